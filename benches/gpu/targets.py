"""What the kernels shall reach on a GPU, and what was predicted for an H100 before any of them had run on one.

The predictions are arithmetic: 3.0 TB/s of a copy, 798 TFLOP/s of bf16 products, allocations as PyTorch makes them.
"""

OURS, EAGER, COMPILED, LIGER = "ours", "eager", "torch.compile", "Liger"
DEMO_TOP1 = 0.413  # of the demo's student on a CPU

# (case, rows): {provider: (ms from, ms to, MiB)}; None where nothing was predicted. LayerNorm is that with dropout
PREDICTIONS = {
    ("loss", 4915): {OURS: (0.55, 0.60, 286), COMPILED: (1.1, 1.4, 286), EAGER: (7.5, 8.5, 2861)},
    ("loss", 32768): {OURS: (3.6, 3.8, None), COMPILED: (7.5, 9.0, None), EAGER: (50, 55, None)},
    ("linear", 4915): {
        OURS: (2.6, 2.9, 509), COMPILED: (3.0, 3.3, 911), EAGER: (9.5, 10.5, 3486), LIGER: (None, None, 648),
    },
    ("linear", 32768): {
        OURS: (14, 15.5, 788), COMPILED: (18.5, 18.5, 5632), EAGER: (62, 62, 22989), LIGER: (None, None, 648),
    },
    ("layernorm", 32768): {
        OURS: (0.17, 0.19, 157), COMPILED: (0.18, 0.20, 288), EAGER: (0.42, 0.48, 408), LIGER: (None, None, 168),
    },
}  # fmt: skip
SPEEDS = {  # tokens/s of an update, T = 512
    "ours, all rows": (465_000, 500_000),
    "ours, masked rows": (600_000, 645_000),
    "original's way": (150_000, 165_000),
}


def ratio(a, b):
    """a / b of two measurements; None where one of them was not made."""
    return a / b if isinstance(a, int | float) and isinstance(b, int | float) and b else None


def targets(rows):
    """Yields (target, the value measured or None, the value wanted, whether less is better)."""
    kernels = {}  # (case, rows of the shape, provider): row of the comparison; of LayerNorm that with dropout
    for row in rows:
        if "provider" in row and row["case"] != "step" and row["shape"].get("p") != 0:
            kernels[row["case"], row["shape"]["N"], row["provider"]] = row

    def found(case, N, provider, name):
        return kernels.get((case, N, provider), {}).get(name)

    def speed_up(case, N, *others):
        ours, *times = (found(case, N, provider, "ms") for provider in (OURS, *others))
        return ratio(min((ms[1] for ms in times if ms and ms[1]), default=None), ours and ours[1])

    def memory(case, N, other):
        return ratio(found(case, N, OURS, "peak_mib"), found(case, N, other, "peak_mib"))

    others = EAGER, COMPILED, LIGER
    for N in (4915, 32768):
        yield f"loss, {N:,} rows: x eager", speed_up("loss", N, EAGER), 10, False
        yield f"loss, {N:,} rows: x torch.compile", speed_up("loss", N, COMPILED), 2, False
        yield f"loss, {N:,} rows: share of a copy's bandwidth", found("loss", N, OURS, "share_of_copy"), 0.85, False
    yield "linear, 4,915 rows: x the fastest other", speed_up("linear", 4915, *others), 1.5, False
    yield "linear, 4,915 rows: share of eager's memory", memory("linear", 4915, EAGER), 0.15, True
    yield "linear, 32,768 rows: x the fastest other", speed_up("linear", 32768, *others), 1, False
    yield "linear, 32,768 rows: share of Liger's memory", memory("linear", 32768, LIGER), 1, True
    yield "LayerNorm: share of a copy's bandwidth", found("layernorm", 32768, OURS, "share_of_copy"), 0.8, False
    yield "LayerNorm: x torch.compile", speed_up("layernorm", 32768, COMPILED), 1, False
    yield "LayerNorm: x Liger", speed_up("layernorm", 32768, LIGER), 1, False
    speeds = {r["provider"]: r["tokens_per_second"] for r in rows if r.get("case") == "step" and r["shape"]["T"] == 512}
    all_rows, masked, original = (speeds.get(provider) for provider in SPEEDS)
    yield "update, all rows: tokens/s", all_rows, 450_000, False
    yield "update, masked rows: tokens/s", masked, 600_000, False
    yield "update, all rows: x the original's way", ratio(all_rows, original), 3, False
    top1 = [abs(row["top1"] - DEMO_TOP1) for row in rows if row.get("unit") == "demo" and "top1" in row]
    yield f"demo: top-1's distance from {DEMO_TOP1}", max(top1, default=None), 0.005, True
    means = [abs(row["mean"] - 1) for row in rows if row.get("unit") == "attention dropout" and row["backend"] == OURS]
    yield "attention: distance of dropout's mean from 1", max(means, default=None), 0.005, True
