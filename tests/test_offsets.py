"""Rows whose offset passes 2^31 numbers, as of 8,589 rows of 250,037 logits: the address of a row needs 64 bits.

Here rows are 2^30 numbers apart in memory that is reserved and hardly written, so that three of them do. Interpreted
kernels compute the offsets that a GPU's do, in the same integer types; one of 32 bits ends in a segmentation fault.
Kernels whose rows cannot be set apart, as those of LayerNorm, are checked by their compiled types alone
(test_cross_compile.py). Neither shows a GPU's own arithmetic.
"""

import math

import pytest
import torch

from kernels import distill_kl, linear_distill_kl
from kernels.cosine import cosine_distance, cosine_distance_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []
V = 200
# (rows, numbers between them): the product passes 2^31; rows at 16-byte boundaries and off them; the stride alone
LAYOUTS = [(3, 2**30 + 64), (3, 2**30 + 3), (2, 2**31 + 64)]


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    pytest.importorskip("triton")
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(distill_kl, "BLOCK_V", 1024)


def far_apart(N, stride, seed):
    """Random bf16 (N, V) with rows `stride` apart: 4.3 GB of addresses, of which a few pages are used."""
    try:
        memory = torch.empty((N - 1) * stride + 2048, dtype=torch.bfloat16, device=DEVICE)
    except (RuntimeError, torch.OutOfMemoryError):
        pytest.skip("needs 4.3 GB of addresses a tensor")
    x = memory.as_strided((N, V), (stride, 1))
    return x.copy_(torch.randn(N, V, generator=torch.Generator().manual_seed(seed)))


def close(got, want):
    torch.testing.assert_close(got.double(), want.double(), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("N, stride", LAYOUTS)
def test_distill_kl(N, stride):
    s, t, labels = far_apart(N, stride, 0), far_apart(N, stride, 1), torch.arange(N, device=DEVICE)
    found = []
    for function, logits in ((distill_kl.distill_kl, (s, t)), (distill_kl.distill_kl_ref, (s.double(), t.double()))):
        leaf = logits[0].detach().requires_grad_()
        kl, ce = (x.sum() for x in function(leaf, logits[1], labels))
        found.append((kl, ce, *torch.autograd.grad(kl + ce, leaf)))
    assert found[0][2].stride() == (stride, 1)  # the gradient's rows are as far apart
    for got, want in zip(*found, strict=True):
        close(got, want)


def test_rows_in_parts(monkeypatch):
    N, stride = LAYOUTS[0]
    monkeypatch.setattr(distill_kl, "BLOCK_V", 64)
    monkeypatch.setattr(distill_kl, "_split", lambda N, V, device: (2, 128))
    s, t, labels = far_apart(N, stride, 0), far_apart(N, stride, 1), torch.arange(N, device=DEVICE)
    want = distill_kl.distill_kl_ref(s.double(), t.double(), labels)
    for got, expected in zip(distill_kl.distill_kl(s, t, labels), want, strict=True):
        close(got, expected.sum())


def test_linear_distill_kl():
    """Its kernel alone: chunks of a projection end long before."""
    N, stride = LAYOUTS[0]
    s, t, labels = far_apart(N, stride, 0), far_apart(N, stride, 1), torch.arange(N, device=DEVICE)
    leaf, losses = s.double().requires_grad_(), torch.full((N, 3), math.nan, device=DEVICE)
    kl, ce = distill_kl.distill_kl_ref(leaf, t.double(), labels)
    (want,) = torch.autograd.grad((0.5 * kl + 0.3 * ce).sum(), leaf)
    linear_distill_kl._loss_and_gradient_kernel[(N,)](
        s, t, labels, losses, stride, V, 2.0, 0.5, 0.3, 0.0, HAS_MSE=False, TAU=2, BLOCK_V=1024, num_warps=4
    )  # fmt: skip
    close(losses[:, :2], torch.stack([kl, ce], 1).detach())
    close(s, want)


@pytest.mark.parametrize("N, stride", LAYOUTS)
def test_cosine(N, stride):
    a, b = far_apart(N, stride, 0), far_apart(N, stride, 1)
    found = []
    for function, rows in ((cosine_distance, (a, b)), (cosine_distance_ref, (a.double(), b.double()))):
        leaf = rows[0].detach().requires_grad_()
        distance = function(leaf, rows[1])
        found.append((distance, *torch.autograd.grad(distance, leaf)))
    for got, want in zip(*found, strict=True):
        close(got, want)
