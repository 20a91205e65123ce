"""The report: the numbers that it computes from records written by hand."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from support.results import TASKS, add_run, computed, fill, guess, notes, raw, table, truth
from twinbench.records.record import completed
from twinbench.report import blocks, costs, plots
from twinbench.report.catalog import TABLES
from twinbench.report.make import make


def shown(name: str, numbers: pd.DataFrame) -> pd.DataFrame:
    return next(table for table in TABLES if table.name == name).cells(numbers)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return fill(tmp_path)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """The written report of the same records, made once: read it, leave it as it is."""
    return make(fill(tmp_path_factory.mktemp("results")), suite="toy")


def test_normalized_is_the_share_of_the_individual_score(results):
    found, ties, individual = table(results), raw(guess(0.6)), raw(guess(0.95))
    expected = {task: 100 * ties[task] / individual[task] for task in TASKS}
    for task in TASKS:
        assert found.loc["ties", task] == pytest.approx(expected[task], rel=1e-12)
    assert found.loc["ties", "average"] == pytest.approx(np.mean(list(expected.values())), rel=1e-12)
    assert found.loc["ties", "worst"] == pytest.approx(min(expected.values()), rel=1e-12)
    assert found.loc["ties", "worst_task"] == min(expected, key=expected.get)


def test_individual_is_exactly_100_and_bounds_have_no_rank(results):
    found = table(results)
    assert list(found.loc["individual", [*TASKS, "average", "worst", "average_low", "average_high"]]) == [100.0] * 6
    assert found.index[0] == "individual" and found.index[-1] == "pretrained"
    assert found.loc[["individual", "pretrained"], "rank"].isna().all()
    ranked = found[found["rank"].notna()]
    assert list(ranked["rank"]) == [1, 2, 3, 4]
    assert ranked["average"].is_monotonic_decreasing


def test_protocols_and_suite_ids_are_never_mixed(results):
    add_run(results, "f0", "average", guess(0.7), suite_id="old", time="2025-01-01T00:00:00+00:00")
    found = computed(results)
    assert list(found) == [("new", "strict"), ("new", "blind"), ("old", "strict")]
    blind = found["new", "blind"]["normalized"].set_index("method")
    assert set(blind.index) == {"individual", "twin_merging"}
    assert blind.loc["individual", "topic"] == pytest.approx(100 * raw(guess(0.9))["topic"] / raw(guess(0.95))["topic"])
    old = found["old", "strict"]["normalized"]
    assert list(old["method"]) == ["average"] and old[[*TASKS, "average"]].isna().all(axis=None)
    make(results, suite="toy")
    page = (results / "reports" / "toy" / "index.html").read_text(encoding="utf-8")
    assert page.index("blind protocol") < page.index("other experts or data")
    assert "no run of individual under the strict protocol" in page


def test_seeds_are_aggregated(results):
    found = table(results).loc["twin_merging (router=mlp)"]
    runs = [raw(guess(quality, seed)) for seed, quality in enumerate((0.85, 0.9, 0.92))]
    each = np.array([[100 * run[task] / raw(guess(0.95))[task] for task in TASKS] for run in runs])
    assert found["seeds"] == 3
    assert found["topic"] == pytest.approx(each[:, 0].mean())
    assert found["topic_std"] == pytest.approx(each[:, 0].std(ddof=1))
    assert found["average_std"] == pytest.approx(each.mean(axis=1).std(ddof=1))
    assert pd.isna(table(results).loc["ties", "average_std"])


def test_rerun_replaces_its_older_result(results):
    before = table(results).loc["ties", "topic"]
    later = "2026-02-01T00:00:00+00:00"
    add_run(results, "a3-again", "ties", guess(0.7), params={"density": 0.2}, time=later)
    add_run(results, "a3-failed", "ties", params={"density": 0.2}, time="2026-03-01T00:00:00+00:00", error="boom")
    found = table(results).loc["ties"]
    assert found["seeds"] == 1
    assert found["topic"] == pytest.approx(100 * raw(guess(0.7))["topic"] / raw(guess(0.95))["topic"]) != before


def test_seeds_of_another_source_are_left_out_and_told(results):
    """Three seeds, of which a changed method has measured one again, and failed on another."""
    mlp = {"name": "mlp", "hidden": 8}
    for seed, quality in enumerate((0.3, 0.4, 0.5)):
        earlier = {"time": f"2025-01-0{seed + 1}T00:00:00+00:00", "source": "old"}
        add_run(results, f"f{seed}", "dare", guess(quality, seed), seed=seed, **earlier)
    assert table(results).loc["dare", "seeds"] == 3 and "Left out" not in notes(results)
    add_run(results, "f3", "dare", guess(0.6), seed=0, source="new")
    add_run(results, "f4", "dare", seed=2, source="new", error="boom", time="2026-01-02T00:00:00+00:00")
    found = table(results).loc["dare"]
    assert found["seeds"] == 1
    assert found["topic"] == pytest.approx(100 * raw(guess(0.6))["topic"] / raw(guess(0.95))["topic"])
    assert "Left out: seed 1 of dare. The source of its method has changed" in notes(results)
    assert table(results, "failed").loc["dare", "error"] == "boom", "an older result does not hide it"
    add_run(
        results, "g0", "twin_merging", guess(0.4), router=mlp, seed=9, source="other", time="2025-01-01T00:00:00+00:00"
    )
    assert table(results).loc["twin_merging (router=mlp)", "seeds"] == 3


def test_runs_of_older_experts_are_in_no_table_and_in_no_search_and_the_report_says_so(results):
    """A search and runs of before a training, some of which were measured again after it."""
    old, new = ({"expert": f"fine-tuned, xxh3 {name}"} for name in "ab")
    router, times = {"name": "oracle"}, iter(f"2026-02-{day:02}T00:00:00+00:00" for day in range(1, 29))
    for number, density in enumerate((0.1, 0.2)):
        params = {"density": density}
        add_run(results, f"v{number}", "ties", guess(0.6), params=params, split="validation", time=next(times), **old)
    add_run(results, "v2", "individual", guess(0.95), router=router, split="validation", time=next(times), **old)
    for name, quality in (("magmax", 0.5), ("fisher", 0.5), ("lines", 0.6), ("iso_c", 0.6)):
        add_run(results, f"h-{name}", name, guess(quality), source="one", time=next(times), **old)
    add_run(results, "h-mine", "svc", guess(0.5), time=next(times), expert="local folder moved, sha256 abc")
    before = make(results, suite="toy")
    searched = before["tables"]["strict_storage"].set_index("method")
    assert searched.loc["ties", "settings tried"] == 2 and "Left out" not in before["summary"]
    add_run(results, "h-average", "average", guess(0.55), time=next(times), **new)
    add_run(results, "h-lines", "lines", time=next(times), error="boom", source="one")
    add_run(results, "h-other", "iso_c", guess(0.6), time=next(times), source="two", **new)
    after = make(results, suite="toy")
    searched = after["tables"]["strict_storage"].set_index("method")
    assert searched.loc["ties", "settings tried"] == 0
    assert {"magmax", "fisher", "lines"}.isdisjoint(searched.index) and {"average", "svc", "iso_c"} <= {*searched.index}
    assert "lines" in after["tables"]["strict_failed"]["method"].tolist(), "an older result does not hide a failure"
    told = "Left out, measured with the experts of an earlier training: 2 of the runs, of fisher, magmax."
    assert told in after["summary"] and told in (after["folder"] / "index.html").read_text(encoding="utf-8")


def test_a_report_of_older_experts_alone_is_refused_with_what_to_do(tmp_path):
    for run_id, (suite, expert, day) in {"a": ("first", "old", 1), "b": ("second", "new", 2)}.items():
        given = {"suite": suite, "expert": f"fine-tuned, {expert}", "time": f"2026-02-0{day}T00:00:00+00:00"}
        add_run(tmp_path, run_id, "ties", guess(0.6), params={"density": day / 10}, **given)
    with pytest.raises(ValueError, match="all records of suite 'first' are of the experts of an earlier training; the"):
        make(tmp_path, suite="first")
    assert make(tmp_path, suite="second")["summary"]


def test_failed_run_is_shown_with_the_first_line_of_its_error(report):
    failed = report["tables"]["strict_failed"]
    assert failed.loc[0, ["method", "status"]].tolist() == ["della", "failed"]
    assert failed.loc[0, "error"] == "ValueError: density must be in (0, 1]; got 0"
    for text in ((report["folder"] / "leaderboard.md").read_text(encoding="utf-8"), report["summary"]):
        assert "della" in text and "density must be in (0, 1]" in text and "traceback" not in text


def test_missing_task_gives_an_empty_cell_and_no_average(results):
    add_run(results, "f1", "slerp", {"topic": guess(0.9)["topic"]})
    found = table(results)
    assert found.loc["slerp", ["mood", "average", "worst", "rank", "average_low"]].isna().all()
    assert found.loc["slerp", "topic"] > 0
    assert pd.isna(table(results, "raw").loc["slerp", "average"])
    cells = shown("normalized", found.reset_index()).set_index("method").loc["slerp"]
    assert (cells["mood"], cells["average"], cells["95 % interval"]) == ("", "", "")


def test_an_expert_of_zero_or_less_leaves_the_cell_empty_and_its_task_out_of_the_average(tmp_path):
    upside_down = guess(0.9) | {"mood": -truth()["mood"]}
    add_run(tmp_path, "a0", "individual", upside_down)
    add_run(tmp_path, "a1", "average", guess(0.5))
    found = table(tmp_path)
    assert found["mood"].isna().all() and found.loc["individual", ["topic", "average"]].tolist() == [100, 100]
    assert found.loc["average", "average"] == pytest.approx(found.loc["average", [*TASKS]].drop("mood").mean())
    assert "Not normalized: mood" in notes(tmp_path)


def test_csv_has_full_precision(report):
    for name, frame in report["tables"].items():
        lines = (report["folder"] / f"{name}.csv").read_text(encoding="utf-8").splitlines()
        assert lines[0].split(",")[0] == frame.columns[0] and len(lines) == len(frame) + 1
    read = pd.read_csv(report["folder"] / "strict_normalized.csv", float_precision="round_trip")
    for column in [*TASKS, "average", "average_low", "difference_high"]:
        np.testing.assert_array_equal(read[column], report["tables"]["strict_normalized"][column])


def test_storage_time_and_router_tables(results):
    assert list(table(results, "storage").loc["ties"]) == [1_000_001, 500_000, 7, 1_500_008, "nothing", 0, None]
    assert list(table(results, "time").loc["ties"])[:4] == [1.5, 4.0, 0.5 * len(TASKS), 2.0 * len(TASKS)]
    router = table(results, "router")
    assert list(router.index) == ["twin_merging (router=mlp)"]
    assert router.loc["twin_merging (router=mlp)", "average"] == pytest.approx(90)
    assert {"router_accuracy", "routed_to/mood"} <= set(table(results, "secondary")["metric"])


def test_storage_says_how_exclusive_parts_are_stored_where_the_records_do(results):
    assert "exclusive stored as" not in table(results, "storage")
    add_run(results, "f4", "emr", guess(0.7), exclusive_kind="dense", exclusive_bytes=8_000_000)
    for seed, kind in enumerate(("low-rank + dense vectors", "low-rank + dense vectors", "sparse")):
        add_run(results, f"g{seed}", "smile", guess(0.7), exclusive_kind=kind, seed=seed)
    found = table(results, "storage")["exclusive stored as"]
    assert (found["emr"], found["smile"]) == ("dense", "low-rank + dense vectors, sparse") and pd.isna(found["ties"])
    folder = make(results, suite="toy")["folder"]
    page, markdown = ((folder / name).read_text(encoding="utf-8") for name in ("index.html", "leaderboard.md"))
    assert '<td class="text">dense</td>' in page and "as much as an expert each" in page
    line = next(line for line in markdown.split("### Storage")[1].splitlines() if line.startswith("| emr"))
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        "emr",
        "1.00",
        "8.00",
        "0.00",
        "9.00",
        "dense",
        "nothing",
        "0",
        "",
    ]


def test_a_row_says_how_many_settings_were_tried_on_held_out_rows_of_the_same_experts(tmp_path):
    """A limit on the test or another name is another suite_id; other experts are another matter."""

    def tried(run_id: str, density: float, suite_id: str, **fields) -> None:
        fields = {"split": "validation", "expert": "one", "predictions": guess(0.6)} | fields
        add_run(tmp_path, run_id, "ties", params={"density": density}, suite_id=suite_id, **fields)

    add_run(tmp_path, "a0", "individual", guess(0.95), router={"name": "oracle"}, expert="one")
    tried("t0", 0.1, "new", split="test")
    tried("v0", 0.1, "other name", suite="elsewhere", seed=0)
    tried("v1", 0.1, "other name", suite="elsewhere", seed=1)
    tried("v2", 0.2, "new")
    tried("v3", 0.2, "new", router={"name": "mlp"})
    tried("v4", 0.3, "other experts", expert="two")
    tried("v5", 0.4, "new", predictions=None, error="ValueError: no")
    found = table(tmp_path, "storage")["settings tried"]
    assert (found["ties"], found["individual"]) == (3, 0)


def test_a_row_says_which_place_its_setting_has_on_held_out_rows(tmp_path):
    """In the largest search; its own router's there, or else that of the best router with the same parameters."""

    def run(run_id: str, method: str = "ties", density: float | None = None, router: str = "oracle", **fields) -> None:
        fields = {"predictions": guess(0.95), "expert": "one", "router": {"name": router}} | fields
        add_run(tmp_path, run_id, method, params={"density": density} if density else {}, **fields)

    def searched(run_id: str, density: float, right: float, suite_id: str = "half", **fields) -> None:
        searched = {"predictions": guess(right), "split": "validation", "suite_id": suite_id}
        run(run_id, density=density, **searched | fields)

    run("a0", "individual")
    for suite_id in ("half", "few"):
        run(f"a-{suite_id}", "individual", split="validation", suite_id=suite_id)
    for n, right in enumerate((0.5, 0.8, 0.6, 0.9)):
        searched(f"v{n}", (n + 1) / 10, right, seed=0)
    searched("v4", 0.2, 0.9, seed=1)  # the second seed lifts 0.2, but not above 0.4
    searched("v5", 0.1, 0.7, router="mlp")
    half = {"topic": guess(0.99)["topic"]}
    searched("v6", 0.6, 0.99, predictions=half)
    searched("w0", 0.1, 0.9, suite_id="few")
    searched("w1", 0.2, 0.3, suite_id="few")
    for n in range(6):
        run(f"t{n}", density=(n + 1) / 10)
    run("t6", density=0.1, router="mlp")
    run("t7", density=0.1, router="knn")
    found = table(tmp_path, "storage")
    place = found["place in the largest search"]
    routed = [f"ties (density=0.1, router={name})" for name in ("oracle", "mlp", "knn")]
    assert place[routed].tolist() == ["5 of 5", "3 of 5", "3 of 5"]
    others = [f"ties (density={n / 10}, router=oracle)" for n in (2, 3, 4)]
    assert place[others].tolist() == ["2 of 5", "4 of 5", "1 of 5"]
    assert found.loc[others, "settings tried"].tolist() == [6, 6, 6]
    assert place[[f"ties (density={n}, router=oracle)" for n in (0.5, 0.6)]].isna().all(), "not searched; not whole"
    assert pd.isna(place["individual"]), "nothing was chosen"


