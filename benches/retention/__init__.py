"""What a student keeps of its teacher: sentence vectors, without a label, and scores after the same fine-tuning.

    python bench.py retention --teacher DIR --data GLUE --layers 3 --minutes 5     distils students, and compares them
    python bench.py retention --teacher DIR --data GLUE --student DIR,DIR          compares finished ones

Its rows:

    teacher                            the model as it is
    layers alone, untrained            the student as it starts, the teacher's layers: what no training has to earn
    undistilled                        trained on the masked words of the text, without the teacher
    masked words                       the published recipe: KL to the teacher, masked words, cosine of hidden states;
                                       without the KL where the teacher has no masked-LM head
    masked words (30 %)                the same with twice as many masked words
    vectors                            squared distance of sentence vectors to the teacher's, alone
    vectors from a random start        the same, from random weights
    vectors + cosine                   and the cosine of hidden states
    vectors + cosine + masked words    and a small share of the published recipe's other terms
    sentence-transformers              that library's own recipe: peer.py
    ..., taught                        with --taught: the best of `vectors` (with --student alone the first student),
                                       fine-tuned with the fine-tuned teacher (Sanh et al. 2019, section 4.1)

Each recipe of recipes.py has the same text, layers, minutes and threads: a short run of each, the probe, measures the
time of an update, from which its number of updates follows, the same for all seeds. While probes run, the computer must
do nothing else; what it does later changes no result. The text is part of the training sets, without labels (text.py);
students of more than ten minutes read more of IMDb. `zero_shot` is the Spearman correlation of the cosine of
two sentences' vectors with STS-B's scores, on its dev set. Each seed of a student is fine-tuned once; the models that
have no seeds, once for each.

An interrupted bench goes on where it was: the same command finds what is finished in runs/retention/NAME, named after
--out or after the teacher, and resumes what is not. Files:

    recipes.py    the table of recipes
    text.py       their text, and a training set of QNLI where only its dev set is at hand
    jobs.py       distillation, zero-shot score and fine-tuning, a process per core
    peer.py       sentence-transformers' recipe, a script of its own
    show.py       table and picture
"""

import dataclasses
import pathlib
import statistics
from importlib.util import find_spec

from benches import Common
from benches.report import attempt
from benches.retention import jobs
from benches.retention.recipes import PEER, RECIPES, UNTRAINED, flags
from benches.retention.show import draw, table  # noqa: F401 (bench.py calls them)
from benches.retention.text import with_qnli, write_texts
from data.workers import cores
from minidistil import hub, weights
from minidistil.cli import option
from minidistil.device import choose_device
from minidistil.downstream.grid import summarise
from minidistil.errors import UserError
from minidistil.model import num_params
from minidistil.precision import choose_dtype

RUNS = pathlib.Path("runs") / "retention"
UPDATES = 50  # of a probe: in so many, train.py sees sentences of all lengths
TAUGHT = "{}, taught"


@dataclasses.dataclass
class Settings(Common):
    teacher: str = option(None, "folder or name of the teacher")
    data: str = option(None, "the GLUE folder; IMDb may be in it as aclImdb")
    student: str = option(None, "folders of finished students, with commas")
    # students to distil
    layers: str = option(None, "distil students of so many teacher layers, or of these: 3, or 0,2,5")
    width: int = option(None, "width of these students (default: the teacher's)")
    minutes: float = option(5.0, "of the training of each")
    recipes: str = option(None, f"with commas (default: all): {', '.join(RECIPES)}")
    train: str = option(None, 'more settings of train.py, for every recipe, such as "--lr 1e-4"')
    text: str = option(None, "more files of unlabelled text, with commas")
    prefix: str = option(None, 'text before every sentence, such as "query: "')
    # scores
    task: str = option("cola,sst2,stsb,mrpc,qnli,imdb", 'tasks to fine-tune on, with commas; "": sentence vectors only')
    rounds: int = option(3, "seeds")
    finetune: str = option(None, 'more settings of finetune.py, such as "--examples 2500 --lr 1e-4"')
    taught: str = option(None, 'also distil the fine-tuned teacher into the best student: "--unlabelled 4000"')


