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
import pathlib
import signal

import numpy as np
import torch

from minidistil import files, hub, weights
from minidistil.checks import check_fit, check_settings, score_words
from minidistil.cli import option, parse_args, run_script
from minidistil.data import IGNORE, Corpus, Prefetcher, Sequences
from minidistil.device import choose_device, choose_dtype, keep_freed_memory
from minidistil.distiller import Distiller
from minidistil.distributed import Distributed
from minidistil.errors import UserError
from minidistil.evaluate import HeldOut
from minidistil.losses import Denominators, Objective
from minidistil.micro_batch import choose_micro_batch
from minidistil.progress import Progress, lr_at
from minidistil.report import RunReport
from minidistil.rng import mix
from minidistil.run import CHECKPOINT, Run, SignalFlag, State, choose_folder, resume_command
from minidistil.student import build_student
from minidistil.tokenizer import Tokenizer

ROOT = pathlib.Path(__file__).resolve().parent
EVAL_SEED = 20191002  # of the held-out masks, the same for every run


@dataclasses.dataclass
class Settings:
    # what
    teacher: str = option("demo", "folder, name on the Hugging Face Hub, demo, or none (plain masked-LM training)")
    data: str = option(None, "folder that data/prepare.py wrote; without it, the docs corpus, prepared once")
    out: str = option(None, "output folder; without it, runs/NAME, a fresh one each time")
    # how long
    steps: int = option(None, "updates; overrides --epochs")
    epochs: float = option(3.0, "passes over the corpus")
    batch: int = option(5, "sequences in a micro-batch")
    accum: int = option(50, "micro-batches in an update")
    micro_batch: str = option(None, "sequences at once: splits batch * accum anew; auto: the most that fit on a GPU, "
                               "a fast number on a CPU (default: auto on a GPU, --batch on a CPU)")  # fmt: skip
    seq_len: int = option(512, "tokens in a sequence, [CLS] and [SEP] included")
    # optimiser: AdamW with betas (0.9, 0.98), eps 1e-6, no weight decay
    lr: float = option(5e-4, "peak learning rate")
    warmup: float = option(0.05, "share of the updates over which the learning rate rises; then it falls to zero")
    clip: float = option(5.0, "largest norm of the gradient")
    # objective
    temperature: float = option(2.0, "softens both distributions in the KL term")
    alpha_ce: float = option(5.0, "weight of tau^2 KL to the teacher's distribution")
    alpha_mlm: float = option(2.0, "weight of the masked-LM cross-entropy")
    alpha_cos: float = option(1.0, "weight of 1 - cosine between last hidden states")
    alpha_mse: float = option(0.0, "weight of the squared difference of logits")
    kd_rows: str = option("all", "where the teacher's distribution is learnt", choices=("all", "masked"))
    mask_smoothing: float = option(0.7, "mask rare words first: weight count^-this; 0 is uniform")
    # student
    student_layers: str = option(None, "how many of the teacher's layers, or which: 6, or 0,2,4 (default: half)")
    student_init: str = option(None, "teacher, random, or a folder (default: teacher where there is one)")
    student_config: str = option(None, "config.json of a student of another shape; its weights are random")
    dropout: float = option(None, "dropout of the student in this run, attention included (default: its config's)")
    # machine
    dtype: str = option("auto", "of matrix products", choices=("auto", "fp32", "bf16", "fp16"))
    device: str = option("auto", "auto, cpu, cuda, cuda:1 ...")
    compile: bool = option(False, "compile the models first: takes a minute, for long runs")
    price_per_hour: float = option(None, "of one device: adds costs to progress, metrics.jsonl and run.json")
    seed: int = option(0, "of data order, masks, dropout and fresh weights")
    # keeping
    resume: bool = option(False, "go on from the checkpoint in --out, to the same bits as without the interruption")
    eval_every: int = option(0, "updates between held-out evaluations; 0: ten in a run")
    eval_data: str = option(None, "corpus whose held-out part to evaluate on (default: that of --data)")
    eval_tokens: int = option(32768, "held-out tokens to evaluate on, at most")
    save_every: float = option(10.0, "minutes between checkpoints")
    time_limit: float = option(None, "minutes after which to save, evaluate and end; --resume goes on")


# What `python train.py` changes in the published recipe to show it in two minutes on two CPU cores: short sequences,
# small updates at a higher rate, uniform masks as in the evaluation, KL on masked tokens only; and, text being short
# here, more of the teacher's hidden states than of true words (LOG.md).
DEMO = dict(
    steps=1000, batch=8, accum=1, seq_len=128, lr=1.2e-3, alpha_mlm=0.5, alpha_cos=10.0, mask_smoothing=0.0,
    kd_rows="masked", eval_every=200,
)  # fmt: skip

