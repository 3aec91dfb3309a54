"""Windows against the characters of real questions, the n-best list against brute force, EM and F1 by hand."""

import bisect
import collections
import copy
import dataclasses
import hashlib
import json
import random

import numpy as np
import pytest

from minidistil.downstream import squad
from minidistil.downstream.squad import Question
from minidistil.errors import UserError
from minidistil.tokenizer import Tokenizer
from minidistil.tokenizers.wordpiece import WordPiece
from minidistil.tokenizers.wordpiece_files import SPECIAL_TOKENS

WORDS = WordPiece([*SPECIAL_TOKENS.values(), *(f"w{i}" for i in range(1000))])  # w7 is one token


def ask(context, *answers, question="w0"):
    return Question("q", "title", context, question, answers or ((context, 0),))


def words(*numbers):
    return " ".join(f"w{n}" for n in numbers)


# ---- the score


def test_em_and_f1_by_hand():
    table = [  # prediction, answers
        # eiffel tower = eiffel tower: EM 1, F1 1
        ("Eiffel  tower!", ["the Eiffel Tower"]),
        # paris in spring : in paris france share 2, precision 2/3, recall 2/3, F1 2/3
        #                 : paris shares 1, precision 1/3, recall 1, F1 1/2; the better counts; EM 0
        ("Paris in the spring", ["Paris", "in Paris, France"]),
        # the second of two answers: EM 1, F1 1
        ("Paris", ["in Paris, France", "Paris"]),
        # waterloo : 1815 share nothing: EM 0, F1 0
        ("Waterloo", ["1815"]),
        # very good good : very very good share one of each, precision 2/3, recall 2/3, F1 2/3 (as sets: 1)
        ("very good good", ["very very good"]),
        # both are nothing but an article: EM 1, F1 0, in v1.1's script
        ("The", ["a"]),
        # no prediction: EM 0, F1 0
        (None, ["42"]),
    ]
    questions = [Question(str(i), "", "", "", tuple((t, 0) for t in truths)) for i, (_, truths) in enumerate(table)]
    predictions = {str(i): text for i, (text, _) in enumerate(table) if text is not None}
    # EM: 1 + 0 + 1 + 0 + 0 + 1 + 0 of 7; F1: 1 + 2/3 + 1 + 0 + 2/3 + 0 + 0 = 10/3 of 7
    assert squad.metrics(predictions, questions) == pytest.approx({"em": 100 * 3 / 7, "f1": 100 * 10 / 21})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  cat,\tan ape and a\ndog.", "cat ape and dog"),
        ("theatre Anna a1", "theatre anna a1"),
        ("well-known", "wellknown"),
        ("A.N. Other", "other"),  # first without punctuation, then without articles
        ("a–b", "–b"),  # this dash is not ASCII punctuation, and ends a word
        ("$ 5 “x”", "5 “x”"),
    ],
)
def test_normalise(text, expected):
    assert squad.normalise(text) == expected


def test_score_of_transformers():
    # its squad_metrics.py, which is gone from version 5, gave these numbers in version 4.57.6
    draw = random.Random(0)
    parts = ["a", "an", "the", "The", "cat", "Cat's", "dog", "é", "42", "$", "–", "-", ".", ",", "“", "\u3000", "_"]
    texts = [
        "".join(draw.choice(parts) + draw.choice(["", " "]) for _ in range(draw.randrange(6))) for _ in range(8000)
    ]
    normal = "\n".join(map(squad.normalise, texts))
    assert (
        hashlib.sha256(normal.encode()).hexdigest()
        == "ae8ff5e36338aefa0f8ea29e4dbc1bf7dd2f8ad60e943eb8153d2648a75d9817"
    )
    # of an empty truth it says F1 1, as SQuAD v2 does
    pairs = [pair for pair in zip(texts[::2], texts[1::2], strict=True) if squad.normalise(pair[1])]
    questions = [dataclasses.replace(ask("", (truth, 0)), id=str(i)) for i, (_, truth) in enumerate(pairs)]
    found = squad.metrics({str(i): predicted for i, (predicted, _) in enumerate(pairs)}, questions)
    assert found == pytest.approx({"em": 1.6059537798668233, "f1": 5.297222688527041})


# ---- windows


