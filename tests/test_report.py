"""The report: what it computes from records written by hand, and what it writes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from twinbench import records
from twinbench.metrics import score
from twinbench.report import blocks, intervals, literature, make, read, tables
from twinbench.report.notes import notes as explained
from twinbench.report.text import shown

ROOT = Path(__file__).parents[1]
TASKS = {"topic": "accuracy", "mood": "pearson"}
N = 300


def truth() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {"topic": generator.integers(0, 4, N).astype(float), "mood": generator.normal(size=N)}


def guess(quality: float, seed: int = 0) -> dict[str, np.ndarray]:
    """Predictions that are right (topic) or correlate (mood) the more, the nearer ``quality`` is to 1."""
    generator, labels = np.random.default_rng(seed), truth()
    wrong = generator.random(N) > quality
    noise = generator.normal(size=N)
    return {
        "topic": np.where(wrong, (labels["topic"] + 1) % 4, labels["topic"]),
        "mood": quality * labels["mood"] + np.sqrt(1 - quality**2) * noise,
    }


def add_run(results: Path, run_id: str, method: str, predictions: dict | None = None, **fields) -> dict:
    """Write the records and predictions of one run and return its fields; without predictions it is a failed one."""
    run = {"run_id": run_id, "time": "2026-01-01T00:00:00+00:00", "commit": "abc", "dirty": False, "status": "ok"}
    run |= {"error": None, "experiment": None, "suite": "toy", "suite_id": "new", "base": "mini", "method": method}
    run |= {"params": {}, "router": None, "protocol": "strict", "seed": None, "split": "test", "device": "cpu"}
    run |= {"merge_seconds": 1.5, "router_seconds": 4.0, "route_seconds": 0.5, "eval_seconds": 2.0}
    run |= {"shared_bytes": 1_000_001}
    run |= {"exclusive_bytes": 500_000, "router_bytes": 7, "peak_memory_bytes": 1, "versions": {"numpy": "2"}} | fields
    rows, frames = [], []
    for task, prediction in (predictions or {}).items():
        value = score(TASKS[task], truth()[task], prediction)
        row = {"task": task, "metric": TASKS[task], "primary": True, "value": value, "n": N}
        rows.append(run | row)
        if (run["router"] or {}).get("name") == "mlp":
            shares = {"router_accuracy": 0.9} | {f"routed_to/{name}": 0.9 if name == task else 0.1 for name in TASKS}
            rows += [run | row | {"metric": name, "primary": False, "value": part} for name, part in shares.items()]
        frame = {
            "task": task,
            "split": run["split"],
            "row": np.arange(N),
            "label": truth()[task],
            "prediction": prediction,
        }
        frames.append(pd.DataFrame(frame))
    if predictions is None:
        rows = [run | dict.fromkeys(("task", "metric", "primary", "value", "n")) | {"status": "failed"}]
    for folder in ("records", "predictions"):
        (results / folder).mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (results / "records" / f"{run_id}.jsonl").write_text(text, encoding="utf-8")
    if frames:
        pd.concat(frames).to_parquet(results / "predictions" / f"{run_id}.parquet")
    return run


def fill(tmp_path: Path) -> Path:
    """Bounds, two static methods, Twin-Merging over three seeds and with an oracle, blind runs and a failed one."""
    mlp, oracle = {"name": "mlp", "hidden": 8}, {"name": "oracle"}
    add_run(tmp_path, "a0", "individual", guess(0.95), router=oracle)
    add_run(tmp_path, "a1", "pretrained", guess(0.2))
    add_run(tmp_path, "a2", "average", guess(0.5))
    add_run(tmp_path, "a3", "ties", guess(0.6), params={"density": 0.2})
    for seed, quality in enumerate((0.85, 0.9, 0.92)):
        add_run(tmp_path, f"b{seed}", "twin_merging", guess(quality, seed), router=mlp, seed=seed)
    add_run(tmp_path, "b3", "twin_merging", guess(0.93), router=oracle, seed=0)
    add_run(tmp_path, "c0", "individual", guess(0.9), router=mlp, protocol="blind", seed=0)
    add_run(tmp_path, "c1", "twin_merging", guess(0.8), router=mlp, protocol="blind", seed=0)
    add_run(tmp_path, "d0", "della", error="ValueError: density must be in (0, 1]; got 0\n  traceback")
    for name in TASKS:
        other = guess(0.3) | {name: guess(0.95)[name]}
        add_run(tmp_path, f"e-{name}", "expert", other, params={"task": name})
    return tmp_path


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return fill(tmp_path)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """The written report of the same records, made once: read it, leave it as it is."""
    return make(fill(tmp_path_factory.mktemp("results")), suite="toy")


def computed(results: Path, reference: str = "twin_merging") -> dict[tuple[str, str], dict[str, pd.DataFrame]]:
    """Tables per (suite_id, protocol), without writing or drawing anything."""
    found = blocks.blocks(read.chosen(results, "toy", None))
    frames, _ = read.predictions(results, found)
    draws = intervals.draws(frames, found)
    return {(block.suite_id, block.protocol): tables.make(block, draws, reference) for block in found}


def table(results: Path, name: str = "normalized", reference: str = "twin_merging") -> pd.DataFrame:
    """A table of the strict block of the newest experts, by label."""
    found = computed(results, reference)["new", "strict"][name]
    return found.set_index("expert" if name == "experts" else "method")


def notes(results: Path) -> str:
    """What is said of the empty cells of the first block."""
    block, *_ = blocks.blocks(read.chosen(results, "toy", None))
    frames, doubts = read.predictions(results, [block])
    table = tables.normalized(block, intervals.draws(frames, [block]), "ties")
    return "\n".join(explained(block, table, "ties", doubts=doubts, where="results_dir=R"))


def raw(predictions: dict[str, np.ndarray]) -> dict[str, float]:
    return {task: score(TASKS[task], truth()[task], predictions[task]) for task in TASKS}


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


def test_normalizer_of_zero_or_less_leaves_the_cell_empty(tmp_path):
    upside_down = guess(0.9) | {"mood": -truth()["mood"]}
    add_run(tmp_path, "a0", "individual", upside_down)
    add_run(tmp_path, "a1", "average", guess(0.5))
    found = table(tmp_path)
    assert found[["mood", "average"]].isna().all(axis=None)
    assert found.loc["individual", "topic"] == 100.0
    assert "Not normalized: mood" in notes(tmp_path)


def test_csv_has_full_precision(report):
    for name, frame in report["tables"].items():
        lines = (report["folder"] / f"{name}.csv").read_text(encoding="utf-8").splitlines()
        assert lines[0].split(",")[0] == frame.columns[0] and len(lines) == len(frame) + 1
    read = pd.read_csv(report["folder"] / "strict_normalized.csv", float_precision="round_trip")
    for column in [*TASKS, "average", "average_low", "difference_high"]:
        np.testing.assert_array_equal(read[column], report["tables"]["strict_normalized"][column])


def test_storage_time_and_router_tables(results):
    assert list(table(results, "storage").loc["ties"]) == [1_000_001, 500_000, 7, 1_500_008]
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
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["emr", "1.00", "8.00", "0.00", "9.00", "dense"]


def time_rows(*runs: list[tuple]) -> pd.DataFrame:
    """The time table of one row, a seed per run; a run has (task, split, metric, n, route, evaluation) per record."""
    names = ("task", "split", "metric", "n", "route_seconds", "eval_seconds")
    made = [[dict(zip(names, record, strict=True)) | {"merge_seconds": 1.0} for record in run] for run in runs]
    row = blocks.Row("ties", "ties", True, [blocks.Run("a", 0, {}, {}, {}, records) for records in made])
    return tables.time([row])


def test_seconds_per_1000_rows_count_each_split_of_a_task_once():
    """(4 + 1 + 0 + 5 + 2 + 0) s of routing and evaluation for 200 + 100 + 500 rows, then (8 + 12) s for 500 more."""
    one = [("a", "test", "accuracy", 200, 1.0, 4.0), ("a", "test", "router_accuracy", 200, 1.0, 4.0)]
    one += [("a", "mismatched", "accuracy", 100, 0.0, 5.0), ("b", "test", "accuracy", 500, 0.0, 2.0)]
    other = [("a", "test", "accuracy", 500, 8.0, 12.0)]
    assert time_rows(one)["s per 1000 rows"].tolist() == [12 / 800 * 1000]
    both = time_rows(one, other)
    assert both["s per 1000 rows"].tolist() == [(15 + 40) / 2]
    assert both[["merge", "route", "evaluation"]].to_numpy().tolist() == [[1.0, (1 + 8) / 2, (11 + 12) / 2]]


def test_seconds_that_were_not_measured_are_missing_and_the_others_stay():
    found = time_rows([("a", "test", "accuracy", 200, None, 4.0)]).iloc[0]
    assert found["evaluation"] == 4 and found[["route", "s per 1000 rows"]].isna().all()


def test_records_from_before_the_training_of_routers_was_timed_leave_it_empty_only_where_there_was_one():
    for router_bytes, missing in ((7, True), (0, False)):
        record = {"task": "a", "split": "test", "n": 1, "merge_seconds": 1.0, "router_bytes": router_bytes}
        found = tables.time([blocks.Row("ties", "ties", True, [blocks.Run("a", 0, {}, {}, {}, [record])])]).iloc[0]
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


def add_experts(results: Path, suite_id: str = "new", **changes) -> None:
    """Write how the experts of ``TASKS`` were trained: a log as transformers keeps it, two epochs and three."""
    recipe = {"epochs": 2, "batch_size": 16, "lr": 1e-4, "weight_decay": 0.01, "warmup": 0.06, "freeze": [], "seed": 0}
    training = {}
    for place, (name, metric) in enumerate(TASKS.items()):
        log = []
        for epoch in range(1, 3 + place):
            log.append({"loss": 1 / epoch, "learning_rate": 1e-4, "epoch": float(epoch), "step": 5 * epoch})
            log.append({"eval_loss": 2 / epoch, f"eval_{metric}": 0.5 + 0.1 * epoch, "epoch": float(epoch)})
        log.append({"train_runtime": 9.0, "train_loss": 0.5, "epoch": 2.0 + place})
        training[name] = {"expert": f"{name}-0", "data": "wheel toys==1.0", "rows": {"train": 700, "validation": 80}}
        training[name] |= {"loss": "squared error", "metric": metric, "recipe": recipe, "curve": log}
        training[name] |= {"seconds": 12.4, "device": "cpu", "torch": "2"} | changes
    records.write_experts(results, suite_id, training)


def test_experts_are_told_with_their_recipe_and_learning_curves(results):
    before = make(results, suite="toy")
    assert not [name for name in before["tables"] if name.startswith(("experts_", "data_"))]
    add_experts(results)
    made = make(results, suite="toy")
    found = {name: made["tables"][f"experts_{name}"].set_index("task") for name in ("training", "learned", "seconds")}
    assert found["training"].loc["mood", ["rows", "epochs", "learning rate", "batch size"]].tolist() == [
        700,
        2,
        1e-4,
        16,
    ]
    assert found["learned"].loc["topic", ["epoch 1", "epoch 2", "last"]].tolist() == pytest.approx([60, 70, 70])
    assert pd.isna(found["learned"].loc["topic", "epoch 3"])
    assert found["learned"].loc["mood", "last"] == pytest.approx(80)
    assert found["seconds"]["training"].tolist() == [12.4, 12.4]
    curve = pd.read_csv(made["folder"] / "experts_learning.csv").set_index(["task", "epoch"])
    assert len(curve) == 2 + 3
    assert curve.loc[("mood", 3), ["training_loss", "held_out_loss", "value"]].tolist() == pytest.approx(
        [1 / 3, 2 / 3, 0.8]
    )
    for name in ("leaderboard.md", "experts.md", "index.html"):
        text = (made["folder"] / name).read_text(encoding="utf-8")
        assert "How the experts were trained" in text and "Held-out score after each epoch (points)" in text
    assert r"topic & 700 & 2 & 0.0001 & 16" in (made["folder"] / "experts.tex").read_text(encoding="utf-8")
    drawing = made["figures"]["experts_learning"].with_suffix(".svg").read_text(encoding="utf-8")
    for words in ("topic", "mood", "loss: squared error", "accuracy (points)", "pearson (points)", "epoch"):
        assert f">{words}</text>" in drawing
    same = before["tables"]["strict_normalized"]
    pd.testing.assert_frame_equal(made["tables"]["strict_normalized"], same)


def test_a_diverged_training_is_shown_without_its_numbers(results):
    log = [{"loss": None, "epoch": 1.0}, {"eval_loss": None, "eval_accuracy": None, "epoch": 1.0}]
    add_experts(results, curve=log)
    made = make(results, suite="toy")
    assert made["tables"]["experts_learned"][["epoch 1", "last"]].isna().all(axis=None)
    assert made["figures"]["experts_learning"].exists()


def test_experts_stand_with_their_own_suite_id(results):
    add_run(results, "f0", "average", guess(0.7), suite_id="old", time="2025-01-01T00:00:00+00:00")
    add_experts(results, "old")
    made = make(results, suite="toy")
    assert {"experts_old_training", "data_old_origins"} <= made["tables"].keys()
    assert "experts_training" not in made["tables"] and "experts_old_learning" not in made["figures"]
    page = (made["folder"] / "index.html").read_text(encoding="utf-8")
    assert page.index("other experts or data") < page.index("How the experts were trained")


def test_a_file_of_experts_that_is_none_is_one_clear_error(results):
    (results / "experts").mkdir()
    for text in ("{", "[]"):
        (results / "experts" / "new.json").write_text(text)
        with pytest.raises(ValueError, match=r"new\.json: not "):
            make(results, suite="toy")
    for text, lacks in (('{"topic": 1}', "rows, recipe, .*, epochs"), ('{"topic": {"rows": {}}}', "recipe, curve, .*")):
        (results / "experts" / "new.json").write_text(text)
        with pytest.raises(ValueError, match=rf"experts/new\.json: task topic lacks {lacks}"):
            make(results, suite="toy")


def test_data_is_told_with_its_origin_and_a_local_copy_is_called_one(tmp_path):
    hub, local = "nyu-mll/glue@bcdcba79/qqp", "local folder qqp, sha256 0123456789ab"
    for folder, origin in (("a", hub), ("b", local)):
        add_run(tmp_path / folder, "a0", "average", guess(0.5), data=origin)
        made = make(tmp_path / folder, suite="toy")
        assert made["tables"]["data_origins"].to_numpy().tolist() == [["topic", N, origin], ["mood", N, origin]]
        for name in ("leaderboard.md", "index.html"):
            text = (made["folder"] / name).read_text(encoding="utf-8")
            told = "local copy: topic, mood. A local copy may differ from the official split" in text
            assert origin in text and told == (origin == local)


def test_data_of_older_records_is_told_by_the_file_of_their_experts(results):
    add_experts(results, data="local folder qqp, sha256 0123456789ab")
    found = make(results, suite="toy")["tables"]["data_origins"].set_index("task")
    assert found.loc["mood"].tolist() == [700, 80, N, "local folder qqp, sha256 0123456789ab"]


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


def test_no_interval_without_predictions(results):
    (results / "predictions" / "a3.parquet").unlink()
    found = table(results)
    assert found.loc["ties", ["average_low", "difference_low", "p"]].isna().all()
    assert found.loc["ties", ["average", "difference"]].notna().all()
    assert "No interval for ties" in notes(results)


def test_predictions_are_those_of_their_record_or_not_used(results):
    """An interval is never of other predictions than the score beside it."""
    path = results / "predictions" / "a3.parquet"
    own = pd.read_parquet(path)
    path.write_bytes((results / "predictions" / "a2.parquet").read_bytes())  # another run's
    found, told = table(results), notes(results)
    assert found.loc["ties", ["average_low", "difference_low", "p"]].isna().all()
    assert found.loc["ties", "average"] > 0 and found.loc["average", "average_low"] > 0
    ties, average = raw(guess(0.6)), raw(guess(0.5))
    said = "; ".join(f"{t} {m} {average[t]:.4f}, the record {ties[t]:.4f}" for t, m in TASKS.items())
    assert f"Predictions not used: those of ties, run a3, give {said}." in told
    assert "No interval for ties: per-example predictions are missing or not used" in told
    own[own["row"] != 7].to_parquet(path)
    assert "those of ties, run a3, give 299 rows of topic, the record 300; 299 rows of mood" in notes(results)
    own.assign(prediction=np.where(own.index == 5, np.nan, own["prediction"])).to_parquet(path)
    assert "predictions of mood that are no numbers." in notes(results)
    other = own.assign(split="mismatched", prediction=0.0)  # rows scored beside the test
    pd.concat([other, own]).sample(frac=1, random_state=0).to_parquet(path)
    assert "not used" not in notes(results) and table(results).loc["ties", "average_low"] > 0


def test_predictions_within_rounding_are_used(results):
    path = results / "records" / "a3.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for change, used in ((5e-7, True), (-5e-7, True), (2e-6, False), (-2e-6, False)):
        changed = [row | {"value": row["value"] + change} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in changed), encoding="utf-8")
        assert ("not used" not in notes(results)) == used


def test_a_file_that_holds_no_predictions_is_one_clear_error(results):
    path = results / "predictions" / "a3.parquet"
    own = pd.read_parquet(path)
    own.drop(columns="row").to_parquet(path)
    with pytest.raises(ValueError, match=r"predictions/a3\.parquet: not predictions, for want of row"):
        make(results, suite="toy")
    own.assign(label="x").to_parquet(path)
    with pytest.raises(ValueError, match=r"a3\.parquet: not predictions, for want of label"):
        make(results, suite="toy")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"a3\.parquet: not predictions \(") as error:
        make(results, suite="toy")
    assert "\n" not in str(error.value)


def test_what_is_not_normalized_is_told_with_the_command_that_measures_it(tmp_path):
    add_run(tmp_path, "a1", "average", guess(0.5))
    command = "`python run.py suite=toy method=individual results_dir=R`"
    assert "Nothing is normalized: no run of individual under the strict protocol" in notes(tmp_path)
    assert command in notes(tmp_path)
    page = (make(tmp_path, suite="toy")["folder"] / "index.html").read_text(encoding="utf-8")
    assert f"<code>python run.py suite=toy method=individual results_dir={tmp_path}</code>" in page
    add_run(tmp_path, "a0", "individual", {"topic": guess(0.95)["topic"]})
    told = notes(tmp_path)
    assert "Not normalized: mood; a run of individual has no score there" in told
    assert command.replace("R`", "R force=true`") in told
    assert "Incomplete: individual, run a0, has no score of mood." in told
    add_run(tmp_path, "a0", "individual", guess(0.95))
    assert "ormalized" not in notes(tmp_path) and "Incomplete" not in notes(tmp_path)


def test_older_results_are_not_told_a_command(results):
    add_run(results, "f0", "average", guess(0.7), suite_id="old", time="2025-01-01T00:00:00+00:00")
    page = (make(results, suite="toy")["folder"] / "index.html").read_text(encoding="utf-8")
    assert "Nothing is normalized" in page and "method=individual" not in page


def test_predictions_of_other_rows_are_refused(results):
    path = results / "predictions" / "a3.parquet"
    frame = pd.read_parquet(path)
    frame.assign(row=frame["row"] + 1).to_parquet(path)
    with pytest.raises(ValueError, match="a3, task topic: other rows"):
        computed(results)


def test_what_a_shared_expert_is_worth_is_paired_at_equal_settings(tmp_path):
    add_run(tmp_path, "a0", "individual", guess(0.95))
    quality = {("pretrained", 0.1): 0.7, ("ties", 0.1): 0.9, ("pretrained", 0.5): 0.9, ("ties", 0.5): 0.9}
    quality[("ties", 0.9)] = 1  # alone
    for (method, ratio), good in quality.items():
        params = {"rank_ratio": ratio, "shared": {"method": method}}
        add_run(tmp_path, f"{method}{ratio}", "twin_merging", guess(good), params=params, router={"name": "oracle"})
    found = table(tmp_path, "shared")
    assert list(found.index) == [f"twin_merging (rank_ratio={ratio}, shared.method=ties)" for ratio in (0.1, 0.5)]
    small, large = found.iloc[0], found.iloc[1]
    normalized = table(tmp_path)["average"]
    labels = [f"twin_merging (rank_ratio=0.1, shared.method={method})" for method in ("ties", "pretrained")]
    assert small["average"] == pytest.approx(normalized[labels[0]] - normalized[labels[1]])
    assert small["topic"] > 10 and 0 < small["average_low"] < small["average"] < small["average_high"]
    assert small["p"] < 0.01 and large["average"] == large["topic"] == 0 and large["p"] == 1
    cells = shown("shared", found.reset_index())
    assert cells["topic"][0].endswith("*") and cells["topic"][1] == "+0.0"


def test_regenerating_gives_the_same_bytes(report):
    folder = report["folder"]
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    make(folder.parents[1], suite="toy")
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before
    suffixes = {path.suffix for path in before}
    assert suffixes == {".html", ".md", ".tex", ".csv", ".svg", ".png", ".txt"}
    listed = set((folder / "manifest.txt").read_text(encoding="utf-8").splitlines())
    assert listed == {path.relative_to(folder).as_posix() for path in before} - {"manifest.txt"}


def test_a_report_removes_what_the_last_one_wrote_and_nothing_else(results):
    folder = make(results, suite="toy")["folder"]
    outside = [results / "README.md", folder / "mine.csv", folder / "figures" / "mine.png"]
    for path in outside:
        path.write_text("not of a report")
    with (folder / "manifest.txt").open("a", encoding="utf-8") as file:
        file.write("../../README.md\nfigures/../mine.csv\n/etc/hosts\nnever_there.csv\n")
    for path in [*(results / "records").glob("[de]*.jsonl"), results / "records" / "c0.jsonl"]:
        path.unlink()
    before = {path for path in folder.rglob("*.*") if path not in outside}
    make(results, suite="toy")
    gone = {"experts.csv", "experts.md", "strict_failed.csv", "figures/experts.svg", "figures/experts.png"}
    after = {path for path in folder.rglob("*.*") if path not in outside}
    assert {path.relative_to(folder).as_posix() for path in before - after} >= gone - {"experts.md"}
    assert all(path.read_text() == "not of a report" for path in outside)
    listed = set((folder / "manifest.txt").read_text(encoding="utf-8").splitlines())
    assert listed == {path.relative_to(folder).as_posix() for path in after} - {"manifest.txt"}


def test_a_report_that_could_not_be_written_leaves_no_parts_and_is_mended_by_the_next(results):
    folder = results / "reports" / "toy"
    (folder / "strict_raw.csv").mkdir(parents=True)
    with pytest.raises(OSError, match=r"strict_raw\.csv"):
        make(results, suite="toy")
    assert (folder / "index.html").exists() and not list(folder.rglob(".*"))
    (folder / "strict_raw.csv").rmdir()
    for path in (results / "records").glob("[bce]*.jsonl"):
        path.unlink()
    make(results, suite="toy")
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    assert left == {"manifest.txt", *(folder / "manifest.txt").read_text(encoding="utf-8").splitlines()}


@pytest.mark.parametrize("name", ["../../..", "/tmp", "a/b", ".hidden", "", "-x", "a b", "a\n"])
def test_names_that_leave_the_folder_of_reports_are_refused(results, name):
    add_run(results, "f0", "average", guess(0.7), suite=name)
    for setting in ("suite", "experiment"):
        with pytest.raises(ValueError, match=f"{setting}=.* names no report"):
            make(results, **{setting: name})
    assert not (results / "reports").exists()


def test_a_record_whose_suite_id_is_a_path_writes_nothing(results):
    add_run(results, "f0", "average", guess(0.7), suite_id="../../x", time="2025-01-01T00:00:00+00:00")
    with pytest.raises(ValueError, match=r"a report has no file 'strict_\.\./\.\./x"):
        make(results, suite="toy")
    assert not (results / "reports").exists()


ABSENT = object()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("value", None, "value of a record must be a finite number; got None"),
        ("value", "0.5", "value of a record must be a finite number; got '0.5'"),
        ("value", True, "value of a record must be a finite number; got True"),
        ("value", float("nan"), "value of a record must be a finite number; got nan"),
        ("value", -float("inf"), "value of a record must be a finite number; got -inf"),
        ("value", ABSENT, "value of a record must be a finite number; there is none"),
        ("time", ABSENT, "time of a record must be text; there is none"),
        ("status", "fine", "status of a record must be ok or failed; got 'fine'"),
        ("protocol", "loose", "protocol of a record must be strict or paper or blind; got 'loose'"),
        ("suite_id", 3, "suite_id of a record must be text or null; got 3"),
        ("params", [], r"params of a record must be an object or null; got \[\]"),
        ("router", {}, "router of a record must have a name"),
        ("primary", 1, "primary of a record must be true or false; got 1"),
        ("shared_bytes", None, "shared_bytes of a record must be a finite number; got None"),
        ("merge_seconds", "1", "merge_seconds of a record must be a finite number or null"),
        ("n", 1.5, "n of a record must be a whole number or null; got 1.5"),
        ("seed", "0", "seed of a record must be"),
    ],
)
def test_a_malformed_record_is_one_clear_error_with_its_file(results, key, value, words):
    path = results / "records" / "a3.jsonl"
    first, *rest = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    first = {name: kept for name, kept in first.items() if name != key} | ({} if value is ABSENT else {key: value})
    path.write_text("".join(json.dumps(row) + "\n" for row in (first, *rest)), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"records/a3\.jsonl, line 1: {words}") as error:
        make(results, suite="toy")
    assert "\n" not in str(error.value)


def test_an_experiment_without_records_is_one_clear_error(results):
    records.write_sweep(results, "pilot", ["nowhere"])
    with pytest.raises(ValueError, match="no records of experiment 'pilot'"):
        make(results, experiment="pilot")


def test_a_caveat_of_the_suite_stands_first(results):
    (results / "caveats").mkdir()
    (results / "caveats" / "toy.md").write_text("Not a\nfinding: x < y.\n\nSecond.\n")
    (results / "caveats" / "other.md").write_text("Of another suite.")
    made = make(results, suite="toy")
    for text in (made["summary"], (made["folder"] / "leaderboard.md").read_text()):
        assert text.startswith("# toy\n\n> Not a finding: x < y.\n\n> Second.\n\nA normalized score")
        assert "another suite" not in text
    page = (made["folder"] / "index.html").read_text()
    assert page.index("Not a finding: x &lt; y.") < page.index("How to read the numbers")


def test_suites_are_told_apart_in_the_headings_of_one_report(results):
    add_run(results, "z9", "average", guess(0.4), suite="toy_other", suite_id="other", time="2025-01-01T00:00:00+00:00")
    records.write_sweep(results, "both", ["a0", "a2", "z9"])
    text = make(results, experiment="both")["summary"]
    assert "## toy: strict protocol" in text and "## toy_other: strict protocol, 2 tasks, suite_id other" in text


def test_page_is_self_contained_and_names_every_method(report):
    page = (report["folder"] / "index.html").read_text(encoding="utf-8")
    loaded = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)\)|@import""", page)
    links = {first or second for first, second in loaded}
    assert all(link.startswith("#") or (report["folder"] / link).exists() for link in links), links
    for name in ("individual", "pretrained", "average", "ties", "twin_merging", "della", "router=oracle"):
        assert name in page
    assert page.count("<svg") == len(report["figures"]) == 9
    assert all(path.exists() for path in report["figures"].values())


