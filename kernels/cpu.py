"""The CPU paths of the kernels: the same closed forms in PyTorch, on a few rows at a time, which stay in cache.

Autograd would keep several tensors of N x V numbers; here the gradient is explicit, and a loop works on so few rows
that they stay in second-level caches. Quantities of one number per row are computed for all rows at once.

Legend:  N rows   V vocabulary   R rows of a block   s, t student and teacher logits   tau temperature
"""

import math

import numpy as np
import torch

from kernels import FLOOR, IGNORE

CACHE_BYTES = 1 << 20  # per block, 8 rows of 30,522 fp32: the few blocks of a loop fit second-level caches


def rows_in_cache(V, dtype):
    """Returns the number of rows of V numbers in a block; with fewer, the overhead per pass would dominate."""
    return max(1, CACHE_BYTES // (V * dtype.itemsize))


def _divided(x, tau, n, out):
    """Returns x / tau + n of a few rows, n (R, 1). It adds even where n is 0: a product is a third slower."""
    if x.dtype != out.dtype:
        x = out.copy_(x)  # arithmetic on two dtypes is not vectorised
    return torch.add(n, x, alpha=1 / tau, out=out)


def exponentials(x, tau, m, Z, out):
    """Puts exp(x - m) of a few rows x = logits / tau (R, V) into `out`, and their sums into Z (R, 1); returns `out`.

    m (R, 1), zero on entry, stays zero unless a row risks overflow or underflow of exp(x) or of exp(x)^tau =
    exp(logits), which logits of a trained model do not; skipping the row maximum saves one pass in ten. Otherwise m
    becomes the maximum of each row, and x becomes x - m. Results go into existing memory: allocating would cost more
    than exp.
    """
    V, most = x.shape[1], 1e30 ** (1 / max(tau, 1.0))
    if V >= 1000:  # shorter rows cost little; and with V = 1 the probability must be exactly 1
        torch.sum(torch.exp(x, out=out), -1, keepdim=True, out=Z)
        if all(V / most < z < most for z in Z[:, 0].tolist()):
            return out
    x.sub_(torch.amax(x, -1, keepdim=True, out=m))
    torch.sum(torch.exp(x, out=out), -1, keepdim=True, out=Z)
    return out


def floored(x):
    """Clamps log-probabilities x (R, V), up to a constant per row, from below at FLOOR, in place; returns x."""
    return x.clamp_(min=x.amax(-1, keepdim=True) + FLOOR * math.log(2))


def forward_rows(s, t, labels, tau):
    """Returns per-row (kl, ce, stats); stats (N, 5) are m_s, m_t, Z_s, Z_t, Z_1 of logits divided by tau."""
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
        # logits of -inf: 0 (-inf + inf) = 0; a word that only the student rules out costs the floor
        a, b = (floored(x[rows].to(wide).div_(tau).sub_(m[rows])) for x, m in ((s, m_s), (t, m_t)))
        c[rows] = (b.exp() * (b - a)).sum(-1, keepdim=True)
    log_Z_s, log_Z_t, log_Z_1 = (Z.double().log() for Z in (Z_s, Z_t, Z_1))  # fp64: large, with small differences
    kl = (c / Z_t - log_Z_t + log_Z_s)[:, 0] * tau**2
    if labels is None:
        return kl.to(wide), torch.zeros_like(kl, dtype=wide), stats
    labelled = labels != IGNORE
    s_y = s.gather(1, labels.where(labelled, 0)[:, None])
    ce = (log_Z_1 + m_s * tau - s_y)[:, 0].where(labelled, 0.0)
    return kl.to(wide), ce.to(wide), stats


def backward_rows(g_kl, g_ce, s, t, labels, stats, tau, ds):
    """Writes the gradient of `forward_rows` into ds."""
    N, V = s.shape
    R = rows_in_cache(V, stats.dtype)
    scratch = s.new_empty(1 + (ds.dtype != stats.dtype), min(N, R), V, dtype=stats.dtype)
    m_s, m_t, Z_s, Z_t, Z_1 = stats.split(1, 1)
    weight = tau * g_kl[:, None]
    y = s.new_full((N, 1), IGNORE, dtype=torch.int64) if labels is None else labels[:, None]
    g_1, y = g_ce[:, None].where(y != IGNORE, 0.0), y.where(y != IGNORE, 0)
    per_row = -m_s, -m_t, weight / Z_s, -weight / Z_t, g_1 / Z_1, y, -g_1
    for d, s_, t_, n_s, n_t, w_s, w_t, w_1, y, minus in zip(*(x.split(R) for x in (ds, s, t, *per_row)), strict=True):
        g, *e_s = scratch[:, : len(d)]
        e_s = e_s[0] if e_s else d  # in the memory of the result where its dtype is as wide
        _divided(s_, tau, n_s, e_s).exp_()
        _divided(t_, tau, n_t, g).exp_().mul_(w_t).addcmul_(e_s, w_s)
        if labels is not None:
            g = torch.addcmul(g.scatter_add_(1, y, minus), e_s.pow_(tau), w_1, out=e_s)
        if g is not d:
            d.copy_(g)
    return ds


def loss_and_gradient_rows(s, t, biases, labels, tau, weights, losses, scratch, db=None):
    """Adds the losses of a chunk to `losses` (1, 3) and overwrites `s` with their gradient; `t` is scratch.

    The sum of the gradient over rows is added to `db` (V,), unless that is None.

    s, t (R, V): logits divided by tau, without the biases (V,), which are divided by tau too; t is None without a
    teacher. Single passes over a few megabytes in cache, into existing memory: allocating would cost more than exp.
    """
    kl_weight, ce_weight, mse_weight = weights
    finite = all(bias.isfinite().all() for bias in biases)  # otherwise a bias of -inf rules words out
    has_label = labels[:, None] != IGNORE
    y = labels[:, None].where(has_label, 0)
    s_y = s.gather(1, y).to(biases[0].dtype) + biases[0][y]
    minus_one = has_label.to(s_y.dtype) * -ce_weight
    stats = s_y.new_ones(5, len(y), 1)
    stats[:2] = 0.0
    kl = mse = s_y.new_zeros(())
    columns = (s, s if t is None else t, *stats, y, minus_one, has_label)
    for s_, t_, m_s, m_t, Z_s, Z_t, Z_1, y_, minus, scored in zip(
        *(x.split(scratch.shape[1]) for x in columns), strict=True
    ):
        p, e = scratch[:, : len(s_)]
        a = s_.to(p.dtype).add_(biases[0])
        exponentials(a, tau, m_s, Z_s, e)
        if t is None:
            a.zero_()
        else:
            d = t_.to(p.dtype).add_(biases[1])
            exponentials(d, tau, m_t, Z_t, p).mul_(-1 / Z_t)  # minus the teacher's probabilities
            if not finite:  # 0 (-inf + inf) = 0, and a word that only the student rules out costs the floor
                floored(a)
                floored(d)
            d.sub_(a)
            kl = kl - torch.dot(p.view(-1), d.view(-1))
            torch.addcmul(p, e, 1 / Z_s, out=a)
            if kl_weight * tau != 1:
                a.mul_(kl_weight * tau)
            if mse_weight:
                d.add_(m_t - m_s)
                mse = mse + torch.dot(d.view(-1), d.view(-1))
                a.add_(d, alpha=-2 * mse_weight * tau)
        if ce_weight:
            scored = scored[:, 0].tolist()
            for rows in [slice(None)] if all(scored) else [slice(i, i + 1) for i, yes in enumerate(scored) if yes]:
                e_1 = e[rows].pow_(tau)  # exp(s) = exp(s / tau)^tau
                a[rows].addcmul_(e_1, ce_weight / torch.sum(e_1, -1, keepdim=True, out=Z_1[rows]))
            a.scatter_add_(1, y_, minus)
        if db is not None:
            db += a.sum(0)
        if a.dtype != s.dtype:
            s_.copy_(a)
    m_s, _, *Z = stats
    log_Z_s, log_Z_t, log_Z_1 = (x.double().log() for x in Z)  # fp64: large, with small differences
    if t is not None:
        kl = kl + (log_Z_s - log_Z_t).sum()
    ce = (log_Z_1 - tau * (s_y - m_s)).where(has_label, 0.0).sum() if ce_weight else torch.zeros_like(kl)
    losses += torch.stack([kl * tau**2, ce, mse * tau**2])


# ---- dropout

BITS = 16  # random bits per element


class Dropout(torch.autograd.Function):
    """Dropout with one 64-bit draw per four elements: PyTorch's draws one per element, which takes most of its time.

    key (2,) int64: seed, and the number of the first sequence of x; see dropout.py.
    """

    @staticmethod
    def forward(ctx, x, p, key, site):
        n, threshold, (seed, first) = x.numel(), round(p * 2**BITS), key.tolist()
        # SFC64 is a tenth faster, but cannot jump to the first element of a sequence
        draw, skipped = divmod(first * (n // max(1, len(x))), 64 // BITS)
        draws = np.random.PCG64DXSM([seed, site]).advance(draw).random_raw(-(-(skipped + n) * BITS // 64))
        draws = torch.from_numpy(draws.view(np.int16))[skipped : skipped + n]
        # 0 below the threshold, else 1: conversions and arithmetic are vectorised, comparisons are not
        keep = draws.view(x.shape).float().sub_(threshold - 2 ** (BITS - 1) - 1).clamp_(0, 1)
        ctx.scale = 2**BITS / (2**BITS - threshold)
        if x.dtype == keep.dtype:
            ctx.save_for_backward(keep.to(torch.uint8))
            return keep.mul_(ctx.scale).mul_(x)
        factor = keep.mul_(ctx.scale).to(x.dtype)  # in bf16 a factor takes two bytes and saves two passes
        ctx.save_for_backward(factor)
        return x * factor

    @staticmethod
    def backward(ctx, dy):
        (saved,) = ctx.saved_tensors
        if saved.is_floating_point():
            return dy * saved, None, None, None
        return saved.to(dy.dtype).mul_(ctx.scale).mul_(dy), None, None, None
