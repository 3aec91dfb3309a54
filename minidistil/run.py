"""The output folder of a run: identity, metrics, checkpoint, resumption.

Data order and random numbers are functions of (seed, update), so a checkpoint holds no state of the data or of random
generators: only weights, AdamW's two moments, and a few numbers such as the finished updates and the loss scale.
"""

import dataclasses
import json
import os
import pathlib
import signal
import time

import torch

from minidistil import files, hub, plot, weights
from minidistil.data import MASK_SHARE
from minidistil.energy import Energy
from minidistil.errors import UserError
from minidistil.folder import CHECKPOINT, inheritable
from minidistil.safetensors import read_safetensors, write_safetensors
from minidistil.student import drops

MOMENTS = ("exp_avg", "exp_avg_sq")
HELD_OUT = [  # metrics of masked and of causal models, without and with a teacher, and of sentence vectors
    {*of_words, *of_vectors}
    for loss in (["mlm_loss"], ["clm_loss", "perplexity"])
    for of_words in ([*loss, "top1"], [*loss, "top1", "kl", "agreement"], [])
    for of_vectors in ([], ["emb"])
    if of_words or of_vectors
]
PATHS = ("teacher", "data", "eval_data", "student_init", "student_config")  # settings of train.py that may be paths

# Settings of train.py that may differ when a run resumes, because they do not affect the arithmetic of an update.
# (epochs counts as steps; batch, accum and the number of ranks count as their product; the checkpoint holds the chosen
# dtype.)
MAY_CHANGE = {
    "out", "resume", "epochs", "batch", "accum", "micro_batch", "dtype", "price_per_hour", "watts", "grams_per_kwh",
    "eval_every", "eval_data", "eval_tokens", "save_every", "time_limit",
}  # fmt: skip


# ---- identity


def identity_of(settings, total, G, corpus, teacher_folder, student, pooling):
    """Returns everything that affects the arithmetic of an update, by contents: it must not change on resuming.

    `settings` are those of train.py, `total` the updates of the run, `G` the sequences in one.
    """
    named = settings.student_init not in (None, "teacher", "random")
    init, shape = hub.resolve(settings.student_init) if named else None, settings.student_config
    return {
        **{name: value for name, value in dataclasses.asdict(settings).items() if name not in MAY_CHANGE},
        "steps": total,
        "sequences in an update": G,
        "dropout's masks": "by sequence" if drops(student) else None,  # once they followed the micro-batch
        "data": corpus.meta["sha256"]["train.bin"],
        "sentences": corpus.meta.get("sentences"),
        "pooling": pooling and pooling.mode,
        "vectors' width": "the student's" if pooling and hasattr(student, "projection") else None,  # once the teacher's
        "teacher": teacher_folder and weights.digests(teacher_folder),
        "student_init": weights.digests(init) if init else settings.student_init,
        "student_config": shape and dataclasses.asdict(weights.read_config(shape)),
    }


def require_same(before, now, out):
    """Raises UserError unless two identities (dicts) are equal: a resumed run must compute the same updates."""
    if different := differences(before, now):
        raise UserError(f"{out} was begun with other settings ({different}): repeat them, or choose a new --out")


def differences(before, now):
    """Returns what differs between two dicts, "" for nothing."""
    changed = {name: value for name, value in now.items() if before.get(name) != value}
    return ", ".join(f"{name} {before.get(name)} -> {value}" for name, value in changed.items())


def same_on_ranks(contents, ranks):
    """Returns `contents` (a dict), which must be the same on all ranks but for the device; raises UserError on each."""
    first, *others = ranks.gather({name: value for name, value in contents.items() if name != "device"})
    for rank, other in enumerate(others, 1):
        if different := differences(first, other):
            way = "give all the same settings, models and text"
            raise UserError(f"rank {rank} has other settings than rank 0 ({different}): {way}")
    return contents


# ---- checkpoint