def test_a_search_shows_the_best_setting_of_each_method_and_draws_no_other(tmp_path):
    searched = {"split": "validation"}
    add_run(tmp_path, "a0", "individual", guess(0.95), router={"name": "oracle"}, **searched)
    for density, right in ((0.1, 0.5), (0.2, 0.9), (0.3, 0.6)):
        add_run(tmp_path, f"t{density}", "ties", guess(right), params={"density": density}, **searched)
    add_run(tmp_path, "v0", "average", guess(0.7), **searched)
    found, scores = (table(tmp_path, name) for name in ("settings", "normalized"))
    assert found["best setting"].to_dict() == {"ties": "ties (density=0.2)", "average": "average"}
    assert found["settings tried"].to_dict() == {"ties": 3, "average": 1}
    each = (1.5 + 4.0 + 2 * (0.5 + 2.0)) / 60  # of one run: to merge, to train a router, and of two tasks
    assert found["minutes"].to_dict() == pytest.approx({"ties": 3 * each, "average": each})
    assert found.loc["ties", "average"] == scores.loc["ties (density=0.2)", "average"]
    assert found.loc["ties", "worst setting's average"] == scores.loc["ties (density=0.1)", "average"]
    folder = make(tmp_path, suite="toy")["folder"]
    (drawn,) = (folder / "figures").glob("*_scores.svg")
    assert "density=0.2" in drawn.read_text() and "density=0.1" not in drawn.read_text()
    assert "best setting of each method" in (folder / "leaderboard.md").read_text()


