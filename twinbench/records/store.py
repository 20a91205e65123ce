"""Records: measured numbers, one JSON line each, one file per run, written once and never edited.

``RESULTS/records/TIME-RUN_ID.jsonl`` holds a run's rows; ``RESULTS/predictions/TIME-RUN_ID.parquet`` its predictions;
``RESULTS/sweeps/EXPERIMENT.json`` the runs of an experiment's last sweep (see `add_to_sweep`), or, where the experiment
has its suite's name, those of its runs that are recorded under another suite's;
``RESULTS/experts/SUITE_ID.json`` how the experts of a suite were trained, where twinbench trained them.
A file appears under its name only when it is whole, so a killed process leaves nothing half-written to read.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from twinbench.records.record import Record, experts_of, parsed
from twinbench.system.claims import claimed
from twinbench.system.files import new_file
from twinbench.system.mistakes import Mistake

if TYPE_CHECKING:  # pandas costs half a second that `plan=true` need not pay
    import pandas as pd

STAMP = "%Y%m%dT%H%M%S%f"
PREDICTED = ("row", "label", "prediction")  # columns of numbers


def write(results_dir: Path, rows: list[dict], predictions: "pd.DataFrame | None" = None) -> Path:
    """Write the rows of one run to a new file, all or nothing, and its predictions to another one before.

    Each row says how many there are (``rows``), and that of a run with predictions what their file holds
    (``predictions``, its xxh3-128), so that neither is taken for whole when it is not.

    Args:
        predictions: task, split, row, label, prediction, route.

    Raises:
        OSError: the folder cannot be written to.
        ValueError: a value is NaN or infinite.
    """
    name = f"{_stamp(results_dir, rows[0]['run_id'])}-{rows[0]['run_id']}"
    own = {"rows": len(rows)}
    if predictions is not None:
        with new_file(results_dir / "predictions" / f"{name}.parquet") as part:
            predictions.to_parquet(part, compression="zstd")
            own["predictions"] = xxhash.xxh3_128(part.read_bytes()).hexdigest()
    path = results_dir / "records" / f"{name}.jsonl"
    with new_file(path) as part:
        part.write_text("".join(json.dumps(row | own, allow_nan=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _stamp(results_dir: Path, run_id: str) -> str:
    """Now, or just after the run's newest record where the clock was put back: the last one written is the newest."""
    now, (name, _) = datetime.now(UTC), _newest(results_dir, run_id)
    try:
        last = datetime.strptime(name.removesuffix(f"-{run_id}"), STAMP).replace(tzinfo=UTC)
    except ValueError:  # there is none, or somebody named it otherwise
        last = now
    return max(now, last + timedelta(microseconds=1)).strftime(STAMP)


def _newest(results_dir: Path, run_id: str, status: str | None = None) -> tuple[str, Record | None]:
    """Name, without its suffix, and first row of a run's newest file, or of its newest one with a status."""
    for path in sorted((results_dir / "records").glob(f"*{run_id}.jsonl"), reverse=True):
        head = next(iter(_rows(path, path.stat().st_mtime_ns)), None)
        if head and head["run_id"] == run_id and status in (None, head["status"]):
            return path.stem, head
    return "", None


def read(results_dir: Path) -> list[Record]:
    """All rows of all files, oldest file first, each with every field.

    Raises:
        ValueError: a line is not a record, or some that were written are not there.
    """
    return [dict(row) for row in _every(results_dir)]


def _every(results_dir: Path) -> Iterator[Record]:
    """What `read` gives, not copied: to look at, not to change."""
    for path in sorted((results_dir / "records").glob("*.jsonl")):
        yield from _rows(path, path.stat().st_mtime_ns)


@cache  # every job of a sweep asks which runs are done
def _rows(path: Path, changed: int) -> list[Record]:
    """The rows of a file as it was when it was last changed."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise Mistake(f"{path}: not a file of records ({error})") from error
    rows = [parsed(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    for (run_id, _), found in Counter((row["run_id"], row["time"]) for row in rows).items():
        written = next(row["rows"] for row in rows if row["run_id"] == run_id)
        if written not in (None, found):
            raise Mistake(f"{path}: {found} rows found of run {run_id}, {written} rows written")
    return rows


def finished(results_dir: Path, run_id: str) -> list[dict]:
    """The rows of a run's newest ok record; none where it has none."""
    rows = [row for row in _every(results_dir) if row["run_id"] == run_id and row["status"] == "ok"]
    return [dict(row) for row in rows if row["time"] == rows[-1]["time"]]


def by_experts(rows: Iterable[Record]) -> tuple[list[Record], list[Record]]:
    """The rows of files with the newest experts of their suite_id, and those of files with others.

    Experts that are fine-tuned here have one recipe and, on another machine, other weights. A row that names none, as
    that of a failed run, is among the first.

    Args:
        rows: of all files, as ``read`` gives them.
    """
    rows = list(rows)
    tuned = [
        (row, (row["suite_id"], task), expert)
        for row in sorted(rows, key=lambda row: row["time"])
        for task, expert in experts_of(row).items()
        if expert.startswith("fine-tuned")
    ]
    newest = {of: expert for _, of, expert in tuned}
    older = {(row["run_id"], row["time"]) for row, of, expert in tuned if expert != newest[of]}
    kept: tuple[list[Record], list[Record]] = ([], [])
    for row in rows:
        kept[(row["run_id"], row["time"]) in older].append(row)
    return kept


