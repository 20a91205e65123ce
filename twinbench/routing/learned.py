"""The learned router: trained once and asked once per split; all runs with the same settings share the result."""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from twinbench.merging.merged import Merged, stored_bytes
from twinbench.merging.method import Method
from twinbench.routing.attach import attach
from twinbench.routing.base_states import base_states
from twinbench.routing.features import characters, encodings, hidden_states, read_names
from twinbench.routing.of_experts import blocks_before, entropies, residuals
from twinbench.routing.recipe import ENTROPIES, RESIDUALS, Recipe
from twinbench.routing.router import Router, grouped
from twinbench.system.mistakes import Mistake
from twinbench.weights.parts import kind
from twinbench.workbench import Workbench, merged

ROUTER_TRAIN = 0.8  # of each task's validation rows train a router of no others; the rest chooses its epoch


@dataclass(frozen=True)
class Setting:
    """What a forward pass depends on beside the suite.

    Attributes:
        method: what is merged.
        route: the route that protocol and router leave to the method: None (no exclusive parts), "task" (one-hot at
            the known task), "router", "top1" (one-hot at the router's choice) or "layer".
        router, seed: of the learned router; None where none is asked.
        gold_biases: biases are the known task's own and not merged.
    """

    method: Method
    route: str | None
    router: Recipe | None = None
    seed: int | None = None
    gold_biases: bool = False


def learned(bench: Workbench, setting: Setting) -> tuple[Router, float]:
    """The router, and the seconds that it took to read its training rows and to train it.

    How its weights are used is no part of its training. What its mistakes cost is measured beside it.
    """
    recipe = setting.router
    key = "router", _read(setting), recipe.features, recipe.model, setting.seed
    model, seconds = bench.remember(key, lambda: _fitted(bench, setting))
    costs = None
    if recipe.use.minimum_risk:
        costs, took = bench.remember("costs", lambda: bench.suite.workload.costs(bench))
        costs, seconds = costs.to(bench.module.device), seconds + took
    return Router(model, recipe.use, costs).eval(), seconds


def router_bytes(bench: Workbench, setting: Setting, router: Router, shared: Mapping[str, Tensor]) -> int:
    """Size of the file that holds a router and what it reads beside the stored shared part.

    Where it reads the base, these are the base's embeddings and the layers that it goes through, as far as the shared
    part has other weights there; where it reads the shared model, the base's biases if that has none. LoRA factors are
    stored beside the base, which is whole then.

    Args:
        shared: the shared part of the merge.
    """
    reads, suite, beside = setting.router.features, bench.suite, {}
    if reads.source == ENTROPIES:
        return stored_bytes(router.stored()) + _whole_experts(bench, setting, shared)
    if reads.source and not suite.factored:
        read = read_names(bench.module, _layers_read(bench, setting))
        for name in (name for name in suite.base if name in read):
            stored = name in shared and (reads.source == "shared" or torch.equal(shared[name], suite.base[name]))
            beside |= {} if stored else {f"base.{name}": suite.base[name]}
    return stored_bytes(router.stored() | beside)


def _layers_read(bench: Workbench, setting: Setting) -> int | None:
    """How many of the base's layers the router's features go through; None is all."""
    reads = setting.router.features
    return blocks_before(bench.module, reads.layer) if reads.source == RESIDUALS else reads.layer


def _whole_experts(bench: Workbench, setting: Setting, shared: Mapping[str, Tensor]) -> int:
    """Bytes of what whole experts have beyond a merge: of all tensors but those that a dense part gives back."""
    size = 0
    for expert, parts in _made(bench, setting).exclusive.items():
        lacking = {}
        for name, tensor in bench.suite.experts[expert].items():
            part = parts.get(name)
            same = name in shared and torch.equal(tensor, shared[name])
            lacking |= {} if (same if part is None else kind(part) == "dense") else {name: tensor}
        size += stored_bytes(lacking) if lacking else 0
    return size


def applied(bench: Workbench, setting: Setting, task: str, split: str) -> Tensor | None:
    """The weights w(x) of a task's rows in a split, (n, experts); None where no sample has weights of its own."""
    if setting.route in (None, "layer"):
        return None
    if setting.route == "task":
        hot = torch.zeros(len(bench.suite.tasks[task].splits[split]), len(bench.suite.experts))
        hot[:, list(bench.suite.experts).index(task)] = 1.0
        return hot
    found, _ = weights(bench, setting, task, split)
    if setting.route == "top1":
        return torch.zeros_like(found).scatter_(1, found.argmax(1, keepdim=True), 1.0)
    return found


def weights(bench: Workbench, setting: Setting, task: str, split: str) -> tuple[Tensor, float]:
    """The router's weights (n, experts) for a task's rows in a split, and the seconds that they took."""
    key = "weights", _read(setting), setting.router, setting.seed, task, split
    return bench.remember(key, lambda: _weighed(bench, setting, task, split))


def _read(setting: Setting) -> tuple[Method | None, bool]:
    """What the router's features depend on: the merge that is read and whose biases it has, or neither."""
    if setting.router.features.source == "shared":
        return setting.method.shared or setting.method, setting.gold_biases
    if setting.router.features.source == RESIDUALS:
        return setting.method, setting.gold_biases
    return None, False