def test_settings_of_records_that_name_no_experts_count_for_their_own_suite_id(tmp_path):
    add_run(tmp_path, "t0", "ties", guess(0.6), params={"density": 0.1})
    for split, suite_id in (("validation", "new"), ("validation", "another")):
        add_run(tmp_path, f"v-{suite_id}", "ties", guess(0.6), params={"density": 0.2}, suite_id=suite_id, split=split)
    assert table(tmp_path, "storage")["settings tried"].tolist() == [1]


def test_a_row_says_what_data_it_reads(results):
    add_run(results, "f5", "fisher", guess(0.7), reads="training labels")
    found = table(results, "storage")["data needs"]
    assert found[["fisher", "ties", "twin_merging (router=mlp)", "twin_merging (router=oracle)"]].tolist() == [
        "training labels",
        "nothing",
        "training inputs",
        "nothing",
    ]


def time_rows(*runs: list[tuple]) -> pd.DataFrame:
    """The time table of one row, a seed per run; a run has (task, split, metric, n, route, evaluation) per record."""
    names = ("task", "split", "metric", "n", "route_seconds", "eval_seconds")
    made = [
        [
            completed(dict(zip(names, record, strict=True)) | {"merge_seconds": 1.0, "others_share": 0.0})
            for record in run
        ]
        for run in runs
    ]
    row = blocks.Row("ties", "ties", True, [blocks.Run("a", 0, {}, {}, {}, records) for records in made])
    return costs.time([row])


