"""Fine-tuning the experts of a generative suite as LoRA adapters (Hu et al., arXiv 2106.09685), each once and cached.

An example is a prompt of the task in the base's own chat format and its right answer; the loss is on the answer alone.
Examples are packed: they fill rows of a fixed length, and attention does not cross from one to the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from twinbench.suite import Task
from twinbench.system.cached import made
from twinbench.weights.pretrained import open_pretrained
from twinbench.workloads.generation.attention import attend_per_example
from twinbench.workloads.generation.data import answers, begun
from twinbench.workloads.recipe import checked

ROW = ("input_ids", "labels", "position_ids")
METRIC = "token_accuracy"  # share of answer tokens that the model ranks first, given the right tokens before them


@dataclass(frozen=True)
class Recipe:
    """How every expert of a suite is fine-tuned: AdamW, linear warm-up, linear decay to 0, gradients clipped at norm 1.

    Args:
        tokens: length of a packed row; a longer example loses its beginning.
        batch_size: rows per step.
        rank, alpha, dropout, targets: of the adapter; targets are names of linear layers.
        warmup: fraction of the steps, in [0, 1).
        seed: of the adapter's initialization, dropout and order of examples.
        bf16: compute in bfloat16 (autocast); weights, gradients and the optimizer stay float32.

    Raises:
        ValueError: a value is out of range.
    """

    epochs: int
    tokens: int
    batch_size: int
    lr: float
    weight_decay: float
    warmup: float
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    seed: int
    bf16: bool = False

    def __post_init__(self):
        checked(
            self,
            tokens=(self.tokens >= 16, "at least 16"),
            rank=(self.rank >= 1, "at least 1"),
            dropout=(0 <= self.dropout < 1, "in [0, 1)"),
            targets=(len(self.targets) > 0, "names of layers"),
        )


def finetune(base: Path, task: Task, recipe: Recipe, folder: Path, device: str, words: Path) -> Path:
    """Fine-tune an adapter of the base on a task unless ``folder`` has it already, undamaged.

    The folder appears when training has ended and everything is in it: a PEFT adapter, and ``training.json`` (recipe,
    learning curve, seconds).

    Args:
        words: a folder with the tokenizer.

    Returns:
        folder
    """
    return made(folder, lambda part: _train(base, words, task, recipe, part, device))


def _train(base: Path, words: Path, task: Task, recipe: Recipe, folder: Path, device: str) -> None:
    # Seconds that a run pays only if it trains.
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer

    from twinbench.workloads.training import arguments, trained

    tokenizer = open_pretrained(AutoTokenizer, words)
    examples = {split: encoded(task, split, tokenizer, recipe.tokens) for split in ("train", "validation")}
    tokens = sum(len(ids) for ids, _ in examples["train"])
    size = f"{len(examples['train'])} prompts, {tokens} tokens, {recipe.epochs} epochs"
    print(f"fine-tuning expert {task.name}: {size} on {device}", flush=True)
    torch.manual_seed(recipe.seed)  # before the adapter is drawn
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(recipe.targets),
        task_type="CAUSAL_LM",
    )
    opened = open_base(base)
    if device == "cpu":  # where it was measured
        attend_per_example(opened)
    model = get_peft_model(opened, config)
    trainer = Trainer(
        model,
        arguments(recipe, folder, device, per_device_eval_batch_size=1, remove_unused_columns=False),
        _batch,
        train_dataset=packed(examples["train"], recipe.tokens, recipe.seed),
        eval_dataset=packed(examples["validation"], recipe.tokens, recipe.seed),
        preprocess_logits_for_metrics=lambda logits, _: logits.argmax(-1),
        compute_metrics=lambda output: {METRIC: _token_accuracy(output.predictions, output.label_ids)},
    )
    trained(trainer, model, recipe, folder, (task.name, METRIC))


def open_base(folder: Path) -> PreTrainedModel:
    """The base for training: without a cache of keys, as with one transformers does not look for packed rows."""
    model = open_pretrained(AutoModelForCausalLM, folder, dtype=torch.float32)
    model.config.use_cache = False
    return model


def encoded(
    task: Task, split: str, tokenizer: PreTrainedTokenizerBase, longest: int
) -> list[tuple[list[int], list[int]]]:
    """Token ids of every prompt with its answer and an end, and labels, which are -100 where there is no loss."""
    found = []
    for prompt, answer in zip(task.splits[split]["prompt"], answers(task.harness[split]), strict=True):
        before = tokenizer(prompt, add_special_tokens=not begun(prompt, tokenizer))["input_ids"]
        after = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids, labels = before + after, [-100] * len(before) + after
        found.append((ids[-longest:], labels[-longest:]))
    return found


def packed(examples: Sequence[tuple[list[int], list[int]]], tokens: int, seed: int) -> list[dict[str, list[int]]]:
    """Fill rows of at most ``tokens`` with whole examples, in a seeded order; positions begin anew with each example.

    An example's first label is never predicted from the example before.
    """
    rows: list[dict[str, list[int]]] = []
    for at in np.random.default_rng(seed).permutation(len(examples)):
        ids, labels = examples[at]
        if not rows or len(rows[-1]["input_ids"]) + len(ids) > tokens:
            rows.append({key: [] for key in ROW})
        rows[-1]["input_ids"] += ids
        rows[-1]["labels"] += [-100, *labels[1:]]
        rows[-1]["position_ids"] += range(len(ids))
    return rows


def _batch(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Concatenates packed rows to one sequence (1, tokens), without padding.

    Logits are computed only where an answer token is predicted; for all positions they would cost as much as several
    layers.
    """
    ids, labels, positions = (torch.tensor([t for row in rows for t in row[key]]) for key in ROW)
    kept = (labels[1:] != -100).nonzero().flatten()
    wanted = labels[kept + 1][None]
    batch = {"input_ids": ids[None], "position_ids": positions[None], "logits_to_keep": kept}
    return batch | {"labels": wanted, "shift_labels": wanted}  # the model would shift labels itself


def _token_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    counted = labels != -100  # fills what was gathered up to one length
    return float((predictions[counted] == labels[counted]).mean())
