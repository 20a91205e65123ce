"""An exported folder, loaded by plain transformers and PEFT with the very lines of its README, gives our logits."""

import json
import re
import subprocess
import sys

import pytest
import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from transformers import AutoModel, AutoModelForSequenceClassification, pipeline

from support.commands import OS_ENVIRON, ROOT, composed
from support.family import CLASSES
from twinbench import benchmark, prepare
from twinbench.command import run
from twinbench.merging.merged import with_route
from twinbench.plan.preflight import planned
from twinbench.records import store
from twinbench.routing.attach import attach
from twinbench.routing.features import hidden_states
from twinbench.workloads.classification.open import classifier
from twinbench.workloads.classification.score import forward

ROWS = range(0, 31, 6)  # test rows that are compared
TWIN = ["method=twin_merging", "method.rank_ratio=0.2"]


@pytest.fixture
def export(family, tmp_path):
    """Run and export a configuration in this process; returns the folder and what twinbench measured it with."""

    def start(*overrides):
        folder = tmp_path / "exported"
        cfg = composed(family / "conf", tmp_path / "results", f"export={folder}", *overrides)
        start.status = run(cfg).status
        return folder, built(cfg)

    start.results = tmp_path / "results"
    return start


def built(cfg):
    """The bench, the merged model and the router."""
    cfg.export = None  # it is there already
    job = planned(cfg, HydraConfig.get().runtime.choices)
    own = prepare.workbench(job, 10**9)
    return own, *benchmark.built(own, prepare.setting(job, own))


@torch.inference_mode()
def logits_of(own, task, state=None, merged=None, weights=None):
    """Our own forward of the compared rows: of one state dict, or of routed exclusive parts."""
    with own.holding(merged.shared if state is None else state) as module:
        model, rows = classifier(own.suite, task, module), list(ROWS)
        if weights is None:
            return forward(own, model, task, "test", rows)
        with attach(module, merged) as routes:
            return forward(own, model, task, "test", rows, (routes, weights))


def features_of(own, task, merged, layer=None, pool="mean"):
    """What the router reads of the compared rows."""
    with own.holding(merged.shared):
        return hidden_states(own, task, "test", layer=layer, pool=pool)[list(ROWS)]


def readme_blocks(folder):
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)


def run_block(block, suite, task, monkeypatch, folder):
    """Execute a README block as it stands, but for the task and the text, on every compared row."""
    monkeypatch.chdir(folder)
    assert "twinbench" not in block
    found = []
    for row in ROWS:
        text = suite.tasks[task].splits["test"]["text"][row]
        lines = block.replace('task = ".", "letters"', f'task = ".", "{task}"').replace('"a text"', repr(text))
        scope = {}
        exec(lines, scope)
        found.append(scope)
    return found


def stacked(scopes):
    return torch.cat([scope["logits"] for scope in scopes])


@pytest.mark.parametrize("method", [["method=average"], ["method=expert", "method.task=colours"]])
def test_a_static_merge_is_a_normal_model_for_every_task(export, monkeypatch, method):
    folder, (own, merged, router) = export(*method)
    assert router is None
    (block,) = readme_blocks(folder)
    for task, classes in CLASSES.items():
        expected = logits_of(own, task, merged=merged)
        torch.testing.assert_close(
            stacked(run_block(block, own.suite, task, monkeypatch, folder)), expected, atol=1e-5, rtol=0
        )
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder / "tasks" / task, output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert list(model.config.id2label.values()) == (classes or ["LABEL_0"])
        shard = folder / "tasks" / task / "model-00001-of-00002.safetensors"
        assert shard.samefile(folder / "model.safetensors"), "the shared weights are on the disk once"
        for name in ("tokenizer.json", "tokenizer_config.json"):
            theirs = (own.suite.base_folder / name).read_bytes()
            assert (folder / "tasks" / task / name).read_bytes() == theirs == (folder / name).read_bytes()
    bare, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == {"pooler.dense.weight", "pooler.dense.bias"}, "they belong to the heads"
    texts = [own.suite.tasks["size"].splits["test"]["text"][row] for row in ROWS]
    with torch.inference_mode():
        means = [bare(**own.suite.tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1) for text in texts]
    torch.testing.assert_close(torch.cat(means), features_of(own, "size", merged), atol=1e-5, rtol=0)


def test_an_exported_task_serves_in_a_pipeline(export):
    folder, (own, merged, _) = export("method=ties")
    served = pipeline("text-classification", str(folder / "tasks" / "colours"))
    texts = [own.suite.tasks["colours"].splits["test"]["text"][row] for row in ROWS]
    expected = logits_of(own, "colours", merged=merged).argmax(1)
    assert [answer["label"] for answer in served(texts)] == [CLASSES["colours"][position] for position in expected]


@pytest.mark.parametrize("shared", [[], ["method@shared=expert", "shared.task=letters"]])
def test_the_known_tasks_expert_is_the_shared_model_and_a_lora_adapter(export, monkeypatch, shared):
    pytest.importorskip("peft", reason="adapters are loaded back by PEFT")
    folder, (own, merged, router) = export(*TWIN, *shared, "router=oracle")
    assert router is None
    (block,) = readme_blocks(folder)
    for task in CLASSES:
        route = [float(expert == task) for expert in merged.exclusive]
        expected = logits_of(own, task, with_route(merged, route))
        got = stacked(run_block(block, own.suite, task, monkeypatch, folder))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
        if not (shared and task == "letters"):
            assert (expected - logits_of(own, task, merged=merged)).abs().max() > 1e-3, "the expert matters here"
    config = json.loads((folder / "experts" / "colours" / "adapter_config.json").read_text())
    ranks = {expert.right.shape[0] for expert in merged.exclusive["colours"].values() if hasattr(expert, "right")}
    assert {config["r"], *config["rank_pattern"].values()} == ranks == {1, 3}


