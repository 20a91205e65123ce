"""Bootstrap intervals: their arithmetic on samples one can count, and the draws that runs share."""

import numpy as np
import pandas as pd
import pytest

from twinbench.report import bootstrap
from twinbench.report.blocks import Block, Row, Run
from twinbench.tasks.metrics import score

N = 50
TOPIC = ("topic", "accuracy")


def frame(task: str = "topic", *, seed: int = 0, n: int = N, quality: float = 0.7) -> pd.DataFrame:
    """Predictions of two classes; ``seed`` draws what is wrong, never the labels."""
    labels = np.random.default_rng(9).integers(0, 2, n).astype(float)
    right = np.random.default_rng(seed).random(n) < quality
    return pd.DataFrame(
        {"task": task, "row": np.arange(n), "label": labels, "prediction": np.where(right, labels, 1 - labels)}
    )


def run(run_id: str) -> Run:
    return Run(run_id, None, {}, {}, {}, [])


def block(suite_id: str, columns: list, *runs: str, split: str = "test", protocol: str = "strict") -> Block:
    rows = [Row(name, name, True, [run(name)]) for name in runs]
    beside = {name: [] for name in ("experts", "failed", "outdated", "individual", "base")}
    return Block("toy", suite_id, split, "float32", protocol, columns, rows, **beside)


def test_an_interval_leaves_out_a_fortieth_on_either_side():
    assert bootstrap.interval(np.arange(1001)) == (25, 975)


def test_p_is_twice_the_smaller_side_one_added():
    samples = np.r_[np.full(10, -1.0), np.full(990, 2.0)]
    low, high, p = bootstrap.paired(samples, np.zeros(1000))
    assert p == pytest.approx(2 * 11 / 1001) and (low, high) == (2, 2)
    assert bootstrap.paired(-samples, np.zeros(1000))[2] == p
    assert bootstrap.paired(np.ones(1000), np.zeros(1000))[2] == pytest.approx(2 / 1001), "never 0"
    halves = np.r_[np.full(500, -1.0), np.full(500, 1.0)]
    assert bootstrap.paired(halves, np.zeros(1000))[2] == 1, "and never above 1"
    ties = np.r_[np.full(10, -1.0), np.full(4, 0.0), np.full(986, 1.0)]
    assert bootstrap.paired(ties, np.zeros(1000))[2] == pytest.approx(2 * 15 / 1001), "a tie is on both sides"


def test_rounding_is_no_difference_and_what_is_above_it_is():
    samples = np.random.default_rng(0).normal(90, 1, 1000)
    assert bootstrap.paired(samples + 1e-13, samples) == (0.0, 0.0, 1.0)
    assert bootstrap.paired(samples - 1e-13, samples) == (0.0, 0.0, 1.0)
    nothing = np.zeros(1000)
    for sign in (1, -1):
        assert bootstrap.paired(sign * (nothing + 0.99e-9), nothing)[2] == 1
        assert bootstrap.paired(sign * (nothing + 1e-9), nothing)[2] < 0.01


def test_samples_that_are_compared_stay_as_they_are():
    samples, reference = np.full(1000, 1e-10), np.zeros(1000)
    bootstrap.paired(samples, reference)
    assert (samples == 1e-10).all() and (reference == 0).all()


def test_averages_divide_by_the_expert_and_weigh_tasks_alike():
    columns = [("a", "accuracy"), ("b", "accuracy")]
    draws = {
        ("run", columns[0]): np.array([0.2, 0.4]),
        ("run", columns[1]): np.array([0.3, 0.3]),
        ("again", columns[0]): np.array([0.4, 0.6]),
        ("again", columns[1]): np.array([0.5, 0.1]),
        ("one", columns[0]): np.array([0.5, 0.8]),
        ("one", columns[1]): np.array([0.6, 0.4]),
        ("two", columns[0]): np.array([0.7, 0.8]),
        ("two", columns[1]): np.array([0.2, 0.6]),
    }
    alone = bootstrap.averages([run("run")], [run("one")], columns, draws)
    np.testing.assert_allclose(alone, 100 * np.array([(0.2 / 0.5 + 0.3 / 0.6) / 2, (0.4 / 0.8 + 0.3 / 0.4) / 2]))
    both = bootstrap.averages([run("run"), run("again")], [run("one"), run("two")], columns, draws)
    np.testing.assert_allclose(both, 100 * np.array([(0.3 / 0.6 + 0.4 / 0.4) / 2, (0.5 / 0.8 + 0.2 / 0.5) / 2]))


