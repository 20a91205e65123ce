"""Task metrics on numpy arrays: raw values in [0, 1] or [-1, 1], never percent.

Each metric is written once, for resampled examples: ``counts`` (n, samples) says how often each of n examples stands in
each sample, ``labels`` are (n,), ``predictions`` (runs, n), and the scores (runs, samples). A score is the case of one
sample that holds every example once; a bootstrap of 1,000 samples is a few matrix products.
"""

from collections.abc import Sequence

import numpy as np

from twinbench.system.mistakes import Mistake

ROUNDING = 1e-12


def score(metric: str, labels: np.ndarray, predictions: np.ndarray) -> float:
    """Score predictions against labels, both of shape (n,).

    A classification prediction of -1 (sent to another task's head) is wrong, whatever the label.

    Raises:
        ValueError: the metric is unknown, the arrays differ in length or are empty, or a prediction is not finite.
    """
    if metric not in METRICS:
        raise Mistake(f"unknown metric {metric!r}; known: {', '.join(METRICS)}")
    labels, predictions = np.asarray(labels, dtype=float), np.asarray(predictions, dtype=float)
    if len(labels) != len(predictions) or len(labels) == 0:
        raise Mistake(
            f"{metric}: need as many predictions as labels, at least 1; got {len(predictions)}, {len(labels)}"
        )
    wrong = np.flatnonzero(~np.isfinite(predictions))
    if len(wrong):
        first = f"the first is {predictions[wrong[0]]} in row {wrong[0]}"
        raise Mistake(f"{metric}: {len(wrong)} of {len(predictions)} predictions are not finite; {first}")
    return METRICS[metric](np.ones((len(labels), 1)), labels, predictions[None]).item()


def best_constant(metric: str, labels: np.ndarray) -> float:
    """The one answer for all rows that scores best: a class, or for a regression the mean, whose correlation is 0."""
    labels = np.asarray(labels, dtype=float)
    if metric in CORRELATIONS:
        return float(labels.mean())
    answers = np.unique(labels)
    scores = METRICS[metric](np.ones((len(labels), 1)), labels, np.repeat(answers[:, None], len(labels), 1))
    return float(answers[scores[:, 0].argmax()])


def predictions(logits: np.ndarray, classes: bool) -> np.ndarray:
    """Logits (n, outputs) as class numbers, or as values where the task is a regression; (n,), float64."""
    return (logits.argmax(1) if classes else logits[:, 0]).astype("float64")


def check_fit(metrics: Sequence[str], classes: Sequence[str] | None, who: str) -> None:
    """Refuse metrics that say nothing about a task's predictions.

    Args:
        classes: names by class id, or None for regression.
        who: begins the message.

    Raises:
        ValueError: there is no metric, one is unknown, or one is for another number of classes.
    """
    if not metrics or set(metrics) - METRICS.keys():
        raise Mistake(f"{who}: metrics must be of {', '.join(METRICS)}; got {list(metrics)}")
    legal = [name for name in METRICS if (name in CORRELATIONS) == (classes is None)]
    if classes is not None and len(classes) != 2:
        legal = [name for name in legal if name not in OF_TWO_CLASSES]
    for metric in (metric for metric in metrics if metric not in legal):
        kind = "is a regression" if classes is None else f"has {len(classes)} classes"
        needs = "two classes" if metric in OF_TWO_CLASSES else "numbers" if metric in CORRELATIONS else "classes"
        raise Mistake(f"{who}: metric {metric} is for {needs}, and the task {kind}; choose of {', '.join(legal)}")


