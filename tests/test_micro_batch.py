"""The micro-batch that fits: found by trying, and the trial leaves no trace."""

import dataclasses
import itertools

import pytest
import torch
from test_train import same_bits, settings

import train
from minidistil import micro_batch
from minidistil.errors import UserError
from minidistil.model import Config, LanguageModel

CPU = torch.device("cpu")


@pytest.mark.parametrize("room, most, expected", [(100, 100, 60), (59, 100, 30), (100, 31, 30), (7, 100, 6), (1, 0, 1)])
def test_the_largest_divisor_that_has_room(room, most, expected):
    tried = []

    full = itertools.cycle([  # as PyTorch says it, Triton where it loads a kernel, and cuBLAS
        torch.OutOfMemoryError("full"), RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ])  # fmt: skip

    def attempt(size):
        tried.append(size)
        if size > room:
            raise next(full)

    assert micro_batch.largest_that_fits(60, most, attempt) == expected
    first, *others = tried  # the first, of one sequence, is not repeated
    assert first == 1 and others == sorted(others, reverse=True) and all(60 % size == 0 for size in others)
    assert others[-1] == expected if expected > 1 else 1 not in others


def test_nothing_fits():
    def attempt(size):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(UserError, match="not even one sequence"):
        micro_batch.largest_that_fits(6, 6, attempt)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def attempt(size):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        micro_batch.largest_that_fits(6, 6, attempt)


def test_a_rehearsal_meets_the_fullest_moment_and_leaves_no_trace(monkeypatch):
    """The second pass finds the first one's gradients, as in an update; afterwards there are none, even if it fails."""
    student = LanguageModel(Config(vocab_size=50, positions=16, layers=1, heads=2, width=8, mlp_width=16), seed=0)
    before = [p.clone() for p in student.parameters()]
    found = []

    def learn(ids):
        found.append(student.encoder.embeddings.words.weight.grad is not None)
        student.logits(student(ids).flatten(0, 1)).square().sum().backward()

    optimizer = torch.optim.AdamW(student.parameters())
    micro_batch.probe_memory(student, optimizer, learn, (torch.zeros(2, 16, dtype=torch.int64),), CPU)
    assert found == [False, True]
    # beside the gradients: AdamW's moments and the buckets before its first step, the buckets alone after it
    like, made = torch.empty_like, []
    monkeypatch.setattr(torch, "empty_like", lambda p: made.append(p) or like(p))
    for steps, copies in ((0, 3), (1, 1)):
        optimizer.state = {"moments": 0} if steps else {}
        made.clear()
        micro_batch.probe_memory(student, optimizer, lambda: None, (), CPU)
        assert len(made) == copies * len(before)
    monkeypatch.undo()
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(student.parameters(), before, strict=True))

    def overflow(ids):
        learn(ids)
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        micro_batch.probe_memory(student, optimizer, overflow, (torch.zeros(2, 16, dtype=torch.int64),), CPU)
    assert all(p.grad is None for p in student.parameters())


def test_training_after_a_rehearsal_is_the_same_training(tiny, tmp_path, monkeypatch):
    """The search before the first update changes no bit of the run with the size that it finds."""
    train.train(settings(tiny, tmp_path / "given", batch=1, accum=8, micro_batch="4"))
    sizes = []

    def trial(n, most, attempt):
        for size in (8, 4):
            attempt(size)
            sizes.append((size, most))
        return 4

    monkeypatch.setattr(micro_batch, "largest_that_fits", trial)
    monkeypatch.setattr(micro_batch, "can_search", lambda device: True)
    train.train(settings(tiny, tmp_path / "found", batch=1, accum=8, micro_batch="auto"))
    assert sizes == [(8, micro_batch.MAX_TOKENS // 32), (4, micro_batch.MAX_TOKENS // 32)]
    assert same_bits(tmp_path / "given", tmp_path / "found")
    # a resumed run looks for no more than the first found: on the same device, the same bits
    (tmp_path / "found" / "run.json").unlink()  # it would say that the run is finished
    again = settings(tiny, tmp_path / "found", batch=1, accum=8, micro_batch="auto", resume=True)
    train.train(again)
    assert sizes[2:] == [(8, 4), (4, 4)]


@pytest.mark.parametrize("tokens, split", [(2560, "1 x 6"), (32 * 5, "2 x 3"), (31, "6 x 1")])
def test_auto_on_a_cpu_searches_nothing(tokens, split, tiny, tmp_path, capsys, monkeypatch):
    """The largest micro-batch of at most so many tokens that divides the update, and never less than a sequence."""
    monkeypatch.setattr(micro_batch, "CPU_TOKENS", tokens)
    train.train(settings(tiny, tmp_path / "auto", batch=2, accum=3, steps=1, micro_batch="auto", device="cpu"))
    assert f"1 updates of {split} x 32" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["3", "0", "-1", "16", "many", "2.0"])
def test_a_size_that_does_not_divide_the_update(size, tiny, tmp_path):
    with pytest.raises(UserError, match="--micro-batch .*divides batch . accum = 8"):
        train.train(settings(tiny, tmp_path / "out", batch=1, accum=8, micro_batch=size))
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_auto_on_a_gpu(tiny, tmp_path, capsys):
    """A whole update of this size fits at once, and is the same update."""
    base = settings(tiny, tmp_path / "one", batch=2, accum=16, dropout=0.0, device="cuda", micro_batch="2")
    given = train.train(base)
    assert "5 updates of 16 x 2 x 32" in capsys.readouterr().out
    found = train.train(dataclasses.replace(base, out=str(tmp_path / "auto"), micro_batch=None))  # the default
    assert "5 updates of 1 x 32 x 32" in capsys.readouterr().out
    compiled = dataclasses.replace(base, out=str(tmp_path / "compiled"), micro_batch="auto", compile=True)
    assert train.train(compiled)["student"]["mlm_loss"] == pytest.approx(given["student"]["mlm_loss"], rel=1e-4)
    assert found["student"]["mlm_loss"] == pytest.approx(given["student"]["mlm_loss"], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kd_rows", ["all", "masked"])
def test_one_wait_for_the_gpu_in_an_update(kd_rows, tiny, tmp_path):
    """Sixteen micro-batches make the host wait for the device as often as two do, and an update more once more."""
    waits = []
    for steps, accum in ((3, 2), (3, 2), (3, 16), (5, 2)):  # the first compiles
        out = tmp_path / f"{len(waits)}"
        sizes = dict(batch=2, accum=accum, micro_batch="2", steps=steps, eval_every=100)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns() as caught:
                train.train(settings(tiny, out, device="cuda", kd_rows=kd_rows, dtype="bf16", **sizes))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(w.message) for w in caught))
    assert waits[1] == waits[2] > 0 and waits[3] - waits[1] == 2
