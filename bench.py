"""Speed and memory, ours against the alternatives, in one run: each provider is checked before it is timed.

    python bench.py               the loss on logits, forward and backward; `linear` with the vocabulary projection,
                                  `layernorm` dropout + residual + LayerNorm: on a GPU where there is one
    python bench.py step          updates of distillation, against the original script's way of doing them
    python bench.py prepare       2 GB of text into tokens: workers, memory, the same bytes after a kill
    python bench.py tokenizer     WordPiece on one thread, against the Rust package `tokenizers`
    python bench.py demo          does the teacher help? the demo against the same student without it, three seeds
    python bench.py ablation      what does each part of the recipe add? the demo with one left out, three seeds
    python bench.py infer         latency, throughput and size of teacher, student and int8 student, and transformers'
    python bench.py retention --teacher DIR --student DIR --data GLUE    what a student keeps of GLUE
    python bench.py all           all of them but retention, which needs two models
    python bench.py --readme      the README's tables, from results/*.json

Prints a table, writes results/CASE.json and ends with one JSON line: {"device", "versions", "results": [...]}.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import platform
import shutil
import sys
import tempfile
import time

import torch

import benches.gpu
from benches.ablation import ablation_table, bench_ablation, train_variants
from benches.infer import bench_infer, draw_infer, infer_table
from benches.prepare import bench_prepare, prepare_table
from benches.retention import bench_retention, draw_retention, retention_table
from benches.step import bench_step, draw_step
from kernels.cases import CASES as KERNEL_CASES
from minidistil import files
from minidistil.cli import UserError, given, run, setting
from minidistil.machine import choose_device, versions
from minidistil.measure import copy_bandwidth, extra_memory_mib, interleaved, spread
from minidistil.plot import bar_chart
from minidistil.tokenizer import Tokenizer

ROOT = pathlib.Path(__file__).resolve().parent


@dataclasses.dataclass
class Settings:
    case: str = setting(dataclasses.MISSING, "what to measure (default: loss)", nargs="?",
                        choices=(*KERNEL_CASES, "step", "prepare", "tokenizer", "infer", "demo", "ablation",
                                 "retention", "all"))  # fmt: skip
    device: str = setting("auto", "of the kernels' cases and step: auto, cpu, cuda, cuda:1 ...")
    tiny: bool = setting(False, "seconds instead of minutes: shows that it runs, not how fast")
    rounds: int = setting(None, "times that each provider is measured, in turn (default: 3; of kernels 21)")
    teacher: str = setting(None, "of retention: folder; of infer: a fine-tuned folder (default: BERT-base's shape)")
    student: str = setting(None, "of retention: folders, with commas; of infer: a fine-tuned folder")
    data: str = setting(None, "of retention and infer: the GLUE folder; IMDb may lie in it as aclImdb")
    task: str = setting("all", "of retention: tasks, with commas")
    finetune: str = setting(None, 'of retention: more settings of finetune.py, such as "--examples 2500 --lr 1e-4"')
    taught: str = setting(None, 'of retention: the first student again, by the fine-tuned teacher: "--augment 4"')
    train: str = setting(None, "of ablation: settings of train.py, in quotes (default: the demo)")
    profile: bool = setting(False, "also write a trace of each provider of a kernel's case, for chrome://tracing")
    out: str = setting("results", "folder for the JSON files")
    readme: bool = setting(False, "measure nothing: print the README's tables from the JSON files")


# ---- tokenizer: one thread, English


def bench_tokenizer(settings):
    """Ids must be identical before anything is timed; ours starts each round with an empty cache."""
    os.environ["TOKENIZERS_PARALLELISM"], os.environ["RAYON_NUM_THREADS"] = "false", "1"
    try:
        import tokenizers
    except ImportError:
        raise UserError("there is nothing to compare with: pip install -r requirements-dev.txt") from None
    from data.docstrings import harvest, python_files

    paths = python_files()
    texts = harvest(paths[:: 20 if settings.tiny else 1])
    mine = Tokenizer.load(ROOT / "data" / "demo")
    rust = tokenizers.Tokenizer(tokenizers.models.WordPiece(mine.ids, unk_token="[UNK]", max_input_chars_per_word=100))
    rust.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    rust.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()

    def cold():
        fresh = Tokenizer(mine.vocab, mine.lowercase)
        return [fresh.encode(text) for text in texts]

    providers = {
        "ours, cold cache": cold,
        "ours, warm cache": lambda: [mine.encode(text) for text in texts],
        "tokenizers, one text at a time": lambda: [rust.encode(text, add_special_tokens=False).ids for text in texts],
        "tokenizers, encode_batch": lambda: [e.ids for e in rust.encode_batch(texts, add_special_tokens=False)],
        "tokenizers, encode_batch_fast": lambda: [
            e.ids for e in rust.encode_batch_fast(texts, add_special_tokens=False)  # the same, without offsets
        ],
    }
    expected = providers["tokenizers, encode_batch"]()
    for provider, encode in providers.items():
        if encode() != expected:
            raise UserError(f"{provider} gives other ids than tokenizers: no time is reported for a wrong result")
    tokens, times = sum(map(len, expected)), {provider: [] for provider in providers}
    for _ in range(settings.rounds or 3):
        for provider, encode in providers.items():
            start = time.process_time()
            encode()
            times[provider].append(time.process_time() - start)
    results = []
    for provider, seconds in times.items():
        speeds = [tokens / s for s in seconds]
        results.append({"case": "tokenizer", "provider": provider, "shape": {"tokens": tokens, "texts": len(texts)},
                        "tokens_per_second": [round(x, 1) for x in spread(speeds)]})  # fmt: skip
    best = max(r["tokens_per_second"][1] for r in results if r["provider"].startswith("tokenizers"))
    for result in results:
        result["speed_up"] = round(result["tokens_per_second"][1] / best, 2)
    return results


# ---- demo: what distillation adds

VARIANTS = {
    "distilled": [],
    "same start, no teacher": ["--alpha-ce", "0", "--alpha-cos", "0"],
    "random start, no teacher": ["--alpha-ce", "0", "--alpha-cos", "0", "--student-init", "random"],
}


def bench_demo(settings):
    """`python train.py` and its baselines: same student, same data, same number of updates."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        results = train_variants(VARIANTS, settings.rounds or 3, folder, settings.tiny)
        pathlib.Path(settings.out).mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "curve.svg", pathlib.Path(settings.out) / "demo.svg")
    return [{"case": "demo", **result} for result in results]


