"""Fine-tuning the experts of a suite, each once: they are cached under a hash of everything that shapes them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from twinbench.suite import Task
from twinbench.system.cached import made
from twinbench.tasks.metrics import predictions, score
from twinbench.weights.pretrained import copy_tokenizer, open_pretrained
from twinbench.workloads.recipe import checked

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Recipe:
    """How every expert of a suite is fine-tuned: AdamW, linear warm-up, linear decay to 0, gradients clipped at norm 1.

    Args:
        freeze: prefixes of backbone parameter names that stay as they are in the base.
        warmup: fraction of the steps, in [0, 1).
        seed: of the head's initialization, dropout and order of rows.
        bf16: compute in bfloat16 (autocast); weights, gradients and the optimizer stay float32.
        label_smoothing: the share of a target that is spread over all classes (Szegedy et al., CVPR 2016), in [0, 1);
            a regression has none.

    Raises:
        ValueError: a value is out of range.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    warmup: float
    freeze: tuple[str, ...]
    seed: int
    bf16: bool = False
    label_smoothing: float = 0.0

    def __post_init__(self):
        checked(self, label_smoothing=(0 <= self.label_smoothing < 1, "in [0, 1)"))


def finetune(base: Path, task: Task, recipe: Recipe, folder: Path, device: str, words: Path) -> Path:
    """Fine-tune the base on a task unless ``folder`` has the expert already, undamaged.

    The folder appears when training has ended and everything is in it: a Hugging Face sequence classifier with its
    tokenizer, and ``training.json`` (recipe, learning curve with the validation score after each epoch, seconds).

    Args:
        words: a folder with the tokenizer; the base's own.

    Returns:
        folder
    """
    return made(folder, lambda part: _train(base, words, task, recipe, part, device))


def _train(base: Path, words: Path, task: Task, recipe: Recipe, folder: Path, device: str) -> None:
    # Seconds that a run pays only if it trains.
    from transformers import DataCollatorWithPadding, Trainer

    from twinbench.workloads.training import arguments, trained

    print(
        f"fine-tuning expert {task.name}: {len(task.splits['train'])} rows, {recipe.epochs} epochs on {device}",
        flush=True,
    )
    tokenizer = open_pretrained(AutoTokenizer, words)
    given = arguments(
        recipe,
        folder,
        device,
        per_device_eval_batch_size=64,
        train_sampling_strategy="group_by_length",
        label_smoothing_factor=recipe.label_smoothing if task.classes else 0.0,
    )
    torch.manual_seed(recipe.seed)  # before the head is drawn
    labels = {"num_labels": len(task.classes) if task.classes else 1} | _label_names(task)
    model = open_pretrained(AutoModelForSequenceClassification, base, dtype=torch.float32, **labels)
    for name, parameter in model.base_model.named_parameters():
        if name.startswith(recipe.freeze):
            parameter.requires_grad_(False)
    trainer = Trainer(
        model,
        given,
        DataCollatorWithPadding(tokenizer),
        train_dataset=_rows(task, "train", tokenizer),
        eval_dataset=_rows(task, "validation", tokenizer),
        compute_metrics=lambda output: _scores(task, output.label_ids, output.predictions),
    )
    trained(trainer, model, recipe, folder, (task.name, task.metrics[0]))
    copy_tokenizer(tokenizer, words, folder)


def _label_names(task: Task) -> Mapping:
    if task.classes is None:
        return {"problem_type": "regression"}
    return {"id2label": dict(enumerate(task.classes)), "label2id": {name: i for i, name in enumerate(task.classes)}}


def _rows(task: Task, split: str, tokenizer) -> "Dataset":
    from datasets import Dataset

    frame = task.splits[split]
    if split != "train":  # in evaluation like lengths go together, so that little is padded
        frame = frame.sort_values(task.columns[0], key=lambda texts: texts.str.len())
    texts = [frame[column].tolist() for column in task.columns]
    rows = dict(tokenizer(*texts, truncation=True, max_length=task.max_length))
    kind = float if task.classes is None else int
    return Dataset.from_dict(rows | {"labels": [kind(label) for label in frame["label"]]})


def _scores(task: Task, labels, logits) -> dict[str, float]:
    given = predictions(logits, task.classes is not None)
    return {metric: score(metric, labels, given) for metric in task.metrics}
