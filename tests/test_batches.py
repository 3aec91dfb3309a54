"""Batches of texts of all lengths: nothing lost, hardly any padding, the same order every time."""

import random

import numpy as np
import pytest
import torch

from minidistil.downstream.batches import batches, encode_pair, padded, predict
from minidistil.tokenizers.wordpiece import WordPiece
from minidistil.tokenizers.wordpiece_files import SPECIAL_TOKENS

CPU = torch.device("cpu")
TOKENIZER = WordPiece([*SPECIAL_TOKENS.values(), *(f"w{i}" for i in range(95))])


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 5000])
def test_an_epoch_holds_every_item_once(n):
    lengths = np.random.default_rng(0).integers(3, 90, n)
    parts = batches(lengths, 32, 1, 0)
    assert sorted(i for part in parts for i in part) == list(range(n))
    assert all(0 < len(part) <= 32 for part in parts) and len(parts) <= -(-n // 32) + n // (32 * 50)


def test_order_is_a_function_of_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(3, 90, 500)

    def order(seed, epoch):
        return [part.tolist() for part in batches(lengths, 8, seed, epoch)]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)


def test_hardly_any_padding():
    lengths = np.random.default_rng(0).integers(3, 129, 10_000)
    parts = batches(lengths, 32, 0, 0)
    assert sum(len(p) * lengths[p].max() for p in parts) < 1.05 * lengths.sum()
    # and chance is left: a batch is no run of the sorted lengths, and batches come in no order of length
    longest = [lengths[p].max() for p in parts]
    assert abs(np.corrcoef(longest, np.arange(len(parts)))[0, 1]) < 0.3


def test_number_of_batches_is_that_of_an_epoch():
    """finetune.py counts epochs by it."""
    for n in (1, 1599, 1600, 1601, 3203):
        assert len(batches(np.full(n, 9), 32, 0, 0)) == -(-n // 32)


def test_pairs_are_cut_as_transformers_cuts_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    TOKENIZER.save(tmp_path, "bert")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(0)
    for _ in range(300):
        a, b = (" ".join(f"w{rng.randrange(95)}" for _ in range(rng.randint(1, 30))) for _ in range(2))
        T = rng.randint(8, 40)
        expected = theirs(a, b, truncation="longest_first", max_length=T)
        ids, types = encode_pair(TOKENIZER, a, b, T)
        assert (ids, types) == (expected["input_ids"], expected["token_type_ids"])
        expected = theirs(a, truncation=True, max_length=T)
        assert encode_pair(TOKENIZER, a, None, T) == (expected["input_ids"], expected["token_type_ids"])


def test_padding_is_marked():
    items = [([2, 7, 3], [0, 0, 0]), ([2, 7, 3, 8, 9, 9, 9, 9, 3], [0, 0, 0, 1, 1, 1, 1, 1, 1])]
    ids, mask, types = padded(items, [1, 0], 0, "cpu")
    assert ids.shape == (2, 16) and ids.dtype == types.dtype == torch.int64
    assert ids[1].tolist() == [2, 7, 3] + [0] * 13 and mask.sum(1).tolist() == [9, 3]
    assert types[0].tolist() == items[1][1] + [0] * 7


def test_predictions_come_in_the_order_of_the_items():
    class Longest(torch.nn.Module):
        def forward(self, ids, mask, types):
            assert not self.training
            return torch.stack([mask.sum(1), ids.sum(1)], 1).float()

    items = [([1] * n, [0] * n) for n in np.random.default_rng(0).integers(1, 50, 300)]
    model = Longest().train()
    rows = predict(model, items, 0, CPU, tokens=70)
    assert [row.tolist() for row in rows] == [[len(ids), len(ids)] for ids, _ in items]
    assert model.training


def test_predictions_in_bf16_cast_each_weight_once():
    class Words(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.out = torch.nn.Linear(50, 3)

        def forward(self, ids, mask, types):
            sizes.append(ids.numel())
            return self.out(torch.nn.functional.one_hot(ids, 50).float()).sum(1)

    items, sizes, model = [([7] * n, [0] * n) for n in range(1, 49)], [], Words()
    with torch.profiler.profile(record_shapes=True) as profiled:
        rows = predict(model, items, 0, CPU, "bf16")
    casts = [e for e in profiled.events() if e.name == "aten::_to_copy" and e.input_shapes[0] == [3, 50]]
    assert len(casts) == 1 and len(sizes) > 2 and max(sizes) < 1024 and rows[0].dtype == np.float32
    exact = predict(model, items, 0, CPU)
    assert 0 < max(abs(a - b).max() for a, b in zip(rows, exact, strict=True)) < 0.3


def test_spans_are_predicted_without_padding():
    class Positions(torch.nn.Module):
        def forward(self, ids, mask, types):
            return torch.stack([ids.float(), -ids.float()], 1)

    items = [(list(range(n)), [0] * n) for n in (3, 17, 9)]
    for row, (ids, _) in zip(predict(Positions(), items, 0, CPU), items, strict=True):
        assert row.tolist() == [ids, [-i for i in ids]]
