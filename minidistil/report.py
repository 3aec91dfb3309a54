"""The output of a run: progress lines, metrics, model, curve and run.json."""

import dataclasses

from minidistil import files, weights
from minidistil.device import peak_mib, versions
from minidistil.memory import peak_rss_mib
from minidistil.model import num_params
from minidistil.progress import estimate_cost, peak_tflops, training_flops_per_token
from minidistil.run import draw_curve


class RunReport:
    """Prints and logs the progress of a run, and writes its result."""

    def __init__(self, settings, run, progress, distiller, dtype, ranks):
        self.settings, self.run, self.progress, self.ranks = settings, run, progress, ranks
        self.dtype, self.device = dtype, distiller.device
        self.student, self.teacher = distiller.student, distiller.teacher
        self.role, self.logged = "student" if self.teacher else "model", {"loss", "lr", *distiller.objective.terms}
        shapes = self.teacher and self.teacher.config, self.student.config
        self.flops = training_flops_per_token(distiller.objective, *shapes, settings.seq_len)  # per token
        self.peak = peak_tflops(self.device, dtype)

    def begin(self, corpus, A, B, T, held_out):
        ranks, total = self.ranks, self.progress.total
        teacher = f"teacher {num_params(self.teacher.config):,} parameters, " if self.teacher else ""
        several = f"{ranks.size} ranks x " if ranks.size > 1 else ""
        ranks.print0(
            f"{teacher}{self.role} {num_params(self.student.config):,} parameters; "
            f"{len(corpus.train):,} tokens of text; {total} updates of {several}{A} x {B} x {T} = "
            f"{self.progress.tokens:,} tokens; {self.dtype} on {self.device}; {self.run.out}"
        )
        if ranks.first and held_out.teacher_metrics:
            ranks.print0(f"held-out, teacher: {format_metrics(held_out.teacher_metrics)}")

    def cost(self):
        """Returns the estimated cost, at this speed, of the whole run and of the published one."""
        progress, price = self.progress, self.settings.price_per_hour
        tokens = progress.total * progress.tokens
        return estimate_cost(tokens, progress.tokens_per_second, self.flops, self.peak, self.ranks.size, price)

    def updated(self, terms, norm):
        progress, terms = self.progress, {name: value for name, value in terms.items() if name in self.logged}
        cost = {name: value for name, value in self.cost().items() if not name.startswith("published")}
        speed, memory = round(progress.tokens_per_second, 1), round(peak_mib(self.device), 1)
        self.run.log({
            "step": progress.update, **terms, "grad_norm": norm, **cost, "tokens_per_second": speed, "peak_mib": memory,
        })  # fmt: skip
        if not progress.line_due():
            return
        share = f" ({cost['utilisation']:.0%} of peak)" if self.peak else ""
        price = "" if cost["cost"] is None else f"  {cost['cost']:,.2f} in all"
        self.ranks.print0(
            f"update {progress.update:>6}/{progress.total}  {format_metrics(terms)}  {speed:,.0f} tokens/s  "
            f"{cost['tflops_per_second']:.2f} TFLOP/s{share}{price}  {progress.left} left  {memory:,.0f} MiB"
        )

    def evaluated(self, metrics):
        self.run.log({"step": self.progress.update, "held_out": metrics})
        self.ranks.print0(f"held-out, {self.role} after {self.progress.update}: {format_metrics(metrics)}")

    def finish(self, corpus, tokenizer, held_out, metrics):
        """Writes the student, its tokenizer, run.json and the curve; returns the summary."""
        run, progress, student, teacher = self.run, self.progress, self.student, self.teacher
        cost, tokens_per_second = self.cost(), round(progress.tokens_per_second, 1)
        summary = {
            "out": str(run.out),
            "steps": progress.update,
            "tokens": progress.update * progress.tokens,
            "seconds": round(progress.seconds, 1),
            "tokens_per_second": tokens_per_second,
            "peak_rss_mib": peak_rss_mib(),
            "peak_gpu_mib": round(peak_mib(self.device), 1) if self.device.type == "cuda" else 0.0,
            "teacher": {"parameters": num_params(teacher.config), **held_out.teacher_metrics} if teacher else None,
            "student": {"parameters": num_params(student.config), **metrics},
        }
        self.ranks.print0(
            f"{self.flops / 1e6:,.0f} MFLOP a token; at {tokens_per_second:,.0f} tokens/s the {progress.total} updates "
            f"take {cost['device_hours']:,.2f} device-hours, the published recipe's 12.6 billion tokens "
            f"{cost['published_device_hours']:,.0f}"
        )
        student.cpu().eval()
        weights.save_model(run.out, student)
        tokenizer.max_length = student.config.positions
        tokenizer.save(run.out, student.config.family)
        files.write_json(run.out / "run.json", {
            "settings": dataclasses.asdict(self.settings), "dtype": self.dtype, "identity": run.identity,
            "versions": versions(), "data": corpus.meta, "summary": summary, "accounting": cost,
        })  # fmt: skip
        draw_curve(run.out / "curve.svg", run.history, held_out.teacher_metrics)
        return summary


def format_metrics(metrics):
    """Returns metrics as text for a progress line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
