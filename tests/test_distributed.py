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
from same_layers import assert_same_layers

import train
from minidistil.distributed import Distributed
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


def torchrun(tiny, out, start=subprocess.run, ranks=2, **settings):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--master-port", str(port), str(ROOT / "train.py"), *flags(tiny, out, **settings)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return start(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def parameters(out):
    tensors, metadata = read_safetensors(out / CHECKPOINT, checksum=True)
    student = {name: tensor.double() for name, tensor in tensors.items() if name.startswith("student.")}
    return student, json.loads(metadata["info"])


@pytest.mark.parametrize("rank, local, turns_before", [(0, 0, 0), (8, 0, 1), (9, 1, 2), (1, 1, 2)])
def test_the_first_of_each_machine_comes_before_its_others(rank, local, turns_before, monkeypatch):
    """Two machines of eight ranks: what is fetched by one is there when the next look for it."""
    for name, value in (("RANK", rank), ("LOCAL_RANK", local), ("WORLD_SIZE", 16), ("LOCAL_WORLD_SIZE", 8)):
        monkeypatch.setenv(name, str(value))
    events = []
    monkeypatch.setattr(torch.distributed, "barrier", lambda: events.append("barrier"))
    assert Distributed().rank0_first(lambda: events.append("made") or "it") == "it"
    assert events.index("made") == turns_before and events.count("barrier") == 3


def test_ranks_agree_on_the_smallest(monkeypatch):
    """GPUs may have room for different micro-batches; an update must be cut alike on all."""
    assert Distributed().min(7) == 7
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda room, mine: room.__setitem__(
        slice(None), [9, mine, 8]))  # fmt: skip
    assert Distributed().min(7) == 7 and Distributed().min(12) == 8


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory):
    """Two ranks, 2 x 4 sequences each, dropout off: (finished process, its folder)."""
    out = tmp_path_factory.mktemp("ranks") / "two"
    done = torchrun(tiny, out, batch=4, accum=2, dropout=0.0)
    assert done.returncode == 0, done.stderr
    return done, out


def test_two_ranks_are_one(tiny, two, tmp_path):
    """The bound is that of the split into micro-batches."""
    train.main(flags(tiny, tmp_path / "one", batch=4, accum=4, dropout=0.0))
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
    assert sum(line.startswith("update") for line in lines) == len({x for x in lines if x.startswith("update")})
    assert sum(line.startswith("{") for line in lines) == 1
    summary = json.loads(lines[-1])
    assert summary["tokens"] == STEPS * 2 * 2 * 4 * 32 and summary["out"] == str(out)
    assert "5 updates of 2 ranks x 2 x 4 x 32" in done.stdout


def test_stopped_and_resumed_is_uninterrupted(tiny, tmp_path):
    """With dropout: SIGTERM to torchrun, which passes it on; the same bits as without. Then once more on one rank."""
    few = dict(batch=4, accum=2, steps=60)
    assert torchrun(tiny, tmp_path / "a", **few).returncode == 0
    process = torchrun(tiny, tmp_path / "b", subprocess.Popen, **few)
    for line in process.stdout:
        if line.startswith("update"):
            process.send_signal(signal.SIGTERM)
            break
    said = process.stdout.read()
    process.wait(60)
    assert re.search(r"saved after update \d+ of 60; go on with: torchrun --nproc-per-node 2 train.py", said)
    _, info = parameters(tmp_path / "b")
    assert 0 < info["update"] < 60
    assert torchrun(tiny, tmp_path / "b", resume=True, **few).returncode == 0
    (a, _), (b, _) = parameters(tmp_path / "a"), parameters(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_rank_that_is_killed(tiny, tmp_path):
    """The other says so in one line within 30 s; one rank, with the same update, goes on from the last checkpoint."""
    few = dict(batch=4, steps=2000, save_every=0.001)
    process = torchrun(tiny, tmp_path / "out", subprocess.Popen, accum=2, **few)
    for line in process.stdout:
        if line.startswith("update") and load_checkpoint(tmp_path / "out")[0]["update"] > 0:
            break
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    (rank_1,) = (w for w in workers if b"\0RANK=1\0" in pathlib.Path(f"/proc/{w}/environ").read_bytes())
    began = time.monotonic()
    os.kill(int(rank_1), signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - began < 30 and process.returncode != 0
    ours = [line for line in stderr.splitlines() if line.startswith("train.py: error:")]
    assert len(ours) == 1 and "rank 0 has lost another rank" in ours[0]
    assert re.search("go on from the last checkpoint with: torchrun .* --resume$", ours[0])
    saved = load_checkpoint(tmp_path / "out")[0]["update"]
    train.main(flags(tiny, tmp_path / "out", accum=4, resume=True, **few | dict(steps=2000, time_limit=0.01)))
    assert load_checkpoint(tmp_path / "out")[0]["update"] > saved


def test_one_line_for_a_mistake(tiny, tmp_path):
    """Which rank 0 sees while the others wait for it."""
    done = torchrun(tiny, tmp_path / "out", batch=4, accum=2, data="nowhere")
    assert done.returncode != 0 and not (tmp_path / "out").exists()
    ours = [line for line in done.stderr.splitlines() if line.startswith("train.py: error:")]
    assert len(ours) == 1 and "nowhere is no corpus" in ours[0]
    assert 'train.py", line' not in done.stderr  # no traceback
