"""One update of the published recipe: the original script's way against ours, and the phases of ours.

On a GPU: a teacher of BERT-base's shape, a student with 6 of its layers, T = 512 and 128, bf16. On a CPU the shapes at
which the original script was measured: a 4 x 256 teacher, a student with half its layers, the real vocabulary size, 5
micro-batches of 8 x 128 tokens, fp32. Ours splits the same update into micro-batches of its own choice. Weights are
random, which costs the same time as trained ones.
"""

import contextlib
import dataclasses
import json
import pathlib
import random
import sys
import tempfile
import time
from unittest import mock

import torch
import torch.nn.functional as F

import train
from benches import Common, script
from benches.measure import spread
from benches.report import attempt, measured, speed_up
from data.prepare import prepare
from kernels import cosine, dropout, layer_norm, linear_distill_kl
from minidistil import distiller, plot, weights
from minidistil.cli import option
from minidistil.data import IGNORE, Corpus, Prefetcher, Sequences
from minidistil.device import choose_device, peak_mib
from minidistil.losses import Objective
from minidistil.model import Config, LanguageModel
from minidistil.precision import precision
from minidistil.progress import estimate_cost, peak_tflops, training_flops_per_token
from minidistil.run import read_metrics
from minidistil.student import student_from_teacher, student_layers
from minidistil.tokenizer import Tokenizer
from minidistil.tokenizers.wordpiece import WordPiece
from minidistil.tokenizers.wordpiece_files import SPECIAL_TOKENS

STEP = dict(
    layers=4, width=256, heads=4, mlp_width=1024, vocab_size=30522, T=128, batch=8, accum=5, updates=12, padding=6
)  # fmt: skip
TINY_STEP = STEP | dict(width=32, heads=2, mlp_width=64, vocab_size=500, T=32, batch=2, updates=2, padding=2)
BERT_STEP = STEP | dict(layers=12, width=768, heads=12, mlp_width=3072)
# tokens in an update: 122,880, about the default of 128,000
GPU_STEPS = [BERT_STEP | dict(T=512, batch=5, accum=48), BERT_STEP | dict(T=128, batch=20, accum=48)]

# settings of train.py, and whether our kernels are used; without a GPU there are none
OURS = {"ours, all rows": (dict(kd_rows="all"), True), "ours, masked rows": (dict(kd_rows="masked"), True)}
OURS_ON_GPU = {
    "ours, all rows, no kernels": (dict(kd_rows="all"), False),
    "ours, all rows, compiled": (dict(kd_rows="all", compile=True), True),
}


def vocabulary(size):
    return [*SPECIAL_TOKENS.values(), *(f"w{i}" for i in range(size - len(SPECIAL_TOKENS)))]


def make_teacher(folder, shape, seed=0):
    """Writes a random teacher."""
    config = {k: shape[k] for k in ("vocab_size", "layers", "width", "heads", "mlp_width")}
    weights.save_model(folder, LanguageModel(Config(**config), seed=seed))
    WordPiece(vocabulary(shape["vocab_size"]), max_length=512).save(folder, "bert")


def make_corpus(folder, shape, words=400_000, seed=0):
    """Writes a corpus of random words with Zipf frequencies, in the teacher's vocabulary."""
    vocab = vocabulary(shape["vocab_size"])
    regular = vocab[len(SPECIAL_TOKENS) :]
    drawn = random.Random(seed).choices(regular, [1 / (i + 10) for i in range(len(regular))], k=words)
    with tempfile.TemporaryDirectory() as scratch:
        text = pathlib.Path(scratch) / "text.txt"
        text.write_text("\n".join(" ".join(drawn[i : i + 200]) for i in range(0, words, 200)))
        WordPiece(vocab, max_length=512).save(pathlib.Path(scratch), "bert")
        prepare([str(text)], scratch, folder, val_share=0.05, progress=False)


def make_world(folder, shape, words=400_000, seed=0):
    make_teacher(folder / "teacher", shape, seed)
    make_corpus(folder / "corpus", shape, words, seed)


