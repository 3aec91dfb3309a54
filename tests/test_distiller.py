"""The gradient of an update, whatever its split into micro-batches and ranks."""

import contextlib
import types

import pytest
import torch

from kernels.dropout import Key
from minidistil import weights
from minidistil.data import IGNORE, Corpus, Sequences
from minidistil.distiller import Distiller
from minidistil.losses import Denominators, Objective
from minidistil.student import set_dropout, student_from_teacher
from minidistil.tokenizer import Tokenizer

CPU, SEED, G = torch.device("cpu"), 2**61 + 12345, 8
SPLITS = {"8 x 1": (8, 1, 1), "1 x 8": (1, 8, 1), "2 x 4": (2, 4, 1), "2 ranks, 2 x 2": (2, 2, 2)}


def gradients(tiny, batch, accum, ranks, device=CPU, attention=True, T=31, dtype="fp32"):
    """{parameter: gradient of an update of 8 sequences, dropout 0.1}: the mean over ranks."""
    teacher = weights.load_model(tiny / "teacher").eval().requires_grad_(False).to(device)
    sequences = Sequences(Corpus(tiny / "corpus").train, T, Tokenizer.load(tiny / "teacher"), seed=0)
    ids, labels = map(torch.from_numpy, sequences.batch(0, G))
    counts, found = Denominators(ids.numel(), int((labels != IGNORE).sum())), []
    for rank in range(ranks):
        student = student_from_teacher(teacher.cpu(), [0, 3]).train().to(device)
        teacher.to(device)
        set_dropout(student, 0.1)
        if not attention:
            for block in student.encoder.blocks:
                block.attention.dropout = 0.0
        group = types.SimpleNamespace(rank=rank, size=ranks, no_sync=lambda model, last: contextlib.nullcontext())
        distiller = Distiller(Objective(), teacher, student, dtype, device, group)
        share = slice(rank * batch * accum, (rank + 1) * batch * accum)
        assert len(ids[share]) * ranks == G
        distiller.accumulate((ids[share], labels[share]), batch, counts, SEED, lambda done, A: True)
        found.append({name: parameter.grad.cpu() for name, parameter in student.named_parameters()})
    return {name: sum(each[name] for each in found) / ranks for name in found[0]}


def distance(a, b):
    """The largest distance of two gradients' tensors, as a share of their norm."""
    return max(((a[name] - b[name]).norm() / a[name].norm()).item() for name in a)


@pytest.mark.parametrize("split", [name for name in SPLITS if name != "8 x 1"])
def test_the_split_changes_nothing_but_rounding_with_dropout(split, tiny):
    assert distance(gradients(tiny, *SPLITS["8 x 1"]), gradients(tiny, *SPLITS[split])) < 1e-5


@pytest.mark.parametrize("split", [name for name in SPLITS if name != "8 x 1"])
def test_the_split_in_bf16(split, tiny):
    """Each micro-batch rounds its gradients to bf16, 8 bits: as far apart as a bf16 gradient is from the fp32 one."""
    whole = gradients(tiny, *SPLITS["8 x 1"], dtype="bf16")
    rounding = distance(gradients(tiny, *SPLITS["8 x 1"]), whole)
    assert 1e-4 < rounding < 0.05 and distance(whole, gradients(tiny, *SPLITS[split], dtype="bf16")) < 1.5 * rounding


def test_weights_are_cast_once_an_update(tiny):
    """Autocast makes as many bf16 copies of the MLPs' matrices (32, 64) for four micro-batches as for one."""

    def casts(accum):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            gradients(tiny, 8 // accum, accum, 1, dtype="bf16")
        copies = [event for event in profile.events() if event.name == "aten::_to_copy"]
        forward = [event for event in copies if "Backward" not in str(event.cpu_parent and event.cpu_parent.cpu_parent)]
        return sum(event.input_shapes[0] == [32, 64] for event in forward)

    assert casts(1) == casts(4) >= 2 + 4  # the student's layers, and once for all the teacher's


def test_one_mask_for_all_micro_batches_would_show(tiny, monkeypatch):
    """The test above sees which sequences a key names: by the number of the micro-batch, another gradient."""
    whole = gradients(tiny, *SPLITS["8 x 1"])
    of = Key.of.__func__
    monkeypatch.setattr(Key, "of", classmethod(lambda cls, seed, first, device: of(cls, seed + first, 0, device)))
    assert distance(whole, gradients(tiny, *SPLITS["8 x 1"])) == 0.0
    for split in ("1 x 8", "2 x 4", "2 ranks, 2 x 2"):
        assert distance(whole, gradients(tiny, *SPLITS[split])) > 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_split_without_attention_dropout_on_a_gpu(tiny):
    """fp32, whose attention draws from PyTorch's generator; that of bf16 is tested in test_dropout.py."""
    pytest.importorskip("triton")
    cuda = torch.device("cuda", 0)
    whole, parts = (gradients(tiny, *SPLITS[name], cuda, False, T=4) for name in ("8 x 1", "2 ranks, 2 x 2"))
    assert distance(whole, parts) < 1e-4