def test_seconds_per_1000_rows_count_each_split_of_a_task_once():
    """(4 + 1 + 0 + 5 + 2 + 0) s of routing and evaluation for 200 + 100 + 500 rows, then (8 + 12) s for 500 more."""
    one = [("a", "test", "accuracy", 200, 1.0, 4.0), ("a", "test", "router_accuracy", 200, 1.0, 4.0)]
    one += [("a", "mismatched", "accuracy", 100, 0.0, 5.0), ("b", "test", "accuracy", 500, 0.0, 2.0)]
    other = [("a", "test", "accuracy", 500, 8.0, 12.0)]
    assert time_rows(one)["s per 1000 rows"].tolist() == [12 / 800 * 1000]
    both = time_rows(one, other)
    assert both["s per 1000 rows"].tolist() == [(15 + 40) / 2]
    assert both[["merge", "route", "evaluation"]].to_numpy().tolist() == [[1.0, (1 + 8) / 2, (11 + 12) / 2]]


def test_times_are_those_of_runs_that_had_the_machine_to_themselves():
    names = ("task", "split", "metric", "n", "route_seconds", "eval_seconds", "merge_seconds", "others_share")
    runs = [
        blocks.Run("a", 0, {}, {}, {}, [completed(dict(zip(names, ("a", "test", "m", 10, 0.0, *row), strict=True)))])
        for row in ((2.0, 1.0, 0.05), (90.0, 80.0, 0.06), (70.0, 60.0, None))
    ]
    found = costs.time([blocks.Row("ties", "ties", True, runs), blocks.Row("dare", "dare", True, runs[1:])])
    assert found[["method", "merge", "evaluation"]].to_numpy().tolist() == [["ties", 1.0, 2.0]]