READS = {"mean": None, "segments": 1, "first": None, "last": None}  # a layer


@pytest.mark.parametrize("pool", READS)
@pytest.mark.parametrize("changes", [[], ["router.use.top_k=2"]])
def test_the_router_weighs_adapters_as_it_does_here(export, monkeypatch, changes, pool):
    pytest.importorskip("peft", reason="adapters are loaded back by PEFT")
    reads = [f"router.features.pool={pool}", f"router.features.layer={READS[pool] or 'null'}"]
    folder, (own, merged, router) = export(*TWIN, *changes, *reads)
    _, block = readme_blocks(folder)
    for task in CLASSES:
        weights = router(features_of(own, task, merged, READS[pool], pool))
        assert 0 < weights.min(1).values.max() < 1 or changes, "a mixture, not one expert"
        scopes = run_block(block, own.suite, task, monkeypatch, folder)
        torch.testing.assert_close(torch.tensor([scope["weights"] for scope in scopes]), weights, atol=1e-5, rtol=0)
        expected = logits_of(own, task, merged=merged, weights=weights)
        torch.testing.assert_close(stacked(scopes), expected, atol=1e-4, rtol=0)


def test_under_blind_the_exported_router_chooses_the_head(export, monkeypatch):
    folder, (own, merged, router) = export("method=average", "protocol=blind")
    _, block = readme_blocks(folder)
    weights = router(features_of(own, "size", merged))
    for at, scope in enumerate(run_block(block, own.suite, "size", monkeypatch, folder)):
        assert scope["task"] == list(CLASSES)[weights[at].argmax()]
        assert scope["logits"].shape == (1, len(CLASSES[scope["task"]] or [0]))


def test_the_card_says_what_it_is_and_how_it_scored(export, family):
    run(composed(family / "conf", export.results, "method=individual"))
    folder, _ = export(*TWIN)
    text = (folder / "README.md").read_text()
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["library_name"] == "transformers"
    assert {"twinbench", "twin_merging", "peft"} <= set(header["tags"])
    rows = store.read(export.results)
    own = [row for row in rows if row["method"] == "twin_merging" and row["primary"]]
    bound = {row["task"]: row["value"] for row in rows if row["method"] == "individual" and row["primary"]}
    assert len(own) == len(CLASSES)
    for row in own:
        (line,) = re.findall(rf"^\| {row['task']} \| {row['metric']} \| 31 .*$", text, flags=re.MULTILINE)
        assert f"| {row['value']:.4f} | {bound[row['task']]:.4f} |" in line
        if bound[row["task"]] > 0:
            assert f"{100 * row['value'] / bound[row['task']]:.1f}" in line
    assert own[0]["run_id"] in text and own[0]["base"] in text and '"rank_ratio": 0.2' in text
    for task in CLASSES:
        (change,) = re.findall(rf"^\| {task} \| 31 \|.* (\S+) \|$", text, flags=re.MULTILINE)
        assert float(change) > 0, "the vectors' effect is measured"
    assert str(folder.parent) not in text + (folder / "config.json").read_text(), "no path of this machine"


def test_an_export_does_not_change_the_run_and_does_not_measure_it_again(export, family):
    assert run(composed(family / "conf", export.results, "method=average")).status == "ok"
    folder, _ = export("method=average")
    assert export.status == "skipped"
    assert len(list((export.results / "records").glob("*.jsonl"))) == 1
    assert (folder / "README.md").exists()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["exported", "results"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method=individual"], "its experts are models already"),
        (["method=twin_merging", "method.compression=none", "method.rank_ratio=null"], "needs method.compression=svd"),
        (["method=average", "protocol=paper"], "every task's own biases"),
        (["method=twin_merging", "router.features.source=base"], "router of the shared expert's hidden states"),
        (["method=twin_merging", "router.features.characters=64"], "router of the shared expert's hidden states"),
        (["method=twin_merging", "router.use.minimum_risk=true"], "minimum_risk=false"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_it_runs(export, overrides, words):
    with pytest.raises(ValueError, match=words):
        export(*overrides)
    assert store.read(export.results) == []


def test_a_folder_with_something_in_it_is_refused_before_anything_runs(export, tmp_path):
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        export("method=average")
    assert store.read(export.results) == []
    assert [path.name for path in (tmp_path / "exported").iterdir()] == ["mine.txt"]
    (tmp_path / "exported" / "mine.txt").unlink()
    folder, _ = export("method=average")
    assert (folder / "model.safetensors").exists(), "an empty folder will do"


def test_a_disk_that_fills_up_leaves_no_folder(family, tmp_path):
    results, folder = tmp_path / "results", tmp_path / "out" / "exported"
    run(composed(family / "conf", results, "method=average"))
    script = (
        "import resource, runpy\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "runpy.run_path('run.py', run_name='__main__')\n"
    )
    own = ["--config-dir", str(family / "conf"), "suite=tiny", "method=average", "wandb.mode=disabled"]
    done = subprocess.run(
        [sys.executable, "-c", script, *own, f"results_dir={results}", f"export={folder}"],
        cwd=ROOT,
        env=OS_ENVIRON,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(folder.parent.iterdir()) == [], "neither the folder nor a part of it"
    assert {row["status"] for row in store.read(results)} == {"ok"}, "the finished record stays"
