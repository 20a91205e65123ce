"""The learned router of a configuration: trained once, asked once per split, for all runs that it is the same for."""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from twinbench.merging.merged import Merged, stored_bytes
from twinbench.merging.method import Method, merge
from twinbench.routing.attach import attach
from twinbench.routing.features import characters, encoded, features, read_names
from twinbench.routing.router import Mlp, Router, fit, grouped, minimizing
from twinbench.suite import Suite, backbone, load
from twinbench.system.mistakes import Mistake
from twinbench.workloads.classification.costs import costs

ROUTER_TRAIN = 0.8  # of each task's validation rows train a router of no others; the rest chooses its epoch


@dataclass(frozen=True)
class Setting:
    """What a forward pass depends on beside the suite and the method.

    Attributes:
        gold_biases: biases are the known task's own and not merged (protocol ``paper``).
        router, seed: of the learned router; None where none is asked.
        device, batch_size: where models run, and in what portions.
    """

    gold_biases: bool
    router: Mlp | None
    seed: int | None
    device: str
    batch_size: int


def learned(suite: Suite, shared: Method, setting: Setting) -> tuple[Router, float]:
    """The router, and the seconds that it took to read its training rows and to train it.

    Settings that only change how its weights are used are no part of its training; what its mistakes cost is measured
    beside it.
    """
    source, setting = _read(shared, setting)
    plain = replace(setting.router, groups=None, tolerance=0.0, minimum_risk=False)
    router, seconds = _trained(suite, source, replace(setting, router=plain))
    if setting.router.minimum_risk:
        found, took = costs(suite, setting.device, setting.batch_size)
        router, seconds = minimizing(router, found), seconds + took
    return router, seconds


def router_bytes(suite: Suite, router: Router, shared: Mapping[str, Tensor], setting: Setting) -> int:
    """Size of the file that holds a router and what it reads beside the stored shared part.

    Where it reads the base, these are the base's embeddings and the layers that it goes through, as far as the shared
    part has other weights there; where it reads the shared model, the base's biases if that has none. LoRA factors are
    stored beside the base, which is whole then.

    Args:
        shared: the shared part of the merge.
    """
    recipe, beside = setting.router, {}
    if recipe.source and not suite.factored:
        read = read_names(backbone(suite, setting.device), recipe.layer)
        for name in (name for name in suite.base if name in read):
            stored = name in shared and (recipe.source == "shared" or torch.equal(shared[name], suite.base[name]))
            beside |= {} if stored else {f"base.{name}": suite.base[name]}
    return stored_bytes(router.state_dict() | beside)


def _read(shared: Method, setting: Setting) -> tuple[Method | None, Setting]:
    """What the router's features depend on: the shared expert and whose biases it has, or neither."""
    return (shared, setting) if setting.router.source == "shared" else (None, replace(setting, gold_biases=False))


@lru_cache(maxsize=8)
def _trained(suite: Suite, source: Method | None, setting: Setting) -> tuple[Router, float]:
    device, seconds = backbone(suite, setting.device).device, 0.0
    train, held_out = ([], []), ([], [])
    for position, task in enumerate(suite.experts):
        *examples, took = _examples(suite, source, setting, task)
        seconds += took
        for (inputs, experts), rows in zip((train, held_out), examples, strict=True):
            inputs.append(rows.to(device))
            experts.append(torch.full((len(rows),), position, device=device))
    start = time.perf_counter()
    router = fit(setting.router, *((torch.cat(f), torch.cat(e)) for f, e in (train, held_out)), setting.seed)
    return router, seconds + time.perf_counter() - start


