"""Causal distillation, a GPT-2 into one of half its layers: labels, objective, runs, metrics, and continuing a text."""

import json
import math
import pathlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from same_layers import assert_same_layers

import finetune
import sample
import train
from minidistil import weights
from minidistil.data import Corpus, Sequences
from minidistil.errors import UserError
from minidistil.evaluate import HeldOut
from minidistil.generate import continuation
from minidistil.losses import Denominators, Objective, distillation_loss
from minidistil.model import Config, LanguageModel
from minidistil.progress import training_flops_per_token
from minidistil.safetensors import read_safetensors
from minidistil.student import student_from_teacher
from minidistil.tokenizer import Tokenizer
from minidistil.tokenizers.wordpiece import WordPiece
from minidistil.tokenizers.wordpiece_files import SPECIAL_TOKENS

SHAPE = dict(positions=32, token_types=0, layers=4, heads=2, width=32, mlp_width=64, norm_eps=1e-5, family="gpt2")


@pytest.fixture(scope="module")
def causal(tiny, tmp_path_factory):
    """The tiny world with a GPT-2 for its teacher: random weights, large enough to have opinions."""
    folder = tmp_path_factory.mktemp("causal") / "teacher"
    folder.mkdir()
    tokenizer = Tokenizer.load(tiny / "teacher")
    config = Config(vocab_size=len(tokenizer.vocab), init_range=0.2, **SHAPE)
    weights.save_model(folder, LanguageModel(config, seed=1))
    tokenizer.save(folder)
    return folder


def settings(tiny, causal, out, **changes):
    basic = dict(
        teacher=str(causal), data=str(tiny / "corpus"), steps=5, batch=4, accum=2, seq_len=32, device="cpu",
        dtype="fp32", eval_tokens=512, out=str(out),
    )  # fmt: skip
    return train.Settings(**basic | changes)


def weights_of(folder):
    return read_safetensors(folder / "model.safetensors")[0]


def test_the_shape_that_readme_trains():
    config = weights.read_config(pathlib.Path(train.__file__).parent / "data" / "gpt2.json")
    assert (config.family, config.vocab_size, config.positions) == ("gpt2", 8192, 256)


# ---- data and objective


@pytest.mark.parametrize("shuffle", [False, True])
def test_labels_are_the_next_tokens(tiny, shuffle):
    stream = np.arange(1000, dtype=np.uint16)  # whose tokens say where they are
    sequences = Sequences(stream, 16, Tokenizer.load(tiny / "teacher"), 3, shuffle=shuffle, causal=True)
    ids, labels = sequences.batch(0, sequences.per_epoch)
    assert ids.shape == labels.shape == (sequences.per_epoch, 16) and ids.dtype == labels.dtype == np.int64
    assert (labels == ids + 1).all() and (np.diff(ids, axis=1) == 1).all() and sequences.label_share == 1.0
    starts = np.sort(ids[:, 0])
    assert (np.diff(starts) == 16).all()  # every block once, and none overlaps another
    assert starts[0] < 16 and 1000 - starts[-1] <= 16 + 16 * (1 + shuffle)
    assert (starts == ids[:, 0]).all() != shuffle
    again = np.concatenate([sequences.batch(first, 1)[0] for first in range(sequences.per_epoch)])
    assert (again == ids).all()


def test_objective_is_the_formula():
    """KL and cross-entropy on every token, against the formula in fp64, loss and gradient."""
    config = Config(vocab_size=97, dropout=0.0, attention_dropout=0.0, init_range=0.2, **SHAPE)
    teacher = LanguageModel(config, seed=1).double().eval().requires_grad_(False)
    student = LanguageModel(config.student(2), seed=2).double()
    tokens = torch.randint(0, 97, (3, 13), generator=torch.Generator().manual_seed(3))
    ids, labels = tokens[:, :-1], tokens[:, 1:]
    h_s, h_t = student(ids), teacher(ids).detach()
    found, parts = distillation_loss(Objective(), Denominators(36, 36), labels, student, h_s, teacher, h_t)
    s, t = student.logits(h_s), teacher.logits(h_t).detach()
    kl = F.kl_div(F.log_softmax(s / 2, -1), F.softmax(t / 2, -1), reduction="none").sum(-1).mean() * 4
    ce = F.cross_entropy(s.flatten(0, 1), labels.flatten())
    cos = 1 - F.cosine_similarity(h_s, h_t, dim=-1).mean()
    expected = 5 * kl + 2 * ce + cos
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, check_dtype=False)
    torch.testing.assert_close(parts[:3].double(), torch.stack([kl, ce, cos]).detach(), rtol=1e-5, atol=1e-7)
    parameters = list(student.parameters())
    got, want = torch.autograd.grad(found, parameters, retain_graph=True), torch.autograd.grad(expected, parameters)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-7 * w.abs().max().item() + 1e-9)


