"""The jobs of the comparison. Each is a function that runs one script and finds it done when it is called again.

A finished job leaves a JSON file with what it was asked and its result; an interrupted script goes on with --resume.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading

from benches import ROOT, last_line
from benches.retention.recipes import PEER, RECIPES, flags
from minidistil import files, weights
from minidistil.downstream import glue, vectors
from minidistil.errors import UserError
from minidistil.folder import CHECKPOINT
from minidistil.pooling import modules_folder, read_pooling, write_pooling
from minidistil.student import build_student
from minidistil.tokenizer import Tokenizer

RUNNING, STARTING = set(), threading.Lock()  # processes, which end with the bench
ENDING = threading.Event()  # while it is set, none starts


@dataclasses.dataclass(frozen=True)
class Plan:
    """What all jobs share."""

    folder: pathlib.Path  # of everything that is kept
    teacher: pathlib.Path
    data: pathlib.Path  # the GLUE folder, with a training set of QNLI
    texts: tuple  # files
    corpus: pathlib.Path
    with_head: bool  # of the teacher's: whether it predicts masked words
    dtype: str  # of matrix products, the same in all jobs
    threads: int  # of each process
    shape: tuple  # flags of the student's layers and width
    updates: int  # of a probe
    settings: object

    @property
    def prefix(self):
        """The flag of the text before every sentence, if there is one."""
        return [f"--prefix={self.settings.prefix}"] if self.settings.prefix else []


def once(path, asked, work):
    """Returns the result of `work()` that the file `path` holds for `asked` (JSON-able), or runs it and writes that."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if known.get("asked") != asked:
        known = {"asked": asked, "result": work()}
        files.write_json(path, known)
    return known["result"]


@contextlib.contextmanager
def pool(workers):
    """Yields submit(function, *arguments) -> Future, for `workers` jobs at a time; an exception ends their processes.

    SIGTERM ends the bench as Ctrl-C does. train.py and finetune.py then save what they have.
    """

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    executor = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        yield executor.submit
    finally:  # on success no job is left
        executor.shutdown(wait=False, cancel_futures=True)
        with STARTING:  # a job may be reading what its script is asked
            ENDING.set()
        for process in list(RUNNING):
            process.terminate()
        executor.shutdown()
        ENDING.clear()
        signal.signal(signal.SIGTERM, before)


def script(log, threads, *words):
    """Runs `python words...` with its output appended to the file `log`; returns the JSON of the last line."""
    command = [sys.executable, ROOT / words[0], *words[1:]]
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(log, "a", encoding="utf-8") as file:
        print(f"$ {shlex.join(map(str, words))}", file=file, flush=True)
        with STARTING:
            if ENDING.is_set():
                raise InterruptedError("the bench has ended")
            process = subprocess.Popen([*map(str, command)], stdout=file, stderr=file, env=environment)
            RUNNING.add(process)
    code = process.wait()
    RUNNING.discard(process)
    said = log.read_text(encoding="utf-8", errors="replace")
    return last_line(subprocess.CompletedProcess([*map(str, command)], code, said, "".join(said.splitlines()[-1:])))


def resumed(log, threads, words, out, marker):
    """Runs a script as `script` does; resumes what it has begun in `out`, where `marker` is, with equal settings."""
    if (out / marker).is_file():
        try:
            return script(log, threads, *words, "--resume")  # perhaps with more seeds or tasks
        except UserError as error:
            if "was begun with other" not in str(error):
                raise
        shutil.rmtree(out)
    return script(log, threads, *words)


def slug(name, seed=None):
    """Returns a row's name, and the seed's number, as a file name."""
    return re.sub(r"\W+", "-", name) + ("" if seed is None else f"-{seed}")


# ---- text


def corpus(plan):
    """Prepares the texts, a sentence a row, with the teacher's vocabulary."""
    words = ["data/prepare.py", *plan.texts, "--sentences", *plan.prefix, "--vocab", plan.teacher, "--out", plan.corpus]
    asked = [*map(str, words), *map(files.sha256, plan.texts)]

    def work():
        shutil.rmtree(plan.corpus, ignore_errors=True)  # of other texts, or another prefix
        return script(plan.folder / "text.log", plan.threads, *words)

    return once(plan.folder / "text.json", asked, work)


# ---- students


