"""The router of Twin-Merging (arXiv 2406.15479, section 3.3, appendix D.1): features in, weights over experts out.

``w = softmax(R(Emb(x)))``, where Emb(x) are hidden states of the shared expert pooled over the tokens of x (the paper:
the mean of the last ones), and R is three linear layers with batch normalization and Leaky ReLU, trained by
cross-entropy on which task x comes from.
"""

import copy
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from twinbench.system.mistakes import Mistake

POOLS = ("mean", "first", "last", "segments")


@dataclass(frozen=True)
class Oracle:
    """No router: the weights are one-hot at the known task."""


@dataclass(frozen=True)
class Mlp:
    """How a router is built and trained.

    Args:
        hidden_ratio: width of the two hidden layers, in units of the feature width.
        dropout: after each hidden layer, in [0, 1).
        lr: AdamW's, falling linearly to 0.
        epochs: at most; the epoch with the lowest loss on held-out training rows is kept.
        batch_size: rows.
        top_k: keep only the k largest weights of a row, rescaled to sum to 1; None keeps all, as the paper does.
        balanced: weigh the training rows so that every expert's count the same, as every task does in an average.
        groups: at most so many routes per expert in a split, each shared by the rows of a group (see `grouped`; the
            paper's speed-up has 20); None routes every row by itself.
        source: whose hidden states are read: "shared", the shared expert's as in the paper, or "base"; None reads none.
        layer, pool: which hidden states and how they are pooled, as in `inference.features`; the paper's are the last
            ones (None), and their "mean".
        characters: beside the hidden states, how many hashed counts of character n-grams are read of each text column
            (see `inference.characters`); 0, as in the paper, is none.
        rows: train on at most so many of each task's training rows, as the authors' code does, and let the rows held
            out of them choose the epoch; None trains on four fifths of the held-out rows, as the paper says.
        minimum_risk: a row goes to the expert with the least expected loss of score (see `costs`), not to the
            likeliest one.
        tolerance: a row may do without an expert whose weight is at most this, which is faster (see `routed.attach`
            for the bound); 0 is exact.

    Raises:
        ValueError: a value is out of range.
    """

    hidden_ratio: float
    dropout: float
    lr: float
    epochs: int
    batch_size: int
    top_k: int | None
    source: str | None = "shared"
    layer: int | None = None
    pool: str = "mean"
    characters: int = 0
    rows: int | None = None
    balanced: bool = False
    minimum_risk: bool = False
    groups: int | None = None
    tolerance: float = 0.0

    def __post_init__(self):
        for name, legal, wanted in (
            ("hidden_ratio", self.hidden_ratio > 0, "above 0"),
            ("dropout", 0 <= self.dropout < 1, "in [0, 1)"),
            ("lr", self.lr > 0, "above 0"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 2, "at least 2 (batch normalization needs two rows)"),
            ("top_k", self.top_k is None or self.top_k >= 1, "null or at least 1"),
            ("groups", self.groups is None or self.groups >= 1, "null or at least 1"),
            ("source", self.source in ("shared", "base", None), "shared, base or null"),
            ("layer", self.layer is None or self.layer >= 0, "null or at least 0"),
            ("pool", self.pool in POOLS, f"of {', '.join(POOLS)}"),
            ("characters", self.characters >= (self.source is None), "at least 0, or 1 where router.source is null"),
            ("rows", self.rows is None or self.rows >= 2, "null or at least 2"),
            (
                "minimum_risk",
                not self.minimum_risk or (self.balanced and self.top_k == 1),
                "false unless balanced is true and top_k is 1",
            ),
            ("tolerance", 0 <= self.tolerance < 1, "in [0, 1)"),
        ):
            if not legal:
                raise Mistake(f"router.{name} must be {wanted}, got {getattr(self, name)}")


