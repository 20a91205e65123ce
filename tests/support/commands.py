"""Configurations composed and run.py started, as a user would, and the records that a run leaves."""

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict

from twinbench.plan.job import Job, configured
from twinbench.plan.suite import narrowed
from twinbench.records import store

ROOT = Path(__file__).parents[2]
OS_ENVIRON = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def command(*arguments: str, launcher: Sequence[str] = (), **environment: str) -> subprocess.CompletedProcess:
    """`python run.py ...` in a process of its own, or in a launcher's, from the project's root."""
    return subprocess.run(
        [sys.executable, *launcher, "run.py", *arguments],
        cwd=ROOT,
        env=OS_ENVIRON | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def composed(conf, results_dir, *overrides):
    """The configuration that `python run.py OVERRIDES` composes, with Hydra's part where Hydra keeps it."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        own = [f"hydra.searchpath=[file://{conf}]", "suite=tiny", f"results_dir={results_dir}", "wandb.mode=disabled"]
        untrained = {f"router={name}" for name in ("oracle", "knn", "prototypes", "mass", "dawin")} & {*overrides}
        short = [] if untrained else ["router.model.epochs=5"]
        cfg = compose("config", [*own, *short, *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def rows_of(results, **wanted):
    return [row for row in store.read(results) if all(row[key] == value for key, value in wanted.items())]


@cache
def read(*overrides: str) -> tuple[dict, dict]:
    """A composed configuration of the project's own, and the chosen file of each group."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    choices = HydraConfig.get().runtime.choices
    names = {"method": choices["method"], "shared": choices["method@shared"], "router": choices["router"]}
    return OmegaConf.to_container(OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"]), resolve=True), names


def job(config: dict, names: dict) -> Job:
    return configured(config | {"suite": narrowed(config["suite"])}, names)


def planned(*overrides: str) -> Job:
    return job(*read(*overrides))
