"""Cosine distance of paired rows, summed over the rows, one kernel each way: DistilBERT's loss on hidden states.

For rows a and b, with eps = 1e-8 and |x| the Euclidean norm:

    m_a = max(|a|, eps)    m_b = max(|b|, eps)    cos = (a . b) / (m_a m_b)
    loss = sum over rows of 1 - cos               CosineEmbeddingLoss with target 1, in Sanh et al. 2019, section 2
    d loss / da = (cos a / |a| - b / m_b) / m_a   where |a| = 0, the first term is 0

b comes from the frozen teacher and has no gradient. The clamps are those of F.cosine_similarity: a zero row has
distance 1 and a finite gradient. As in PyTorch, the value of |a| is clamped, but differentiated as if it were not.

One warp reads a whole row, so the sums over columns need no barrier. `split_width` of layer_norm.py splits the width
into two powers of two (768 = 512 + 256). The forward pass computes a . a, b . b and a . b in one pass over both
rows and stores three numbers per row: cos / |a|, 1 / m_a and 1 / m_b. The backward pass reads these and both rows.
`sum` adds the rows' distances in a fixed order, so repeated runs give the same bits.

Arithmetic, statistics and the result are fp32 for every dtype of a and b; the gradient has the dtype of a. As in
PyTorch's fp32 expression, norms must stay below 1.8e19, where their squares overflow.
Bytes per element, bf16: forward 4 (reads a and b), backward 6 (reads a and b, writes da): 10 in all. PyTorch's
expression casts both to fp32, launches about 30 kernels and moves about 150 bytes per element.

Legend:  N rows   C width   a, b student and teacher rows   m clamped norm   da gradient of a   g upstream gradient
Source: F.cosine_similarity and torch.nn.CosineEmbeddingLoss of PyTorch; Sanh et al. 2019 (arXiv 1910.01108).
"""

import torch
import torch.nn.functional as F

from kernels.backend import on_triton, tl, triton
from kernels.layer_norm import split_width
from kernels.operator import differentiable, opaque

EPS = tl.constexpr(1e-8)  # the default of F.cosine_similarity


def cosine_distance_ref(a, b):
    """Sum over rows of 1 - cos(a, b): the definition, in the dtype of its inputs."""
    return (1 - F.cosine_similarity(a, b, dim=-1)).sum()


@triton.jit
def _load(ptr, group, C):
    """Loads a row's groups of 8 columns with numbers `group` (G,): (G, 8) fp32, zero beyond column C."""
    cols = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    return tl.load(ptr + cols, mask=cols < C, other=0.0).to(tl.float32)


@triton.jit
def _dot(x, y):
    return tl.sum(tl.sum(x * y, 1), 0)


