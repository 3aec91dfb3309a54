"""Speed, memory and quality of ours and the alternatives; each provider is checked before it is timed.

    python bench.py loss          the loss on logits, forward and backward (the default)
    python bench.py linear        the same with the vocabulary projection
    python bench.py layernorm     dropout + residual + LayerNorm
    python bench.py cosine        cosine distance of hidden states
    python bench.py roofline      these four beside the limits of memory and arithmetic, a picture of kernels/README.md
    python bench.py step          updates of distillation, against the original script's way
    python bench.py prepare       2 GB of text to tokens: workers, memory, the same bytes after a kill
    python bench.py tokenizer     WordPiece and byte-level BPE on one thread, against the Rust package `tokenizers`
    python bench.py demo          the demo against the same student without a teacher, three seeds
    python bench.py ablation      the demo without each part of the recipe, three seeds
    python bench.py lesson        what the rungs of kernels/lesson.py execute, and the pictures of kernels/README.md
    python bench.py temperature   the teacher's guesses at four temperatures, the picture of minidistil/README.md
    python bench.py infer         latency, throughput and size in fp32, bf16 and int8: ours and transformers'
    python bench.py export        size, latency and score of ONNX files, fp32 and int8, beside our model
    python bench.py retention --teacher DIR --data GLUE --layers 3    what students keep, distilled by several recipes
    python bench.py gpu --out DIR    ten minutes of one GPU: are the kernels right, how fast, with which constants
    python bench.py all           all cases except retention, which needs a teacher
    python bench.py readme        measures nothing: prints the README's tables from the JSON files
    python bench.py pictures      measures nothing: draws every picture again from the JSON files

`python bench.py CASE --help` lists a case's flags. Each case prints a table that fits the terminal and
writes results/CASE.json, row by row; the last line is one JSON object: {"device", "versions", "results": [...]}. The
exit code is 1 where a provider failed.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
import sys
import types

from benches import (
    Common,
    distil,
    export,
    gpu,
    infer,
    kernels,
    lesson,
    prepare,
    retention,
    roofline,
    step,
    temperature,
    tokenizer,
)  # fmt: skip
from benches.kernel_cases import CASES as KERNEL_CASES
from benches.report import Report, fitted, measured
from minidistil.cli import option, parse_args, run_script
from minidistil.device import choose_device, device_name, versions
from minidistil.errors import UserError


def kernel_case(case):
    return types.SimpleNamespace(
        Settings=kernels.Settings, bench=functools.partial(kernels.bench, case), table=kernels.table, draw=kernels.draw
    )


CASES = {
    **{name: kernel_case(case) for name, case in KERNEL_CASES.items()},
    "roofline": roofline, "step": step, "prepare": prepare, "tokenizer": tokenizer, "infer": infer, "export": export,
    "demo": distil.DEMO, "ablation": distil.ABLATION, "retention": retention, "lesson": lesson,
    "temperature": temperature,
}  # fmt: skip
# cases of a CPU; the others without --device run scripts, which choose it
ON_CPU = ("prepare", "tokenizer", "infer", "export", "lesson", "temperature")
# results that depend on the device by rounding at most
QUALITY = ("demo", "ablation", "retention", "lesson", "temperature")
FOLDERS = (".", "zen4", "e5-6", "e5-3", "width")  # in results/, of the README's tables: by processor, or by student
# the README's tables, in its order
README = ("demo", "ablation", "retention", "step", "loss", "prepare", "tokenizer", "infer", "export")


@dataclasses.dataclass
class AllSettings(Common):
    device: str = option("auto", "of the kernels' cases and step: auto, cpu, cuda, cuda:1 ...")


@dataclasses.dataclass
class FilesSettings:
    out: str = option("results", "folder of the JSON files")


def table(name, rows):
    """Returns the Markdown table of a case, in its corner the device that its rows name."""
    corner, rest = CASES[name].table(rows)[1:].split("|", 1)
    words = ", ".join(filter(None, [corner.strip(), measured(rows)[0].get("device")]))
    return f"| {words} |{rest}" if words else f"| |{rest}"


def measure(name, settings):
    """Runs one case, with results in `settings.folder`; returns its report."""
    case, folder = CASES[name], settings.folder
    device = device_name(choose_device("cpu" if name in ON_CPU else getattr(settings, "device", "auto")))
    print(f"{name}, on {device}, into {folder}", flush=True)
    report = Report(folder, name, {"device": device, "versions": versions()})
    for row in case.bench(settings):
        if name not in QUALITY:
            row["device"] = device
        report.put(row)  # the same object, where a case updates it
    report.finish()
    width = shutil.get_terminal_size().columns
    print(fitted(table(name, report.rows), width) if measured(report.rows) else "nothing was measured", flush=True)
    if hasattr(case, "draw") and measured(report.rows):
        case.draw(folder / f"{name}.svg", report.rows)
    return report


def results_of(folder, name):
    """The rows of a case that has been measured."""
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["results"]


def main(argv):
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if argv[:1] == ["gpu"]:
        return gpu.main(argv[1:])
    name, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("loss", argv)
    classes = {"all": AllSettings} | dict.fromkeys(("readme", "pictures"), FilesSettings)
    classes |= {case: CASES[case].Settings for case in CASES}
    if name not in classes:
        print(f"bench.py: error: there is no case {name}: choose one of {', '.join(classes)}", file=sys.stderr)
        return 2
    description = f"python bench.py {name}: see also python bench.py --help"
    settings = classes[name](**parse_args(classes[name], flags, description))
    if (rounds := getattr(settings, "rounds", None)) is not None and rounds < 1:
        raise UserError(f"--rounds is {rounds}: it must be at least 1")
    if name in ("readme", "pictures"):
        folder = pathlib.Path(settings.out)
        if not any(folder.glob("*.json")):
            raise UserError(f"there are no results in {folder}: name the folder of the JSON files with --out")
        if name == "readme":
            places = [(folder / name, case) for case in README for name in FOLDERS]
            print("\n\n".join(table(case, results_of(place, case)) for place, case in places
                               if (place / f"{case}.json").exists()))  # fmt: skip
            return 0
        for case, module in CASES.items():
            if hasattr(module, "draw") and (folder / f"{case}.json").exists():
                module.draw(folder / f"{case}.svg", results_of(folder, case))
        return 0
    chosen = {name: settings}
    if name == "all":
        chosen = {}
        for case in CASES:
            fields = {field.name for field in dataclasses.fields(classes[case])}
            if case != "retention":
                chosen[case] = classes[case](**{k: v for k, v in vars(settings).items() if k in fields})
    reports = [measure(case, settings) for case, settings in chosen.items()]
    devices = ", ".join(dict.fromkeys(report.head["device"] for report in reports))
    results = [row for report in reports for row in report.rows]
    print(json.dumps({"device": devices, "versions": versions(), "results": results}, separators=(",", ":")))
    for report in reports:
        if report.failed:
            print(f"bench.py: {report.case}: {', '.join(report.failed)} failed: see {report.failures}", file=sys.stderr)
    return int(any(report.failed for report in reports))


if __name__ == "__main__":
    run_script(main)