def test_markup_in_a_name_is_escaped(tmp_path):
    evil = "<script>alert(1)</script> [x](http://y) a|b & $x^$ \\n\n| c"
    for run_id, note in (("a", ""), ("b", evil)):
        add_run(tmp_path, run_id, "average", guess(0.5), params={"note": note})
    add_run(tmp_path, "c", "ties", error=evil)
    folder = make(tmp_path, suite="toy")["folder"]
    page, markdown, latex = ((folder / f).read_text() for f in ("index.html", "leaderboard.md", "leaderboard.tex"))
    assert "alert(1)" in page and "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; [x]\\(http://y) a\\|b &amp; $x^$" in markdown
    assert "<script>" not in markdown and "](http" not in markdown and "\n| c" not in markdown
    assert r"\textless{}script\textgreater{}" in latex and r"a\textbar{}b \& \$x\textasciicircum{}\$" in latex


def run_module(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess:
    command = ["-c", code] if code else ["-m", "twinbench.report", *arguments]
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, encoding="utf-8")


def test_command_line_prints_the_table_and_imports_no_torch(results):
    code = (
        "import sys; from twinbench.report.__main__ import main; "
        f"code = main(['suite=toy', 'results_dir={results}']); "
        "sys.exit(9 if {'torch', 'transformers', 'scipy'} & set(sys.modules) else code)"
    )
    done = run_module(code=code)
    assert done.returncode == 0, done.stderr
    assert "| twin_merging (router=mlp) [reference]" in done.stdout
    assert done.stdout.splitlines()[-1] == str(results / "reports" / "toy" / "index.html")


