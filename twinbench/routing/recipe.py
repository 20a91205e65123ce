"""How a router comes about: what it reads, which model that goes into, and how the model's weights are used.

A configuration ``conf/router/NAME.yaml`` has these three leaves. The oracle has none: its weights are one-hot at the
known task.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from twinbench.system.mistakes import Mistake

POOLS = ("mean", "first", "last", "segments", "content")
RESIDUALS, ENTROPIES = "residuals", "entropies"  # what `of_experts` gives
SOURCES = ("shared", "base", RESIDUALS, ENTROPIES, None)


@dataclass(frozen=True)
class Features:
    """What a router reads.

    Args:
        source: whose hidden states: "shared", the shared expert's as in the paper, or "base"; None reads none. Or what
            the experts say of a row: "residuals" or "entropies" (see `of_experts`).
        layer, pool: which hidden states and how they are pooled, as in `features.hidden_states`; the paper's are the
            last ones (None), and their "mean". Of residuals the layer whose input is read; entropies have neither.
        characters: beside the hidden states, how many hashed counts of character n-grams are read of each text column
            (see `features.characters`); 0, as in the paper, is none.
        rows: train on at most so many of each task's training rows, as the authors' code does, and let the rows held
            out of them choose; None trains on four fifths of the held-out rows, as the paper says.

    Raises:
        ValueError: a value is out of range.
    """

    source: str | None
    layer: int | None
    pool: str
    characters: int
    rows: int | None

    def __post_init__(self):
        checked(
            "features",
            self,
            source=(self.source in SOURCES, "shared, base, residuals, entropies or null"),
            layer=(self.layer is None or self.layer >= 0, "null or at least 0"),
            pool=(self.pool in POOLS, f"of {', '.join(POOLS)}"),
            characters=(
                self.characters >= (self.source is None),
                "at least 0, or 1 where router.features.source is null",
            ),
            rows=(self.rows is None or self.rows >= 2, "null or at least 2"),
        )


@dataclass(frozen=True)
class Use:
    """How the weights of a router are used.

    Args:
        top_k: keep only the k largest weights of a row, rescaled to sum to 1; None keeps all, as the paper does.
        groups: at most so many routes per expert in a split, each shared by the rows of a group (see
            `router.grouped`; the paper's speed-up has 20); None routes every row by itself.
        minimum_risk: a row goes to the expert with the least expected loss of score, not to the likeliest one.
        tolerance: a row may do without an expert whose weight is at most this, which is faster (see `attach` for the
            bound); 0 is exact.

    Raises:
        ValueError: a value is out of range.
    """

    top_k: int | None
    groups: int | None
    minimum_risk: bool
    tolerance: float

    def __post_init__(self):
        checked(
            "use",
            self,
            top_k=(self.top_k is None or self.top_k >= 1, "null or at least 1"),
            groups=(self.groups is None or self.groups >= 1, "null or at least 1"),
            minimum_risk=(not self.minimum_risk or self.top_k == 1, "false unless top_k is 1"),
            tolerance=(0 <= self.tolerance < 1, "in [0, 1)"),
        )


class Fitted(Protocol):
    """A trained model of a router."""

    def logits(self, features: Tensor) -> Tensor:
        """Scores (n, experts) of rows whose softmax are the weights."""

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that are stored."""


class Model(Protocol):
    """What a router's ``model`` leaf makes: settings that can be fitted.

    One that learns from no rows has ``ready() -> Fitted`` in the place of ``fit``.
    """

    def fit(self, train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], seed: int | None) -> nn.Module:
        """Fit to features (n, width) and expert positions (n,); the held-out rows choose. A `Fitted` module.

        A model that draws no random numbers says ``DRAWS = {}`` in its module, and its seed is in no identity.
        """


@dataclass(frozen=True)
class Recipe:
    """The three leaves of a router.

    Raises:
        ValueError: they contradict each other.
    """

    features: Features
    model: Model
    use: Use

    def __post_init__(self):
        said, ready = self.features.source in (RESIDUALS, ENTROPIES), hasattr(self.model, "ready")
        given = self.features
        checked(
            "features",
            given,
            source=(said or not ready, f"{RESIDUALS} or {ENTROPIES}, for a model that learns from no rows"),
            pool=(given.pool == "mean" or not said, f"mean where router.features.source={given.source}"),
            layer=(given.layer is None or given.source != ENTROPIES, f"null where router.features.source={ENTROPIES}"),
            characters=(not given.characters or not ready, "0, for a model that learns from no rows"),
            rows=(given.rows is None or not ready, "null, for a model that learns from no rows"),
        )
        if self.use.minimum_risk and not getattr(self.model, "balanced", True):
            raise Mistake("router.use.minimum_risk must be false unless router.model.balanced is true, got true")


def checked(leaf: str, values: object, **rules: tuple[bool, str]) -> None:
    """Raise ValueError for the first setting of a router's leaf that is out of range.

    Args:
        rules: per setting whether it is legal, and what is.
    """
    for name, (legal, wanted) in rules.items():
        if not legal:
            raise Mistake(f"router.{leaf}.{name} must be {wanted}, got {getattr(values, name)}")
