"""Fine-tuning the experts of a generative suite as LoRA adapters (Hu et al., arXiv 2106.09685), each once and cached.

An example is a prompt of the task in the base's own chat format and its right answer; the loss is on the answer alone.
Examples are packed: they fill rows of a fixed length, and attention does not cross from one to the next.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from twinbench.system.cached import made
from twinbench.system.mistakes import Mistake
from twinbench.weights.pretrained import open_pretrained
from twinbench.workloads.classification.data import Task
from twinbench.workloads.classification.finetune import Progress
from twinbench.workloads.generation.data import answers

ROW = ("input_ids", "labels", "position_ids")
METRIC = "token_accuracy"  # share of the answers' tokens that are the likeliest after what is right before them


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
        for name, legal, wanted in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("tokens", self.tokens >= 16, "at least 16"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("lr", self.lr > 0, "above 0"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("warmup", 0 <= self.warmup < 1, "in [0, 1)"),
            ("rank", self.rank >= 1, "at least 1"),
            ("dropout", 0 <= self.dropout < 1, "in [0, 1)"),
            ("targets", len(self.targets) > 0, "names of layers"),
        ):
            if not legal:
                raise Mistake(f"suite.finetune.{name} must be {wanted}, got {getattr(self, name)}")


def finetune(
    base: Path, task: Task, recipe: Recipe, folder: Path, device: str, tokenizer_folder: Path | None = None
) -> Path:
    """Fine-tune an adapter of the base on a task unless ``folder`` has it already, undamaged.

    The folder appears when training has ended and everything is in it: a PEFT adapter, and ``training.json`` (recipe,
    learning curve, seconds).

    Args:
        tokenizer_folder: for a base that comes without a tokenizer.

    Returns:
        folder
    """
    return made(folder, lambda part: _train(base, tokenizer_folder or base, task, recipe, part, device))


def _train(base: Path, words: Path, task: Task, recipe: Recipe, folder: Path, device: str) -> None:
    from peft import LoraConfig, get_peft_model  # seconds that a suite of classifiers need not pay

    tokenizer = open_pretrained(AutoTokenizer, words)
    examples = {split: encoded(task, split, tokenizer, recipe.tokens) for split in ("train", "validation")}
    tokens = sum(len(ids) for ids, _ in examples["train"])
    print(
        f"fine-tuning expert {task.name}: {len(examples['train'])} prompts, {tokens} tokens, {recipe.epochs} epochs on "
        f"{device}",
        flush=True,
    )
    torch.manual_seed(recipe.seed)  # before the adapter is drawn
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(recipe.targets),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(open_base(base), config)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=1,
        learning_rate=recipe.lr,
        weight_decay=recipe.weight_decay,
        warmup_steps=recipe.warmup,
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,  # of the library's bars, which print a dict per epoch; Progress is ours
        seed=recipe.seed,
        bf16=recipe.bf16,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model,
        arguments,
        _batch,
        train_dataset=packed(examples["train"], recipe.tokens, recipe.seed),
        eval_dataset=packed(examples["validation"], recipe.tokens, recipe.seed),
        preprocess_logits_for_metrics=lambda logits, _: logits.argmax(-1),
        compute_metrics=lambda output: {METRIC: _token_accuracy(output.predictions, output.label_ids)},
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(task.name, METRIC))
    start = time.perf_counter()
    trainer.train()
    model.save_pretrained(folder)
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    history = {"recipe": asdict(recipe), "seconds": time.perf_counter() - start, "device": device}
    history |= {"torch": torch.__version__, "curve": trainer.state.log_history}
    (folder / "training.json").write_text(json.dumps(history, indent=1), encoding="utf-8")


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
        begun = prompt.startswith(tokenizer.bos_token or "\0")  # by its chat template
        before = tokenizer(prompt, add_special_tokens=not begun)["input_ids"]
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
    """Rows as one, (1, tokens): what packs examples packs rows, and nothing is padded.

    Logits are asked for only where an answer's token comes next; over the whole vocabulary they cost as much as layers.
    """
    ids, labels, positions = (torch.tensor([t for row in rows for t in row[key]]) for key in ROW)
    kept = (labels[1:] != -100).nonzero().flatten()
    wanted = labels[kept + 1][None]
    batch = {"input_ids": ids[None], "position_ids": positions[None], "logits_to_keep": kept}
    return batch | {"labels": wanted, "shift_labels": wanted}  # the model would shift labels itself


def _token_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    counted = labels != -100  # fills what was gathered up to one length
    return float((predictions[counted] == labels[counted]).mean())
