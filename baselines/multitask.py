"""One model trained on all tasks' data together: what merging is measured against where the data are at hand.

The usual upper bound of merging for one model (Zhang and Yang, "A Survey on Multi-Task Learning", arXiv 1707.08114).
``shared`` is the base fine-tuned on the rows of all tasks under the experts' heads, which stay as they are. With
``split: train`` it reads what the experts were trained on; with ``split: validation`` only the rows that were held out
of that, which a learned router reads: the fair rival of a router. Its training time is its merge time.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from twinbench.merging.merged import Merged
from twinbench.weights.state_dict import StateDict


def merge(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    split: str,
    rows: int | None,
    epochs: int,
    lr: float,
    size: int,
    seed: int,
    joint: Callable[..., Mapping[str, Tensor]],
) -> Merged:
    """Train one model on all tasks.

    Args:
        split: "train" or "validation": the experts' training rows, or those held out of them.
        rows: at most so many of each task; None: all.
        epochs, lr: of the training.
        size: rows in a batch.
        joint: from these numbers and the seed, the trained tensors.

    Raises:
        ValueError: a hyperparameter is out of range.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"split must be train or validation, got {split!r}")
    for name, value in (("rows", 1 if rows is None else rows), ("epochs", epochs), ("size", size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 < lr < float("inf"):
        raise ValueError(f"lr must be above 0, got {lr}")
    if not base:
        return Merged(base)
    found = joint(split, rows, epochs, lr, size, seed)
    return Merged(StateDict(base, lambda name: found[name].to(base[name].dtype) if name in found else base[name]))