def _fitted(bench: Workbench, setting: Setting):
    if hasattr(setting.router.model, "ready"):
        return setting.router.model.ready(), 0.0
    device, seconds = bench.module.device, 0.0
    train, held_out = ([], []), ([], [])
    for position, task in enumerate(bench.suite.experts):
        *examples, took = _examples(bench, setting, task)
        seconds += took
        for (inputs, experts), rows in zip((train, held_out), examples, strict=True):
            inputs.append(rows.to(device))
            experts.append(torch.full((len(rows),), position, device=device))
    start = time.perf_counter()
    model = setting.router.model.fit(*((torch.cat(f), torch.cat(e)) for f, e in (train, held_out)), setting.seed)
    return model, seconds + time.perf_counter() - start


def _examples(bench: Workbench, setting: Setting, task: str) -> tuple[Tensor, Tensor, float]:
    """Features of a task's rows that train the router, of those that choose, at least one of each, and the seconds.

    Raises:
        ValueError: there is one held-out row, which cannot do both.
    """
    held_out, seconds = _features(bench, setting, task, "validation")
    if setting.router.features.rows is not None:
        train, more = _features(bench, setting, task, "train", setting.router.features.rows)
        return train, held_out, seconds + more
    if len(held_out) < 2:
        raise Mistake(
            f"router: task {task} has {len(held_out)} held-out row, which cannot both train it and choose its epoch; "
            f"raise suite.tasks.{task}.rows.validation to at least 2, or set router.features.rows"
        )
    count = int(ROUTER_TRAIN * len(held_out))
    return held_out[:count], held_out[count:], seconds


def _weighed(bench: Workbench, setting: Setting, task: str, split: str) -> tuple[Tensor, float]:
    router, _ = learned(bench, setting)
    rows, before = _features(bench, setting, task, split)
    start = time.perf_counter()
    rows = rows.to(bench.module.device)
    found, groups = router(rows).cpu(), setting.router.use.groups
    if groups is not None:
        found = grouped(found, router.logits(rows).cpu(), groups, setting.seed)
    return found, before + time.perf_counter() - start


def _features(
    bench: Workbench, setting: Setting, task: str, split: str, rows: int | None = None
) -> tuple[Tensor, float]:
    """What the router reads of the first rows of a split, and the seconds that it took."""
    reads, parts, seconds = setting.router.features, [], 0.0
    if reads.source in (RESIDUALS, ENTROPIES):
        key = reads.source, _read(setting), reads.layer, task, split, rows
        said, seconds = bench.remember(key, lambda: _said(bench, setting, task, split, rows))
        parts.append(said)
    elif reads.source:
        key = "hidden states", _read(setting), reads.layer, reads.pool, task, split, rows
        hidden, seconds = bench.remember(key, lambda: _hidden_states(bench, setting, task, split, rows))
        parts.append(hidden)
    if reads.characters:
        start, spec = time.perf_counter(), bench.suite.tasks[task]
        key = "characters", reads.characters, task, split, rows
        parts.append(bench.remember(key, lambda: characters(spec, split, reads.characters, rows)))
        seconds += time.perf_counter() - start
    return torch.cat(parts, 1), seconds


def _said(bench: Workbench, setting: Setting, task: str, split: str, rows: int | None) -> tuple[Tensor, float]:
    """What the experts say of rows, and the seconds that it took."""
    reads = setting.router.features
    exclusive = _made(bench, setting).exclusive if reads.source == RESIDUALS else {}
    encodings(bench, task, split)  # to tokenize is no part of it
    start = time.perf_counter()
    if reads.source == RESIDUALS:
        found = residuals(bench, exclusive, task, split, layer=reads.layer, rows=rows)
    else:
        found = entropies(bench, task, split, rows=rows)
    return found, time.perf_counter() - start


def _made(bench: Workbench, setting: Setting) -> Merged:
    return merged(bench, setting.method, setting.gold_biases)[0]


def _hidden_states(bench: Workbench, setting: Setting, task: str, split: str, rows: int | None) -> tuple[Tensor, float]:
    """Hidden states under the shared expert or the base, and the seconds of the pass.

    Before routing the task is not known, so where biases are the known task's own these are the base's.
    """
    (source, gold_biases), suite, reads = _read(setting), bench.suite, setting.router.features
    made = merged(bench, source, gold_biases)[0] if source else Merged({})
    # To tokenize is no part of the pass, and runs share it.
    encodings(bench, task, split, content=reads.pool == "content")

    def passed() -> tuple[Tensor, float]:
        beside = attach(bench.module, Merged({}, always=made.always)) if made.always else nullcontext()
        start = time.perf_counter()
        # Factors run beside the base, which the module holds and keeps.
        with bench.holding(None if suite.factored else dict(suite.base.items()) | dict(made.shared)), beside as routes:
            if routes:
                routes.weights = torch.ones(1, 0)
            found = hidden_states(bench, task, split, layer=reads.layer, pool=reads.pool, rows=rows)
        return found, time.perf_counter() - start

    if source is None and split == "train":  # held-out rows may be scored, and a pass over scored rows is timed
        return base_states(bench, reads, task, split, rows, passed)
    return passed()
