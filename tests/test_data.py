"""Order, masks and token files: pure functions, published shares, and damage that shows."""

import json
import os
import shutil

import numpy as np
import pytest

from minidistil.data import IGNORE, Corpus, Sequences, TokenFile
from minidistil.errors import UserError
from minidistil.memory import status_kib
from minidistil.rng import mix, permuted, uniform
from minidistil.tokenizer import Tokenizer
from minidistil.tokenizers.wordpiece import WordPiece
from minidistil.tokenizers.wordpiece_files import SPECIAL_TOKENS

V = 500


@pytest.fixture(scope="module")
def tokenizer():
    return WordPiece([*SPECIAL_TOKENS.values(), *(f"w{i}" for i in range(V - 5))])


def stream(tokenizer, n=20_000, seed=0):
    """Tokens with a Zipf-like distribution and a [SEP] now and then."""
    rng = np.random.default_rng(seed)
    tokens = np.minimum(5 + rng.zipf(1.3, n), V - 1).astype(np.uint16)
    tokens[rng.random(n) < 0.02] = tokenizer.sep_id
    return tokens


def make(tokenizer, T=64, **options):
    return Sequences(stream(tokenizer), T, tokenizer, seed=7, **{"shuffle": True, "smoothing": 0.0, **options})


# ---- randomness


def test_mix_is_splitmix64():
    """The first outputs of splitmix64 from seed 1234567, as its authors' C code prints them."""
    golden, z = 0x9E3779B97F4A7C15, 1234567
    expected = (6457827717110365317, 3203168211198807973)
    for i, value in enumerate(expected):
        assert int(mix((z + i * golden) % 2**64)[0]) == value


def test_uniform_is_uniform_and_independent():
    u = uniform(3, np.arange(200)[:, None], np.arange(500)[None])
    assert u.shape == (200, 500) and 0 < u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 0.01


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_permuted_is_a_permutation(n):
    orders = [permuted(np.arange(n, dtype=np.uint64), n, seed, 0) for seed in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(n))
    if n > 16:
        assert not np.array_equal(orders[0], orders[1])
        fixed = np.mean([(order == np.arange(n)).sum() for order in orders])
        assert fixed < 6  # a random permutation has one fixed point on average


# ---- sequences