def chosen_recipes(settings):
    """Returns the names of the recipes to run, in their order; UserError for an unknown one."""
    if not (settings.layers or settings.width):
        return []
    names = settings.recipes.split(",") if settings.recipes else list(RECIPES)
    if unknown := [name for name in names if name not in RECIPES]:
        raise UserError(f"--recipes {unknown[0]} is not known: choose from {', '.join(RECIPES)}")
    why = None if find_spec("sentence_transformers") else "install it with pip install -r requirements-dev.txt"
    why = "its recipe keeps the teacher's width" if settings.width else why
    if why and PEER in names:
        print(f"{PEER} is left out: {why}", flush=True)
    return [name for name in RECIPES if name in names and not (why and name == PEER)]


def open_plan(settings, recipes):
    """Returns the Plan of this comparison, with its text written; its folder is named after --out, or the teacher."""
    teacher = hub.resolve(settings.teacher, vectors=True)
    shape = [*(["--student-layers", settings.layers] if settings.layers else [])]
    shape += ["--student-width", str(settings.width)] if settings.width else []
    names = [pathlib.Path(settings.teacher).absolute().name, *shape[1::2], *(["tiny"] if settings.tiny else [])]
    folder = RUNS / (pathlib.Path(settings.out).name if settings.out else jobs.slug("-".join(names)))
    data = with_qnli(settings.data, folder / "data")
    texts = write_texts(data, folder / "text", settings.minutes) + (settings.text or "").split(",") if recipes else []
    device = choose_device("auto")
    dtype = jobs.once(folder / "dtype.json", str(device), lambda: choose_dtype("auto", device)[0])
    return jobs.Plan(
        folder, teacher, data, tuple(filter(None, texts)), folder / "corpus", weights.has_head(teacher), dtype,
        cores() // workers(), tuple(shape), 2 if settings.tiny else UPDATES, settings,
    )  # fmt: skip


def workers():
    """Returns how many processes run at a time: one per core, with a thread each; on a GPU one."""
    return 1 if choose_device("auto").type == "cuda" else cores()


def bench(settings):
    """Yields the row of each model: with its zero-shot score, then again with those of fine-tuning."""
    if not (settings.teacher and settings.data and (settings.layers or settings.width or settings.student)):
        what = "--teacher and --data, and --layers to distil students or --student for finished ones"
        raise UserError(f"retention compares models: give {what}")
    if not settings.minutes > 0:
        raise UserError(f"--minutes is {settings.minutes}: it must be greater than 0")
    recipes = chosen_recipes(settings)
    plan = open_plan(settings, recipes)
    fixed = {"teacher": plan.teacher}
    folders = [name for name in (settings.student or "").split(",") if name]
    students = {pathlib.Path(name).absolute().name: name for name in folders}
    names = ["teacher", *([UNTRAINED] if recipes else []), *recipes, *students]
    if len(students) < len(folders) or len({*names}) < len(names):
        raise UserError("--student: the last part of each path names a row, and two are equal: rename a folder")
    rows = {name: {"case": "retention", "provider": name} for name in names}
    with jobs.pool(workers()) as submit:
        made = distilled(plan, submit, rows, recipes, fixed | students)
        models = {}  # name -> [{"folder", "zero_shot", ...} of each seed]
        for name, row in rows.items():
            if name in made:
                with attempt(row):
                    models[name] = [future.result() for future in made[name]]
                    row |= described(plan, name, models[name])
                    if teacher := row.get("zero_shot") and rows["teacher"].get("zero_shot"):
                        row["retained_zero_shot"] = round(100 * row["zero_shot"][0] / teacher[0], 2)
            yield row
        if settings.task:
            yield from fine_tuned(plan, submit, rows, models, students)


