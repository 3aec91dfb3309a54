"""Dropout's masks: a function of (seed, site, sequence, position), in whatever parts an update is computed."""

import math
import types

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import dropout as module
from kernels.dropout import Key, dropout, flash_dropout
from kernels.layer_norm import dropout_add_layer_norm
from minidistil.model import GPU_ATTENTION, attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
on_the_device = pytest.mark.gpu if DEVICE.type == "cuda" else []


def on_cpu(x, p, key, site=0):
    return dropout(x.cpu(), p, True, Key.of(key.seed, key.first, torch.device("cpu")), site)


def by_kernel(x, p, key, site=0):
    rows = x.reshape(-1, x.shape[-1])
    return module._operator(rows, p, key.data, site, module.rows_per_sequence(x)).view(x.shape)


def by_layer_norm(x, p, key, site=0):
    """Through the kernel that adds and normalises: an element decides whether its row is the mean of 1s or not."""
    affine = torch.linspace(1, 2, x.shape[-1], device=x.device), torch.zeros(x.shape[-1], device=x.device)
    return dropout_add_layer_norm(x, torch.ones_like(x), *affine, 1e-12, p, True, key, site)


@pytest.fixture(params=[on_cpu, pytest.param(by_kernel, marks=on_the_device),
                        pytest.param(by_layer_norm, marks=on_the_device)], ids=lambda way: way.__name__)  # fmt: skip
def way(request, monkeypatch):
    if request.param is not on_cpu:
        pytest.importorskip("triton")
        if DEVICE.type == "cpu":
            monkeypatch.setenv("TRITON_INTERPRET", "1")
    return request.param


def masks(way, shape, p=0.5, seed=1, first=0, site=0):
    """What is kept (True) of x of this shape."""
    assert way is not by_layer_norm
    return (way(torch.ones(shape, device=DEVICE), p, Key.of(seed, first, DEVICE), site) != 0).cpu()


# ---- parts of an update


