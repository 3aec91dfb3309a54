"""The metrics of GLUE, and of one's own labels, in fp64: each a share from 0 to 1, or a correlation from -1 to 1.

Predictions and labels are (N,) arrays, N at least 1: class ids, or scores for the correlations. An undefined
metric is 0, so that a constant prediction does not make a mean over tasks NaN.
"""

import numpy as np


def _arrays(predictions, labels):
    predictions, labels = np.asarray(predictions, np.float64), np.asarray(labels, np.float64)
    if predictions.shape != labels.shape or labels.ndim != 1 or not len(labels):
        raise ValueError(f"predictions {predictions.shape} and labels {labels.shape} are not both (N,), N at least 1")
    return predictions, labels


def accuracy(predictions, labels):
    """The share of predictions that are right."""
    predictions, labels = _arrays(predictions, labels)
    return float((predictions == labels).mean())


def f1(predictions, labels):
    """The harmonic mean of precision and recall of class 1; 0 where nothing is of class 1."""
    predictions, labels = _arrays(predictions, labels)
    positives = (predictions == 1).sum() + (labels == 1).sum()
    return float(2 * ((predictions == 1) & (labels == 1)).sum() / max(positives, 1))


def macro_f1(predictions, labels):
    """The mean over all classes that are predicted or right of the harmonic mean of precision and recall."""
    predictions, labels = _arrays(predictions, labels)
    classes = np.union1d(predictions, labels)
    return float(np.mean([f1(predictions == c, labels == c) for c in classes]))


def pearson(predictions, labels):
    """Pearson's correlation; 0 where either array is constant."""
    x, y = _arrays(predictions, labels)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    r = (x / np.linalg.norm(x)) @ (y / np.linalg.norm(y))
    return float(np.clip(r, -1, 1))  # rounding may exceed 1


matthews = pearson  # of two binary variables (Matthews 1975)


def spearman(predictions, labels):
    """Spearman's rank correlation; ties share their average rank; 0 where either array is constant."""
    x, y = _arrays(predictions, labels)
    return pearson(_ranks(x), _ranks(y))


def _ranks(x):
    """Returns the rank of each value from 1, equal values sharing their average; NaN stays NaN."""
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    return np.where(np.isnan(x), x, (np.cumsum(count) - (count - 1) / 2)[place])


METRICS = {each.__name__: each for each in (accuracy, f1, macro_f1, pearson, spearman)} | {"matthews": matthews}
