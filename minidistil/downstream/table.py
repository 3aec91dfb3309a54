"""One's own labelled examples, in a .tsv, .csv or .jsonl file (plain or .gz), as a task like those of GLUE.

    .tsv      a line of column names, then an example a line; quotes are text, as in GLUE
    .csv      the same with quotes as in RFC 4180, and "," or ";" or a tab between columns, as the first line has them
    .jsonl    an object a line; its fields are the columns

The label is a class, by any name, or a number to predict: see `_kind`. Without a file of held-out examples, a share of
the texts is held out by their hash, so that copies of a text are on the same side.
"""

import csv
import hashlib
import json
import pathlib
import re

from minidistil.downstream.glue import Example, Task, lines
from minidistil.errors import UserError

ENDINGS = (".tsv", ".csv", ".jsonl")
HELD_OUT = 0.1  # share
TEXTS = [  # names of columns, in lower case: of two texts, then of one; the first that a file has are taken
    ("sentence1", "sentence2"), ("question1", "question2"), ("text1", "text2"), ("text_a", "text_b"),
    ("premise", "hypothesis"), ("query", "passage"), ("query", "document"), ("question", "answer"),
    ("question", "sentence"), ("question", "context"), ("text",), ("sentence",), ("review",), ("comment",),
    ("message",), ("content",), ("document",), ("utterance",), ("query",), ("question",), ("title",),
]  # fmt: skip
LABELS = "label labels class category target intent sentiment rating score similarity".split()
NUMBERS = ("score", "similarity")  # columns whose whole numbers are a scale, too, and not the names of classes


def is_table(text):
    """Whether a --task names a file of one's own examples."""
    return text.removesuffix(".gz").lower().endswith(ENDINGS)


def name_of(path):
    """Returns the name of the task in a file: the file's, without endings; its folder is beside `checkpoint`."""
    name = pathlib.Path(pathlib.Path(path).name.removesuffix(".gz")).stem
    return "labels" if name == "checkpoint" else name


def read_table(path, columns=None, dev=None, held_out=None):
    """Returns (Task, training Examples, {"dev": Examples}) of the file `path`.

    columns: names of the texts' columns and of the label's, with commas; default: those with a common name. dev: a file
    with the same columns; without it the share `held_out` is (default: HELD_OUT). UserErrors have line and column.
    """
    path = pathlib.Path(path)
    texts, label, rows = _read(path, columns and [name.strip() for name in columns.split(",")])
    others = _read(pathlib.Path(dev), (*texts, label))[2] if dev else []
    codes = _kind(path, label, rows)
    metrics = ("accuracy", "macro_f1") if codes else ("pearson", "spearman")
    task = Task(name_of(path), str(path), tuple(codes), metrics, texts, label)
    examples, held = (
        [_example(file, label, codes, *row) for row in side] for file, side in ((path, rows), (dev, others))
    )
    if not dev:
        examples, held = _split(path, examples, held_out or HELD_OUT)
    return task, examples, {"dev": held}


def _read(path, columns):
    """Returns (names of the texts' columns, name of the label's, [(line, first text, second text, label), ...])."""
    read = _read_jsonl if path.name.removesuffix(".gz").lower().endswith(".jsonl") else _read_cells
    rows = read(path)
    header = next(rows)
    texts, label = _columns(path, header, columns)
    taken = []
    for number, cells in rows:
        for name in (*texts, label):
            if not isinstance(cells.get(name, ""), str):
                what = f"column {name!r} holds a list or an object"
                raise UserError(f"{path}, line {number}: {what}: write a text or a number")
            if not cells.get(name, "").strip():
                raise UserError(f"{path}, line {number}: column {name!r} is empty: fill it, or remove the line")
        second = cells[texts[1]] if len(texts) == 2 else None
        taken.append((number, cells[texts[0]], second, cells[label].strip()))
    if not taken:
        raise UserError(f"{path} holds no examples: write one a line, below the names of the columns")
    return texts, label, taken


def _columns(path, header, columns):
    """Returns (names of the texts' columns, name of the label's) among those of a file."""
    found = f"its columns are {', '.join(map(repr, header))[:200]}"
    how = "name those of the text, or two texts, and of the label, such as --columns text,label"
    if len(set(header)) < len(header):
        raise UserError(f"{path} has two columns of one name ({found}): rename one")
    if columns:
        *texts, label = columns
        if absent := [name for name in (*texts, label) if name not in header]:
            raise UserError(f"{path} has no column {absent[0]!r} ({found}): {how}")
        if not 1 <= len(set(texts)) == len(texts) <= 2 or label in texts:
            raise UserError(f"--columns {','.join(columns)}: {how}")
        return tuple(texts), label
    names = {name.strip().casefold(): name for name in header}
    texts = next((group for group in TEXTS if set(group) <= set(names)), None)
    labels = [name for name in LABELS if name in names]
    if texts is None or len(labels) != 1:
        what = "the text" if texts is None else "the label" if not labels else f"the label ({' or '.join(labels)})"
        raise UserError(f"{path} does not say which column is {what} ({found}): {how}")
    return tuple(names[name] for name in texts), names[labels[0]]


