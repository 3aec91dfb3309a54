"""One's own labelled files: what is found in them, and what is said of a wrong one."""

import csv
import gzip
import json

import numpy as np
import pytest
import torch
from test_finetune import tuned

from minidistil.downstream import metrics, table
from minidistil.downstream.batches import predict
from minidistil.downstream.distil import label_order
from minidistil.downstream.heads import load_finetuned
from minidistil.downstream.tasks import Outline, SentenceTask, open_task
from minidistil.errors import UserError
from minidistil.tokenizer import Tokenizer


def read(tmp_path, content, name="mine.csv", **given):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    dev = tmp_path / name if "dev" not in given and "held_out" not in given else given.pop("dev", None)
    task, train, splits = table.read_table(tmp_path / name, dev=dev, **given)
    return task, train, splits["dev"]


# ---- what is found


def test_quotes_separators_and_line_breaks(tmp_path):
    content = '\ufeffid;Review;Sentiment\r\n1;"good; ""really"" good";pos\r\n\r\n2;"bad,\r\n\u0085bad";neg\r\n'
    for name in ("mine.csv", "Mine.CSV.gz"):
        data = content.encode()
        task, train, dev = read(tmp_path, gzip.compress(data) if name.endswith("gz") else data, name)
        assert (task.name, task.texts, task.label) == (name.split(".")[0], ("Review",), "Sentiment")
        assert task.labels == ("neg", "pos") and task.metrics == ("accuracy", "macro_f1")
        assert train == dev == [('good; "really" good', None, 1), ("bad,\n\u0085bad", None, 0)]


def test_tabs_and_quotes_that_are_text(tmp_path):
    _, train, _ = read(tmp_path, 'text\tlabel\n"Well\tx\nhe said "no"\ty\n', "mine.tsv")
    assert [e.first for e in train] == ['"Well', 'he said "no"']
    _, train, _ = read(tmp_path, "text\tlabel\na, b\tx\nc\ty\n", "tabs.csv")
    assert [e.first for e in train] == ["a, b", "c"]


def test_json_lines(tmp_path):
    rows = [{"premise": "a", "hypothesis": "b", "label": True, "more": [1]}, {"label": False, "hypothesis": "d\ne",
             "premise": "\u597d"}]  # fmt: skip
    task, train, _ = read(tmp_path, "\n\n".join(map(json.dumps, rows)), "mine.jsonl")
    assert task.pair and task.labels == ("false", "true") and train == [("a", "b", 1), ("\u597d", "d\ne", 0)]


def test_half_a_surrogate_pair(tmp_path):
    """JSON can hold one, where a text was cut within an emoji."""
    content = "".join(f'{{"text": "{i} \\ud83d", "label": {i % 2}}}\n' for i in range(40))
    _, train, dev = read(tmp_path, content, "mine.jsonl", held_out=0.25)
    assert len(train) + len(dev) == 40 and train[0].first.endswith("\ud83d")


@pytest.mark.parametrize("header, texts, label", [
    ("sentence1,sentence2,score", ("sentence1", "sentence2"), "score"),
    ("idx, Text ,LABEL", (" Text ",), "LABEL"),
    ("title,text,category", ("text",), "category"),  # a text before a title
    ("question,answer,label", ("question", "answer"), "label"),
])  # fmt: skip
def test_columns_are_found_by_their_names(header, texts, label, tmp_path):
    task, *_ = read(tmp_path, f"{header}\n" + "\n".join(",".join(f"{i}{j}.5" for j in range(3)) for i in range(4)))
    assert (task.texts, task.label) == (texts, label)


def test_columns_are_named(tmp_path):
    task, train, _ = read(tmp_path, 'a,b,"c, d"\n1,x,2\n3,y,4\n', columns="a,b")
    assert (task.texts, task.label, train[0]) == (("a",), "b", ("1", None, 0))
    (tmp_path / "dev.tsv").write_text("more\tb\ta\n9\ty\t8\n")  # of another kind, in another order
    _, _, dev = read(tmp_path, 'a,b,"c, d"\n1,x,2\n3,y,4\n', columns="a,b", dev=tmp_path / "dev.tsv")
    assert dev == [("8", None, 1)]


