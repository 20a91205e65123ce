"""Sections -> index.html: one file with its pictures, style and script inside, to be read without a network."""

import re
from pathlib import Path

import jinja2
import pandas as pd

from twinbench.report import text
from twinbench.report.sections import TITLES, Section


def render(suite: str, sections: list[Section], records: list[dict], command: str) -> str:
    """The page.

    Args:
        records: the records that the sections were made from, for the footer.
        command: what regenerates the report.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    parts = [
        {
            "id": section.file("section"),
            "heading": text.heading(section),
            "older": section.older,
            "sentence": text.PROTOCOLS[section.block.protocol],
            "notes": section.notes,
            "tables": [_table(section, name) for name in text.TITLES if name in section.tables],
            "figures": [(TITLES[name], _inline(files["svg"])) for name, files in section.figures.items()],
        }
        for section in sections
    ]
    texts = {"reading": text.READING, "protocols": text.PROTOCOLS, "older": text.OLDER}
    return template.render(suite=suite, parts=parts, provenance=_provenance(records), command=command, **texts) + "\n"


def _table(section: Section, name: str) -> dict:
    """A table's heading, file and cells; the scores of the main table carry their value for the shading."""
    table = section.tables[name]
    cells = text.shown(name, table)
    rows = []
    for (_, line), (_, values) in zip(cells.iterrows(), table.iterrows(), strict=True):
        mark = _mark(values) if name == "normalized" else ""
        rows.append({"mark": mark, "cells": [_cell(head, line[head], values, name) for head in cells.columns]})
    caption, file = text.CAPTIONS[name], section.file(name) + ".csv"
    return {"title": text.TITLES[name], "caption": caption, "file": file, "heads": list(cells.columns), "rows": rows}


def _mark(values: pd.Series) -> str:
    return "reference" if values["reference"] else values["role"]


def _cell(head: str, shown: str, values: pd.Series, name: str) -> dict:
    """A cell: what it holds, the small print under it, and the share in [0, 1] that it is shaded by."""
    if head in ("method", "expert"):
        label, _, settings = values[head].partition(" (")
        return {"kind": "name", "text": label, "under": settings.removesuffix(")"), "share": None}
    if head == "worst task":
        score, _, task = shown.partition(" ")
        return {"kind": "number", "text": score, "under": task, "share": None}
    kind = "text" if head in ("status", "error") else "number"
    scored = name == "normalized" and head in values.loc["seeds":"average"].index[1:] and shown
    share = min(max(values[head] / 100, 0), 1) if scored else None
    return {"kind": kind, "text": shown, "under": "", "share": share}


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
