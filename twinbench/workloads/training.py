"""What fine-tuning has in common for all kinds of models: the trainer's settings, a progress bar, the log."""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from twinbench.system.device import check_bfloat16


def arguments(recipe, folder: Path, device: str, **more) -> TrainingArguments:
    """AdamW with linear warm-up and linear decay to 0, gradients clipped at norm 1, scored after each epoch.

    Args:
        more: what one kind of model sets beside that.

    Raises:
        ValueError: the recipe wants bfloat16, which the device would emulate.
    """
    if recipe.bf16:
        check_bfloat16(device, "suite.finetune.bf16=true", "suite.finetune.bf16=false, which trains other experts")
    return TrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
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
        **more,
    )


def trained(trainer: Trainer, model: PreTrainedModel, recipe, folder: Path, shown: tuple[str, str]) -> None:
    """Train, save the model, and write ``training.json``: recipe, learning curve, seconds.

    Args:
        shown: the task's name and the metric that the bar shows.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(*shown))
    start = time.perf_counter()
    trainer.train()
    model.save_pretrained(folder)
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    history: Mapping = {
        "recipe": asdict(recipe),
        "seconds": time.perf_counter() - start,
        "device": str(trainer.args.device),
        "torch": torch.__version__,
        "curve": trainer.state.log_history,
    }
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
