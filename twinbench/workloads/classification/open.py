"""Opening a suite of classifiers: the encoder is merged, and each task keeps its head."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from twinbench.suite import Suite, Task, Workload
from twinbench.system.mistakes import Mistake
from twinbench.weights.expert import bare, check_vocabulary, encoder, in_pooler, open_expert
from twinbench.weights.pretrained import new_model, open_pretrained
from twinbench.weights.state_dict import Layout, StateDict, check_finite, check_same_layout, layout, read_checkpoint
from twinbench.workloads.classification.class_order import class_order
from twinbench.workloads.classification.probe import Pooled


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return open_pretrained(AutoTokenizer, folder)


def open_suite(
    base_folder: Path,
    experts: Mapping[str, Path],
    tasks: Mapping[str, Task],
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping,
    kind: Workload,
) -> Suite:
    """Open the checkpoints and check that they fit each other and their tasks.

    Args:
        experts: per task with an expert of its own, the Hugging Face folder of its fine-tuned sequence classifier, or
            of a PEFT LoRA adapter that makes one of the base and has the head among its ``modules_to_save``.
        settings: the suite's ``name``; ``merged``, the tasks whose experts are merged, of the others the heads alone
            are used; and ``head``, the layer that heads begin with: "pooler", or "classifier", which merges the pooler
            as a part of the encoder. Only then the base needs one.
        kind: this kind of model, which the suite hands on.

    Raises:
        ValueError: names, shapes, dtypes, vocabularies or numbers of classes differ, or weights are not finite.
    """
    skeleton = _skeleton(base_folder, 1)
    prefix, names = skeleton.base_model_prefix + ".", list(skeleton.base_model.state_dict())
    own = [name for name in names if settings["head"] == "classifier" or not in_pooler(name)]
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
        if task in settings["merged"]:
            weights[task] = opened
        head_of = _head(state, entries, _skeleton(base_folder, outputs(tasks[task])), reference, who, tasks[task])
        heads[task] = _in_order(head_of, base_folder, folder, who, tasks[task])
        check_finite(heads[task], f"{who}, head")
        check_vocabulary(base_folder, folder, who)
    for task, spec in tasks.items():
        if spec.head is not None:
            heads[task] = _lent(heads[spec.head], tasks[spec.head], spec)
    return Suite(settings["name"], base_folder, base, weights, heads, tasks, tokenizer, kind)


def module(suite: Suite, device: str) -> nn.Module:
    """The bare model that merged state dicts are put into."""
    return _classifier(suite.base_folder, 1).base_model.eval().to(device)


def classifier(suite: Suite, task: str, module: nn.Module) -> nn.Module:
    """The task's sequence classifier: its expert's head on the given backbone, which it shares and does not copy.

    Of a probed task it is the backbone, whose features stand in the place of logits.
    """
    if suite.tasks[task].probe:
        return Pooled(module)
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
