"""Temperature-softened KL divergence and masked-LM cross-entropy in one pass over the logits each way.

For one row of student logits s and teacher logits t, temperature tau and label y:

    p = softmax(t / tau)      q = softmax(s / tau)      q1 = softmax(s)
    kl = tau^2 sum_v p (log p - log q)        d kl / ds = tau (q - p)       Hinton et al. 2015, section 2
    ce = -log q1[y], or 0 without a label     d ce / ds = q1 - [v = y]

Forward: with m the maximum of a row, k = 1 / tau and Z = sum exp(k (x - m)), everything relative to the maxima,

    kl / tau^2 = c / Z_t + log(Z_s / Z_t)        c = sum exp(k (t - m_t)) k ((t - m_t) - (s - m_s))

and m, Z and c can be carried along a row from block to block, so that one pass is enough (README.md derives it). Each
thread carries its own and they meet at the end of the row: inside it no thread waits for another.
Backward: one more pass, from the statistics (m_s, m_t, log Z_s, log Z_t, log Z_1).

Arithmetic and statistics are fp32 whatever the logits are, and in base 2, since exp2 is what the hardware has.
Bytes per row of bf16 logits: forward 4 V (read s, t), backward 6 V (read s, t, write the gradient): 10 V in all,
305 kB at V = 30,522. What limits both kernels is memory, as long as loads are 16 bytes wide. Triton makes them so where
it can prove that a row begins at a multiple of 16 bytes. Rows of 30,522 = 2 * 3 * 5,087 bf16 logits do not: the kernels
then start at the boundary below (PEEL), and ignore what precedes the row. `padded` allocates rows that begin at one.

Legend:  N rows   V vocabulary   s, t student and teacher logits   m maximum   Z sum of exponentials   tau temperature
         E logits of a 16-byte load   G such loads in a block   P parts of a row
"""

import math

import torch
import torch.nn.functional as F

from kernels import on_triton, tl, triton
from kernels.operator import differentiable, opaque

IGNORE = -100  # PyTorch's label of a row without cross-entropy
BLOCK_V, WARPS = 2048, 4  # of both kernels: 16 logits of each model in flight per thread, no spills
FLOOR_LOG2 = -16384.0  # of log2 of a probability over the row's largest: 2 to this power is 0, and KL stays finite
FLOOR_NATS = FLOOR_LOG2 * math.log(2)
FLOOR = tl.constexpr(FLOOR_LOG2)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NOTHING = tl.constexpr(-1.0e30)  # the maximum of no logits: finite, since -inf - -inf is NaN


def distill_kl_ref(s, t, labels=None, temperature=2.0):
    """Per-row (kl, ce), each (N,), in nats: the definition, differentiable in any dtype; keeps everything."""
    log_q, log_p = F.log_softmax(s / temperature, -1), F.log_softmax(t / temperature, -1)
    p = log_p.exp()
    # 0 log 0 = 0: a teacher that rules a word out says nothing more about it
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1) * temperature**2
    if labels is None:
        return kl, torch.zeros_like(kl)
    return kl, F.cross_entropy(s, labels, ignore_index=IGNORE, reduction="none")


