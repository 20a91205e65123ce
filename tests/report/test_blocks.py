"""Blocks: which runs may stand in one table, what its lines are called, and what they are divided by."""

from dataclasses import replace
from itertools import count

import pytest

from twinbench.records.record import completed
from twinbench.report import blocks

MLP, ORACLE = {"name": "mlp", "hidden": 8}, {"name": "oracle"}
NUMBER = count()


def run(method: str, run_id: str | None = None, values: tuple = (0.5, 0.6), **fields) -> list[dict]:
    """The records of one run on the tasks a and b; ``time`` is an hour of one day."""
    head = {"run_id": run_id or f"{method}{next(NUMBER)}", "status": "ok", "suite": "toy", "suite_id": "new"}
    head |= {"method": method, "params": {}, "router": None, "protocol": "strict", "seed": None, "split": "test"}
    head |= {"time": 10} | fields
    head["time"] = f"2026-01-01T{head['time']:02}:00:00"
    rows = [{"task": t, "metric": "accuracy", "primary": True, "value": v} for t, v in zip("ab", values, strict=False)]
    return [head | row for row in rows]


def failed(method: str, **fields) -> list[dict]:
    none = dict.fromkeys(("task", "metric", "primary", "value"))
    return [run(method, **fields)[0] | none | {"status": "failed", "error": "boom"}]


def made(*runs: list[dict]) -> list[blocks.Block]:
    return blocks.blocks([completed(row) for records in runs for row in records])


def only(*runs: list[dict]) -> blocks.Block:
    (block,) = made(*runs)
    return block


def named(found: list[blocks.Block]) -> list[tuple[str, str, str]]:
    return [(block.suite_id, block.split, block.protocol) for block in found]


def test_the_newest_suite_comes_first_then_the_test_then_the_strict_protocol():
    found = made(
        run("ties", suite_id="old", time=1, protocol="blind"),
        run("ties", suite_id="new", time=5, protocol="blind", router=MLP),
        run("ties", suite_id="new", time=3, protocol="paper"),
        run("ties", suite_id="new", time=2, split="validation"),
        run("ties", suite_id="old", time=4),
        run("ties", suite_id="new", time=1),
    )
    assert named(found) == [
        *(("new", "test", protocol) for protocol in ("strict", "paper", "blind")),
        ("new", "validation", "strict"),
        *(("old", "test", protocol) for protocol in ("strict", "blind")),
    ]
    assert [len(block.rows) for block in found] == [1] * 6


def test_the_precision_with_more_runs_comes_first_and_of_two_alike_float32():
    few, many = [run("ties")], [run(method, precision="bfloat16") for method in ("ties", "average")]
    assert [block.precision for block in made(*few, *many)] == ["bfloat16", "float32"]
    assert [block.precision for block in made(*few, *many[:1])] == ["float32", "bfloat16"]


def test_a_suite_with_results_comes_before_one_that_only_failed():
    """However new the failure; and a late failure makes no suite newer than its results."""
    found = made(run("ties", suite_id="done", time=1), failed("ties", suite_id="broken", time=9))
    assert [block.suite_id for block in found] == ["done", "broken"]
    found = made(
        run("ties", suite_id="older", time=1), failed("dare", suite_id="older", time=9), run("ties", suite_id="newer")
    )
    assert [block.suite_id for block in found] == ["newer", "older"]
    found = made(failed("ties", suite_id="a", time=2), failed("ties", suite_id="b", time=1))
    assert [block.suite_id for block in found] == ["a", "b"]
    same = made(run("ties", suite_id="a"), run("ties", suite_id="b"))
    assert [block.suite_id for block in same] == ["b", "a"], "as new: by name, in every process"


def test_a_run_that_failed_before_its_suite_was_known_has_a_block():
    (block,) = made(failed("ties", suite_id=None, split=None))
    assert (block.suite_id, block.split, block.rows) == ("unknown", "test", [])
    assert [(label, record["error"]) for label, record in block.failed] == [("ties", "boom")]


