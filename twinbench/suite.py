"""A suite: one base, its experts and their tasks, opened and checked; nothing is copied into memory yet."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from twinbench.system.mistakes import Mistake
from twinbench.weights.expert import bare, check_vocabulary, encoder, in_pooler, is_adapter, open_expert
from twinbench.weights.lora import read_factors
from twinbench.weights.pretrained import new_model, open_pretrained
from twinbench.weights.state_dict import (
    Layout,
    StateDict,
    check_finite,
    check_same_layout,
    layout,
    listed,
    read_checkpoint,
)
from twinbench.workloads.classification.class_order import class_order
from twinbench.workloads.classification.data import Task


@dataclass(frozen=True, eq=False)
class Suite:
    """Attributes:
    base: the encoder's weights, under the names they have in the architecture's bare model; of a causal language model
        all weights, under its own names.
    experts: what is merged: per task, in the order of ``tasks``, its expert's encoder under the same names. The other
        tasks are unseen: they are only scored.
    heads: per task, the rest of its expert, which maps hidden states to the task's classes (or one value): the
        classifier, and the pooler where there is one. A task without an expert borrows the head of the task that its
        ``head`` names. A causal language model has none.
    factored: experts are LoRA adapters that stay factors (`twinbench.merging.factored`).
    dtype, device_map: of the module of a causal language model; "auto" spreads its layers over all GPUs.
    adapter_bytes: what the experts take on disk where all of them are LoRA adapters.
    """

    name: str
    base_folder: Path
    base: StateDict
    experts: Mapping[str, StateDict]
    heads: Mapping[str, StateDict]
    tasks: Mapping[str, Task]
    tokenizer: PreTrainedTokenizerBase
    causal: bool = False
    factored: bool = False
    dtype: str = "float32"
    device_map: str | None = None
    adapter_bytes: int | None = None


def open_suite(
    name: str,
    base_folder: Path,
    experts: Mapping[str, Path],
    tasks: Mapping[str, Task],
    merged: Collection[str] | None = None,
    *,
    head: str,
) -> Suite:
    """Open the checkpoints and check that they fit each other and their tasks.

    Args:
        experts: per task with an expert of its own, the Hugging Face folder of its fine-tuned sequence classifier, or
            of a PEFT LoRA adapter that makes one of the base and has the head among its ``modules_to_save``.
        merged: tasks whose experts are merged; None is all that have one. Of the others the heads alone are used.
        head: the layer that heads begin with: "pooler", or "classifier", which merges the pooler as a part of the
            encoder. Only then the base needs one.

    Raises:
        ValueError: names, shapes, dtypes, vocabularies or numbers of classes differ, or weights are not finite.
    """
    skeleton = _skeleton(base_folder, 1)
    prefix, names = skeleton.base_model_prefix + ".", list(skeleton.base_model.state_dict())
    own = [name for name in names if head == "classifier" or not in_pooler(name)]
    found = read_checkpoint(base_folder), layout(base_folder)
    whole, all_entries = bare(*found, prefix, own, f"base ({base_folder})")
    cut = (lambda *bare_model: bare_model) if any(map(in_pooler, own)) else encoder
    base, reference = cut(whole, all_entries)
    check_finite(base, "base")
    weights, heads = {}, {}
    for task, folder in experts.items():
        who = f"expert {task}"
        state, entries = open_expert(folder, whole, all_entries, prefix)
        opened, found = cut(*bare(state, entries, prefix, own, f"{who} ({folder})"))
        check_same_layout(reference, found, who)
        check_finite(opened, who)
        if merged is None or task in merged:
            weights[task] = opened
        head_of = _head(state, entries, _skeleton(base_folder, outputs(tasks[task])), reference, who, tasks[task])
        heads[task] = _in_order(head_of, base_folder, folder, who, tasks[task])
        check_finite(heads[task], f"{who}, head")
        check_vocabulary(base_folder, folder, who)
    for task, spec in tasks.items():
        if spec.head is not None:
            heads[task] = _lent(heads[spec.head], tasks[spec.head], spec)
    tokenizer = open_pretrained(AutoTokenizer, base_folder)
    return Suite(name, base_folder, base, weights, heads, tasks, tokenizer)


def open_causal_suite(
    name: str,
    base_folder: Path,
    experts: Mapping[str, Path],
    tasks: Mapping[str, Task],
    merged: Collection[str] | None = None,
    *,
    factored: bool = False,
    dtype: str = "float32",
    device_map: str | None = None,
    tokenizer_folder: Path | None = None,
) -> Suite:
    """Open a causal language model and its experts, whole checkpoints or LoRA adapters, and check that they fit.

    Args, Raises:
        as `open_suite` and `Suite`; there are no heads. ``tokenizer_folder`` is for a base that comes without a
        tokenizer.
    """
    words = tokenizer_folder or base_folder
    tokenizer = open_tokenizer(words)
    last, known = max(tokenizer.get_vocab().values()), open_pretrained(AutoConfig, base_folder).vocab_size
    if last >= known:
        raise Mistake(f"the tokenizer ({words}) has tokens up to {last}, the base embeddings for {known}")
    base, reference = read_checkpoint(base_folder), layout(base_folder)
    check_finite(base, "base")
    weights = {}
    experts = {task: folder for task, folder in experts.items() if merged is None or task in merged}
    for task, folder in experts.items():
        if factored:
            weights[task] = read_factors(folder, base)
            continue
        state, entries = open_expert(folder, base, reference)
        check_same_layout(reference, entries, f"expert {task}")
        check_finite(state, f"expert {task}")
        check_vocabulary(words, folder, f"expert {task}")
        weights[task] = state
    stored = [folder / "adapter_model.safetensors" for folder in experts.values() if is_adapter(folder)]
    taken = sum(file.stat().st_size for file in stored) if len(stored) == len(experts) else None
    return Suite(name, base_folder, base, weights, {}, tasks, tokenizer, True, factored, dtype, device_map, taken)


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A causal language model's tokenizer; of a prompt that is too long it leaves out the beginning.

    Raises:
        ValueError: there is none, or none without remote code.
    """
    needed = f"{folder}: no tokenizer that can be read without remote code; set suite.tokenizer to the source of one"
    try:
        tokenizer = open_pretrained(AutoTokenizer, folder, truncation_side="left")
    except ValueError as error:
        raise Mistake(f"{needed} ({error})") from error
    if not tokenizer("word", add_special_tokens=False)["input_ids"]:  # a class known by the model, and no vocabulary
        raise Mistake(needed)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


