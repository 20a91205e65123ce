"""A record: one measured number with its identity, or one failed run; a JSON object on a line.

This file is the home of a record's fields: their names, their types, what older records lack, and what that means.
"""

import json
import math
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Literal, TypedDict, Union, get_args, get_origin, get_type_hints

from twinbench.plan.signature import router_reads
from twinbench.protocol import PROTOCOLS
from twinbench.system.mistakes import Mistake

ROUTER_ACCURACY = "router_accuracy"  # metric: share of a task's rows whose largest weight is on its own expert
ROUTED_TO = "routed_to/"  # metric, an expert's name behind it: share of a task's rows whose largest weight is on it
UPPER, LOWER, ONE = "upper bound", "lower bound", "one expert"  # roles


class Attempt(TypedDict):
    """What all records of a run say alike, and all that a failed run has to say.

    Attributes:
        source: hash of what a person has not chosen: the code of the methods and the content of files that they read.
        suite, suite_id, base, split: None where the run failed before its suite was known.
        role: what the method is to others: a bound of their scores, or one expert for all tasks; None: a method.
        route: how w(x) is found: None (there is no w), the known task, the router's weights, one-hot at the router's
            first choice, or layer by layer.
        reads: the most demanding data that the method and its router read beside the experts' weights.
        router, seed: None where the result does not depend on them.
        split: which one was asked for; a record of a number says which one it is of.
        precision: of forward passes.
        time: of the run's start, ISO 8601.
        dirty: whether the source tree had changes that are in no commit.
    """

    run_id: str
    source: str | None
    suite: str | None
    suite_id: str | None
    base: str | None
    method: str
    role: Literal["upper bound", "lower bound", "one expert"] | None
    route: Literal["task", "router", "top1", "layer"] | None
    reads: str
    params: dict | None
    router: dict | None
    protocol: str
    seed: int | None
    split: str | None
    precision: Literal["float32", "bfloat16"]
    time: str
    commit: str | None
    dirty: bool | None
    experiment: str | None
    versions: dict | None
    status: Literal["ok", "failed"]
    error: str | None


class Record(Attempt):
    """One number of a finished run; a failed run has None in the fields below. Generative suites add some of their own.

    Attributes:
        primary: whether this is the metric that the task is compared by.
        value: raw, as the metric gives it, at full precision.
        n: rows scored.
        merge_seconds, router_seconds: of the whole run, once; ``route_seconds`` and ``eval_seconds``: of this task.
        shared_bytes, exclusive_bytes, router_bytes: as they would be written; ``exclusive_kind`` says in which form.
        data, expert: where the task's rows and its expert come from.
        unscored: the experts of tasks that the run did not score; None where it scored all.
        others_share: of the time of all cores that other processes used while the run was timed, from 0 to 1.
        rows: how many records the run has; ``predictions``: hash of its file of predictions. Both are for checks.
    """

    task: str
    metric: str
    primary: bool
    value: float
    n: int | None
    merge_seconds: float | None
    router_seconds: float | None
    route_seconds: float | None
    eval_seconds: float | None
    shared_bytes: float
    exclusive_bytes: float
    exclusive_kind: str | None
    router_bytes: float
    peak_memory_bytes: float | None
    others_share: float | None
    device: str | None
    data: str | None
    expert: str | None
    unscored: dict | None
    rows: int | None
    predictions: str | None


LATER = {  # fields that older records lack
    *(
        "source",
        "role",
        "route",
        "reads",
        "precision",
        "experiment",
        "n",
        "router_seconds",
        "exclusive_kind",
        "peak_memory_bytes",
        "others_share",
    ),
    *("data", "expert", "unscored", "rows", "predictions"),
}
OLDER_ROLES = {"individual": UPPER, "pretrained": LOWER, "expert": ONE}
WORDS = {str: "text", dict: "an object", bool: "true or false", int: "a whole number", float: "a finite number"}


