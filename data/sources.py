"""Sources of text: files, folders, Wikipedia dumps, installed documentation, Hugging Face datasets.

A source is read in batches of about one megabyte. The reading process only splits bytes; the workers decode them into
documents by `batch.read(batch.payload)`. Batches do not depend on the number of workers.
"""

import bz2
import codecs
import collections
import contextlib
import csv
import dataclasses
import gzip
import html
import importlib
import io
import json
import lzma
import os
import pathlib
import re
import sys
import textwrap
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

from data import docstrings, wikipedia
from minidistil.errors import UserError

BATCH_BYTES = 1 << 20
_OPENERS = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda raw: _package("backports.zstd", ".zst files").ZstdFile(raw),
}
_TEXT_ENDINGS = (".txt", ".jsonl", ".json", ".tsv", ".csv", ".parquet", ".zip", *_OPENERS)
_NO_TEXT = set(
    ".7z .arrow .avi .db .doc .docx .epub .feather .gif .h5 .htm .html .jpeg .jpg .mobi .mp3 .mp4 .npy .npz .odt .pdf "
    ".pickle .pkl .png .ppt .pptx .pt .rar .rtf .safetensors .sqlite .tar .tbz2 .tgz .txz .webp .xls .xlsx .xml".split()
)
_LONG_RECORD = re.compile(rb'\s*\{"id": ?"[^"]*", ?("revid": ?"[^"]*", ?)?"url": ?"')  # its first article may be long
_WIKIEXTRACTOR = re.compile(rb"<doc id=[^<>]*>")  # how its files begin, which have no ending


@dataclasses.dataclass(frozen=True)
class Batch:
    """Undecoded documents; `read(payload)` returns them as a list of str."""

    read: Callable
    payload: Any
    weight: int  # bytes in memory
    progress: int  # stored bytes of the source since the last batch
    unique: bool = False  # whether to drop documents that repeat an earlier one of the source


def check(sources):
    """Returns the stored bytes of all sources (0 where unknown); raises UserError for a missing source."""
    if not sources:
        raise UserError("no source of text: name files, folders, `docs`, `wikipedia:DUMP` or `hf:DATASET`")
    total = 0
    for source in map(str, sources):
        if source == "docs":
            total += sum(map(os.path.getsize, docstrings.python_files()))
        elif source.startswith("wikipedia:"):
            total += _size(source.removeprefix("wikipedia:"))
        elif source.startswith("hf:"):
            _package("datasets", "hf: sources")
        else:
            for path in text_files(source):
                _check_ending(path)
                total += _size(path)
    return total


def paths_first(sources):
    """Returns the sources of a command line: what exists as a path, such as a folder `docs`, is meant as a path."""
    return [os.path.join(os.curdir, s) if _is_keyword(s) and os.path.exists(s) else s for s in sources]


def _is_keyword(source):
    return source == "docs" or source.startswith(("wikipedia:", "hf:"))


def files_of(sources):
    """Returns what of paths is read and what is not: {"read": {ending: files}, "skipped": {ending: files}}."""
    read, skipped = collections.Counter(), collections.Counter()
    for source in map(str, sources):
        if not _is_keyword(source):
            chosen = set(text_files(source))
            read.update(map(_ending, chosen))
            skipped.update(_ending(path) for path in _visible_files(source) if path not in chosen)
            for path in filter(_is_zip, chosen):
                with _whole(path), zipfile.ZipFile(path) as archive:
                    skipped.update(_ending(name) for name in set(archive.namelist()) - set(_members(path)))
    return {"read": dict(sorted(read.items())), "skipped": dict(sorted(skipped.items()))}


def described(found):
    """Returns `files_of` as one line, or "" for a single file."""
    if not found["skipped"] and sum(found["read"].values()) < 2:
        return ""
    parts = {key: ", ".join(f"{n} {ending}" for ending, n in found[key].items()) for key in found}
    return f"files read: {parts['read']}; skipped, as of no known kind of text: {parts['skipped'] or 'none'}"


def _ending(path):
    return pathlib.Path(path).suffix.lower() or "without ending"


def _check_ending(path):
    """Raises UserError for a file that is not text, or whose reader is not installed."""
    inner = pathlib.Path(path[: -len(_ending(path))]) if _ending(path) in _OPENERS else pathlib.Path(path)
    if inner.suffix.lower() in _NO_TEXT:
        raise UserError(f"{path} is not text ({inner.suffix}): convert it to .txt, or leave it out")
    for ending, package in ((".parquet", "pyarrow"), (".zst", "backports.zstd")):
        if path.lower().endswith(ending):
            _package(package, f"{ending} files")


def _package(name, what):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{what} need the package `{name}`: pip install {name}") from None


