"""Comparable measurements of time, memory and bandwidth of functions."""

import contextlib
import ctypes
import pathlib
import statistics
import time

import torch

from minidistil.memory import status_kib

SLEEP = 10_000_000  # GPU cycles, 5 ms: longer than the host needs for the launches


def spread(values):
    """Returns [p20, p50, p80]."""
    ordered = sorted(values)
    n = len(ordered) - 1
    return [ordered[round(0.2 * n)], statistics.median(ordered), ordered[round(0.8 * n)]]


def interleaved(functions, rounds, device, before=None):
    """Returns {name: milliseconds} of `rounds` interleaved calls, so that disturbances affect all alike.

    On a GPU this is device time, for functions that do not wait for the device: while the device sleeps, the host
    launches all kernels, because in training the host runs ahead too. before() precedes each measurement, untimed.
    """
    times = {name: [] for name in functions}
    # larger than any cache; written between measurements to flush the caches
    flush = torch.empty(64 << 20, dtype=torch.float32, device=device) if device.type == "cuda" else None
    for _ in range(rounds):
        for name, function in functions.items():
            if before:
                before()
            if flush is not None:
                flush.zero_()
                began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(SLEEP)
                began.record()
                function()
                ended.record()
                torch.cuda.synchronize(device)
                times[name].append(began.elapsed_time(ended))
            else:
                start = time.perf_counter()
                function()
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def extra_memory_mib(function, device):
    """Returns the peak memory of a call beyond the memory in use before it, in MiB."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        time.sleep(0.05)  # autograd's thread releases an earlier call's gradients a little later
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # memory freed earlier does not count as in use
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status_kib("VmRSS")
    function()
    return (status_kib("VmHWM") - before) / 2**10


def copy_bandwidth(device, mib=256, rounds=9):
    """Returns GB/s (1e9 bytes) of copying a large tensor, reads plus writes: the practical limit of the memory."""
    x = torch.empty(mib << 18, dtype=torch.float32, device=device).normal_()
    y = torch.empty_like(x)
    milliseconds = interleaved({"copy": lambda: y.copy_(x)}, rounds, device)["copy"]
    return 2 * x.numel() * 4 / statistics.median(milliseconds) / 1e6
