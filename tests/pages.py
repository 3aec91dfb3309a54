"""Python blocks of a page of Markdown, which run in order and print what the page shows below them."""

import contextlib
import io
import pathlib
import re

import torch

import bench

ROOT = pathlib.Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n(About:\n\n)?```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
UNITS = "s|ms|us|kB|MB|GB|MiB|GiB|TB|MB/s|GB/s|TB/s|GFLOP/s|nats|instructions"
FIGURE = re.compile(rf"(?<![\w.])(?<!section )\d[\d,]*\.\d+(?!\.?\d)|\d[\d,]*(?= (?:{UNITS})(?!\w))")


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


def run(path):
    """Runs the blocks of a page in one namespace; errors name the page's own lines.

    Returns (blocks, those with a text below them); AssertionError where one prints something else.
    """
    text, namespace, shown = path.read_text(encoding="utf-8"), {}, 0
    with torch.random.fork_rng():
        for match in BLOCK.finditer(text):
            code, about, expected = match.groups()
            line, printed = text.count("\n", 0, match.start(1)), io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * line + code, path, "exec"), namespace)  # so that errors name the page's lines
            different = differences(expected or "", printed.getvalue(), bool(about))
            assert not different, f"the block at line {line + 1} prints\n{printed.getvalue()}\n{different}"
            shown += bool(expected)
    found = len(BLOCK.findall(text))
    assert found == text.count("```python\n")
    return found, shown


def named_sources(paragraph):
    """Returns what a paragraph names: sections of LOG.md by quoted headings, README.md, results of bench.py's cases."""
    log, found = (ROOT / "LOG.md").read_text(encoding="utf-8"), []
    for quoted in re.findall(r'LOG\.md, "([^"]+)"', " ".join(paragraph.split())):
        sections = [section for section in log.split("\n## ") if quoted in section.splitlines()[0]]
        assert sections, f"LOG.md has no heading {quoted}"
        found += sections
    if "(README.md" in paragraph:
        found.append((ROOT / "README.md").read_text(encoding="utf-8"))
    for case in re.findall(r"bench\.py (\w+)", paragraph):
        rows = bench.results_of(ROOT / "results", case)
        found.append(f"{bench.table(case, rows)} {rows}")
    return "".join(found)


def figures_without_source(text, sources=named_sources):
    """Returns the figures of a page that stand neither in its blocks nor where their paragraph says.

    Figures are numbers with a decimal point and numbers with a unit.
    """
    blocks = "".join(re.findall(r"^```.*?^```$", text, re.DOTALL | re.MULTILINE))
    prose = re.sub(r"^```.*?^```$", "", text.partition("\nSources: ")[0], flags=re.DOTALL | re.MULTILINE)
    return [
        (figure, paragraph)
        for paragraph in re.split(r"\n\n(?!\|)", prose)  # a table belongs to what is above it
        if not paragraph.startswith("    ")  # code
        for figure in FIGURE.findall(paragraph)
        if not re.search(rf"(?<![\d.,]){re.escape(figure)}(?!\d)", blocks + sources(paragraph))
    ]
