"""Where text comes from: files, folders, a Wikipedia dump, this computer's documentation, a Hugging Face dataset.

A source is read in batches of about one megabyte. The process that reads only cuts bytes; decoding them into
documents is `batch.read(batch.payload)`, which the workers do. Batches do not depend on the number of workers.
"""

import bz2
import codecs
import dataclasses
import gzip
import io
import json
import os
import pathlib
import textwrap
import zlib
from collections.abc import Callable
from typing import Any

from data import docstrings, wikipedia
from minidistil.errors import UserError

BATCH_BYTES = 1 << 20
_OPENERS = {".gz": lambda raw: gzip.GzipFile(fileobj=raw), ".bz2": bz2.BZ2File}
_TEXT_ENDINGS = (".txt", ".jsonl", ".tsv", ".gz", ".bz2")


@dataclasses.dataclass(frozen=True)
class Batch:
    """Some documents still to be decoded; `read(payload)` returns them as a list of str."""

    read: Callable
    payload: Any
    weight: int  # bytes in memory
    progress: int  # bytes of the source, as stored, since the last batch
    unique: bool = False  # a document that repeats an earlier one of its source is to be dropped


def check(sources):
    """Returns the total of stored bytes of all sources (0 where unknown); raises UserError for what is not there."""
    if not sources:
        raise UserError("no source of text: name files, folders, `docs`, `wikipedia:DUMP` or `hf:DATASET`")
    total = 0
    for source in map(str, sources):
        if source == "docs":
            total += sum(map(os.path.getsize, docstrings.python_files()))
        elif source.startswith("wikipedia:"):
            total += _size(source.removeprefix("wikipedia:"))
        elif source.startswith("hf:"):
            _datasets()
        else:
            total += sum(map(_size, text_files(source)))
    return total


def _size(path):
    if not os.path.isfile(path):
        raise UserError(f"{path} is not a file: check the path")
    return os.path.getsize(path)


def text_files(path):
    """Returns `path` itself, or the text files below it in sorted order; hidden files and folders are left out."""
    if not os.path.isdir(path):
        if not os.path.exists(path):
            raise UserError(f"{path} does not exist: check the path, or use docs, wikipedia:DUMP, hf:NAME")
        return [str(path)]
    files = []
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        visible = sorted(name for name in names if not name.startswith("."))
        files += [os.path.join(folder, name) for name in visible if name.lower().endswith(_TEXT_ENDINGS)]
    if not files:
        raise UserError(f"no {' '.join(_TEXT_ENDINGS)} file below {path}: name a folder that holds text")
    return files


def batches(sources, field="text"):
    """Yields the `Batch`es of all sources, in the order given.

    A line is a document, unless at least one line in a hundred of the first megabyte is blank: then documents are
    what stands between blank lines. In .jsonl and .tsv files (with a header, without quoting) a document is the
    text in `field`.
    """
    for source in map(str, sources):
        if source == "docs":
            yield from _docs()
        elif source.startswith("wikipedia:"):
            yield from _wikipedia(source.removeprefix("wikipedia:"))
        elif source.startswith("hf:"):
            yield from _hugging_face(source.removeprefix("hf:"), field)
        else:
            for path in text_files(source):
                yield from _text(path, field)


# --- files ---


class _Stored:
    """An open, perhaps compressed, file: the stream of its contents and how far the stored bytes have been read."""

    def __init__(self, path):
        self.path = path
        self._raw = open(path, "rb")
        opener = _OPENERS.get(pathlib.Path(path).suffix.lower())
        self.stream = io.BufferedReader(opener(self._raw), 1 << 18) if opener else self._raw
        self._reported = 0

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self._raw.close()
        # gzip and bz2 report damage as EOFError, zlib.error, or OSError without an errno
        if isinstance(error, EOFError | zlib.error) or (isinstance(error, OSError) and error.errno is None):
            raise UserError(f"{self.path} is damaged ({error}): fetch or compress it again") from None

    def progress(self):
        """Returns the stored bytes read since the last call."""
        before, self._reported = self._reported, self._raw.tell()
        return self._reported - before


def _text(path, field):
    """Yields the batches of one text, .jsonl or .tsv file, cut between documents."""
    name = path.lower().removesuffix(".gz").removesuffix(".bz2")
    with _Stored(path) as file:
        lines = file.stream
        beginning = lines.peek(1)
        if b"\0" in beginning:
            raise UserError(f"{path} is not UTF-8 text (it holds NUL bytes): convert it, or leave it out")
        if beginning.startswith(codecs.BOM_UTF8):
            lines.read(len(codecs.BOM_UTF8))
        if name.endswith(".tsv"):
            header = lines.readline().decode("utf-8", "replace").rstrip("\r\n").split("\t")
            if field not in header:
                raise UserError(f"{path} has no column {field!r}, only {_listed(header)}: name one with --field")
            yield from _records(file, read_tsv, 2, header.index(field), len(header))
        elif name.endswith(".jsonl"):
            yield from _records(file, read_jsonl, 1, field)
        else:
            first = list(_take(lines))
            blank_separated = _blank_separated(first)
            if blank_separated and first[-1].strip():
                first += _take(lines, True, 0)
            read = read_paragraphs if blank_separated else read_lines
            while first:
                payload = b"".join(first)
                yield Batch(read, payload, len(payload), file.progress())
                first = list(_take(lines, blank_separated))


