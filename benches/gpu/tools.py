"""pytest, ncu and compute-sanitizer, run on the kernels, and the scripts of the lesson."""

import csv
import glob
import importlib.util
import os
import re
import shutil
import subprocess
import sys

import torch

from benches import ROOT
from benches.kernel_cases import CASES
from benches.kernels import both_passes

SCRIPTS = {"roofline": ("bench.py", "roofline"), "lesson": ("kernels/lesson.py",)}  # what kernels/README.md refers to
OTHERS = ("test_pretended_gpu", "test_gpu_day", "test_readme")  # they test what runs without a GPU
METRICS = ("gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum", "lts__t_sector_hit_rate.pct",
           "launch__registers_per_thread", "smsp__issue_active.avg.pct_of_peak_sustained_active",
           "sm__warps_active.avg.pct_of_peak_sustained_active",
           "dram__throughput.avg.pct_of_peak_sustained_elapsed")  # fmt: skip


def tests(run):
    """pytest -m gpu: part `kernels`, or everything else."""
    names = [path.stem for path in (ROOT / "kernels").glob("*.py")] + ["losses"]
    ours = [f"tests/test_{name}.py" for name in names if (ROOT / "tests" / f"test_{name}.py").exists()]
    paths = ours if run.part == "kernels" else ["tests", *(f"--ignore={path}" for path in ours)]
    paths += [] if run.part == "kernels" else [f"--ignore=tests/{name}.py" for name in OTHERS]
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short",
               f"--junitxml={run.reports}/pytest-{run.part}.xml", *paths]  # fmt: skip
    # a file at a time for the others, since each test of test_offsets.py takes 13 GB
    share = ["-n", str(run.jobs), "--dist", "load" if run.part == "kernels" else "loadfile"]
    command += share if importlib.util.find_spec("xdist") else []
    command += ["-k", "half_precision"] if run.null else []  # a few, since numbers are garbage
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    counts, failed, last = {}, [], []
    for line in process.stdout:  # counts while it runs: the time limit may end it
        print(line, end="", flush=True)
        last = [*last[-400:], line]
        found = re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", line)
        test = re.search(r"tests/\S+::.*?(?= (PASSED|FAILED|ERROR|SKIPPED|XFAIL)|$)", line)
        if found and test and line.startswith(("[gw", "tests/")):
            counts[found[1]] = counts.get(found[1], 0) + 1
            failed += [test[0].strip()] if found[1] in ("FAILED", "ERROR") else []
            if sum(counts.values()) % 100 == 0:
                run.emit(unit="pytest so far", **counts)
    run.emit(unit="pytest", rc=process.wait(), failed=failed[:40], **counts)
    if process.returncode:
        run.failed += 1
        run.record("pytest", "".join(last))


def script(run):
    """The script of SCRIPTS that the part names; its output is kept as PART.txt among the reports."""
    command = [sys.executable, *SCRIPTS[run.part], *(["--out", str(run.reports)] if run.part == "roofline" else [])]
    command += ["--tiny"] if run.part == "roofline" and run.tiny else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    with open(run.reports / f"{run.part}.txt", "w") as file:
        for line in process.stdout:
            print(line, end="", flush=True)
            print(line, end="", file=file)
    run.emit(unit=run.part, rc=process.wait())
    if process.returncode and not run.null:  # whose numbers are wrong
        run.failed += 1
        run.record(run.part, (run.reports / f"{run.part}.txt").read_text())


def probe(run):
    """Launches each kernel, at real shapes or (part `small`) at small ones, for the tools below."""
    small = run.part == "small" or run.tiny
    for case in CASES.values():
        # the rows of a micro-batch of masked ones; dropout, where there is some
        shape = max(case.shapes(run.device, small), key=lambda shape: (shape["N"] == 4915, shape.get("p", 0)))
        for dtype in ("float32", "bfloat16") if small else ("bfloat16",):
            inputs = case.prepared("ours", case.inputs(shape | dict(dtype=dtype), run.device))
            both_passes(case.ours, inputs, case.leaves, dtype)()
    torch.cuda.synchronize()
    print("probe: done", flush=True)


def tool(run):
    """ncu, or compute-sanitizer with one of its tools, around `probe`."""
    name, _, check = run.part.partition("/")
    places = [*glob.glob(f"/opt/nvidia/nsight-compute/*/{name}"), *glob.glob(f"/usr/local/cuda*/bin/{name}")]
    path = shutil.which(name) or next(iter(sorted(places)), None)
    if path is None:
        raise FileNotFoundError(f"{name} is not installed")
    ncu = name == "ncu"
    measure = ["--clock-control", "none", "--csv", "-k", "regex:^_", "-c", "16", "--metrics", ",".join(METRICS)]
    command = [path, *(measure if ncu else ["--tool", check, "--error-exitcode", "99"])]
    command += [sys.executable, "-m", "benches.gpu", "--out", str(run.out), "--work", str(run.work), "--stage"]
    command += ["probe" if ncu else "probe:small"]
    # without PyTorch's cache each tensor is an allocation, whose end the sanitizer watches
    environment = dict(os.environ, **({} if ncu else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
    environment.pop("GPU_DAY_BEGUN", None)
    both = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done = subprocess.run(command, cwd=ROOT, env=environment, **both)
    print(done.stdout[-20_000:], flush=True)
    launches = launches_of(done.stdout) if ncu else {}
    for (_, kernel, grid), metrics in launches.items():
        run.emit(unit="ncu", kernel=kernel, grid=grid, **metrics)
    if not ncu:
        lines = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
        run.emit(unit=run.part, rc=done.returncode, summary=lines)
    if done.returncode or "probe: done" not in done.stdout or (ncu and not launches):
        raise AssertionError(f"{run.part} ended with {done.returncode}\n{done.stdout[-20_000:]}")


def launches_of(text):
    """{(number, kernel, grid): {metric: value and unit}} of ncu's table."""
    launches = {}
    for row in csv.DictReader(line for line in text.splitlines() if line.startswith('"')):
        key = row.get("ID"), (row.get("Kernel Name") or "")[:60], row.get("Grid Size")
        launches.setdefault(key, {})[row.get("Metric Name")] = f"{row.get('Metric Value')} {row.get('Metric Unit')}"
    return launches