def _size(path):
    if not os.path.isfile(path):
        raise UserError(f"{path} is not a file: check the path")
    return os.path.getsize(path)


def text_files(path):
    """Returns `path` itself, or the text files below it in sorted order, without hidden files and folders."""
    if not os.path.isdir(path):
        if not os.path.exists(path):
            raise UserError(f"{path} does not exist: check the path, or use docs, wikipedia:DUMP, hf:NAME")
        return [str(path)]
    files = [file for file in _visible_files(path) if file.lower().endswith(_TEXT_ENDINGS) or _is_extracted(file)]
    if not files:
        raise UserError(f"no {' '.join(_TEXT_ENDINGS)} file below {path}: name a folder that holds text")
    return files


def _visible_files(path):
    files = []
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files += [os.path.join(folder, name) for name in sorted(names) if not name.startswith(".")]
    return files


def _is_extracted(path):
    """Returns whether a file without ending is of WikiExtractor, in either of its layouts."""
    if pathlib.Path(path).suffix or not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return _layout(file.read(1 << 16)) != "text"


def _layout(beginning):
    """Returns "doc" or "json" for the layouts of WikiExtractor, else "text"."""
    if _WIKIEXTRACTOR.match(beginning):
        return "doc"
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(beginning.split(b"\n")[0])
        return "json" if isinstance(record, dict) and {"id", "url", "title", "text"} <= set(record) else "text"
    return "json" if _LONG_RECORD.match(beginning) else "text"


def batches(sources, field="text", encoding="utf-8"):
    """Yields the `Batch`es of all sources, in the order given.

    Each line is a document, unless at least one line in a hundred of the first megabyte is blank: then blank lines
    separate documents. In .jsonl, .json, .csv, .parquet and .tsv files (.tsv without quoting) a document is the text in
    `field`. Files that are not in `encoding` are refused.
    """
    try:
        "".encode(encoding)  # not all codecs are of text
        encoding = codecs.lookup(encoding).name
    except LookupError:
        raise UserError(f"--encoding {encoding} is not known: name one of Python's, such as cp1252") from None
    for source in map(str, sources):
        if source == "docs":
            yield from _docs()
        elif source.startswith("wikipedia:"):
            yield from _wikipedia(source.removeprefix("wikipedia:"))
        elif source.startswith("hf:"):
            yield from _hugging_face(source.removeprefix("hf:"), field)
        else:
            for path in text_files(source):
                for member in _members(path):
                    yield from _text(path, member, field, encoding)


# --- files ---


class _Stored:
    """An open, perhaps compressed, file: the stream of its contents and the number of stored bytes read."""

    def __init__(self, path, member=None):
        self.path = path if member is None else f"{path}/{member}"
        self._raw = open(path, "rb")
        opener = _OPENERS.get(pathlib.Path(path).suffix.lower())
        with _whole(path):
            stream = opener(self._raw) if opener else self._raw
            if member is not None:
                stream = zipfile.ZipFile(self._raw).open(member)
        self.stream = stream if stream is self._raw else io.BufferedReader(stream, 1 << 18)
        self._reported = 0

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self._raw.close()
        if error is not None:
            with _whole(self.path):
                raise error

    def progress(self):
        """Returns the stored bytes read since the last call."""
        before, self._reported = self._reported, self._raw.tell()
        return self._reported - before


@contextlib.contextmanager
def _whole(path):
    """Turns what the readers of compressed files raise for damaged ones into a UserError."""
    try:
        yield
    except Exception as error:
        # gzip and bz2 report damage as EOFError, zlib.error, or OSError without an errno
        damaged = EOFError | zlib.error | lzma.LZMAError | zipfile.BadZipFile | OSError
        if not isinstance(error, damaged) and type(error).__name__ != "ZstdError" or getattr(error, "errno", None):
            raise
        raise UserError(f"{path} is damaged ({error}): fetch or compress it again") from None


def _is_zip(path):
    return path.lower().endswith(".zip")


def _members(path):
    """Returns the text files in a .zip file; [None] for another file, which is one itself."""
    if not _is_zip(path):
        return [None]
    with _whole(path), zipfile.ZipFile(path) as archive:
        names = [
            name for name in sorted(archive.namelist()) if name.lower().endswith((".txt", ".jsonl", ".tsv", ".csv"))
        ]
    if not names:
        raise UserError(f"{path} holds no .txt .jsonl .tsv .csv file: extract it, or leave it out")
    return names


