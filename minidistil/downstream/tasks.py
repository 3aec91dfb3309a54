"""The tasks of fine-tuning: encoded items, targets, and the official score of a model's logits.

`SentenceTask` is a task of GLUE, IMDb or a table of one's own; `SpanTask` is SQuAD v1.1. Both have

    name, labels            name of the task and of its labels; a regression has one
    train = (items, targets) targets (n,) int64, (n,) fp32 of a regression, (n, 2) int64 first and last token of a span
    unlabelled               other items of the training set, for a teacher to label
    others                   of how many examples these are
    dev = [items, ...]       one per held-out split
    teacher                  () or two lists with an array per training item: see `distil.ensemble`
    length(item)             tokens of the longest sequence in an item
    evaluate(logits)         logits of `dev`, per split, from `predict` -> {"score", official metrics}
"""

import hashlib
import pathlib
import typing

import numpy as np
import torch

from minidistil.downstream import glue, metrics, squad, table
from minidistil.downstream.batches import encode_apart, encode_pair, padded_length
from minidistil.downstream.heads import Classifier, SpanReader, VectorClassifier
from minidistil.errors import UserError
from minidistil.rng import mix

SEQ_LEN = {"imdb": 512, "squad": 384}  # tokens; 128 elsewhere, as published for GLUE


class Outline(typing.NamedTuple):
    """What is known of a task without its data; it decides whether a model fits the task."""

    name: str
    kind: type  # of its model
    labels: tuple
    pair: bool  # of texts, the second of which has token type 1


def outline(name, own=None, vectors=False):
    """Returns the Outline of the task of this name, or of one's own labels, as `table.read_table` returns them.

    `vectors`: whether sentence vectors are classified.
    """
    if name == "squad" and not own:
        return Outline(name, SpanTask.kind, SpanTask.labels, pair=True)
    task = own[0] if own else glue.TASKS[name]
    return Outline(name, VectorClassifier if vectors else Classifier, task.labels or ("score",), task.pair)


def check_model(role, config, tokenizer, task, words_only=False):
    """Raises UserError for a causal model, and where one lacks the second token type that a task of pairs needs.

    A VectorClassifier has no pairs in a sequence. `words_only`: nor has a BiLSTM, which takes nothing but the words.
    """
    words_only |= task.kind is VectorClassifier
    if config.causal:
        raise UserError(f"{role} is a {config.family}, which is not fine-tuned here: use a BERT or RoBERTa")
    if task.pair and not words_only and not config.has_type(tokenizer.second_type):
        what = f"{role} has one token type (type_vocab_size 1), {task.name} needs two for its pairs of texts"
        raise UserError(f"{what}: use a model that has two, or a --task of single texts")


def check_positions(role, config, task):
    """Raises UserError where an item of a task (with its data) is longer than a model reads."""
    longest = max(task.length(item) for items in (task.train[0], task.unlabelled, *task.dev) for item in items)
    if padded_length(longest) > config.positions:
        most = config.positions // 8 * 8
        raise UserError(f"{role} has {config.positions} positions: use --seq-len {most} or less")


def subsample(examples, limit, more=0):
    """Returns two fixed random subsets, each in order: `limit` of the examples, and `more` of the others.

    All where there are no more; `limit` None: all examples, and none.
    """
    order = np.argsort(mix(0, 9, np.arange(len(examples))), kind="stable")
    limit = len(examples) if limit is None else limit
    return [[examples[i] for i in np.sort(part)] for part in (order[:limit], order[limit : limit + more])]


def digest(task):
    """SHA-256 of a task's encoded training data: it must not change when a run resumes."""
    items, targets = task.train
    state = hashlib.sha256(np.ascontiguousarray(targets.numpy()).tobytes())
    for ids, types in (*items, *task.unlabelled):
        state.update(np.array([len(ids), *ids, *types], np.uint32).tobytes())
    return state.hexdigest()


def compact(item):
    """Returns an item as arrays: lists of Python integers take ten times the memory, gigabytes for MNLI or SQuAD."""
    ids, types = item
    return np.array(ids, np.int32), np.array(types, np.int8)


