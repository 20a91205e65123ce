"""Records: measured numbers, one JSON line each, one file per run, written once and never edited.

``RESULTS/records/TIME-RUN_ID.jsonl`` holds a run's rows; ``RESULTS/predictions/RUN_ID.parquet`` its predictions;
``RESULTS/sweeps/EXPERIMENT.json`` which runs an experiment consisted of when it was last run;
``RESULTS/experts/SUITE_ID.json`` how the experts of a suite were trained, where twinbench trained them.
A file appears under its name only when it is whole, so a killed process leaves nothing half-written to read.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from twinbench import processes

if TYPE_CHECKING:  # pandas costs half a second that `plan=true` need not pay
    import pandas as pd


def write(results_dir: Path, rows: list[dict]) -> Path:
    """Write the rows of one run to a new file, all or nothing.

    Raises:
        OSError: the folder cannot be written to.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    path = results_dir / "records" / f"{stamp}-{rows[0]['run_id']}.jsonl"
    with _whole_file(path) as part:
        part.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(results_dir: Path) -> list[dict]:
    """All rows of all files, oldest file first.

    Raises:
        ValueError: a line is not a JSON object.
    """
    paths = sorted((results_dir / "records").glob("*.jsonl"))
    return [dict(row) for path in paths for row in _rows(path, path.stat().st_mtime_ns)]


@cache  # every job of a sweep asks which runs are done
def _rows(path: Path, changed: int) -> list[dict]:
    """The rows of a file as it was when it was last changed."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not a JSON record ({error})") from error
        if not isinstance(row, dict) or "run_id" not in row:
            raise ValueError(f"{path}, line {number}: not a record (an object with a run_id)")
        rows.append(row)
    return rows


def latest(rows: Iterable[Mapping]) -> list[dict]:
    """Per run_id the rows of its newest ok file or, where it has none, its newest failed row.

    The rows of one file share their ``time``; input is oldest first, as ``read`` returns it.
    """
    files: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        files.setdefault((row["run_id"], row["time"]), []).append(dict(row))
    chosen: dict[str, list[dict]] = {}
    for (run_id, _), group in files.items():
        old = chosen.get(run_id)
        if old is None or group[0]["status"] == "ok" or old[0]["status"] != "ok":
            chosen[run_id] = group
    return [row for group in chosen.values() for row in group]


def write_predictions(results_dir: Path, run_id: str, frame: "pd.DataFrame") -> None:
    """Write a run's predictions (task, split, row, label, prediction, route), all or nothing."""
    with _whole_file(results_dir / "predictions" / f"{run_id}.parquet") as part:
        frame.to_parquet(part, compression="zstd")


def predictions(results_dir: Path, run_id: str) -> "pd.DataFrame | None":
    """The predictions of a run, or None where none were kept."""
    import pandas as pd

    path = results_dir / "predictions" / f"{run_id}.parquet"
    if not path.exists():
        return None
    frame = pd.read_parquet(path)
    return frame if "split" in frame else frame.assign(split="test")  # files of before there were others


def write_sweep(results_dir: Path, experiment: str, run_ids: Sequence[str]) -> None:
    """Write which runs an experiment consists of, all or nothing."""
    with _whole_file(results_dir / "sweeps" / f"{experiment}.json") as part:
        part.write_text(json.dumps(list(run_ids), indent=0) + "\n", encoding="utf-8")


def sweep(results_dir: Path, experiment: str) -> list[str]:
    """The run_ids of an experiment's last sweep.

    Raises:
        ValueError: there was none.
    """
    path = results_dir / "sweeps" / f"{experiment}.json"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.json"))) or "none"
        raise ValueError(f"no sweep of experiment {experiment!r} in {results_dir}; there are: {known}")
    return json.loads(path.read_text(encoding="utf-8"))


def write_experts(results_dir: Path, suite_id: str, training: Mapping[str, Mapping]) -> None:
    """Write how each expert of a suite was trained, all or nothing; a file that says the same is left alone.

    One that says something else is replaced: its experts were trained again, and the newest records are of these.
    """
    if experts(results_dir, suite_id) != training:
        with _whole_file(_experts_file(results_dir, suite_id)) as part:
            part.write_text(json.dumps(training, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def experts(results_dir: Path, suite_id: str) -> dict[str, dict] | None:
    """How the experts of a suite were trained, by task, or None where that is not known.

    Raises:
        ValueError: the file is not a JSON object.
    """
    path = _experts_file(results_dir, suite_id)
    if not path.exists():
        return None
    try:
        training = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(training, dict):
        raise ValueError(f"{path}: not an object with the training of each task's expert")
    return training


def _experts_file(results_dir: Path, suite_id: str) -> Path:
    return results_dir / "experts" / f"{suite_id}.json"


def check_writable(results_dir: Path) -> None:
    """Raise OSError with the folder's name if records could not be written there."""
    try:
        with _whole_file(results_dir / "records" / "writable") as part:
            part.touch()
        (results_dir / "records" / "writable").unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"results_dir={results_dir} cannot be written to: {error.strerror or error}") from error


@contextmanager
def _whole_file(path: Path):
    """Yield a temporary name beside ``path``; move it there when the block has ended well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        if processes.rank() == 0:  # the others have the same to write
            with part.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
