"""What reaches W&B is read back from the offline files: a `.wandb` log of protobuf records and the media beside it."""

import json
import logging
import struct
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from twinbench.records import tracking

ROOT = Path(__file__).parents[2]
SCORES = {"sst2": 0.8432, "trec": 0.1 + 0.2}
RUN = {
    "run_id": "0123456789ab",
    "status": "ok",
    "error": None,
    "method": "ties",
    "protocol": "strict",
    "seed": 1,
    "split": "test",
    "primary": True,
    "n": 50,
    "merge_seconds": 1.25,
    "router_seconds": 0.75,
    "route_seconds": 0.5,
    "eval_seconds": 2.0,
    "shared_bytes": 1000,
    "exclusive_bytes": 200,
    "router_bytes": 30,
    "peak_memory_bytes": 5000,
}
CONFIG = {"method": {"density": 0.2}, "seed": 1, "tasks": ["sst2", "trec"], "router": None}


def scored(**changes) -> list[dict]:
    return [RUN | {"task": task, "metric": "accuracy", "value": value} | changes for task, value in SCORES.items()]


def routed() -> list[dict]:
    shares = {("sst2", "sst2"): 0.75, ("sst2", "trec"): 0.25, ("trec", "sst2"): 0.0, ("trec", "trec"): 1.0}
    return [
        RUN | {"task": task, "metric": f"routed_to/{expert}", "primary": False, "value": share}
        for (task, expert), share in shares.items()
    ]


def offline(folder: Path, project: str = "twinbench", group: str | None = "demo") -> dict:
    return {"mode": "offline", "folder": folder, "project": project, "group": group}