def test_no_average_without_every_draw_or_over_a_divisor_of_nothing():
    draws = {("run", TOPIC): np.array([0.2, 0.4]), ("one", TOPIC): np.array([0.5, 0.8])}
    assert bootstrap.averages([run("run")], [], [TOPIC], draws) is None
    assert bootstrap.averages([], [run("one")], [TOPIC], draws) is None
    assert bootstrap.averages([run("run"), run("lost")], [run("one")], [TOPIC], draws) is None
    assert bootstrap.averages([run("run")], [run("one"), run("lost")], [TOPIC], draws) is None
    assert bootstrap.averages([run("run")], [run("one")], [], draws) is None
    for nothing in (0.0, -0.1):
        wrong = draws | {("one", TOPIC): np.array([0.5, nothing])}
        assert bootstrap.averages([run("run")], [run("one")], [TOPIC], wrong) is None


def test_resampled_scores_spread_as_the_metric_does():
    """The mean of the resamples is the score; their variance that of a proportion, p (1 - p) / n."""
    wide = frame(n=400)
    right = float((wide["label"] == wide["prediction"]).mean())
    found = bootstrap.resample({"a": wide}, [TOPIC])["a", TOPIC]
    assert found.shape == (bootstrap.SAMPLES,) == (10_000,)
    assert found.mean() == pytest.approx(right, abs=0.004)
    assert found.std() == pytest.approx(np.sqrt(right * (1 - right) / 400), rel=0.1)
    assert set(np.round(found * 400)) <= set(range(401)), "each resample has as many examples as there are"


def test_runs_share_their_draws_and_tasks_do_not():
    """A run that is right where another is wrong scores what that one lacks, in every resample."""
    one = frame()
    other = one.assign(prediction=1 - one["prediction"])
    found = bootstrap.resample({"a": one, "b": other}, [TOPIC])
    np.testing.assert_allclose(found["a", TOPIC] + found["b", TOPIC], 1)
    two_tasks = {"a": pd.concat([frame("topic"), frame("mood")])}
    both = bootstrap.resample(two_tasks, [TOPIC, ("mood", "accuracy")])
    assert abs(np.corrcoef(both["a", TOPIC], both["a", ("mood", "accuracy")])[0, 1]) < 0.15
    assert np.array_equal(both["a", TOPIC], found["a", TOPIC]), "another task changes no draw"
    longer = bootstrap.resample({"a": frame(n=N + 1)}, [TOPIC])["a", TOPIC]
    assert abs(np.corrcoef(longer, found["a", TOPIC])[0, 1]) < 0.15


def test_draws_do_not_depend_on_how_many_are_held_at_once(monkeypatch):
    whole = np.hstack(list(bootstrap._counts("topic", N)))
    assert whole.shape == (N, 10_000) and (whole.sum(axis=0) == N).all() and whole.max() < 12
    assert next(bootstrap._counts("topic", 2_000_000)).shape == (2_000_000, 2), "no more than 32 MB at once"
    monkeypatch.setattr(bootstrap, "CELLS", 7 * N)
    pieces = list(bootstrap._counts("topic", N))
    assert [piece.shape[1] for piece in pieces] == [7] * 1428 + [4]
    assert all((piece.sum(axis=0) == N).all() for piece in pieces)
    assert len({piece.tobytes() for piece in pieces}) == len(pieces), "no piece repeats another's draws"
    monkeypatch.setattr(bootstrap, "CELLS", 1)
    assert [piece.shape[1] for piece in bootstrap._counts("topic", N)] == [1] * 10_000


def test_every_example_is_drawn_as_often_and_every_report_has_the_same_draws():
    whole = np.hstack(list(bootstrap._counts("topic", N)))
    assert whole.sum(axis=1) == pytest.approx(np.full(N, 10_000), rel=0.05)
    assert whole.var() == pytest.approx(1 - 1 / N, rel=0.05), "with replacement"
    assert whole[:12, 0].tolist() == [1, 1, 0, 0, 1, 0, 3, 3, 3, 1, 2, 1]


