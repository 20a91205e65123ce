"""Metrics equal scikit-learn's and SciPy's, also at their edges."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as reference

from twinbench.metrics import METRICS, score


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("wrong_heads", [False, True])
def test_classification(classes, wrong_heads):
    draw = np.random.default_rng(classes)
    labels = draw.integers(0, classes, 200).astype(float)
    predictions = np.where(draw.random(200) < 0.6, labels, draw.integers(0, classes, 200))
    if wrong_heads:
        predictions[::7] = -1
    assert score("accuracy", labels, predictions) == pytest.approx(reference.accuracy_score(labels, predictions))
    assert score("matthews", labels, predictions) == pytest.approx(reference.matthews_corrcoef(labels, predictions))
    f1 = reference.f1_score(labels == 1, predictions == 1)
    assert score("f1", labels, predictions) == pytest.approx(f1)
    assert score("accuracy_f1", labels, predictions) == pytest.approx((f1 + np.mean(labels == predictions)) / 2)


def test_correlations():
    draw = np.random.default_rng(0)
    labels = draw.normal(size=100).round(1)  # with ties
    predictions = labels + draw.normal(size=100)
    pearson, spearman = stats.pearsonr(labels, predictions)[0], stats.spearmanr(labels, predictions)[0]
    assert score("pearson", labels, predictions) == pytest.approx(pearson)
    assert score("spearman", labels, predictions) == pytest.approx(spearman)
    assert score("pearson_spearman", labels, predictions) == pytest.approx((pearson + spearman) / 2)


def test_constant_predictions_tell_nothing_apart():
    labels = np.array([0.0, 1.0, 1.0, 0.0])
    for metric in ("matthews", "pearson", "spearman"):
        assert score(metric, labels, np.ones(4)) == 0.0
    assert score("f1", np.zeros(3), np.zeros(3)) == 0.0


@pytest.mark.parametrize("metric", METRICS)
def test_perfect_predictions_score_one(metric):
    labels = np.array([0, 1, 1, 0, 1], dtype=float)
    assert score(metric, labels, labels.copy()) == pytest.approx(1.0)


def test_bad_input():
    with pytest.raises(ValueError, match="bleu"):
        score("bleu", np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match="as many"):
        score("accuracy", np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="at least 1"):
        score("accuracy", np.ones(0), np.ones(0))