class Router(nn.Module):
    """(n, hidden) features to (n, experts) weights whose rows sum to 1."""

    def __init__(self, width: int, experts: int, recipe: Mlp):
        super().__init__()
        self.register_buffer("costs", None)  # see `minimizing`
        hidden = max(1, round(recipe.hidden_ratio * width))
        self.top_k = recipe.top_k
        self.logits = nn.Sequential(
            *(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(), nn.Dropout(recipe.dropout)),
            *(nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(), nn.Dropout(recipe.dropout)),
            nn.Linear(hidden, experts),
        )

    def forward(self, features: Tensor) -> Tensor:
        weights = self.logits(features).softmax(1)
        if self.costs is not None:
            return F.one_hot((weights @ self.costs).argmin(1), weights.shape[1]).to(weights.dtype)
        if self.top_k is None or self.top_k >= weights.shape[1]:
            return weights
        top = weights.topk(self.top_k, dim=1)
        kept = torch.zeros_like(weights).scatter_(1, top.indices, top.values)
        return kept / kept.sum(1, keepdim=True)


def minimizing(router: Router, costs: Tensor) -> Router:
    """The same router, but sending each row to the one expert with the least expected cost.

    Args:
        costs: (experts, experts), of a row of one task (first) that another's expert gets; see `costs`.
    """
    careful = copy.deepcopy(router)
    careful.costs = costs.to(next(router.parameters()).device)
    return careful


def fit(recipe: Mlp, train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], seed: int) -> Router:
    """Train a router; deterministic under ``seed``, and the caller's random state is left as it was.

    Args:
        train: features (n, hidden) and expert positions (n,).
        held_out: the same of rows that no expert was trained on; they choose the epoch.
    """
    features, experts = train
    weight = 1 / torch.bincount(experts).to(features) if recipe.balanced else None  # the loss divides by their sum
    with torch.random.fork_rng(devices=[features.device] if features.is_cuda else []):
        torch.manual_seed(seed)
        router = Router(features.shape[1], int(experts.max()) + 1, recipe).to(features.device)
        steps = recipe.epochs * -(-len(features) // recipe.batch_size)
        optimizer = torch.optim.AdamW(router.parameters(), lr=recipe.lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        best_loss, best = float("inf"), None
        for _ in range(recipe.epochs):
            router.train()
            for rows in torch.randperm(len(features)).split(recipe.batch_size):
                if len(rows) > 1:  # batch normalization has no statistics of a single row
                    loss = F.cross_entropy(router.logits(features[rows]), experts[rows], weight)
                    loss.backward()
                    nn.utils.clip_grad_norm_(router.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                schedule.step()
            router.eval()
            with torch.inference_mode():
                loss = F.cross_entropy(router.logits(held_out[0]), held_out[1], weight).item()
            if loss < best_loss:
                best_loss, best = loss, copy.deepcopy(router.state_dict())
    if best is None:
        raise Mistake(f"router: the held-out loss was never finite; lower router.lr={recipe.lr}")
    router.load_state_dict(best)
    return router.requires_grad_(False)


def grouped(weights: Tensor, logits: Tensor, groups: int, seed: int) -> Tensor:
    """Let rows with near routes share one: the group-wise speed-up of the paper (appendix E).

    Rows are binned by their largest logit, KMeans on the logits splits each bin, and the rows of a group get the mean
    of their weights. So a row's weights depend on the rows that it is grouped with.

    Args:
        weights: (n, experts), on the CPU.
        logits: the router's for the same rows, (n, experts).
        groups: at most so many in a bin; a bin with no more distinct rows is left as it is.
        seed: of KMeans' first centres.
    """
    shared, bins = weights.clone(), logits.argmax(1)
    for expert in bins.unique():
        rows = (bins == expert).nonzero().flatten()
        points = logits[rows].double()
        if len(points.unique(dim=0)) <= groups:
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "One of the clusters is empty")  # then there is a group less
            _, label = kmeans2(points.numpy(), groups, iter=30, minit="++", seed=seed)
        member = F.one_hot(torch.as_tensor(label, dtype=torch.long), groups).to(weights.dtype)
        mean = member.T @ weights[rows] / member.sum(0).clamp(min=1)[:, None]
        shared[rows] = mean[label]
    return shared
