"""The files of a report: their names stay inside its folder, and only what the last report listed is ever removed."""

import re
from pathlib import Path

from twinbench.system.files import new_file
from twinbench.system.mistakes import NAME, Mistake

FILE = re.compile(rf"(figures/)?{NAME.pattern}")
MANIFEST = "manifest.txt"  # what the last report wrote, a path a line


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Put each file in place whole, then remove those that the last report listed and this one lacks.

    Args:
        files: path inside the folder -> content.

    Raises:
        ValueError: a path is not that of a file in the folder or in its ``figures``.
        OSError: the folder cannot be written to.
    """
    for name in files:
        if not FILE.fullmatch(name):
            raise Mistake(f"{folder}: a report has no file {name!r}; the records hold a name that is a path")
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    stale = _listed(folder) - files.keys()
    _list(folder, files.keys() | stale)  # first: a report that is killed here leaves nothing that no list has
    for name, data in files.items():
        _put(folder / name, data)
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    _list(folder, files.keys())


def text(path: Path) -> str:
    """A file's text; empty where there is no file.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise Mistake(f"{path}: not a text in UTF-8 ({error})") from error


def _listed(folder: Path) -> set[str]:
    """What the last report wrote, by its list."""
    return {line for line in text(folder / MANIFEST).splitlines() if FILE.fullmatch(line)}


def _list(folder: Path, names: set[str]) -> None:
    _put(folder / MANIFEST, "".join(f"{name}\n" for name in sorted(names)).encode())


def _put(path: Path, data: bytes) -> None:
    with new_file(path) as part:
        part.write_bytes(data)
