"""Does the student still know it? Fine-tunes a model on GLUE, IMDb or SQuAD and reports the official score.

    python finetune.py --task sst2 --model runs/demo --data GLUE                 one task; GLUE is the official folder
    python finetune.py --task all --model bert-base-uncased --data GLUE --seeds 5    all nine, and the macro score
    python finetune.py --task squad --model runs/demo --data SQUAD --teacher runs/finetune-squad    second distillation
    python finetune.py --task sst2 --model bilstm --words bert-base-uncased --data GLUE    a baseline without attention

Each task leaves in --out/TASK the best run's model, which transformers loads, and in --out/scores.json all runs.
The last line of stdout is one JSON object:

    {"out", "tasks": {TASK: {"score": median, "lowest", "highest", "lr", "seeds", metrics}}, "macro", "seconds", ...}

Scores are in percent and follow the GLUE leaderboard: the mean of a task's metrics. Of several --lr, the first seed
chooses on the dev set, as BERT's authors did (Devlin et al. 2018, appendix A.3).

Legend:  B examples in a batch   T tokens of its longest   K labels
"""

import dataclasses
import json
import math
import pathlib
import shlex
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F

from kernels.distill_kl import distill_kl
from minidistil import files, hub, weights
from minidistil.cli import option, parse_args, run_script
from minidistil.data import IGNORE
from minidistil.device import choose_device, choose_dtype, keep_freed_memory, peak_rss_mib, precision, versions
from minidistil.downstream import bilstm
from minidistil.downstream.batches import batches, padded, predict
from minidistil.downstream.distil import altered
from minidistil.downstream.glue import GLUE, TASKS
from minidistil.downstream.heads import NOWHERE, Classifier, load_finetuned, load_pretrained
from minidistil.downstream.tasks import digest, open_task
from minidistil.errors import UserError
from minidistil.progress import duration, lr_at
from minidistil.rng import mix
from minidistil.run import CHECKPOINT, SignalFlag, choose_folder, load_checkpoint, restore, save_checkpoint
from minidistil.tokenizer import Tokenizer

# Grids of peak learning rates: BERT's own, and for narrower models one after Turc et al. 2019, arXiv 1908.08962
WIDE, NARROW, LSTM = (2e-5, 3e-5, 5e-5), (5e-5, 1e-4, 3e-4), (1e-3,)


@dataclasses.dataclass
class Settings:
    # what
    task: str = option(None, f"{', '.join(TASKS)}, squad; several with commas; all: the nine of GLUE", required=True)
    model: str = option(None, "what to fine-tune: folder, name on the Hugging Face Hub, or bilstm", required=True)
    data: str = option(None, "GLUE folder, folder of the task, or (imdb, squad) a single file", required=True)
    out: str = option(None, "output folder; without it, runs/finetune-TASK, a fresh one each time")
    words: str = option(None, "whose word vectors and vocabulary a bilstm has (default: the teacher's)")
    # how long
    epochs: float = option(3.0, "passes over the training set")
    batch: int = option(32, "examples in an update")
    seq_len: int = option(None, "tokens of an example at most (default: 128; imdb 512; squad 384)")
    examples: int = option(None, "train on this many examples only, drawn at random but always the same")
    seeds: int = option(1, "runs from different heads and orders; the median is reported")
    # optimiser: AdamW with betas (0.9, 0.999), weight decay 0.01 on matrices
    lr: str = option(None, "peak learning rates to choose from, with commas (default: a grid of three)")
    warmup: float = option(0.1, "share of the updates over which the learning rate rises; then it falls to zero")
    clip: float = option(1.0, "largest norm of the gradient")
    # a teacher that was fine-tuned for the task
    teacher: str = option(None, "its folder, or an --out that holds one for each task; with commas: an ensemble")
    temperature: float = option(2.0, "softens both distributions in the KL term")
    alpha_task: float = option(0.5, "with a teacher, weight of the task's own loss")
    alpha_ce: float = option(0.5, "weight of tau^2 KL to the teacher's distribution (stsb: of the squared difference)")
    alpha_mse: float = option(0.0, "weight of the squared difference of logits")
    augment: int = option(0, "copies of each example, words masked or exchanged, that the teacher alone labels")
    # machine
    dtype: str = option("auto", "of matrix products", choices=("auto", "fp32", "bf16", "fp16"))
    device: str = option("auto", "auto, cpu, cuda, cuda:1 ...")
    seed: int = option(0, "of the first run; the others follow")
    # keeping
    resume: bool = option(False, "go on in --out: runs that ended are kept, the one that was interrupted goes on")
    save_every: float = option(10.0, "minutes between checkpoints")


