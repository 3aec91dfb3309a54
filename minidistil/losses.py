"""The distillation objective: rows, weights and denominators; the arithmetic is in kernels/.

    L = alpha_ce  * tau^2 * mean over R of KL(softmax(t / tau) || softmax(s / tau))     Hinton et al. 2015, section 2
      + alpha_mlm * mean over masked of -log softmax(s)[label]                          Devlin et al. 2018, section 3.1
      + alpha_cos * mean over all tokens of 1 - cos(h_s, h_t)                           Sanh et al. 2019, section 3
      + alpha_mse * mean over R of sum_v (s - t)^2

for student logits s, teacher logits t and last hidden states h. R is all tokens (the published recipe) or the masked
ones (`kd_rows`: all | masked). In a causal model every token counts as masked: its label is the next one. The
denominator of every mean is that of the *whole update*, so the gradient does not depend on the split into
micro-batches. The factor tau^2 undoes the 1 / tau^2 by which the softened gradient shrinks:
d(tau^2 KL)/ds = tau (softmax(s / tau) - softmax(t / tau)).

Legend:  B batch   T tokens per sequence   N rows   C width   s, t student and teacher   tau temperature
"""

import dataclasses

import torch

from kernels.cosine import cosine_distance
from kernels.linear_distill_kl import linear_distill_kl
from minidistil.data import IGNORE


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weights of the four terms; the defaults are the released DistilBERT's (5 / 2 / 1 / 0, tau = 2)."""

    alpha_ce: float = 5.0
    alpha_mlm: float = 2.0
    alpha_cos: float = 1.0
    alpha_mse: float = 0.0
    temperature: float = 2.0
    kd_rows: str = "all"

    def without_teacher(self):
        """Returns the objective of a run without a teacher: the term of the true tokens alone."""
        return dataclasses.replace(self, alpha_ce=0.0, alpha_cos=0.0, alpha_mse=0.0)

    @property
    def on_logits(self):
        """Whether a term needs the teacher's logits."""
        return bool(self.alpha_ce or self.alpha_mse)

    @property
    def terms(self):
        """Names of the terms that are computed."""
        parts = {"kl": self.on_logits, "ce": self.alpha_mlm, "cos": self.alpha_cos, "mse": self.alpha_mse}
        return [name for name, computed in parts.items() if computed]

    @property
    def needs_teacher(self):
        return self.on_logits or bool(self.alpha_cos)


@dataclasses.dataclass(frozen=True)
class Denominators:
    """Number of tokens, and of masked tokens, in one update over all micro-batches and ranks."""

    tokens: int
    masked: int


def distillation_loss(
    objective, denominators, labels, student, h_s, teacher=None, h_t=None, teacher_decoder=None, masked=None
):
    """Returns one micro-batch's share of the update's loss L, differentiable, and of its terms.

    labels (B, T) int64, of which `masked` are not IGNORE (None: counted here, which makes the host wait for a GPU).
    h_s, h_t (B, T, C) are the last hidden states of the LanguageModels `student` and `teacher`. `teacher_decoder` is
    the teacher's decoder as `decoder_for` converted it once. The shares of all micro-batches sum to L. Returns (loss,
    parts): parts, fp32 (4,), is this micro-batch's share of the unweighted means (kl, ce, cos, mse).
    """
    h_s_rows, row_labels = h_s.flatten(0, 1), labels.flatten()
    h_t_rows = None if h_t is None else h_t.flatten(0, 1)
    cos = h_s.new_zeros((), dtype=torch.float32)
    if objective.alpha_cos:
        cos = cosine_distance(h_s_rows, h_t_rows) / denominators.tokens
    if objective.kd_rows == "masked" or not objective.on_logits:
        # no other row has a loss on its logits, so only these are projected
        is_masked = row_labels != IGNORE
        chosen = torch.nonzero_static(is_masked, size=int(is_masked.sum()) if masked is None else masked).squeeze(1)
        row_labels, h_s_rows = row_labels[chosen], h_s_rows[chosen]
        h_t_rows = None if h_t_rows is None else h_t_rows[chosen]
    teacher_inputs = (None, None, None)
    if objective.on_logits:
        with torch.no_grad():
            teacher_inputs = (teacher.head(h_t_rows), *(teacher_decoder or teacher.decoder))
    kd_denominator = max(denominators.tokens if objective.kd_rows == "all" else denominators.masked, 1)
    mlm_denominator = max(denominators.masked, 1)
    loss, kl, ce, mse = linear_distill_kl(
        student.head(h_s_rows), *student.decoder, *teacher_inputs, row_labels, objective.temperature,
        objective.alpha_ce / kd_denominator, objective.alpha_mlm / mlm_denominator,
        objective.alpha_mse / kd_denominator,
    )  # fmt: skip
    parts = torch.stack([kl / kd_denominator, ce / mlm_denominator, cos.detach(), mse / kd_denominator]).float()
    return loss + objective.alpha_cos * cos, parts.detach()