def _examples(suite: Suite, source: Method | None, setting: Setting, task: str) -> tuple[Tensor, Tensor, float]:
    """Features of a task's rows that train the router, and of those that choose its epoch: at least one of each.

    And the seconds that they took.

    Raises:
        ValueError: there is one held-out row, which cannot do both.
    """
    held_out, seconds = _features(suite, source, setting, task, "validation")
    if setting.router.rows is not None:
        train, more = _features(suite, source, setting, task, "train", setting.router.rows)
        return train, held_out, seconds + more
    if len(held_out) < 2:
        raise Mistake(
            f"router: task {task} has {len(held_out)} held-out row, which cannot both train it and choose its epoch; "
            f"raise suite.tasks.{task}.rows.validation to at least 2, or set router.rows"
        )
    count = int(ROUTER_TRAIN * len(held_out))
    return held_out[:count], held_out[count:], seconds


def applied(suite: Suite, method: Method, route: str | None, setting: Setting, task: str, split: str) -> Tensor | None:
    """The weights w(x) of a task's rows in a split, (n, experts), or None for a static method.

    Args:
        route: as `Method.route`, after the protocol had its say; "top1" is one-hot at the router's choice.
    """
    if route is None:
        return None
    if route == "task":
        hot = torch.zeros(len(suite.tasks[task].splits[split]), len(suite.experts))
        hot[:, list(suite.experts).index(task)] = 1.0
        return hot
    found, _ = weights(suite, method.shared or method, setting, task, split)
    if route == "top1":
        return torch.zeros_like(found).scatter_(1, found.argmax(1, keepdim=True), 1.0)
    return found


def weights(suite: Suite, shared: Method, setting: Setting, task: str, split: str) -> tuple[Tensor, float]:
    """The router's weights (n, experts) for a task's rows in a split, and the seconds that they took."""
    return _weighed(suite, *_read(shared, setting), task, split)


@lru_cache(maxsize=128)
def _weighed(suite: Suite, source: Method | None, setting: Setting, task: str, split: str) -> tuple[Tensor, float]:
    router, *_ = learned(suite, source, setting)
    rows, before = _features(suite, source, setting, task, split)
    start = time.perf_counter()
    rows = rows.to(backbone(suite, setting.device).device)
    found = router(rows).cpu()
    if setting.router.groups is not None:
        found = grouped(found, router.logits(rows).cpu(), setting.router.groups, setting.seed)
    return found, before + time.perf_counter() - start


def _features(
    suite: Suite, source: Method | None, setting: Setting, task: str, split: str, rows: int | None = None
) -> tuple[Tensor, float]:
    """What the router reads of the first rows of a split, and the seconds that it took.

    Args:
        source: of the model whose hidden states it reads; None is the base.
    """
    recipe, parts, seconds = setting.router, [], 0.0
    if recipe.source:
        where = (setting.gold_biases, setting.device, setting.batch_size)
        hidden, seconds = _extracted(suite, source, *where, recipe.layer, recipe.pool, task, split, rows)
        parts.append(hidden)
    if recipe.characters:
        start = time.perf_counter()
        parts.append(characters(suite, task, split, recipe.characters, rows))
        seconds += time.perf_counter() - start
    return torch.cat(parts, 1), seconds


@lru_cache(maxsize=256)
def _extracted(
    suite: Suite,
    source: Method | None,
    gold_biases: bool,
    device: str,
    batch_size: int,
    layer: int | None,
    pool: str,
    task: str,
    split: str,
    rows: int | None,
) -> tuple[Tensor, float]:
    """Features under the model that ``source`` makes, or the base.

    Before routing the task is not known, so where biases are the known task's own these are the base's.
    """
    module = backbone(suite, device)
    made = merge(suite, source, gold_biases)[0] if source else Merged({})
    merged = made.exclusive if suite.factored else made.shared
    read = partial(features, module, suite, task, split, layer=layer, pool=pool, rows=rows, batch_size=batch_size)
    encoded(suite, task, split)
    start = time.perf_counter()
    if suite.factored:  # the module holds the base and stays as it is
        with attach(module, merged) if source else nullcontext() as routes:
            if source:
                routes.weights = torch.ones(1, len(merged))
            found = read()
    else:
        load(module, dict(suite.base.items()) | merged)
        found = read()
    return found, time.perf_counter() - start
