"""data/vocab.py: what it writes is a vocabulary that our tokenizer, and everybody's, can use to the last entry."""

import collections
import json
import pathlib
import random
import subprocess
import sys

import pytest

from data import byte_vocab
from data import vocab as learner
from minidistil.errors import UserError
from minidistil.tokenizer import Tokenizer
from minidistil.tokenizers.byte_bpe import ByteBPE
from minidistil.tokenizers.byte_bpe_files import BYTES
from minidistil.tokenizers.wordpiece import WordPiece
from minidistil.tokenizers.wordpiece_files import SPECIAL_TOKENS

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEMS = "walk talk jump play look rain work help turn call Naïve Zürich über point paint print".split()
ENDINGS = ["", "", "s", "ed", "ing", "er", "ers", "able", "ingly"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of 4,000 lines of made-up words with punctuation, digits, Chinese and one very rare character."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    with open(path, "w", encoding="utf-8") as file:
        for i in range(4000):
            words = [draw.choice(STEMS) + draw.choice(ENDINGS) for _ in range(draw.randint(5, 25))]
            file.write(" ".join(words) + f", {i} (中文)." + ("\u16a0" if i == 7 else "") + "\n")
    return path


def run(*arguments):
    command = [sys.executable, str(ROOT / "data" / "vocab.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def learned(text, tmp_path_factory):
    """(lines of the vocabulary, summary, folder) of one run, uncased, 300 entries."""
    folder = tmp_path_factory.mktemp("learned") / "model"
    result = run(text, "--size", 300, "--out", folder)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    return (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1], json.loads(result.stdout), folder


def test_size_order_and_alphabet(learned):
    lines, summary, _ = learned
    assert len(lines) == len(set(lines)) == summary["size"] == 300
    assert lines[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    for c in "abcdefghijklmnopqrstuvwxyz0123456789":
        assert c in lines and f"##{c}" in lines
    for c in ",.()中文":  # always words of their own: a continuation could never be used
        assert c in lines and f"##{c}" not in lines
    assert "\u16a0" not in lines
    assert {"walk", "talk"} <= set(lines) and any(len(line) > 3 for line in lines if line.startswith("##"))


def test_every_entry_can_be_reached(learned):
    lines, _, folder = learned
    tokenizer = Tokenizer.load(folder)
    for i, entry in enumerate(lines[5:], 5):
        word = "a" + entry[2:] if entry.startswith("##") else entry
        assert tokenizer.encode(word)[-1] == i or entry.startswith("##") and word in lines
        assert WordPiece([*SPECIAL_TOKENS.values(), word]).encode(word) == [5]  # normalised already, and one word


def test_the_figures_are_true(learned, text):
    lines, summary, folder = learned
    tokenizer = Tokenizer.load(folder)
    contents = text.read_text(encoding="utf-8")
    words = collections.Counter(WordPiece([*SPECIAL_TOKENS.values()])._words(contents))
    ids = tokenizer.encode(contents)
    assert summary["words"] + 0.05 * summary["words"] > sum(words.values()) > summary["words"]  # without the held-out
    assert summary["tokens_per_word"] == pytest.approx(len(ids) / sum(words.values()), rel=0.02)
    assert summary["unk_share"] < 1e-3 and ids.count(tokenizer.unk_id) <= 1


def test_the_oracle_agrees(learned, text):
    tokenizers = pytest.importorskip("tokenizers")
    lines, _, folder = learned
    oracle = tokenizers.BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=True)
    for line in text.read_text(encoding="utf-8").split("\n")[:300]:
        assert Tokenizer.load(folder).encode(line) == oracle.encode(line, add_special_tokens=False).ids


def test_the_same_for_any_number_of_workers(learned, text, tmp_path):
    for workers in (1, 2):
        assert run(text, "--size", 300, "--out", tmp_path / f"{workers}.txt", "--workers", workers).returncode == 0
        written = (tmp_path / f"{workers}.txt").read_text(encoding="utf-8")
        assert written == "".join(f"{line}\n" for line in learned[0])


def test_cased(text, tmp_path):
    result = run(text, "--size", 300, "--out", tmp_path / "model", "--cased")
    assert result.returncode == 0, result.stderr
    tokenizer = Tokenizer.load(tmp_path / "model")
    assert not tokenizer.lowercase and not tokenizer.strip_accents
    assert {"ü", "Z", "ï", "Zürich"} <= set(tokenizer.vocab)
    assert json.loads(result.stdout)["unk_share"] < 1e-3
    assert Tokenizer.load(tmp_path / "model" / "vocab.txt").encode("Zürich") == tokenizer.encode("Zürich")


def test_shorter_than_byte_pairs_alone():
    """The point of learning more than needed: fewer tokens than the first merges give."""
    draw = random.Random(1)
    words = collections.Counter()
    for _ in range(3000):
        syllables = draw.choices(["ba", "ri", "tos", "quen", "li", "mar", "e"], k=draw.randint(2, 5))
        words["".join(syllables)] += draw.randint(1, 9)
    splitter = WordPiece([*SPECIAL_TOKENS.values()])
    ours = learner.learn(words, 240, splitter)
    base = ours[:5] + [entry for entry in ours[5:] if len(entry.removeprefix("##")) == 1]
    plain = list(dict.fromkeys(base + learner._byte_pairs(words, 300)))[:240]
    ours, plain = (learner.usage(WordPiece(vocab), words).total() for vocab in (ours, plain))
    assert ours < plain


@pytest.mark.parametrize(("size", "message"), [(20, "--size 20 is too small"), (9000, "lower --size or give more")])
def test_sizes_that_do_not_fit_the_text(text, tmp_path, size, message):
    result = run(text, "--size", size, "--out", tmp_path / "v.txt")
    assert result.returncode == 1 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "v.txt").exists()


@pytest.mark.parametrize("text_now, more, message", [
    ("\n\n", [], "the sources hold no text"), ("\n\n", ["--byte-level", "gpt2"], "the sources hold no text"),
    ("\u2585 \u2585\n", [], "lower --size or give more text"),  # which sentencepiece uses itself
])  # fmt: skip
def test_sources_without_words(text_now, more, message, tmp_path):
    (tmp_path / "x.txt").write_text(text_now, encoding="utf-8")
    arguments = [tmp_path / "x.txt", "--size", "300", "--out", tmp_path / "v", "--workers", "1", *more]
    with pytest.raises(UserError, match=message):
        learner.main([*map(str, arguments)])
    assert not (tmp_path / "v").exists()


def test_many_rare_characters_do_not_take_the_vocabulary():
    words = collections.Counter({"common": 10**7, "word": 10**7} | {chr(code): 1 for code in range(0x1000, 0x1250)})
    splitter = WordPiece([*SPECIAL_TOKENS.values()])
    entries = learner.learn(words, 120, splitter)
    assert len(entries) == 120 and {"common", "word"} <= set(entries)
    with pytest.raises(UserError, match="too small"):
        learner.learn(collections.Counter({chr(code): 1 for code in range(0x4E00, 0x5000)}), 300, splitter)


def test_a_vocabulary_in_use_is_not_overwritten(learned, text):
    _, _, folder = learned
    for out in (folder, folder / "vocab.txt"):
        result = run(text, "--size", 300, "--out", out)
        assert result.returncode == 1 and "already exists" in result.stderr


# --- byte-level BPE ---


@pytest.fixture(scope="module", params=["gpt2", "roberta"])
def byte_level(request, text, tmp_path_factory):
    """(kind, tokenizer, summary, folder) of one run, 500 entries."""
    folder = tmp_path_factory.mktemp("byte_level") / "model"
    result = run(text, "--size", 500, "--byte-level", request.param, "--out", folder)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    return request.param, Tokenizer.load(folder), json.loads(result.stdout), folder


def test_bytes_merges_and_special_tokens(byte_level):
    kind, tokenizer, summary, folder = byte_level
    assert isinstance(tokenizer, ByteBPE) and len(tokenizer.vocab) == summary["size"] == 500
    special = {"gpt2": ["<|endoftext|>"], "roberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]}[kind]
    assert len(tokenizer.merges) == 500 - 256 - len(special) and {*special, *BYTES} <= set(tokenizer.vocab)
    assert tokenizer.special_ids == ([499] if kind == "gpt2" else [0, 1, 2, 3, 499])
    assert {"\u0120walk", "\u0120Z\u00c3\u00bcrich", "ing", "\u00e4\u00b8\u0143\u00e6\u0138\u0129"} <= set(
        tokenizer.vocab
    )
    assert {"vocab.json", "merges.txt"} <= {path.name for path in folder.iterdir()}


def test_every_merge_can_be_reached(byte_level):
    _, tokenizer, _, _ = byte_level
    assert len(set(tokenizer.merges)) == len(tokenizer.merges)
    for left, right in tokenizer.merges:
        assert tokenizer._merge([tokenizer.ids[c] for c in left + right]) == [tokenizer.ids[left + right]]


def test_the_figures_of_byte_level_are_true(byte_level, text):
    _, tokenizer, summary, _ = byte_level
    contents = text.read_text(encoding="utf-8").split("\n")
    words = sum(len(tokenizer.words(chunk)) for line in contents for chunk in tokenizer.chunks(line.strip()))
    tokens = sum(len(tokenizer.encode(line.strip())) for line in contents)
    assert words * 0.95 < summary["words"] < words  # without the held-out
    assert summary["tokens_per_word"] == pytest.approx(tokens / words, rel=0.02) and "unk_share" not in summary


def test_byte_level_is_as_short_as_what_others_learn(byte_level, text):
    tokenizers = pytest.importorskip("tokenizers")
    _, tokenizer, _, _ = byte_level
    lines = text.read_text(encoding="utf-8").split("\n")
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator(lines, vocab_size=256 + len(tokenizer.merges), min_frequency=1, show_progress=False)
    expected = sum(len(encoding.ids) for encoding in theirs.encode_batch(lines))
    assert sum(len(tokenizer.encode(line)) for line in lines) < 1.01 * expected


def test_byte_level_for_any_number_of_workers(byte_level, text, tmp_path):
    kind, tokenizer, _, _ = byte_level
    for workers in (1, 2):
        out = tmp_path / str(workers)
        assert run(text, "--size", 500, "--byte-level", kind, "--out", out, "--workers", workers).returncode == 0
        assert Tokenizer.load(out).digest == tokenizer.digest


@pytest.mark.parametrize(("arguments", "message"), [
    (["--size", 200], "--size 200 is too small: the bytes and the special tokens alone take 257"),
    (["--size", 90000], "lower --size or give more text"),
    (["--size", 400, "--cased"], "--cased is for WordPiece"),
    (["--size", 400, "--out", "v.txt"], "name a folder with --out"),
    (["--size", 400, "--out", "merges.json"], "name a folder with --out"),
])  # fmt: skip
def test_byte_level_that_cannot_be(text, tmp_path, arguments, message):
    result = run(text, "--byte-level", "gpt2", "--out", tmp_path / "model", *arguments)
    assert result.returncode == 1 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_bytes_alone(text, tmp_path):
    assert run(text, "--byte-level", "gpt2", "--size", 257, "--out", tmp_path / "model").returncode == 0
    assert Tokenizer.load(tmp_path / "model").decode([*b"ABC"]) == "bcd"  # ids as in GPT-2: the first is "!"


def test_a_piece_that_the_earlier_merges_leave_in_three_is_skipped(monkeypatch):
    monkeypatch.setattr(byte_vocab, "byte_pairs", lambda *_, **__: ["ab", "a", "abc", "xyz", "abcab"])
    found = byte_vocab.learn({"abc": 1}, 260, "gpt2")
    assert found.merges == [("a", "b"), ("ab", "c"), ("abc", "ab")]