# ---- kernels: eager, torch.compile, ours, and Liger where it is installed

WRONG = {"float32": 1e-4, "bfloat16": 3e-2}  # largest error of a gradient that is still timed, relative to its largest


def call(function, inputs, leaves, dtype):
    """One forward and backward; returns the gradients. Half precision is autocast's, as in training."""
    inputs = [x.detach().requires_grad_(i in leaves) if torch.is_tensor(x) else x for i, x in enumerate(inputs)]
    wanted = [inputs[i] for i in leaves]
    with torch.autocast(wanted[0].device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        output = function(*inputs)
    return torch.autograd.grad(output, wanted, torch.ones_like(output))


def largest_error(case, function, provider, shape, device):
    """Of the gradients, against the definition in fp64, on a few rows and without dropout."""
    inputs = case.inputs({**shape, "N": min(shape["N"], 48), "p": 0.0}, device)
    wide = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
    truth = call(case.eager, wide, case.leaves, "float64")
    found = call(function, case.prepared(provider, inputs), case.leaves, shape["dtype"])
    return max(((f - t).abs().max() / t.abs().max()).item() for f, t in zip(found, truth, strict=True))


def providers_of(case, shape, device):
    """{name: function} of what is here."""
    found = {"eager": case.eager, "torch.compile": torch.compile(case.eager, dynamic=False), "ours": case.ours}
    if device.type == "cuda" or case.liger_on_cpu:
        try:
            found["Liger"] = case.liger(shape)
        except ImportError:
            print("Liger is not installed: pip install liger-kernel")
    return found


@contextlib.contextmanager
def spared(row):
    """What a provider that is not ours cannot do goes into its row, and does not end the run."""
    try:
        yield
    except torch.OutOfMemoryError:
        row["peak_mib"] = "OOM"
    except Exception as error:
        if row["provider"] in ("eager", "ours"):
            raise
        row["peak_mib"] = "failed"
        print(f"{row['case']}, {row['provider']} failed: {error}", file=sys.stderr)


def bench_kernel(case, settings):
    device = choose_device(settings.device)
    ceiling, results = copy_bandwidth(device, 16 if settings.tiny else 256), []
    for shape in case.shapes(device, settings.tiny):
        torch._dynamo.reset()
        providers, rows, running = providers_of(case, shape, device), {}, {}
        for provider, function in providers.items():
            rows[provider] = row = {"case": case.name, "provider": provider, "shape": shape, "dtype": shape["dtype"]}
            row["ms"] = None
            if not getattr(function, "computes_less", False):
                with spared(row):
                    row["max_error"] = float(f"{largest_error(case, function, provider, shape, device):.1e}")
                    if not row["max_error"] <= WRONG[shape["dtype"]]:
                        raise UserError(
                            f"{case.name}, {provider}: error {row['max_error']}: a wrong result is not timed"
                        )
        torch._dynamo.reset()  # the checks had another shape
        inputs = case.inputs(shape, device)
        for provider, function in providers.items():
            once = functools.partial(
                call, function, case.prepared(provider, inputs), case.leaves, shape["dtype"]
            )  # fmt: skip
            if "peak_mib" in rows[provider]:  # it has failed
                continue
            with spared(rows[provider]):
                once()  # compiles, where that is its way
                rows[provider]["peak_mib"] = round(extra_memory_mib(once, device), 2)
                running[provider] = once
                if settings.profile:
                    trace(once, pathlib.Path(settings.out) / f"trace-{case.name}-{provider}.json")
        times = interleaved(running, settings.rounds or (1 if settings.tiny else 21), device)
        for provider, milliseconds in times.items():
            row = rows[provider]
            row["ms"] = [round(x, 3) for x in spread(milliseconds)]
            row["gb_per_s"] = round(case.bytes(shape) / row["ms"][1] / 1e6, 1)
            row["share_of_copy"] = round(row["gb_per_s"] / ceiling, 3)
        results += rows.values()
    return results


def trace(once, path):
    with torch.profiler.profile() as profiler:
        once()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))


