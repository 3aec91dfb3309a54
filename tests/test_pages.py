"""The Python blocks of the lessons run as they stand, and their figures are those of results/."""

import json
import pathlib

import pages
import pytest
import torch

from benches import lesson

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("page, least", [("kernels/README.md", 6)])
def test_blocks_run(page, least):
    with torch.random.fork_rng():
        assert pages.run(ROOT / page) >= least


def test_a_wrong_formula_is_noticed(tmp_path):
    """And named with its line."""
    text = (ROOT / "kernels" / "README.md").read_text()
    page = tmp_path / "page.md"
    page.write_text(text.replace("(cos * a / m_a - b / m_b) / m_a", "(cos * a - b / m_b) / m_a"))
    with torch.random.fork_rng(), pytest.raises(AssertionError) as error:
        pages.run(page)
    line = error.traceback[-1].lineno + 1
    assert page.read_text().splitlines()[line - 1].startswith("assert torch.allclose(da,")


def test_the_ladder_of_the_page_was_measured():
    rows = json.loads((ROOT / "results" / "lesson.json").read_text())["results"]
    page = (ROOT / "kernels" / "README.md").read_text()
    assert lesson.table(rows) in page and len(rows) == 8
    assert all(f"../results/{name}.svg" in page for name in ("lesson", "lesson-row", "lesson-chunk"))