# sequences of 18, 3, 35 and 13 elements: most of them begin within four elements that share a draw
@pytest.mark.parametrize("shape", [(6, 2, 3, 3), (6, 3), (6, 5, 7), (6, 1, 13)], ids=str)
def test_a_part_drops_what_the_whole_drops(way, shape):
    """Slices of the update, even or not, from sequence 0 or a later rank's first: same values, same gradients."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator).to(DEVICE) for _ in "xy")

    def both(x, dy, first):
        x = x.clone().requires_grad_()
        y = way(x, 0.3, Key.of(5, first, DEVICE), 7)
        return y.detach().cpu(), torch.autograd.grad(y, x, dy.to(y.device))[0].cpu()

    whole = both(x, dy, 16)
    for size in (1, 2, 4):
        starts = range(16, 22, size)
        parts = [both(*part, first) for *part, first in zip(x.split(size), dy.split(size), starts, strict=True)]
        assert all(torch.equal(a, torch.cat(b)) for a, b in zip(whole, zip(*parts, strict=True), strict=True))
    assert not torch.equal(whole[0], both(x, dy, 0)[0])  # other sequences, other masks


@pytest.mark.parametrize("way", [on_cpu, by_kernel], indirect=True, ids=lambda way: way.__name__)
def test_forward_and_backward_drop_the_same(way):
    x = torch.ones(6, 5, 21, device=DEVICE, requires_grad=True)
    y = way(x, 0.3, Key.of(5, 2, DEVICE), 3)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(gradient.cpu(), y.detach().cpu()) and 0 < (y == 0).float().mean() < 1
    assert sorted(y.detach().unique().tolist()) == [0.0, pytest.approx(1 / 0.7, rel=1e-4)]


# ---- masks are random


@pytest.mark.parametrize("way", [on_cpu, by_kernel], indirect=True, ids=lambda way: way.__name__)
def test_masks_of_other_sequences_sites_and_updates_are_independent(way):
    """The right share, and each pair of them agrees as often as chance would have it, element by element or shifted."""
    p, shape = 0.3, (4, 3, 256)
    drawn = [(seed, first, site) for seed in (1, 2) for first in (0, 4) for site in (0, 1)]
    kept = torch.cat([masks(way, shape, p, *where).view(4, -1) for where in drawn]).double()  # 32 sequences
    n = kept.shape[1]
    assert abs(kept.mean() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / kept.numel())
    z = (kept - (1 - p)) / math.sqrt(p * (1 - p) * n)
    for shift in (0, 1, 3, 4, 8, 64):
        correlation = z @ z.roll(shift, dims=1).T
        if shift == 0:
            correlation.fill_diagonal_(0.0)
        assert correlation.abs().max() < 5 / math.sqrt(n), shift  # 1,024 pairs


@pytest.mark.parametrize("way", [on_cpu, by_kernel], indirect=True, ids=lambda way: way.__name__)
def test_no_counter_wraps(way):
    """Row and element numbers beyond 2^32 are numbers of their own."""
    first = [masks(way, (1, 1, 64), first=n) for n in (0, 2**29, 2**32, 2**33)]
    assert all(not torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])


def test_a_key_is_drawn_from_pytorchs_generator_where_none_is_given():
    x, results = torch.ones(4, 64), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(dropout(x, 0.5))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1000, 100), (7,), (3, 5, 11), (0, 4)])
def test_dropout_on_a_cpu(shape, dtype):
    """Kept with probability 1 - p and scaled exactly for it; the same mask in the backward pass."""
    torch.manual_seed(0)
    p, x = 0.1, torch.randn(shape).to(dtype).abs().add_(1).requires_grad_()
    y = dropout(x, p)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    kept = y != 0
    scale = 2**16 / (2**16 - round(p * 2**16))
    assert y.dtype == gradient.dtype == dtype
    close = dict(rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)
    torch.testing.assert_close(y[kept].double(), x[kept].double() * scale, **close)
    torch.testing.assert_close(gradient.double(), kept.double() * scale, **close)
    if x.numel() == 100_000:
        assert abs(kept.float().mean().item() - 0.9) < 4 * (0.09 / 100_000) ** 0.5
        columns = (~kept).float().mean(0)  # no column of a draw is special
        assert (columns - p).abs().max() < 5 * (0.09 / 1000) ** 0.5
    torch.manual_seed(0)
    torch.randn(shape)
    assert torch.equal(dropout(x, p), y)
    assert dropout(x, p, training=False) is x and dropout(x, 0.0) is x


# ---- torch.compile


@pytest.mark.parametrize("way", [pytest.param(by_kernel, marks=on_the_device),
                                 pytest.param(by_layer_norm, marks=on_the_device)], indirect=True,
                         ids=lambda way: way.__name__)  # fmt: skip
def test_one_graph_serves_every_micro_batch(way):
    """The key is data: neither another seed nor another sequence compiles anew; value and gradient are eager's."""
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(way, backend=backend, fullgraph=True, dynamic=False)
    x = torch.randn(2, 3, 16, device=DEVICE, requires_grad=True)
    for seed, first in ((1, 0), (1, 2), (2, 4)):
        y, truth = (f(x, 0.5, Key.of(seed, first, DEVICE), 4) for f in (compiled, way))
        gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in (y, truth)]
        assert torch.equal(y, truth) and torch.equal(*gradients)
    assert backend.frame_count == 1


@pytest.mark.parametrize("way", [pytest.param(by_kernel, marks=on_the_device)], indirect=True)
def test_registered_as_an_operator(way):
    x = torch.randn(3, 16, device=DEVICE, requires_grad=True)
    arguments = x, 0.5, Key.of(3, 1, DEVICE).data, 2, 1
    torch.library.opcheck(torch.ops.minidistil.dropout.default, arguments)


