"""Published scores of the same tasks, beside ours and never in the same column.

``results/literature/*.csv`` has one number a line: source, where in it, how it came to us (quoted, derived from quoted
numbers, digitised from a picture), checkpoints and base that it is of, protocol, unit, method, task, value, note.
"""

import csv
from pathlib import Path

import numpy as np
import pandas as pd

from twinbench.report.blocks import Block

FOLDER = Path(__file__).parents[2] / "results" / "literature"
UNIT = "normalized %"  # the only one that other checkpoints' scores can be compared in


def published(block: Block, table: pd.DataFrame) -> pd.DataFrame:
    """Normalized scores of the block's tasks under its protocol, a line per method and source, as they were published.

    Args:
        table: the block's normalized table.

    Returns:
        Columns method, tasks, average, ours (our average of that row), difference (ours - theirs, only where base and
        checkpoints are the same), source; no line where nothing of the kind was published.
    """
    tasks = [task for task, _ in block.columns]
    lines: dict[tuple[str, str], dict] = {}
    for row in _numbers(block.protocol, set(tasks)):
        source = f"{row['source']}, {row['where']} ({row['how']}); {row['checkpoints']}"
        line = lines.setdefault((row["method"], source), {"base": row["base"]})
        line[row["task"]] = float(row["value"])
        line["note"] = row["note"] if row["task"] == "average" else line.get("note")
    ours = table.set_index("method")["average"]
    found = []
    for (method, source), line in lines.items():
        own = block.find(method)
        mean = ours[own.label] if own else np.nan
        same = own and f"hub:{line['base']}@" in str(own.runs[0].records[0]["base"])
        gap = mean - line.get("average", np.nan) if same else np.nan
        told = f"{source}; {line['note']}" if line["note"] else source
        scores = {name: line.get(name, np.nan) for name in (*tasks, "average")}
        found.append({"method": method} | scores | {"ours": mean, "difference": gap, "source": told})
    return pd.DataFrame(found, columns=["method", *tasks, "average", "ours", "difference", "source"])


def _numbers(protocol: str, tasks: set[str]) -> list[dict[str, str]]:
    """The lines of the files that are of these tasks, all and no other: their averages are over the same ones."""
    found = []
    for path in sorted(FOLDER.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if {row["task"] for row in rows} - {"average"} == tasks:
            found += [row for row in rows if (row["protocol"], row["unit"]) == (protocol, UNIT)]
    return found
