"""A record: one measured number with its identity, or one failed run; a JSON object on a line."""

import json
import math
from collections.abc import Mapping

from twinbench.protocol import PROTOCOLS
from twinbench.system.mistakes import Mistake

NUMBER, NONE = (float, int), (type(None),)
EVERY = {  # what any record holds: key -> types of its value, as JSON gives them
    **dict.fromkeys(("run_id", "time", "status", "method", "protocol"), (str,)),
    **dict.fromkeys(("suite", "suite_id", "base", "split", "error", "commit", "device"), (str, *NONE)),
    **dict.fromkeys(("params", "router", "versions"), (dict, *NONE)),
    **{"seed": (int, *NONE), "dirty": (bool, *NONE), "primary": (bool, *NONE)},
}
MEASURED = {  # what those of a finished run hold
    **{"task": (str,), "split": (str,), "metric": (str,), "primary": (bool,), "value": NUMBER},
    **dict.fromkeys(("merge_seconds", "route_seconds", "eval_seconds"), (*NUMBER, *NONE)),
    **dict.fromkeys(("shared_bytes", "exclusive_bytes", "router_bytes"), NUMBER),
}
LATER = {  # what older ones may lack
    **{"n": (int, *NONE), "router_seconds": (*NUMBER, *NONE), "rows": (int,), "predictions": (str,)},
    **dict.fromkeys(("data", "expert", "exclusive_kind"), (str, *NONE)),
}
WORDS = {str: "text", dict: "an object", bool: "true or false", int: "a whole number", float: "a finite number"}
CHOICES = {"status": ("ok", "failed"), "protocol": tuple(PROTOCOLS)}


def parsed(line: str, where: str) -> dict:
    """Read a record as it was written.

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
    kinds = EVERY | LATER | (MEASURED if row.get("status") == "ok" else {})
    wrong = next((key for key, types in kinds.items() if not _legal(row, key, types)), None)
    if wrong:
        words = [WORDS.get(kind, "null") for kind in kinds[wrong] if kind is not int or float not in kinds[wrong]]
        got = f"got {row[wrong]!r}" if wrong in row else "there is none"
        raise Mistake(f"{where}: {wrong} of a record must be {' or '.join(CHOICES.get(wrong, words))}; {got}")
    if row["router"] is not None and not isinstance(row["router"].get("name"), str):
        raise Mistake(f"{where}: router of a record must have a name; got {row['router']}")
    return row


def _legal(row: Mapping, key: str, types: tuple[type, ...]) -> bool:
    if key not in row:
        return key in LATER
    value = row[key]
    finite = type(value) is not float or math.isfinite(value)
    return type(value) in types and finite and value in CHOICES.get(key, (value,))
