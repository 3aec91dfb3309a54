"""data/formats.py and its kin: long documents, and the files that people have."""

import bz2
import csv
import gzip
import json
import lzma
import os
import pathlib
import random
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from data import formats, json_values, sources
from data.documents import DOCUMENT_BYTES, RECORD_BYTES
from minidistil import files
from minidistil.errors import UserError
from minidistil.tokenizer import Tokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent
VOCAB = ROOT / "data" / "demo"
WORDS = "the of a cat dog sat on mat runs fast slowly house river blue green sky caf\u00e9 under over and".split()


def texts_of(*paths, **options):
    """The documents of sources, stripped, without blank ones."""
    return [text for batch in sources.batches(paths, **options) for text in batch.documents()[0] if text]


def cuts_of(path):
    return sum(batch.documents()[1] for batch in sources.batches([path]))


def run(script, *arguments):
    command = [sys.executable, str(ROOT / "data" / script), *map(os.fspath, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


# --- long documents ---


@pytest.fixture(scope="module")
def long_text():
    """About ten megabytes of words on one line."""
    return " ".join(random.Random(0).choices(WORDS, k=2_000_000))


def write_csv(path, text):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text"], [text]])


LONG = {
    "x.txt": lambda path, text: path.write_text(text, encoding="utf-8"),
    "x.txt.gz": lambda path, text: path.write_bytes(gzip.compress(text.encode(), 1)),
    "x.txt.bz2": lambda path, text: path.write_bytes(bz2.compress(text.encode(), 1)),
    "x.txt.xz": lambda path, text: path.write_bytes(lzma.compress(text.encode(), preset=0)),
    "x.zip": lambda path, text: zipfile.ZipFile(path, "w").writestr("x.txt", text),
    "x.jsonl": lambda path, text: path.write_text(json.dumps({"text": text}) + "\n"),
    "x.json": lambda path, text: path.write_text(json.dumps([text])),
    "x.tsv": lambda path, text: path.write_text(f"n\ttext\n1\t{text}\n", encoding="utf-8"),
    "x.csv": write_csv,
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_document_is_cut_at_white_space(tmp_path, long_text, name):
    LONG[name](tmp_path / name, long_text)
    found = texts_of(tmp_path / name)
    assert " ".join(found) == long_text  # no word is cut
    sizes = [len(text.encode()) for text in found]
    assert len(found) > 2 and max(sizes) <= DOCUMENT_BYTES and min(sizes[:-1]) > DOCUMENT_BYTES - 100
    assert cuts_of(tmp_path / name) == len(found) - 1
    tokenizer = Tokenizer.load(VOCAB)
    assert sum(map(tokenizer.encode, found), []) == tokenizer.encode(long_text)


def test_a_long_line_in_another_encoding(tmp_path, long_text):
    for encoding in ("latin-1", "utf-16"):
        (tmp_path / "x.txt").write_text(long_text, encoding=encoding)
        assert " ".join(texts_of(tmp_path / "x.txt", encoding=encoding)) == long_text


def test_a_line_of_the_greatest_length_is_whole(tmp_path):
    line = "word " * (DOCUMENT_BYTES // 5) + "end!"[: DOCUMENT_BYTES % 5]
    for end in ("", "\n", "\nanother line\n"):
        (tmp_path / "x.txt").write_text(line + end)
        assert texts_of(tmp_path / "x.txt")[0] == line.strip() and not cuts_of(tmp_path / "x.txt")
    (tmp_path / "x.txt").write_text(f"{line}x\nanother line\n")
    assert cuts_of(tmp_path / "x.txt") == 1 and texts_of(tmp_path / "x.txt")[2] == "another line"


def test_long_text_without_white_space(tmp_path):
    """Chinese is cut after a mark; what has no mark either is no text."""
    text = "\u732b\u5750\u5728\u57ab\u5b50\u4e0a\u3002" * 300_000
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    found = texts_of(tmp_path / "x.txt")
    assert "".join(found) == text and len(found) == 2 and found[0].endswith("\u3002")
    (tmp_path / "y.txt").write_text("a line\n" + "x" * (DOCUMENT_BYTES + 1))
    (tmp_path / "y.jsonl").write_text(json.dumps({"text": "x" * (DOCUMENT_BYTES + 1)}))
    for name, place in (("y.txt", "y.txt, line 2"), ("y.jsonl", "a document")):
        with pytest.raises(UserError, match=f"{place} has 4,194,304 bytes without white space or punctuation"):
            texts_of(tmp_path / name)


def test_a_long_paragraph_is_cut_between_lines(tmp_path):
    lines = [f"{i} some words of a line" for i in range(300_000)]
    (tmp_path / "x.txt").write_text("one\n\ntwo\n\n" * 30_000 + "\n".join(lines) + "\n\nlast\n")
    found = texts_of(tmp_path / "x.txt")
    assert found[:60_000] == ["one", "two"] * 30_000 and found[-1] == "last"
    assert "\n".join(found[60_000:-1]) == "\n".join(lines) and len(found) == 60_003
    assert max(batch.weight for batch in sources.batches([tmp_path / "x.txt"])) < 1.3 * DOCUMENT_BYTES
    assert cuts_of(tmp_path / "x.txt") == 1


def test_a_long_line_of_a_paragraph(tmp_path, long_text):
    (tmp_path / "x.txt").write_text(
        "one\n\ntwo\n\n" * 30_000 + f"first\n{long_text}\nlast\n\nthree\n", encoding="utf-8"
    )
    found = texts_of(tmp_path / "x.txt")[60_000:]
    assert " ".join(found).split() == f"first {long_text} last three".split()
    assert cuts_of(tmp_path / "x.txt") == len(found) - 2 and found[-1] == "three" and found[-2].endswith("\nlast")


@pytest.mark.parametrize("script", ["prepare.py", "vocab.py"])
def test_cuts_are_said(tmp_path, long_text, script):
    """In one line of output and in meta.json; any number of workers gives the same."""
    (tmp_path / "x.txt").write_text(long_text + "\nA line.\n" * 5, encoding="utf-8")
    (tmp_path / "y.jsonl").write_text(json.dumps({"text": long_text}))
    said = "long documents cut at white space into parts of at most 4,194,304 bytes: 4 cuts"
    options = ["--vocab", "demo"] if script == "prepare.py" else ["--size", "150"]
    for workers in "12":
        done = run(script, tmp_path / "x.txt", tmp_path / "y.jsonl", *options, "--out", tmp_path / workers,
                   "--workers", workers)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert said in done.stdout.splitlines()
    written = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert len({tuple(files.sha256(tmp_path / workers / name) for name in written) for workers in "12"}) == 1
    if script == "prepare.py":
        meta = json.loads((tmp_path / "1" / "meta.json").read_text())
        assert meta["long documents"] == {"cuts": 4, "bytes": DOCUMENT_BYTES}


def test_short_documents_are_not_said_to_be_cut(tmp_path):
    (tmp_path / "x.txt").write_text("a cat\nthe dog\n" * 20)
    done = run("prepare.py", tmp_path / "x.txt", "--vocab", "demo", "--out", tmp_path / "out", "--workers", "1")
    few, _ = done.stdout.splitlines()  # and the summary
    assert few.startswith("so little text") and "long" not in (tmp_path / "out" / "meta.json").read_text()


@pytest.mark.parametrize(
    ("name", "start", "message"),
    [
        ("x.jsonl", '{"text": "', r"x.jsonl, line 1 is a record of more than 16,777,216 bytes"),
        ("x.tsv", "text\nshort\n", r"x.tsv, line 3 is a record of more than"),
        ("x.csv", "text\nshort\n", r"x.csv, line 3 is a record of more than"),
        ("x.csv", 'text\nshort\n"\n' + 'short "" lines\n' * (RECORD_BYTES // 13), r"x.csv is not a .csv file .*limit"),
        ("x.json", '["short", "', r"x.json, record 2 is not JSON, or has more than 16,777,216 characters"),
        ("x.txt", '<doc id="1" title="T">\n' + "short\n" * (RECORD_BYTES // 6), r"x.txt has a <doc> of more than"),
    ],
)
def test_a_record_that_is_too_long_is_refused(tmp_path, name, start, message):
    (tmp_path / name).write_text(start + "the cat " * (RECORD_BYTES // 8 + 1))
    with pytest.raises(UserError, match=message):
        texts_of(tmp_path / name)


def test_a_page_with_its_history_is_refused(tmp_path):
    (tmp_path / "x.xml").write_text("<mediawiki><page><title>T</title>" + "<revision>x</revision>\n" * 800_000)
    with pytest.raises(UserError, match="without </page>: take a dump of pages-articles"):
        texts_of(f"wikipedia:{tmp_path / 'x.xml'}")


def test_json_is_read_value_by_value(tmp_path, monkeypatch):
    """Values that span blocks, in arrays and one after the other, with at most a few in memory."""
    records = [{"text": f'{i} \u00e9 \\ " [{{', "more": [{"a": [i]}] * (i % 50)} for i in range(3000)]
    longest = 0

    class Window(json_values._Window):
        def next(self):
            nonlocal longest
            longest = max(longest, len(self.text))
            return super().next()

    monkeypatch.setattr(json_values, "_Window", Window)
    monkeypatch.setattr(json_values, "_BLOCK", 997)
    for written in (
        json.dumps(records),
        json.dumps(records, indent=1, ensure_ascii=False),
        "\n".join(json.dumps(record, indent=2) for record in records),
        "[" + ",\n".join(map(json.dumps, records)) + "]\n",
    ):
        (tmp_path / "x.json").write_text(written, encoding="utf-8")
        assert texts_of(tmp_path / "x.json") == [record["text"] for record in records]
    assert 0 < longest < 20_000


@pytest.mark.parametrize(
    "content", ['["a"', '["a",]', '["a" "b"]', '["a"] "b"', '["a"]]', '{"text": "a"', "[1 2", '["a", tru]', ",", "]"]
)
def test_what_is_no_json_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match="x.json, .* (is not JSON|has no field)"):
        texts_of(tmp_path / "x.json")


# --- the files that people have ---

LINES = ["a cat", "the caf\u00e9", "a dog"]
TEXT = "".join(f"{line}\n" for line in LINES)
JSONL = "".join(json.dumps({"text": line}) + "\n" for line in LINES)
MARK = "\ufeff"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.txt", MARK + LINES[0] + "\n" + MARK + "\n".join(LINES[1:])),  # `cat a.txt b.txt`
        ("x.jsonl", MARK + JSONL.replace("\n", "\n" + MARK, 2)),
        ("x.txt", TEXT + "\0\0\0"),
        ("x.jsonl", JSONL + "\0"),
        ("x.json", json.dumps(LINES) + "\n\0"),
        ("x.tsv", "text\n" + TEXT + "\0"),
        ("x.csv", "text\n" + TEXT + "\0"),
        ("x.ndjson", JSONL),
        ("X.NDJSON", JSONL),
        ("x.txt", JSONL),
        ("without-ending", JSONL.replace('"a cat"', '"' + "a" * 300_000 + ' cat"')),
        ("X.TSV", "n\ttext\r\n" + "".join(f"1\t{line}\r\n" for line in LINES) + "\r\n"),
        ("a name\nof two lines.txt", TEXT),
        (os.fsdecode(b"caf\xe9.txt"), TEXT),
    ],
)
def test_odd_files_are_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    assert texts_of(tmp_path / name) == [LINES[0].replace("a", "a" * 300_000, "aaa" in content), *LINES[1:]]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        (
            "x.txt",
            TEXT.encode("utf-16-le"),
            {},
            r"\(1 wrong bytes and \d+ NUL bytes, the first in line 1\)",
        ),
        ("x.txt", TEXT.encode("utf-16-be"), {"encoding": "utf-16"}, "no byte-order mark: give --encoding utf-16-le or"),
        (
            "x.txt",
            TEXT.encode("utf-16-le"),
            {"encoding": "latin-1"},
            "not ISO8859-1 text .* true --encoding",
        ),
        ("x.txt", (TEXT * 9999 + "a\0b\n" + TEXT).encode(), {}, r"\(1 NUL bytes, the first in line 29,998\)"),
        ("x.txt", bytes(range(256)) * 999, {}, "not UTF-8 text"),
        ("x.txt", (TEXT * 9999).encode() + "\u00e9".encode()[:1], {}, r"\(1 wrong bytes, the first in line 29,998\)"),
        ("x.ndjson", b'{"body": "a"}\n', {}, "x.ndjson, line 1 has no field 'text', only body"),
        ("x.xml.bz2", b"<a>", {}, "is not text .*name a dump of Wikipedia as wikipedia:PATH"),
        ("x.xhtml", b"<p>", {}, "is not text"),
        ("x.tar.txt.gz", b"no gzip", {}, "is damaged"),
        ("x.csv", b'text\na\n"b\nc\n', {}, "x.csv is not a .csv file .line 4, unexpected end"),
        ("x.json", b'{"data": [\n{"text": "a"}]}', {}, "record 1 has no field 'text', only data"),
        ("x.json", b'["a", "caf\xe9"]', {}, "not UTF-8 text .1 wrong bytes"),
        ("x.txt", b'<doc id="1" title="T">\nT\n\na\n\n</doc>\n<doc id="2" title="U">\nU\n\nb\n', {}, "outside of <doc"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, name, content, options, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        sources.check([tmp_path / name])
        texts_of(tmp_path / name, **options)


@pytest.mark.parametrize("name", ["e.txt", "e.jsonl", "e.ndjson", "e.json", "e.tsv", "e.csv", "e.txt.gz"])
def test_an_empty_file_holds_no_document(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    (tmp_path / "x.txt").write_text(TEXT, encoding="utf-8")
    assert texts_of(tmp_path) == LINES


def test_links_to_folders_are_followed_once(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.txt").write_text(TEXT, encoding="utf-8")
    for name in ("a", "b"):
        (tmp_path / "text" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "text")
    assert texts_of(tmp_path / "text") == LINES


def test_a_folder_that_may_not_be_read_is_not_left_out(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "x.txt").write_text(TEXT)
    scan = os.scandir

    def guarded(path):
        if str(path).endswith("a"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(PermissionError):
        sources.text_files(tmp_path)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x.txt")
    (tmp_path / "y.txt").symlink_to("y.txt")
    for path, kind in (
        (tmp_path / "x.txt", "a pipe or device"),
        (tmp_path, "a pipe or device"),
        ("/dev/null", "a pipe or device"),
    ):
        with pytest.raises(UserError, match=f"is not a file but {kind}"):
            sources.check([path])
    (tmp_path / "x.txt").unlink()
    with pytest.raises(UserError, match="y.txt is not a file but a broken link"):
        sources.check([tmp_path])


@pytest.mark.parametrize("change", ["grows", "shrinks", "vanishes"])
def test_a_file_that_changes_while_it_is_read(tmp_path, change):
    path = tmp_path / "x.txt"
    path.write_text("the cat sat\n" * 500_000)
    batches = sources.batches([path])
    next(batches)
    if change == "vanishes":  # but is still open, and whole
        path.unlink()
        assert sum(len(batch.documents()[0]) for batch in batches) > 0
        return
    with open(path, "a") as file:
        file.truncate(100) if change == "shrinks" else file.write("and a dog\n")
    with pytest.raises(UserError, match="x.txt changed while it was read: start again when it is complete"):
        list(batches)


def test_members_of_an_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("folder/", "")
        archive.writestr("folder/a.json", json.dumps(LINES[:1]))
        archive.writestr("folder/B.NDJSON", "\n".join(JSONL.splitlines()[1:]))
        archive.writestr("c.md", "no text")
    assert sorted(texts_of(tmp_path / "x.zip")) == sorted(LINES)
    assert sources.files_of([tmp_path / "x.zip"]) == {"read": {".zip": 1}, "skipped": {".md": 1}}
    data = bytearray((tmp_path / "x.zip").read_bytes())
    for place in range(len(data) - 4):  # marked as encrypted in both headers of each member
        if data[place : place + 4] in (b"PK\1\2", b"PK\3\4"):
            data[place + (8 if data[place + 2] == 1 else 6)] |= 1
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(UserError, match="x.zip/.* cannot be read .*encrypted"):
        texts_of(tmp_path / "x.zip")


# --- formats that need a package ---


@pytest.fixture
def zstd():
    return pytest.importorskip("backports.zstd", reason="needs backports.zstd (requirements-dev.txt)")


@pytest.fixture
def parquet():
    return pytest.importorskip("pyarrow.parquet", reason="needs pyarrow (requirements-dev.txt)")


def test_zstandard(tmp_path, zstd, long_text):
    data = TEXT.encode()
    frames = zstd.compress(data[:7]) + zstd.compress(b"") + zstd.compress(data[7:])  # what `cat a.zst b.zst` makes
    (tmp_path / "x.txt.zst").write_bytes(frames)
    (tmp_path / "y.jsonl.zst").write_bytes(zstd.compress(JSONL.encode()))
    assert texts_of(tmp_path / "x.txt.zst") == texts_of(tmp_path / "y.jsonl.zst") == LINES
    (tmp_path / "x.txt.zst").write_bytes(zstd.compress(long_text.encode()))
    assert " ".join(texts_of(tmp_path / "x.txt.zst")) == long_text
    far = {zstd.CompressionParameter.window_log: 28, zstd.CompressionParameter.enable_long_distance_matching: 1}
    with zstd.open(tmp_path / "x.txt.zst", "wb", options=far) as file:
        file.write(data)
    assert texts_of(tmp_path / "x.txt.zst") == LINES
    for damaged in (frames[:-5], TEXT.encode(), frames + b"rest", zstd.compress(data)[:-3]):
        (tmp_path / "x.txt.zst").write_bytes(damaged)
        with pytest.raises(UserError, match="x.txt.zst is damaged .*fetch or compress it again"):
            texts_of(tmp_path / "x.txt.zst")


def test_parquet(tmp_path, parquet):
    import pyarrow

    def write(**columns):
        parquet.write_table(pyarrow.table(columns), tmp_path / "cafe.parquet", row_group_size=2)
        return tmp_path / "cafe.parquet"

    path = write(n=[1, 2, 3, 4], text=[LINES[0], None, *LINES[1:]])  # two row groups
    assert parquet.ParquetFile(path).num_row_groups == 2
    assert texts_of(path) == LINES
    odd = tmp_path / os.fsdecode(b"\xe9.parquet")
    os.rename(path, odd)
    assert texts_of(odd) == texts_of(tmp_path) == LINES
    odd.unlink()
    for kind in (pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        assert texts_of(write(text=pyarrow.array(LINES, kind))) == LINES
    assert texts_of(write(**{"a.b": LINES}), field="a.b") == LINES
    assert texts_of(write(body=LINES), field="body") == LINES
    assert texts_of(write(text=pyarrow.array([], pyarrow.string()))) == []
    assert texts_of(write(text=[None, None])) == []
    for columns, message in (
        ({"body": LINES}, "no column 'text', only body: name one with --field"),
        ({"text": [[line] for line in LINES]}, "'text' is not text"),
        ({"text": [{"text": line} for line in LINES]}, "'text' is not text"),
        ({"text": [1, 2]}, "'text' is not text"),
        ({"text": [b"a", b"b"]}, "'text' is not text"),
    ):
        with pytest.raises(UserError, match=message):
            texts_of(write(**columns))
    whole = write(text=LINES).read_bytes()
    for damaged in (whole[:-10], b"", b"PAR1" + bytes(len(whole) - 8) + b"PAR1", whole[:4] + bytes(40) + whole[44:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cafe.parquet cannot be read .*fetch it again"):
            texts_of(path)


def test_parquet_is_read_in_constant_memory(tmp_path, parquet):
    """One row group of 160 MB of long texts, of which no batch holds more than a few megabytes."""
    import pyarrow

    draw = np.random.default_rng(0)
    texts = [" ".join(map(str, draw.integers(0, 10**9, 1600).tolist())) for _ in range(10_000)]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "x.parquet", use_dictionary=False)
    assert parquet.ParquetFile(tmp_path / "x.parquet").num_row_groups == 1
    batches = list(sources.batches([tmp_path / "x.parquet"]))
    assert [text for batch in batches for text in batch.documents()[0]] == texts
    assert len(batches) > 100 and max(batch.weight for batch in batches) < 2 * formats.BATCH_BYTES
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from data import sources; from minidistil.memory import status_kib\n"
        "import pyarrow.parquet; before = status_kib('VmRSS')\n"
        "for batch in sources.batches([sys.argv[2]]): pass\n"
        "print((status_kib('VmHWM') - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, ROOT, tmp_path / "x.parquet"], capture_output=True, text=True)
    assert float(done.stdout) < 100, done.stdout + done.stderr
