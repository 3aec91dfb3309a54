"""Distils a student from a BERT, RoBERTa or GPT-2. Reads from top to bottom.

    python train.py                                              the demo: two minutes on two CPU cores
    python train.py --teacher bert-base-uncased --accum 64       any BERT, a folder or a name
    python train.py --teacher none --student-config FILE --data DIR    training without a teacher
    torchrun --nproc-per-node 8 train.py ...                     any of these in several processes

Every run leaves in --out a folder that transformers loads, its model card README.md, run.json, metrics.jsonl, curve.svg
and a checkpoint. The last line of stdout is one JSON object, with "clm_loss" and "perplexity" in place of "mlm_loss"
for a GPT-2:

    {"out", "steps", "tokens", "seconds", "tokens_per_second", "peak_rss_mib", "peak_gpu_mib",
     "teacher": {"parameters", "mlm_loss", "top1"}, "student": {"parameters", "mlm_loss", "top1", "kl", "agreement"}}

Legend:  B sequences in a micro-batch   T tokens per sequence   G sequences in an update (batch * accum * ranks)
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import signal

import numpy as np
import torch

from minidistil import hub, weights
from minidistil.checks import check_family, check_fit, check_needs_teacher, check_sentences, check_settings, score_words
from minidistil.cli import option, parse_args, run_script
from minidistil.data import Corpus, Prefetcher
from minidistil.device import choose_device
from minidistil.distiller import Distiller
from minidistil.distributed import Distributed
from minidistil.energy import Meter
from minidistil.errors import UserError
from minidistil.folder import CHECKPOINT, check_room, claimed, command
from minidistil.losses import TERMS, Denominators, Objective, counts
from minidistil.memory import keep_freed_memory
from minidistil.micro_batch import choose_micro_batch
from minidistil.model import LanguageModel
from minidistil.narrow import Projection
from minidistil.pooling import SentenceEncoder, read_pooling
from minidistil.precision import choose_dtype
from minidistil.progress import Progress, lr_at
from minidistil.report import RunReport, already_finished, not_finite
from minidistil.rng import mix
from minidistil.run import Run, SignalFlag, State, identity_of, inherited, same_on_ranks
from minidistil.student import build_student
from minidistil.text import open_held_out, training_sequences
from minidistil.tokenizer import Tokenizer


@dataclasses.dataclass
class Settings:
    # models and data
    teacher: str = option("demo", "folder, name on the Hugging Face Hub, demo, or none (training on the text alone)")
    data: str = option(None, "folder that data/prepare.py wrote (default: the docstring corpus, prepared once "
                        "in the folder $MINIDISTIL_CACHE or data/cache)")  # fmt: skip
    out: str = option(None, "output folder (default: runs/NAME, a new one each time)")
    # length
    steps: int = option(None, "updates; overrides --epochs")
    epochs: float = option(3.0, "passes over the corpus")
    batch: int = option(5, "sequences; batch * accum of them are a process's share of an update")
    accum: int = option(50, "factor of batch; the number of micro-batches unless --micro-batch changes it")
    micro_batch: str = option(None, "sequences per forward pass, a divisor of batch * accum; auto: as many as fit on a "
                               "GPU, a fast number on a CPU (default: auto on a GPU, --batch on a CPU); it changes an "
                               "update only by rounding, but see --dropout")  # fmt: skip
    seq_len: int = option(512, "tokens in a sequence, [CLS] and [SEP] of masked models included")
    # optimiser: AdamW with betas (0.9, 0.98), eps 1e-6, no weight decay
    lr: float = option(5e-4, "peak learning rate")
    warmup: float = option(0.05, "share of the updates in which the learning rate rises; then it falls linearly")
    clip: float = option(5.0, "maximum norm of the gradient")
    # objective
    temperature: float = option(2.0, "softens both distributions in the KL term")
    alpha_ce: float = option(5.0, "weight of tau^2 KL to the teacher's distribution")
    alpha_mlm: float = option(2.0, "weight of the cross-entropy of masked tokens, or of a GPT-2's next ones")
    alpha_cos: float = option(1.0, "weight of 1 - cosine between last hidden states")
    alpha_mse: float = option(0.0, "weight of the squared difference of logits")
    alpha_emb: float = option(0.0, "weight of the squared distance of sentence vectors of length 1; --data: sentences")
    kd_rows: str = option("all", "tokens on which the student learns the teacher's logits", choices=("all", "masked"))
    mask_share: float = option(0.15, "share of the tokens that are masked, in training; held-out text: 0.15")
    mask_smoothing: float = option(0.7, "prefer rare words for masking: weights count^-FLOAT; 0: uniform")
    # student
    student_layers: str = option(None, "teacher layers to copy: a number (6) or a list (0,2,4) (default: half)")
    student_width: int = option(None, "width of a narrower student, which starts from the teacher's leading directions")
    student_init: str = option(None, "initial weights: teacher, random, or a model (default: teacher if there is one)")
    student_config: str = option(None, "config.json of a student of another shape, with random weights")
    dropout: float = option(None, "dropout of the student, attention included (default: its config's); the same in any "
                            "micro-batch and on any number of ranks, on a GPU with exceptions: see README")  # fmt: skip
    # hardware
    dtype: str = option("auto", "precision of matrix products", choices=("auto", "fp32", "bf16", "fp16"))
    device: str = option("auto", "auto, cpu, cuda, cuda:1 ...")
    compile: bool = option(False, "compile both models first: takes a minute, for long runs")
    price_per_hour: float = option(None, "of one device: adds costs to progress lines, metrics.jsonl and run.json")
    watts: float = option(None, "power of one device, to estimate the energy of a run where it cannot be measured")
    grams_per_kwh: float = option(None, "CO2 of a kWh of your electricity: adds the CO2 of the run's energy")
    seed: int = option(0, "seed of data order, masks, dropout and random weights")
    # evaluation and checkpoints
    resume: bool = option(False, "continue from the checkpoint in --out, to the bits of an uninterrupted run")
    eval_every: int = option(0, "updates between held-out evaluations; 0: ten per run")
    eval_data: str = option(None, "corpus whose held-out part is evaluated (default: that of --data)")
    eval_tokens: int = option(32768, "maximum number of held-out tokens")
    save_every: float = option(10.0, "minutes between checkpoints")
    time_limit: float = option(None, "minutes after which the run saves, evaluates and ends; --resume continues it")


# The demo's changes to the published recipe, for a run of two minutes on two CPU cores: short sequences, small updates
# at a higher learning rate, uniform masks as in the evaluation, but twice as many, KL on masked tokens only. With so
# little text, the cosine term has more weight and the masked-LM term less (LOG.md).
DEMO = dict(
    steps=1000, batch=8, accum=1, seq_len=128, lr=1.2e-3, alpha_mlm=0.5, alpha_cos=10.0, mask_share=0.3,
    mask_smoothing=0.0, kd_rows="masked", eval_every=200,
)  # fmt: skip

# ---- models and data


def objective_of(settings):
    alphas = settings.alpha_ce, settings.alpha_mlm, settings.alpha_cos, settings.alpha_mse
    objective = Objective(*alphas, settings.temperature, settings.kd_rows, settings.alpha_emb)
    return objective.without_teacher() if settings.teacher == "none" else objective


def load_models(settings, objective, ranks):
    """Returns (teacher or None, its folder or None, student, tokenizer, folder of the tokenizer).

    Both models are fp32 on the CPU; the teacher is frozen. They have no head where the objective has nothing for it.
    """
    teacher = teacher_folder = init = None
    if settings.teacher != "none":
        teacher_folder = ranks.rank0_first(lambda: hub.resolve(settings.teacher, settings.alpha_emb > 0))
        kind = SentenceEncoder if objective.vectors_only else LanguageModel
        teacher = weights.load_model(teacher_folder, not objective.on_logits, kind).requires_grad_(False)
    if settings.student_init not in (None, "teacher", "random"):
        init = ranks.rank0_first(lambda: hub.resolve(settings.student_init))
    folder = teacher_folder or init or settings.data or hub.resolve("demo")
    tokenizer = Tokenizer.load(folder)
    if teacher and init and Tokenizer.load(init).digest != tokenizer.digest:
        raise UserError(f"{init} and {settings.teacher} have different vocabularies: they must agree word for word")
    shape = settings.student_layers, settings.student_config, settings.seed, settings.dropout
    student = build_student(teacher, init or settings.student_init, *shape, settings.student_width)
    if teacher and student.config.width != teacher.config.width:
        student.projection = Projection(teacher, student, objective.alpha_cos > 0, objective.alpha_emb > 0)
    check_family(teacher, student, settings)
    for role, model in (("teacher", teacher), ("student" if teacher else "model", student)):
        if model:
            score_words(role, model, tokenizer, ranks.print0)
    return teacher, teacher_folder, student, tokenizer, folder


def open_corpus(settings, tokenizer, tokenizer_folder):
    """Opens --data, or prepares (once) and opens the docstring corpus, tokenised with this tokenizer."""
    if settings.data:
        corpus = Corpus(settings.data)
    else:
        if settings.teacher != "demo":
            print(
                f"no --data: training on the docstring corpus with the vocabulary of {tokenizer_folder}; for the "
                "published result take Wikipedia + books: python data/prepare.py "
                f"wikipedia:enwiki-latest-pages-articles.xml.bz2 BOOKS_FOLDER --vocab {tokenizer_folder} "
                "--out data/wikibooks, then add --data data/wikibooks",
                flush=True,
            )
        from data.cached import docstring_corpus

        corpus = Corpus(docstring_corpus(tokenizer.digest, tokenizer_folder))
    corpus.check_tokenizer(tokenizer, tokenizer_folder)
    return corpus


def open_eval_corpus(settings, corpus, tokenizer, tokenizer_folder):
    if not settings.eval_data:
        return corpus
    eval_corpus = Corpus(settings.eval_data)
    eval_corpus.check_tokenizer(tokenizer, tokenizer_folder)
    return eval_corpus


def dropout_seed(seed, update):
    """Seed of an update's dropout, the same on all ranks and in all micro-batches."""
    return int(mix(seed, 6, update)[0] >> np.uint64(2))


