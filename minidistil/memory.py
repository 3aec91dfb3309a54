"""Memory of this process, without PyTorch, which data/prepare.py does not load."""

import ctypes
import pathlib
import re
import resource
import sys


def status_kib(name):
    """Returns a memory value of this process in KiB from /proc: VmRSS, resident memory, or VmHWM, its peak."""
    return int(re.search(rf"{name}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])


def peak_rss_mib():
    """Returns the peak resident memory, in MiB, of the largest of this process and its finished children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    try:  # ru_maxrss survives exec, so it would be at least that of the parent process
        own = status_kib("VmHWM")
    except (OSError, TypeError):
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(max(children, own) / (2**20 if sys.platform == "darwin" else 2**10), 1)


def keep_freed_memory():
    """Tells glibc to keep freed blocks for the next allocation; without glibc, does nothing.

    glibc would return blocks of 30 to 50 MB (a gradient of the vocabulary, a chunk of logits) to the kernel and get
    zeroed pages back, one page fault each: 15 ms for 31 MB, longer than the matrix product that fills them.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    trim_threshold, mmap_threshold = -1, -3  # their names in malloc.h
    for parameter in (trim_threshold, mmap_threshold):
        mallopt(parameter, 2**30)