def test_command_line_errors_are_one_clear_line(results):
    cases = {
        ("suite=toys", f"results_dir={results}"): "error: no records of suite 'toys'; suites with records: toy",
        ("sute=toy",): "error: unknown setting 'sute'; did you mean 'suite'?",
        ("suite=toy", f"results_dir={results}", "reference=tie"): "did you mean 'ties'?",
        ("suite=../../x", f"results_dir={results}"): "error: suite='../../x' names no report: a name is of letters",
    }
    for arguments, message in cases.items():
        done = run_module(*arguments)
        assert done.returncode == 1 and done.stdout == ""
        assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_reference_that_fits_several_rows_is_refused_with_their_labels(results):
    add_run(results, "a4", "ties", guess(0.7), params={"density": 0.5})
    words = r"'ties' fits 2 rows; give one of ties \(density=0\.2\); ties \(density=0\.5\)"
    with pytest.raises(ValueError, match=words):
        make(results, suite="toy", reference="ties")
    assert table(results, reference="ties (density=0.5)").loc["ties (density=0.5)", "reference"]
    made = make(results, suite="toy", reference="ties (density=0.5)")["tables"]["strict_normalized"]
    assert made.loc[made["reference"], "method"].tolist() == ["ties (density=0.5)"]


def test_suite_that_only_failed_still_has_a_report(tmp_path):
    add_run(tmp_path, "a0", "ties", error=None)
    report = make(tmp_path, suite="toy")
    assert list(report["tables"]) == ["strict_failed"] and report["figures"] == {}
    assert "no message" in (report["folder"] / "index.html").read_text(encoding="utf-8")


