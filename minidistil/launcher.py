"""What `torchrun` tells each of its processes in the environment: all of it, or nothing.

A cluster, or a shell that was used for something else, may hold some of these variables without a launcher.
"""

import os
import typing

from minidistil.errors import UserError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_NUMBERS = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": 1}  # and the least that each may be


class Place(typing.NamedTuple):
    """Where a process stands among those of a run: process `rank` of `size`, `local` on its machine."""

    rank: int = 0
    size: int = 1
    local: int = 0
    meeting: str = ""  # host:port of rank 0


def place():
    """Returns the Place of this process, which is alone where nothing was launched; UserError for half a launch."""
    found = {name: os.environ[name].strip() for name in VARIABLES if os.environ.get(name, "").strip()}
    ours = [name for name in VARIABLES[:3] if name in found]
    if not ours or (found.get("WORLD_SIZE") == "1" and found.get("RANK", "0") == "0"):
        return Place()  # an address alone launches nothing, and one process meets nobody
    way = f"start with `torchrun --nproc-per-node N train.py ...`, or `unset {' '.join(ours)}` for one process"
    if missing := [name for name in VARIABLES if name not in found]:
        raise UserError(f"the environment has {', '.join(ours)}, but no {', '.join(missing)}: {way}")
    for name, least in _NUMBERS.items():
        if not (found[name].isdecimal() and int(found[name]) >= least):
            raise UserError(f"the environment has {name} {found[name]!r}, not a number from {least} on: {way}")
    rank, size, local, port = (int(found[name]) for name in _NUMBERS)
    if not local <= rank < size or port > 65535:
        told = ", ".join(f"{name} {found[name]}" for name in VARIABLES)
        raise UserError(f"the environment has {told}, which contradict each other: {way}")
    return Place(rank, size, local, f"{found['MASTER_ADDR']}:{port}")


def is_first():
    """Whether this process speaks for the run: rank 0, and anyone whose place is not clear."""
    try:
        return place().rank == 0
    except UserError:
        return True


def speaks():
    """Whether this process prints an error that all may have: the first of its machine, and anyone who is not clear."""
    try:
        return place().local == 0
    except UserError:
        return True


def forget():
    """Makes this process, and those that it starts, one that nobody launched."""
    for name in VARIABLES:
        os.environ.pop(name, None)
