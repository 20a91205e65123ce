"""What a report writes: its files, its page, its names, and the command line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.results import add_run, fill, guess, table
from twinbench.records import store
from twinbench.report.make import make


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return fill(tmp_path)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """The written report of the same records, made once: read it, leave it as it is."""
    return make(fill(tmp_path_factory.mktemp("results")), suite="toy")


ROOT = Path(__file__).parents[2]


def test_regenerating_gives_the_same_bytes(report):
    folder = report["folder"]
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    make(folder.parents[1], suite="toy")
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before
    suffixes = {path.suffix for path in before}
    assert suffixes == {".html", ".md", ".tex", ".csv", ".svg", ".png", ".txt"}
    listed = set((folder / "manifest.txt").read_text(encoding="utf-8").splitlines())
    assert listed == {path.relative_to(folder).as_posix() for path in before} - {"manifest.txt"}


def test_a_report_removes_what_the_last_one_wrote_and_nothing_else(results):
    folder = make(results, suite="toy")["folder"]
    outside = [results / "README.md", folder / "mine.csv", folder / "figures" / "mine.png"]
    for path in outside:
        path.write_text("not of a report")
    with (folder / "manifest.txt").open("a", encoding="utf-8") as file:
        file.write("../../README.md\nfigures/../mine.csv\n/etc/hosts\nnever_there.csv\n")
    for path in [*(results / "records").glob("[de]*.jsonl"), results / "records" / "c0.jsonl"]:
        path.unlink()
    before = {path for path in folder.rglob("*.*") if path not in outside}
    make(results, suite="toy")
    gone = {"experts.csv", "experts.md", "strict_failed.csv", "figures/experts.svg", "figures/experts.png"}
    after = {path for path in folder.rglob("*.*") if path not in outside}
    assert {path.relative_to(folder).as_posix() for path in before - after} >= gone - {"experts.md"}
    assert all(path.read_text() == "not of a report" for path in outside)
    listed = set((folder / "manifest.txt").read_text(encoding="utf-8").splitlines())
    assert listed == {path.relative_to(folder).as_posix() for path in after} - {"manifest.txt"}


def test_a_report_that_could_not_be_written_leaves_no_parts_and_is_mended_by_the_next(results):
    folder = results / "reports" / "toy"
    (folder / "strict_raw.csv").mkdir(parents=True)
    with pytest.raises(OSError, match=r"strict_raw\.csv"):
        make(results, suite="toy")
    assert (folder / "index.html").exists() and not list(folder.rglob(".*"))
    (folder / "strict_raw.csv").rmdir()
    for path in (results / "records").glob("[bce]*.jsonl"):
        path.unlink()
    make(results, suite="toy")
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    assert left == {"manifest.txt", *(folder / "manifest.txt").read_text(encoding="utf-8").splitlines()}


@pytest.mark.parametrize("name", ["../../..", "/tmp", "a/b", ".hidden", "", "-x", "a b", "a\n"])
def test_names_that_leave_the_folder_of_reports_are_refused(results, name):
    add_run(results, "f0", "average", guess(0.7), suite=name)
    for setting in ("suite", "experiment"):
        with pytest.raises(ValueError, match=f"{setting} .* is no name"):
            make(results, **{setting: name})
    assert not (results / "reports").exists()


def test_a_record_whose_suite_id_is_a_path_writes_nothing(results):
    add_run(results, "f0", "average", guess(0.7), suite_id="../../x", time="2025-01-01T00:00:00+00:00")
    with pytest.raises(ValueError, match=r"a report has no file 'strict_\.\./\.\./x"):
        make(results, suite="toy")
    assert not (results / "reports").exists()


def test_a_caveat_of_the_suite_stands_first(results):
    (results / "caveats").mkdir()
    (results / "caveats" / "toy.md").write_text("Not a\nfinding: x < y.\n\nSecond.\n")
    (results / "caveats" / "other.md").write_text("Of another suite.")
    made = make(results, suite="toy")
    for text in (made["summary"], (made["folder"] / "leaderboard.md").read_text()):
        assert text.startswith("# toy\n\n> Not a finding: x < y.\n\n> Second.\n\nA normalized score")
        assert "another suite" not in text
    page = (made["folder"] / "index.html").read_text()
    assert page.index("Not a finding: x &lt; y.") < page.index("How to read the numbers")


def test_suites_are_told_apart_in_the_headings_of_one_report(results):
    add_run(results, "z9", "average", guess(0.4), suite="toy_other", suite_id="other", time="2025-01-01T00:00:00+00:00")
    store.write_sweep(results, "both", ["a0", "a2", "z9"])
    text = make(results, experiment="both")["summary"]
    assert "## toy: strict protocol" in text and "## toy_other: strict protocol, 2 tasks, suite_id other" in text


def test_a_suite_and_the_experiment_of_its_name_have_one_report_but_for_runs_with_other_experts(results):
    own = make(results, suite="toy")["summary"]
    assert make(results, experiment="toy")["summary"] == own, "no run is listed"
    add_run(results, "z9", "average", guess(0.4), suite="toy_other", suite_id="other", time="2025-01-01T00:00:00+00:00")
    store.write_sweep(results, "toy", ["z9"])
    assert make(results, suite="toy")["summary"] == own
    both = make(results, experiment="toy")["summary"]
    assert "## toy: strict protocol" in both and "## toy_other: strict protocol" in both


def test_page_is_self_contained_and_names_every_method(report):
    page = (report["folder"] / "index.html").read_text(encoding="utf-8")
    loaded = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)\)|@import""", page)
    links = {first or second for first, second in loaded}
    assert all(link.startswith("#") or (report["folder"] / link).exists() for link in links), links
    for name in ("individual", "pretrained", "average", "ties", "twin_merging", "della", "router=oracle"):
        assert name in page
    assert page.count("<svg") == len(report["figures"]) == 9
    assert all(path.exists() for path in report["figures"].values())