def _text(path, member, field, encoding):
    """Yields the batches of one file, cut between documents."""
    name = (member or path).lower()
    for ending in _OPENERS:
        name = name.removesuffix(ending)
    if name.endswith(".parquet"):
        yield from _together(_parquet(path, field), lambda: 0)
        return
    with _Stored(path, member) as file:
        beginning = file.stream.peek(1)
        if encoding == "utf-8":
            if b"\0" in beginning:
                raise UserError(
                    f"{file.path} is not UTF-8 text (it holds NUL bytes): convert it, or give its --encoding"
                )
            if beginning.startswith(codecs.BOM_UTF8):
                file.stream.read(len(codecs.BOM_UTF8))
        else:
            file.stream = _Recoded(file, encoding)
        where = path, member, encoding
        if name.endswith(".csv"):
            yield from _together(_csv(file, where, field), file.progress)
        elif name.endswith(".json") and not _is_json_line(file.stream.peek(1)):
            yield from _together(_json(file, where, field), file.progress)
        else:
            yield from _text_lines(file, where, name, field)


def _text_lines(file, where, name, field):
    """Yields the batches of a file whose lines, or groups of lines, are documents."""
    lines, layout = file.stream, _layout(file.stream.peek(1))
    if name.endswith(".tsv"):
        header = _decode(lines.readline(), where).rstrip("\r\n").split("\t")
        if field not in header:
            raise UserError(f"{file.path} has no column {field!r}, only {_listed(header)}: name one with --field")
        yield from _records(file, read_tsv, 2, where, header.index(field), len(header))
    elif name.endswith((".jsonl", ".json")) or layout == "json":
        yield from _records(file, read_jsonl, 1, where, field)
    else:
        first = list(_take(lines))
        extracted = layout == "doc"
        blank_separated = extracted or _blank_separated(first)
        end = (lambda line: line.strip() == b"</doc>") if extracted else lambda line: not line.strip()
        if blank_separated and first and not end(first[-1]):
            first += _take(lines, end, 0)
        read = read_extracted if extracted else read_paragraphs if blank_separated else read_lines
        while first:
            payload = b"".join(first)
            yield Batch(read, (payload, where), len(payload), file.progress())
            first = list(_take(lines, end if blank_separated else None))


class _Recoded(io.RawIOBase):
    """The lines of a file in another encoding, as UTF-8."""

    def __init__(self, file, encoding):
        self._file, self._encoding = file, encoding
        self._text = io.TextIOWrapper(file.stream, encoding, newline="\n")
        self._next = None

    def peek(self, _):
        if self._next is None:
            self._next = self.readline()
        return self._next

    def readline(self, _=-1):
        line, self._next = self._next, None
        if line is not None:
            return line
        try:
            return self._text.readline().removeprefix("\ufeff").encode("utf-8")
        except UnicodeError as error:
            raise UserError(f"{self._file.path} is not in {self._encoding} ({error}): give its --encoding") from None

    def __iter__(self):
        return iter(self.readline, b"")

    def read(self, _=-1):
        return b"".join(self)


def _decode(data, where):
    """Returns UTF-8 bytes as text; raises UserError that tells how much of the file is not UTF-8, and where."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        path, member, _ = where
        with _Stored(path, member) as file:
            bad = [
                (number, count)
                for number, line in enumerate(file.stream, 1)
                if (count := line.decode("utf-8", "replace").count("\ufffd") - line.count("\ufffd".encode())) > 0
            ]
        count, first = sum(count for _, count in bad), bad[0][0] if bad else 1
        raise UserError(
            f"{file.path} is not UTF-8 text ({count:,} wrong bytes, the first in line {first:,}): "
            "give its --encoding, such as cp1252 or latin-1, or repair it"
        ) from None


def _together(texts, progress):
    """Yields batches of texts that this process has read already."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield Batch(list, batch, size, progress())
            batch, size = [], 0
    if batch:
        yield Batch(list, batch, size, progress())


def _csv(file, where, field):
    """Yields the text in one column of a .csv file with a header."""
    csv.field_size_limit(sys.maxsize)
    try:
        rows = csv.reader((_decode(line, where) for line in file.stream), strict=True)
        header = next(rows, [])
        if field not in header:
            raise UserError(f"{file.path} has no column {field!r}, only {_listed(header)}: name one with --field")
        column = header.index(field)
        for row in rows:
            if len(row) > column:
                yield row[column]
            elif row:
                raise UserError(
                    f"{file.path}, line {rows.line_num} has {len(row)} of {len(header)} columns: "
                    "repair it or leave it out"
                )
    except csv.Error as error:
        raise UserError(f"{file.path} is not a .csv file ({error}): repair it or leave it out") from None


def _is_json_line(line):
    """Returns whether a file begins with a line that is a JSON object: then every line should be one."""
    try:
        return isinstance(json.loads(line.split(b"\n")[0]), dict)
    except (ValueError, RecursionError):
        return line.lstrip()[:1] == b"{" and line.split(b"\n")[0].strip() not in (b"{", b"{}")


