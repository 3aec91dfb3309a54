"""What this computer is and can do: device, fast dtype, versions."""

import contextlib
import pathlib
import platform
import subprocess
import time

import numpy as np
import torch

import minidistil
from minidistil.cli import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent


def choose_device(name):
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)
        if device.type == "cuda":
            torch.cuda.get_device_properties(device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"--device {name} is not here ({str(error).splitlines()[0]}): try --device cpu") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported: use cpu or cuda")
    return device


def choose_dtype(name, device):
    """Returns fp32, bf16 or fp16 by name: what is asked for, or what is fast on this device.

    A CPU may have bf16 instructions and yet multiply fp32 faster (AVX512-BF16 without AMX does), so it is timed:
    bf16 must win by half again, since its casts cost something too.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    x, w = torch.randn(512, 512), torch.randn(2048, 512)
    seconds = {}
    for label, a, b in (("fp32", x, w), ("bf16", x.bfloat16(), w.bfloat16())):
        times = []
        for _ in range(7):
            start = time.perf_counter()
            torch.mm(a, b.t())
            times.append(time.perf_counter() - start)
        seconds[label] = min(times)
    return "bf16" if seconds["bf16"] * 1.5 < seconds["fp32"] else "fp32"


HALVES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision(dtype, device):
    """Returns (context of a forward pass, loss scaler) for fp32, bf16 or fp16 by name; only fp16 scales its loss."""
    half = HALVES[dtype]
    autocast = contextlib.nullcontext if half is None else lambda: torch.autocast(device.type, half)
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == "fp16")


def cast_products(model, dtype):
    """Stores the weights of a frozen model's linear layers in fp32, bf16 or fp16 by name.

    Autocast would cast them to the same bits in each forward pass, since it remembers only what takes gradients.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(HALVES[dtype] or torch.float32)


def git_revision():
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def duration(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def versions():
    """Versions of what the figures of a run depend on, and the revision of this repository where git knows it."""
    return {
        "minidistil": minidistil.__version__,
        "git": git_revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