def test_examples_are_paired_by_row_whatever_the_order_of_the_file():
    """Two runs, one of them shuffled: as if it were not, and so for a reader of one file alone."""
    one, other = frame(seed=1), frame(seed=2)
    mixed = other.sample(frac=1, random_state=0)
    assert mixed["row"].tolist() != other["row"].tolist()
    expected = bootstrap.resample({"a": one, "b": other}, [TOPIC])
    for frames in ({"a": one, "b": mixed}, {"b": mixed, "a": one}):
        found = bootstrap.resample(frames, [TOPIC])
        for run_id in "ab":
            np.testing.assert_array_equal(found[run_id, TOPIC], expected[run_id, TOPIC])


@pytest.mark.parametrize("column", ["label", "row"])
def test_runs_on_other_rows_or_labels_are_not_paired(column):
    other = frame(seed=2)
    other.loc[N - 1, column] = 1 - other.loc[N - 1, column] if column == "label" else N
    with pytest.raises(ValueError, match="predictions of runs a and b, task topic: other rows or labels"):
        bootstrap.resample({"a": frame(), "b": other}, [TOPIC])
    with pytest.raises(ValueError, match="other rows or labels"):
        bootstrap.resample({"a": frame(), "b": frame().iloc[:-1]}, [TOPIC])


def test_a_run_without_the_task_is_left_out():
    found = bootstrap.resample({"a": frame("mood"), "b": frame(), "c": frame(seed=3)}, [TOPIC])
    assert found.keys() == {("b", TOPIC), ("c", TOPIC)}
    expected = bootstrap.resample({"c": frame(seed=3)}, [TOPIC])["c", TOPIC]
    np.testing.assert_array_equal(found["c", TOPIC], expected)
    assert bootstrap.resample({"a": frame("mood")}, [TOPIC]) == bootstrap.resample({}, [TOPIC]) == {}


def test_scores_without_labels_are_resampled_as_means():
    """What lm-eval gives is a score per document: the metric is their mean, whatever its name."""
    draw, column = np.random.default_rng(0), ("bbq", "rouge2")
    frames = {
        run_id: pd.DataFrame({"task": "bbq", "row": range(40), "label": np.nan, "prediction": draw.random(40)})
        for run_id in ("a", "b")
    }
    found = bootstrap.resample(frames, [column])
    for run_id, given in frames.items():
        samples = found[run_id, column]
        assert samples.shape == (bootstrap.SAMPLES,)
        assert samples.mean() == pytest.approx(given["prediction"].mean(), abs=0.01)
        assert samples.std() == pytest.approx(given["prediction"].std(ddof=0) / np.sqrt(40), rel=0.1)
    same = bootstrap.resample({"a": frames["a"], "c": frames["a"].assign()}, [column])
    assert np.array_equal(same["a", column], same["c", column]), "the same draws"
    labelled = {run_id: given.assign(label=1.0) for run_id, given in frames.items()}
    assert bootstrap.resample(labelled, [column]) == {}
    some = {run_id: given.assign(label=[1.0] + [np.nan] * 39) for run_id, given in frames.items()}
    assert bootstrap.resample(some, [column]) == {}


def test_each_suite_and_split_is_resampled_by_itself():
    """Blocks of one suite_id and split share what they are compared by; other suites have other rows."""
    shorter = frame(n=N - 5)
    frames = {"a": frame(), "b": frame(seed=2), "c": shorter, "d": shorter.assign(label=0.0)}
    found, constants = bootstrap.draws(
        frames,
        [
            block("new", [TOPIC], "a", "lost"),
            block("new", [TOPIC], "b", protocol="blind"),
            block("new", [TOPIC], "c", split="validation"),
            block("old", [TOPIC], "d"),
        ],
    )
    assert {run_id for run_id, _ in found} == {*"abcd", *(run.run_id for run in constants.values())}
    assert constants.keys() == {("new", "test"), ("new", "validation"), ("old", "test")}
    with pytest.raises(ValueError, match="cannot pair"):
        bootstrap.draws(frames, [block("new", [TOPIC], "a"), block("new", [TOPIC], "c", protocol="blind")])


def test_a_statistic_is_the_metric():
    labels, given = frame()["label"].to_numpy(), frame()["prediction"].to_numpy()
    rule = bootstrap.statistic("matthews", labels)
    assert rule(np.ones((N, 1)), labels, given[None])[0, 0] == score("matthews", labels, given)
    assert bootstrap.statistic("rouge2", labels) is None
    mean = bootstrap.statistic("rouge2", np.full(N, np.nan))
    assert mean(np.ones((N, 1)), labels, given[None])[0, 0] == given.mean()
