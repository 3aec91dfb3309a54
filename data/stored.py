"""Files as streams of UTF-8: decompressed, decoded, and refused where damaged or in another encoding."""

import bz2
import codecs
import contextlib
import gzip
import importlib
import io
import lzma
import os
import pathlib
import re
import zipfile
import zlib

from data.documents import DOCUMENT_BYTES, RECORD_BYTES, place_to_cut
from minidistil.errors import UserError

OPENERS = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": lambda raw: _Streams(raw, bz2.BZ2Decompressor),
    ".xz": lambda raw: _Streams(raw, lzma.LZMADecompressor),
    ".zst": lambda raw: _zstd(package("backports.zstd", ".zst files"), raw),
}
MEMBERS = (".txt", ".jsonl", ".ndjson", ".json", ".tsv", ".csv")  # what is read of a .zip file
_BLOCK = 1 << 18
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # as "surrogateescape" decodes wrong bytes


def package(name, what):
    """Returns an optional package; raises UserError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{what} need the package `{name}`: pip install {name}") from None


def _zstd(library, raw):
    """Returns the reader of a .zst file, which may refer back 2 GiB, as those of `zstd --long=31` do."""
    return library.ZstdFile(raw, options={library.DecompressionParameter.window_log_max: 31})


class _Streams(io.RawIOBase):
    """What the streams of a .bz2 or .xz file hold; Python's own readers end in silence at bytes that are no stream."""

    def __init__(self, raw, decompressor):
        self._raw, self._new, self._stream = raw, decompressor, decompressor()

    def readable(self):
        return True

    def readinto(self, buffer):
        data = b""
        while not data:
            given = b""
            if self._stream.eof:
                given = self._stream.unused_data.lstrip(b"\0")  # streams may have zeros between them
                while not given:
                    if not (block := self._raw.read(_BLOCK)):
                        return 0
                    given = block.lstrip(b"\0")
                self._stream = self._new()
            elif self._stream.needs_input:
                given = self._raw.read(_BLOCK)
                if not given:
                    raise EOFError("it ends within a stream")
            data = self._stream.decompress(given, len(buffer))
        buffer[: len(data)] = data
        return len(data)


class Stored:
    """An open, perhaps compressed, file: the stream of its contents and the number of stored bytes read."""

    def __init__(self, path, member=None, encoding="utf-8"):
        self.where = path, member, encoding
        self.path = path if member is None else f"{path}/{member}"
        self.cuts = 0  # of long lines since this was last set to 0
        self._raw = open(path, "rb")
        self._before = self._state()
        opener = OPENERS.get(pathlib.Path(path).suffix.lower())
        with whole(path):
            stream = opener(self._raw) if opener else self._raw
            if member is not None:
                stream = _open_member(self._raw, member, self.path)
        if encoding != "utf-8":
            stream = _Recoded(self.path, stream, encoding)
        self.stream = stream if stream is self._raw else io.BufferedReader(stream, _BLOCK)
        self._reported = 0

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        changed = self._state() != self._before
        self._raw.close()
        if error is not None:
            with whole(self.path):
                raise error
        if changed:
            raise UserError(f"{self.path} changed while it was read: start again when it is complete")

    def _state(self):
        found = os.fstat(self._raw.fileno())
        return found.st_size, found.st_mtime_ns

    def progress(self):
        """Returns the stored bytes read since the last call."""
        before, self._reported = self._reported, self._raw.tell()
        return self._reported - before

    def skip_mark(self):
        """Skips a byte-order mark; raises UserError where the beginning is that of no text."""
        beginning = self.stream.peek(1)
        if b"\0" in beginning.rstrip(b"\0"):
            refuse(self.where)
        if beginning.startswith(codecs.BOM_UTF8):
            self.stream.read(len(codecs.BOM_UTF8))

    def text_lines(self):
        """Yields the lines of text, with their ends; one of more than DOCUMENT_BYTES in parts with a blank line after.

        NUL bytes at the end of the file are dropped.
        """
        number, rest = 1, b""
        while line := rest + self.stream.readline(DOCUMENT_BYTES + 1 - len(rest)):
            if line.endswith(b"\n"):
                yield line
                number, rest = number + 1, b""
            elif len(line) <= DOCUMENT_BYTES:  # the last one
                yield line.rstrip(b"\0")
                return
            else:
                end = place_to_cut(line[:DOCUMENT_BYTES], f"{self.path}, line {number:,}")
                self.cuts += 1
                yield line[:end] + b"\n\n"
                rest = line[end:]

    def record_lines(self, number=1):
        """Yields lines of records, the first with this number; raises UserError for one of more than RECORD_BYTES."""
        while line := self.stream.readline(RECORD_BYTES + 1):
            if len(line) > RECORD_BYTES:
                raise too_long(f"{self.path}, line {number:,}")
            yield line if line.endswith(b"\n") else line.rstrip(b"\0")
            number += 1


