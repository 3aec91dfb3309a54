"""results.jsonl -> summary.md: what to conclude, in at most 120 lines."""

import json

from benches.gpu.targets import EAGER, PREDICTIONS, SPEEDS, targets

LEAST_GAIN = 0.02  # of a configuration, for which a default changes
LINES, WIDTH = 120, 700


def summary(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for part in (head, wrong, promises, configurations, steps, comparison, tools) for line in part(rows)]
    return "\n".join(line[:WIDTH] for line in lines[:LINES])


def of(rows, **wanted):
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def listed(items):
    return ", ".join(items) or "not measured"


def head(rows):
    versions = (of(rows, unit="versions") or [{}])[-1]
    yield f"# GPU day: {versions.pop('device', 'device not recorded in this run')}"
    yield listed(f"{name} {value}" for name, value in versions.items() if name not in ("stage", "unit", "t"))
    ceilings = [f"copy {r['gb_per_s']:,.0f} GB/s" for r in of(rows, unit="copy")]
    yield listed(ceilings + [f"bf16 product {r['tflops']:,.0f} TFLOP/s" for r in of(rows, unit="matrix product")])
    chosen = of(rows, unit="attention chosen")
    chosen = listed(f"T {r['T']} p {r['p']}{' mask' * r['mask']} {r['backend']}" for r in chosen)
    yield f"attention that PyTorch would choose: {chosen}"
    dropout = [
        f"{r['backend']} {r['p']}: {r['mean']:.4f} {r['dropped']:.4f}{'' if r['right'] else ' WRONG'}"
        for r in of(rows, unit="attention dropout")
    ]
    yield f"attention dropout (mean, share dropped): {listed(dropout)}"
    ended = [row for row in rows if "starts" in row]
    other = [f"{r['stage']} {r['status']}, {r['seconds']:.0f} s" for r in ended if r["status"] != "ok"]
    yield f"stages: {len(ended) - len(other)} ok; {'; '.join(other) or 'no other'}"
    cards = [f"{r['stage']}: {r['card']}" for r in ended if r["card"] and r["stage"].startswith(("compare", "step"))]
    yield f"card (SM clock, memory clock, C, W, MiB) after {listed(cards)}"
    smoke = [row for row in rows if "errors" in row]
    yield f"smoke: {sum(row['ok'] for row in smoke)} of {len(smoke)} cases right"
    tests = {row["stage"]: row for row in rows if str(row.get("unit")).startswith("pytest")}  # the last one of each
    for stage, row in tests.items():
        counts = listed(f"{name} {n}" for name, n in row.items() if name.isupper())
        yield f"{row['unit']}, {stage}: rc {row.get('rc')}, {counts} {row.get('failed', [])[:5]}"


def wrong(rows):
    """Units that failed, hung or died."""
    found = [row for row in rows if "unit" in row and row.get("status")]
    yield from ("", f"## Wrong: {len(found)} (failures.txt has all of it)")
    for row in found[:14]:
        yield f"- {row['stage']}, {row['unit']}: {str(row.get('error') or row['status'])[:150]}"


def promises(rows):
    yield from ("", "## Targets", "| target | wanted | measured | met |", "|---|---|---|---|")
    for text, value, wanted, less in targets(rows):
        limit = f"{'at most' if less else 'at least'} {wanted:,}"
        if value is None:
            yield f"| {text} | {limit} | not measured | |"
        else:
            shown = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
            met = value <= wanted if less else value >= wanted
            yield f"| {text} | {limit} | {shown} | {'yes' if met else 'NO'} |"


def verdict(row):
    """(best configuration, its gain, the noise, whether the default should change) of a sweep."""
    middle = {name: max(ms[1], 1e-9) for name, ms in row["ms"].items()}
    now, again = middle.get(row["default"]), middle.pop("default again", None)
    chosen = [name for name in middle if name not in row.get("information", ())]
    best = min(chosen, key=lambda name: (middle[name], name != row["default"]))
    if not now:
        return best, float("nan"), float("nan"), False
    gain, noise = 1 - middle[best] / now, abs(again / now - 1)
    return best, gain, noise, gain > LEAST_GAIN and gain > 2 * noise