# settings that may differ between a run and its resumption: none of them enters the arithmetic of a single run
FREE_ON_RESUME = set("task out seeds lr dtype resume save_every data".split())


# ---- small pieces


def check(settings):
    """Refuses values that cannot work, before anything is read or written."""
    for name in ("epochs", "batch", "seq_len", "examples", "seeds", "clip", "temperature"):
        value = getattr(settings, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be greater than 0")
    for name in ("alpha_task", "alpha_ce", "alpha_mse", "augment", "save_every"):
        if not (getattr(settings, name) >= 0 and math.isfinite(getattr(settings, name))):
            raise UserError(f"--{name.replace('_', '-')} is {getattr(settings, name)}: it must not be negative")
    if not 0 <= settings.warmup <= 1:
        raise UserError(f"--warmup is {settings.warmup}: it is a share of the updates, between 0 and 1")
    if settings.seq_len is not None and settings.seq_len < 8:
        raise UserError(f"--seq-len is {settings.seq_len}: an example needs at least 8 tokens")
    if settings.teacher and not settings.alpha_task + settings.alpha_ce + settings.alpha_mse:
        raise UserError("every weight of the objective is 0: give at least one --alpha- setting a positive value")
    if settings.words and settings.model != "bilstm":
        raise UserError("--words is for --model bilstm: leave it out")
    if settings.resume and settings.out is None:
        raise UserError("--resume needs to know which run: name its folder with --out")


def tasks_of(settings):
    """The names that --task stands for; of `all`, those that the GLUE folder holds."""
    if settings.task == "all":
        here = [name for name in GLUE if (pathlib.Path(settings.data) / TASKS[name].folder).is_dir()]
        if not here:
            raise UserError(f"{settings.data} holds no task of GLUE (CoLA, SST-2 ...): give the official folder")
        if absent := [name for name in GLUE if name not in here]:
            print(f"not in {settings.data}, and not in the macro score: {', '.join(absent)}", flush=True)
        return here
    names = settings.task.split(",")
    for name in names:
        if name not in (*TASKS, "squad"):
            raise UserError(f"--task {name} is not known: choose from {', '.join(TASKS)}, squad, all")
    return names


def rates_of(settings, width):
    """The learning rates to try."""
    if settings.lr is None:
        return LSTM if width is None else WIDE if width >= 512 else NARROW
    try:
        rates = [float(rate) for rate in settings.lr.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(rate > 0 and math.isfinite(rate) for rate in rates):
        raise UserError(f"--lr {settings.lr}: give one learning rate, or several such as 2e-5,3e-5,5e-5")
    return rates


def next_run(runs, rates, settings):
    """The next (lr, seed), or None: each learning rate with the first seed, then the best one with the others."""
    done = [(r["lr"], r["seed"]) for r in runs]
    plan = [(lr, settings.seed) for lr in rates]
    if all(p in done for p in plan):
        plan = [(summary_of(runs)["lr"], settings.seed + i) for i in range(settings.seeds)]
    return next((p for p in plan if p not in done), None)


# ---- teachers


def load_teachers(settings, work, tokenizer):
    """Returns the models that --teacher names for this task, all with its labels and this vocabulary."""
    models = []
    for place in settings.teacher.split(",") if settings.teacher else ():
        folder = pathlib.Path(place) / work.name
        folder = folder if folder.is_dir() else pathlib.Path(place)
        model, labels = load_finetuned(folder)
        if type(model) is not work.kind or labels != tuple(work.labels):
            raise UserError(f"{folder} was not fine-tuned for {work.name}: give a teacher that was")
        if Tokenizer.load(folder).digest != tokenizer.digest:
            raise UserError(f"{folder} and {settings.model} have different vocabularies: they must agree word for word")
        models.append(model.requires_grad_(False))
    return models


def agreed(logits, tau):
    """One teacher out of several: (logits whose softmax at tau is the mean of theirs, mean logits), each a list.

    `logits` holds one list a teacher, of an array an item.
    """
    if len(logits) == 1:
        return logits[0], logits[0]
    soft, mean = [], []
    for views in zip(*logits, strict=True):
        z = torch.from_numpy(np.stack(views)).double()
        soft.append((tau * torch.log_softmax(z / tau, -1).logsumexp(0)).float().numpy())
        mean.append(z.mean(0).float().numpy())
    return soft, mean


def stacked(arrays, shape, device):
    """The arrays of a batch's items as one tensor of the shape of its logits; padding is NOWHERE."""
    stack = np.full(shape, NOWHERE, np.float32)
    for row, array in enumerate(arrays):
        stack[row, ..., : array.shape[-1]] = array
    return torch.from_numpy(stack).to(device)


def objective(settings, regression, logits, targets, soft=None, mean=None):
    """The loss of one batch, its mean over examples (over starts and ends of spans).

    logits (B, K) or (B, 2, T); targets (B,) or (B, 2), NaN (of a regression) or IGNORE where there is no label, and so
    no loss of the task's own; soft and mean, of `agreed`, like logits, where there is a teacher:
    alpha_task * loss + alpha_ce * tau^2 KL(teacher || student) + alpha_mse * squared difference
    (Sanh et al. 2019, section 3; Tang et al. 2019).
    """
    logits = logits.float()
    rows, targets = logits.flatten(0, -2), targets.flatten()
    if regression:
        loss = F.mse_loss(rows[:, 0], targets.where(targets.isfinite(), rows[:, 0].detach()))
    else:
        loss = F.cross_entropy(rows, targets, ignore_index=IGNORE, reduction="sum") / len(rows)
    if soft is None:
        return loss
    loss = settings.alpha_task * loss
    if settings.alpha_ce and regression:  # one number has no distribution
        loss = loss + settings.alpha_ce * F.mse_loss(logits, mean)
    elif settings.alpha_ce:
        kl, _ = distill_kl(rows, soft.flatten(0, -2), None, settings.temperature)
        loss = loss + settings.alpha_ce * kl / len(rows)
    if settings.alpha_mse:
        loss = loss + settings.alpha_mse * F.mse_loss(logits, mean)
    return loss


# ---- one run: a fresh head, one learning rate, one seed


def build(settings, folder, work, seed):
    """A model for the task, in training mode: a fresh head on the encoder in `folder`, or a BiLSTM on its words."""
    if settings.model == "bilstm":
        words = load_pretrained(folder, Classifier, 1).encoder.embeddings.words.weight
        model = bilstm.BiLSTM(words, len(work.labels), pair=work.task.pair, seed=seed).train()
    else:
        model = load_pretrained(folder, work.kind, len(work.labels) or 2, seed)
    if work.regression:  # from the mean, not from 0: hundreds of updates would go into that alone
        *_, bias = model.parameters()
        torch.nn.init.constant_(bias, work.train[1].nanmean().item())
    return model


def fine_tune(settings, model, work, soft, mean, lr, seed, tokenizer, device, dtype, stop, out, key, identity):
    """Trains `model` in place; returns the figures after each epoch, or None where a signal ended it (and it is saved).

    Goes on from the checkpoint in `out` where that is one of this run, `key`.
    """
    items, targets = work.train
    lengths = np.array([len(ids) for ids, _ in items])
    per_epoch = -(-len(items) // settings.batch)
    total = max(1, math.ceil(settings.epochs * per_epoch))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, fused=True)
    autocast, scaler = precision(dtype, device)
    update, seconds_before, epochs = 0, 0.0, []
    if out / CHECKPOINT.is_file():
        saved, tensors = load_checkpoint(out)
        if saved["key"] == key and saved["identity"] == identity:
            restore(tensors, model, optimizer, saved["adam_steps"])
            update, seconds_before, epochs = saved["update"], saved["seconds"], saved["epochs"]
            scaler.load_state_dict(saved["scale"])
            print(f"{key}: goes on after update {update}", flush=True)
    first = update
    began = last_line = last_save = time.monotonic()

    def save():
        info = {"update": update, "seconds": seconds_before + time.monotonic() - began, "epochs": epochs}
        info |= {"key": key, "identity": identity, "scale": scaler.state_dict(), "dtype": dtype}
        save_checkpoint(out, model, optimizer, info)

    while update < total:
        epoch, place = divmod(update, per_epoch)
        if place == 0 or update == first:
            order = batches(lengths, settings.batch, seed, epoch)
        chosen = order[place]
        torch.manual_seed(int(mix(seed, 6, update)[0] >> np.uint64(1)))  # dropout's only source
        for group in optimizer.param_groups:
            group["lr"] = lr_at(update, total, lr, settings.warmup)
        inputs = padded(items, chosen, tokenizer.pad_id, device)
        y = targets[chosen].to(device)
        with autocast():
            logits = model(*inputs)
        shape, teach = logits.shape, soft is not None
        views = [stacked([a[i] for i in chosen], shape, device) for a in ((soft, mean) if teach else ())]
        loss = objective(settings, work.regression, logits, y, *views)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        if not loss.isfinite() or not (norm.isfinite() or scaler.is_enabled()):
            raise UserError(
                f"{key}, update {update + 1}: the loss is {loss.item()}, the gradient's norm {norm.item()} (examples "
                f"{', '.join(map(str, chosen[:8]))} ...): lower --lr, or look at these examples"
            )
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        update += 1
        now = time.monotonic()
        if now - last_line > 2 or update in (first + 1, total):
            last_line = now
            left = duration((total - update) * (now - began) / (update - first))
            print(f"{key}: update {update:>5}/{total}  loss {loss.item():.4f}  {left} left", flush=True)
        if update % per_epoch == 0 or update == total:
            logits = [predict(model, split, tokenizer.pad_id, device) for split in work.dev]
            epochs.append(work.figures(logits))
            shown = "  ".join(f"{name} {value:.2f}" for name, value in epochs[-1].items())
            print(f"{key}: dev after {update / per_epoch:.3g} epochs: {shown}", flush=True)
        if stop.signal is not None:
            save()
            return None
        if now - last_save > settings.save_every * 60:
            save()
            last_save = now
    return {"epochs": epochs, "updates": update, "seconds": round(seconds_before + time.monotonic() - began, 1)}


# ---- all of them


def summary_of(runs):
    """The median run of the best learning rate: {"score", "lowest", "highest", "lr", "seeds", metrics}."""
    first = min(r["seed"] for r in runs)
    best = max((r for r in runs if r["seed"] == first), key=lambda r: r["epochs"][-1]["score"])["lr"]
    final = [r["epochs"][-1] for r in runs if r["lr"] == best]
    scores = [f["score"] for f in final]
    metrics = {m: round(statistics.median(f[m] for f in final), 2) for m in final[0] if m != "score"}
    figures = {"score": statistics.median(scores), "lowest": min(scores), "highest": max(scores)}
    return {**{name: round(x, 2) for name, x in figures.items()}, "lr": best, "seeds": len(scores), **metrics}


def finetune(settings, argv=()):
    """Fine-tunes on each task as `settings` say; returns the summary that the last line prints.

    `argv` is the command line, for the line that tells how to resume. Raises UserError, and SystemExit(128 + signal)
    once an interrupted run is saved.
    """
    check(settings)
    names = tasks_of(settings)
    stem = f"finetune-{settings.task.replace(',', '-')}"
    out = choose_folder(settings.out, stem, settings.resume, "scores.json")
    device = choose_device(settings.device)
    keep_freed_memory()

    # ---- model and vocabulary
    source = settings.model
    if source == "bilstm":
        source = settings.words or (settings.teacher or "").split(",")[0]
        if not source:
            raise UserError("--model bilstm needs word vectors: name a model's folder with --words")
        if not settings.words and (pathlib.Path(source) / names[0]).is_dir():
            source = pathlib.Path(source) / names[0]
        if "squad" in names:
            raise UserError("--model bilstm classifies sentences: choose another --task than squad")
    folder = hub.resolve(str(source))
    config = weights.read_config(folder)
    tokenizer = Tokenizer.load(folder)
    if len(tokenizer.vocab) != config.vocab_size:
        raise UserError(f"{folder} has {config.vocab_size} words, its vocabulary {len(tokenizer.vocab)}: copy it again")
    rates = rates_of(settings, None if settings.model == "bilstm" else config.width)
    dtype = choose_dtype(settings.dtype, device)

    # ---- what has been done before
    teachers = [str(t) for t in (settings.teacher or "").split(",") if t]
    identity = {
        **{name: value for name, value in dataclasses.asdict(settings).items() if name not in FREE_ON_RESUME},
        "weights": [files.sha256(path) for path in weights.weight_files(folder)],
    }
    state = {"identity": identity, "dtype": dtype, "data": {}, "runs": {}}
    if settings.resume:
        if not (out / "scores.json").is_file():
            raise UserError(f"nothing to resume in {out} (no scores.json): start without --resume")
        state = json.loads((out / "scores.json").read_text(encoding="utf-8"))
        before = state["identity"]
        different = [f"{name} {before.get(name)} -> {now}" for name, now in identity.items() if before.get(name) != now]
        if settings.dtype not in ("auto", state["dtype"]):
            different.append(f"dtype {state['dtype']} -> {settings.dtype}")
        if different:
            different = ", ".join(different)
            raise UserError(f"{out} was begun with other settings ({different}): repeat them, or choose a new --out")
        dtype = state["dtype"]
    began = time.monotonic()

    with SignalFlag() as stop:
        for name in names:
            # ---- the task's data, and what its teachers say of it, once
            work = open_task(name, settings.data, tokenizer, settings.seq_len, settings.examples)
            items = work.train[0]
            T = max(len(ids) for ids, _ in [*items, *(item for split in work.dev for item in split)])
            if settings.model != "bilstm" and T > config.positions:
                raise UserError(f"{folder} has {config.positions} positions: use --seq-len {config.positions} or less")
            data = digest(work.train)
            if state["data"].setdefault(name, data) != data:
                raise UserError(f"{out} was begun with other data for {name}: give the same --data, or a new --out")
            runs = state["runs"].setdefault(name, [])
            if next_run(runs, rates, settings) is None:
                continue  # done before the resumption: its teachers are not asked again
            mean_length = sum(len(ids) for ids, _ in items) / len(items)
            sizes = " + ".join(f"{len(split):,}" for split in work.dev)
            also = f" and {settings.augment} altered copies of each" if settings.augment else ""
            what = f"{len(items):,} items of {mean_length:.0f} tokens{also}"
            print(f"{name}: {what}, dev {sizes}; {dtype} on {device}; {out}")
            if settings.augment:
                items, targets = items + altered(items, settings.augment, tokenizer), work.train[1]
                nothing = math.nan if work.regression else IGNORE
                none = targets.new_full((len(items) - len(targets), *targets.shape[1:]), nothing)
                work.train = items, torch.cat([targets, none])
            soft = mean = None
            if teachers:
                views = []
                for teacher in load_teachers(settings, work, tokenizer):
                    views.append(predict(teacher.to(device), items, tokenizer.pad_id, device))
                    on_dev = [predict(teacher, split, tokenizer.pad_id, device) for split in work.dev]
                    print(f"{name}: the teacher's dev score is {work.figures(on_dev)['score']:.2f}", flush=True)
                soft, mean = agreed(views, settings.temperature)

            # ---- run after run
            files.write_json(out / "scores.json", state)
            while (todo := next_run(runs, rates, settings)) is not None:
                lr, seed = todo
                key = f"{name} lr {lr:g} seed {seed}"
                model = build(settings, folder, work, seed).to(device)
                done = fine_tune(
                    settings, model, work, soft, mean, lr, seed, tokenizer, device, dtype, stop, out, key, identity
                )
                if done is None:
                    command = ["python", "finetune.py", *(a for a in argv if a != "--resume"), "--resume"]
                    command += [] if settings.out else ["--out", str(out)]
                    print(f"saved within {key}; go on with: {shlex.join(command)}", flush=True)
                    raise SystemExit(128 + stop.signal)
                score = done["epochs"][-1]["score"]
                if all(score > r["epochs"][-1]["score"] for r in runs):
                    keep(out / name, model.cpu().eval(), work, tokenizer, config)
                runs.append({"lr": lr, "seed": seed, **done})
                files.write_json(out / "scores.json", state)
                out / CHECKPOINT.unlink(missing_ok=True)

    # ---- what it comes to
    summaries = {name: summary_of(state["runs"][name]) for name in names}
    in_glue = [summaries[name]["score"] for name in names if name in GLUE]
    for name, s in summaries.items():
        print(f"{name:>6} {s['score']:6.2f}  [{s['lowest']:.2f}, {s['highest']:.2f}]  lr {s['lr']:g}")
    macro = round(statistics.mean(in_glue), 2) if in_glue else None
    summary = {"out": str(out), "tasks": summaries, "macro": macro}
    summary |= {"seconds": round(time.monotonic() - began, 1), "peak_rss_mib": peak_rss_mib()}
    state |= {"settings": dataclasses.asdict(settings), "versions": versions(), "summary": summary}
    files.write_json(out / "scores.json", state)
    return summary


def keep(folder, model, work, tokenizer, config):
    """Writes a fine-tuned model and its vocabulary as transformers has them; a BiLSTM in a form of our own."""
    if isinstance(model, bilstm.BiLSTM):
        bilstm.save(folder, model, work.labels)
        tokenizer.save(folder, "distilbert")
        return
    extra = {"finetuning_task": work.name}
    if work.labels:
        extra["id2label"] = {str(i): label for i, label in enumerate(work.labels)}
        extra["label2id"] = {label: i for i, label in enumerate(work.labels)}
        extra["problem_type"] = "regression" if work.regression else "single_label_classification"
    weights.save_model(folder, model, **extra)
    tokenizer.max_length = config.positions
    tokenizer.save(folder, config.family)


def main(argv):
    values = parse_args(Settings, argv, __doc__)
    for name in ("temperature", "alpha_task", "alpha_ce", "alpha_mse", "augment"):
        if name in values and "teacher" not in values:
            raise UserError(f"--{name.replace('_', '-')} is for a teacher: name one with --teacher, or leave it out")
    summary = finetune(Settings(**values), argv)
    print(json.dumps(summary, separators=(",", ":")))


if __name__ == "__main__":
    run_script(main)
