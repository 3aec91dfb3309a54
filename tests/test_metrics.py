"""GLUE's metrics: by hand, against scikit-learn and scipy, and where they are undefined."""

import numpy as np
import pytest

from minidistil.downstream.metrics import METRICS, accuracy, f1, matthews, pearson, spearman


def test_by_hand():
    predictions, labels = [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]  # 2 right and 1 wrong of each prediction
    assert accuracy(predictions, labels) == 4 / 6
    assert f1(predictions, labels) == pytest.approx(4 / 6, abs=1e-15)  # precision and recall are both 2 / 3
    assert matthews(predictions, labels) == pytest.approx(3 / 9, abs=1e-15)  # (2 * 2 - 1 * 1) / sqrt(3 * 3 * 3 * 3)
    assert f1([1, 1, 1, 0], [1, 0, 0, 0]) == 0.5  # precision 1 / 3, recall 1
    assert pearson([1, 2, 3], [1, 2, 6]) == pytest.approx(5 / np.sqrt(2 * 14), abs=1e-15)
    # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: covariance 4.5, variances 4.5 and 5
    assert spearman([0, 7, 7, 9], [-1, 3, 2, 1e6]) == pytest.approx(4.5 / np.sqrt(4.5 * 5), abs=1e-15)
    for name, metric in METRICS.items():
        assert metric([0, 1, 1], [0, 1, 1]) == pytest.approx(1.0, abs=1e-15), name
        assert type(metric(np.float32([0, 1]), np.int64([0, 1]))) is float
    for metric in (matthews, pearson, spearman):
        assert metric([0, 1, 0, 1], [1, 0, 1, 0]) == pytest.approx(-1.0, abs=1e-15)


def test_what_is_undefined_is_zero():
    for metric in (matthews, pearson, spearman):
        assert metric([0.1] * 7, [0, 1, 1, 0, 1, 0, 1]) == 0.0
        assert metric([0, 1, 1], [1, 1, 1]) == 0.0
        assert metric([1], [1]) == 0.0
    assert f1([0, 0], [0, 0]) == f1([0, 0], [1, 1]) == f1([1, 1], [0, 0]) == 0.0


def test_nan_stays_nan():
    for metric in (pearson, spearman):
        assert np.isnan(metric([0.5, np.nan, 1.0], [1.0, 2.0, 3.0]))


@pytest.mark.parametrize("shapes", [((0,), (0,)), ((3,), (2,)), ((3, 1), (3,)), ((3, 1), (3, 1)), ((1,), (3,))])
def test_refuses_other_shapes(shapes):
    """(N, 1) against (N,) would be broadcast to N x N comparisons."""
    for metric in METRICS.values():
        with pytest.raises(ValueError, match="not both"):
            metric(np.zeros(shapes[0]), np.zeros(shapes[1]))


@pytest.mark.filterwarnings("ignore")  # scikit-learn warns where a metric is undefined
def test_against_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for case in range(60):
        n, share = int(rng.integers(1, 40)), rng.choice([0.0, 0.02, 0.3, 0.5, 0.9, 1.0], 2)  # many with one class only
        predictions, labels = (rng.random((2, n)) < share[:, None]).astype(np.int64)
        for metric, theirs in (
            (accuracy, sklearn.accuracy_score), (f1, sklearn.f1_score), (matthews, sklearn.matthews_corrcoef),
        ):  # fmt: skip
            assert metric(predictions, labels) == pytest.approx(theirs(labels, predictions), abs=1e-13), case
    three = rng.integers(0, 3, (2, 100))
    assert accuracy(*three) == sklearn.accuracy_score(*three)


@pytest.mark.filterwarnings("ignore")  # scipy warns where one side is constant
def test_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    for case in range(300):
        n = int(rng.integers(2, 60))
        x, y = rng.normal(size=(2, n)) * 10.0 ** rng.integers(-6, 6) + rng.choice([0, 3, 1000])
        if case % 2:  # ties, and sometimes nothing else
            x = rng.integers(0, rng.integers(1, 6), n).astype(float)
        if case % 3 == 0:
            y = x * rng.choice([-1, 1]) + y * 0.01
        for metric, theirs in ((pearson, stats.pearsonr), (spearman, stats.spearmanr)):
            expected = theirs(x, y).statistic
            assert metric(x, y) == pytest.approx(0.0 if np.isnan(expected) else expected, abs=1e-9), case
        assert spearman(x, y) == pytest.approx(spearman(np.exp(x / np.abs(x).max(initial=1.0)), y), abs=1e-12)
