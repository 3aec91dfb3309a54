"""The processes of a distributed run: rank, collectives, gradient averaging.

`torchrun` starts the processes and sets environment variables; in a single process every function here does nothing.
Source: PyTorch's `torch.distributed` (gloo on CPUs, nccl on GPUs).
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

TIMEOUT = datetime.timedelta(hours=2)  # the others wait while rank 0 evaluates and saves


class Distributed:
    """This process among the `size` processes of a run; only the `first` (rank 0) prints, evaluates and writes."""

    def __init__(self):
        self.rank, self.size, self.local, self.meeting = launcher.place()
        self.first = self.rank == 0
        local_size = os.environ.get("LOCAL_WORLD_SIZE", "1")  # processes on this machine
        self.launcher = ["python"] if self.size == 1 else ["torchrun", "--nproc-per-node", local_size]

    def device(self, name):
        """Returns the name of this process's device: each process on a machine has its own GPU."""
        several = self.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available()
        return f"cuda:{self.local}" if several else name

    def join(self, device):
        """Joins the process group; `train` leaves it at its end."""
        if self.size > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            backend = "nccl" if device.type == "cuda" else "gloo"
            before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would have to wait, too
            try:
                with self.waiting(f" at {self.meeting}; start them, or press Ctrl-C", seconds=2.0):
                    dist.init_process_group(backend, timeout=TIMEOUT)
            except RuntimeError as error:
                way = "start all of them with a MASTER_ADDR and MASTER_PORT that are free and that each can reach"
                what = f"rank {self.rank} of {self.size} has not met the others at {self.meeting}"
                raise RankLost(f"{what} ({' '.join(str(error).split())[:200]}): {way}") from error
            finally:
                signal.signal(signal.SIGINT, before)

    @contextlib.contextmanager
    def waiting(self, how="", seconds=60.0):
        """Prints, after so many seconds inside, that this process waits for the others."""
        line = f"rank {self.rank} of {self.size} waits for the others{how}"
        timer = threading.Timer(seconds, lambda: print(line, file=sys.stderr, flush=True))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def leave(self):
        """Leaves the process group and ends gloo's threads; no wrapped model may be left.

        A thread of gloo needs Python's lock (the GIL) to release the tensor that it has exchanged. Whoever drops the
        last reference to the group waits for the threads: Python gives up the lock meanwhile, a wrapped model does not,
        and then both wait for ever. Source: https://github.com/pytorch/pytorch/issues/56297.
        """
        if self.size > 1:
            dist.destroy_process_group()

    def print0(self, line):
        """Prints on rank 0."""
        if self.first:
            print(line, flush=True)

    def sum(self, *numbers):
        """Returns the sum of each number over all ranks, a list with the same bits on every rank."""
        if self.size == 1:
            return numbers
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        numbers = torch.tensor(numbers, dtype=torch.float64, device=device)
        with self.waiting():
            dist.all_reduce(numbers)
        return numbers.tolist()

    def gather(self, value):
        """Returns the values of all ranks, a list on every rank; they are pickled."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with self.waiting():
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, make):
        """Returns on every rank what `make()` returns on rank 0."""
        if self.size == 1:
            return make()
        values = [make() if self.first else None]
        with self.waiting():
            dist.broadcast_object_list(values)
        return values[0]

    def rank0_first(self, make):
        """Calls `make` on rank 0, then on the first rank of each other machine, then on the rest; returns its result.

        An earlier rank may download or prepare what the later ones then find, with or without shared folders.
        """
        if self.size == 1:
            return make()
        own_turn = 0 if self.first else 1 if self.local == 0 else 2
        for turn in range(3):
            if turn == own_turn:
                result = make()
            with self.waiting():
                dist.barrier()
        return result

    def wrap(self, model, device):
        """Returns the model whose backward pass averages gradients over ranks; a loss times `size` gives their sum."""
        if self.size == 1:
            return model
        devices = [device] if device.type == "cuda" else None
        # the model has no buffers, and the option not to exchange them has another name in each version of PyTorch
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def no_sync(self, model, last):
        """Returns a context without gradient exchange, for all micro-batches of an update but the last."""
        return contextlib.nullcontext() if last or self.size == 1 else model.no_sync()

    @contextlib.contextmanager
    def report_lost_rank(self, hint):
        """Turns the loss of another rank into a one-line error that ends with `hint`."""
        try:
            yield
        except RuntimeError as error:  # gloo and nccl have no common class
            lost = isinstance(error, dist.DistError) or "onnection" in str(error)
            if self.size == 1 or not lost:
                raise
            raise RankLost(f"rank {self.rank} has lost another rank, which has ended: {hint}") from error
