"""Linear probes: how much a merged model's features say about a task that no expert was fine-tuned for.

A probe (Alain and Bengio, arXiv 1610.01644) is a linear model on the mean of a text's last hidden states, standardized:
logistic regression for classes, ridge regression for values. It is fitted for each merged model on the task's training
rows, so no head that saw other features is asked. Its penalty is the best one in five folds of these rows: with one
penalty for all, more rows can make a probe worse.
"""

import warnings
from types import SimpleNamespace

import numpy as np
from torch import nn

STEPS = 2000  # of a fit at most
FOLDS = 5
PENALTIES = np.logspace(-1, 4, 11)  # of squared weights: 1 / C of a logistic regression, alpha of a ridge


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
    # A second that few runs need to pay.
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if classes:
        model, values = LogisticRegression(max_iter=STEPS), {"logisticregression__C": 1 / PENALTIES}
    else:
        model, values = Ridge(), {"ridge__alpha": PENALTIES}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # it is then in some folds alone
        chosen = GridSearchCV(make_pipeline(StandardScaler(), model), values, cv=FOLDS).fit(train, labels)
    return chosen.predict(features).astype("float64")
