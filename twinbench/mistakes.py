"""Errors that are the user's own to mend: they are told in one line, without a traceback."""

import difflib
from collections.abc import Iterable

from hydra.errors import InstantiationException
from omegaconf.errors import OmegaConfBaseException

MISTAKES = (ValueError, OSError, OmegaConfBaseException, InstantiationException)


def one_line(error: BaseException) -> str:
    """An error's own words; Hydra wraps what a constructor raised."""
    cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
    return " ".join(str(cause).split())


def one_of(what: str, given: str, known: Iterable[str]) -> None:
    """Raise ValueError, with the nearest name, unless ``given`` is known."""
    known = list(known)
    if given not in known:
        near = difflib.get_close_matches(given, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown {what} {given!r}{hint} Known: {', '.join(known)}.")
