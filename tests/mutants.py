"""Would the tests notice? `python tests/mutants.py seed=1 count=150` changes one line at a time and runs them.

A seed draws lines of `FILES` and one mutation of each (`mutation/operators.py`). A mutant stands in a copy of the
project, never in the working tree (`mutation/forks.py`). Which tests run which lines is measured once for a state of
the project (`mutation/line_map.py`). The tests that run a mutant's line are started, quickest first, and no more than
take `SECONDS` in all, until one fails: then the mutant is killed, as is one that hangs. All others survive, also those
whose change nobody can observe. Prints Markdown.

Options, as KEY=VALUE: seed; count, of mutants; workers, the processes at a time; files, a part of the paths drawn from.
(mutmut and cosmic-ray draw no samples, and neither sees which lines run in the processes that tests start.)
"""

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from mutation import line_map
from mutation.forks import Task, copied, forked, import_libraries
from mutation.operators import Place, mutated, places

ROOT = Path(__file__).parent.parent
NAMES = "plan/job plan/refused plan/exportable plan/suite plan/identity plan/signature system/source system/files"
NAMES += " records/record records/store"
NAMES += " routing/learned routing/attach routing/batch routing/operations routing/per_route routing/readers"
NAMES += " routing/varying routing/router merging/compress merging/merged merging/twin_merging weights/state_dict"
NAMES += " weights/lora weights/write tasks/metrics report/bootstrap report/blocks report/held_out"
FILES = [*(f"twinbench/{name}.py" for name in NAMES.split()), "baselines/*.py"]
SECONDS = 60.0  # of tests for one mutant, as long as they took when their lines were measured


class Mutant(NamedTuple):
    """One mutation: the file's new text, its line before and after, and the lines whose tests see it (None: all)."""

    file: str
    line: int
    kind: str
    before: str
    after: str
    text: str
    lines: range | None


def main(seed: str = "1", count: str = "150", workers: str = "1", files: str = "") -> None:
    """Draw, run, print."""
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True).strip()
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        copies = [copied(ROOT, Path(scratch) / f"copy{i}") for i in range(int(workers))]
        import_libraries(copies[0])
        maps = line_maps(copies)
        mutants = drawn(copies[0], int(seed), int(count), files)
        killers = forked([task(mutant, maps) for mutant in mutants], copies, "mutants")
    print(report(f"Seed {seed} on commit {commit}", mutants, killers))


def line_maps(copies: Sequence[Path]) -> list[dict]:
    """Which tests run which lines, a map per test file, kept until that file or something that is no test changes."""
    tests = sorted(copies[0].glob("tests/**/test_*.py"))
    paths = (path for kind in ("py", "yaml", "jinja", "html") for path in sorted(copies[0].rglob(f"*.{kind}")))
    code = b"".join(path.read_bytes() for path in paths if path not in tests)
    kept = {}
    for test in tests:
        digest = hashlib.sha256(code + test.read_bytes()).hexdigest()[:16]
        kept[test] = ROOT / ".pytest_cache" / "lines" / f"{digest}.json"
    todo = [(test.relative_to(copies[0]).as_posix(), path) for test, path in kept.items() if not path.exists()]
    forked([Task(partial(line_map.measure, *given), 1800.0) for given in todo], copies, "test files")
    return [json.loads(path.read_text()) for path in kept.values()]


def drawn(copy: Path, seed: int, count: int, files: str) -> list[Mutant]:
    """So many mutants, each of another line; every line is as likely, and on it every kind of mutation."""
    draw, by_line, found = random.Random(seed), {}, []
    sources = {}
    for pattern in FILES:
        if not (paths := sorted(copy.glob(pattern))):
            raise ValueError(f"FILES of tests/mutants.py: there is no {pattern}")
        sources |= {path.relative_to(copy).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    for file, source in sources.items():
        for place in places(source) if files in file else ():
            by_line.setdefault((file, place.node.lineno), {}).setdefault(place.kind, []).append(place)
    for file, line in draw.sample(list(by_line), len(by_line)):
        place = draw.choice(draw.choice(list(by_line[file, line].values())))
        made = mutated(sources[file], place) if len(found) < count else None
        if made:
            text, before, after = made
            found.append(Mutant(file, line, place.kind, before, after, text, seen_by(place)))
    return sorted(found, key=lambda mutant: mutant[:2])


def seen_by(place: Place) -> range | None:
    """The lines whose tests can see a mutation; None are all of the file, for what Python reads at import."""
    if place.function is None:
        return None
    first, last = place.function if place.statement[0] == place.function[0] else place.statement
    return range(first, last + 1)


def task(mutant: Mutant, maps: Sequence[dict]) -> Task:
    tests, seconds = line_map.chosen(maps, mutant.file, mutant.lines, SECONDS)
    return Task(partial(line_map.killer, tests), 60 + 5 * seconds, mutant.file, mutant.text)


def report(title: str, mutants: Sequence[Mutant], killers: Sequence[str | None]) -> str:
    """The killed share of each file, and what survived."""
    drawn, killed = (
        Counter(m.file for m in mutants),
        Counter(m.file for m, by in zip(mutants, killers, strict=True) if by),
    )
    lines = [f"{title}: {killed.total()} of {len(mutants)} mutants killed ({killed.total() / len(mutants):.1%}),"]
    lines += [
        f"{killers.count('hangs')} of them because they hang.",
        "",
        "| file | mutants | killed |",
        "|---|---|---|",
    ]
    lines += [f"| {file} | {count} | {killed[file]} |" for file, count in drawn.items()]
    lines += ["", "| survivor | before | after |", "|---|---|---|"]
    for mutant, by in zip(mutants, killers, strict=True):
        before, after = (text.replace("|", "\\|") for text in (mutant.before, mutant.after))
        lines += [] if by else [f"| {mutant.file}:{mutant.line} | `{before}` | `{after}` |"]
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    tqdm.monitor_interval = 0  # a thread of the parent does not live on in a child
    sys.path.remove(str(ROOT / "tests"))  # children import the copies of what lies there
    main(**dict(option.split("=", 1) for option in sys.argv[1:]))
