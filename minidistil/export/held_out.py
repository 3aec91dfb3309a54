"""The items on which an exported model is compared with ours: held-out text, or a task's dev set with its score.

An item is (ids, types) as in downstream/batches.py. A model of words has a label per token, masked or next; its score
is the share of them that it predicts first. Other models have a score on a task only.
"""

import dataclasses
import pathlib
import re
import typing

import numpy as np

from kernels import IGNORE
from minidistil import hub
from minidistil.data import MASK_SHARE, Corpus, Sequences
from minidistil.downstream import glue, metrics
from minidistil.downstream.batches import encode_pair
from minidistil.downstream.distil import label_order
from minidistil.downstream.tasks import SEQ_LEN, check_model, open_task, outline
from minidistil.errors import UserError
from minidistil.export.graphs import Labels, MaskedWords, NextTokens, Spans, Vectors
from minidistil.masking import Masking
from minidistil.sentences import Sentences
from minidistil.text import EVAL_SEED

LENGTH = 64  # tokens of an item of text, at most


@dataclasses.dataclass
class HeldOut:
    """Items, in words what they are, labels per item or None, and rows (gate.py) -> score in percent, or None."""

    what: str
    items: list
    labels: list | None = None
    score: typing.Callable | None = None


def public(source):
    """Returns the name of a source of text without the folders of this computer, which a file for others leaves out."""
    on_hub = source.startswith("hf:") and re.fullmatch(hub.NAME, source.split(":")[1], re.ASCII)
    return source if on_hub else pathlib.PurePath(source).name or source


def of_words(graph):
    """Whether a Graph predicts words."""
    return isinstance(graph, MaskedWords | NextTokens)


