"""Several processes as one program: which of them this is, and what they must agree on.

`torchrun` starts them and says so in the environment; alone, every function here does nothing. Source: PyTorch's
`torch.distributed` (gloo on CPUs, nccl on GPUs).
"""

import contextlib
import datetime
import os

import torch
import torch.distributed as dist

from minidistil.errors import RankLost

PATIENCE = datetime.timedelta(hours=2)  # rank 0 evaluates and saves while the others wait


class Distributed:
    """rank 0 ... size - 1 of the processes of a run; `first` alone prints, evaluates and writes."""

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.first = self.rank == 0
        here = os.environ.get("LOCAL_WORLD_SIZE", "1")  # of them on this machine
        self.launcher = ["python"] if self.size == 1 else ["torchrun", "--nproc-per-node", here]

    def device(self, name):
        """The device's name for this process: with several on a machine, each has a GPU of its own."""
        several = self.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available()
        return f"cuda:{os.environ['LOCAL_RANK']}" if several else name

    def join(self, device):
        """Meets the other processes; they part when `train` ends."""
        if self.size > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)

    def leave(self):
        if self.size > 1:
            dist.destroy_process_group()

    def print0(self, line):
        """Prints on rank 0."""
        if self.first:
            print(line, flush=True)

    def sum(self, *numbers):
        """The sums of each of some numbers over all ranks, a list: the same bits on all."""
        if self.size == 1:
            return numbers
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        numbers = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(numbers)
        return numbers.tolist()

    def min(self, number):
        """The smallest of all ranks' integers."""
        if self.size == 1:
            return number
        numbers = [None] * self.size
        dist.all_gather_object(numbers, number)
        return min(numbers)

    def broadcast(self, make):
        """What `make()` gives on rank 0, on every rank."""
        if self.size == 1:
            return make()
        values = [make() if self.first else None]
        dist.broadcast_object_list(values)
        return values[0]

    def rank0_first(self, make):
        """Calls `make` on every rank: on rank 0, then on the first of each other machine, then on the rest.

        It may fetch or prepare what the others then find, whether machines share their folders or not.
        """
        if self.size == 1:
            return make()
        mine = 0 if self.first else 1 if os.environ["LOCAL_RANK"] == "0" else 2
        for turn in range(3):
            if turn == mine:
                made = make()
            dist.barrier()
        return made

    def wrap(self, model, device):
        """The model whose backward pass averages gradients over all ranks: a loss times `size` gives their sum."""
        if self.size == 1:
            return model
        devices = [device] if device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(
            model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    def no_sync(self, model, last):
        """A context in which gradients stay on their rank: for all micro-batches of an update but the last."""
        return contextlib.nullcontext() if last or self.size == 1 else model.no_sync()

    @contextlib.contextmanager
    def report_lost_rank(self, how_to_go_on):
        """Turns the loss of another rank into one line, which ends with `how_to_go_on`."""
        try:
            yield
        except RuntimeError as error:  # gloo and nccl have no class of their own in common
            lost = isinstance(error, dist.DistError) or "onnection" in str(error)
            if self.size == 1 or not lost:
                raise
            raise RankLost(f"rank {self.rank} has lost another rank, which has ended: {how_to_go_on}") from error