def test_no_token_sees_a_later_one():
    model = LanguageModel(Config(vocab_size=97, init_range=0.2, **SHAPE), seed=0).eval()
    ids = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 97
    with torch.no_grad():
        one, other = model(ids), model(changed)
    torch.testing.assert_close(one[:, :12], other[:, :12], rtol=0, atol=1e-6)
    assert (one[:, 12:] - other[:, 12:]).abs().amax(-1).min() > 1e-3


def test_flops_count_every_row():
    config = Config(vocab_size=97, **SHAPE)
    count = training_flops_per_token(Objective(), config, config.student(2), 32, 1.0)
    head = 2 * 32 * 97
    body = [layers * 2 * (4 * 32**2 + 2 * 32 * 64 + 2 * 32 * 32) for layers in (4, 2)]
    assert count == body[0] + head + 3 * (body[1] + head)


# ---- runs


def test_metrics_are_those_of_transformers(tiny, causal):
    transformers = pytest.importorskip("transformers")
    corpus, tokenizer = Corpus(tiny / "corpus"), Tokenizer.load(causal)
    batch = Sequences(corpus.val, 32, tokenizer, 0, causal=True).batch(0, 4)
    teacher = weights.load_model(causal)
    student = student_from_teacher(teacher, [0, 3]).eval()
    found = HeldOut(*batch, teacher).evaluate(student)
    ids = torch.from_numpy(np.concatenate([batch[0], batch[1][:, -1:]], axis=1))[:, :-1]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(causal).eval()
    with torch.no_grad():
        t = theirs(ids).logits.flatten(0, 1)
        s = student.logits(student(ids).flatten(0, 1))
    labels = torch.from_numpy(batch[1]).flatten()
    loss = F.cross_entropy(s, labels).item()
    assert found.keys() == {"clm_loss", "perplexity", "top1", "kl", "agreement"}
    assert found["clm_loss"] == pytest.approx(loss, abs=2e-6)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["top1"] == pytest.approx((s.argmax(-1) == labels).float().mean().item(), abs=1e-6)
    assert found["agreement"] == pytest.approx((s.argmax(-1) == t.argmax(-1)).float().mean().item(), abs=1e-6)
    kl = F.kl_div(F.log_softmax(s, -1), F.log_softmax(t, -1), log_target=True, reduction="batchmean").item()
    assert found["kl"] == pytest.approx(kl, abs=2e-6)


def test_a_student_learns_and_opens_in_transformers(tiny, causal, tmp_path, capsys):
    """A whole run: the KL falls, the summary has a perplexity, and transformers computes the same logits."""
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "run"
    summary = train.train(settings(tiny, causal, out, steps=40, lr=3e-3, eval_every=40))
    said = capsys.readouterr().out
    history = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    first, last = (record["held_out"] for record in history if "held_out" in record)
    assert last["kl"] < 0.8 * first["kl"] and summary["student"]["perplexity"] == last["perplexity"]
    assert "tokens that come next" in said and "perplexity" in said and "finetune.py" not in said
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "gpt2" and config["n_layer"] == 2 and config["architectures"] == ["GPT2LMHeadModel"]
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    sep = Tokenizer.load(out).sep_id  # at which a text ends, in this vocabulary too
    assert (theirs.generation_config.bos_token_id, theirs.generation_config.eos_token_id) == (sep, sep)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    ours = weights.load_model(out)
    ids = torch.randint(5, ours.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), theirs.eval()(ids).logits, atol=1e-5, rtol=1e-5)
    assert (out / "curve.svg").exists() and "causal-LM loss" in (out / "curve.svg").read_text()
    text = " ".join(Tokenizer.load(out).vocab[5:9])  # transformers gives it no [CLS] and [SEP], and no segments
    assert transformers.AutoTokenizer.from_pretrained(out)(text) == {
        "input_ids": Tokenizer.load(out).encode(text), "attention_mask": [1] * 4
    }  # fmt: skip