@triton.jit
def _forward_kernel(
    a_ptr,  # (N, C), any float
    b_ptr,  # (N, C), any float
    distance_ptr,  # (N,) fp32
    stats_ptr,  # (N, 3) fp32: cos / |a|, 1 / m_a, 1 / m_b
    stride_a,
    stride_b,
    C,
    BLOCK_1: tl.constexpr,  # BLOCK_1 + BLOCK_2 columns cover C; both are powers of two, and BLOCK_2 may be 0
    BLOCK_2: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    a_ptr += row * stride_a
    b_ptr += row * stride_b
    group = tl.arange(0, BLOCK_1 // 8)
    a = _load(a_ptr, group, C)
    b = _load(b_ptr, group, C)
    aa = _dot(a, a)
    bb = _dot(b, b)
    ab = _dot(a, b)
    if BLOCK_2:
        group_2 = BLOCK_1 // 8 + tl.arange(0, BLOCK_2 // 8)
        a_2 = _load(a_ptr, group_2, C)
        b_2 = _load(b_ptr, group_2, C)
        aa += _dot(a_2, a_2)
        bb += _dot(b_2, b_2)
        ab += _dot(a_2, b_2)
    norm_a = tl.sqrt(aa)
    # the maximum of NaN and EPS may be EPS; a NaN still reaches distance and gradient through a . b
    inv_a = 1.0 / tl.maximum(norm_a, EPS)
    inv_b = 1.0 / tl.maximum(tl.sqrt(bb), EPS)
    cos = ab * inv_a * inv_b
    tl.store(distance_ptr + row, 1.0 - cos)
    stats_ptr += row * 3
    tl.store(stats_ptr + 0, cos / tl.where(norm_a == 0.0, 1.0, norm_a))  # cos is 0 there
    tl.store(stats_ptr + 1, inv_a)
    tl.store(stats_ptr + 2, inv_b)


@triton.jit
def _store_gradient(a_ptr, b_ptr, da_ptr, group, cos_a, inv_b, scale, C):
    cols = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    # inv_b * scale may underflow fp32 where da does not
    da = (_load(a_ptr, group, C) * cos_a - _load(b_ptr, group, C) * inv_b) * scale
    tl.store(da_ptr + cols, da.to(da_ptr.dtype.element_ty), mask=cols < C)


@triton.jit
def _backward_kernel(
    g_ptr,  # () fp32: read on the device, so the host does not wait for it
    a_ptr,  # (N, C), any float
    b_ptr,  # (N, C), any float
    stats_ptr,  # (N, 3) fp32: cos / |a|, 1 / m_a, 1 / m_b
    da_ptr,  # (N, C) contiguous, as a
    stride_a,
    stride_b,
    C,
    BLOCK_1: tl.constexpr,
    BLOCK_2: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    a_ptr += row * stride_a
    b_ptr += row * stride_b
    da_ptr += row * C
    stats_ptr += row * 3
    cos_a = tl.load(stats_ptr + 0)
    scale = tl.load(stats_ptr + 1) * tl.load(g_ptr)
    inv_b = tl.load(stats_ptr + 2)
    _store_gradient(a_ptr, b_ptr, da_ptr, tl.arange(0, BLOCK_1 // 8), cos_a, inv_b, scale, C)
    if BLOCK_2:
        group = BLOCK_1 // 8 + tl.arange(0, BLOCK_2 // 8)
        _store_gradient(a_ptr, b_ptr, da_ptr, group, cos_a, inv_b, scale, C)


def _launch_forward(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (loss, stats) of a and b (N, C), whose last dimension is contiguous."""
    N, C = a.shape
    distance, stats = a.new_empty(N, dtype=torch.float32), a.new_empty(N, 3, dtype=torch.float32)
    if N:
        block_1, block_2, warps = split_width(C)
        _forward_kernel[(N,)](a, b, distance, stats, a.stride(0), b.stride(0), C, block_1, block_2, num_warps=warps)
    return distance.sum(), stats


def _fake_forward(a, b):
    return a.new_empty((), dtype=torch.float32), a.new_empty(len(a), 3, dtype=torch.float32)


def _launch_backward(g: torch.Tensor, a: torch.Tensor, b: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    """Returns da (N, C), contiguous, from the 0-d gradient g of the loss."""
    N, C = a.shape
    da = a.new_empty(N, C)
    if N:
        block_1, block_2, warps = split_width(C)
        _backward_kernel[(N,)](g, a, b, stats, da, a.stride(0), b.stride(0), C, block_1, block_2, num_warps=warps)
    return da


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # otherwise PyTorch fills a gradient of the statistics with zeros
    ctx.save_for_backward(*inputs, output[1])


def _backward_of_forward(ctx, g, _):
    return None if g is None else _backward(g, *ctx.saved_tensors), None


_backward = opaque("cosine_distance_backward", _launch_backward, lambda g, a, b, stats: a.new_empty(a.shape))
_forward = differentiable("cosine_distance", _launch_forward, _fake_forward, _setup_context, _backward_of_forward)


def cosine_distance(a, b):
    """Returns the sum over rows of 1 - cos(a, b), differentiable in a: 0-d fp32, or fp64 where a or b is fp64.

    a, b (N, C) of any float dtypes, which may differ, and with any strides. On a GPU one kernel each way; on a CPU, and
    for fp64, PyTorch's expression in fp32 or fp64. Raises ValueError where the shapes disagree or b requires a
    gradient. Source: Sanh et al. 2019, section 2.
    """
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"a and b must both be (N, C): they are {tuple(a.shape)} and {tuple(b.shape)}")
    if b.requires_grad:
        raise ValueError("the teacher must be frozen: b takes no gradient")
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    if not on_triton(a) or wide == torch.float64:
        return cosine_distance_ref(a.to(wide), b.to(wide))
    a, b = (x if x.stride(-1) == 1 else x.contiguous() for x in (a, b))
    return _forward(a, b)[0]


def bytes_moved(N, C, itemsize):
    """Minimum bytes moved by forward and backward: both inputs are read twice, the gradient is written once."""
    return 5 * N * C * itemsize
