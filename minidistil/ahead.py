"""The next batch, made while the device works on this one."""

import concurrent.futures

import torch


class Ahead:
    """make(u) for u one after the other; for a GPU a thread makes the next meanwhile, so that it never waits for data.

    `make` returns numpy arrays; they become tensors, pinned for a GPU, so that copying them there waits for nothing. On
    a CPU the thread would only take time from the model.
    """

    def __init__(self, make, device):
        self.make, self.cuda = make, device.type == "cuda"
        self.pool, self.coming = concurrent.futures.ThreadPoolExecutor(1) if self.cuda else None, {}

    def __call__(self, u):
        if self.pool is None:
            return self._tensors(u)
        now = self.coming.pop(u, None) or self.pool.submit(self._tensors, u)
        self.coming = {u + 1: self.pool.submit(self._tensors, u + 1)}
        return now.result()

    def _tensors(self, u):
        tensors = [torch.from_numpy(array) for array in self.make(u)]
        return [tensor.pin_memory() for tensor in tensors] if self.cuda else tensors
