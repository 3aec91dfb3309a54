"""What this card can do at best, what is installed, and whether each attention backend applies dropout correctly."""

import json

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benches.gpu.prepare import FOLDER
from benches.gpu.timing import timed
from benches.measure import copy_bandwidth
from minidistil import model
from minidistil.device import versions

COPY_MIB = 1024  # of the tensor whose copy is the ceiling of memory
DROPOUTS = (0.1, 0.125, 0.05)
OFF = 0.005  # of a mean of 1, and of a share: a backend that keeps 230 of 256 for 0.9 is 0.0017 off


def ceilings(run):
    for function in (card, copy, product, choice):
        run.attempt(function.__name__, function, run)
    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    others += [] if run.null else [SDPBackend.CUDNN_ATTENTION]  # for information: our models do not use it
    for backend in [None, *others]:
        name = short(backend)
        for p in DROPOUTS:
            run.attempt(f"attention dropout, {name}, {p}", dropout, run, backend, p)
        if backend != SDPBackend.FLASH_ATTENTION:  # which takes no mask
            run.attempt(f"attention mask, {name}", masked_backward, run, backend)


def short(backend):
    return "ours" if backend is None else {"CUDNN": "cuDNN"}.get(word := backend.name.split("_")[0], word.lower())


def card(run):
    found, revision = versions(), FOLDER / "revision.json"
    if found["git"] is None and revision.exists():  # what travelled has no git
        found["git"] = json.loads(revision.read_text())
    total = torch.cuda.get_device_properties(0).total_memory >> 20
    run.emit(unit="versions", device=torch.cuda.get_device_name(0), memory_mib=total, **found)


def copy(run):
    run.emit(unit="copy", gb_per_s=round(copy_bandwidth(run.device, 4 if run.tiny else COPY_MIB), 1))


def product(run):
    n = 64 if run.tiny else 8192
    a, b = (run.randn(n, n, dtype=torch.bfloat16) for _ in "ab")
    a @ b
    ms, _ = timed(run, {"product": lambda: a @ b}, 9)["product"]
    run.emit(unit="matrix product", ms=ms, tflops=round(2 * n**3 / max(ms[1], 1e-9) / 1e9, 1))


def choice(run):
    """Which backend PyTorch chooses by default."""
    for T in (512, 128):
        q, k, v = (run.randn(16, 12, T, 64, dtype=torch.bfloat16) for _ in "qkv")
        mask = torch.ones(16, 1, 1, T, dtype=torch.bool, device=run.device)
        for p, m in ((0.0, None), (0.1, None), (0.0, mask), (0.1, mask)):
            backend = SDPBackend(torch._fused_sdp_choice(q, k, v, m, p, False))
            run.emit(unit="attention chosen", T=T, p=p, mask=m is not None, backend=short(backend))


def attend(backend, q, k, v, mask=None, p=0.0):
    if backend is None:
        return model.attention(q, k, v, mask, p)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)


def dropout(run, backend, p):
    """With v = 1 the mean must be 1; with v = identity the result is the probabilities, 0 where one is dropped."""
    B, T = (4, 128) if run.tiny else (16, 512)
    q, k, v = (run.randn(B, 12, T, 64, dtype=torch.bfloat16) for _ in "qkv")
    mean = attend(backend, q, k, torch.ones_like(v), p=p).float().mean().item()
    q, k = (x[:, :, :64] for x in (q, k))
    eye = torch.eye(64, dtype=q.dtype, device=run.device).expand(B, 12, 64, 64).contiguous()
    share = (attend(backend, q, k, eye, p=p) == 0).float().mean().item()
    right = abs(mean - 1) < OFF and abs(share - p) < OFF
    run.emit(
        unit="attention dropout", backend=short(backend), p=p, mean=round(mean, 5), dropped=round(share, 5), right=right
    )
    if not right and backend != SDPBackend.CUDNN_ATTENTION and not run.null:
        raise AssertionError(f"dropout {p} drops {share:.4f} and scales the mean by {mean:.4f}")


def masked_backward(run, backend, T=192):
    qkv = run.randn(16, T, 3, 12, 64, dtype=torch.bfloat16).requires_grad_()
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    mask = (torch.arange(T, device=run.device) < T - 5)[None, None, None].expand(16, 1, 1, T)
    attend(backend, q, k, v, mask, 0.1).float().sum().backward()
    finite = bool(qkv.grad.isfinite().all())
    run.emit(unit="attention mask", backend=short(backend), T=T, right=finite)
    if not finite and backend != SDPBackend.CUDNN_ATTENTION and not run.null:
        raise AssertionError(f"T = {T} with a mask: gradients are not finite")
