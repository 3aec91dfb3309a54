"""SQuAD v1.1: questions whose answer is a span of a given text (Rajpurkar et al. 2016, arXiv 1606.05250).

    [CLS] question [SEP] context [SEP]        types 0 ... 0 1 ... 1

A context too long for the model is read through overlapping windows (Devlin et al. 2018, section 4.2 and its code). The
model gives each token a score as the answer's start and as its end; the best pairs over all windows of a question are
its n-best list. A token in several windows may start an answer only in the one that shows most of its surroundings.

Tokens know their characters in the context, so that an answer is cut from the original text, capitals and accents
included. Exact match and F1 forgive case, punctuation, articles and spaces, and count the best of the given answers.
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
    """What the model reads at once: `length` tokens at most. Of n context tokens, the k-th is ids[first + k]."""

    ids: list
    types: list  # 0 up to the first [SEP], then 1
    first: int
    starts: list  # n places in the context: token k is written at context[starts[k] : ends[k]]
    ends: list
    best: list  # n bools: this window, no other, shows the token with most context around it
    span: tuple  # (start, end) of the first answer in ids, end included; (0, 0), which is [CLS], where it does not fit


# ---- the files


def read(path):
    """Returns the Questions of a JSON file in SQuAD v1.1's form. Raises UserError where it is anything else."""
    path = pathlib.Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
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
    """record[key], which must be of that kind."""
    value = record.get(key) if isinstance(record, dict) else None
    if type(value) is not kind:  # isinstance would take True for an int
        kinds = {list: "a list", str: "text", int: "a whole number"}
        raise UserError(f"{where} lacks {key!r}, {kinds[kind]}: use a file in SQuAD v1.1's form")
    return value


def load(data):
    """Returns (train, dev), lists of Questions, from the folder of the official files or from one file of that form.

    One file is split by article, so that dev asks about unseen texts: about one article in five, chosen by its title's
    SHA-256, is dev. Raises UserError.
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


# ---- from a question to windows, and from logits to an answer


def windows(question, tokenizer, length=384, stride=128, longest_question=64):
    """Returns the Windows of a question: `length` tokens at most, the context walks on by `stride` tokens.

    A question is cut at `longest_question` tokens. The span is the shortest that covers the answer. Raises UserError
    where a window has no room or the context has no tokens.
    """
    if length < longest_question + 4 or stride < 1:
        raise UserError(
            f"windows of {length} tokens, {stride} apart, cannot show a context after {longest_question} tokens of "
            f"question: use {longest_question + 4} tokens and a stride of 1, or more"
        )
    asked = tokenizer.encode(question.question)[:longest_question]
    ids, starts, ends = tokenizer.encode_with_offsets(question.context)
    if not ids:
        raise UserError(f"question {question.id!r}: its context has no tokens: remove the question")
    first = len(asked) + 2
    room = length - first - 1
    step = min(stride, room)
    parts = [(begin, min(begin + room, len(ids))) for begin in range(0, max(len(ids) - room, 0) + step, step)]

    token = np.arange(len(ids))
    context = []  # of each token in each window, by Google's measure; the small term prefers the longer window
    for begin, end in parts:
        poorer_side = np.minimum(token - begin, end - 1 - token)  # negative outside the window
        context.append(np.where(poorer_side < 0, -1, poorer_side + 0.01 * (end - begin)))
    best = np.argmax(context, axis=0)  # the first of equals

    text, character = question.answers[0]
    start = bisect.bisect_right(ends, character)
    last = bisect.bisect_left(starts, character + len(text)) - 1
    return [
        Window(
            ids=[tokenizer.cls_id, *asked, tokenizer.sep_id, *ids[begin:end], tokenizer.sep_id],
            types=[0] * first + [1] * (end - begin + 1),
            first=first,
            starts=starts[begin:end],
            ends=ends[begin:end],
            best=(best[begin:end] == w).tolist(),
            span=(first + start - begin, first + last - begin) if begin <= start <= last < end else (0, 0),
        )
        for w, (begin, end) in enumerate(parts)
    ]


def answer(question, windows, start_logits, end_logits, n_best=20, longest=30):
    """Returns the n-best list of a question: [(text, score)], best first, no text twice, never empty.

    windows: all of the question; logits: for each window one array over its ids, or longer where they were padded.
    Pairs the n_best starts and ends of each window; an answer has `longest` tokens at most. score: the sum of logits.
    """
    found = []  # (score, start, end), in characters
    for window, start, end in zip(windows, start_logits, end_logits, strict=True):
        place = slice(window.first, window.first + len(window.starts))
        start, end = (np.asarray(logits, np.float64)[place] for logits in (start, end))
        starts = _highest(np.where(window.best, start, -np.inf), n_best)
        ends = _highest(end, n_best)
        found += [
            (start[i] + end[j], window.starts[i], window.ends[j])
            for i in starts
            for j in ends
            if window.best[i] and i <= j < i + longest
        ]
    if not found:  # no end was near a start: the best single token
        return answer(question, windows, start_logits, end_logits, max(len(w.ids) for w in windows), 1)[:1]
    texts = {}
    for score, start, end in sorted(found, key=lambda span: -span[0]):
        texts.setdefault(question.context[start:end], float(score))
    return list(texts.items())[:n_best]


def _highest(logits, n):
    """The places of the n highest logits, highest first."""
    return np.argsort(-logits, kind="stable")[:n].tolist()


# ---- the official score


def normalise(text):
    """Returns text in lower case without ASCII punctuation, articles and superfluous spaces."""
    text = text.lower().translate(dict.fromkeys(map(ord, string.punctuation)))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def metrics(predictions, questions):
    """Returns {"em", "f1"} in percent of all questions; predictions: question id -> text, none counts 0."""
    em = f1 = 0
    for question in questions:
        if question.id in predictions:
            truths = [normalise(text) for text, _ in question.answers]
            predicted = normalise(predictions[question.id])
            em += predicted in truths
            f1 += max(_f1(predicted.split(), truth.split()) for truth in truths)
    return {"em": 100 * em / len(questions), "f1": 100 * f1 / len(questions)}


def _f1(predicted, truth):
    """2 / (1 / precision + 1 / recall) of two lists of words; 0 where both are empty, as in v1.1's script."""
    same = (collections.Counter(predicted) & collections.Counter(truth)).total()
    return 2 * same / (len(predicted) + len(truth)) if same else 0.0