# ---- attention on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or not torch.version.cuda, reason="no NVIDIA GPU")
@pytest.mark.parametrize("T", [512, 200])
def test_flash_attention_drops_by_sequence_on_a_gpu(T):
    """Parts of an update: the values of the whole, to the bit, and its gradient; the generator as it was."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("flash attention needs Ampere")
    B, H, D, p = 6, 12, 64, 0.3
    qkv = torch.randn(B, T, 3, H, D, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(B, H, T, D, device="cuda", dtype=torch.bfloat16)

    def both(qkv, dy, first, site):
        x = qkv.clone().requires_grad_()
        q, k, v = (z.transpose(1, 2) for z in x.unbind(2))
        assert torch._fused_sdp_choice(q, k, v, None, p, False) == SDPBackend.FLASH_ATTENTION.value
        y = attention(q, k, v, None, p, Key.of(5, first, DEVICE), site)
        return y.detach(), torch.autograd.grad(y, x, dy)[0].float()

    def distance(a, b):
        return ((a - b).norm() / a.norm()).item()

    before = torch.cuda.get_rng_state()
    with sdpa_kernel(GPU_ATTENTION):
        y, gradient = both(qkv, dy, 16, 4)
        for size in (1, 2, 4):
            parts = zip(qkv.split(size), dy.split(size), range(16, 22, size), strict=True)
            y_, gradient_ = (torch.cat(each) for each in zip(*(both(*part, 4) for part in parts), strict=True))
            assert torch.equal(y, y_) and distance(gradient, gradient_) < 1e-2  # queries' is summed in any order
        for other in ((16, 7), (0, 4)):
            y_, gradient_ = both(qkv, dy, *other)
            assert distance(y.float(), y_.float()) > 0.1 and distance(gradient, gradient_) > 0.1
    assert torch.equal(torch.cuda.get_rng_state(), before)


class Generator:
    """A GPU's generator: a seed and an offset."""

    def __init__(self, seed, offset):
        self.seed, self.offset = seed, offset

    def initial_seed(self):
        return self.seed

    def get_offset(self):
        return self.offset

    def manual_seed(self, seed):
        self.seed, self.offset = seed, 0

    def set_offset(self, offset):
        assert offset % 4 == 0
        self.offset = offset


def test_where_flash_attention_draws(monkeypatch):
    """Sequence s, head h at offset (s H + h) 32 of a seed of the layer, in whatever micro-batch; others as they are."""
    generator, H = Generator(123, 44), 3
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "default_generators", (None, generator))
    q = types.SimpleNamespace(device=torch.device("cuda:1"), shape=(2, H, 8, 8))

    def state(first, site, p=0.1, backend=SDPBackend.FLASH_ATTENTION, key=True):
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_: backend.value)
        given = Key.of(1000, first, torch.device("cpu")) if key else None
        with flash_dropout(q, q, q, None, p, given, site):
            inside = generator.seed, generator.offset
            if inside != (123, 44):
                generator.offset += 2 * H * 32  # what flash attention takes for two sequences
        assert (generator.seed, generator.offset) == (123, 44)
        return inside

    assert [state(first, 4) for first in (0, 2, 4)] == [(1004, first * H * 32) for first in (0, 2, 4)]
    assert state(2, 7) == (1007, 2 * H * 32)
    with pytest.raises(torch.OutOfMemoryError):
        with flash_dropout(q, q, q, None, 0.1, Key.of(1, 1, torch.device("cpu")), 1):
            raise torch.OutOfMemoryError("full")
    assert (generator.seed, generator.offset) == (123, 44)
    # what follows no key leaves its draws
    monkeypatch.setattr(generator, "set_offset", None)
    monkeypatch.setattr(generator, "manual_seed", None)
    elsewhere = [dict(backend=other) for other in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)]
    for other in (dict(p=0.0), dict(key=False), *elsewhere):
        assert state(0, 4, **other) == (123, 44)