def _read_cells(path):
    """Yields the column names of a .tsv or .csv file, then (line, {column: cell}) of each row."""
    numbered = lines(path)
    _, first = next(numbered)
    if "\r" in first:
        raise UserError(f"{path}: lines end in carriage returns alone: save it with the line ends of Windows or Unix")
    if path.name.removesuffix(".gz").lower().endswith(".tsv"):
        separator, rows = "\t", ((number, line.split("\t")) for number, line in numbered if line)
        header = first.split("\t")
    else:
        separator = max(",;\t", key=first.count)
        header, *_ = csv.reader([first], delimiter=separator)
        rows = _csv_rows(path, numbered, separator)
    yield header
    for number, cells in rows:
        if len(cells) != len(header):
            way = "a .tsv has no quotes, so that a text has no tab and no line break: repair it, or save it as .csv"
            way = "put quotes around a text with a separator or a line break" if separator != "\t" else way
            raise UserError(f"{path}, line {number}: {len(cells)} columns instead of {len(header)}: {way}")
        yield number, dict(zip(header, cells, strict=True))


def _csv_rows(path, numbered, separator):
    """Yields (line, cells) of the rows of a .csv file; the line is the row's last."""
    csv.field_size_limit(1 << 30)
    rows = csv.reader((line + "\n" for _, line in numbered), delimiter=separator, strict=True)
    try:
        yield from ((rows.line_num + 1, cells) for cells in rows if cells)
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num + 1}: {error}: repair its quotes") from None


def _read_jsonl(path):
    """Yields the fields of a .jsonl file's first object, then (line, {field: `_text` of its value}) of each line."""
    header = None
    for number, line in lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{path}, line {number} is not JSON: write an object a line") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number} holds no object ({line[:40]!r}): write one a line")
        if header is None:
            header = list(record)
            yield header
        yield number, {name: _text(value) for name, value in record.items()}
    if header is None:
        raise UserError(f"{path} holds no examples: write an object a line")


def _text(value):
    """Returns a JSON value as text: "" of null and NaN, with which programs write gaps; lists and objects as such."""
    if isinstance(value, str | list | dict):
        return value
    return "" if value is None or value != value else json.dumps(value)


def _number(text):
    """Returns the finite number that a text is, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None


def _class(text):
    """Returns the name of a class: whole numbers without decimals, which a table with gaps adds ("1.0")."""
    whole = re.fullmatch(r"(-?(?:0|[1-9]\d*))\.0+", text)
    return whole[1] if whole else text


def _kind(path, label, rows):
    """Returns {name: id} of the classes in a column, in order; {} where its values are numbers to predict.

    They are where all are numbers and one of them has decimals, or where the column is called score or similarity.
    Raises UserError where only some are, and are the most, and where numbers have decimal commas.
    """
    found, scale = [row[-1] for row in rows], label.casefold() in NUMBERS
    numbers = [_number(text) for text in found]
    known = [value for value in numbers if value is not None]
    others = [(line, text) for (line, *_, text), value in zip(rows, numbers, strict=True) if value is None]
    commas = others and all(re.fullmatch(r"-?\d+,\d+", text) for _, text in others)
    mixed = 2 * len(known) > len(found) and (scale or any(value != int(value) for value in known))
    if others and ((commas and (scale or not known)) or mixed):
        (line, text), what = others[0], "has a decimal comma" if commas else "is no number, as most of the column are"
        way = "correct it, or remove the line; for classes, put a letter before each number"
        way = "write decimals with a point" if commas else way
        raise UserError(f"{path}, line {line}: column {label!r}: {text[:40]!r} {what}: {way}")
    if not others and (scale or any(value != int(value) for value in numbers)):
        if len(set(numbers)) == 1:
            raise UserError(f"{path}: column {label!r} is {found[0]!r} in all lines: there is nothing to learn")
        return {}
    names = {_class(text) for text in found}
    if len(names) == 1:
        raise UserError(f"{path}: column {label!r} is {found[0]!r} in all lines: there is nothing to learn")
    if len(names) > max(20, len(found) // 2):
        what = f"{path}: column {label!r} has {len(names):,} different values in {len(found):,} examples"
        raise UserError(f"{what}: name the columns of the text and of the label with --columns text,label")
    order = sorted(sorted(names), key=float) if None not in map(_number, names) else sorted(names)
    return {name: i for i, name in enumerate(order)}


def _example(path, label, codes, line, first, second, text):
    """Returns the Example of a row, its label a class id or a number."""
    value = codes.get(_class(text)) if codes else _number(text)
    if value is None:
        wanted = f"one of {', '.join(codes)[:200]}, the labels of the training examples" if codes else "a number"
        raise UserError(f"{path}, line {line}: column {label!r} is {text[:40]!r}, not {wanted}: correct it")
    return Example(first, second, value)


def _split(path, examples, share):
    """Returns (training examples, held-out ones)."""
    sides = [], []
    for example in examples:
        digest = hashlib.sha256("\0".join(filter(None, example[:2])).encode("utf-8", "replace")).digest()
        sides[int.from_bytes(digest[:8], "big") < share * 2**64].append(example)
    if not all(sides):
        what = f"{path} has {len(examples)} examples, too few to hold {share:.3g} of them out"
        raise UserError(f"{what}: give a file of held-out examples with --dev, or another share with --held-out")
    return sides


def describe(task):
    """Returns one line: what a file was taken for."""
    classes = f"{len(task.labels)} classes: {', '.join(task.labels)[:200]}"
    texts = f"text in {' and '.join(map(repr, task.texts))}"
    return f"{task.folder}: {texts}, label in {task.label!r} ({classes if task.labels else 'numbers'})"
