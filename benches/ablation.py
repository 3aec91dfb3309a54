"""What does each part of the recipe add? The student trained with one part left out (Sanh et al. 2019, table 4)."""

import pathlib
import shlex
import shutil
import statistics
import tempfile

from benches.process import script

# name -> settings of train.py, and the paper's change in GLUE macro score
ABLATIONS = {
    "all three losses": ([], 0.0),
    "no KL": (["--alpha-ce", "0"], -2.96),
    "no cosine": (["--alpha-cos", "0"], -1.46),
    "no masked-LM loss": (["--alpha-mlm", "0"], -0.31),
    "random start": (["--student-init", "random"], -3.69),
}
FIGURES = ("top1", "mlm_loss", "kl", "agreement")


def train_variants(variants, seeds, folder, tiny, flags=()):
    """Runs train.py with each of {name: settings}, for each seed; returns the teacher's figures, then each variant's.

    A figure is [mean, standard deviation] over seeds; curve.svg of the first run is left in `folder`.
    """
    flags = [*flags, *(["--steps", "2", "--eval-tokens", "512"] if tiny else [])]
    runs = {name: [] for name in variants}
    for seed in range(seeds):
        for name, settings in variants.items():
            out = pathlib.Path(folder) / f"{name}-{seed}".replace(" ", "-")
            runs[name].append(script("train.py", *flags, *settings, "--seed", seed, "--out", out))
            if not (folder / "curve.svg").exists():
                shutil.copy(out / "curve.svg", folder)
            shutil.rmtree(out)
    results = [{"provider": "teacher", **next(iter(runs.values()))[0]["teacher"]}]
    for name, summaries in runs.items():
        result = {"provider": name, "parameters": summaries[0]["student"]["parameters"]}
        for figure in FIGURES:
            values = [summary["student"][figure] for summary in summaries]
            result[figure] = [round(statistics.mean(values), 4), round(statistics.pstdev(values), 4)]
        result["seconds"] = max(summary["seconds"] for summary in summaries)
        result["seeds"], result["steps"] = seeds, summaries[0]["steps"]
        results.append(result)
    return results


def bench_ablation(settings):
    """The demo, or with --train another run of train.py, with one part left out at a time."""
    variants, flags = {name: flags for name, (flags, _) in ABLATIONS.items()}, shlex.split(settings.train or "")
    with tempfile.TemporaryDirectory() as folder:
        seeds = settings.rounds or 3
        results = train_variants(variants, seeds, pathlib.Path(folder), settings.tiny, flags)
    for result in results[1:]:
        result["change"] = round(result["top1"][0] - results[1]["top1"][0], 4)
        result["paper"] = ABLATIONS[result["provider"]][1]
    return [{"case": "ablation", "settings": settings.train, **result} for result in results]


def ablation_table(results):
    """Markdown: held-out accuracy in per cent, and the change that leaving a part out makes, ours and the paper's."""
    lines = ["| | held-out top-1 | change, points | the paper's, points of GLUE | KL to the teacher |",
             "|---|---|---|---|---|"]  # fmt: skip
    for r in results[1:]:
        top1 = f"{r['top1'][0]:.1%}" + (f" ± {r['top1'][1]:.1%}" if r["seeds"] > 1 else "")
        change = [f"{100 * r['change']:+.2f}", f"{r['paper']:+.2f}"] if r["paper"] else ["", ""]
        lines.append(f"| {r['provider']} | {top1} | {' | '.join(change)} | {r['kl'][0]:.3f} |")
    return "\n".join(lines)
