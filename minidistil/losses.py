"""The distillation objective in plain PyTorch, and the path that computes it without keeping logits.

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


# ---- the reference: correct in any dtype, keeps everything


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


# ---- the path that training takes: projection and loss together, a few rows at a time

CHUNK_BYTES = 32 << 20  # one buffer of logits: large enough for fast matrix products, small enough to stay in cache
CACHE_ROWS = 4  # rows turned into gradients together: 4 x 30,522 fp32 = 0.5 MB, so that four such stay in a core's L2


class _LinearDistillLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk of logits exists; backward only scales them."""

    @staticmethod
    def forward(ctx, h_s, W_s, b_s, h_t, W_t, b_t, labels, tau, kl_weight, ce_weight, mse_weight):
        device = h_s.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_s.dtype
        wide = torch.promote_types(dtype, torch.float32)  # of softmax and sums
        N, V = len(h_s), len(W_s)
        # G is the gradient in units of `unit`, which enters in fp32 after the product: a half-precision G would
        # otherwise underflow, its entries being a probability divided by thousands of rows
        unit = max(abs(kl_weight) * tau, abs(ce_weight), abs(mse_weight)) or 1.0
        in_units = [weight / unit for weight in (kl_weight, ce_weight, mse_weight)]
        chunk = max(1, min(N, CHUNK_BYTES // (V * dtype.itemsize)))
        step = min(CACHE_ROWS, chunk) if device == "cpu" else chunk  # a GPU wants few large steps
        with torch.autocast(device, enabled=False):
            models = [(h_s, W_s.to(dtype), b_s.to(dtype), h_s.new_empty(chunk, V, dtype=dtype))]
            if h_t is not None:
                models += [(h_t, W_t.to(dtype), b_t.to(dtype), h_s.new_empty(chunk, V, dtype=dtype))]
            scratch = [h_s.new_empty(step, V, dtype=wide) for _ in range(4)]
            sums = h_s.new_zeros(3, dtype=wide)  # kl, ce, mse
            dh = torch.empty_like(h_s)
            dW, db = torch.zeros_like(W_s, dtype=wide), torch.zeros_like(b_s, dtype=wide)
            for start in range(0, N, chunk):
                rows = slice(start, min(start + chunk, N))
                # logits / tau of student and, where there is one, teacher: (R, V) each
                logits = [
                    torch.addmm(b, h[rows].to(dtype), W.t(), beta=1 / tau, alpha=1 / tau, out=buffer[: len(h[rows])])
                    for h, W, b, buffer in models
                ]
                for r in range(0, len(logits[0]), step):
                    block = [x[r : r + step] for x in logits]
                    sums += _losses_and_gradient(block, labels[rows][r : r + step], tau, *in_units, scratch)
                G = logits[0]
                dh[rows] = torch.mm(G, models[0][1]).mul_(unit)
                if dtype == wide:
                    dW.addmm_(G.t(), models[0][0][rows], alpha=unit)
                else:
                    dW.add_(torch.mm(G.t(), models[0][0][rows].to(dtype)), alpha=unit)
                db.add_(G.sum(0, dtype=wide), alpha=unit)
        ctx.save_for_backward(dh, dW.to(W_s.dtype), db.to(b_s.dtype))
        ctx.mark_non_differentiable(sums)
        return sums @ sums.new_tensor([kl_weight, ce_weight, mse_weight]), sums

    @staticmethod
    def backward(ctx, upstream, _):
        gradients = ctx.saved_tensors
        # reading one number is free on a CPU and spares a pass over dW; on a GPU it would stall the queue
        if upstream.device.type != "cpu" or upstream.item() != 1.0:
            gradients = tuple(g * upstream.to(g.dtype) for g in gradients)
        return *gradients, *([None] * 8)


def _losses_and_gradient(logits, labels, tau, kl_weight, ce_weight, mse_weight, scratch):
    """Returns the sums (kl, ce, mse) of a few rows, and overwrites their student logits with the gradient.

    logits: [s / tau, t / tau], each (R, V), or [s] with tau = 1; labels (R,). With a and b their distances from the
    row maxima, and Z the sums of their exponentials, nothing large is ever subtracted from something large:
        KL = sum_v p (b - a) - log Z_b + log Z_a
    Every pass goes over half a megabyte in cache, into memory that is there already: allocating costs more than exp.
    """
    a, b, q, p = (x[: len(labels)] for x in scratch)
    wide = a.dtype
    if logits[0].dtype == wide:
        a, b = logits[0], logits[-1]
    else:
        a, b = a.copy_(logits[0]), b.copy_(logits[-1])
    kl = mse = a.new_zeros(())
    a_max = a.amax(-1, keepdim=True)
    a.sub_(a_max)
    labelled = (labels != IGNORE).nonzero().squeeze(1) if ce_weight else labels[:0]
    log_q1 = torch.log_softmax(a[labelled] * tau, -1)  # at temperature 1, and only where there is a label
    if len(logits) == 1:
        gradient = a.zero_()
    else:
        b_max = b.amax(-1, keepdim=True)
        b.sub_(b_max)
        torch.exp(a, out=q)
        torch.exp(b, out=p)
        Z_a, Z_b = q.sum(-1, keepdim=True), p.sum(-1, keepdim=True)
        p.div_(Z_b)
        b.sub_(a)
        kl = torch.dot(p.flatten(), b.flatten()) + (Z_a.log() - Z_b.log()).sum()
        gradient = torch.sub(q.mul_(kl_weight * tau / Z_a), p, alpha=kl_weight * tau, out=a)
        if mse_weight:
            difference = b.add_(b_max - a_max).mul_(-tau)  # s - t
            mse = torch.dot(difference.flatten(), difference.flatten())
            gradient.add_(difference, alpha=2 * mse_weight)
    targets = labels[labelled, None]
    ce = -log_q1.gather(1, targets).sum()
    q1 = log_q1.exp_().scatter_add_(1, targets, targets.new_full(targets.shape, -1, dtype=wide))
    gradient.index_add_(0, labelled, q1, alpha=ce_weight)
    if gradient is not logits[0]:
        logits[0].copy_(gradient)
    return torch.stack([kl * tau**2, ce, mse])


def linear_distill_loss(h_s, W_s, b_s, h_t, W_t, b_t, labels, tau, kl_weight, ce_weight, mse_weight=0.0):
    """Vocabulary projection and logit losses in one: never keeps (N, V) logits of either model, nor a graph over them.

    h_s (N, C_s), W_s (V, C_s), b_s (V): student rows after the head's transform, decoder weight, bias; differentiable.
    h_t (N, C_t), W_t (V, C_t), b_t (V): the teacher's, without gradient; all None where no teacher is needed.
    labels (N,) int64: the original ids of masked tokens, else -100. Weights are floats: alpha / denominator.
    Returns (loss, kl, ce, mse): loss = kl_weight * kl + ce_weight * ce + mse_weight * mse is differentiable; the three
    sums over rows, in nats (kl with its tau^2), are for the log. Matrix products follow autocast; softmax and sums are
    fp32 or better.
    """
    if any(x is not None and x.requires_grad for x in (h_t, W_t, b_t)):
        raise ValueError("the teacher must be frozen: its rows, weight and bias take no gradient")
    if h_t is None:
        tau, kl_weight, mse_weight = 1.0, 0.0, 0.0
    loss, sums = _LinearDistillLoss.apply(
        h_s, W_s, b_s, h_t, W_t, b_t, labels, tau, kl_weight, ce_weight, mse_weight
    )
    return loss, *sums


# ---- the whole objective


def distillation_loss(objective, counts, labels, student, h_s, teacher=None, h_t=None):
    """One micro-batch's share of the update's loss.

    labels (B, T) int64; h_s, h_t (B, T, C) last hidden states of the `MaskedLM`s `student` and `teacher`. The shares of
    all micro-batches add up to L. Returns (loss, parts): parts is fp32 (4,), this micro-batch's share of the means
    (kl, ce, cos, mse), unweighted.
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
        objective.alpha_ce / kd_denominator, objective.alpha_mlm / mlm_denominator,
        objective.alpha_mse / kd_denominator,
    )  # fmt: skip
    parts = torch.stack([kl / kd_denominator, ce / mlm_denominator, cos.detach(), mse / kd_denominator]).float()
    return loss + objective.alpha_cos * cos, parts.detach()