def test_best_window_by_hand():
    # 4 of 7 tokens at a time, walking by 2: 0 1 2 3, 2 3 4 5, 4 5 6. On its poorer side token 2 has 1 neighbour in the
    # first and 0 in the second, token 3 0 and 1; token 4 has 1 in the second and 0 in the third, token 5 0 and 1
    question = ask(words(10, 11, 12, 13, 14, 15, 16), (words(13, 14), 12))
    found = squad.windows(question, WORDS, length=8, stride=2, longest_question=1)
    assert [WORDS.decode(window.ids) for window in found] == [
        f"[CLS] w0 [SEP] {words(*part)} [SEP]" for part in ((10, 11, 12, 13), (12, 13, 14, 15), (14, 15, 16))
    ]
    assert [window.best for window in found] == [[True] * 3 + [False], [False, True, True, False], [False, True, True]]
    assert [window.span for window in found] == [(0, 0), (4, 5), (0, 0)]  # only the second holds w13 w14
    assert [window.types for window in found] == [[0] * 3 + [1] * 5] * 2 + [[0] * 3 + [1] * 4]
    assert found[1].starts == [8, 12, 16, 20] and found[1].ends == [11, 15, 19, 23]
    assert {window.first for window in found} == {3}


def test_the_longer_window_is_preferred():
    # tokens 0-299 and 200-349: token 250 has 49 + 3.00 in the first and 50 + 1.50 in the second, token 251 48 + 3.00
    # and 51 + 1.50
    first, second = squad.windows(ask(words(*range(350))), WORDS, length=304, stride=200, longest_question=1)
    assert first.best == [True] * 251 + [False] * 49
    assert second.best == [False] * 51 + [True] * 99


@pytest.mark.parametrize(("length", "stride"), [(12, 1), (12, 3), (12, 5), (12, 100), (5, 1), (311, 128), (312, 1)])
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 10, 300])
def test_windows_cover_any_length(length, stride, tokens):
    longest = min(8, length - 4)
    question = ask(words(*range(tokens)), question=words(*range(20)))  # is cut
    found = squad.windows(question, WORDS, length, stride, longest)
    check_windows(question, WORDS, found, length, longest)
    assert max(len(window.ids) for window in found) == min(length, tokens + longest + 3)


def check_windows(question, tokenizer, found, length, longest_question):
    """Nothing is lost, nothing is too long, each token is best once, and spans are where the characters say."""
    asked = tokenizer.encode(question.question)[:longest_question]
    ids, starts, ends = tokenizer.encode_with_offsets(question.context)
    pieces, best = set(), collections.Counter()
    (text, begin), *_ = question.answers
    covering = [place for place in zip(starts, ends, strict=True) if place[1] > begin and place[0] < begin + len(text)]
    for window in found:
        places = list(zip(window.starts, window.ends, strict=True))
        assert len(window.ids) == len(window.types) <= length and places
        assert window.ids[: window.first] == [tokenizer.cls_id, *asked, tokenizer.sep_id]
        assert window.ids[-1] == tokenizer.sep_id and sum(window.types) == len(places) + 1
        assert window.types == sorted(window.types) and len(window.types) == window.first + len(places) + 1
        pieces |= set(zip(places, window.ids[window.first : -1], strict=True))
        best.update(place for place, is_best in zip(places, window.best, strict=True) if is_best)
        if set(covering) <= set(places):
            assert [place - window.first for place in window.span] == [places.index(covering[i]) for i in (0, -1)]
        else:
            assert window.span == (0, 0)
    assert pieces == set(zip(zip(starts, ends, strict=True), ids, strict=True))
    assert best == collections.Counter(zip(starts, ends, strict=True))


@pytest.mark.parametrize(
    ("context", "text", "covering"),
    [
        ("Le  CAFÉ de\u00a0Flore, est. 1887", "CAFÉ de\u00a0Flore", "CAFÉ de\u00a0Flore"),
        ("Le  CAFÉ de\u00a0Flore, est. 1887", ", est", ", est"),
        ("from 1887", "7", "1887"),  # inside a token
        ("a 한국 b", "한", "한국"),  # one [UNK]
        ("x \u200b y", "\u200b", None),  # no token: nowhere
        ("x \u200b", "\u200b", None),
    ],
)
def test_spans_by_hand(context, text, covering):
    tokenizer = WordPiece([*SPECIAL_TOKENS.values(), "cafe", "de", "flore", ",", "est"])
    (window,) = squad.windows(ask(context, (text, context.index(text))), tokenizer)
    start, end = (place - window.first for place in window.span)
    assert (context[window.starts[start] : window.ends[end]] if window.span != (0, 0) else None) == covering