def _accuracy(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    return (predictions == labels).astype(float) @ counts / len(labels)


def _f1(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """F1 of class 1; 0 where neither labels nor predictions hold it, as scikit-learn."""
    return _f1_of(1, counts, labels, predictions)[0]


def _f1_macro(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Mean F1 of the classes that labels or predictions hold, as scikit-learn; -1 is no class."""
    classes = [label for label in np.union1d(labels, predictions) if label >= 0]
    found, there = zip(*(_f1_of(label, counts, labels, predictions) for label in classes), strict=True)
    return sum(found) / sum(there)


def _f1_of(label: float, counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> tuple:
    """F1 of one class, and whether labels or predictions hold it, both (runs, samples)."""
    true, given = (labels == label).astype(float), (predictions == label).astype(float)
    total = true @ counts + given @ counts
    return np.divide(2 * (true * given) @ counts, total, out=np.zeros_like(total), where=total > 0), total > 0


def _matthews(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Matthews correlation, any number of classes (Gorodkin 2004); 0 where one side is constant."""
    n = len(labels)
    hits = (predictions == labels).astype(float) @ counts
    both, true2, given2 = np.zeros_like(hits), np.zeros(counts.shape[1]), np.zeros_like(hits)
    for label in np.union1d(labels, predictions):
        true = (labels == label).astype(float) @ counts
        given = (predictions == label).astype(float) @ counts
        both, true2, given2 = both + true * given, true2 + true**2, given2 + given**2
    spread = np.sqrt((n**2 - true2) * (n**2 - given2))
    return np.divide(n * hits - both, spread, out=np.zeros_like(hits), where=spread > 0)


def _pearson(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Pearson correlation; 0 where one side is constant (nothing was told apart)."""
    n = len(labels)
    x = labels - labels.mean()
    y = predictions - predictions.mean(axis=1, keepdims=True)
    mean_x, mean_y = x @ counts / n, y @ counts / n
    covariance = (x * y) @ counts / n - mean_x * mean_y
    x, y = x**2, y**2
    var_x, var_y = x @ counts / n - mean_x**2, y @ counts / n - mean_y**2
    return _correlation(covariance, var_x, var_y, x.max(), y.max(axis=1, keepdims=True))


def _spearman(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Ranks are of the sample itself: a value's mean rank is the count of the smaller ones and half of its own."""
    n = len(labels)
    tied = _grouped(counts, labels)
    ranks = np.cumsum(tied, axis=0) - tied / 2 - n / 2  # centred: weighted by the counts they sum to 0
    weighted = counts * ranks[np.unique(labels, return_inverse=True)[1]]
    var_x, untied = _rank_variance(tied, n), _rank_variance(counts, n)
    scores = []
    for prediction in predictions:
        tied, weight = _grouped(counts, prediction), _grouped(weighted, prediction)
        above = np.einsum("gs,gs->s", weight, np.cumsum(tied, axis=0)) - np.einsum("gs,gs->s", weight, tied) / 2
        var_y = untied if len(tied) == n else _rank_variance(tied, n)
        scores.append(_correlation(above / n, var_x, var_y, n**2, n**2))
    return np.array(scores)


def _grouped(amounts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sums of ``amounts`` (n, samples) over equal ``values`` (n,), smallest value first."""
    order = np.argsort(values)
    starts = np.flatnonzero(np.r_[True, np.diff(values[order]) > 0])
    ordered = amounts[order]
    return ordered if len(starts) == len(values) else np.add.reduceat(ordered, starts, axis=0)


def _rank_variance(tied: np.ndarray, n: int) -> np.ndarray:
    """Variance of mean ranks 1..n where ``tied`` (groups, samples) examples share a rank."""
    return (n**3 - np.einsum("gs,gs,gs->s", tied, tied, tied)) / (12 * n)


def _correlation(covariance, var_x, var_y, square_x, square_y) -> np.ndarray:
    """Covariance over the spreads; 0 where a side is constant: its variance is rounding beside the largest square."""
    varied = (var_x > ROUNDING * square_x) & (var_y > ROUNDING * square_y)
    spread = np.sqrt(np.maximum(var_x * var_y, 0))
    return np.divide(covariance, spread, out=np.zeros_like(spread), where=varied)


METRICS = {
    "accuracy": _accuracy,
    "f1": _f1,
    "f1_macro": _f1_macro,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
    "accuracy_f1": lambda c, y, p: (_accuracy(c, y, p) + _f1(c, y, p)) / 2,
    "pearson_spearman": lambda c, y, p: (_pearson(c, y, p) + _spearman(c, y, p)) / 2,
}
CORRELATIONS = ("pearson", "spearman", "pearson_spearman")  # for regression; the others are for classes
OF_TWO_CLASSES = ("f1", "accuracy_f1")
