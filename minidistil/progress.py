"""Progress of a run: learning-rate schedule, clock, speed, remaining time, cost."""

import contextlib
import math
import re
import sys
import time

import torch

from minidistil.data import MASK_SHARE

PUBLISHED_TOKENS = 12.6e9  # of the released DistilBERT, computed: three passes over Wikipedia and books

# TFLOP/s of dense bf16 or fp16 matrix products with fp32 accumulation, from the vendors' data sheets (half of the
# values with sparsity); the first name whose words are among those of the device's name applies
PEAKS = [
    ("B200", 2250), ("GH200", 989), ("H200", 989), ("H100 PCIe", 756), ("H100 NVL", 835), ("H100", 989), ("A100", 312),
    ("L40S", 362), ("L40", 181), ("L4", 121), ("A10", 125), ("T4", 65), ("V100", 125), ("MI300X", 1307),
]  # fmt: skip


def lr_at(update, total, peak, warmup):
    """Learning rate of update 0 ... total - 1: linear warm-up to `peak` over the first `warmup` share, linear decay.

    No update has a learning rate of zero: warm-up starts one step above it, and the decay would reach it at `total`.
    """
    rising = min(math.ceil(total * warmup), total)
    if update < rising:
        return peak * (update + 1) / rising
    return peak * (total - update) / (total - rising + (rising > 0))


def duration(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


class Progress:
    """Counts `total` updates of `tokens` tokens, from `update`, after `seconds_before`; the speed excludes pauses."""

    def __init__(self, total, tokens=0, update=0, seconds_before=0.0):
        self.total, self.tokens, self.update, self.first = total, tokens, update, update
        self.line_every = 2.0 if sys.stdout.isatty() else 30.0  # seconds between lines of progress
        self.restart(seconds_before)

    def restart(self, seconds_before):
        """Starts the clock of training: time before it counts for the run, but not for the speed."""
        self.before = seconds_before
        self.began, self.paused_seconds, self.last = time.monotonic(), 0.0, {}

    @contextlib.contextmanager
    def paused(self):
        """Excludes the time within, such as evaluation, from the speed but not from the run."""
        start = time.monotonic()
        yield
        self.paused_seconds += time.monotonic() - start

    @property
    def elapsed(self):
        """Seconds since training began in this process."""
        return time.monotonic() - self.began

    @property
    def seconds(self):
        """Seconds of the whole run without interruptions."""
        return self.before + self.elapsed

    @property
    def updates_per_second(self):
        """Of this process, or of the run before it where it has done no update yet."""
        if self.update == self.first:
            return self.update / self.before if self.before else 0.0
        return (self.update - self.first) / max(self.elapsed - self.paused_seconds, 1e-9)

    @property
    def tokens_per_second(self):
        return self.updates_per_second * self.tokens

    @property
    def left(self):
        speed = self.updates_per_second
        return duration((self.total - self.update) / speed) if speed else "unknown time"

    @property
    def done(self):
        return self.update >= self.total

    def due(self, what, seconds):
        """Whether `what` is due: it last happened more than `seconds` ago. If so, records it as happening now."""
        if time.monotonic() - self.last.get(what, self.began) <= seconds:
            return False
        self.reset(what)
        return True

    def line_due(self):
        """Whether to print a line: often to a terminal, seldom to a file, always after the first and last update."""
        if self.due("line", self.line_every):
            return True
        if self.update in (self.first + 1, self.total):
            self.reset("line")
            return True
        return False

    def reset(self, what):
        self.last[what] = time.monotonic()


def flops_per_token(config, T, head_rows=1.0):
    """FLOPs per token of a forward pass on sequences of T, two per multiply-add; a backward pass costs twice as much.

    `head_rows` is the share of rows that are projected to the vocabulary (1.0 all, 0.15 masked only). Matrix products
    only: per block 4 C^2 (q, k, v, out) + 2 C F (MLP) + 2 T C (scores, and their product with v).
    """
    C, F_ = config.width, config.mlp_width
    body = config.layers * 2 * (4 * C * C + 2 * C * F_ + 2 * T * C)
    head = head_rows * 2 * C * ((0 if config.causal else C) + config.vocab_size)
    return body + head


def training_flops_per_token(objective, teacher, student, T, label_share=MASK_SHARE):
    """FLOPs per training token: forward and backward pass of the student (3 forward passes), forward of the teacher.

    `teacher` (or None) and `student` are Configs. Only rows that the objective scores count for the projection.
    """
    rows = 1.0 if objective.on_logits and objective.kd_rows == "all" else label_share
    rows = 0.0 if objective.vectors_only else rows
    flops = 3 * flops_per_token(student, T, rows)
    if teacher is not None and objective.needs_teacher:
        flops += flops_per_token(teacher, T, rows if objective.on_logits else 0.0)
    return flops


def peak_tflops(device, dtype):
    """Dense peak of a device for matrix products in bf16 or fp16, TFLOP/s; None where it is unknown."""
    if device.type != "cuda" or dtype == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS if re.search(rf"\b{part}\b", name)), None)


def estimate_cost(tokens, tokens_per_second, flops_per_token, peak, ranks, price_per_hour=None, watts=None):
    """Returns the estimated cost of a run of `tokens` tokens at this speed (of all ranks together).

    {"tflops_per_second" per rank, "utilisation" of `peak` TFLOP/s (None: unknown), "device_hours", "cost", "kwh", and
    "published_device_hours", "published_cost", "published_kwh" for the tokens of the published recipe}; without a
    price, costs are None, without `watts` of a device, kWh are, and so is everything but TFLOP/s without a speed.
    """
    tflops = tokens_per_second * flops_per_token / 1e12 / ranks
    estimate = {"tflops_per_second": round(tflops, 3), "utilisation": peak and round(tflops / peak, 4)}
    for name, n in (("", tokens), ("published_", PUBLISHED_TOKENS)):
        hours = n / tokens_per_second * ranks / 3600 if tokens_per_second else None
        estimate[f"{name}device_hours"] = hours and round(hours, 4)
        estimate[f"{name}cost"] = hours and (None if price_per_hour is None else round(hours * price_per_hour, 2))
        estimate[f"{name}kwh"] = hours and (None if watts is None else float(f"{hours * watts / 1000:.4g}"))
    return estimate