def test_markup_in_a_name_is_escaped(tmp_path):
    evil = "<script>alert(1)</script> [x](http://y) a|b & $x^$ \\n\n| c"
    for run_id, note in (("a", ""), ("b", evil)):
        add_run(tmp_path, run_id, "average", guess(0.5), params={"note": note})
    add_run(tmp_path, "c", "ties", error=evil)
    folder = make(tmp_path, suite="toy")["folder"]
    page, markdown, latex = ((folder / f).read_text() for f in ("index.html", "leaderboard.md", "leaderboard.tex"))
    assert "alert(1)" in page and "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; [x]\\(http://y) a\\|b &amp; $x^$" in markdown
    assert "<script>" not in markdown and "](http" not in markdown and "\n| c" not in markdown
    assert r"\textless{}script\textgreater{}" in latex and r"a\textbar{}b \& \$x\textasciicircum{}\$" in latex


def run_module(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess:
    command = ["-c", code] if code else ["-m", "twinbench.report", *arguments]
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, encoding="utf-8")


def test_command_line_prints_the_table_and_imports_no_torch(results):
    code = (
        "import sys; from twinbench.report.__main__ import main; "
        f"code = main(['suite=toy', 'results_dir={results}']); "
        "sys.exit(9 if {'torch', 'transformers', 'scipy'} & set(sys.modules) else code)"
    )
    done = run_module(code=code)
    assert done.returncode == 0, done.stderr
    assert "| twin_merging (router=mlp) [reference]" in done.stdout
    assert done.stdout.splitlines()[-1] == str(results / "reports" / "toy" / "index.html")


def test_command_line_errors_are_one_clear_line(results):
    cases = {
        ("suite=toys", f"results_dir={results}"): "error: no records of suite 'toys'; suites with records: toy",
        ("sute=toy",): "error: unknown setting 'sute'; did you mean 'suite'?",
        ("suite=toy", f"results_dir={results}", "reference=tie"): "did you mean 'ties'?",
        ("suite=../../x", f"results_dir={results}"): "error: suite '../../x' is no name: files are called by it",
    }
    for arguments, message in cases.items():
        done = run_module(*arguments)
        assert done.returncode == 1 and done.stdout == ""
        assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_reference_that_fits_several_rows_is_refused_with_their_labels(results):
    add_run(results, "a4", "ties", guess(0.7), params={"density": 0.5})
    words = r"'ties' fits 2 rows; give one of ties \(density=0\.2\); ties \(density=0\.5\)"
    with pytest.raises(ValueError, match=words):
        make(results, suite="toy", reference="ties")
    assert table(results, reference="ties (density=0.5)").loc["ties (density=0.5)", "reference"]
    made = make(results, suite="toy", reference="ties (density=0.5)")["tables"]["strict_normalized"]
    assert made.loc[made["reference"], "method"].tolist() == ["ties (density=0.5)"]


def test_suite_that_only_failed_still_has_a_report(tmp_path):
    add_run(tmp_path, "a0", "ties", error=None)
    report = make(tmp_path, suite="toy")
    assert list(report["tables"]) == ["strict_failed"] and report["figures"] == {}
    assert "no message" in (report["folder"] / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["caveats/toy.md", "reports/toy/manifest.txt"])
def test_a_file_that_is_no_text_is_named(results, name):
    (results / name).parent.mkdir(parents=True)
    (results / name).write_bytes(b"\xff")
    with pytest.raises(ValueError, match=f"{name}: not a text in UTF-8"):
        make(results, suite="toy")