@pytest.mark.parametrize("label, values, labels", [
    ("label", "0 1 2 10", ("0", "1", "2", "10")),
    ("label", "1.0 2.0 1", ("1", "2")),  # as a table with gaps writes them
    ("label", "0.5 1 2", ()),
    ("rating", "1 5 3", ("1", "3", "5")),
    ("score", "1 5 3", ()),
    ("Similarity", "1 5 3", ()),
    ("score", "low high low", ("high", "low")),
    ("label", "nan 1 2", ("1", "2", "nan")),
    ("label", "007 7 01 12E4", ("01", "007", "7", "12E4")),  # names, whatever else they look like
    ("label", "9007199254740992 9007199254740993", ("9007199254740992", "9007199254740993")),
    ("rating", "0.5 low high low", ("0.5", "high", "low")),
])  # fmt: skip
def test_classes_or_numbers(label, values, labels, tmp_path):
    task, train, _ = read(tmp_path, f"text,{label}\n" + "".join(f"some,{value}\n" for value in values.split()))
    assert task.labels == labels and task.metrics == (("accuracy", "macro_f1") if labels else ("pearson", "spearman"))
    if labels:
        assert [task.labels[e.label] for e in train] == [v.removesuffix(".0") for v in values.split()]
    else:
        assert [e.label for e in train] == [float(v) for v in values.split()]


def test_copies_of_a_text_are_on_the_same_side(tmp_path):
    content = "text,label\n" + "".join(f"text {i % 200},{i % 3}\n" for i in range(1000))
    _, train, dev = read(tmp_path, content, held_out=0.25)
    assert len(train) + len(dev) == 1000 and not {e.first for e in train} & {e.first for e in dev}
    assert 0.15 < len(dev) / 1000 < 0.35
    assert read(tmp_path, content, held_out=0.25)[2] == dev
    _, _, tenth = read(tmp_path, content, held_out=None)
    assert {e.first for e in tenth} < {e.first for e in dev} and 0.05 < len(tenth) / 1000 < 0.15


# ---- what is said of a wrong one


@pytest.mark.parametrize("content, said", [
    ("text,label\na,x\n,y\n", "mine.csv, line 3: column 'text' is empty: fill it"),
    ("text,label\na,x\nb, \n", "line 3: column 'label' is empty"),
    ("text,label\na,x\nb,y,z\n", "line 3: 3 columns instead of 2: put quotes around a text with a separator"),
    ('text,label\n"a\nb",x\n"c"d,y\n', "line 4: ',' expected after '\"': repair its quotes"),
    ('text,label\na,x\n"b,y\n', "unexpected end of data: repair its quotes"),
    ("it was good,1\nit was bad,0\n", "does not say which column is the text (its columns are 'it was good', '1')"),
    ("text,tag\na,x\n", "does not say which column is the label (its columns are 'text', 'tag'): name those"),
    ("text,label,score\na,x,1\n", "which column is the label (label or score)"),
    ("text,label,text\na,x,b\n", "has two columns of one name"),
    ("text,label\n", "holds no examples"),
    ("", "is empty"),
    ("text,label\na,x\nb,x\n", "column 'label' is 'x' in all lines: there is nothing to learn"),
    ("text,score\na,1\nb,1.0\n", "column 'score' is '1' in all lines"),
    ("text,score\na,1\nb,3\nc,n/a\n", "line 4: column 'score': 'n/a' is no number, as most of the column are"),
    ("text,rating\na,1.5\nb,3\nc,n/a\n", "line 4: column 'rating': 'n/a' is no number"),
    ("text;score\na;1\nb;3,5\n", "line 3: column 'score': '3,5' has a decimal comma: write decimals with a point"),
    ("text;rating\na;1,0\nb;3,5\n", "line 2: column 'rating': '1,0' has a decimal comma"),
    ("text,label\n" + "".join(f"some,text {i}\n" for i in range(50)), "has 50 different values in 50 examples"),
    (b"text,label\ncaf\xe9,x\n", "line 2: not UTF-8: save it as UTF-8"),
    (b"text,label\ra,x\rb,y\r", "lines end in carriage returns alone: save it with the line ends of Windows or Unix"),
])  # fmt: skip
def test_wrong_csv(content, said, tmp_path):
    with pytest.raises(UserError) as error:
        read(tmp_path, content)
    assert said in str(error.value) and "\n" not in str(error.value) and "mine.csv" in str(error.value)


