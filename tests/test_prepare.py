"""data/prepare.py: against a naive writer, for every kind of source, and under every kind of interruption."""

import bz2
import csv
import errno
import functools
import gzip
import hashlib
import itertools
import json
import lzma
import operator
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import zipfile

import filelock
import numpy as np
import pytest

from data import docstrings, sources, wikipedia
from data.encode import HASHES, document_hash, pieces, token_dtype
from data.prepare import prepare
from data.workers import ordered_map
from minidistil import files
from minidistil.data import Corpus, meta_digest
from minidistil.errors import UserError
from minidistil.tokenizer import Tokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORDS = "the of a cat dog sat on mat runs fast slowly house river blue green sky tree under over and".split()
SHARE = 0.1  # enough of these small corpora to be held out as asked
CONTENTS = ("train.bin", "val.bin", "counts.npy", "meta.json", "vocab.txt")


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    letters = "abcdefghijklmnopqrstuvwxyz"
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), *".,!0123456789"]
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(dict.fromkeys(entries + WORDS)) + "\n", encoding="utf-8")
    return path


def some_documents(count, seed=0):
    """Returns distinct documents of 3 to 40 words."""
    draw = random.Random(seed)
    return [f"{i} " + " ".join(draw.choices(WORDS, k=draw.randint(3, 40))) + "." for i in range(count)]


@pytest.fixture(scope="module")
def documents():
    return some_documents(2000)


def write_lines(path, documents):
    path.write_text("\n".join(documents) + "\n", encoding="utf-8")
    return path


def naive(documents, vocab, share=SHARE):
    """Returns (train ids, val ids), one document after the other in plain Python."""
    tokenizer = Tokenizer.load(vocab)
    sides = [], []
    for document in documents:
        number = int(hashlib.blake2b(document.encode(), digest_size=8).hexdigest(), 16) % 2**63
        sides[number < share * 2**63].extend([*tokenizer.encode(document), tokenizer.sep_id])
    return sides