def test_individual_normalizes_where_the_task_is_known_and_the_protocol_strict():
    """Not one that a router sends astray, nor one of another protocol, split or suite."""
    normal = run("individual", "known", router=ORACLE)
    others = [
        run("individual", "routed", router=MLP, seed=0),
        run("individual", "paper", protocol="paper", router=ORACLE),
        run("individual", "blind", protocol="blind", router=MLP, seed=0),
        run("individual", "validation", split="validation", router=ORACLE),
        run("individual", "old", suite_id="old", router=ORACLE, time=1),
        run("ties", "ties"),
    ]
    for block in made(normal, *others):
        wanted = {"validation": "validation"}.get(block.split, "old" if block.suite_id == "old" else "known")
        assert [one.run_id for one in block.individual] == [wanted], named([block])
    found = made(*others)
    assert [[one.run_id for one in block.individual] for block in found[:3]] == [[], [], []]


def test_an_upper_bound_of_any_name_normalizes_and_any_single_expert_stands_apart():
    top = {"role": "upper bound", "route": "task"}
    routed = run("best", "routed", role="upper bound", route="top1", router=MLP, seed=0)
    block = only(run("ties"), run("best", "top", **top), routed, run("one", role="one expert", params={"task": "a"}))
    assert [one.run_id for one in block.individual] == ["top"]
    assert {row.method: row.role for row in block.rows} == {"ties": None, "best": "upper bound"}
    assert [row.method for row in block.experts] == ["one"]


def test_without_strict_runs_nothing_normalizes():
    (block,) = made(run("individual", protocol="paper", router=ORACLE))
    assert block.individual == [] and [row.label for row in block.rows] == ["individual"]


def test_settings_are_the_same_in_any_order():
    one, other = {"density": 0.2, "scaling": 1.0}, {"scaling": 1.0, "density": 0.2}
    (row,) = only(run("dare", params=one, seed=0), run("dare", params=other, seed=1)).rows
    assert len(row.runs) == 2


def test_individual_without_a_router_normalizes_too():
    assert [one.run_id for one in only(run("individual", "bare")).individual] == ["bare"]


def test_columns_are_those_of_any_run_in_the_order_of_individual():
    swapped = [row | {"task": {"a": "b", "b": "c"}[row["task"]]} for row in run("ties", protocol="blind", time=1)]
    strict, blind = made(swapped, run("average", values=(0.1,)), run("individual", time=11))
    assert strict.columns == blind.columns == [("a", "accuracy"), ("b", "accuracy"), ("c", "accuracy")]


def test_experts_stand_apart():
    block = only(run("expert", params={"task": "a"}), run("ties"), run("expert", params={"task": "b"}))
    assert [row.label for row in block.rows] == ["ties"]
    assert [row.settings["task"] for row in block.experts] == ["a", "b"]


def test_the_plainest_row_is_routed_then_has_more_seeds_then_is_older():
    sage = {"name": "sage"}  # a router is an oracle by what it is told, not by its name
    told = [run("twin", f"o{seed}", router=sage, route="task", seed=seed, time=1) for seed in range(3)]
    routed = [run("twin", "r0", router=MLP, seed=0, time=2)]
    wide = [run("twin", f"w{seed}", router=MLP | {"hidden": 16}, seed=seed, time=3) for seed in range(2)]
    last = [run("twin", f"l{seed}", router=MLP | {"hidden": 32}, seed=seed, time=4) for seed in range(2)]
    assert only(*told, *routed).find("twin").label == "twin (router=mlp)", "routed, with fewer seeds"
    block = only(*told, *routed, *last, *wide)
    assert block.find("twin").label == "twin (router=mlp, router.hidden=16)"
    assert block.find("twin (router=sage)").oracle
    assert block.find("ties") is None


def test_a_label_goes_before_a_method_of_that_name():
    block = only(run("ties", params={"density": 0.2}), run("ties", params={"density": 0.5}), run("average"))
    row = next(row for row in block.rows if row.label == "ties (density=0.5)")
    assert block.find("ties (density=0.5)") is row
    renamed = blocks.Row("ties", "other", True, [])
    assert replace(block, rows=[*block.rows, renamed]).find("ties") is renamed


