"""A merged model as a folder that others use without twinbench: plain transformers, and PEFT for Twin-Merging.

| path under the folder | what it is |
|---|---|
| ``.`` | the shared model without a head, its tokenizer, and README.md, the model card |
| ``tasks/TASK/`` | the shared model under the task's head: a sequence classifier |
| ``experts/TASK/`` | Twin-Merging: a LoRA adapter of the shared model; ``vectors.safetensors``, what LoRA cannot hold |
| ``router.json``, ``router.safetensors`` | the router's layers and weights, where one is learned |

A task's classifier names two weight files: its head, and the shared model, which is a hard link and takes no space.
The folder appears under its name when everything is in it.
"""

import copy
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from twinbench import benchmark
from twinbench.export import card
from twinbench.export.lora import lora, split
from twinbench.merging.merged import Merged, for_every_input
from twinbench.plan.job import Job
from twinbench.routing.learned import Setting
from twinbench.routing.recipe import Recipe
from twinbench.routing.router import Router
from twinbench.suite import Suite, Task
from twinbench.system.files import new_folder
from twinbench.weights.pretrained import copy_tokenizer
from twinbench.weights.write import DTYPES, write_weights
from twinbench.workbench import Workbench

SHARED, HEAD = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
POOLED = {
    "mean": "mean over a text's tokens, special ones included",
    "first": "first token",
    "last": "last token",
    "segments": "means over the tokens of a row's first and of its second text, one after the other",
}


def export(
    folder: Path, job: Job, bench: Workbench, setting: Setting, origins: Mapping[str, str], rows: list[dict]
) -> None:
    """Write what `benchmark.run` measures on the same bench with the same setting.

    Args:
        folder: new, or empty.
        job: the configuration that this is.
        origins: where each expert comes from, for the card.
        rows: records, for the card's scores.

    Raises:
        ValueError: an exclusive part fits no LoRA adapter.
        OSError: the folder cannot be written; nothing is left of it.
    """
    merged, learned = benchmark.built(bench, setting)
    merged = Merged(dict(for_every_input(merged)), merged.exclusive)
    suite, module = bench.suite, bench.module
    halves = {expert: split(parts, expert) for expert, parts in merged.exclusive.items()}
    adapters = {expert: lora(low, module) for expert, (low, _) in halves.items()}
    effect = card.vector_effect(bench, merged, halves) if halves else []
    with new_folder(folder) as part:
        models = {task: suite.workload.classifier(suite, task, module) for task in suite.tasks}
        files = _write_shared(part, suite, merged.shared, next(iter(models.values())))
        for name, task in suite.tasks.items():
            _write_task(part / "tasks" / name, files, merged.shared, suite.heads[name], models[name], task)
        for expert, (config, tensors) in adapters.items():
            home = part / "experts" / expert
            home.mkdir(parents=True)
            _write_json(home / "adapter_config.json", config)
            _save(home / "adapter_model.safetensors", tensors)
            _save(home / "vectors.safetensors", halves[expert][1])
        if learned:
            _write_json(part / "router.json", _describe(learned, setting.router, list(suite.experts)))
            _save(part / "router.safetensors", learned.model.logits.state_dict())
        text = card.render(job, suite, origins, rows, learned, effect)
        (part / "README.md").write_text(text, encoding="utf-8")


def _write_shared(folder: Path, suite: Suite, state: Mapping[str, Tensor], model: PreTrainedModel) -> list[Path]:
    """Write the model without a head and its tokenizer; return the files that a task's classifier has too."""
    prefixed = {f"{model.base_model_prefix}.{name}": tensor for name, tensor in state.items()}
    names = {dtype: name for name, dtype in DTYPES.items()}
    layout = {name: (names[tensor.dtype], tuple(tensor.shape)) for name, tensor in prefixed.items()}
    write_weights(folder, prefixed, layout, shard_bytes=sys.maxsize, metadata={})  # one file, for the tasks to link to
    _config(model.base_model, model.config, state).save_pretrained(folder)
    return [folder / "model.safetensors", *copy_tokenizer(suite.tokenizer, suite.base_folder, folder)]


def _write_task(
    folder: Path,
    files: list[Path],
    shared: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    model: PreTrainedModel,
    task: Task,
) -> None:
    """Write a sequence classifier of two weight files, the first of which is the shared model's."""
    folder.mkdir(parents=True)
    for path in files:
        _link(path, folder / (SHARED if path.name == "model.safetensors" else path.name))
    _save(folder / HEAD, head)
    owner = {f"{model.base_model_prefix}.{name}": SHARED for name in shared} | dict.fromkeys(head, HEAD)
    size = sum(tensor.nbytes for state in (shared, head) for tensor in state.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": owner})
    config = _config(model, model.config, shared)
    if task.classes:
        config.id2label = dict(enumerate(task.classes))
        config.label2id = {name: position for position, name in enumerate(task.classes)}
    config.problem_type = "single_label_classification" if task.classes else "regression"
    config.save_pretrained(folder)


def _config(model: nn.Module, config, state: Mapping[str, Tensor]):
    """A configuration that says which class and dtype the weights are of."""
    config = copy.deepcopy(config)
    config.architectures = [type(model).__name__]
    config.dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    return config


def _describe(router: Router, recipe: Recipe, experts: list[str]) -> dict:
    """What builds the router in plain torch: its ``layers`` are classes of ``torch.nn`` and their arguments."""
    sizes = {
        nn.Linear: lambda layer: [layer.in_features, layer.out_features],
        nn.BatchNorm1d: lambda layer: [layer.num_features],
        nn.LeakyReLU: lambda layer: [layer.negative_slope],
        nn.Dropout: lambda layer: [layer.p],
    }
    layers = [[type(layer).__name__, *sizes[type(layer)](layer)] for layer in router.model.logits]
    which = (
        "last hidden states" if recipe.features.layer is None else f"hidden states after layer {recipe.features.layer}"
    )
    features = f"{POOLED[recipe.features.pool]}, of the shared model's {which}"
    return {"experts": experts, "features": features, "layers": layers, "softmax": True, "top_k": router.top_k}


def _link(path: Path, name: Path) -> None:
    """Give a file a second name, or a copy where the file system knows no hard links."""
    try:
        os.link(path, name)
    except OSError:
        shutil.copyfile(path, name)


def _save(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a small file; safetensors' own writer hides the operating system's error."""
    path.write_bytes(save({name: t.cpu().contiguous() for name, t in state.items()}, metadata={"format": "pt"}))


def _write_json(path: Path, content: Mapping) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
