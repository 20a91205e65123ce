"""Records on disk: the last one written counts, predictions are its own, and what is damaged is named in one line."""

import json
import os
import re
import socket
import subprocess
import sys

import pandas as pd
import pytest

from support.commands import ROOT
from twinbench.assets import sources
from twinbench.records import store
from twinbench.records.record import KINDS, LATER, MEASURED, completed, failure, finished, is_local, parsed

RUN = {"run_id": "a1", "suite": "toy", "suite_id": "s", "base": "b", "method": "ties", "params": {}, "router": None}
RUN |= {"protocol": "strict", "seed": None, "split": "test", "versions": {}, "status": "ok", "error": None}
RUN |= {"commit": None, "dirty": None, "metric": "accuracy", "primary": True, "n": 4, "device": "cpu"}
RUN |= {"merge_seconds": 1.0, "route_seconds": 0.0, "eval_seconds": 1.0}
RUN |= {"shared_bytes": 8, "exclusive_bytes": 0, "router_bytes": 0}
FUTURE = "20990101T000000000000"


def rows(time: str, *values: float, **changes) -> list[dict]:
    return [RUN | {"time": time, "task": f"t{i}", "value": value} | changes for i, value in enumerate(values)]


def frame(prediction: float) -> pd.DataFrame:
    return pd.DataFrame({"task": "t0", "split": "test", "row": range(4), "label": 1.0, "prediction": prediction})


def shown(results) -> tuple[list[float], list[float]]:
    """Values and predictions that a report has of the run."""
    found = store.predictions(results, "a1")
    values = [row["value"] for row in store.latest(store.read(results))]
    return values, None if found is None else found["prediction"].unique().tolist()


def test_the_last_run_wins_with_any_clock_and_keeps_its_own_predictions(tmp_path):
    first = store.write(tmp_path, rows("then", 0.1, 0.2), frame(0.0))
    predicted = tmp_path / "predictions" / f"{first.stem}.parquet"
    for path in (first, predicted):  # as a clock that was set to the year 2099 would have named them
        path.rename(path.with_name(f"{FUTURE}-a1{path.suffix}"))
    assert shown(tmp_path) == ([0.1, 0.2], [0.0])
    second = store.write(tmp_path, rows("now", 0.3, 0.4), frame(1.0))
    assert second.name == "20990101T000000000001-a1.jsonl"
    assert shown(tmp_path) == ([0.3, 0.4], [1.0])
    other = store.write(tmp_path, rows("now", 0.5, run_id="b1"), frame(1.0))
    assert other.name < FUTURE, "another run has the time of the clock"
    for path in (second, other):
        path.unlink()
    assert shown(tmp_path) == ([0.1, 0.2], [0.0]), "each record has its own predictions"


def test_a_newer_failure_hides_no_result(tmp_path):
    store.write(tmp_path, rows("then", 0.1), frame(1.0))
    store.write(tmp_path, [RUN | {"time": "now", "status": "failed", "error": "x"}])
    assert shown(tmp_path) == ([0.1], [1.0])
    assert store.has_predictions(tmp_path, "a1")


def test_a_file_that_changes_is_read_again(tmp_path):
    path = store.write(tmp_path, rows("now", 0.1))
    state, text = path.stat(), path.read_text()
    assert store.read(tmp_path)[0]["value"] == 0.1
    path.write_text(text.replace('"value": 0.1', '"value": 0.9'))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert store.read(tmp_path)[0]["value"] == 0.9


def test_predictions_of_before_are_called_by_the_run_alone(tmp_path):
    store.write(tmp_path, rows("now", 0.1))
    (tmp_path / "predictions").mkdir()
    frame(1.0).drop(columns="split").to_parquet(tmp_path / "predictions" / "a1.parquet")
    assert store.predictions(tmp_path, "a1")["split"].unique().tolist() == ["test"]
    store.write(tmp_path, rows("later", 0.2), frame(0.0))
    assert shown(tmp_path) == ([0.2], [0.0])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda text: text[: len(text) - 9], "line 2: not a JSON record (Unterminated"),
        (lambda text: text.splitlines()[0] + "\n", "2 rows written"),
        (lambda text: text + text.splitlines()[0] + "\n", "3 rows found"),
        (lambda text: "[]\n" + text, "line 1: not a record, which is an object with a run_id; got []"),
        (lambda text: text.replace("0.25", "NaN"), "line 2: value of a record must be a finite number; got nan"),
    ],
)
def test_a_damaged_record_is_named_with_its_line(tmp_path, spoil, said):
    path = store.write(tmp_path, rows("now", 0.5, 0.25))
    store.read(tmp_path)
    path.write_text(spoil(path.read_text()))
    with pytest.raises(ValueError) as error:
        store.read(tmp_path)
    assert str(error.value).startswith(f"{path}") and said in str(error.value)


