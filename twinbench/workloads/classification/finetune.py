"""Fine-tuning the experts of a suite, each once: they are cached under a hash of everything that shapes them."""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from twinbench.system.cached import made
from twinbench.system.mistakes import Mistake
from twinbench.tasks.metrics import score
from twinbench.weights.pretrained import copy_tokenizer, open_pretrained
from twinbench.workloads.classification.data import Task


@dataclass(frozen=True)
class Recipe:
    """How every expert of a suite is fine-tuned: AdamW, linear warm-up, linear decay to 0, gradients clipped at norm 1.

    Args:
        freeze: prefixes of backbone parameter names that stay as they are in the base.
        warmup: fraction of the steps, in [0, 1).
        seed: of the head's initialization, dropout and order of rows.
        bf16: compute in bfloat16 (autocast); weights, gradients and the optimizer stay float32.

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

    def __post_init__(self):
        for name, legal, wanted in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("lr", self.lr > 0, "above 0"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("warmup", 0 <= self.warmup < 1, "in [0, 1)"),
        ):
            if not legal:
                raise Mistake(f"suite.finetune.{name} must be {wanted}, got {getattr(self, name)}")


def finetune(base: Path, task: Task, recipe: Recipe, folder: Path, device: str) -> Path:
    """Fine-tune the base on a task unless ``folder`` has the expert already, undamaged.

    The folder appears when training has ended and everything is in it: a Hugging Face sequence classifier with its
    tokenizer, and ``training.json`` (recipe, learning curve with the validation score after each epoch, seconds).

    Returns:
        folder
    """
    return made(folder, lambda part: _train(base, task, recipe, part, device))


def _train(base: Path, task: Task, recipe: Recipe, folder: Path, device: str) -> None:
    print(
        f"fine-tuning expert {task.name}: {len(task.splits['train'])} rows, {recipe.epochs} epochs on {device}",
        flush=True,
    )
    tokenizer = open_pretrained(AutoTokenizer, base)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=recipe.lr,
        weight_decay=recipe.weight_decay,
        warmup_steps=recipe.warmup,
        train_sampling_strategy="group_by_length",
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,  # of the library's bars, which print a dict per epoch; Progress is ours
        seed=recipe.seed,
        bf16=recipe.bf16,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
    )
    torch.manual_seed(recipe.seed)  # before the head is drawn
    regression = task.classes is None
    labels = {"num_labels": 1 if regression else len(task.classes)} | _label_names(task)
    model = open_pretrained(AutoModelForSequenceClassification, base, dtype=torch.float32, **labels)
    for name, parameter in model.base_model.named_parameters():
        if name.startswith(recipe.freeze):
            parameter.requires_grad_(False)
    trainer = Trainer(
        model,
        arguments,
        DataCollatorWithPadding(tokenizer),
        train_dataset=_rows(task, "train", tokenizer),
        eval_dataset=_rows(task, "validation", tokenizer),
        compute_metrics=lambda output: _scores(task, output.label_ids, output.predictions),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(task.name, task.metrics[0]))
    start = time.perf_counter()
    trainer.train()
    model.save_pretrained(folder)
    copy_tokenizer(tokenizer, base, folder)
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    history = {"recipe": asdict(recipe), "seconds": time.perf_counter() - start, "device": device}
    history |= {"torch": torch.__version__, "curve": trainer.state.log_history}
    (folder / "training.json").write_text(json.dumps(history, indent=1), encoding="utf-8")


class Progress(TrainerCallback):
    """A bar over steps, and a line per epoch with the validation score."""

    def __init__(self, name: str, metric: str):
        self.metric, self.name = f"eval_{metric}", name

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, desc=self.name, unit="step", leave=False)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        score, loss = metrics[self.metric], metrics["eval_loss"]
        self.bar.write(f"  epoch {state.epoch:.0f}: validation {self.metric[5:]} {score:.4f}, loss {loss:.4f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def _label_names(task: Task) -> Mapping:
    if task.classes is None:
        return {"problem_type": "regression"}
    return {"id2label": dict(enumerate(task.classes)), "label2id": {name: i for i, name in enumerate(task.classes)}}


def _rows(task: Task, split: str, tokenizer) -> Dataset:
    frame = task.splits[split]
    if split != "train":  # in evaluation like lengths go together, so that little is padded
        frame = frame.sort_values(task.columns[0], key=lambda texts: texts.str.len())
    texts = [frame[column].tolist() for column in task.columns]
    rows = dict(tokenizer(*texts, truncation=True, max_length=task.max_length))
    kind = float if task.classes is None else int
    return Dataset.from_dict(rows | {"labels": [kind(label) for label in frame["label"]]})


def _scores(task: Task, labels, logits) -> dict[str, float]:
    predictions = logits[:, 0] if task.classes is None else logits.argmax(1)
    return {metric: score(metric, labels, predictions) for metric in task.metrics}