def test_no_room_and_no_context():
    question = ask(words(*range(20)))
    assert squad.windows(question, WORDS, length=68, stride=1)
    for settings in ({"length": 67}, {"stride": 0}, {"longest_question": 400}):
        with pytest.raises(UserError, match="windows of [0-9]+ tokens.*: use"):
            squad.windows(question, WORDS, **settings)
    with pytest.raises(UserError, match="question 'q': its context has no tokens: "):
        squad.windows(ask(" \u200b "), WORDS)


# ---- answers


def brute_force(question, found, start_logits, end_logits, n_best, longest):
    """Every span of every window, the best score of each text."""
    texts = collections.defaultdict(lambda: -np.inf)
    for window, start, end in zip(found, start_logits, end_logits, strict=True):
        context = range(window.first, window.first + len(window.starts))
        allowed = [i for i in context if window.best[i - window.first]]
        for i in sorted(allowed, key=lambda i: start[i])[-n_best:]:
            for j in sorted(context, key=lambda j: end[j])[-n_best:]:
                if 0 <= j - i < longest:
                    text = question.context[window.starts[i - window.first] : window.ends[j - window.first]]
                    texts[text] = max(texts[text], float(start[i]) + float(end[j]))
    return sorted(texts.items(), key=lambda item: -item[1])[:n_best]


@pytest.mark.parametrize(("n_best", "longest"), [(20, 30), (5, 3), (3, 30), (100, 2), (100, 100)])
def test_n_best_is_brute_force(n_best, longest):
    rng = np.random.default_rng(1)
    for _ in range(20):
        # few different words: the same text comes from many places
        question = ask(words(*rng.integers(0, 4, size=rng.integers(20, 60))))
        found = squad.windows(question, WORDS, length=24, stride=7, longest_question=4)
        # as wide as a padded batch
        start, end = ([rng.normal(size=24).astype(np.float32) for _ in found] for _ in "se")
        expected = brute_force(question, found, start, end, n_best, longest)
        assert 0 < len(expected) <= n_best
        assert squad.answer(question, found, start, end, n_best, longest) == expected


def logits(window, place):
    result = np.zeros(len(window.ids), np.float32)
    result[place] = 9
    return result


def test_what_an_answer_may_not_be():
    question = ask(words(10, 11, 12, 13, 14, 15, 16))
    found = squad.windows(question, WORDS, length=8, stride=2, longest_question=1)  # as in the example by hand

    def best(places, **settings):  # (start, end) in each window's ids
        start, end = ([logits(w, place[i]) for w, place in zip(found, places, strict=True)] for i in (0, 1))
        return squad.answer(question, found, start, end, **settings)[0]

    assert best([(0, 0), (4, 5), (0, 0)]) == (words(13, 14), 18.0)
    assert best([(0, 0), (4, 5), (0, 0)], longest=1)[1] == 9.0  # two tokens are too long
    for places in [(0, 0), (1, 1), (2, 2), (-1, -1), (1, 5)]:  # [CLS], the question, [SEP]
        assert best([(0, 0), places, (0, 0)])[1] <= 9.0
    assert best([(0, 0), (3, 3), (0, 0)])[1] == 0.0  # w12 starts only where it is best, in the first window
    assert best([(0, 0), (5, 3), (0, 0)])[1] == 9.0  # ends before it starts
    assert best([(3, 3), (4, 3), (3, 3)], n_best=1) == ("w10", 18.0)


def test_an_answer_is_never_empty():
    question = ask(words(*range(10, 16)))
    (window,) = found = squad.windows(question, WORDS)
    start = np.zeros(len(window.ids))
    end = start.copy()
    start[window.first :][:6] = [0, 0, 5, 2, 0, 9]
    end[window.first :][:6] = [10, 0, 0, 9, 0, 0]
    assert squad.answer(question, found, [start], [end], n_best=1) == [("w13", 11.0)]
    assert squad.answer(question, found, [start], [end], n_best=6)[0] == ("w12 w13", 14.0)


# ---- real questions