@lru_cache(maxsize=1)
def backbone(suite: Suite, device: str) -> nn.Module:
    """The one module that every merged state dict of a suite is loaded into: a bare model, or a whole causal one."""
    if suite.causal:
        placed = {"device_map": suite.device_map} if suite.device_map else {}
        given = {"dtype": getattr(torch, suite.dtype)} | placed
        model = open_pretrained(AutoModelForCausalLM, suite.base_folder, **given).eval()
        return model if placed else model.to(device)
    return _classifier(suite.base_folder, 1).base_model.eval().to(device)


def load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put a merged state dict into the module that `backbone` gave; a tied weight is there under one of its names.

    The pooler stays as it is where it belongs to the head (`classifier`).

    Raises:
        RuntimeError: names or shapes differ.
    """
    missing, unexpected = module.load_state_dict(state, strict=False)
    tied = getattr(module, "all_tied_weights_keys", {})
    missing = [name for name in missing if name not in tied and not in_pooler(name)]
    if missing or unexpected:
        raise RuntimeError(f"{type(module).__name__} lacks {listed(missing)} or has no {listed(unexpected)}")


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


def _classifier(folder: Path, labels: int) -> nn.Module:
    return new_model(AutoModelForSequenceClassification, folder, num_labels=labels)


def _skeleton(folder: Path, labels: int) -> nn.Module:
    """The architecture without memory for its weights."""
    with torch.device("meta"):
        return _classifier(folder, labels)


def _head(state: StateDict, entries: Layout, skeleton: nn.Module, merged: Layout, who: str, task: Task) -> StateDict:
    """A checkpoint's head: what the task's classifier has beside what is merged.

    A pooler that the checkpoint has and the classifier does not use is left out.
    """
    prefix = skeleton.base_model_prefix + "."

    def above(name: str) -> bool:
        bare_name = name.removeprefix(prefix)
        return bare_name == name or (in_pooler(bare_name) and bare_name not in merged)

    wanted = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items() if above(name)}
    found = {name: shape for name, (_, shape) in entries.items() if above(name)}
    found = {name: shape for name, shape in found.items() if name in wanted or not name.startswith(prefix)}
    if found != wanted:
        raise Mistake(f"{who}: task {task.name} needs the head {wanted}, the checkpoint has {found}")
    return StateDict(found, state.__getitem__)


def _in_order(head: StateDict, base_folder: Path, folder: Path, who: str, task: Task) -> StateDict:
    """A checkpoint's head with its outputs in the order of the task's classes."""
    order = class_order(folder, task.classes, who) if task.classes else None
    if order is None:
        return head
    told = f"{who}: its config.json has the classes in another order; its head is put in the task's"
    print(f"{told}: {', '.join(task.classes)}", flush=True)
    wider = _skeleton(base_folder, len(order) + 1).state_dict()
    last = {name for name in head if head[name].shape != wider[name].shape}  # the layer with an output per class
    return StateDict(head, lambda name: head[name][order] if name in last else head[name])


def _lent(head: StateDict, owner: Task, task: Task) -> StateDict:
    if owner.classes != task.classes:
        raise Mistake(
            f"task {task.name}: the head of {owner.name} gives {owner.classes or 'a value'}, the task has "
            f"{task.classes or 'a value'}; they must be the same in the same order"
        )
    return head
