"""The rows of the comparison as a table and a picture."""

import statistics

from benches.report import measured
from benches.retention.recipes import RECIPES
from minidistil import plot
from minidistil.downstream import glue

NAMES = {name: task.folder for name, task in glue.TASKS.items()} | {"imdb": "IMDb"}  # as they are written

# GLUE dev, median of five seeds, and IMDb; MNLI as implied by the mean of nine (the table's 86.7 is a misprint)
PUBLISHED = {
    "BERT-base, published": dict(cola=56.3, sst2=92.7, mrpc=88.6, stsb=89.0, qqp=89.6, mnli=84.7, qnli=91.8, rte=69.3,
                                 wnli=53.5, imdb=93.46),
    "DistilBERT, published": dict(cola=51.3, sst2=91.3, mrpc=87.5, stsb=86.9, qqp=88.5, mnli=82.2, qnli=89.2, rte=59.9,
                                  wnli=56.3, imdb=92.82),
}  # fmt: skip


def spread(low, middle, high):
    """Returns a median as text, with half the range of the seeds if there is one."""
    return f"{middle:.1f}" + (f" ± {(high - low) / 2:.1f}" if high > low else "")


def table(results):
    """Markdown: a row per model; zero-shot, a column per task, the mean, both also as a share of the teacher's.

    Columns without a figure are left out. The paper's models come last, with shares of their own teacher's.
    """
    results = measured(results)
    tasks = list(results[0].get("scores", {}))
    zero_shot = any("zero_shot" in r for r in results)
    head = ["zero-shot stsb", "kept"] * zero_shot + [*tasks, *["mean", "kept"] * bool(tasks)]
    lines = [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    base = None
    for r in results + [{"provider": name, "scores": scores} for name, scores in PUBLISHED.items() if tasks]:
        cells = []
        if zero_shot:
            first = results[0].get("zero_shot") != r.get("zero_shot")
            cells += [spread(low, x, high) for x, low, high in [r["zero_shot"]]] if "zero_shot" in r else [""]
            cells.append(f"{r['retained_zero_shot']:.1f}%" if first and r.get("retained_zero_shot") else "")
        if tasks:
            scores, runs = r["scores"], r.get("tasks", {})
            mean = statistics.mean(scores[task] for task in tasks)
            base = mean if base is None or r["provider"].startswith("BERT") else base
            for task in tasks:
                x = scores[task]
                cells.append(spread(runs[task]["lowest"], x, runs[task]["highest"]) if task in runs else f"{x:.1f}")
            cells += [f"{mean:.1f}", "" if mean == base else f"{mean / base:.1%}"]
        lines.append(f"| {r['provider']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path, results):
    """Bars of the models: zero-shot, by task, and the mean; of the recipes of a kind the best one alone."""
    results, series = measured(results), {}
    left_out = []  # more than seven colours are not told apart
    for kind in ("masked words", "vectors"):
        variants = [r for r in results if r["provider"] in RECIPES and r["provider"].startswith(kind)]
        left_out += sorted(variants, key=lambda r: r.get("macro", r.get("zero_shot", [0])[0]))[:-1]
    for r in results:
        if r in left_out:
            continue
        of = {}
        if "zero_shot" in r:
            middle, low, high = r["zero_shot"]
            of["zero-shot STS-B"] = [low, middle, high]
        for task, t in r.get("tasks", {}).items():
            of[NAMES.get(task, task)] = [t["lowest"], t["score"], t["highest"]]
        series[r["provider"]] = of | ({"mean": [r["macro"]] * 3} if "macro" in r else {})
    plot.draw(path, plot.bars("dev sets: median, lowest to highest", "score", series, "".format))
