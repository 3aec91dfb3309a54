"""Chooses the micro-batch: on a GPU the largest that fits, found by trial; on a CPU one that is fast."""

import torch

from minidistil.errors import RankError, is_out_of_memory
from minidistil.losses import Denominators, counts

CPU_TOKENS = 2560  # per micro-batch: 3 % faster than 1,024; twice as many are 1 % faster but take 150 MiB more
MAX_TOKENS = 2**19  # per micro-batch: no GPU is faster with more, and element counts stay within 32 bits
RESERVED = 0.05  # share of the GPU's memory left for temporary use: evaluation, fragmentation


def divisors(n, limit):
    """Yields the divisors of `n` up to `limit` (at least 1), the largest first."""
    return (m for m in range(min(n, max(limit, 1)), 0, -1) if n % m == 0)


def largest_that_fits(n, limit, attempt):
    """Returns the largest divisor of `n` up to `limit` for which `attempt(divisor)` does not run out of memory.

    It begins with 1, which loads kernels and libraries while there is room for them.
    """
    if not fits(1, attempt):
        raise RankError("not even one sequence fits on this GPU: use a smaller --seq-len or student, or --device cpu")
    return next(size for size in divisors(n, limit) if size == 1 or fits(size, attempt))


def fits(size, attempt):
    """Whether `attempt(size)` does not run out of memory."""
    try:
        attempt(size)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False  # memory is freed after this clause: the exception still holds the tensors that did fit
    finally:
        torch.cuda.empty_cache()
    return True


def probe_memory(student, optimizer, forward_backward, micro_batch, device):
    """Allocates the peak memory of training, then removes it and the gradients.

    The peak is in the second micro-batch of an update, which adds its gradient to the first's, and after the first
    step, which allocates AdamW's two moments of each weight; several ranks also have gradient buckets.
    `forward_backward(*micro_batch)` runs a forward and a backward pass.
    """
    copies = 1 if optimizer.state else 3
    reserved = [torch.empty_like(p) for p in student.parameters() for _ in range(copies)]
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        reserved.append(torch.empty(int(RESERVED * memory), dtype=torch.uint8, device=device))
    try:
        for _ in range(2):
            forward_backward(*micro_batch)
    finally:
        student.zero_grad(set_to_none=True)
        del reserved
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # training reports its own peak


def choose_micro_batch(wanted, batch, share, sequences, state, distiller, optimizer, batches, compile=False):
    """Returns B, the sequences in a micro-batch: a divisor of `share`, a rank's sequences in an update.

    A number in `wanted` is used as it is. Otherwise, on a GPU, B is the largest that fits, because a small micro-batch
    leaves the GPU waiting for the host; on a CPU it is `batch`, or where `wanted` is "auto" a number that is fast. The
    result of a search goes into `state`: a resumed run starts its search there and finds the same, unless its GPU is
    smaller. With `compile` the models are compiled for this B.
    """
    device, ranks, T = distiller.device, distiller.ranks, sequences.T

    def attempt(size):
        ids, labels, *mask = (tensor[:size] for tensor in batches(state.update))
        if mask:  # other sentences may be longer: as many tokens as one may have, all of them real
            ids, labels = (tensor.repeat(1, -(-T // ids.shape[1]))[:, :T] for tensor in (ids, labels))
            mask = [torch.ones_like(ids, dtype=torch.bool)]
        batch = ids, labels, *mask
        inputs = batch, Denominators(size * T, max(counts(*batch)[1], 1), size), 0, 0  # seed and first sequence
        probe_memory(distiller.student, optimizer, distiller.backward, inputs, device)

    if wanted not in (None, "auto"):
        B = int(wanted)
    elif can_search(device):
        B = state.searched = min(ranks.gather(largest_that_fits(share, state.searched or MAX_TOKENS // T, attempt)))
    else:
        B = next(divisors(share, int(CPU_TOKENS / sequences.mean_length))) if wanted else batch
    if compile:
        distiller.compile()
        ranks.print0("compiling: this takes a minute")
        attempt(B)  # compiles, before the clock starts
    return B


def can_search(device):
    """Whether the search may run out of memory: a GPU raises an exception, a CPU would swap."""
    return device.type == "cuda"
