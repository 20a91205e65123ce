"""Tasks whose experts are not merged, or that have none: scored under their own or another task's head."""

import pytest
import torch
from omegaconf import OmegaConf

from support.commands import composed, rows_of
from support.family import CLASSES, bench, write_suite
from twinbench import prepare
from twinbench.command import run
from twinbench.plan import identity
from twinbench.plan.job import configured
from twinbench.plan.suite import narrowed
from twinbench.records import provenance, store
from twinbench.system.cached import made
from twinbench.workloads.classification.open import classifier

SEEN = ["letters", "size"]


@pytest.fixture
def conf(family, tmp_path):
    """The tiny suite with a task without an expert, `hues`, whose rows are those of `colours`."""
    write_suite(family, tmp_path / "conf", merged=SEEN)
    path = tmp_path / "conf" / "suite" / "tiny.yaml"
    suite = OmegaConf.load(path)
    suite.tasks.hues = {**suite.tasks.colours, "head": "colours"}
    OmegaConf.save(suite, path)
    return tmp_path / "conf"


def test_unseen_tasks_are_scored_by_what_is_merged(conf, tmp_path):
    for method in ("average", "twin_merging"):
        assert run(composed(conf, tmp_path, f"method={method}")).status == "ok"
        rows = {row["task"]: row for row in rows_of(tmp_path, method=method) if row["primary"]}
        assert list(rows) == [*CLASSES, "hues"]
        assert rows["hues"]["value"] == rows["colours"]["value"], "the same rows under the same head"
    routed = [row for row in rows_of(tmp_path, method="twin_merging") if row["metric"].startswith("rout")]
    assert {row["metric"] for row in routed if row["task"] == "hues"} == {f"routed_to/{task}" for task in SEEN}
    assert {row["task"] for row in routed if row["metric"] == "router_accuracy"} == set(SEEN)


def test_only_the_merged_experts_are_in_the_weights(conf, tmp_path):
    cfg = composed(conf, tmp_path, "method=average")
    assert run(cfg).status == "ok"
    suite = prepare.opened(narrowed(OmegaConf.to_container(cfg, resolve=True)["suite"]), "cpu")
    assert list(suite.experts) == SEEN and set(suite.heads) == {*CLASSES, "hues"}
    mean = {n: sum(suite.experts[task][n] for task in SEEN) / len(SEEN) for n in suite.base}
    texts = suite.tasks["hues"].splits["test"]["text"].tolist()
    with torch.inference_mode(), bench(suite).holding(mean) as module:
        batch = suite.tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
        wanted = classifier(suite, "hues", module)(**batch).logits.argmax(1)
    found = store.predictions(tmp_path, rows_of(tmp_path, method="average")[0]["run_id"])
    assert found[found["task"] == "hues"]["prediction"].tolist() == wanted.tolist()


def test_what_is_merged_is_part_of_the_identity(family, conf, tmp_path):
    def suite_id(folder, *overrides):
        cfg = composed(folder, tmp_path, "method=average", *overrides)
        return configured(OmegaConf.to_container(cfg, resolve=True), NAMES).suite_id

    narrow = suite_id(conf)
    assert narrow != suite_id(conf, "suite.merged=[letters]") != suite_id(conf, "suite.merged=null") != narrow
    write_suite(family, tmp_path / "all", merged=list(CLASSES))
    assert suite_id(tmp_path / "all") == suite_id(family / "conf"), "naming them all changes nothing"


def test_how_experts_were_trained_is_told_of_those_that_there_are(conf, tmp_path, monkeypatch):
    monkeypatch.setenv("TWINBENCH_CACHE", str(tmp_path / "cache"))
    suite = OmegaConf.to_container(composed(conf, tmp_path, "method=average"), resolve=True)["suite"]
    suite |= {"checkpoints": None, "finetune": {"epochs": 1}}
    assert not provenance.trained(suite)
    for task in CLASSES:
        made(identity.expert_folder(suite, task), lambda part: (part / "training.json").write_text('{"curve": []}'))
    assert provenance.trained(suite)
    tasks = prepare.read(suite)
    assert list(provenance.training(suite, tasks)) == list(CLASSES)


NAMES = {"method": "average", "shared": "task_arithmetic", "router": "mlp"}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method=individual"], "method=individual goes by the known task, and no expert of colours, hues is merged"),
        (["method=twin_merging", "router=oracle"], "goes by the known task"),
        (["method=average", "protocol=blind"], "protocol=blind, and no expert"),
        (["method=average", "protocol=paper"], "protocol=paper, and no expert"),
        (["method=average", "suite.merged=[]"], "must list at least one task"),
        (["method=average", "suite.merged=[hues]"], "unknown task in suite.merged 'hues'"),
        (["method=average", "suite.tasks.hues.head=colour"], "did you mean 'colours'"),
    ],
)
def test_what_cannot_be_scored_is_refused(conf, tmp_path, overrides, words):
    with pytest.raises(ValueError, match=words):
        run(composed(conf, tmp_path, *overrides))


def test_a_head_for_other_classes_is_refused(conf, tmp_path):
    overrides = ["method=average", "suite.tasks.hues.classes=[red,blue,green]"]
    assert run(composed(conf, tmp_path, *overrides)).status == "failed"
    (row,) = store.read(tmp_path)
    assert "task hues: the head of colours gives" in row["error"]
