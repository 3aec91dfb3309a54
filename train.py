"""Distil a student from a BERT teacher. Reads from top to bottom.

    python train.py                                              the demo: two minutes on two CPU cores
    python train.py --teacher bert-base-uncased --accum 64       any BERT, by folder or by name
    python train.py --teacher none --student-config FILE --data DIR    masked-LM training without a teacher
    torchrun --nproc-per-node 8 train.py ...                     any of these in several processes, as one

Every run leaves in --out a folder that transformers loads (`AutoModelForMaskedLM`, `AutoTokenizer`), run.json,
metrics.jsonl, curve.svg and a checkpoint. The last line of stdout is one JSON object:

    {"out", "steps", "tokens", "seconds", "tokens_per_second", "peak_rss_mib", "peak_gpu_mib",
     "teacher": {"parameters", "mlm_loss", "top1"}, "student": {"parameters", "mlm_loss", "top1", "kl", "agreement"}}

Legend:  B sequences in a micro-batch   T tokens per sequence   C width   G sequences in an update (batch * accum)
"""

import dataclasses
import json
import math
import os
import pathlib
import shlex
import signal
import time

import numpy as np
import torch

from minidistil import checkpoint, files, hub, weights
from minidistil.accounting import account, peak_tflops, training_flops_per_token
from minidistil.ahead import Ahead
from minidistil.checks import check_fit, check_settings
from minidistil.cli import UserError, given, run, setting
from minidistil.data import IGNORE, Corpus, Sequences, mix
from minidistil.evaluate import HeldOut
from minidistil.fit import CPU_TOKENS, MOST_TOKENS, divisors, largest_that_fits, rehearse
from minidistil.losses import Counts, Objective, distillation_loss
from minidistil.machine import cast_products, choose_device, choose_dtype, duration, precision, versions
from minidistil.memory import keep_freed_memory, peak_rss_mib
from minidistil.metrics import draw_curve, read_metrics
from minidistil.model import num_params
from minidistil.ranks import Ranks
from minidistil.schedule import lr_at
from minidistil.stop import Stop
from minidistil.student import build_student
from minidistil.tokenizer import Tokenizer

ROOT = pathlib.Path(__file__).resolve().parent
EVAL_SEED = 20191002  # of the held-out masks, the same for every run


@dataclasses.dataclass
class Settings:
    # what
    teacher: str = setting("demo", "folder, name on the Hugging Face Hub, demo, or none (plain masked-LM training)")
    data: str = setting(None, "folder that data/prepare.py wrote; without it, the docs corpus, prepared once")
    out: str = setting(None, "output folder; without it, runs/NAME, a fresh one each time")
    # how long
    steps: int = setting(None, "updates; overrides --epochs")
    epochs: float = setting(3.0, "passes over the corpus")
    batch: int = setting(5, "sequences in a micro-batch")
    accum: int = setting(50, "micro-batches in an update")
    micro_batch: str = setting(None, "sequences at once: splits batch * accum anew; auto: the most that fit on a GPU, "
                               "a fast number on a CPU (default: auto on a GPU, --batch on a CPU)")  # fmt: skip
    seq_len: int = setting(512, "tokens in a sequence, [CLS] and [SEP] included")
    # optimiser: AdamW with betas (0.9, 0.98), eps 1e-6, no weight decay
    lr: float = setting(5e-4, "peak learning rate")
    warmup: float = setting(0.05, "share of the updates over which the learning rate rises; then it falls to zero")
    clip: float = setting(5.0, "largest norm of the gradient")
    # objective
    temperature: float = setting(2.0, "softens both distributions in the KL term")
    alpha_ce: float = setting(5.0, "weight of tau^2 KL to the teacher's distribution")
    alpha_mlm: float = setting(2.0, "weight of the masked-LM cross-entropy")
    alpha_cos: float = setting(1.0, "weight of 1 - cosine between last hidden states")
    alpha_mse: float = setting(0.0, "weight of the squared difference of logits")
    kd_rows: str = setting("all", "where the teacher's distribution is learnt", choices=("all", "masked"))
    mask_smoothing: float = setting(0.7, "mask rare words first: weight count^-this; 0 is uniform")
    # student
    student_layers: str = setting(None, "how many of the teacher's layers, or which: 6, or 0,2,4 (default: half)")
    student_init: str = setting(None, "teacher, random, or a folder (default: teacher where there is one)")
    student_config: str = setting(None, "config.json of a student of another shape; its weights are random")
    dropout: float = setting(None, "dropout of the student in this run, attention included (default: its config's)")
    # machine
    dtype: str = setting("auto", "of matrix products", choices=("auto", "fp32", "bf16", "fp16"))
    device: str = setting("auto", "auto, cpu, cuda, cuda:1 ...")
    compile: bool = setting(False, "compile the models first: takes a minute, for long runs")
    price_per_hour: float = setting(None, "of one device: adds costs to progress, metrics.jsonl and run.json")
    seed: int = setting(0, "of data order, masks, dropout and fresh weights")
    # keeping
    resume: bool = setting(False, "go on from the checkpoint in --out, to the same bits as without the interruption")
    eval_every: int = setting(0, "updates between held-out evaluations; 0: ten in a run")
    eval_data: str = setting(None, "corpus whose held-out part to evaluate on (default: that of --data)")
    eval_tokens: int = setting(32768, "held-out tokens to evaluate on, at most")
    save_every: float = setting(10.0, "minutes between checkpoints")
    time_limit: float = setting(None, "minutes after which to save, evaluate and end; --resume goes on")


