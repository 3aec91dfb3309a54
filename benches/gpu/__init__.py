"""Ten minutes of one GPU: is each kernel right, how fast is it, which constants suit it, and how fast is training?

    python bench.py gpu --out DIR --budget 500           the first run; DIR/summary.md says what to conclude
    python bench.py gpu --out DIR --budget 190 --second  the second: what the first lost, then profilers and sanitizers
    python bench.py gpu --out DIR --budget 60 --only "smoke:norm;ceilings"    some stages (day.py lists them)
    python bench.py gpu --prepare                        for a GPU without a network: what to carry, and the commands

Each stage is a process with its own time limit, so that an exception, a crash or a hang costs one stage. Each
measurement is written to DIR/results.jsonl as soon as it is made. DIR/failures.txt has each failure's traceback and
arguments, and the PTX of the kernels; DIR/log.txt the end of each stage's output; DIR/trace.json.gz a profile of one
update for chrome://tracing; DIR/code.tar.gz the compiled kernels; DIR/reports.tar.gz pytest's files and the output of
the lesson and of bench.py roofline.

Nothing is timed while anything else runs. A default changes only where a sweep says CHANGE: a gain of more than 2 % and
of more than twice the noise, which is the default timed twice.

    day.py        the plan, the processes and their time limits; needs no PyTorch
    run.py        what a stage does: units of work, rows of results, records of failures
    ceilings.py   what the card can do, and whether each attention backend's dropout keeps the mean
    smoke.py      each kernel at real shapes against fp64
    sweeps.py     the constants of each kernel; only variants.py knows the kernels' internals
    compare.py    the cases of bench.py against eager PyTorch, torch.compile and Liger; timing.py times them
    steps.py      updates of train.py, their profile, the demo
    tools.py      pytest, ncu, compute-sanitizer
    summary.py    results.jsonl -> summary.md, beside the targets and predictions of targets.py
    prepare.py    what travels to a machine without a network
    rehearsal.py  for rehearsals without a GPU: a stage that fails on purpose, checks that accept any number
"""

import dataclasses
import pathlib
import signal
import sys
import tempfile

from minidistil.cli import option, parse_args
from minidistil.errors import UserError


@dataclasses.dataclass
class Settings:
    out: str = option(None, "folder of the results")
    budget: float = option(500.0, "seconds for all stages together")
    second: bool = option(False, "the second run: stages that the first one lost, then profilers and sanitizers")
    only: str = option(None, "stages, with semicolons, in place of a plan")
    limit: float = option(120.0, "seconds of a stage of --only that is in no plan")
    work: str = option(None, "folder of caches and logs, which the second run reads (default: a temporary one)")
    jobs: int = option(8, "processes of pytest")
    prepare: bool = option(False, "measure nothing: make what travels to a machine without a network")
    cpu: bool = option(False, "rehearsal: smoke alone, small, interpreted on the CPU")
    tiny: bool = option(False, "rehearsal: small shapes, on whatever is called a GPU")
    null: bool = option(False, "rehearsal: on a GPU whose kernels do nothing; all numbers are garbage")
    sabotage: bool = option(False, "rehearsal: spoil one element of each result, which smoke must find")
    stage: str = option(None, "internal: be this stage")


def main(argv):
    settings = Settings(**parse_args(Settings, argv, __doc__))
    if settings.prepare:
        from benches.gpu.prepare import main as prepare

        return prepare()
    if not settings.out:
        raise UserError("there is no folder for the results: name one with --out")
    settings.out = str(pathlib.Path(settings.out).resolve())
    settings.work = str(pathlib.Path(settings.work or pathlib.Path(tempfile.gettempdir()) / "minidistil-gpu").resolve())
    if settings.stage:
        from benches.gpu.run import be

        be(settings)
    from benches.gpu.day import Day

    day = Day(settings)
    if not settings.cpu and not all(stage.name.startswith("pretend") for stage in day.stages()):
        import torch

        if not torch.cuda.is_available():
            raise UserError("there is no GPU here: run it on a machine with one, or rehearse with --cpu")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the stages, too
    day.go()
    print((day.out / "summary.md").read_text())
