"""LayerNorm of dropout(x) + residual, one kernel each way: what connects the halves of a transformer block.

    z = x * keep / (1 - p) + residual       keep = 1 with probability 1 - p
    y = gamma * xhat + beta                 xhat = (z - mean) * rstd, rstd = 1 / sqrt(var + eps)     Ba et al. 2016
    dz = rstd * (gamma dy - mean(gamma dy) - xhat * mean(gamma dy * xhat)) + g
    d residual = dz     dx = dz * keep / (1 - p)     dgamma = sum over rows of dy * xhat     dbeta = sum over rows of dy

A post-norm block goes on with y alone. A pre-norm block also passes z on, the residual stream, and g is the gradient
that arrives at z from there; otherwise g is 0. The stream has a dtype of its own, that of the residual: fp32 in
training, while x and y are bf16 under autocast.

The mask is not stored: the backward pass draws it again (dropout.py).

One warp processes a row, so its sums need no barrier. A width that is not a power of two is split into two powers: 768
= 512 + 256, where a single block of 1,024 would leave a quarter of the lanes idle. Sums over rows: a fixed number of
programs each sum their rows in registers and write one partial row; the sum of these has the same bits every time.

Arithmetic and statistics are fp32 for every dtype of x. Bytes per element, bf16: forward 8 (read x and residual, write
z and y; 6 without a gradient, since only the backward pass needs z; 4 without dropout and residual, where z is x),
backward 6 (read z, dy, write dz; 8 with dropout). With a stream in fp32: forward 12 (read x and residual, write z and
y), backward 16 (read z, dy, g, write dz and dx).

Legend:  N rows   C width   T rows of a sequence   p probability of dropping   g gradient that arrives at z
"""

import torch
import torch.nn.functional as F

from kernels.backend import on_triton, tl, triton
from kernels.dropout import Key, dropout, dropped, rows_per_sequence, threshold_and_scale
from kernels.dropout import gradient as dropout_gradient
from kernels.operator import differentiable, opaque


def dropout_add_layer_norm_ref(x, residual, weight, bias, eps, p=0.0):
    """LayerNorm(dropout(x) + residual): the definition. `residual` may be None."""
    z = F.dropout(x, p)
    return F.layer_norm(z if residual is None else z + residual, x.shape[-1:], weight, bias, eps)


# ---- Triton


