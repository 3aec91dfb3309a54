"""The output folder of a run: claimed by one process at a time, with room for what will be written.

A lock is the operating system's, so it ends with its process, however that ends. Source: filelock, which PyTorch needs
too.
"""

import contextlib
import itertools
import os
import pathlib
import shlex
import shutil
import sys

import filelock

from minidistil.errors import UserError

CHECKPOINT = pathlib.Path("checkpoint") / "state.safetensors"  # in the folder of a run
LOCK = CHECKPOINT.with_name("lock")
KEYWORDS = {"teacher": ("none",), "student_init": ("teacher", "random"), "model": ("bilstm",)}  # no paths
BEFORE_CHECKPOINT = {"checkpoint", "metrics.jsonl"}  # what a run may leave behind that ended before its first one


@contextlib.contextmanager
def claimed(out, stem, resume, resume_marker):
    """Yields the folder `out`, or the first free one of runs/`stem`, runs/`stem`-2 ..., locked for this process.

    With `resume` it must contain the file `resume_marker`; otherwise it must be new, empty, or left by a run that ended
    before its first checkpoint. A folder in which nothing was written is removed. Raises UserError.
    """
    out, made = (_new_folder(stem), True) if out is None else (pathlib.Path(out), not os.path.exists(out))
    _check(out, resume, resume_marker)
    (out / LOCK).parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"another process is writing into {out}: wait for its end, or choose another --out") from None
    try:
        _check(out, resume, resume_marker)  # another process may have begun, and ended, in between
        for leftover in out.rglob(".*.tmp"):  # half a file of a run that was killed
            leftover.unlink()
        yield out
    finally:
        lock.release()
        if set(out.rglob("*")) <= {out / LOCK, (out / LOCK).parent}:
            shutil.rmtree(out if made else (out / LOCK).parent, ignore_errors=True)


def _new_folder(stem):
    """Makes and returns the first free folder of runs/`stem`, runs/`stem`-2 ..."""
    for n in itertools.count(1):
        out = pathlib.Path("runs") / (stem if n == 1 else f"{stem}-{n}")
        with contextlib.suppress(FileExistsError):
            out.mkdir(parents=True)
            return out


def _check(out, resume, resume_marker):
    """Raises UserError unless a run may resume, or begin, in `out`."""
    begun = (out / resume_marker).is_file()
    if resume and not begun:
        raise UserError(f"nothing to resume in {out} (no {resume_marker}): start without --resume")
    if out.is_dir() and not resume and (begun or not {path.name for path in out.iterdir()} <= BEFORE_CHECKPOINT):
        how = "add --resume to continue, or choose" if begun else "choose"
        raise UserError(f"--out {out} is not empty: {how} another --out")


@contextlib.contextmanager
def one_at_a_time(path):
    """Waits until no other process is within this context for the same `path`, a file or folder to be made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"another process is making {path}: waiting for it", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def check_room(folder, size):
    """Raises UserError unless the disk of `folder` has room for `size` more bytes."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{folder} has {free / 2**20:,.0f} MiB free, and this run writes {size / 2**20:,.0f} MiB: "
            "free some space, or choose an --out elsewhere"
        )


# ---- how to take a run up again


def inheritable(settings, paths):
    """Returns the settings (a dict) that a resumed run inherits, wherever it is started: existing paths are absolute.

    `paths` names those that may be paths, several with commas. The settings of one process are left out.
    """

    def absolute(text):
        path = os.path.abspath(os.path.expanduser(text))
        return path if text and os.path.exists(path) else text

    result = {name: value for name, value in settings.items() if name not in ("out", "resume", "time_limit")}
    given = {name: result[name] for name in paths if result[name] and result[name] not in KEYWORDS.get(name, ())}
    return result | {name: ",".join(map(absolute, value.split(","))) for name, value in given.items()}


def check_name(settings, *models):
    """Raises UserError where --out is the name of one of these settings, which would then mean the new folder."""
    for name in models if settings.out and not settings.resume else ():
        for model in (getattr(settings, name) or "").split(","):
            if model and os.path.abspath(os.path.expanduser(model)) == os.path.abspath(settings.out):
                what = f"--out {settings.out} is also the name of the model of --{name.replace('_', '-')}"
                raise UserError(f"{what}: choose another --out, such as runs/{pathlib.Path(settings.out).name}")


def command(script, *words, launcher=("python",)):
    """Returns a command line that runs a script of this program from the folder in which this one was started."""
    typed = pathlib.Path(sys.argv[0]).parent / script
    if tuple(launcher) == ("python",):
        found = (name for name in ("python", "python3") if shutil.which(name) == sys.executable)
        launcher = [next(found, sys.executable)]
    return shlex.join([*launcher, str(typed) if typed.is_file() else script, *map(str, words)])
