"""finetune.py --vectors: the classifier of sentence vectors, against sentence-transformers, from end to end."""

import dataclasses
import json
import shutil
import signal

import numpy as np
import pytest
import torch
from test_finetune import interrupted_at, tuned

import finetune
from minidistil import weights
from minidistil.downstream import glue as official
from minidistil.downstream import trial
from minidistil.downstream.batches import encode_apart, padded, predict
from minidistil.downstream.distil import augment
from minidistil.downstream.heads import VectorClassifier, load_finetuned, split_pairs
from minidistil.downstream.models import build_model
from minidistil.downstream.tasks import SentenceTask, compact, open_task
from minidistil.errors import UserError
from minidistil.export.graphs import Vectors, open_graph
from minidistil.model import LanguageModel
from minidistil.pooling import Pooling, read_pooling, write_pooling
from minidistil.safetensors import read_safetensors
from minidistil.tokenizer import Tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stsb(tiny, glue, tmp_path_factory):
    """(summary, folder) of the teacher of other tests, whose vectors its users get with length 1."""
    out = tmp_path_factory.mktemp("runs") / "stsb"
    model = str(encoder(tiny, out.parent / "encoder", normalize=True))
    return tuned(tiny, glue, out, "stsb", model=model, vectors=True), out


def encoder(tiny, folder, **pooling):
    """Writes the tiny teacher as a folder of sentence-transformers."""
    model = weights.load_model(tiny / "teacher")
    weights.save_model(folder, model)
    Tokenizer.load(tiny / "teacher").save(folder, "bert")
    write_pooling(folder, Pooling(**pooling), model.config)
    return folder


def test_an_item_is_two_sequences(tiny):
    tokenizer = Tokenizer.load(tiny / "teacher")
    a, b = tokenizer.vocab[20], " ".join(tokenizer.vocab[30:40])
    cls, sep = tokenizer.cls_id, tokenizer.sep_id
    assert encode_apart(tokenizer, a, None, 8) == ([cls, 20, sep], [0] * 3)
    assert encode_apart(tokenizer, a, b, 8) == ([cls, 20, sep, cls, *range(30, 36), sep], [0] * 3 + [1] * 8)
    items = [compact(encode_apart(tokenizer, *texts, 8)) for texts in ((a, b), (b, a), ("", a))]
    ids, mask = split_pairs(*padded(items, [0, 1, 2], tokenizer.pad_id, CPU))
    rows = [row[inside].tolist() for row, inside in zip(ids, mask, strict=True)]
    long = [cls, *range(30, 36), sep]
    assert rows == [[cls, 20, sep], long, [cls, sep], long, [cls, 20, sep], [cls, 20, sep]] and ids.shape == (6, 8)
    for (before, types), (after, same) in zip(items, augment(items, 1, tokenizer), strict=True):
        ends = np.isin(before, [cls, sep])
        assert (types == same).all() and (before[ends] == after[ends]).all()  # an augmented copy is still two


@pytest.mark.parametrize("mode", ["mean", "cls"])
@torch.no_grad()
def test_features_are_those_of_the_librarys_vectors(mode, tiny, tmp_path):
    """Our logits are W [u; v; |u - v|; u * v] + b of sentence-transformers' vectors, whatever else is in a batch."""
    library = pytest.importorskip("sentence_transformers")
    folder = encoder(tiny, tmp_path, mode=mode)
    config, tokenizer = weights.read_config(folder), Tokenizer.load(folder)
    model = VectorClassifier(config, 3, read_pooling(folder), pair=True, seed=1).eval()
    model.encoder.load_state_dict(weights.load_model(folder).encoder.state_dict())
    words = tokenizer.vocab[5:]
    texts = [(" ".join(words[:n]), " ".join(words[n : 3 * n])) for n in (1, 9, 4)]
    rows = predict(model, [compact(encode_apart(tokenizer, *pair, 32)) for pair in texts], tokenizer.pad_id, CPU)
    theirs = library.SentenceTransformer(str(folder), device="cpu")
    for pair, logits in zip(texts, rows, strict=True):
        u, v = theirs.encode(pair, normalize_embeddings=True, convert_to_tensor=True) * config.width**0.5
        expected = model.classify(torch.cat([u, v, (u - v).abs(), u * v]))
        torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-5, rtol=1e-4)