def read(folder):
    """Returns the contents of a prepared folder, after checking that its meta.json tells the truth about them."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    rest = {key: value for key, value in meta.items() if key != "meta_sha256"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
    assert meta["meta_sha256"] == hashlib.sha256(canonical).hexdigest()
    for name, digest in meta["sha256"].items():
        assert files.sha256(folder / name) == digest
    train, val = (np.fromfile(folder / name, meta["dtype"]) for name in ("train.bin", "val.bin"))
    counts = np.load(folder / "counts.npy")
    tokenizer = Tokenizer.load(folder)
    assert meta["format"] == 1 + ("sentences" in meta) and meta["vocab_size"] == len(tokenizer.vocab) == len(counts)
    assert meta["tokenizer"] == tokenizer.digest
    assert meta["tokens"] == {"train": len(train), "val": len(val)}
    for side, ids in (("train", train), ("val", val)):
        assert meta["documents"][side] == np.count_nonzero(ids == tokenizer.sep_id)
    assert counts.dtype == np.int64 and np.array_equal(counts, np.bincount(train, minlength=len(counts)))
    return train, val, meta


def split_documents(ids, tokenizer):
    """Returns the set of documents, as tuples of ids."""
    ends = np.flatnonzero(ids == tokenizer.sep_id) + 1
    return {tuple(part[:-1]) for part in np.split(ids, ends)[:-1]}


def command(*arguments):
    return [sys.executable, str(ROOT / "data" / "prepare.py"), *map(str, arguments)]


def start(*arguments):
    """Starts a run in a process group of its own."""
    pipe = subprocess.PIPE
    listening = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    return subprocess.Popen(
        command(*arguments), stdout=pipe, stderr=pipe, text=True, start_new_session=True, preexec_fn=listening
    )


def run(*arguments, **options):
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120, **options)


# --- the files ---


def test_same_ids_as_a_naive_writer(tmp_path, vocab, documents):
    source = write_lines(tmp_path / "text.txt", documents)
    meta = prepare([source], vocab, tmp_path / "out", SHARE, workers=1)
    train, val, stored = read(tmp_path / "out")
    expected = naive(documents, vocab)
    assert train.tolist() == expected[0] and val.tolist() == expected[1]
    assert meta == stored
    assert sum(meta["bytes"].values()) == sum(len(text.encode()) for text in documents)
    assert meta["sources"] == [str(source)]
    assert sorted(os.listdir(tmp_path)) == ["out", "text.txt"]


def test_the_vocabulary_may_be_that_of_a_named_model(tmp_path, documents):
    source = write_lines(tmp_path / "text.txt", documents)
    done = run(source, "--vocab", "demo", "--out", tmp_path / "out", "--workers", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == (ROOT / "data" / "demo" / "vocab.txt").read_bytes()
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    files = {f"absent{suffix}": f"there is no absent{suffix}: name" for suffix in (".txt", ".json", ".model")}
    for name, reason in {"no/model": "forbids a download", **files}.items():
        done = run(source, "--vocab", name, "--out", tmp_path / "none", cwd=tmp_path, env=offline)
        assert done.returncode == 1 and reason in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "none").exists()


def test_the_training_program_reads_it(tmp_path, vocab, documents):
    data = pytest.importorskip("minidistil.data")
    prepare([write_lines(tmp_path / "text.txt", documents)], vocab, tmp_path / "out", SHARE, workers=1)
    corpus = data.Corpus(tmp_path / "out")
    train, val, _ = read(tmp_path / "out")
    assert np.array_equal(corpus.train[:], train) and np.array_equal(corpus.val[:], val)


def test_any_number_of_workers_writes_the_same_bytes(tmp_path, vocab):
    """Over several batches, a document longer than a batch among them."""
    documents = some_documents(30_000)
    documents[7] = " ".join(random.Random(1).choices(WORDS, k=400_000))
    source = write_lines(tmp_path / "text.txt", documents)
    assert source.stat().st_size > 4 * sources.BATCH_BYTES
    for workers in (1, 2, 3):
        prepare([source], vocab, tmp_path / str(workers), SHARE, workers=workers)
    for name in CONTENTS:
        assert len({files.sha256(tmp_path / str(workers) / name) for workers in (1, 2, 3)}) == 1
    train, val, _ = read(tmp_path / "2")
    expected = naive(documents, vocab)
    assert train.tolist() == expected[0] and val.tolist() == expected[1]


@pytest.mark.parametrize(("size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_ids_take_the_smallest_type_that_holds_them(tmp_path, size, dtype):
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]
    entries += [f"[unused{i}]" for i in range(size - len(entries) - 1)] + ["last"]
    (tmp_path / "vocab.txt").write_text("\n".join(entries) + "\n", encoding="utf-8")
    source = write_lines(tmp_path / "text.txt", ["last a"] * 50 + ["a last"] * 50)
    meta = prepare([source], tmp_path / "vocab.txt", tmp_path / "out", workers=1)
    assert meta["dtype"] == dtype and token_dtype(size).str == {"uint16": "<u2", "uint32": "<u4"}[dtype]
    train, val, _ = read(tmp_path / "out")
    assert set(np.concatenate([train, val]).tolist()) == {3, 5, size - 1}


def test_long_text_is_cut_only_where_no_token_changes(vocab):
    tokenizer = Tokenizer.load(vocab)
    text = "\u00e9 ".join(random.Random(2).choices(WORDS, k=60_000)) + "x" * 200_000 + " \ttail\nof text"
    parts = list(pieces(text))
    assert len(parts) > 4 and "".join(parts) == text
    assert list(itertools.chain.from_iterable(map(tokenizer.encode, parts))) == tokenizer.encode(text)


# --- the held-out documents ---


def test_a_document_stays_on_its_side(tmp_path, vocab, documents):
    tokenizer = Tokenizer.load(vocab)
    sides = []
    shuffled = random.Random(3).sample(documents, len(documents))
    for name, texts in (("a", documents), ("b", shuffled), ("c", some_documents(500, seed=9) + documents[:1000])):
        prepare([write_lines(tmp_path / f"{name}.txt", texts)], vocab, tmp_path / name, val_share=0.2, workers=1)
        sides.append([split_documents(ids, tokenizer) for ids in read(tmp_path / name)[:2]])
    assert sides[0] == sides[1]
    assert not sides[0][0] & sides[0][1]
    assert not sides[0][0] & sides[2][1] and not sides[0][1] & sides[2][0]
    held_out = [document_hash(text.encode()) < 0.2 * HASHES for text in documents]
    assert 0.15 < np.mean(held_out) < 0.25


def test_repeated_text_is_on_one_side(tmp_path, vocab):
    source = write_lines(tmp_path / "text.txt", some_documents(300) * 4)
    prepare([source], vocab, tmp_path / "out", val_share=0.3, workers=1)
    train, val, meta = read(tmp_path / "out")
    tokenizer = Tokenizer.load(vocab)
    assert not split_documents(train, tokenizer) & split_documents(val, tokenizer)
    assert meta["documents"]["train"] + meta["documents"]["val"] == 1200


@pytest.mark.parametrize("count", [2, 3, 10, 60, 700])
def test_a_small_corpus_holds_out_the_smallest_hashes(tmp_path, vocab, count, capsys):
    documents = some_documents(count, seed=4)
    source = write_lines(tmp_path / "text.txt", documents)
    prepare([source], vocab, tmp_path / "out", val_share=1e-6, workers=1)
    assert "so little text holds out more than --val-share 1e-06: " in capsys.readouterr().out
    train, val, meta = read(tmp_path / "out")
    held_out = meta["documents"]["val"]
    tokenizer = Tokenizer.load(vocab)
    by_hash = sorted(documents, key=lambda text: document_hash(text.encode()))
    assert split_documents(val, tokenizer) == {tuple(tokenizer.encode(text)) for text in by_hash[:held_out]}
    target = min(2048, 0.1 * (len(train) + len(val)))
    assert len(val) >= target and meta["documents"]["train"] >= 1
    assert held_out == 1 or len(val) - len(tokenizer.encode(by_hash[held_out - 1])) - 1 < target  # and no more


def test_a_share_that_takes_everything_leaves_something(tmp_path, vocab):
    for count in (4, 300):
        source = write_lines(tmp_path / f"{count}.txt", some_documents(count))
        meta = prepare([source], vocab, tmp_path / f"{count}", 1 - 1e-12, workers=1)
        assert meta["documents"]["train"] and meta["documents"]["val"]


def test_a_long_document_with_the_largest_hash_is_not_held_out(tmp_path, vocab):
    long = " ".join(WORDS * 100)
    short = next(text for text in some_documents(100) if document_hash(text.encode()) < document_hash(long.encode()))
    meta = prepare([write_lines(tmp_path / "t.txt", [long, short])], vocab, tmp_path / "o", workers=1)
    assert meta["documents"] == {"train": 1, "val": 1} and meta["bytes"]["train"] == len(long)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no text"), ("\n \n\t\n\u200b\n", "no text"), ("a cat", "one document"), ("a cat\na cat\n", "one document")],
)
def test_what_cannot_be_split_is_refused(tmp_path, vocab, text, message):
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        prepare([tmp_path / "text.txt"], vocab, tmp_path / "out", workers=1)
    assert os.listdir(tmp_path) == ["text.txt"]


# --- kinds of sources ---


def write_jsonl(path, documents):
    return write_lines(path, [json.dumps({"id": i, "text": text}) for i, text in enumerate(documents)])


def write_tsv(path, documents):
    return write_lines(path, ["id\ttext\tend", *(f"{i}\t{text}\tz" for i, text in enumerate(documents))])


def write_windows(path, documents):
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(documents).encode())
    return path


def write_paragraphs(path, documents):
    return write_lines(path, [text.replace(" ", "\n") + "\n \n" for text in documents])


@pytest.mark.parametrize("compress", [None, gzip, bz2], ids=["plain", "gz", "bz2"])
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.txt", write_lines),
        ("a.jsonl", write_jsonl),
        ("a.tsv", write_tsv),
        ("b.txt", write_windows),
        ("c.txt", write_paragraphs),
    ],
)
def test_every_kind_of_file_gives_the_same_documents(tmp_path, vocab, documents, name, write, compress):
    path = write(tmp_path / name, documents)
    if compress:
        ending = {gzip: ".gz", bz2: ".bz2"}[compress]
        half = path.stat().st_size // 2  # two members: what `cat a.gz b.gz` makes
        data = path.read_bytes()
        path.unlink()
        path = path.with_name(name + ending)
        path.write_bytes(compress.compress(data[:half]) + compress.compress(data[half:]))
    prepare([path], vocab, tmp_path / "out", SHARE, workers=1)
    train, val, _ = read(tmp_path / "out")
    if write is not write_paragraphs:  # there the hash is that of the lines
        assert (train.tolist(), val.tolist()) == naive(documents, vocab)
    else:
        tokenizer = Tokenizer.load(vocab)
        found = split_documents(train, tokenizer) | split_documents(val, tokenizer)
        assert found == {tuple(tokenizer.encode(text)) for text in documents}


def test_a_folder_is_read_in_sorted_order(tmp_path, vocab, documents):
    folder = tmp_path / "text"
    for name in ("b/2.txt", "b/10.txt", "a.txt", ".hidden/x.txt", "b/.x.txt", "b/picture.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for name, part in (("a.txt", documents[1500:]), ("b/10.txt", documents[:700]), ("b/2.txt", documents[700:1500])):
        write_lines(folder / name, part)
    for name in (".hidden/x.txt", "b/.x.txt", "b/picture.png"):
        (folder / name).write_bytes(b"\0 the cat")
    prepare([folder], vocab, tmp_path / "out", SHARE, workers=1)
    train, val, _ = read(tmp_path / "out")
    assert (train.tolist(), val.tolist()) == naive(documents[1500:] + documents[:1500], vocab)


def test_blank_lines_separate_documents_if_there_are_enough(tmp_path):
    def texts(content):
        (tmp_path / "x.txt").write_text(content, encoding="utf-8")
        [batch] = sources.batches([tmp_path / "x.txt"])
        return [text for text in batch.read(batch.payload) if text.strip()]

    assert texts("one\ntwo\n\nthree\nfour\n") == ["one\ntwo", "three\nfour"]
    assert texts("\n\none\ntwo\n\n\n") == ["one", "two"]  # at the ends they separate nothing
    assert texts("one\n" * 300 + "\n" + "two\n" * 300) == ["one"] * 300 + ["two"] * 300
    assert texts("one\n" * 98 + "\ntwo\n") == ["\n".join(["one"] * 98), "two"]


def test_batches_end_between_documents(tmp_path):
    paragraph = "\n".join(["some words of a paragraph"] * 40)
    (tmp_path / "x.txt").write_text("\n\n".join(f"{i}\n{paragraph}" for i in range(3000)), encoding="utf-8")
    batches = list(sources.batches([tmp_path / "x.txt"]))
    assert len(batches) >= 3 and all(batch.weight < 1.1 * sources.BATCH_BYTES for batch in batches)
    assert sum(batch.progress for batch in batches) == (tmp_path / "x.txt").stat().st_size
    found = [text for batch in batches for text in batch.read(batch.payload) if text]
    assert found == [f"{i}\n{paragraph}" for i in range(3000)]


LATIN = "caf\u00e9 na\u00efve"


def texts_of(path, **options):
    """The documents of a file, stripped, without blank ones."""
    batches = list(sources.batches([path], **options))
    return [text.strip() for batch in batches for text in batch.read(batch.payload) if text.strip()]


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "start"), [("x.txt", ""), ("x.jsonl", ""), ("x.csv", "text\n"), ("x.tsv", "text\n"), ("p.txt", "a\n\n")]
)
def test_text_that_is_not_utf8_is_refused_or_read_as_told(tmp_path, vocab, name, start, ending):
    lines = ["a cat", LATIN, "the dog", LATIN]
    if name.endswith(".jsonl"):
        lines = [json.dumps({"text": line}, ensure_ascii=False) for line in lines]
    data = (start + "\n".join(lines) + "\n").encode("latin-1")
    path = tmp_path / (name + ending)
    path.write_bytes(gzip.compress(data) if ending else data)
    line = 2 + start.count("\n")
    expected = rf"{name}{ending} is not UTF-8 text \(4 wrong bytes, the first in line {line}\): give its --encoding"
    with pytest.raises(UserError, match=expected):
        prepare([path], vocab, tmp_path / "out", workers=1)
    assert os.listdir(tmp_path) == [path.name]
    found = "\n".join(texts_of(path, encoding="cp1252")).split("\n")
    assert [text for text in found if text != "a"] == ["a cat", LATIN, "the dog", LATIN]


def test_encodings(tmp_path):
    for encoding in ("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "UTF8"):
        (tmp_path / "x.txt").write_text(f"a cat\n{LATIN}\n", encoding=encoding)
        assert texts_of(tmp_path / "x.txt", encoding=encoding) == ["a cat", LATIN]
    (tmp_path / "x.txt").write_bytes(b"\xff\xfea\0b")
    with pytest.raises(UserError, match="x.txt is not in utf-16"):
        texts_of(tmp_path / "x.txt", encoding="utf-16")
    (tmp_path / "x.txt").write_bytes(b"a\xff\n")
    marked = "x.txt has no byte-order mark: give --encoding utf-16-le or utf-16-be"
    for encoding, message in (("utf-16", marked), ("nonsense", "not known"), ("base64", "not known")):
        with pytest.raises(UserError, match=message):
            texts_of(tmp_path / "x.txt", encoding=encoding)
    done = run(tmp_path / "x.txt", "--vocab", "demo", "--out", tmp_path / "o", "--encoding", "ascii")
    assert done.returncode == 1 and "not in ascii" in done.stderr and done.stderr.count("\n") == 1


def wiki_tags(documents):
    head = '<doc id="{0}" url="https://xx.example.org/wiki?curid={0}" title="A &quot;{0}&quot;">\nA "{0}"\n\n'
    return "".join(head.format(i) + f"{text} &lt;\n\n{text}\n\n</doc>\n" for i, text in enumerate(documents))


def wiki_json(documents):
    records = [{"id": "1", "url": "u", "title": "T", "text": f"{text} <\n{text}"} for text in documents]
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize("write", [wiki_tags, wiki_json])
@pytest.mark.parametrize("name", ["wiki_00", "wiki_00.bz2", "all.txt"])
def test_what_wikiextractor_writes(tmp_path, write, name):
    documents = [*some_documents(30), " ".join(WORDS * 2000)][::-1]  # the first is longer than a buffer
    data = write(documents).encode()
    (tmp_path / "AA").mkdir()
    (tmp_path / "AA" / name).write_bytes(bz2.compress(data) if name.endswith("bz2") else data)
    for path in (tmp_path, tmp_path / "AA" / name):
        assert texts_of(path) == [f"{text} <\n{text}" for text in documents]


def test_batches_of_wikiextractor_end_between_documents(tmp_path):
    documents = some_documents(20_000)
    (tmp_path / "wiki_00").write_text(wiki_tags(documents))
    assert len(list(sources.batches([tmp_path / "wiki_00"]))) > 2
    assert texts_of(tmp_path) == [f"{text} <\n{text}" for text in documents]


TABLE = [{"n": "1", "text": 'a "cat", sat'}, {"n": "2", "text": "two\nlines"}, {"n": "3", "text": ""}]


def write_csv(path):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["n", "text"])
        writer.writeheader()
        writer.writerows(TABLE)


FORMATS = {
    "x.csv": write_csv,
    "x.json": lambda path: path.write_text(json.dumps(TABLE, indent=1)),
    "y.json": lambda path: path.write_text("\n".join(map(json.dumps, TABLE))),
    "z.json": lambda path: path.write_text(json.dumps([row["text"] for row in TABLE])),
    "x.jsonl.xz": lambda path: path.write_bytes(lzma.compress("\n".join(map(json.dumps, TABLE)).encode())),
}


@pytest.mark.parametrize("name", FORMATS)
def test_tables_and_json(tmp_path, name):
    FORMATS[name](tmp_path / name)
    for path in (tmp_path / name, tmp_path):
        assert texts_of(path) == [row["text"] for row in TABLE if row["text"]]
    if name != "z.json":
        with pytest.raises(UserError, match=rf"{name}.* has no (column|field) 'body', only n, text: .*--field"):
            texts_of(tmp_path, field="body")


def test_a_zip_archive(tmp_path, vocab):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("b.txt", "the dog\n")
        archive.writestr("./a/a.txt", "a cat\nthe cat\n")
        archive.writestr("picture.png", "no text")
        archive.writestr("__MACOSX/a/._a.txt", b"\0\x05\x16\x07 of macOS")
        archive.writestr("a/.hidden/b.txt", "not read, as in a folder\n")
    assert texts_of(tmp_path / "x.zip") == ["a cat", "the cat", "the dog"]
    meta = prepare([tmp_path], vocab, tmp_path / "out", workers=1)
    assert meta["files"] == {"read": {".zip": 1}, "skipped": {".png": 1}}
    for data in (b"no archive", (tmp_path / "x.zip").read_bytes()[:-30]):
        (tmp_path / "x.zip").write_bytes(data)
        with pytest.raises(UserError, match="x.zip is damaged"):
            texts_of(tmp_path / "x.zip")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.pdf", "is not text .*convert it"),
        ("x.html.gz", "is not text"),
        ("x.tar.gz", "is not text"),
        ("x.parquet", "pip install pyarrow"),
        ("x.txt.zst", "pip install backports.zstd"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, vocab, monkeypatch, name, message):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_bytes(b"a cat\nthe dog\n")
    for path in (folder / name, folder):
        with pytest.raises(UserError, match=message if path.is_file() or "pdf" not in name else "no .txt"):
            prepare([path], vocab, tmp_path / "out", workers=1)


def test_no_path_of_this_repository_hides_a_source(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert sources.paths_first([sources.DOCSTRINGS]) == [sources.DOCSTRINGS]


def test_what_is_read_and_skipped_is_said(tmp_path, vocab, documents):
    folder = tmp_path / "docstrings"  # the path is meant, not the source of that name
    folder.mkdir()
    write_lines(folder / "a.txt", documents[:50])
    (folder / "b.md").write_text("the dog\n")
    (folder / "Makefile").write_text("the dog\n")
    done = run("docstrings", "--vocab", vocab, "--out", "out", "--workers", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "files read: 1 .txt; skipped, as of no known kind of text: 1 .md, 1 without ending" in done.stdout
    _, _, meta = read(tmp_path / "out")
    assert meta["files"] == {"read": {".txt": 1}, "skipped": {".md": 1, "without ending": 1}}
    assert sum(meta["documents"].values()) == 50 and meta["sources"] == ["./docstrings"]


def test_half_a_surrogate_pair_is_no_obstacle(tmp_path, vocab):
    write_lines(tmp_path / "x.jsonl", ['{"text": "a \\ud800 cat"}', '{"text": "the dog"}', '{"text": null}', ""])
    meta = prepare([tmp_path / "x.jsonl"], vocab, tmp_path / "out", workers=1)
    assert sum(meta["documents"].values()) == 2


def test_a_byte_order_mark_is_not_text(tmp_path):
    for name, content in (("x.jsonl", '{"text": "a"}'), ("x.txt", "a"), ("x.tsv", "text\na")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        [batch] = sources.batches([tmp_path / name])
        assert batch.read(batch.payload) == ["a"]


@pytest.mark.parametrize(
    ("name", "content", "field", "message"),
    [
        ("x.jsonl", '{"text": "a"}\n{"body": "b"}\n', "text", "x.jsonl, line 2 has no field 'text', only body:"),
        ("x.jsonl", '{"text": "a"}\n\n{"text": \n', "text", "x.jsonl, line 3 is not JSON"),
        ("x.jsonl", '{"text": "a longer one"}\n' * 60_000 + "?", "text", "x.jsonl, line 60001 is not JSON"),
        ("x.jsonl", '{"text": 3}\n', "text", "x.jsonl, line 1: field 'text' is not text"),
        ("x.jsonl", "[1]\n", "text", "line 1 has no field 'text', only list"),
        ("x.tsv", "id\tsentence\n1\ta cat\n", "text", "x.tsv has no column 'text', only id, sentence: .*--field"),
        ("x.tsv", "id\ttext\n1\ta cat\n2\n", "text", "x.tsv, line 3 has 1 of 2 columns"),
        ("x.tsv", "id\ttext\tlabel\n1\ta\tcat\tx\n", "text", "x.tsv, line 2 has 4 of 3 columns"),
        ("x.csv", "id,text,label\n1,a cat,x\n2,a, dog,y\n", "text", "x.csv, line 3 has 4 of 3 columns: put quotes"),
        ("x.csv", "id,text\n1,a cat,, \n2\n", "text", "x.csv, line 3 has 1 of 2 columns: repair it"),
        ("x.txt", "a\0b", "text", "x.txt is not UTF-8 text"),
    ],
)
def test_what_a_file_lacks_is_said_with_its_place(tmp_path, vocab, name, content, field, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        prepare([tmp_path / name], vocab, tmp_path / "out", field=field, workers=1)
    assert os.listdir(tmp_path) == [name]


def test_another_field(tmp_path, vocab, documents):
    lines = ["n\tbody text", *(f"{i}\t{text}\twith a tab" for i, text in enumerate(documents))]
    prepare([write_lines(tmp_path / "x.tsv", lines)], vocab, tmp_path / "out", SHARE, 1, "body text")
    train, val, _ = read(tmp_path / "out")
    assert (train.tolist(), val.tolist()) == naive([f"{text}\twith a tab" for text in documents], vocab)


@pytest.mark.parametrize("name, compress", [("x.txt.bz2", bz2.compress), ("x.txt.xz", lzma.compress)])
def test_nothing_is_lost_behind_a_stream(tmp_path, vocab, documents, name, compress):
    """Several streams, with zeros between them, are one text; what is no stream is damage, not an end."""
    lines = [f"{document}\n".encode() for document in documents]
    parts = [compress(b"".join(lines[i : i + 50])) for i in range(0, len(lines), 50)]
    (tmp_path / name).write_bytes((b"\0" * 8).join(parts) + b"\0" * 4)
    assert texts_of(tmp_path / name) == [line.decode().strip() for line in lines if line.strip()]
    for damage in (b"oops", b"X" + parts[1][1:], parts[1][:-3]):
        (tmp_path / name).write_bytes(parts[0] + damage)
        with pytest.raises(UserError, match=f"{name} is damaged"):
            texts_of(tmp_path / name)


@pytest.mark.parametrize("name", ["x.txt.gz", "x.txt.bz2"])
@pytest.mark.parametrize("damage", ["cut", "changed", "not compressed"])
def test_damaged_compression_names_the_file(tmp_path, vocab, documents, name, damage):
    text = "\n".join(documents).encode()
    data = gzip.compress(text) if name.endswith("gz") else bz2.compress(text)
    middle = len(data) // 2
    changed = data[:middle] + b"oops" + data[middle + 4 :]
    data = {"cut": data[:middle], "changed": changed, "not compressed": text}[damage]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} is damaged .*fetch or compress it again"):
        prepare([tmp_path / name], vocab, tmp_path / "out", workers=1)
    assert os.listdir(tmp_path) == [name]


def test_sources_that_are_not_there_are_refused_at_once(tmp_path, vocab):
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "nothing", "does not exist"),
        (tmp_path / "empty", "no .txt .* file below"),
        (f"wikipedia:{tmp_path / 'nothing.xml'}", "is not a file"),
    ):
        with pytest.raises(UserError, match=message):
            prepare([source], vocab, tmp_path / "out", workers=1)
    with pytest.raises(UserError, match="no source"):
        prepare([], vocab, tmp_path / "out")
    for options in ({"val_share": 0}, {"val_share": 1.5}, {"workers": 0}):
        with pytest.raises(UserError, match="--"):
            prepare(["docstrings"], vocab, tmp_path / "out", **options)


def test_hugging_face_datasets(tmp_path, vocab, monkeypatch):
    class Datasets:
        @staticmethod
        def load_dataset(name, config, split, streaming):
            assert (name, config, split, streaming) == ("org/set", "small", "train", True)
            return ({"body": text} for text in some_documents(50))

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    prepare(["hf:org/set:small:body"], vocab, tmp_path / "out", val_share=0.2, workers=1)
    train, val, _ = read(tmp_path / "out")
    assert (train.tolist(), val.tolist()) == naive(some_documents(50), vocab, 0.2)
    with pytest.raises(UserError, match="no column 'text', only body"):
        prepare(["hf:org/set:small"], vocab, tmp_path / "out2", workers=1)
    with pytest.raises(UserError, match="hf:other cannot be read .AssertionError"):
        prepare(["hf:other"], vocab, tmp_path / "out2", workers=1)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        prepare(["hf:org/set"], vocab, tmp_path / "out2", workers=1)


# --- documentation strings ---

PYTHON_SOURCE = r'''
"""Module of *some* importance.

