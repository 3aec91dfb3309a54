"""Precision of matrix products: which dtype is fast on this computer, and how a model computes in it.

Weights, their gradients, LayerNorm's statistics and the loss are fp32 whatever the dtype (Micikevicius et al. 2018,
arXiv 1710.03740).
"""

import contextlib
import time

import torch
import torch.nn.functional as F

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

SHAPE = 128, 768, 768  # rows, columns in and columns out of the products that are timed: a millisecond or less
ROUNDS, SECONDS = 5, 1.0  # at least so many rounds, and none after so long
ALIKE = 1.1  # the three fastest products of a kind differ by no more where nothing disturbed them
CLEAR = 1.3  # bf16 must be so many times as fast, since the rest of an update is no faster


def choose_dtype(name, device, clock=time.perf_counter):
    """Returns (dtype, why): `name`, or for "auto" the dtype whose products are fast; `why` is text, "" for a given one.

    On a CPU products of both kinds are timed, because instruction sets alone decide nothing: with AVX512-BF16 bf16 was
    half as fast as fp32 on one processor and four times as fast on another (LOG.md).
    """
    if name != "auto":
        return name, ""
    if device.type == "cuda":
        return ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"), ""
    ratio = bf16_speed_up(clock)
    return "bf16" if ratio >= CLEAR else "fp32", f"bf16 products are {ratio:.1f} times as fast as fp32's"


@torch.no_grad()
def bf16_speed_up(clock=time.perf_counter):
    """Returns how many times as fast as in fp32 matrix products in bf16 are on this CPU, with the threads in use.

    Short products of both kinds in turn, and the minimum of each: what else runs on the computer only adds time. It
    goes on until the three fastest of each kind are alike, so that no minimum is one that was disturbed: a few tens of
    milliseconds, up to a second on a busy computer or where bf16 is emulated. The first round warms up.
    """
    M, K, N = SHAPE
    dtypes = torch.float32, torch.bfloat16
    inputs = {dtype: (torch.ones(M, K, dtype=dtype), torch.ones(N, K, dtype=dtype)) for dtype in dtypes}
    seconds, began, turns = {dtype: [] for dtype in dtypes}, clock(), 0
    while turns <= ROUNDS or not (clock() - began > SECONDS or all(map(_steady, seconds.values()))):
        for dtype, (x, weight) in inputs.items():
            start = clock()
            F.linear(x, weight)
            if turns:
                seconds[dtype].append(clock() - start)
        turns += 1
    return min(seconds[torch.float32]) / min(seconds[torch.bfloat16])


def _steady(seconds):
    fastest, _, third = sorted(seconds)[:3]
    return third <= ALIKE * fastest


def precision(dtype, device):
    """Returns (context of a forward pass, loss scaler) for a dtype by name; only fp16 scales the loss."""
    autocast = contextlib.nullcontext if dtype == "fp32" else lambda: torch.autocast(device.type, DTYPES[dtype])
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == "fp16")


def cast_products(model, dtype):
    """Casts the weights of a frozen model's linear layers to fp32, bf16 or fp16 by name.

    Autocast would cast them to the same bits in each forward pass: it caches only weights that require gradients.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(DTYPES[dtype])
