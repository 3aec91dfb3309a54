"""The Python blocks of the lessons run as they stand."""

import pathlib

import pages
import pytest
import torch

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
