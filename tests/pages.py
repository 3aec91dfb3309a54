"""Python blocks of a page of Markdown."""

import re


def blocks(path):
    """Returns the Python blocks of a page, each preceded by as many blank lines as stand above it there."""
    text, found = path.read_text(encoding="utf-8"), []
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        found.append("\n" * text.count("\n", 0, match.start(1)) + match[1])
    return found


def run(path):
    """Runs the blocks of a page in one namespace; errors name the page's own lines. Returns their number."""
    found, namespace = blocks(path), {}
    for block in found:
        exec(compile(block, path, "exec"), namespace)
    return len(found)
