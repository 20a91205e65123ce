"""The kind of model "generation": causal language models, scored by lm-eval."""

from twinbench.workloads.generation.data import encoded, read
from twinbench.workloads.generation.finetune import Recipe, finetune
from twinbench.workloads.generation.open import module, open_suite, open_tokenizer
from twinbench.workloads.generation.score import score

__all__ = ["Recipe", "encoded", "finetune", "module", "open_suite", "open_tokenizer", "read", "score"]
