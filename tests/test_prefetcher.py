"""Batches made ahead: the ones that were asked for, each once."""

import threading
import types

import numpy as np
import pytest
import torch

from minidistil.data import Prefetcher


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_ahead_gives_what_was_asked_for(kind, monkeypatch):
    """In any order; with a GPU each is made once, in another thread, before it is asked for."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    made = []

    def make(u):
        made.append((u, threading.current_thread() is threading.main_thread()))
        return np.full(3, u), np.full(3, -u)

    take = Prefetcher(make, types.SimpleNamespace(type=kind))
    for u in (0, 1, 2, 7, 8):
        ids, labels = take(u)
        assert ids.tolist() == [u] * 3 and labels.tolist() == [-u] * 3
    if kind == "cpu":
        assert made == [(u, True) for u in (0, 1, 2, 7, 8)]
    else:
        take.pool.shutdown()
        assert made == [(u, False) for u in (0, 1, 2, 3, 7, 8, 9)]


def test_ahead_tells_of_an_error():
    take = Prefetcher(lambda u: 1 / 0, types.SimpleNamespace(type="cuda"))
    with pytest.raises(ZeroDivisionError):
        take(0)
