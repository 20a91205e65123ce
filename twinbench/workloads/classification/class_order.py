"""The order of a checkpoint's classes: its config.json may name them, and a task's ids must mean the same."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from twinbench.system.mistakes import Mistake

NAMELESS = re.compile(r"LABEL_\d+")  # what transformers calls a class that nobody named


def class_order(folder: Path, classes: Sequence[str], who: str) -> list[int] | None:
    """Which output of the head in ``folder`` is each of the task's classes; None where they stand as they are.

    Names are compared without case, spaces, ``-`` and ``_``, where they then still differ from each other. Classes
    without names are taken to stand in the task's order.

    Raises:
        ValueError: the config.json names other classes.
    """
    path = folder / "config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("id2label") if path.exists() else None
    names = [str(name) for _, name in sorted((named or {}).items(), key=lambda item: int(item[0]))]
    if all(NAMELESS.fullmatch(name) for name in names):
        return None
    for spelled in (str, _bare):
        ours, theirs = [spelled(str(name)) for name in classes], [spelled(name) for name in names]
        if len(set(theirs)) == len(theirs) and sorted(ours) == sorted(theirs):
            order = [theirs.index(name) for name in ours]
            return None if order == sorted(order) else order
    wanted = (
        "set the task's classes to these names, or name them LABEL_0, LABEL_1 and so on where they stand in its order"
    )
    raise Mistake(f"{who}: {path} names the classes {', '.join(names)}, the task {', '.join(classes)}; {wanted}")


def _bare(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.casefold())
