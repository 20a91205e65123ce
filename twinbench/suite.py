"""A suite: one base, its experts and their tasks, opened and checked; nothing is copied into memory yet."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from twinbench.state_dict import SHOWN, StateDict, check_finite, check_same_layout, layout, read_checkpoint, renamed
from twinbench.task import Task


@dataclass(frozen=True, eq=False)
class Suite:
    """Attributes:
    base: the backbone's weights, under the names they have in the architecture's bare model.
    experts: per task, in the order of ``tasks``, its expert's backbone under the same names.
    heads: per task, the rest of its expert, which maps the backbone's output to the task's classes (or one value).
    """

    name: str
    base_folder: Path
    base: StateDict
    experts: Mapping[str, StateDict]
    heads: Mapping[str, StateDict]
    tasks: Mapping[str, Task]
    tokenizer: PreTrainedTokenizerBase


def open_suite(name: str, base_folder: Path, experts: Mapping[str, Path], tasks: Mapping[str, Task]) -> Suite:
    """Open the checkpoints and check that they fit each other and their tasks.

    Args:
        experts: per task, the Hugging Face folder of its fine-tuned sequence classifier.

    Raises:
        ValueError: names, shapes, dtypes, vocabularies or numbers of classes differ, or weights are not finite.
    """
    skeleton = _skeleton(base_folder, 1)
    prefix, own = skeleton.base_model_prefix + ".", list(skeleton.base_model.state_dict())
    base, reference = _open_backbone(base_folder, prefix, own, "base")
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    weights, heads = {}, {}
    for task, folder in experts.items():
        who = f"expert {task}"
        weights[task], found = _open_backbone(folder, prefix, own, who)
        check_same_layout(reference, found, who)
        heads[task] = _open_head(folder, prefix, _skeleton(base_folder, outputs(tasks[task])), who, tasks[task])
        _check_vocabulary(tokenizer.get_vocab(), folder, who)
    return Suite(name, base_folder, base, weights, heads, tasks, tokenizer)


@lru_cache(maxsize=1)
def backbone(suite: Suite, device: str) -> nn.Module:
    """The one module that every merged state dict of a suite is loaded into."""
    return AutoModelForSequenceClassification.from_config(_config(suite.base_folder, 1)).base_model.eval().to(device)


def classifier(suite: Suite, task: str, module: nn.Module) -> nn.Module:
    """The task's sequence classifier: its expert's head on the given backbone, which it shares and does not copy."""
    model = _skeleton(suite.base_folder, outputs(suite.tasks[task]))
    setattr(model, model.base_model_prefix, module)
    head = {name: tensor.to(module.device) for name, tensor in suite.heads[task].items()}
    model.load_state_dict(head, strict=False, assign=True)
    return model.eval()


def outputs(task: Task) -> int:
    """Width of the task's head: its number of classes, or 1 for regression."""
    return len(task.classes) if task.classes else 1


def _config(folder: Path, labels: int):
    return AutoConfig.from_pretrained(folder, num_labels=labels)


def _skeleton(folder: Path, labels: int) -> nn.Module:
    """The architecture without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(_config(folder, labels))


def _open_backbone(folder: Path, prefix: str, own: list[str], who: str) -> tuple[StateDict, dict]:
    """The backbone in a folder under the bare model's names, and its layout.

    A bare model has it under these names, a model with a head under prefixed ones.
    """
    found = layout(folder)
    prefixed = {name.removeprefix(prefix): name for name in found if name.startswith(prefix)}
    names = prefixed or {name: name for name in own if name in found}
    names.pop("embeddings.position_ids", None)  # a constant buffer that older checkpoints carry
    missing = [name for name in own if name not in names]
    if missing:
        raise ValueError(f"{who} lacks {', '.join(missing[:SHOWN])} of the architecture in its config.json ({folder})")
    state = renamed(read_checkpoint(folder), names)
    check_finite(state, who)
    return state, {new: found[old] for new, old in names.items()}


def _open_head(folder: Path, prefix: str, skeleton: nn.Module, who: str, task: Task) -> StateDict:
    found = {name: shape for name, (_, shape) in layout(folder).items() if not name.startswith(prefix)}
    wanted = {n: tuple(t.shape) for n, t in skeleton.state_dict().items() if not n.startswith(prefix)}
    if found != wanted:
        raise ValueError(f"{who}: task {task.name} needs the head {wanted}, the checkpoint has {found}")
    return StateDict(found, read_checkpoint(folder).__getitem__)


def _check_vocabulary(vocabulary: Mapping[str, int], folder: Path, who: str) -> None:
    """An expert's folder may come without a tokenizer; one that it has must be the base's."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.txt", "vocab.json")):
        return
    other = AutoTokenizer.from_pretrained(folder).get_vocab()
    differing = [t for t in sorted(vocabulary.keys() | other.keys()) if vocabulary.get(t) != other.get(t)]
    if differing:
        shown = ", ".join(f"{t!r}: {other.get(t)} (base {vocabulary.get(t)})" for t in differing[:SHOWN])
        raise ValueError(f"{who}: its tokenizer differs from the base's in {len(differing)} tokens: {shown}")
