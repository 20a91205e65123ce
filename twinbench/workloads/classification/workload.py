"""The kind of model "classification": encoders with a head per task."""

from twinbench.workloads.classification.costs import costs
from twinbench.workloads.classification.data import encoded, read
from twinbench.workloads.classification.finetune import Recipe, finetune
from twinbench.workloads.classification.open import classifier, module, open_suite, open_tokenizer
from twinbench.workloads.classification.score import forward, score
from twinbench.workloads.classification.statistics import batches, log_likelihoods, model

__all__ = [
    "Recipe",
    "batches",
    "classifier",
    "costs",
    "encoded",
    "finetune",
    "forward",
    "log_likelihoods",
    "model",
    "module",
    "open_suite",
    "open_tokenizer",
    "read",
    "score",
]
