"""results.jsonl -> summary.md: what to conclude, at most 100 lines of it."""

import json

from benches.gpu.targets import SPEEDS, predicted, targets

LEAST_GAIN = 0.02  # of a configuration, for which a default changes
LINES, WIDTH = 100, 700


def summary(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    parts = (head, wrong, promises, configurations, steps, comparison, others)
    return "\n".join(line[:WIDTH] for line in [line for part in parts for line in part(rows)][:LINES])


def of(rows, **wanted):
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def listed(items):
    return ", ".join(items) or "not measured"


def head(rows):
    versions = (of(rows, unit="versions") or [{}])[-1]
    yield f"# GPU day: {versions.get('device')}"
    yield listed(f"{name} {value}" for name, value in versions.items() if name not in ("stage", "unit", "t", "device"))
    ceilings = [f"copy {r['gb_per_s']:,.0f} GB/s" for r in of(rows, unit="copy")]
    yield listed(ceilings + [f"bf16 product {r['tflops']:,.0f} TFLOP/s" for r in of(rows, unit="matrix product")])
    yield "attention that PyTorch would choose: " + listed(
        f"T {r['T']} p {r['p']}{' mask' * r['mask']} {r['backend']}" for r in of(rows, unit="attention chosen"))  # fmt: skip
    yield "attention dropout (mean, share dropped): " + listed(
        f"{r['backend']} {r['p']}: {r['mean']:.4f}, {r['dropped']:.4f}{'' if r['right'] else ' WRONG'}"
        for r in of(rows, unit="attention dropout"))  # fmt: skip
    yield "stages: " + listed(f"{r['stage']} {r['status']} {r['seconds']:.0f} s" for r in rows if "starts" in r)
    cards = [
        f"{r['stage']}: {r['card']}"
        for r in rows
        if r.get("card") and r["stage"].partition(":")[0] in ("compare", "step")
    ]
    yield "card (SM clock, memory clock, C, W, MiB) after " + listed(cards)
    smoke = [r for r in rows if "errors" in r]
    yield f"smoke: {sum(r['ok'] for r in smoke)} of {len(smoke)} cases right"
    for r in of(rows, unit="pytest"):
        yield (
            f"pytest, {r['stage']}: rc {r['rc']}, "
            + listed(f"{k} {v}" for k, v in r.items() if k.isupper())
            + f" {r['failed'][:5]}"
        )


def wrong(rows):
    """Units that failed, hung or died."""
    found = [r for r in rows if "unit" in r and r.get("status")]
    yield from ("", f"## Wrong: {len(found)} (failures.txt has all of it)")
    for r in found[:14]:
        yield f"- {r['stage']}, {r['unit']}: {str(r.get('error') or r['status'])[:150]}"


def promises(rows):
    yield from ("", "## Targets", "| met | target | measured |", "|---|---|---|")
    yield from (target.line() for target in targets(rows))


def verdict(row):
    """(best configuration, its gain, the noise, whether the default should change) of a row of a sweep."""
    middle = {name: max(ms[1], 1e-9) for name, ms in row["ms"].items()}
    now, again = middle.get(row["default"]), middle.get("default again")
    best = min((name for name in middle if name != "default again"), key=middle.get)
    if not now:
        return best, float("nan"), float("nan"), False
    gain, noise = 1 - middle[best] / now, abs(again / now - 1) if again else 0.0
    return best, gain, noise, gain > LEAST_GAIN and gain > 2 * noise


def configurations(rows):
    """The best configuration of each kernel, and whether a default should change."""
    yield from ("", "## Best configurations (a default changes for more than 2 % and twice the noise)")
    for r in of(rows, stage="sweeps"):
        if not r.get("ms"):
            continue
        best, gain, noise, change = verdict(r)
        now = r["ms"].get(r["default"], [0, float("nan")])[1]
        yield (f"- {r['unit']}: {'CHANGE' if change else 'keep'} {r['default']}, {now:.4f} ms; best {best}, "
               f"{r['ms'][best][1]:.4f} ms ({gain:.1%}, noise {noise:.1%}); {r.get('what')}"
               + f"; MiB {r['peak_mib']}" * bool(r.get("peak_mib")) + f"; failed {list(r['failed'])}" * bool(r["failed"]))  # fmt: skip


def steps(rows):
    found = of(rows, case="step")
    yield from ("", "## Updates of training")
    for r in found:
        T, speed = r["shape"]["T"], r["tokens_per_second"]
        original = [s["tokens_per_second"] for s in found if s["provider"] == "original's way" and s["shape"]["T"] == T]
        low, high = SPEEDS.get(r["provider"], (0, 0)) if T == 512 else (0, 0)
        losses = r.get("losses") or [r.get("loss")]
        yield (f"- T = {T}, {r['provider']}: {speed:,.0f} tokens/s" + f" (predicted {low:,} to {high:,})" * bool(low)
               + (f", {speed / original[0]:.1f}x" if original and original[0] else "")
               + f", {r['peak_mib']:,.0f} MiB, losses {losses[0]} ... {losses[-1]}")  # fmt: skip
    for r in of(rows, unit="demo"):
        if "top1" in r:
            yield f"- demo: top-1 {r['top1']:.4f}, {r['tokens_per_second']:,.0f} tokens/s, {r['seconds']} s"
    for r in of(rows, unit="profile"):
        yield f"- the device's time in an update of all rows is {r['device_ms']} ms, of which"
    for r in of(rows, stage="profile", unit="kernel")[:10]:
        yield f"  - {r['share']:.1%} {r['us'] / 1e3:.2f} ms x{r['count']} {r['name'][:90]}"


def comparison(rows):
    found = [r for r in of(rows, stage="compare") if "provider" in r]
    yield from ("", "## Kernels", "| case | shape | provider | ms | predicted | x eager | of a copy | host us | MiB | predicted |",
                "|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for r in found:
        eager = [
            e["ms"][1]
            for e in found
            if (e["shape"], e["case"], e["provider"]) == (r["shape"], r["case"], "eager") and e["ms"]
        ]
        expected, mib = predicted(r)
        ms = r["ms"] and r["ms"][1]
        cells = [r["case"], " ".join(str(v) for k, v in r["shape"].items() if k != "dtype"), r["provider"], ms,
                 expected and f"{expected[0]} to {expected[1]}", eager and ms and round(eager[0] / ms, 1),
                 r.get("share_of_copy"), r.get("host_us"), r["peak_mib"], mib]  # fmt: skip
        yield f"| {' | '.join(str(cell or '') for cell in cells)} |"


def others(rows):
    for r in of(rows, unit="ncu"):
        yield "- ncu: " + ", ".join(f"{k} {v}" for k, v in r.items() if k not in ("stage", "unit", "t"))[:400]
    for r in rows:
        if "summary" in r:
            yield f"- {r['unit']}: rc {r['rc']}, {r['summary']}"
