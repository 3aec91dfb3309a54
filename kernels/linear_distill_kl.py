"""Vocabulary projection and distillation losses in one: logits exist only for one chunk of rows at a time.

    s = h_s W_s^T + b_s      t = h_t W_t^T + b_t
    loss = kl_weight * sum kl + ce_weight * sum ce + mse_weight * sum (s - t)^2        kl and ce as in distill_kl.py
    G = d loss / ds          d loss / dh_s = G W_s     d loss / dW_s = G^T h_s     d loss / db_s = sum of G over rows

The loss of a row depends on that row alone, so its gradient is available as soon as its logits are: for each chunk of
rows the forward pass projects, overwrites student logits with G, and multiplies G out. The backward pass only scales.

Bytes per row of bf16 logits: two matrix products write s and t (4 V), the kernel reads both (4 V) and writes G (2 V;
its second pass over the row, 122 kB, hits the L2 cache), two products read G (4 V), and so does the sum over rows for
db (2 V; GPT-2's decoder has no bias to train): 16 V. The gradient of the weight, V * C fp32 numbers, is read and
written once per chunk: 188 MB at BERT-base, as much as 380 rows. Chunks therefore have thousands of rows on a GPU, and
hundreds on a CPU, where arithmetic rules; at V = 250,000 half as many, so that they stay small beside the gradient.

G is in units of the largest weight, which is applied in fp32 after the products: its entries, probabilities divided by
thousands of rows, would otherwise underflow in half precision. G therefore needs no loss scale.

Legend:  N rows   C width   V vocabulary   R rows of a chunk   s, t student and teacher logits   tau temperature
"""

import torch
import torch.nn.functional as F

from kernels import cpu
from kernels.backend import on_triton, tl, triton
from kernels.distill_kl import distill_kl_ref, power_of, row_width
from kernels.operator import differentiable
from kernels.rows import LOG2E, block_gradient, row_losses, row_statistics

CPU_CHUNK_BYTES = 48 << 20  # of one model's logits: 412 rows of 30,522; fast matrix products, little memory
CPU_CHUNK_ROWS = 128  # at least: fewer add to dW too often, and these take no more than dW has where C is 128 or more
GPU_CHUNK_ROWS = 4096  # at most: 250 MB of bf16 logits a model; half as many would double the traffic of dW
GPU_CHUNK_BYTES = 1 << 30  # at most, of one model's logits: 2,147 bf16 rows of 250,037; all 4,096 of 30,522


def linear_distill_kl_ref(h_s, W_s, b_s, h_t, W_t, b_t, labels, tau, kl_weight, ce_weight, mse_weight=0.0):
    """The same loss through logits and autograd: returns (loss, kl, ce, mse), in any dtype; autograd keeps all."""
    s = F.linear(h_s, W_s, b_s)
    t = s.detach() if h_t is None else F.linear(h_t, W_t, b_t)
    kl, ce = (x.sum() for x in distill_kl_ref(s, t, labels, 1.0 if h_t is None else tau))
    mse = (s - t).square().sum() if mse_weight else s.new_zeros(())
    if h_t is None:
        kl = kl.detach() * 0
    return kl_weight * kl + ce_weight * ce + mse_weight * mse, kl, ce, mse


