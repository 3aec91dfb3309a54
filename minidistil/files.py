"""Atomic file writes: a temporary file is written, synced and renamed. The folder of what can be made again."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_folder():
    """Returns the folder of corpora that are prepared once: $MINIDISTIL_CACHE, or data/cache in this checkout."""
    here = pathlib.Path(__file__).resolve().parent.parent / "data" / "cache"
    return pathlib.Path(os.environ.get("MINIDISTIL_CACHE") or here).expanduser()


@contextlib.contextmanager
def replacing(path, size=None):
    """Yields a temporary path in the same folder, which replaces `path` on success and is removed on failure.

    The data reach the disk before the name does, so a power cut leaves the old file or the new one. The error for a
    full disk names `path` and `size`, the bytes to be written.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno in FULL:
            wanted = f" for {size:,} bytes" if size else ""
            raise OSError(error.errno, f"{os.strerror(error.errno)}{wanted}", str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder):
    """Makes renames in `folder` durable; does nothing where folders cannot be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse to sync a folder
        pass
    finally:
        os.close(descriptor)


def write_text(path, text, errors="strict"):
    """Writes `text` as UTF-8, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors, newline="\n")


def write_json(path, value):
    """Writes `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_text(path, text, "backslashreplace")  # half a surrogate pair, as in a path that is not UTF-8: "\\udce9"


def sha256(path):
    """Returns the hexadecimal SHA-256 of a file, read in chunks."""
    hasher, chunk = hashlib.sha256(), memoryview(bytearray(1 << 18))
    with open(path, "rb", buffering=0) as file:  # hashlib.file_digest, which does this, came with Python 3.11
        while n := file.readinto(chunk):
            hasher.update(chunk[:n])
    return hasher.hexdigest()
