"""Held-out metrics of teacher and student on fixed sequences: of their words, and of their sentence vectors."""

import math

import torch
import torch.nn.functional as F

from minidistil.data import IGNORE
from minidistil.narrow import to_student

ROWS = 256  # rows of logits at a time, at most: 256 x 30,522 fp32 is 31 MB
LOGIT_BYTES = 128 << 20  # at most, of one model's fp32 logits at a time, of which five such tensors exist


def rows_at_a_time(V):
    """Returns how many rows of V fp32 logits are computed at a time: 256 of up to 131,072 words, 134 of 250,037."""
    return max(1, min(ROWS, LOGIT_BYTES // (4 * V)))


def hidden_states(model, ids, mask, device, batch):
    """Yields (slice of the sequences, their last hidden states (batch, T, C) in eval mode), T that of their longest."""
    training = model.training
    model.eval()
    for start in range(0, len(ids), batch):
        part = slice(start, start + batch)
        if mask is None:
            yield part, model(ids[part].to(device))
        else:
            T = int(mask[part].sum(1).max())
            yield part, model(ids[part, :T].to(device), mask[part, :T].to(device))
    model.train(training)


class HeldOut:
    """Fixed held-out sequences, for a masked model uniformly masked; the teacher's hidden states are computed once.

    ids, labels (n, T) int64 from `Sequences.batch`, and mask (n, T) bool from `Sentences.batch`; `teacher` may be None.
    Arithmetic is fp32. Metrics are over the labelled positions: `mlm_loss` in nats, of a causal model `clm_loss` and
    `perplexity`, its exponential; `top1` and `agreement` (same first guess as the teacher) are shares; `kl` is
    KL(teacher || student) at temperature 1, in nats.
    """

    def __init__(self, ids, labels, teacher=None, device="cpu", batch=8, mask=None):
        self.ids, self.device, self.batch = torch.from_numpy(ids), device, batch
        self.mask = None if mask is None else torch.from_numpy(mask)
        labels = torch.from_numpy(labels)
        self.labelled = labels != IGNORE
        self.targets = labels[self.labelled].to(device)
        self.teacher = teacher
        self.teacher_rows = None if teacher is None else self._rows(teacher)
        self.teacher_metrics = None if teacher is None else self._metrics(teacher, self.teacher_rows)

    @torch.no_grad()
    def _rows(self, model):
        """Returns the hidden states of the M labelled positions after the head's transform: (M, C)."""
        places, labelled = hidden_states(model, self.ids, self.mask, self.device, self.batch), self.labelled
        rows = (hidden[labelled[part, : hidden.shape[1]].to(self.device)] for part, hidden in places)
        return torch.cat([model.head(each) for each in rows])

    @torch.no_grad()
    def _metrics(self, model, rows):
        with_teacher = self.teacher_rows is not None and model is not self.teacher
        lm_loss = top1 = kl = agreement = 0.0
        R = rows_at_a_time(len(model.decoder[0]))
        for start in range(0, len(rows), R):
            part = slice(start, start + R)
            log_q = F.log_softmax(F.linear(rows[part], *model.decoder), -1)  # (R, V)
            guess = log_q.argmax(-1)
            lm_loss += F.nll_loss(log_q, self.targets[part], reduction="sum").item()
            top1 += (guess == self.targets[part]).sum().item()
            if with_teacher:
                log_p = F.log_softmax(F.linear(self.teacher_rows[part], *self.teacher.decoder), -1)
                kl += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
                agreement += (guess == log_p.argmax(-1)).sum().item()
        metrics = {"clm_loss" if model.config.causal else "mlm_loss": lm_loss, "top1": top1}
        if with_teacher:
            metrics |= {"kl": kl, "agreement": agreement}
        metrics = {name: round(total / max(len(rows), 1), 6) for name, total in metrics.items()}
        if model.config.causal:
            metrics["perplexity"] = round(math.exp(min(metrics["clm_loss"], 700.0)), 4)
        return metrics

    def evaluate(self, student):
        """Returns {"mlm_loss" or "clm_loss" and "perplexity", "top1"}, with a teacher also {"kl", "agreement"}."""
        return self._metrics(student, self._rows(student))


class HeldOutVectors:
    """Fixed held-out sentences, whose vectors by the teacher are computed once; with `words`, a HeldOut of them, too.

    ids (n, T) int64, mask (n, T) bool from `Sentences.batch` without masking. `emb` is the mean squared distance of
    student's and teacher's vectors, both of length 1 and of the student's width: from 0 to 4, and 2 for unrelated ones.
    """

    def __init__(self, ids, mask, teacher, pooling, words=None, device="cpu", batch=16):
        self.ids, self.mask, self.pooling = torch.from_numpy(ids), torch.from_numpy(mask), pooling
        self.words, self.device, self.batch = words, device, batch
        self.teacher_vectors = self._vectors(teacher)
        self.teacher_metrics = words and words.teacher_metrics

    @torch.no_grad()
    def _vectors(self, model):
        """Returns the vectors (n, C) of a model."""
        vectors = []
        for part, hidden in hidden_states(model, self.ids, self.mask, self.device, self.batch):
            pooled = self.pooling(hidden, self.mask[part, : hidden.shape[1]].to(self.device))
            vectors.append(pooled)
        return torch.cat(vectors)

    def evaluate(self, student):
        """Returns {"emb"}, and before it the metrics of `words`."""
        both = self._vectors(student), to_student(student, self.teacher_vectors)
        a, b = (F.normalize(vectors, dim=-1) for vectors in both)
        distance = (a - b).square().sum(-1).mean().item()
        return {**(self.words.evaluate(student) if self.words else {}), "emb": round(distance, 6)}