def train(plan, recipe, steps, seed, out):
    """Makes the student of a recipe in the folder `out`; returns {"steps", "seconds"} of its training alone."""
    if recipe == PEER:
        teacher = modules_folder(plan.teacher) or plan.teacher
        words = [RECIPES[PEER], *plan.texts, "--teacher", teacher, *plan.shape, "--dtype", plan.dtype, *plan.prefix]
    else:
        words = ["train.py", "--teacher", plan.teacher, *plan.shape, "--data", plan.corpus, "--dtype", plan.dtype]
        words += shlex.split(f"{flags(recipe, plan.with_head)} {plan.settings.train or ''}")
    words += ["--steps", steps, "--seed", seed, "--out", out]
    log, result = out.with_name(f"{out.name}.log"), out.with_name(f"{out.name}.json")

    def work():
        if result.is_file():  # of another text or other settings; without it, an interrupted run is resumed
            shutil.rmtree(out, ignore_errors=True)
            result.unlink()
        summary = resumed(log, plan.threads, words, out, CHECKPOINT)
        seconds = summary["seconds"]
        if speed := summary.get("tokens_per_second"):  # without the evaluations, of which a short run has as many
            seconds = summary["tokens"] / speed
        return {"steps": summary["steps"], "seconds": seconds}

    asked = [*map(str, words), *weights.digests(plan.teacher), *map(files.sha256, plan.texts), *plan.prefix]
    return once(result, [*asked, repr(read_pooling(plan.teacher))], work)


def probe(plan, recipe):
    """Returns the seconds of an update of a recipe on this computer, from a short run."""
    done = train(plan, recipe, plan.updates, 0, plan.folder / "probes" / slug(recipe))
    return done["seconds"] / done["steps"]


def student(plan, recipe, steps, seed):
    """Trains a student and scores its vectors; returns {"folder", "steps", "seconds", "zero_shot"}.

    The seconds are those of its updates at the probe's speed: what else the computer did later does not count.
    """
    out = plan.folder / "students" / slug(recipe, seed)
    train(plan, recipe, steps, seed, out)
    seconds = steps * probe(plan, recipe)
    return {"folder": out, "steps": steps, "seconds": seconds, "zero_shot": zero_shot(plan, slug(recipe, seed), out)}


def untrained(plan, name):
    """Writes the student as it starts, the teacher's layers alone; returns {"folder", "zero_shot"}."""
    out = plan.folder / "students" / slug(name)

    def work():
        model, tokenizer = weights.load_model(plan.teacher, fresh_head=True), Tokenizer.load(plan.teacher)
        start = build_student(model, layers=plan.settings.layers, width=plan.settings.width).eval()
        weights.save_model(out, start)
        tokenizer.max_length = start.config.positions
        tokenizer.save(out, start.config.family)
        write_pooling(out, read_pooling(plan.teacher), start.config)
        return str(out)

    asked = [*plan.shape, *weights.digests(plan.teacher), repr(read_pooling(plan.teacher))]
    once(out.with_name(f"{out.name}.json"), asked, work)
    return given(plan, name, out)


def given(plan, name, folder):
    """Scores the vectors of a finished model; returns {"folder", "zero_shot"}."""
    return {"folder": folder, "zero_shot": zero_shot(plan, slug(name), folder)}


def zero_shot(plan, name, folder):
    """Returns the zero-shot score of a model's vectors on STS-B, or None where that is not in the data."""
    if not (plan.data / glue.TASKS["stsb"].folder).is_dir():
        return None
    pairs = digest_of(glue.load("stsb", plan.data)[1])
    asked = [plan.settings.prefix, *weights.digests(folder), pairs, repr(read_pooling(folder))]

    def work():
        return round(vectors.zero_shot(folder, plan.data, plan.settings.prefix or ""), 2)

    return once(plan.folder / "zero-shot" / f"{name}.json", asked, work)


# ---- fine-tuning


def finetuned(plan, name):
    """Returns the folder of the fine-tuned models of a row, or of one seed of it."""
    return plan.folder / "finetuned" / slug(name)


def finetune(plan, name, folder, seed, seeds, more=""):
    """Fine-tunes a model `seeds` times, from seed `seed` on; returns the runs of each task, {task: [run, ...]}."""
    out = finetuned(plan, name)
    words = ["finetune.py", "--task", plan.settings.task, "--model", folder, "--data", plan.data, "--out", out]
    words += ["--seed", seed, "--seeds", seeds, "--dtype", plan.dtype]
    words += shlex.split(f"{plan.settings.finetune or ''} {more}")

    def work():
        summary = resumed(out.with_name(f"{out.name}.log"), plan.threads, words, out, "scores.json")
        runs = json.loads((out / "scores.json").read_text(encoding="utf-8"))["runs"]
        asked = range(seed, seed + seeds)
        return {task: [run for run in runs[task] if run["seed"] in asked] for task in summary["tasks"]}

    names = glue.GLUE if plan.settings.task == "all" else plan.settings.task.split(",")
    here = [name for name in names if name in glue.TASKS and (plan.data / glue.TASKS[name].folder).is_dir()]
    asked = [*map(str, words), *weights.digests(folder), repr(read_pooling(folder))]
    asked += [digest_of(glue.load(name, plan.data)) for name in here]
    if "--teacher" in words:
        teacher = pathlib.Path(words[words.index("--teacher") + 1])
        asked += map(files.sha256, sorted(teacher.glob("*/model.safetensors")))
    return once(out.with_name(f"{out.name}.json"), asked, work)


def digest_of(examples):
    """SHA-256 of what `glue.load` returns."""
    return hashlib.sha256(repr(examples).encode("utf-8", "replace")).hexdigest()
