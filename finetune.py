"""Fine-tunes a model on GLUE, IMDb, SQuAD or examples of your own, and reports the score.

    python finetune.py --task sst2 --model runs/demo --data GLUE                 one task; GLUE: the official folder
    python finetune.py --task all --model bert-base-uncased --data GLUE --seeds 5    all nine, and the macro score
    python finetune.py --task reviews.csv --model runs/demo                          examples of your own
    python finetune.py --task squad --model runs/student --data SQUAD --teacher runs/teacher    second distillation
    python finetune.py --task sst2 --model bilstm --words bert-base-uncased --data GLUE    a baseline without attention

The best run's model of each task and its card are in --out/TASK, which transformers loads, or of --vectors
sentence-transformers; --out/scores.json holds all runs. The last line of stdout is one JSON object:

    {"out", "tasks": {TASK: {"score": median, "lowest", "highest", "lr", "seeds", metrics}}, "macro", "seconds", ...}

Scores are in percent and follow the GLUE leaderboard: the mean of a task's metrics. With several --lr, the dev score of
the first seed selects one, as BERT's authors did (Devlin et al. 2018, appendix A.3).

Legend:  B examples in a batch   T tokens of the longest one   K labels
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import signal
import statistics
import time

import numpy as np
import torch

from minidistil import files, hub, weights
from minidistil.checks import check_needs_teacher, check_vocabulary
from minidistil.cli import option, parse_args, run_script
from minidistil.device import choose_device, versions
from minidistil.distributed import Distributed
from minidistil.downstream import distil, scores, table
from minidistil.downstream.batches import batches, padded, predict_shared
from minidistil.downstream.card import write_results
from minidistil.downstream.checks import check_settings
from minidistil.downstream.glue import GLUE, TASKS
from minidistil.downstream.grid import learning_rates, next_run, summarise
from minidistil.downstream.models import adamw, build_model, export
from minidistil.downstream.tasks import check_model, check_positions, describe, digest, open_task, outline, task_names
from minidistil.downstream.trial import Trial
from minidistil.energy import Meter
from minidistil.errors import UserError
from minidistil.folder import CHECKPOINT, claimed, command, inheritable
from minidistil.memory import keep_freed_memory, peak_rss_mib
from minidistil.pooling import read_pooling
from minidistil.precision import precision
from minidistil.progress import Progress, lr_at
from minidistil.rng import mix
from minidistil.run import SignalFlag, same_on_ranks
from minidistil.tokenizer import Tokenizer

TASK_HELP = f"{', '.join(TASKS)}, squad; several with commas; all: the nine of GLUE; or a table of your own examples"


@dataclasses.dataclass
class Settings:
    # model and data
    task: str = option(None, TASK_HELP, required=True)
    model: str = option(None, "model to fine-tune: folder, name on the Hugging Face Hub, or bilstm", required=True)
    data: str = option(None, "GLUE folder, folder of the task, or (imdb, squad) a single file")
    out: str = option(None, "output folder (default: runs/finetune-TASK, a new one each time)")
    vectors: bool = option(False, "classify the vectors of a sentence encoder; it reads the texts of a pair one by one")
    words: str = option(None, "model that gives a bilstm its word vectors and vocabulary (default: the teacher)")
    # examples of your own: --task FILE, a .tsv, .csv or .jsonl
    columns: str = option(None, "columns of the text, or two texts, and of the label, with commas (default: by name)")
    dev: str = option(None, "file of held-out examples (default: a share of --task FILE)")
    held_out: float = option(None, f"this share, by the hash of the text (default: {table.HELD_OUT})")
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
    unlabelled: int = option(0, "this many of the texts that --examples leaves out, labelled by the teacher alone")
    # hardware
    dtype: str = option("auto", "precision of matrix products", choices=("auto", "fp32", "bf16", "fp16"))
    device: str = option("auto", "auto, cpu, cuda, cuda:1 ...")
    watts: float = option(None, "power of the device, to estimate the energy where it cannot be measured")
    grams_per_kwh: float = option(None, "CO2 of a kWh of your electricity: adds the CO2 of the energy")
    seed: int = option(0, "seed of the first run; the next runs count up from it")
    # checkpoints
    resume: bool = option(False, "continue in --out: finished runs are kept, the interrupted one continues")
    save_every: float = option(10.0, "minutes between checkpoints")


# Settings that may differ when a run resumes: they change nothing, or their examples and weights are compared instead.
PATHS = ("data", "dev", "model", "words", "teacher")
MAY_CHANGE = {*PATHS, *"task vectors unlabelled out seeds lr dtype resume save_every watts grams_per_kwh".split()}


def fine_tune(settings, trial, model, task, pad_id, device, dtype, stop, ranks):
    """Trains `model` in place with one learning rate and seed; returns the run's record, or None once interrupted.

    Each rank has its share of an update's examples; the gradient is that of their mean, and `stop` that of any rank.
    """
    items, targets = task.train
    lengths = np.array([len(ids) for ids, _ in items])
    per_epoch = -(-len(items) // settings.batch)
    objective = distil.TaskObjective(
        task.regression, settings.alpha_task, settings.alpha_ce, settings.alpha_mse, settings.temperature
    )
    optimizer, (autocast, scaler) = adamw(model), precision(dtype, device)
    total = max(1, math.ceil(settings.epochs * per_epoch))
    progress = Progress(total, 0, *trial.resume(model, optimizer, scaler, ranks))
    run_model, order = ranks.wrap(model, device), None
    while not progress.done:
        epoch, position = divmod(progress.update, per_epoch)
        if position == 0 or order is None:
            order = batches(lengths, settings.batch, trial.seed, epoch)
        chosen = order[position][ranks.rank :: ranks.size]
        share = len(chosen) / len(order[position])
        chosen = chosen if share else order[position][:1]  # for nothing, since the ranks call each other in `backward`
        torch.manual_seed(int(mix(trial.seed, 6, progress.update)[0] >> np.uint64(1)) + ranks.rank)  # of the dropout
        for group in optimizer.param_groups:
            group["lr"] = lr_at(progress.update, total, trial.lr, settings.warmup)
        inputs = padded(items, chosen, pad_id, device)
        with autocast():
            logits = run_model(*inputs)
        teacher_targets = [distil.pad_logits([each[i] for i in chosen], logits.shape, device) for each in task.teacher]
        loss = share * objective.loss(logits, targets[chosen].to(device), *teacher_targets)
        scaler.scale(loss * ranks.size).backward()  # of which the ranks' gradients are averaged
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        loss, signals = ranks.sum(loss.item(), stop.signal or 0)
        if not math.isfinite(loss) or not (norm.isfinite() or scaler.is_enabled()):
            raise UserError(
                f"{trial.key}, update {progress.update + 1}: the loss is {loss}, the gradient's norm "
                f"{norm.item()} (examples {', '.join(map(str, chosen[:8]))} ...): lower --lr, or look at these examples"
            )
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        progress.update += 1
        if progress.line_due():
            where = f"update {progress.update:>5}/{total}"
            ranks.print0(f"{trial.key}: {where}  loss {loss:.4f}  {progress.left} left")
        if progress.update % per_epoch == 0 or progress.done:
            metrics = task.evaluate([predict_shared(model, split, pad_id, device, dtype, ranks) for split in task.dev])
            trial.epochs.append(metrics)
            shown = "  ".join(f"{name} {value:.2f}" for name, value in metrics.items())
            ranks.print0(f"{trial.key}: dev after {progress.update / per_epoch:.3g} epochs: {shown}")
        if ranks.first and (signals or progress.due("save", settings.save_every * 60)):
            trial.save(model, optimizer, scaler, progress)
        if signals:
            return None
    return {"epochs": trial.epochs, "updates": progress.update, "seconds": round(progress.seconds, 1)}


def source_folder(settings, names):
    """Returns the folder of the encoder to fine-tune, or of the word vectors of a bilstm."""
    if settings.model != "bilstm":
        return hub.resolve(settings.model, settings.vectors)
    if "squad" in names:
        raise UserError("--model bilstm classifies sentences: choose another --task than squad")
    source = settings.words or (settings.teacher or "").split(",")[0]
    if not source:
        raise UserError("--model bilstm needs word vectors: name a model's folder with --words")
    if not settings.words and (pathlib.Path(source) / names[0]).is_dir():
        source = pathlib.Path(source) / names[0]
    return hub.resolve(str(source))


def finetune(settings):
    """Fine-tunes on each task as `settings` describe; returns the summary that the last line prints.

    Raises UserError, and SystemExit(128 + signal) after an interrupted run is saved.
    """
    check_settings(settings)
    names = task_names(settings.task, settings.data)
    ranks = Distributed()
    device = choose_device(ranks.device(settings.device))
    ranks.join(device)
    with contextlib.ExitStack() as stack:
        folder = claimed(settings.out, f"finetune-{'-'.join(names)}", settings.resume, "scores.json")
        out = ranks.broadcast(lambda: stack.enter_context(folder))
        how_to_resume = command("finetune.py", "--out", out, "--resume", launcher=ranks.launcher)
        stack.enter_context(ranks.report_lost_rank(f"resume from the last checkpoint with: {how_to_resume}"))
        return finetune_tasks(settings, names, out, device, ranks, how_to_resume)


def finetune_tasks(settings, names, out, device, ranks, how_to_resume):
    """Fine-tunes on the tasks `names` in the folder `out`; see `finetune`."""
    as_bilstm, is_own = settings.model == "bilstm", table.is_table(settings.task)
    keep_freed_memory()
    folder = ranks.rank0_first(lambda: source_folder(settings, names))
    config = weights.read_config(folder)
    tokenizer = Tokenizer.load(folder)
    check_vocabulary("model", config, tokenizer, ranks.print0)
    rates = learning_rates(settings.lr, None if as_bilstm else config.width)
    teachers = settings.teacher.split(",") if settings.teacher else []
    own = table.read_table(settings.task, settings.columns, settings.dev, settings.held_out) if is_own else None
    pooling = read_pooling(folder) if settings.vectors else None
    identity = {name: value for name, value in dataclasses.asdict(settings).items() if name not in MAY_CHANGE}
    identity["model"] = "bilstm" if as_bilstm else "vectors" if settings.vectors else "encoder"
    identity |= {"weights": weights.digests(folder), **({"pooling": str(pooling)} if pooling else {})}
    same_on_ranks({**identity, "lr": rates, "seeds": settings.seeds, "task": names}, ranks)
    inherited = inheritable(dataclasses.asdict(settings), (*PATHS, "task") if own else PATHS)
    if settings.resume:
        state = scores.resume(out, identity, settings.dtype) | {"settings": inherited}
    else:
        state = ranks.broadcast(lambda: scores.begin(inherited, identity, settings.dtype, device))
    for name in names:  # before hours go into the first
        folders = distil.find_teachers(teachers, task := outline(name, own, settings.vectors))
        if next_run(state["runs"].get(name, []), rates, settings.seed, settings.seeds) is not None:
            check_model(folder, config, tokenizer, task, as_bilstm)
            for teacher in folders:
                distil.check_teacher(teacher, task, tokenizer)
        digests = same_on_ranks({"teachers": [weights.digests(teacher) for teacher in folders]}, ranks)["teachers"]
        scores.require_same_for(name, state, "teachers", digests, out)
    if own:
        state["columns"] = {"texts": own[0].texts, "label": own[0].label}
        ranks.print0(table.describe(own[0]))
    began, before = time.monotonic(), state.get("joules", ()) if ranks.first else ()

    def save(write=lambda out, state: files.write_json(out / "scores.json", state)):
        energy = meter.record(settings.grams_per_kwh, ranks)  # of all ranks, which meet here
        if ranks.first:
            write(out, state | energy)

    with SignalFlag() as stop, Meter(device, settings.watts, before, ranks.print0) as meter:
        for name in names:
            examples, unlabelled, prompt = settings.examples, settings.unlabelled, pooling and pooling.prompt
            task = open_task(name, settings.data, tokenizer, settings.seq_len, examples, unlabelled, own, prompt)
            if not as_bilstm:
                check_positions(folder, config, task)
            scores.require_same_for(name, state, "data", same_on_ranks({"data": digest(task)}, ranks)["data"], out)
            runs = scores.runs_of(name, state)
            if next_run(runs, rates, settings.seed, settings.seeds) is None:
                continue  # finished before the resumption: its teachers need not predict again
            ranks.print0(f"{describe(task, settings.augment, unlabelled)}; {state['dtype']} on {device}; {out}")
            if teachers:
                task.train = distil.with_unlabelled(task, settings.augment, tokenizer)
                given = teachers, task, tokenizer, settings.temperature, device, state["dtype"], ranks
                task.teacher = distil.teacher_logits(*given)
            save()
            while (todo := next_run(runs, rates, settings.seed, settings.seeds)) is not None:
                trial = Trial(name, *todo, out, {**identity, "teachers": state["teachers"][name]})
                model = build_model(folder, task, trial.seed, as_bilstm).to(device)
                given = model, task, tokenizer.pad_id, device, state["dtype"], stop, ranks
                record = fine_tune(settings, trial, *given)
                if record is None:
                    save(write_results)
                    ranks.print0(f"saved within {trial.key}; resume with: {how_to_resume}")
                    raise SystemExit(128 + (stop.signal or signal.SIGTERM))
                if ranks.first and all(record["epochs"][-1]["score"] > r["epochs"][-1]["score"] for r in runs):
                    export(out / name, model.cpu().eval(), task, tokenizer, config)
                runs.append({"lr": trial.lr, "seed": trial.seed, **record})
                save()
                if ranks.first:
                    (out / CHECKPOINT).unlink(missing_ok=True)
        energy = meter.record(settings.grams_per_kwh, ranks)

    ranks.leave()
    return summary_of(state, names, out, began, energy) if ranks.first else None


def summary_of(state, names, out, began, energy):
    """Returns the summary of a finished run, which its first process prints and writes into scores.json."""
    summaries = {name: summarise(state["runs"][name]) for name in names}
    for name, s in summaries.items():
        print(f"{name:>6} {s['score']:6.2f}  [{s['lowest']:.2f}, {s['highest']:.2f}]  lr {s['lr']:g}")
    if (before := state.get("summary", {})).get("tasks") == summaries:
        print(f"{out} is finished: all runs are done, and nothing is changed")
        return {**before, "out": str(out)}  # it may have been moved
    in_glue = [summaries[name]["score"] for name in names if name in GLUE and "columns" not in state]
    macro = round(statistics.mean(in_glue), 2) if in_glue else None
    summary = {"out": str(out), "tasks": summaries, "macro": macro}
    summary |= {"seconds": round(time.monotonic() - began, 1), "peak_rss_mib": peak_rss_mib()}
    state |= {"versions": versions(), "summary": summary}
    write_results(out, state | energy)
    return summary


def main(argv):
    values = parse_args(Settings, argv, __doc__)
    check_needs_teacher(values.keys() & {"teacher", "resume"}, values)
    if values.keys() >= {"out", "resume"} and (state := pathlib.Path(values["out"]) / "scores.json").is_file():
        values = json.loads(state.read_text(encoding="utf-8")).get("settings", {}) | values
    if summary := finetune(Settings(**values)):  # on rank 0 only
        print(json.dumps(summary, separators=(",", ":")))


if __name__ == "__main__":
    run_script(main, in_ranks=True)
