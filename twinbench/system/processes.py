"""Several processes of one run, as `torchrun` or `accelerate launch` starts them: lm-eval's data parallelism.

All of them do the same, but of a split's rows each runs only its share; the first one alone writes and speaks. Without
a launcher there is one process, and nothing here costs anything.
"""

import os
from datetime import timedelta
from functools import cache
from typing import TypeVar

T = TypeVar("T")
PATIENCE = timedelta(weeks=1)  # the others wait for a slow one


def rank() -> int:
    """This process's number; 0 is the first one."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@cache
def accelerator():
    """The group of the processes, which this one joins."""
    import torch  # seconds that one process need not pay
    from accelerate import Accelerator, InitProcessGroupKwargs

    return Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])


def gathered(values: list[T]) -> list[T]:
    """The values of all processes, in their order."""
    if count() == 1:
        return values
    from accelerate.utils import gather_object

    accelerator()
    return gather_object(values)


def of_first(value: T) -> T:
    """The first process's value, in every one."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    accelerator()
    return broadcast_object_list([value])[0]
