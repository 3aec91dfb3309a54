"""Text to tokens at full size: throughput by number of workers, memory, equal bytes, and a kill halfway."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

from benches import ROOT, Common, last_line
from benches.report import attempt, measured, speed_up
from data import docstrings
from minidistil.errors import UserError

Settings = Common

GIGABYTES, TINY_GIGABYTES = 2.1, 0.004
VARIED = 0.05  # share of the words that each repetition of the docstring corpus redraws


def write_text(path, size, seed=0):
    """Writes at least `size` bytes of English, a document per line: varied repetitions of the docstring corpus."""
    rng, written = np.random.default_rng(seed), 0
    texts = docstrings.harvest(docstrings.python_files())
    words = np.array(" \n ".join(" ".join(text.split()) for text in texts).split(" "), dtype=object)
    inside = np.flatnonzero(words != "\n")  # keeps the ends of documents
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            copy, drawn = words.copy(), rng.choice(inside, int(VARIED * len(inside)))
            copy[drawn] = words[rng.permutation(drawn)]
            written += file.write(" ".join(copy) + "\n")


def family_mib(pid):
    """Returns the resident memory of a process and its children in MiB; shared memory counts for each of them."""
    pids = [str(pid)]
    for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        pids += task.read_text().split()
    pages = [int(pathlib.Path(f"/proc/{p}/statm").read_text().split()[1]) for p in pids]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def prepared(text, out, workers, kill_after=None):
    """Runs data/prepare.py; returns its summary and the peak memory of all its processes.

    With `kill_after`, it is killed this many seconds after it begins to write, and the result is None.
    """
    command = [sys.executable, ROOT / "data" / "prepare.py", text, "--vocab", ROOT / "data" / "demo", "--out", out]
    command = [*map(str, command), "--workers", str(workers)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said, peak, writing = [], 0.0, None
    reader = threading.Thread(target=lambda: said.extend(process.communicate()))
    reader.start()
    while reader.is_alive():
        with contextlib.suppress(OSError):  # a process ended in the meantime
            peak = max(peak, family_mib(process.pid))
        if writing is None and any(out.parent.glob(f".{out.name}.*.tmp")):
            writing = time.monotonic()
        if None not in (kill_after, writing) and time.monotonic() - writing > kill_after:
            process.send_signal(signal.SIGKILL)
        reader.join(0.02)
    if process.returncode == -signal.SIGKILL:
        return None
    summary = last_line(subprocess.CompletedProcess(command, process.returncode, *said))
    return summary | {"peak_mib": round(peak, 1), "hashes": json.loads((out / "meta.json").read_text())["sha256"]}


def kill_and_restart(text, folder, workers, seconds):
    """Kills a run halfway through its `seconds`, restarts it, and returns the hashes of the result."""
    again = folder / "again"
    if prepared(text, again, workers, kill_after=0.5 * seconds) is not None:
        raise UserError("data/prepare.py ended before it was killed: the machine is busy, run it again")
    if again.exists():
        raise UserError(f"{again} is there although the run that writes it was killed")
    hashes = prepared(text, again, workers)["hashes"]
    if left := [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]:
        raise UserError(f"the restarted run left {', '.join(left)} of the killed one behind")
    return hashes


def bench(settings):
    """Yields a row for 1, 2 ... workers; the last number also runs with a kill halfway and a restart."""
    counts = [1, 2] if settings.tiny else sorted({1, 2, os.cpu_count() or 1})
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        text = folder / "text.txt"
        write_text(text, int((TINY_GIGABYTES if settings.tiny else GIGABYTES) * 1e9))
        megabytes, rows = text.stat().st_size / 1e6, []
        for workers in counts:
            row = {"case": "prepare", "provider": f"{workers} worker" + "s" * (workers > 1)}
            rows.append(row)
            with attempt(row):
                summary = prepared(text, folder / f"by-{workers}", workers)
                require_same(summary["hashes"], rows[0].get("hashes", summary["hashes"]), row["provider"])
                if workers == counts[-1]:
                    again = kill_and_restart(text, folder, workers, summary["seconds"])
                    require_same(again, summary["hashes"], "the restarted run")
                row |= {
                    "shape": {"megabytes": round(megabytes, 1), "tokens": sum(summary["tokens"].values())},
                    "mb_per_second": round(megabytes / summary["seconds"], 2),
                    "tokens_per_second": summary["tokens_per_second"], "seconds": summary["seconds"],
                    "peak_mib": summary["peak_mib"], "hashes": summary["hashes"],
                }  # fmt: skip
                row["speed_up"] = speed_up(row, rows[0], "mb_per_second")
            yield row


def require_same(hashes, expected, name):
    if hashes != expected:
        raise UserError(f"{name} wrote other bytes than one worker: no speed is reported for a wrong result")


def table(results):
    """Markdown: megabytes and tokens a second, and the memory of all processes together."""
    lines = ["| workers | MB/s | tokens/s | speed-up | peak memory, MiB |", "|---|---|---|---|---|"]
    for r in measured(results):
        speeds = f"{r['mb_per_second']:,.1f} | {r['tokens_per_second']:,.0f} | {r['speed_up']:.2f}x"
        lines.append(f"| {r['provider'].split()[0]} | {speeds} | {r['peak_mib']:,.0f} |")
    return "\n".join(lines)
