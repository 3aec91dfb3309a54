"""The layout of the program: direction of imports, lengths of files and functions, what a light import leaves out."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = ("train", "finetune", "sample", "export", "bench")
PRODUCT = [
    path
    for pattern in ("*.py", "minidistil/**/*.py", "kernels/*.py", "data/**/*.py", "benches/**/*.py")
    for path in sorted(ROOT.glob(pattern))
    if not {"cache", "__pycache__"} & set(path.relative_to(ROOT).parts)
]


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PRODUCT}


def layer(module):
    """The folder that a module belongs to: scripts, benches, data, minidistil with its own folders, or kernels."""
    if module in SCRIPTS:
        return "scripts"
    inner = re.match(r"minidistil\.(downstream|export)\b", module)
    return inner[0] if inner else module.split(".")[0]


def imports(module):
    """Returns the modules of ours that a module imports, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            inside = [name for name in members if name in MODULES]
            # `from package import module` needs the package itself only where it takes something else from it
            names = inside + ([node.module] if len(inside) < len(members) else [])
        else:
            continue
        found |= {name for name in names if name in MODULES}
    return found - {module}


GRAPH = {module: imports(module) for module in MODULES}

# what each layer may import besides its own modules; train.py runs data.cached for the docstring corpus
ALLOWED = {
    "kernels": set(),
    "minidistil": {"kernels"},
    "minidistil.downstream": {"minidistil", "kernels"},
    "minidistil.export": {"minidistil.downstream", "minidistil", "kernels"},
    "data": {"minidistil"},
    "scripts": {"minidistil.export", "minidistil.downstream", "minidistil", "kernels", "data", "benches"},
    "benches": {"scripts", "minidistil.export", "minidistil.downstream", "minidistil", "kernels", "data"},
}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    own = layer(module)
    for imported in GRAPH[module]:
        assert layer(imported) == own or layer(imported) in ALLOWED[own], f"{module} imports {imported}"
    if own == "scripts":  # bench.py runs the cases; no other script knows them, and none imports another script
        assert module == "bench" or not any(layer(imported) == "benches" for imported in GRAPH[module])
        assert not any(layer(imported) == "scripts" for imported in GRAPH[module])
    if module in ("train", "sample"):  # the core works without fine-tuning
        assert not any(layer(imported) == "minidistil.downstream" for imported in GRAPH[module])
    if own != "benches":  # for one script, whose libraries no other needs
        assert (
            module == "export"
            or own == "minidistil.export"
            or not any(layer(imported) == "minidistil.export" for imported in GRAPH[module])
        )


def cycle(graph):
    """Returns the modules of one import cycle, in order, or None."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return path[path.index(module) :] + [module]
        if module in done:
            return None
        path.append(module)
        found = next((c for c in map(visit, sorted(graph[module])) if c), None)
        path.pop()
        done.add(module)
        return found

    return next((c for c in map(visit, sorted(graph)) if c), None)


def test_no_import_cycles():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    rooms = {m for m in MODULES if layer(m) == "kernels" or layer(m).startswith("minidistil")}
    assert cycle({m: GRAPH[m] & rooms for m in rooms}) is None


def functions(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield node.name, node.end_lineno - min([node.lineno, *(d.lineno for d in node.decorator_list)]) + 1


def lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def test_sizes():
    """Limits that keep a file readable in one sitting."""
    assert lines(ROOT / "train.py") <= 350 and lines(ROOT / "finetune.py") <= 300
    assert dict(functions(ROOT / "train.py"))["train"] <= 120
    for path in PRODUCT:
        for name, length in functions(path):
            assert length <= 120, f"{path}: {name} has {length} lines"
        if layer(module_name(path)) in ("kernels", "data") or layer(module_name(path)).startswith("minidistil"):
            assert lines(path) <= 450, path


def test_token_types_are_known_in_few_places():
    """Other modules ask a Config for its family, not whether it has token types."""
    known = {path.relative_to(ROOT).as_posix() for path in PRODUCT if "token_types" in path.read_text(encoding="utf-8")}
    assert known <= {f"minidistil/{name}.py" for name in ("model", "families", "weights", "student")}


@pytest.mark.parametrize("module", ["train", "export", "bench", "minidistil.data", "data.prepare"])
def test_imports_are_light(module):
    """No script needs matplotlib, transformers or the libraries of ONNX to begin; preparing text needs no PyTorch."""
    heavy = {"matplotlib", "transformers", "onnx", "onnxscript", "onnxruntime"}
    heavy |= {"torch", "triton"} if "data" in module else set()
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