def test_published_scores_stand_apart_and_are_subtracted_only_from_the_same_work(tmp_path, monkeypatch):
    """Under their own protocol, with their source, and never as one of our rows."""
    fields = {"source": "A paper", "where": "Table 1", "how": "quoted", "checkpoints": "theirs", "base": "me/base"}
    fields |= {"protocol": "paper", "unit": "normalized %", "note": ""}
    numbers = [("average", "topic", 60.0), ("average", "average", 61.5), ("ties", "average", 70.0)]
    lines = [fields | {"method": method, "task": task, "value": value} for method, task, value in numbers]
    lines.append(fields | {"method": "average", "task": "mood", "value": 99.0, "unit": "points"})
    (tmp_path / "literature").mkdir()
    pd.DataFrame(lines).to_csv(tmp_path / "literature" / "toy.csv", index=False)
    monkeypatch.setattr(literature, "FOLDER", tmp_path / "literature")
    add_run(tmp_path, "a0", "individual", guess(0.95), router={"name": "oracle"})
    for run_id, method, base in (("p0", "average", "hub:me/base@1"), ("p1", "ties", "hub:you/base@1")):
        add_run(tmp_path, run_id, method, guess(0.5), protocol="paper", base=base)
    found = computed(tmp_path)
    assert "published" not in found["new", "strict"]
    normalized, published = (found["new", "paper"][name].set_index("method") for name in ("normalized", "published"))
    assert published.loc["average", "topic"] == 60.0
    assert published.loc["average", "difference"] == pytest.approx(normalized.loc["average", "average"] - 61.5)
    assert published.loc["ties", "ours"] == normalized.loc["ties", "average"]
    assert np.isnan(published.loc["ties", "difference"]), "other experts are other work"
    assert np.isnan(published.loc["average", "mood"]), "points are no percentages"
    assert published.loc["ties", "source"] == "A paper, Table 1 (quoted); theirs"


