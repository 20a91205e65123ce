"""What the user can mend: an error class for it, and the words of its messages."""

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

NAME = re.compile(r"\w[\w.-]*")  # of what becomes the name of a file or folder


class Mistake(ValueError):
    """Something that the user can mend. It is told in one line, without a traceback."""


@contextmanager
def mistakes() -> Iterator[None]:
    """Turn the ValueError of a method or a loader into a `Mistake`: such files raise it for bad input."""
    try:
        yield
    except ValueError as error:
        raise Mistake(str(error)) from error


def one_of(what: str, given: str, known: Iterable[str]) -> None:
    """Raise ValueError, with the nearest name, unless ``given`` is known."""
    known = list(known)
    if given not in known:
        raise Mistake(unknown(what, given, known))


def check_name(what: str, name: object) -> None:
    """Raise ValueError unless a name can be that of a file or folder inside another one."""
    if name is None or not NAME.fullmatch(str(name)):
        wanted = "letters, digits, _, - and ., the first no - or ."
        raise Mistake(f"{what} {name!r} is no name: files are called by it, so it is of {wanted}")


def unknown(what: str, given: str, known: Iterable[str], otherwise: str = "") -> str:
    """Say that there is no such name, and which is nearest; ``otherwise`` is said where none is near."""
    known = list(known)
    near = difflib.get_close_matches(str(given), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"{otherwise}."
    return f"unknown {what} {given!r}{hint} Known: {', '.join(known)}."
