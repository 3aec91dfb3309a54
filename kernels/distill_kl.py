"""Temperature-softened KL divergence and masked-LM cross-entropy, one pass over the logits each way.

For one row of student logits s and teacher logits t, temperature tau and label y:

    p = softmax(t / tau)      q = softmax(s / tau)      q1 = softmax(s)
    kl = tau^2 sum_v p (log p - log q)        d kl / ds = tau (q - p)       Hinton et al. 2015, section 2
    ce = -log q1[y], or 0 without a label     d ce / ds = q1 - [v = y]

Forward: with m the maximum of a row, k = 1 / tau and Z = sum exp(k (x - m)), everything relative to the maxima,

    kl / tau^2 = c / Z_t + log(Z_s / Z_t)        c = sum exp(k (t - m_t)) k ((t - m_t) - (s - m_s))

m, Z and c are updated from block to block, so one pass is enough (README.md derives it). Each thread keeps its own
statistics, which are combined at the end of the row: inside the row no thread waits for another.
Backward: one more pass, from the statistics (m_s, m_t, log Z_s, log Z_t, log Z_1).

Arithmetic and statistics are fp32 for every dtype of the logits, and in base 2, because the hardware computes exp2.
Bytes per row of bf16 logits: forward 4 V (read s, t), backward 6 V (read s, t, write the gradient): 10 V in all,
305 kB at V = 30,522. Memory bandwidth limits both kernels as long as loads are 16 bytes wide, which needs a proof by
Triton that a row begins at a multiple of 16 bytes. Rows of 30,522 = 2 * 3 * 5,087 bf16 logits do not: the kernels then
start at the boundary before the row (PEEL) and mask what precedes it. `padded` allocates rows that begin at one.

Legend:  N rows   V vocabulary   s, t student and teacher logits   m maximum   Z sum of exponentials   tau temperature
         E logits of a 16-byte load   G such loads in a block   P parts of a row
"""

import torch
import torch.nn.functional as F

from kernels import IGNORE, cpu
from kernels.backend import on_triton, tl, triton
from kernels.operator import differentiable, opaque
from kernels.rows import LOG2E, NOTHING, block_gradient, combine, first_of_row, row_losses, row_statistics

BLOCK_V, WARPS = 2048, 4  # of both kernels: 16 logits of each model in flight per thread, no spills


def distill_kl_ref(s, t, labels=None, temperature=2.0):
    """Returns per-row (kl, ce), each (N,), in nats: the definition, differentiable in any dtype; autograd keeps all."""
    log_q, log_p = F.log_softmax(s / temperature, -1), F.log_softmax(t / temperature, -1)
    p = log_p.exp()
    # 0 log 0 = 0: a word that the teacher rules out adds nothing
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1) * temperature**2
    if labels is None:
        return kl, torch.zeros_like(kl)
    return kl, F.cross_entropy(s, labels, ignore_index=IGNORE, reduction="none")


