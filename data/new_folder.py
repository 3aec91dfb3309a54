"""A folder that is written beside its place, and takes it when it is complete."""

import contextlib
import errno
import os
import pathlib
import shutil
import socket

import filelock

from minidistil import files
from minidistil.errors import UserError


@contextlib.contextmanager
def new_folder(out):
    """Yields a new folder beside `out`, which is renamed to `out` on success and removed on failure.

    `out` must not exist, or be an empty folder. Raises UserError where it is something else, a mount point, or written
    by another process; what a killed process of this computer left is removed.
    """
    out = pathlib.Path(os.path.abspath(out))
    empty = out.is_dir() and not out.is_symlink() and not any(out.iterdir())
    if out.is_symlink() or out.exists() and not empty:
        raise UserError(f"{out} already exists and is no empty folder: choose another --out")
    if empty:
        _check_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.{socket.gethostname()}-"
    for leftover in out.parent.iterdir():
        owner = leftover.name.removeprefix(prefix).removesuffix(".tmp")
        if leftover.name == f"{prefix}{owner}.tmp" and not _alive(owner):  # from a killed run
            shutil.rmtree(leftover, ignore_errors=True)
    folder, lock = out.with_name(f"{prefix}{os.getpid()}.tmp"), filelock.FileLock(out.with_name(f".{out.name}.writer"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"another process is writing {out}: wait for its end, or choose another --out") from None
    try:
        folder.mkdir()
        yield folder
        for path in filter(pathlib.Path.is_file, folder.rglob("*")):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        files.sync_folder(folder)
        with contextlib.suppress(OSError):  # Windows replaces no folder, not even an empty one
            out.rmdir()
        os.rename(folder, out)
        files.sync_folder(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # Windows keeps a file that is open
            os.unlink(lock.lock_file)
        lock.release()


def _check_replaceable(out):
    """Raises UserError for an empty folder that no other can replace, such as the volume of a container."""
    try:
        out.rmdir()
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise UserError(f"{out} is a mount point, which cannot be replaced: name a folder in it") from None
    out.mkdir()


def _alive(owner):
    """Whether another process on this computer has this id."""
    try:
        os.kill(int(owner), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        pass
    return int(owner) != os.getpid()
