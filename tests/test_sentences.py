"""Sentences: where documents are split, and batches of them as pure functions of seed and index."""

import hashlib
import json
import types

import numpy as np
import pytest
import torch
from test_data import V, stream, tokenizer  # noqa: F401  a fixture

from data.prepare import prepare
from data.sentence_split import sentences
from minidistil.data import IGNORE, Corpus, Prefetcher, Sequences, TokenFile, meta_digest
from minidistil.errors import UserError
from minidistil.memory import status_kib
from minidistil.sentences import WINDOW, Sentences
from minidistil.tokenizer import Tokenizer

G, T = 16, 64
MASKING = None, 0.0, 0.15


@pytest.mark.parametrize(
    "expected",
    [
        ["One ends here.", "Is it two?", "Yes! and no.", 'She said "Go."', '"No," he said.', "(Really?)", "$5 more."],
        ["J. Smith of the U.S. Navy saw Dr. Who at 3.5 m, e.g. Monday.", "It is John's.", "I...", "Then ... nothing"],
        ["1. First entry.", "'J. Smith' came.", "The end . . .", "Or not.", "10/10."],
        ["\u00a1Hola!", "\u00bfQu\u00e9 tal?", "\u00c9l dijo \u00abs\u00ed.\u00bb", "\u00c1ngel vino."],
        ["\u092f\u0939 \u0939\u0948\u0964", "\u0935\u0939 \u0939\u0948\u0964"],
        ["\u0645\u0646 \u0623\u0646\u062a\u061f", "\u0644\u0627 \u0634\u064a\u0621."],
    ],
)
def test_where_sentences_end(expected):
    assert list(sentences(" ".join(expected))) == expected


def test_full_width_marks_need_no_space():
    parts = [
        "\u8fd9\u662f\u3002",
        "\u597d\u5417\uff1f\uff01",
        "\u300c\u4f55\uff1f\u300d\u3068\u8a00\u3063\u305f\u3002",
        "a",
    ]
    assert list(sentences("".join(parts))) == parts


def test_lines_are_sentences():
    lines = ["no mark at the end", "it 's good . but not great .", "a", "Unter 3 Zeilen"]
    for end in ("\n", "\r\n", " \n\n ", "<br /><br />", " <BR> ", "\u2028"):
        assert list(sentences(end.join(["", *lines, ""]))) == lines
    assert list(sentences(" \n\t<br />\n")) == []


