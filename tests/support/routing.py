"""Small routers: the recipe that tests begin with, and a static method whose weights they may read."""

from twinbench.merging.merged import Merged
from twinbench.merging.method import Method
from twinbench.routing.mlp import Mlp
from twinbench.routing.recipe import Features, Recipe, Use

READS = {"source": "shared", "layer": None, "pool": "mean", "characters": 0, "rows": None}
MODEL = {"hidden_ratio": 2.0, "dropout": 0.5, "lr": 5e-3, "epochs": 3, "batch_size": 16, "balanced": False}
USE = {"top_k": None, "groups": None, "minimum_risk": False, "tolerance": 0.0}
STATIC = Method("base", "base", lambda base, experts: Merged(base))


def recipe(**changes) -> Recipe:
    """A router of three quick epochs; `changes` replace settings of any of its leaves."""
    assert changes.keys() <= READS.keys() | MODEL.keys() | USE.keys(), changes
    features, model, use = ({k: changes.get(k, v) for k, v in leaf.items()} for leaf in (READS, MODEL, USE))
    return Recipe(Features(**features), Mlp(**model), Use(**use))
