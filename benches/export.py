"""What export.py makes of models: size, latency at batch 1 and score of ours and of the ONNX files, fp32 and int8.

Folders with `:TASK` are judged by the task's dev set, others by held-out text (minidistil/export/held_out.py). Files
are measured whether or not export.py would write them.
"""

import dataclasses
import pathlib

import export  # the script
from benches import ROOT, Common
from benches.report import measured
from minidistil.cli import option
from minidistil.errors import UserError
from minidistil.export import int8
from minidistil.export.gate import OURS, measure
from minidistil.export.graphs import open_graph, to_onnx
from minidistil.export.session import library
from minidistil.tokenizer import Tokenizer

TINY_ITEMS = 20


@dataclasses.dataclass
class Settings(Common):
    model: str = option(None, "folders, each perhaps with :TASK, with commas (default: the demo's teacher)")
    data: str = option(None, "the GLUE folder, for models with :TASK")
    sentences: int = option(1000, "items of held-out text")


def bench(settings):
    """Yields a row per model and provider: those of `gate.measure`, with the model's name and what it ran on."""
    library("onnxruntime")
    n = min(settings.sentences, TINY_ITEMS) if settings.tiny else settings.sentences
    for name in (settings.model or str(ROOT / "data" / "demo")).split(","):
        place, _, task = name.partition(":")
        folder = pathlib.Path(place)
        if not folder.is_dir():
            raise UserError(f"--model {place} is not a folder: name those of models")
        graph, tokenizer = open_graph(folder), Tokenizer.load(folder)
        given = export.Settings(place, "onnx-int8", settings.data if task else None, task or None, sentences=n)
        held = export.open_held_out(given, folder, graph, tokenizer)
        model = to_onnx(graph)
        data = {export.FP32: model.SerializeToString(), export.INT8: int8.quantised(model).SerializeToString()}
        for row in measure(graph, data, held)[0]:
            yield {"case": "export", "model": folder.resolve().name, "kind": graph.kind, "held_out": held.what, **row}


def table(results):
    """Markdown: sizes, milliseconds and scores, and how they compare with ours."""
    rows = measured(results)
    threads = list(rows[0]["ms"])
    timed = " | ".join(f"ms, {t} thread{'s' * (t != '1')}" for t in threads)
    lines = [f"| | | MB | {timed} | smaller | faster | score | agreement |", f"|{'---|' * (7 + len(threads))}"]
    first, most = None, threads[-1]
    for row in rows:
        same = row["provider"] == OURS
        first = row if same else first  # ours comes before the files of the same model
        cells = [f"{row['model']}, {row['kind']}" if same else "", row["provider"], f"{row['bytes'] / 1e6:,.1f}"]
        cells += [f"{ms:,.2f}" for ms in row["ms"].values()]
        cells += ["" if same else f"{first['bytes'] / row['bytes']:.1f}x"]
        cells += ["" if same else f"{first['ms'][most] / row['ms'][most]:.1f}x"]
        cells += ["" if row["score"] is None else f"{row['score']:.2f}"]
        cells += [f"{row['agreement']:.1f}%" if "agreement" in row else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
