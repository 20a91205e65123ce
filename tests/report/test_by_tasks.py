"""Scores by the number of tasks: subsets of one suite in an experiment, against numbers that one can count by hand."""

import numpy as np
import pytest

from support.results import add_run, guess
from twinbench.records import store
from twinbench.report.make import make


def subset(results, tag: str, tasks: list[str], ties: float, **fields) -> list[str]:
    """Experts that are always right, and TIES right so often, on some of the toy suite's tasks."""
    names = []
    for method, quality in (("individual", 1.0), ("ties", ties)):
        said = {task: values for task, values in guess(quality).items() if task in tasks}
        given = {"suite_id": tag, "router": {"name": "oracle"} if method == "individual" else None} | fields
        add_run(results, f"{tag}{method}", method, said, **given)
        names.append(f"{tag}{method}")
    return names


def reported(results, runs: list[str]) -> dict:
    store.write_sweep(results, "growing", runs)
    return make(results, experiment="growing")


def test_subsets_of_one_size_are_averaged_and_their_ends_told(tmp_path):
    runs = [*subset(tmp_path, "one", ["topic"], 0.9), *subset(tmp_path, "two", ["mood"], 0.5)]
    runs += subset(tmp_path, "all", ["topic", "mood"], 0.4)
    made = reported(tmp_path, runs)
    found = made["tables"]["tasks_toy_strict_tasks"].set_index("method")
    slugs = ("strict_one", "strict", "strict_all")  # the newest suite_id has none behind it
    alone = [made["tables"][f"{slug}_normalized"].set_index("method") for slug in slugs]
    *ones, both = (scores.loc["ties", "average"] for scores in alone)
    assert ones[0] > ones[1] + 5
    row = found.loc["ties"]
    assert row["1 tasks"] == pytest.approx(sum(ones) / 2)
    assert (row["1 tasks_low"], row["1 tasks_high"]) == (ones[1], ones[0])
    assert row["2 tasks"] == both and np.isnan(row["2 tasks_low"]), "there is one subset of two"
    assert list(found.loc["individual", ["1 tasks", "2 tasks"]]) == [100, 100]
    text = (made["folder"] / "leaderboard.md").read_text()
    first = text.index("## toy: by the number of tasks")
    assert first < text.index("suite_id one"), "it stands before the subsets' own tables"
    assert f"| {sum(ones) / 2:.1f} ({ones[1]:.1f} to {ones[0]:.1f}) |" in text
    assert made["figures"]["tasks_toy_strict_tasks"].exists()


def test_one_number_of_tasks_has_no_curve_and_neither_has_a_report_of_a_suite(tmp_path):
    runs = [*subset(tmp_path, "one", ["topic"], 0.9), *subset(tmp_path, "two", ["mood"], 0.5)]
    assert not any("tasks_" in name for name in reported(tmp_path, runs)["tables"])
    runs += subset(tmp_path, "all", ["topic", "mood"], 0.4)
    assert not any("tasks_" in name for name in make(tmp_path, suite="toy")["tables"]), "those are older versions of it"


def test_what_differs_in_protocol_or_suite_is_not_joined(tmp_path):
    one = subset(tmp_path, "one", ["topic"], 0.9)
    for tag, fields in (("a", {"suite": "other"}), ("b", {"split": "validation"})):
        runs = [*one, *subset(tmp_path, tag, ["topic", "mood"], 0.4, **fields)]
        assert not any("tasks_" in name for name in reported(tmp_path, runs)["tables"]), fields
    runs = [
        *subset(tmp_path, "one", ["topic"], 0.9),
        *subset(tmp_path, "two", ["topic", "mood"], 0.4, precision="bfloat16"),
    ]
    found = reported(tmp_path, runs)["tables"]
    assert not any("tasks_" in name for name in found), list(found)