def test_learns_pairs_and_leaves_a_sentence_encoder(stsb, tiny, glue):
    """Its score is that of the model in the folder, whose vectors the library reads."""
    summary, out = stsb
    assert summary["tasks"]["stsb"]["spearman"] > 60
    folder = out / "stsb"
    model, labels = load_finetuned(folder)
    assert isinstance(model, VectorClassifier) and (model.pair, labels) == (True, ("score",))
    task = open_task("stsb", glue, Tokenizer.load(folder), prefix="")
    kept = task.evaluate([predict(model, task.dev[0], 0, CPU)])
    assert kept["score"] == pytest.approx(summary["tasks"]["stsb"]["score"], abs=0.01)
    assert read_pooling(folder).normalize and isinstance(open_graph(folder), Vectors)  # export.py writes its encoder
    library = pytest.importorskip("sentence_transformers")
    text = official.load("stsb", glue)[1]["dev"][0].first
    theirs = library.SentenceTransformer(str(folder), device="cpu").encode(text, normalize_embeddings=True)
    ids, mask, _ = padded([compact(encode_apart(Tokenizer.load(folder), text, None, 32))], [0], 0, CPU)
    with torch.no_grad():
        ours = model.vectors(ids, mask)[0] / model.config.width**0.5
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@torch.no_grad()
def test_a_label_starts_at_0_and_a_score_as_the_cosine(tiny, glue):
    work = open_task("rte", glue, Tokenizer.load(tiny / "teacher"), prefix="")
    model = build_model(tiny / "teacher", work, seed=0)
    assert not model(*padded(work.train[0], range(8), 0, CPU)).any()
    work = open_task("stsb", glue, Tokenizer.load(tiny / "teacher"), prefix="")
    model = build_model(tiny / "teacher", work, seed=0).eval()
    inputs = padded(work.train[0], range(8), 0, CPU)
    u, v = model.vectors(*split_pairs(*inputs)).chunk(2)
    cosine = torch.nn.functional.cosine_similarity(u, v)
    assert cosine.std() > 1e-3
    torch.testing.assert_close(model(*inputs)[:, 0], 5 * cosine, atol=1e-5, rtol=1e-5)  # scores from 0 to 5


def test_single_texts_and_labels(tiny, glue, tmp_path):
    figures = tuned(tiny, glue, tmp_path / "out", vectors=True)["tasks"]["sst2"]
    assert figures["score"] > 80
    model, labels = load_finetuned(tmp_path / "out" / "sst2")
    assert labels == ("negative", "positive") and model.classify.weight.shape == (2, 32) and not model.pair
    assert read_pooling(tmp_path / "out" / "sst2") == Pooling(max_length=32)  # the mean, of a folder that does not say


def test_a_teacher_of_vectors(stsb, tiny, glue, tmp_path, capsys):
    """The second distillation: of vectors by vectors, and refused where one side reads pairs as one sequence."""
    tuned(tiny, glue, tmp_path / "out", "stsb", vectors=True, teacher=str(stsb[1]), augment=1, epochs=1.0,
          examples=32, unlabelled=16)  # fmt: skip
    assert f"teacher's dev score is {stsb[0]['tasks']['stsb']['score']:.2f}" in capsys.readouterr().out
    with pytest.raises(UserError, match="both learn with --vectors, or neither"):
        tuned(tiny, glue, tmp_path / "other", "stsb", teacher=str(stsb[1]))
    tuned(tiny, glue, tmp_path / "pairs", "stsb", epochs=1.0, examples=16)
    with pytest.raises(UserError, match="both learn with --vectors, or neither"):
        tuned(tiny, glue, tmp_path / "third", "stsb", vectors=True, teacher=str(tmp_path / "pairs"))


def test_a_teacher_of_other_texts(stsb, tiny, glue, tmp_path):
    """Of pairs for a task of single texts, and the other way round: both are scores, by the same name."""
    single = str(tmp_path / "single.csv")
    (tmp_path / "single.csv").write_text("text,score\n" + "a,1.5\nb,2.5\n" * 8)
    few = dict(data=None, vectors=True, epochs=1.0, dev=single)
    tuned(tiny, glue, tmp_path / "out", single, **few)
    with pytest.raises(UserError, match="classifies pairs of texts, which single has not"):
        tuned(tiny, glue, tmp_path / "other", single, teacher=str(stsb[1] / "stsb"), **few)
    with pytest.raises(UserError, match="classifies single texts, which stsb has not"):
        tuned(tiny, glue, tmp_path / "third", "stsb", vectors=True, teacher=str(tmp_path / "out" / "single"))