.. note:: Kept because it is prose.

.. code-block:: python

    dropped = 1
"""

class Thing:
    """A :class:`~package.Thing` that has ``names`` and a `link <https://example.org>`_.

    Parameters
    ----------
    x : int
        The number of **items** to count::

            thing(x=3)

    Examples
    --------
    >>> Thing().count()
    3

    .. math::

        \frac{a}{b}

    The end of the text.
    """

    def method(self):
        """Too short."""

        def inner():
            """This stands inside of a function body."""

    if True:
        async def other(self):
            "A docstring with only one quote around it."

add_docstr(thing, r"""
thing(input) -> Tensor

Returns the thing of the input.
""".format(1))
'''


def test_docstrings_become_prose(tmp_path):
    (tmp_path / "a.py").write_text(PYTHON_SOURCE, encoding="utf-8")
    (tmp_path / "b.py").write_text('"""Not valid Python at all, sorry."""\nprint "x"\n', encoding="utf-8")
    (tmp_path / "c.py").write_text("# no docstring\nx = 1\n", encoding="utf-8")
    assert docstrings.harvest([tmp_path / name for name in ("a.py", "b.py", "c.py")]) == [
        "Module of some importance.\n\nKept because it is prose.",
        "A package.Thing that has names and a link .\n\nParameters\nx : int\nThe number of items to count:\n\n"
        "The end of the text.",
        "A docstring with only one quote around it.",
        "thing(input) -> Tensor\n\nReturns the thing of the input.",
    ]


def test_documentation_of_this_computer(tmp_path, vocab, monkeypatch):
    paths = docstrings.python_files()
    assert len(paths) > 400 and len(set(paths)) == len(paths) and paths == docstrings.python_files()
    assert not any("/test/" in path or "/tests/" in path or "site-packages/pip" in path for path in paths)
    some = [path for path in paths if "/email/" in path or "/json/" in path or "/unittest/" in path]
    text = docstrings.harvest(some)
    assert text == docstrings.harvest(some) and sum(map(len, text)) > 100_000
    assert not any(">>>" in document or "::" in document.split("\n")[0] for document in text)
    monkeypatch.setattr(docstrings, "python_files", lambda: some + some[::-1])
    prepare(["docstrings"], vocab, tmp_path / "out", workers=1)
    _, _, meta = read(tmp_path / "out")
    assert sum(meta["documents"].values()) == len(set(text))  # each document once


# --- Wikipedia ---

MARKUP = """{{Infobox city|name={{nowrap|Rome}}|map=[[File:x.svg|20px]]
|area={{convert|5|km|mi}}
}}<!-- a remark
over {{lines}} -->
'''Rome''' ({{IPA|x}}; {{lang|it|Roma}}) is the [[capital city|capital]] of [[Italy]]s.<ref name="a">{{cite|x}}</ref>
It is {{convert|5|km|mi}} long<ref name="b" /> &amp; ''wide''&nbsp;here, H<sub>2</sub>O.
[[File:x.jpg|thumb|A [[picture|nice picture]] of [http://x.y z], see {{tl}}]]
[[Datei:y.jpg|thumb|German]] [[Bild:z.JPG|mini|an older name]]
See [[c:File:Map.jpg|this map]] and [[Node.js]].
== History ==
=== Nothing follows ===
=== Early ===
* item [http://a.b/c with label] and [http://bare]
#: deeper
{| class="wikitable"
|-
! head || b
| a || b
{| nested
| x
|}
|}
: <math>\\frac{{a}}{b}}</math>the formula
<nowiki>[[kept]]</nowiki><br />second line
__NOTOC__
[[Category:Cities]]
[[fr:Rome]]
See [[:Category:Cities]].
== References ==
<references />
"""

PLAIN = """Rome (Roma) is the capital of Italys.
It is 5 km long & wide here, H2O.
See this map and Node.js.
Early
item with label and
deeper
the formula
[[kept]]
second line
See Category:Cities."""


def test_wiki_markup_becomes_text():
    assert wikipedia.plain(MARKUP, frozenset({"file", "category", "datei"})) == PLAIN


@pytest.mark.parametrize(
    ("markup", "shown"),
    [
        ("{{formatnum:3456}} people, {{FORMATNUM:-10}}&nbsp;degrees", "3456 people, -10 degrees"),
        ("{{formatnum:{{num|1234.5}}|R}} and {{formatnum|7}}", "1234.5 and 7"),
        ("{{convert|5|km|mi|abbr=on}}, {{cvt|2|-|3|ft}}, {{convert|3|x|4|m}}", "5 km, 2–3 ft, 3 by 4 m"),
        ("{{nowrap|10 {{small|of [[ten|10]]}}}}, {{nowrap|1=a = b}}", "10 of 10, a = b"),
        (
            "{{quote|To be {{!}} not|Hamlet}} {{Blockquote|text=I came.|author=Caesar}}",
            "To be | not\n— Hamlet\nI came.\n— Caesar",
        ),
        ("the {{abbr|UN|United Nations}}, {{tooltip|here|there}}", "the UN, here"),
        (
            "{{lang|fr|bon mot}}, {{lang-de|Wort}}, {{langx|it|parola|a word}}",
            "bon mot, German: Wort, Italian: parola, lit. 'a word'",
        ),
        ("{{frac|1|2}}, {{frac|3|1|2}}, {{sfrac|2}}, {{half}}", "1/2, 3 1/2, 1/2, 1/2"),
        (
            "{{val|3.5|u=kg}}, {{US$|20}}, {{circa|1066}}, {{As of|2010}}, 5{{times}}6, 1{{spaced_ndash}}2",
            "3.5 kg, US$20, c. 1066, As of 2010, 5×6, 1 – 2",
        ),
        ("It is{{citation needed|date=May 2020}} so.{{sfn|Smith|2001}}{{main|Rome}}", "It is so."),
        ("a {{nowrap}} b {{convert}} c {{frac}} d {{quote|}}", "a b c d"),
    ],
)
def test_what_templates_show_stays(markup, shown):
    assert wikipedia.plain(markup) == shown


@pytest.mark.parametrize("broken", ["[[open", "{{open", "text ]] and }} stay", "{|\n| cell\nx", "<ref>open", "<math>"])
def test_unclosed_markup_does_not_swallow_the_article(broken):
    assert wikipedia.plain(f"{broken}\nThe rest is read.").endswith("The rest is read.")


@pytest.mark.parametrize(
    "piece", ["{{", "[[", "[[a|b", "{{a|", "<ref>", "<ref><math>", "<!--", "[http://x ", "{|\n", "<", "''", "=", "( ;"]
)
def test_markup_takes_linear_time(piece):
    seconds = []
    for size in (50_000, 400_000):
        text = piece * (size // len(piece))
        started = time.process_time()
        wikipedia.plain(text + "]]" * (size // 10) + "}}" * (size // 10))
        seconds.append(time.process_time() - started)
    assert seconds[1] < 25 * max(seconds[0], 0.01)  # quadratic time would be 64


def page(title, text, namespace=0, extra=""):
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return (
        f"  <page>\n    <title>{title}</title>\n    <ns>{namespace}</ns>\n{extra}    <revision>\n"
        f'      <text bytes="1" xml:space="preserve">{escaped}</text>\n    </revision>\n  </page>\n'
    )


HEADER = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="de">
  <siteinfo><namespaces><namespace key="0" case="first-letter" />
  <namespace key="6" case="first-letter">Datei</namespace>
  <namespace key="14" case="first-letter">Kategorie</namespace></namespaces></siteinfo>
"""


def test_wikipedia_dump(tmp_path, vocab):
    documents = some_documents(4000, seed=5)
    pages = [page("Page", f"'''{text}'''\n[[Datei:x|thumb|y]]\n[[Kategorie:x]]") for text in documents]
    pages.insert(1, page("Old name", "#REDIRECT [[Rome]]", extra='    <redirect title="Rome" />\n'))
    pages.insert(2, page("Older name", "#redirect [[Rome]] {{R from move}}"))  # marked in its text alone
    pages.insert(2, page("Talk:Rome", "the discussion", namespace=1))
    pages.insert(3, page("Nothing", "{{delete}}"))
    dump = tmp_path / "dump.xml.bz2"
    dump.write_bytes(bz2.compress((HEADER + "".join(pages) + "</mediawiki>\n").encode()))
    prepare([f"wikipedia:{dump}"], vocab, tmp_path / "out", SHARE, workers=2)
    train, val, _ = read(tmp_path / "out")
    assert (train.tolist(), val.tolist()) == naive(documents, vocab)


@pytest.mark.parametrize("content", [HEADER + page("A", "the cat") + "  <page>\n <title>B", HEADER, "text", "x</page>"])
def test_what_is_not_a_whole_dump_is_refused(tmp_path, vocab, content):
    (tmp_path / "dump.xml").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="dump.xml is not a (whole )?MediaWiki dump"):
        prepare([f"wikipedia:{tmp_path / 'dump.xml'}"], vocab, tmp_path / "out", workers=1)


# --- where the output goes ---


def test_what_exists_is_left_alone(tmp_path, vocab, documents):
    source = write_lines(tmp_path / "text.txt", documents)
    (tmp_path / "empty").mkdir()
    prepare([source], vocab, tmp_path / "empty", workers=1)  # an empty folder is no obstacle
    before = {name: files.sha256(tmp_path / "empty" / name) for name in CONTENTS}
    with pytest.raises(UserError, match="already holds a prepared corpus"):
        prepare([source], vocab, tmp_path / "empty", workers=1)
    assert before == {name: files.sha256(tmp_path / "empty" / name) for name in CONTENTS}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.doc").write_text("years of work")
    for out in ("other", "text.txt"):
        with pytest.raises(UserError, match="already exists"):
            prepare([source], vocab, tmp_path / out, workers=1)
    assert os.listdir(tmp_path / "other") == ["thesis.doc"]
    result = run(source, "--vocab", vocab, "--out", source / "below")
    assert result.returncode == 1 and result.stderr.startswith("prepare.py: error: ") and result.stderr.count("\n") == 1


def test_a_mount_point_is_refused_before_the_text_is_read(tmp_path, vocab, monkeypatch):
    """An empty volume of a container: what is complete could not take its place."""
    (tmp_path / "out").mkdir()

    def busy(self):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self))

    monkeypatch.setattr(pathlib.Path, "rmdir", busy)
    with pytest.raises(UserError, match="out is a mount point.*name a folder in it"):
        prepare([write_lines(tmp_path / "text.txt", ["a cat"])], vocab, tmp_path / "out", workers=1)
    assert sorted(os.listdir(tmp_path)) == ["out", "text.txt"]