def too_long(name):
    """Returns the UserError for a record that is too long to be parsed."""
    return UserError(
        f"{name} is a record of more than {RECORD_BYTES:,} bytes, which is not parsed: split it, or make it a .txt file"
    )


@contextlib.contextmanager
def whole(path):
    """Turns what the readers of compressed files raise for damaged ones into a UserError."""
    try:
        yield
    except Exception as error:
        # gzip and bz2 report damage as EOFError, zlib.error, or OSError without an errno
        damaged = EOFError | zlib.error | lzma.LZMAError | zipfile.BadZipFile | OSError
        if not isinstance(error, damaged) and type(error).__name__ != "ZstdError" or getattr(error, "errno", None):
            raise
        raise UserError(f"{path} is damaged ({error}): fetch or compress it again") from None


def is_zip(path):
    """Returns whether a path is that of a .zip file."""
    return path.lower().endswith(".zip")


def is_hidden(member):
    """Returns whether a member of a .zip file is hidden, as __MACOSX/._NAME is, which macOS adds to each file."""
    return any(part.startswith(".") and part != "." for part in member.split("/"))


def members(path):
    """Returns the text files in a .zip file, without hidden ones; [None] for another file, which is one itself."""
    if not is_zip(path):
        return [None]
    with whole(path), zipfile.ZipFile(path) as archive:
        names = [n for n in sorted(archive.namelist()) if n.lower().endswith(MEMBERS) and not is_hidden(n)]
    if not names:
        raise UserError(f"{path} holds no {' '.join(MEMBERS)} file: extract it, or leave it out")
    return names


def _open_member(raw, member, name):
    try:
        return zipfile.ZipFile(raw).open(member)
    except (RuntimeError, NotImplementedError) as error:  # encrypted, or compressed in an unusual way
        raise UserError(f"{name} cannot be read ({error}): extract it") from None


# --- encodings ---


def codec(encoding):
    """Returns Python's name of an encoding of text."""
    try:
        "".encode(encoding)  # not all codecs are of text
        return codecs.lookup(encoding).name
    except LookupError:
        raise UserError(f"--encoding {encoding} is not known: name one of Python's, such as cp1252") from None


_MARKS = {"utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)}


class _Recoded(io.RawIOBase):
    """A stream in another encoding, as UTF-8."""

    def __init__(self, path, stream, encoding):
        self._path, self._stream, self._encoding = path, stream, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._ready, self._begun = b"", False

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self._ready:
            block = self._stream.read(_BLOCK)
            if not self._begun:
                self._check_order(block)
            try:
                self._ready = self._decoder.decode(block, final=not block).encode("utf-8")
            except UnicodeError as error:
                raise UserError(f"{self._path} is not in {self._encoding} ({error}): give its --encoding") from None
            if not block:
                break
        taken = self._ready[: len(buffer)]
        buffer[: len(taken)] = taken
        self._ready = self._ready[len(taken) :]
        return len(taken)

    def _check_order(self, block):
        """Raises UserError for UTF-16 or UTF-32 without a byte-order mark: Python would guess this computer's order."""
        self._begun = True
        mark = _MARKS.get(self._encoding, b"")
        if block and not block.startswith(mark):
            names = f"{self._encoding}-le or {self._encoding}-be"
            raise UserError(f"{self._path} has no byte-order mark: give --encoding {names}")


def decode(data, where):
    """Returns UTF-8 bytes as text, without byte-order marks at the start of lines; `where` is that of their file.

    Raises UserError that tells how much of the file is not UTF-8 text, and where.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        refuse(where)
    if "\0" in text:
        refuse(where)
    # from `cat a.txt b.txt`
    return text.replace("\n\ufeff", "\n").removeprefix("\ufeff") if "\ufeff" in text else text


def refuse(where):
    """Raises UserError for a file with wrong or NUL bytes."""
    path, member, encoding = where
    wrong = nulls = first = 0
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    with Stored(path, member, encoding) as file:
        number, block = 1, b"x"
        while block:
            block = file.stream.readline(_BLOCK)
            text = decoder.decode(block, final=not block)
            here = len(_NOT_UTF8.findall(text)), text.count("\0")
            if any(here) and not first:
                first = number
            wrong, nulls = wrong + here[0], nulls + here[1]
            number += block.endswith(b"\n")
    found = [f"{wrong:,} wrong bytes"] * (wrong > 0) + [f"{nulls:,} NUL bytes"] * (nulls > 0)
    remedy = "give its --encoding, such as cp1252, latin-1 or utf-16, or repair it"
    if encoding != "utf-8":
        remedy = "give its true --encoding, or repair it"
    raise UserError(
        f"{file.path} is not {encoding.upper()} text ({' and '.join(found)}, the first in line {first:,}): {remedy}"
    )
