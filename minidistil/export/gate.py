"""Whether an exported model is as good as ours: both run on the same held-out items.

    largest, mean   difference of an output's numbers, at real tokens
    agreement       percent: of words, labels or spans, how often its first guess is ours; of a regression the
                    correlation, of vectors the mean cosine
    score           percent: of words, how many are predicted; of a task, its official metric
    loss            points of score that the export costs; without a score, what the agreement lacks of 100
    margin          of words, two standard errors of that: with little text, a loss shows by chance or not at all

Batches are padded, as those of a user are. A row is what is kept of an item: the guesses, logits or the vector.
"""

import dataclasses
import statistics
import time

import numpy as np
import torch

from kernels import IGNORE
from minidistil.downstream.batches import TOKENS, padded
from minidistil.evaluate import LOGIT_BYTES
from minidistil.export.graphs import Labels, Spans, Vectors
from minidistil.export.held_out import of_words
from minidistil.export.session import Session

CPU = torch.device("cpu")
EXACT = 1e-4  # difference that an fp32 file may have, of outputs up to 1; larger ones round in proportion
TIMED = 40  # items whose latency is measured
OURS = "ours, PyTorch"


@dataclasses.dataclass
class Quality:
    """Of one provider against ours; see above."""

    largest: float
    mean: float
    scale: float  # the largest absolute value among our outputs
    agreement: float
    before: float | None
    after: float | None
    margin: float = 0.0

    @property
    def loss(self):
        return 100 - self.agreement if self.before is None else self.before - self.after

    def within(self, most):
        """Whether the loss is no more than `most`, margin included."""
        return self.loss + self.margin <= most

    @property
    def exact(self):
        """Whether the difference is no more than rounding in fp32."""
        return self.largest <= EXACT * max(1.0, self.scale / 10)


