"""The lesson in minidistil/README.md: its blocks run in order and print what the page shows below them."""

import contextlib
import io
import json
import pathlib
import re

import pytest
import torch
from pictures import svg_texts

from benches import temperature

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "minidistil" / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n(About:\n\n)?```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def differences(shown, printed, about=False):
    """Returns what differs: words, or numbers by more than one in the last digit shown; `about`: by a third."""
    words = [" ".join(NUMBER.sub("#", text).split()) for text in (shown, printed)]
    if words[0] != words[1]:
        return [words]
    found = []
    for pair in zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True):
        a, b = (float(number.replace(",", "")) for number in pair)
        unit = 10.0 ** -len(pair[0].partition(".")[2])
        if abs(a - b) > 1.001 * unit + about * max(a, b) / 3:
            found.append(pair)
    return found


def test_differences_are_noticed():
    assert not differences("kl   0.218 of 1,000", "kl 0.219 of 1,000") and differences("kl 0.218", "kl 0.220")
    assert differences("kl 1", "ce 1") and differences("1 2", "1 2 3") and differences("-1", "1")
    assert not differences("0.30", "0.39", about=True) and differences("0.30", "0.60", about=True)


@pytest.fixture(scope="module")
def text():
    return PAGE.read_text(encoding="utf-8")


def test_blocks_run_and_print_what_the_page_shows(text, monkeypatch):
    monkeypatch.chdir(ROOT)
    namespace, shown = {}, 0
    with torch.random.fork_rng():
        for match in BLOCK.finditer(text):
            code, about, expected = match.groups()
            line, printed = text.count("\n", 0, match.start(1)), io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * line + code, PAGE, "exec"), namespace)  # so that errors name the page's lines
            different = differences(expected or "", printed.getvalue(), bool(about))
            assert not different, f"the block at line {line + 1} prints\n{printed.getvalue()}\n{different}"
            shown += bool(expected)
    assert shown >= 12 and text.count("```python\n") == len(BLOCK.findall(text)) > shown


def named_sources(paragraph):
    """The sections of LOG.md whose headings a paragraph quotes, and README.md where it is named."""
    log, found = (ROOT / "LOG.md").read_text(encoding="utf-8"), []
    for quoted in re.findall(r'LOG\.md, "([^"]+)"', " ".join(paragraph.split())):
        sections = [section for section in log.split("\n## ") if quoted in section.splitlines()[0]]
        assert sections, f"LOG.md has no heading {quoted}"
        found += sections
    if "(README.md" in paragraph:
        found.append((ROOT / "README.md").read_text(encoding="utf-8"))
    return "".join(found)


def test_every_figure_has_its_source(text):
    """A figure in the prose is printed by a block or in its code, or is where its paragraph says."""
    blocks = "".join(re.findall(r"^```.*?^```$", text, re.DOTALL | re.MULTILINE))
    prose = re.sub(r"^```.*?^```$", "", text.partition("\nSources: ")[0], flags=re.DOTALL | re.MULTILINE)
    checked = 0
    for paragraph in prose.split("\n\n"):
        sources = blocks + named_sources(paragraph)
        for figure in re.findall(r"(?<![\w.])(?<!section )\d+\.\d+(?!\.?\d)|\d+(?= s\b)", paragraph):
            found = re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", sources)
            assert found, f"{figure} has no source: {paragraph}"
            checked += 1
    assert checked > 10


def test_the_picture_shows_the_teacher(text):
    """results/temperature.json is what the shipped teacher says, and its picture is drawn from it."""
    stored = json.loads((ROOT / "results" / "temperature.json").read_text(encoding="utf-8"))["results"]
    drawn = set(svg_texts(ROOT / "results" / "temperature.svg"))
    for row, now in zip(stored, temperature.bench(temperature.Settings()), strict=True):
        (words, shares), (words_now, shares_now) = (zip(*r["guesses"], strict=True) for r in (row, now))
        assert (row["prompt"], row["provider"], words) == (now["prompt"], now["provider"], words_now)
        assert shares == pytest.approx(shares_now, abs=1e-4)
        assert {f"temperature {row['provider']}", *words, *(f"{share:.2%}" for share in shares)} <= drawn
    assert [share for _, share in stored[0]["guesses"]] == [1.0] + [0.0] * 19
    assert len({share for _, share in stored[-1]["guesses"]}) == 1 and "../results/temperature.svg" in text
