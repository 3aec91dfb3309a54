"""One run of fine-tuning, with one learning rate and one seed, and its checkpoint."""

import dataclasses
import pathlib

from minidistil.run import CHECKPOINT, load_checkpoint, restore, save_checkpoint


@dataclasses.dataclass
class Trial:
    """One run of a task, with its checkpoint in `out`."""

    task: str
    lr: float
    seed: int
    out: pathlib.Path
    identity: dict  # of the whole run of finetune.py
    epochs: list = dataclasses.field(default_factory=list)  # metrics after each epoch

    @property
    def key(self):
        return f"{self.task} lr {self.lr:g} seed {self.seed}"

    def resume(self, model, optimizer, scaler, ranks):
        """Restores this run from its checkpoint; returns (update, seconds), zeros without one."""
        if not ranks.broadcast((self.out / CHECKPOINT).is_file):  # which rank 0 removes after a run
            return 0, 0.0
        saved, tensors = load_checkpoint(self.out)
        identity = {k: v for k, v in self.identity.items() if k != "pooling" or k in saved["identity"]}  # once unnoted
        if (saved["key"], saved["identity"]) != (self.key, identity):
            return 0, 0.0
        restore(tensors, model, optimizer, saved["adam_steps"])
        scaler.load_state_dict(saved["scale"])
        self.epochs = saved["epochs"]
        ranks.print0(f"{self.key}: resumes after update {saved['update']}")
        return saved["update"], saved["seconds"]

    def save(self, model, optimizer, scaler, progress):
        save_checkpoint(self.out, model, optimizer, {
            "update": progress.update, "seconds": progress.seconds, "epochs": self.epochs, "key": self.key,
            "identity": self.identity, "scale": scaler.state_dict(),
        })  # fmt: skip