def batches_of(held, graph):
    """Yields (indices, labels (B, T) or None, ids, mask, types), longest items first, until all have had their turn."""
    order = np.argsort([-len(ids) for ids, _ in held.items], kind="stable")
    per_token = 4 * graph.config.vocab_size if of_words(graph) else 1
    tokens, done = min(TOKENS["cpu"], max(1, LOGIT_BYTES // per_token)), 0
    while done < len(order):
        chosen = order[done : done + max(1, tokens // len(held.items[order[done]][0]))]
        done += len(chosen)
        ids, mask, types = padded(held.items, chosen, graph.config.pad_id, CPU)
        labels = None
        if held.labels is not None:
            labels = torch.full(ids.shape, IGNORE)
            for row, i in zip(labels, chosen, strict=True):
                row[: len(held.labels[i])] = torch.from_numpy(held.labels[i])
        yield chosen, labels, ids, mask, types


def rows_of(graph, outputs, mask, labels):
    """Returns what is kept of each item of a batch, a list of numpy arrays."""
    if of_words(graph):
        guesses = outputs[0].argmax(-1)
        return [guess[label != IGNORE].numpy() for guess, label in zip(guesses, labels, strict=True)]
    if isinstance(graph, Vectors):
        return list(graph.pooling(outputs[0], mask).numpy())
    if isinstance(graph, Spans):
        spans = torch.stack(outputs, 1)
        return [span[:, :n].numpy() for span, n in zip(spans, mask.sum(1).tolist(), strict=True)]
    return list(outputs[0].numpy())


def agreement(graph, ours, theirs):
    """Returns the agreement of two lists of rows, in percent."""
    if isinstance(graph, Vectors):
        a, b = (np.stack(rows) for rows in (ours, theirs))
        cosines = (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)
        return 100 * float(cosines.mean())
    if isinstance(graph, Labels) and len(ours[0]) == 1:
        a, b = (np.concatenate(rows).astype(np.float64) for rows in (ours, theirs))
        a, b = a - a.mean(), b - b.mean()
        return 100 * float((a * b).sum() / max(np.sqrt((a * a).sum() * (b * b).sum()), 1e-30))
    if of_words(graph):
        return 100 * float((np.concatenate(ours) == np.concatenate(theirs)).mean())
    same = [(a.argmax(-1) == b.argmax(-1)).all() for a, b in zip(ours, theirs, strict=True)]
    return 100 * float(np.mean(same))


def margin(held, ours, theirs):
    """Returns two standard errors, in points, of the difference of two scores of the same words."""
    targets = np.concatenate([row[row != IGNORE] for row in held.labels])
    ours, theirs = ((np.concatenate(rows) == targets).astype(np.float64) for rows in (ours, theirs))
    return 200 * float((ours - theirs).std()) / len(targets) ** 0.5


@torch.inference_mode()
def compare(graph, sessions, held):
    """Returns {name: Quality} of `sessions` {name: Session}, and our own rows are computed once."""
    n = len(held.items)
    ours, theirs = [None] * n, {name: [None] * n for name in sessions}
    largest, total, count, scale = dict.fromkeys(sessions, 0.0), dict.fromkeys(sessions, 0.0), 0, 0.0
    for chosen, labels, ids, mask, types in batches_of(held, graph):
        truth = graph.ours(ids, mask, types)

        def keep(rows, outputs, chosen=chosen, mask=mask, labels=labels):
            for i, row in zip(chosen, rows_of(graph, outputs, mask, labels), strict=True):
                rows[i] = row

        keep(ours, truth)
        real = [mask if each.ndim > 2 or isinstance(graph, Spans) else ... for each in truth]
        truth = [each[where] for each, where in zip(truth, real, strict=True)]
        count += sum(each.numel() for each in truth)
        scale = max(scale, *(each.abs().max().item() for each in truth))
        for name, session in sessions.items():
            outputs = session(ids, mask, types)
            keep(theirs[name], outputs)
            for a, b, where in zip(truth, outputs, real, strict=True):
                difference = (a - b[where]).abs()
                largest[name] = max(largest[name], difference.max().item())
                total[name] += difference.sum().item()
    score = held.score or (lambda rows: None)
    before, found = score(ours), {}
    for name, rows in theirs.items():
        same = agreement(graph, ours, rows)
        spread = margin(held, ours, rows) if of_words(graph) else 0.0
        found[name] = Quality(largest[name], total[name] / count, scale, same, before, score(rows), spread)
    return found


@torch.inference_mode()
def latency(graph, sessions, held, threads):
    """Returns {name: median ms} of one item at a time, OURS and `sessions` in turns, with so many threads each.

    A single thread's time is that in which it ran, so that other programs count for little.
    """
    step = max(1, len(held.items) // TIMED)
    inputs = [padded(held.items, [i], graph.config.pad_id, CPU) for i in range(0, len(held.items), step)][:TIMED]
    functions = {OURS: lambda ids, mask, types: graph.ours(ids, None, types), **sessions}
    before, times = torch.get_num_threads(), {name: [] for name in functions}
    clock = time.thread_time if threads == 1 else time.perf_counter
    torch.set_num_threads(threads)
    try:
        for ids, mask, types in inputs:
            n = int(mask.sum())
            ids, mask, types = ids[:, :n], mask[:, :n], types[:, :n]  # alone, an item needs no padding
            for name, function in functions.items():
                function(ids, mask, types)
                start = clock()
                function(ids, mask, types)
                times[name].append(1e3 * (clock() - start))
    finally:
        torch.set_num_threads(before)
    return {name: round(statistics.median(each), 3) for name, each in times.items()}


def measure(graph, data, held):
    """Returns ([row, ...], {name: Quality}) of ours and of the ONNX files in `data`, {name: bytes}.

    A row is JSON: provider, bytes (of ours, in fp32), ms {threads: median}, score, agreement, and differences.
    """
    qualities = compare(graph, {name: Session(each) for name, each in data.items()}, held)
    size = sum(4 * parameter.numel() for parameter in graph.parameters())
    rows = {OURS: {"provider": OURS, "bytes": size, "ms": {}, "score": next(iter(qualities.values())).before}}
    for name, quality in qualities.items():
        rows[name] = {
            "provider": name, "bytes": len(data[name]), "ms": {}, "score": quality.after,
            "agreement": round(quality.agreement, 3), "largest_difference": float(f"{quality.largest:.2e}"),
            "mean_difference": float(f"{quality.mean:.2e}"),
        }  # fmt: skip
    for threads in sorted({1, torch.get_num_threads()}):
        times = latency(graph, {name: Session(each, threads) for name, each in data.items()}, held, threads)
        for name, row in rows.items():
            row["ms"][str(threads)] = times[name]
    for row in rows.values():
        row["score"] = row["score"] if row["score"] is None else round(row["score"], 3)
    return list(rows.values()), qualities
