"""The output of a run: progress lines, metrics, model, curve and run.json."""

import re
import shutil

from minidistil import files, weights
from minidistil.card import card, write_card
from minidistil.device import peak_mib, versions
from minidistil.energy import Energy, amount, describe
from minidistil.folder import CHECKPOINT, command
from minidistil.memory import peak_rss_mib
from minidistil.pooling import write_pooling
from minidistil.progress import duration, estimate_cost, peak_tflops, training_flops_per_token
from minidistil.run import draw_curve


class RunReport:
    """Prints and logs the progress of a run, and writes its result."""

    def __init__(self, run, progress, distiller, state, sequences, ranks):
        self.run, self.progress, self.state, self.ranks = run, progress, state, ranks
        self.device, self.student, self.teacher = distiller.device, distiller.student, distiller.teacher
        self.pooling, self.T = distiller.pooling, round(sequences.mean_length)
        self.objective, self.peak = distiller.objective, peak_tflops(self.device, state.dtype)
        shapes = self.teacher and self.teacher.config, self.student.config
        self.flops = training_flops_per_token(self.objective, *shapes, self.T, sequences.label_share)  # per token

    def begin(self, corpus, A, B, held_out):
        """Prints what will run: A micro-batches of B sequences in an update of each rank."""
        self.data, self.teacher_metrics = corpus.meta, held_out and held_out.teacher_metrics
        ranks, size = self.ranks, f"{parameters(self.student):,} parameters"
        teacher = self.teacher and f"teacher {parameters(self.teacher):,} parameters, student {size}"
        ranks.print0(teacher or f"model {size}, no teacher")
        several = f"{ranks.size} ranks x " if ranks.size > 1 else ""
        ranks.print0(f"{len(corpus.train):,} tokens of text; {self.state.dtype} on {self.device}")
        sizes = f"{several}{A} x {B} x {self.T} = {self.progress.tokens:,} tokens"
        ranks.print0(f"{self.progress.total} updates of {sizes}")
        if self.teacher_metrics:
            ranks.print0(f"held-out, teacher: {format_metrics(self.teacher_metrics)}")

    def cost(self):
        """Returns the estimated cost, at this speed, of the whole run and of the published one."""
        progress, prices = self.progress, (self.run.settings["price_per_hour"], Energy(*self.state.energy).watts)
        tokens, speed = progress.total * progress.tokens, progress.tokens_per_second
        return estimate_cost(tokens, speed, self.flops, self.peak, self.ranks.size, *prices)

    def micro_batch_done(self, done, A):
        """Prints a line where the first `done` of the A micro-batches of an update took long: it may take minutes."""
        progress = self.progress
        if done < A and progress.due("line", max(10.0, progress.line_every)):
            self.ranks.print0(f"  update {progress.update + 1}/{progress.total}: micro-batch {done}/{A}")

    def updated(self, loss, terms, lr, norm):
        """Logs an update and prints a line where one is due; terms that the objective lacks are left out."""
        progress = self.progress
        terms = {"loss": loss, **{name: terms[name] for name in self.objective.terms}}
        cost = {name: value for name, value in self.cost().items() if not name.startswith("published")}
        speed, memory = round(progress.tokens_per_second, 1), round(peak_mib(self.device), 1)
        self.run.log({
            "step": progress.update, **terms, "lr": lr, "grad_norm": norm, **cost, "tokens_per_second": speed,
            "peak_mib": memory,
        })  # fmt: skip
        if not progress.line_due():
            return
        share = f"  {cost['utilisation']:.0%} of peak" if self.peak else ""
        price = "" if cost["cost"] is None else f"  {cost['cost']:,.2f} in all"
        if cost["kwh"] is not None:
            price += f"  {amount(Energy(*self.state.energy).kwh)} of {amount(cost['kwh'])}"
        width = len(str(progress.total))
        self.ranks.print0(folded(
            f"{progress.update:>{width}}/{progress.total}  {format_metrics(terms, 3)}  {speed:,.0f} tokens/s{share}"
            f"{price}  {progress.left} left"
        ))  # fmt: skip

    def evaluated(self, metrics):
        self.run.log({"step": self.progress.update, "held_out": metrics})
        self.ranks.print0(folded(f"held-out, after {self.progress.update}: {format_metrics(metrics)}"))

    def finish(self, tokenizer, ended_by, resume):
        """Writes the student, its tokenizer, run.json, the curve and the card; returns the summary.

        `ended_by` is "completion", "time limit" or "signal"; `resume` is the command line that continues the run.
        """
        run, progress, student, teacher = self.run, self.progress, self.student, self.teacher
        cost, tokens_per_second = self.cost(), round(progress.tokens_per_second, 1)
        energy = Energy(*self.state.energy).record(run.settings["grams_per_kwh"])
        summary = {
            "out": str(run.out),
            "steps": progress.update,
            "tokens": progress.update * progress.tokens,
            "seconds": round(progress.seconds, 1),
            "tokens_per_second": tokens_per_second,
            "peak_rss_mib": peak_rss_mib(),
            "peak_gpu_mib": round(peak_mib(self.device), 1) if self.device.type == "cuda" else 0.0,
            "teacher": {"parameters": parameters(teacher), **(self.teacher_metrics or {})} if teacher else None,
            "student": {"parameters": parameters(student), **run.evaluation["held_out"]},
        }
        student.cpu().eval()
        ids = tokenizer.hub_ids
        if student.config.causal:  # whatever its vocabulary: without them, transformers takes those of GPT-2's own
            ids = {"bos_token_id": tokenizer.sep_id, "eos_token_id": tokenizer.sep_id}
        weights.save_model(run.out, student, **ids)
        tokenizer.max_length = student.config.positions
        tokenizer.save(run.out, student.config.family)
        if self.pooling:
            write_pooling(run.out, self.pooling, student.config)
        ending = {"planned_steps": progress.total, "ended_by": ended_by, "evaluated_after": run.evaluation["step"]}
        before = next((record["held_out"] for record in run.history if record["step"] == 0), None)
        files.write_json(run.out / "run.json", {
            "settings": run.settings, "dtype": self.state.dtype, "identity": run.identity, "versions": versions(),
            "data": self.data, "before": before, "summary": summary, **ending, "accounting": cost, "energy": energy,
        })  # fmt: skip
        draw_curve(run.out / "curve.svg", run.history, self.teacher_metrics)
        write_card(run.out, card(run.out))
        if energy:
            self.ranks.print0(f"energy: {describe(energy)}")
        if ended_by == "completion":
            published = f" and about {amount(cost['published_kwh'])}" if energy and cost["published_kwh"] else ""
            self.ranks.print0(
                f"{self.flops / 1e6:,.0f} MFLOP a token; at {tokens_per_second:,.0f} tokens/s the {progress.total} "
                f"updates take\n{cost['device_hours']:,.3g} device-hours, the published recipe's 12.6 billion tokens "
                f"{cost['published_device_hours']:,.0f}{published}\n"
                + conclusion(summary, of_other_width=hasattr(self.student, "projection"))
            )
        else:
            reason, done = "--time-limit" if ended_by == "time limit" else "a signal", progress.update
            self.ranks.print0(
                f"{reason} ended the run after {done} of {progress.total} updates; {progress.left} were left\n"
                f"{run.out} holds the {'student' if teacher else 'model'} of this moment\nresume with: {resume}"
            )
        return summary


