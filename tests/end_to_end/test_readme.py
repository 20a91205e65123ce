"""The README shows what the committed records give, and names what exists."""

import re

import pandas as pd

from support.commands import ROOT

REPORTS = ROOT / "results" / "reference" / "reports"
README = (ROOT / "README.md").read_text()


def test_its_tables_are_those_of_the_reference_reports():
    (table,) = [block for block in README.split("\n\n") if "[upper bound]" in block]
    assert table in (REPORTS / "demo" / "leaderboard.md").read_text()


def test_its_table_of_heads_is_that_of_the_reference_report():
    merged, kept = (
        pd.read_csv(file)
        for file in sorted(REPORTS.glob("demo_head/strict*_normalized.csv"), key=lambda file: len(file.name))
    )
    (table,) = [block for block in README.split("\n\n") if "pooler in the head" in block]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len(lines) == len(kept) == len(merged)
    for method, in_head, in_encoder, cost in lines:
        scores = [frame.set_index("method")["average"][method] for frame in (kept, merged)]
        assert [in_head, in_encoder, cost] == [f"{score:.1f}" for score in (*scores, scores[0] - scores[1])], method


def test_the_reference_report_is_made_of_the_reference_records(tmp_path):
    import shutil

    from twinbench.report.make import make

    for folder in ("records", "predictions"):
        shutil.copytree(ROOT / "results" / "reference" / folder, tmp_path / folder)
    make(tmp_path, suite="demo")
    kept = ROOT / "results" / "reference" / "reports" / "demo"
    for name in ("strict_raw.csv", "strict_storage.csv", "blind_raw.csv", "experts.csv"):
        assert (tmp_path / "reports" / "demo" / name).read_bytes() == (kept / name).read_bytes()


def test_the_files_that_it_links_to_are_there():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_a_method_takes_the_two_files_that_it_shows(tmp_path):
    """The example in the README is a working method."""
    import torch

    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    space = {}
    exec(compile(code, "README.md", "exec"), space)
    base, experts = {"w": torch.zeros(2)}, {"a": {"w": torch.ones(2)}, "b": {"w": -2 * torch.ones(2)}}
    assert space["merge"](base, experts, scaling=0.5).shared["w"].tolist() == [-1.0, -1.0]
