"""Which precision a run chooses: by the time of products, on an idle computer and on a busy one."""

import random

import pytest
import torch

from minidistil import precision
from minidistil.precision import CLEAR, choose_dtype

CPU, RUNS = torch.device("cpu"), 40


class Clock:
    """A clock that only products move: `fp32` and `bf16` seconds each, and `delay()` more for what else runs."""

    def __init__(self, monkeypatch, fp32, bf16, delay=lambda: 0.0):
        self.now, self.products = 0.0, 0
        monkeypatch.setattr(precision.F, "linear", self.linear)
        self.seconds, self.delay = {torch.float32: fp32, torch.bfloat16: bf16}, delay

    def linear(self, x, weight):
        assert x.dtype == weight.dtype and x.shape[1] == weight.shape[1]
        self.now += self.seconds[x.dtype] + self.delay()
        self.products += 1

    def __call__(self):
        return self.now


@pytest.mark.parametrize("fp32, bf16, expected", [
    (4e-3, 1e-3, "bf16"), (4e-3, 4e-3 / (CLEAR + 0.01), "bf16"), (4e-3, 4e-3 / (CLEAR - 0.01), "fp32"),
    (2e-3, 4e-3, "fp32"), (1e-3, 1.0, "fp32"),
])  # fmt: skip
def test_a_clear_ratio_decides(fp32, bf16, expected, monkeypatch):
    clock = Clock(monkeypatch, fp32, bf16)
    dtype, why = choose_dtype("auto", CPU, clock)
    assert dtype == expected and why == f"bf16 products are {fp32 / bf16:.1f} times as fast as fp32's"
    assert clock.products == 2 * (1 + precision.ROUNDS)  # nothing disturbed: no longer than needed
    # a given one is not questioned
    assert choose_dtype("fp32", CPU, clock) == ("fp32", "") and choose_dtype("bf16", CPU, clock) == ("bf16", "")


@pytest.mark.parametrize("fp32, bf16, expected", [(1e-3, 4e-4, "bf16"), (1e-3, 1e-3, "fp32"), (1e-3, 2e-3, "fp32")])
def test_a_busy_computer_does_not_decide(fp32, bf16, expected, monkeypatch):
    """Two products in three are interrupted for up to thirty times as long as they take."""
    rng = random.Random(0)
    delays = lambda: rng.choice((0.0, 1.0, 1.0)) * rng.uniform(1e-4, 30e-3)  # noqa: E731
    chosen = {choose_dtype("auto", CPU, Clock(monkeypatch, fp32, bf16, delays))[0] for _ in range(RUNS)}
    assert chosen == {expected}


def test_it_ends_where_nothing_is_steady(monkeypatch):
    growing = iter(range(1, 10**6))
    clock = Clock(monkeypatch, 1e-3, 1e-3, lambda: 1e-3 * next(growing))
    assert choose_dtype("auto", CPU, clock)[0] == "fp32" and clock.now < 2 * precision.SECONDS


def test_this_computer():
    """Real products give a ratio that a processor can have."""
    ratio = precision.bf16_speed_up()
    assert 0.001 < ratio < 100
    assert choose_dtype("auto", CPU)[0] in ("fp32", "bf16")