def test_what_scores_some_of_its_merged_tasks_is_not_joined(tmp_path):
    runs = subset(tmp_path, "all", ["topic", "mood"], 0.4)
    some = subset(tmp_path, "some", ["topic"], 0.9, unscored={"mood": "fine-tuned"})
    assert not any("tasks_" in name for name in reported(tmp_path, runs + some)["tables"])
    assert any(
        "tasks_" in name for name in reported(tmp_path, runs + subset(tmp_path, "one", ["topic"], 0.9))["tables"]
    )


def test_a_method_of_one_number_alone_is_left_out(tmp_path):
    runs = [*subset(tmp_path, "one", ["topic"], 0.9), *subset(tmp_path, "all", ["topic", "mood"], 0.4)]
    add_run(tmp_path, "lone", "della", guess(0.5), suite_id="all")
    found = reported(tmp_path, [*runs, "lone"])["tables"]["tasks_toy_strict_tasks"]
    assert set(found["method"]) == {"individual", "ties"}


def test_rows_of_one_name_with_other_settings_are_told(tmp_path):
    runs = [*subset(tmp_path, "one", ["topic"], 0.9), *subset(tmp_path, "all", ["topic", "mood"], 0.4)]
    for tag, tasks, density, router in (("one", ["topic"], 0.2, None), ("all", ["topic", "mood"], 0.9, None)):
        said = {task: values for task, values in guess(0.6).items() if task in tasks}
        add_run(tmp_path, f"{tag}dare", "dare", said, suite_id=tag, params={"density": density}, router=router)
        runs.append(f"{tag}dare")
    made = reported(tmp_path, runs)
    text = (made["folder"] / "leaderboard.md").read_text()
    note = "The settings of dare differ: density=0.2, router=none for 1 tasks; density=0.9, router=none for 2 tasks."
    assert text.count(note) == 1
    assert "The settings of ties" not in text


def test_what_is_told_the_task_is_never_in_one_row_with_what_asks_a_router(tmp_path):
    runs = [*subset(tmp_path, "one", ["topic"], 0.9), *subset(tmp_path, "all", ["topic", "mood"], 0.4)]
    for tag, tasks, router in (("one", ["topic"], "oracle"), ("all", ["topic", "mood"], "mlp")):
        said = {task: values for task, values in guess(0.9).items() if task in tasks}
        add_run(tmp_path, f"{tag}twin", "twin_merging", said, suite_id=tag, router={"name": router})
        runs.append(f"{tag}twin")
    found = reported(tmp_path, runs)["tables"]["tasks_toy_strict_tasks"]
    assert set(found["method"]) == {"individual", "ties"}


def test_a_row_under_another_protocol_is_not_joined(tmp_path):
    one, (best, ties) = subset(tmp_path, "one", ["topic"], 0.9), subset(tmp_path, "all", ["topic", "mood"], 0.4)
    assert "ties" in set(reported(tmp_path, [*one, best, ties])["tables"]["tasks_toy_strict_tasks"]["method"])
    add_run(tmp_path, "paper", "ties", guess(0.4), suite_id="all", protocol="paper")
    found = reported(tmp_path, [*one, best, "paper"])["tables"]["tasks_toy_strict_tasks"]
    assert set(found["method"]) == {"individual"}


def test_a_method_that_lacks_a_subset_has_no_average_of_that_many(tmp_path):
    """The subset that it ends in may be the easy one."""
    runs = [*subset(tmp_path, "one", ["topic"], 0.9), *subset(tmp_path, "two", ["mood"], 0.5)]
    runs += subset(tmp_path, "all", ["topic", "mood"], 0.4)
    for tag, tasks in (("one", ["topic"]), ("all", ["topic", "mood"])):
        said = {task: values for task, values in guess(0.9).items() if task in tasks}
        add_run(tmp_path, f"{tag}della", "della", said, suite_id=tag)
        runs.append(f"{tag}della")
    found = reported(tmp_path, runs)["tables"]["tasks_toy_strict_tasks"]
    assert set(found["method"]) == {"individual", "ties"}, "of two numbers it has one average alone"