# settings that may differ between a run and its resumption: none of them enters the arithmetic of an update
# (epochs enters as steps; batch, accum and the number of ranks as their product; the chosen dtype is in the checkpoint)
MAY_CHANGE_ON_RESUME = {
    "out", "resume", "epochs", "batch", "accum", "micro_batch", "dtype", "price_per_hour", "eval_every",
    "eval_data", "eval_tokens", "save_every", "time_limit",
}  # fmt: skip


# ---- what a run is made of


def load_models(settings, ranks):
    """Returns (teacher or None, its folder or None, student, tokenizer, the folder that the tokenizer is from).

    Both models are fp32 on the CPU; the teacher is frozen.
    """
    teacher = teacher_folder = init = None
    if settings.teacher != "none":
        teacher_folder = ranks.rank0_first(lambda: hub.resolve(settings.teacher))
        teacher = weights.load_model(teacher_folder).eval().requires_grad_(False)
    if settings.student_init not in (None, "teacher", "random"):
        init = ranks.rank0_first(lambda: hub.resolve(settings.student_init))
    folder = teacher_folder or init or settings.data or hub.resolve("demo")
    tokenizer = Tokenizer.load(folder)
    if teacher and init and Tokenizer.load(init).digest != tokenizer.digest:
        raise UserError(f"{init} and {settings.teacher} have different vocabularies: they must agree word for word")
    student = build_student(settings, teacher, init)
    for who, model in (("teacher", teacher), ("student", student)):
        if model:
            score_words(who, model, tokenizer, ranks.print0)
    return teacher, teacher_folder, student, tokenizer, folder


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


def open_eval_corpus(settings, corpus, tokenizer, tokenizer_folder):
    if not settings.eval_data:
        return corpus
    eval_corpus = Corpus(settings.eval_data)
    eval_corpus.check_tokenizer(tokenizer, tokenizer_folder)
    return eval_corpus


