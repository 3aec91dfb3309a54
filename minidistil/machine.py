"""What this computer is and can do: device, fast dtype, versions."""

import contextlib
import importlib.metadata
import pathlib
import platform
import subprocess

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

    A CPU's bf16 is fast with AMX; dot products of AVX512-BF16 alone are half as fast as fp32 (LOG.md). It is not timed:
    a busy computer would change a run's precision.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu.get_capabilities().get("amx_bf16") else "fp32"


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


def printed(*command):
    """What a command prints, or None where it is not installed or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def triton_version():
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def duration(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def versions():
    """Versions of what a run's figures depend on; the revision where git knows it, a GPU's software where one is."""
    found = {
        "minidistil": minidistil.__version__,
        "git": printed("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "numpy": np.__version__,
    }
    if torch.cuda.is_available():
        driver = printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver and driver.splitlines()[0],
        }
    return found
