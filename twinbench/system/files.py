"""Files and folders that appear under their name when they are whole and on the disk, or not at all.

What is being written lies beside that name as ``.NAME-HOST-PROCESS-RANDOM``. Whoever next writes into the same folder
removes what processes of this machine have left there and are gone.
"""

import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from twinbench.system import processes

HOST = socket.gethostname()  # in hidden names, since process ids mean nothing on other machines
CLAIM = ".claim"  # ends the names of claims, see `claims`
HIDDEN = re.compile(rf"\..+-{re.escape(HOST)}-(\d+)-[0-9a-f]{{8}}")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a hidden name beside ``path`` to write to; the file gets that name when the context ends without an error.

    Of several processes of one run the first one's file stays: they have the same to write.

    Raises:
        OSError: the disk is full, or cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent)
    part = _hidden(path)
    try:
        yield part
        if processes.rank() == 0:
            _sync(part)
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a hidden folder beside ``folder`` to write into; it gets that name when the context ends without an error.

    Raises:
        FileExistsError: the folder exists and is not empty.
        OSError: the disk is full, or cannot be written to.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder; remove it or choose another name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder.parent)
    part = _hidden(folder)
    part.mkdir()
    try:
        yield part
        for path in (*part.rglob("*"), part):
            _sync(path)
        os.replace(part, folder)
        _sync(folder.parent)
    except OSError as error:
        if error.errno is None:  # not of the disk: whoever raised it has said what is wrong
            raise
        said = f"{folder} could not be written, and nothing is left of it: {error.strerror or error}"
        raise OSError(error.errno, said) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file or folder at once for everybody else: it loses its name first; a reader keeps what is open."""
    aside = _hidden(path)
    with suppress(FileNotFoundError):  # another process was faster
        os.replace(path, aside)
        _delete(aside)


def check_writable(results_dir: Path) -> None:
    """Raise OSError with the folder's name if records could not be written there."""
    try:
        with new_file(results_dir / "records" / "writable") as part:
            part.touch()
        (results_dir / "records" / "writable").unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"results_dir={results_dir} cannot be written to: {error.strerror or error}") from error


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes have left in a folder: half-written files, if they ran here, and claims."""
    for path in folder.glob(".*"):
        found = HIDDEN.fullmatch(path.name)
        if found and not _alive(int(found[1])):
            _delete(path)
        elif path.name.endswith(CLAIM):
            _unclaim(path)


def _unclaim(path: Path) -> None:
    """Remove a claim unless a process, of whatever machine, holds its lock."""
    from filelock import FileLock, Timeout  # a tenth of a second, which a plan need not pay

    with suppress(Timeout, OSError), FileLock(path, blocking=False):
        path.unlink(missing_ok=True)


def _hidden(path: Path) -> Path:
    return path.parent / f".{path.name}-{HOST}-{os.getpid()}-{secrets.token_hex(4)}"


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # a leftover that cannot be removed keeps nobody from writing
            path.unlink()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
