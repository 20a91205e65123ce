"""Dead experts, the chance-corrected average, Holm's correction, tiers, and how often an interval holds the truth."""

import numpy as np
import pandas as pd
import pytest

from support.results import TASKS, add_run, guess, raw, table, truth
from twinbench.report import bootstrap, living, tables
from twinbench.report.blocks import Block, Row, Run
from twinbench.tasks.metrics import best_constant, score

COLUMN = ("topic", "accuracy")


def run(run_id: str, **scores: float) -> Run:
    return Run(run_id, None, {(task, "accuracy"): value for task, value in scores.items()}, {}, {}, [])


@pytest.mark.parametrize(
    ("metric", "labels", "answer"),
    [
        ("accuracy", [0, 2, 2, 1], 2),
        ("f1", [0, 0, 0, 1], 1),
        ("accuracy_f1", [0, 0, 1], 1),
        ("accuracy_f1", [0] * 9 + [1], 0),
        ("f1_macro", [0, 0, 1], 0),
        ("matthews", [0, 1, 1], 0),
        ("pearson_spearman", [1.0, 2.0, 6.0], 3),
    ],
)
def test_the_best_constant_answer_is_the_best_of_all(metric, labels, answer):
    labels = np.array(labels, dtype=float)
    assert best_constant(metric, labels) == answer
    best = score(metric, labels, np.full(len(labels), best_constant(metric, labels)))
    assert all(score(metric, labels, np.full(len(labels), other)) <= best + 1e-12 for other in np.unique(labels))


def test_an_expert_that_answers_the_same_always_is_dead_and_counts_in_no_average(tmp_path):
    """By the files of a report: the expert of ``topic`` answers its commonest class, one method answers it well."""
    labels = truth()["topic"]
    dead = guess(0.9) | {"topic": np.full(len(labels), best_constant(TASKS["topic"], labels))}
    add_run(tmp_path, "a0", "individual", dead)
    add_run(tmp_path, "a1", "average", guess(0.6))
    lives = table(tmp_path, "normalized")
    kept = [task for task in TASKS if task != "topic"]
    assert lives.loc["average", "average"] == pytest.approx(lives.loc["average", kept].mean())
    assert lives.loc["average", "worst_task"] in kept and lives.loc["average", "topic"] > 100
    assert table(tmp_path, "raw").loc["average", "average"] == pytest.approx(
        100 * np.mean([raw(guess(0.6))[task] for task in kept])
    )


def test_the_table_of_experts_has_their_lead_over_the_constant_answer_and_the_base():
    columns = [("good", "accuracy"), ("dead", "accuracy"), ("idle", "accuracy"), ("unknown", "accuracy")]
    spread = np.linspace(-0.02, 0.02, 1001)
    values, base = {"good": 0.9, "dead": 0.51, "idle": 0.9}, {"good": 0.5, "dead": 0.5, "idle": 0.89}
    draws = {("i", (task, "accuracy")): value + spread for task, value in values.items()}
    draws |= {("c", (task, "accuracy")): np.full(1001, 0.5) for task in values}
    draws |= {("base", (task, "accuracy")): np.full(1001, value) for task, value in base.items()}
    individual = run("i", **values, unknown=0.7)
    others = [run("base", **base, unknown=0.4)]
    block = Block("toy", "id", "test", "float32", "strict", columns, [], [], [], [], [individual], others)
    found = living.checked(block, draws, run("c", good=0.5, dead=0.5, idle=0.5))
    assert found.living == [columns[0], columns[3]]
    lines = found.table.set_index("task")
    wanted = {"good": "alive", "dead": "dead", "idle": "dead", "unknown": "not tested"}
    assert lines["expert is"].to_dict() == wanted, "the idle one knows no more than its base"
    assert lines.loc["good", "over best constant"] == pytest.approx(40)
    assert lines.loc["good", ["over base_low", "over base_high"]].tolist() == pytest.approx([38.1, 41.9])
    assert lines.loc["dead", "over best constant_low"] < 0 and pd.isna(lines.loc["unknown", "over base_low"])
    assert living.dead({"living": found.table}) == ["dead", "idle"] and living.dead({}) == []
    assert living.checked(block, {}, None).living == columns, "nothing is known against any"


