"""The lesson in minidistil/README.md: its blocks run in order and print what the page shows below them."""

import json
import pathlib

import pages
import pytest
from pictures import svg_texts

from benches import temperature

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "minidistil" / "README.md"


@pytest.fixture(scope="module")
def text():
    return PAGE.read_text(encoding="utf-8")


def test_blocks_run_and_print_what_the_page_shows(monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks, shown = pages.run(PAGE)
    assert blocks > shown >= 12


def test_every_figure_has_its_source(text):
    """A figure in the prose is printed by a block or in its code, or is where its paragraph says."""
    assert pages.figures_without_source(text) == []
    assert len(pages.figures_without_source(text, lambda paragraph: "")) > 5


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
