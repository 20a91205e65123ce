"""What the runs of a sweep share: one module, and what was computed with it, bounded in bytes.

A sweep's jobs differ in little: they ask for the same merges, routers, features and forward passes. Each of these is
remembered under all that it depends on, so a shared number is the number.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from twinbench.merging.merged import Merged, for_every_input, materialize
from twinbench.merging.method import Method, factored
from twinbench.suite import Suite
from twinbench.weights.state_dict import StateDict, listed

T = TypeVar("T")


class Workbench:
    """A suite, where it runs, the one module that it runs in, and what was computed so far.

    Attributes:
        suite: what is merged and scored.
        device, batch_size: where models run, and in what portions.
        precision: of the module's forward passes: "float32", or "bfloat16" by autocast. Its weights stay as they are,
            and its outputs are float32, as is all that stands on top of it, such as a head.
        limit: bytes of remembered values. Those used longest ago go first; the newest stays, however large.
    """

    def __init__(self, suite: Suite, device: str, batch_size: int, limit: int, precision: str):
        self.suite, self.device, self.batch_size, self.limit = suite, device, batch_size, limit
        self.precision = precision
        self._values: OrderedDict[Hashable, tuple[object, int]] = OrderedDict()
        self._held = False

    @cached_property
    def module(self) -> nn.Module:
        """The module that every merged state dict is put into; it holds the base until then."""
        with torch.inference_mode(False):  # its weights are overwritten later, whoever asks for it first
            module = self.suite.workload.module(self.suite, self.device)
        return module if self.precision == "float32" else autocast(module, getattr(torch, self.precision))

    @contextmanager
    def holding(self, state: Mapping[str, Tensor] | None) -> Iterator[nn.Module]:
        """Let the module hold a state dict while the context lasts; None leaves in it what it holds.

        A tied weight is in the state under one of its names. What the state does not have (a head) stays as it is.

        Raises:
            RuntimeError: names or shapes differ; or another state is being held, which this one would overwrite.
        """
        if self._held:
            raise RuntimeError("the module holds one state at a time: ask the router before a forward pass begins")
        self._held = True
        try:
            if state is not None:
                self._load(state)
            yield self.module
        finally:
            self._held = False

    @contextmanager
    def answering(self, state: Mapping[str, Tensor] | None) -> Iterator[nn.Module]:
        """As `holding`, for passes that change no weight and need no gradient: autocast casts each weight once.

        PyTorch keeps what it has cast while an autocast context is open, here one that is off. In inference mode, or
        without a context around the passes, each pass casts all weights again.
        """
        with self.holding(state) as module, torch.autocast(torch.device(self.device).type, enabled=False):
            yield module

    def _load(self, state: Mapping[str, Tensor]) -> None:
        missing, unexpected = self.module.load_state_dict(state, strict=False)
        tied = getattr(self.module, "all_tied_weights_keys", {})
        missing = [name for name in missing if name not in tied and name in self.suite.base]
        if missing or unexpected:
            kind = type(self.module).__name__
            raise RuntimeError(f"{kind} lacks {listed(missing)} or has no {listed(unexpected)}")

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of ``make()``, computed now or at an earlier call with the same key."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key][0]
        value = make()
        self._values[key] = value, held_bytes(value, set())
        while self.remembered_bytes() > self.limit and len(self._values) > 1:
            self._values.popitem(last=False)
        return value

    def remembered_bytes(self) -> int:
        """Bytes of all remembered values; a tensor in two of them counts twice."""
        return sum(size for _, size in self._values.values())


def autocast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Let each call of a model compute in another dtype, and give float32.

    The head of a language model stays outside: rounded to bfloat16, several tokens would often have the same logit.
    Hooks, since whatever is put in place of its forward (`routing.attach`) is to run inside, too.
    """
    entered = []

    def enter(module: nn.Module, _) -> None:
        context = torch.autocast(next(module.parameters()).device.type, dtype=dtype)
        context.__enter__()
        entered.append(context)

    def leave(module: nn.Module, _, output):
        entered.pop().__exit__(None, None, None)
        return single(output)

    body = getattr(module, "base_model", module)
    body.register_forward_pre_hook(enter)
    body.register_forward_hook(leave, always_call=True)
    return module


def single(output):
    """The same nested output with its tensors of floats in float32."""
    if isinstance(output, Tensor):
        return output.float() if output.is_floating_point() else output
    if isinstance(output, dict):  # transformers' outputs are such
        for key, value in output.items():
            output[key] = single(value)
        return output
    return type(output)(map(single, output)) if isinstance(output, list | tuple) else output


def held_bytes(value: object, seen: set[int]) -> int:
    """Memory of the tensors, arrays, frames and texts in a value; a tensor that is there twice counts once."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        new = storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        return storage.nbytes() if new else 0
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, pd.DataFrame):
        return int(value.memory_usage(deep=True).sum())
    if isinstance(value, nn.Module):
        return sum(held_bytes(tensor, seen) for tensor in value.state_dict().values())
    if isinstance(value, str):
        return len(value)
    if isinstance(value, StateDict):
        return 0  # read on access
    if isinstance(value, Mapping):
        return sum(held_bytes(item, seen) for item in value.values())
    if isinstance(value, list | tuple):
        if value and all(type(item) is int for item in value):
            return 8 * len(value)
        return sum(held_bytes(item, seen) for item in value)
    if is_dataclass(value):
        return sum(held_bytes(getattr(value, each.name), seen) for each in fields(value))
    return 8


def merged(bench: Workbench, method: Method, gold_biases: bool) -> tuple[Merged, float]:
    """The merge in memory, and its seconds, those of its shared expert included.

    Args:
        gold_biases: biases stay each task's own, so they are not merged.
    """
    return bench.remember(("merge", method, gold_biases), lambda: _merged(bench, method, gold_biases))


def _merged(bench: Workbench, method: Method, gold_biases: bool) -> tuple[Merged, float]:
    suite, before = bench.suite, 0.0
    names = [name for name in suite.base if not (gold_biases and "bias" in name)]
    base, *experts = (StateDict(names, state.__getitem__) for state in (suite.base, *suite.experts.values()))
    experts = dict(zip(suite.experts, experts, strict=True))
    if suite.factored:
        start = time.perf_counter()
        return factored(method, suite.base, suite.experts), time.perf_counter() - start
    given = {}
    if method.shared:
        shared, before = merged(bench, method.shared, gold_biases)
        given["shared"] = for_every_input(shared)
    start = time.perf_counter()
    made = materialize(method.merge(base, experts, **given), progress=f"merging {method.name}")
    return made, before + time.perf_counter() - start
