"""Child processes in copies of the project, forked from one process that has imported the libraries."""

import ast
import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

MEMORY = 12 << 30  # bytes that a child may map: a mutant must not take the machine down


class Task(NamedTuple):
    """What a child process does in a copy of the project.

    Attributes:
        run: called there with a new folder for what it writes; returns something that JSON can hold.
        seconds: until it is ended.
        file, text: a file of the copy that has this text meanwhile, or None.
    """

    run: Callable[[Path], object]
    seconds: float
    file: str | None = None
    text: str | None = None


def copied(root: Path, folder: Path) -> Path:
    """Copy a working tree to ``folder``: what git tracks, and what is new and not ignored."""
    names = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=root, text=True)
    for name in filter(lambda name: (root / name).is_file(), names.splitlines()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, folder / name)
    return folder


def import_libraries(copy: Path) -> None:
    """Import whatever the project's files import, but none of themselves."""
    own = {"conftest", "mutation", "support", *(path.stem for path in copy.iterdir())}
    for path in sorted(copy.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else names
            for name in (name for name in names if name.partition(".")[0] not in own):
                with contextlib.suppress(ImportError):
                    module = importlib.import_module(name)
                    for alias in node.names:
                        getattr(module, alias.name, None)  # transformers imports its classes when they are asked for


def forked(tasks: Sequence[Task], copies: Sequence[Path], unit: str) -> list:
    """What each task returns, as many at a time as there are copies; "hangs" if its time was up, "dies" if it did."""
    results, waiting, running, free = [None] * len(tasks), list(enumerate(tasks))[::-1], {}, list(copies)
    with tqdm(total=len(tasks), unit=f" {unit}", disable=False) as bar:
        while waiting or running:
            while waiting and free:
                number, task = waiting.pop()
                copy = free.pop()
                running[_fork(number, task, copy)] = number, task, copy, time.monotonic() + task.seconds
            time.sleep(0.05)
            for child, (number, task, copy, end) in list(running.items()):
                late = time.monotonic() > end
                if late or os.waitpid(child, os.WNOHANG)[0]:
                    results[number] = _ended(child, task, copy, late)
                    del running[child]
                    free.append(copy)
                    bar.update()
    return results


def _fork(number: int, task: Task, copy: Path) -> int:
    """Start a task; return the child's process id, which is also that of the group of all that it starts."""
    shutil.rmtree(_beside(copy, "work"), ignore_errors=True)
    _beside(copy, "work").mkdir()
    _beside(copy, "json").unlink(missing_ok=True)
    if task.file:
        shutil.copy2(copy / task.file, _beside(copy, "original"))
        (copy / task.file).write_text(task.text, encoding="utf-8")
        os.utime(
            copy / task.file, (number, number)
        )  # no other text has this time, so no stale bytecode is taken for it
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.chdir(copy)
        with _beside(copy, "log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        _beside(copy, "json").write_text(json.dumps(task.run(_beside(copy, "work"))))
    finally:
        os._exit(0)


def _ended(child: int, task: Task, copy: Path, late: bool):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if late:
        os.waitpid(child, 0)
    if task.file:
        shutil.copy2(_beside(copy, "original"), copy / task.file)
    result = _beside(copy, "json")
    return "hangs" if late else json.loads(result.read_text()) if result.exists() else "dies"


def _beside(copy: Path, what: str) -> Path:
    return copy.with_name(f"{copy.name}.{what}")