def test_rows_without_labels_may_say_what_the_best_constant_answer_scores():
    """lm-eval judges answers one by one: prediction is each one's score."""
    columns = [("choice", "acc"), ("old", "acc")]
    block = Block("toy", "id", "test", "float32", "strict", columns, [], [], [], [], [], [])
    rows = {"row": [0, 1, 2, 3], "label": np.nan, "prediction": [1.0, 1.0, 0.0, 1.0], "split": "test"}
    frame = pd.DataFrame(rows | {"task": "choice", "constant": [1.0, 0.0, 0.0, 0.0]})
    found, answers = bootstrap.constant({"i": pd.concat([frame, pd.DataFrame(rows | {"task": "old"})])}, block)
    assert found.scores == {columns[0]: 0.25} and answers["prediction"].tolist() == [1.0, 0.0, 0.0, 0.0]
    draws = bootstrap.resample({"i": frame, found.run_id: answers}, columns)
    assert draws[found.run_id, columns[0]].mean() == pytest.approx(0.25, abs=0.01)


def test_the_chance_corrected_average_is_0_for_the_constant_answer_and_100_for_the_expert():
    columns = [("a", "accuracy"), ("b", "accuracy")]
    scores = {"i": (0.9, 0.8), "c": (0.5, 0.6), "x": (0.7, 0.6)}
    draws = {
        (name, column): np.full(11, value)
        for name, two in scores.items()
        for column, value in zip(columns, two, strict=True)
    }
    runs = {name: run(name, a=two[0], b=two[1]) for name, two in scores.items()}
    rows = [Row(name, name, True, [runs[name]]) for name in scores]
    block = Block("toy", "id", "test", "float32", "strict", columns, rows, [], [], [], [runs["i"]], [])
    found = tables.normalized(block, draws, "x", living.Experts(columns, runs["c"], pd.DataFrame())).set_index("method")
    assert found["corrected"].to_dict() == pytest.approx({"i": 100, "x": 25, "c": 0})
    assert found["corrected_low"].to_dict() == pytest.approx({"i": 100, "x": 25, "c": 0})
    assert found.loc["x", "average"] == pytest.approx(100 * (7 / 9 + 6 / 8) / 2)


def test_holm_multiplies_the_smallest_p_by_all_and_the_largest_by_one():
    assert bootstrap.holm(np.array([0.04, 0.01, 0.03])).tolist() == pytest.approx([0.06, 0.03, 0.06])
    assert bootstrap.holm(np.array([0.9, 0.8])).tolist() == [1, 1]
    assert bootstrap.holm(np.array([])).tolist() == []


def test_rows_of_a_tier_are_not_told_apart_from_its_first():
    noise = np.random.default_rng(0).normal(0, 1, 10_000)
    other = np.random.default_rng(1).normal(0, 1, 10_000)
    samples = {"a": 90 + noise, "b": 89.5 + other, "c": 70 + noise, "d": 69.9 + other, "bare": None}
    assert tables._tiers(["a", "b", "bare", "c", "d"], samples) == {"a": 1, "b": 1, "c": 2, "d": 2}


def test_a_resample_draws_the_seeds_too_and_those_of_two_rows_together():
    values = {"s0": 0.2, "s1": 0.4, "s2": 0.9}
    draws = {(name, COLUMN): np.full(10_000, value) for name, value in values.items()}
    draws |= {(f"t{name}", COLUMN): draw + 0.1 for (name, _), draw in list(draws.items())}
    one, two = (bootstrap.over_seeds([run(f"{t}s{k}") for k in range(3)], COLUMN, draws) for t in ("", "t"))
    assert one.mean() == pytest.approx(0.5, abs=0.01)
    assert one.std() == pytest.approx(np.std(list(values.values())) / np.sqrt(3), rel=0.03)
    np.testing.assert_allclose(two - one, 0.1)


@pytest.mark.parametrize("metric", ["accuracy", "matthews"])
@pytest.mark.parametrize("n", [200, 1000])
def test_an_interval_of_95_percent_holds_the_truth_that_often(metric, n, monkeypatch):
    """Two classes, 70 to 30, answered rightly in 80 and 65 % of the cases; the truth is the score of all such rows."""
    monkeypatch.setattr(bootstrap, "SAMPLES", 400)
    draw, trials, held = np.random.default_rng(n), 600, 0

    def rows(task: str, count: int) -> pd.DataFrame:
        labels = (draw.random(count) < 0.3).astype(float)
        right = draw.random(count) < np.where(labels == 1, 0.65, 0.8)
        answers = np.where(right, labels, 1 - labels)
        return pd.DataFrame({"task": task, "row": range(count), "label": labels, "prediction": answers})

    everything = rows("all", 2_000_000)
    true = score(metric, everything["label"], everything["prediction"])
    for trial in range(trials):
        column = f"trial {trial}", metric  # the draws depend on the task's name
        low, high = bootstrap.interval(bootstrap.resample({"run": rows(column[0], n)}, [column])["run", column])
        held += low <= true <= high
    assert 0.93 <= held / trials <= 0.97