def test_last_line_and_exit_codes(tmp_path, vocab, documents):
    source = write_lines(tmp_path / "text.txt", documents)
    result = run(source, "--vocab", vocab, "--out", "out", "--workers", 1, cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    summary = json.loads(result.stdout.splitlines()[-1])
    assert list(summary) == ["out", "documents", "tokens", "bytes", "seconds", "tokens_per_second", "peak_rss_mib"]
    assert summary["tokens"] == read(tmp_path / "out")[2]["tokens"]
    assert run(source, "--vocab", vocab).returncode == 2
    result = run(tmp_path / "none.txt", "--vocab", vocab, "--out", tmp_path / "o")
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "does not exist" in result.stderr


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, vocab):
    source = write_lines(tmp_path / "text.txt", some_documents(30_000))
    limited = ["sh", "-c", 'ulimit -f 200; exec "$@"', "sh"]
    limited += command(source, "--vocab", vocab, "--out", tmp_path / "out")
    result = subprocess.run(limited, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("prepare.py: error: file too large") and result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["text.txt"]


# --- sentences ---


def naive_sentences(documents, vocab, prefix):
    """Returns (ids, ends) of both sides in plain Python, from lists of sentences."""
    tokenizer = Tokenizer.load(vocab)
    sides = ([], []), ([], [])
    for text in itertools.chain.from_iterable(documents):
        number = int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) % 2**63
        ids, ends = sides[number < SHARE * 2**63]
        ids += [*tokenizer.encode(prefix + text), tokenizer.sep_id]
        ends.append(len(ids))
    return sides


