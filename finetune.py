"""Fine-tunes a model on GLUE, IMDb or SQuAD and reports the official score.

    python finetune.py --task sst2 --model runs/demo --data GLUE                 one task; GLUE: the official folder
    python finetune.py --task all --model bert-base-uncased --data GLUE --seeds 5    all nine, and the macro score
    python finetune.py --task squad --model runs/demo --data SQUAD --teacher runs/finetune-squad    second distillation
    python finetune.py --task sst2 --model bilstm --words bert-base-uncased --data GLUE    a baseline without attention

The best run's model of each task and its card are in --out/TASK, which transformers loads; --out/scores.json holds all
runs. The last line of stdout is one JSON object:

    {"out", "tasks": {TASK: {"score": median, "lowest", "highest", "lr", "seeds", metrics}}, "macro", "seconds", ...}

Scores are in percent and follow the GLUE leaderboard: the mean of a task's metrics. With several --lr, the dev score of
the first seed selects one, as BERT's authors did (Devlin et al. 2018, appendix A.3).

Legend:  B examples in a batch   T tokens of the longest one   K labels
"""

import dataclasses
import json
import math
import pathlib
import statistics
import time

import numpy as np
import torch

from minidistil import files, hub, weights
from minidistil.checks import check_needs_teacher, check_seeds, check_vocabulary
from minidistil.cli import option, parse_args, run_script
from minidistil.device import choose_device, versions
from minidistil.downstream import distil
from minidistil.downstream.batches import batches, padded, predict
from minidistil.downstream.card import write_results
from minidistil.downstream.glue import GLUE, TASKS
from minidistil.downstream.grid import learning_rates, next_run, read_scores, summarise
from minidistil.downstream.models import adamw, build_model, export
from minidistil.downstream.tasks import check_model, check_positions, describe, digest, open_task, outline, task_names
from minidistil.downstream.trial import Trial
from minidistil.energy import Meter
from minidistil.errors import UserError
from minidistil.folder import CHECKPOINT, claimed, command, inheritable
from minidistil.memory import keep_freed_memory, peak_rss_mib
from minidistil.precision import choose_dtype, precision
from minidistil.progress import Progress, lr_at
from minidistil.rng import mix
from minidistil.run import SignalFlag, require_same
from minidistil.tokenizer import Tokenizer


@dataclasses.dataclass
class Settings:
    # model and data
    task: str = option(None, f"{', '.join(TASKS)}, squad; several with commas; all: the nine of GLUE", required=True)
    model: str = option(None, "model to fine-tune: folder, name on the Hugging Face Hub, or bilstm", required=True)
    data: str = option(None, "GLUE folder, folder of the task, or (imdb, squad) a single file", required=True)
    out: str = option(None, "output folder (default: runs/finetune-TASK, a new one each time)")
    words: str = option(None, "model that gives a bilstm its word vectors and vocabulary (default: the teacher)")
    # length
    epochs: float = option(3.0, "passes over the training set")
    batch: int = option(32, "examples in an update")
    seq_len: int = option(None, "maximum tokens of an example (default: 128; imdb 512; squad 384)")
    examples: int = option(None, "train on a fixed random subset of this many examples")
    seeds: int = option(1, "runs with different heads and data orders; the median is reported")
    # optimiser: AdamW with betas (0.9, 0.999), weight decay 0.01 on matrices
    lr: str = option(None, "peak learning rates to try, with commas (default: a grid of three)")
    warmup: float = option(0.1, "share of the updates in which the learning rate rises; then it falls linearly")
    clip: float = option(1.0, "maximum norm of the gradient")
    # distillation from a teacher that was fine-tuned for the task
    teacher: str = option(None, "its folder, or an --out with one for each task; several with commas: an ensemble")
    temperature: float = option(2.0, "softens both distributions in the KL term")
    alpha_task: float = option(0.5, "with a teacher, weight of the task's own loss")
    alpha_ce: float = option(0.5, "weight of tau^2 KL to the teacher's distribution (stsb: of the squared difference)")
    alpha_mse: float = option(0.0, "weight of the squared difference of logits")
    augment: int = option(0, "copies of each example with masked or replaced words, labelled by the teacher alone")
    # hardware
    dtype: str = option("auto", "precision of matrix products", choices=("auto", "fp32", "bf16", "fp16"))
    device: str = option("auto", "auto, cpu, cuda, cuda:1 ...")
    watts: float = option(None, "power of the device, to estimate the energy where it cannot be measured")
    grams_per_kwh: float = option(None, "CO2 of a kWh of your electricity: adds the CO2 of the energy")
    seed: int = option(0, "seed of the first run; the next runs count up from it")
    # checkpoints
    resume: bool = option(False, "continue in --out: finished runs are kept, the interrupted one continues")
    save_every: float = option(10.0, "minutes between checkpoints")


