"""Teacher, student and objective: the forward and backward pass of a micro-batch, and the gradient of an update.

Legend:  B sequences in a micro-batch   T tokens per sequence   C width   A micro-batches in a rank's share of an update
"""

import torch

from kernels.linear_distill_kl import decoder_for
from minidistil.data import IGNORE
from minidistil.device import DTYPES, cast_products, precision
from minidistil.losses import distillation_loss


class Distiller:
    """What a run trains, and by what; `teacher` may be None where the objective needs none.

    dtype is that of matrix products: fp32, bf16 or fp16 by name. Weights, their gradients, LayerNorm's statistics and
    the loss are fp32. The teacher is frozen, and evaluated by then: its products are cast once and for all.
    """

    def __init__(self, objective, teacher, student, dtype, device, ranks):
        self.objective, self.teacher, self.student, self.device, self.ranks = objective, teacher, student, device, ranks
        self.autocast, self.scaler = precision(dtype, device)
        self.teach, self.forward = teacher, student  # the models as they are, compiled, or wrapped
        self.teacher_decoder = None
        if teacher is not None:
            cast_products(teacher, dtype)
            self.teacher_decoder = decoder_for(*teacher.decoder, DTYPES[dtype])

    def compile(self):
        """Compiles both models for training's one shape; evaluation, whose shape is another, uses them as they are."""
        self.teach, self.forward = (m and torch.compile(m, dynamic=False) for m in (self.teacher, self.student))

    def distribute(self):
        """From here on the backward pass averages gradients over all ranks."""
        self.forward = self.ranks.wrap(self.forward, self.device)

    def backward(self, ids, labels, masked, denominators):
        """Adds the gradient of a micro-batch (B, T) to what is there; `masked` of its labels are not IGNORE.

        Returns its share of the update's (loss, kl, ce, cos, mse): (5,) fp32 on the device.
        """
        ids, labels = (tensor.to(self.device, non_blocking=True) for tensor in (ids, labels))
        with self.autocast():
            h_t = None
            if self.objective.needs_teacher:
                with torch.no_grad():
                    h_t = self.teach(ids)  # (B, T, C)
            h_s = self.forward(ids)  # (B, T, C)
            loss, terms = distillation_loss(
                self.objective, denominators, labels, self.student, h_s, self.teacher, h_t, self.teacher_decoder, masked
            )
        # DistributedDataParallel divides the gradient by the number of ranks, but the loss is a share of a mean already
        self.scaler.scale(loss * self.ranks.size).backward()
        return torch.cat([loss.detach().float()[None], terms])

    def accumulate(self, ids, labels, B, denominators, after_each):
        """Accumulates the gradient of a rank's share of an update, B sequences at a time; nothing waits for the device.

        after_each(done, A) is asked after each micro-batch whether to take the next. Returns the micro-batches' terms,
        a list of A tensors (5,), or None where it said no.
        """
        micro_batches, terms = list(zip(ids.split(B), labels.split(B), strict=True)), []
        for x, y in micro_batches:
            last = len(terms) == len(micro_batches) - 1
            with self.ranks.no_sync(self.forward, last):  # ranks exchange gradients in the last backward pass
                terms.append(self.backward(x, y, int((y != IGNORE).sum()), denominators))
            if not after_each(len(terms), len(micro_batches)):
                return None
        return terms

    def clip(self, optimizer, largest):
        """Undoes the loss scale and clips the gradient; returns its norm before, 0-d fp32 on the device."""
        self.scaler.unscale_(optimizer)
        return torch.nn.utils.clip_grad_norm_(self.student.parameters(), largest)

    def step(self, optimizer):
        """Takes the optimiser's step; with fp16, an overflow skips it and lowers the loss scale."""
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