def row_width(V):
    """Returns V rounded up to a multiple of 64, for wide loads and matrix units."""
    return -(-V // 64) * 64


def padded(N, V, dtype, device):
    """Returns uninitialised logits (N, V) with a row stride of `row_width(V)` elements."""
    return torch.empty(N, row_width(V), dtype=dtype, device=device)[:, :V]


@triton.jit
def _store_row(
    s_ptr, labels_ptr, kl_ptr, ce_ptr, stats_ptr, row, m_s, m_t, Z_s, Z_t, Z_1, c, V, tau, HAS_LABELS: tl.constexpr
):  # fmt: skip
    """Writes the losses of a row, and its statistics for the backward pass."""
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
    PEEL: tl.constexpr,  # whether rows begin off 16-byte boundaries, equally in s and t
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31 at 70,345 rows
    s_ptr, skip = first_of_row(s_ptr, row, stride_s, PEEL)
    t_ptr, _ = first_of_row(t_ptr, row, stride_t, PEEL)
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
        if tl.program_id(1) + 1 < tl.num_programs(1):  # the last part also covers the `skip` positions
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
    """Combines the parts of a row."""
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
    m_s, m_t, Z_s, Z_t, Z_1, c = combine(m_s, m_t, Z_s, Z_t, Z_1, c, k, HAS_LABELS, TAU)
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
    PEEL: tl.constexpr,  # whether rows begin off 16-byte boundaries, equally in s, t and ds
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s_ptr, skip = first_of_row(s_ptr, row, stride_s, PEEL)
    t_ptr, _ = first_of_row(t_ptr, row, stride_t, PEEL)
    ds_ptr, _ = first_of_row(ds_ptr, row, stride_ds, PEEL)
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
    g_kl = tl.load(g_kl_ptr + row * stride_g_kl) * tau  # tau^2 from the loss, 1 / tau from the softened logits
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


def power_of(tau):
    """Returns n with exp(x) = exp(x / tau)^n, which saves an exponential per logit at usual temperatures; 0: none."""
    return int(tau) if tau in (1.0, 2.0) else 0


def _split(N, V, device):
    """Returns (parts, width): each row is split into `parts` of `width` columns, so that few rows still fill a GPU."""
    programs = 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    count = -(-V // BLOCK_V)  # triton.cdiv costs the host 2 us
    width = -(-count // min(count, -(-programs // N))) * BLOCK_V
    return -(-V // width), width


def _peel(*tensors):
    """Whether the kernels start each row at the 16-byte boundary at or before it, where Triton cannot prove alignment.

    This needs tensors of one dtype, whose first elements are at a boundary and whose rows are equally far off one.
    """
    E = 16 // tensors[0].element_size()
    strides = [x.stride(0) for x in tensors]
    return (
        any(stride % 16 for stride in strides)
        and all((stride - strides[0]) % E == 0 for stride in strides)
        and all(x.dtype == tensors[0].dtype and x.data_ptr() % 16 == 0 for x in tensors)
    )


def _forward_losses(
    s: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None, tau: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    N, V = s.shape
    if not on_triton(s) or s.dtype == torch.float64:
        return cpu.forward_rows(s, t, labels, tau)
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
    ds = torch.empty_strided(s.shape, s.stride(), dtype=s.dtype, device=s.device)  # padded if s is
    if not on_triton(s) or s.dtype == torch.float64:
        return cpu.backward_rows(g_kl, g_ce, s, t, labels, stats, tau, ds)
    if N:
        peel = _peel(s, t, ds)
        most = V + (16 // s.element_size() - 1 if peel else 0)  # positions of a row, with those before it
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
    # the kernel reads the upstream gradients by pointer, so the host does not wait for them
    return _backward(g_kl, g_ce, *ctx.saved_tensors, ctx.tau), None, None, None


_forward = differentiable("distill_kl", _forward_losses, _fake_losses, _setup_context, _backward_of_forward)


def distill_kl(s, t, labels=None, temperature=2.0, kl_weights=None, ce_weights=None):
    """Sums over rows of kl_weights * tau^2 KL(softmax(t / tau) || softmax(s / tau)) and ce_weights * cross-entropy.

    s, t (N, V): logits of student and teacher, fp32, bf16 or fp16 (fp64 without a kernel), with any row stride; loads
    are wide where rows of s and t are equally far off 16-byte boundaries. labels (N,) int64 are -100 in rows without
    cross-entropy; None: no row has one. kl_weights, ce_weights (N,) fp32 default to 1; 0 drops a row. Returns (kl, ce):
    0-d fp32, in nats, each differentiable in s only. Raises ValueError where shapes disagree or the teacher's logits
    require a gradient. Source: Hinton et al. 2015, section 2.
    """
    shapes = [tuple(x.shape) for x in (s, t, labels) if x is not None]
    if s.ndim != 2 or s.shape != t.shape or (labels is not None and labels.shape != s.shape[:1]):
        raise ValueError(f"logits must be (N, V) twice, and labels (N,): they are {shapes}")
    if t.requires_grad:
        raise ValueError("the teacher must be frozen: its logits take no gradient")
    s, t = (x if x.stride(-1) == 1 else x.contiguous() for x in (s, t))
    labels = None if labels is None else labels.contiguous()
    kl, ce, _ = _forward(s, t, labels, float(temperature))
    kl, ce = (x if w is None else x * w for x, w in ((kl, kl_weights), (ce, ce_weights)))
    return kl.sum(), ce.sum()


def bytes_moved(N, V, itemsize):
    """Minimum bytes moved by forward and backward: both logits are read twice, the gradient is written once."""
    return 5 * N * V * itemsize