def kernel_table(results):
    """Markdown: medians; speed and memory beside eager's of the same shape."""
    lines = ["| | shape | ms [p20, p80] | of the copy's bandwidth | speed-up | extra memory, MiB | of eager's |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in results:
        eager = next(e for e in results if e["shape"] == r["shape"] and e["provider"] == "eager")
        shape = ", ".join(str(value) for value in r["shape"].values())
        if r["ms"] is None:
            lines.append(f"| {r['provider']} | {shape} | | | | {r['peak_mib']} | |")
            continue
        low, middle, high = r["ms"]
        speed = f"{eager['ms'][1] / middle:.1f}x" if eager["ms"] else ""
        memory = f"{r['peak_mib'] / eager['peak_mib']:.0%}" if eager["ms"] and eager["peak_mib"] else ""
        cells = [r["provider"], shape, f"{middle:,.2f} [{low:,.2f}, {high:,.2f}]", f"{r['share_of_copy']:.0%}", speed]
        lines.append(f"| {' | '.join([*cells, format(r['peak_mib'], ',.0f'), memory])} |")
    return "\n".join(lines)


# ---- the frame


def show(results):
    case = results[0]["case"]
    tables = {"demo": demo_table, "infer": infer_table, "ablation": ablation_table, "retention": retention_table}
    tables["prepare"] = prepare_table
    if case in tables or case in KERNEL_CASES:
        print(tables.get(case, kernel_table)(results))
        return
    print(f"{'case':<10} {'provider':<32} {'tokens/s':>12} {'[p20, p80]':>22} {'speed-up':>9} {'peak MiB':>9}")
    for r in results:
        low, middle, high = r["tokens_per_second"]
        around, peak = f"[{low:,.0f}, {high:,.0f}]", f"{r['peak_mib']:,.0f}" if "peak_mib" in r else ""
        speed = f"{middle:>12,.0f} {around:>22} {r['speed_up']:>8.2f}x"
        print(f"{r['case']:<10} {r['provider']:<32} {speed} {peak:>9}")


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def draw_kernel(path, results):
    """Bars of bandwidth, as a share of what a copy reaches: the axis ends at that ceiling."""
    bars = []
    for r in results:
        shape = ", ".join(str(value) for value in r["shape"].values())
        bars.append((f"{r['provider']}, {shape}", r.get("share_of_copy", r["peak_mib"])))
    bar_chart(path, f"{results[0]['case']}: bytes that must move / time, as a share of a copy's bandwidth", bars)


def demo_table(results):
    """Markdown: means over seeds, and their standard deviations where there is more than one."""
    teacher, *students = results
    lines = ["| | parameters | held-out top-1 | of the teacher's | masked-LM loss, nats | agrees with the teacher |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    lines.append(f"| teacher | {teacher['parameters']:,} | {teacher['top1']:.1%} | | {teacher['mlm_loss']:.3f} | |")
    for r in students:
        share = r["top1"][0] / teacher["top1"]
        top1, loss, agreement = (
            f"{r[name][0]:{form}}" + (f" ± {r[name][1]:{form}}" if r["seeds"] > 1 else "")
            for name, form in (("top1", ".1%"), ("mlm_loss", ".3f"), ("agreement", ".1%"))
        )
        row = [f"student, {r['provider']}", f"{r['parameters']:,}", top1, f"{share:.1%}", loss, agreement]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def speed_table(results):
    """Markdown: medians, and how much faster than the first of the alternatives."""
    memory = "peak_mib" in results[0]
    lines = ["| | tokens/s | speed-up |" + " peak memory, MiB |" * memory, "|---|---|---|" + "---|" * memory]
    for r in results:
        peak = f" {r['peak_mib']:,.0f} |" if memory else ""
        lines.append(f"| {r['provider']} | {r['tokens_per_second'][1]:,.0f} | {r['speed_up']:.1f}x |{peak}")
    return "\n".join(lines)


def readme_tables(folder):
    """The tables of README.md, in its order; a result that has not been measured is an error."""
    tables = {"demo": demo_table, "ablation": ablation_table, "retention": retention_table, "step": speed_table}
    tables |= {"loss": kernel_table, "prepare": prepare_table, "tokenizer": speed_table, "infer": infer_table}
    return [table(json.loads((folder / f"{case}.json").read_text())["results"]) for case, table in tables.items()]


def main(argv):
    if argv[:1] == ["gpu"]:
        return benches.gpu.main(argv[1:])
    settings = Settings(**given(Settings, argv, __doc__))
    if settings.readme:
        print("\n\n".join(readme_tables(pathlib.Path(settings.out))))
        return
    cases = {name: functools.partial(bench_kernel, case) for name, case in KERNEL_CASES.items()}
    cases |= {"step": bench_step, "prepare": bench_prepare, "tokenizer": bench_tokenizer, "infer": bench_infer}
    cases |= {"demo": bench_demo, "ablation": bench_ablation, "retention": bench_retention}
    chosen = list(cases)[:-1] if settings.case == "all" else [settings.case or "loss"]
    found, ran_on = [], []
    for case in chosen:
        # these are measured on the CPU; those run our scripts where they would run
        on_cpu, anywhere = ("prepare", "tokenizer", "infer"), ("demo", "ablation", "retention")
        device = "cpu" if case in on_cpu else "auto" if case in anywhere else settings.device
        report = {"device": device_name(choose_device(device)), "versions": versions()}
        results = cases[case](settings)
        show(results)
        found += results
        ran_on += [report["device"]] if report["device"] not in ran_on else []
        if case in KERNEL_CASES:
            draw_kernel(pathlib.Path(settings.out) / f"{case}.svg", results)
        drawings = {"step": draw_step, "infer": draw_infer, "retention": draw_retention}
        if case in drawings:
            drawings[case](pathlib.Path(settings.out) / f"{case}.svg", results)
        files.write_json(pathlib.Path(settings.out) / f"{case}.json", {**report, "results": results})
    print(json.dumps({"device": ", ".join(ran_on), "versions": versions(), "results": found}, separators=(",", ":")))


if __name__ == "__main__":
    run(main)
