"""File formats: one file -> batches of documents.

.txt                lines, or groups of lines between blank lines if a line in a hundred of the first megabyte is blank
.jsonl .ndjson      the text in one field of each line; also in another file whose first line is such an object
.json               JSON lines, or an array of texts or of objects with that field, or such objects one after the other
.tsv .csv           one column of a table with a header; .tsv without quoting, and the last column may contain tabs
.parquet            one column, by batches of rows
WikiExtractor's     <doc> elements or JSON lines, whatever the file's name

Memory is bounded by DOCUMENT_BYTES for text and by RECORD_BYTES for a record (data/documents.py): a longer line of
text is cut, a longer record refused.
"""

import contextlib
import csv
import html
import json
import re
import textwrap

from data.documents import BATCH_BYTES, DOCUMENT_BYTES, RECORD_BYTES, Batch
from data.json_values import values
from data.stored import OPENERS, Stored, decode, package
from minidistil.errors import UserError

_LONG_RECORD = re.compile(rb'\s*\{"id": ?"[^"]*", ?("revid": ?"[^"]*", ?)?"url": ?"')  # its first article may be long
_WIKIEXTRACTOR = re.compile(rb"<doc id=[^<>]*>")  # how its files begin, which have no ending


def batches_of(path, member, field, encoding):
    """Yields the batches of one file, cut between documents; `member` is the name in a .zip file, or None."""
    name = (member or path).lower()
    for ending in OPENERS:
        name = name.removesuffix(ending)
    if name.endswith(".parquet"):
        yield from together(_parquet(path, field))
        return
    with Stored(path, member, encoding) as file:
        file.skip_mark()
        beginning = file.stream.peek(1)
        layout = layout_of(beginning)
        if not beginning:
            return  # an empty file
        if name.endswith(".csv"):
            yield from together(_csv(file, field), file.progress)
        elif name.endswith(".tsv"):
            yield from _tsv(file, field)
        elif name.endswith((".jsonl", ".ndjson")) or layout == "json" or _is_json_lines(name, beginning, field):
            yield from _records(file, read_jsonl, 1, field)
        elif name.endswith(".json"):
            yield from together(_json(file, field), file.progress)
        elif layout == "doc":
            yield from _extracted(file)
        else:
            yield from _text(file)


def layout_of(beginning):
    """Returns "doc" or "json" for the layouts of WikiExtractor, else "text"."""
    if _WIKIEXTRACTOR.match(beginning):
        return "doc"
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(beginning.split(b"\n")[0])
        return "json" if isinstance(record, dict) and {"id", "url", "title", "text"} <= set(record) else "text"
    return "json" if _LONG_RECORD.match(beginning) else "text"


def listed(names):
    """Returns names as a short text."""
    return textwrap.shorten(", ".join(map(str, names)), 100, placeholder=" ...")


# --- text ---


def _text(file):
    """Yields the batches of a file whose lines, or groups of lines, are documents."""
    lines = file.text_lines()
    first = list(_take(lines))
    paragraphs = _blank_separated(first)
    if paragraphs:
        lines = _bounded(file, first, lines)
        first = []
    read = read_paragraphs if paragraphs else read_lines
    while taken := first or list(_take(lines, _ends_paragraph if paragraphs else None)):
        yield _batch(file, read, taken)
        first = []


def _ends_paragraph(line):
    return not line.strip() or line.endswith(b"\n\n")  # the latter from a long line that was cut


def _bounded(file, first, lines):
    """Yields lines, with a blank one after DOCUMENT_BYTES without any."""
    size = 0
    for source in (first, lines):
        for line in source:
            if size and size + len(line) > DOCUMENT_BYTES and line.strip():
                file.cuts += 1
                yield b"\n"
                size = 0
            yield line
            size = 0 if _ends_paragraph(line) else size + len(line)


def _blank_separated(lines):
    filled = "".join("x" if line.strip() else " " for line in lines).strip()  # blank lines at the ends separate nothing
    return 0 < len(filled) <= 100 * filled.count(" ")


def _batch(file, read, lines, *how):
    payload, cuts, file.cuts = b"".join(lines), file.cuts, 0
    return Batch(read, (payload, file.where, *how), len(payload), file.progress(), cuts=cuts)


def _take(lines, end=None, size=BATCH_BYTES):
    """Yields about `size` bytes of whole lines; up to and with the next line that `end` accepts, if there is one."""
    taken = 0
    for line in lines:
        yield line
        taken += len(line)
        if taken >= size and (end is None or end(line)):
            return


def read_lines(payload):
    """Returns one document per line of UTF-8 bytes; `payload` is (bytes, place to name if they are not UTF-8)."""
    return decode(*payload).split("\n")


def read_paragraphs(payload):
    """Returns the documents between blank lines."""
    documents = [[]]
    for line in read_lines(payload):
        if line.strip():
            documents[-1].append(line)
        elif documents[-1]:
            documents.append([])
    return ["\n".join(lines) for lines in documents]


# --- WikiExtractor's documents ---

_EXTRACTED = re.compile(
    r"""\s*<doc [^<>]*title=(["'])(?P<title>.*?)\1[^<>]*>\s*\n(?P<body>.*?)^</doc>""", re.DOTALL | re.MULTILINE
)


def _extracted(file):
    """Yields the batches of a file in WikiExtractor's <doc> layout."""
    lines = _limited(file, file.record_lines())
    while taken := list(_take(lines, lambda line: line.strip() == b"</doc>")):
        yield _batch(file, read_extracted, taken)