def train_here(folder, shape, device, flags, out):
    """Runs train.py's `train` in this process, in micro-batches that fit and are fast; returns its summary."""
    with contextlib.redirect_stdout(sys.stderr):  # the caller prints the last line of stdout
        return train.train(train.Settings(
            teacher=f"{folder}/teacher", data=f"{folder}/corpus", seq_len=shape["T"], batch=shape["batch"],
            accum=shape["accum"], steps=shape["updates"] + 1, eval_tokens=1024, eval_every=1000, save_every=1000.0,
            device=device, out=out, **{"micro_batch": "auto", **flags},
        ))  # fmt: skip


@contextlib.contextmanager
def without_kernels():
    """A context in which PyTorch replaces our kernels."""
    with contextlib.ExitStack() as stack:
        for module in (cosine, dropout, layer_norm, linear_distill_kl):
            stack.enter_context(mock.patch.object(module, "on_triton", lambda x: False))
        yield


def ours(folder, shape, device, flags, kernels=True):
    """Returns train.py's own tokens/s from the second update on, peak memory, and each update's loss."""
    serving = contextlib.nullcontext() if kernels else without_kernels()
    with serving, tempfile.TemporaryDirectory(dir=folder) as out:
        summary = train_here(folder, shape, device, flags, out)
        records = read_metrics(pathlib.Path(out) / "metrics.jsonl")
        dtype = json.loads((pathlib.Path(out) / "run.json").read_text(encoding="utf-8"))["dtype"]
    # the rate after k updates is k over the time they took: the first warms up, as in `original`
    updates = [r for r in records if "loss" in r]
    first, last = updates[0], updates[-1]
    took = [r["step"] / r["tokens_per_second"] for r in (first, last)]
    peak = summary["peak_gpu_mib"] or summary["peak_rss_mib"]
    speed = (last["step"] - first["step"]) / (took[1] - took[0])
    return {"tokens_per_second": speed, "peak_mib": peak, "dtype": dtype, "losses": [r["loss"] for r in updates]}


@without_kernels()
def original(folder, shape, device):
    """The same update as in the original script, in plain PyTorch; returns tokens/s and peak memory.

    After huggingface/transformers-research-projects, distillation/distiller.py: padded batches with an attention mask,
    logits of every position from both models, rows taken out by masked_select, KLDivLoss + CrossEntropyLoss +
    CosineEmbeddingLoss, a mean per micro-batch, several host reads a step, PyTorch's default AdamW; autocast to bf16 on
    a GPU, fp32 on a CPU. As fast as that script's own step on transformers' models, within 5 % (LOG.md).
    """
    folder, device = pathlib.Path(folder), torch.device(device)
    dtype = "bf16" if device.type == "cuda" else "fp32"
    autocast, _ = precision(dtype, device)
    tokenizer = Tokenizer.load(folder / "teacher")
    corpus = Corpus(folder / "corpus")
    sequences = Sequences(corpus.train, shape["T"], tokenizer, 0, corpus.counts, 0.7, shuffle=True)
    teacher = weights.load_model(folder / "teacher").eval()
    student = student_from_teacher(teacher, student_layers(teacher.config.layers)).train().to(device)
    teacher.to(device)
    optimizer = torch.optim.AdamW(student.parameters(), 5e-4, (0.9, 0.98), eps=1e-6)
    G, tau, n, start = shape["batch"] * shape["accum"], 2.0, 0, time.perf_counter()
    for update in range(shape["updates"] + 1):
        if update == 1:  # the first warms up
            start = time.perf_counter()
        ids, labels = map(torch.from_numpy, sequences.batch(update * G, G))
        for x, y in zip(ids.split(shape["batch"]), labels.split(shape["batch"]), strict=True):
            # the original groups by length, so its batches are nearly full: 122 to 128 of 128 tokens
            lengths = torch.randint(shape["T"] - shape["padding"], shape["T"] + 1, (len(x),))
            mask = torch.arange(shape["T"])[None] < lengths[:, None]  # (B, T)
            y = y.masked_fill(~mask, IGNORE)
            x, y, mask = x.to(device), y.to(device), mask.to(device)
            with autocast():
                h_s = student(x, mask)
                s = student.logits(h_s)  # (B, T, V)
                with torch.no_grad():
                    h_t = teacher(x, mask)
                    t = teacher.logits(h_t)
                rows = mask[..., None].expand_as(s)
                s_rows, t_rows = (torch.masked_select(z, rows).view(-1, s.size(-1)) for z in (s, t))  # (N, V)
                divergence = torch.nn.KLDivLoss(reduction="batchmean")
                kl = divergence(F.log_softmax(s_rows / tau, dim=-1), F.softmax(t_rows / tau, dim=-1)) * tau**2
                ce = torch.nn.CrossEntropyLoss(ignore_index=IGNORE)(s.view(-1, s.size(-1)), y.flatten())
                wide = mask[..., None].expand_as(h_s)
                c_s, c_t = (torch.masked_select(h, wide).view(-1, h.size(-1)) for h in (h_s, h_t))
                cos = torch.nn.CosineEmbeddingLoss()(c_s, c_t, c_s.new_ones(len(c_s)))
                loss = 5.0 * kl + 2.0 * ce + cos
            logged = [x.item() for x in (loss, kl, ce, cos)]
            (loss / shape["accum"]).backward()
            n += int(mask.sum()) if update else 0
        torch.nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    peak = round(peak_mib(device), 1)
    return {"tokens_per_second": n / seconds, "peak_mib": peak, "dtype": dtype, "loss": logged[0]}


