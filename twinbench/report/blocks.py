"""Records -> blocks of labelled rows: what may stand in one table, and what each line of it is called.

A block holds the runs of one (suite_id, split, precision, protocol). Scores of other experts, other data, another
precision or another protocol are not comparable, so they never share a table; nor do methods that read the test's
inputs and methods that do not. A row is one (method, params, router)
with one source, the newest; its runs differ in the seed only. A recipe trains other weights on another machine, so runs
with other experts than the newest ones of their suite_id are left out.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product

from twinbench.protocol import NORMALIZER, PROTOCOLS
from twinbench.records.record import LOWER, ONE, UPPER, Record
from twinbench.system.device import PRECISIONS

Column = tuple[str, str]  # (task, metric)
NAMED = {"shared.method": "method@shared"}  # settings that a record calls otherwise than the command line


@dataclass(frozen=True)
class Run:
    """One finished run; ``scores`` holds each task's primary metric, ``others`` every other one, raw.

    ``beside`` holds every metric on splits beside the scored one, called ``METRIC on SPLIT``.
    """

    run_id: str
    seed: int | None
    scores: dict[Column, float]
    others: dict[Column, float]
    beside: dict[Column, float]
    records: list[Record]


@dataclass(frozen=True)
class Row:
    """One line of a table: a method with its settings, over its seeds."""

    label: str
    method: str
    oracle: bool  # w(x) is one-hot at the known task
    runs: list[Run]
    settings: dict = field(default_factory=dict)
    role: str | None = None  # as its records have it


@dataclass(frozen=True)
class Block:
    """The comparable rows of one (suite_id, split, precision, protocol, adapted).

    ``adapted`` rows have read the inputs that they are scored on.

    ``individual`` are the runs every score is divided by: the upper bound, strict, told the task; ``base`` is the
    lower bound under strict, if that was run.
    ``failed`` pairs a label with the record of a run that has no result; ``outdated`` with that of a seed that has only
    been run with an older source of its method, and is left out of the row. ``of_older_experts`` has a record of each
    run that was measured before the suite's experts were trained anew.
    """

    suite: str
    suite_id: str
    split: str
    precision: str
    protocol: str
    columns: list[Column]
    rows: list[Row]
    experts: list[Row]
    failed: list[tuple[str, dict]]
    outdated: list[tuple[str, dict]]
    individual: list[Run]
    base: list[Run]
    adapted: bool = False
    of_older_experts: list[dict] = field(default_factory=list)

    def find(self, name: str) -> Row | None:
        """The row called ``name``: its label, or else a method's plainest row.

        Among several rows of a method: routed before told the task, more seeds before fewer, first recorded. No
        score is looked at, so the test split picks nothing.
        """
        rows = [row for row in self.rows if row.label == name] or [row for row in self.rows if row.method == name]
        return min(rows, key=lambda row: (row.oracle, -len(row.runs)), default=None)


def blocks(rows: Iterable[Record]) -> list[Block]:
    """The blocks of some runs: newest suite_id first, then the test split, the precision with more runs, ``PROTOCOLS``.

    Args:
        rows: records as ``records.store.latest`` gives them.
    """
    rows, older = by_experts(list(rows))
    runs, left = _newest_runs(rows), _newest_runs(older)
    ids = sorted({_suite_id(run) for run in runs}, key=lambda name: (*_freshness(runs, name), name), reverse=True)
    found = []
    for suite_id, split in product(ids, ("test", "validation")):
        families = {key: [run for run in runs if _family(run) == (suite_id, split, key)] for key in PRECISIONS}
        for precision, family in sorted(families.items(), key=lambda item: -len(item[1])):
            kinds = sorted({_kind(run) for run in family}, key=lambda kind: (list(PROTOCOLS).index(kind[0]), kind[1]))
            rows_of = {kind: _rows([run for run in family if _kind(run) == kind]) for kind in kinds}
            key = suite_id, split, precision
            made = _family_blocks(_head(family[0])["suite"], key, rows_of) if family else []
            for block in made:
                block.of_older_experts.extend(
                    _head(run) for run in left if _family(run) == key and _kind(run) == (block.protocol, block.adapted)
                )
            found += made
    return found


def by_experts(rows: list[Record]) -> tuple[list[Record], list[Record]]:
    """The records of runs with the newest experts of their suite_id, and of runs with others.

    A failed run has none and is among the first, as are those of old records that do not say which they were.

    Args:
        rows: as ``records.store.latest`` gives them.
    """
    in_time = sorted(rows, key=lambda row: row["time"])
    newest = {(row["suite_id"], row["task"]): row["expert"] for row in in_time if row["expert"]}
    older = {row["run_id"] for row in rows if row["expert"] not in (None, newest.get((row["suite_id"], row["task"])))}
    return [row for row in rows if row["run_id"] not in older], [row for row in rows if row["run_id"] in older]


def _family_blocks(suite: str, key: tuple[str, str, str], rows_of: dict[tuple[str, bool], tuple]) -> list[Block]:
    """The blocks of one (suite_id, split, precision), with its column order and its normalizing runs."""
    suite_id, split, precision = key
    strict = rows_of.get((NORMALIZER, False), ([],))[0]
    individual = [run for row in strict if row.role == UPPER and row.oracle for run in row.runs]
    base = [run for row in strict if row.role == LOWER for run in row.runs]
    everything = individual + [run for rows, *_ in rows_of.values() for row in rows for run in row.runs]
    columns = list(dict.fromkeys(column for run in everything for column in run.scores))
    return [
        Block(
            suite=suite,
            suite_id=suite_id,
            split=split,
            precision=precision,
            protocol=protocol,
            adapted=adapted,
            columns=columns,
            rows=[row for row in rows if row.role != ONE],
            experts=[row for row in rows if row.role == ONE],
            failed=failed,
            outdated=outdated,
            individual=individual,
            base=base,
        )
        for (protocol, adapted), (rows, failed, outdated) in rows_of.items()
    ]


def _newest_runs(rows: list[Mapping]) -> list[list[dict]]:
    """Per (family, protocol, row, seed) the records of one run: the newest ok one, or else failed one.

    A run with the newest source of the row's method goes before others, even if it failed.
    """
    runs: dict[str, list[dict]] = {}
    for row in rows:
        runs.setdefault(row["run_id"], []).append(dict(row))
    in_time = sorted(runs.values(), key=lambda run: (_head(run)["time"], _head(run)["run_id"]))
    newest = {_row(run): _head(run)["source"] for run in in_time}
    chosen: dict[tuple, list[dict]] = {}
    for run in sorted(
        in_time, key=lambda run: (_head(run)["source"] == newest[_row(run)], _head(run)["status"] == "ok")
    ):
        chosen[*_row(run), _head(run)["seed"]] = run
    return sorted(chosen.values(), key=lambda run: (_head(run)["time"], _head(run)["run_id"]))


def _row(run: list[dict]) -> tuple:
    """What the runs of a row have in common, whatever the source of its method."""
    return *_family(run), _head(run)["protocol"], *_identity(_head(run))


def _rows(runs: list[list[dict]]) -> tuple[list[Row], list[tuple[str, dict]], list[tuple[str, dict]]]:
    """Rows of one block in the order recorded; its failed runs, and those of an older source, with their labels."""
    groups: dict[tuple, list[list[dict]]] = {}
    for run in runs:
        groups.setdefault(_identity(_head(run)), []).append(run)
    names: dict[tuple, str] = {}
    for method in {identity[0] for identity in groups}:
        same = [identity for identity in groups if identity[0] == method]
        names |= zip(same, labels(method, [_settings(_head(groups[identity][0])) for identity in same]), strict=True)
    rows, failed, outdated = [], [], []
    for identity, whole in groups.items():
        head = max((_head(run) for run in whole), key=lambda record: record["time"])
        group = [run for run in whole if _head(run)["source"] == head["source"]]
        outdated += [(names[identity], _head(run)) for run in whole if run not in group]
        done = [_run(records) for records in group if _head(records)["status"] == "ok"]
        failed += [(names[identity], _head(records)) for records in group if _head(records)["status"] != "ok"]
        if done:
            oracle, role = head["route"] == "task", head["role"]
            rows.append(Row(names[identity], head["method"], oracle, done, _settings(head), role))
    return rows, failed, outdated


def labels(method: str, settings: list[dict]) -> list[str]:
    """Name a method's rows by the settings in which they differ, e.g. ``ties (density=0.2)``.

    A setting of a router or of a shared method goes with its name: it is named only where it differs among rows of that
    name. A setting that only some rows have is named only where the labels would otherwise coincide.
    """
    keys = list(dict.fromkeys(key for row in settings for key in row))
    named = [[key for key in keys if key in row and len(_values(key, row, settings)) > 1] for row in settings]
    names = [_label(method, row, mine) for row, mine in zip(settings, named, strict=True)]
    if len(set(names)) < len(names):
        several = {key for mine in named for key in mine} | {k for k in keys if any(k not in row for row in settings)}
        names = [_label(method, row, [key for key in keys if key in several]) for row in settings]
    return names


def _values(key: str, row: Mapping, settings: list[dict]) -> set[str]:
    """The values of a setting among the rows where it means the same: all, or those of one router or shared method."""
    of = {"router.": "router", "shared.": "method@shared"}.get(key[: key.find(".") + 1])
    like = [other for other in settings if of in (None, key) or other.get(of) == row.get(of)]
    return {_text(other[key]) for other in like if key in other}


def _label(method: str, settings: dict, keys: list[str]) -> str:
    told = (key for key in keys if key in settings and (settings[key] is not None or key.startswith("router.")))
    parts = ", ".join(f"{key}={_text(settings[key])}" for key in told)  # a null is what another value excludes
    return f"{method} ({parts})" if parts else method


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _settings(record: Mapping) -> dict:
    """Params and router as flat overrides: ``method@shared``, ``shared.scaling``, ``router`` (its name), …"""
    router = dict(record["router"] or {"name": "none"})
    params = {NAMED.get(key, key): value for key, value in _flat(record["params"] or {}, "").items()}
    return params | {"router": router.pop("name")} | _flat(router, "router.")


def _flat(tree: Mapping, prefix: str) -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _run(records: list[dict]) -> Run:
    scores = {(row["task"], row["metric"]): row["value"] for row in records if row["primary"]}
    split = _split(records)
    own = [row for row in records if not row["primary"] and row["split"] == split]
    others = {(row["task"], row["metric"]): row["value"] for row in own}
    further = [row for row in records if row["split"] != split]
    beside = {(row["task"], f"{row['metric']} on {row['split']}"): row["value"] for row in further}
    return Run(_head(records)["run_id"], _head(records)["seed"], scores, others, beside, records)


def _head(run: list[dict]) -> dict:
    """A record of the run, for what all of them say alike."""
    return run[0]


def _identity(record: Mapping) -> tuple[str, str]:
    return record["method"], json.dumps([record["params"], record["router"]], sort_keys=True)


def _family(run: list[dict]) -> tuple[str, str, str]:
    """What runs have in common that are normalized by one another."""
    return _suite_id(run), _split(run), _head(run)["precision"]


def _kind(run: list[dict]) -> tuple[str, bool]:
    """The protocol of a run, and whether it has read the inputs that it is scored on."""
    return _head(run)["protocol"], _head(run)["reads"] == "test inputs"


def _suite_id(run: list[dict]) -> str:
    return _head(run)["suite_id"] or "unknown"  # a run can fail before its suite is known


def _split(run: list[dict]) -> str:
    """The split that a run was asked to score; what it scored beside it is in no primary record."""
    return next((row["split"] for row in run if row["primary"]), _head(run)["split"]) or "test"


def _freshness(runs: list[list[dict]], suite_id: str) -> tuple[bool, str]:
    """Sort key: a family with results before one that only failed, then its newest record."""
    heads = [_head(run) for run in runs if _suite_id(run) == suite_id]
    done = [head["time"] for head in heads if head["status"] == "ok"]
    return bool(done), max(done or [head["time"] for head in heads])
