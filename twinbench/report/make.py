"""Records -> leaderboard: tables, figures and one page per suite or experiment, made from the results folder alone.

``RESULTS/reports/NAME/`` holds ``index.html``, ``leaderboard.md``, ``leaderboard.tex``, ``experts.md``,
``experts.tex``, one CSV per table at full precision and ``figures/``. It is regenerated as a whole: the same records
give the same bytes. ``manifest.txt`` lists its files; those that the last report listed and this one lacks are removed.
``RESULTS/caveats/SUITE.md``, where somebody wrote it, says in a report's first lines what is wrong with its numbers.
"""

import json
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from twinbench.plan.job import CONFIGURATION
from twinbench.system.mistakes import NAME, Mistake, check_name, unknown

if TYPE_CHECKING:
    from twinbench.report.blocks import Block
    from twinbench.report.section import Section

REFERENCE = "twin_merging"
SUMMARY = ("normalized", "failed")  # the tables that the terminal shows


def make(
    results_dir: Path, *, suite: str | None = None, experiment: str | None = None, reference: str = REFERENCE
) -> dict:
    """Write a report and return what is in it.

    Args:
        results_dir: folder with ``records/``, ``predictions/``, ``experts/`` and ``sweeps/``.
        suite: the report is of all runs on the test split of this suite, or if there are none on its held-out rows; or
        experiment: of the runs of this experiment's last sweep, whatever they score. Where it has the name of a suite,
            either is of both (`read.belonging`).
        reference: the method, or the label of the row, that differences are taken to. The default may be absent (then
            there are no differences); any other must exist.

    Returns:
        ``tables`` (name -> DataFrame), ``figures`` (name -> path of the PNG), ``folder``, and ``summary``, the main
        tables as text.

    Raises:
        ValueError: no records of that suite or experiment, no row called ``reference``, or a malformed record.
        OSError: the folder cannot be written to.
    """
    from twinbench.records import store
    from twinbench.report import blocks, files, read

    which, name = ("suite", suite) if experiment is None else ("experiment", experiment)
    check_name(which, name)
    current, older = store.by_experts(store.read(results_dir))
    rows, gone = store.latest(current), read.belonging(older, results_dir, suite, experiment)
    if gone and not read.belonging(rows, results_dir, suite, experiment):
        raise Mistake(
            f"all records of {which} {name!r} are of the experts of an earlier training; the command that made them "
            "measures them again"
        )
    mine = read.chosen(rows, results_dir, suite, experiment)
    found = blocks.blocks(mine)
    _check_reference(found, reference)
    where = f"results_dir={shlex.quote(str(_relative(results_dir)))}"
    with ThreadPoolExecutor(1) as pool:  # numpy resamples while Python imports matplotlib
        sampled = pool.submit(_sampled, results_dir, found)
        from twinbench.report import catalog, held_out, page, sections, text

        training = {block.suite_id: read.experts(results_dir, block.suite_id) for block in found}
        beside = sections.Beside(training, *sampled.result(), held_out.settings(rows))
        made = sections.make(found, beside, name, reference, older=experiment is None, where=where)
    command = f"python -m twinbench.report {which}={name} {where} reference={shlex.quote(reference)}"
    folder, caveats = results_dir / "reports" / name, _caveats(results_dir, mine)
    caveats += _left_out(gone, rows, mine)
    whole = page.render(name, made, mine, command, caveats)
    files.write(folder, {"index.html": whole.encode()} | _files(name, made, caveats))
    shown = [table for table in catalog.TABLES if table.name in SUMMARY]
    return {
        "tables": {section.file(name): table for section in made for name, table in section.tables.items()},
        "figures": {s.file(name): folder / "figures" / f"{s.file(name)}.png" for s in made for name in s.figures},
        "folder": folder,
        "summary": text.document(name, [s for s in made if not s.older], shown, caveats),
    }


def _sampled(results_dir: Path, found: "list[Block]") -> tuple:
    """The resampled scores of all runs, the best constant answers, and why some runs' predictions are left out."""
    from twinbench.report import bootstrap, read

    frames, doubts = read.predictions(results_dir, found)
    return *bootstrap.draws(frames, found), doubts


def _check_reference(found: "list[Block]", reference: str) -> None:
    """Refuse a reference that is no row or several; the default may be none, and of several it is the plainest."""
    rows = [row for block in found for row in block.rows]
    if reference == REFERENCE or any(row.label == reference for row in rows):
        return
    fitting = list(dict.fromkeys(row.label for row in rows if row.method == reference))
    if fitting:
        raise Mistake(f"reference={reference!r} fits {len(fitting)} rows; give one of {'; '.join(fitting)}")
    raise Mistake(unknown("reference", reference, sorted({name for row in rows for name in (row.label, row.method)})))


def _caveats(results_dir: Path, rows: list[dict]) -> list[str]:
    """What people wrote about the suites that the records are of, a paragraph each."""
    from twinbench.report import files

    suites = [suite for suite in dict.fromkeys(row["suite"] for row in rows) if suite and NAME.fullmatch(suite)]
    texts = [files.text(results_dir / "caveats" / f"{suite}.md") for suite in suites]
    return [" ".join(paragraph.split()) for whole in texts for paragraph in whole.split("\n\n") if paragraph.strip()]


def _left_out(older: list[dict], rows: list[dict], shown: list[dict]) -> list[str]:
    """That runs are missing, since their suite's experts have been trained anew; nothing where none is.

    Args:
        older: the report's records of other experts than the newest of their suite.
        rows: all others. What they have, under whatever source of its method, is not missing.
        shown: the report's own.
    """
    has, splits = {_configuration(row) for row in rows}, {row["split"] for row in shown if row["primary"]}
    missing = [row for row in older if row["primary"] and row["split"] in splits and _configuration(row) not in has]
    if not missing:
        return []
    runs, methods = {row["run_id"] for row in missing}, sorted({row["method"] for row in missing})
    them = f"{len(runs)} of the runs, of {', '.join(methods)}"
    return [
        f"Left out, measured with the experts of an earlier training: {them}. The command that made them measures them "
        "again."
    ]


def _configuration(row: dict) -> str:
    return json.dumps([row[key] for key in CONFIGURATION], sort_keys=True)


def _files(name: str, made: "list[Section]", caveats: list[str]) -> dict[str, bytes]:
    """Every file of the report but the page: path inside the folder -> content."""
    from twinbench.report import text
    from twinbench.report.catalog import EXPERTS, LEADERBOARD, TABLES

    files = {}
    for file in (LEADERBOARD, EXPERTS):
        shown = [table for table in TABLES if file in table.files]
        names = {table.name for table in shown}
        if file == LEADERBOARD or any(names & section.tables.keys() for section in made):
            files[file] = text.document(name, made, shown, caveats).encode()
    for table in (table for table in TABLES if table.latex):
        first = next((section for section in made if table.name in section.tables), None)
        if first:
            files[table.latex[0]] = text.latex(name, first, table).encode()
    for section in made:
        for title, table in section.tables.items():
            files[f"{section.file(title)}.csv"] = table.to_csv(index=False, lineterminator="\n").encode()
        for title, pictures in section.figures.items():
            files |= {f"figures/{section.file(title)}.{kind}": data for kind, data in pictures.items()}
    return files


def _relative(path: Path) -> Path:
    """``path`` as it reads from the current folder, where it lies inside it."""
    whole = path.resolve()
    return whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else path