def _records(file, read, number, *how):
    """Yields the batches of a file with one record per line, the next of which is line `number`."""
    while lines := list(_take(file.stream)):
        payload = b"".join(lines)
        yield Batch(read, (payload, number, file.path, *how), len(payload), file.progress())
        number += len(lines)


def _listed(names):
    return textwrap.shorten(", ".join(names), 100, placeholder=" ...")


def _take(lines, to_blank=False, size=BATCH_BYTES):
    """Yields about `size` bytes of whole lines; up to and with the next blank line if `to_blank`."""
    taken = 0
    for line in lines:
        yield line
        taken += len(line)
        if taken >= size and not (to_blank and line.strip()):
            return


def _blank_separated(lines):
    filled = "".join("x" if line.strip() else " " for line in lines).strip()  # the ends separate nothing
    return 0 < len(filled) <= 100 * filled.count(" ")


def read_lines(data):
    """Returns one document per line of UTF-8 bytes; invalid bytes become U+FFFD."""
    return data.decode("utf-8", "replace").split("\n")


def read_paragraphs(data):
    """Returns the documents between blank lines."""
    documents = [[]]
    for line in data.decode("utf-8", "replace").split("\n"):
        if line.strip():
            documents[-1].append(line)
        elif documents[-1]:
            documents.append([])
    return ["\n".join(lines) for lines in documents]


def read_jsonl(payload):
    """Returns the text in one field of each JSON line; null and blank lines give nothing."""
    data, first, path, field = payload
    documents = []
    for number, line in enumerate(read_lines(data), first):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{path}, line {number} is not JSON: repair it or leave the file out") from None
        if not isinstance(record, dict) or field not in record:
            found = _listed(record) if isinstance(record, dict) else type(record).__name__
            raise UserError(f"{path}, line {number} has no field {field!r}, only {found}: name one with --field")
        text = record[field]
        if not isinstance(text, str | None):
            raise UserError(f"{path}, line {number}: field {field!r} is not text: name another with --field")
        documents.append(text or "")
    return documents


def read_tsv(payload):
    """Returns the text in one column of each line; the last column may hold tabs."""
    data, first, path, column, columns = payload
    documents = []
    for number, line in enumerate(read_lines(data), first):
        cells = line.rstrip("\r").split("\t", columns - 1)
        if len(cells) > column:
            documents.append(cells[column])
        elif line.strip():
            raise UserError(f"{path}, line {number} has {len(cells)} of {columns} columns: repair it or leave it out")
    return documents


# --- other sources ---


def _docs():
    """Yields the sources of installed packages, about two megabytes of code (0.4 of prose) at a time."""
    paths, size = [], 0
    for path in docstrings.python_files():
        paths.append(path)
        size += os.path.getsize(path)
        if size >= 2 * BATCH_BYTES:
            yield Batch(docstrings.harvest, paths, size, size, unique=True)
            paths, size = [], 0
    if paths:
        yield Batch(docstrings.harvest, paths, size, size, unique=True)


def _wikipedia(path):
    """Yields the pages of a MediaWiki XML dump, cut after a `</page>`."""
    with _Stored(path) as file:
        rest = b""
        dropped = None
        while block := file.stream.read(BATCH_BYTES):
            block = rest + block
            end = block.rfind(b"</page>") + len(b"</page>")
            if end < len(b"</page>"):
                rest = block
                continue
            dropped = dropped or wikipedia.dropped_links(block)
            yield Batch(wikipedia.articles, (path, block[:end], dropped), end, file.progress())
            rest = block[end:]
        if b"<page>" in rest or not dropped:
            raise UserError(f"{path} is not a whole MediaWiki dump (no </page> at its end): fetch it again")


def _datasets():
    try:
        import datasets
    except ImportError:
        raise UserError("hf: sources need the package `datasets`: pip install datasets") from None
    return datasets


def _hugging_face(name, field):
    """Yields the rows of the training split of DATASET[:CONFIG[:COLUMN]], streamed."""
    name, config, column = (name.split(":", 2) + ["", ""])[:3]
    column = column or field
    texts, size = [], 0
    for row in _rows(name, config):
        if not isinstance(row.get(column), str | None):
            raise UserError(f"hf:{name}: column {column!r} is not text: name another with --field")
        if column not in row:
            raise UserError(f"hf:{name} has no column {column!r}, only {_listed(row)}: name one with --field")
        texts.append(row[column] or "")
        size += len(texts[-1])
        if size >= BATCH_BYTES:
            yield Batch(list, texts, size, 0)
            texts, size = [], 0
    if texts:
        yield Batch(list, texts, size, 0)


def _rows(name, config):
    try:
        yield from _datasets().load_dataset(name, config or None, split="train", streaming=True)
    except UserError:
        raise
    except Exception as error:  # of any of the libraries below `datasets`
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        raise UserError(f"hf:{name} cannot be read ({reason}): check its name and the network") from None