def test_seeds_of_a_row_are_its_runs_and_a_newer_run_of_a_seed_replaces_the_older():
    seeds = [run("dare", f"s{seed}", (0.1 * seed, 0.5), seed=seed, time=seed) for seed in (2, 1)]
    again = run("dare", "again", (0.9, 0.9), seed=1, time=9)
    broken = failed("dare", run_id="broken", seed=1, time=12)
    (row,) = only(*seeds, again, broken).rows
    assert [(one.run_id, one.seed) for one in row.runs] == [("s2", 2), ("again", 1)]
    assert row.runs[1].scores == {("a", "accuracy"): 0.9, ("b", "accuracy"): 0.9}
    assert only(*seeds, again, broken).failed == [], "a failure does not stand beside the same run's result"
    other = failed("dare", run_id="other", seed=3, time=1)
    block = only(*seeds, other, run("ties", time=11))
    assert [(label, record["run_id"]) for label, record in block.failed] == [("dare", "other")]
    assert [row.label for row in block.rows] == ["dare", "ties"]


def test_the_newer_of_two_failures_is_shown():
    block = only(failed("dare", run_id="z", time=1), failed("dare", run_id="y", time=2))
    assert [record["run_id"] for _, record in block.failed] == ["y"]


def test_seeds_of_an_older_source_are_left_out_of_the_row():
    """The newest source counts, even where it failed; a seed that has only an older result is told."""
    old = [run("dare", f"old{seed}", seed=seed, source="one", time=1 + seed) for seed in range(4)]
    new = run("dare", "new0", seed=0, source="two", time=9)
    broken = failed("dare", run_id="new1", seed=1, source="two", time=8)
    block = only(new, broken, *old)
    assert [[one.run_id for one in row.runs] for row in block.rows] == [["new0"]]
    assert [(label, record["run_id"]) for label, record in block.failed] == [("dare", "new1")]
    assert [(label, record["run_id"]) for label, record in block.outdated] == [("dare", "old2"), ("dare", "old3")]
    assert block.outdated[0][1]["task"] == "a"
    block = only(*old)
    assert [one.run_id for one in block.rows[0].runs] == [f"old{seed}" for seed in range(4)] and not block.outdated
    back = run("dare", "back", seed=2, source="one", time=10)
    assert [[one.run_id for one in row.runs] for row in only(back, new, *old).rows] == [
        ["old0", "old1", "old3", "back"]
    ]


def test_runs_of_experts_that_were_trained_anew_since_are_left_out():
    """The newest experts of a suite_id count; a run that names none, or that failed, stands beside any."""
    old = [run(name, name, expert="one", time=1) for name in ("individual", "ties", "dare")]
    blind = run("ties", "blind", protocol="blind", expert="one", time=2)
    other = run("ties", "other", suite_id="old", expert="one", time=3)
    new = run("ties", "again", expert="two", time=9)
    silent, broken = run("average", "silent", time=1), failed("dare", run_id="broken", time=11)
    block, rest = made(*old, new, silent, broken, blind, other)
    assert [row.runs[0].run_id for row in block.rows] == ["silent", "again"] and not block.individual
    assert [record["run_id"] for _, record in block.failed] == ["broken"]
    assert {record["run_id"] for record in block.of_older_experts} == {"individual", "dare", "ties"}
    assert [one.run_id for one in rest.rows[0].runs] == ["other"] and not rest.of_older_experts
    (half, *more), again = run("dare", "half", expert="two", time=4), run("ties", "whole", expert="two", time=5)
    mixed = [half, *({**row, "expert": "one"} for row in more)]
    assert [row.label for row in only(mixed, again).rows] == ["ties"], "one of its experts is another"
    assert len(only(*old).rows) == 3 and not only(*old).of_older_experts