def some_sentences(count, seed=0):
    """Returns distinct sentences, none of which ends like an initial ("on a.")."""
    return [text for text in some_documents(count, seed) if not text.endswith(" a.")]


@pytest.mark.parametrize("prefix", ["", "query: "])
def test_any_number_of_workers_writes_the_same_sentences(tmp_path, vocab, prefix):
    """Over several batches, as a naive writer does; a sentence longer than a batch and blank ones among them."""
    draw, texts = random.Random(8), some_sentences(5000)
    documents = [draw.choices(texts, k=3) for _ in range(15_000)]  # many a sentence stands in several
    documents[5] = [" ".join(draw.choices(WORDS, k=300_000)) + " on."]
    lines = ["<br />\u200b<br /> ".join([" ".join(parts[:2]), *parts[2:]]) for parts in documents]
    source = write_lines(tmp_path / "text.txt", ["\u200b", *lines])
    assert source.stat().st_size > 4 * sources.BATCH_BYTES
    for workers in (1, 2):
        prepare([source], vocab, tmp_path / str(workers), SHARE, workers=workers, prefix=prefix)
    names = (*CONTENTS, "train.ends.bin", "val.ends.bin")
    assert set(names) <= set(os.listdir(tmp_path / "1"))
    for name in names:
        assert files.sha256(tmp_path / "1" / name) == files.sha256(tmp_path / "2" / name)
    train, val, meta = read(tmp_path / "2")
    assert meta["sentences"] == {"prefix": prefix} and meta["format"] == 2  # which older programs refuse
    assert set(meta["sha256"]) == {"train.bin", "val.bin", "counts.npy", "train.ends.bin", "val.ends.bin"}
    assert sum(meta["bytes"].values()) == sum(len(text) for parts in documents for text in parts)
    for side, found, (ids, ends) in zip(
        ("train", "val"), (train, val), naive_sentences(documents, vocab, prefix), strict=True
    ):
        assert found.tolist() == ids and meta["documents"][side] == len(ends) > 1000
        assert np.fromfile(tmp_path / "2" / f"{side}.ends.bin", "<i8").tolist() == ends


