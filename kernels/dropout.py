"""Dropout whose mask is a pure function of where an element is, so that it does not depend on the micro-batch or rank.

    keep = u >= p 2^16      u = 16 random bits of (seed, site, sequence, position)
    y = x * keep / (1 - p)

`seed` is that of the update, `site` the number of this dropout in the model, `sequence` counts from the update's first,
and `position` is where the element is in its sequence. The first dimension of x is that of sequences. A counter-based
generator (Salmon et al. 2011) computes any element's bits without those before it:

    CPU     PCG64DXSM of (seed, site) jumps to the first element of the first sequence; 64 bits serve four elements
    Triton  Philox of the key `seed` and the counter (group of 8 elements in a row, row in the update, site)

Both round p to a multiple of 2^-16, and neither stores its mask for a GPU's backward pass, which draws it again. Each
has its own bits: a CPU and a GPU drop different elements.
"""

import contextlib
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from kernels import cpu
from kernels.backend import on_triton, tl, triton
from kernels.cpu import BITS
from kernels.operator import differentiable, opaque


@dataclasses.dataclass
class Key:
    """What the masks of a forward pass follow from: the update's seed, and the number in it of the first sequence.

    `data` holds both, int64 (2,), on the device of the model: kernels read them there, so that a compiled graph serves
    every micro-batch and the host waits for nothing.
    """

    seed: int
    first: int
    data: torch.Tensor

    @classmethod
    def of(cls, seed, first, device):
        data = torch.tensor([seed, first], pin_memory=device.type == "cuda")
        return cls(seed, first, data.to(device, non_blocking=True))

    @classmethod
    def drawn(cls, device):
        """Returns a key with a seed from PyTorch's generator, for a batch that is an update of its own."""
        return cls.of(int(torch.randint(2**62, ())), 0, device)


def dropout(x, p, training=True, key=None, site=0):
    """x / (1 - p) with probability 1 - p, else 0; x (sequences, ...); p < 1; differentiable. `key`: None for a new one.

    On a GPU without Triton, and there in fp64, it is PyTorch's, which draws from PyTorch's generator.
    """
    if not training or p == 0.0:
        return x
    if x.is_cuda and (not on_triton(x) or x.dtype == torch.float64):
        return F.dropout(x, p)
    key = key or Key.drawn(x.device)
    if not x.is_cuda:  # in the interpreter, too
        return cpu.Dropout.apply(x, p, key.data, site)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return _operator(rows, p, key.data, site, rows_per_sequence(x)).view(x.shape)


@contextlib.contextmanager
def flash_dropout(q, k, v, mask, p, key, site, causal=False):
    """A context in which flash attention drops by `key` and `site`, and after which PyTorch's generator is as before.

    Flash attention on an NVIDIA GPU takes 32 offsets of the generator for each head of each sequence, in order, and
    keeps seed and offset for its backward pass (flash_api.cpp and dropout.h in PyTorch's sources). Other backends, and
    compiled models, draw from the generator as they find it, in the order of their calls.
    """
    eager = p and key is not None and torch.version.cuda and not torch.compiler.is_compiling()
    if not eager or torch._fused_sdp_choice(q, k, v, mask, p, causal) != SDPBackend.FLASH_ATTENTION.value:
        yield
        return
    generator = torch.cuda.default_generators[q.device.index]
    seed, offset = generator.initial_seed(), generator.get_offset()
    generator.manual_seed(key.seed + site)
    generator.set_offset(key.first * q.shape[1] * 32)
    try:
        yield
    finally:
        generator.manual_seed(seed)
        generator.set_offset(offset)


def rows_per_sequence(x):
    """Returns the rows of the last dimension that a sequence of x (sequences, ..., C) has."""
    return math.prod(x.shape[1:-1])


def threshold_and_scale(p):
    """Returns (p 2^16, 1 / (1 - p)) of the p that 16 bits can tell."""
    threshold = round(p * 2**BITS)
    return threshold, 2**BITS / (2**BITS - threshold)


# ---- Triton


@triton.jit
def dropped(x, seed, site, row, group, threshold, scale):
    """Applies dropout to x (G, 8) of a `row` (int64, counted in the update): the groups of 8 numbered `group` (G,).

    One call of Philox serves the 16 bits of 8 elements: ten rounds an element would cost more than everything else.
    """
    a, b, c, d = tl.philox(seed, group, (row & 0xFFFFFFFF).to(tl.uint32), (row >> 32).to(tl.uint32), site, 7)
    j = tl.arange(0, 8)[None, :]
    word = tl.where(j < 2, a[:, None], tl.where(j < 4, b[:, None], tl.where(j < 6, c[:, None], d[:, None])))
    return tl.where(((word >> (16 * (j % 2))) & 0xFFFF) >= threshold, x * scale, 0.0)


@triton.jit
def _kernel(
    x_ptr,  # (N, C), any float
    y_ptr,  # (N, C)
    key_ptr,  # (2,) int64: seed, first sequence
    site,
    T,  # rows of a sequence
    C,
    threshold,
    scale,
    BLOCK: tl.constexpr,  # C or more, a power of two, at least 8
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK // 8)
    cols = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    x = tl.load(x_ptr + row * C + cols, mask=cols < C, other=0.0).to(tl.float32)
    y = dropped(x, tl.load(key_ptr), site, tl.load(key_ptr + 1) * T + row, group, threshold, scale)
    tl.store(y_ptr + row * C + cols, y.to(y_ptr.dtype.element_ty), mask=cols < C)


def _apply(x: torch.Tensor, p: float, key: torch.Tensor, site: int, T: int) -> torch.Tensor:
    """Returns dropout of x (N, C); and of a gradient, since the masks are the same."""
    y, (N, C) = torch.empty_like(x), x.shape
    block = max(8, triton.next_power_of_2(C))
    if N:
        warps = max(1, min(8, block // 1024))
        _kernel[(N,)](x, y, key, site, T, C, *threshold_and_scale(p), BLOCK=block, num_warps=warps)
    return y


def _setup_context(ctx, inputs, output):
    _, ctx.p, key, ctx.site, ctx.T = inputs
    ctx.save_for_backward(key)


def _backward(ctx, dy):
    return gradient(dy.contiguous(), ctx.p, *ctx.saved_tensors, ctx.site, ctx.T), None, None, None, None


def _empty_result(x, p, key, site, T):
    return torch.empty_like(x)


gradient = opaque("dropout_backward", _apply, _empty_result)
_operator = differentiable("dropout", _apply, _empty_result, _setup_context, _backward)
