"""The Python blocks of kernels/README.md run as they stand, and each figure of the page has its source."""

import pathlib

import pages
import pytest

import bench
from benches import lesson

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "kernels" / "README.md"


def test_blocks_run_and_print_what_the_page_shows():
    blocks, shown = pages.run(PAGE)
    assert blocks >= 11 and shown >= 5


def test_a_wrong_formula_is_noticed(tmp_path):
    """And named with its line."""
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text().replace("(cos * a / m_a - b / m_b) / m_a", "(cos * a - b / m_b) / m_a"))
    with pytest.raises(AssertionError) as error:
        pages.run(page)
    line = error.traceback[-1].lineno + 1
    assert page.read_text().splitlines()[line - 1].startswith("assert torch.allclose(da,")


def test_a_wrong_figure_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint('kl', 0.2184)\n```\n\n```text\nkl 0.220\n```\n")
    with pytest.raises(AssertionError, match="the block at line 2 prints"):
        pages.run(page)


def test_differences_are_noticed():
    differences = pages.differences
    assert not differences("kl   0.218 of 1,000", "kl 0.219 of 1,000") and differences("kl 0.218", "kl 0.220")
    assert differences("kl 1", "ce 1") and differences("1 2", "1 2 3") and differences("-1", "1")
    assert not differences("0.30", "0.39", about=True) and differences("0.30", "0.60", about=True)


def test_every_figure_has_its_source():
    """Printed by a block or in its code, in a result of a named command, or checked by test_cross_compile.py."""

    def sources(paragraph):
        return pages.named_sources(paragraph) + paragraph * ("tests/cross_compile.py" in paragraph)

    text = PAGE.read_text(encoding="utf-8")
    assert pages.figures_without_source(text, sources) == []
    assert len(pages.figures_without_source(text, lambda paragraph: "")) > 20


def test_tables_were_measured():
    page = PAGE.read_text(encoding="utf-8")
    ladder, roofline = (bench.results_of(ROOT / "results", name) for name in ("lesson", "roofline"))
    assert lesson.table(ladder) in page and len(ladder) == 8 and bench.table("roofline", roofline) in page
    assert all(f"../results/{name}.svg" in page for name in ("lesson", "lesson-row", "lesson-chunk", "roofline"))