def distilled(plan, submit, rows, recipes, fixed):
    """Returns {name: [Future of {"folder", "zero_shot", ...} of each seed]}, without the rows whose probe failed."""
    if recipes:
        print(f"preparing {len(plan.texts)} files of text: see {plan.folder}", flush=True)
        jobs.corpus(plan)
    updates, probes = {}, {name: submit(jobs.probe, plan, name) for name in recipes}
    for name, future in probes.items():
        with attempt(rows[name]):
            updates[name] = max(1, int(60 * plan.settings.minutes / future.result()))
            print(f"{name}: {updates[name]:,} updates of {future.result():.3g} s", flush=True)
    made = {name: [submit(jobs.given, plan, name, pathlib.Path(folder))] for name, folder in fixed.items()}
    if recipes:
        made[UNTRAINED] = [submit(jobs.untrained, plan, UNTRAINED)]
    for seed in range(plan.settings.rounds):
        for name, steps in updates.items():
            made.setdefault(name, []).append(submit(jobs.student, plan, name, steps, seed))
    return made


def described(plan, name, seeds):
    """Returns what a row holds before fine-tuning."""
    row = {"parameters": num_params(weights.read_config(seeds[0]["folder"])), "seeds": len(seeds)}
    if "steps" in seeds[0]:
        more = "" if name == PEER else plan.settings.train or ""
        row["settings"] = f"{flags(name, plan.with_head)} {more}".strip()
        row |= {"steps": seeds[0]["steps"], "seconds": round(seeds[0]["seconds"], 1)}
    if seeds[0]["zero_shot"] is not None:
        found = [seed["zero_shot"] for seed in seeds]
        row["zero_shot"] = [round(statistics.median(found), 2), min(found), max(found)]
    return row


def fine_tuned(plan, submit, rows, models, students):
    """Yields the rows again with their scores, and with --taught one more."""

    def start(name, seeds, more=""):
        if len(seeds) == 1 and "steps" not in seeds[0]:  # a model without seeds
            return [submit(jobs.finetune, plan, name, seeds[0]["folder"], 0, plan.settings.rounds, more)]
        names = [jobs.slug(name, seed) for seed in range(len(seeds))]
        return [submit(jobs.finetune, plan, names[i], seed["folder"], i, 1, more) for i, seed in enumerate(seeds)]

    def finish(name, futures, more=""):
        with attempt(rows[name]):
            runs = [future.result() for future in futures]
            tasks = {task: summarise([run for each in runs for run in each[task]]) for task in runs[0]}
            scores = {task: summary["score"] for task, summary in tasks.items()}
            how = [rows[name].get("settings"), plan.settings.finetune, more.strip()]
            rows[name] |= {
                "settings": "; ".join(filter(None, how)), "seeds": plan.settings.rounds, "scores": scores,
                "tasks": tasks, "macro": round(statistics.mean(scores.values()), 2),
            }  # fmt: skip
            if "macro" in rows["teacher"]:
                rows[name]["retained"] = round(100 * rows[name]["macro"] / rows["teacher"]["macro"], 2)
        return rows[name]

    started = {name: start(name, seeds) for name, seeds in models.items() if "error" not in rows[name]}
    for name, futures in started.items():
        yield finish(name, futures)
    vectors = [name for name in started if name.startswith("vectors") and "macro" in rows[name]]
    best = max(vectors, key=lambda name: rows[name]["macro"], default=next(iter(students), None))
    if plan.settings.taught is not None and "macro" in rows.get(best, {}):
        name, more = TAUGHT.format(best), f"--teacher {jobs.finetuned(plan, 'teacher')} {plan.settings.taught}"
        rows[name] = {k: rows[best][k] for k in ("case", "parameters")} | {"provider": name}
        yield finish(name, start(name, models[best], more), plan.settings.taught)