PHASES = ("data", "teacher", "student forward", "loss", "backward", "optimiser")


class Stopwatch:
    """Measures the seconds of train.py's phases, one function each, in all updates but the first.

    The loss computes its gradient with its value, so `backward` is that of the student's body; `data` is the time that
    the loop waits for data. On a GPU each phase is synchronised, so their sum exceeds the time of a normal update.
    """

    def __init__(self, updates):
        self.seconds, self.left = dict.fromkeys(PHASES, 0.0), updates
        self.updates = updates - 1  # that are measured

    def watch(self, owner, name, phase):
        """Wraps a function or method to measure its time; `phase` may be a function of the first argument."""
        function = getattr(owner, name)

        def watched(*args, **options):
            start = self.now()
            result = function(*args, **options)
            if 0 < self.left <= self.updates:  # excludes the first update and evaluation
                self.seconds[phase if isinstance(phase, str) else phase(args[0])] += self.now() - start
            self.left -= owner is torch.optim.AdamW
            return result

        setattr(owner, name, watched)

    def now(self):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()


def phases(folder, shape, device, flags):
    """Runs train.py's `train` in this process; returns milliseconds an update of each phase."""
    watch = Stopwatch(shape["updates"] + 1)
    watch.watch(Prefetcher, "__call__", "data")
    watch.watch(LanguageModel, "forward", lambda model: "student forward" if model.training else "teacher")
    watch.watch(distiller, "distillation_loss", "loss")
    watch.watch(torch.Tensor, "backward", "backward")
    watch.watch(torch.nn.utils, "clip_grad_norm_", "optimiser")
    watch.watch(torch.optim.AdamW, "step", "optimiser")
    with tempfile.TemporaryDirectory(dir=folder) as out:
        train_here(folder, shape, device, flags, out)
    return {phase: 1000 * seconds / watch.updates for phase, seconds in watch.seconds.items()}


def table(results):
    """Markdown: medians, and the speed-up over the original's way."""
    lines = ["| | products in | tokens/s | speed-up | peak memory, MiB |", "|---|---|---|---|---|"]
    for r in results:
        if "error" in r:
            lines.append(f"| {r['provider']} | | {r['error']} | | |")
            continue
        ratio = f"{r['speed_up']:.1f}x" if r["speed_up"] else ""
        dtype, speed = r.get("dtype", "fp32"), r["tokens_per_second"][1]
        lines.append(f"| {r['provider']} | {dtype} | {speed:,.0f} | {ratio} | {r['peak_mib']:,.0f} |")
    return "\n".join(lines)


