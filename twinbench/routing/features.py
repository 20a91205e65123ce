"""Running a classifier over a split for its logits, and what a router reads: hidden states and characters."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from sklearn.feature_extraction.text import HashingVectorizer
from torch import Tensor, nn
from tqdm import tqdm

from twinbench.routing.attach import Routes
from twinbench.suite import Suite
from twinbench.system import processes
from twinbench.system.mistakes import Mistake
from twinbench.weights.expert import in_pooler
from twinbench.workloads.classification.data import Task


@lru_cache(maxsize=64)
def encoded(suite: Suite, task: str, split: str) -> list[dict[str, list[int]]]:
    """Token ids of every row of a split, truncated to the task's max_length."""
    batch = _encode(suite, task, split, None)
    return [dict(zip(batch.keys(), row, strict=True)) for row in zip(*batch.values(), strict=True)]


@torch.inference_mode()
def forward(
    model: nn.Module,
    suite: Suite,
    task: str,
    split: str,
    rows: list[int] | None = None,
    *,
    batch_size: int,
    routes: Routes | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Run a sequence classifier over rows of a split.

    Args:
        rows: which ones, and in what order the results come; None is all of them.
        routes: of the exclusive parts attached to the model, if there are any.
        weights: (n, experts) router weights of these rows, with ``routes``.

    Returns:
        Logits (n, outputs), float32 on the CPU.
    """
    rows = list(range(len(encoded(suite, task, split)))) if rows is None else rows

    def logits(batch: dict, chosen: list[int]) -> Tensor:
        if routes is not None:
            routes.weights = weights[chosen]
        return model(**batch).logits

    # neighbours with one route share their matrix products
    key = None if routes is None else lambda at: int(weights[at].argmax())
    return _batched(logits, suite, task, split, rows, batch_size, model.device, key)


def predictions(logits: Tensor, spec: Task) -> np.ndarray:
    """Logits (n, outputs) as class numbers, or as values where the task is a regression; (n,), float64."""
    return (logits.argmax(1) if spec.classes else logits[:, 0]).double().numpy()


@torch.inference_mode()
def features(
    module: nn.Module,
    suite: Suite,
    task: str,
    split: str,
    *,
    layer: int | None,
    pool: str,
    rows: int | None,
    batch_size: int,
) -> Tensor:
    """What a router reads of the first ``rows`` rows of a split: a backbone's hidden states, pooled over tokens.

    Args:
        layer: after how many layers, 0 being the embeddings, which is all that is run; None is the last.
        pool: "mean" over a row's tokens, special ones included; "first" or "last" token; or "segments": the means over
            the tokens of its first and of its second text column beside each other, zeros where there is no second.
        rows: None is all of them.

    Returns:
        (n, hidden), or (n, 2 * hidden) for segments; float32 on the CPU.

    Raises:
        ValueError: the backbone has no such layer.
    """
    count = len(encoded(suite, task, split)) if rows is None else min(rows, len(encoded(suite, task, split)))
    columns = _segments(suite, task, split, count) if pool == "segments" else None

    def pooled(batch: dict, chosen: list[int]) -> Tensor:
        hidden, mask = module.base_model(**batch).last_hidden_state.float(), batch["attention_mask"]
        if pool == "first":
            return hidden[torch.arange(len(hidden)), mask.argmax(1)]
        if pool == "last":
            return hidden[torch.arange(len(hidden)), (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)]
        if pool == "mean":
            return _mean(hidden, mask)
        column = torch.full_like(mask, -1)
        column[mask.bool()] = torch.tensor([c for at in chosen for c in columns[at]], device=mask.device)
        return torch.cat([_mean(hidden, column == which) for which in (0, 1)], 1)

    with _first_layers(module, layer):
        return _batched(pooled, suite, task, split, list(range(count)), batch_size, module.device, None)


def read_names(module: nn.Module, layer: int | None) -> set[str]:
    """Names of the module's tensors that `features` of a layer depend on: the embeddings and the layers up to it.

    Raises:
        ValueError: the backbone has no such layer.
    """
    with _first_layers(module, layer):
        read = {id(tensor) for tensor in module.base_model.state_dict(keep_vars=True).values()}
    own = module.state_dict(keep_vars=True).items()
    return {name for name, tensor in own if id(tensor) in read and not in_pooler(name)}


@lru_cache(maxsize=64)
def characters(suite: Suite, task: str, split: str, width: int, rows: int | None) -> Tensor:
    """What a router may read beside hidden states: the raw text of the first ``rows`` rows of a split.

    A tokenizer drops what tells data sets apart, such as blanks before punctuation.

    Returns:
        (n, columns * width) square roots of the counts of character n-grams (n = 1 to 4, case and blanks included) in
        each text column, hashed to ``width`` places and scaled to a mean square of 1, as hidden states have; columns is
        2, zeros where there is no second.
    """
    spec = suite.tasks[task]
    frame = spec.splits[split].iloc[:rows]
    count = HashingVectorizer(
        analyzer="char", ngram_range=(1, 4), n_features=width, lowercase=False, norm="l1", alternate_sign=False
    )
    found = np.zeros((2, len(frame), width), dtype=np.float32)
    for place, column in enumerate(spec.columns):
        found[place] = np.sqrt(width * count.transform(frame[column]).toarray())
    return torch.from_numpy(np.concatenate(found, 1))


def _batched(
    run: Callable[[dict, list[int]], Tensor],
    suite: Suite,
    task: str,
    split: str,
    rows: list[int],
    batch_size: int,
    device: torch.device,
    key: Callable[[int], int] | None,
) -> Tensor:
    """The rows' results of ``run``, which gets a padded batch and its positions in ``rows``, ordered by ``key``."""
    encodings = encoded(suite, task, split)
    order = sorted(range(len(rows)), key=lambda at: len(encodings[rows[at]]["input_ids"]))  # like lengths: less padding
    order, found = order[processes.rank() :: processes.count()], []
    with tqdm(total=len(order), desc=f"{task} {split}", unit="row", leave=False) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            if key is not None:
                chosen.sort(key=key)
            batch = suite.tokenizer.pad([encodings[rows[at]] for at in chosen], return_tensors="pt").to(device)
            found.append((chosen, run(batch, chosen).float().cpu()))
            bar.update(len(chosen))
    found = processes.gathered(found)
    places = torch.tensor([at for chosen, _ in found for at in chosen])
    return torch.cat([results for _, results in found])[places.argsort()]


@contextmanager
def _first_layers(module: nn.Module, count: int | None) -> Iterator[None]:
    """Let a backbone end after so many of its layers."""
    if count is None:
        yield
        return
    depth = module.config.num_hidden_layers
    stacks = [
        (owner, name, child)
        for owner in module.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == depth
    ]
    if not 0 <= count <= depth:
        raise Mistake(f"router.layer must be in [0, {depth}] or null, got {count}")
    if len(stacks) != 1:
        raise Mistake(f"router.layer: {type(module).__name__} has no one list of {depth} layers; use null")
    ((owner, name, layers),) = stacks
    setattr(owner, name, layers[:count])
    try:
        yield
    finally:
        setattr(owner, name, layers)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """(n, tokens, hidden) averaged over the tokens of a mask (n, tokens); zeros where it has none."""
    kept = mask[..., None].float()
    return (hidden * kept).sum(1) / kept.sum(1).clamp(min=1)


def _segments(suite: Suite, task: str, split: str, count: int) -> list[list[int]]:
    """Per row and token the text column that it comes from, 0 or 1, or -1 for a special token."""
    batch = _encode(suite, task, split, count)
    return [[-1 if column is None else column for column in batch.sequence_ids(row)] for row in range(count)]


def _encode(suite: Suite, task: str, split: str, count: int | None):
    spec = suite.tasks[task]
    texts = [spec.splits[split][column].tolist()[:count] for column in spec.columns]
    begun = suite.causal and texts[0][0].startswith(suite.tokenizer.bos_token or "\0")  # by its chat template
    return suite.tokenizer(*texts, truncation=True, max_length=spec.max_length, add_special_tokens=not begun)