def test_runs_of_one_time_stand_in_the_order_of_their_ids():
    found = only(run("b", "2"), run("a", "3"), run("c", "1"))
    assert [row.label for row in found.rows] == ["c", "b", "a"]
    (row,) = only(run("dare", "2"), run("dare", "1"), run("dare", "3", seed=1)).rows
    assert [one.run_id for one in row.runs] == ["2", "3"], "of two alike the last"


def test_runs_that_differ_in_anything_but_the_seed_are_rows_of_their_own():
    block = only(
        run("ties", params={"density": 0.2}),
        run("ties", params={"density": 0.2}, router=MLP, time=11),
        run("dare", seed=0, time=12),
    )
    assert [row.label for row in block.rows] == ["ties (router=none)", "ties (router=mlp)", "dare"]
    assert not any(row.oracle for row in block.rows), "a static method is told no task"
    mixed = {"shared": {"method": "ties", "scaling": 0.5}, "rank": 8}
    (row,) = only(run("twin", params=mixed, router=MLP)).rows
    assert row.settings == {
        "method@shared": "ties",
        "shared.scaling": 0.5,
        "rank": 8,
        "router": "mlp",
        "router.hidden": 8,
    }
    (row,) = only(run("average", params=None)).rows
    assert row.settings == {"router": "none"}


def test_primary_scores_stand_apart_from_other_metrics_and_splits():
    records = run("ties")
    f1 = records[0] | {"metric": "f1", "primary": False, "value": 0.3}
    elsewhere = records[0] | {"split": "mismatched", "primary": False, "value": 0.2}
    ((one,),) = (row.runs for row in only([elsewhere, f1, *records]).rows)
    assert one.scores == {("a", "accuracy"): 0.5, ("b", "accuracy"): 0.6}
    assert one.others == {("a", "f1"): 0.3}
    assert one.beside == {("a", "accuracy on mismatched"): 0.2}
    assert len(one.records) == 4 and one.seed is None


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (  # what is the same everywhere, or of another shared method alone, is left out
            [{"method@shared": "none", "rank": 8}, {"method@shared": "ties", "shared.scaling": 1.0, "rank": 8}],
            ["(method@shared=none)", "(method@shared=ties)"],
        ),
        (  # but not where two rows have that shared method
            [{"method@shared": "ties", "shared.scaling": 1.0}, {"method@shared": "ties", "shared.scaling": 0.5}],
            ["(shared.scaling=1.0)", "(shared.scaling=0.5)"],
        ),
        ([{"rank": 8}], [""]),
        ([{"rank": 8}, {"rank": 8}], ["", ""]),
        ([{"p": 0.2}, {"p": 0.2, "rescale": True}], ["", "(rescale=true)"]),
        ([{"p": 0.2}, {"p": 0.5, "rescale": True}], ["(p=0.2)", "(p=0.5)"]),
        ([{"p": 0.2, "q": "a"}, {"p": 0.5, "q": "b"}], ["(p=0.2, q=a)", "(p=0.5, q=b)"]),
        ([{"p": 1}, {"p": 1, "x": 2}, {"p": 3}], ["(p=1)", "(p=1, x=2)", "(p=3)"]),
        ([{"rank": 0.1, "density": None}, {"rank": None, "density": 0.2}], ["(rank=0.1)", "(density=0.2)"]),
        ([{"freeze": ["a"]}, {"freeze": ["a", "b"]}], ['(freeze=["a"])', '(freeze=["a", "b"])']),
    ],
)
def test_labels_name_only_what_tells_rows_apart(settings, names):
    assert blocks.labels("twin", settings) == [f"twin {name}".rstrip() for name in names]


def test_labels_name_a_routers_settings_only_beside_routers_of_its_name():
    mlp, text = {"router": "mlp", "router.layer": None}, {"router": "text", "router.layer": 2}
    assert blocks.labels("twin", [mlp, text]) == ["twin (router=mlp)", "twin (router=text)"]
    early = mlp | {"router.layer": 2}
    names = ["twin (router=mlp, router.layer=null)", "twin (router=mlp, router.layer=2)", "twin (router=text)"]
    assert blocks.labels("twin", [mlp, early, text]) == names
