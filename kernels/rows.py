"""Triton functions of both loss kernels, for a row of logits: statistics in one pass, losses, gradient.

The formulas and the legend are in distill_kl.py; README.md derives them.
"""

from kernels import FLOOR
from kernels.backend import tl, triton

FLOOR_LOG2 = tl.constexpr(FLOOR)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NOTHING = tl.constexpr(-1.0e30)  # maximum of no logits: finite, because -inf - -inf is NaN


@triton.jit
def first_of_row(ptr, row, stride, PEEL: tl.constexpr):
    """Returns (pointer, skip): the row begins `skip` elements after the pointer, which is 16-byte aligned with PEEL."""
    offset = row * stride
    if PEEL:
        E: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
        aligned = offset // E * E  # in this form the compiler sees that E divides it
        return ptr + aligned, (offset - aligned).to(tl.int32)
    else:
        return ptr + offset, 0


@triton.jit
def rescale(m_s, m_t, Z_s, Z_t, Z_1, c, n_s, n_t, k, HAS_LABELS: tl.constexpr, TAU: tl.constexpr):
    """Returns (Z_s, Z_t, Z_1, c) for the maxima n_s, n_t instead of m_s, m_t; k = log2(e) / tau."""
    # where all student logits so far are -inf, c holds the floor, not a distance to a maximum: no shift
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
    # every old term of c shifts by the change of both maxima, weighted with its p: hence the old Z_t
    c = old_t * (c + Z_t * (d_t - d_s))
    return Z_s * old_s, Z_t * old_t, Z_1, c


@triton.jit
def update(s, t, m_s, m_t, Z_s, Z_t, Z_1, c, k, HAS_LABELS: tl.constexpr, TAU: tl.constexpr):
    """Updates each of G statistics (G,) with E logits (G, E), fp32."""
    n_s = tl.maximum(m_s, tl.max(s, 1))
    n_t = tl.maximum(m_t, tl.max(t, 1))
    Z_s, Z_t, Z_1, c = rescale(m_s, m_t, Z_s, Z_t, Z_1, c, n_s, n_t, k, HAS_LABELS, TAU)
    d_s = s - n_s[:, None]
    # the floor avoids NaN from 0 * (-inf - -inf); plain tl.maximum would turn a NaN logit into probability 0
    x_s = tl.maximum(d_s * k, FLOOR_LOG2, propagate_nan=tl.PropagateNan.ALL)
    x_t = tl.maximum((t - n_t[:, None]) * k, FLOOR_LOG2, propagate_nan=tl.PropagateNan.ALL)
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
def combine(m_s, m_t, Z_s, Z_t, Z_1, c, k, HAS_LABELS: tl.constexpr, TAU: tl.constexpr):
    """Returns the statistics of a row from those of its parts (P,)."""
    n_s = tl.max(m_s, 0)
    n_t = tl.max(m_t, 0)
    Z_s, Z_t, Z_1, c = rescale(m_s, m_t, Z_s, Z_t, Z_1, c, n_s, n_t, k, HAS_LABELS, TAU)
    return n_s, n_t, tl.sum(Z_s, 0), tl.sum(Z_t, 0), tl.sum(Z_1, 0), tl.sum(c, 0)


@triton.jit
def load_inside(ptr, at, skip, stop, end):
    """Loads fp32 logits at positions skip ... stop, -inf elsewhere; loads up to `end` are wide where 16 divides it."""
    x = tl.load(ptr + at, mask=at < end, other=float("-inf")).to(tl.float32)
    return tl.where((at >= skip) & (at < stop), x, float("-inf"))  # of fp32: Triton 3.7 interprets no bf16 constant


@triton.jit
def row_statistics(
    s_ptr, t_ptr, start, skip, stop, end, k,
    HAS_LABELS: tl.constexpr, TAU: tl.constexpr, PEEL: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Returns the statistics of positions start ... stop, in one aligned pass; `start` is a multiple of BLOCK_V.

    With PEEL, the first `skip` positions precede the row. Positions from `stop` to `end` may be read too. A thread
    loads E logits at once, 16 bytes, and keeps statistics of these; the threads are combined after the loop.
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
        s = load_inside(s_ptr, start + cols, skip, stop, end)
        t = load_inside(t_ptr, start + cols, skip, stop, end)
        m_s, m_t, Z_s, Z_t, Z_1, c = update(s, t, m_s, m_t, Z_s, Z_t, Z_1, c, k, HAS_LABELS, TAU)
        start += BLOCK_V
    full = start + tl.maximum(stop - start, 0) // BLOCK_V * BLOCK_V
    for v in range(start, full, BLOCK_V):  # a mask here would make every load two bytes wide
        s = tl.load(s_ptr + v + cols).to(tl.float32)
        t = tl.load(t_ptr + v + cols).to(tl.float32)
        m_s, m_t, Z_s, Z_t, Z_1, c = update(s, t, m_s, m_t, Z_s, Z_t, Z_1, c, k, HAS_LABELS, TAU)
    if full < stop:
        s = load_inside(s_ptr, full + cols, 0, stop, end)
        t = load_inside(t_ptr, full + cols, 0, stop, end)
        m_s, m_t, Z_s, Z_t, Z_1, c = update(s, t, m_s, m_t, Z_s, Z_t, Z_1, c, k, HAS_LABELS, TAU)
    return combine(m_s, m_t, Z_s, Z_t, Z_1, c, k, HAS_LABELS, TAU)


@triton.jit
def row_losses(s_ptr, y, m_s, Z_s, Z_t, Z_1, c, V, tau, HAS_LABELS: tl.constexpr):
    """Returns (kl, ce) of a row in nats; a label outside the vocabulary gives NaN instead of a read out of bounds."""
    kl = (c / Z_t + tl.log2(Z_s / Z_t)) * LN2 * tau * tau  # not a difference of logarithms, which are large
    ce = tl.full((), 0.0, tl.float32)
    if HAS_LABELS:
        known = (y >= 0) & (y < V)
        s_y = tl.load(s_ptr + tl.where(known, y, 0)).to(tl.float32)
        ce = (m_s - s_y) + tl.log2(Z_1) * LN2
        ce = tl.where(known, ce, tl.where(y == -100, 0.0, float("nan")))
    return kl, ce


@triton.jit
def block_gradient(s, t, at, y_at, g_kl, g_ce, m_s, m_t, l_s, l_t, l_1, k, HAS_LABELS: tl.constexpr, TAU: tl.constexpr):
    """Returns the gradient of g_kl kl / tau + g_ce ce at positions `at`; y_at: that of the label; l_*: log2 of Z_*."""
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
