"""Sections -> index.html: one file with its pictures, style and script inside, to be read without a network."""

import re
from collections.abc import Sequence
from pathlib import Path

import jinja2

from twinbench.protocol import PROTOCOLS
from twinbench.report import text
from twinbench.report.catalog import TABLES, Table
from twinbench.report.cells import NAMES, WORDS
from twinbench.report.living import dead
from twinbench.report.section import Section
from twinbench.report.sections import title


def render(suite: str, sections: list[Section], records: list[dict], command: str, caveats: Sequence[str]) -> str:
    """The page.

    Args:
        records: the records that the sections were made from, for the footer.
        command: what regenerates the report.
        caveats: paragraphs on what is wrong with the numbers; they come first.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    parts = [
        {
            "id": section.file("section"),
            "heading": section.heading,
            "older": section.older,
            "sentence": section.sentence,
            "notes": [_spans(note) for note in section.notes],
            "tables": [_table(section, table) for table in TABLES if table.name in section.tables],
            "figures": [(title(name), _inline(files["svg"])) for name, files in section.figures.items()],
        }
        for section in sections
    ]
    protocols = PROTOCOLS.values()
    texts = {"caveats": caveats, "reading": text.READING, "protocols": protocols, "older": text.OLDER}
    return template.render(suite=suite, parts=parts, provenance=_provenance(records), command=command, **texts) + "\n"


def _table(section: Section, table: Table) -> dict:
    """A table's heading, file and cells."""
    numbers = section.tables[table.name]
    cells = table.cells(numbers)
    shaded = list(numbers.loc[:, "seeds":"average"])[1:] if table.name == "normalized" else []
    grey = {head for task in dead(section.tables) for head in cells if head == task or head.startswith(f"{task} (")}
    rows = []
    for shown, values in zip(cells.to_dict("records"), numbers.to_dict("records"), strict=True):
        mark = "reference" if values.get("reference") else values.get("role", "")
        made = {head: _cell(head, shown[head], values, head in shaded and head not in grey) for head in shown}
        rows.append({"mark": mark, "cells": [cell | {"grey": head in grey} for head, cell in made.items()]})
    said = {"title": table.title, "caption": table.caption, "file": f"{section.file(table.name)}.csv"}
    return said | {"heads": list(cells), "rows": rows}


def _cell(head: str, shown: str, values: dict, shaded: bool) -> dict:
    """A cell: its kind and text, the small print under it, and the share in [0, 1] that it is shaded by."""
    cell = {"kind": "number", "text": shown, "under": "", "share": None}
    if head in NAMES:
        label, _, settings = values[head].partition(" (")
        return cell | {"kind": "name", "text": label, "under": settings.removesuffix(")")}
    if head == "worst task":
        score, _, task = shown.partition(" ")
        return cell | {"text": score, "under": task}
    if shaded and shown:
        return cell | {"share": min(max(values[head] / 100, 0), 1)}
    return cell | {"kind": "text"} if head in WORDS else cell


def _spans(note: str) -> list[tuple[bool, str]]:
    """The pieces of a note, and whether each stands in backticks."""
    return [(place % 2 == 1, piece) for place, piece in enumerate(note.split("`"))]


def _inline(svg: bytes) -> str:
    """The ``svg`` element alone: a file's XML head and metadata have no place inside a page."""
    drawing = svg.decode("utf-8")
    return re.sub(r"<metadata>.*?</metadata>\s*", "", drawing[drawing.index("<svg") :], flags=re.DOTALL)


def _provenance(records: list[dict]) -> list[tuple[str, str]]:
    """What made the records, every value that occurs."""
    versions = {f"{name} {version}" for record in records for name, version in (record["versions"] or {}).items()}
    commits = {f"{record['commit']}{' (dirty)' if record['dirty'] else ''}" for record in records}
    times = sorted(record["time"] for record in records)
    return [
        ("Records", f"{len({record['run_id'] for record in records})} runs, {times[0]} to {times[-1]}"),
        ("Base model", _listed(record["base"] for record in records)),
        ("Suite id", _listed(record["suite_id"] for record in records)),
        ("Commit", _listed(commits)),
        ("Device", _listed(record["device"] for record in records)),
        ("Versions", _listed(versions)),
    ]


def _listed(values) -> str:
    return ", ".join(sorted({str(value) for value in values if value is not None}))
