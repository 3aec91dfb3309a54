"""SQuAD v1.1: questions whose answer is a span of a given text (Rajpurkar et al. 2016, arXiv 1606.05250).

    [CLS] question [SEP] context [SEP]        types 0 ... 0 1 ... 1

A long context is split into overlapping windows (Devlin et al. 2018, section 4.2 and its code). The model gives each
token a start score and an end score; the best pairs over all windows of a question are its n-best list. A token in
several windows may start an answer only in the window with the most context around it.

Each token has character offsets in the context, so an answer is a slice of the original text, with capitals and
accents. Exact match and F1 ignore case, punctuation, articles and spaces, and take the best of the reference answers.
"""

import bisect
import collections
import dataclasses
import hashlib
import json
import pathlib
import re
import string

import numpy as np

from minidistil.errors import UserError


@dataclasses.dataclass(frozen=True)
class Question:
    id: str
    title: str  # of the article that the context is from
    context: str
    question: str
    answers: tuple  # of (text, its first character in the context)


@dataclasses.dataclass
class Window:
    """One input of the model, at most `length` tokens; context token k of n is ids[first + k]."""

    ids: list
    types: list  # 0 up to the first [SEP], then 1
    first: int
    starts: list  # n character offsets: token k is context[starts[k] : ends[k]]
    ends: list
    best: list  # n bools: of all windows, this one has the most context around the token
    span: tuple  # (start, end) of the first answer in ids, end included; (0, 0), [CLS], where it is not in this window


def read(path):
    """Returns the Questions of a JSON file in SQuAD v1.1's format; raises UserError for anything else."""
    path = pathlib.Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig").rstrip("\0"))
    except (FileNotFoundError, NotADirectoryError):
        form = "a folder with train-v1.1.json and dev-v1.1.json, or one file in their form"
        raise UserError(f"there is no {path}: name {form}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): fetch it again") from None
    questions = {}
    for article in _get(data, "data", list, path):
        title = _get(article, "title", str, path)
        where = f"{path}, article {title!r}"
        for paragraph in _get(article, "paragraphs", list, where):
            context = _get(paragraph, "context", str, where)
            for qa in _get(paragraph, "qas", list, where):
                name = _get(qa, "id", str, where)
                if name in questions:
                    raise UserError(f"{path}, question {name!r} comes twice: remove one of them")
                questions[name] = _question(qa, name, title, context, f"{path}, question {name!r}")
    if not questions:
        raise UserError(f"{path} holds no question: fetch it again")
    return list(questions.values())


def _question(qa, name, title, context, where):
    if qa.get("is_impossible"):
        raise UserError(f"{where} cannot be answered, as SQuAD v2 allows: use SQuAD v1.1")
    answers = []
    for answer in _get(qa, "answers", list, where):
        text, start = _get(answer, "text", str, where), _get(answer, "answer_start", int, where)
        if not text or start < 0 or not context.startswith(text, start):
            raise UserError(f"{where}: answer_start {start} is not where {text!r} begins: fetch the file again")
        answers.append((text, start))
    if not answers:
        raise UserError(f"{where} has no answers: use SQuAD v1.1")
    return Question(name, title, context, _get(qa, "question", str, where), tuple(answers))


def _get(record, key, kind, where):
    """Returns record[key]; raises UserError where it is not of this type."""
    value = record.get(key) if isinstance(record, dict) else None
    if type(value) is not kind:  # isinstance would take True for an int
        kinds = {list: "a list", str: "text", int: "a whole number"}
        raise UserError(f"{where} lacks {key!r}, {kinds[kind]}: use a file in SQuAD v1.1's form")
    return value


def load(data):
    """Returns (train, dev), lists of Questions, from the folder of the official files or from one file in their format.

    Of a single file about one article in five, by the SHA-256 of its title, is dev, so that its texts are unseen.
    """
    data = pathlib.Path(data)
    if data.is_dir():
        return read(data / "train-v1.1.json"), read(data / "dev-v1.1.json")
    train, dev = [], []
    for question in read(data):
        digest = hashlib.sha256(question.title.encode("utf-8", "surrogatepass")).hexdigest()
        (train if int(digest, 16) % 5 else dev).append(question)
    if not train or not dev:
        raise UserError(f"{data} has too few articles to hold some out: add some, or name a folder with both files")
    return train, dev


