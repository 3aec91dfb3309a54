"""Paths are bytes: a name that is not UTF-8 is a name like any other, in every locale."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from data.prepare import prepare
from minidistil import files
from minidistil.data import Corpus
from minidistil.safetensors import read_safetensors, write_safetensors

ROOT = pathlib.Path(__file__).resolve().parent.parent
OLD = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # a locale of ASCII


@pytest.fixture
def folder(tmp_path):
    path = pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/t\xe9xtes"))
    try:
        path.mkdir()
    except OSError:
        pytest.skip("this file system wants UTF-8")
    (path / "text.txt").write_text("\n".join(f"a cat {i} sat there" for i in range(300)))
    return path


def test_a_corpus(folder):
    meta = prepare([folder / "text.txt"], ROOT / "data" / "demo", folder / "corpus", workers=2, progress=False)
    stored = json.loads((folder / "corpus" / "meta.json").read_text(encoding="utf-8"))
    assert stored == meta and stored["sources"] == [str(folder / "text.txt")]
    assert len(Corpus(folder / "corpus").train) == meta["tokens"]["train"]


@pytest.mark.parametrize("locale", [{}, OLD])
@pytest.mark.parametrize("script", ["prepare.py", "vocab.py"])
def test_command_lines(folder, locale, script):
    more = ["--vocab", ROOT / "data" / "demo"] if script == "prepare.py" else ["--size", "200"]
    source, out = folder, folder / "out"
    (folder / "b.csv").write_text("text\nthe dog\n")
    command = [sys.executable, ROOT / "data" / script, source, *more, "--out", out, "--workers", "1"]
    done = subprocess.run(command, env={**os.environ, **locale}, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout.splitlines()[-1])["out"].startswith(str(folder.parent))
    assert (out / "vocab.txt").exists()


def test_json(folder):
    for value in (str(folder), "é 中 \\udce9 \n"):
        files.write_json(folder / "x.json", {"path": value})
        assert json.loads((folder / "x.json").read_bytes().decode("utf-8")) == {"path": value}
    assert "é 中" in (folder / "x.json").read_text(encoding="utf-8")  # what is text stays readable


def test_tensors(folder):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.int8)}
    write_safetensors(folder / "x.safetensors", tensors, {"info": str(folder.parent)}, checksum=True)
    found, _ = read_safetensors(folder / "x.safetensors", checksum=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    found["a"][0, 0] = 7  # the map is private
    assert read_safetensors(folder / "x.safetensors", checksum=True)[0]["a"][0, 0] == 0


def test_output_that_a_terminal_cannot_show(folder):
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from minidistil.cli import run_script\n"
    program += "run_script(lambda argv: print(argv[0]))"
    done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, timeout=60)
    assert done.returncode == 0 and b"t\\udce9xtes" in done.stdout, done.stderr
