"""Altered copies of examples: what changes, what stays, and that nothing else decides."""

import numpy as np
import pytest

from minidistil.downstream.batches import encode_pair
from minidistil.downstream.distil import EXCHANGED, MASKED, augment
from minidistil.downstream.tasks import compact
from minidistil.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return Tokenizer.load(tiny / "teacher")


@pytest.fixture(scope="module")
def items(tokenizer):
    """Pairs whose second text is five times as frequent a word as any other, so that the pool's shares are known."""
    first = " ".join(tokenizer.vocab[10:30])
    pair = compact(encode_pair(tokenizer, first, " ".join([tokenizer.vocab[40]] * 5), 64))
    return [pair] * 200


def test_a_tenth_is_masked_and_a_tenth_exchanged(items, tokenizer):
    before = np.array([ids for ids, _ in items] * 3)
    after = np.array([ids for ids, _ in augment(items, 3, tokenizer)])
    framing = np.isin(before, [tokenizer.cls_id, tokenizer.sep_id])
    assert (after == before)[framing].all() and framing.sum() == 3 * len(before)
    masked, n = after == tokenizer.mask_id, (~framing).sum()
    exchanged = (after != before) & ~masked
    assert abs(masked.sum() / n - MASKED) < 0.01
    # a fifth of the pool is one word and four fifths are twenty: it is drawn so often, and for itself unseen
    assert abs(exchanged.sum() / n - EXCHANGED * (1 - 0.2**2 - 20 * 0.04**2)) < 0.01
    often = (after[exchanged] == tokenizer.ids[tokenizer.vocab[40]]).mean()
    assert 0.12 < often < 0.22 and not np.isin(after[exchanged], [tokenizer.cls_id, tokenizer.sep_id]).any()


def test_copies_differ_and_are_always_the_same(items, tokenizer):
    once = augment(items, 2, tokenizer)
    assert len(once) == 400 and all((t == u).all() for (_, t), (_, u) in zip(once, items * 2, strict=True))
    assert len({ids.tobytes() for ids, _ in once}) > 390  # of one and the same pair
    again = augment(items, 2, tokenizer)
    assert all((a == b).all() for (a, _), (b, _) in zip(once, again, strict=True))
    assert {ids.dtype for ids, _ in once} == {np.dtype(np.int32)}


def test_texts_of_any_length(tokenizer):
    """A text without words has nothing to change, alone or among others."""
    empty, word = (compact(encode_pair(tokenizer, text, None, 8)) for text in ("", tokenizer.vocab[10]))
    assert [ids.tolist() for ids, _ in augment([empty], 2, tokenizer)] == [[tokenizer.cls_id, tokenizer.sep_id]] * 2
    mixed = augment([word, empty, word], 1, tokenizer)
    assert [len(ids) for ids, _ in mixed] == [3, 2, 3] and augment([word], 0, tokenizer) == []
