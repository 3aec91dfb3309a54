"""The demo against its baselines, and the ablation: the demo without one part of the recipe."""

import contextlib
import dataclasses
import functools
import pathlib
import shlex
import statistics
import tempfile
import types

from benches import Common, script
from benches.report import attempt, measured
from minidistil import plot
from minidistil.cli import option
from minidistil.run import read_metrics

# name -> settings of train.py: the demo, longer, from other layers of its teacher, and its baselines with the same
# student, data and number of updates
VARIANTS = {
    "distilled": [],
    "distilled, 1,700 updates": ["--steps", "1700"],
    "distilled, layers 0 and 1": ["--student-layers", "0,1"],
    "same start, no teacher": ["--alpha-ce", "0", "--alpha-cos", "0"],
    "layers 0 and 1, no teacher": ["--alpha-ce", "0", "--alpha-cos", "0", "--student-layers", "0,1"],
    "random start, no teacher": ["--alpha-ce", "0", "--alpha-cos", "0", "--student-init", "random"],
}
# name -> settings of train.py, and the published change in GLUE macro score (Sanh et al. 2019, table 4)
ABLATIONS = {
    "all three losses": ([], 0.0),
    "no KL": (["--alpha-ce", "0"], -2.96),
    "no cosine": (["--alpha-cos", "0"], -1.46),
    "no masked-LM loss": (["--alpha-mlm", "0"], -0.31),
    "random start": (["--student-init", "random"], -3.69),
}
PUBLISHED_MASKS = ("--mask-share", "0.15")
UNTRAINED = {  # variant -> its row before the first update: what no training has to earn
    "distilled": "student, layers alone, untrained",
    "distilled, layers 0 and 1": "student, layers 0 and 1 alone, untrained",
}
METRICS = ("top1", "mlm_loss", "kl", "agreement")


@dataclasses.dataclass
class DemoSettings(Common):
    rounds: int = option(3, "seeds")


@dataclasses.dataclass
class AblationSettings(DemoSettings):
    train: str = option(None, "settings of train.py, in quotes (default: the demo)")


