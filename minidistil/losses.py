"""The distillation objective: what is minimised, in plain PyTorch, and the path that computes it without keeping logits.

    L = alpha_ce  * tau^2 * mean over R of KL(softmax(t / tau) || softmax(s / tau))     Hinton et al. 2015, section 2
      + alpha_mlm * mean over masked of -log softmax(s)[label]                          Devlin et al. 2018, section 3.1
      + alpha_cos * mean over all tokens of 1 - cos(h_s, h_t)                           Sanh et al. 2019, section 3
      + alpha_mse * mean over R of sum_v (s - t)^2

for student logits s, teacher logits t and last hidden states h. R is every token (the published recipe) or the masked
ones (`kd_rows`: all | masked). Every mean has the denominator of the *whole update*, so that the gradient does not
depend on how an update is split into micro-batches. The factor tau^2 undoes the 1 / tau^2 by which the softened
gradient shrinks: d(tau^2 KL)/ds = tau (softmax(s / tau) - softmax(t / tau)).

Legend:  N rows   C width   V vocabulary   s, t student and teacher logits   tau temperature   lse log-sum-exp
"""

import dataclasses

import torch
import torch.nn.functional as F

IGNORE = -100  # label of a token that was not masked


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weights of the four terms; the defaults are those of the released DistilBERT (5 / 2 / 1 / 0, tau = 2)."""

    alpha_ce: float = 5.0
    alpha_mlm: float = 2.0
    alpha_cos: float = 1.0
    alpha_mse: float = 0.0
    temperature: float = 2.0
    kd_rows: str = "all"

    @property
    def on_logits(self):
        """True where teacher logits are needed."""
        return bool(self.alpha_ce or self.alpha_mse)

    @property
    def needs_teacher(self):
        return self.on_logits or bool(self.alpha_cos)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Denominators of one update, over all its micro-batches: tokens, and masked tokens."""

    tokens: int
    masked: int

    def kd_rows(self, objective):
        return self.tokens if objective.kd_rows == "all" else self.masked


# ---- the reference: correct in any dtype, keeps everything -----------------------------------------------------------


def logit_losses_ref(s, t, labels, tau):
    """Sums over rows of tau^2 KL, cross-entropy and squared difference for logits s, t (N, V) and labels (N,).

    In nats, as 0-d tensors (kl, ce, mse). `t` may be None: then kl and mse are zero. Rows labelled -100 have no CE.
    """
    ce = F.cross_entropy(s, labels, ignore_index=IGNORE, reduction="sum")
    if t is None:
        return s.new_zeros(()), ce, s.new_zeros(())
    log_q, log_p = F.log_softmax(s / tau, -1), F.log_softmax(t / tau, -1)
    kl = (log_p.exp() * (log_p - log_q)).sum() * tau**2
    return kl, ce, (s - t).square().sum()


# ---- the path that training takes: projection and loss together, a few rows at a time --------------------------------

CHUNK_BYTES = 32 << 20  # one buffer of logits: large enough for fast matrix products, small enough to stay in cache
CACHE_ROWS = 8  # rows whose logits are turned into gradients together: 8 x 30,522 fp32 = 1 MB, inside a core's L2


