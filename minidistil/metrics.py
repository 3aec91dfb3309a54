"""metrics.jsonl, one record a line, and the curve drawn from it."""

import json

from minidistil.plot import line_chart


def read_metrics(path):
    """Returns the records of a metrics.jsonl; the last line may be cut short by a crash."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def draw_curve(path, history, teacher_figures):
    """Draws the training loss and the held-out figures of a run's metrics."""
    updates = [m for m in history if "loss" in m]
    held_out = [m for m in history if "held_out" in m]
    training = {name: [(m["step"], m[name]) for m in updates] for name in ("loss", "kl", "ce")}
    training = {name: line for name, line in training.items() if any(y for _, y in line)}
    top1 = {"student": [(m["step"], m["held_out"]["top1"]) for m in held_out]}
    loss = {"student": [(m["step"], m["held_out"]["mlm_loss"]) for m in held_out]}
    if teacher_figures:
        ends = (held_out[0]["step"], held_out[-1]["step"])
        top1["teacher (dashed)"] = [(step, teacher_figures["top1"]) for step in ends]
        loss["teacher (dashed)"] = [(step, teacher_figures["mlm_loss"]) for step in ends]
    line_chart(path, [
        {"title": "training loss, nats", "x": "update", "lines": training},
        {"title": "held-out masked-LM loss, nats", "x": "update", "lines": loss},
        {"title": "held-out top-1 accuracy", "x": "update", "lines": top1},
    ])  # fmt: skip