def test_every_block_once_an_epoch_and_other_blocks_in_the_next(tokenizer):
    sequences = make(tokenizer)
    n = sequences.per_epoch
    tokens, block = np.asarray(sequences.tokens), sequences.block

    def starts(first):
        ids, labels = sequences.batch(first, n)
        original = np.where(labels != IGNORE, labels, ids)[:, 1:-1]
        places = {tokens[s : s + block].tobytes(): s for s in range(len(tokens) - block + 1)}
        return [places[row.astype(np.uint16).tobytes()] for row in original]

    one, two = starts(0), starts(n)
    for epoch in (one, two):
        assert len({s // 1 for s in epoch}) == n
        assert {s % block for s in epoch} == {epoch[0] % block}  # one offset an epoch, no overlap
        assert sorted(epoch) == list(range(min(epoch), min(epoch) + n * block, block))
    assert one[0] % block != two[0] % block and one != sorted(one)


@pytest.mark.parametrize("share", [0.15, 0.3, 0.02, 0.8])
def test_shape_of_a_sequence(tokenizer, share):
    ids, labels = make(tokenizer, mask_share=share).batch(0, 50)
    assert ids.dtype == labels.dtype == np.int64 and ids.shape == labels.shape == (50, 64)
    assert (ids[:, 0] == tokenizer.cls_id).all() and (ids[:, -1] == tokenizer.sep_id).all()
    masked = labels != IGNORE
    assert (masked.sum(1) == round(share * 64)).all()
    assert labels[masked].min() >= 5  # never a special token


@pytest.mark.parametrize("pieces", [[64], [1] * 64, [7, 1, 56], [32, 32]])
def test_a_pure_function_of_the_global_index(tokenizer, pieces):
    sequences = make(tokenizer, counts=np.bincount(stream(tokenizer), minlength=V), smoothing=0.7)
    first = sequences.per_epoch - 30  # across an epoch's end
    whole = sequences.batch(first, 64)
    parts, at = [], first
    for n in pieces:
        parts.append(sequences.batch(at, n))
        at += n
    for k in range(2):
        assert np.array_equal(np.concatenate([part[k] for part in parts]), whole[k])
    other_seed = Sequences(sequences.tokens, 64, tokenizer, seed=8, shuffle=True).batch(first, 64)
    assert not np.array_equal(other_seed[0], whole[0])


def test_80_10_10(tokenizer):
    sequences = make(tokenizer)
    ids, labels = sequences.batch(0, 4000)
    masked = labels != IGNORE
    n = masked.sum()
    is_mask = (ids[masked] == tokenizer.mask_id).mean()
    kept = (ids[masked] == labels[masked]).mean()
    assert abs(is_mask - (0.8 + 0.1 / V)) < 4 * (0.16 / n) ** 0.5 + 1e-3
    assert abs(kept - 0.1) < 4 * (0.09 / n) ** 0.5 + 0.1 * 0.2  # a random token may be the old one
    replaced = ids[masked & (ids != tokenizer.mask_id) & (ids != labels)]
    assert abs(len(replaced) / n - 0.1) < 0.01
    assert len(np.unique(replaced)) > 0.95 * V  # the whole vocabulary
    dynamic = sequences.batch(sequences.per_epoch, 4000)[1] != IGNORE
    assert 0.1 < (dynamic == masked).mean() < 0.9


def test_masks_are_drawn_by_weight(tokenizer):
    """Each position's chance agrees with numpy's weighted sampling without replacement; 0.7 favours rare words."""
    tokens = np.tile(np.arange(5, 67, dtype=np.uint16), 4000)
    counts = np.ones(V)
    counts[5:67] = 10.0 ** np.linspace(0, 4, 62)
    sequences = Sequences(tokens, 64, tokenizer, seed=1, counts=counts, smoothing=0.7)
    _, labels = sequences.batch(0, 4000)
    ours = np.bincount(labels[labels != IGNORE], minlength=V)[5:67] / 4000
    weights = counts[5:67] ** -0.7
    rng = np.random.default_rng(0)
    draws = [rng.choice(62, 10, replace=False, p=weights / weights.sum()) for _ in range(4000)]
    expected = np.bincount(np.concatenate(draws), minlength=62) / 4000
    assert np.abs(ours - expected).max() < 0.05
    assert ours[0] > 5 * ours[-1]
    uniform_labels = Sequences(tokens, 64, tokenizer, seed=1).batch(0, 4000)[1]
    even = np.bincount(uniform_labels[uniform_labels != IGNORE], minlength=V)[5:67] / 4000
    assert np.abs(even - 10 / 62).max() < 0.03


def test_almost_nothing_to_mask(tokenizer):
    tokens = np.full(1000, tokenizer.sep_id, np.uint16)
    tokens[::60] = 9
    ids, labels = Sequences(tokens, 64, tokenizer, seed=0).batch(0, 10)
    assert set(labels[labels != IGNORE]) == {9}


# ---- token files


def test_corpus_reads_what_prepare_wrote(tiny):
    corpus = Corpus(tiny / "corpus")
    tokenizer = Tokenizer.load(tiny / "teacher")
    corpus.check_tokenizer(tokenizer, "teacher")
    assert len(corpus.train) == corpus.meta["tokens"]["train"] > 1000 < corpus.counts.sum() + 1
    assert np.array_equal(np.bincount(corpus.train[:], minlength=len(tokenizer.vocab)), corpus.counts)
    other = WordPiece([*tokenizer.vocab[:-1], "zzz"])
    with pytest.raises(UserError, match="another vocabulary"):
        corpus.check_tokenizer(other, "other")


def test_reading_takes_no_memory(tmp_path):
    """Blocks from all over a file of 256 MB: a memory map would end with most of it resident."""
    with open(tmp_path / "train.bin", "wb") as file:
        file.truncate(256 << 20)  # zeros, which take no room on disk
    tokens = TokenFile(tmp_path / "train.bin", "<u2")
    assert len(tokens) == 128 << 20
    before = status_kib("VmRSS")
    for start in range(0, len(tokens), 2048):  # a token of every page of 4 kB
        assert len(tokens[start : start + 510]) == 510
    assert status_kib("VmRSS") - before < 32 << 10


def test_a_file_that_became_shorter(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    tokens = TokenFile(tmp_path / "train.bin", "<u2")
    assert tokens[7:9].tolist() == [7, 8] and tokens[98:].tolist() == [98, 99] and tokens[9:7].size == 0
    os.truncate(tmp_path / "train.bin", 20)
    with pytest.raises(UserError, match="became shorter"):
        tokens[50:60]


def test_600_mutations_all_show(tiny, tmp_path):
    """Any flipped bit, cut or insertion in any file that training reads from a corpus is an error of one line."""
    rng = np.random.default_rng(0)
    names = ["train.bin", "val.bin", "counts.npy", "meta.json"]
    for name in names:
        shutil.copy(tiny / "corpus" / name, tmp_path)
    Corpus(tmp_path)
    for i in range(600):
        path = tmp_path / names[i % 4]
        good = path.read_bytes()
        bad = mutate(good, rng)
        path.write_bytes(bad)
        try:
            corpus = Corpus(tmp_path)
        except UserError as error:
            assert "\n" not in str(error)
        else:  # white space in meta.json is the one change without a meaning
            assert path.name == "meta.json" and json.loads(bad) == json.loads(good), (i, path.name, corpus.meta)
        path.write_bytes(good)
    for name in names:
        (tmp_path / name).rename(tmp_path / "away")
        with pytest.raises(UserError):
            Corpus(tmp_path)
        (tmp_path / "away").rename(tmp_path / name)


def mutate(data, rng):
    """One random damage: a flipped bit, a cut, an insertion, a deletion, a doubled piece or zeros."""
    at, n = int(rng.integers(len(data))), int(rng.integers(1, 9))
    kind = rng.integers(6)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + rng.bytes(n) + data[at:]
    if kind == 3:
        return data[:at] + data[at + n :]
    if kind == 4:
        return data[:at] + data[at : at + n] + data[at:]
    changed = bytearray(data)
    changed[at : at + n] = bytes(b ^ 0xFF for b in changed[at : at + n])
    return bytes(changed)