def windows(question, tokenizer, length=384, stride=128, longest_question=64):
    """Returns the Windows of a question: at most `length` tokens each, their contexts `stride` tokens apart.

    A question is truncated to `longest_question` tokens. The span is the shortest that covers the answer. Raises
    UserError where a window is too short or the context has no tokens.
    """
    shortest = longest_question + 3 + tokenizer.pair_separators
    if length < shortest or stride < 1:
        what = f"windows of {length} tokens, {stride} apart, cannot show a context after {longest_question} tokens"
        raise UserError(f"{what} of question: use {shortest} tokens and a stride of 1, or more")
    asked = tokenizer.encode(question.question)[:longest_question]
    ids, starts, ends = tokenizer.encode_with_offsets(question.context)
    if not ids:
        raise UserError(f"question {question.id!r}: its context has no tokens: remove the question")
    asked = [tokenizer.cls_id, *asked, *[tokenizer.sep_id] * tokenizer.pair_separators]
    first = len(asked)
    room = length - first - 1
    step = min(stride, room)
    parts = [(begin, min(begin + room, len(ids))) for begin in range(0, max(len(ids) - room, 0) + step, step)]

    token = np.arange(len(ids))
    context = []  # of each token in each window, by Google's measure; the second term prefers longer windows
    for begin, end in parts:
        smaller_side = np.minimum(token - begin, end - 1 - token)  # negative outside the window
        context.append(np.where(smaller_side < 0, -1, smaller_side + 0.01 * (end - begin)))
    best = np.argmax(context, axis=0)  # ties: the first

    text, character = question.answers[0]
    start = bisect.bisect_right(ends, character)
    last = bisect.bisect_left(starts, character + len(text)) - 1
    return [
        Window(
            ids=[*asked, *ids[begin:end], tokenizer.sep_id],
            types=[0] * first + [tokenizer.second_type] * (end - begin + 1),
            first=first,
            starts=starts[begin:end],
            ends=ends[begin:end],
            best=(best[begin:end] == w).tolist(),
            span=(first + start - begin, first + last - begin) if begin <= start <= last < end else (0, 0),
        )
        for w, (begin, end) in enumerate(parts)
    ]


def answer(question, windows, start_logits, end_logits, n_best=20, longest=30):
    """Returns the n-best list of a question: [(text, score)], best first, without repeated texts, never empty.

    windows: all of the question; logits: one array per window over its ids, longer where they were padded. Pairs the
    n_best starts and ends of each window; an answer has at most `longest` tokens. score: the sum of both logits.
    """
    found = []  # (score, start, end), in characters
    for window, start, end in zip(windows, start_logits, end_logits, strict=True):
        part = slice(window.first, window.first + len(window.starts))
        start, end = (np.asarray(logits, np.float64)[part] for logits in (start, end))
        starts = _highest(np.where(window.best, start, -np.inf), n_best)
        ends = _highest(end, n_best)
        pairs = [(i, j) for i in starts if window.best[i] for j in ends if i <= j < i + longest]
        found += [(start[i] + end[j], window.starts[i], window.ends[j]) for i, j in pairs]
    if not found:  # no pair is short enough: the best single token
        return answer(question, windows, start_logits, end_logits, max(len(w.ids) for w in windows), 1)[:1]
    texts = {}
    for score, start, end in sorted(found, key=lambda span: -span[0]):
        texts.setdefault(question.context[start:end], float(score))
    return list(texts.items())[:n_best]


def _highest(logits, n):
    """Returns the indices of the n highest logits, highest first."""
    return np.argsort(-logits, kind="stable")[:n].tolist()


def normalise(text):
    """Returns text in lower case without ASCII punctuation, articles and superfluous spaces."""
    text = text.lower().translate(dict.fromkeys(map(ord, string.punctuation)))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def metrics(predictions, questions):
    """Returns {"em", "f1"} in percent of all questions; predictions: question id -> text, a missing one scores 0."""
    em = f1 = 0
    for question in questions:
        if question.id in predictions:
            truths = [normalise(text) for text, _ in question.answers]
            predicted = normalise(predictions[question.id])
            em += predicted in truths
            f1 += max(_f1(predicted.split(), truth.split()) for truth in truths)
    return {"em": 100 * em / len(questions), "f1": 100 * f1 / len(questions)}


def _f1(predicted, truth):
    """2 / (1 / precision + 1 / recall) of two lists of words; 0 where both are empty, as in the official script."""
    same = (collections.Counter(predicted) & collections.Counter(truth)).total()
    return 2 * same / (len(predicted) + len(truth)) if same else 0.0