def test_seconds_that_were_not_measured_are_missing_and_the_others_stay():
    found = time_rows([("a", "test", "accuracy", 200, None, 4.0)]).iloc[0]
    assert found["evaluation"] == 4 and found[["route", "s per 1000 rows"]].isna().all()


def test_records_from_before_the_training_of_routers_was_timed_leave_it_empty_only_where_there_was_one():
    for router_bytes, missing in ((7, True), (0, False)):
        record = {"task": "a", "split": "test", "n": 1, "merge_seconds": 1.0, "others_share": 0.0}
        record = completed(record | {"router_bytes": router_bytes})
        found = costs.time([blocks.Row("ties", "ties", True, [blocks.Run("a", 0, {}, {}, {}, [record])])]).iloc[0]
        assert pd.isna(found["router training"]) == missing


def test_records_without_a_count_of_rows_can_be_read(results):
    path = results / "records" / "a3.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "n"}) + "\n" for row in rows))
    found = table(results, "time")
    assert found.loc["ties", "evaluation"] == 4 and pd.isna(found.loc["ties", "s per 1000 rows"])
    assert found.loc["average", "s per 1000 rows"] == pytest.approx(1000 * 5 / 600)
    cells = shown("time", found.reset_index()).set_index("method")["s per 1000 rows"]
    assert (cells["ties"], cells["average"]) == ("", "8.33")


