"""Linear probes: how much a merged model's features say about a task that no expert was fine-tuned for.

A probe (Alain and Bengio, arXiv 1610.01644) is a linear model on the mean of a text's last hidden states, standardized:
logistic regression for classes, ridge regression for values, both with a penalty of 1. It is fitted for each merged
model on the task's training rows, so no head that saw other features is asked.
"""

from types import SimpleNamespace

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

STEPS = 2000  # of the fit at most


class Pooled(nn.Module):
    """A bare model as the classifier of a probed task: its outputs are features, (n, hidden)."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, attention_mask, **batch) -> SimpleNamespace:
        hidden = self.module(attention_mask=attention_mask, **batch).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return SimpleNamespace(logits=(hidden * mask).sum(1) / mask.sum(1))


def predictions(train: np.ndarray, labels: np.ndarray, features: np.ndarray, classes: bool) -> np.ndarray:
    """What a probe says of rows: class numbers, or values in a regression; (n,), float64.

    Args:
        train, labels: features (rows, hidden) and labels of the training rows.
        features: (n, hidden) of the rows that are asked about.
    """
    model = LogisticRegression(max_iter=STEPS) if classes else Ridge()
    return make_pipeline(StandardScaler(), model).fit(train, labels).predict(features).astype("float64")
