"""Several processes as one program: which of them this is, and what they must agree on.

`torchrun` starts them and says so in the environment; alone, every function here does nothing. Source: PyTorch's
`torch.distributed` (gloo on CPUs, nccl on GPUs).
"""

import contextlib
import datetime
import os
import signal
import sys
import threading

import torch
import torch.distributed as dist

from minidistil import launcher
from minidistil.errors import RankLost

PATIENCE = datetime.timedelta(hours=2)  # rank 0 evaluates and saves while the others wait


class Distributed:
    """rank 0 ... size - 1 of the processes of a run; `first` alone prints, evaluates and writes."""

    def __init__(self):
        self.rank, self.size, self.local, self.meeting = launcher.place()
        self.first = self.rank == 0
        here = os.environ.get("LOCAL_WORLD_SIZE", "1")  # of them on this machine
        self.launcher = ["python"] if self.size == 1 else ["torchrun", "--nproc-per-node", here]

    def device(self, name):
        """The device's name for this process: with several on a machine, each has a GPU of its own."""
        several = self.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available()
        return f"cuda:{self.local}" if several else name

    def join(self, device):
        """Meets the other processes; they part when `train` ends."""
        if self.size > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            backend = "nccl" if device.type == "cuda" else "gloo"
            before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would have to wait, too
            try:
                with self.waiting(f" at {self.meeting}; start them, or press Ctrl-C", seconds=2.0):
                    dist.init_process_group(backend, timeout=PATIENCE)
            except RuntimeError as error:
                way = "start all of them with a MASTER_ADDR and MASTER_PORT that are free and that each can reach"
                what = f"rank {self.rank} of {self.size} has not met the others at {self.meeting}"
                raise RankLost(f"{what} ({' '.join(str(error).split())[:200]}): {way}") from error
            finally:
                signal.signal(signal.SIGINT, before)

    @contextlib.contextmanager
    def waiting(self, how="", seconds=60.0):
        """Says, after so many seconds within, for whom this process waits."""
        line = f"rank {self.rank} of {self.size} waits for the others{how}"
        timer = threading.Timer(seconds, lambda: print(line, file=sys.stderr, flush=True))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

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
        with self.waiting():
            dist.all_reduce(numbers)
        return numbers.tolist()

    def min(self, number):
        """The smallest of all ranks' integers."""
        if self.size == 1:
            return number
        numbers = [None] * self.size
        with self.waiting():
            dist.all_gather_object(numbers, number)
        return min(numbers)

    def broadcast(self, make):
        """What `make()` gives on rank 0, on every rank."""
        if self.size == 1:
            return make()
        values = [make() if self.first else None]
        with self.waiting():
            dist.broadcast_object_list(values)
        return values[0]

    def rank0_first(self, make):
        """Calls `make` on every rank: on rank 0, then on the first of each other machine, then on the rest.

        It may fetch or prepare what the others then find, whether machines share their folders or not.
        """
        if self.size == 1:
            return make()
        mine = 0 if self.first else 1 if self.local == 0 else 2
        for turn in range(3):
            if turn == mine:
                made = make()
            with self.waiting():
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
