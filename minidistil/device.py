"""What this computer is and can do: device, precision, memory, versions."""

import contextlib
import ctypes
import importlib.metadata
import pathlib
import platform
import re
import resource
import subprocess
import sys

import numpy as np
import torch

import minidistil
from minidistil.errors import UserError

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


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision(dtype, device):
    """Returns (context of a forward pass, loss scaler) for fp32, bf16 or fp16 by name; only fp16 scales its loss."""
    autocast = contextlib.nullcontext if dtype == "fp32" else lambda: torch.autocast(device.type, DTYPES[dtype])
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == "fp16")


def cast_products(model, dtype):
    """Stores the weights of a frozen model's linear layers in fp32, bf16 or fp16 by name.

    Autocast would cast them to the same bits in each forward pass, since it remembers only what takes gradients.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(DTYPES[dtype])


# ---- memory


def status_kib(name):
    """A figure of this process that Linux keeps: VmRSS, resident memory, or VmHWM, its peak."""
    return int(re.search(rf"{name}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])


def peak_rss_mib():
    """Returns the peak resident memory, in MiB, of the largest of this process and its finished children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    try:  # ru_maxrss of this process would be at least that of the one that started it: it outlives exec
        own = status_kib("VmHWM")
    except (OSError, TypeError):
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(max(children, own) / (2**20 if sys.platform == "darwin" else 2**10), 1)


def keep_freed_memory():
    """Tells glibc to keep freed blocks for the next allocation; without glibc, does nothing.

    It would return those of 30 to 50 MB (a gradient of the vocabulary, a chunk of logits) to the kernel, and get zeroed
    pages back one fault at a time: 15 ms for 31 MB, longer than the matrix product that fills them.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    trim_threshold, mmap_threshold = -1, -3  # their names in malloc.h
    for parameter in (trim_threshold, mmap_threshold):
        mallopt(parameter, 2**30)


def peak_mib(device):
    """Returns the peak memory of a device, in MiB: allocated on a GPU, resident on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else peak_rss_mib()


# ---- versions


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
