"""How much memory a program has used, at most."""

import pathlib
import re
import resource
import sys


def peak_rss_mib():
    """Returns the peak resident memory, in MiB, of the largest of this process and its finished children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    try:  # ru_maxrss of this process would be at least that of the one that started it: it outlives exec
        own = int(re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
    except (OSError, TypeError):
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(max(children, own) / (2**20 if sys.platform == "darwin" else 2**10), 1)