def test_a_packed_corpus_is_what_it_was(tmp_path, monkeypatch):
    """Before there were corpora of sentences: the bytes, and the keys of meta.json with their order."""
    monkeypatch.chdir(tmp_path)
    meta = prepare([write_lines(pathlib.Path("text.txt"), some_documents(2000))], ROOT / "data/demo", "out", SHARE, 1)
    assert meta["sha256"] == {
        "train.bin": "31a771fea305175c93115f2d17dda82646c268edf2e682d89ea71a255b269bff",
        "val.bin": "8cf393f49423057c8ccbd88e7b8933ee3dac51da8d1ecfdb764adf36ae189ad3",
        "counts.npy": "c3a91fb9a059399e0722123afae7826e40e2753a54b846ca13bac4efb971c1d1",
    }
    keys = "format dtype vocab_size tokenizer documents tokens bytes sha256 sources files created_by meta_sha256"
    assert (
        list(meta)
        == list(json.loads((tmp_path / "out" / "meta.json").read_text()))
        == [key.replace("created_by", "created by") for key in keys.split()]
    )
    assert not list((tmp_path / "out").glob("*.ends.bin"))


def test_a_corpus_of_another_program_is_refused(tmp_path, vocab, documents):
    source = tmp_path / "a.txt"
    source.write_text("\n\n".join(documents))
    prepare([source], vocab, tmp_path / "out", SHARE)
    for number in (1, 2, 3):
        meta = json.loads((tmp_path / "out" / "meta.json").read_text()) | {"format": number}
        files.write_json(tmp_path / "out" / "meta.json", meta | {"meta_sha256": meta_digest(meta)})
        if number < 3:
            assert len(Corpus(tmp_path / "out").train) == meta["tokens"]["train"]
    with pytest.raises(UserError, match="has corpus format 3, this program reads 1 and 2: "):
        Corpus(tmp_path / "out")


