"""Which tests run which lines: measured once by pytest under `coverage`, asked once a mutant by `tests/mutants.py`.

A fixture's lines belong to every test that uses it, and those of a process to the test or fixture that started it.
"""

import json
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import coverage
import pytest

SETTINGS = "[run]\nparallel = true\ndata_file = {folder}/child\ninclude = {root}/twinbench/*, {root}/baselines/*\n"


def measure(test_file: str, out: Path, folder: Path) -> None:
    """Run the tests of a file, and write the lines that each test or fixture ran, their seconds, and what a test uses.

    A test that fails or is skipped is left out. Run it in a process of its own, from the project's root.
    """
    (folder / "settings").write_text(SETTINGS.format(folder=folder, root=Path.cwd()))
    (folder / "sitecustomize.py").write_text("import coverage\ncoverage.process_startup()\n")
    os.environ |= {"COVERAGE_PROCESS_START": str(folder / "settings"), "PYTHONPATH": str(folder)}
    cov = coverage.Coverage(data_file=None, include=["twinbench/*", "baselines/*"])
    cov.start()
    recorder = Recorder(cov, folder)
    pytest.main([test_file, "-q", f"--basetemp={folder}/tmp", "-p", "no:cacheprovider"], plugins=[recorder])
    cov.stop()
    for file in cov.get_data().measured_files():
        for line, names in cov.get_data().contexts_by_lineno(file).items():
            for name in names:
                recorder.lines[name].add((os.path.relpath(file), line))
    tests = {name: uses for name, uses in recorder.uses.items() if name not in recorder.unfit}
    lines = {name: sorted(run) for name, run in recorder.lines.items() if name}
    out.parent.mkdir(parents=True, exist_ok=True)
    (folder / "map").write_text(json.dumps({"lines": lines, "seconds": recorder.seconds, "tests": tests}))
    shutil.move(folder / "map", out)


class Recorder:
    """A pytest plugin that tells coverage, and a clock, which test or fixture is at work."""

    def __init__(self, cov: coverage.Coverage, folder: Path):
        self.cov, self.folder = cov, folder
        self.lines, self.seconds, self.uses, self.unfit = defaultdict(set), defaultdict(float), {}, set()

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        with self._at_work(_name(fixturedef)):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.uses[item.nodeid] = [_name(f) for many in item._fixtureinfo.name2fixturedefs.values() for f in many]
        with self._at_work(item.nodeid):
            return (yield)

    def pytest_runtest_logreport(self, report):
        if not report.passed:
            self.unfit.add(report.nodeid)

    @contextmanager
    def _at_work(self, name: str):
        before, start = self.cov.switch_context(name) or "", time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self.seconds[name] += took
            self.seconds[before] -= took  # a fixture's seconds are not those of the test that was first to use it
            self.cov.switch_context(before)
            for path in self.folder.glob("child.*"):
                data = coverage.CoverageData(str(path))
                data.read()
                self.lines[name] |= {(os.path.relpath(f), n) for f in data.measured_files() for n in data.lines(f)}
                path.unlink()


def _name(fixturedef) -> str:
    return f"fixture {fixturedef.argname} of {fixturedef.baseid}"


def chosen(maps: list[Mapping], file: str, lines: range | None, seconds: float) -> tuple[list[str], float]:
    """The tests that run one of the lines of a file (None: any of its lines), and how long they take.

    Quickest first; no more than fit into so many seconds.
    """
    costs = []
    for found in maps:
        at_work = {
            name for name, run in found["lines"].items() if any(f == file and (not lines or n in lines) for f, n in run)
        }
        for test, uses in found["tests"].items():
            if at_work & {test, *uses}:
                costs.append(
                    (found["seconds"][test] + sum(found["seconds"].get(f, 0.0) for f in uses), test, uses, found)
                )
    tests, total, paid = [], 0.0, set()
    for _, test, uses, found in sorted(costs, key=lambda cost: cost[:2]):
        more = found["seconds"][test] + sum(found["seconds"].get(f, 0.0) for f in uses if (id(found), f) not in paid)
        if total + more <= seconds:
            tests, total, paid = [*tests, test], total + more, paid | {(id(found), f) for f in uses}
    return tests, total


class First:
    """A pytest plugin that runs these tests in this order, stops at the first that fails, and remembers it."""

    def __init__(self, tests: list[str]):
        self.order, self.failed = {test: i for i, test in enumerate(tests)}, None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda item: self.order[item.nodeid])

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed = self.failed or report.nodeid


def killer(tests: list[str], folder: Path) -> str | None:
    """Run tests until one fails: its name, or None. A file whose tests cannot even be collected fails as well."""
    if not tests:
        return None
    first = First(tests)
    files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
    code = pytest.main([*files, "-q", "-x", f"--basetemp={folder}/tmp", "-p", "no:cacheprovider"], plugins=[first])
    survived = code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    return None if survived else first.failed or f"pytest ended with {code!r}"
