"""Errors as one line, for those that the user can mend."""

from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from twinbench.system.mistakes import Mistake, unknown

MISTAKES = (Mistake, OSError, OmegaConfBaseException, HydraException)


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


def _unknown_key(error: ConfigAttributeError | ConfigKeyError) -> str:
    """What there is beside a key that was set and is not there."""
    above = error.full_key.rpartition(".")[0]
    beside = error.parent_node if error.parent_node is not None else {}
    known = [str(key) for key in beside if key != "hydra" and not str(key).startswith("_")]
    what = f"key of {above}" if above else "key"
    return unknown(what, error.full_key.rpartition(".")[2], known, f"; +{error.full_key}=VALUE adds it")
