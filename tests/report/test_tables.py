"""Tables: each cell against numbers that one can count by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from twinbench.records.record import completed
from twinbench.report import blocks, costs, living, tables
from twinbench.report.held_out import Settings

A, B = ("a", "accuracy"), ("b", "pearson")


def run(run_id: str, a: float | None = None, b: float | None = None, **fields) -> blocks.Run:
    scores = {column: score for column, score in ((A, a), (B, b)) if score is not None}
    record = {"task": "a", "split": "test", "n": 10, "route_seconds": 1.0, "eval_seconds": 4.0, "router_seconds": 3.0}
    record |= {
        "base": None,
        "shared_bytes": 8,
        "exclusive_bytes": 4,
        "router_bytes": 2,
        "merge_seconds": 1.0,
        "others_share": 0.0,
    }
    given = {"others": {}, "beside": {}} | fields
    return blocks.Run(run_id, None, scores, given["others"], given["beside"], [completed(record)])


def row(label: str, *runs: blocks.Run, method: str | None = None, **settings) -> blocks.Row:
    roles = {"individual": "upper bound", "pretrained": "lower bound"}
    return blocks.Row(label, method or label.split(" ")[0], True, list(runs), settings, roles.get(label))


def block(*rows: blocks.Row, individual: tuple = (), experts: tuple = (), failed: tuple = ()) -> blocks.Block:
    lists = {"rows": list(rows), "experts": list(experts), "failed": list(failed), "outdated": [], "base": []}
    return blocks.Block("toy", "new", "test", "float32", "strict", [A, B], **lists, individual=list(individual))


def normalized(given: blocks.Block, draws: dict, reference: str, constant: blocks.Run | None = None) -> pd.DataFrame:
    return tables.normalized(given, draws, reference, living.checked(given, draws, constant))


@pytest.fixture
def whole() -> blocks.Block:
    """Two seeds of individual (0.8, 0.4 on the average), the bounds and three methods, one of which lacks a task."""
    best = [run("i0", 0.7, 0.5), run("i1", 0.9, 0.3)]
    rows = [
        row("slerp", run("s", 0.9)),
        row("pretrained", run("p", 0.8, 0.4)),
        row("ties", run("t", 0.4, 0.3)),
        row("dare", run("d0", 0.4, 0.1), run("d1", 0.6, 0.3)),
        row("individual", *best),
    ]
    return block(*rows, individual=tuple(best))


def test_normalized_table(whole):
    found = normalized(whole, {}, "ties").set_index("method")
    assert list(found.index) == ["individual", "ties", "dare", "slerp", "pretrained"]
    assert found["rank"].tolist() == [None, 1, 2, None, None]
    assert found["role"].tolist() == ["upper bound", "", "", "", "lower bound"]
    assert found["reference"].tolist() == [False, True, False, False, False]
    assert found["seeds"].tolist() == [2, 1, 2, 1, 1]
    assert found.loc["ties", ["a", "b", "average", "worst"]].tolist() == pytest.approx([50, 75, 62.5, 50])
    assert found.loc["dare", ["a", "b", "average", "worst"]].tolist() == pytest.approx([62.5, 50, 56.25, 50])
    assert found["worst_task"].dropna().tolist() == ["a", "a", "b", "a"]
    assert found.loc["dare", "difference"] == pytest.approx(-6.25) and pd.isna(found.loc["ties", "difference"])
    assert found.loc["dare", "a_std"] == pytest.approx(np.std([50, 75], ddof=1))
    assert found.loc["dare", "average_std"] == pytest.approx(np.std([37.5, 75], ddof=1))
    assert found.loc["ties", ["a_std", "average_std"]].isna().all()
    assert found.loc["slerp", "a"] == pytest.approx(112.5)
    assert found.loc["slerp", ["b", "average", "worst", "difference"]].isna().all()
    assert not normalized(whole, {}, "nothing")["reference"].any()


def test_without_several_seeds_there_are_no_spreads(whole):
    single = block(row("ties", run("t", 0.4, 0.3)), individual=(run("i", 0.8, 0.4),))
    assert not [name for name in normalized(single, {}, "ties") if name.endswith("_std")]
    assert list(tables.raw(single.rows, single.columns, single.columns)) == [
        "method",
        "seeds",
        "a (accuracy)",
        "b (pearson)",
        "average",
    ]
    spread = tables.raw(whole.rows, whole.columns, whole.columns)
    assert list(spread)[-3:] == ["a (accuracy)_std", "b (pearson)_std", "average_std"]
    assert spread.set_index("method").loc["dare", "b (pearson)"] == pytest.approx(20)


def test_equal_averages_stand_by_name():
    rows = [row(name, run(name, 0.4, 0.3)) for name in ("b", "a", "c")]
    found = normalized(block(*rows, individual=(run("i", 0.8, 0.4),)), {}, "a")
    assert found["method"].tolist() == ["a", "b", "c"] and found["rank"].tolist() == [1, 2, 3]


def test_intervals_come_from_the_draws_of_the_row_and_the_reference(whole):
    draws = {("t", A): np.linspace(0.3, 0.5, 1001), ("t", B): np.full(1001, 0.3)}
    draws |= {("d0", A): np.full(1001, 0.4), ("d0", B): np.full(1001, 0.1)}
    draws |= {("d1", A): np.full(1001, 0.6), ("d1", B): np.full(1001, 0.3)}
    draws |= {(name, column): np.full(1001, top) for name in ("i0", "i1") for column, top in ((A, 0.8), (B, 0.4))}
    found = normalized(whole, draws, "ties").set_index("method")
    low, high = 50 * (0.305 / 0.8 + 0.75), 50 * (0.495 / 0.8 + 0.75)
    assert found.loc["ties", ["average_low", "average_high"]].tolist() == pytest.approx([low, high])
    assert found.loc["ties", ["difference_low", "p"]].isna().all()
    ends = found.loc["dare", ["average_low", "average_high"]].tolist()
    assert ends == pytest.approx([37.5, 75]), "a resample may draw one seed twice"
    assert found.loc["dare", "difference_low"] < 56.25 - high < 56.25 - low < found.loc["dare", "difference_high"]
    assert 0 < found.loc["dare", "p"] <= 1
    assert found.loc["pretrained", ["average_low", "difference_low", "p"]].isna().all()
    assert found.loc["pretrained", "difference"] == pytest.approx(37.5)


def test_a_score_is_divided_only_by_one_above_zero_that_every_individual_run_has():
    assert tables.normalizers(block(individual=(run("i0", 0.7, 0.5), run("i1", 0.9, 0.3)))) == {
        A: pytest.approx(0.8),
        B: pytest.approx(0.4),
    }
    assert tables.normalizers(block(individual=(run("i0", 0.7, 0.5), run("i1", 0.9)))).keys() == {A}
    assert tables.normalizers(block(individual=(run("i0", 0.0, -0.5),))) == tables.normalizers(block()) == {}


def shares(a_to_a: float, b_to_a: float, **more) -> dict:
    return {("a", "routed_to/a"): a_to_a, ("a", "routed_to/b"): 1 - a_to_a, ("b", "routed_to/a"): b_to_a} | more


def test_confusion_is_the_mean_share_in_percent_of_each_task_by_expert():
    routed = row("twin", run("x", others=shares(0.9, 0.2)), run("y", others=shares(0.7, 0.4)))
    found = tables.confusion(routed, [A, B])
    assert found.index.tolist() == ["a", "b"] and found.columns.tolist() == ["a", "b"]
    assert found.loc["a"].tolist() == pytest.approx([80, 20])
    assert found.loc["b", "a"] == pytest.approx(30) and pd.isna(found.loc["b", "b"])
    assert tables.confusion(row("ties", run("t", 0.5, others={("a", "f1"): 0.5})), [A, B]) is None
    others = {("a", "routed_to/z"): 0.1, ("a", "routed_to/b"): 0.2, ("a", "routed_to/a"): 0.7}
    assert tables.confusion(row("twin", run("x", others=others)), [B, A]).columns.tolist() == ["b", "a", "z"]


def test_router_accuracy_is_of_rows_that_were_routed():
    others = {("a", "router_accuracy"): 0.9, ("b", "router_accuracy"): 0.7, ("a", "f1"): 0.1}
    rows = [row("ties", run("t", 0.5)), row("twin", run("x", others=others))]
    found = tables.router(rows, [A, B], [A, B])
    assert found.to_dict("records") == [{"method": "twin", "seeds": 1, "a": 90, "b": 70, "average": 80}]


def test_storage_is_the_mean_over_seeds_and_its_sum():
    big = run("x")
    big.records[0].update(shared_bytes=12, exclusive_bytes=5, router_bytes=3)
    three = Settings(({("{}", str(router)): {} for router in range(3)},))
    found = costs.storage([row("twin", run("y"), big), row("ties", run("z"))], {"twin": three, "ties": Settings()}, [A])
    twin, ties = ["twin", 10, 4, 2, 16, "nothing", 3, None], ["ties", 8, 4, 2, 14, "nothing", 0, None]
    assert found.to_numpy().tolist() == [twin, ties]


def test_secondary_metrics_are_raw_means_over_the_seeds_that_have_them():
    one = run("x", others={("a", "f1"): 0.2}, beside={("a", "accuracy on mismatched"): 0.5})
    two = run("y", others={("a", "f1"): 0.4})
    found = tables.secondary([row("dare", one, two), row("ties", run("t", 0.5))])
    assert list(found) == ["method", "task", "metric", "seeds", "value", "std"]
    f1, beside = found.to_dict("records")
    assert f1 == {"method": "dare", "task": "a", "metric": "f1", "seeds": 2} | {
        "value": pytest.approx(0.3),
        "std": pytest.approx(np.std([0.2, 0.4], ddof=1)),
    }
    assert (beside["metric"], beside["seeds"], beside["value"]) == ("accuracy on mismatched", 1, 0.5)
    assert np.isnan(beside["std"])


def test_experts_stand_in_the_order_of_their_tasks_and_others_last():
    names = ("z", "b", "y", "a")
    given = tuple(row("expert", run(name, 0.1 * place, 0.5), task=name) for place, name in enumerate(names))
    found = tables.experts(block(experts=given))
    assert list(found) == ["expert", "a (accuracy)", "b (pearson)"]
    assert found["expert"].tolist() == ["a", "b", "y", "z"]
    assert found["a (accuracy)"].tolist() == pytest.approx([30, 10, 20, 0])


def test_curves_need_three_values_of_rows_that_are_alike_otherwise():
    rows = [
        row(f"ties ({i})", run(str(i), 0.1 * i, 0.4), method="ties", density=0.1 * i, seeded=True) for i in (3, 1, 2)
    ]
    rows += [row(f"dare ({i})", run(f"d{i}", 0.5, 0.4), method="dare", density=0.1 * i, seeded=True) for i in (1, 2)]
    rows[0] = row("ties (3)", rows[0].runs[0], method="ties", seeded=True, density=0.1 * 3)  # in another order
    rows += [row("ties (else)", run("e", 0.5, 0.4), method="ties", density=0.9, seeded=False)]
    whole = block(*rows, individual=(run("i", 0.8, 0.4),))
    found = tables.curves(whole, normalized(whole, {}, "ties"))
    assert list(found) == ["density"]
    assert found["density"]["curve"].tolist() == ["ties"] * 3
    assert found["density"]["value"].tolist() == pytest.approx([0.1, 0.2, 0.3])
    averages = [50 * (0.1 * i / 0.8 + 1) for i in (1, 2, 3)]
    assert found["density"]["average"].tolist() == pytest.approx(averages)


def test_a_failure_is_told_by_the_first_line_that_says_something():
    errors = ["\n  \n  ValueError: x \nmore", None, "", " \n"]
    given = tuple(("della", {"seed": place, "error": error}) for place, error in enumerate(errors))
    found = tables.failed(block(failed=given))
    assert found["error"].tolist() == ["ValueError: x", "no message", "no message", "no message"]
    assert found[["method", "seed", "status"]].to_numpy().tolist() == [["della", place, "failed"] for place in range(4)]


def test_tables_that_have_lines_are_made_under_their_names(whole):
    failed = (("della", {"seed": 0, "error": "x"}),)
    expert = row("expert", run("e", 0.5, 0.5), task="a")
    found = tables.make(replace(whole, failed=list(failed), experts=[expert]), {}, "ties", None, {})
    assert list(found) == ["normalized", "living", "raw", "storage", "time", "experts", "failed"]
    order = found["normalized"]["method"].tolist()
    assert all(found[name]["method"].tolist() == order for name in ("raw", "storage", "time"))
    assert found["normalized"].set_index("method")["reference"]["ties"]
    assert list(found["failed"]) == ["method", "seed", "status", "error"]
    assert list(found["time"]) == ["method", "merge", "router training", "route", "evaluation", costs.RATE]
    assert found["time"].iloc[0].tolist()[1:] == [1, 3, 1, 4, 500]
