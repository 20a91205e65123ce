"""What a report reads: sound records, predictions that are their record's, and notes on all else."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from support.results import TASKS, add_run, computed, fill, guess, notes, raw, table
from twinbench.records import store
from twinbench.report.make import make


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return fill(tmp_path)


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
    store.write_sweep(results, "pilot", ["nowhere"])
    with pytest.raises(ValueError, match="no records of experiment 'pilot'"):
        make(results, experiment="pilot")


def test_a_suite_whose_test_was_never_scored_is_reported_on_its_held_out_rows(results):
    """A sweep that chooses a setting is one; the next one scores the test, and the report is of that alone."""
    for path in (results / "records").iterdir():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        path.write_text("".join(json.dumps(row | {"split": "validation"}) + "\n" for row in rows), encoding="utf-8")
    assert any("validation" in name for name in make(results, suite="toy")["tables"])
    add_run(results, "t0", "individual", guess(0.9))
    assert not any("validation" in name for name in make(results, suite="toy")["tables"])


def test_what_has_read_the_tests_inputs_has_a_table_of_its_own(results):
    before = table(results)
    add_run(results, "x0", "adamerging_tta", guess(0.99), reads="test inputs")
    add_run(results, "x1", "adamerging", guess(0.8), reads="training inputs")
    found = make(results, suite="toy")["tables"]
    apart = next(found[name] for name in found if "adapted" in name and "normalized" in name)
    assert apart["method"].tolist() == ["adamerging_tta"]
    assert 0 < apart["average"][0] < 120, "it is still divided by the experts' scores"
    together = table(results)
    assert set(together.index) == {*before.index, "adamerging"}
    assert (results / "reports" / "toy" / "leaderboard.md").read_text().count(
        "adapted to the inputs that are scored"
    ) == 1