def _json(file, where, field):
    """Yields the texts of a JSON array of texts or of objects with `field`."""
    try:
        records = json.loads(_decode(file.stream.read(), where))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file.path} is not JSON ({error}): repair it or leave it out") from None
    for number, record in enumerate(records if isinstance(records, list) else [records], 1):
        record = {field: record} if isinstance(record, str) else record
        yield _field(record, field, f"{file.path}, record {number}") or ""


def _parquet(path, field):
    """Yields the text in one column of a .parquet file."""
    pyarrow = _package("pyarrow.parquet", ".parquet files")
    try:
        file = pyarrow.ParquetFile(pathlib.Path(path).open("rb"))  # it takes no name that is not UTF-8
    except Exception as error:  # pyarrow has its own kinds
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}): fetch it again") from None
    names = file.schema_arrow.names
    if field not in names:
        raise UserError(f"{path} has no column {field!r}, only {_listed(names)}: name one with --field")
    for batch in file.iter_batches(columns=[field]):
        for text in batch.column(0).to_pylist():
            yield _field({field: text}, field, path) or ""


def _records(file, read, number, *how):
    """Yields the batches of a file with one record per line; its next line has this `number`."""
    while lines := list(_take(file.stream)):
        payload = b"".join(lines)
        yield Batch(read, (payload, number, file.path, *how), len(payload), file.progress())
        number += len(lines)


def _listed(names):
    return textwrap.shorten(", ".join(names), 100, placeholder=" ...")


def _take(lines, end=None, size=BATCH_BYTES):
    """Yields about `size` bytes of whole lines; up to and with the next line that `end` accepts, if there is one."""
    taken = 0
    for line in lines:
        yield line
        taken += len(line)
        if taken >= size and (end is None or end(line)):
            return


def _blank_separated(lines):
    filled = "".join("x" if line.strip() else " " for line in lines).strip()  # blank lines at the ends separate nothing
    return 0 < len(filled) <= 100 * filled.count(" ")


def read_lines(payload):
    """Returns one document per line of UTF-8 bytes; `payload` is (bytes, place to name if they are not UTF-8)."""
    return _decode(*payload).split("\n")


def read_paragraphs(payload):
    """Returns the documents between blank lines."""
    documents = [[]]
    for line in read_lines(payload):
        if line.strip():
            documents[-1].append(line)
        elif documents[-1]:
            documents.append([])
    return ["\n".join(lines) for lines in documents]


_EXTRACTED = re.compile(r"""<doc [^<>]*title=(["'])(.*?)\1[^<>]*>\s*\n(.*?)^</doc>""", re.DOTALL | re.MULTILINE)


def read_extracted(payload):
    """Returns the documents of WikiExtractor's <doc> layout, without the title that it repeats."""
    documents = []
    for _, title, body in _EXTRACTED.findall(_decode(*payload)):
        lines = [line for line in html.unescape(body).split("\n") if line.strip()]
        documents.append("\n".join(lines[1:] if lines and lines[0].strip() == html.unescape(title) else lines))
    return documents


def read_jsonl(payload):
    """Returns the text in one field of each JSON line; null and blank lines give nothing."""
    data, first, path, where, field = payload
    documents = []
    for number, line in enumerate(read_lines((data, where)), first):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{path}, line {number} is not JSON: repair it or leave the file out") from None
        documents.append(_field(record, field, f"{path}, line {number}") or "")
    return documents


def _field(record, field, place):
    """Returns the text, or None, in one field of a record."""
    if not isinstance(record, dict) or field not in record:
        found = _listed(record) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{place} has no field {field!r}, only {found}: name one with --field")
    text = record[field]
    if not isinstance(text, str | None):
        raise UserError(f"{place}: field {field!r} is not text: name another with --field")
    return text


def read_tsv(payload):
    """Returns the text in one column of each line; the last column may contain tabs."""
    data, first, path, where, column, columns = payload
    documents = []
    for number, line in enumerate(read_lines((data, where)), first):
        cells = line.rstrip("\r").split("\t", columns - 1)
        if len(cells) > column:
            documents.append(cells[column])
        elif line.strip():
            raise UserError(f"{path}, line {number} has {len(cells)} of {columns} columns: repair it or leave it out")
    return documents


# --- other sources ---


def _docs():
    """Yields batches of Python files, about two megabytes of code (0.4 of prose) each."""
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
    """Yields batches of pages of a MediaWiki XML dump, split after a `</page>`."""
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


def _hugging_face(name, field):
    """Yields batches of rows of the training split of DATASET[:CONFIG[:COLUMN]], streamed."""
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
        yield from _package("datasets", "hf: sources").load_dataset(name, config or None, split="train", streaming=True)
    except UserError:
        raise
    except Exception as error:  # of any of the libraries below `datasets`
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        raise UserError(f"hf:{name} cannot be read ({reason}): check its name and the network") from None
