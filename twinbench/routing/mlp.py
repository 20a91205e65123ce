"""The router model of Twin-Merging (arXiv 2406.15479, section 3.3, appendix D.1): three linear layers.

``w = softmax(R(Emb(x)))``: Emb(x) are the features, and R is three linear layers with batch normalization and Leaky
ReLU, trained by cross-entropy on which task x comes from.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinbench.routing.recipe import checked
from twinbench.system.mistakes import Mistake


@dataclass(frozen=True)
class Mlp:
    """How the layers are built and trained.

    Args:
        hidden_ratio: width of the two hidden layers, in units of the feature width.
        dropout: after each hidden layer, in [0, 1).
        lr: AdamW's, falling linearly to 0.
        epochs: at most; the epoch with the lowest loss on the held-out rows is kept.
        batch_size: rows.
        balanced: weigh the training rows so that every expert's count the same, as every task does in an average.

    Raises:
        ValueError: a value is out of range.
    """

    hidden_ratio: float
    dropout: float
    lr: float
    epochs: int
    batch_size: int
    balanced: bool

    def __post_init__(self):
        checked(
            "model",
            self,
            hidden_ratio=(self.hidden_ratio > 0, "above 0"),
            dropout=(0 <= self.dropout < 1, "in [0, 1)"),
            lr=(self.lr > 0, "above 0"),
            epochs=(self.epochs >= 1, "at least 1"),
            batch_size=(self.batch_size >= 2, "at least 2 (batch normalization needs two rows)"),
        )

    def fit(self, train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], seed: int) -> "Layers":
        """Train the layers; deterministic under ``seed``, and the caller's random state is left as it was.

        Args:
            train: features (n, width) and expert positions (n,).
            held_out: the same of rows that no expert was trained on; they choose the epoch.

        Raises:
            ValueError: the loss was never finite.
        """
        features, experts = train
        weight = 1 / torch.bincount(experts).to(features) if self.balanced else None  # the loss divides by their sum
        with torch.random.fork_rng(devices=[features.device] if features.is_cuda else []):
            torch.manual_seed(seed)
            layers = Layers(features.shape[1], int(experts.max()) + 1, self).to(features.device)
            steps = self.epochs * -(-len(features) // self.batch_size)
            optimizer = torch.optim.AdamW(layers.parameters(), lr=self.lr, weight_decay=0.0)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
            best_loss, best = float("inf"), None
            for _ in range(self.epochs):
                _train_epoch(layers, features, experts, weight, self.batch_size, optimizer, schedule)
                layers.eval()
                with torch.inference_mode():
                    loss = F.cross_entropy(layers.logits(held_out[0]), held_out[1], weight).item()
                if loss < best_loss:
                    best_loss, best = loss, copy.deepcopy(layers.state_dict())
        if best is None:
            raise Mistake(f"router: the held-out loss was never finite; lower router.model.lr={self.lr}")
        layers.load_state_dict(best)
        return layers.requires_grad_(False)


class Layers(nn.Module):
    """(n, width) features to (n, experts) logits."""

    def __init__(self, width: int, experts: int, recipe: Mlp):
        super().__init__()
        hidden = max(1, round(recipe.hidden_ratio * width))
        self.logits = nn.Sequential(
            *(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(), nn.Dropout(recipe.dropout)),
            *(nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(), nn.Dropout(recipe.dropout)),
            nn.Linear(hidden, experts),
        )


def _train_epoch(layers, features, experts, weight, batch_size, optimizer, schedule) -> None:
    layers.train()
    for rows in torch.randperm(len(features)).split(batch_size):
        if len(rows) > 1:  # batch normalization has no statistics of a single row
            loss = F.cross_entropy(layers.logits(features[rows]), experts[rows], weight)
            loss.backward()
            nn.utils.clip_grad_norm_(layers.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
