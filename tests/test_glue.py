"""The GLUE tasks: one set of files for the hub's layout and for a folder of parquet files."""

import os
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from twinbench.assets import fetch
from twinbench.task import load_task

CONF = Path(__file__).parent.parent / "conf"
TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")  # the paper's, in the order of its table
PRIMARY = {"cola": "matthews", "mrpc": "accuracy_f1", "qqp": "accuracy_f1", "stsb": "pearson_spearman"}
OFFICIAL = {"cola": 1043, "sst2": 872, "mrpc": 408, "stsb": 1500, "mnli": 9815, "qnli": 5463, "rte": 277}  # validation


@pytest.fixture(scope="module")
def suite() -> dict:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("config", ["suite=glue_minilm"]), resolve=True)["suite"]


def test_the_suite_has_the_papers_tasks_and_metrics(suite):
    assert tuple(suite["tasks"]) == TASKS
    assert {
        name: task["metrics"][0] for name, task in suite["tasks"].items() if task["metrics"][0] != "accuracy"
    } == PRIMARY
    for name, task in suite["tasks"].items():
        assert task["sources"]["folder"]["hub"] == "nyu-mll/glue" and len(task["sources"]["folder"]["revision"]) == 40
        assert task["data"]["test"].startswith("validation"), "GLUE's own test has no labels"
        assert bool(task["data"].get("also")) == (name == "mnli")


def test_real_data_fits_the_task_files(suite):
    if not os.environ.get("TWINBENCH_DATA"):
        pytest.skip("TWINBENCH_DATA is not set")
    for name, spec in suite["tasks"].items():
        sources = {key: fetch(source) for key, source in spec["sources"].items()}
        rest = {key: value for key, value in spec.items() if key not in ("sources", "data", "finetune")}
        task = load_task(instantiate(spec["data"]), sources, name=name, **rest)
        assert len(task.splits["test"]) == OFFICIAL.get(name, 1000)
        assert len(task.splits["train"]) >= 5 * len(task.splits["validation"])
        if task.classes:
            assert set(task.labels("test")) == set(range(len(task.classes)))
        pairs = {split: set(map(tuple, frame[list(task.columns)].to_numpy())) for split, frame in task.splits.items()}
        assert len(pairs["validation"] & pairs["train"]) <= 0.02 * len(pairs["validation"]), "GLUE repeats a few rows"
        assert ("validation_mismatched_1k" in task.splits) == (name == "mnli")