def open_held_out(settings, eval_corpus, tokenizer, teacher, device):
    """Fixed blocks of held-out text with fixed uniform masks, which are evaluated in fp32."""
    val = Sequences(eval_corpus.val, settings.seq_len, tokenizer, EVAL_SEED)
    n = min(val.per_epoch, max(1, settings.eval_tokens // settings.seq_len))
    return HeldOut(*val.batch(0, n), teacher, device)


def digests(folder):
    """What the weights in a folder are, wherever it lies."""
    return [files.sha256(path) for path in weights.weight_files(folder)]


def identity_of(settings, total, G, corpus, teacher_folder):
    """All that enters the arithmetic of an update: a resumed run must have the same, under whatever paths."""
    named = settings.student_init not in (None, "teacher", "random")
    init, shape = hub.resolve(settings.student_init) if named else None, settings.student_config
    return {
        **{name: value for name, value in dataclasses.asdict(settings).items() if name not in MAY_CHANGE_ON_RESUME},
        "steps": total,
        "sequences in an update": G,
        "data": corpus.meta["sha256"]["train.bin"],
        "teacher": teacher_folder and digests(teacher_folder),
        "student_init": digests(init) if init else settings.student_init,
        "student_config": shape and dataclasses.asdict(weights.read_config(shape)),
    }


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
    ranks = Distributed()
    device = choose_device(ranks.device(settings.device))
    ranks.join(device)
    stem = "scratch" if settings.teacher == "none" else pathlib.Path(settings.teacher).name or "student"
    out = ranks.broadcast(lambda: choose_folder(settings.out, stem, settings.resume, CHECKPOINT))
    ranks.print0(f"loading models and text; this run's folder is {out}")
    keep_freed_memory()

    # ---- models and data: update u takes sequences u * G ... (u + 1) * G - 1, and each rank its share of them
    teacher, teacher_folder, student, tokenizer, tokenizer_folder = load_models(settings, ranks)
    corpus = ranks.rank0_first(lambda: open_corpus(settings, tokenizer, tokenizer_folder))
    eval_corpus = open_eval_corpus(settings, corpus, tokenizer, tokenizer_folder)
    T, share = settings.seq_len, settings.batch * settings.accum
    G = share * ranks.size
    sequences = Sequences(
        corpus.train, T, tokenizer, settings.seed, corpus.counts, settings.mask_smoothing, shuffle=True
    )
    total = settings.steps or max(1, math.ceil(settings.epochs * sequences.per_epoch / G))
    batches = Prefetcher(lambda update: sequences.batch(update * G + ranks.rank * share, share), device)
    objective = Objective.of(settings)
    check_fit(settings, objective, teacher, student, corpus, eval_corpus, sequences, G)

    # ---- optimiser (AdamW without weight decay, as published), and where an earlier run stands
    student.to(device)
    if teacher:
        teacher.to(device)
    optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0, fused=True)
    run = Run(out, identity_of(settings, total, G, corpus, teacher_folder), writes=ranks.first)
    state = run.resume(student, optimizer, settings.dtype) if settings.resume else State()
    state.dtype = state.dtype or ranks.broadcast(lambda: choose_dtype(settings.dtype, device))
    held_out = open_held_out(settings, eval_corpus, tokenizer, teacher, device) if ranks.first else None
    distiller = Distiller(objective, teacher, student, state.dtype, device, ranks)
    distiller.scaler.load_state_dict(state.scale or distiller.scaler.state_dict())
    B = choose_micro_batch(settings, state, distiller, optimizer, batches)
    distiller.distribute()

    progress = Progress(total, G * T, state.update, state.seconds)
    report = RunReport(settings, run, progress, distiller, state.dtype, ranks)
    run.open(state.update if settings.resume else None)
    report.begin(corpus, share // B, B, T, held_out)

    def evaluate():
        if ranks.first:
            with progress.paused():
                metrics = held_out.evaluate(student)
            report.evaluated(metrics)
            return metrics

    def save():
        with progress.paused():
            state.update, state.seconds, state.scale = progress.update, progress.seconds, distiller.scaler.state_dict()
            run.save(student, optimizer, state)
        progress.reset("save")

    def goes_on(done, A):  # after a micro-batch: a signal ends a run of one process at once
        if done < A and progress.due("line", max(10.0, progress.line_every)):  # an update may take minutes
            ranks.print0(f"  update {progress.update + 1}/{total}: micro-batch {done}/{A}")
        return stop.signal is None or ranks.size > 1

    if not settings.resume:
        save()
    metrics = run.history[-1].get("held_out") if run.history else evaluate()
    how_to_resume = resume_command(ranks.launcher, "train.py", argv, out)
    eval_every = settings.eval_every or max(1, total // 10)
    limit = math.inf if settings.time_limit is None else settings.time_limit * 60
    progress.restart(progress.seconds)
    lost = f"go on from the last checkpoint with: {how_to_resume}"
    with SignalFlag() as stop, run.metrics, ranks.report_lost_rank(lost):
        signals = late = False
        while not (progress.done or signals or late):
            update = progress.update
            torch.manual_seed(dropout_seed(settings.seed, update, ranks.rank))
            lr = lr_at(update, total, settings.lr, settings.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # the gradient of the update: a sum over micro-batches and ranks of shares of one mean
            ids, labels = batches(update)  # (share, T)
            (masked,) = ranks.sum((labels != IGNORE).sum().item())
            terms = distiller.accumulate(ids, labels, B, Denominators(G * T, int(masked)), goes_on)
            if terms is None:
                break  # an update that was begun is not counted: the resumed run takes it again, to the same bits
            norm = distiller.clip(optimizer, settings.clip)
            numbers = torch.cat([*terms, norm[None]]).cpu()  # the one place where the host waits for the device
            terms, norm = numbers[:-1].view(-1, 5), numbers[-1]  # loss, kl, ce, cos, mse of each micro-batch

            # all ranks see the same losses, a signal to any of them, and the clock of rank 0: they end together
            ends = [stop.signal or 0, ranks.first and progress.elapsed > limit]
            loss, kl, ce, cos, mse, signals, late = ranks.sum(*terms.sum(0).tolist(), *ends)
            if not math.isfinite(loss) or not (norm.isfinite() or distiller.scaler.is_enabled()):
                raise UserError(not_finite(update, terms[:, 0], norm, B, share, ranks, out))
            distiller.step(optimizer)
            progress.update += 1

            report.updated({"loss": loss, "kl": kl, "ce": ce, "cos": cos, "mse": mse, "lr": lr}, norm.item())
            if progress.update % eval_every == 0 or progress.done:
                metrics = evaluate()
            if progress.due("save", settings.save_every * 60):
                save()

        if progress.update > progress.first or stop.signal is not None:
            save()
        if stop.signal is not None or signals:
            ranks.print0(f"saved after update {progress.update} of {total}; go on with: {how_to_resume}")
            raise SystemExit(128 + (stop.signal or signal.SIGTERM))
        if ranks.first and "held_out" not in run.history[-1]:  # the time limit came between evaluations
            metrics = evaluate()
    ranks.leave()
    return report.finish(corpus, tokenizer, held_out, metrics) if ranks.first else None


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
        f"the last good checkpoint is untouched in {out / CHECKPOINT}"
    )


def main(argv):
    values = parse_args(Settings, argv, __doc__)
    demo = DEMO if values.get("teacher", "demo") == "demo" else {}
    summary = train(Settings(**{**demo, **values}), argv)
    if summary:  # rank 0 has it
        print(json.dumps(summary, separators=(",", ":")))


if __name__ == "__main__":
    run_script(main, in_ranks=True)
