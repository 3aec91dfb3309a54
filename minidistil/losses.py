"""The distillation objective: which rows, which weights, which denominators; the arithmetic is in kernels/.

    L = alpha_ce  * tau^2 * mean over R of KL(softmax(t / tau) || softmax(s / tau))     Hinton et al. 2015, section 2
      + alpha_mlm * mean over masked of -log softmax(s)[label]                          Devlin et al. 2018, section 3.1
      + alpha_cos * mean over all tokens of 1 - cos(h_s, h_t)                           Sanh et al. 2019, section 3
      + alpha_mse * mean over R of sum_v (s - t)^2

for student logits s, teacher logits t and last hidden states h. R is every token (the published recipe) or the masked
ones (`kd_rows`: all | masked). Every mean has the denominator of the *whole update*, so that the gradient does not
depend on how an update is split into micro-batches. The factor tau^2 undoes the 1 / tau^2 by which the softened
gradient shrinks: d(tau^2 KL)/ds = tau (softmax(s / tau) - softmax(t / tau)).

Legend:  B batch   T tokens per sequence   N rows   C width   s, t student and teacher   tau temperature
"""

import dataclasses

import torch

from kernels.cosine import cosine_distance
from kernels.linear_distill_kl import linear_distill_kl
from minidistil.data import IGNORE


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weights of the four terms; the defaults are those of the released DistilBERT (5 / 2 / 1 / 0, tau = 2)."""

    alpha_ce: float = 5.0
    alpha_mlm: float = 2.0
    alpha_cos: float = 1.0
    alpha_mse: float = 0.0
    temperature: float = 2.0
    kd_rows: str = "all"

    @classmethod
    def of(cls, settings):
        """The objective that the settings of train.py name; without a teacher only its masked-LM term is left."""
        values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(cls)}
        if settings.teacher == "none":
            values |= {"alpha_ce": 0.0, "alpha_cos": 0.0, "alpha_mse": 0.0}
        return cls(**values)

    @property
    def on_logits(self):
        """True where teacher logits are needed."""
        return bool(self.alpha_ce or self.alpha_mse)

    @property
    def needs_teacher(self):
        return self.on_logits or bool(self.alpha_cos)


@dataclasses.dataclass(frozen=True)
class Denominators:
    """Denominators of one update, over all its micro-batches: tokens, and masked tokens."""

    tokens: int
    masked: int

    def kd_rows(self, objective):
        return self.tokens if objective.kd_rows == "all" else self.masked


# ---- the whole objective


def distillation_loss(
    objective, denominators, labels, student, h_s, teacher=None, h_t=None, teacher_decoder=None, masked=None
):
    """One micro-batch's share of the update's loss.

    labels (B, T) int64, of which `masked` are not IGNORE (counted where it is None, which makes the host wait for a
    GPU); h_s, h_t (B, T, C) last hidden states of the `MaskedLM`s `student` and `teacher`; `teacher_decoder` is the
    teacher's as `decoder_for` converted it, so that no micro-batch does that again. The shares of all
    micro-batches add up to L. Returns (loss, parts): parts is fp32 (4,), this micro-batch's share of the means
    (kl, ce, cos, mse), unweighted.
    """
    h_s_rows, row_labels = h_s.flatten(0, 1), labels.flatten()
    h_t_rows = None if h_t is None else h_t.flatten(0, 1)
    cos = h_s.new_zeros((), dtype=torch.float32)
    if objective.alpha_cos:
        cos = cosine_distance(h_s_rows, h_t_rows) / denominators.tokens
    if objective.kd_rows == "masked" or not objective.on_logits:
        # no other row is scored, so no other row meets the vocabulary
        here = row_labels != IGNORE
        chosen = torch.nonzero_static(here, size=int(here.sum()) if masked is None else masked).squeeze(1)
        row_labels, h_s_rows = row_labels[chosen], h_s_rows[chosen]
        h_t_rows = None if h_t_rows is None else h_t_rows[chosen]
    on_teacher = (None, None, None)
    if objective.on_logits:
        with torch.no_grad():
            on_teacher = (teacher.head(h_t_rows), *(teacher_decoder or teacher.decoder))
    kd_denominator, mlm_denominator = max(denominators.kd_rows(objective), 1), max(denominators.masked, 1)
    loss, kl, ce, mse = linear_distill_kl(
        student.head(h_s_rows), *student.decoder, *on_teacher, row_labels, objective.temperature,
        objective.alpha_ce / kd_denominator, objective.alpha_mlm / mlm_denominator,
        objective.alpha_mse / kd_denominator,
    )  # fmt: skip
    parts = torch.stack([kl / kd_denominator, ce / mlm_denominator, cos.detach(), mse / kd_denominator]).float()
    return loss + objective.alpha_cos * cos, parts.detach()
