"""Metrics equal scikit-learn's and SciPy's, also at their edges."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as reference

from twinbench.tasks.metrics import CORRELATIONS, METRICS, OF_TWO_CLASSES, check_fit, score


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
    macro = reference.f1_score(labels, predictions, average="macro", labels=range(classes))
    assert score("f1_macro", labels, predictions) == pytest.approx(macro)
    assert score("accuracy_f1", labels, predictions) == pytest.approx((f1 + np.mean(labels == predictions)) / 2)


def test_correlations():
    draw = np.random.default_rng(0)
    labels = draw.normal(size=100).round(1)  # with ties
    predictions = labels + draw.normal(size=100)
    pearson, spearman = stats.pearsonr(labels, predictions)[0], stats.spearmanr(labels, predictions)[0]
    assert score("pearson", labels, predictions) == pytest.approx(pearson)
    assert score("spearman", labels, predictions) == pytest.approx(spearman)
    assert score("pearson_spearman", labels, predictions) == pytest.approx((pearson + spearman) / 2)


def test_macro_f1_is_of_the_classes_that_occur():
    """One that neither labels nor predictions hold is left out; one that is only predicted counts as 0."""
    labels, predictions = np.array([0.0, 0, 2, 2]), np.array([0.0, 3, 2, 2])
    assert score("f1_macro", labels, predictions) == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert score("f1_macro", labels, np.array([0.0, -1, 2, 2])) == pytest.approx((2 / 3 + 1) / 2)


@pytest.mark.parametrize("metric", ["matthews", "pearson", "spearman", "pearson_spearman"])
def test_a_constant_side_tells_nothing_apart(metric):
    """Also where the mean of equal numbers is not that number: ten times 0.1, seven times 1/3."""
    for n, value in ((4, 1.0), (10, 0.1), (7, 1 / 3), (1000, 1e6 + 0.1)):
        varied, constant = np.arange(n) % 3 * 1.0, np.full(n, value)
        assert score(metric, varied, constant) == 0.0
        assert score(metric, constant, varied) == 0.0
        for other in (constant, np.full(n, -2.3)):
            assert score(metric, constant, other) == 0.0
    assert score("f1", np.zeros(3), np.zeros(3)) == 0.0


def test_a_correlation_has_no_scale():
    """Neither of its own, nor that of the runs beside it."""
    draw = np.random.default_rng(0)
    labels, noise = draw.normal(size=40), draw.normal(size=40)
    expected = stats.pearsonr(labels, noise)[0]
    for scale in (1e-13, 1e13):
        assert score("pearson", scale * labels, noise) == pytest.approx(expected)
        assert score("pearson", labels, scale * noise) == pytest.approx(expected)
    found = METRICS["pearson"](np.ones((40, 1)), labels, np.stack([noise, 1e9 * noise]))
    np.testing.assert_allclose(found[:, 0], expected)


def test_predictions_in_a_narrow_range_are_told_apart():
    labels = np.arange(8.0)
    for offset, scale in ((0, 1e-12), (1, 1e-9), (1e6, 1e-3)):
        assert score("pearson", labels, offset + scale * labels) == pytest.approx(1, abs=1e-6)


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


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_predictions_that_are_no_numbers_are_refused(metric, wrong):
    predictions = np.array([0, wrong, 1, wrong])
    with pytest.raises(ValueError, match=f"{metric}: 2 of 4 predictions are not finite; the first is {wrong} in row 1"):
        score(metric, np.array([0, 1, 1, 0]), predictions)


@pytest.mark.parametrize("metric", METRICS)
def test_counts_are_repeated_examples(metric):
    """Each sample and run scores as if its examples were written out as often as they are counted, ties, a constant
    side, wrong heads and samples of one class included."""
    draw = np.random.default_rng(1)
    n = 40
    classes = metric not in CORRELATIONS
    labels = draw.integers(0, 2 if metric in OF_TWO_CLASSES else 4, n).astype(float)
    labels = labels if classes else np.round(draw.normal(size=n), 1)
    noise = draw.integers(0, 4, n) if classes else draw.normal(size=n)
    wrong_heads = np.where(draw.random(n) < 0.3, -1, labels)
    predictions = np.stack([labels, np.roll(labels, 1), wrong_heads, noise, np.full(n, 0.1), np.full(n, 1.0)])
    drawn = draw.integers(0, n, size=(n, 20))
    drawn[:, 0], drawn[:, 1] = np.arange(n), 7  # as they are, and one example alone
    counts = np.stack([np.bincount(column, minlength=n) for column in drawn.T], axis=1).astype(float)
    expected = [[score(metric, labels[column], run[column]) for column in drawn.T] for run in predictions]
    np.testing.assert_allclose(METRICS[metric](counts, labels, predictions), expected, atol=1e-9)


def test_scores_are_computed_in_double_precision_whatever_comes():
    draw = np.random.default_rng(0)
    labels = draw.normal(1000, 1, 5000).astype("float32")
    predictions = (labels + draw.normal(size=5000)).astype("float32")
    exact = stats.pearsonr(labels.astype(float), predictions.astype(float))[0]
    assert score("pearson", labels, predictions) == pytest.approx(exact, abs=1e-12)
    assert score("accuracy", [True, False, True], [1, 0, 0]) == 2 / 3
    assert type(score("accuracy", [1], [1])) is float


KINDS = {None: "pearson", 2: "f1 accuracy_f1 accuracy f1_macro matthews", 3: "accuracy f1_macro matthews"}
KINDS[None] += " spearman pearson_spearman"


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("number", KINDS)
def test_a_metric_must_fit_the_classes(metric, number):
    classes = None if number is None else list("abc")[:number]
    if metric in KINDS[number].split():
        check_fit([metric], classes, "task x")
        return
    kind = "is a regression" if number is None else f"has {number} classes"
    needs = "two classes" if "f1" in metric and metric != "f1_macro" else "classes" if number is None else "numbers"
    good = KINDS[number].split()[0]
    with pytest.raises(ValueError) as error:
        check_fit([good, metric], classes, "task x")
    said, legal = str(error.value).split("; choose of ")
    assert said == f"task x: metric {metric} is for {needs}, and the task {kind}"
    assert sorted(legal.split(", ")) == sorted(KINDS[number].split())


@pytest.mark.parametrize("metrics", [[], ["bleu"], ["accuracy", "bleu"]])
def test_metrics_must_be_known(metrics):
    with pytest.raises(ValueError, match=r"task x: metrics must be of accuracy, f1, .*; got \["):
        check_fit(metrics, ["a", "b"], "task x")