@pytest.fixture(scope="module")
def real(assets):
    return squad.read(assets / "squad" / "mlqa-en-a.json")


def cut_inside_a_token(question, tokenizer):
    _, starts, ends = tokenizer.encode_with_offsets(question.context)
    ((text, begin),) = question.answers
    return begin not in starts or begin + len(text) not in ends


@pytest.mark.parametrize("kind", ["uncased", "cased"])
@pytest.mark.parametrize(("length", "stride", "longest_question"), [(384, 128, 64), (120, 50, 20)])
def test_spans_of_real_questions(assets, real, kind, length, stride, longest_question):
    tokenizer = Tokenizer.load(assets / "vocab" / f"bert-base-{kind}.txt")
    fitting, too_long, cut, predictions = [], [], [], {}
    for question in real:
        found = squad.windows(question, tokenizer, length, stride, longest_question)
        check_windows(question, tokenizer, found, length, longest_question)
        spans = {
            (window.starts[window.span[0] - window.first], window.ends[window.span[1] - window.first])
            for window in found
            if window.span != (0, 0)
        }
        if not any(window.span != (0, 0) and window.best[window.span[0] - window.first] for window in found):
            too_long.append(question)  # for every window, or for the one where it may start
            continue
        ((start, end),) = spans  # the same in each window
        ((text, begin),) = question.answers
        if cut_inside_a_token(question, tokenizer):
            cut.append(question.id)
            _, starts, ends = tokenizer.encode_with_offsets(question.context)
            assert start == starts[bisect.bisect_right(ends, begin)]  # the smallest that covers it
            assert end == ends[bisect.bisect_left(starts, begin + len(text)) - 1]
            assert text in question.context[start:end]
        else:
            fitting.append(question)
            assert question.context[start:end] == text
        # a perfect model answers in every window that holds the answer
        start_logits, end_logits = ([logits(w, w.span[i]) for w in found] for i in (0, 1))
        best = squad.answer(question, found, start_logits, end_logits, longest=length)
        assert best[0] == (question.context[start:end], 18.0)
        predictions[question.id] = best[0][0]
    # "orm" of "form" and "31.4" of "31.40"
    assert cut == ["6a636c91f7733165c92ed84864debf6bdbdf7d16", "320cc9b94d74eb11fd4bc12d347eb46058745e14"]
    assert len(too_long) == (1 if length == 120 and kind == "uncased" else 0)
    assert len(fitting) == len(real) - len(too_long) - len(cut)
    assert squad.metrics(predictions, fitting) == {"em": 100, "f1": 100}
    assert squad.metrics(predictions, real)["em"] == 100 * len(fitting) / len(real)


def test_one_file_is_split_by_article(assets, real, tmp_path):
    train, dev = squad.load(assets / "squad" / "mlqa-en-a.json")
    titles = [{question.title for question in part} for part in (train, dev)]
    assert not titles[0] & titles[1]
    assert sorted(train + dev, key=real.index) == real
    assert [*map(len, titles), len(train), len(dev)] == [214, 46, 557, 107]  # for ever: results depend on it
    data = json.loads((assets / "squad" / "mlqa-en-a.json").read_text())
    data["data"] = data["data"][::-2]
    (tmp_path / "half.json").write_text(json.dumps(data))
    again = squad.load(str(tmp_path / "half.json"))  # what other articles there are changes nothing
    assert set(again[0]) < set(train) and set(again[1]) < set(dev)


# ---- files


QA = {"id": "q1", "question": "What is Paris?", "answers": [{"text": "a city", "answer_start": 9}]}
DOCUMENT = {
    "version": "1.1",
    "data": [{"title": "Paris", "paragraphs": [{"context": "Paris is a city, a city.", "qas": [QA]}]}],
}


def write(path, document):
    path.write_text(json.dumps(document), encoding="utf-8")


def test_a_folder_of_the_official_files(tmp_path):
    write(tmp_path / "dev-v1.1.json", DOCUMENT)
    with pytest.raises(UserError, match="there is no .*train-v1.1.json: name a folder"):
        squad.load(tmp_path)
    two = copy.deepcopy(DOCUMENT)
    qas = two["data"][0]["paragraphs"][0]["qas"]
    answers = [{"text": "Paris", "answer_start": 0}, {"text": "a city", "answer_start": 17}]
    qas.append({"id": "q2", "question": "Où?", "answers": answers, "is_impossible": False})
    write(tmp_path / "train-v1.1.json", two)
    train, dev = squad.load(tmp_path)
    assert dev == [Question("q1", "Paris", "Paris is a city, a city.", "What is Paris?", (("a city", 9),))]
    assert train[0] == dev[0] and train[1].answers == (("Paris", 0), ("a city", 17))


