"""Each row is routed by itself: no router but `grouped` looks at the rows that share a batch with it.

Published code of ESM++, WEMoE, T-Switch and MASS averages the route over a batch, which holds one data set in its runs.
"""

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from baselines import mass
from support.commands import ROOT
from support.family import CLASSES, bench, make_task, opened
from twinbench.merging.compress import basis
from twinbench.merging.method import Method
from twinbench.routing.learned import Setting, learned, weights
from twinbench.routing.recipe import Features, Recipe, Use

MASS = Method("mass", "mass", lambda base, experts: mass.merge(base, experts, basis=basis))
NAMED = [task for task, classes in CLASSES.items() if classes]  # DaWin wants classes
ROUTERS = sorted(path.stem for path in (ROOT / "conf" / "router").glob("*.yaml"))


def made(settings: dict) -> Recipe:
    return Recipe(Features(**settings["features"]), instantiate(settings["model"]), Use(**settings["use"]))


def asked(router: str) -> dict:
    """A router's file, with its defaults below it."""
    own = OmegaConf.load(ROOT / "conf" / "router" / f"{router}.yaml")
    below = [asked(name) for name in own.pop("defaults", [])]
    return OmegaConf.to_container(OmegaConf.merge(*below, own))


@pytest.mark.parametrize("router", [name for name in ROUTERS if name not in ("grouped", "oracle")])
def test_a_rows_weights_are_the_same_alone_and_among_other_rows(family, router, monkeypatch, tmp_path):
    monkeypatch.setenv("TWINBENCH_CACHE", str(tmp_path / "cache"))
    settings = asked(router)
    settings["features"]["layer"] = {"mass": 1, "text": 1, "risk": 1}.get(router)  # of two
    settings["features"] |= {"characters": 16, "rows": 20} if router in ("text", "risk") else {}
    settings["use"] |= {} if router == "risk" else {"top_k": None}  # where weights are mixed, a small change shows
    settings["model"] |= {"neighbours": 2} if router == "knn" else {}
    suite = opened(family, tasks={task: make_task(task) for task in NAMED})
    setting = Setting(MASS, "router", made(settings), 0)
    found = []
    for size in (7, 1):
        asked_of = bench(suite, 7)
        learned(asked_of, setting)
        asked_of.batch_size = size
        found.append(torch.cat([weights(asked_of, setting, task, "test")[0] for task in NAMED]))
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)
    assert len(found[0]) == 20 and (router == "risk" or found[0].std(0).max() > 0), "rows differ"


def test_these_are_all_routers():
    assert {"mlp", "text", "risk", "knn", "prototypes", "mass", "dawin", "grouped", "oracle"} <= {*ROUTERS}
