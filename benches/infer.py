"""Latency, throughput and size on a CPU: teacher and student in fp32 and bf16, int8 student, and transformers'.

The measurement is that of DistilBERT's authors (Sanh et al. 2019, table 3): one pass over STS-B's dev set, 1,500 pairs
of sentences, one at a time; and also the same pairs in batches of 32, sorted by length. All providers get the same
tensors, so tokenisation is not timed; their measurements are interleaved.

Legend:  n pairs   B batch   T tokens of the longest example   K labels, 1 for a regression
"""

import copy
import dataclasses
import json
import math
import pathlib
import re
import tempfile
import time

import numpy as np
import torch

from benches import ROOT, Common
from benches.measure import spread
from benches.report import attempt, measured
from data.docstrings import harvest, python_files
from minidistil import plot, weights
from minidistil.cli import option
from minidistil.downstream import glue
from minidistil.downstream.batches import encode_pair, padded, predict
from minidistil.downstream.heads import Classifier, load_finetuned
from minidistil.downstream.tasks import open_task
from minidistil.errors import UserError
from minidistil.export import int8
from minidistil.export.graphs import open_graph, to_onnx
from minidistil.export.session import Session, library
from minidistil.model import BERT_BASE, Config
from minidistil.tokenizer import Tokenizer

CPU = torch.device("cpu")
DEMO = ROOT / "data" / "demo"
TINY = Config(layers=4, heads=2, width=64, mlp_width=128)
INT8 = "student int8"
BATCH = 32
TURN = 150  # single examples per turn of a provider: the first, on cold caches, must not determine the p99
CHECKED = 2 * BATCH  # examples whose logits are compared
WRONG = {"fp32": 1e-4, "bf16": 0.3, "int8": math.inf}  # maximum error of a logit; a provider beyond it is not timed


@dataclasses.dataclass
class Settings(Common):
    teacher: str = option(None, "a fine-tuned folder (default: BERT-base's shape)")
    student: str = option(None, "a fine-tuned folder (default: half the teacher's layers)")
    data: str = option(None, "the GLUE folder")
    rounds: int = option(3, "measurements of each provider, interleaved")


