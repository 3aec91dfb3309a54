"""One update of the published recipe, scaled to a CPU: the original script's way against ours, and where ours goes.

The shapes are those at which the original script was measured: a 4 x 256 teacher, half of it as the student, the real
vocabulary's size, 8 sequences of 128 tokens in each of 5 micro-batches.
"""

import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn.functional as F

from benches.process import ROOT, last_line
from minidistil import weights
from minidistil.data import IGNORE, Corpus, Sequences
from minidistil.measure import spread
from minidistil.memory import peak_rss_mib
from minidistil.metrics import read_metrics
from minidistil.model import Config, MaskedLM
from minidistil.plot import bar_chart
from minidistil.tokenizer import SPECIAL_TOKENS, Tokenizer

STEP = dict(
    layers=4, width=256, heads=4, mlp_width=1024, vocab_size=30522, T=128, batch=8, accum=5, updates=12, padding=6
)  # fmt: skip
TINY_STEP = STEP | dict(width=32, heads=2, mlp_width=64, vocab_size=500, T=32, batch=2, updates=2, padding=2)


def make_world(folder, shape, words=400_000, seed=0):
    """Writes a random teacher and a corpus of random words, as frequent as words are (Zipf), that it can read."""
    from data.prepare import prepare

    rng = random.Random(seed)
    vocab = [*SPECIAL_TOKENS.values(), *(f"w{i}" for i in range(shape["vocab_size"] - 5))]
    shape = {k: shape[k] for k in ("vocab_size", "layers", "width", "heads", "mlp_width")}
    weights.save_model(folder / "teacher", MaskedLM(Config(positions=128, **shape), seed=seed))
    Tokenizer(vocab, max_length=128).save(folder / "teacher", "bert")
    frequencies = [1 / (i + 10) for i in range(len(vocab) - 5)]
    drawn = rng.choices(vocab[5:], frequencies, k=words)
    (folder / "text.txt").write_text("\n".join(" ".join(drawn[i : i + 200]) for i in range(0, words, 200)))
    prepare([str(folder / "text.txt")], folder / "teacher", folder / "corpus", val_share=0.05, progress=False)


def ours(folder, shape, kd_rows):
    """Runs train.py itself; returns its own tokens/s from the second update on, and peak memory."""
    command = [sys.executable, ROOT / "train.py", "--teacher", folder / "teacher", "--data", folder / "corpus"]
    command += ["--seq-len", shape["T"], "--batch", shape["batch"], "--accum", shape["accum"]]
    command += ["--steps", shape["updates"] + 1, "--kd-rows", kd_rows]
    command += ["--eval-tokens", 1024, "--eval-every", 1000, "--save-every", 1000, "--device", "cpu"]
    with tempfile.TemporaryDirectory(dir=folder) as out:
        summary = last_line(subprocess.run([*map(str, command), "--out", out], capture_output=True, text=True))
        records = read_metrics(pathlib.Path(out) / "metrics.jsonl")
    # the rate after k updates is k over the time they took: the first warms up, as in `original`
    first, *_, last = (r for r in records if "loss" in r)
    took = [r["step"] / r["tokens_per_second"] for r in (first, last)]
    return summary | {"tokens_per_second": (last["step"] - first["step"]) / (took[1] - took[0])}


def original(folder, shape):
    """The same update the way the original script writes it, in plain PyTorch; returns tokens/s and peak memory.

    After huggingface/transformers-research-projects, distillation/distiller.py: padded batches with an attention mask,
    logits of every position from both models, rows taken out by masked_select, KLDivLoss + CrossEntropyLoss +
    CosineEmbeddingLoss, a mean per micro-batch, several host reads a step, AdamW without fusion, fp32.
    """
    folder = pathlib.Path(folder)
    tokenizer = Tokenizer.load(folder / "teacher")
    corpus = Corpus(folder / "corpus")
    sequences = Sequences(corpus.train, shape["T"], tokenizer, 0, corpus.counts, 0.7, shuffle=True)
    teacher = weights.load_model(folder / "teacher").eval()
    student = weights.student_from_teacher(teacher, weights.student_layers(teacher.config.layers)).train()
    optimizer = torch.optim.AdamW(student.parameters(), 5e-4, (0.9, 0.98), eps=1e-6, fused=False, foreach=False)
    G, tau, n, start = shape["batch"] * shape["accum"], 2.0, 0, time.perf_counter()
    for update in range(shape["updates"] + 1):
        if update == 1:  # the first warms up
            start = time.perf_counter()
        ids, labels = map(torch.from_numpy, sequences.take(update * G, G))
        for x, y in zip(ids.split(shape["batch"]), labels.split(shape["batch"]), strict=True):
            # grouped by size, its batches are all but full: 122 to 128 of 128 tokens
            lengths = torch.randint(shape["T"] - shape["padding"], shape["T"] + 1, (len(x),))
            mask = torch.arange(shape["T"])[None] < lengths[:, None]  # (B, T)
            y = y.masked_fill(~mask, IGNORE)
            h_s = student(x, mask)
            s = student.logits(h_s)  # (B, T, V)
            with torch.no_grad():
                h_t = teacher(x, mask)
                t = teacher.logits(h_t)
            rows = mask[..., None].expand_as(s)
            s_rows, t_rows = (torch.masked_select(z, rows).view(-1, s.size(-1)) for z in (s, t))  # (N, V)
            kl = torch.nn.KLDivLoss(reduction="batchmean")(
                F.log_softmax(s_rows / tau, dim=-1), F.softmax(t_rows / tau, dim=-1)
            ) * tau**2
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
    return {"tokens_per_second": n / seconds, "peak_rss_mib": peak_rss_mib(), "loss": logged[0]}


