"""`bench.py infer`: its figures hold together, and what it times is right."""

import itertools
import json
import shutil
import sys
import time
import types

import pytest
import torch
from pictures import svg_texts

import export
from benches import infer
from minidistil import weights
from minidistil.downstream.batches import encode_pair
from minidistil.downstream.heads import Classifier, SpanReader, load_finetuned
from minidistil.errors import UserError
from minidistil.export.session import Session
from minidistil.model import Config
from minidistil.tokenizers.wordpiece import WordPiece
from minidistil.tokenizers.wordpiece_files import SPECIAL_TOKENS

HALF = ["teacher bf16", "student bf16"] if infer.has_bf16() else []
PROVIDERS = ["teacher", "student", *HALF, "student int8", "transformers, teacher", "transformers, student"]
SMALL = Config(vocab_size=105, positions=32, layers=2, heads=2, width=32, mlp_width=64)


def measure(**given):
    settings = dict(tiny=True, rounds=1, data=None, teacher=None, student=None)
    return list(infer.bench(types.SimpleNamespace(**settings | given)))


@pytest.fixture(scope="module")
def results():
    pytest.importorskip("transformers")
    return {r["provider"]: r for r in measure()}


def test_figures_hold_together(results):
    assert list(results) == PROVIDERS
    for r in results.values():
        p50, p90, p99 = r["ms"]
        low, middle, high = r["seconds"]
        assert 0 < p50 <= p90 <= p99 and 0 < low <= middle <= high
        # 20 of 40 pairs take at least p50, 4 of these at least p90
        assert r["examples"] == 40 and 40 * (0.4 * p50 + 0.1 * p90) / 1e3 <= 1.001 * high
        assert 0 < r["examples_per_second"][0] <= r["examples_per_second"][2]
        assert (r["case"], r["weights"], r["pairs"]) == ("infer", "random", "docstrings") and 8 < r["tokens"] < 128
        assert "accuracy" not in r


def test_sizes(results):
    teacher, student, *half, int8 = (r for name, r in results.items() if "transformers" not in name)
    theirs = [r for name, r in results.items() if "transformers" in name]
    for r in (teacher, student):
        assert 4 * r["parameters"] < r["bytes"] < 4 * r["parameters"] + 20_000
    # the student lacks 2 of 4 layers (4 matrices (64, 64), 2 of (64, 128), biases, 2 norms) and the token types
    layer = 4 * 64 * 65 + 64 * 129 + 128 * 65 + 4 * 64
    assert teacher["parameters"] - student["parameters"] == 2 * layer + 2 * 64
    assert int8["bytes"] < student["bytes"] - 2 * layer
    for r, whole in zip(half, (teacher, student), strict=bool(half)):
        assert r["parameters"] == whole["parameters"] and whole["bytes"] / 2 < r["bytes"] < whole["bytes"] / 2 + 30_000
    assert [(r["parameters"], r["bytes"]) for r in theirs] == [
        (r["parameters"], r["bytes"]) for r in (teacher, student)
    ]


def test_int8_is_the_file_that_users_get(world, tmp_path):
    """The bytes and the logits are those of export.py, in batches and alone."""
    pytest.importorskip("onnxruntime", reason="pip install -r requirements-export.txt")
    shutil.copytree(world / "sst2", tmp_path / "sst2")
    (tmp_path / "text.txt").write_text("aa bb cc\n\ndd ee\n")
    export.export(export.Settings(str(tmp_path / "sst2"), "onnx-int8", str(tmp_path / "text.txt"), max_loss=100))
    written = tmp_path / "sst2" / "onnx" / "model_quantized.onnx"
    ours = infer.Exported(world / "sst2")
    assert ours.bytes == written.stat().st_size
    ids, mask = torch.arange(5, 29).view(2, 12), torch.ones(2, 12, dtype=torch.bool)
    mask[1, 7:] = False
    assert torch.equal(ours(ids, mask, None), Session(written)(ids, mask)[0])
    assert torch.equal(ours(ids[:1]), Session(written)(ids[:1])[0])


