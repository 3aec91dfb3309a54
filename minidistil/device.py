"""Device, peak memory and software versions."""

import pathlib
import platform
import subprocess

import numpy as np
import torch

import minidistil
from kernels.backend import triton
from minidistil.errors import RankError, UserError
from minidistil.memory import peak_rss_mib

ROOT = pathlib.Path(__file__).resolve().parent.parent


def choose_device(name):
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)
        if device.type == "cuda":
            torch.cuda.get_device_properties(device)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # where Triton launches kernels, whatever the device of their tensors
    except (RuntimeError, AssertionError, ValueError) as error:
        raise RankError(f"--device {name} is not here ({str(error).splitlines()[0]}): try --device cpu") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported: use cpu or cuda")
    return device


def peak_mib(device):
    """Returns the peak memory of a device, in MiB: allocated on a GPU, resident on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else peak_rss_mib()


def device_name(device):
    """Returns the name of a GPU, or of the processor and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = torch.cpu.get_capabilities().get("cpu_name") or f"{platform.machine()} CPU"
    return f"{name}, {torch.get_num_threads()} threads"


def output_of(*command):
    """Returns the output of a command, or None where it is not installed or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def versions():
    """Returns the versions of the software that a run depends on, with git revision and, on a GPU, driver."""
    result = {
        "minidistil": minidistil.__version__,
        "git": output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", None),  # None where it is not installed
        "numpy": np.__version__,
    }
    if torch.cuda.is_available():
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        result |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        result["driver"] = driver and driver.splitlines()[0]
    return result