def finished(attempt: Mapping, numbers: Iterable[Mapping], origins: Mapping[str, Mapping]) -> list[dict]:
    """The records of a run that ended well.

    Args:
        attempt: what they say alike.
        numbers: the measured fields of each.
        origins: per task ``data`` and ``expert``.
    """
    numbers = list(numbers)
    scored = {row["task"] for row in numbers}
    others = {task: of["expert"] for task, of in origins.items() if of["expert"] and task not in scored}
    common = {**attempt, "status": "ok", "error": None, "unscored": others or None}
    return [{**common, **row, **origins[row["task"]]} for row in numbers]


def experts_of(row: Mapping) -> dict[str, str]:
    """Per task the expert that a record names: its own task's, and those of tasks that its run did not score."""
    return ({row["task"]: row["expert"]} if row["expert"] else {}) | (row["unscored"] or {})


def is_of(row: Mapping, own: Mapping[str, str]) -> bool:
    """Whether a record is of these experts, ``own`` per task; a record or a mapping may name fewer."""
    return all(own.get(task, expert) == expert for task, expert in experts_of(row).items())


def failure(attempt: Mapping, error: str) -> dict:
    """The record of a run that did not end well."""
    return {**attempt, "status": "failed", "error": error, **MEASURED}


def parsed(line: str, where: str) -> Record:
    """Read a record, check it, and complete it with what older ones lack.

    Args:
        where: file and line, for the error.

    Raises:
        ValueError: it is no JSON object, lacks a key, or holds a value of another type or a number that is not finite.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        raise Mistake(f"{where}: not a JSON record ({error})") from error
    if not isinstance(row, dict):
        raise Mistake(f"{where}: not a record, which is an object with a run_id; got {line[:40]}")
    done = row.get("status") == "ok"
    wrong = next((key for key in KINDS if (done or key not in MEASURED) and not _legal(row, key)), None)
    if wrong:
        legal = " or ".join(WORDS.get(kind, kind) for kind in _words(KINDS[wrong]))
        got = f"got {row[wrong]!r}" if wrong in row else "there is none"
        raise Mistake(f"{where}: {wrong} of a record must be {legal}; {got}")
    if row["router"] is not None and not isinstance(row["router"].get("name"), str):
        raise Mistake(f"{where}: router of a record must have a name; got {row['router']}")
    return completed(row)


def completed(row: Mapping) -> Record:
    """The record with every field: what an older one lacks is None, or follows from the methods that there were."""
    whole = dict.fromkeys(KINDS) | row
    learned = whole["router"] is not None and whole["router"]["name"] != "oracle"
    if "precision" not in row:
        whole["precision"] = "float32"
    if "role" not in row:
        whole["role"] = OLDER_ROLES.get(whole["method"])
    if "route" not in row:
        routes = {"individual": ("task", "top1"), "twin_merging": ("task", "router")}
        whole["route"] = routes.get(whole["method"], (None, None))[learned]
    if "reads" not in row:
        whole["reads"] = router_reads(whole["router"]) if learned else "nothing"
    if "router_seconds" not in row:
        whole["router_seconds"] = None if whole["router_bytes"] else 0.0
    return whole


def is_local(data: str | None) -> bool:
    """Whether a record's ``data`` or a part of it comes from a folder of that machine: see `assets.sources.origin`."""
    return any(part.startswith("local ") for part in (data or "").split("; "))


def _parts(hint: object) -> tuple:
    """What a field may hold, of an annotation: types as JSON gives them, and texts that are legal as they are."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return tuple(part for one in get_args(hint) for part in _parts(one))
    return (float, int) if hint is float else (hint,)


KINDS = {name: _parts(hint) for name, hint in get_type_hints(Record).items()} | {"protocol": PROTOCOLS}
MEASURED = {name: None for name in KINDS if name not in Attempt.__annotations__}  # as a failed run has them


def _legal(row: Mapping, key: str) -> bool:
    if key not in row:
        return key in LATER
    value, legal = row[key], KINDS[key]
    finite = type(value) is not float or math.isfinite(value)
    return finite and (type(value) in legal or (type(value) is str and value in legal))


def _words(legal: Iterable) -> list:
    """What is legal, for an error: a whole number goes without saying where any number will do."""
    return ["null" if part is NoneType else part for part in legal if part is not int or float not in legal]
