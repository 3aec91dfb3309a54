"""The pages for a browser are drawn from the Markdown as it is now, and their links lead somewhere."""

import importlib.util
import pathlib
import re

import pytest

pytest.importorskip("markdown_it")
DOCS = pathlib.Path(__file__).parent.parent / "docs"
spec = importlib.util.spec_from_file_location("make", DOCS / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


@pytest.mark.parametrize("page", make.PAGES)
def test_pages_are_drawn_from_the_text(page):
    assert (DOCS / page).read_text(encoding="utf-8") == make.html(page), "run python docs/make.py"


def test_links_lead_somewhere():
    """Between pages, to files and to headings; nothing is fetched from elsewhere."""
    pages = {page: make.html(page) for page in make.PAGES}
    for page, text in pages.items():
        assert not re.search(r"<script|src=\"https?:|@import", text)
        for target in re.findall(r'(?:href|src)="([^"]+)"', text):
            path, _, part = target.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            assert not path or (DOCS / path).exists(), (page, target)
            within = pages.get(path or page)
            assert not part or within is None or f'id="{part}"' in within, (page, target)


def test_headings_are_named_as_on_github():
    taken = {}
    names = [make.anchor(h, taken) for h in ("2. Bytes, and why 30,522 hurts", "What is `this`?", "What is this")]
    assert names == ["2-bytes-and-why-30522-hurts", "what-is-this", "what-is-this-1"]


def test_links_of_markdown_become_pages():
    assert make.linked("../kernels/README.md#2-bytes", "minidistil/README.md") == "kernels.html#2-bytes"
    assert make.linked("distill_kl.py", "kernels/README.md") == "../kernels/distill_kl.py"
    assert make.linked("https://a.b/c", "README.md") == "https://a.b/c"
