"""The ladder of kernels/lesson.py as an H100 would execute it, and the pictures of kernels/README.md.

Nothing runs on a GPU: instructions are read off the machine code, times computed from data sheets.
"""

import dataclasses
import json
import os
import subprocess
import sys

from benches import ROOT, Common
from minidistil import plot

V, BLOCK, THREADS, E = 30522, 2048, 128, 8  # words, logits of a block, threads of a program, bf16 logits in 16 bytes
EAGER, OURS = 160, 10  # bytes a pair of logits, both passes: kernels/README.md, section 2
BYTES_PER_SECOND, FLOPS = 3.35e12, 989e12  # of an H100, by its data sheet
BUDGET = 39  # instructions a pair while the forward pass moves its bytes at 90 % of that
ROWS, WIDTH = 4096, 768  # of a chunk; of BERT's hidden states


@dataclasses.dataclass
class Settings(Common):
    pass


def bench(settings):
    """Yields a row a rung: {"provider": rung, "instructions", "barriers", "narrow", "registers"}."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "kernels" / "lesson.py", "--compile"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    for rung, figures in json.loads(done.stdout.splitlines()[-1]).items():
        row = {"case": "lesson", "provider": rung, "barriers": figures["barriers"], "registers": figures["registers"]}
        row["narrow"] = not all(name.endswith(("128", "256")) for name in figures["loads"])
        yield row | {"instructions": figures["instructions"], "in_loops": figures["where"] == "loops"}


def table(results):
    """Markdown: a row per rung with a loop over the vocabulary."""
    lines = ["| rung of `lesson.py` | instructions per pair | barriers in the loop | loads |", "|---" * 4 + "|"]
    for r in results:
        if r["in_loops"]:
            cells = f"{r['instructions']} | {r['barriers']} | {'narrow' if r['narrow'] else '16 bytes'}"
            lines.append(f"| {r['provider']} | {cells} |")
    return "\n".join(lines)


def draw(path, results):
    """Three pictures: the ladder and the bytes; how a row is read; what a chunk of the projection takes."""
    forward = [r for r in results if r["in_loops"] and "both" not in r["provider"]]
    rungs = {r["provider"]: [r["instructions"]] * 3 for r in forward}
    ladder = plot.bars("instructions a pair, forward", "", {"ours": rungs}, "{:.1f}".format, dashed=("budget", BUDGET))
    moved = {"eager": {"bytes a pair, both passes": [EAGER] * 3}, "ours": {"bytes a pair, both passes": [OURS] * 3}}
    plot.draw(path, ladder, plot.bars("memory traffic", "", moved), widths=[3, 1])
    plot.draw(path.with_name("lesson-row.svg"), row_of_logits())
    plot.draw(path.with_name("lesson-chunk.svg"), chunk())


def row_of_logits():
    """A row, one of its blocks, and the logits of two threads: three lines of boxes, each a part of the one above."""

    def paint(axes, width):
        blocks, loads = -(-V // BLOCK), BLOCK // E
        lines = [
            (blocks, f"a row: {V // BLOCK} blocks of {BLOCK:,} logits, and a masked rest of {V % BLOCK:,}"),
            (loads, f"a block: {loads} loads of 16 bytes, {E} logits each; thread 0 has the first and the 129th"),
            (2 * E, f"thread 0: 2 x {E} logits, and its own m, Z and c; no other thread is waited for"),
        ]
        for level, (n, text) in enumerate(lines):
            y = 2.4 * (2 - level)
            for i in range(n):
                own = (i == 1, i in (0, THREADS), True)[level]
                size = (V / BLOCK % 1 if level == 0 and i == n - 1 else 1) / n
                axes.barh(y, 0.9 * size, 1, i / n, color=plot.BLUE if own else plot.GREY, align="edge")
            axes.text(0, y + 1.15, text, fontsize=8.5)
        enlarged = [(4.8, 1 / blocks, 0), (4.8, 2 / blocks, 1), (2.4, 0, 0), (2.4, 1 / loads, 0.5),
                    (2.4, THREADS / loads, 0.5), (2.4, (THREADS + 1) / loads, 1)]  # fmt: skip
        for y, above, below in enlarged:
            axes.plot([above, below], [y, y - 1.4], color=plot.GREY, linewidth=0.6, linestyle=":")
        axes.barh(0, 0, color=plot.BLUE, label="enlarged in the next line")
        axes.set(xlim=(0, 1), ylim=(-0.2, 6.5))
        axes.set_axis_off()

    return f"{V:,} logits of a model", paint


def chunk():
    """What each step of a chunk of rows takes on an H100, computed, beside the same with eager PyTorch's loss."""
    product = 2 * ROWS * V * WIDTH / FLOPS * 1e6
    pairs, table_bytes = ROWS * V, 8 * V * WIDTH  # dW is read and written in fp32

    def memory(n):
        return n / BYTES_PER_SECOND * 1e6

    ours = {"s and t": 2 * product, "loss and gradient": memory(6 * pairs), "dh": product, "dW": product}
    eager = dict(ours, **{"loss and gradient": memory(EAGER * pairs)})
    ours["sum of dW"] = memory(table_bytes)
    return plot.stacks(f"{ROWS:,} rows", "microseconds on an H100, computed", {"ours": ours, "eager": eager})
