"""Errors that are the user's own to mend: they are told in one line, without a traceback."""

from hydra.errors import InstantiationException
from omegaconf.errors import OmegaConfBaseException

MISTAKES = (ValueError, OSError, OmegaConfBaseException, InstantiationException)


def one_line(error: BaseException) -> str:
    """An error's own words; Hydra wraps what a constructor raised."""
    cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
    return " ".join(str(cause).split())
