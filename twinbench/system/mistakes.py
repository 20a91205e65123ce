"""Errors that are the user's own to mend: they are told in one line, without a traceback."""

import difflib
import re
from collections.abc import Iterable

from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

MISTAKES = (ValueError, OSError, OmegaConfBaseException, HydraException)
NAME = re.compile(r"\w[\w.-]*")  # of what becomes the name of a file or folder


def one_line(error: BaseException) -> str:
    """An error's own words; those of Hydra and OmegaConf, which go over many lines, with what is legal instead."""
    cause = error.__cause__
    if isinstance(error, InstantiationException) and cause:  # it wraps what a constructor raised
        return one_line(cause)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return unknown(group or "config", name, error.options or ())
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override!r} cannot be read: arguments are KEY=VALUE, and a VALUE with signs, blanks or letters "
            "beyond a to z goes into two pairs of quotes, \"KEY='VALUE'\""
        )
    if isinstance(error, HydraException) and isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return _unknown_key(cause)
    if isinstance(error, HydraException) and str(error).startswith("Ambiguous value for argument "):
        given = str(error).splitlines()[0].removeprefix("Ambiguous value for argument ")
        return (
            f"{given} has several values: KEY=[A,B] is a list, KEY='{{a: A, b: B}}' gives them names, "
            "\"KEY='A,B'\" is one text, and in run.py -m sweeps over them"
        )
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is missing; give {error.full_key}=VALUE"
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {str(error).splitlines()[0]}"
    return " ".join(str(error).split())


def one_of(what: str, given: str, known: Iterable[str]) -> None:
    """Raise ValueError, with the nearest name, unless ``given`` is known."""
    known = list(known)
    if given not in known:
        raise ValueError(unknown(what, given, known))


def check_name(what: str, name: object) -> None:
    """Raise ValueError unless a name can be that of a file or folder inside another one."""
    if name is None or not NAME.fullmatch(str(name)):
        wanted = "letters, digits, _, - and ., the first no - or ."
        raise ValueError(f"{what} {name!r} is no name: files are called by it, so it is of {wanted}")


def unknown(what: str, given: str, known: Iterable[str], otherwise: str = "") -> str:
    """Say that there is no such name, and which is nearest; ``otherwise`` is said where none is near."""
    known = list(known)
    near = difflib.get_close_matches(str(given), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"{otherwise}."
    return f"unknown {what} {given!r}{hint} Known: {', '.join(known)}."


def _unknown_key(error: ConfigAttributeError | ConfigKeyError) -> str:
    """What there is beside a key that was set and is not there."""
    above = error.full_key.rpartition(".")[0]
    beside = error.parent_node if error.parent_node is not None else {}
    known = [str(key) for key in beside if key != "hydra" and not str(key).startswith("_")]
    what = f"key of {above}" if above else "key"
    return unknown(what, error.full_key.rpartition(".")[2], known, f"; +{error.full_key}=VALUE adds it")
