"""What safetensors files say of themselves, read without torch: a plan looks at sizes and names alone."""

import json
from math import prod
from pathlib import Path


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a file. Empty if it is not safetensors; the error is raised when its tensors are read."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length <= file.stat().st_size else {}
        return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def parameters(folder: Path) -> int | None:
    """Number of weights in the safetensors of a checkpoint's folder; None where there are none."""
    return sum(prod(shape) for file in folder.glob("model*.safetensors") for shape in shapes(file).values()) or None
