"""Time and memory: what is measured is what was asked for."""

import subprocess
import sys
import time

import pytest
import torch

from benches.measure import copy_bandwidth, extra_memory_mib, interleaved, spread

CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_extra_memory():
    held = torch.ones(10 << 18)  # what is there before does not count
    assert 49 < extra_memory_mib(lambda: torch.ones(50 << 18), CPU) < 55
    assert extra_memory_mib(lambda: None, CPU) < 2
    del held


def test_interleaved_takes_turns():
    order = []
    functions = {"a": lambda: order.append("a"), "b": lambda: (order.append("b"), time.sleep(0.01))}
    times = interleaved(functions, 3, CPU)
    assert order == ["a", "b"] * 3 and [len(x) for x in times.values()] == [3, 3]
    assert min(times["b"]) >= 10 > max(times["a"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_host_that_takes_its_time_is_not_measured():
    x = torch.ones(1024, device="cuda")
    times = interleaved({"slow to launch": lambda: (time.sleep(0.002), x.add_(1))}, 3, x.device)
    assert 0 < min(times["slow to launch"]) and max(times["slow to launch"]) < 1


def test_spread_and_bandwidth():
    assert spread([5, 1, 2, 3, 4, 6]) == [2, 3.5, 5] and spread([7]) == [7, 7, 7]
    assert 0.01 < copy_bandwidth(CPU, mib=8, rounds=5) < 10_000


@linux
def test_freed_memory_is_kept():
    """A block of 60 MiB, freed and taken again, costs 15,360 page faults, or none once there is room to align it."""
    program = """
import resource, sys
import torch
from minidistil.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(16):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(60 << 20, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {}
    for mode in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", program, mode], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        faults[mode] = int(done.stdout)
    assert faults["keep"] < 100
    if faults["leave"] < 100:
        pytest.skip("this allocator keeps freed memory of its own accord")
