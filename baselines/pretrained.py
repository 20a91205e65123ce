"""The base model itself, under each task's head: the lower bound.

``shared = base``; there are no exclusive parts.
"""

from collections.abc import Mapping

from torch import Tensor

from twinbench.merging.merged import Merged

ROLE = "lower bound"  # of a report's rows


def merge(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]]) -> Merged:
    """Return the base."""
    return Merged(base)