def test_marks_line_ends_and_nulls_are_not_json(tmp_path):
    path = tmp_path / "questions.json"
    write(path, DOCUMENT)
    expected = squad.read(path)
    indented = json.dumps(DOCUMENT, indent=2).replace("\n", "\r\n")
    for text in ("\ufeff" + indented, indented + "\r\n\r\n", indented + "\r\n\0\0", "\ufeff" + indented + "\0"):
        path.write_bytes(text.encode())
        assert squad.read(path) == expected


def broken(change):
    """Writes DOCUMENT after `change(document, paragraph, question)`."""

    def write_broken(path):
        document = copy.deepcopy(DOCUMENT)
        paragraph = document["data"][0]["paragraphs"][0]
        change(document, paragraph, paragraph["qas"][0])
        write(path, document)

    return write_broken


BROKEN = {
    "absent": (lambda path: None, "there is no .*: name a folder with train-v1.1.json"),
    "not JSON": (lambda path: path.write_text("{"), "not valid JSON"),
    "not UTF-8": (lambda path: path.write_bytes(b'{"data": "\xff"}'), "not valid JSON"),
    "deep": (lambda path: path.write_text("[" * 100_000), "not valid JSON"),
    "a list": (lambda path: path.write_text("[]"), "lacks 'data', a list"),
    "no title": (broken(lambda d, p, q: d["data"][0].pop("title")), "lacks 'title', text"),
    "an odd article": (broken(lambda d, p, q: d["data"].append("x")), "lacks 'title', text"),
    "no paragraphs": (broken(lambda d, p, q: d["data"][0].pop("paragraphs")), "article 'Paris' lacks 'paragraphs'"),
    "no context": (broken(lambda d, p, q: p.update(context=None)), "article 'Paris' lacks 'context', text"),
    "no qas": (broken(lambda d, p, q: p.update(qas={})), "article 'Paris' lacks 'qas', a list"),
    "no id": (broken(lambda d, p, q: q.update(id=7)), "article 'Paris' lacks 'id', text"),
    "no question text": (broken(lambda d, p, q: q.pop("question")), "question 'q1' lacks 'question', text"),
    "no question": (broken(lambda d, p, q: p.update(qas=[])), "holds no question"),
    "no answers": (broken(lambda d, p, q: q.pop("answers")), "question 'q1' lacks 'answers', a list"),
    "zero answers": (broken(lambda d, p, q: q.update(answers=[])), "question 'q1' has no answers: use SQuAD v1.1"),
    "an odd answer": (broken(lambda d, p, q: q.update(answers=["x"])), "question 'q1' lacks 'text', text"),
    "no start": (broken(lambda d, p, q: q["answers"][0].update(answer_start=True)), "'answer_start', a whole number"),
    "off by one": (broken(lambda d, p, q: q["answers"][0].update(answer_start=8)), "'q1': answer_start 8 is not where"),
    "beyond": (broken(lambda d, p, q: q["answers"][0].update(answer_start=10**30)), "is not where 'a city' begins"),
    "from the end": (broken(lambda d, p, q: q["answers"][0].update(answer_start=-7)), "answer_start -7 is not where"),
    "empty answer": (broken(lambda d, p, q: q["answers"][0].update(text="")), "is not where '' begins"),
    "same id": (broken(lambda d, p, q: p["qas"].append(q)), "question 'q1' comes twice"),
    "v2": (broken(lambda d, p, q: q.update(answers=[], is_impossible=True)), "'q1' cannot be .*: use SQuAD v1.1"),
    "one article": (broken(lambda d, p, q: None), "too few articles"),
}


@pytest.mark.parametrize(("breaks", "message"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_loaded(tmp_path, breaks, message):
    path = tmp_path / "questions.json"
    breaks(path)
    with pytest.raises(UserError, match=message) as caught:
        squad.load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value) and ": " in str(caught.value)
