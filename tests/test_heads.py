"""The heads of fine-tuning against transformers, and their way to disk and back."""

import dataclasses

import pytest
import torch

from minidistil import weights
from minidistil.downstream import heads
from minidistil.downstream.heads import MASKED_LOGIT, Classifier, SpanReader, load_finetuned, load_pretrained
from minidistil.errors import UserError
from minidistil.model import Config, LanguageModel
from minidistil.tokenizers.wordpiece import WordPiece
from minidistil.tokenizers.wordpiece_files import SPECIAL_TOKENS

BERT = Config(vocab_size=60, positions=24, layers=2, heads=2, width=16, mlp_width=32, init_range=0.3)
DISTILBERT = BERT.student(2)
ROBERTA = dataclasses.replace(BERT, token_types=1, pad_id=1, norm_eps=1e-5, family="roberta")
XLM_R = dataclasses.replace(ROBERTA, family="xlm-roberta")
SHAPES = pytest.mark.parametrize("config", [BERT, DISTILBERT, ROBERTA, XLM_R], ids=lambda config: config.family)


def batch(config):
    ids = torch.randint(5, config.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12)[None] < torch.tensor([[12], [7], [9]])
    types = (torch.arange(12)[None] >= 5).long().expand(3, 12) * mask * (config.token_types != 1)
    theirs = {"input_ids": ids, "attention_mask": mask.long()}
    return (ids, mask, types), theirs | ({"token_type_ids": types} if config.token_types else {})


@SHAPES
@torch.no_grad()
def test_classifier_is_that_of_transformers(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = Classifier(config, 3, seed=1).eval()
    weights.save_model(tmp_path, model, id2label={str(i): name for i, name in enumerate("abc")})
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    ours, inputs = batch(config)
    expected = theirs.eval()(**inputs).logits
    assert expected.std() > 0.1  # something to compare
    torch.testing.assert_close(model(*ours), expected, atol=1e-5, rtol=1e-5)


@SHAPES
@torch.no_grad()
def test_span_reader_is_that_of_transformers(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = SpanReader(config, seed=1).eval()
    weights.save_model(tmp_path, model)
    theirs, info = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    ours, inputs = batch(config)
    expected = theirs.eval()(**inputs)
    logits, mask = model(*ours), ours[1]
    for side, expected_logits in enumerate((expected.start_logits, expected.end_logits)):
        torch.testing.assert_close(logits[:, side][mask], expected_logits[mask], atol=1e-5, rtol=1e-5)
    assert (logits.transpose(1, 2)[~mask] == MASKED_LOGIT).all()


@SHAPES
@pytest.mark.parametrize("kind, outputs", [(Classifier, 3), (Classifier, 1), (SpanReader, 2)])
def test_disk_and_back(config, kind, outputs, tmp_path):
    model = kind(config, outputs, seed=1)
    names = {str(i): f"label {i}" for i in range(outputs)} if kind is Classifier else {}
    weights.save_model(tmp_path, model, **({"id2label": names} if names else {}))
    again, labels = load_finetuned(tmp_path)
    assert type(again) is kind and not again.training and labels == tuple(names.values())
    assert again.config == dataclasses.replace(config, norm_eps=again.config.norm_eps)
    state, expected = again.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@SHAPES
def test_a_start_takes_the_encoder_and_a_fresh_head(config, tmp_path):
    source = LanguageModel(config, seed=1)
    weights.save_model(tmp_path, source)
    one, same, other = (load_pretrained(tmp_path, Classifier, 2, seed) for seed in (0, 0, 1))
    assert one.training
    for name, tensor in source.encoder.state_dict().items():
        assert torch.equal(one.encoder.state_dict()[name], tensor)
    assert torch.equal(one.pool.weight, same.pool.weight) and not torch.equal(one.pool.weight, other.pool.weight)
    assert one.classify.weight.std() > 0 and not one.classify.bias.any()


@SHAPES
def test_only_the_pooler_of_bert_was_pretrained(config, tmp_path):
    """The dense layer of other families belongs to the task that it was tuned for; BERT's comes from pre-training."""
    tuned = Classifier(config, 3, seed=1)
    weights.save_model(tmp_path, tuned)
    model = load_pretrained(tmp_path, Classifier, 2, seed=2)
    assert torch.equal(model.pool.weight, tuned.pool.weight) == (config.family == "bert")
    assert model.classify.weight.shape == (2, config.width)
    assert load_pretrained(tmp_path, SpanReader, 2).answer.weight.shape == (2, config.width)


def test_folders_that_are_not_fine_tuned_are_refused(tmp_path):
    weights.save_model(tmp_path / "mlm", LanguageModel(BERT, seed=1))
    with pytest.raises(UserError, match="not a fine-tuned model: make one with finetune.py"):
        load_finetuned(tmp_path / "mlm")
    weights.save_model(tmp_path / "gap", Classifier(BERT, 2, seed=1), id2label={"0": "a", "2": "b"})
    with pytest.raises(UserError, match="id2label does not count 0, 1, 2"):
        load_finetuned(tmp_path / "gap")
    weights.save_model(tmp_path / "three", Classifier(BERT, 2, seed=1), id2label={"0": "a", "1": "b", "2": "c"})
    with pytest.raises(UserError, match="classifier"):
        load_finetuned(tmp_path / "three")
    with pytest.raises(UserError, match="has no masked-LM head"):
        weights.load_model(tmp_path / "gap")


@SHAPES
def test_pipeline_gives_the_same_answer(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    vocab = [*SPECIAL_TOKENS.values(), *(f"w{i}" for i in range(55))]
    tokenizer = WordPiece(vocab, max_length=24)
    config = dataclasses.replace(config, pad_id=tokenizer.pad_id)
    model = Classifier(config, 2, seed=1).eval()
    weights.save_model(tmp_path, model, id2label={"0": "no", "1": "yes"}, label2id={"no": 0, "yes": 1})
    tokenizer.save(tmp_path, config.family)
    pipeline = transformers.pipeline("text-classification", model=str(tmp_path), device=-1)
    for text in ("w1 w2 w3", "w9", "w50 w50 unknown w2"):
        said = pipeline(text)[0]
        with torch.no_grad():
            p = torch.softmax(model(torch.tensor([tokenizer.encode_prompt(text)])), -1)[0]
        assert said["label"] == ("no", "yes")[p.argmax()]
        assert said["score"] == pytest.approx(p.max().item(), abs=1e-5)


@SHAPES
def test_cls_alone_is_the_same(config):
    """The rows of the last block that are left out change neither [CLS] nor any gradient."""
    model, (ids, mask, types) = Classifier(config, 2, seed=1).eval().double(), batch(config)[0]
    whole, alone = model.encoder(ids, mask, types), model.encoder(ids, mask, types, first=1)
    assert alone.shape == (3, 1, config.width)
    torch.testing.assert_close(alone[:, 0], whole[:, 0], atol=1e-12, rtol=0)
    parameters = [p for name, p in model.encoder.named_parameters()]
    gradients = [torch.autograd.grad(x[:, 0].square().sum(), parameters) for x in (whole, alone)]
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)


def test_what_roberta_drops(monkeypatch):
    """RoBERTa's classifier drops out of [CLS] and of the dense layer, BERT's of the dense layer only."""
    for config, calls in ((BERT, 1), (ROBERTA, 2)):
        shapes = []
        monkeypatch.setattr(heads, "dropout", lambda x, p, training, shapes=shapes: shapes.append((x.shape, p)) or x)
        Classifier(config, 2, seed=1).train()(*batch(config)[0])
        assert shapes == [((3, config.width), config.dropout)] * calls