def test_few_sentences_hold_out_the_smallest_hashes(tmp_path, vocab):
    """Of one document: a sentence is what is held out, whatever stands before it."""
    parts = some_sentences(60, seed=4)
    source = write_lines(tmp_path / "text.txt", [" ".join(parts)])
    tokenizer = Tokenizer.load(vocab)
    by_hash = sorted(parts, key=lambda text: document_hash(text.encode()))
    for number, prefix in enumerate(("", "query: ")):
        prepare([source], vocab, tmp_path / str(number), 1e-6, workers=1, prefix=prefix)
        train, val, meta = read(tmp_path / str(number))
        held_out = meta["documents"]["val"]
        expected = {tuple(tokenizer.encode(prefix + text)) for text in by_hash[:held_out]}
        assert split_documents(val, tokenizer) == expected
        assert held_out >= 1 and len(val) >= 0.1 * (len(train) + len(val)) > len(val) - max(map(len, expected)) - 1
        ends = np.fromfile(tmp_path / str(number) / "val.ends.bin", "<i8")
        assert np.array_equal(ends, np.flatnonzero(val == tokenizer.sep_id) + 1)
    write_lines(tmp_path / "one.txt", ["One sentence."])
    with pytest.raises(UserError, match="one document"):
        prepare([tmp_path / "one.txt"], vocab, tmp_path / "one", workers=1, prefix="query: ")
    write_lines(tmp_path / "none.txt", ["\u200b", "\u200b <br>"])
    with pytest.raises(UserError, match="no text"):
        prepare([tmp_path / "none.txt"], vocab, tmp_path / "none", workers=1, prefix="query: ")


def test_sentences_on_the_command_line(tmp_path, vocab, documents):
    source = write_lines(tmp_path / "text.txt", documents)
    asked = [source, "--vocab", vocab, "--workers", 1, "--out"]
    done = run(*asked, tmp_path / "none", "--prefix", "query: ")
    assert done.returncode == 1 and not (tmp_path / "none").exists()
    assert done.stderr == "prepare.py: error: --prefix stands before each sentence: add --sentences, or leave it out\n"
    for number, (more, prefix) in enumerate(((["--prefix", "query: "], "query: "), ([], ""))):
        done = run(*asked, tmp_path / str(number), "--sentences", *more)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert read(tmp_path / str(number))[2]["sentences"] == {"prefix": prefix}