def latest(rows: Iterable[Record]) -> list[Record]:
    """Per run_id the rows of its newest ok file or, where it has none, its newest failed row.

    The rows of one file share their ``time``; input is oldest first, as ``read`` returns it.
    """
    files: dict[tuple[str, str], list[Record]] = {}
    for row in rows:
        files.setdefault((row["run_id"], row["time"]), []).append(dict(row))
    chosen: dict[str, list[Record]] = {}
    for (run_id, _), group in files.items():
        old = chosen.get(run_id)
        if old is None or group[0]["status"] == "ok" or old[0]["status"] != "ok":
            chosen[run_id] = group
    return [row for group in chosen.values() for row in group]


def predictions(results_dir: Path, run_id: str) -> "pd.DataFrame | None":
    """The predictions of a run's newest ok record, or None where none were kept.

    Raises:
        ValueError: the file is not the one that the record was written with, or is broken.
    """
    import pandas as pd

    path, written = _predictions_file(results_dir, run_id)
    if not path.exists():
        return None
    if written and xxhash.xxh3_128(path.read_bytes()).hexdigest() != written:
        raise Mistake(f"{path}: not the file that its record was written with; remove it, or run with force=true")
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise Mistake(f"{path}: not predictions ({' '.join(str(error).split())})") from error
    wrong = [name for name in ("task", *PREDICTED) if name not in frame]
    wrong += [name for name in PREDICTED if name in frame and frame[name].dtype.kind not in "iufb"]
    if wrong:
        raise Mistake(f"{path}: not predictions, for want of {', '.join(wrong)} (numbers, and task as text)")
    return frame if "split" in frame else frame.assign(split="test")  # files of before there were others


def has_predictions(results_dir: Path, run_id: str) -> bool:
    """Whether the predictions of a run's newest ok record were kept."""
    return _predictions_file(results_dir, run_id)[0].exists()


def _predictions_file(results_dir: Path, run_id: str) -> tuple[Path, str | None]:
    """Where a run's predictions are, and their hash as its newest ok record has it.

    Records of before November 2026 have none, and their predictions are called by the run_id alone.
    """
    name, head = _newest(results_dir, run_id, "ok")
    written = head["predictions"] if head else None
    return results_dir / "predictions" / f"{name if written else run_id}.parquet", written


def write_sweep(results_dir: Path, experiment: str, run_ids: Sequence[str]) -> None:
    """Write which runs an experiment consists of, all or nothing."""
    with new_file(results_dir / "sweeps" / f"{experiment}.json") as part:
        part.write_text(json.dumps(list(run_ids), indent=0) + "\n", encoding="utf-8")


def add_to_sweep(results_dir: Path, experiment: str, run_id: str) -> None:
    """Add a run to those of an experiment's last sweep.

    Until a sweep ends, its runs are listed beside those of the sweep before.
    """
    path = results_dir / "sweeps" / f"{experiment}.json"
    with claimed(path, wait=True):  # other jobs add theirs
        try:
            known = sweep(results_dir, experiment)
        except Mistake:  # there is no list, or none that can be read
            known = []
        if run_id not in known:
            write_sweep(results_dir, experiment, sorted([*known, run_id]))


def sweep(results_dir: Path, experiment: str) -> list[str]:
    """The run_ids of an experiment's last sweep; while one runs, those of the sweep before, too.

    Raises:
        ValueError: there was none, or its file is not a list of run_ids.
    """
    path, known = results_dir / "sweeps" / f"{experiment}.json", sweeps(results_dir)
    if experiment not in known:
        raise Mistake(
            f"no sweep of experiment {experiment!r} in {results_dir}; there are: {', '.join(known) or 'none'}"
        )
    run_ids = _json(path)
    if not isinstance(run_ids, list) or not run_ids or not all(isinstance(run_id, str) for run_id in run_ids):
        raise Mistake(f"{path}: not a list of run_ids")
    return run_ids


def sweeps(results_dir: Path) -> list[str]:
    """The experiments whose runs are listed."""
    return sorted(file.stem for file in (results_dir / "sweeps").glob("*.json"))


def write_experts(results_dir: Path, suite_id: str, training: Mapping[str, Mapping]) -> None:
    """Write how each expert of a suite was trained, all or nothing; a file that says the same is left alone.

    One that says something else is replaced: its experts were trained again, and the newest records are of these.
    """
    if experts(results_dir, suite_id) != training:
        with new_file(_experts_file(results_dir, suite_id)) as part:
            part.write_text(json.dumps(training, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def experts(results_dir: Path, suite_id: str) -> dict[str, dict] | None:
    """How the experts of a suite were trained, by task, or None where that is not known.

    Raises:
        ValueError: the file is not a JSON object.
    """
    path = _experts_file(results_dir, suite_id)
    if not path.exists():
        return None
    training = _json(path)
    if not isinstance(training, dict):
        raise Mistake(f"{path}: not an object with the training of each task's expert")
    return training


def _experts_file(results_dir: Path, suite_id: str) -> Path:
    return results_dir / "experts" / f"{suite_id}.json"


def _json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Mistake(f"{path}: not JSON ({error})") from error