@triton.jit
def _sum(x):
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def _load_z(
    x_ptr, r_ptr, z_ptr, seed, site, row, group, C, threshold, scale,
    HAS_RESIDUAL: tl.constexpr, HAS_DROPOUT: tl.constexpr, KEEP_Z: tl.constexpr,
):  # fmt: skip
    """Returns one piece of a row of z = dropout(x) + residual: (G, 8) fp32, zero beyond column C."""
    cols = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = cols < C
    z = tl.load(x_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_DROPOUT:
        z = dropped(z, seed, site, row, group, threshold, scale)
    if HAS_RESIDUAL:
        z += tl.load(r_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL or HAS_DROPOUT:
        rounded = z.to(z_ptr.dtype.element_ty)
        if KEEP_Z:
            tl.store(z_ptr + cols, rounded, mask=inside)
        z = rounded.to(tl.float32)  # the statistics are those of the z that the backward pass reads
    return z


@triton.jit
def _store_y(y_ptr, w_ptr, b_ptr, z, mean, rstd, group, C):
    cols = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = cols < C
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    y = (z - mean) * rstd * w + b
    tl.store(y_ptr + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _forward_kernel(
    x_ptr,  # (N, C), any float
    r_ptr,  # (N, C), any float: the residual
    w_ptr,  # (C,)
    b_ptr,  # (C,)
    y_ptr,  # (N, C)
    z_ptr,  # (N, C), any float: dropout(x) + residual; without KEEP_Z only its dtype is used
    stats_ptr,  # (N, 2) fp32: mean, rstd
    key_ptr,  # (2,) int64: seed, first sequence; on the device, so that a replayed CUDA graph draws new masks
    site,
    T,
    C,
    eps,
    threshold,  # p * 2^16
    scale,  # 1 / (1 - p)
    HAS_RESIDUAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    KEEP_Z: tl.constexpr,
    A: tl.constexpr,  # C is split into A and B columns, powers of two; B may be 0
    B: tl.constexpr,
):
    row = tl.program_id(0)
    offset = row.to(tl.int64) * C
    x_ptr += offset
    y_ptr += offset
    z_ptr += offset
    if HAS_RESIDUAL:
        r_ptr += offset
    seed = tl.load(key_ptr) if HAS_DROPOUT else 0
    counted = (tl.load(key_ptr + 1) if HAS_DROPOUT else 0) * T + row  # in the update
    groups_a = tl.arange(0, A // 8)
    a = _load_z(
        x_ptr, r_ptr, z_ptr, seed, site, counted, groups_a, C, threshold, scale, HAS_RESIDUAL, HAS_DROPOUT, KEEP_Z
    )  # fmt: skip
    total = _sum(a)
    if B:
        groups_b = A // 8 + tl.arange(0, B // 8)
        b = _load_z(
            x_ptr, r_ptr, z_ptr, seed, site, counted, groups_b, C, threshold, scale, HAS_RESIDUAL, HAS_DROPOUT, KEEP_Z
        )  # fmt: skip
        total += _sum(b)
    mean = total / C
    # on a GPU a quotient may be two units off in the last place, which counts beside a large mean
    mean += tl.fma(-mean, tl.cast(C, tl.float32), total) / C
    # two sums over registers, because a difference of mean squares would cancel
    d = tl.where(groups_a[:, None] * 8 + tl.arange(0, 8)[None, :] < C, a - mean, 0.0)
    square = _sum(d * d)
    if B:
        d = tl.where(groups_b[:, None] * 8 + tl.arange(0, 8)[None, :] < C, b - mean, 0.0)
        square += _sum(d * d)
    rstd = 1.0 / tl.sqrt(square / C + eps)
    _store_y(y_ptr, w_ptr, b_ptr, a, mean, rstd, groups_a, C)
    if B:
        _store_y(y_ptr, w_ptr, b_ptr, b, mean, rstd, groups_b, C)
    tl.store(stats_ptr + row * 2 + 0, mean)
    tl.store(stats_ptr + row * 2 + 1, rstd)


@triton.jit
def _load_gradient(z_ptr, dy_ptr, w, mean, rstd, group, C):
    """Returns (xhat, dy, gamma dy) of one piece of a row: (G, 8) fp32, zero beyond column C."""
    cols = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = cols < C
    z = tl.load(z_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, (z - mean) * rstd, 0.0), dy, w * dy


@triton.jit
def _store_dz(
    g_ptr, dz_ptr, dx_ptr, xhat, wdy, mean_wdy, mean_wdy_xhat, rstd, seed, site, row, group, C, threshold, scale,
    HAS_G: tl.constexpr, HAS_DX: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    cols = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    dz = rstd * (wdy - mean_wdy - xhat * mean_wdy_xhat)
    if HAS_G:
        dz += tl.load(g_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    tl.store(dz_ptr + cols, dz.to(dz_ptr.dtype.element_ty), mask=cols < C)
    if HAS_DX:
        dx = dropped(dz, seed, site, row, group, threshold, scale) if HAS_DROPOUT else dz
        tl.store(dx_ptr + cols, dx.to(dx_ptr.dtype.element_ty), mask=cols < C)


@triton.jit
def _load_columns(ptr, group, C):
    cols = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    return tl.load(ptr + cols, mask=cols < C, other=0.0).to(tl.float32)


@triton.jit
def _store_columns(ptr, x, group, C):
    cols = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(ptr + cols, x, mask=cols < C)


@triton.jit
def _backward_kernel(
    dy_ptr,  # (N, C)
    g_ptr,  # (N, C): the gradient that arrives at z, with HAS_G only
    z_ptr,  # (N, C)
    w_ptr,  # (C,)
    stats_ptr,  # (N, 2) fp32: mean, rstd
    key_ptr,  # (2,) int64: seed, first sequence
    site,
    T,
    dz_ptr,  # (N, C), the gradient of the residual
    dx_ptr,  # (N, C), the gradient of x, with HAS_DX only
    dwb_ptr,  # (programs, 2, C) fp32: partial sums of dgamma and dbeta
    N,
    C,
    threshold,
    scale,
    HAS_G: tl.constexpr,
    HAS_DX: tl.constexpr,  # whether dx differs from dz: by the mask of dropout, or by its dtype
    HAS_DROPOUT: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
):
    program = tl.program_id(0)
    groups_a = tl.arange(0, A // 8)
    w_a = _load_columns(w_ptr, groups_a, C)
    dw_a = tl.zeros((A // 8, 8), tl.float32)
    db_a = tl.zeros((A // 8, 8), tl.float32)
    if B:
        groups_b = A // 8 + tl.arange(0, B // 8)
        w_b = _load_columns(w_ptr, groups_b, C)
        dw_b = tl.zeros((B // 8, 8), tl.float32)
        db_b = tl.zeros((B // 8, 8), tl.float32)
    seed = tl.load(key_ptr) if HAS_DROPOUT else 0
    first = (tl.load(key_ptr + 1) if HAS_DROPOUT else 0) * T  # row, counted in the update
    for row in tl.range(program, N, tl.num_programs(0), num_stages=2):  # prefetches the next row
        offset = (tl.zeros((), tl.int64) + row) * C
        mean = tl.load(stats_ptr + row * 2 + 0)
        rstd = tl.load(stats_ptr + row * 2 + 1)
        xhat_a, dy_a, wdy_a = _load_gradient(z_ptr + offset, dy_ptr + offset, w_a, mean, rstd, groups_a, C)
        mean_wdy = _sum(wdy_a)
        mean_wdy_xhat = _sum(wdy_a * xhat_a)
        if B:
            xhat_b, dy_b, wdy_b = _load_gradient(z_ptr + offset, dy_ptr + offset, w_b, mean, rstd, groups_b, C)
            mean_wdy += _sum(wdy_b)
            mean_wdy_xhat += _sum(wdy_b * xhat_b)
        mean_wdy /= C
        mean_wdy_xhat /= C
        g_row = g_ptr + offset if HAS_G else g_ptr
        _store_dz(
            g_row, dz_ptr + offset, dx_ptr + offset, xhat_a, wdy_a, mean_wdy, mean_wdy_xhat, rstd, seed, site,
            first + row, groups_a, C, threshold, scale, HAS_G, HAS_DX, HAS_DROPOUT,
        )  # fmt: skip
        dw_a += dy_a * xhat_a
        db_a += dy_a
        if B:
            _store_dz(
                g_row, dz_ptr + offset, dx_ptr + offset, xhat_b, wdy_b, mean_wdy, mean_wdy_xhat, rstd, seed, site,
                first + row, groups_b, C, threshold, scale, HAS_G, HAS_DX, HAS_DROPOUT,
            )  # fmt: skip
            dw_b += dy_b * xhat_b
            db_b += dy_b
    dwb_ptr += program * 2 * C
    _store_columns(dwb_ptr, dw_a, groups_a, C)
    _store_columns(dwb_ptr + C, db_a, groups_a, C)
    if B:
        _store_columns(dwb_ptr, dw_b, groups_b, C)
        _store_columns(dwb_ptr + C, db_b, groups_b, C)


def split_width(C):
    """Returns (A, B, num_warps): C columns as two powers of two, at least 8; 768 = 512 + 256, 1,024 = 1,024 + 0."""
    A = max(8, 1 << (C.bit_length() - 1))
    B = 0 if C <= A else max(8, triton.next_power_of_2(C - A))
    return A, B, max(1, min(8, A // 1024))


def _backward_warps(C, stream):
    """Returns the warps of a row in the backward pass.

    A warp keeps gamma, dgamma and dbeta in registers: of 1,024 columns, or of fewer beside the gradient of a `stream`.
    """
    columns = sum(split_width(C)[:2])
    return min(8, triton.next_power_of_2(columns // 1024 + 1 if stream else -(-columns // 1024)))


def _programs(N, device):
    """Returns the number of programs of the backward pass, which also is that of partial sums: 8 per multiprocessor."""
    return min(N, 8 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4)


# ---- operator


def _forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float, p: float,
    key: torch.Tensor | None, site: int, T: int, dtype: torch.dtype, keep_z: bool, with_sum: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Returns (y, z, stats) of x (N, C), y in `dtype`; z is empty where it equals x or is not needed.

    It is needed for a backward pass (`keep_z`), in the dtype of y, and as a result (`with_sum`), in the stream's.
    """
    N, C = x.shape
    A, B, warps = split_width(C)
    y, z, stats = _empty_results(x, residual, weight, bias, eps, p, key, site, T, dtype, keep_z, with_sum)
    if N:
        _forward_kernel[(N,)](
            x, residual, weight, bias, y, z, stats, key, site, T, C, eps, *threshold_and_scale(p),
            HAS_RESIDUAL=residual is not None, HAS_DROPOUT=key is not None, KEEP_Z=keep_z or with_sum, A=A, B=B,
            num_warps=warps,
        )  # fmt: skip
    return y, z, stats


def _empty_results(x, residual, weight, bias, eps, p, key, site, T, dtype, keep_z, with_sum):
    new = (keep_z or with_sum) and (residual is not None or key is not None)
    of_z = (x if residual is None else residual).dtype if with_sum else dtype
    z = torch.empty_like(x, dtype=of_z) if new else x.new_empty(0, dtype=of_z)
    return torch.empty_like(x, dtype=dtype), z, x.new_empty(len(x), 2, dtype=torch.float32)


def _backward(
    dy: torch.Tensor, g: torch.Tensor | None, z: torch.Tensor, weight: torch.Tensor, stats: torch.Tensor, p: float,
    key: torch.Tensor | None, site: int, T: int, dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Returns (dz, dx, dweight and dbias (2, C)), dx in `dtype`; where dx is dz it is returned empty."""
    N, C = z.shape
    A, B, warps = split_width(C)
    programs = _programs(N, z.device)
    dz, dx, _ = _empty_gradients(dy, g, z, weight, stats, p, key, site, T, dtype)
    dwb = z.new_empty(programs, 2, C, dtype=torch.float32)
    if N:
        _backward_kernel[(programs,)](
            dy, g, z, weight, stats, key, site, T, dz, dx, dwb, N, C, *threshold_and_scale(p),
            HAS_G=g is not None, HAS_DX=dx.ndim == 2, HAS_DROPOUT=key is not None, A=A, B=B,
            num_warps=max(warps, _backward_warps(C, g is not None)),
        )  # fmt: skip
    return dz, dx, dwb.sum(0).to(weight.dtype)


def _empty_gradients(dy, g, z, weight, stats, p, key, site, T, dtype):
    same = key is None and dtype == z.dtype
    dx = z.new_empty(0) if same else torch.empty_like(z, dtype=dtype)
    return torch.empty_like(z), dx, weight.new_empty(2, len(weight))


def _setup_context(ctx, inputs, output):
    x, residual, weight, _, _, ctx.p, key, ctx.site, ctx.T, *_ = inputs
    _, z, stats = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None and key is None else z, weight, stats, key)
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype


def _backward_of_forward(ctx, dy, g, _):
    z, weight, stats, key = ctx.saved_tensors
    of_x, of_residual = ctx.dtypes
    g, dwb = None if g is None or g.ndim == 1 else g.contiguous(), (None, None)  # z may be empty
    if dy is not None:
        dz, dx, dwb = _backward_operator(
            dy.contiguous(), g, z, weight, stats, ctx.p, key, ctx.site, ctx.T, of_x
        )  # fmt: skip
        dx = dx if dx.ndim == 2 else dz
    elif g is not None:  # only z is used further on
        dz, dx = g, (g if key is None else dropout_gradient(g, ctx.p, key, ctx.site, ctx.T)).to(of_x)
    else:
        return (None,) * 12
    return dx, None if of_residual is None else dz.to(of_residual), *dwb, *(None,) * 8


_backward_operator = opaque("dropout_add_layer_norm_backward", _backward, _empty_gradients)
_operator = differentiable("dropout_add_layer_norm", _forward, _empty_results, _setup_context, _backward_of_forward)


def dropout_add_layer_norm(x, residual, weight, bias, eps, p=0.0, training=True, key=None, site=0, with_sum=False):
    """LayerNorm(dropout(x) + residual) over the last dimension, differentiable; `residual` may be None.

    x, residual (..., C) any float; weight, bias (C,). The result has autocast's dtype, or that of x without autocast.
    `with_sum`: returns (y, z), where z = dropout(x) + residual has the dtype of the residual, or of x without one; both
    are differentiable. On a GPU one kernel each way, elsewhere PyTorch's LayerNorm, with fp32 arithmetic and
    statistics. p, key, site: see `dropout`. Source: Ba et al. 2016; Vaswani et al. 2017, section 5.4, for the dropout.
    """
    p, device, C = p if training else 0.0, x.device.type, x.shape[-1]
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if not on_triton(x) or x.dtype == torch.float64:
        z = dropout(x, p, True, key, site)
        z = z if residual is None else z + residual
        if with_sum and residual is not None:
            z = z.to(residual.dtype)
        # from bf16, PyTorch sums the gradients of weight and bias in bf16, 6 % off over 2,560 rows (LOG.md)
        learns = torch.is_grad_enabled() and weight.requires_grad
        y = F.layer_norm(z.float() if learns and z.itemsize < 4 else z, weight.shape, weight, bias, eps).to(dtype)
        return (y, z) if with_sum else y
    data = (key or Key.drawn(x.device)).data if p else None
    rows = [None if t is None else t.reshape(-1, C).contiguous() for t in (x, residual)]
    keep_z = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, weight, bias))
    T = rows_per_sequence(x)
    y, z, _ = _operator(*rows, weight, bias, eps, p, data, site, T, dtype, keep_z, with_sum)
    if not with_sum:
        return y.view(x.shape)
    return y.view(x.shape), x if residual is None and data is None else z.view(x.shape)


def bytes_moved(N, C, itemsize, p):
    """Minimum bytes moved by forward and backward, with a residual: 14 per element in bf16, 16 with dropout."""
    return N * C * itemsize * (4 + (4 if p else 3))
