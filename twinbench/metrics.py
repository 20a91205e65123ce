"""Task metrics on numpy arrays: raw values in [0, 1] or [-1, 1], never percent.

Written out in numpy because a bootstrap calls them tens of thousands of times.
"""

import numpy as np
from scipy.stats import rankdata


def score(metric: str, labels: np.ndarray, predictions: np.ndarray) -> float:
    """Score predictions against labels, both of shape (n,).

    A classification prediction of -1 (sent to another task's head) is wrong, whatever the label.

    Raises:
        ValueError: the metric is unknown, or the arrays differ in length or are empty.
    """
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}")
    if len(labels) != len(predictions) or len(labels) == 0:
        raise ValueError(
            f"{metric}: need as many predictions as labels, at least 1; got {len(predictions)}, {len(labels)}"
        )
    return float(METRICS[metric](np.asarray(labels), np.asarray(predictions)))


def _accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    return np.mean(labels == predictions)


def _f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """F1 of class 1; 0 where neither labels nor predictions hold it, as scikit-learn."""
    hits = np.sum((labels == 1) & (predictions == 1))
    total = np.sum(labels == 1) + np.sum(predictions == 1)
    return 2 * hits / total if total else 0.0


def _matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Matthews correlation, any number of classes (Gorodkin 2004); 0 where one side is constant."""
    classes = np.union1d(labels, predictions)
    true = labels[:, None] == classes
    given = predictions[:, None] == classes
    t, p, n = true.sum(0), given.sum(0), len(labels)
    covariance = n * np.sum(labels == predictions) - t @ p
    spread = np.sqrt(float(n**2 - t @ t) * float(n**2 - p @ p))
    return covariance / spread if spread else 0.0


def _pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Pearson correlation; 0 where one side is constant (nothing was told apart)."""
    x, y = labels - labels.mean(), predictions - predictions.mean()
    spread = np.sqrt((x @ x) * (y @ y))
    return (x @ y) / spread if spread > 0 else 0.0


def _spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
    return _pearson(rankdata(labels), rankdata(predictions))


METRICS = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
    "accuracy_f1": lambda y, p: (_accuracy(y, p) + _f1(y, p)) / 2,
    "pearson_spearman": lambda y, p: (_pearson(y, p) + _spearman(y, p)) / 2,
}
