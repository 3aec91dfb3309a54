"""The BiLSTM baseline: padding, pairs, learning, and its folder."""

import json

import pytest
import torch
import torch.nn.functional as F

from minidistil.downstream import bilstm
from minidistil.downstream.bilstm import BiLSTM
from minidistil.errors import UserError

V, CLS, SEP = 50, 1, 2


def build(pair, outputs=3, seed=0, **options):
    words = 0.05 * torch.randn(V, 24, generator=torch.Generator().manual_seed(9))  # BERT's have this size
    return BiLSTM(words, outputs, pair, hidden=16, seed=seed, **options)


def batch(examples):
    """Returns (ids, mask, types) of examples, each a list of one or two lists of ids, padded with zeros."""
    rows = [[(CLS, 0)] + [(i, t) for t, text in enumerate(example) for i in [*text, SEP]] for example in examples]
    T = max(map(len, rows))
    ids, types = torch.zeros(len(rows), T, dtype=torch.long), torch.zeros(len(rows), T, dtype=torch.long)
    mask = torch.zeros(len(rows), T, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], types[i, : len(row)] = torch.tensor(row).T
        mask[i, : len(row)] = True
    return ids, mask, types


SINGLES = [[[7, 8, 9]], [[]], [[3] * 9], [[9, 8, 7, 5]]]
PAIRS = [[[7, 8], [9]], [[], [4, 5, 6, 7]], [[3] * 9, []], [[9, 8, 7], [9, 8, 7]]]


@pytest.mark.parametrize("examples", [SINGLES, PAIRS], ids=["singles", "pairs"])
def test_padding_does_not_matter(examples):
    model = build(pair=len(examples[0]) == 2).eval()
    together = model(*batch(examples))
    assert together.shape == (4, 3)
    for example, logits in zip(examples, together, strict=True):
        torch.testing.assert_close(model(*batch([example]))[0], logits, rtol=1e-5, atol=1e-6)
    ids, mask, types = batch(examples)
    other = torch.where(mask, ids, 33)  # nor what the padding holds
    assert torch.equal(model(other, mask, torch.where(mask, types, 1)), together)


def test_encode_is_the_definition():
    """Against an LSTM run on one sentence that was never packed: the last state forward, the first backward."""
    model = build(pair=False).eval()
    ids, mask, _ = batch(SINGLES)
    for row, inside, vector in zip(ids, mask, model.encode(ids, mask), strict=True):
        states = model.lstm(model.words(row[inside]))[0]  # (T, 2H)
        torch.testing.assert_close(vector, torch.cat([states[-1, :16], states[0, 16:]]), rtol=1e-5, atol=1e-6)


def test_pair_features():
    """[u; v; |u - v|; u * v]: exchanging the texts exchanges u and v and changes nothing else."""
    model, seen = build(pair=True).eval(), []
    model.dense.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    # the segments as they are cut out, [CLS] being a word of the first
    a, b = torch.tensor([[CLS, 7, 8, SEP]]), torch.tensor([[9, 9, 4, 5, SEP]])
    logits = []
    for first, second in ((a, b), (b, a)):
        ids = torch.cat([first, second], dim=1)
        types = torch.cat([torch.zeros_like(first), torch.ones_like(second)], dim=1)
        logits.append(model(ids, torch.ones_like(ids, dtype=torch.bool), types))
    (u, v, distance, product), swapped = seen[0].chunk(4, 1), seen[1].chunk(4, 1)
    torch.testing.assert_close(torch.cat(swapped, 1), torch.cat([v, u, distance, product], 1))
    torch.testing.assert_close(u, model.encode(a, torch.ones_like(a, dtype=torch.bool)))
    torch.testing.assert_close(torch.cat([distance, product], 1), torch.cat([(u - v).abs(), u * v], 1))
    assert (logits[0] - logits[1]).abs().max() > 1e-4  # the order matters


