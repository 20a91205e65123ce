"""The kind of model "classification": encoders with a head per task."""

from twinbench.workloads.classification.costs import costs
from twinbench.workloads.classification.data import encoded, read
from twinbench.workloads.classification.finetune import Recipe, finetune
from twinbench.workloads.classification.open import module, open_suite, open_tokenizer
from twinbench.workloads.classification.score import score

__all__ = ["Recipe", "costs", "encoded", "finetune", "module", "open_suite", "open_tokenizer", "read", "score"]
