"""Writes a model as an ONNX file, for a phone, a browser or a C++ program, if it is as good as ours.

    python export.py --model runs/demo --to onnx             fp32: onnx/model.onnx in the model's folder
    python export.py --model runs/demo --to onnx-int8        int8: onnx/model_quantized.onnx
    python export.py --model runs/finetune-sst2/sst2 --to onnx-int8 --data GLUE    judged by its task's dev set
    python export.py --model all-MiniLM-L6-v2 --to onnx-int8 --task stsb --data GLUE    in runs/export/all-MiniLM-L6-v2

These are the places and names where transformers.js and optimum look. A folder other than the model's own (--out, or
that of a downloaded model) gets config.json and the tokenizer, too: all that they need. The file and our model run on
the same held-out items: differences, score, size and latency are printed, and kept in onnx/report.json. A file that
loses more than --max-loss, or may do so by the standard error of few held-out words, is not written. The last line of
stdout is JSON: what report.json says of the file.
"""

import dataclasses
import itertools
import json
import math
import pathlib

import torch

from data.cached import docstring_corpus
from data.sentence_split import sentences
from data.sources import batches, check
from minidistil import files, hub, weights
from minidistil.checks import check_vocabulary
from minidistil.cli import option, parse_args, run_script
from minidistil.device import device_name, versions
from minidistil.downstream import glue
from minidistil.downstream.heads import VectorClassifier
from minidistil.downstream.table import is_table
from minidistil.errors import UserError
from minidistil.export import blame, int8
from minidistil.export.gate import measure
from minidistil.export.graphs import OPSET, Labels, Spans, Vectors, open_graph, to_onnx
from minidistil.export.held_out import from_corpus, from_task, from_texts, public
from minidistil.export.session import library
from minidistil.pooling import modules_folder, read_pooling, write_pooling
from minidistil.tokenizer import Tokenizer

FILES = {"onnx": "model.onnx", "onnx-int8": "model_quantized.onnx"}  # in the folder onnx
FP32, INT8 = "ONNX, fp32", "ONNX, int8"
CONFIG = "config.json"


@dataclasses.dataclass
class Settings:
    model: str = option(None, "folder or name of the model", required=True)
    to: str = option(None, "fp32 or int8", choices=tuple(FILES), required=True)
    data: str = option(None, "held-out text: a folder of data/prepare.py, a file or folder of text; or a task's data "
                             "(default: the docstring corpus, prepared once)")  # fmt: skip
    task: str = option(None, "judge by this task's dev set (default: the one that the model was fine-tuned for, if "
                             "--data is a folder, but no corpus)")  # fmt: skip
    max_loss: float = option(1.0, "points of score that the file may cost; without a score, percent of agreement")
    exclude: str = option(None, "int8: groups that stay fp32, with commas: embeddings, layer.0, layer.1 ..., head")
    sentences: int = option(1000, "items of text that are compared, at most; of a task all")
    out: str = option(None, "folder for onnx/ (default: the model's own; of a downloaded model runs/export/NAME)")


def check_settings(settings):
    """Raises UserError for values that cannot work."""
    if not (settings.max_loss >= 0 and math.isfinite(settings.max_loss)):
        raise UserError(f"--max-loss is {settings.max_loss}: it must not be negative")
    if settings.sentences < 1:
        raise UserError(f"--sentences is {settings.sentences}: it must be at least 1")
    if settings.exclude and settings.to != "onnx-int8":
        raise UserError("--exclude is for --to onnx-int8: leave it out")
    if settings.task and is_table(settings.task):
        raise UserError("--task names a task; on a table, file and model are compared: give --data FILE and no --task")
    if settings.task and not settings.data:
        raise UserError(f"--task {settings.task} needs its data: name the folder with --data")
    for name in ("onnx", "onnxscript", "onnxruntime"):
        library(name)


