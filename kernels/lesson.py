"""The kernels of the distillation loss, rung by rung; README.md derives the formulas.

    python kernels/lesson.py                   every rung: its error, its traps, and what an H100 would execute
    python kernels/lesson.py 5 6               some of them
    python kernels/lesson.py check mine.py     the same for a kernel of yours

Each rung is a whole kernel, which differs from the one before by one idea, said above it. They run in Triton's
interpreter where there is no GPU; a compiler for the H100 comes with Triton. Cover a rung and write it from its idea
into a file that imports triton, as a kernel marked `@triton.jit`, called `forward` with the arguments of rungs 1 to 6,
or `backward` with those of rung 7. Then have it checked. BLOCK and WARPS may be set in the file.

For a row of student logits s and teacher logits t, temperature TAU and label y (-100: none):

    kl = TAU^2 sum p (log p - log q)        p = softmax(t / TAU)      q = softmax(s / TAU)
    ce = -log softmax(s)[y]

Legend:  V vocabulary   m maximum   Z sum of exponentials   c sum of the teacher's exponentials times log differences
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # kernels/operator.py is not Python's

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

if __name__ == "__main__" and not torch.cuda.is_available() and "--compile" not in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

BLOCK, WARPS = 2048, 4  # logits of each model that a program loads at once, and warps of 32 threads that share them


# ---- 0. The definition
# PyTorch's operators read and write everything in fp32, about 160 bytes a pair of bf16 logits. Ten would do.


def definition(s, t, labels, TAU):
    """Returns (kl, ce), each (N,): of logits (N, V) in any dtype, differentiable."""
    log_q, log_p = F.log_softmax(s / TAU, -1), F.log_softmax(t / TAU, -1)
    p = log_p.exp()
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1) * TAU**2  # 0 log 0 = 0
    return kl, F.cross_entropy(s, labels, reduction="none")


# ---- 1. Two passes
# A program reads a row twice, block by block: once for the maxima, once for four sums. It writes two numbers a row. No
# logarithm is taken of a word: kl / TAU^2 = c / Z_t + log(Z_s / Z_t) (README.md, section 1).


@triton.jit
def finish(s_ptr, labels_ptr, kl_ptr, ce_ptr, row, m_s, Z_s, Z_t, Z_1, c, TAU: tl.constexpr):
    """Writes the losses of a row from its statistics: the end of rungs 1 to 4."""
    tl.store(kl_ptr + row, (c / Z_t + tl.log(Z_s / Z_t)) * TAU * TAU)
    y = tl.load(labels_ptr + row)
    s_y = tl.load(s_ptr + y, mask=y >= 0, other=0.0).to(tl.float32)
    tl.store(ce_ptr + row, tl.where(y == -100, 0.0, m_s + tl.log(Z_1) - s_y))


@triton.jit
def two_passes(s_ptr, t_ptr, labels_ptr, kl_ptr, ce_ptr, stride, V, TAU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    s_ptr += row * stride
    t_ptr += row * stride
    cols = tl.arange(0, BLOCK)
    m_s = tl.full((), float("-inf"), tl.float32)
    m_t = tl.full((), float("-inf"), tl.float32)
    for v in range(0, V, BLOCK):
        inside = v + cols < V
        m_s = tl.maximum(m_s, tl.max(tl.load(s_ptr + v + cols, mask=inside, other=float("-inf")).to(tl.float32), 0))
        m_t = tl.maximum(m_t, tl.max(tl.load(t_ptr + v + cols, mask=inside, other=float("-inf")).to(tl.float32), 0))
    Z_s = tl.full((), 0.0, tl.float32)
    Z_t = tl.full((), 0.0, tl.float32)
    Z_1 = tl.full((), 0.0, tl.float32)
    c = tl.full((), 0.0, tl.float32)
    for v in range(0, V, BLOCK):
        inside = v + cols < V
        s = tl.load(s_ptr + v + cols, mask=inside, other=float("-inf")).to(tl.float32)
        t = tl.load(t_ptr + v + cols, mask=inside, other=float("-inf")).to(tl.float32)
        x_s = (s - m_s) / TAU
        x_t = (t - m_t) / TAU
        e_t = tl.exp(x_t)
        Z_s += tl.sum(tl.exp(x_s), 0)
        Z_t += tl.sum(e_t, 0)
        Z_1 += tl.sum(tl.exp(s - m_s), 0)
        c += tl.sum(tl.where(inside, e_t * (x_t - x_s), 0.0), 0)  # outside it is 0 * (-inf - -inf), which is NaN
    finish(s_ptr, labels_ptr, kl_ptr, ce_ptr, row, m_s, Z_s, Z_t, Z_1, c, TAU)


# ---- 2. One pass
# The sums begin before the maxima are known. Where a block raises them, the old sums are brought to the new ones: every
# old exponential by the same factor, and c by the change of all its differences. No maximum yet is a finite number,
# because -inf - -inf is NaN. Half the bytes.

NOTHING = tl.constexpr(-1.0e30)


@triton.jit
def one_pass(s_ptr, t_ptr, labels_ptr, kl_ptr, ce_ptr, stride, V, TAU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    s_ptr += row * stride
    t_ptr += row * stride
    cols = tl.arange(0, BLOCK)
    m_s = tl.full((), NOTHING, tl.float32)
    m_t = tl.full((), NOTHING, tl.float32)
    Z_s = tl.full((), 0.0, tl.float32)
    Z_t = tl.full((), 0.0, tl.float32)
    Z_1 = tl.full((), 0.0, tl.float32)
    c = tl.full((), 0.0, tl.float32)
    for v in range(0, V, BLOCK):
        inside = v + cols < V
        s = tl.load(s_ptr + v + cols, mask=inside, other=float("-inf")).to(tl.float32)
        t = tl.load(t_ptr + v + cols, mask=inside, other=float("-inf")).to(tl.float32)
        n_s = tl.maximum(m_s, tl.max(s, 0))
        n_t = tl.maximum(m_t, tl.max(t, 0))
        d_s = (m_s - n_s) / TAU
        d_t = (m_t - n_t) / TAU
        x_s = (s - n_s) / TAU
        x_t = (t - n_t) / TAU
        e_t = tl.exp(x_t)
        c = tl.exp(d_t) * (c + Z_t * (d_t - d_s)) + tl.sum(tl.where(inside, e_t * (x_t - x_s), 0.0), 0)
        Z_s = tl.exp(d_s) * Z_s + tl.sum(tl.exp(x_s), 0)
        Z_t = tl.exp(d_t) * Z_t + tl.sum(e_t, 0)
        Z_1 = tl.exp(m_s - n_s) * Z_1 + tl.sum(tl.exp(s - n_s), 0)
        m_s = n_s
        m_t = n_t
    finish(s_ptr, labels_ptr, kl_ptr, ce_ptr, row, m_s, Z_s, Z_t, Z_1, c, TAU)


# ---- 3. No mask in the loop
# A mask applies to single logits, so a load of sixteen bytes falls apart into eight. The loop covers whole blocks, and
# the rest of the row, masked, comes after it. Rows must begin at multiples of 16 bytes: the lesson's are padded. A
# floor under the exponents replaces the select: exp(-16384) is 0, and 0 * (-16384 - -16384) is 0, too.

FLOOR = tl.constexpr(-16384.0)


@triton.jit
def add_block(s, t, m_s, m_t, Z_s, Z_t, Z_1, c, TAU: tl.constexpr):
    """Returns the statistics with a block of logits (BLOCK,)."""
    n_s = tl.maximum(m_s, tl.max(s, 0))
    n_t = tl.maximum(m_t, tl.max(t, 0))
    d_s = (m_s - n_s) / TAU
    d_t = (m_t - n_t) / TAU
    x_s = tl.maximum((s - n_s) / TAU, FLOOR)
    x_t = tl.maximum((t - n_t) / TAU, FLOOR)
    e_t = tl.exp(x_t)
    c = tl.exp(d_t) * (c + Z_t * (d_t - d_s)) + tl.sum(e_t * (x_t - x_s), 0)
    Z_s = tl.exp(d_s) * Z_s + tl.sum(tl.exp(x_s), 0)
    Z_t = tl.exp(d_t) * Z_t + tl.sum(e_t, 0)
    Z_1 = tl.exp(m_s - n_s) * Z_1 + tl.sum(tl.exp(s - n_s), 0)
    return n_s, n_t, Z_s, Z_t, Z_1, c


@triton.jit
def unmasked(s_ptr, t_ptr, labels_ptr, kl_ptr, ce_ptr, stride, V, TAU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    s_ptr += row * stride
    t_ptr += row * stride
    cols = tl.arange(0, BLOCK)
    m_s = tl.full((), NOTHING, tl.float32)
    m_t = tl.full((), NOTHING, tl.float32)
    Z_s = tl.full((), 0.0, tl.float32)
    Z_t = tl.full((), 0.0, tl.float32)
    Z_1 = tl.full((), 0.0, tl.float32)
    c = tl.full((), 0.0, tl.float32)
    full = V // BLOCK * BLOCK
    for v in range(0, full, BLOCK):
        s = tl.load(s_ptr + v + cols).to(tl.float32)
        t = tl.load(t_ptr + v + cols).to(tl.float32)
        m_s, m_t, Z_s, Z_t, Z_1, c = add_block(s, t, m_s, m_t, Z_s, Z_t, Z_1, c, TAU)
    if full < V:
        inside = full + cols < V
        s = tl.load(s_ptr + full + cols, mask=inside, other=float("-inf")).to(tl.float32)
        t = tl.load(t_ptr + full + cols, mask=inside, other=float("-inf")).to(tl.float32)
        m_s, m_t, Z_s, Z_t, Z_1, c = add_block(s, t, m_s, m_t, Z_s, Z_t, Z_1, c, TAU)
    finish(s_ptr, labels_ptr, kl_ptr, ce_ptr, row, m_s, Z_s, Z_t, Z_1, c, TAU)


# ---- 4. Sums per thread
# A maximum over a block involves all 128 threads: shuffles, a barrier, shared memory, a barrier, and no load is in
# flight meanwhile. Here a block is (G, E), and a thread, which loads E logits at once, keeps the statistics of its own.
# The rule that brought old sums to new maxima combines the G statistics once, after the loop.


@triton.jit
def add_rows(s, t, m_s, m_t, Z_s, Z_t, Z_1, c, TAU: tl.constexpr):
    """Returns G statistics (G,), each with E more logits; s, t (G, E)."""
    n_s = tl.maximum(m_s, tl.max(s, 1))
    n_t = tl.maximum(m_t, tl.max(t, 1))
    d_s = (m_s - n_s) / TAU
    d_t = (m_t - n_t) / TAU
    x_s = tl.maximum((s - n_s[:, None]) / TAU, FLOOR)
    x_t = tl.maximum((t - n_t[:, None]) / TAU, FLOOR)
    e_t = tl.exp(x_t)
    c = tl.exp(d_t) * (c + Z_t * (d_t - d_s)) + tl.sum(e_t * (x_t - x_s), 1)
    Z_s = tl.exp(d_s) * Z_s + tl.sum(tl.exp(x_s), 1)
    Z_t = tl.exp(d_t) * Z_t + tl.sum(e_t, 1)
    Z_1 = tl.exp(m_s - n_s) * Z_1 + tl.sum(tl.exp(s - n_s[:, None]), 1)
    return n_s, n_t, Z_s, Z_t, Z_1, c


@triton.jit
def per_thread(s_ptr, t_ptr, labels_ptr, kl_ptr, ce_ptr, stride, V, TAU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    s_ptr += row * stride
    t_ptr += row * stride
    E: tl.constexpr = 128 // s_ptr.dtype.element_ty.primitive_bitwidth  # logits in 16 bytes
    G: tl.constexpr = BLOCK // E
    cols = tl.arange(0, G)[:, None] * E + tl.arange(0, E)[None, :]
    m_s = tl.full((G,), NOTHING, tl.float32)
    m_t = tl.full((G,), NOTHING, tl.float32)
    Z_s = tl.zeros((G,), tl.float32)
    Z_t = tl.zeros((G,), tl.float32)
    Z_1 = tl.zeros((G,), tl.float32)
    c = tl.zeros((G,), tl.float32)
    full = V // BLOCK * BLOCK
    for v in range(0, full, BLOCK):
        s = tl.load(s_ptr + v + cols).to(tl.float32)
        t = tl.load(t_ptr + v + cols).to(tl.float32)
        m_s, m_t, Z_s, Z_t, Z_1, c = add_rows(s, t, m_s, m_t, Z_s, Z_t, Z_1, c, TAU)
    if full < V:
        inside = full + cols < V
        s = tl.load(s_ptr + full + cols, mask=inside, other=float("-inf")).to(tl.float32)
        t = tl.load(t_ptr + full + cols, mask=inside, other=float("-inf")).to(tl.float32)
        m_s, m_t, Z_s, Z_t, Z_1, c = add_rows(s, t, m_s, m_t, Z_s, Z_t, Z_1, c, TAU)
    n_s = tl.max(m_s, 0)
    n_t = tl.max(m_t, 0)
    d_s = (m_s - n_s) / TAU
    d_t = (m_t - n_t) / TAU
    c = tl.sum(tl.exp(d_t) * (c + Z_t * (d_t - d_s)), 0)
    Z_1 = tl.sum(tl.exp(m_s - n_s) * Z_1, 0)
    finish(
        s_ptr, labels_ptr, kl_ptr, ce_ptr, row, n_s, tl.sum(tl.exp(d_s) * Z_s, 0), tl.sum(tl.exp(d_t) * Z_t, 0), Z_1, c,
        TAU,
    )  # fmt: skip


# ---- 5. Base 2, and a square for an exponential
# The hardware computes 2^x; exp(x) costs it a multiplication more. With log2(e) / TAU as the one factor, all exponents
# are in base 2, and one multiplication per row returns to nats. At TAU = 2, exp(s - m) is the square of
# exp((s - m) / 2), which is there already.
#
# ---- 6. Right for every row
# (a) The floor must not hide a NaN: plain tl.maximum returns the *other* operand. (b) Where the student's logits were
# all -inf so far, c holds the floor and no distance to a maximum, and nothing shifts it. (c) A label outside the
# vocabulary gives NaN, not the number that lies there. (d) row * stride passes 2^31 at 70,345. RIGHT tells them apart.

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


@triton.jit
def shift(m_s, m_t, Z_s, Z_t, Z_1, c, n_s, n_t, k, TAU: tl.constexpr, RIGHT: tl.constexpr):
    """Returns (Z_s, Z_t, Z_1, c) for the maxima n_s, n_t instead of m_s, m_t; k = log2(e) / TAU."""
    d_s = (m_s - n_s) * k
    d_t = (m_t - n_t) * k
    if RIGHT:
        d_s = tl.where(m_s == NOTHING, 0.0, d_s)  # (b)
    a_s = tl.exp2(d_s)
    a_t = tl.exp2(d_t)
    c = a_t * (c + Z_t * (d_t - d_s))
    Z_1 *= a_s * a_s if TAU == 2 else tl.exp2((m_s - n_s) * LOG2E)
    return a_s * Z_s, a_t * Z_t, Z_1, c


@triton.jit
def add(s, t, m_s, m_t, Z_s, Z_t, Z_1, c, k, TAU: tl.constexpr, RIGHT: tl.constexpr):
    """Returns G statistics (G,), each with E more logits; s, t (G, E)."""
    n_s = tl.maximum(m_s, tl.max(s, 1))
    n_t = tl.maximum(m_t, tl.max(t, 1))
    Z_s, Z_t, Z_1, c = shift(m_s, m_t, Z_s, Z_t, Z_1, c, n_s, n_t, k, TAU, RIGHT)
    x_s = (s - n_s[:, None]) * k
    x_t = (t - n_t[:, None]) * k
    if RIGHT:  # (a)
        x_s = tl.maximum(x_s, FLOOR, propagate_nan=tl.PropagateNan.ALL)
        x_t = tl.maximum(x_t, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    else:
        x_s = tl.maximum(x_s, FLOOR)
        x_t = tl.maximum(x_t, FLOOR)
    e_s = tl.exp2(x_s)
    e_t = tl.exp2(x_t)
    e_1 = e_s * e_s if TAU == 2 else tl.exp2((s - n_s[:, None]) * LOG2E)
    c += tl.sum(e_t * (x_t - x_s), 1)
    return n_s, n_t, Z_s + tl.sum(e_s, 1), Z_t + tl.sum(e_t, 1), Z_1 + tl.sum(e_1, 1), c


@triton.jit
def statistics(s_ptr, t_ptr, V, TAU: tl.constexpr, BLOCK: tl.constexpr, RIGHT: tl.constexpr):
    """Returns (m_s, m_t, Z_s, Z_t, Z_1, c) of the rows that begin at two pointers, in one pass."""
    E: tl.constexpr = 128 // s_ptr.dtype.element_ty.primitive_bitwidth
    G: tl.constexpr = BLOCK // E
    k: tl.constexpr = LOG2E / TAU
    cols = tl.arange(0, G)[:, None] * E + tl.arange(0, E)[None, :]
    m_s = tl.full((G,), NOTHING, tl.float32)
    m_t = tl.full((G,), NOTHING, tl.float32)
    Z_s = tl.zeros((G,), tl.float32)
    Z_t = tl.zeros((G,), tl.float32)
    Z_1 = tl.zeros((G,), tl.float32)
    c = tl.zeros((G,), tl.float32)
    full = V // BLOCK * BLOCK
    for v in range(0, full, BLOCK):
        s = tl.load(s_ptr + v + cols).to(tl.float32)
        t = tl.load(t_ptr + v + cols).to(tl.float32)
        m_s, m_t, Z_s, Z_t, Z_1, c = add(s, t, m_s, m_t, Z_s, Z_t, Z_1, c, k, TAU, RIGHT)
    if full < V:
        inside = full + cols < V
        s = tl.load(s_ptr + full + cols, mask=inside, other=float("-inf")).to(tl.float32)
        t = tl.load(t_ptr + full + cols, mask=inside, other=float("-inf")).to(tl.float32)
        m_s, m_t, Z_s, Z_t, Z_1, c = add(s, t, m_s, m_t, Z_s, Z_t, Z_1, c, k, TAU, RIGHT)
    n_s = tl.max(m_s, 0)
    n_t = tl.max(m_t, 0)
    Z_s, Z_t, Z_1, c = shift(m_s, m_t, Z_s, Z_t, Z_1, c, n_s, n_t, k, TAU, RIGHT)
    return n_s, n_t, tl.sum(Z_s, 0), tl.sum(Z_t, 0), tl.sum(Z_1, 0), tl.sum(c, 0)


@triton.jit
def losses(s_ptr, labels_ptr, kl_ptr, ce_ptr, row, m_s, Z_s, Z_t, Z_1, c, V, TAU: tl.constexpr, RIGHT: tl.constexpr):
    """Writes the losses of a row from its statistics in base 2."""
    tl.store(kl_ptr + row, (c / Z_t + tl.log2(Z_s / Z_t)) * LN2 * TAU * TAU)
    y = tl.load(labels_ptr + row)
    known = (y >= 0) & (y < V) if RIGHT else y >= 0
    s_y = tl.load(s_ptr + y, mask=known, other=0.0).to(tl.float32)
    ce = m_s + tl.log2(Z_1) * LN2 - s_y
    if RIGHT:  # (c)
        ce = tl.where(known, ce, float("nan"))
    tl.store(ce_ptr + row, tl.where(y == -100, 0.0, ce))


@triton.jit
def base_2(s_ptr, t_ptr, labels_ptr, kl_ptr, ce_ptr, stride, V, TAU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    s_ptr += row * stride
    t_ptr += row * stride
    m_s, _, Z_s, Z_t, Z_1, c = statistics(s_ptr, t_ptr, V, TAU, BLOCK, RIGHT=False)
    losses(s_ptr, labels_ptr, kl_ptr, ce_ptr, row, m_s, Z_s, Z_t, Z_1, c, V, TAU, RIGHT=False)


@triton.jit
def every_row(s_ptr, t_ptr, labels_ptr, kl_ptr, ce_ptr, stride, V, TAU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # (d)
    s_ptr += row * stride
    t_ptr += row * stride
    m_s, _, Z_s, Z_t, Z_1, c = statistics(s_ptr, t_ptr, V, TAU, BLOCK, RIGHT=True)
    losses(s_ptr, labels_ptr, kl_ptr, ce_ptr, row, m_s, Z_s, Z_t, Z_1, c, V, TAU, RIGHT=True)


# ---- 7. Backward
# The gradient of a logit needs no other logit, only five numbers of its row: TAU (q - p) g_kl + (q_1 - [v = y]) g_ce,
# where g are the upstream gradients. So a program has one block and no loop. The maximum and the logarithm of the sum
# are kept apart: s - m - log Z loses less than s - (m + log Z).


@triton.jit
def gradient(s, t, at, y, g_kl, g_ce, m_s, m_t, l_s, l_t, l_1, TAU: tl.constexpr):
    """Returns the gradient of s at columns `at`; l_*: log2 of Z_*."""
    k: tl.constexpr = LOG2E / TAU
    q = tl.exp2((s - m_s) * k - l_s)
    p = tl.exp2((t - m_t) * k - l_t)
    q_1 = q * q * tl.exp2(2.0 * l_s - l_1) if TAU == 2 else tl.exp2((s - m_s) * LOG2E - l_1)
    return TAU * g_kl * (q - p) + g_ce * (q_1 - tl.where(at == y, 1.0, 0.0))


@triton.jit
def backward(
    s_ptr, t_ptr, labels_ptr, g_kl_ptr, g_ce_ptr, stats_ptr, ds_ptr, stride, V, TAU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(labels_ptr + row)
    g_kl = tl.load(g_kl_ptr + row)
    g_ce = tl.where(y == -100, 0.0, tl.load(g_ce_ptr + row))
    stats_ptr += row * 5
    m_s, m_t = tl.load(stats_ptr + 0), tl.load(stats_ptr + 1)
    l_s, l_t, l_1 = tl.load(stats_ptr + 2), tl.load(stats_ptr + 3), tl.load(stats_ptr + 4)
    if tl.program_id(1) * BLOCK + BLOCK <= V:
        s = tl.load(s_ptr + row * stride + at).to(tl.float32)
        t = tl.load(t_ptr + row * stride + at).to(tl.float32)
        g = gradient(s, t, at, y, g_kl, g_ce, m_s, m_t, l_s, l_t, l_1, TAU)
        tl.store(ds_ptr + row * stride + at, g.to(ds_ptr.dtype.element_ty))
    else:
        s = tl.load(s_ptr + row * stride + at, mask=at < V, other=float("-inf")).to(tl.float32)
        t = tl.load(t_ptr + row * stride + at, mask=at < V, other=float("-inf")).to(tl.float32)
        g = gradient(s, t, at, y, g_kl, g_ce, m_s, m_t, l_s, l_t, l_1, TAU)
        tl.store(ds_ptr + row * stride + at, g.to(ds_ptr.dtype.element_ty), mask=at < V)


# ---- 8. Both in one, with the projection
# Logits of all rows take gigabytes, and nobody needs them: the loss of a row depends on that row alone. For one chunk
# of rows after the other, `projected` multiplies hidden states by the word table, and the kernel replaces the student's
# logits by their gradient while the row is still in the L2 cache. Gradients are complete after the forward pass.


@triton.jit
def both(
    s_ptr, t_ptr, labels_ptr, kl_ptr, ce_ptr, stride, V, g_kl, g_ce, TAU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    s_ptr += row * stride
    t_ptr += row * stride
    m_s, m_t, Z_s, Z_t, Z_1, c = statistics(s_ptr, t_ptr, V, TAU, BLOCK, RIGHT=True)
    losses(s_ptr, labels_ptr, kl_ptr, ce_ptr, row, m_s, Z_s, Z_t, Z_1, c, V, TAU, RIGHT=True)
    y = tl.load(labels_ptr + row)
    of_label = tl.where(y == -100, 0.0, g_ce)
    l_s, l_t, l_1 = tl.log2(Z_s), tl.log2(Z_t), tl.log2(Z_1)
    tl.debug_barrier()  # no thread overwrites the label's logit before it is read
    cols = tl.arange(0, BLOCK)
    full = V // BLOCK * BLOCK
    for v in range(0, full, BLOCK):
        s = tl.load(s_ptr + v + cols).to(tl.float32)
        t = tl.load(t_ptr + v + cols).to(tl.float32)
        g = gradient(s, t, v + cols, y, g_kl, of_label, m_s, m_t, l_s, l_t, l_1, TAU)
        tl.store(s_ptr + v + cols, g.to(s_ptr.dtype.element_ty))
    if full < V:
        inside = full + cols < V
        s = tl.load(s_ptr + full + cols, mask=inside, other=float("-inf")).to(tl.float32)
        t = tl.load(t_ptr + full + cols, mask=inside, other=float("-inf")).to(tl.float32)
        g = gradient(s, t, full + cols, y, g_kl, of_label, m_s, m_t, l_s, l_t, l_1, TAU)
        tl.store(s_ptr + full + cols, g.to(s_ptr.dtype.element_ty), mask=inside)


def projected(h_s, h_t, W_s, W_t, labels, g_kl, g_ce, TAU, rows):
    """Returns (kl, ce, dh, dW) of logits h W^T (N, V), which exist for `rows` rows at a time; kl, ce (N,)."""
    N, V = len(h_s), len(W_s)
    kl, ce = torch.empty(2, N, device=h_s.device)
    dh, dW = torch.empty_like(h_s), torch.zeros_like(W_s, dtype=torch.float32)
    s, t = (torch.empty(rows, -(-V // 64) * 64, dtype=h_s.dtype, device=h_s.device)[:, :V] for _ in range(2))
    for i in range(0, N, rows):
        n = min(rows, N - i)
        torch.mm(h_s[i : i + n], W_s.T, out=s[:n])
        torch.mm(h_t[i : i + n], W_t.T, out=t[:n])
        at = labels[i:], kl[i:], ce[i:], s.stride(0), V, g_kl, g_ce
        both[(n,)](s, t, *at, TAU=TAU, BLOCK=BLOCK, num_warps=WARPS)
        dh[i : i + n] = s[:n] @ W_s  # s holds the gradient now
        dW += s[:n].T @ h_s[i : i + n]
    return kl, ce, dh, dW


RUNGS = {
    "1 two passes": two_passes, "2 one pass": one_pass, "3 no mask in the loop": unmasked,
    "4 sums per thread": per_thread, "5 base 2, a square": base_2, "6 right for every row": every_row,
    "7 backward": backward, "8 both in one, projected": both,
}  # fmt: skip

if __name__ == "__main__":
    from kernels.lesson_run import main

    sys.exit(main(sys.argv[1:], RUNGS, definition, projected, (BLOCK, WARPS)))
