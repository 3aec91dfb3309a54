"""`pip install .` installs what the scripts need, and no module of ours."""

import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import minidistil

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_pip_installs_the_requirements_alone(tmp_path):
    """Without a network: from the setuptools that is here, into a folder of its own."""
    setuptools = pytest.importorskip("setuptools", minversion="64")
    if int(setuptools.__version__.split(".")[0]) < 70:
        pytest.importorskip("wheel", reason="setuptools before 70.1 leaves making wheels to it")
    pytest.importorskip("pip")
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    large = "runs results cache __pycache__ node_modules *.safetensors *.bin *.egg-info".split()
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".*", *large))
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--target"]
    done = subprocess.run([*command, str(site), str(checkout)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (distribution,) = importlib.metadata.distributions(path=[str(site)])
    assert distribution.name == "minidistil" and distribution.version == minidistil.__version__
    assert [path.name for path in site.iterdir() if path.suffix != ".dist-info"] == []
    lines = re.findall(r"^[\w].*", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert len(distribution.requires) == len(lines) > 5
    for needed, line in zip(distribution.requires, lines, strict=True):
        assert re.match(r"[\w-]+", needed)[0] == re.match(r"[\w-]+", line)[0]


def test_the_readme_installs_a_torch_that_the_requirements_keep():
    """Another range would let pip replace PyTorch for CPUs by gigabytes of CUDA."""
    (wanted,) = re.findall(r"^torch.*", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert f'pip install "{wanted}" --index-url' in (ROOT / "README.md").read_text()


def test_the_oldest_python_is_the_same_everywhere():
    oldest = re.search(r'requires-python = ">=(.*?)"', (ROOT / "pyproject.toml").read_text())[1]
    assert f"Python {oldest} to 3.13" in (ROOT / "README.md").read_text()


def test_windows_gets_one_line():
    done = subprocess.run(
        [sys.executable, "-c", "import os; os.name = 'nt'; import minidistil"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "WSL" in done.stderr and done.stderr.count("\n") == 1
