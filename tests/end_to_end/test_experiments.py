"""The first run of every grid of an experiment composes and plans, and each of its choices is a file.

That needs neither the hub nor anybody's data.
"""

from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from twinbench.plan.job import Job, configured
from twinbench.plan.suite import merged, narrowed

CONF = Path(__file__).parents[2] / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
SOME = 8  # of a grid that is planned whole for another experiment each eighth block is planned: a block takes a second


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_grid_plans(experiment, tmp_path, monkeypatch):
    for task in ("sick", "bbq", "trec", "ag_news", "wnli"):  # those that are read from a folder alone
        (tmp_path / task).mkdir()
        pd.DataFrame({"label": [0]}).to_parquet(tmp_path / task / "test.parquet")
    monkeypatch.setenv("TWINBENCH_DATA", str(tmp_path))
    parser, planned = OverridesParser.create(), []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        blocks = compose("config", [f"experiment={experiment}"], return_hydra_config=True).hydra.sweeper.blocks
        whole = experiment == first_of_its_grid(experiment)
        for number, block in enumerate(blocks):
            (jobs,) = BasicSweeper.split_arguments(
                parser.parse_overrides([f"{key}={values}" for key, values in block.items()]), None
            )
            assert len(set(map(tuple, jobs))) == len(jobs)
            for key, value in (override.split("=", 1) for job in jobs for override in job):
                group = CONF / key.partition("@")[0]
                assert not group.is_dir() or (group / f"{value}.yaml").exists(), f"{key}={value}"
            if whole or number % SOME == 0:
                suite, found = planned_job(experiment, jobs[0])  # a second of work, so not each of them
                planned.append(found)
    assert len({job.run_id for job in planned}) >= len(planned) / 2
    divided = any("individual" in block.get("method", "") for block in blocks)
    assert divided or any(task not in merged(suite) for task in suite["tasks"]), "nothing to normalize by"


def first_of_its_grid(experiment: str) -> str:
    """The first experiment with the blocks of the same file of ``conf/grid``; itself where its blocks are its own."""

    def grid(name: str) -> str | None:
        defaults = OmegaConf.load(CONF / "experiment" / f"{name}.yaml").get("defaults", [])
        return next((entry["/grid"] for entry in defaults if "/grid" in entry), None)

    own = grid(experiment)
    return experiment if own is None else next(name for name in EXPERIMENTS if grid(name) == own)


def pinned(suite: object) -> object:
    """The suite at some commit, where its file leaves the commit to the user."""
    if not isinstance(suite, dict):
        return suite
    return {key: "0" * 40 if (key, value) == ("revision", None) else pinned(value) for key, value in suite.items()}


def planned_job(experiment: str, overrides: list[str]) -> tuple[dict, Job]:
    cfg = compose("config", [f"experiment={experiment}", *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    choices = HydraConfig.get().runtime.choices
    names = {"method": choices["method"], "shared": choices["method@shared"], "router": choices["router"]}
    config = OmegaConf.to_container(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]), resolve=True)
    suite = pinned(narrowed(config["suite"]))
    return suite, configured(config | {"suite": suite}, names)
