"""What a stage does: a sequence of units of work. A unit that fails leaves its traceback, and the next one begins.

An error that destroys the CUDA context ends the process with code 3; day.py restarts it behind the unit that failed.
"""

import functools
import importlib
import json
import os
import pathlib
import re
import sys
import time
import traceback

import torch

from benches.gpu.day import REPORTS, STAGES
from minidistil.errors import is_out_of_memory

ATTEMPTS = 3  # at a unit that runs out of memory, since other stages may use the GPU at the same time


def be(settings):
    """Runs the stage that `settings` name, and ends the process with 0, or with 1 if a unit failed."""
    run = Run(settings)
    if run.null:
        torch.backends.cuda.enable_cudnn_sdp(False)  # the null GPU has no cuDNN
    stage = getattr(importlib.import_module(f"benches.gpu.{STAGES[run.name]}"), run.name)
    run.attempt(f"({run.name})", stage, run, again=True)
    sys.stdout.flush()
    if run.name == "probe":  # profilers want an orderly end
        sys.exit(bool(run.failed))
    os._exit(bool(run.failed))  # skips the clean-up, which could hang or crash


class Run:
    """A stage's settings and output. The stage `warm:NAME/PART` is `NAME:PART` without measurements: it compiles."""

    def __init__(self, settings):
        self.stage, self.out, self.work = settings.stage, pathlib.Path(settings.out), pathlib.Path(settings.work)
        self.reports = self.work / REPORTS
        self.jobs, self.null, self.sabotage = settings.jobs, settings.null, settings.sabotage
        self.tiny = settings.tiny or settings.cpu
        self.name, _, self.part = settings.stage.partition(":")
        self.warm = self.name == "warm"
        if self.warm:
            self.name, _, self.part = self.part.partition("/")
        self.device = torch.device("cpu" if settings.cpu else "cuda")
        self.V, self.C = (1500, 64) if self.tiny else (30522, 768)
        self.failed, self.begun = 0, pathlib.Path(os.environ.get("GPU_DAY_BEGUN", os.devnull))
        self.before = self.begun.read_text().splitlines() if self.begun.is_file() else []

    @functools.cached_property
    def generator(self):
        return torch.Generator(self.device).manual_seed(0)

    def randn(self, *shape, dtype=torch.float32, scale=1.0):
        return torch.randn(*shape, device=self.device, generator=self.generator).mul_(scale).to(dtype)

    def labels(self, N, share=1.0):
        """A word for about `share` of N rows, -100 for the others."""
        labels = torch.randint(0, self.V, (N,), device=self.device, generator=self.generator)
        return labels.where(torch.rand(N, device=self.device, generator=self.generator) < share, -100)

    def emit(self, **row):
        """Writes a line of results.jsonl, at once, since other stages write there too."""
        if self.warm:
            return
        line = json.dumps({"stage": self.stage, **row, "t": round(time.time(), 1)}, default=str)
        with open(self.out / "results.jsonl", "a") as file:
            file.write(line + "\n")
        print(line[:300], flush=True)  # day.py takes a stage without output for one that hangs

    def attempt(self, unit, function, *arguments, again=False, **options):
        """Calls function(...) as a unit; None if it fails. What a lost process began is left out, unless `again`."""
        if unit in self.before and not again:
            return None
        with open(self.begun, "a") as file:
            file.write(unit + "\n")
        began = time.time()
        for tries in range(1, ATTEMPTS + 1):
            try:
                self.__dict__.pop("generator", None)
                return function(*arguments, **options)
            except BaseException as error:  # only its text is kept: it refers to the tensors that did fit
                failure, text = first_line(error), traceback.format_exc()
                if tries == ATTEMPTS or not is_out_of_memory(error):
                    break
            print(f"{unit}: out of memory", flush=True)
            torch.cuda.empty_cache()
            time.sleep(5)
        self.failed += 1
        self.emit(unit=unit, status="failed", error=failure)
        given = [argument for argument in arguments if argument is not self]
        self.record(unit, f"arguments: {given} {options} (seed 0)\n{text}", began)

    def record(self, unit, text, since=0.0):
        """Writes what failed and the PTX of kernels compiled since; ends the process if the CUDA context is lost."""
        with open(self.out / "failures.txt", "a") as file:
            file.write(f"\n======== {self.stage} | {unit}\n{text}\n")
            if self.name == "smoke":
                found = pathlib.Path(os.environ.get("TRITON_CACHE_DIR", os.devnull)).glob("*/_*.ptx")
                age = {path: path.stat().st_mtime for path in found}
                recent = [path for path in age if age[path] >= since - 1] or list(age)
                for path in sorted(recent, key=lambda path: -age[path])[:2]:
                    file.write(f"---- {path.name}\n{path.read_text(errors='replace')[:80_000]}\n")
        try:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
        except Exception:
            print(f"{unit}: the CUDA context is lost", flush=True)
            os._exit(3)


def first_line(error):
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:300]