class SentenceTask:
    """A glue.Task with its training Examples and {split: Examples}.

    `limit`: number of training examples; `unlabelled`: number of the others whose texts a teacher labels.
    With a `prefix`, which may be "", texts are encoded one by one, each after it, for a VectorClassifier. A model
    learns the scores of one's own regression as (score - shift) / scale, of mean 0 and variance 1, which any learning
    rate reaches; STS-B's are learnt as they are, as published.
    """

    teacher = ()

    def __init__(self, task, train, examples, tokenizer, T, limit=None, unlabelled=0, prefix=None):
        self.name, self.task, self.examples = task.name, task, examples
        self.kind = Classifier if prefix is None else VectorClassifier
        self.labels = self.task.labels or ("score",)
        self.regression = not self.task.labels
        train, others = subsample(train, limit, unlabelled)
        scores = np.array([e.label for e in train], np.float64)
        own = self.regression and task is not glue.TASKS["stsb"]
        self.shift, self.scale = (float(scores.mean()), float(scores.std()) or 1.0) if own else (0.0, 1.0)

        def item(example):
            if prefix is None:
                return encode_pair(tokenizer, example.first, example.second, T)
            return encode_apart(tokenizer, *(None if text is None else prefix + text for text in example[:2]), T)

        def items(examples):
            return [compact(item(example)) for example in examples]

        dtype = torch.float32 if self.regression else torch.int64
        self.train = items(train), torch.from_numpy((scores - self.shift) / self.scale).to(dtype)
        self.unlabelled, self.others = items(others), len(others)
        self.dev = [items(examples) for examples in self.examples.values()]

    def length(self, item):
        """Returns how many tokens of an item the encoder reads in a sequence."""
        return len(item[0]) if self.kind is Classifier else int(np.bincount(item[1]).max())

    def evaluate(self, logits):
        per_split = {}
        for (split, examples), rows in zip(self.examples.items(), logits, strict=True):
            rows = np.stack(rows)
            guesses = rows[:, 0] if self.regression else rows.argmax(1)
            truth = np.array([e.label for e in examples])
            per_split[split] = {m: float(metrics.METRICS[m](guesses, truth)) for m in self.task.metrics}
        result = {"score": glue.score(self.task, per_split)}
        for split, shares in per_split.items():
            where = "" if len(per_split) == 1 else f"_{split}"
            result |= {f"{m}{where}": 100 * x for m, x in shares.items()}  # in percent, as published
        return result


class SpanTask:
    """SQuAD v1.1: a question may have several windows; `limit` and `unlabelled` count training questions."""

    kind, name, labels, regression, teacher = SpanReader, "squad", (), False, ()

    def __init__(self, data, tokenizer, T, limit=None, unlabelled=0):
        train, self.questions = squad.load(data)
        train, others = subsample(train, limit, unlabelled)

        def encoded(questions):  # published: windows of 384 tokens with a stride of 128; questions of at most 64
            windows = (w for q in questions for w in squad.windows(q, tokenizer, T, T // 3))
            return [(compact((w.ids, w.types)), w.span) for w in windows]

        items, spans = zip(*encoded(train), strict=True)
        self.train = items, torch.tensor(spans)
        self.unlabelled, self.others = [item for item, _ in encoded(others)], len(others)
        self.windows = [squad.windows(q, tokenizer, T, T // 3) for q in self.questions]
        self.dev = [[compact((w.ids, w.types)) for group in self.windows for w in group]]

    def length(self, item):
        return len(item[0])

    def evaluate(self, logits):
        rows, answers = iter(logits[0]), {}
        for question, windows in zip(self.questions, self.windows, strict=True):
            starts, ends = zip(*(next(rows) for _ in windows), strict=True)
            answers[question.id] = squad.answer(question, windows, starts, ends)[0][0]
        scores = squad.metrics(answers, self.questions)
        return {"score": scores["f1"], **scores}


def open_task(name, data, tokenizer, seq_len=None, limit=None, unlabelled=0, own=None, prefix=None):
    """Returns the SentenceTask or SpanTask of this name, encoded: read from `data`, or `own`, a table read before.

    `limit` and `unlabelled` count its training examples and its other texts.
    `prefix`: None, or what stands before each sentence whose vector is classified.
    """
    T = seq_len or SEQ_LEN.get(name, 128)
    if name == "squad" and not own:
        return SpanTask(data, tokenizer, T, limit, unlabelled)
    return SentenceTask(*(own or (glue.TASKS[name], *glue.load(name, data))), tokenizer, T, limit, unlabelled, prefix)


def task_names(text, data):
    """Returns the task names of --task; for `all`, those in the GLUE folder; of a table, the file's name."""
    if table.is_table(text):
        return [table.name_of(text)]
    if data is None:
        raise UserError("--data is missing: give the GLUE folder, or the folder or file of the task")
    if text == "all":
        here = [name for name in glue.GLUE if (pathlib.Path(data) / glue.TASKS[name].folder).is_dir()]
        if not here:
            raise UserError(f"{data} holds no task of GLUE (CoLA, SST-2 ...): give the official folder")
        if absent := [name for name in glue.GLUE if name not in here]:
            print(f"not in {data}, and not in the macro score: {', '.join(absent)}", flush=True)
        return here
    names = text.split(",")
    for name in names:
        if name not in (*glue.TASKS, "squad"):
            raise UserError(f"--task {name} is not known: choose from {', '.join(glue.TASKS)}, squad, all, or a file")
    return names


def describe(task, augment, unlabelled):
    """Returns one line about a task with its data, of which so many copies and unlabelled texts were asked for."""
    items = task.train[0]
    mean_length = sum(len(ids) for ids, _ in items) / len(items)
    copies = f" and {augment} augmented copies of each" if augment else ""
    if unlabelled:
        fewer = ", all that there are" if task.others < unlabelled else ""
        copies += f" and {len(task.unlabelled):,} unlabelled ones{fewer}"
    sizes = " + ".join(f"{len(split):,}" for split in task.dev)
    return f"{task.name}: {len(items):,} items of {mean_length:.0f} tokens{copies}, dev {sizes}"