def parameters(model):
    """Returns how many parameters a model has, tied ones counted once, without a projection, which is not saved."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("projection."))


def format_metrics(metrics, digits=4):
    """Returns metrics as text for a progress line."""
    return "  ".join(f"{name} {value:.{digits}g}" for name, value in metrics.items())


def folded(line):
    """Returns a line, whose parts stand two spaces apart, folded between parts to the width of the terminal."""
    first, *parts = re.split(r"(?<=\S)  (?=\S)", line)
    lines, width = [first], shutil.get_terminal_size().columns
    for part in parts:
        if len(lines[-1]) + 2 + len(part) > width:
            lines.append("    " + part)
        else:
            lines[-1] += "  " + part
    return "\n".join(lines)


def conclusion(summary, of_other_width=False):
    """Returns what a finished run has achieved, where it is, and what to run next, as text."""
    student, teacher, out = summary["student"], summary["teacher"], summary["out"]
    causal = "perplexity" in student
    words = "tokens that come next" if causal else "masked words"
    what = "the model "
    if teacher:
        what = f"the student has {student['parameters'] / teacher['parameters']:.0%} of its teacher's parameters and\n"
    if "top1" in student:
        what += f"predicts {student['top1']:.1%} of the {words} of held-out text"
        what += f", the teacher {teacher['top1']:.1%}" if "top1" in (teacher or {}) else ""
    if "emb" in student:
        what += ";\n" if "top1" in student else ""
        what += f"its vectors of held-out sentences have cosine {1 - student['emb'] / 2:.3f} with the teacher's"
        what += ", in its own width" if of_other_width else ""
    if causal:
        what += f";\nits perplexity is {student['perplexity']:.4g}"
        what += f", the teacher's {teacher['perplexity']:.4g}" if teacher else ""
    tries = [command("sample.py", "--model", out)] if "top1" in student else []
    tries += [] if causal else [command("finetune.py", "--task", "sst2", "--model", out, "--data", "GLUE")]
    return "\n  ".join([
        f"finished after {duration(summary['seconds'])}: {what}\n"
        f"{out} holds the model, its card (README.md), run.json, metrics.jsonl and curve.svg; try it:",
        *tries,
    ])  # fmt: skip


def already_finished(summary):
    """Returns what --resume says of a finished run, and how to train its model further, as text."""
    out, model = summary["out"], "its student" if summary["teacher"] else "the model"
    return (
        f"{out} is finished: all {summary['steps']} updates are done, and nothing is changed\n"
        f"to train {model} further, with a learning rate that rises and falls anew:\n"
        f"  {command('train.py', '--student-init', out)} ... (and the settings of that run)"
    )


def not_finite(update, losses, norm, B, share, ranks, out):
    """Returns the error for a loss or gradient that is not finite: which update and sequences, and what is safe."""
    G, bad = share * ranks.size, (~losses.isfinite()).nonzero().flatten().tolist()
    if bad:
        first = update * G + ranks.rank * share + bad[0] * B
        last = first + B - 1
        what = f"the loss is {losses[bad[0]].item()} in micro-batch {bad[0] + 1} (sequences {first} to {last})"
    else:
        what = f"the gradient's norm is {norm.item()} (sequences {update * G} to {(update + 1) * G - 1})"
    return (
        f"update {update + 1}: {what}: lower --lr or --clip, or look at these sequences; "
        f"the last good checkpoint is untouched in {out / CHECKPOINT}"
    )
