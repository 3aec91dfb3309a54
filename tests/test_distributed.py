"""Two processes under torchrun are the same program: same parameters, same bits on resume, one line when one dies."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from forked import Script, call, call_ranks, ranks
from same_layers import assert_same_layers

import train
from minidistil import cli, launcher
from minidistil.distributed import Distributed
from minidistil.errors import UserError
from minidistil.model import Config, LanguageModel
from minidistil.run import CHECKPOINT, load_checkpoint, read_metrics
from minidistil.safetensors import read_safetensors

ROOT = pathlib.Path(train.__file__).parent
STEPS = 5


def flags(tiny, out, **settings):
    settings = dict(teacher=tiny / "teacher", data=tiny / "corpus", seq_len=32, steps=STEPS, dtype="fp32",
                    device="cpu", eval_every=100, eval_tokens=256, out=out) | settings  # fmt: skip
    words = [[f"--{name.replace('_', '-')}", str(value)] for name, value in settings.items() if value is not True]
    words += [[f"--{name}"] for name, value in settings.items() if value is True]
    return [word for pair in words for word in pair]


def words(tiny, out, **settings):
    return [ROOT / "train.py", *flags(tiny, out, **settings)]


def torchrun(tiny, out, start=subprocess.run, **settings):
    """Starts train.py on two ranks as users do, by `start` of subprocess."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return start([*command, *words(tiny, out, **settings)], env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def parameters(out):
    tensors, metadata = read_safetensors(out / CHECKPOINT, checksum=True)
    student = {name: tensor.double() for name, tensor in tensors.items() if name.startswith("student.")}
    return student, json.loads(metadata["info"])


def launched(monkeypatch, rank, size, local=None, port=29500):
    """The environment of a process that torchrun started."""
    values = (rank, size, rank if local is None else local, "127.0.0.1", port)
    for name, value in zip(launcher.VARIABLES, values, strict=True):
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("rank, local, turns_before", [(0, 0, 0), (8, 0, 1), (9, 1, 2), (1, 1, 2)])
def test_the_first_of_each_machine_comes_before_its_others(rank, local, turns_before, monkeypatch):
    """Two machines of eight ranks: what is fetched by one is there when the next look for it."""
    launched(monkeypatch, rank, 16, local)
    events = []
    monkeypatch.setattr(torch.distributed, "barrier", lambda: events.append("barrier"))
    assert Distributed().rank0_first(lambda: events.append("made") or "it") == "it"
    assert events.index("made") == turns_before and events.count("barrier") == 3


def test_every_rank_knows_the_values_of_all(monkeypatch):
    """GPUs may have room for different micro-batches, and an update must be cut alike on all."""
    assert Distributed().gather(7) == [7]
    launched(monkeypatch, 1, 3)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda room, mine: room.__setitem__(
        slice(None), [9, mine, 8]))  # fmt: skip
    assert Distributed().gather(7) == [9, 7, 8]


# ---- half a launch


ALL = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")


@pytest.mark.parametrize("values, expected", [
    ({}, (0, 1, 0, "")),
    (dict(MASTER_ADDR="head", MASTER_PORT="29500"), (0, 1, 0, "")),
    (dict(WORLD_SIZE="1"), (0, 1, 0, "")),
    (dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="head", MASTER_PORT="1"), (0, 1, 0, "")),
    (dict.fromkeys(ALL, ""), (0, 1, 0, "")),
    (ALL, (1, 2, 1, "127.0.0.1:29500")),
    (ALL | dict(LOCAL_RANK="0"), (1, 2, 0, "127.0.0.1:29500")),
    (dict(RANK="3"), "has RANK, but no WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start with `torchrun"),
    (dict(RANK="0"), "`unset RANK` for one process"),
    (dict(WORLD_SIZE="2"), "has WORLD_SIZE, but no RANK, LOCAL_RANK"),
    (dict(LOCAL_RANK="0"), "has LOCAL_RANK, but no RANK, WORLD_SIZE"),
    (dict(RANK="3", WORLD_SIZE="1"), "but no LOCAL_RANK"),
    *((ALL | {name: ""}, f", but no {name}: ") for name in ALL),
    (ALL | dict(RANK="one"), "RANK 'one', not a number from 0 on"),
    (ALL | dict(RANK="-1"), "RANK '-1', not a number from 0 on"),
    (ALL | dict(WORLD_SIZE="0"), "WORLD_SIZE '0', not a number from 1 on"),
    (ALL | dict(MASTER_PORT="tcp://1.2.3.4:5"), "MASTER_PORT 'tcp://1.2.3.4:5', not a number"),
    (ALL | dict(MASTER_PORT="70000"), "contradict each other"),
    (ALL | dict(RANK="2"), "RANK 2, WORLD_SIZE 2, "),
    (ALL | dict(RANK="0"), "RANK 0, WORLD_SIZE 2, LOCAL_RANK 1"),
])  # fmt: skip
def test_the_launchers_variables_are_a_set(values, expected, monkeypatch):
    for name in launcher.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, tuple):
        assert launcher.place() == expected and launcher.is_first() == (expected[0] == 0)
        return
    with pytest.raises(UserError) as error:
        Distributed()
    assert expected in str(error.value) and "\n" not in str(error.value) and "`unset " in str(error.value)
    assert launcher.is_first()  # so that the error is said


