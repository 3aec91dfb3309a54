"""Teacher, student and objective: forward and backward pass of a micro-batch, gradient of an update.

A batch is (ids, labels), or (ids, labels, mask) of sentences, whose padding the mask hides.

Legend:  B sequences in a micro-batch   T tokens per sequence   C width   A micro-batches of a rank in an update
"""

import torch

from kernels.dropout import Key
from kernels.linear_distill_kl import decoder_for
from minidistil.losses import counts, distillation_loss
from minidistil.precision import DTYPES, cast_products, precision


class Distiller:
    """A teacher, the student that it trains, and the objective; `teacher` may be None where the objective needs none.

    dtype, by name, is the precision of matrix products: fp32, bf16 or fp16. Weights, their gradients, LayerNorm's
    statistics and the loss are fp32. The frozen teacher's linear layers are cast to it once, after its evaluation.
    `pooling` makes sentence vectors of hidden states, where the objective has a term of them.
    """

    def __init__(self, objective, teacher, student, dtype, device, ranks, pooling=None):
        self.objective, self.teacher, self.student, self.device, self.ranks = objective, teacher, student, device, ranks
        self.pooling = pooling
        self.autocast, self.scaler = precision(dtype, device)
        self.run_teacher, self.run_student = teacher, student  # the models, perhaps compiled or wrapped
        self.teacher_decoder = None
        if teacher is not None:
            cast_products(teacher, dtype)
            if objective.on_logits:
                self.teacher_decoder = decoder_for(*teacher.decoder, DTYPES[dtype])

    def compile(self):
        """Compiles both models for the one shape of training; evaluation, with another shape, runs uncompiled."""
        self.run_teacher, self.run_student = (
            m and torch.compile(m, dynamic=False) for m in (self.teacher, self.student)
        )

    def distribute(self):
        """Makes the backward pass average gradients over all ranks."""
        self.run_student = self.ranks.wrap(self.run_student, self.device)

    def leave(self):
        """Leaves the other ranks, after the last update."""
        self.run_student = self.student  # `Distributed.leave` says why
        self.ranks.leave()

    def backward(self, batch, denominators, seed, first):
        """Adds the gradient of a micro-batch, tensors (B, T) as `Sequences` or `Sentences` make them, to the gradients.

        Dropout follows from `seed` and from the numbers of the sequences in the update, `first` and on. Returns the
        micro-batch's share of the update's (loss, *TERMS): fp32 (6,) on the device.
        """
        key = Key.of(seed, first, self.device)
        torch.manual_seed(seed + first)  # of dropout that PyTorch draws: see kernels/dropout.py
        real, masked = counts(*batch)  # before the copies, so that nothing waits for the device
        ids, labels, *padding = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        mask = padding[0] if padding else None
        with self.autocast():
            h_t = None
            if self.objective.needs_teacher:
                with torch.no_grad():
                    h_t = self.run_teacher(ids, mask)  # (B, T, C); only the loss makes logits, a chunk at a time
            h_s = self.run_student(ids, mask, key=key)  # (B, T, C)
            loss, terms = distillation_loss(
                self.objective, denominators, labels, self.student, h_s, self.teacher, h_t, self.teacher_decoder,
                masked, mask, real, self.pooling,
            )  # fmt: skip
        # undoes DistributedDataParallel's division by the number of ranks: the loss is a share of a mean already
        with torch.autocast(self.device.type, enabled=False):
            self.scaler.scale(loss * self.ranks.size).backward()
        return torch.cat([loss.detach().float()[None], terms])

    def accumulate(self, batch, B, denominators, seed, proceed):
        """Accumulates the gradient of a rank's share of an update in micro-batches of B; nothing waits for the device.

        `seed` is that of the update's dropout, the same on all ranks. proceed(done, A) is called after each micro-batch
        and returns whether to continue. Returns the terms of the micro-batches, a list of A tensors (6,), or None where
        it returned False.
        """
        micro_batches, terms = list(zip(*(tensor.split(B) for tensor in batch), strict=True)), []
        with self.autocast():  # around all micro-batches: the student's weights are cast once an update
            for micro_batch in micro_batches:
                last = len(terms) == len(micro_batches) - 1
                first = self.ranks.rank * len(batch[0]) + len(terms) * B
                with self.ranks.no_sync(self.run_student, last):  # ranks exchange gradients in the last backward pass
                    terms.append(self.backward(micro_batch, denominators, seed, first))
                if not proceed(len(terms), len(micro_batches)):
                    return None
        return terms

    def clip(self, optimizer, max_norm):
        """Undoes the loss scale and clips the gradient; returns the norm before clipping, 0-d fp32 on the device."""
        self.scaler.unscale_(optimizer)
        return torch.nn.utils.clip_grad_norm_(self.student.parameters(), max_norm)

    def step(self, optimizer):
        """Runs the optimiser step; with fp16, an overflow skips it and lowers the loss scale."""
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
