"""A teacher with the pieces of a corpus only says of that corpus what the whole one says."""

import dataclasses
import json
import shutil

import pytest
import sentencepiece
import torch
from conftest import ROOT
from test_unigram import MODEL, train

from data import trim
from minidistil import weights
from minidistil.downstream.heads import Classifier, SpanReader
from minidistil.errors import UserError
from minidistil.families import FAMILIES
from minidistil.model import Config, LanguageModel, num_params
from minidistil.pooling import Pooling, write_pooling
from minidistil.safetensors import read_safetensors, write_safetensors
from minidistil.tokenizer import Tokenizer

OTHER = "“Zürich” has ½ the 東京 of Привет"


@pytest.fixture(scope="module", params=["bert", "xlm-roberta"])
def teacher(request, tmp_path_factory):
    """A random model with a vocabulary of README.md; the BERT has spare rows, as the multilingual E5 has."""
    folder = tmp_path_factory.mktemp(request.param)
    train(folder / MODEL)
    tokenizer = Tokenizer.load(folder)
    family = {"bert": {"token_types": 2}, "xlm-roberta": {"token_types": 1}}[request.param]
    shape = Config(len(tokenizer.vocab) + 3 * (request.param == "bert"), 64, layers=2, heads=2, width=16, mlp_width=32)
    model = LanguageModel(dataclasses.replace(shape, pad_id=1, family=request.param, **family), seed=0)
    with torch.no_grad():
        model.head.bias.normal_()
    weights.save_model(folder, model, bos_token_id=0, mask_token_id=tokenizer.mask_id)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:60]
    path.write_text("\n".join([*lines, OTHER, "\u2603 <mask>"]), encoding="utf-8")
    return path


def run(teacher, text, out, capsys, *more):
    trim.main(["--teacher", str(teacher), "--data", str(text), "--out", str(out), "--workers", "1", *more])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_text_and_logits_of_the_corpus_are_equal(teacher, text, tmp_path, capsys):
    summary = run(teacher, text, tmp_path / "out", capsys)
    whole, small = Tokenizer.load(teacher), Tokenizer.load(tmp_path / "out")
    ids = [whole.ids[token] for token in small.vocab]
    assert ids == sorted(ids) and len(ids) < len(whole.vocab) and (small.cls_id, small.pad_id) == (0, 1)
    big, cut = (weights.load_model(folder) for folder in (teacher, tmp_path / "out"))
    tokens = 0
    for line in text.read_text(encoding="utf-8").splitlines():
        expected, found = whole.encode(line), small.encode(line)
        assert [ids[i] for i in found] == expected
        assert [whole.vocab[i] for i in expected] == [small.vocab[i] for i in found]
        tokens += len(found)
        if not found:
            continue
        with torch.no_grad():
            states = [model(torch.tensor([i[:64]]))[0] for model, i in ((big, expected), (cut, found))]
            assert torch.equal(*states)
            logits, kept = big.logits(states[0]), cut.logits(states[1])
        torch.testing.assert_close(logits[:, ids], kept, atol=1e-6, rtol=0)  # fewer columns: another order of sums
    unused = 2 * 16 * (big.config.family == "xlm-roberta")  # RoBERTa's position table begins with two rows more
    parameters = {"before": num_params(big.config) + unused, "after": num_params(cut.config) + unused}
    assert summary["parameters"] == parameters and summary["tokens"] == tokens
    assert summary["pieces"] == {"before": len(whole.vocab), "after": len(small.vocab)}
    assert 0 <= summary["unseen_share"] < 0.5
    assert torch.equal(big.encoder.embeddings.words.weight[ids], cut.encoder.embeddings.words.weight)
    assert torch.equal(big.head.bias[ids], cut.head.bias)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (teacher, tmp_path / "out"))
    changed = {key: value for key, value in after.items() if before[key] != value}
    assert changed == {"vocab_size": len(ids), "mask_token_id": small.mask_id}


