"""A fitted model and how its scores are used: features in, weights over experts out."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinbench.routing.recipe import Use


class Router(nn.Module):
    """(n, width) features to (n, experts) weights whose rows sum to 1.

    Attributes:
        model: a fitted `recipe.Fitted` module.
        costs: (experts, experts), of a row of one task (first) that another's expert gets; None: the likeliest expert
            is the best.
    """

    def __init__(self, model: nn.Module, use: Use, costs: Tensor | None = None):
        super().__init__()
        self.model, self.top_k = model, use.top_k
        self.register_buffer("costs", costs)

    def logits(self, features: Tensor) -> Tensor:
        return self.model.logits(features)

    def forward(self, features: Tensor) -> Tensor:
        weights = self.logits(features).softmax(1)
        if self.costs is not None:  # the Bayes decision: argmin_e sum_t p(t | x) C[t, e]
            return F.one_hot((weights @ self.costs).argmin(1), weights.shape[1]).to(weights.dtype)
        if self.top_k is None or self.top_k >= weights.shape[1]:
            return weights
        top = weights.topk(self.top_k, dim=1)
        kept = torch.zeros_like(weights).scatter_(1, top.indices, top.values)
        return kept / kept.sum(1, keepdim=True)

    def stored(self) -> dict[str, Tensor]:
        """The tensors that would be written."""
        return self.model.state_dict() | ({"costs": self.costs} if self.costs is not None else {})


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
    from scipy.cluster.vq import kmeans2  # half a second that few runs need to pay

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
