"""What a router reads of a split's rows: hidden states of the module, pooled over tokens, and characters."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from twinbench.suite import CONTENT, Task
from twinbench.system import processes
from twinbench.system.mistakes import Mistake
from twinbench.weights.expert import in_pooler
from twinbench.workbench import Workbench

Rows = list[int]


def encodings(bench: Workbench, task: str, split: str, *, content: bool = False) -> list[dict[str, list[int]]]:
    """Token ids of every row of a split, truncated to the task's max_length.

    Args:
        content: of what each prompt is about, and not of the prompt.

    Raises:
        ValueError: the task does not say what its prompts are about.
    """

    def encoded() -> list[dict[str, list[int]]]:
        spec = bench.suite.tasks[task]
        if content and CONTENT not in spec.splits[split]:
            raise Mistake(f"router.features.pool=content: task {task} has no prompts that say what they are about")
        spec = replace(spec, columns=(CONTENT,)) if content else spec
        batch = bench.suite.workload.encoded(bench.suite.tokenizer, spec, split, len(spec.splits[split]))
        return [dict(zip(batch.keys(), row, strict=True)) for row in zip(*batch.values(), strict=True)]

    return bench.remember(("encodings", task, split, content), encoded)


@torch.inference_mode()
def hidden_states(
    bench: Workbench, task: str, split: str, *, layer: int | None, pool: str, rows: int | None = None
) -> Tensor:
    """Hidden states of the bench's module for the first ``rows`` rows of a split, pooled over tokens.

    Args:
        layer: after how many layers, 0 being the embeddings, which is all that is run; None is the last.
        pool: "mean" over a row's tokens, special ones included; "first" or "last" token; or "segments": the means over
            the tokens of its first and of its second text column beside each other, zeros where there is no second; or
            "content": the mean over what a prompt is about, alone, so that its task's format tells nothing.
        rows: None is all of them.

    Returns:
        (n, hidden), or (n, 2 * hidden) for segments; float32 on the CPU.

    Raises:
        ValueError: the module has no such layer.
    """
    module, spec = bench.module, bench.suite.tasks[task]
    count = len(spec.splits[split]) if rows is None else min(rows, len(spec.splits[split]))
    columns = _segments(bench, spec, split, count) if pool == "segments" else None

    def pooled(batch: dict, chosen: Rows) -> Tensor:
        hidden, mask = module.base_model(**batch).last_hidden_state.float(), batch["attention_mask"]
        if pool == "first":
            return hidden[torch.arange(len(hidden)), mask.argmax(1)]
        if pool == "last":
            return hidden[torch.arange(len(hidden)), (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)]
        if pool in ("mean", "content"):
            return _mean(hidden, mask)
        column = torch.full_like(mask, -1)
        column[mask.bool()] = torch.tensor([c for at in chosen for c in columns[at]], device=mask.device)
        return torch.cat([_mean(hidden, column == which) for which in (0, 1)], 1)

    with first_layers(module, layer):
        return in_batches(bench, pooled, task, split, list(range(count)), content=pool == "content")


def in_batches(
    bench: Workbench,
    run: Callable[[dict, Rows], Tensor],
    task: str,
    split: str,
    rows: Rows,
    order: Callable[[int], int] | None = None,
    content: bool = False,
) -> Tensor:
    """The results of ``run`` for some rows of a split, in their order, float32 on the CPU.

    Args:
        run: gets a padded batch and its positions in ``rows``.
        order: of the positions within a batch.
        content: the rows are what prompts are about, as in `encodings`.
    """
    found_encodings = encodings(bench, task, split, content=content)
    places = sorted(range(len(rows)), key=lambda at: len(found_encodings[rows[at]]["input_ids"]))  # less padding
    places, found = places[processes.rank() :: processes.count()], []
    with tqdm(total=len(places), desc=f"{task} {split}", unit="row", leave=False) as bar:
        for start in range(0, len(places), bench.batch_size):
            chosen = places[start : start + bench.batch_size]
            if order is not None:
                chosen.sort(key=order)
            batch = bench.suite.tokenizer.pad([found_encodings[rows[at]] for at in chosen], return_tensors="pt")
            found.append((chosen, run(batch.to(bench.module.device), chosen).float().cpu()))
            bar.update(len(chosen))
    found = processes.gathered(found)
    back = torch.tensor([at for chosen, _ in found for at in chosen])
    return torch.cat([results for _, results in found])[back.argsort()]


def read_names(module: nn.Module, layer: int | None) -> set[str]:
    """Names of the module's tensors that hidden states of a layer depend on: the embeddings and the layers up to it.

    Raises:
        ValueError: the module has no such layer.
    """
    with first_layers(module, layer):
        read = {id(tensor) for tensor in module.base_model.state_dict(keep_vars=True).values()}
    own = module.state_dict(keep_vars=True).items()
    return {name for name, tensor in own if id(tensor) in read and not in_pooler(name)}


def characters(spec: Task, split: str, width: int, rows: int | None) -> Tensor:
    """What a router may read beside hidden states: the raw text of the first ``rows`` rows of a split.

    A tokenizer drops what tells data sets apart, such as blanks before punctuation.

    Returns:
        (n, columns * width) square roots of the counts of character n-grams (n = 1 to 4, case and blanks included) in
        each text column, hashed to ``width`` places and scaled to a mean square of 1, as hidden states have; columns is
        2, zeros where there is no second.
    """
    from sklearn.feature_extraction.text import HashingVectorizer  # a second that few runs need to pay

    frame = spec.splits[split].iloc[:rows]
    count = HashingVectorizer(
        analyzer="char", ngram_range=(1, 4), n_features=width, lowercase=False, norm="l1", alternate_sign=False
    )
    found = np.zeros((2, len(frame), width), dtype=np.float32)
    for place, column in enumerate(spec.columns):
        found[place] = np.sqrt(width * count.transform(frame[column]).toarray())
    return torch.from_numpy(np.concatenate(found, 1))


def layers_of(module: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """The list of a model's layers, the module that has it, and its name there.

    Raises:
        ValueError: the model has no such list, or several.
    """
    depth = module.config.num_hidden_layers
    stacks = [
        (owner, name, child)
        for owner in module.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == depth
    ]
    if len(stacks) != 1:
        raise Mistake(f"router.features.layer: {type(module).__name__} has no one list of {depth} layers; use null")
    return stacks[0]


@contextmanager
def first_layers(module: nn.Module, count: int | None) -> Iterator[None]:
    """Let a module end after so many of its layers."""
    if count is None:
        yield
        return
    owner, name, layers = layers_of(module)
    if not 0 <= count <= len(layers):
        raise Mistake(f"router.features.layer must be in [0, {len(layers)}] or null, got {count}")
    setattr(owner, name, layers[:count])
    try:
        yield
    finally:
        setattr(owner, name, layers)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """(n, tokens, hidden) averaged over the tokens of a mask (n, tokens); zeros where it has none."""
    kept = mask[..., None].float()
    return (hidden * kept).sum(1) / kept.sum(1).clamp(min=1)


def _segments(bench: Workbench, spec: Task, split: str, count: int) -> list[list[int]]:
    """Per row and token the text column that it comes from, 0 or 1, or -1 for a special token."""
    batch = bench.suite.workload.encoded(bench.suite.tokenizer, spec, split, count)
    return [[-1 if column is None else column for column in batch.sequence_ids(row)] for row in range(count)]