def destination(settings, folder):
    """Returns the folder in which onnx/ is made; UserError where it holds another model."""
    name = hub.published_name(settings.model)
    out = settings.out or (pathlib.Path("runs", "export", name.rpartition("/")[2]) if name else folder)
    out = pathlib.Path(out).expanduser()
    if out.is_dir() and not out.samefile(folder) and (out / CONFIG).is_file():
        if (out / CONFIG).read_bytes() != (folder / CONFIG).read_bytes():
            raise UserError(f"{out} holds another model (its {CONFIG} differs): name another folder with --out")
    return out


def open_held_out(settings, folder, graph, tokenizer):
    """Returns the HeldOut that --data and --task name, or that of the docstring corpus."""
    n, data = settings.sentences, settings.data
    if data is None:
        corpus = docstring_corpus(tokenizer.digest, folder)
        return from_corpus(corpus, graph, tokenizer, folder, n, "the docstring corpus")
    if settings.task:
        return from_task(settings.task, data, folder, graph, tokenizer)
    if (pathlib.Path(data) / "meta.json").is_file():
        return from_corpus(data, graph, tokenizer, folder, n)
    task = weights.read_json(folder / "config.json").get("finetuning_task")
    known = task == "squad" or task in glue.TASKS and pathlib.Path(data).is_dir()  # another is a table of one's own
    if isinstance(graph, Labels | Spans) and known:
        return from_task(task, data, folder, graph, tokenizer)
    check([data])
    found = (text for batch in batches([data]) for document in batch.documents()[0] for text in sentences(document))
    return from_texts(f"sentences of {public(data)}", list(itertools.islice(found, n)), graph, tokenizer)


def show(graph, held, rows):
    """Prints a table of the rows of `measure`."""
    print(f"{graph.kind}, on {held.what}, {device_name(torch.device('cpu'))}", flush=True)
    heads = [f"ms, {threads} thread{'s' * (threads != '1')}" for threads in rows[0]["ms"]]
    print("  ".join([f"{'':13}", f"{'MB':>7}", *heads, f"{'score':>7}", "agreement", "largest difference"]))
    for row in rows:
        score = "-" if row["score"] is None else f"{row['score']:.2f}"
        cells = [f"{row['provider']:13}", f"{row['bytes'] / 1e6:7.1f}"]
        cells += [f"{ms:{len(head)}.2f}" for ms, head in zip(row["ms"].values(), heads, strict=True)] + [f"{score:>7}"]
        cells += [f"{row['agreement']:8.2f}%", f"{row['largest_difference']:18.1e}"] if "agreement" in row else []
        print("  ".join(cells), flush=True)


def refuse(settings, graph, model, held, quality, exclude):
    """Raises UserError for an int8 file that loses too much: which groups cost most, and what to exclude."""
    if quality.loss <= settings.max_loss:
        what = f"int8 loses {quality.loss:.2f} ± {quality.margin:.2f} points on {held.what}, too few to tell"
        raise UserError(f"{what}: name more text with --data (and --sentences), or give a larger --max-loss")
    print(f"int8 loses {quality.loss:.2f}: each group is left in fp32 in turn", flush=True)
    found = blame.costs(graph, model, held, exclude)
    total = max(sum(max(gain, 0) for gain in found.values()), 1e-30)
    for name, gain in found.items():
        print(f"  {name:12} {max(gain, 0) / total:6.1%} of the difference", flush=True)
    worst = [name for name, gain in found.items() if gain > 0]
    chosen, kept = blame.enough(graph, model, held, exclude, worst, settings.max_loss) if worst else (None, quality)
    unit = "% of agreement" if quality.before is None else " points of score"
    most = f"{', '.join(worst[:2])} cost most" if worst else "no group alone costs it"
    if chosen:
        way = f"add --exclude {','.join(chosen)} (loses {max(kept.loss, 0):.2f})"
    else:
        way = f"with {', '.join(worst[: blame.MOST])} in fp32 {kept.loss:.2f}: take --to onnx, or a larger --max-loss"
    way += "" if settings.data else "; or judge it on its own kind of text with --data"
    raise UserError(f"int8 loses {quality.loss:.2f}{unit}, more than --max-loss {settings.max_loss:g}: {most}: {way}")