@pytest.mark.parametrize("content, said", [
    ('{"text": "a", "label": 1}\n{"text": "b"}\n', "line 2: column 'label' is empty"),
    ('{"text": "a", "label": 1}\n{"text": ["b"], "label": 2}\n', "line 2: column 'text' holds a list or an object"),
    ('{"text": "a", "label": 1}\n{"text": "b", "label": NaN}\n', "line 2: column 'label' is empty"),
    ('{"text": "a", "label": 1}\n{"text": "b", \n', "line 2 is not JSON: write an object a line"),
    ('{"text": "a", "label": 1}\n["b", 2]\n', "line 2 holds no object ('[\"b\", 2]')"),
    ("\n", "holds no examples"),
])  # fmt: skip
def test_wrong_json_lines(content, said, tmp_path):
    with pytest.raises(UserError) as error:
        read(tmp_path, content, "mine.jsonl")
    assert said in str(error.value) and "mine.jsonl" in str(error.value)


@pytest.mark.parametrize("given, said", [
    (dict(columns="text"), "--columns text: name those of the text"),
    (dict(columns="text,label,tag"), "has no column 'tag'"),
    (dict(columns="text,text"), "--columns text,text: name those"),
    (dict(dev="DEV"), "dev.csv, line 3: column 'label' is 'z', not one of x, y, the labels of the training examples"),
    (dict(held_out=1e-9), "has 2 examples, too few to hold 1e-09 of them out: give a file"),
])  # fmt: skip
def test_wrong_settings_of_a_file(given, said, tmp_path):
    (tmp_path / "dev.csv").write_text("text,label\na,x\nb,z\n")
    given = {name: tmp_path / "dev.csv" if value == "DEV" else value for name, value in given.items()}
    with pytest.raises(UserError) as error:
        read(tmp_path, "text,label\na,x\nb,y\n", **given)
    assert said in str(error.value)


# ---- a task like the others