# ---- where an update of ours goes

PHASES = ("data", "teacher", "student forward", "loss", "backward", "optimiser")


class Stopwatch:
    """Seconds of train.py's phases, by a watch around each function that is one; the first update is not counted.

    The loss computes its gradient with its value, so that `backward` is that of the student's body. On a GPU the
    device is waited for around each phase: the sum is then more than an update that is not watched takes.
    """

    def __init__(self):
        self.seconds, self.inside, self.updates = dict.fromkeys(PHASES, 0.0), False, 0

    def watch(self, owner, name, phase):
        """Replaces a function or method by one that counts its time; `phase` may be chosen by the first argument."""
        function = getattr(owner, name)

        def watched(*args, **options):
            key = phase if isinstance(phase, str) else phase(args[0])
            if key == "data":  # an update begins here; evaluations, which come between updates, do not count
                self.inside, self.updates = self.updates > 0, self.updates + 1
            if not self.inside:
                return function(*args, **options)
            start = self.now()
            result = function(*args, **options)
            self.seconds[key] += self.now() - start
            if owner is torch.optim.AdamW:
                self.inside = False
            return result

        setattr(owner, name, watched)

    def now(self):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()


def phases(folder, shape, kd_rows):
    """Runs train.py's `train` in this process; returns milliseconds an update of each phase."""
    import train

    watch = Stopwatch()
    watch.watch(Sequences, "take", lambda sequences: "data" if sequences.shuffle else "held-out")
    watch.watch(MaskedLM, "forward", lambda model: "student forward" if model.training else "teacher")
    watch.watch(train, "distillation_loss", "loss")
    watch.watch(torch.Tensor, "backward", "backward")
    watch.watch(torch.nn.utils, "clip_grad_norm_", "optimiser")
    watch.watch(torch.optim.AdamW, "step", "optimiser")
    with tempfile.TemporaryDirectory(dir=folder) as out:
        train.train(train.Settings(
            teacher=f"{folder}/teacher", data=f"{folder}/corpus", seq_len=shape["T"], batch=shape["batch"],
            accum=shape["accum"], steps=shape["updates"] + 1, kd_rows=kd_rows, eval_tokens=1024, eval_every=1000,
            save_every=1000.0, device="cpu", out=out,
        ))  # fmt: skip
    return {phase: 1000 * seconds / (watch.updates - 1) for phase, seconds in watch.seconds.items()}


def draw_step(path, results):
    """Bars of the phases of our updates, each as a share of the whole."""
    bars = []
    for r in results:
        whole = sum(r.get("phases", {}).values())
        bars += [(f"{r['provider']}: {phase}, {ms:,.0f} ms", ms / whole) for phase, ms in r.get("phases", {}).items()]
    bar_chart(path, "an update's phases, as shares of their sum", bars)


# ---- all of it


def alone(function, *arguments):
    """Calls a function of this module in a process of its own, so that its peak memory is its own."""
    call = f"step.{function}(*map(json.loads, sys.argv[1:]))"
    program = f"import json, sys; from benches import step; print(json.dumps({call}))"
    command = [sys.executable, "-c", program, *map(json.dumps, arguments)]
    return last_line(subprocess.run(command, capture_output=True, text=True, cwd=ROOT))


def bench_step(settings):
    """Tokens/s and peak memory of each provider, in turn; then the phases of ours, in runs of their own."""
    shape, rows = TINY_STEP if settings.tiny else STEP, {"ours, all rows": "all", "ours, masked rows": "masked"}
    measured = {"original's way": [], **{provider: [] for provider in rows}}
    with tempfile.TemporaryDirectory() as folder:
        make_world(pathlib.Path(folder), shape, 40_000 if settings.tiny else 400_000)
        for _ in range(settings.rounds or 3):
            measured["original's way"].append(alone("original", folder, shape))
            for provider, kd_rows in rows.items():
                measured[provider].append(ours(pathlib.Path(folder), shape, kd_rows))
        took = {provider: alone("phases", folder, shape, kd_rows) for provider, kd_rows in rows.items()}
    results = []
    for provider, runs in measured.items():
        results.append({
            "case": "step", "provider": provider, "shape": shape,
            "tokens_per_second": [round(x, 1) for x in spread([m["tokens_per_second"] for m in runs])],
            "peak_mib": max(m["peak_rss_mib"] for m in runs),
        })  # fmt: skip
        if provider in took:
            results[-1]["phases"] = {phase: round(ms, 1) for phase, ms in took[provider].items()}
    base = results[0]["tokens_per_second"][1]
    for result in results:
        result["speed_up"] = round(result["tokens_per_second"][1] / base, 2)
    return results
