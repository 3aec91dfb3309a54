"""Held-out metrics on fixed masks: what the teacher knows, what the student kept, how often they agree."""

import torch
import torch.nn.functional as F

from minidistil.data import IGNORE

ROWS = 256  # logits at a time: 256 x 30,522 fp32 is 31 MB


class HeldOut:
    """Fixed, uniformly masked held-out sequences, and the teacher's view of them, computed once.

    ids, labels (n, T) int64 from `Sequences.take`; `teacher` may be None. Arithmetic is fp32. Metrics are over masked
    positions only: `mlm_loss` in nats, `top1` and `agreement` (same first guess as the teacher) as shares, `kl` in nats
    at temperature 1 from teacher to student.
    """

    def __init__(self, ids, labels, teacher=None, device="cpu", batch=8):
        self.ids, self.device, self.batch = torch.from_numpy(ids), device, batch
        labels = torch.from_numpy(labels)
        self.masked = labels != IGNORE
        self.targets = labels[self.masked].to(device)
        self.teacher = teacher
        self.teacher_rows = None if teacher is None else self._rows(teacher)
        self.teacher_metrics = None if teacher is None else self._metrics(teacher, self.teacher_rows)

    @torch.no_grad()
    def _rows(self, model):
        """Hidden states of the masked positions, after the head's transform: (M, C)."""
        training = model.training
        model.eval()
        rows = []
        for ids, masked in zip(self.ids.split(self.batch), self.masked.split(self.batch), strict=True):
            hidden = model(ids.to(self.device))
            rows.append(model.head(hidden[masked.to(self.device)]))
        model.train(training)
        return torch.cat(rows)

    @torch.no_grad()
    def _metrics(self, model, rows):
        against = self.teacher_rows is not None and model is not self.teacher
        mlm_loss = top1 = kl = agreement = 0.0
        for start in range(0, len(rows), ROWS):
            part = slice(start, start + ROWS)
            log_q = F.log_softmax(F.linear(rows[part], *model.decoder), -1)  # (R, V)
            guess = log_q.argmax(-1)
            mlm_loss += F.nll_loss(log_q, self.targets[part], reduction="sum").item()
            top1 += (guess == self.targets[part]).sum().item()
            if against:
                log_p = F.log_softmax(F.linear(self.teacher_rows[part], *self.teacher.decoder), -1)
                kl += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
                agreement += (guess == log_p.argmax(-1)).sum().item()
        metrics = {"mlm_loss": mlm_loss, "top1": top1}
        if against:
            metrics |= {"kl": kl, "agreement": agreement}
        return {name: round(total / max(len(rows), 1), 6) for name, total in metrics.items()}

    def evaluate(self, student):
        """Returns {"mlm_loss", "top1"} of a student, with a teacher also {"kl", "agreement"}."""
        return self._metrics(student, self._rows(student))