def save_checkpoint(out, model, optimizer, info):
    """Writes `out`/checkpoint, self-checksummed: weights, moments and `info`, a JSON-able dict."""
    tensors, adam_steps = {}, 0.0
    for name, parameter in model.named_parameters():
        tensors[f"student.{name}"] = parameter.detach()
        for moment in MOMENTS:
            if parameter in optimizer.state:
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
                adam_steps = float(optimizer.state[parameter]["step"])
    info = {**info, "adam_steps": adam_steps}  # fewer than the updates where fp16 overflowed
    write_safetensors(pathlib.Path(out) / CHECKPOINT, tensors, {"info": json.dumps(info)}, checksum=True)


def load_checkpoint(out):
    """Returns (info, tensors) of the checkpoint in `out`; UserError where it is damaged."""
    tensors, metadata = read_safetensors(pathlib.Path(out) / CHECKPOINT, checksum=True)
    return json.loads(metadata["info"]), tensors


def inherited(out):
    """Returns the settings of the run whose checkpoint is in `out`; {} without a checkpoint that holds them."""
    return load_checkpoint(out)[0].get("settings", {}) if (pathlib.Path(out) / CHECKPOINT).is_file() else {}


@torch.no_grad()
def restore(tensors, model, optimizer, adam_steps):
    """Copies the tensors of `load_checkpoint` into a model and its optimiser, which has run `adam_steps` steps."""
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[f"student.{name}"])
        if f"exp_avg.{name}" in tensors:
            # the fused optimiser keeps its step counter beside the parameter, in fp32
            state = {moment: tensors[f"{moment}.{name}"].to(parameter.device, copy=True) for moment in MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(adam_steps, device=parameter.device), **state}


# ---- the run of train.py


@dataclasses.dataclass
class State:
    """The state of a run besides its tensors; the defaults are those of a new run."""

    update: int = 0
    seconds: float = 0.0
    dtype: str = None  # precision of matrix products, chosen once
    scale: dict = dataclasses.field(default_factory=dict)  # state of the loss scaler, fp16 only
    searched: int = None  # result of the micro-batch search
    energy: tuple = Energy()  # of all ranks


class Run:
    """metrics.jsonl and checkpoint/ in the folder `out`; only the first rank `writes`.

    `settings` and `identity` are JSON-able dicts: the former are what a resumed run inherits, the latter is everything
    that affects the arithmetic of an update.
    """

    def __init__(self, out, settings, identity, writes):
        self.out, self.settings, self.identity, self.writes, self.history = out, settings, identity, writes, []

    def resume(self, student, optimizer, dtype):
        """Restores student and optimiser; returns the State. Raises UserError for another run."""
        saved, tensors = load_checkpoint(self.out)
        wanted = self.identity if dtype == "auto" else {**self.identity, "dtype": dtype}
        once = {"mask_share": MASK_SHARE, "alpha_emb": 0.0}  # of runs before these were settings
        before = {**once, **saved["identity"], "dtype": saved["dtype"]}
        require_same(before, wanted, self.out)
        restore(tensors, student, optimizer, saved["adam_steps"])
        saved.setdefault("energy", Energy(seconds=saved["seconds"]))  # of a run before it was measured: unknown
        return State(**{field.name: saved[field.name] for field in dataclasses.fields(State)})

    @staticmethod
    def size(student):
        """Bytes that a run writes: its model and two checkpoints, the old one and the one that replaces it."""
        return sum(parameter.nbytes for parameter in student.parameters()) * (1 + 2 * (1 + len(MOMENTS)))

    def save(self, student, optimizer, state):
        if self.writes:
            settings = inheritable(self.settings, PATHS)
            info = {**dataclasses.asdict(state), "identity": self.identity, "settings": settings}
            save_checkpoint(self.out, student, optimizer, info)

    def open(self, update, text):
        """Opens metrics.jsonl for `log`; drops records after `update`, because these updates will be repeated.

        `text` says what text the held-out metrics are of; those of another one do not count.
        """
        path, self.text = self.out / "metrics.jsonl" if self.writes else os.devnull, text
        if self.writes:
            self.out.mkdir(parents=True, exist_ok=True)
            records = [m for m in read_metrics(path) if m["step"] <= update] if update is not None else []
            files.write_text(path, "".join(json.dumps(m) + "\n" for m in records))
            self.history = [m for m in records if m.get("text", text) == text]
        self.metrics = open(path, "a", encoding="utf-8", buffering=1)

    def finished_summary(self, total):
        """Returns the summary of a run whose `total` updates and evaluation are done, else None."""
        path = self.out / "run.json"
        summary = json.loads(path.read_text(encoding="utf-8"))["summary"] if path.is_file() else {}
        return {**summary, "out": str(self.out)} if summary.get("steps") == total else None  # it may have been moved

    @property
    def evaluation(self):
        """The newest record with held-out metrics, or None."""
        return next((record for record in reversed(self.history) if "held_out" in record), None)

    def log(self, record):
        record |= {"text": self.text} if "held_out" in record else {}
        self.history.append(record)
        self.metrics.write(json.dumps(record) + "\n")