@pytest.mark.parametrize("piece", [".", "'", ".'", ". ", ". =", "\u3002", ".)", " ", "<br ", "A. "])
def test_splitting_takes_linear_time(piece):
    """Half a megabyte of marks is read, not backtracked over: a quadratic pattern would take hours."""
    assert len(list(sentences(f". {piece * (500_000 // len(piece))}"))) <= 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tokenizer):  # noqa: F811
    """3,030 sentences of 1 to 100 tokens in files: (tokens, ends)."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(19), 0.7, 3030).astype(int), 1, 100)
    ends = np.cumsum(lengths + 1)
    tokens = np.minimum(5 + rng.zipf(1.3, ends[-1]), V - 1).astype("<u2")
    tokens[ends - 1] = tokenizer.sep_id
    tokens[ends[9] : ends[10] - 1] = tokenizer.special_ids[1]  # a sentence in which nothing can be masked
    folder = tmp_path_factory.mktemp("sentences")
    tokens.tofile(folder / "train.bin")
    ends.astype("<i8").tofile(folder / "train.ends.bin")
    return TokenFile(folder / "train.bin", "<u2"), TokenFile(folder / "train.ends.bin", "<i8")


@pytest.fixture
def make(corpus, tokenizer):  # noqa: F811
    def made(seed=7, shuffle=True, **options):
        given = {"T": T, "G": G, **options}
        return Sentences(*corpus, tokenizer=tokenizer, seed=seed, shuffle=shuffle, **given)

    return made


def originals(batch):
    """The unmasked rows of a batch as tuples, without padding."""
    ids, labels, mask = batch
    return [tuple(row[real]) for row, real in zip(np.where(labels != IGNORE, labels, ids), mask, strict=True)]


def rows(corpus, tokenizer, T=T):  # noqa: F811
    """All sentences of a corpus as `originals` gives them, in the order of the file."""
    parts = np.split(corpus[0][:].astype(np.int64), corpus[1][:])[:-1]
    return [(tokenizer.cls_id, *part[: min(len(part) - 1, T - 2)], tokenizer.sep_id) for part in parts]


@pytest.mark.parametrize("masking", [None, MASKING])
def test_without_shuffle_the_sentences_of_the_file(make, corpus, tokenizer, masking):  # noqa: F811
    val = make(shuffle=False, masking=masking)
    expected = rows(corpus, tokenizer)
    for first, n in ((0, 5), (1000, 40), (3029, 1)):
        ids, labels, mask = val.batch(first, n)
        assert ids.dtype == labels.dtype == np.int64 and mask.dtype == bool and ids.shape == labels.shape == mask.shape
        longest = max(map(len, expected[first : first + n]))
        assert ids.shape == (n, min(T, (longest + 7) // 8 * 8))
        assert originals((ids, labels, mask)) == expected[first : first + n]
        assert (ids[~mask] == tokenizer.pad_id).all() and (labels[~mask] == IGNORE).all()
        assert ((labels != IGNORE).any() if masking else (labels == IGNORE).all()) and not val.causal
    assert val.label_share == (0.15 if masking else 0)
    assert val.mean_length == pytest.approx(np.mean([len(row) for row in expected]))  # all of them are in the sample


def test_an_epoch_uses_every_sentence_once_but_the_rest(make, corpus, tokenizer):  # noqa: F811
    train = make()
    n, left_out = train.per_epoch, []
    assert n == 3030 // G * G
    everything = sorted(rows(corpus, tokenizer))
    orders = []
    for epoch in range(2):
        found = [row for u in range(n // G) for row in originals(train.batch(epoch * n + u * G, G))]
        rest = list(everything)
        for row in found:
            rest.remove(row)  # raises ValueError for one more than the file has
        assert len(rest) == 3030 - n
        left_out.append(rest)
        orders.append(found)
    assert left_out[0] != left_out[1] and orders[0] != orders[1]
    assert originals(make(seed=8).batch(0, G)) != orders[0][:G]


def test_sentences_of_an_update_have_similar_lengths(make):
    """14 % is padding, of which the rounding up to a multiple of 8 makes 12; in random order it would be 59 %."""
    train = make()
    masks = [train.batch(u * G, G)[2] for u in range(train.per_epoch // G)]
    real, places = sum(mask.sum() for mask in masks), sum(mask.size for mask in masks)
    assert 0.84 < real / places < 1
    lengths = [mask.sum(1).mean() for mask in masks]
    window = lengths[:WINDOW]
    assert np.abs(np.corrcoef(window, np.arange(WINDOW))[0, 1]) < 0.5  # updates are not in the order of their lengths
    assert window != sorted(window)


@pytest.mark.parametrize("masking", [None, MASKING])
@pytest.mark.parametrize("size", [1, 2, 8, 16])
def test_a_split_changes_nothing(make, masking, size):
    """The same arrays, padding included, whatever the parts of an update and the order of the calls."""
    whole, parts = make(masking=masking), make(masking=masking)
    updates = [*range(WINDOW + 1), 188, 189, 400]  # 189 updates an epoch: across windows and epochs
    expected = {u: whole.batch(u * G, G) for u in updates}
    for u in reversed(updates):
        found = [parts.batch(u * G + at, size) for at in reversed(range(0, G, size))][::-1]
        for ours, theirs in zip(zip(*found, strict=True), expected[u], strict=True):
            assert np.array_equal(np.concatenate(ours), theirs)
    across = originals(whole.batch(188 * G - 3, 40))  # more than an update: the same sentences
    assert across[3 : 3 + G] == originals(expected[188]) and across[3 + G : 3 + 2 * G] == originals(expected[189])


@pytest.mark.parametrize("share", [0.02, 0.15, 0.3, 0.8])
def test_masks_of_each_sentence(make, corpus, tokenizer, share):  # noqa: F811
    val = make(shuffle=False, masking=(None, 0.0, share))
    _, labels, mask = val.batch(0, 3030)
    masked, lengths = labels != IGNORE, mask.sum(1)
    wanted = np.minimum(np.maximum(1, np.round(share * lengths)), lengths - 2)
    wanted[10] = 0  # special tokens only
    assert np.array_equal(masked.sum(1), wanted)
    assert labels[masked].min() >= 5 and not (masked & ~mask).any()


def test_masks_do_not_depend_on_the_padding(make):
    """A short sentence alone, and beside a long one that makes it be padded to 64."""
    val = make(shuffle=False, masking=(np.arange(V), 0.7, 0.3))
    wide = val.batch(0, 3030)
    for g in range(0, 3030, 97):
        narrow = val.batch(g, 1)
        n = narrow[0].shape[1]
        for ours, theirs in zip(narrow, wide, strict=True):
            assert np.array_equal(ours[0], theirs[g, :n])


def test_sequences_of_a_stream_have_the_bits_that_they_had(tokenizer):  # noqa: F811
    """Before masks were shared with sentences."""
    counts = np.bincount(stream(tokenizer), minlength=V)
    sequences = Sequences(stream(tokenizer), 64, tokenizer, seed=7, counts=counts, smoothing=0.7, shuffle=True)
    digest = hashlib.sha256(b"".join(array.tobytes() for array in sequences.batch(sequences.per_epoch - 10, 400)))
    assert digest.hexdigest() == "920571619d5937381914e4676cce32a7b924dbf02e0362bbc5bb1c662fbca84e"


def test_fewer_sentences_than_an_update_needs(make):
    assert make(G=3030).per_epoch == 3030
    with pytest.raises(UserError, match="3030 sentences, fewer than the 3031 of an update"):
        make(G=3031)


def test_memory_does_not_grow_with_the_corpus(tmp_path, tokenizer):  # noqa: F811
    """Batches of 16 million sentences of two tokens, of which only the files know all: 192 MB."""
    n = 16 << 20
    with open(tmp_path / "train.bin", "wb") as file:
        file.truncate(2 * 2 * n)  # zeros, which take no room on disk
    with open(tmp_path / "train.ends.bin", "wb") as file:
        for first in range(0, n, 1 << 20):
            file.write(np.arange(2 * first + 2, 2 * (first + (1 << 20)) + 2, 2, dtype="<i8").tobytes())
    tokens, ends = TokenFile(tmp_path / "train.bin", "<u2"), TokenFile(tmp_path / "train.ends.bin", "<i8")
    before = status_kib("VmRSS")
    train = Sentences(tokens, ends, T, G, tokenizer, 0, shuffle=True)
    for u in range(0, n // G, n // G // 20):
        assert train.batch(u * G, G)[2].sum() == 3 * G
    assert status_kib("VmRSS") - before < 32 << 10


def test_the_prefetcher_takes_three_arrays(make, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    train = make(masking=MASKING)
    for kind in ("cpu", "cuda"):
        take = Prefetcher(lambda u: train.batch(u * G, G), types.SimpleNamespace(type=kind))
        for u in (0, 1, 5):
            for ours, theirs in zip(take(u), make(masking=MASKING).batch(u * G, G), strict=True):
                assert np.array_equal(ours.numpy(), theirs)
        assert [tensor.dtype for tensor in take(6)] == [torch.int64, torch.int64, torch.bool]


# ---- corpora of sentences


@pytest.fixture
def prepared(tiny, tmp_path):
    text = (tiny / "text.txt").read_text()
    (tmp_path / "text.txt").write_text(text)
    prepare([tmp_path / "text.txt"], tiny / "teacher", tmp_path / "corpus", 0.1, 1, progress=False, prefix="")
    return tmp_path / "corpus"


def test_training_reads_what_prepare_wrote(tiny, prepared):
    corpus, packed = Corpus(prepared), Corpus(tiny / "corpus")
    assert corpus.prefix == "" and packed.prefix is packed.train_ends is packed.val_ends is None
    tokenizer = Tokenizer.load(tiny / "teacher")  # noqa: F811
    for split, ends in (("train", corpus.train_ends), ("val", corpus.val_ends)):
        tokens = getattr(corpus, split)
        assert np.array_equal(tokens[:], getattr(packed, split)[:])  # each line is a sentence
        assert np.array_equal(ends[:], np.flatnonzero(tokens[:] == tokenizer.sep_id) + 1)
        made = Sentences(tokens, ends, 32, 1, tokenizer, 0)
        assert made.per_epoch == corpus.meta["documents"][split] == len(originals(made.batch(0, made.per_epoch)))


@pytest.mark.parametrize("name", ["train.ends.bin", "val.ends.bin"])
def test_damaged_ends_show(prepared, name):
    good, meta = (prepared / name).read_bytes(), json.loads((prepared / "meta.json").read_text())
    for bad in (good[:-8], good[:8] + good[16:24] + good[8:16], good + good[-8:], b"", bytes([good[0] ^ 1]) + good[1:]):
        (prepared / name).write_bytes(bad)
        with pytest.raises(UserError, match=f"{name} is damaged .*: prepare the corpus again"):
            Corpus(prepared)
    (prepared / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        Corpus(prepared)
    for bad in (good[:-8], b"", good[:-3]):  # by whoever wrote its hash, too
        (prepared / name).write_bytes(bad)
        meta["sha256"][name] = hashlib.sha256(bad).hexdigest()
        meta["meta_sha256"] = meta_digest(meta)
        (prepared / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(UserError, match=f"{name} is damaged .it does not end where {name.split('.')[0]}.bin does"):
            Corpus(prepared)
