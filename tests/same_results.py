"""Do two results folders hold the same numbers? `python tests/same_results.py OLD NEW` compares the runs in both.

It compares per run_id the newest finished run: every row's task, split, metric, value and bytes, and every prediction,
to the last digit. Seconds, dates and versions may differ. It prints what differs and what only one folder has; exit
code 1 if a number differs or no run is in both.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEYS = ("task", "split", "metric", "primary", "value", "n", "shared_bytes", "exclusive_bytes", "router_bytes")


def main(old: str, new: str) -> int:
    from twinbench.records import store

    folders = [Path(old), Path(new)]
    runs = [finished(store, folder) for folder in folders]
    both, wrong = sorted(runs[0].keys() & runs[1].keys()), []
    for run in both:
        rows = [[{key: row.get(key) for key in KEYS} for row in side[run]] for side in runs]
        if rows[0] != rows[1]:
            pairs = zip(*rows, strict=False)
            wrong.append(f"{run} {runs[0][run][0]['method']}: {next((p for p in pairs if p[0] != p[1]), 'other rows')}")
        frames = [store.predictions(folder, run) for folder in folders]
        if all(frame is not None for frame in frames) and not frames[0].equals(frames[1][list(frames[0])]):
            wrong.append(f"{run} {runs[0][run][0]['method']}: predictions differ")
    print(*wrong, f"{len(both)} runs in both, {len(wrong)} differences", sep="\n")
    for folder, mine, other in zip(folders, runs, reversed(runs), strict=True):
        print(f"only in {folder}: {len(mine.keys() - other.keys())} runs")
    return int(bool(wrong) or not both)


def finished(store, folder: Path) -> dict[str, list[dict]]:
    found = {}
    for row in store.latest(store.read(folder)):
        if row["status"] == "ok":
            found.setdefault(row["run_id"], []).append(row)
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(*sys.argv[1:]))
