"""The distillation objective: rows, weights and denominators; the arithmetic is in kernels/.

    L = alpha_ce  * tau^2 * mean over R of KL(softmax(t / tau) || softmax(s / tau))     Hinton et al. 2015, section 2
      + alpha_mlm * mean over masked of -log softmax(s)[label]                          Devlin et al. 2018, section 3.1
      + alpha_cos * mean over all tokens of 1 - cos(h_s, h_t)                           Sanh et al. 2019, section 2
      + alpha_mse * mean over R of sum_v (s - t)^2
      + alpha_emb * mean over sentences of |v_s / |v_s| - v_t / |v_t||^2                Reimers and Gurevych 2020

for student logits s, teacher logits t, last hidden states h and sentence vectors v, which pool h. R is all tokens (the
published recipe) or the masked ones (`kd_rows`: all | masked). In a causal model every token counts as masked: its
label is the next one. The denominator of every mean is that of the *whole update*, so the gradient does not depend on
the split into micro-batches. The factor tau^2 undoes the 1 / tau^2 by which the softened gradient shrinks:
d(tau^2 KL)/ds = tau (softmax(s / tau) - softmax(t / tau)). The squared distance of two vectors of length 1 is twice
1 - cos of them. A student of another width is compared as narrow.py says; padding never counts.

Legend:  B batch   T tokens per sequence   N rows   C width   s, t student and teacher   tau temperature
"""

import dataclasses

import torch

from kernels.cosine import cosine_distance
from kernels.linear_distill_kl import linear_distill_kl
from minidistil.data import IGNORE
from minidistil.narrow import to_student, to_teacher


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weights of the five terms; the defaults are the released DistilBERT's (5 / 2 / 1 / 0 / 0, tau = 2)."""

    alpha_ce: float = 5.0
    alpha_mlm: float = 2.0
    alpha_cos: float = 1.0
    alpha_mse: float = 0.0
    temperature: float = 2.0
    kd_rows: str = "all"
    alpha_emb: float = 0.0

    def without_teacher(self):
        """Returns the objective of a run without a teacher: the term of the true tokens alone."""
        return dataclasses.replace(self, alpha_ce=0.0, alpha_cos=0.0, alpha_mse=0.0, alpha_emb=0.0)

    @property
    def on_logits(self):
        """Whether a term needs the teacher's logits."""
        return bool(self.alpha_ce or self.alpha_mse)

    @property
    def vectors_only(self):
        """Whether nothing but sentence vectors, perhaps with hidden states, is learnt: then no model needs a head."""
        return bool(self.alpha_emb) and not (self.on_logits or self.alpha_mlm)

    @property
    def terms(self):
        """Names of the terms that are computed."""
        weights = self.on_logits, self.alpha_mlm, self.alpha_cos, self.alpha_mse, self.alpha_emb
        return [name for name, computed in zip(TERMS, weights, strict=True) if computed]

    @property
    def needs_teacher(self):
        return self.on_logits or bool(self.alpha_cos or self.alpha_emb)


TERMS = "kl", "ce", "cos", "mse", "emb"


@dataclasses.dataclass(frozen=True)
class Denominators:
    """Number of tokens, of masked tokens, and of sequences in one update over all micro-batches and ranks."""

    tokens: int
    masked: int
    sequences: int = 0


def counts(ids, labels, mask=None):
    """Returns the numbers of real tokens and of labelled ones in a batch on the CPU."""
    return ids.numel() if mask is None else int(mask.sum()), int((labels != IGNORE).sum())


def distillation_loss(
    objective, denominators, labels, student, h_s, teacher=None, h_t=None, teacher_decoder=None, masked=None,
    mask=None, real=None, pooling=None,
):  # fmt: skip
    """Returns one micro-batch's share of the update's loss L, differentiable, and of its terms.

    labels (B, T) int64, of which `masked` are not IGNORE; mask (B, T) bool is True at its `real` tokens, None without
    padding. (Where these numbers are None they are counted here, which makes the host wait for a GPU.) h_s, h_t
    (B, T, C) are the last hidden states of the models `student` and `teacher`, and `pooling` makes sentence vectors of
    them. `teacher_decoder` is the teacher's decoder as `decoder_for` converted it once. The shares of all micro-batches
    sum to L. Returns (loss, parts): parts, fp32 (5,), is this micro-batch's share of the unweighted means in TERMS.
    """
    rows, row_labels = (h_s.flatten(0, 1), None if h_t is None else h_t.flatten(0, 1)), labels.flatten()
    emb = cos = kl = ce = mse = h_s.new_zeros((), dtype=torch.float32)
    if objective.alpha_emb:
        v_s, v_t = pooling(h_s, mask), to_student(student, pooling(h_t, mask))
        emb = 2 * cosine_distance(v_s, v_t) / denominators.sequences
    if mask is not None:
        rows, row_labels = _chosen(mask.flatten(), real, rows, row_labels)
    if objective.alpha_cos:
        cos = cosine_distance(to_teacher(student, rows[0]), rows[1]) / denominators.tokens
    kd_denominator = max(denominators.tokens if objective.kd_rows == "all" else denominators.masked, 1)
    mlm_denominator = max(denominators.masked, 1)
    loss = objective.alpha_cos * cos + objective.alpha_emb * emb
    if not objective.vectors_only:
        if objective.kd_rows == "masked" or not objective.on_logits:
            # no other row has a loss on its logits, so only these are projected
            rows, row_labels = _chosen(row_labels != IGNORE, masked, rows, row_labels)
        teacher_inputs = (None, None, None)
        if objective.on_logits:
            with torch.no_grad():
                teacher_inputs = (teacher.head(rows[1]), *(teacher_decoder or teacher.decoder))
        on_words, kl, ce, mse = linear_distill_kl(
            student.head(rows[0]), *student.decoder, *teacher_inputs, row_labels, objective.temperature,
            objective.alpha_ce / kd_denominator, objective.alpha_mlm / mlm_denominator,
            objective.alpha_mse / kd_denominator,
        )  # fmt: skip
        loss = on_words + loss
    parts = [kl / kd_denominator, ce / mlm_denominator, cos.detach(), mse / kd_denominator, emb.detach()]
    return loss, torch.stack(parts).float().detach()


def _chosen(where, n, rows, labels):
    """Returns (student's and teacher's rows, labels) of the `n` places where `where` (N,) is True; n None: count."""
    chosen = torch.nonzero_static(where, size=int(where.sum()) if n is None else n).squeeze(1)
    return [None if x is None else x[chosen] for x in rows], labels[chosen]
