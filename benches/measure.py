"""Time, memory and bandwidth of functions, measured so that they can be compared."""

import contextlib
import ctypes
import pathlib
import statistics
import time

import torch

from minidistil.device import status_kib

SLEEP = 10_000_000  # cycles of a GPU, 5 ms: launching takes the host less


def spread(values):
    """[p20, p50, p80]."""
    ordered = sorted(values)
    n = len(ordered) - 1
    return [ordered[round(0.2 * n)], statistics.median(ordered), ordered[round(0.8 * n)]]


def interleaved(functions, rounds, device, before=None):
    """Milliseconds of each of {name: function}, `rounds` times, in turn: what disturbs one disturbs the others too.

    On a GPU the device's own time, as long as a function does not wait for it: while the device sleeps, the host
    launches all there is, as in training, where it is ahead. before() is called untimed before each measurement.
    """
    times = {name: [] for name in functions}
    # larger than any cache; written between two measurements, so that none finds its input there
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
    """MiB that a call needs at its peak beyond what was there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        time.sleep(0.05)  # autograd's thread releases an earlier call's gradients a little later
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before does not count as there
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status_kib("VmRSS")
    function()
    return (status_kib("VmHWM") - before) / 2**10


def copy_bandwidth(device, mib=256, rounds=9):
    """GB/s (1e9 bytes) of copying a large tensor, read and write together: what the device's memory does at best."""
    x = torch.empty(mib << 18, dtype=torch.float32, device=device).normal_()
    y = torch.empty_like(x)
    milliseconds = interleaved({"copy": lambda: y.copy_(x)}, rounds, device)["copy"]
    return 2 * x.numel() * 4 / statistics.median(milliseconds) / 1e6