def test_resumed_is_uninterrupted(tiny, glue, tmp_path, monkeypatch):
    settings = dict(task="stsb", vectors=True, examples=48, epochs=2.0)
    tuned(tiny, glue, tmp_path / "whole", **settings)
    with pytest.raises(SystemExit) as stopped, pytest.MonkeyPatch.context() as patch:
        interrupted_at(7, patch)
        tuned(tiny, glue, tmp_path / "parts", **settings)
    assert stopped.value.code == 128 + signal.SIGTERM
    tuned(tiny, glue, tmp_path / "parts", resume=True, **settings)
    whole, parts = (read_safetensors(tmp_path / n / "stsb" / "model.safetensors")[0] for n in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    with pytest.raises(UserError, match="model vectors -> encoder"):
        tuned(tiny, glue, tmp_path / "parts", resume=True, **{**settings, "vectors": False})


def test_a_run_of_before_resumes(tiny, glue, tmp_path):
    """A scores.json of a version without --vectors."""
    settings = dict(examples=16, epochs=1.0)
    tuned(tiny, glue, tmp_path / "out", **settings)
    state = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert "vectors" not in state["identity"]
    state["settings"].pop("vectors")
    (tmp_path / "out" / "scores.json").write_text(json.dumps(state))
    assert tuned(tiny, glue, tmp_path / "out", resume=True, **settings)["tasks"]["sst2"]["seeds"] == 1


def test_another_pooling_is_another_run(tiny, glue, tmp_path):
    """As where a cache is completed in between."""
    config = weights.read_config(tiny / "teacher")
    shutil.copytree(tiny / "teacher", tmp_path / "model")
    settings = dict(task="sst2", model=str(tmp_path / "model"), examples=16, epochs=1.0, vectors=True)
    tuned(tiny, glue, tmp_path / "out", **settings)
    write_pooling(tmp_path / "model", Pooling("cls"), config)
    with pytest.raises(UserError, match=r"begun with other settings \(pooling .*mode='mean'.*mode='cls'"):
        tuned(tiny, glue, tmp_path / "out", resume=True, seeds=2, **settings)
    state = json.loads((tmp_path / "out" / "scores.json").read_text())  # of before it was noted, it is noted once
    del state["identity"]["pooling"]
    (tmp_path / "out" / "scores.json").write_text(json.dumps(state))
    tuned(tiny, glue, tmp_path / "out", resume=True, seeds=2, **settings)
    assert "mode='cls'" in json.loads((tmp_path / "out" / "scores.json").read_text())["identity"]["pooling"]


def test_a_checkpoint_of_before_the_pooling_was_noted_resumes(tiny, glue, tmp_path, monkeypatch, capsys):
    settings = dict(task="sst2", examples=48, epochs=1.0, vectors=True)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupted_at(3, patch)
        tuned(tiny, glue, tmp_path / "out", **settings)
    state = json.loads((tmp_path / "out" / "scores.json").read_text())
    del state["identity"]["pooling"]
    (tmp_path / "out" / "scores.json").write_text(json.dumps(state))

    def of_before(out, load=trial.load_checkpoint):
        saved, tensors = load(out)
        return saved | {"identity": {k: v for k, v in saved["identity"].items() if k != "pooling"}}, tensors

    monkeypatch.setattr(trial, "load_checkpoint", of_before)
    tuned(tiny, glue, tmp_path / "out", resume=True, **settings)
    assert "resumes after update 3" in capsys.readouterr().out


def test_pairs_need_neither_two_types_nor_room_for_both(tiny, glue, tmp_path):
    """Two sentences of 5 words have 13 tokens as one sequence: more than a model of 10 positions reads."""
    config = dataclasses.replace(weights.read_config(tiny / "teacher"), token_types=1, positions=10)
    weights.save_model(tmp_path / "model", LanguageModel(config, seed=0))
    Tokenizer.load(tiny / "teacher").save(tmp_path / "model", "bert")
    settings = dict(task="rte", model=str(tmp_path / "model"), epochs=1.0)
    tuned(tiny, glue, tmp_path / "out", vectors=True, **settings)
    with pytest.raises(UserError, match="has 10 positions: use --seq-len 8 or less"):
        tuned(tiny, glue, tmp_path / "other", **{**settings, "task": "sst2", "vectors": True})
    with pytest.raises(UserError, match="has one token type"):
        tuned(tiny, glue, tmp_path / "other", **settings)


def test_a_prompt_stands_before_each_sentence(tiny, glue, tmp_path, monkeypatch):
    """The default one of the model's folder, which the fine-tuned folder has, too."""
    tokenizer = Tokenizer.load(tiny / "teacher")
    prompt, word = tokenizer.vocab[50], tokenizer.vocab[60]
    settings = {"prompts": {"query": f"{prompt} "}, "default_prompt_name": "query"}
    model, opened = str(encoder(tiny, tmp_path / "model", settings=settings)), []
    monkeypatch.setattr(finetune, "open_task", lambda *given: opened.append(given[-1]) or open_task(*given))
    tuned(tiny, glue, tmp_path / "out", model=model, vectors=True, examples=16, epochs=1.0)
    assert opened == [f"{prompt} "] == [read_pooling(tmp_path / "out" / "sst2").prompt]
    card = (tmp_path / "out" / "sst2" / "README.md").read_text()
    assert f"encode_apart(tokenizer, '{prompt} One sentence.', None, 128)" in card
    example = official.Example(word, word, 1.0)
    task = official.TASKS["stsb"]
    ids, types = SentenceTask(task, [example], {"dev": [example]}, tokenizer, 8, prefix=f"{prompt} ").train[0][0]
    assert ids.tolist() == [tokenizer.cls_id, 50, 60, tokenizer.sep_id] * 2 and types.tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("wrong", [{"model": "bilstm"}, {"task": "squad"}])
def test_what_has_no_vectors_is_refused(wrong, tiny, glue, tmp_path):
    with pytest.raises(UserError, match="--vectors classifies sentence vectors, which neither"):
        tuned(tiny, glue, tmp_path / "out", vectors=True, **wrong)