# Settings that may differ when a run resumes: they do not affect the arithmetic of a single run, except through the
# contents of the files that they name, which are compared.
PATHS = ("data", "model", "words", "teacher")
MAY_CHANGE_ON_RESUME = {*PATHS, *"task out seeds lr dtype resume save_every watts grams_per_kwh".split()}


def check(settings):
    """Raises UserError for values that cannot work, before anything is read or written."""
    for name in ("epochs", "batch", "seq_len", "examples", "seeds", "clip", "temperature", "watts"):
        value = getattr(settings, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be greater than 0")
    for name in ("alpha_task", "alpha_ce", "alpha_mse", "augment", "save_every", "grams_per_kwh"):
        value = getattr(settings, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must not be negative")
    if not 0 <= settings.warmup <= 1:
        raise UserError(f"--warmup is {settings.warmup}: it is a share of the updates, between 0 and 1")
    if settings.seq_len is not None and settings.seq_len < 8:
        raise UserError(f"--seq-len is {settings.seq_len}: an example needs at least 8 tokens")
    check_seeds(settings.seed, settings.seeds)
    if settings.teacher and not settings.alpha_task + settings.alpha_ce + settings.alpha_mse:
        raise UserError("every weight of the objective is 0: give at least one --alpha- setting a positive value")
    if settings.words and settings.model != "bilstm":
        raise UserError("--words is for --model bilstm: leave it out")
    if settings.resume and settings.out is None:
        raise UserError("--resume needs to know which run: name its folder with --out")
    if None in (settings.task, settings.model, settings.data):
        raise UserError(f"{settings.out} holds no settings to resume with: repeat --task, --model and --data")


def fine_tune(settings, trial, model, task, pad_id, device, dtype, stop):
    """Trains `model` in place with one learning rate and seed; returns the run's record, or None once interrupted."""
    items, targets = task.train
    lengths = np.array([len(ids) for ids, _ in items])
    per_epoch = -(-len(items) // settings.batch)
    objective = distil.TaskObjective(
        task.regression, settings.alpha_task, settings.alpha_ce, settings.alpha_mse, settings.temperature
    )
    optimizer, (autocast, scaler) = adamw(model), precision(dtype, device)
    total = max(1, math.ceil(settings.epochs * per_epoch))
    progress = Progress(total, 0, *trial.resume(model, optimizer, scaler))
    order = None
    while not progress.done:
        epoch, position = divmod(progress.update, per_epoch)
        if position == 0 or order is None:
            order = batches(lengths, settings.batch, trial.seed, epoch)
        chosen = order[position]
        torch.manual_seed(int(mix(trial.seed, 6, progress.update)[0] >> np.uint64(1)))  # of the dropout
        for group in optimizer.param_groups:
            group["lr"] = lr_at(progress.update, total, trial.lr, settings.warmup)
        inputs = padded(items, chosen, pad_id, device)
        with autocast():
            logits = model(*inputs)
        teacher_targets = [distil.pad_logits([each[i] for i in chosen], logits.shape, device) for each in task.teacher]
        loss = objective.loss(logits, targets[chosen].to(device), *teacher_targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        if not loss.isfinite() or not (norm.isfinite() or scaler.is_enabled()):
            raise UserError(
                f"{trial.key}, update {progress.update + 1}: the loss is {loss.item()}, the gradient's norm "
                f"{norm.item()} (examples {', '.join(map(str, chosen[:8]))} ...): lower --lr, or look at these examples"
            )
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        progress.update += 1
        if progress.line_due():
            where = f"update {progress.update:>5}/{total}"
            print(f"{trial.key}: {where}  loss {loss.item():.4f}  {progress.left} left", flush=True)
        if progress.update % per_epoch == 0 or progress.done:
            metrics = task.evaluate([predict(model, split, pad_id, device, dtype) for split in task.dev])
            trial.epochs.append(metrics)
            shown = "  ".join(f"{name} {value:.2f}" for name, value in metrics.items())
            print(f"{trial.key}: dev after {progress.update / per_epoch:.3g} epochs: {shown}", flush=True)
        if stop.signal is not None or progress.due("save", settings.save_every * 60):
            trial.save(model, optimizer, scaler, progress)
        if stop.signal is not None:
            return None
    return {"epochs": trial.epochs, "updates": progress.update, "seconds": round(progress.seconds, 1)}


def source_folder(settings, names):
    """Returns the folder of the encoder to fine-tune, or of the word vectors of a bilstm."""
    if settings.model != "bilstm":
        return hub.resolve(settings.model)
    if "squad" in names:
        raise UserError("--model bilstm classifies sentences: choose another --task than squad")
    source = settings.words or (settings.teacher or "").split(",")[0]
    if not source:
        raise UserError("--model bilstm needs word vectors: name a model's folder with --words")
    if not settings.words and (pathlib.Path(source) / names[0]).is_dir():
        source = pathlib.Path(source) / names[0]
    return hub.resolve(str(source))


def open_state(settings, out, identity, device):
    """Returns the contents of scores.json: a new state, or with --resume that of the same run in `out`."""
    if not settings.resume:
        dtype, why = choose_dtype(settings.dtype, device)
        print(f"matrix products in {dtype}{why and f': {why}'}", flush=True)
        state = {"identity": identity, "dtype": dtype, "data": {}, "teachers": {}, "runs": {}}
        return {"settings": inheritable(dataclasses.asdict(settings), PATHS), **state}
    state = read_scores(out / "scores.json")
    wanted = identity if settings.dtype == "auto" else {**identity, "dtype": settings.dtype}
    require_same({**state["identity"], "dtype": state["dtype"]}, wanted, out)
    return state


def require_same_for(task, state, what, contents, out):
    """Raises UserError where a task was begun with other contents of `what`, "data" or "teachers"; notes them else."""
    if state.setdefault(what, {}).setdefault(task, contents) != contents:
        flag = "--" + what.removesuffix("s")
        raise UserError(f"{out} was begun with other {what} for {task}: give the same {flag}, or a new --out")


def finetune(settings):
    """Fine-tunes on each task as `settings` describe; returns the summary that the last line prints.

    Raises UserError, and SystemExit(128 + signal) after an interrupted run is saved.
    """
    check(settings)
    names = task_names(settings.task, settings.data)
    stem = f"finetune-{settings.task.replace(',', '-')}"
    with claimed(settings.out, stem, settings.resume, "scores.json") as out:
        return finetune_tasks(settings, names, out)


def finetune_tasks(settings, names, out):
    """Fine-tunes on the tasks `names` in the folder `out`; see `finetune`."""
    device, as_bilstm = choose_device(settings.device), settings.model == "bilstm"
    keep_freed_memory()
    folder = source_folder(settings, names)
    config = weights.read_config(folder)
    tokenizer = Tokenizer.load(folder)
    check_vocabulary("model", config, tokenizer)
    rates = learning_rates(settings.lr, None if as_bilstm else config.width)
    teachers = settings.teacher.split(",") if settings.teacher else []
    identity = {
        **{name: value for name, value in dataclasses.asdict(settings).items() if name not in MAY_CHANGE_ON_RESUME},
        "model": "bilstm" if as_bilstm else "encoder",
        "weights": weights.digests(folder),
    }
    state = open_state(settings, out, identity, device)
    for name in names:  # before hours go into the first
        task, folders = outline(name), distil.find_teachers(teachers, outline(name))
        if next_run(state["runs"].get(name, []), rates, settings.seed, settings.seeds) is not None:
            check_model(folder, config, tokenizer, task, as_bilstm)
            for teacher in folders:
                distil.check_teacher(teacher, task, tokenizer)
        require_same_for(name, state, "teachers", [weights.digests(teacher) for teacher in folders], out)
    began = time.monotonic()
    with SignalFlag() as stop, Meter(device, settings.watts, state.get("joules", ())) as meter:
        for name in names:
            task = open_task(name, settings.data, tokenizer, settings.seq_len, settings.examples)
            if not as_bilstm:
                check_positions(folder, config, task)
            require_same_for(name, state, "data", digest(task.train), out)
            runs = state["runs"].setdefault(name, [])
            if next_run(runs, rates, settings.seed, settings.seeds) is None:
                continue  # finished before the resumption: its teachers need not predict again
            print(f"{describe(task, settings.augment)}; {state['dtype']} on {device}; {out}", flush=True)
            if settings.augment:
                task.train = distil.with_copies(task, settings.augment, tokenizer)
            if teachers:
                given = teachers, task, tokenizer, settings.temperature, device, state["dtype"]
                task.teacher = distil.teacher_logits(*given)
            files.write_json(out / "scores.json", state | meter.record(settings.grams_per_kwh))
            while (todo := next_run(runs, rates, settings.seed, settings.seeds)) is not None:
                trial = Trial(name, *todo, out, {**identity, "teachers": state["teachers"][name]})
                model = build_model(folder, task, trial.seed, as_bilstm).to(device)
                record = fine_tune(settings, trial, model, task, tokenizer.pad_id, device, state["dtype"], stop)
                if record is None:
                    write_results(out, state, meter.record(settings.grams_per_kwh))
                    how_to_resume = command("finetune.py", "--out", out, "--resume")
                    print(f"saved within {trial.key}; resume with: {how_to_resume}", flush=True)
                    raise SystemExit(128 + stop.signal)
                if all(record["epochs"][-1]["score"] > r["epochs"][-1]["score"] for r in runs):
                    export(out / name, model.cpu().eval(), task, tokenizer, config)
                runs.append({"lr": trial.lr, "seed": trial.seed, **record})
                files.write_json(out / "scores.json", state | meter.record(settings.grams_per_kwh))
                (out / CHECKPOINT).unlink(missing_ok=True)

    summaries = {name: summarise(state["runs"][name]) for name in names}
    for name, s in summaries.items():
        print(f"{name:>6} {s['score']:6.2f}  [{s['lowest']:.2f}, {s['highest']:.2f}]  lr {s['lr']:g}")
    if (before := state.get("summary", {})).get("tasks") == summaries:
        print(f"{out} is finished: all runs are done, and nothing is changed")
        return {**before, "out": str(out)}  # it may have been moved
    in_glue = [summaries[name]["score"] for name in names if name in GLUE]
    macro = round(statistics.mean(in_glue), 2) if in_glue else None
    summary = {"out": str(out), "tasks": summaries, "macro": macro}
    summary |= {"seconds": round(time.monotonic() - began, 1), "peak_rss_mib": peak_rss_mib()}
    state |= {"versions": versions(), "summary": summary}
    write_results(out, state, meter.record(settings.grams_per_kwh))
    return summary


def main(argv):
    values = parse_args(Settings, argv, __doc__)
    check_needs_teacher(values.keys() & {"teacher", "resume"}, values)
    if values.keys() >= {"out", "resume"} and (state := pathlib.Path(values["out"]) / "scores.json").is_file():
        values = json.loads(state.read_text(encoding="utf-8")).get("settings", {}) | values
    print(json.dumps(finetune(Settings(**values)), separators=(",", ":")))


if __name__ == "__main__":
    run_script(main)