@pytest.mark.parametrize("pair", [False, True])
def test_learns(pair):
    """Whether the text holds word 7; of pairs, whether the first does and the second does not."""
    g = torch.Generator().manual_seed(1)
    torch.manual_seed(2)  # dropout
    model = build(pair, outputs=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def sample(n):
        texts = [torch.randint(8, V, (int(torch.randint(2, 9, (1,), generator=g)),), generator=g) for _ in range(2 * n)]
        held = torch.rand(2 * n, generator=g) < 0.5
        for text, holds in zip(texts, held, strict=True):
            if holds:
                text[int(torch.randint(len(text), (1,), generator=g))] = 7
        texts, held = [text.tolist() for text in texts], held.view(n, 2)
        labels = held[:, 0] & ~held[:, 1] if pair else held[:, 0]
        return batch([texts[2 * i : 2 * i + (2 if pair else 1)] for i in range(n)]), labels.long()

    for _ in range(100):
        inputs, labels = sample(32)
        optimizer.zero_grad()
        F.cross_entropy(model(*inputs), labels).backward()
        optimizer.step()
    inputs, labels = sample(500)
    with torch.no_grad():
        right = (model.eval()(*inputs).argmax(1) == labels).float().mean()
    assert right > 0.95


def test_gradient_reaches_every_weight_and_only_the_words_that_occur():
    model = build(pair=True)
    model(*batch(PAIRS)).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
    words = model.words.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert words == [CLS, SEP, 3, 4, 5, 6, 7, 8, 9]


def test_initialisation_is_a_function_of_the_seed():
    words = torch.randn(V, 24)
    one, same, other = (BiLSTM(words, 2, True, hidden=16, seed=seed) for seed in (1, 1, 2))
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c) == (a.ndim == 1 or name == "words.weight")
    with torch.no_grad():
        one.words.weight.zero_()
    assert words.abs().min() > 0  # a copy


def test_dropout_is_for_training_only():
    model = build(pair=True, dropout=0.5)
    inputs = batch(PAIRS)
    assert not torch.equal(model(*inputs), model(*inputs))
    model.eval()
    assert torch.equal(model(*inputs), model(*inputs))


@pytest.mark.parametrize("pair, labels", [(True, ("no", "maybe", "yes")), (False, ())])
def test_round_trip(tmp_path, pair, labels):
    model = build(pair, outputs=len(labels) or 1, dropout=0.25)
    bilstm.save(tmp_path / "new", model, labels)
    loaded, names = bilstm.load(tmp_path / "new")
    assert names == labels and not loaded.training and loaded.dropout == loaded.lstm.dropout == 0.25
    inputs = batch(PAIRS if pair else SINGLES)
    assert torch.equal(loaded(*inputs), model.eval()(*inputs))
    loaded.train()(*inputs).sum().backward()  # and it can be trained on
    assert loaded.words.weight.grad.abs().max() > 0 and loaded.lstm.weight_hh_l1.grad.abs().max() > 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "bert"}, "describes a 'bert'"),
        ({"hidden": None}, "is damaged"),
        ({"hidden": 0}, "is damaged"),
        ({"vocab_size": -1}, "is damaged"),
        ({"vocab_size": 10**30}, "is damaged"),
        ({"dropout": 2}, "is damaged"),
        ({"labels": 3}, "is damaged"),
        ({"hidden": 17}, "are of different models"),
        ({"vocab_size": 10**12}, "are of different models"),
        ({"pair": True}, "are of different models"),
        ({"labels": ["a"]}, "are of different models"),
    ],
)
def test_refuses_a_damaged_config(tmp_path, change, message):
    bilstm.save(tmp_path, build(pair=False), ("a", "b", "c"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as error:
        bilstm.load(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_refuses_damaged_files(tmp_path):
    bilstm.save(tmp_path, build(pair=False), ("a", "b", "c"))
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="the file is damaged"):
        bilstm.load(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="lacks config.json or model.safetensors"):
        bilstm.load(tmp_path)
    weights.write_bytes(whole)
    for text in (b"", b"[]", b"[" * 100_000, b"\xff{}", config.read_bytes()[:-9]):
        config.write_bytes(text)
        with pytest.raises(UserError, match="is damaged"):
            bilstm.load(tmp_path)
    with pytest.raises(UserError, match="give the folder of a trained BiLSTM"):
        bilstm.load(tmp_path / "nowhere")