# What `python train.py` changes in the published recipe to show it in two minutes on two CPU cores: short sequences,
# small updates at a higher rate, uniform masks as in the evaluation, KL on masked tokens only; and, text being short
# here, more of the teacher's hidden states than of true words (LOG.md).
DEMO = dict(
    steps=1000, batch=8, accum=1, seq_len=128, lr=1.2e-3, alpha_mlm=0.5, alpha_cos=10.0, mask_smoothing=0.0,
    kd_rows="masked", eval_every=200,
)  # fmt: skip

# settings that may differ between a run and its resumption: none of them enters the arithmetic of an update
# (epochs enters as steps; batch, accum and the number of ranks as their product; the chosen dtype is in the checkpoint)
FREE_ON_RESUME = {
    "out", "resume", "epochs", "batch", "accum", "micro_batch", "dtype", "price_per_hour", "eval_every",
    "eval_data", "eval_tokens", "save_every", "time_limit",
}  # fmt: skip


# ---- small pieces


def open_corpus(settings, tokenizer, tokenizer_folder):
    """Opens --data, or prepares (once) and opens the docs corpus in this tokenizer's vocabulary."""
    if settings.data:
        corpus = Corpus(settings.data)
    else:
        folder = ROOT / "data" / "cache" / f"docs-{tokenizer.digest[:12]}"
        if settings.teacher not in ("demo", "none"):
            print(
                "no --data: training on the docs corpus; for the published result prepare Wikipedia + books: "
                "python data/prepare.py wikipedia:enwiki-latest-pages-articles.xml.bz2 BOOKS_FOLDER "
                f"--vocab {tokenizer_folder} --out data/wikibooks, then add --data data/wikibooks",
                flush=True,
            )
        if not (folder / "meta.json").exists():
            from data.prepare import prepare

            prepare(["docs"], tokenizer_folder, folder, val_share=0.02)
        corpus = Corpus(folder)
    corpus.check_tokenizer(tokenizer, tokenizer_folder)
    return corpus


def searches(device):
    """Whether --micro-batch auto searches here: a CPU would swap rather than refuse."""
    return device.type == "cuda"


def dropout_seed(seed, update, rank):
    """Of the one source of an update's dropout: another on each rank, on rank 0 that of a run of one process."""
    return int(mix(seed, 6, update + (rank << 40))[0] >> np.uint64(1))


# ---- the run


