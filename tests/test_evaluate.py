"""Held-out metrics: how many rows of logits exist at a time."""

import numpy as np
import pytest

from minidistil import evaluate
from minidistil.data import IGNORE
from minidistil.model import Config, LanguageModel


def test_rows_at_a_time():
    """256 of BERT's and GPT-2's words, as ever; of XLM-R's 250,002 no more than 128 MiB of logits."""
    assert [evaluate.rows_at_a_time(V) for V in (30522, 50257, 131072)] == [256] * 3
    assert evaluate.rows_at_a_time(250002) == 134 and evaluate.rows_at_a_time(10**9) == 1


@pytest.mark.parametrize("fit, rows", [(7, [7] * 6 + [6]), (1000, [48])])
def test_metrics_do_not_depend_on_the_rows_at_a_time(fit, rows, monkeypatch):
    """48 masked positions, 7 at a time or all: teacher's logits once on their own, then with the student's."""
    ids = np.random.default_rng(0).integers(0, 1000, (6, 16))
    labels = np.where(np.arange(16) < 8, ids, IGNORE)
    teacher, student = (LanguageModel(Config(1000, 16, 0, 1, 2, 16, 16), seed=seed) for seed in (0, 1))
    want = evaluate.HeldOut(ids, labels, teacher).evaluate(student)
    projected, linear = [], evaluate.F.linear

    def watched(x, W, b):
        if len(W) == 1000:
            projected.append(len(x))
        return linear(x, W, b)

    monkeypatch.setattr(evaluate, "LOGIT_BYTES", fit * 1000 * 4)
    monkeypatch.setattr(evaluate.F, "linear", watched)
    got = evaluate.HeldOut(ids, labels, teacher).evaluate(student)
    assert got == pytest.approx(want, abs=2e-6) and got["kl"] > 0
    assert projected == rows + [n for n in rows for _ in "st"]