def _limited(file, lines):
    """Yields lines; raises UserError for RECORD_BYTES without a </doc>."""
    size = 0
    for line in lines:
        size += len(line)
        if size > RECORD_BYTES:
            raise UserError(f"{file.path} has a <doc> of more than {RECORD_BYTES:,} bytes: extract it again")
        if line.strip() == b"</doc>":
            size = 0
        yield line


def read_extracted(payload):
    """Returns the documents of WikiExtractor's <doc> layout, without the title that it repeats."""
    text, (path, _, _) = decode(*payload), payload[1]
    documents, end = [], 0
    while match := _EXTRACTED.match(text, end):
        end = match.end()
        title, body = html.unescape(match["title"]), html.unescape(match["body"])
        lines = [line for line in body.split("\n") if line.strip()]
        documents.append("\n".join(lines[1:] if lines and lines[0].strip() == title else lines))
    if rest := text[end:].strip():
        shown = textwrap.shorten(rest, 60, placeholder=" ...")
        raise UserError(f"{path} has text outside of <doc ...> and </doc> ({shown!r}): extract it again")
    return documents


# --- tables ---


def _tsv(file, field):
    header = decode(next(file.record_lines(), b""), file.where).rstrip("\r\n").split("\t")
    yield from _records(file, read_tsv, 2, _column(file.path, header, field), len(header))


def _column(path, header, field):
    if field not in header:
        raise UserError(f"{path} has no column {field!r}, only {listed(header)}: name one with --field")
    return header.index(field)


def _records(file, read, number, *how):
    """Yields the batches of a file with one record per line; its next line has this `number`."""
    lines = file.record_lines(number)
    while taken := list(_take(lines)):
        yield _batch(file, read, taken, number, file.path, *how)
        number += len(taken)


def read_tsv(payload):
    """Returns the text in one column of each line; the last column may contain tabs."""
    data, where, first, path, column, columns = payload
    documents = []
    for number, line in enumerate(read_lines((data, where)), first):
        cells = line.rstrip("\r").split("\t", columns - 1 if column == columns - 1 else -1)
        if len(cells) > column and not any(map(str.strip, cells[columns:])):
            documents.append(cells[column])
        elif line.strip():
            raise UserError(f"{path}, line {number} has {len(cells)} of {columns} columns: repair it or leave it out")
    return documents


def _csv(file, field):
    """Yields the text in one column of a .csv file with a header."""
    csv.field_size_limit(RECORD_BYTES)
    try:
        rows = csv.reader((decode(line, file.where) for line in file.record_lines()), strict=True)
        header = next(rows, [])
        column = _column(file.path, header, field)
        for row in rows:
            if row and (len(row) <= column or any(map(str.strip, row[len(header) :]))):  # some add empty cells
                way = "put quotes around a text with a comma, or leave the line out"
                way = "repair it or leave it out" if len(row) <= column else way
                raise UserError(f"{file.path}, line {rows.line_num} has {len(row)} of {len(header)} columns: {way}")
            if row:
                yield row[column]
    except csv.Error as error:
        place = f"line {rows.line_num}, {error}"
        raise UserError(f"{file.path} is not a .csv file ({place}): repair it or leave it out") from None


def _parquet(path, field):
    """Yields the text in one column of a .parquet file."""
    pyarrow = package("pyarrow.parquet", ".parquet files")
    try:
        # opened here, since pyarrow takes no name that is not UTF-8; the options keep it from reading whole row groups
        with open(path, "rb") as raw, pyarrow.ParquetFile(raw, buffer_size=BATCH_BYTES, pre_buffer=False) as file:
            _column(path, file.schema_arrow.names, field)
            for batch in file.iter_batches(_rows_at_once(file, field), columns=[field], use_threads=False):
                for text in batch.column(0).to_pylist():
                    yield _field({field: text}, field, path) or ""
    except (UserError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # pyarrow has its own kinds
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        raise UserError(f"{path} cannot be read ({reason}): fetch it again") from None


def _rows_at_once(file, field):
    """Returns how many rows of the column take about BATCH_BYTES on average, in the row group of the longest."""
    longest = 1
    for i in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(i)
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema.split(".")[0] == field:
                longest = max(longest, column.total_uncompressed_size // max(1, group.num_rows))
    return max(1, min(BATCH_BYTES // longest, 1 << 14))


# --- JSON ---


def _is_json_lines(name, beginning, field):
    """Returns whether a .json file, or one of text, begins with a line that is a JSON object with `field`.

    In a .json file, any object that does not span lines will do.
    """
    line = beginning.split(b"\n")[0].strip()
    try:
        record = json.loads(line)
        return isinstance(record, dict) and (name.endswith(".json") or field in record)
    except (ValueError, RecursionError):
        longer = line[:1] == b"{" and line == beginning.strip()
        return longer and (name.endswith(".json") or f'"{field}":'.encode() in line)


def read_jsonl(payload):
    """Returns the text in one field of each JSON line; null and blank lines give nothing."""
    data, where, first, path, field = payload
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


def _json(file, field):
    """Yields the texts of a JSON array of texts or of objects with `field`, or of such values one after the other."""
    for number, record in enumerate(values(file), 1):
        record = {field: record} if isinstance(record, str) else record
        yield _field(record, field, f"{file.path}, record {number}") or ""


def _field(record, field, place):
    """Returns the text, or None, in one field of a record."""
    if not isinstance(record, dict) or field not in record:
        found = listed(record) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{place} has no field {field!r}, only {found}: name one with --field")
    text = record[field]
    if not isinstance(text, str | None):
        raise UserError(f"{place}: field {field!r} is not text: name another with --field")
    return text


def together(texts, progress=lambda: 0):
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
