"""finetune.py on two processes is the same program."""

import json
import pathlib
import re
import signal

import pytest
import torch
from forked import call_ranks, ranks
from same_layers import assert_same_layers
from test_finetune import FAST, tuned

import finetune
from minidistil import weights
from minidistil.model import Config, LanguageModel
from minidistil.safetensors import read_safetensors
from minidistil.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def calm(tiny, tmp_path_factory):
    """The tiny teacher without dropout, whose bits would depend on the rank."""
    folder = tmp_path_factory.mktemp("calm")
    config = Config(**{**vars(weights.read_config(tiny / "teacher")), "dropout": 0.0, "attention_dropout": 0.0})
    weights.save_model(folder / "teacher", LanguageModel(config, seed=1))
    Tokenizer.load(tiny / "teacher").save(folder / "teacher", "bert")
    return folder


def words(world, glue, out, **settings):
    values = {"task": "sst2", "model": world / "teacher", "data": glue, "out": out} | FAST | settings
    flags = [
        [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])] for name, value in values.items()
    ]
    return [pathlib.Path(finetune.__file__), *(word for flag in flags for word in flag)]


def parameters(out, task="sst2"):
    tensors, _ = read_safetensors(out / task / "model.safetensors")
    return {name: tensor.double() for name, tensor in tensors.items()}


def test_two_ranks_are_one(calm, glue, tmp_path):
    """With a teacher; of an epoch's last update, one rank has the only example."""
    tuned(calm, glue, tmp_path / "teacher")
    few = dict(teacher=str(tmp_path / "teacher"), examples=43, epochs=2.0, augment=2)
    done = call_ranks(words(calm, glue, tmp_path / "two", **few))
    assert done.returncode == 0, done.stderr
    one, lines = tuned(calm, glue, tmp_path / "one", **few), done.stdout.splitlines()
    two = json.loads(lines[-1])
    assert sum(line.startswith("{") for line in lines) == 1 and len(set(lines)) == len(lines)
    assert two["tasks"] == one["tasks"] and "Warning: " not in done.stderr
    assert_same_layers(parameters(tmp_path / "one"), parameters(tmp_path / "two"), 1e-5)  # of 34 updates
    a, b = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("one", "two"))
    assert a["data"] == b["data"] and [r["updates"] for r in b["runs"]["sst2"]] == [2 * 17]


def test_stopped_and_resumed_is_uninterrupted(tiny, glue, tmp_path):
    """With dropout, and two seeds: SIGTERM to one rank alone, which ends both; the same bits as without."""
    few = dict(seeds=2, epochs=2.0)
    assert call_ranks(words(tiny, glue, tmp_path / "a", **few)).returncode == 0
    first, other = ranks(words(tiny, glue, tmp_path / "b", **few))
    for line in first.stdout:
        if re.search(r"seed 1: update ", line):
            other.send_signal(signal.SIGTERM)
            break
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGTERM and other.wait(60) in (0, 128 + signal.SIGTERM)
    assert re.search(r"saved within sst2 lr 0.003 seed 1; resume with: torchrun --nproc-per-node 2 .*finetune.py", said)
    resumed = call_ranks(words(tiny, glue, tmp_path / "b", **few, resume=True))
    assert resumed.returncode == 0 and re.search("seed 1: resumes after update [1-9]", resumed.stdout)
    a, b = (json.loads((tmp_path / name / "scores.json").read_text())["runs"]["sst2"] for name in "ab")
    assert [run["epochs"] for run in a] == [run["epochs"] for run in b] and len(a) == 2
    a, b = (parameters(tmp_path / name) for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_one_line_for_a_mistake(tiny, glue, tmp_path):
    done = call_ranks(words(tiny, glue, tmp_path / "out", data="nowhere"))
    ours = [line for line in done.stderr.splitlines() if line.startswith("finetune.py: error:")]
    assert done.returncode != 0 and len(ours) == 1 and "nowhere" in ours[0] and not (tmp_path / "out").exists()
