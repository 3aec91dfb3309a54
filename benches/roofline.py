"""Arithmetic and memory: what each of our four computations reaches of a processor's two limits, and the picture.

A computation of A operations that moves B bytes takes at least B / (bytes a second) and A / (operations a second). The
first limit is measured by a copy, the second by the fastest of several matrix products. An operation is an addition, a
multiplication, a comparison or an exponential. Bytes are those that must move: a provider that moves more lies lower.

Source: Williams, Waterman and Patterson 2009, the roofline model.
"""

import dataclasses
import statistics
import sys

import torch

from benches import Common
from benches.kernel_cases import CASES
from benches.kernels import TITLES, both_passes, check
from benches.measure import copy_bandwidth, interleaved
from benches.report import attempt, measured
from minidistil import plot
from minidistil.cli import option
from minidistil.device import choose_device

# logits and hidden states beyond every cache; rows of logits, of hidden states
SHAPES = {
    "cpu": dict(rows=(512, 4096), V=30522, C=768, dtype="float32"),
    "cuda": dict(rows=(4915, 32768), V=30522, C=768, dtype="bfloat16"),
    "tiny": dict(rows=(8, 16), V=1000, C=64, dtype="float32"),
}
COPY, PRODUCT = "copy", "matrix product"


@dataclasses.dataclass
class Settings(Common):
    device: str = option("auto", "auto, cpu, cuda, cuda:1 ...")
    rounds: int = option(9, "measurements of each provider, interleaved")


def operations(name, shape):
    """Returns the operations of both passes of a case, counted in the formulas of kernels/README.md at tau = 2."""
    N, V, C = (shape[key] for key in "NVC")
    # forward: 2 maxima, 2 differences, 2 products with k, 3 exponentials, 1 difference and product for c, 4 sums;
    # backward: 4 differences, 2 products with k, 3 exponentials, 1 difference, 2 products with weights, 1 sum
    loss = 15 + 13
    return {
        "loss": N * V * loss,
        "linear": N * V * (loss + 4 * 2 * C + 2),  # the products s, t, dh and dW; s and t plus bias
        "layernorm": N * C * (8 + 13),  # 8 forward: sum, mean, variance, scale; 13 backward
        "cosine": N * C * (6 + 4),
    }[name]


def bench(settings):
    """Yields the two limits, then a row a computation and provider, with its operations, bytes and milliseconds."""
    device = choose_device(settings.device)
    sizes = SHAPES["tiny" if settings.tiny else device.type]
    rounds = 1 if settings.tiny else settings.rounds
    ceiling = copy_bandwidth(device, 16 if settings.tiny else 256)
    yield {"case": "roofline", "provider": COPY, "gb_per_s": round(ceiling, 2)}
    N, C, dtype = sizes["rows"][1], sizes["C"], getattr(torch, sizes["dtype"])  # of an MLP of BERT, 4 C wide
    x, W = (torch.randn(n, C, device=device, dtype=dtype) for n in (N, 4 * C))
    (times,) = interleaved({PRODUCT: lambda: x @ W.T}, 3 * rounds, device).values()
    rate = 2 * N * 4 * C * C / min(times) / 1e6
    yield {"case": "roofline", "provider": PRODUCT, "gflop_per_s": round(rate, 1)}
    for name, case in CASES.items():
        shape = dict(sizes, N=sizes["rows"][name in ("layernorm", "cosine")], labelled=1.0, p=0.0)
        print(f"{TITLES[name]}, {shape['N']:,} rows", file=sys.stderr, flush=True)
        rows, running = {}, {}
        for provider, function in {"eager": case.eager, "ours": case.ours}.items():
            rows[provider] = row = {"case": "roofline", "provider": provider, "computation": name}
            with attempt(row):
                row["max_error"] = check(case, function, provider, shape, device)
                inputs = case.prepared(provider, case.inputs(shape, device))
                running[provider] = both_passes(function, inputs, case.leaves, shape["dtype"])
                running[provider]()
            yield row
        for provider, milliseconds in interleaved(running, rounds, device).items():
            row, ms = rows[provider], statistics.median(milliseconds)
            row |= {"operations": operations(name, shape), "bytes": case.bytes(shape), "ms": round(ms, 3)}
            row["gflop_per_s"] = round(row["operations"] / ms / 1e6, 2)
            row["of_limit"] = round(row["gflop_per_s"] / limit(row["operations"] / row["bytes"], ceiling, rate), 3)
            yield row