# ---- the run


def train(settings):
    """Runs the distillation that `settings` describe; returns the summary that the last line prints.

    Raises UserError, and SystemExit(128 + signal) after an interrupted run is saved.
    """
    check_settings(settings)
    ranks = Distributed()
    device = choose_device(ranks.device(settings.device))
    ranks.join(device)
    stem = "scratch" if settings.teacher == "none" else pathlib.Path(settings.teacher).name or "student"
    with contextlib.ExitStack() as stack:
        folder = claimed(settings.out, stem, settings.resume, CHECKPOINT)
        out = ranks.broadcast(lambda: stack.enter_context(folder))
        return distil(settings, out, device, ranks)


def distil(settings, out, device, ranks):
    """Runs `settings` in the folder `out`; see `train`."""
    ranks.print0(f"loading models and text; output folder {out}")
    keep_freed_memory()

    # ---- models and data: update u uses sequences u * G ... (u + 1) * G - 1, split evenly over the ranks
    objective = objective_of(settings)
    teacher, teacher_folder, student, tokenizer, tokenizer_folder = load_models(settings, objective, ranks)
    pooling = read_pooling(teacher_folder) if objective.alpha_emb else None
    corpus = ranks.rank0_first(lambda: open_corpus(settings, tokenizer, tokenizer_folder))
    eval_corpus = open_eval_corpus(settings, corpus, tokenizer, tokenizer_folder)
    T, share, causal = settings.seq_len, settings.batch * settings.accum, student.config.causal
    G, masking = share * ranks.size, (settings.mask_smoothing, settings.mask_share)
    sequences = training_sequences(corpus, T, G, tokenizer, settings.seed, objective, causal, *masking)
    total = settings.steps or max(1, math.ceil(settings.epochs * sequences.per_epoch / G))
    batches = Prefetcher(lambda update: sequences.batch(update * G + ranks.rank * share, share), device)
    check_fit(objective, teacher, student, corpus, eval_corpus, sequences, G)
    check_sentences(objective, student, corpus, eval_corpus, pooling, settings.compile)

    # ---- optimiser (AdamW without weight decay, as published) and state of an earlier run
    student.to(device)
    if teacher:
        teacher.to(device)
    optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0, fused=True)
    identity = same_on_ranks(identity_of(settings, total, G, corpus, teacher_folder, student, pooling), ranks)
    run = Run(out, dataclasses.asdict(settings), identity, writes=ranks.first)
    state = run.resume(student, optimizer, settings.dtype) if settings.resume else State()
    how_to_resume = command("train.py", "--out", out, "--resume", launcher=ranks.launcher)
    if state.update == total and (summary := run.finished_summary(total)):
        ranks.print0(already_finished(summary))
        return summary if ranks.first else None
    if ranks.first:
        check_room(out, run.size(student))
    if not state.dtype:  # once: a resumed run keeps its dtype
        state.dtype, why = ranks.broadcast(lambda: choose_dtype(settings.dtype, device))
        ranks.print0(f"matrix products in {state.dtype}{why and f': {why}'}")
    # the teacher is evaluated in fp32 here, before Distiller casts it
    evaluated = eval_corpus, T, settings.eval_tokens, tokenizer, objective, causal, teacher, pooling, device
    held_out = open_held_out(*evaluated) if ranks.first else None
    distiller = Distiller(objective, teacher, student, state.dtype, device, ranks, pooling)
    distiller.scaler.load_state_dict(state.scale or distiller.scaler.state_dict())
    wanted = settings.micro_batch, settings.batch
    B = choose_micro_batch(*wanted, share, sequences, state, distiller, optimizer, batches, settings.compile)
    distiller.distribute()

    progress, stop = Progress(total, round(G * sequences.mean_length), state.update, state.seconds), SignalFlag()
    meter = Meter(device, settings.watts, state.energy if ranks.first else (), ranks.print0)
    report = RunReport(run, progress, distiller, state, sequences, ranks)
    run.open(state.update if settings.resume else None, [eval_corpus.meta["sha256"]["val.bin"], settings.eval_tokens])
    report.begin(corpus, share // B, B, held_out)

    def evaluate():
        if ranks.first:
            with progress.paused():
                metrics = held_out.evaluate(student)
            report.evaluated(metrics)

    def save():
        with progress.paused():
            state.update, state.seconds, state.scale = progress.update, progress.seconds, distiller.scaler.state_dict()
            run.save(student, optimizer, state)
        progress.reset("save")

    def after_micro_batch(done, A):  # returns whether to continue: a signal ends a single-process run at once
        report.micro_batch_done(done, A)
        return stop.signal is None or ranks.size > 1

    if not settings.resume:
        save()
    if not run.evaluation:
        evaluate()
    eval_every = settings.eval_every or max(1, total // 10)
    limit = math.inf if settings.time_limit is None else settings.time_limit * 60
    progress.restart(progress.seconds)
    with stop, run.metrics, meter, ranks.report_lost_rank(f"resume from the last checkpoint with: {how_to_resume}"):
        signals = timed_out = False
        while not (progress.done or signals or timed_out):
            update = progress.update
            lr = lr_at(update, total, settings.lr, settings.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # gradient of the update, summed over micro-batches and ranks; each loss is a share of one mean
            batch = batches(update)  # ids and labels (share, T), and of sentences the mask of padding
            denominators = Denominators(*map(int, ranks.sum(*counts(*batch))), G)
            terms = distiller.accumulate(batch, B, denominators, dropout_seed(settings.seed, update), after_micro_batch)
            if terms is None:
                break  # the unfinished update does not count: the resumed run repeats it, with the same bits
            norm = distiller.clip(optimizer, settings.clip)
            numbers = torch.cat([*terms, norm[None]]).cpu()  # in one process, all that waits for the device
            terms, norm = numbers[:-1].view(-1, 1 + len(TERMS)), numbers[-1]  # loss and terms of each micro-batch

            # every rank gets the same losses, a signal to any rank, and rank 0's clock, so that all end together
            end = stop.signal or 0, ranks.first and progress.elapsed > limit
            sums = ranks.sum(*meter.energy, *end, *terms.sum(0).tolist())
            *state.energy, signals, timed_out, loss = sums[: -len(TERMS)]
            if not math.isfinite(loss) or not (norm.isfinite() or distiller.scaler.is_enabled()):
                raise UserError(not_finite(update, terms[:, 0], norm, B, share, ranks, out))
            distiller.step(optimizer)
            progress.update += 1

            report.updated(loss, dict(zip(TERMS, sums[-len(TERMS) :], strict=True)), lr, norm.item())
            if progress.update % eval_every == 0 or progress.done:
                evaluate()
            if progress.due("save", settings.save_every * 60):
                save()

        state.energy = ranks.sum(*meter.read())  # of the checkpoint, which knows nothing of what follows it
        interrupted = stop.signal or signals
        if progress.update > progress.first or interrupted:
            save()
        if ranks.first and not interrupted and "held_out" not in run.history[-1]:  # timed out between evaluations
            evaluate()
        ended_by = "signal" if interrupted else "completion" if progress.done else "time limit"
        state.energy = ranks.sum(*meter.read())
        distiller.leave()  # before rank 0 writes its results: no rank keeps a connection that others have closed
        summary = report.finish(tokenizer, ended_by, how_to_resume) if ranks.first else None
    if interrupted:
        raise SystemExit(128 + (stop.signal or signal.SIGTERM))
    return summary


def main(argv):
    values = parse_args(Settings, argv, __doc__)
    check_needs_teacher(values.get("teacher") != "none", values)
    begun = inherited(values["out"]) if values.keys() >= {"out", "resume"} else {}
    demo = DEMO if not begun and values.get("teacher", "demo") == "demo" else {}
    if "epochs" in values:
        demo = {name: value for name, value in demo.items() if name != "steps"}
    summary = train(Settings(**{**demo, **begun, **values}))
    if summary:  # on rank 0 only
        print(json.dumps(summary, separators=(",", ":")))


if __name__ == "__main__":
    run_script(main, in_ranks=True)