@triton.jit
def _loss_and_gradient_kernel(
    s_ptr,  # (R, >= V), any float: in: student logits; out: their gradient, zero from column V on
    t_ptr,  # (R, >= V) teacher logits
    labels_ptr,  # (R,) int64
    losses_ptr,  # (R, 3) fp32: kl, ce, mse
    stride,  # of s and t: the width of a padded row
    V,
    tau,
    kl_weight,  # in units of the largest weight
    ce_weight,
    mse_weight,
    HAS_MSE: tl.constexpr,
    TAU: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s_ptr += row * stride
    t_ptr += row * stride
    losses_ptr += row * 3
    cols = tl.arange(0, BLOCK_V)
    k = LOG2E / tau
    y = tl.load(labels_ptr + row)
    m_s, m_t, Z_s, Z_t, Z_1, c = row_statistics(s_ptr, t_ptr, 0, 0, V, stride, k, True, TAU, False, BLOCK_V)
    kl, ce = row_losses(s_ptr, y, m_s, Z_s, Z_t, Z_1, c, V, tau, True)
    tl.store(losses_ptr + 0, kl)
    tl.store(losses_ptr + 1, ce)
    l_s = tl.log2(Z_s)
    l_t = tl.log2(Z_t)
    l_1 = tl.log2(Z_1)
    g_kl = kl_weight * tau
    g_ce = tl.where(y == -100, 0.0, ce_weight)
    mse = tl.full((), 0.0, tl.float32)
    tl.debug_barrier()  # every thread must read s[y] before any thread overwrites it
    full = V // BLOCK_V * BLOCK_V
    for v in range(0, full, BLOCK_V):
        s = tl.load(s_ptr + v + cols).to(tl.float32)
        t = tl.load(t_ptr + v + cols).to(tl.float32)
        g = block_gradient(s, t, v + cols, y, g_kl, g_ce, m_s, m_t, l_s, l_t, l_1, k, True, TAU)
        if HAS_MSE:
            g += 2.0 * mse_weight * (s - t)
            mse += tl.sum((s - t) * (s - t), 0)
        tl.store(s_ptr + v + cols, g.to(s_ptr.dtype.element_ty))
    if full < stride:
        there, inside = full + cols < stride, full + cols < V  # 16 divides the stride: masked loads stay wide
        # beyond V use the row's maximum: exp of other values may overflow
        s = tl.where(inside, tl.load(s_ptr + full + cols, mask=there, other=0.0).to(tl.float32), m_s)
        t = tl.where(inside, tl.load(t_ptr + full + cols, mask=there, other=0.0).to(tl.float32), m_t)
        g = block_gradient(s, t, full + cols, y, g_kl, g_ce, m_s, m_t, l_s, l_t, l_1, k, True, TAU)
        if HAS_MSE:
            g += 2.0 * mse_weight * (s - t)
            mse += tl.sum(tl.where(inside, (s - t) * (s - t), 0.0), 0)
        tl.store(s_ptr + full + cols, tl.where(inside, g, 0.0).to(s_ptr.dtype.element_ty), mask=there)
    tl.store(losses_ptr + 2, mse)


def launch(itemsize):
    """Returns (BLOCK_V, num_warps) of the kernel for logits of this item size."""
    return (4096, 8) if itemsize == 2 else (2048, 8)


def _chunk(N, V, dtype, on_cpu):
    """Returns the rows of a chunk; all chunks have about the same size, so that the last is not small."""
    row = V * dtype.itemsize
    most = (
        max(CPU_CHUNK_ROWS, CPU_CHUNK_BYTES // row) if on_cpu else min(GPU_CHUNK_ROWS, max(1, GPU_CHUNK_BYTES // row))
    )
    return max(1, -(-N // max(1, -(-N // most))))


def _in_kernel(x, dtype):
    """Whether the kernel handles logits of `dtype` on the device of tensor x."""
    return on_triton(x) and dtype != torch.float64


def _converted(x, dtype, rows):
    """Returns x in `dtype`, zero-padded to `rows` rows; x itself where nothing changes."""
    n, *rest = x.shape
    if x.dtype == dtype and n == rows:
        return x
    wide = x.new_empty(rows, *rest, dtype=dtype)
    wide[:n] = x
    wide[n:] = 0
    return wide


def decoder_for(W, b, dtype):
    """Returns (weight, bias) as `linear_distill_kl` uses them: in `dtype`, padded to `row_width(V)` for the kernel.

    Each call of it converts both decoders. A frozen teacher's can be converted once and passed as W_t, b_t to all
    calls, which then do not copy it. dtype is autocast's, or that of the hidden rows without autocast.
    """
    V = W.shape[0]
    rows = row_width(V) if _in_kernel(W, dtype) else V
    return _converted(W, dtype, rows), _converted(b, dtype, rows)


def _multiply(A, B, unit, out, add=False):
    """out = unit A B, plus `out` if `add`, summed in the precision of `out` where that is wider."""
    beta = 1.0 if add else 0.0  # 0: the old contents, even NaN, are ignored
    if A.dtype == out.dtype:
        torch.addmm(out, A, B, beta=beta, alpha=unit, out=out)
    elif A.is_cuda:
        torch.addmm(out, A, B, out_dtype=out.dtype, beta=beta, alpha=unit, out=out)
    else:
        product = torch.mm(A, B)
        out.add_(product, alpha=unit) if add else out.copy_(product).mul_(unit)


def _dtype_of_dh(h_s, dtype):
    """bf16 where h_s is; fp32 where h_s is fp16, in which unit G W may vanish before the loss scale multiplies it."""
    return torch.bfloat16 if h_s.dtype == dtype == torch.bfloat16 else torch.promote_types(dtype, torch.float32)


def _loss_and_gradients(
    h_s: torch.Tensor, W_s: torch.Tensor, b_s: torch.Tensor,
    h_t: torch.Tensor | None, W_t: torch.Tensor | None, b_t: torch.Tensor | None,
    labels: torch.Tensor, tau: float, kl_weight: float, ce_weight: float, mse_weight: float,
    dtype: torch.dtype, wants_dh: bool, wants_dW: bool, wants_db: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(loss, sums (3,), dh, dW, db): loss and its gradients; those that are not wanted are empty."""
    (N, C), V, wide = h_s.shape, len(W_s), torch.promote_types(dtype, torch.float32)
    kernel = _in_kernel(h_s, dtype)
    width = row_width(V) if kernel else V
    unit = max(abs(kl_weight) * tau, abs(ce_weight), abs(mse_weight)) or 1.0
    weights = [weight / unit for weight in (kl_weight, ce_weight, mse_weight)]
    R = _chunk(N, V, dtype, not h_s.is_cuda)
    losses = h_s.new_zeros(N if kernel else 1, 3, dtype=wide)  # kl, ce, mse
    dh = h_s.new_empty((N, C) if wants_dh else (0,), dtype=_dtype_of_dh(h_s, dtype))
    dW = h_s.new_empty(W_s.shape if wants_dW else (0,), dtype=wide)
    db = h_s.new_zeros(V if wants_db else 0, dtype=wide)
    if N == 0:
        dW.zero_()
    with torch.autocast(h_s.device.type, enabled=False):
        models = [(h_s, *decoder_for(W_s, b_s, dtype), h_s.new_empty(R, width, dtype=dtype))]
        if h_t is not None:
            models += [(h_t, *decoder_for(W_t, b_t, dtype), h_s.new_empty(R, width, dtype=dtype))]
        if not kernel:
            biases = [b.to(wide) / tau for _, _, b, _ in models]
            scratch = h_s.new_empty(2, R if h_s.is_cuda else min(R, cpu.rows_in_cache(V, wide)), V, dtype=wide)
        for start in range(0, N, R):
            rows = slice(start, min(start + R, N))
            inputs = [(h[rows].to(dtype), W.t(), b, buffer[: rows.stop - start]) for h, W, b, buffer in models]
            if kernel:
                s, *t = (torch.addmm(b, h, W, out=out) for h, W, b, out in inputs)
                BLOCK_V, warps = launch(dtype.itemsize)
                # without a teacher the student is its own teacher: kl is 0, and so is kl_weight
                _loss_and_gradient_kernel[(len(s),)](
                    s, *(t or [s]), labels[rows], losses[rows], width, V, tau, *weights,
                    HAS_MSE=mse_weight != 0, TAU=power_of(tau), BLOCK_V=BLOCK_V, num_warps=warps,
                )  # fmt: skip
            else:
                # the division by tau is free here; the bias is added later, with the rows in cache
                s, *t = (torch.addmm(out, h, W, beta=0, alpha=1 / tau, out=out) for h, W, _, out in inputs)
                of_rows = labels[rows], tau, weights, losses, scratch, db if wants_db else None
                cpu.loss_and_gradient_rows(s, t[0] if t else None, biases, *of_rows)
            G = s
            if wants_dh:
                _multiply(G, models[0][1], unit if G.is_cuda else 1.0, dh[rows])
            if wants_dW:
                _multiply(G[:, :V].t(), inputs[0][0], unit, dW, add=start > 0)
            if wants_db and kernel:
                db += G[:, :V].sum(0, dtype=wide)
    db.mul_(unit)
    if wants_dh and not h_s.is_cuda:
        dh.mul_(unit)  # once: a CPU's product would round its factor into each of several partial sums
    sums = losses.sum(0)
    # Python numbers: a tensor of them would be copied to the device, and the host would wait
    loss = sums[0] * kl_weight + sums[1] * ce_weight + sums[2] * mse_weight
    return loss, sums, dh, dW, db


def _fake(h_s, W_s, b_s, h_t, W_t, b_t, labels, tau, kl_weight, ce_weight, mse_weight, dtype, *wanted):
    wide, (wants_dh, *of_decoder) = torch.promote_types(dtype, torch.float32), wanted
    dh = h_s.new_empty(h_s.shape if wants_dh else (0,), dtype=_dtype_of_dh(h_s, dtype))
    dW, db = (x.new_empty(x.shape if w else (0,), dtype=wide) for x, w in zip((W_s, b_s), of_decoder, strict=True))
    return h_s.new_empty((), dtype=wide), h_s.new_empty(3, dtype=wide), dh, dW, db


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # else PyTorch makes zeros as large as the weight for unused outputs
    ctx.save_for_backward(*output[2:])
    ctx.dtypes, ctx.wanted = [x.dtype for x in inputs[:3]], inputs[-3:]


def _backward(ctx, upstream, *_):
    """Scales the gradients out of place, so that a second backward pass finds them unchanged."""
    if upstream is None:
        return (None,) * 15
    gradients = [g if wanted else None for g, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)]
    # on a CPU reading one number is free and can save a pass over dW; on a GPU it would wait, and a tracer has none
    if type(upstream) is not torch.Tensor or upstream.device.type != "cpu" or upstream.item() != 1.0:
        gradients = [g if g is None else g * upstream for g in gradients]
    return *(g if g is None else g.to(d) for g, d in zip(gradients, ctx.dtypes, strict=True)), *([None] * 12)


_forward = differentiable("linear_distill_kl", _loss_and_gradients, _fake, _setup_context, _backward)


def linear_distill_kl(h_s, W_s, b_s, h_t, W_t, b_t, labels, tau, kl_weight, ce_weight, mse_weight=0.0):
    """Vocabulary projection and distillation losses in one, on any device, without storing logits or a graph over them.

    h_s (N, C_s), W_s (V, C_s), b_s (V): student rows after the head's transform, decoder weight, bias; differentiable.
    h_t (N, C_t), W_t (V, C_t), b_t (V): the teacher's, without gradient; all None where there is no teacher. W_t and
    b_t may come from `decoder_for`, which saves their conversion.
    labels (N,) int64: the original ids of masked tokens, else -100. Weights are floats: alpha / denominator.
    Returns (loss, kl, ce, mse): loss = kl_weight * kl + ce_weight * ce + mse_weight * mse is differentiable; the three
    sums over rows, in nats (kl with its tau^2), are for logging, and may be 0 where their weight is 0. Matrix products
    follow autocast; softmax and sums are at least fp32. Raises ValueError for a teacher with a gradient or another V.
    """
    if any(x is not None and x.requires_grad for x in (h_t, W_t, b_t)):
        raise ValueError("the teacher must be frozen: its rows, weight and bias take no gradient")
    if W_t is not None and len(W_t) not in (len(W_s), row_width(len(W_s))):
        raise ValueError(f"student and teacher must share a vocabulary: of {len(W_s)} and {len(W_t)} words")
    if h_t is None:
        tau, kl_weight, mse_weight = 1.0, 0.0, 0.0
    device = h_s.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_s.dtype
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (h_s, W_s, b_s)]
    loss, sums, *_ = _forward(
        h_s, W_s, b_s, h_t, W_t, b_t, labels.contiguous(), float(tau), float(kl_weight), float(ce_weight),
        float(mse_weight), dtype, *wanted,
    )  # fmt: skip
    return loss, *sums.detach()