def limit(per_byte, bandwidth, rate):
    """Returns the GFLOP/s that a computation of so many operations a byte can reach at most."""
    return min(per_byte * bandwidth, rate)


def limits(results):
    """Returns (GB/s of the copy, GFLOP/s of the product)."""
    found = {r["provider"]: r for r in results}
    return found[COPY]["gb_per_s"], found[PRODUCT]["gflop_per_s"]


def table(results):
    """Markdown: a row per computation and provider."""
    lines = ["| | operations a byte | GFLOP/s | limited by | of the limit |", "|---" * 5 + "|"]
    bandwidth, rate = limits(results)
    for r in measured(results):
        if "computation" in r:
            per_byte = r["operations"] / r["bytes"]
            limited = "memory" if per_byte * bandwidth < rate else "products"
            cells = [f"{TITLES[r['computation']]}, {r['provider']}", f"{per_byte:,.1f}", f"{r['gflop_per_s']:,.1f}"]
            lines.append(f"| {' | '.join([*cells, limited, format(r['of_limit'], '.0%')])} |")
    lines.append(f"| {COPY} | | | {bandwidth:,.1f} GB/s | |")
    lines.append(f"| {PRODUCT} | | {rate:,.1f} | | |")
    return "\n".join(lines)


def draw(path, results):
    """Both limits as a line over operations a byte, both axes logarithmic, and a point a computation and provider."""
    bandwidth, rate = limits(results)
    points = [r for r in measured(results) if "computation" in r]

    def paint(axes, width):
        per_byte = [r["operations"] / r["bytes"] for r in points]
        left, right, ridge = min(per_byte) / 2, max(per_byte) * 2, rate / bandwidth
        axes.plot([left, ridge, right], [left * bandwidth, rate, rate], label="limit", **plot.DASHED)
        for provider, colour in plot.colours({r["provider"]: None for r in points}).items():
            own = [(x, r["gflop_per_s"]) for x, r in zip(per_byte, points, strict=True) if r["provider"] == provider]
            axes.plot(*zip(*own, strict=True), "o", color=colour, label=provider)
        for x, r in zip(per_byte, points, strict=True):
            if r["provider"] == "ours":
                at = dict(ha="right", xytext=(-7, -3)) if x > ridge else dict(ha="left", xytext=(7, -3))
                axes.annotate(TITLES[r["computation"]], (x, r["gflop_per_s"]), textcoords="offset points",
                              fontsize=8, **at)  # fmt: skip
        middle = (left * ridge) ** 0.5
        notes = ((f"a copy: {bandwidth:,.0f} GB/s", middle, middle * bandwidth, "right"),
                 (f"a matrix product: {rate:,.0f} GFLOP/s", (ridge * right) ** 0.5, rate, "center"))  # fmt: skip
        for text, x, y, side in notes:
            axes.annotate(text, (x, y), (0, 5), textcoords="offset points", fontsize=8, ha=side)
        axes.set(xscale="log", yscale="log", xlabel="operations a byte that must move", ylabel="GFLOP/s")
        axes.xaxis.set_major_formatter(plot.NUMBER)
        axes.yaxis.set_major_formatter(plot.NUMBER)
        axes.set_ylim(top=4 * rate)
        axes.grid(True, axis="both")

    plot.draw(path, ("forward and backward", paint), height=3.8)