def train_variants(case, variants, settings, flags=()):
    """Runs train.py with each of {name: flags}, seed after seed; yields the teacher's row, then each variant's.

    A variant's row is yielded again after each seed: a metric is [mean, standard deviation] over the seeds so far,
    `curve` is [update, mean held-out top-1, mean masked-LM loss] of each evaluation.
    """
    short = ["--steps", "2", "--eval-tokens", "512"] if settings.tiny else []
    rows, runs, curves = {}, {name: [] for name in variants}, {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(settings.rounds):
            for name, more in variants.items():
                row = rows.setdefault(name, {"case": case, "provider": name})
                out = pathlib.Path(folder) / f"{name}-{seed}".replace(" ", "-")
                with attempt(row):
                    runs[name].append(script("train.py", *flags, *more, *short, "--seed", seed, "--out", out))
                    curves[name].append([m for m in read_metrics(out / "metrics.jsonl") if "held_out" in m])
                    if "teacher" not in rows:
                        rows["teacher"] = {"case": case, "provider": "teacher", **runs[name][0]["teacher"]}
                        yield rows["teacher"]
                    summarise(row, runs[name], curves[name])
                yield row


def summarise(row, summaries, curves):
    """Stores means and standard deviations over the runs of one variant in its row."""
    row["parameters"] = summaries[0]["student"]["parameters"]
    for metric in METRICS:
        with contextlib.suppress(KeyError):  # without a teacher there is no KL and no agreement
            values = [summary["student"][metric] for summary in summaries]
            row[metric] = [round(statistics.mean(values), 4), round(statistics.pstdev(values), 4)]
    row["seconds"] = max(summary["seconds"] for summary in summaries)
    row["seeds"], row["steps"] = len(summaries), summaries[0]["steps"]
    row["curve"] = [
        [same[0]["step"], *(round(statistics.mean(m["held_out"][k] for m in same), 4) for k in ("top1", "mlm_loss"))]
        for same in zip(*curves, strict=True)
    ]


def bench_ablation(settings):
    """The demo with masks as published, or with --train another run of train.py, without one part at a time."""
    variants, whole = {name: flags for name, (flags, _) in ABLATIONS.items()}, None
    for row in train_variants("ablation", variants, settings, [*PUBLISHED_MASKS, *shlex.split(settings.train or "")]):
        if row["provider"] in ABLATIONS and "error" not in row:
            whole = row if row["provider"] == next(iter(ABLATIONS)) else whole
            row["paper"] = ABLATIONS[row["provider"]][1]
            row["change"] = whole and round(row["top1"][0] - whole["top1"][0], 4)
        row["settings"] = settings.train
        yield row


def with_spread(row, metric, form):
    """Returns the mean as text, with the standard deviation if there is more than one seed."""
    mean, deviation = row[metric]
    return f"{mean:{form}}" + (f" ± {deviation:{form}}" if row["seeds"] > 1 else "")


def demo_table(results):
    """Markdown: means over seeds, with standard deviations if there is more than one."""
    teacher, *students = measured(results)
    lines = ["| | parameters | held-out top-1 | of the teacher's | masked-LM loss, nats | agrees with the teacher "
             "| seconds |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    lines.append(f"| teacher | {teacher['parameters']:,} | {teacher['top1']:.1%} | | {teacher['mlm_loss']:.3f} | | |")
    for r in students:
        if name := UNTRAINED.get(r["provider"]):
            _, top1, loss = r["curve"][0]  # which begins before the first update
            row = [name, f"{r['parameters']:,}", f"{top1:.1%}", f"{top1 / teacher['top1']:.1%}", f"{loss:.3f}"]
            lines.append(f"| {' | '.join(row)} | | |")
    for r in students:
        row = [f"student, {r['provider']}", f"{r['parameters']:,}", with_spread(r, "top1", ".1%")]
        row += [f"{r['top1'][0] / teacher['top1']:.1%}", with_spread(r, "mlm_loss", ".3f")]
        row += [with_spread(r, "agreement", ".1%"), f"{r['seconds']:.0f}"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def ablation_table(results):
    """Markdown: held-out accuracy in per cent, and its change without a part, ours and the paper's."""
    lines = ["| | held-out top-1 | change, points | the paper's, points of GLUE | KL to the teacher |",
             "|---|---|---|---|---|"]  # fmt: skip
    for r in measured(results)[1:]:
        change = [f"{100 * r['change']:+.2f}", f"{r['paper']:+.2f}"] if r["paper"] else ["", ""]
        lines.append(f"| {r['provider']} | {with_spread(r, 'top1', '.1%')} | {' | '.join(change)} | {r['kl'][0]:.3f} |")
    return "\n".join(lines)


def draw_demo(path, results):
    """Held-out accuracy and loss of every student, means over seeds, and the teacher's, dashed."""
    teacher, *students = measured(results)
    seeds = max((r["seeds"] for r in students), default=1)
    over = f", mean of {seeds} seeds" if seeds > 1 else ""

    def panel(column, figure, title, unit, form=plot.NUMBER):
        curves = {r["provider"]: [(point[0], point[column]) for point in r["curve"]] for r in students}
        return plot.lines(title, unit, curves, ("teacher", teacher[figure]), form=form)

    accuracy = panel(1, "top1", "held-out accuracy" + over, "top-1", plot.percent)
    plot.draw(path, accuracy, panel(2, "mlm_loss", "held-out masked-LM loss", "nats"))


DEMO = types.SimpleNamespace(
    Settings=DemoSettings, bench=functools.partial(train_variants, "demo", VARIANTS), table=demo_table, draw=draw_demo
)
ABLATION = types.SimpleNamespace(Settings=AblationSettings, bench=bench_ablation, table=ablation_table)