def open_models(settings, work):
    """Returns (folders, models) of "teacher" and "student", missing ones random in `work`; UserError for readers."""
    folders, models = {}, {}
    config = TINY if settings.tiny else BERT_BASE
    for seed, name in enumerate(("teacher", "student")):
        folders[name] = getattr(settings, name) or work / name
        if not getattr(settings, name):
            weights.save_model(folders[name], Classifier(config, 1, seed), id2label={"0": "score"})
        models[name], _ = load_finetuned(folders[name])
        if not isinstance(models[name], Classifier):
            way = "fine-tune one on a task of GLUE, without --vectors"
            raise UserError(f"{folders[name]} is no classifier of [CLS]: {way}")
        config = models[name].config.student(max(1, models[name].config.layers // 2))
    return folders, models


class Exported(torch.nn.Module):
    """The int8 file that export.py makes of a fine-tuned folder: (ids, mask, types) -> logits; `bytes`, its size."""

    def __init__(self, folder):
        super().__init__()
        library("onnxruntime")  # where it is missing, say so before the export, which takes seconds
        data = int8.quantised(to_onnx(open_graph(folder))).SerializeToString()
        self.bytes, self.session = len(data), Session(data, torch.get_num_threads())

    def forward(self, ids, mask=None, types=None):
        return self.session(ids, mask, types)[0]


def in_bf16(model):
    """Returns a copy with bf16 weights and activations, cast once; LayerNorm's parameters and statistics are fp32."""
    model = copy.deepcopy(model).bfloat16()
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.float()
    return model


def has_bf16():
    """Returns whether oneDNN, which computes PyTorch's products on a CPU, has products in bf16 for this processor."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def of_transformers(folder):
    """Returns transformers' model of a folder as a function like ours, with its default attention, sdpa."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)

    def logits(ids, mask, types):
        types = {"token_type_ids": types} if model.config.model_type == "bert" else {}
        return model(ids, attention_mask=mask, **types).logits

    return logits


def providers_of(folders, models, work):
    """Returns {name: (ids, mask, types) -> logits} of the available providers, and bytes on disk of our models."""
    functions = dict(models)
    sizes = {name: sum(path.stat().st_size for path in weights.weight_files(folders[name])) for name in models}
    if has_bf16():
        functions |= {f"{name} bf16": in_bf16(model) for name, model in models.items()}
    else:
        print("no bf16: this PyTorch has no products in bf16 for this processor")
    for name in functions.keys() - models.keys():
        torch.save(functions[name].state_dict(), work / "weights.pt")
        sizes[name] = (work / "weights.pt").stat().st_size
    try:
        functions[INT8] = Exported(folders["student"])
        sizes[INT8] = functions[INT8].bytes
    except UserError as error:  # a library is not installed
        print(f"no int8: {error}")
    try:
        functions |= {f"transformers, {name}": of_transformers(folder) for name, folder in folders.items()}
    except ImportError:
        print("transformers is not installed: pip install -r requirements-dev.txt")
    return functions, sizes


def original(provider):
    """Returns which of our fp32 models a provider computes."""
    return "teacher" if "teacher" in provider else "student"


def dtype_of(provider):
    """Returns the dtype of a provider's weights, by name."""
    return next((dtype for dtype in ("bf16", "int8") if provider.endswith(dtype)), "fp32")


def pairs_of(settings):
    """Returns (name, pairs of texts): STS-B's dev set, or without --data as many pairs of docstrings."""
    n = 40 if settings.tiny else 1500
    if settings.data:
        return "STS-B dev", [(e.first, e.second) for e in glue.load("stsb", settings.data)[1]["dev"]][:n]
    texts = harvest(python_files()[:: 200 if settings.tiny else 8])
    sentences = [re.split(r"(?<=[.!?])\s|\n\n", text, maxsplit=1)[0] for text in texts]
    return "docstrings", list(zip(sentences[: 2 * n : 2], sentences[1 : 2 * n : 2], strict=False))


def accuracies(settings, models, T):
    """Returns {name: accuracy on SST-2's dev set, percent} if the student was fine-tuned for it, else {}."""
    if not settings.student or not settings.data or not (pathlib.Path(settings.data) / "SST-2").is_dir():
        return {}
    config = json.loads((pathlib.Path(settings.student) / "config.json").read_text(encoding="utf-8"))
    if config.get("finetuning_task") != "sst2":
        return {}
    tokenizer = Tokenizer.load(settings.student)
    task = open_task("sst2", settings.data, tokenizer, T, limit=1)  # the training set is not used
    logits = {name: predict(model, task.dev[0], tokenizer.pad_id, CPU) for name, model in models.items()}
    return {name: task.evaluate([rows])["accuracy"] for name, rows in logits.items()}


@torch.inference_mode()
def largest_error(function, truth, singles, batches):
    """Returns the largest difference of a provider's logits from `truth` (n, K), singly and in padded batches."""
    logits = torch.stack([torch.cat([function(*x) for x in inputs]) for inputs in (singles, batches)])  # (2, n, K)
    return (logits - truth).abs().max().item()


@torch.inference_mode()
def timed(functions, inputs, rounds, turn):
    """Seconds of each call, {name: (rounds, inputs)}; after `turn` inputs it is the next function's turn."""
    seconds = {name: np.zeros((rounds, len(inputs))) for name in functions}
    for r in range(rounds):
        for start in range(0, len(inputs), turn):
            for name, function in functions.items():
                for i, x in enumerate(inputs[start : start + turn], start):
                    began = time.perf_counter()
                    function(*x)
                    seconds[name][r, i] = time.perf_counter() - began
    return seconds


def bench(settings):
    """Yields a row per provider: seconds and examples/s as `spread` over rounds, ms [p50, p90, p99] per example."""
    what, pairs = pairs_of(settings)
    tokenizer = Tokenizer.load(settings.teacher or settings.student or DEMO)
    with tempfile.TemporaryDirectory() as work:
        folders, models = open_models(settings, pathlib.Path(work))
        functions, sizes = providers_of(folders, models, pathlib.Path(work))
    words, T = (min(getattr(m.config, limit) for m in models.values()) for limit in ("vocab_size", "positions"))
    if len(tokenizer.vocab) > words:
        raise UserError(f"{len(tokenizer.vocab)} words are too many for a model of {words}: give two that share them")
    T = min(T, 128)
    items = [encode_pair(tokenizer, *pair, T) for pair in pairs]
    singles = [(torch.tensor([ids]), None, torch.tensor([types])) for ids, types in items]

    def batches(chosen):
        return [padded(items, chosen[i : i + BATCH], tokenizer.pad_id, CPU) for i in range(0, len(chosen), BATCH)]

    tokens, rows = sum(len(ids) for ids, _ in items) / len(items), {}
    with torch.inference_mode():  # our fp32 models, one example at a time
        truth = {name: torch.cat([models[name](*x) for x in singles[:CHECKED]]) for name in models}
    for name, function in functions.items():
        of = original(name)
        rows[name] = row = {
            "case": "infer", "provider": name, "dtype": dtype_of(name),
            "weights": "fine-tuned" if getattr(settings, of) else "random",
            "pairs": what, "examples": len(items), "tokens": round(tokens, 1),
            "parameters": sum(p.numel() for p in models[of].parameters()), "bytes": sizes.get(name, sizes[of]),
        }  # fmt: skip
        with attempt(row):
            error = largest_error(function, truth[of], singles[:CHECKED], batches(range(len(items))[:CHECKED]))
            row["max_error"] = float(f"{error:.1e}")
            if not error <= WRONG[dtype_of(name)]:
                raise UserError(f"{name} is wrong by {error:.1e}: no time is reported for a wrong result")
        if "error" in row:
            yield row
    functions = {name: function for name, function in functions.items() if "error" not in rows[name]}
    students = {name: f for name, f in functions.items() if name.startswith("student")}
    accuracy = accuracies(settings, students, T)
    rounds = 1 if settings.tiny else settings.rounds
    alone = timed(functions, singles, rounds, TURN)
    together = timed(functions, batches(np.argsort([len(ids) for ids, _ in items], kind="stable")), rounds, 1)
    for name in functions:
        ms = 1e3 * np.median(np.percentile(alone[name], (50, 90, 99), axis=1), axis=1)
        rows[name] |= {
            "seconds": [round(x, 3) for x in spread(alone[name].sum(1).tolist())],
            "ms": [round(x, 3) for x in ms.tolist()],
            "examples_per_second": [round(x, 1) for x in spread((len(items) / together[name].sum(1)).tolist())],
        }
        if name in accuracy:
            rows[name]["accuracy"] = round(accuracy[name], 2)
        yield rows[name]


def table(results):
    """Markdown: medians over rounds, and the speed-up over our teacher, one example at a time."""
    results = measured(results)
    first, scored = results[0], any("accuracy" in r for r in results)
    head = (
        f"| | parameters | on disk, MB | {first['examples']:,} pairs one at a time, s | speed-up | p50, p90, p99, ms "
        f"| examples/s in batches of {BATCH} | largest difference |"
    )
    lines = [head + " SST-2 accuracy |" * scored, "|---" * (8 + scored) + "|"]
    for r in results:
        seconds, rate = r["seconds"][1], r["examples_per_second"][1]
        cells = [r["provider"], f"{r['parameters'] / 1e6:.1f}M", f"{r['bytes'] / 1e6:,.0f}", f"{seconds:,.1f}"]
        cells += [f"{first['seconds'][1] / seconds:.2f}x", ", ".join(f"{ms:,.1f}" for ms in r["ms"]), f"{rate:,.1f}"]
        cells += [f"{r['max_error']:.0e}"] + [f"{r['accuracy']:.1f}%" if "accuracy" in r else ""] * scored
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path, results):
    """Bars of the seconds of a pass: the same model by ours, in bf16, in int8, and by transformers."""
    series, first = {}, measured(results)[0]
    for r in measured(results):
        of, dtype = original(r["provider"]), dtype_of(r["provider"])
        by = "transformers" if r["provider"].startswith("transformers") else "ours"
        series.setdefault(by if dtype == "fp32" else f"{by}, {dtype}", {})[of] = r["seconds"]
    title = f"{first['examples']:,} pairs ({first['pairs']}) one at a time: median, p20 to p80"
    plot.draw(path, plot.bars(title, "seconds", series, "{:,.1f}".format))