def read_records(file: Path) -> list:
    """All records of a `.wandb` file: a 7-byte header, then a LevelDB log in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, message, records = file.read_bytes(), 7, b"", []
    while position < len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:  # too short for a chunk header: padding
            position += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, last
            records.append(Record.FromString(message))
            message = b""
    return records


def read_run(file: Path) -> dict:
    """The run's identity, config, exit code and its logged values, with tables as lists of rows and images opened."""
    found = {"values": {}}
    for record in read_records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
            found["config"] = {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "exit":
            found["exit_code"] = record.exit.exit_code
        elif kind == "history":
            for item in record.history.item:
                *outer, last = item.nested_key
                place = found["values"]
                for key in outer:
                    place = place.setdefault(key, {})
                place[last] = json.loads(item.value_json)
    for key, value in found["values"].items():
        if isinstance(value, dict):
            media = file.parent / "files" / value["path"]
            is_table = value["_type"] == "table-file"
            found["values"][key] = json.loads(media.read_text()) if is_table else Image.open(media)
    return found


def read_runs(folder: Path) -> list[dict]:
    import wandb

    wandb.teardown()  # W&B's own process closes the files some milliseconds after a run's finish
    return [read_run(file) for file in folder.glob("wandb/*/*.wandb")]


def only_run(folder: Path) -> dict:
    (found,) = read_runs(folder)
    return found


def test_run_holds_identity_config_scores_table_and_figures(tmp_path):
    tracking.log_run(scored() + routed(), CONFIG, **offline(tmp_path))

    found = only_run(tmp_path)
    run, values = found["run"], found["values"]
    identity = (run.run_id, run.display_name, run.run_group, run.job_type, run.project)
    assert identity == ("0123456789ab", "ties strict seed 1", "demo", "run", "twinbench")
    assert found["config"].items() >= CONFIG.items()
    assert found["exit_code"] == 0
    assert {task: values[f"{task}/accuracy"] for task in SCORES} == SCORES  # full precision
    assert values["sst2/routed_to/trec"] == 0.25
    assert values["average"] == pytest.approx((0.8432 + 0.3) / 2)
    assert {key: values[key] for key in tracking.MEASUREMENTS} == {key: RUN[key] for key in tracking.MEASUREMENTS}
    assert values["eval_seconds"] == 4.0  # once per task, however many metrics it has
    assert values["route_seconds"] == 1.0
    assert values["tables/scores"]["columns"] == ["task", "split", "metric", "value", "n"]
    assert [tuple(row) for row in values["tables/scores"]["data"]] == [
        (row["task"], "test", row["metric"], row["value"], 50) for row in scored() + routed()
    ]
    for figure in ("figures/scores", "figures/router"):
        darkest, lightest = values[figure].convert("L").getextrema()
        assert (darkest < 100, lightest) == (True, 255), f"{figure} is blank"


def test_router_figure_only_for_routed_runs_and_no_seed_in_the_name_without_one(tmp_path):
    tracking.log_run(scored(seed=None), CONFIG, **offline(tmp_path, group=None))
    found = only_run(tmp_path)
    assert found["run"].display_name == "ties strict"
    assert [key for key in found["values"] if key.startswith("figures/")] == ["figures/scores"]


def test_router_figure_keeps_the_order_of_the_tasks():
    figure = tracking._draw_router(routed())
    (image,) = figure.axes[0].images
    assert image.get_array().tolist() == [[0.75, 0.25], [0.0, 1.0]]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["sst2", "trec"]


def test_failed_run_is_marked_failed_with_its_error(tmp_path):
    failed = RUN | {"status": "failed", "error": "ValueError: NaN weights", "primary": None, "n": None}
    tracking.log_run([failed | {"task": None, "metric": None, "value": None}], CONFIG, **offline(tmp_path))
    found = only_run(tmp_path)
    assert found["config"]["error"] == "ValueError: NaN weights"
    assert found["config"]["status"] == "failed"
    assert found["exit_code"] == 1


def test_twenty_runs_in_one_process_stay_apart_and_silent(tmp_path, capfd):
    for number in range(20):
        rows = [row | {"run_id": f"{number:012x}", "value": number / 20} for row in scored()]
        tracking.log_run(rows, {"seed": number}, **offline(tmp_path))

    assert capfd.readouterr() == ("", "")
    found = read_runs(tmp_path)
    assert len(found) == 20
    seen = {run["run"].run_id: (run["config"]["seed"], run["values"]["sst2/accuracy"]) for run in found}
    assert seen == {f"{number:012x}": (number, number / 20) for number in range(20)}


def test_same_id_again_is_logged_again(tmp_path):
    for value in (0.5, 0.75):
        tracking.log_run(scored(value=value), CONFIG, **offline(tmp_path))
    found = read_runs(tmp_path)
    assert sorted(run["values"]["average"] for run in found) == [0.5, 0.75]
    assert {run["run"].run_id for run in found} == {RUN["run_id"]}


def test_report_holds_every_table_and_figure(tmp_path):
    tables = {
        "main": pd.DataFrame({"method": ["ties", "average"], "sst2": [84.3, "failed"], "std": [0.5, float("nan")]}),
        "storage": pd.DataFrame({"method": ["ties"], "bytes": [1200]}),
    }
    Figure(figsize=(3, 2), dpi=100).savefig(tmp_path / "pareto.png")
    report = {"tables": tables, "figures": {"pareto": tmp_path / "pareto.png"}}
    tracking.log_report(report, **offline(tmp_path / "logs"))

    found = only_run(tmp_path / "logs")
    assert (found["run"].job_type, found["run"].run_group) == ("report", "demo")
    assert found["values"]["tables/main"]["data"] == [["ties", 84.3, 0.5], ["average", "failed", None]]
    assert found["values"]["tables/storage"] == {"columns": ["method", "bytes"], "data": [["ties", 1200]]}
    assert found["values"]["figures/pareto"].size == (300, 200)


def test_disabled_writes_nothing_and_does_not_import_wandb(tmp_path):
    code = f"""
import sys
from pathlib import Path
from twinbench.records import tracking
where = dict(mode="disabled", folder=Path({str(tmp_path)!r}) / "logs", project="p", group=None)
tracking.log_run({scored()!r}, {{}}, **where)
tracking.log_report({{"tables": {{}}, "figures": {{}}}}, **where)
print("wandb" in sys.modules, "matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    assert list(tmp_path.iterdir()) == []


def test_failing_wandb_is_one_warning(tmp_path, monkeypatch, caplog):
    def refuse(**_):
        raise RuntimeError("no\nserver")

    monkeypatch.setattr("wandb.init", refuse)
    with caplog.at_level(logging.WARNING):
        tracking.log_run(scored(), CONFIG, **offline(tmp_path))
    assert [record.getMessage() for record in caplog.records] == ["W&B run not logged: RuntimeError: no server"]


def test_unusable_folder_and_missing_figure_are_warnings_and_the_next_run_is_logged(tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        tracking.log_run(scored(), CONFIG, **offline(tmp_path / "file"))
        tracking.log_report({"tables": {}, "figures": {"lost": tmp_path / "lost.png"}}, **offline(tmp_path))
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "W&B run not logged",
        "W&B report not logged",
    ]
    assert "lost.png" in caplog.records[1].getMessage()
    tracking.log_run(scored(), CONFIG, **offline(tmp_path))
    assert only_run(tmp_path)["values"]["sst2/accuracy"] == SCORES["sst2"]