def train(settings, argv=()):
    """Runs a distillation as `settings` say; returns the summary that the last line prints.

    `argv` is the command line, for the line that tells how to resume. Raises UserError, and SystemExit(128 + signal)
    once an interrupted run is saved.
    """
    check_settings(settings)
    stem = "scratch" if settings.teacher == "none" else pathlib.Path(settings.teacher).name or "student"
    ranks = Ranks()
    device = choose_device(ranks.device(settings.device))
    ranks.join(device)
    witness = f"checkpoint/{checkpoint.NAME}"
    out = ranks.same(lambda: checkpoint.choose_out(settings.out, stem, settings.resume, witness))
    keep_freed_memory()

    # ---- teacher and vocabulary
    teacher = teacher_folder = init = None
    if settings.teacher != "none":
        teacher_folder = ranks.after_the_first(lambda: hub.resolve(settings.teacher))
        teacher = weights.load_model(teacher_folder).eval().requires_grad_(False)
    if settings.student_init not in (None, "teacher", "random"):
        init = ranks.after_the_first(lambda: hub.resolve(settings.student_init))
    tokenizer_folder = teacher_folder or init or settings.data or hub.resolve("demo")
    tokenizer = Tokenizer.load(tokenizer_folder)
    if teacher and init and Tokenizer.load(init).digest != tokenizer.digest:
        raise UserError(f"{init} and {settings.teacher} have different vocabularies: they must agree word for word")

    # ---- data: update u takes sequences u * G ... (u + 1) * G - 1, each rank its share of them
    corpus = ranks.after_the_first(lambda: open_corpus(settings, tokenizer, tokenizer_folder))
    eval_corpus = corpus
    if settings.eval_data:
        eval_corpus = Corpus(settings.eval_data)
        eval_corpus.check_tokenizer(tokenizer, tokenizer_folder)
    T, share = settings.seq_len, settings.batch * settings.accum  # a rank's share of an update
    G = share * ranks.size
    sequences = Sequences(
        corpus.train, T, tokenizer, settings.seed, corpus.counts, settings.mask_smoothing, shuffle=True
    )
    total = settings.steps or max(1, math.ceil(settings.epochs * sequences.per_epoch / G))
    take = Ahead(lambda update: sequences.take(update * G + ranks.rank * share, share), device)

    # ---- student, objective, optimiser
    objective = Objective.of(settings)
    student = build_student(settings, teacher, init)
    check_fit(settings, objective, teacher, student, tokenizer, corpus, eval_corpus, sequences, G)
    student.to(device)
    if teacher:
        teacher.to(device)
    # no weight decay, as published, and so no parameter groups
    optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0, fused=True)

    # ---- resume: the same arithmetic, or not at all
    identity = {
        **{name: value for name, value in dataclasses.asdict(settings).items() if name not in FREE_ON_RESUME},
        "steps": total,
        "sequences in an update": G,
        "data": corpus.meta["sha256"]["train.bin"],
        "teacher": teacher and [files.sha256(path) for path in weights.weight_files(teacher_folder)],
    }
    update, seconds_before, dtype, scale, most = 0, 0.0, None, None, MOST_TOKENS // T
    if settings.resume:
        saved, tensors = checkpoint.load(out)
        before = saved["identity"]
        different = [f"{name} {before.get(name)} -> {now}" for name, now in identity.items() if before.get(name) != now]
        if settings.dtype not in ("auto", saved["dtype"]):
            different.append(f"dtype {saved['dtype']} -> {settings.dtype}")
        if different:
            different = ", ".join(different)
            raise UserError(f"{out} was begun with other settings ({different}): repeat them, or choose a new --out")
        checkpoint.restore(tensors, student, optimizer, saved["adam_steps"])
        update, seconds_before, dtype, scale = (saved[k] for k in ("update", "seconds", "dtype", "scale"))
        most = saved["searched"] or most  # a search ends where it did, unless this is a smaller GPU
    dtype = dtype or ranks.same(lambda: choose_dtype(settings.dtype, device))
    autocast, scaler = precision(dtype, device)
    scaler.load_state_dict(scale or scaler.state_dict())

    # ---- held-out set: fixed blocks, fixed uniform masks, fp32; rank 0 alone evaluates
    eval_every = settings.eval_every or max(1, total // 10)
    if ranks.first:
        val = Sequences(eval_corpus.val, T, tokenizer, EVAL_SEED)
        held_out = HeldOut(*val.take(0, min(val.per_epoch, max(1, settings.eval_tokens // T))), teacher, device)
    if teacher:  # which has been evaluated
        cast_products(teacher, dtype)

    # ---- micro-batches: A of B sequences are a rank's share of an update
    teach, forward = teacher, student  # as they are, compiled, or wrapped

    def learn(x, y, masked, counts):
        """Adds the gradient of a micro-batch to what is there; returns its share of (loss, kl, ce, cos, mse), (5,)."""
        x, y = (tensor.to(device, non_blocking=True) for tensor in (x, y))  # (B, T)
        with autocast():
            h_t = None
            if objective.needs_teacher:
                with torch.no_grad():
                    h_t = teach(x)  # (B, T, C)
            h_s = forward(x)  # (B, T, C)
            loss, parts = distillation_loss(objective, counts, y, student, h_s, teacher, h_t, masked)
        scaler.scale(loss * ranks.size).backward()  # see Ranks.wrap
        return torch.cat([loss.detach().float()[None], parts])

    def attempt(size):
        x, y = (tensor[:size] for tensor in take(update))
        masked = size * sequences.masked_per_sequence
        rehearse(student, optimizer, learn, (x, y, masked, Counts(size * T, masked)), device)

    B, searched = settings.batch, None
    if settings.micro_batch not in (None, "auto"):
        B = int(settings.micro_batch)
    elif searches(device):  # the default: a few sequences at once keep a GPU waiting for the host
        B = searched = ranks.least(largest_that_fits(share, most, attempt))
    elif settings.micro_batch:
        B = next(divisors(share, CPU_TOKENS // T))
    if settings.compile:  # for training's one shape; evaluation, whose shape is another, uses the models as they are
        teach, forward = (model and torch.compile(model, dynamic=False) for model in (teacher, student))
        ranks.say("compiling: this takes a minute")
        attempt(B)  # before the clock starts
    forward = ranks.wrap(forward, device)
    A = share // B

    # ---- from here on rank 0 writes
    if ranks.first:
        out.mkdir(parents=True, exist_ok=True)
        metrics_path = out / "metrics.jsonl"
        history = [m for m in read_metrics(metrics_path) if m["step"] <= update] if settings.resume else []
        files.write_text(metrics_path, "".join(json.dumps(m) + "\n" for m in history))  # what came after is done again
    else:
        metrics_path, history = os.devnull, []
    metrics = open(metrics_path, "a", encoding="utf-8", buffering=1)
    teacher_text = f"teacher {num_params(teacher.config):,} parameters, " if teacher else ""
    several = f"{ranks.size} ranks x " if ranks.size > 1 else ""
    ranks.say(
        f"{teacher_text}student {num_params(student.config):,} parameters; {len(corpus.train):,} tokens of text; "
        f"{total} updates of {several}{A} x {B} x {T} = {G * T:,} tokens; {dtype} on {device}; {out}"
    )
    flops = training_flops_per_token(objective, teacher and teacher.config, student.config, T)
    peak = peak_tflops(device, dtype)
    first_update = update
    began = time.monotonic()
    aside = 0.0  # seconds of evaluating and saving

    def seconds():  # of the whole run, interruptions apart
        return seconds_before + time.monotonic() - began

    def log(record):
        history.append(record)
        metrics.write(json.dumps(record) + "\n")

    def evaluate():
        nonlocal aside
        if not ranks.first:
            return None
        start = time.monotonic()
        figures = held_out.figures(student)
        aside += time.monotonic() - start
        log({"step": update, "held_out": figures})
        ranks.say(f"held-out, student after {update}: {shown(figures)}")
        return figures

    def save():
        nonlocal aside
        if not ranks.first:
            return
        start = time.monotonic()
        info = {"update": update, "seconds": seconds(), "dtype": dtype, "scale": scaler.state_dict()}
        checkpoint.save(out, student, optimizer, {**info, "searched": searched, "identity": identity})
        aside += time.monotonic() - start

    def accounts():  # at this speed, for the whole run and for the published one
        return account(total * G * T, speed(), flops, peak, ranks.size, settings.price_per_hour)

    def rate(figures):  # for a line of progress
        share = f" ({figures['utilisation']:.0%} of peak)" if peak else ""
        cost = "" if figures["cost"] is None else f"  {figures['cost']:,.2f} in all"
        return f"{speed():,.0f} tokens/s  {figures['tflops_per_second']:.2f} TFLOP/s{share}{cost}"

    def peak_mib():  # of the device
        return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else peak_rss_mib()

    def speed():  # tokens/s of training in this process, evaluating and saving apart
        return (update - first_update) * G * T / max(time.monotonic() - began - aside, 1e-9)

    # ---- the loop
    if ranks.first and held_out.teacher_figures:
        ranks.say(f"held-out, teacher: {shown(held_out.teacher_figures)}")
    if not settings.resume:
        save()
    figures = history[-1].get("held_out") if history else evaluate()
    command = [*ranks.launcher, "train.py", *(a for a in argv if a != "--resume"), "--resume"]
    command = shlex.join(command + ([] if settings.out else ["--out", str(out)]))
    limit = math.inf if settings.time_limit is None else settings.time_limit * 60
    seconds_before, aside = seconds(), 0.0
    began = last_line = last_save = time.monotonic()
    with Stop() as stop, metrics, ranks.together(f"go on from the last checkpoint with: {command}"):
        over = False
        while update < total and not over:
            torch.manual_seed(dropout_seed(settings.seed, update, ranks.rank))
            lr = lr_at(update, total, settings.lr, settings.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            ids, labels = take(update)  # (share, T)
            (masked,) = ranks.sum((labels != IGNORE).sum().item())
            counts = Counts(tokens=G * T, masked=int(masked))
            shares = []  # of the update's loss, kl, ce, cos, mse: (5,) a micro-batch
            for i in range(A):
                part = slice(i * B, (i + 1) * B)
                x, y = ids[part], labels[part]  # (B, T)
                with ranks.alone(forward, last=i == A - 1):
                    shares.append(learn(x, y, int((y != IGNORE).sum()), counts))
                if stop.signal is not None and ranks.size == 1:
                    break
                if time.monotonic() - last_line > 10:  # updates may take minutes: show life inside them
                    last_line = time.monotonic()
                    ranks.say(f"  update {update + 1}/{total}: micro-batch {i + 1}/{A}")
            if stop.signal is not None and ranks.size == 1:
                break  # what was begun is not counted: resume does it again, to the same bits

            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), settings.clip)
            numbers = torch.cat([*shares, norm[None]]).cpu()  # the update's one wait for the device
            shares, norm = numbers[:-1].view(-1, 5), numbers[-1]
            # ranks end together: at the same losses, the first signal to one of them, and the clock of rank 0
            ends = [stop.signal or 0, ranks.first and time.monotonic() - began > limit]
            loss, kl, ce, cos, mse, signals, late = ranks.sum(*shares.sum(0).tolist(), *ends)
            if not math.isfinite(loss) or not (norm.isfinite() or scaler.is_enabled()):
                raise UserError(not_finite(update, shares[:, 0], norm, B, share, ranks, out))
            scaler.step(optimizer)  # with fp16, an overflow skips the step and lowers the scale
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            update += 1
            over = bool(signals or late)

            record = {"loss": loss, "kl": kl, "ce": ce, "cos": cos, "mse": mse, "lr": lr}
            machine = {k: v for k, v in accounts().items() if not k.startswith("published")}
            machine |= {"tokens_per_second": round(speed(), 1), "peak_mib": round(peak_mib(), 1)}
            log({"step": update, **record, "grad_norm": norm.item(), **machine})
            if time.monotonic() - last_line > 2 or update in (first_update + 1, total):
                last_line = time.monotonic()
                left = duration((total - update) * G * T / speed())
                ranks.say(
                    f"update {update:>6}/{total}  {shown(record)}  {rate(machine)}  {left} left  {peak_mib():,.0f} MiB"
                )
            if update % eval_every == 0 or update == total:
                figures = evaluate()
            if time.monotonic() - last_save > settings.save_every * 60:
                save()
                last_save = time.monotonic()

        if update > first_update or stop.signal is not None:
            save()
        if stop.signal is not None or (over and signals):
            ranks.say(f"saved after update {update} of {total}; go on with: {command}")
            raise SystemExit(128 + (stop.signal or signal.SIGTERM))
        if ranks.first and "held_out" not in history[-1]:  # the time limit came between evaluations
            figures = evaluate()
    ranks.leave()
    if not ranks.first:
        return None

    # ---- what the run leaves
    tokens_per_second = round(speed(), 1)
    summary = {
        "out": str(out),
        "steps": update,
        "tokens": update * G * T,
        "seconds": round(seconds(), 1),
        "tokens_per_second": tokens_per_second,
        "peak_rss_mib": peak_rss_mib(),
        "peak_gpu_mib": round(torch.cuda.max_memory_allocated(device) / 2**20, 1) if device.type == "cuda" else 0.0,
        "teacher": {"parameters": num_params(teacher.config), **held_out.teacher_figures} if teacher else None,
        "student": {"parameters": num_params(student.config), **figures},
    }
    figures_of_all = accounts()
    ranks.say(
        f"{flops / 1e6:,.0f} MFLOP a token; at {tokens_per_second:,.0f} tokens/s the {total} updates take "
        f"{figures_of_all['device_hours']:,.2f} device-hours, the published recipe's 12.6 billion tokens "
        f"{figures_of_all['published_device_hours']:,.0f}"
    )
    student.cpu().eval()
    weights.save_model(out, student)
    tokenizer.max_length = student.config.positions
    tokenizer.save(out, "bert" if student.config.token_types else "distilbert")
    draw_curve(out / "curve.svg", history, held_out.teacher_figures)
    files.write_json(out / "run.json", {
        "settings": dataclasses.asdict(settings), "dtype": dtype, "identity": identity, "versions": versions(),
        "data": corpus.meta, "summary": summary, "accounting": figures_of_all,
    })  # fmt: skip
    return summary


def shown(figures):
    """Figures for a line of progress; a term that is not part of the objective is left out."""
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items() if value)


def not_finite(update, losses, norm, B, share, ranks, out):
    """Says which update and which sequences gave a loss or gradient that is not a number, and what is safe."""
    G, bad = share * ranks.size, (~losses.isfinite()).nonzero().flatten().tolist()
    if bad:
        first = update * G + ranks.rank * share + bad[0] * B
        last = first + B - 1
        what = f"the loss is {losses[bad[0]].item()} in micro-batch {bad[0] + 1} (sequences {first} to {last})"
    else:
        what = f"the gradient's norm is {norm.item()} (sequences {update * G} to {(update + 1) * G - 1})"
    return (
        f"update {update + 1}: {what}: lower --lr or --clip, or look at these sequences; "
        f"the last good checkpoint is untouched in {checkpoint.path_of(out)}"
    )


def main(argv):
    values = given(Settings, argv, __doc__)
    demo = DEMO if values.get("teacher", "demo") == "demo" else {}
    summary = train(Settings(**{**demo, **values}), argv)
    if summary:  # rank 0 has it
        print(json.dumps(summary, separators=(",", ":")))


if __name__ == "__main__":
    run(main)