def failing(argv):
    raise UserError("something is wrong: mend it")


@pytest.mark.parametrize("values, in_ranks, said", [
    (ALL, True, False), (ALL, False, True), (dict(RANK="1"), True, True), (dict(RANK="1"), False, True),
    (ALL | dict(RANK="0", LOCAL_RANK="0"), True, True),
    (ALL | dict(LOCAL_RANK="0"), True, True),  # on another machine, whose files may be others
])  # fmt: skip
def test_errors_are_swallowed_by_other_ranks_of_a_machine_only(values, in_ranks, said, monkeypatch, capsys):
    for name in launcher.VARIABLES:
        monkeypatch.setenv(name, values.get(name, ""))
    with pytest.raises(SystemExit) as end:
        cli.run_script(failing, [], in_ranks)
    assert end.value.code == 1 and bool(capsys.readouterr().err) == said
    assert in_ranks or not any(name in os.environ for name in launcher.VARIABLES)


@pytest.mark.parametrize("rank", [0, 1])
def test_whoever_waits_says_so_and_can_be_interrupted(rank, tiny, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = Script(words(tiny, tmp_path / "out", batch=2, accum=1), environment)
    line = f"rank {rank} of 2 waits for the others at 127.0.0.1:{port}; start them, or press Ctrl-C\n"
    assert line in iter(process.stderr.readline, "")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode not in (0, None) and not (tmp_path / "out").exists()


def test_a_place_that_is_taken_is_said(tiny, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        environment = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", **address}
        done = call(words(tiny, tmp_path / "out", batch=2, accum=1), env=environment)
    (ours,) = [line for line in done.stderr.splitlines() if line.startswith("train.py: error:")]
    assert "rank 0 of 2 has not met the others at 127.0.0.1:" in ours
    assert done.returncode == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("of_rank_1, said", [
    ({"--lr": 1e-5}, {0: "rank 1 has other settings than rank 0 (lr 0.0005 -> 1e-05): give all the same settings",
                      1: "rank 1: rank 1 has other settings"}),
    ({"--batch": 4}, {0: "sequences in an update 4 -> 8"}),
    ({"--data": "absent"}, {0: "rank 0 has lost another rank", 1: "rank 1: absent is no corpus"}),
])  # fmt: skip
def test_ranks_of_two_machines_that_differ(of_rank_1, said, tiny, tmp_path):
    """Nothing is trained, and each says what it knows, in a line."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = []
    for rank, more in enumerate(({}, of_rank_1)):
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", **address}
        given = words(tiny, tmp_path / "out", batch=2, accum=1) + [str(word) for pair in more.items() for word in pair]
        ranks.append(Script(given, environment))
    found = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    for rank, line in said.items():
        assert f"train.py: error: {line}" in found[rank] or line in found[rank]
        assert "Traceback" not in found[rank]


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory):
    """Two ranks, 2 x 4 sequences each, dropout on: (finished process, its folder)."""
    out = tmp_path_factory.mktemp("ranks") / "two"
    done = torchrun(tiny, out, batch=4, accum=2)
    assert done.returncode == 0, done.stderr
    return done, out


def test_two_ranks_are_one(tiny, two, tmp_path):
    """The bound is that of the split into micro-batches."""
    train.main(flags(tiny, tmp_path / "one", batch=8, accum=2))
    one, info = parameters(tmp_path / "one")
    found, _ = parameters(two[1])
    assert info["update"] == STEPS
    assert_same_layers(one, found)
    one, found = ([m for m in read_metrics(out / "metrics.jsonl") if "loss" in m] for out in (tmp_path / "one", two[1]))
    for a, b in zip(one, found, strict=True):
        assert a["step"] == b["step"]
        for name in ("loss", "kl", "ce", "cos", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-7)


def test_rank_0_alone_speaks_and_writes(two):
    done, out = two
    lines = done.stdout.splitlines()
    updates = [line for line in lines if re.match(r"\d+/5  loss", line)]
    assert 0 < len(updates) == len(set(updates))
    assert sum(line.startswith("{") for line in lines) == 1
    assert "Warning: " not in done.stderr, done.stderr  # on any rank
    summary = json.loads(lines[-1])
    assert summary["tokens"] == STEPS * 2 * 2 * 4 * 32 and summary["out"] == str(out)
    assert "5 updates of 2 ranks x 2 x 4 x 32" in done.stdout


def test_no_buffers():
    """Ranks exchange gradients only: all else that a model computes with is a parameter."""
    config = Config(vocab_size=11, positions=5, layers=1, heads=1, width=4, mlp_width=4)
    assert not [*LanguageModel(config).buffers()] and not [*LanguageModel(config.student(1)).buffers()]


def test_no_thread_of_gloo_is_left(tiny, tmp_path):
    """Such a thread would release its last tensor once it has Python's lock, which whoever waits for it may hold."""
    script = tmp_path / "threads.py"
    script.write_text(f"""import pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
import train
from minidistil.distributed import Distributed

def name_of(thread):
    try:
        return (thread / "comm").read_text().strip()
    except OSError:  # it has ended meanwhile
        return ""

def leave(ranks, leave=Distributed.leave):
    for when in "before", "after":
        names = [name_of(thread) for thread in pathlib.Path("/proc/self/task").iterdir()]
        print(when, names.count("pt_gloo_runloop"))
        leave(ranks) if when == "before" else None

Distributed.leave = leave
train.main(sys.argv[1:])
""")
    done = call_ranks([script, *flags(tiny, tmp_path / "out", batch=4, accum=2)])
    assert done.returncode == 0, done.stderr
    before, after = (re.findall(f"^{when} ([0-9]+)$", done.stdout, re.M) for when in ("before", "after"))
    assert len(before) == len(after) == 2 and "0" not in before and after == ["0", "0"]


def test_stopped_and_resumed_is_uninterrupted(tiny, tmp_path):
    """With dropout: SIGTERM to torchrun, which passes it on; the same bits as without. Then once more on one rank."""
    few = dict(batch=4, accum=2, steps=60)
    assert call_ranks(words(tiny, tmp_path / "a", **few)).returncode == 0
    process = torchrun(tiny, tmp_path / "b", subprocess.Popen, **few)
    for line in process.stdout:
        if re.match(r" *\d+/60  loss", line):
            process.send_signal(signal.SIGTERM)
            break
    said = process.stdout.read()
    process.wait(60)
    assert re.search(r"signal ended the run after \d+ of 60 updates", said)
    assert re.search(r"resume with: torchrun --nproc-per-node 2 \S*train.py --out \S*b --resume", said)
    _, info = parameters(tmp_path / "b")
    assert 0 < info["update"] < 60
    assert call_ranks(words(tiny, tmp_path / "b", resume=True, **few)).returncode == 0
    (a, _), (b, _) = parameters(tmp_path / "a"), parameters(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_rank_that_is_killed(tiny, tmp_path):
    """The other says so in one line within 30 s; one rank, with the same update, goes on from the last checkpoint."""
    few = dict(batch=4, steps=20000, save_every=0.001)
    first, other = ranks(words(tiny, tmp_path / "out", accum=2, **few))
    saved = tmp_path / "out" / CHECKPOINT
    while first.poll() is None and not (saved.exists() and load_checkpoint(tmp_path / "out")[0]["update"] > 0):
        time.sleep(0.1)
    began = time.monotonic()
    other.kill()
    _, stderr = first.communicate(timeout=60)
    assert time.monotonic() - began < 30 and first.returncode != 0
    ours = [line for line in stderr.splitlines() if line.startswith("train.py: error:")]
    assert len(ours) == 1 and "rank 0 has lost another rank" in ours[0], stderr
    assert re.search("resume from the last checkpoint with: torchrun .* --resume$", ours[0])
    saved = load_checkpoint(tmp_path / "out")[0]["update"]
    train.main(flags(tiny, tmp_path / "out", accum=4, resume=True, **few | dict(time_limit=0.01)))
    assert load_checkpoint(tmp_path / "out")[0]["update"] > saved


def test_one_line_for_a_mistake(tiny, tmp_path):
    """Which rank 0 sees while the others wait for it."""
    done = call_ranks(words(tiny, tmp_path / "out", batch=4, accum=2, data="nowhere"))
    assert done.returncode != 0 and not (tmp_path / "out").exists()
    ours = [line for line in done.stderr.splitlines() if line.startswith("train.py: error:")]
    assert len(ours) == 1 and "nowhere is no corpus" in ours[0]
    assert 'train.py", line' not in done.stderr  # no traceback