def draw(path, results):
    """Bars of tokens/s, by length; beside them the phases of our updates, end to end."""
    speeds, rows = {}, measured(results)
    for r in rows:
        length = f"T = {r['shape']['T']}"
        speeds.setdefault(r["provider"].removesuffix(f", {length}"), {})[length] = r["tokens_per_second"]
    phases = {r["provider"].replace(", ", ",\n", 1): r["phases"] for r in rows if "phases" in r}
    speed = plot.bars("speed, median, p20 to p80", "tokens/s", speeds)
    plot.draw(path, speed, plot.stacks("phases of an update", "ms", phases), widths=(2, 3))


@dataclasses.dataclass
class Settings(Common):
    device: str = option("auto", "auto, cpu, cuda, cuda:1 ...")
    rounds: int = option(None, "measurements of each provider, interleaved (default: 3; on a GPU 1)")


def alone(function, *arguments):
    """Calls a function of this module in a new process, so that its peak memory can be measured."""
    call = f"step.{function}(*map(json.loads, sys.argv[1:]))"
    program = f"import json, sys; from benches import step; print(json.dumps({call}))"
    return script("-c", program, *map(json.dumps, arguments))


def summarise(row, runs, kd_rows, shape, peak):
    """Puts speed, memory and the share of the hardware's peak (TFLOP/s, or None) of the runs so far into a row."""
    teacher = Config(**{k: shape[k] for k in ("vocab_size", "layers", "width", "heads", "mlp_width")})
    student = teacher.student(teacher.layers // 2)
    speeds = spread([m["tokens_per_second"] for m in runs])
    flops = training_flops_per_token(Objective(kd_rows=kd_rows), teacher, student, shape["T"])
    figures = estimate_cost(0, speeds[1], flops, peak, 1)
    row |= {
        "tokens_per_second": [round(x, 1) for x in speeds], "peak_mib": max(m["peak_mib"] for m in runs),
        "dtype": runs[-1]["dtype"],
        **{k: figures[k] for k in ("tflops_per_second", "utilisation", "published_device_hours")},
    }  # fmt: skip


def bench_shape(shape, device, rounds, words, suffix=""):
    """Yields a row a provider, again with each of its runs, in turn; then the phases of ours, in runs of their own."""
    providers = OURS | (OURS_ON_GPU if device.type == "cuda" else {})
    peak = peak_tflops(device, "bf16")
    with tempfile.TemporaryDirectory() as folder:
        world = folder, shape, str(device)
        make_world(pathlib.Path(folder), shape, words)
        calls = {"original's way": ("original", *world)}
        calls |= {provider: ("ours", *world, *how) for provider, how in providers.items()}
        rows = {name: {"case": "step", "provider": name + suffix, "shape": shape} for name in calls}
        first, runs = rows["original's way"], {name: [] for name in calls}
        for _ in range(rounds):
            for name, how in calls.items():
                row = rows[name]
                with attempt(row):
                    runs[name].append(alone(*how))
                    kd_rows = providers[name][0]["kd_rows"] if name in providers else "all"
                    summarise(row, runs[name], kd_rows, shape, peak)
                    row["speed_up"] = speed_up(row, first, "tokens_per_second")
                    speed = runs[name][-1]["tokens_per_second"]
                    print(f"T = {shape['T']}, {name}: {speed:,.0f} tokens/s", file=sys.stderr, flush=True)
                yield row
        for name in OURS:
            with attempt(rows[name]):
                took = alone("phases", *world, OURS[name][0])
                rows[name]["phases"] = {phase: round(ms, 1) for phase, ms in took.items()}
            yield rows[name]


def bench(settings):
    """Measures both lengths on a GPU, and on a CPU the shapes at which the original was measured."""
    device, tiny = choose_device(settings.device), settings.tiny
    shapes = [TINY_STEP] if tiny else GPU_STEPS if device.type == "cuda" else [STEP]
    rounds = settings.rounds or (1 if device.type == "cuda" or tiny else 3)
    words = 40_000 if tiny else 400_000 if device.type == "cpu" else 2_000_000
    for shape in shapes:
        yield from bench_shape(shape, device, rounds, words, f", T = {shape['T']}" if len(shapes) > 1 else "")