def export(settings):
    """Writes the file that `settings` describe; returns its record. Raises UserError where it is not good enough."""
    check_settings(settings)
    folder = hub.resolve(settings.model)
    out = destination(settings, folder)
    graph, tokenizer = open_graph(folder), Tokenizer.load(folder)
    if isinstance(graph, Vectors) and not modules_folder(folder):  # perhaps a cache that lacks what they need
        graph = open_graph(hub.resolve(settings.model, vectors=True))
    if isinstance(graph, Vectors) and VectorClassifier.hub_name in str(weights.read_json(folder / CONFIG)):
        print("the file makes sentence vectors; their classifier stays in the folder", flush=True)
    check_vocabulary("model", graph.config, tokenizer)
    held = open_held_out(settings, folder, graph, tokenizer)
    exclude = tuple(settings.exclude.split(",")) if settings.exclude else ()
    model = to_onnx(graph)
    int8.check_groups(model, exclude)
    data = {FP32: model.SerializeToString()}
    if settings.to == "onnx-int8":
        data[INT8] = int8.quantised(model, exclude).SerializeToString()
    rows, qualities = measure(graph, data, held)
    show(graph, held, rows)
    if not qualities[FP32].exact or qualities[FP32].loss > settings.max_loss:
        what = f"differs from ours by {qualities[FP32].largest:.1e} and loses {qualities[FP32].loss:.2f}"
        raise UserError(f"the ONNX file {what}, more than rounding: report it with this model's config.json")
    if settings.to == "onnx-int8" and not qualities[INT8].within(settings.max_loss):
        refuse(settings, graph, model, held, qualities[INT8], exclude)
    record = {
        "to": settings.to, "kind": graph.kind, "opset": OPSET, "excluded": exclude, "held_out": held.what,
        "results": rows, "device": device_name(torch.device("cpu")), "versions": versions(),
    }  # fmt: skip
    if not (out.is_dir() and out.samefile(folder)):
        accompany(folder, out)
    write(out, weights.digests(folder), FILES[settings.to], data[INT8 if INT8 in data else FP32], record)
    return {"file": str(out / "onnx" / FILES[settings.to]), **record}


def accompany(folder, out):
    """Copies what belongs to a model's ONNX file from its folder to another one: tokenizer, pooling, config.json."""
    for name in (*hub.TOKENIZER, "generation_config.json", CONFIG):
        if (folder / name).is_file():
            with files.replacing(out / name) as temporary:
                temporary.write_bytes((folder / name).read_bytes())
    if modules_folder(folder):
        write_pooling(out, read_pooling(folder), weights.read_config(folder))


def write(folder, of, name, data, record):
    """Writes onnx/`name`, and its record into onnx/report.json beside those of the other file `of` the same weights."""
    path, report = folder / "onnx" / name, folder / "onnx" / "report.json"
    known = weights.read_json(report) if report.is_file() else {}
    known = known if known.get("weights") == of else {"weights": of, "files": {}}
    with files.replacing(path, len(data)) as temporary:
        temporary.write_bytes(data)
    files.write_json(report, {**known, "files": {**known["files"], name: record}})
    print(f"written: {path}, {len(data) / 1e6:.1f} MB, opset {OPSET}", flush=True)
    if not (folder / "tokenizer.json").is_file():
        print(f"{folder} has no tokenizer.json, which transformers.js reads the text with: add the model's", flush=True)


def main(argv):
    settings = Settings(**parse_args(Settings, argv, __doc__))
    print(json.dumps(export(settings), separators=(",", ":")))


if __name__ == "__main__":
    run_script(main)