def test_every_value_of_a_record_has_its_type():
    (row,) = rows("now", 0.5)
    assert parsed(json.dumps(row), "here") == completed(row) == completed(completed(row))
    assert {*row, *LATER} == set(KINDS)
    for key in KINDS:
        with pytest.raises(ValueError, match=f"here: {key} of a record must be .*; got "):
            parsed(json.dumps(row | {key: []}), "here")
    optional = dict.fromkeys(("n", "router_seconds", "data", "expert", "exclusive_kind"))
    assert parsed(json.dumps(row | optional | {"router_seconds": 2}), "here")
    for key in KINDS.keys() - LATER:
        with pytest.raises(ValueError, match=f"here: {key} of a record must be .*; there is none"):
            parsed(json.dumps({name: value for name, value in row.items() if name != key}), "here")


LEARNED, TOLD = {"name": "text", "minimum_risk": False}, {"name": "oracle"}


@pytest.mark.parametrize(
    ("method", "router", "role", "route", "reads"),
    [
        ("individual", None, "upper bound", "task", "nothing"),
        ("individual", LEARNED, "upper bound", "top1", "training inputs"),
        ("pretrained", None, "lower bound", None, "nothing"),
        ("expert", None, "one expert", None, "nothing"),
        ("ties", None, None, None, "nothing"),
        ("ties", LEARNED, None, None, "training inputs"),
        ("twin_merging", TOLD, None, "task", "nothing"),
        ("twin_merging", LEARNED, None, "router", "training inputs"),
        ("twin_merging", LEARNED | {"minimum_risk": True}, None, "router", "training labels"),
    ],
)
def test_what_an_older_record_lacks_follows_from_its_method_and_router(method, router, role, route, reads):
    (row,) = rows("now", 0.5, method=method, router=router)
    found = parsed(json.dumps(row), "here")
    assert (found["role"], found["route"], found["reads"]) == (role, route, reads)
    newer = {"role": "lower bound", "route": "layer", "reads": "test inputs", "router_seconds": 2.0}
    assert parsed(json.dumps(row | newer), "here") == found | newer, "what is written down stands"


def test_the_router_of_an_older_record_took_no_time_where_it_had_none():
    (row,) = rows("now", 0.5)
    assert parsed(json.dumps(row), "here")["router_seconds"] == 0
    assert parsed(json.dumps(row | {"router_bytes": 8}), "here")["router_seconds"] is None


def test_data_from_a_folder_of_this_machine_is_known_as_such(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "test.csv").write_text("text,label\n")
    local = sources.origin({"path": str(tmp_path / "rows")})
    assert is_local(local) and is_local(f"wheel local==1; {local}")
    assert not is_local("wheel local==1") and not is_local("nyu-mll/local glue@bcd") and not is_local(None)


def test_a_failed_run_is_a_record_without_a_number():
    attempt = {key: value for key, value in completed(RUN | {"time": "now"}).items() if key not in MEASURED}
    row = failure(attempt, "ValueError: x")
    assert parsed(json.dumps(row), "here") == row
    assert {key: value for key, value in row.items() if value is not None}.keys() & MEASURED.keys() == set()
    number = {key: RUN[key] for key in ("metric", "primary", "n")} | {"task": "t", "split": "validation", "value": 0.5}
    (well,) = finished(row, [number], {"t": {"data": "d", "expert": "e"}})
    assert (well["status"], well["error"], well["split"], well["value"]) == ("ok", None, "validation", 0.5)
    assert (well["data"], well["expert"]) == ("d", "e")


def flipped(data: bytes) -> bytes:
    return data[:99] + bytes([data[99] ^ 64]) + data[100:]