def test_the_library_and_transformers_read_what_is_written(teacher, text, tmp_path, capsys):
    run(teacher, text, tmp_path / "out", capsys)
    small = Tokenizer.load(tmp_path / "out")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out" / MODEL))
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "out")
    for line in text.read_text(encoding="utf-8").splitlines()[:60] + ["Unseen quizzes, zigzag"]:
        assert small.encode(line) == [i + 1 if i else 3 for i in processor.encode(line)]
        kept = sorted if "\u2588" in line else list  # a bar of blocks has several likeliest splits: see test_unigram.py
        assert kept(small.encode_prompt(line)) == kept(theirs.encode(line))
    (tmp_path / "out" / MODEL).unlink()
    assert Tokenizer.load(tmp_path / "out").digest == small.digest


def test_processes_and_an_encoder_without_a_head(teacher, text, tmp_path, capsys):
    first = run(teacher, text, tmp_path / "out", capsys)
    tensors, _ = read_safetensors(teacher / "model.safetensors")
    for name in list(tensors):
        if name.startswith(("cls.", "lm_head.")):
            del tensors[name]
    headless = tmp_path / "headless"
    headless.mkdir()
    write_safetensors(headless / "model.safetensors", {n: tensor.half() for n, tensor in tensors.items()})
    for name in (MODEL, "config.json"):
        (headless / name).write_bytes((teacher / name).read_bytes())
    second = run(headless, text, tmp_path / "second", capsys, "--workers", "2")
    assert [second[key] for key in ("pieces", "tokens", "unseen_share")] == [
        first[key] for key in ("pieces", "tokens", "unseen_share")
    ]
    assert Tokenizer.load(tmp_path / "second").digest == Tokenizer.load(tmp_path / "out").digest
    weights.load_model(tmp_path / "second", fresh_head=True)
    tensors, _ = read_safetensors(tmp_path / "second" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    config = weights.read_config(headless)  # which does not say whether there is a head
    head = config.width**2 + 3 * config.width + config.vocab_size
    assert first["parameters"]["before"] - second["parameters"]["before"] == head
    assert second["parameters"]["after"] == sum(tensor.numel() for tensor in tensors.values())


def test_a_decoder_that_is_written_out_is_cut_with_the_words(teacher, text, tmp_path, capsys):
    """It equals the words, which are written alone; one that is said not to be tied, and is not there, is missed."""
    shutil.copytree(teacher, tmp_path / "whole")
    tensors, _ = read_safetensors(teacher / "model.safetensors")
    (copy, words), *_ = FAMILIES[weights.read_config(teacher).family].tied
    config = json.loads((teacher / "config.json").read_text())
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(UserError, match=f"lacks {copy}"):
        run(tmp_path / "whole", text, tmp_path / "none", capsys)
    write_safetensors(tmp_path / "whole" / "model.safetensors", tensors | {copy: tensors[words].clone()})
    run(tmp_path / "whole", text, tmp_path / "out", capsys)
    run(teacher, text, tmp_path / "usual", capsys)
    cut, usual = (weights.load_model(tmp_path / name).state_dict() for name in ("out", "usual"))
    assert all(torch.equal(cut[name], usual[name]) for name in usual)


def test_pieces_that_no_other_document_uses(tmp_path):
    """A hundred documents of the same words, and of a word of their own: as the one in fifty, so the others."""
    train(tmp_path / MODEL)
    tokenizer = Tokenizer.load(tmp_path)
    lines = [f"the teacher {word}" for word in (ROOT / "README.md").read_text(encoding="utf-8").split()]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    used, held_out, cuts = trim.count_tokens([path], tokenizer, 1, "text", "utf-8")
    assert cuts == 0 and used.sum() + held_out.sum() == sum(len(tokenizer.encode(line)) for line in lines)
    assert 0 < held_out.sum() < 0.06 * used.sum()
    assert held_out[tokenizer.ids["▁teacher"]] > 0 and used[tokenizer.sep_id] == 0


def test_refusals(teacher, text, tiny, tmp_path, capsys):
    with pytest.raises(UserError, match="WordPiece"):
        run(tiny / "teacher", text, tmp_path / "out", capsys)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match="no text"):
        run(teacher, tmp_path / "empty.txt", tmp_path / "out", capsys)
    assert not (tmp_path / "out").exists()
    run(teacher, text, tmp_path / "out", capsys)
    with pytest.raises(UserError, match="already exists"):
        run(teacher, text, tmp_path / "out", capsys)