class _LinearDistillLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk of logits exists; backward only scales them."""

    @staticmethod
    def forward(ctx, h_s, W_s, b_s, h_t, W_t, b_t, labels, tau, kl_weight, ce_weight, mse_weight):
        device = h_s.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_s.dtype
        stat_dtype = torch.promote_types(dtype, torch.float32)  # losses and statistics: at least fp32
        with torch.autocast(device, enabled=False):
            W_s16, b_s16 = W_s.detach().to(dtype), b_s.detach().to(dtype)
            if h_t is not None:
                W_t, b_t = W_t.to(dtype), b_t.to(dtype)
            N, V = len(h_s), len(W_s)
            # G is the gradient in units of `unit`, which enters in fp32 after the product: a half-precision G would
            # otherwise underflow, its entries being a probability divided by thousands of rows
            unit = max(abs(kl_weight) * tau, abs(ce_weight), abs(mse_weight)) or 1.0
            kl, ce, mse = (torch.zeros((), dtype=stat_dtype, device=h_s.device) for _ in range(3))
            dh = torch.empty_like(h_s)
            dW = torch.zeros_like(W_s, dtype=stat_dtype)
            db = torch.zeros_like(b_s, dtype=stat_dtype)
            chunk = max(CACHE_ROWS, CHUNK_BYTES // (V * W_s16.element_size()))
            s_buffer = torch.empty(min(chunk, N), V, dtype=dtype, device=h_s.device)
            t_buffer = torch.empty_like(s_buffer) if h_t is not None else None
            for start in range(0, N, chunk):
                rows = slice(start, min(start + chunk, N))
                h = h_s[rows].to(dtype)
                G = torch.addmm(b_s16, h, W_s16.t(), out=s_buffer[: len(h)])  # student logits; becomes dL/ds
                if h_t is not None:
                    t = torch.addmm(b_t, h_t[rows].to(dtype), W_t.t(), out=t_buffer[: len(h)])
                for r in range(0, len(h), CACHE_ROWS):
                    block = slice(r, r + CACHE_ROWS)
                    sums = _losses_and_gradient(
                        G[block], t[block] if h_t is not None else None, labels[rows][block],
                        tau, kl_weight / unit, ce_weight / unit, mse_weight / unit, stat_dtype,
                    )  # fmt: skip
                    kl, ce, mse = kl + sums[0], ce + sums[1], mse + sums[2]
                dh[rows] = torch.mm(G, W_s16).mul_(unit)
                if dtype == stat_dtype:
                    dW.addmm_(G.t(), h, alpha=unit)
                else:
                    dW.add_(torch.mm(G.t(), h), alpha=unit)
                db.add_(G.sum(0, dtype=stat_dtype), alpha=unit)
        ctx.save_for_backward(dh, dW.to(W_s.dtype), db.to(b_s.dtype))
        loss = kl_weight * kl + ce_weight * ce + mse_weight * mse
        ctx.mark_non_differentiable(kl, ce, mse)
        return loss, kl, ce, mse

    @staticmethod
    def backward(ctx, upstream, *_):
        gradients = ctx.saved_tensors
        # reading one number is free on a CPU and spares a pass over dW; on a GPU it would stall the queue
        if upstream.device.type != "cpu" or upstream.item() != 1.0:
            gradients = tuple(g * upstream.to(g.dtype) for g in gradients)
        return *gradients, *([None] * 8)


def _losses_and_gradient(s, t, labels, tau, kl_weight, ce_weight, mse_weight, stat_dtype):
    """Returns (kl, ce, mse) sums of a few rows and overwrites their student logits s (R, V) with the gradient.

    With everything relative to the row maxima (a = s / tau, b = t / tau):
        KL = sum_v p (b - a) - lse_b + lse_a,    lse = max - log(max probability)
    The teacher's logits are left as they are.
    """
    zero = torch.zeros((), dtype=stat_dtype, device=s.device)
    kl = ce = mse = zero
    gradient = None
    if t is not None:
        a, b = s.to(stat_dtype) / tau, t.to(stat_dtype) / tau
        if kl_weight:
            q, p = torch.softmax(a, -1), torch.softmax(b, -1)
            lse_a, lse_b = (x.amax(-1) - probability.amax(-1).log() for x, probability in ((a, q), (b, p)))
            b -= a
            kl = (torch.linalg.vecdot(p, b) - lse_b + lse_a).sum() * tau**2
            gradient = q.sub_(p).mul_(kl_weight * tau)
        else:
            b -= a
        if mse_weight:
            b *= -tau  # s - t
            mse = torch.linalg.vecdot(b, b).sum()
            gradient = b.mul_(2 * mse_weight) if gradient is None else gradient.add_(b, alpha=2 * mse_weight)
    labelled = (labels != IGNORE).nonzero().squeeze(1)
    if ce_weight and len(labelled):
        log_q1 = torch.log_softmax(s[labelled].to(stat_dtype), -1)
        targets = labels[labelled, None]
        ce = -log_q1.gather(1, targets).sum()
        q1 = log_q1.exp_()
        q1.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=stat_dtype))
        q1 *= ce_weight
        if gradient is None:
            gradient = torch.zeros_like(s, dtype=stat_dtype)
        gradient.index_add_(0, labelled, q1)
    s.zero_() if gradient is None else s.copy_(gradient)
    return kl, ce, mse


def linear_distill_loss(h_s, W_s, b_s, h_t, W_t, b_t, labels, tau, kl_weight, ce_weight, mse_weight=0.0):
    """Vocabulary projection and logit losses in one: never keeps (N, V) logits of either model, nor a graph over them.

    h_s (N, C_s), W_s (V, C_s), b_s (V): student rows after the head's transform, decoder weight and bias; differentiable.
    h_t (N, C_t), W_t (V, C_t), b_t (V): the teacher's, without gradient; all None where no teacher is needed.
    labels (N,) int64: the original ids of masked tokens, else -100. Weights are floats: alpha / denominator.
    Returns (loss, kl, ce, mse): loss = kl_weight * kl + ce_weight * ce + mse_weight * mse is differentiable; the three
    sums over rows (kl with its tau^2) are for the log. Arithmetic follows autocast; softmax and sums are fp32 or better.
    """
    if any(x is not None and x.requires_grad for x in (h_t, W_t, b_t)):
        raise ValueError("the teacher must be frozen: its rows, weight and bias take no gradient")
    return _LinearDistillLoss.apply(h_s, W_s, b_s, h_t, W_t, b_t, labels, tau, kl_weight, ce_weight, mse_weight)


# ---- the whole objective ---------------------------------------------------------------------------------------------


def distillation_loss(objective, counts, labels, student, h_s, teacher=None, h_t=None):
    """One micro-batch's share of the update's loss.

    labels (B, T) int64; h_s, h_t (B, T, C) last hidden states of `student` and `teacher` (`MaskedLM`s). The shares of
    all micro-batches add up to L. Returns (loss, parts): parts is a float tensor (4,) on the device with this
    micro-batch's share of the means (kl, ce, cos, mse), unweighted.
    """
    h_s_rows, row_labels = h_s.flatten(0, 1), labels.flatten()
    h_t_rows = None if h_t is None else h_t.flatten(0, 1)
    cos = h_s.new_zeros((), dtype=torch.float32)
    if objective.alpha_cos:
        cos = (1 - F.cosine_similarity(h_s_rows.float(), h_t_rows.float(), dim=-1)).sum() / counts.tokens
    if objective.kd_rows == "masked" or not objective.on_logits:
        # no other row is scored, so no other row meets the vocabulary
        chosen = (row_labels != IGNORE).nonzero().squeeze(1)
        row_labels, h_s_rows = row_labels[chosen], h_s_rows[chosen]
        h_t_rows = None if h_t_rows is None else h_t_rows[chosen]
    on_teacher = (None, None, None)
    if objective.on_logits:
        with torch.no_grad():
            on_teacher = (teacher.head(h_t_rows), *teacher.decoder)
    kd_denominator, mlm_denominator = max(counts.kd_rows(objective), 1), max(counts.masked, 1)
    loss, kl, ce, mse = linear_distill_loss(
        student.head(h_s_rows), *student.decoder, *on_teacher, row_labels, objective.temperature,
        objective.alpha_ce / kd_denominator, objective.alpha_mlm / mlm_denominator, objective.alpha_mse / kd_denominator,
    )  # fmt: skip
    parts = torch.stack([kl / kd_denominator, ce / mlm_denominator, cos.detach(), mse / kd_denominator]).float()
    return loss + objective.alpha_cos * cos, parts.detach()
