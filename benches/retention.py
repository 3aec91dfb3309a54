"""Scores of teacher and students after the same fine-tuning (Sanh et al. 2019, tables 1 and 2)."""

import dataclasses
import os
import pathlib
import shlex
import statistics
import subprocess
import sys

from benches import ROOT, Common, last_line
from benches.report import attempt, measured
from minidistil import plot, weights
from minidistil.cli import option
from minidistil.downstream import glue
from minidistil.errors import UserError
from minidistil.model import num_params

RUNS = pathlib.Path("runs") / "retention"

NAMES = {name: task.folder for name, task in glue.TASKS.items()} | {"imdb": "IMDb"}  # as they are written

# GLUE dev, median of five seeds, and IMDb; MNLI as implied by the mean of nine (the table's 86.7 is a misprint)
PUBLISHED = {
    "BERT-base, published": dict(cola=56.3, sst2=92.7, mrpc=88.6, stsb=89.0, qqp=89.6, mnli=84.7, qnli=91.8, rte=69.3,
                                 wnli=53.5, imdb=93.46),
    "DistilBERT, published": dict(cola=51.3, sst2=91.3, mrpc=87.5, stsb=86.9, qqp=88.5, mnli=82.2, qnli=89.2, rte=59.9,
                                  wnli=56.3, imdb=92.82),
}  # fmt: skip


@dataclasses.dataclass
class Settings(Common):
    teacher: str = option(None, "folder of the teacher")
    student: str = option(None, "folders of the students, with commas")
    data: str = option(None, "the GLUE folder; IMDb may be in it as aclImdb")
    task: str = option("all", "tasks, with commas")
    rounds: int = option(3, "seeds")
    finetune: str = option(None, 'more settings of finetune.py, such as "--examples 2500 --lr 1e-4"')
    taught: str = option(None, 'also distil the fine-tuned teacher into the first student: "--augment 4"')


def start(name, folder, settings, more, threads):
    """Starts finetune.py on a model, or resumes it in runs/retention/NAME, perhaps with more seeds."""
    out = RUNS / name
    command = [sys.executable, ROOT / "finetune.py", "--task", settings.task, "--model", folder]
    command += ["--data", settings.data, "--seeds", settings.rounds, "--out", out]
    command += shlex.split(f"{settings.finetune or ''} {more}")
    command += ["--resume"] if (out / "scores.json").is_file() else []
    out.mkdir(parents=True, exist_ok=True)
    print(f"{name}: see {out}.log", flush=True)
    with open(f"{out}.log", "w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        return subprocess.Popen([*map(str, command)], stdout=log, stderr=log, env=environment)


def summary_of(name, process):
    """Returns the summary of a run of finetune.py; raises UserError with its last line where it failed."""
    code, said = process.wait(), pathlib.Path(f"{RUNS / name}.log").read_text()
    return last_line(subprocess.CompletedProcess(process.args, code, said, "".join(said.splitlines()[-1:])))


def bench(settings):
    """Yields a row for the teacher and each student, fine-tuned in parallel with the same budget and seeds.

    With --taught, also the first student as STUDENT-taught, with that teacher (Sanh et al. 2019, section 3).
    """
    if not (settings.teacher and settings.student and settings.data):
        raise UserError("retention compares models: give --teacher, --student (several with commas) and --data")
    students = {pathlib.Path(folder).name: folder for folder in settings.student.split(",")}
    models, teacher = {"teacher": settings.teacher} | students, None
    # the models are independent: each gets a share of the cores
    threads = max(1, os.cpu_count() // len(models))
    plan = [(name, folder, "", start(name, folder, settings, "", threads)) for name, folder in models.items()]
    if settings.taught is not None:
        first, folder = next(iter(students.items()))
        plan.append((f"{first}-taught", folder, settings.taught, None))
    for name, folder, more, process in plan:
        row = {"case": "retention", "provider": name}
        with attempt(row):
            if process is None:
                process = start(name, folder, settings, f"--teacher {RUNS / 'teacher'} {more}", os.cpu_count())
            summary = summary_of(name, process)
            scores = {task: scores["score"] for task, scores in summary["tasks"].items()}
            config = weights.read_config(folder)
            row |= {
                "parameters": num_params(config), "settings": f"{settings.finetune or ''} {more}".strip(),
                "seeds": settings.rounds, "scores": scores, "tasks": summary["tasks"],
                "macro": round(statistics.mean(scores.values()), 2), "seconds": summary["seconds"],
            }  # fmt: skip
            teacher = row if name == "teacher" else teacher
            row["retained"] = teacher and round(100 * row["macro"] / teacher["macro"], 2)
        yield row


def draw(path, results):
    """Bars of every model's score by task, and their mean."""
    series = {}
    for r in measured(results):
        of = {NAMES.get(task, task): [t["lowest"], t["score"], t["highest"]] for task, t in r["tasks"].items()}
        series[r["provider"]] = of | {"mean": [r["macro"]] * 3}
    plot.draw(path, plot.bars("dev sets: median, lowest to highest", "score", series, "".format))


def table(results):
    """Markdown: a row per model, a column per task, the mean, and its share of the first row's; the paper's last."""
    results = measured(results)
    tasks = list(results[0]["scores"])
    rows = [(r["provider"], r["scores"], r["tasks"]) for r in results]
    rows += [(name, scores, {}) for name, scores in PUBLISHED.items()]
    lines = [f"| | {' | '.join(tasks)} | mean | kept |", "|---" * (len(tasks) + 3) + "|"]
    base = None
    for name, scores, runs in rows:
        mean = statistics.mean(scores[task] for task in tasks)
        base = mean if base is None or name.startswith("BERT") else base
        cells = []
        for task in tasks:
            half = (runs[task]["highest"] - runs[task]["lowest"]) / 2 if task in runs else 0
            cells.append(f"{scores[task]:.1f}" + (f" ± {half:.1f}" if half else ""))
        kept = "" if mean == base else f"{mean / base:.1%}"
        lines.append(f"| {name} | {' | '.join(cells)} | {mean:.1f} | {kept} |")
    return "\n".join(lines)