def configurations(rows):
    """The best configuration of each kernel, and whether a default should change."""
    yield from ("", "## Best configurations (a default changes for more than 2 % and twice the noise)")
    for row in rows:
        if row.get("ms") and "default" in row:
            best, gain, noise, change = verdict(row)
            now = row["ms"].get(row["default"], (0, float("nan")))[1]
            line = f"- {row['unit']}: {'CHANGE' if change else 'keep'} {row['default']}, {now:.4f} ms; best {best}, "
            line += f"{row['ms'][best][1]:.4f} ms ({gain:.1%}, noise {noise:.1%}); {row['what']}"
            line += f"; MiB {row['peak_mib']}" if row.get("peak_mib") else ""
            yield line + (f"; failed {list(row['failed'])}" if row["failed"] else "")


def steps(rows):
    found = of(rows, case="step")
    originals = {r["shape"]["T"]: r["tokens_per_second"] for r in found if r["provider"] == "original's way"}
    yield from ("", "## Updates of training")
    for row in found:
        T, speed, losses = row["shape"]["T"], row["tokens_per_second"], row.get("losses") or [row.get("loss")]
        line = f"- T = {T}, {row['provider']}: {speed:,.0f} tokens/s"
        if T == 512 and row["provider"] in SPEEDS:
            line += " (predicted {:,} to {:,})".format(*SPEEDS[row["provider"]])
        if originals.get(T):
            line += f", {speed / originals[T]:.1f}x"
        yield f"{line}, {row['peak_mib']:,.0f} MiB, losses {losses[0]} ... {losses[-1]}"
    for row in of(rows, unit="demo"):
        if "top1" in row:
            yield f"- demo: top-1 {row['top1']:.4f}, {row['tokens_per_second']:,.0f} tokens/s, {row['seconds']} s"
    for row in of(rows, unit="profile"):
        yield f"- the device's time in an update of all rows is {row['device_ms']} ms, of which"
    for row in of(rows, unit="kernel")[:10]:
        yield f"  - {row['share']:.1%} {row['us'] / 1e3:.2f} ms x{row['count']} {row['name'][:90]}"


def comparison(rows):
    found = [row for row in rows if "provider" in row and row["case"] != "step"]
    names = ("case", "shape", "provider", "ms", "predicted", "x eager", "of a copy", "host us", "MiB", "predicted")
    yield from ("", "## Kernels", f"| {' | '.join(names)} |", "|---" * len(names) + "|")
    eager = {(r["case"], str(r["shape"])): r["ms"][1] for r in found if r["provider"] == EAGER and "ms" in r}
    for row in found:
        case, shape, ms = row["case"], row["shape"], row.get("ms", (None, None))[1]
        predictions = PREDICTIONS.get((case, shape["N"]), {}) if shape.get("p") != 0 else {}
        low, high, mib = predictions.get(row["provider"], (None, None, None))
        base = eager.get((case, str(shape)))
        cells = [
            case, " ".join(str(value) for name, value in shape.items() if name != "dtype"), row["provider"], ms,
            low and f"{low} to {high}", base and ms and round(base / ms, 1), row.get("share_of_copy"),
            row.get("host_us"), row.get("peak_mib", row.get("error")), mib,
        ]  # fmt: skip
        yield f"| {' | '.join('' if cell is None else str(cell) for cell in cells)} |"


def tools(rows):
    for row in of(rows, unit="ncu"):
        yield "- ncu: " + listed(f"{name} {value}" for name, value in row.items() if name not in ("stage", "unit", "t"))
    for row in rows:
        if "summary" in row:
            yield f"- {row['unit']}: rc {row['rc']}, {row['summary']}"
