"""Output folders: claimed by one process, started again, waited for; the commands that take a run up again."""

import os
import pathlib
import shlex
import subprocess
import sys

import pytest

from minidistil import folder
from minidistil.errors import UserError
from minidistil.folder import CHECKPOINT, LOCK, check_room, claimed, command, inheritable, one_at_a_time

ROOT = pathlib.Path(__file__).resolve().parent.parent
HOLDS = """
import pathlib, sys
from minidistil.folder import claimed, one_at_a_time
path = pathlib.Path(sys.argv[2])
with claimed(path, "x", False, "marker") if sys.argv[1] == "claimed" else one_at_a_time(path):
    print("held", flush=True)
    sys.stdin.readline()
    (path / "metrics.jsonl").touch()
"""


def holder(kind, path):
    """Starts a process that holds `path` until it reads a line."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    process = subprocess.Popen([sys.executable, "-c", HOLDS, kind, str(path)], **pipes)
    assert process.stdout.readline() == "held\n"
    return process


def test_one_process_at_a_time(tmp_path):
    out = tmp_path / "deep" / "out"
    process = holder("claimed", out)
    for resume in (False, True):
        with pytest.raises(UserError, match="another process is writing into .*out" if not resume else "no marker"):
            with claimed(out, "x", resume, "marker"):
                pass
    process.kill()  # without a chance to tidy up: the folder is free, because nothing is in it
    process.wait()
    assert (out / LOCK).exists()
    with claimed(out, "x", False, "marker") as found:
        assert found == out
        (out / "marker").touch()
    with pytest.raises(UserError, match="not empty: add --resume to continue"):
        with claimed(out, "x", False, "marker"):
            pass
    with claimed(out, "x", True, "marker"):
        pass
    assert (out / "marker").exists()


@pytest.mark.parametrize("left", [["metrics.jsonl"], ["checkpoint/.state.safetensors.17.tmp"], []])
def test_a_run_without_a_checkpoint_starts_again(left, tmp_path):
    """And half a file of a killed run goes."""
    (tmp_path / "checkpoint").mkdir()
    for name in left:
        (tmp_path / name).write_text("half")
    with claimed(tmp_path, "x", False, CHECKPOINT):
        assert not list(tmp_path.rglob("*.tmp"))
        (tmp_path / CHECKPOINT).touch()
    assert (tmp_path / CHECKPOINT).exists()


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors", ".hidden"])
def test_a_folder_of_something_else_is_left_alone(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="not empty: choose another --out"):
        with claimed(tmp_path, "x", False, CHECKPOINT):
            pass
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine"
    mine.mkdir()
    for out in (None, "new", "mine"):
        with pytest.raises(ZeroDivisionError), claimed(out, "x", False, CHECKPOINT) as found:
            assert (found / LOCK).exists()
            1 / 0  # noqa: B018
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "runs"]
    assert not list(mine.iterdir()) and not list((tmp_path / "runs").iterdir())


def test_the_first_free_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with claimed(None, "x", False, "marker") as a, claimed(None, "x", False, "marker") as b:
        assert [a, b] == [pathlib.Path("runs/x"), pathlib.Path("runs/x-2")]
        (b / "marker").touch()
    with claimed(None, "x", False, "marker") as c:  # `a` was empty, and is gone
        assert c == pathlib.Path("runs/x")


def test_the_second_waits(tmp_path, capfd):
    """A corpus that two runs need is made by one of them."""
    target = tmp_path / "corpus"
    target.mkdir()
    process = holder("one_at_a_time", target)
    code = HOLDS.replace("sys.stdin.readline()", "assert (path / 'metrics.jsonl').exists()")
    pipes = dict(stdout=subprocess.PIPE, text=True, cwd=ROOT)
    second = subprocess.Popen([sys.executable, "-c", code, "one_at_a_time", str(target)], **pipes)
    assert second.stdout.readline() == f"another process is making {target}: waiting for it\n"
    process.communicate("go on\n")
    assert second.communicate(timeout=30)[0] == "held\n" and second.returncode == 0
    with one_at_a_time(target):
        pass


def test_room(tmp_path):
    check_room(tmp_path, 1000)
    with pytest.raises(UserError, match="MiB free, and this run writes 1,048,576,000,000 MiB: free some space"):
        check_room(tmp_path, 10**6 * 2**40)


def test_settings_that_a_resumed_run_inherits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    given = {"data": "here", "teacher": "here,bert-base-uncased", "model": None, "kd_rows": "here", "lr": 0.1,
             "out": "here", "resume": True, "time_limit": 3.0}  # fmt: skip
    here = str(tmp_path / "here")
    expected = {"data": here, "teacher": f"{here},bert-base-uncased", "model": None, "kd_rows": "here", "lr": 0.1}
    assert inheritable(given, ("data", "teacher", "model")) == expected
    keywords = {"teacher": "none", "student_init": "random", "model": "bilstm"}
    for name in keywords.values():
        (tmp_path / name).mkdir()
    assert inheritable(keywords, tuple(keywords)) == keywords


@pytest.mark.parametrize("typed, start", [("train.py", "train.py"), (str(ROOT / "train.py"), str(ROOT / "sample.py")),
                                          ("/usr/bin/pytest", "sample.py")])  # fmt: skip
def test_commands_start_where_the_user_stood(typed, start, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT if typed == "train.py" else tmp_path)
    monkeypatch.setattr(sys, "argv", [typed])
    script = pathlib.Path(start).name
    for found, python in ((sys.executable, "python"), ("/elsewhere/python", sys.executable), (None, sys.executable)):
        monkeypatch.setattr(folder.shutil, "which", lambda name, found=found: found)
        words = shlex.split(command(script, "--out", pathlib.Path("a b"), "--resume"))
        assert words == [python, start, "--out", "a b", "--resume"]
    launched = command(script, launcher=["torchrun", "--nproc-per-node", "2"])
    assert launched == f"torchrun --nproc-per-node 2 {start}" and os.path.sep not in script
