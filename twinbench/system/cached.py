"""Folders of the cache: made once, and compared with what was written before each use; a damaged one is made again.

``.manifest`` in a folder holds size and hash of each of its files. The hash is xxh3-128, which reads 10 GB a second:
it is there to find damage, and whoever could forge the files could forge the manifest as well.
"""

import functools
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import xxhash

from twinbench.system.claims import claimed
from twinbench.system.files import new_folder, remove

MANIFEST = ".manifest"


def made(folder: Path, make: Callable[[Path], object]) -> Path:
    """Return ``folder`` with the content that ``make(part)`` has written into it, now or at an earlier call.

    Where another process is making it, this one waits for it.

    Raises:
        OSError: the cache cannot be written to.
    """
    if folder.exists() and damaged(folder) is None:
        return folder
    with claimed(folder, wait=True):
        if folder.exists():
            damage = damaged(folder)
            if damage is None:
                return folder
            print(f"{folder}: {damage}; it is made again", file=sys.stderr, flush=True)
            remove(folder)
        with new_folder(folder) as part:
            make(part)
            (part / MANIFEST).write_text(json.dumps(_manifest(part), indent=0) + "\n", encoding="utf-8")
    return folder


def damaged(folder: Path) -> str | None:
    """What keeps a folder from being the one that was written, or None. A file is read once while it stays as it is."""
    try:
        written = {name: tuple(entry) for name, entry in json.loads((folder / MANIFEST).read_bytes()).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return f"no {MANIFEST} to check its files by"
    for name, entry in written.items():
        try:
            if _entry(folder / name) != entry:
                return f"{name} is not what was written there"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def weights_hash(folder: Path) -> str | None:
    """The hash of a folder's weights as its manifest has it; None where there is no manifest to read."""
    try:
        written = json.loads((folder / MANIFEST).read_bytes())
        return ",".join(entry[1] for name, entry in sorted(written.items()) if name.endswith(".safetensors"))
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def _manifest(folder: Path) -> dict[str, tuple[int, str]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {file.relative_to(folder).as_posix(): _entry(file) for file in files}


def _entry(file: Path) -> tuple[int, str]:
    state = file.stat()
    return state.st_size, _hash(file, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=4096)  # the jobs of a sweep ask for the same gigabytes again
def _hash(file: Path, size: int, mtime_ns: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()