def _length(graph, most=LENGTH):
    """Returns how many tokens of an item a Graph is given, at most; a batch is padded to a multiple of 8."""
    return min(most, graph.config.positions // 8 * 8)


def from_corpus(folder, graph, tokenizer, owner, n, name=None):
    """Returns HeldOut of the first n sequences or sentences that a folder of data/prepare.py holds out; `name` it has.

    Packed sequences are cut to different lengths, so that batches have padding.
    """
    corpus, T = Corpus(folder), _length(graph)
    corpus.check_tokenizer(tokenizer, owner)
    causal = isinstance(graph, NextTokens)
    if corpus.prefix is None:
        val = Sequences(corpus.val, T, tokenizer, EVAL_SEED, causal=causal)
    elif causal:
        raise UserError(f"{folder} is a corpus of sentences, and a {graph.config.family} reads whole texts: give those")
    else:
        val = Sentences(corpus.val, corpus.val_ends, T, 1, tokenizer, EVAL_SEED, (None, 0.0, MASK_SHARE))
    if not val.per_epoch:
        raise UserError(f"{folder} holds out no sequence of {T} tokens: use more text")
    ids, labels, *mask = val.batch(0, min(n, val.per_epoch))
    if mask:
        lengths = mask[0].sum(1)
    else:
        lengths = T - 7 * np.arange(len(ids)) % (T // 2)
        if not causal:
            ends = np.arange(len(ids)), lengths - 1
            ids[ends], labels[ends] = tokenizer.sep_id, IGNORE
    kind = "sentences" if mask else "sequences"
    return _of_rows(f"{len(ids):,} held-out {kind} of {name or public(str(folder))}", graph, ids, labels, lengths)


def from_texts(what, texts, graph, tokenizer):
    """Returns HeldOut of texts, one item each; `what` says in words what they are."""
    T = _length(graph)
    if isinstance(graph, NextTokens):
        rows = [[tokenizer.sep_id, *tokenizer.encode(text)][: T + 1] for text in texts]
        rows = [row for row in rows if len(row) > 1]
    else:
        prefix = graph.pooling.prompt if isinstance(graph, Vectors) else ""
        rows = [encode_pair(tokenizer, prefix + text, None, T)[0] for text in texts]
        rows = [row for row in rows if len(row) > 2]
    if not rows:
        raise UserError(f"{what}: no text in them: give a file or folder with some")
    what, causal = f"{len(rows):,} {what}", isinstance(graph, NextTokens)
    lengths = np.array([len(row) - causal for row in rows])
    ids = np.full((len(rows), max(map(len, rows))), tokenizer.sep_id, np.int64)
    for place, row in zip(ids, rows, strict=True):
        place[: len(row)] = row
    if causal:
        return _of_rows(what, graph, ids[:, :-1], ids[:, 1:], lengths)
    if not isinstance(graph, MaskedWords):
        return _of_rows(what, graph, ids, np.full_like(ids, IGNORE), lengths)
    wanted = np.maximum(np.rint(MASK_SHARE * lengths), 1).astype(np.int64)
    masked, labels = Masking(tokenizer, EVAL_SEED)(ids, np.arange(len(ids), dtype=np.uint64), wanted)
    return _of_rows(what, graph, masked, labels, lengths)


def _of_rows(what, graph, ids, labels, lengths):
    """Returns HeldOut of rows (n, T), of which the first `lengths` tokens count; models of no words get no masks."""
    if not of_words(graph):
        ids = np.where(labels == IGNORE, ids, labels)
    items = [(row[:length], np.zeros(length, np.int64)) for row, length in zip(ids, lengths, strict=True)]
    if not of_words(graph):
        return HeldOut(what, items)
    labels = [row[:length] for row, length in zip(labels, lengths, strict=True)]
    targets = np.concatenate([row[row != IGNORE] for row in labels])
    return HeldOut(what, items, labels, lambda rows: 100 * float((np.concatenate(rows) == targets).mean()))


def from_task(name, data, folder, graph, tokenizer):
    """Returns HeldOut of a task's dev set, with its official score; of sentence vectors, STS-B's without training."""
    if name not in (*glue.TASKS, "squad"):
        raise UserError(f"--task {name} is not known: choose from {', '.join(glue.TASKS)}, squad")
    task = outline(name)
    if isinstance(graph, Vectors) and name == "stsb":
        return _similarity(data, graph, tokenizer)
    if not isinstance(graph, Labels | Spans) or not isinstance(graph.model, task.kind):
        way = "--task stsb alone is for sentence vectors" if isinstance(graph, Vectors) else "leave it out"
        raise UserError(f"{folder} does not do --task {name} (it is for {graph.kind}): {way}")
    order = label_order(folder, graph.labels, task) if isinstance(graph, Labels) else None
    check_model(folder, graph.config, tokenizer, task)
    longest = _length(graph, SEQ_LEN.get(name, 128))
    task = open_task(name, data, tokenizer, longest, limit=1)  # the training set is not used
    splits = np.cumsum([len(split) for split in task.dev])[:-1]

    def score(rows):
        rows = rows if order is None else [row[order] for row in rows]
        parts = np.split(np.arange(len(rows)), splits)
        return task.evaluate([[rows[i] for i in part] for part in parts])["score"]

    items = [item for split in task.dev for item in split]
    return HeldOut(f"{name}'s dev set, {len(items):,} items", items, score=score)


def _similarity(data, graph, tokenizer):
    """STS-B's dev set: the correlation (Spearman, percent) of the cosine of two sentences' vectors with their score."""
    examples = glue.load("stsb", data)[1]["dev"]
    T = _length(graph, graph.pooling.max_length or graph.config.positions)
    texts = [graph.pooling.prompt + text for pair in examples for text in pair[:2]]
    items = [encode_pair(tokenizer, text, None, T) for text in texts]

    def score(rows):
        vectors = np.stack(rows)
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return 100 * metrics.spearman((vectors[::2] * vectors[1::2]).sum(1), [each.label for each in examples])

    return HeldOut(f"STS-B's dev set, {len(examples):,} pairs", items, score=score)
