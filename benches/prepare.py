"""Text to tokens at full size: throughput by number of workers, memory, the same bytes, and a kill in the middle."""

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

from benches.process import ROOT, last_line
from minidistil.cli import UserError

GIGABYTES, TINY_GIGABYTES = 2.1, 0.004
VARIED = 0.05  # share of the words that each repetition of the docs corpus draws anew


def write_text(path, size, seed=0):
    """Writes at least `size` bytes of English, a document a line: the docs corpus again and again, never the same."""
    from data.docstrings import harvest, python_files

    rng, written = np.random.default_rng(seed), 0
    words = np.array(" \n ".join(" ".join(text.split()) for text in harvest(python_files())).split(" "), dtype=object)
    inside = np.flatnonzero(words != "\n")  # documents keep their ends
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            copy, drawn = words.copy(), rng.choice(inside, int(VARIED * len(inside)))
            copy[drawn] = words[rng.permutation(drawn)]
            written += file.write(" ".join(copy) + "\n")


def family_mib(pid):
    """Resident memory of a process and its children, MiB: an upper bound, since what they share counts for each."""
    pids = [str(pid)]
    for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        pids += task.read_text().split()
    pages = [int(pathlib.Path(f"/proc/{p}/statm").read_text().split()[1]) for p in pids]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def prepared(text, out, workers, kill_after=None):
    """Runs data/prepare.py; returns its summary and the peak memory of all its processes.

    Where `kill_after` is given, it is killed so many seconds after it began to write, and the result is None.
    """
    command = [sys.executable, ROOT / "data" / "prepare.py", text, "--vocab", ROOT / "data" / "demo", "--out", out]
    command = [*map(str, command), "--workers", str(workers)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said, peak, writing = [], 0.0, None
    reader = threading.Thread(target=lambda: said.extend(process.communicate()))
    reader.start()
    while reader.is_alive():
        try:
            peak = max(peak, family_mib(process.pid))
        except (OSError, ProcessLookupError):  # a process ended between its listing and its reading
            pass
        if writing is None and any(out.parent.glob(f".{out.name}.*.tmp")):
            writing = time.monotonic()
        if None not in (kill_after, writing) and time.monotonic() - writing > kill_after:
            process.send_signal(signal.SIGKILL)
        reader.join(0.02)
    if process.returncode == -signal.SIGKILL:
        return None
    summary = last_line(subprocess.CompletedProcess(command, process.returncode, *said))
    return summary | {"peak_mib": round(peak, 1), "hashes": json.loads((out / "meta.json").read_text())["sha256"]}


def bench_prepare(settings):
    """1, 2 ... workers on the same text, then one run that is killed halfway and started again: all the same bytes."""
    counts = [1, 2] if settings.tiny else sorted({1, 2, os.cpu_count() or 1})
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        text = folder / "text.txt"
        write_text(text, int((TINY_GIGABYTES if settings.tiny else GIGABYTES) * 1e9))
        megabytes = text.stat().st_size / 1e6
        results = []
        for workers in counts:
            summary = prepared(text, folder / f"by-{workers}", workers)
            results.append({
                "case": "prepare", "provider": f"{workers} worker" + "s" * (workers > 1),
                "shape": {"megabytes": round(megabytes, 1), "tokens": sum(summary["tokens"].values())},
                "mb_per_second": round(megabytes / summary["seconds"], 2),
                "tokens_per_second": summary["tokens_per_second"], "seconds": summary["seconds"],
                "peak_mib": summary["peak_mib"], "hashes": summary["hashes"],
            })  # fmt: skip
        again = folder / "again"
        if prepared(text, again, counts[-1], kill_after=0.5 * results[-1]["seconds"]) is not None:
            raise UserError("data/prepare.py ended before it was killed: the machine is busy, run it again")
        if again.exists():
            raise UserError(f"{again} is there although the run that writes it was killed")
        restarted = prepared(text, again, counts[-1])
        left = [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]
    if left:
        raise UserError(f"the restarted run left {', '.join(left)} of the killed one behind")
    for name, hashes in [*((r["provider"], r["hashes"]) for r in results), ("the restarted run", restarted["hashes"])]:
        if hashes != results[0]["hashes"]:
            raise UserError(f"{name} wrote other bytes than one worker: no speed is reported for a wrong result")
    for result in results:
        result["speed_up"] = round(result["mb_per_second"] / results[0]["mb_per_second"], 2)
    return results


def prepare_table(results):
    """Markdown: megabytes and tokens a second, and the memory of all processes together."""
    lines = ["| workers | MB/s | tokens/s | speed-up | peak memory, MiB |", "|---|---|---|---|---|"]
    for r in results:
        speeds = f"{r['mb_per_second']:,.1f} | {r['tokens_per_second']:,.0f} | {r['speed_up']:.2f}x"
        lines.append(f"| {r['provider'].split()[0]} | {speeds} | {r['peak_mib']:,.0f} |")
    return "\n".join(lines)
