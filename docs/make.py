"""Draws the pages for a browser from the Markdown that GitHub shows: README.md and the two lessons.

    python docs/make.py                 writes docs/*.html
    python -m http.server               then http://localhost:8000/docs/

Needs markdown-it-py (requirements-dev.txt). The pages have no script and fetch nothing but the pictures in results/.
"""

import pathlib
import re

from markdown_it import MarkdownIt

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = {  # file: (Markdown, name in the navigation)
    "index.html": ("README.md", "minidistil"),
    "distillation.html": ("minidistil/README.md", "The lesson of distillation"),
    "kernels.html": ("kernels/README.md", "The lesson of the kernels"),
}


def linked(target, source):
    """Returns a link of the Markdown file `source` as the page in docs/ has it: to a page, where it is one."""
    if re.match(r"[a-z]+:|#", target):
        return target
    path, _, part = target.partition("#")
    path = ((ROOT / source).parent / path).resolve().relative_to(ROOT).as_posix()
    page = next((page for page, (markdown, _) in PAGES.items() if markdown == path), f"../{path}")
    return page + (f"#{part}" if part else "")


def anchor(heading, taken):
    """Returns the name of a heading in links, as GitHub makes it."""
    name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
    taken[name] = taken.get(name, -1) + 1
    return f"{name}-{taken[name]}" if taken[name] else name


def html(page):
    """Returns a page as HTML."""
    source, title = PAGES[page]
    parser, taken = MarkdownIt("commonmark", {"html": True}).enable("table"), {}
    tokens = parser.parse((ROOT / source).read_text(encoding="utf-8"))
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            token.attrSet("id", anchor(tokens[i + 1].content, taken))
        for child in token.children or ():
            for name in ("href", "src"):
                if target := child.attrGet(name):
                    child.attrSet(name, linked(target, source))
    body = parser.renderer.render(tokens, parser.options, {})
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    names = {other: name for other, (_, name) in PAGES.items()}
    links = (f'<a href="{other}"{" aria-current=page" * (other == page)}>{name}</a>' for other, name in names.items())
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="stylesheet" href="style.css">\n<nav>{" ".join(links)}</nav>\n<main>\n{body}</main>\n</html>\n'
    )


if __name__ == "__main__":
    for page, (source, _) in PAGES.items():
        (ROOT / "docs" / page).write_text(html(page), encoding="utf-8")
        print(f"docs/{page}, from {source}")