# ---- metrics


def read_metrics(path):
    """Returns the records of a metrics.jsonl, {"step", ...}; a crash may have cut the last, which is dropped.

    Raises UserError for damage before the last line.
    """
    records, lines = [], path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if "held_out" in record and record["held_out"].keys() not in HELD_OUT:
                raise ValueError
            drawn = [record[name] for name in ("step", "loss", "kl", "ce", "emb") if name in record or name == "step"]
            sum([*drawn, *record.get("held_out", {}).values()])  # TypeError where one is no number
            records.append(record)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            if number < len(lines):
                what = "it is no whole record of an update or an evaluation"
                raise UserError(f"{path}, line {number}: {what}: remove that line") from None
    return records


def draw_curve(path, history, teacher_metrics):
    """Draws the training loss and the held-out metrics of a run; the former as a running mean over 2 % of it."""
    updates = [m for m in history if "loss" in m]
    held_out = [m for m in history if "held_out" in m]
    names = [name for name in ("loss", "kl", "ce", "emb") if updates and name in updates[-1]]
    training = {name: [(m["step"], m[name]) for m in updates if name in m] for name in names}
    window = max(1, len(updates) // 50)
    found = held_out[0]["held_out"] if held_out else {"top1": None}
    unit = "squared distance" if names == ["loss", "emb"] else "nats"
    unit += f", mean of {window} updates" if window > 1 else ""

    loss = next((name for name in ("mlm_loss", "clm_loss") if held_out and name in held_out[0]["held_out"]), "mlm_loss")

    def evaluated(title, unit, metric, form=plot.NUMBER):
        student = {
            "student" if teacher_metrics or "emb" in found else "model": [
                (m["step"], m["held_out"][metric]) for m in held_out
            ]
        }
        teacher = (teacher_metrics or {}).get(metric) and ("teacher", teacher_metrics[metric])
        return plot.lines(title, unit, student, teacher, form=form)

    panels = [plot.lines("training loss", unit, training, window=window)]
    if "top1" in found:
        panels.append(evaluated(f"held-out {'masked' if loss == 'mlm_loss' else 'causal'}-LM loss", "nats", loss))
        panels.append(evaluated("held-out accuracy", "top-1", "top1", plot.percent))
    if "emb" in found:
        panels.append(evaluated("held-out sentence vectors", "squared distance to the teacher's", "emb"))
    plot.draw(path, *panels)


# ---- interruption


class SignalFlag:
    """Turns Ctrl-C and SIGTERM into a flag that a loop reads; a second signal ends the process at once.

    A second signal within one second is ignored: `torchrun` forwards to its processes what the terminal sent them too.
    """

    def __init__(self):
        self.signal, self.since = None, 0.0

    def __enter__(self):
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, _):
        if self.signal is not None and time.monotonic() - self.since > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self.signal is None:
            self.signal, self.since = number, time.monotonic()
