"""One computation, forward and backward, by eager PyTorch, torch.compile, ours, and Liger if installed.

Each provider is checked against the definition in fp64 before it is timed. The computations are in kernel_cases.py.
"""

import dataclasses
import sys

import torch

from benches import Common
from benches.measure import copy_bandwidth, extra_memory_mib, interleaved, spread
from benches.report import attempt
from minidistil import plot
from minidistil.cli import option
from minidistil.device import choose_device
from minidistil.errors import UserError

TITLES = {
    "loss": "the loss on logits", "linear": "vocabulary projection and loss",
    "layernorm": "dropout + residual + LayerNorm", "cosine": "cosine distance of hidden states",
}  # fmt: skip
WRONG = {"float32": 1e-4, "bfloat16": 3e-2}  # maximum error relative to the largest gradient; beyond it, no time


@dataclasses.dataclass
class Settings(Common):
    device: str = option("auto", "auto, cpu, cuda, cuda:1 ...")
    rounds: int = option(21, "measurements of each provider, interleaved")
    profile: bool = option(False, "also write a trace of each provider for chrome://tracing")


def both_passes(function, inputs, leaves, dtype):
    """Returns a function that runs forward and backward once and returns the gradients of the inputs `leaves`.

    Half precision means autocast, as in training. The first call makes the upstream gradient, so it is not timed.
    """
    inputs = [x.detach().requires_grad_(i in leaves) if torch.is_tensor(x) else x for i, x in enumerate(inputs)]
    wanted = [inputs[i] for i in leaves]
    upstream = []

    def once():
        with torch.autocast(wanted[0].device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            output = function(*inputs)
        if not upstream:
            upstream.append(torch.ones_like(output))
        return torch.autograd.grad(output, wanted, *upstream)

    return once


def check(case, function, provider, shape, device):
    """Returns the largest error of gradients against fp64, on a few rows, without dropout; UserError if too large."""
    inputs = case.inputs({**shape, "N": min(shape["N"], 48), "p": 0.0}, device)
    wide = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
    truth = both_passes(case.eager, wide, case.leaves, "float64")()
    result = both_passes(function, case.prepared(provider, inputs), case.leaves, shape["dtype"])()
    errors = [((f - t).abs().max() / t.abs().max()).item() for f, t in zip(result, truth, strict=True)]
    error = float(f"{max(errors):.1e}")
    if not error <= WRONG[shape["dtype"]]:
        raise UserError(f"{provider} is wrong by {error}: a wrong result is not timed")
    return error


def providers_of(case, shape, device):
    """Returns {name: function} of the available providers."""
    providers = {"eager": case.eager, "torch.compile": torch.compile(case.eager, dynamic=False), "ours": case.ours}
    if device.type == "cuda":
        providers |= dict.fromkeys(case.also_on_gpu, case.ours)
    if case.liger and (device.type == "cuda" or case.liger_on_cpu):
        try:
            providers["Liger"] = case.liger(shape)
        except ImportError:
            print("Liger is not installed: pip install liger-kernel", file=sys.stderr)
    return providers


def bench(case, settings):
    """Yields a row per provider and shape."""
    device = choose_device(settings.device)
    ceiling = copy_bandwidth(device, 16 if settings.tiny else 256)
    for shape in case.shapes(device, settings.tiny):
        print(f"{case.name}, {shape}", file=sys.stderr, flush=True)
        torch._dynamo.reset()
        providers, rows, running = providers_of(case, shape, device), {}, {}
        for provider, function in providers.items():
            rows[provider] = row = {"case": case.name, "provider": provider, "shape": shape, "dtype": shape["dtype"]}
            with attempt(row):
                if not getattr(function, "computes_less", False):
                    row["max_error"] = check(case, function, provider, shape, device)
        torch._dynamo.reset()  # the checks used another shape
        inputs = case.inputs(shape, device)
        for provider, function in providers.items():
            row = rows[provider]
            if "error" not in row:
                with attempt(row):
                    once = both_passes(function, case.prepared(provider, inputs), case.leaves, shape["dtype"])
                    once()  # compiles
                    row["peak_mib"] = round(extra_memory_mib(once, device), 2)
                    running[provider] = once
                    if settings.profile:
                        trace(once, settings.folder / f"trace-{case.name}-{provider}.json")
            yield row
        times = interleaved(running, 1 if settings.tiny else settings.rounds, device)
        for provider, milliseconds in times.items():
            row = rows[provider]
            row["ms"] = [round(x, 3) for x in spread(milliseconds)]
            row["gb_per_s"] = round(case.bytes(shape) / row["ms"][1] / 1e6, 1)
            row["share_of_copy"] = round(row["gb_per_s"] / ceiling, 3)
            yield row


def trace(once, path):
    with torch.profiler.profile() as profiler:
        once()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))


def shape_text(row):
    return ", ".join(str(value) for value in row["shape"].values())


def table(results):
    """Markdown: medians, with speed and memory relative to eager PyTorch on the same shape."""
    lines = ["| | shape | ms [p20, p80] | of the copy's bandwidth | speed-up | extra memory, MiB | of eager's |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in results:
        if "error" in r:
            lines.append(f"| {r['provider']} | {shape_text(r)} | {r['error']} | | | | |")
            continue
        eager = next(e for e in results if e["shape"] == r["shape"] and e["provider"] == "eager")
        low, middle, high = r["ms"]
        speed = f"{eager['ms'][1] / middle:.1f}x" if "ms" in eager else ""
        memory = f"{r['peak_mib'] / eager['peak_mib']:.0%}" if eager.get("peak_mib") else ""
        cells = [r["provider"], shape_text(r), f"{middle:,.2f} [{low:,.2f}, {high:,.2f}]", f"{r['share_of_copy']:.0%}"]
        lines.append(f"| {' | '.join([*cells, speed, format(r['peak_mib'], ',.0f'), memory])} |")
    return "\n".join(lines)


def shape_words(shape):
    """What tells a picture's shapes apart: "512 rows, bf16"."""
    words = [f"{shape['N']:,} rows"]
    words += [f"p = {shape['p']:g}"] if "p" in shape else []
    words += [f"{shape['labelled']:.0%} labelled"] if shape.get("labelled", 1) < 1 else []
    return ", ".join([*words, {"bfloat16": "bf16", "float32": "fp32"}[shape["dtype"]]])


def draw(path, results):
    """Bars of bandwidth by shape, as shares of what a copy reaches; a provider that failed has a word instead."""
    series = {}
    for r in results:
        known = series.setdefault(r["provider"], {})
        if "error" in r:
            known[shape_words(r["shape"])] = "out of memory" if r["error"] == "out of memory" else "failed"
        else:
            low, middle, high = (r["share_of_copy"] * r["ms"][1] / ms for ms in reversed(r["ms"]))
            known[shape_words(r["shape"])] = [low, middle, high]
    title = f"{TITLES[results[0]['case']]}, forward and backward: median, p20 to p80"
    unit = "bytes that must move / time,\nshare of a copy's bandwidth"
    plot.draw(path, plot.bars(title, unit, series, "{:.0%}".format, plot.percent, ("a copy's bandwidth", 1)))
