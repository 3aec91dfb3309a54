"""The micro-batch that suits: on a GPU the largest that it holds, found by trying; on a CPU one that is fast."""

import torch

from minidistil.data import IGNORE
from minidistil.errors import UserError
from minidistil.losses import Denominators

CPU_TOKENS = 2560  # in a micro-batch: 3 % faster than 1,024, and twice as many gain 1 % and take 150 MiB more
MOST_TOKENS = 2**19  # in a micro-batch: no GPU is faster with more, and element counts stay within 32 bits
SPARE = 0.05  # share of the GPU's memory that is left for what comes and goes: evaluation, fragments


def divisors(n, most):
    """Yields the divisors of `n` that are at most `most` (at least 1), the largest first."""
    return (m for m in range(min(n, max(most, 1)), 0, -1) if n % m == 0)


def largest_that_fits(n, most, attempt):
    """Returns the largest divisor of `n`, at most `most`, for which `attempt(divisor)` does not run out of memory."""
    for size in divisors(n, most):
        try:
            attempt(size)
        except torch.OutOfMemoryError:
            pass  # freed after this clause, in which the exception still holds the tensors that did fit
        else:
            return size
        finally:
            torch.cuda.empty_cache()
    raise UserError("not even one sequence fits on this GPU: use a smaller --seq-len or student, or --device cpu")


def probe_memory(student, optimizer, learn, micro_batch, device):
    """Takes the memory of the fullest moment of training, and leaves no trace: gradients are gone afterwards.

    That is the second micro-batch of an update, when a gradient is added to another, beside AdamW's two moments of each
    weight, which it has after its first step, and, with several ranks, the gradients' buckets. `learn(*micro_batch)` is
    a forward and a backward pass.
    """
    copies = 1 if optimizer.state else 3
    taken = [torch.empty_like(p) for p in student.parameters() for _ in range(copies)]
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        taken.append(torch.empty(int(SPARE * memory), dtype=torch.uint8, device=device))
    try:
        for _ in range(2):
            learn(*micro_batch)
    finally:
        student.zero_grad(set_to_none=True)
        del taken
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # what training reports is its own peak


def choose_micro_batch(settings, state, distiller, optimizer, batches):
    """Returns B, how many sequences to take at once: a divisor of a rank's share of an update; compiles, if asked to.

    A number as --micro-batch gives it. Else, on a GPU, the most that fit, since a few sequences at a time leave the GPU
    waiting for the host; on a CPU --batch, or with `auto` a number that is fast. Puts what a search found into `state`:
    a resumed run starts its search there, and finds the same unless the GPU is smaller.
    """
    T, share, device, ranks = settings.seq_len, settings.batch * settings.accum, distiller.device, distiller.ranks

    def attempt(size):
        ids, labels = (tensor[:size] for tensor in batches(state.update))
        masked = int((labels != IGNORE).sum())
        inputs = ids, labels, masked, Denominators(size * T, max(masked, 1))
        probe_memory(distiller.student, optimizer, distiller.backward, inputs, device)

    if settings.micro_batch not in (None, "auto"):
        B = int(settings.micro_batch)
    elif can_search(device):
        B = state.searched = ranks.min(largest_that_fits(share, state.searched or MOST_TOKENS // T, attempt))
    else:
        B = next(divisors(share, CPU_TOKENS // T)) if settings.micro_batch else settings.batch
    if settings.compile:
        distiller.compile()
        ranks.print0("compiling: this takes a minute")
        attempt(B)  # before the clock starts
    return B


def can_search(device):
    """Whether running out of memory can be tried: a GPU refuses, a CPU would swap."""
    return device.type == "cuda"