def test_a_refused_teacher_leaves_nothing(teacher, text, tmp_path, capsys, monkeypatch):
    """Before the text is read; what is refused or fails later leaves nothing either."""
    shutil.copytree(teacher, tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    shutil.copytree(teacher, tmp_path / "dense")
    modules = [{"path": path, "type": path[2:]} for path in ("", "1_Pooling", "2_Dense")]
    (tmp_path / "dense" / "modules.json").write_text(json.dumps(modules))
    with monkeypatch.context() as patched:
        patched.setattr(trim, "count_tokens", None)
        for name, message in (("bare", "no weights"), ("dense", "lists , Pooling, Dense")):
            with pytest.raises(UserError, match=message):
                run(tmp_path / name, text, tmp_path / "out", capsys)
    monkeypatch.setattr(trim, "cut_model", None)
    with pytest.raises(TypeError):
        run(teacher, text, tmp_path / "out", capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "dense"]


@pytest.mark.parametrize("kind", [Classifier, SpanReader])
def test_the_pooler_and_the_heads_of_tasks_are_kept(kind, teacher, text, tmp_path, capsys):
    """As when the fine-tuned model was made of the cut teacher; a bare encoder keeps its pooler, too."""
    config = weights.read_config(teacher)
    weights.save_model(tmp_path / "whole", kind(config, *[3][: kind is Classifier], seed=1))
    shutil.copy(teacher / MODEL, tmp_path / "whole")
    run(tmp_path / "whole", text, tmp_path / "out", capsys)
    whole, cut = (read_safetensors(tmp_path / name / "model.safetensors")[0] for name in ("whole", "out"))
    assert whole.keys() == cut.keys()
    changed = [name for name in whole if not torch.equal(whole[name], cut[name])]  # equal ones have the same shape
    assert len(changed) == 1 and changed[0].endswith("word_embeddings.weight")


def test_prompts_and_sentences_keep_their_pieces(teacher, tmp_path, capsys):
    """A prompt of the folder, a prefix, and the sentence that follows a full-width mark, where a word begins."""
    path, out = tmp_path / "text.txt", tmp_path / "out"
    path.write_text("a cat。the teacher\na cat\n" * 3, encoding="utf-8")
    shutil.copytree(teacher, tmp_path / "encoder")
    read = weights.read_config(teacher)
    write_pooling(tmp_path / "encoder", Pooling(settings={"prompts": {"query": "distilled: ", "none": ""}}), read)
    whole = Tokenizer.load(teacher)

    def same(line):
        return [whole.vocab[i] for i in whole.encode(line)] == [small.vocab[i] for i in small.encode(line)]

    run(teacher, path, out, capsys)
    small = Tokenizer.load(out)
    assert same("a cat。the teacher")
    assert not any(map(same, ("the teacher", "distilled: a cat", "vocabulary cat")))
    run(tmp_path / "encoder", path, tmp_path / "second", capsys, "--sentences", "--prefix", "vocabulary ")
    small = Tokenizer.load(tmp_path / "second")
    assert all(map(same, ("vocabulary the teacher", "vocabulary a cat。", "distilled: the teacher")))
    with pytest.raises(UserError, match="add --sentences"):
        run(teacher, path, tmp_path / "third", capsys, "--prefix", "vocabulary ")
