"""The grid of learning rates and seeds of a task, and the summary of its runs.

The first seed runs every learning rate; the other seeds run the one with the best dev score, as BERT's authors selected
it (Devlin et al. 2018, appendix A.3). A run is {"lr", "seed", "epochs": [metrics after each]}.
"""

import json
import math
import statistics

from minidistil.energy import Energy
from minidistil.errors import UserError

# Grids of peak learning rates: BERT's own, and for narrower models one after Turc et al. 2019, arXiv 1908.08962
WIDE, NARROW, LSTM = (2e-5, 3e-5, 5e-5), (5e-5, 1e-4, 3e-4), (1e-3,)


def learning_rates(text, width):
    """Returns the learning rates to try: those of --lr, else the grid for an encoder of this width (None: LSTM)."""
    if text is None:
        return LSTM if width is None else WIDE if width >= 512 else NARROW
    try:
        rates = [float(rate) for rate in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(rate > 0 and math.isfinite(rate) for rate in rates):
        raise UserError(f"--lr {text}: give one learning rate, or several such as 2e-5,3e-5,5e-5")
    return rates


def read_scores(path):
    """Returns the contents of a scores.json, whose runs are checked; raises UserError where it is damaged."""
    try:
        state = json.loads(path.read_bytes())
        runs = [run for task in state["runs"].values() for run in task]
        whole = [type(state[name]) for name in ("identity", "data", "teachers")] == [dict] * 3 and "dtype" in state
        whole &= all(math.isfinite(run["lr"]) and type(run["seed"]) is int for run in runs)
        for task in state["runs"].values():
            epochs = [metrics for run in task for metrics in run["epochs"]]
            whole &= all(run["epochs"] for run in task) and all("score" in metrics for metrics in epochs)
            whole &= all(metrics.keys() == epochs[0].keys() for metrics in epochs)
            whole &= all(type(value) is float for metrics in epochs for value in metrics.values())
        seconds = sum((run.get("seconds", 0.0) for run in runs), 0.0)  # of runs whose energy was not counted yet
        joules = state.setdefault("joules", Energy(seconds=seconds))
        whole &= len(joules) == len(Energy()) and all(type(x) is float and math.isfinite(x) for x in joules)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged: copy it again, or begin again with another --out")
    return state


def next_run(runs, rates, first_seed, seeds):
    """Returns the next (lr, seed), or None when all runs are done."""
    done = [(r["lr"], r["seed"]) for r in runs]
    plan = [(lr, first_seed) for lr in rates]
    if all(p in done for p in plan):
        plan = [(summarise(runs)["lr"], first_seed + i) for i in range(seeds)]
    return next((p for p in plan if p not in done), None)


def summarise(runs):
    """Returns medians over the best learning rate's runs: {"score", "lowest", "highest", "lr", "seeds", metrics}."""
    first = min(r["seed"] for r in runs)
    best = max((r for r in runs if r["seed"] == first), key=lambda r: r["epochs"][-1]["score"])["lr"]
    final = [r["epochs"][-1] for r in runs if r["lr"] == best]
    scores = [f["score"] for f in final]
    metrics = {m: round(statistics.median(f[m] for f in final), 2) for m in final[0] if m != "score"}
    summary = {"score": statistics.median(scores), "lowest": min(scores), "highest": max(scores)}
    return {**{name: round(x, 2) for name, x in summary.items()}, "lr": best, "seeds": len(scores), **metrics}