def test_bf16_is_cast_once_and_leaves_the_model_alone():
    """Every weight but LayerNorm's is bf16 before the first call, and so is what LayerNorm, with fp32 sums, returns."""
    model = Classifier(SMALL, 1, seed=0).eval()
    copy = infer.in_bf16(model)
    wide = {name for name, parameter in copy.named_parameters() if parameter.dtype == torch.float32}
    assert wide == {name for name, _ in model.named_parameters() if "norm" in name}
    assert {p.dtype for p in copy.parameters()} == {torch.float32, torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    hidden = []
    copy.encoder.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    ids = torch.arange(5, 29)[None]
    with torch.no_grad():
        assert (copy(ids) - model(ids)).abs().max() < 5e-3
    assert hidden[0].dtype == torch.bfloat16


def test_outputs_are_those_of_transformers(results):
    limits = {"fp32": (0, 1e-6), "bf16": (1e-6, 5e-3), "int8": (1e-6, 0.1)}
    for name, r in results.items():
        low, high = limits[r["dtype"]]
        assert low <= r["max_error"] <= high and r["dtype"] == infer.dtype_of(name)


@pytest.mark.parametrize("fault", ["mask", "types", "logits"])
def test_a_wrong_result_is_not_timed(fault, monkeypatch):
    pytest.importorskip("transformers")
    right = infer.of_transformers

    def wrong(folder):
        logits = right(folder)
        return {
            "mask": lambda ids, mask, types: logits(ids, None, types),
            "types": lambda ids, mask, types: logits(ids, mask, 0 * types),
            "logits": lambda ids, mask, types: logits(ids, mask, types) + 2e-4,
        }[fault]

    monkeypatch.setattr(infer, "of_transformers", wrong)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # int8 is not asked here, and takes seconds
    rows = {r["provider"]: r for r in measure()}
    failed = rows["transformers, teacher"]
    assert "no time is reported for a wrong result" in failed["error"] and "ms" not in failed
    assert rows["teacher"]["ms"] and rows["student"]["ms"]
    assert infer.table(list(rows.values())).count("\n") == 1 + sum("error" not in r for r in rows.values())


def test_what_is_not_here_is_left_out(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(infer, "has_bf16", lambda: False)
    assert [r["provider"] for r in measure()] == PROVIDERS[:2]
    said = capsys.readouterr().out.splitlines()
    starts = ("no bf16", "no int8: onnxruntime is not installed", "transformers is not installed")
    assert len(said) == 3 and all(line.startswith(start) for line, start in zip(said, starts, strict=True))


def test_providers_take_turns():
    order = []
    functions = {
        name: lambda x, name=name: (order.append((name, x)), time.sleep(x / 1000)) for name in ("a", "b")
    }  # fmt: skip
    seconds = infer.timed(functions, [(1,), (2,), (3,)], rounds=2, turn=2)
    once = [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("a", 3), ("b", 3)]
    assert order == 2 * once
    for name in functions:
        assert seconds[name].shape == (2, 3) and (seconds[name] >= [0.001, 0.002, 0.003]).all()


def test_table_and_chart(results, tmp_path):
    rows = list(results.values())
    lines = infer.table(rows).splitlines()
    assert len(lines) == 2 + len(rows) and len({line.count("|") for line in lines}) == 1
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in PROVIDERS]
    assert "40 pairs" in lines[0] and "1.00x" in lines[2] and "2.1M" in lines[2]
    infer.draw(tmp_path / "infer.svg", rows)
    texts = svg_texts(tmp_path / "infer.svg")
    half = {"ours, bf16"} if HALF else set()
    assert {"ours", "ours, int8", "transformers", "teacher", "student", "seconds", *half} <= set(texts)
    assert all(f"{row['seconds'][1]:,.1f}" in texts for row in rows)


# ---- models and data that are given


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models and data with 100 words: "sst2" and "reader", fine-tuned; SST-2, of which "sst2" knows four in five."""
    folder = tmp_path_factory.mktemp("world")
    words = ["".join(letters) for letters in itertools.product("abcdefghij", repeat=2)]
    tokenizer = WordPiece([*SPECIAL_TOKENS.values(), *words], max_length=32)
    model = Classifier(SMALL.student(2), 2, seed=3).eval()
    weights.save_model(folder / "sst2", model, finetuning_task="sst2", id2label={"0": "negative", "1": "positive"})
    weights.save_model(folder / "reader", SpanReader(SMALL.student(2), seed=3))
    for name in ("sst2", "reader"):
        tokenizer.save(folder / name, "distilbert")
    texts = [" ".join(words[i : i + 3 + i % 7]) for i in range(50)]
    sst2 = ["sentence\tlabel"]
    for i, text in enumerate(texts):
        with torch.no_grad():
            guess = model(torch.tensor([encode_pair(tokenizer, text, None, 32)[0]])).argmax().item()
        sst2.append(f"{text}\t{guess if i % 5 else 1 - guess}")
    stsb = ["sentence1\tsentence2\tscore", *(f"{a}\t{b}\t2.5" for a, b in itertools.pairwise(texts))]
    for task, lines in (("SST-2", sst2), ("STS-B", stsb)):
        (folder / "glue" / task).mkdir(parents=True)
        for split in ("train", "dev"):
            (folder / "glue" / task / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_accuracy_of_lower_precisions(world):
    results = {r["provider"]: r for r in measure(student=world / "sst2", data=world / "glue")}
    words = [3 + i % 7 for i in range(41)]
    tokens = sum(a + b + 3 for a, b in itertools.pairwise(words)) / 40
    for r in results.values():
        assert (r["pairs"], r["examples"], r["tokens"]) == ("STS-B dev", 40, round(tokens, 1))
    assert results["student"]["accuracy"] == 80.0 and 25 <= results["student int8"]["accuracy"] <= 100
    assert [name for name, r in results.items() if "accuracy" in r] == ["student", *HALF[1:], "student int8"]
    for name in HALF[1:]:
        assert 70 <= results[name]["accuracy"] <= 90  # a logit or two of fifty may be nearly 0
    assert (results["teacher"]["weights"], results["student"]["weights"]) == ("random", "fine-tuned")
    table = infer.table(list(results.values())).splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert [line.split(" | ")[-1] for line in table if line.startswith("| student |")] == ["80.0% |"]


def test_accuracy_is_that_of_its_own_task(world):
    """A student that was fine-tuned for something else has none, and neither has one without SST-2."""
    config = world / "sst2" / "config.json"
    values = json.loads(config.read_text())
    settings = types.SimpleNamespace(student=world / "sst2", data=world / "glue")
    assert infer.accuracies(settings, {}, 32) == {}
    models = {"student": load_finetuned(world / "sst2")[0]}
    assert infer.accuracies(settings, models, 32) == {"student": 80.0}
    assert infer.accuracies(types.SimpleNamespace(student=world / "sst2", data=world), models, 32) == {}
    config.write_text(json.dumps(values | {"finetuning_task": "rte"}))
    assert infer.accuracies(settings, models, 32) == {}
    config.write_text(json.dumps(values))


def test_models_that_do_not_fit(world):
    with pytest.raises(UserError, match="reader is no classifier"):
        measure(teacher=world / "reader")
    fewer = Classifier(Config(vocab_size=50, layers=1, heads=1, width=8, mlp_width=8), 2)
    weights.save_model(world / "fewer", fewer)
    with pytest.raises(UserError, match="105 words are too many for a model of 50"):
        measure(teacher=world / "sst2", student=world / "fewer", data=world / "glue")
