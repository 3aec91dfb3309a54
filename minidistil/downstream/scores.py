"""scores.json, the state of a run of finetune.py: what it was begun with, and its finished runs."""

import json
import math

from minidistil.energy import Energy
from minidistil.errors import UserError
from minidistil.precision import choose_dtype
from minidistil.run import require_same


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


def begin(settings, identity, dtype, device):
    """Returns a new state, for `settings` that a resumed run inherits; prints the precision that `dtype` becomes."""
    dtype, why = choose_dtype(dtype, device)
    print(f"matrix products in {dtype}{why and f': {why}'}", flush=True)
    return {"settings": settings, "identity": identity, "dtype": dtype, "data": {}, "teachers": {}, "runs": {}}


def resume(out, identity, dtype):
    """Returns the state of the run in `out`; UserError where it was another."""
    state = read_scores(out / "scores.json")
    wanted = identity if dtype == "auto" else {**identity, "dtype": dtype}
    if "pooling" in identity:  # which older runs do not note
        state["identity"].setdefault("pooling", identity["pooling"])
    require_same({**state["identity"], "dtype": state["dtype"]}, wanted, out)
    for task in state["runs"]:  # nor the settings of each task
        state.setdefault("tasks", {}).setdefault(task, state["settings"])
    return state


def runs_of(task, state):
    """Returns the list of a task's finished runs; where there is none yet, notes the settings that it begins with."""
    if task not in state["runs"]:
        state.setdefault("tasks", {})[task] = state["settings"]
    return state["runs"].setdefault(task, [])


def require_same_for(task, state, what, contents, out):
    """Raises UserError where a task was begun with other contents of `what`, "data" or "teachers"; notes them else."""
    if state.setdefault(what, {}).setdefault(task, contents) != contents:
        flag = {"data": "--data and --unlabelled", "teachers": "--teacher"}[what]
        raise UserError(f"{out} was begun with other {what} for {task}: give the same {flag}, or a new --out")