def row_width(V):
    """V rounded up to a multiple of 64, as wide loads and matrix units want rows of logits."""
    return -(-V // 64) * 64


def padded(N, V, dtype, device):
    """Uninitialised logits (N, V) in rows of `row_width(V)` elements."""
    return torch.empty(N, row_width(V), dtype=dtype, device=device)[:, :V]


# ---- Triton


@triton.jit
def _shifted(m_s, m_t, Z_s, Z_t, Z_1, c, n_s, n_t, k, HAS_LABELS: tl.constexpr, TAU: tl.constexpr):
    """(Z_s, Z_t, Z_1, c) with the maxima n_s, n_t in place of m_s, m_t; k = log2(e) / tau."""
    # where the student has ruled out all so far, c holds the floor in place of a distance to a maximum
    d_s = tl.where(m_s == NOTHING, 0.0, (m_s - n_s) * k)
    d_t = (m_t - n_t) * k
    old_s = tl.exp2(d_s)
    old_t = tl.exp2(d_t)
    if HAS_LABELS:
        if TAU == 1:
            Z_1 *= old_s
        elif TAU == 2:
            Z_1 *= old_s * old_s
        else:
            Z_1 *= tl.exp2((m_s - n_s) * LOG2E)
    # every old term of c shifts by what the two maxima moved, weighted with its p: hence the old Z_t
    c = old_t * (c + Z_t * (d_t - d_s))
    return Z_s * old_s, Z_t * old_t, Z_1, c


@triton.jit
def _update(s, t, m_s, m_t, Z_s, Z_t, Z_1, c, k, HAS_LABELS: tl.constexpr, TAU: tl.constexpr):
    """Takes E logits (G, E), fp32, into each of G statistics (G,)."""
    n_s = tl.maximum(m_s, tl.max(s, 1))
    n_t = tl.maximum(m_t, tl.max(t, 1))
    Z_s, Z_t, Z_1, c = _shifted(m_s, m_t, Z_s, Z_t, Z_1, c, n_s, n_t, k, HAS_LABELS, TAU)
    d_s = s - n_s[:, None]
    # the floor keeps 0 * (-inf - -inf) from being NaN; plain tl.maximum would turn a NaN logit into probability 0
    x_s = tl.maximum(d_s * k, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    x_t = tl.maximum((t - n_t[:, None]) * k, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    e_s = tl.exp2(x_s)
    e_t = tl.exp2(x_t)
    if HAS_LABELS:
        if TAU == 1:
            e_1 = e_s
        elif TAU == 2:
            e_1 = e_s * e_s
        else:
            e_1 = tl.exp2(d_s * LOG2E)
        Z_1 += tl.sum(e_1, 1)
    return n_s, n_t, Z_s + tl.sum(e_s, 1), Z_t + tl.sum(e_t, 1), Z_1, c + tl.sum(e_t * (x_t - x_s), 1)


@triton.jit
def _merged(m_s, m_t, Z_s, Z_t, Z_1, c, k, HAS_LABELS: tl.constexpr, TAU: tl.constexpr):
    """The statistics of a row from those of its parts (P,)."""
    n_s = tl.max(m_s, 0)
    n_t = tl.max(m_t, 0)
    Z_s, Z_t, Z_1, c = _shifted(m_s, m_t, Z_s, Z_t, Z_1, c, n_s, n_t, k, HAS_LABELS, TAU)
    return n_s, n_t, tl.sum(Z_s, 0), tl.sum(Z_t, 0), tl.sum(Z_1, 0), tl.sum(c, 0)


@triton.jit
def _load_inside(ptr, at, skip, stop, end):
    """fp32 logits at places skip ... stop, -inf elsewhere. Loads are wide where 16 divides `end`, which bounds them."""
    x = tl.load(ptr + at, mask=at < end, other=float("-inf"))
    return tl.where((at >= skip) & (at < stop), x, float("-inf")).to(tl.float32)


@triton.jit
def row_statistics(
    s_ptr, t_ptr, start, skip, stop, end, k,
    HAS_LABELS: tl.constexpr, TAU: tl.constexpr, PEEL: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One pass over places start ... stop from 16-byte boundaries on; `start` is a multiple of BLOCK_V.

    If PEEL, the first `skip` places belong to what precedes the row. Places from `stop` to `end` may be read, too.
    A thread loads E logits at once, 16 bytes, and keeps statistics of what it has loaded: threads meet after the loop.
    """
    E: tl.constexpr = 128 // s_ptr.dtype.element_ty.primitive_bitwidth
    G: tl.constexpr = BLOCK_V // E
    cols = tl.arange(0, G)[:, None] * E + tl.arange(0, E)[None, :]
    m_s = tl.full((G,), NOTHING, tl.float32)
    m_t = tl.full((G,), NOTHING, tl.float32)
    Z_s = tl.zeros((G,), tl.float32)
    Z_t = tl.zeros((G,), tl.float32)
    Z_1 = tl.zeros((G,), tl.float32)
    c = tl.zeros((G,), tl.float32)
    if PEEL:
        s = _load_inside(s_ptr, start + cols, skip, stop, end)
        t = _load_inside(t_ptr, start + cols, skip, stop, end)
        m_s, m_t, Z_s, Z_t, Z_1, c = _update(s, t, m_s, m_t, Z_s, Z_t, Z_1, c, k, HAS_LABELS, TAU)
        start += BLOCK_V
    full = start + tl.maximum(stop - start, 0) // BLOCK_V * BLOCK_V
    for v in range(start, full, BLOCK_V):  # a mask here would make every load two bytes wide
        s = tl.load(s_ptr + v + cols).to(tl.float32)
        t = tl.load(t_ptr + v + cols).to(tl.float32)
        m_s, m_t, Z_s, Z_t, Z_1, c = _update(s, t, m_s, m_t, Z_s, Z_t, Z_1, c, k, HAS_LABELS, TAU)
    if full < stop:
        s = _load_inside(s_ptr, full + cols, 0, stop, end)
        t = _load_inside(t_ptr, full + cols, 0, stop, end)
        m_s, m_t, Z_s, Z_t, Z_1, c = _update(s, t, m_s, m_t, Z_s, Z_t, Z_1, c, k, HAS_LABELS, TAU)
    return _merged(m_s, m_t, Z_s, Z_t, Z_1, c, k, HAS_LABELS, TAU)


@triton.jit
def row_losses(s_ptr, y, m_s, Z_s, Z_t, Z_1, c, V, tau, HAS_LABELS: tl.constexpr):
    """(kl, ce) of a row, in nats, from its statistics. A label outside the vocabulary gives NaN, not a wild read."""
    kl = (c / Z_t + tl.log2(Z_s / Z_t)) * LN2 * tau * tau  # not a difference of logarithms, which are large
    ce = tl.full((), 0.0, tl.float32)
    if HAS_LABELS:
        known = (y >= 0) & (y < V)
        s_y = tl.load(s_ptr + tl.where(known, y, 0)).to(tl.float32)
        ce = (m_s - s_y) + tl.log2(Z_1) * LN2
        ce = tl.where(known, ce, tl.where(y == -100, 0.0, float("nan")))
    return kl, ce


@triton.jit
def block_gradient(
    s, t, at, y_at, g_kl, g_ce, m_s, m_t, l_s, l_t, l_1, k,
    HAS_LABELS: tl.constexpr, TAU: tl.constexpr,
):  # fmt: skip
    """Gradient of g_kl kl / tau + g_ce ce at places `at`, y_at that of the label; l_* are base-2 logarithms of Z_*."""
    d = s - m_s
    q = tl.exp2(d * k - l_s)
    g = g_kl * (q - tl.exp2((t - m_t) * k - l_t))
    if HAS_LABELS:
        if TAU == 1:
            q_1 = q
        elif TAU == 2:
            q_1 = q * q * tl.exp2(2.0 * l_s - l_1)  # exp(d) = exp(d / 2)^2
        else:
            q_1 = tl.exp2(d * LOG2E - l_1)
        g += g_ce * q_1 - tl.where(at == y_at, g_ce, 0.0)
    return g


@triton.jit
def _row(ptr, row, stride, PEEL: tl.constexpr):
    """(pointer, skip): the row begins `skip` elements after the pointer, which is at a 16-byte boundary where PEEL."""
    offset = row * stride
    if PEEL:
        E: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
        aligned = offset // E * E  # so written, the compiler sees that E divides it
        return ptr + aligned, (offset - aligned).to(tl.int32)
    else:
        return ptr + offset, 0


@triton.jit
def _store_row(
    s_ptr, labels_ptr, kl_ptr, ce_ptr, stats_ptr, row, m_s, m_t, Z_s, Z_t, Z_1, c, V, tau, HAS_LABELS: tl.constexpr
):  # fmt: skip
    """Writes what the whole of a row gives: its losses, and its statistics for the backward pass."""
    y = tl.load(labels_ptr + row) if HAS_LABELS else -100
    kl, ce = row_losses(s_ptr, y, m_s, Z_s, Z_t, Z_1, c, V, tau, HAS_LABELS)
    tl.store(kl_ptr + row, kl)
    tl.store(ce_ptr + row, ce)
    stats_ptr += row * 5
    tl.store(stats_ptr + 0, m_s)
    tl.store(stats_ptr + 1, m_t)
    tl.store(stats_ptr + 2, tl.log2(Z_s))
    tl.store(stats_ptr + 3, tl.log2(Z_t))
    tl.store(stats_ptr + 4, tl.log2(Z_1) if HAS_LABELS else 0.0)


@triton.jit
def _forward_kernel(
    s_ptr,  # (N, V), any float
    t_ptr,  # (N, V), any float
    labels_ptr,  # (N,) int64
    kl_ptr,  # (N,) fp32
    ce_ptr,  # (N,) fp32
    stats_ptr,  # (N, 5) fp32: m_s, m_t, log2 Z_s, log2 Z_t, log2 Z_1
    parts_ptr,  # (N, P, 6) fp32: m_s, m_t, Z_s, Z_t, Z_1, c of each of P parts of a row
    stride_s,
    stride_t,
    V,
    width,  # columns of a part, a multiple of BLOCK_V
    tau,
    HAS_LABELS: tl.constexpr,
    TAU: tl.constexpr,
    SPLIT: tl.constexpr,  # whether P > 1
    PEEL: tl.constexpr,  # whether rows begin off 16-byte boundaries, those of s and t alike
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31 at 70,345 rows
    s_ptr, skip = _row(s_ptr, row, stride_s, PEEL)
    t_ptr, _ = _row(t_ptr, row, stride_t, PEEL)
    k = LOG2E / tau
    stop = skip + V
    if not SPLIT:
        m_s, m_t, Z_s, Z_t, Z_1, c = row_statistics(
            s_ptr, t_ptr, 0, skip, stop, stop, k, HAS_LABELS, TAU, PEEL, BLOCK_V
        )  # fmt: skip
        _store_row(
            s_ptr + skip, labels_ptr, kl_ptr, ce_ptr, stats_ptr, row, m_s, m_t, Z_s, Z_t, Z_1, c, V, tau, HAS_LABELS
        )  # fmt: skip
    else:
        start = tl.program_id(1) * width
        if tl.program_id(1) + 1 < tl.num_programs(1):  # the last part takes the `skip` places, too
            stop = start + width
        m_s, m_t, Z_s, Z_t, Z_1, c = row_statistics(
            s_ptr, t_ptr, start, skip, stop, stop, k, HAS_LABELS, TAU, PEEL, BLOCK_V
        )  # fmt: skip
        parts_ptr += (row * tl.num_programs(1) + tl.program_id(1)) * 6
        tl.store(parts_ptr + 0, m_s)
        tl.store(parts_ptr + 1, m_t)
        tl.store(parts_ptr + 2, Z_s)
        tl.store(parts_ptr + 3, Z_t)
        tl.store(parts_ptr + 4, Z_1)
        tl.store(parts_ptr + 5, c)


@triton.jit
def _merge_kernel(
    s_ptr,  # (N, V), any float
    labels_ptr,  # (N,) int64
    kl_ptr,  # (N,) fp32
    ce_ptr,  # (N,) fp32
    stats_ptr,  # (N, 5) fp32
    parts_ptr,  # (N, P, 6) fp32
    stride_s,
    V,
    P,
    tau,
    HAS_LABELS: tl.constexpr,
    TAU: tl.constexpr,
    BLOCK_P: tl.constexpr,  # P rounded up to a power of two
):
    """Puts the parts of a row together."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_P)
    there = part < P
    parts_ptr += (row * P + part) * 6
    k = LOG2E / tau
    m_s = tl.load(parts_ptr + 0, mask=there, other=NOTHING)
    m_t = tl.load(parts_ptr + 1, mask=there, other=NOTHING)
    Z_s = tl.load(parts_ptr + 2, mask=there, other=0.0)
    Z_t = tl.load(parts_ptr + 3, mask=there, other=0.0)
    Z_1 = tl.load(parts_ptr + 4, mask=there, other=0.0)
    c = tl.load(parts_ptr + 5, mask=there, other=0.0)
    m_s, m_t, Z_s, Z_t, Z_1, c = _merged(m_s, m_t, Z_s, Z_t, Z_1, c, k, HAS_LABELS, TAU)
    s_ptr += row * stride_s
    _store_row(s_ptr, labels_ptr, kl_ptr, ce_ptr, stats_ptr, row, m_s, m_t, Z_s, Z_t, Z_1, c, V, tau, HAS_LABELS)


@triton.jit
def _backward_kernel(
    s_ptr,  # (N, V), any float
    t_ptr,  # (N, V), any float
    labels_ptr,  # (N,) int64
    g_kl_ptr,  # (N,) fp32, stride 0 where every row has the same
    g_ce_ptr,  # (N,) fp32
    stats_ptr,  # (N, 5) fp32
    ds_ptr,  # (N, V), as s
    stride_s,
    stride_t,
    stride_ds,
    stride_g_kl,
    stride_g_ce,
    V,
    tau,
    HAS_LABELS: tl.constexpr,
    TAU: tl.constexpr,
    PEEL: tl.constexpr,  # whether rows begin off 16-byte boundaries, those of s, t and ds alike
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s_ptr, skip = _row(s_ptr, row, stride_s, PEEL)
    t_ptr, _ = _row(t_ptr, row, stride_t, PEEL)
    ds_ptr, _ = _row(ds_ptr, row, stride_ds, PEEL)
    start = tl.program_id(1) * BLOCK_V
    stop = skip + V
    at = start + tl.arange(0, BLOCK_V)
    stats_ptr += row * 5
    k = LOG2E / tau
    m_s = tl.load(stats_ptr + 0)
    m_t = tl.load(stats_ptr + 1)
    l_s = tl.load(stats_ptr + 2)
    l_t = tl.load(stats_ptr + 3)
    l_1 = tl.load(stats_ptr + 4)
    y = tl.load(labels_ptr + row) if HAS_LABELS else -100
    y_at = y + skip
    g_kl = tl.load(g_kl_ptr + row * stride_g_kl) * tau  # tau^2 of the value, 1 / tau of the softened logits
    g_ce = tl.where(y == -100, 0.0, tl.load(g_ce_ptr + row * stride_g_ce))
    if (start >= skip) & (start + BLOCK_V <= stop):
        s = tl.load(s_ptr + at).to(tl.float32)
        t = tl.load(t_ptr + at).to(tl.float32)
        g = block_gradient(s, t, at, y_at, g_kl, g_ce, m_s, m_t, l_s, l_t, l_1, k, HAS_LABELS, TAU)
        tl.store(ds_ptr + at, g.to(ds_ptr.dtype.element_ty))
    else:
        inside = (at >= skip) & (at < stop)
        s = tl.load(s_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
        t = tl.load(t_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
        g = block_gradient(s, t, at, y_at, g_kl, g_ce, m_s, m_t, l_s, l_t, l_1, k, HAS_LABELS, TAU)
        tl.store(ds_ptr + at, g.to(ds_ptr.dtype.element_ty), mask=inside)


# ---- CPU: the same closed form, a few rows at a time; what is one number a row is computed for all of them at once

CACHE_BYTES = 1 << 20  # of a block, 8 rows of 30,522 fp32: the few that a loop works on stay in second-level caches


def rows_in_cache(V, dtype):
    """How many rows of V numbers to work on at once: fewer would cost more in starting passes than they save."""
    return max(1, CACHE_BYTES // (V * dtype.itemsize))


def _divided(x, tau, n, out):
    """x / tau + n of a few rows, n (R, 1). A sum even where n is 0: a product takes a third longer out of place."""
    if x.dtype != out.dtype:
        x = out.copy_(x)  # arithmetic on two dtypes is not vectorised
    return torch.add(n, x, alpha=1 / tau, out=out)


def exponentials(x, tau, m, Z, out):
    """Puts exp(x - m) of a few rows x = logits / tau (R, V) into `out`, and their sums into Z (R, 1); returns `out`.

    m (R, 1) comes as 0 and stays 0 where exp(x), and exp(x)^tau = exp(logits) as well, are far from the ends of fp32,
    as for logits of a trained model: looking for a maximum is one pass in ten. Else m becomes the maximum of each row,
    and x becomes x - m. All goes into memory that is there already: allocating would cost more than exp.
    """
    V, most = x.shape[1], 1e30 ** (1 / max(tau, 1.0))
    if V >= 1000:  # shorter rows cost little, and the probability of a single word is 1 to the last bit
        torch.sum(torch.exp(x, out=out), -1, keepdim=True, out=Z)
        if all(V / most < z < most for z in Z[:, 0].tolist()):
            return out
    x.sub_(torch.amax(x, -1, keepdim=True, out=m))
    torch.sum(torch.exp(x, out=out), -1, keepdim=True, out=Z)
    return out


def floored(x):
    """Log-probabilities x (R, V), up to a constant a row: raises in place those below the floor to the floor."""
    return x.clamp_(min=x.amax(-1, keepdim=True) + FLOOR_NATS)


def _forward_rows(s, t, labels, tau):
    """Per-row (kl, ce, stats): stats (N, 5) are m_s, m_t, Z_s, Z_t, Z_1, of logits divided by tau."""
    N, V = s.shape
    wide = torch.promote_types(s.dtype, torch.float32)
    stats, c = s.new_zeros(N, 5, dtype=wide), s.new_empty(N, 1, dtype=wide)
    columns, R = stats.split(1, 1), rows_in_cache(V, wide)
    scratch = s.new_empty(3, min(N, R), V, dtype=wide)
    for s_, t_, m_s, m_t, Z_s, Z_t, Z_1, c_ in zip(*(x.split(R) for x in (s, t, *columns, c)), strict=True):
        a, b, e = scratch[:, : len(s_)]
        exponentials(_divided(s_, tau, m_s, a), tau, m_s, Z_s, e)
        if labels is not None:  # exp(s) = exp(s / tau)^tau
            torch.linalg.vector_norm(e, tau, dim=-1, keepdim=True, out=Z_1).pow_(tau)
        exponentials(_divided(t_, tau, m_t, b), tau, m_t, Z_t, e)
        torch.sum(b.sub_(a).mul_(e), -1, keepdim=True, out=c_)
    m_s, m_t, Z_s, Z_t, Z_1 = columns
    for rows in (~c.isfinite()[:, 0]).nonzero()[:, 0].split(R):
        # logits of -inf: 0 (-inf + inf) = 0; what only the student rules out costs the floor
        a, b = (floored(x[rows].to(wide).div_(tau).sub_(m[rows])) for x, m in ((s, m_s), (t, m_t)))
        c[rows] = (b.exp() * (b - a)).sum(-1, keepdim=True)
    log_Z_s, log_Z_t, log_Z_1 = (Z.double().log() for Z in (Z_s, Z_t, Z_1))  # fp64: large, and their differences small
    kl = (c / Z_t - log_Z_t + log_Z_s)[:, 0] * tau**2
    if labels is None:
        return kl.to(wide), torch.zeros_like(kl, dtype=wide), stats
    labelled = labels != IGNORE
    s_y = s.gather(1, labels.where(labelled, 0)[:, None])
    ce = (log_Z_1 + m_s * tau - s_y)[:, 0].where(labelled, 0.0)
    return kl.to(wide), ce.to(wide), stats


def _backward_rows(g_kl, g_ce, s, t, labels, stats, tau, ds):
    """Writes the gradient of `_forward_rows` into ds."""
    N, V = s.shape
    R = rows_in_cache(V, stats.dtype)
    scratch = s.new_empty(1 + (ds.dtype != stats.dtype), min(N, R), V, dtype=stats.dtype)
    m_s, m_t, Z_s, Z_t, Z_1 = stats.split(1, 1)
    weight = tau * g_kl[:, None]
    y = s.new_full((N, 1), IGNORE, dtype=torch.int64) if labels is None else labels[:, None]
    g_1, y = g_ce[:, None].where(y != IGNORE, 0.0), y.where(y != IGNORE, 0)
    per_row = -m_s, -m_t, weight / Z_s, -weight / Z_t, g_1 / Z_1, y, -g_1
    for d, s_, t_, n_s, n_t, w_s, w_t, w_1, y, minus in zip(
        *(x.split(R) for x in (ds, s, t, *per_row)), strict=True
    ):
        g, *e_s = scratch[:, : len(d)]
        e_s = e_s[0] if e_s else d  # in the memory of the result where that is as wide
        _divided(s_, tau, n_s, e_s).exp_()
        _divided(t_, tau, n_t, g).exp_().mul_(w_t).addcmul_(e_s, w_s)
        if labels is not None:
            g = torch.addcmul(g.scatter_add_(1, y, minus), e_s.pow_(tau), w_1, out=e_s)
        if g is not d:
            d.copy_(g)
    return ds


def power_of(tau):
    """Which power of exp(x / tau) is exp(x): saves an exponential per logit at the usual temperatures; 0 for none."""
    return int(tau) if tau in (1.0, 2.0) else 0


def _split(N, V, device):
    """(parts, width): into how many parts of `width` columns to cut each row, so that few rows still fill a GPU."""
    programs = 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    count = -(-V // BLOCK_V)  # triton.cdiv costs the host 2 us
    width = -(-count // min(count, -(-programs // N))) * BLOCK_V
    return -(-V // width), width


def _peel(*tensors):
    """Whether the kernels start each row at the 16-byte boundary at or below it: Triton cannot prove that it is at one.

    All tensors must then be alike: of one dtype, their rows equally far off a boundary, their first elements at one.
    """
    E = 16 // tensors[0].element_size()
    strides = [x.stride(0) for x in tensors]
    return (
        any(stride % 16 for stride in strides)
        and all((stride - strides[0]) % E == 0 for stride in strides)
        and all(x.dtype == tensors[0].dtype and x.data_ptr() % 16 == 0 for x in tensors)
    )


# ---- the operator


def _forward_losses(
    s: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None, tau: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    N, V = s.shape
    if not on_triton(s) or s.dtype == torch.float64:
        return _forward_rows(s, t, labels, tau)
    kl, ce, stats = (s.new_empty(shape, dtype=torch.float32) for shape in ((N,), (N,), (N, 5)))
    if N == 0:
        return kl, ce, stats
    parts, width = _split(N, V, s.device)
    scratch = s.new_empty(N, parts, 6, dtype=torch.float32) if parts > 1 else stats
    options = dict(HAS_LABELS=labels is not None, TAU=power_of(tau))
    _forward_kernel[(N, parts)](
        s, t, labels, kl, ce, stats, scratch, s.stride(0), t.stride(0), V, width, tau,
        SPLIT=parts > 1, PEEL=_peel(s, t), BLOCK_V=BLOCK_V, num_warps=WARPS, **options,
    )  # fmt: skip
    if parts > 1:
        _merge_kernel[(N,)](
            s, labels, kl, ce, stats, scratch, s.stride(0), V, parts, tau,
            BLOCK_P=1 << (parts - 1).bit_length(), num_warps=1, **options,
        )  # fmt: skip
    return kl, ce, stats


def _fake_losses(s, t, labels, tau):
    wide = torch.promote_types(s.dtype, torch.float32)
    return tuple(s.new_empty(shape, dtype=wide) for shape in ((len(s),), (len(s),), (len(s), 5)))


def _backward_losses(
    g_kl: torch.Tensor, g_ce: torch.Tensor, s: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None,
    stats: torch.Tensor, tau: float,
) -> torch.Tensor:  # fmt: skip
    N, V = s.shape
    ds = torch.empty_strided(s.shape, s.stride(), dtype=s.dtype, device=s.device)  # padded where s is
    if not on_triton(s) or s.dtype == torch.float64:
        return _backward_rows(g_kl, g_ce, s, t, labels, stats, tau, ds)
    if N:
        peel = _peel(s, t, ds)
        most = V + (16 // s.element_size() - 1 if peel else 0)  # places of a row, with those before it
        _backward_kernel[(N, -(-most // BLOCK_V))](
            s, t, labels, g_kl, g_ce, stats, ds, s.stride(0), t.stride(0), ds.stride(0), g_kl.stride(0),
            g_ce.stride(0), V, tau, HAS_LABELS=labels is not None, TAU=power_of(tau), PEEL=peel, BLOCK_V=BLOCK_V,
            num_warps=WARPS,
        )  # fmt: skip
    return ds


def _fake_gradient(g_kl, g_ce, s, t, labels, stats, tau):
    return torch.empty_strided(s.shape, s.stride(), dtype=s.dtype, device=s.device)


_backward = opaque("distill_kl_backward", _backward_losses, _fake_gradient)


def _setup_context(ctx, inputs, output):
    s, t, labels, ctx.tau = inputs
    ctx.save_for_backward(s, t, labels, output[2])


def _backward_of_forward(ctx, g_kl, g_ce, _):
    # the gradients stay on the device: the kernel reads them by pointer, so nothing waits for the host
    return _backward(g_kl, g_ce, *ctx.saved_tensors, ctx.tau), None, None, None


_forward = differentiable("distill_kl", _forward_losses, _fake_losses, _setup_context, _backward_of_forward)


def distill_kl(s, t, labels=None, temperature=2.0, kl_weights=None, ce_weights=None):
    """Sums over rows of kl_weights * tau^2 KL(softmax(t / tau) || softmax(s / tau)) and ce_weights * cross-entropy.

    s, t (N, V) logits of student and teacher, fp32, bf16, fp16 (fp64 without a kernel); the last dimension contiguous,
    and any row stride: loads are wide where rows of s and t are equally far off 16-byte boundaries. labels (N,) int64
    are -100 in rows without cross-entropy; None: no row has one. kl_weights, ce_weights (N,) fp32: 1 where left out; 0
    drops a row.
    Returns (kl, ce): 0-d fp32, in nats, differentiable in s alone and apart from each other. Raises ValueError where
    shapes disagree or the teacher's logits want a gradient. Source: Hinton et al. 2015, section 2.
    """
    shapes = [tuple(x.shape) for x in (s, t, labels) if x is not None]
    if s.ndim != 2 or s.shape != t.shape or (labels is not None and labels.shape != s.shape[:1]):
        raise ValueError(f"logits must be (N, V) twice, and labels (N,): they are {shapes}")
    if t.requires_grad:
        raise ValueError("the teacher must be frozen: its logits take no gradient")
    s, t = (x if x.stride(-1) == 1 else x.contiguous() for x in (s, t))
    kl, ce, _ = _forward(s, t, labels, float(temperature))
    kl, ce = (x if w is None else x * w for x, w in ((kl, kl_weights), (ce, ce_weights)))
    return kl.sum(), ce.sum()


def bytes_moved(N, V, itemsize):
    """Bytes that forward and backward must move at least: both logits read twice, the gradient written once."""
    return 5 * N * V * itemsize