def test_a_causal_vocabulary_has_no_sentences(tmp_path, documents):
    source = write_lines(tmp_path / "text.txt", documents)
    (tmp_path / "gpt2").mkdir()
    byte_letters = [*map(chr, range(33, 127)), *map(chr, range(161, 173)), *map(chr, range(174, 256))]
    byte_letters += map(chr, range(256, 256 + 256 - len(byte_letters)))
    ids = {token: i for i, token in enumerate([*byte_letters, "<|endoftext|>"])}
    (tmp_path / "gpt2" / "vocab.json").write_text(json.dumps(ids))
    (tmp_path / "gpt2" / "merges.txt").write_text("#version: 0.2\n")
    prepare([source], tmp_path / "gpt2", tmp_path / "packed", SHARE, workers=1)
    done = run(source, "--vocab", tmp_path / "gpt2", "--sentences", "--out", tmp_path / "out")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
    assert "--sentences needs a vocabulary with [CLS], and" in done.stderr


def test_sentences_of_a_real_table(tmp_path, assets):
    """SST-2's rows: each is a sentence, or a few."""
    path, vocab = assets / "glue" / "SST-2" / "train.tsv", assets / "vocab" / "bert-base-uncased.txt"
    if not path.exists():
        pytest.skip("SST-2 is absent")
    done = run(path, "--field", "sentence", "--sentences", "--vocab", vocab, "--workers", 1, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    train, val, meta = read(tmp_path / "out")
    with open(path, encoding="utf-8") as file:
        rows = [line.split("\t")[0].strip() for line in file][1:]
    tokenizer = Tokenizer.load(vocab)
    ids = split_documents(train, tokenizer) | split_documents(val, tokenizer)
    whole = sum(tuple(tokenizer.encode(row)) in ids for row in rows[:5000])
    assert whole > 0.99 * 5000 and len(rows) <= sum(meta["documents"].values()) < 1.01 * len(rows)


# --- interruptions ---


def children(pid):
    listed = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
    if not listed.exists():
        pytest.skip("needs Linux's /proc")
    return [int(child) for child in listed.read_text().split()]


def gone(pid):
    """Returns whether a process ends within a minute: a worker whose parent was killed finishes its batch first."""
    for _ in range(1200):
        try:
            if pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def slow_source(tmp_path_factory):
    """A quick megabyte, then 18 MB of words that must be spelled letter by letter: half a minute of work."""
    path = tmp_path_factory.mktemp("slow") / "text.txt"
    draw = random.Random(6)
    with open(path, "w") as file:
        file.write("the cat sat on the mat\n" * 46_000)
        for _ in range(60_000):
            file.write(" ".join("".join(draw.choices("abcdefghij", k=30)) for _ in range(10)) + "\n")
    return path


@pytest.mark.parametrize("sentences", [False, True])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)], ids=["INT", "TERM", "KILL"]
)
def test_an_interrupted_run_leaves_nothing_to_trust(tmp_path, vocab, documents, slow_source, number, code, sentences):
    asked = [slow_source, "--vocab", vocab, "--out", tmp_path / "out", "--workers", 2, *["--sentences"] * sentences]
    process = start(*asked)
    try:
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size for path in tmp_path.glob(".out.*.tmp/train.bin")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        workers = children(process.pid)
        assert len(workers) == 2
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does: to everybody in the foreground
        else:
            process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code and output == "" and "Traceback" not in errors
    assert errors == ("prepare.py: interrupted\n" if number == signal.SIGINT else "")
    assert all(map(gone, workers))
    assert not (tmp_path / "out").exists()
    if number != signal.SIGKILL:
        assert os.listdir(tmp_path) == []
    again = {"prefix": ""} if sentences else {}
    prepare([write_lines(tmp_path / "text.txt", documents)], vocab, tmp_path / "out", workers=1, **again)
    read(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out", "text.txt"]  # what the killed run left is gone


def test_a_dead_worker_is_one_line(tmp_path, vocab, slow_source):
    process = start(slow_source, "--vocab", vocab, "--out", tmp_path / "out", "--workers", 2)
    try:
        while not (workers := children(process.pid)):
            time.sleep(0.02)
        time.sleep(0.5)
        os.kill(workers[0], signal.SIGKILL)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1 and output == ""
    assert errors.startswith("prepare.py: error: a worker process died (exit code -9): ") and errors.count("\n") == 1
    assert os.listdir(tmp_path) == [] and all(map(gone, workers))


# --- memory ---


def test_reading_waits_for_the_workers():
    pulled = []

    def items():
        for i in range(200):
            pulled.append(i)
            yield i

    for answered, result in enumerate(ordered_map(2, functools.partial, (operator.mul, 2), items())):
        assert result == 2 * answered
        assert len(pulled) - answered <= 5
    assert len(pulled) == 200
    heavy = ordered_map(2, functools.partial, (operator.mul, 2), items(), weigh=lambda item: 1 << 30)
    pulled.clear()
    assert next(heavy) == 0 and len(pulled) == 2  # one at work, and the one that waits for it
    heavy.close()


def test_errors_of_workers_arrive_in_order():
    answers = ordered_map(2, functools.partial, (operator.truediv, 1), [1, 2, 0, 4])
    assert [next(answers), next(answers)] == [1.0, 0.5]
    with pytest.raises(ZeroDivisionError):
        next(answers)
    with pytest.raises(UserError, match="a worker process died .exit code 3."):
        list(ordered_map(2, functools.partial, (os._exit,), [3, 3, 3]))


@pytest.mark.parametrize("sentences", [False, True])
@pytest.mark.parametrize("line_length", [1_000, 80_000_000], ids=["lines", "one line"])
def test_memory_does_not_grow_with_the_text(tmp_path, line_length, sentences):
    """80 MB of text, or a line of 80 MB, is read in a little more memory than a few documents take."""
    words = ["internationalization", "nationalizations", "antidisestablishmentarianism"]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    line = (" ".join(words) + " ") * (line_length // 67) + "\n"
    with open(tmp_path / "text.txt", "w") as file:
        for i in range(80_000_000 // line_length):
            file.write(words[i % 2] + " " + line)
    asked = [tmp_path / "text.txt", "--vocab", tmp_path / "vocab.txt", "--out", tmp_path / "out", "--workers", 2]
    result = run(*asked, *["--sentences"] * sentences)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["peak_rss_mib"] < (100 if line_length == 1_000 else 160), summary


def test_two_writers_of_one_corpus(tmp_path):
    """The second is refused before it begins, not when it has ended; the first is not disturbed."""
    (tmp_path / "text.txt").write_text("one two three\n" * 50 + "four five six\n")
    out = tmp_path / "out"
    arguments = dict(val_share=0.5, workers=1, progress=False)
    held = filelock.FileLock(tmp_path / ".out.writer")
    with held, pytest.raises(UserError, match="another process is writing .*out"):
        prepare([tmp_path / "text.txt"], ROOT / "data" / "demo", out, **arguments)
    assert not out.exists()
    prepare([tmp_path / "text.txt"], ROOT / "data" / "demo", out, **arguments)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "text.txt"]
