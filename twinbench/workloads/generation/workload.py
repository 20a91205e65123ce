"""The kind of model "generation": causal language models, scored by lm-eval."""

from twinbench.workloads.generation.data import encoded, read
from twinbench.workloads.generation.finetune import Recipe, finetune
from twinbench.workloads.generation.open import module, open_suite, open_tokenizer
from twinbench.workloads.generation.score import score
from twinbench.workloads.generation.statistics import batches, model

__all__ = [
    "Recipe",
    "batches",
    "encoded",
    "finetune",
    "model",
    "module",
    "open_suite",
    "open_tokenizer",
    "read",
    "score",
]