def generative(suite: str, base: str) -> dict[tuple[str, str], pd.Series]:
    """What was published beside a block of ``suite``: per method and how it came to us one line.

    Our scores: individual 0.5 on every task, Twin-Merging 0.6, so an average of 120 %.
    """
    rows = []
    for method, value in (("individual", 0.5), ("twin_merging", 0.6)):
        run = {"run_id": method, "time": "2026", "status": "ok", "suite": suite, "suite_id": suite, "base": base}
        run |= {"method": method, "params": {}, "router": None, "protocol": "strict", "seed": None, "split": "test"}
        tasks = {"mmlu": "accuracy", "truthful_qa": "accuracy", "bbq": "accuracy", "cnn_dailymail": "rouge2"}
        rows += [run | {"task": t, "metric": m, "primary": True, "value": value, "n": 9} for t, m in tasks.items()]
    (block,) = blocks.blocks(rows)
    ours = pd.DataFrame({"method": ["individual", "twin_merging"], "average": [100.0, 120.0]})
    lines = [line for _, line in literature.published(block, ours).iterrows()]
    return {(line["method"], re.search(r"\((\w+)\); ", line["source"]).group(1)): line for line in lines}


def test_the_papers_generative_scores_stand_beside_both_generative_suites():
    qwen = generative("generative_qwen", "hub:Qwen/Qwen-14B@c4051215")
    small = generative("generative_smollm", "wheel smollm==1.0")
    assert qwen.keys() == small.keys()
    twin = qwen["twin_merging", "quoted"]
    assert twin["average"] == 102.38 and twin["ours"] == 120
    assert twin["difference"] == pytest.approx(17.62)
    assert small["twin_merging", "quoted"]["ours"] == 120
    assert pd.isna(small["twin_merging", "quoted"]["difference"]), "another base is other work"
    assert [qwen[m, "derived"]["average"] for m in ("ties", "dare")] == pytest.approx([102.38 - 9.71, 102.38 - 3.86])
    tasks = ["mmlu", "truthful_qa", "bbq", "cnn_dailymail"]
    assert twin[tasks].isna().all(), "the README's are points"
    figure = {method: line for (method, how), line in qwen.items() if how == "digitised"}
    assert figure["twin_merging"][tasks].tolist() == [99.7, 98.1, 96.8, 114.3]
    whole = [line for line in figure.values() if line[tasks].notna().all()]
    assert len(whole) == 5
    for line in whole:
        assert line["average"] == pytest.approx(line[tasks].mean(), abs=0.051)
    for method in ("task_arithmetic", "dare"):
        assert "perhaps swapped" in figure[method]["source"]
