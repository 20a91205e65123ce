"""Which of a model's repeated blocks a tensor is in, by its name: ``encoder.layer.3.output.dense.weight`` is in 3."""

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|resblocks)\.(\d+)\.")


def block(name: str) -> int | None:
    """The number of the block that a tensor is in; None: it is outside of them, as embeddings are."""
    found = _NUMBER.search(name)
    return int(found.group(1)) if found else None


def count(names: Iterable[str]) -> int:
    """How many blocks there are."""
    return 1 + max((number for name in names if (number := block(name)) is not None), default=-1)
