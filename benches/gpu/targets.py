"""What was promised of a GPU, and what was predicted for an H100 before any kernel had run on one.

The predictions are arithmetic: 3.0 TB/s of a copy, 798 TFLOP/s of bf16 products, allocations as PyTorch makes them.
"""

import dataclasses

DEMO_TOP1 = 0.408  # of the demo's student on a CPU
OURS, EAGER, COMPILED, LIGER = "ours", "eager", "torch.compile", "Liger"

# (case, rows, provider): (ms from, ms to), MiB; None where nothing was predicted. LayerNorm is that with dropout
PREDICTIONS = {
    ("loss", 4915, OURS): ((0.55, 0.60), 286),
    ("loss", 4915, COMPILED): ((1.1, 1.4), 286),
    ("loss", 4915, EAGER): ((7.5, 8.5), 2861),
    ("loss", 32768, OURS): ((3.6, 3.8), None),
    ("loss", 32768, COMPILED): ((7.5, 9.0), None),
    ("loss", 32768, EAGER): ((50, 55), None),
    ("linear", 4915, OURS): ((2.6, 2.9), 509),
    ("linear", 4915, COMPILED): ((3.0, 3.3), 911),
    ("linear", 4915, EAGER): ((9.5, 10.5), 3486),
    ("linear", 4915, LIGER): (None, 648),
    ("linear", 32768, OURS): ((14, 15.5), 788),
    ("linear", 32768, COMPILED): ((18.5, 18.5), 5632),
    ("linear", 32768, EAGER): ((62, 62), 22989),
    ("linear", 32768, LIGER): (None, 648),
    ("layernorm", 32768, OURS): ((0.17, 0.19), 157),
    ("layernorm", 32768, COMPILED): ((0.18, 0.20), 288),
    ("layernorm", 32768, EAGER): ((0.42, 0.48), 408),
    ("layernorm", 32768, LIGER): (None, 168),
}
# tokens/s of an update, T = 512
SPEEDS = {
    "ours, all rows": (465_000, 500_000), "ours, masked rows": (600_000, 645_000), "original's way": (150_000, 165_000),
}  # fmt: skip


def predicted(row):
    """((ms from, ms to), MiB) of a row of `compare`, None for what was not predicted."""
    shape = row["shape"]
    return (
        PREDICTIONS.get((row["case"], shape["N"], row["provider"]), (None, None))
        if shape.get("p") != 0
        else (None, None)
    )


@dataclasses.dataclass
class Target:
    text: str
    value: float | None  # measured; None where it was not
    wanted: float
    at_most: bool = False

    def line(self):
        if self.value is None:
            return f"| ? | {self.text} | not measured |"
        met = self.value <= self.wanted if self.at_most else self.value >= self.wanted
        return f"| {'yes' if met else '**no**'} | {self.text} | {shown(self.value)} |"


def targets(rows):
    """Each promise, and what was measured."""
    compared = {(r["case"], r["shape"]["N"], r["provider"]): r for r in rows if r.get("stage") == "compare" and "provider" in r
                and r["shape"].get("p") != 0}  # fmt: skip

    def ms(case, N, provider):
        row = compared.get((case, N, provider))
        return row["ms"][1] if row and row["ms"] else None

    def mib(case, N, provider):
        row = compared.get((case, N, provider))
        return row["peak_mib"] if row and isinstance(row["peak_mib"], int | float) else None

    def over(a, b):
        return None if a is None or not b else a / b

    def share(case, N):
        return compared.get((case, N, OURS), {}).get("share_of_copy")

    def best(case, N):
        return min(filter(None, (ms(case, N, provider) for provider in (EAGER, COMPILED, LIGER))), default=None)

    found = []
    for N in (4915, 32768):
        found += [
            Target(f"loss, {N:,} rows: 10x eager", over(ms("loss", N, EAGER), ms("loss", N, OURS)), 10),
            Target(f"loss, {N:,} rows: 2x torch.compile", over(ms("loss", N, COMPILED), ms("loss", N, OURS)), 2),
            Target(f"loss, {N:,} rows: 85 % of a copy's bandwidth", share("loss", N), 0.85),
        ]
    found += [
        Target("linear, 4,915 rows: 1.5x the best other", over(best("linear", 4915), ms("linear", 4915, OURS)), 1.5),
        Target("linear, 4,915 rows: at most 15 % of eager's memory",
               over(mib("linear", 4915, OURS), mib("linear", 4915, EAGER)), 0.15, at_most=True),
        Target("linear, 32,768 rows: no slower than the best other", over(best("linear", 32768), ms("linear", 32768, OURS)), 1),
        Target("linear, 32,768 rows: no more memory than Liger, as a share",
               over(mib("linear", 32768, OURS), mib("linear", 32768, LIGER)), 1, at_most=True),
        Target("LayerNorm, 32,768 x 768: 80 % of a copy's bandwidth", share("layernorm", 32768), 0.8),
        Target("LayerNorm: no slower than torch.compile", over(ms("layernorm", 32768, COMPILED), ms("layernorm", 32768, OURS)), 1),
        Target("LayerNorm: faster than Liger", over(ms("layernorm", 32768, LIGER), ms("layernorm", 32768, OURS)), 1),
    ]  # fmt: skip
    speed = {r["provider"]: r["tokens_per_second"] for r in rows if r.get("case") == "step" and r["shape"]["T"] == 512}
    all_rows, masked, original = (speed.get(name) for name in SPEEDS)
    found += [
        Target("step, all rows: 450,000 tokens/s", all_rows, 450_000),
        Target("step, masked rows: 600,000 tokens/s", masked, 600_000),
        Target("step, all rows: 3x the original's way", over(all_rows, original), 3),
    ]
    top1 = [abs(r["top1"] - DEMO_TOP1) for r in rows if r.get("unit") == "demo" and "top1" in r]
    found += [
        Target(f"demo: top-1 within 0.005 of {DEMO_TOP1}, difference", top1[-1] if top1 else None, 0.005, at_most=True)
    ]
    means = [abs(r["mean"] - 1) for r in rows if r.get("unit") == "attention dropout" and r["backend"] == OURS]
    found += [
        Target("attention: dropout's mean is 1.00, largest difference", max(means, default=None), 0.005, at_most=True)
    ]
    return found


def shown(value):
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