def test_experts_have_their_own_matrix(results, report):
    found = table(results, "experts")
    assert list(found.index) == list(TASKS)
    assert found.loc["mood", "mood (pearson)"] == pytest.approx(100 * raw(guess(0.95))["mood"])
    assert found.loc["topic", "mood (pearson)"] == pytest.approx(100 * raw(guess(0.3))["mood"])
    assert not table(results).index.str.startswith("expert").any()
    assert "| mood " in (report["folder"] / "experts.md").read_text(encoding="utf-8")


def test_intervals_hold_the_point_and_find_real_differences_only(results):
    same = guess(0.92, seed=9)
    add_run(results, "f2", "emr", same)
    add_run(results, "f3", "tall_masks", same)
    found = table(results, reference="emr")
    whole = found[found["average"].notna()]
    assert (whole["average_low"] <= whole["average"]).all() and (whole["average"] <= whole["average_high"]).all()
    assert found.loc["tall_masks", ["difference", "difference_low", "difference_high"]].tolist() == [0.0, 0.0, 0.0]
    assert found.loc["tall_masks", "p"] == 1.0
    assert found.loc["average", "p"] < 0.01 and found.loc["average", "difference_high"] < 0
    assert pd.isna(found.loc["emr", "difference"])


def test_what_a_shared_expert_is_worth_is_paired_at_equal_settings(tmp_path):
    add_run(tmp_path, "a0", "individual", guess(0.95))
    quality = {("pretrained", 0.1): 0.7, ("ties", 0.1): 0.9, ("pretrained", 0.5): 0.9, ("ties", 0.5): 0.9}
    quality[("ties", 0.9)] = 1  # alone
    for (method, ratio), good in quality.items():
        params = {"rank_ratio": ratio, "shared": {"method": method}}
        add_run(tmp_path, f"{method}{ratio}", "twin_merging", guess(good), params=params, router={"name": "oracle"})
    found = table(tmp_path, "shared")
    assert list(found.index) == [f"twin_merging (rank_ratio={ratio}, method@shared=ties)" for ratio in (0.1, 0.5)]
    small, large = found.iloc[0], found.iloc[1]
    normalized = table(tmp_path)["average"]
    labels = [f"twin_merging (rank_ratio=0.1, method@shared={method})" for method in ("ties", "pretrained")]
    assert small["average"] == pytest.approx(normalized[labels[0]] - normalized[labels[1]])
    assert small["topic"] > 10 and 0 < small["average_low"] < small["average"] < small["average_high"]
    assert small["p"] < 0.01 and large["average"] == large["topic"] == 0 and large["p"] == 1
    cells = shown("shared", found.reset_index())
    assert cells["topic"][0].endswith("*") and cells["topic"][1] == "+0.0"


def test_of_many_points_the_picture_of_storage_names_those_that_no_other_beats(tmp_path, monkeypatch):
    """A row that is smallest has a name, however many better ones of nearly its size stand around it."""
    add_run(tmp_path, "a0", "individual", guess(0.95), router={"name": "oracle"}, exclusive_bytes=900_000_000)
    for number in range(plots.CROWD + 8):
        sizes = {"exclusive_bytes": 0 if number == 10 else 1000, "params": {"density": number}}
        add_run(tmp_path, f"t{number}", "ties", guess(0.8 - 0.0001 * number), **sizes)

    def named() -> list[int]:
        (drawn,) = (make(tmp_path, suite="toy")["folder"] / "figures").glob("*_storage.svg")
        return [number for number in range(plots.CROWD + 8) if f">ties (density={number})<" in drawn.read_text()]

    assert 10 in named() and len(named()) < plots.CROWD
    monkeypatch.setattr(plots, "best", lambda sizes, scores: np.full(len(sizes), False))
    assert 10 not in named()


def test_a_point_is_among_the_best_unless_another_is_smaller_or_better_and_in_nothing_worse():
    sizes, scores = np.array([1, 1, 2, 2, 3, 1]), np.array([5, 4, 6, 6, 6, 5])
    assert plots.best(sizes, scores).tolist() == [True, False, True, True, False, True]