def test_neither_the_split_nor_an_interruption_changes_the_update(tiny, causal, tmp_path):
    """16 x 1 and 1 x 16, with dropout: equal but for rounding; stopped after 3 of 6 updates: equal to the bit."""
    for name, (batch, accum) in {"wide": (16, 1), "long": (1, 16)}.items():
        train.train(settings(tiny, causal, tmp_path / name, batch=batch, accum=accum))
    assert_same_layers(weights_of(tmp_path / "wide"), weights_of(tmp_path / "long"))
    train.train(settings(tiny, causal, tmp_path / "whole", steps=6))
    train.train(settings(tiny, causal, tmp_path / "parts", steps=6, time_limit=1e-9))
    assert json.loads((tmp_path / "parts" / "run.json").read_text())["ended_by"] == "time limit"
    train.train(settings(tiny, causal, tmp_path / "parts", steps=6, resume=True))
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_without_a_teacher(tiny, causal, tmp_path):
    shape = str(causal / "config.json")
    summary = train.train(settings(tiny, causal, tmp_path / "run", teacher="none", student_config=shape, steps=2))
    assert summary["teacher"] is None and summary["student"].keys() == {"parameters", "clm_loss", "perplexity", "top1"}
    config = dict(json.loads((causal / "config.json").read_text()), vocab_size=100)
    (tmp_path / "small.json").write_text(json.dumps(config))
    shape = str(tmp_path / "small.json")
    with pytest.raises(UserError, match="has 100 words, its .*, or as many words in the config.json of a new model"):
        train.train(settings(tiny, causal, tmp_path / "small", teacher="none", student_config=shape))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mask_share": 0.3}, "--mask-share is for masked tokens, and a gpt2 has none: leave it out"),
        ({"mask_smoothing": 0.0}, "--mask-smoothing is for masked tokens"),
        ({"kd_rows": "masked"}, "--kd-rows is for masked tokens"),
        ({"seq_len": 64}, "32 positions: use --seq-len 32 or less"),
    ],
)
def test_settings_of_masked_models_are_refused(tiny, causal, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train.train(settings(tiny, causal, tmp_path / "run", **changes))


def test_teacher_and_student_predict_the_same(tiny, causal, tmp_path):
    shape = str(tiny / "teacher" / "config.json")
    with pytest.raises(UserError, match="the teacher is a gpt2 and the student a bert: .* use one family"):
        train.train(settings(tiny, causal, tmp_path / "run", student_config=shape))


# ---- continuing a text


def test_the_greedy_continuation_is_that_of_transformers(causal):
    transformers = pytest.importorskip("transformers")
    model = weights.load_model(causal)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(causal).eval()
    ids = [3, 7, 11, 13, 17]
    expected = theirs.generate(
        torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None
    )[0, len(ids) :].tolist()  # fmt: skip
    assert continuation(model, ids, 20, temperature=0) == expected
    assert continuation(model, ids, 20, k=1) == expected
    assert continuation(model, ids, 20, temperature=1e-6) == expected
    stop = expected[4]
    assert continuation(model, ids, 20, temperature=0, end=stop) == expected[: expected.index(stop)]


def test_continuations_follow_the_seed_and_the_distribution(causal):
    model = weights.load_model(causal)
    assert continuation(model, [3], 12, seed=1) == continuation(model, [3], 12, seed=1) != continuation(model, [3], 12)
    assert len(continuation(model, [3], 60)) == 60  # longer than the model's positions
    with torch.no_grad():
        p = torch.softmax(model.logits(model(torch.tensor([[3, 9]]))[:, -1])[0].double(), -1)
    values, likeliest = p.topk(3)
    drawn = [continuation(model, [3, 9], 1, k=3, seed=seed)[0] for seed in range(600)]
    share = torch.tensor([drawn.count(i) / 600 for i in likeliest.tolist()], dtype=torch.float64)
    assert share.sum() == 1
    torch.testing.assert_close(share, values / values.sum(), atol=0.07, rtol=0)


def test_sample_shows_the_next_word_and_the_continuation(causal, capsys):
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.load(causal)
    prompt = " ".join(word for word in tokenizer.vocab[5:9])
    sample.main([prompt, "--model", str(causal), "--json", "-k", "4", "--tokens", "6", "--temperature", "0"])
    found = json.loads(capsys.readouterr().out)
    ids = [tokenizer.sep_id, *tokenizer.encode(prompt)]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(causal).eval()
    with torch.no_grad():
        best = theirs(torch.tensor([ids])).logits[0, -1].topk(4).indices.tolist()
    assert [token for token, _ in found["predictions"]["student"]] == [tokenizer.vocab[i] for i in best]
    new = continuation(weights.load_model(causal), ids, 6, temperature=0, end=tokenizer.sep_id)
    assert found["continuations"] == {"student": f"{prompt} {tokenizer.decode(new)}", "teacher": None}
    sample.main([prompt, "--model", str(causal), "--teacher", str(causal), "-k", "4", "--tokens", "6", "--seed", "1"])
    said = capsys.readouterr().out
    assert said.count(prompt) == 3 and "same first guess in 1 of 1" in said


def test_a_continuation_joins_its_prompt_as_the_vocabulary_has_it(monkeypatch):
    """WordPiece: a word begins with a space, ## and a full stop without one; nothing stands before an empty prompt."""
    tokenizer = WordPiece([*SPECIAL_TOKENS.values(), "ab", "cd", "##e", "."])
    for prompt, new, text in (
        ("AB", ["cd", "##e"], "AB cde"), ("ab", ["##e", "cd"], "abe cd"), ("cd", ["."], "cd."), ("", ["cd"], "cd"),
    ):  # fmt: skip
        monkeypatch.setattr(sample, "continuation", lambda *_, new=new, **__: [tokenizer.ids[token] for token in new])
        settings = sample.Settings(prompt, tokens=4, top_k=0, seed=0)
        assert sample.go_on(None, [tokenizer.sep_id, *tokenizer.encode(prompt)], settings, tokenizer) == text


def test_flags_of_a_causal_model_are_its_own(tiny, causal):
    for flags, model, message in (
        (["--seed", str(2**63)], causal, f"--seed is {2**63}: it must be a whole number from 0 to"),
        ([], causal, "the model is a GPT-2, which continues a text and fills in no"),
        (["--teacher", str(causal)], tiny / "teacher", "the teacher is a gpt2 and the student a bert: one predicts"),
        (["--teacher", str(tiny / "teacher")], causal, "the teacher is a bert and the student a gpt2: one predicts"),
        (["--tokens", "3"], tiny / "teacher", "--tokens is for a GPT-2, which continues a text: leave it out"),
        (["--top-k", "-1"], causal, "--top-k is -1: it must be 0 or more"),
    ):
        with pytest.raises(UserError, match=message):
            sample.main(["a [MASK]", "--model", str(model), *flags])


def test_a_run_without_data_says_whose_vocabulary_it_has(tiny, monkeypatch, capsys):
    """data/gpt2.json alone is trained with the demo's words, not with byte-level BPE."""
    monkeypatch.setattr("data.cached.docstring_corpus", lambda *_: tiny / "corpus")
    for teacher in ("none", str(tiny / "teacher")):
        train.open_corpus(train.Settings(teacher=teacher), Tokenizer.load(tiny / "teacher"), tiny / "teacher")
        said = capsys.readouterr().out
        assert f"training on the docstring corpus with the vocabulary of {tiny / 'teacher'}; for" in said
        assert f"BOOKS_FOLDER --vocab {tiny / 'teacher'} --out" in said


@pytest.mark.parametrize("flags", [dict(model=None), dict(model="bilstm", words=None)], ids=["model", "words"])
def test_a_causal_model_is_not_fine_tuned(causal, tiny, glue, tmp_path, flags):
    for task in ("sst2", "rte", "squad")[: 3 if "words" not in flags else 2]:
        chosen = {name: value or str(causal) for name, value in flags.items()}
        with pytest.raises(UserError, match="is a gpt2, which is not fine-tuned here: use a BERT or RoBERTa"):
            finetune.finetune(finetune.Settings(task=task, data=str(glue), out=str(tmp_path / "out"), **chosen))
    assert not (tmp_path / "out").exists()
