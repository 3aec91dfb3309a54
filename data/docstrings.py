"""The `docstrings` corpus: English from the documentation strings of installed Python packages.

Extracted with `ast` from the standard library, torch, numpy, sympy and networkx, in sorted order, so the same versions
give the same text on every run. Only prose is kept: no doctests, code and formula blocks, tables or reStructuredText
markers.
"""

import ast
import gc
import importlib.util
import inspect
import os
import pathlib
import re
import sysconfig
import warnings

PACKAGES = ("torch", "numpy", "sympy", "networkx")
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "testing", "idle_test", "lib2to3"}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_MINIMUM_WORDS = 5


def python_files():
    """Returns the sorted paths of the source files of `docstrings`, without packages that are not installed."""
    roots = [sysconfig.get_path("stdlib")]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        roots += list(spec.submodule_search_locations or []) if spec else []
    files = []
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
            files += [os.path.join(folder, name) for name in sorted(names) if name.endswith(".py")]
    return files


def harvest(paths):
    """Returns the documents of some Python files, in order: one per docstring with a sentence of prose."""
    documents = []
    collecting = gc.isenabled()
    gc.disable()  # syntax trees are millions of small objects without cycles: collecting them doubles the time
    try:
        for path in paths:
            source = pathlib.Path(path).read_bytes()
            if b'"""' in source or b"'''" in source:
                documents += map(prose, _docstrings(source))
    finally:
        if collecting:
            gc.enable()
    return [text for text in documents if len(re.findall(r"[A-Za-z]{2,}", text)) >= _MINIMUM_WORDS]


def _docstrings(source):
    """Yields the docstrings of one source file, outer before inner; none where it is not valid Python."""
    try:
        with warnings.catch_warnings():  # such as "\d" in a plain string
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):  # templates, or another version of Python
        return
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, *_FUNCTIONS)):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield text
        elif isinstance(node, ast.Expr):
            yield from _attached(node.value)
        # statements only: expressions contain no docstrings, and are most of a tree
        if not isinstance(node, _FUNCTIONS):
            for part in ("orelse", "body"):
                waiting += reversed(getattr(node, part, ()))


def _attached(call):
    """Yields the text of `add_docstr(torch.abs, "...")` and numpy's `add_newdoc(..., "...")`."""
    name = getattr(call, "func", None)
    if isinstance(call, ast.Call) and re.search("add.*doc", getattr(name, "id", getattr(name, "attr", ""))):
        for node in ast.walk(call):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" in node.value:
                yield node.value


# lines without prose: underlines, table borders, placeholders, headings of removed doctests
_NOISE = re.compile(r"([-=~^\"'*+#_.|: ]+|\{\w+\}|Examples?:*)$")
_DIRECTIVE = re.compile(r"\.\. +([\w:+-]+?) *::\s*")
_NO_PROSE = set(
    "autoclass autofunction automethod automodule autosummary class code code-block currentmodule doctest figure "
    "function graphviz highlight image include ipython math method module parsed-literal plot sourcecode testcode "
    "testoutput testsetup toctree".split()
)
_FORMULA = re.compile(r":math:`[^`]*`")
_ROLE = re.compile(r"(?::[A-Za-z][\w.+-]*)+:`~?")
_LINK = re.compile(r"`([^`<>]+)<[^`<>]*>`_*")
_EMPHASIS = re.compile(r"(?<![\w*])\*\*?(\w[^*\n]*)\*\*?(?![\w*])")


def prose(docstring):
    """Returns the readable part of a docstring: no doctests, code or formula blocks, rules, roles or directives."""
    kept = []
    in_doctest = in_fence = False
    block = None  # indentation of the line that opened a block without prose
    for line in inspect.cleandoc(docstring).split("\n"):
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if text.startswith("```"):
            in_fence = not in_fence
            continue
        if block is not None and text and indent <= block:
            block = None
        if not text:
            in_doctest = False
        elif text.startswith(">>>"):
            in_doctest = True
        if in_fence or in_doctest or block is not None or _NOISE.match(text) or _is_formula(text):
            continue
        directive = _DIRECTIVE.match(text)
        if directive and directive[1] in _NO_PROSE:
            block = indent
            continue
        if directive:
            text = text[directive.end() :].lstrip("0123456789.")  # versionadded:: 2.1
        elif text.endswith("::"):  # the indented block that follows is code
            block = indent
            text = text[:-1] if len(text) > 2 else ""
        kept.append(_plain(text))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def _is_formula(line):
    return line.startswith("$$") or line.count("\\") > 2


def _plain(line):
    """Returns a line without inline markup; a formula that reads as text, such as n or 2x, stays."""
    if "`" in line:
        line = _FORMULA.sub(lambda m: "" if "\\" in m[0] else m[0], line)
        line = _LINK.sub(r"\1", _ROLE.sub("`", line)).replace("`", "")
    return _EMPHASIS.sub(r"\1", line) if "*" in line else line