@pytest.mark.parametrize("spoil", [lambda data: data[:-20], flipped, lambda data: b""])
def test_damaged_predictions_are_not_used(tmp_path, spoil):
    path = store.write(tmp_path, rows("now", 0.5), frame(1.0))
    store.write(tmp_path, rows("now", 0.5, run_id="b1"), frame(0.0))
    mine, theirs = (next((tmp_path / "predictions").glob(f"*{run}.parquet")) for run in ("a1", "b1"))
    whole = mine.read_bytes()
    for content in (spoil(whole), theirs.read_bytes()):
        mine.write_bytes(content)
        with pytest.raises(ValueError, match=f"{re.escape(str(mine))}: not the file that its record was written with"):
            store.predictions(tmp_path, "a1")
    mine.unlink()
    assert store.predictions(tmp_path, "a1") is None and not store.has_predictions(tmp_path, "a1")
    old = mine.with_name("a1.parquet")
    path.write_text(path.read_text().replace('"predictions"', '"of_before"'))
    old.write_bytes(spoil(whole))
    if spoil is not flipped:  # of a record of before nobody knows the hash
        with pytest.raises(ValueError, match=f"{re.escape(str(old))}: not predictions"):
            store.predictions(tmp_path, "a1")


@pytest.mark.parametrize(
    ("folder", "text", "said"),
    [
        ("records", b"\xff\xfe{}", "not a file of records"),
        ("sweeps", b'["a1", ', "not JSON"),
        ("sweeps", b"\xff", "not JSON"),
        ("sweeps", b"[]", "not a list of run_ids"),
        ("sweeps", b'{"a": 1}', "not a list of run_ids"),
        ("experts", b"{", "not JSON"),
        ("experts", b"\xff", "not JSON"),
        ("experts", b"[]", "not an object"),
    ],
)
def test_a_broken_file_of_the_results_is_named(tmp_path, folder, text, said):
    path = tmp_path / folder / f"x.{'jsonl' if folder == 'records' else 'json'}"
    path.parent.mkdir()
    path.write_bytes(text)
    read = {"records": lambda: store.read(tmp_path), "sweeps": lambda: store.sweep(tmp_path, "x")}
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: {said}"):
        read.get(folder, lambda: store.experts(tmp_path, "x"))()


@pytest.mark.parametrize("before", [None, b"[]", b'["a1", ', b'["old"]'])
def test_runs_that_several_processes_add_are_all_listed(tmp_path, before):
    if before is not None:
        (tmp_path / "sweeps").mkdir()
        (tmp_path / "sweeps" / "x.json").write_bytes(before)
    code = (
        "import sys; from pathlib import Path; from twinbench.records import store\n"
        "for at in range(20): store.add_to_sweep(Path(sys.argv[1]), 'x', f'{sys.argv[2]}{at:02}')"
    )
    adding = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], cwd=ROOT) for name in "abc"]
    assert [process.wait() for process in adding] == [0, 0, 0]
    old = ["old"] if before == b'["old"]' else []
    assert store.sweep(tmp_path, "x") == sorted([*old, *(f"{name}{at:02}" for name in "abc" for at in range(20))])


def test_experts_that_were_trained_again_replace_what_was_said_of_them(tmp_path):
    for seconds in (1.0, 1.0, 2.0):
        store.write_experts(tmp_path, "s", {"t0": {"seconds": seconds}})
        assert store.experts(tmp_path, "s") == {"t0": {"seconds": seconds}}
    path = tmp_path / "experts" / "s.json"
    written = path.stat().st_mtime_ns
    store.write_experts(tmp_path, "s", {"t0": {"seconds": 2.0}})
    assert path.stat().st_mtime_ns == written, "a file that says the same is left alone"


def test_what_killed_processes_left_is_removed_by_the_next_that_writes(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = {pid: f".old.jsonl-{socket.gethostname()}-{pid}-0123abcd" for pid in (ended.pid, os.getpid())}
    for name in [*names.values(), ".old.jsonl-elsewhere-1-0123abcd"]:
        (tmp_path / "records" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "records" / name).touch()
    written = store.write(tmp_path, rows("now", 0.5))
    left = sorted(path.name for path in (tmp_path / "records").iterdir())
    assert left == sorted([written.name, names[os.getpid()], ".old.jsonl-elsewhere-1-0123abcd"])
    assert json.loads(written.read_text())["rows"] == 1