def own_file(folder, rows, header=("text", "label"), name="mine.csv"):
    with open(folder / name, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(folder / name)


def rows_of(glue, task, *columns):
    """The rows of a task's files: (training, dev)."""
    sides = []
    for split in ("train", "dev"):
        header, *rows = (line.split("\t") for line in (glue / task / f"{split}.tsv").read_text().splitlines())
        sides.append([tuple(row[header.index(name)] for name in columns) for row in rows])
    return sides


def test_learns_ones_own_classes_and_goes_on(tiny, glue, tmp_path):
    names = {"0": "schlecht", "1": "gut: \u2713"}
    train, dev = ([(text, names[y]) for text, y in side] for side in rows_of(glue, "SST-2", "sentence", "label"))
    files = dict(task=own_file(tmp_path, train, name="mine.csv"), data=None)
    files["dev"] = own_file(tmp_path, dev, name="dev.csv")
    figures = tuned(tiny, None, tmp_path / "out", **files)["tasks"]["mine"]
    assert figures["accuracy"] > 90 and figures["macro_f1"] > 90
    model, labels = load_finetuned(tmp_path / "out" / "mine")
    assert labels == ("gut: \u2713", "schlecht")
    card = (tmp_path / "out" / "mine" / "README.md").read_text()
    assert "--task FILE --model STUDENT --teacher FOLDER" in card and "text_pair" not in card
    assert "datasets:" not in card and "model-index" not in card  # the file's name says nothing of its contents
    tokenizer = Tokenizer.load(tmp_path / "out" / "mine")
    kept = open_task("mine", None, tokenizer, own=table.read_table(files["task"], dev=files["dev"]))
    score = kept.evaluate([predict(model, kept.dev[0], 0, torch.device("cpu"))])["score"]
    assert score == pytest.approx(figures["score"], abs=0.01)
    more = tuned(tiny, None, tmp_path / "out", **files, resume=True, seeds=2)  # a finished run, and one more seed
    assert more["tasks"]["mine"]["seeds"] == 2 and more["macro"] is None
    second = tuned(tiny, None, tmp_path / "second", **files, teacher=str(tmp_path / "out"), examples=80)
    assert second["tasks"]["mine"]["accuracy"] > 60
    own_file(tmp_path, train[:-1], name="mine.csv")
    with pytest.raises(UserError, match="was begun with other data for mine"):
        tuned(tiny, None, tmp_path / "out", **files, resume=True, seeds=3)


def test_a_scale_of_ones_own_is_learnt_and_given_back(tiny, glue, tmp_path):
    """Scores of 1000 and 1050: a learning rate that reaches STS-B's 0 to 5 would not get there."""
    train, dev = ([(text, 1000 + 50 * int(y)) for text, y in side]
                  for side in rows_of(glue, "SST-2", "sentence", "label"))  # fmt: skip
    files = dict(task=own_file(tmp_path, train, ("text", "score")), data=None)
    files["dev"] = own_file(tmp_path, dev, ("text", "score"), "dev.csv")
    figures = tuned(tiny, None, tmp_path / "out", **files)["tasks"]["mine"]
    model, labels = load_finetuned(tmp_path / "out" / "mine")
    assert labels == ("score",) and figures["pearson"] > 80
    own = table.read_table(files["task"], dev=files["dev"])
    work = open_task("mine", None, Tokenizer.load(tmp_path / "out" / "mine"), own=own)
    guesses = np.stack(predict(model, work.dev[0], 0, torch.device("cpu")))[:, 0]
    truth = np.array([y for _, y in dev])
    assert 100 * metrics.pearson(guesses, truth) == pytest.approx(figures["pearson"], abs=0.01)
    assert abs(guesses.mean() - truth.mean()) < 5 and np.abs(guesses - truth).mean() < 15
    taught = dict(teacher=str(tmp_path / "out"), alpha_task=0.0, alpha_ce=1.0)  # by the teacher's scores alone
    assert tuned(tiny, None, tmp_path / "second", **files, **taught)["tasks"]["mine"]["pearson"] > 80


def test_published_scores_are_learnt_as_they_are(tiny, glue):
    work = open_task("stsb", glue, Tokenizer.load(tiny / "teacher"))
    rows, _ = rows_of(glue, "STS-B", "score")
    assert work.train[1].tolist() == [float(score) for (score,) in rows]
    assert isinstance(work, SentenceTask) and (work.shift, work.scale) == (0.0, 1.0)


def test_labels_are_matched_letter_by_letter_first():
    """Of C, C++ and C#, or of labels without a Latin letter, nothing is left once signs are ignored."""
    for names in (("C", "C#", "C++"), ("\u574f", "\u597d"), ("no", "No")):
        task = Outline("mine", None, names, False)
        assert label_order("teacher", names[::-1], task) == list(range(len(names)))[::-1]
        with pytest.raises(UserError, match="was not fine-tuned for mine"):
            label_order("teacher", [f"{name}!" for name in names[:-1]] + ["other"], task)
    near = Outline("mine", None, ("\u574f_1", "\u597d_1"), False)
    assert label_order("teacher", ["\u597d 1", "\u574f 1"], near) == [1, 0]


@pytest.mark.parametrize("wrong, said", [
    (dict(data="GLUE"), "--data does not apply to --task"),
    (dict(held_out=1.5), "--held-out is 1.5: it is a share"),
    (dict(held_out=0.2, dev="dev.csv"), "--held-out is 0.2: it is a share between 0 and 1, where there is no --dev"),
    (dict(task="sst2", data="GLUE", columns="a,b"), "--columns does not apply to --task sst2: it is for a --task FILE"),
    (dict(task="sst2", data=None), "--data is missing: give the GLUE folder"),
    (dict(task="nowhere.csv"), "nowhere.csv"),
])  # fmt: skip
def test_settings_that_do_not_apply(wrong, said, tiny, glue, tmp_path):
    given = dict(task=own_file(tmp_path, [("a", "x"), ("b", "y")]), data=None) | wrong
    with pytest.raises((UserError, FileNotFoundError)) as error:
        tuned(tiny, None, tmp_path / "out", **given)
    assert said in str(error.value) and not (tmp_path / "out").exists()
