"""The import rules and the sizes that the README's map promises, read from the source with `ast`.

`python tests/test_architecture.py` prints the floors: each room stands above all rooms that it imports.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A room is a folder or a top module of twinbench; workloads/X stands for each kind of model. A room imports only rooms
# to its left, so there is no circle; no kind of model imports another one.
ORDER = """
    system protocol weights assets tasks merging baselines suite workbench routing prepared workloads workloads/X
    plan records benchmark export prepare report sweep merge command run.py
"""
BASELINES_IMPORT = ["baselines", "twinbench.weights", "twinbench.merging", "twinbench.system.mistakes"]
NO_TORCH = ["plan", "records", "report"]
CONTRACT = {"merge", "factored"}  # a method's hyperparameters are its arguments, as many as it has


@cache
def sources() -> list[tuple[str, ast.Module]]:
    """Each module of the project that is no test, as `path, tree`."""
    paths = [*(ROOT / "twinbench").rglob("*.py"), *(ROOT / "baselines").glob("*.py"), ROOT / "run.py"]
    return [(p.relative_to(ROOT).as_posix(), ast.parse(p.read_text(encoding="utf-8"))) for p in sorted(paths)]


def room(path: str) -> str:
    """The room of a file or a folder of the project."""
    first, _, below = path.partition("/")
    if first != "twinbench":
        return first
    kind = re.match(r"workloads/(\w+)(/|$)", below)
    return kind[0].removesuffix("/") if kind else re.split(r"[/.]", below)[0]


def imported(tree: ast.Module) -> Iterator[str]:
    """The project's files and folders that a module imports, in functions and for types too."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            while parts and parts[0] in ("twinbench", "baselines"):
                found = [path for path in ("/".join(parts), "/".join(parts) + ".py") if (ROOT / path).exists()]
                if found:
                    yield found[0]
                    break
                parts.pop()


@cache
def arrows() -> dict[str, set[str]]:
    """Room to the rooms that it imports."""
    found: dict[str, set[str]] = {}
    for path, tree in sources():
        others = {room(other) for other in imported(tree)} - {room(path), ""}
        found.setdefault(room(path), set()).update(others)
    return {name: others for name, others in found.items() if name != "__init__"}


def rank(name: str) -> int:
    return ORDER.split().index("workloads/X" if name.startswith("workloads/") else name)


def floors() -> dict[str, int]:
    """Room to its floor, counted from 1; of the arrows that run up, none counts."""
    found: dict[str, int] = {}
    for name in sorted(arrows(), key=rank):
        below = [found[other] for other in arrows()[name] if rank(other) < rank(name)]
        found[name] = 1 + max(below, default=0)
    return found


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path}:{node.name}", node


def code_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return function.end_lineno - function.lineno + 1 - documented * (first.end_lineno - first.lineno + 1)


def arguments(function: ast.FunctionDef) -> list[str]:
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def says_kind(node: ast.AST) -> bool:
    """Whether a name or a comparison is about a kind of model."""
    names = [getattr(node, field, None) for field in ("id", "attr", "arg", "name")]
    if isinstance(node, ast.Compare):
        names += [getattr(side, "value", None) for side in (node.left, *node.comparators)]
    kinds = "causal|generative|^generation$|^classification$"
    return any(isinstance(name, str) and re.search(kinds, name) for name in names)


def test_no_arrow_between_rooms_runs_up():
    up = {f"{a} -> {b}" for a, others in arrows().items() for b in others if rank(b) >= rank(a)}
    assert not up


def test_there_are_few_rooms_and_floors():
    names = [path for path in (ROOT / "twinbench").iterdir() if not path.name.startswith("__")]
    assert len(names) <= 20
    assert max(floor for name, floor in floors().items() if name not in ("run.py", "baselines")) <= 9, floors()


def test_baselines_import_the_algebra_alone():
    wrong = {
        f"{path} imports {name}"
        for path, tree in sources()
        if path.startswith("baselines/")
        for name in (other.removesuffix(".py").replace("/", ".") for other in imported(tree))
        if not any(f"{name}.".startswith(f"{legal}.") for legal in BASELINES_IMPORT)
    }
    assert not wrong


def test_plan_records_and_report_import_no_torch():
    """In a process where to import torch is an error, whose traceback shows who did."""
    paths = (path for path, _ in sources() if room(path) in NO_TORCH and not path.endswith("__main__.py"))
    names = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in paths]
    code = (
        "import importlib, sys\n"
        "class Refused:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': raise RuntimeError('torch is imported')\n"
        "sys.meta_path.insert(0, Refused())\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(names) > 20


def test_functions_are_short():
    assert not {name for name, function in functions() if code_lines(function) > 50}


def test_functions_take_few_arguments():
    assert not {name for name, f in functions() if len(arguments(f)) > 7 and f.name not in CONTRACT}


def test_only_workloads_branch_on_the_kind_of_model():
    found = {
        path
        for path, tree in sources()
        if not room(path).startswith("workloads/") and any(map(says_kind, ast.walk(tree)))
    }
    assert not found


def test_no_test_file_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) (test_\w+|conftest)\b", text, re.MULTILINE), path


if __name__ == "__main__":
    for floor in range(max(floors().values()), 0, -1):
        print(floor, ", ".join(name for name, own in floors().items() if own == floor))
