"""run.py end to end on a tiny real family: records, protocols, resuming, mistakes, and a process that is killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
import xxhash
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

from support.commands import OS_ENVIRON, ROOT, command, composed, rows_of
from support.family import CLASSES, edit_weights, frame, tokenizer, write_suite
from support.methods import YAMLS
from twinbench import command as commands
from twinbench import prepare
from twinbench.command import run
from twinbench.records import store
from twinbench.report import blocks, tables
from twinbench.report.make import make
from twinbench.system.ending import Terminated, interrupt_first
from twinbench.tasks.metrics import score


@pytest.fixture
def bench(family, tmp_path):
    """Run a configuration in this process; returns its status."""

    def start(*overrides, conf=family / "conf"):
        return run(composed(conf, tmp_path, *overrides)).status

    start.results = tmp_path
    return start


def primary(results, **wanted):
    return {row["task"]: row["value"] for row in rows_of(results, primary=True, **wanted)}


def test_a_plan_tells_runs_apart_that_differ_in_their_router(bench, capsys):
    for layer in (1, 2):
        bench("method=twin_merging", f"router.features.layer={layer}", "plan=true")
    first, second = capsys.readouterr().out.splitlines()
    assert first.split(maxsplit=3)[3] == second.split(maxsplit=3)[3].replace("layer=2", "layer=1")
    assert "router.features.layer=1" in first and "router.features.layer=2" in second


def test_methods_of_one_name_and_other_code_do_not_share_a_merge(bench, monkeypatch):
    code = "from twinbench.merging.merged import Merged\n\n\ndef merge(base, experts):\n    return Merged(base)\n"
    (bench.results / "base_alone.py").write_text(code)
    monkeypatch.syspath_prepend(bench.results)
    for overrides in ([], ["method._target_=base_alone.merge", "allow=[base_alone]"]):
        assert bench("method=average", *overrides) == "ok"
    average, base = (
        primary(bench.results, run_id=run_id) for run_id in {r["run_id"]: 0 for r in rows_of(bench.results)}
    )
    assert average["size"] != base["size"]


def test_a_stretched_task_vector_is_merged_as_that(bench):
    """Twice a task vector at half the scaling is the expert itself, where the others are zero times theirs."""
    none = "suite.scaled={letters: 2, colours: 0, size: 0}"
    assert bench("method=task_arithmetic", "method.scaling=0.5", none) == "ok"
    assert bench("method=expert", "method.task=letters") == "ok"
    merged, own = primary(bench.results, method="task_arithmetic"), primary(bench.results, method="expert")
    assert merged["letters"] == pytest.approx(own["letters"]) and merged["size"] == pytest.approx(own["size"], abs=1e-5)


def test_a_run_leaves_complete_records_and_predictions(bench, capsys):
    assert bench("method=twin_merging") == "ok"
    rows = store.read(bench.results)
    assert {row["task"] for row in rows} == set(CLASSES)
    for row in rows:
        assert row["status"] == "ok"
        assert row["method"] == "twin_merging"
        assert row["params"]["shared"] == {"method": "task_arithmetic", "scaling": 0.3}
        assert row["router"]["name"] == "mlp"
        assert row["n"] == 31
        assert min(row[key] for key in ("shared_bytes", "exclusive_bytes", "router_bytes", "peak_memory_bytes")) > 0
        assert row["exclusive_kind"] == "low-rank + dense vectors"
        seconds = ("merge_seconds", "router_seconds", "route_seconds", "eval_seconds")
        assert min(row[key] for key in seconds) > 0
        assert 0 <= row["others_share"] <= 1
    for task in CLASSES:
        routed = [row["value"] for row in rows if row["task"] == task and row["metric"].startswith("routed_to/")]
        assert len(routed) == len(CLASSES)
        assert sum(routed) == pytest.approx(1)
    predictions = store.predictions(bench.results, rows[0]["run_id"])
    for task, group in predictions.groupby("task"):
        kept = [
            row for row in rows if row["task"] == task and row["metric"] in ("accuracy", "f1", "pearson", "spearman")
        ]
        assert kept
        for row in kept:
            assert row["value"] == score(row["metric"], group["label"].to_numpy(), group["prediction"].to_numpy())
    (kept,) = (bench.results / "predictions").iterdir()
    for bare in ("", " without predictions, so no interval"):
        capsys.readouterr()
        assert bench("method=twin_merging") == "skipped"
        assert f"it has a record{bare} (force=true runs it again)" in capsys.readouterr().out
        kept.unlink(missing_ok=True)


@pytest.mark.parametrize("head", ["pooler", "classifier"])
def test_an_average_keeps_each_tasks_own_head(bench, family, tmp_path, head):
    """The predictions of plain transformers: the mean of what is merged, under the task's own pooler and classifier."""
    write_suite(family, tmp_path / "conf", head=head)
    assert bench("method=average", conf=tmp_path / "conf") == "ok"
    found = store.predictions(bench.results, store.read(bench.results)[0]["run_id"])
    experts = {task: load_file(family / "experts" / task / "model.safetensors") for task in CLASSES}
    for task in CLASSES:
        model = BertForSequenceClassification.from_pretrained(family / "experts" / task).eval()
        for name, parameter in model.bert.named_parameters(prefix="bert"):
            if head == "classifier" or "pooler" not in name:
                parameter.data = sum(state[name] for state in experts.values()) / len(experts)
        texts = pd.read_parquet(family / "data" / task / "test.parquet")["text"].tolist()
        batch = tokenizer()(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
        with torch.inference_mode():
            logits = model(**batch).logits
        wanted = logits.argmax(1) if CLASSES[task] else logits[:, 0]
        assert found[found["task"] == task]["prediction"].tolist() == pytest.approx(wanted.tolist(), abs=1e-5)


def unreachable(*_):
    raise OSError("no network")


def test_how_experts_were_trained_comes_into_the_results_and_its_report(bench, family, tmp_path, monkeypatch):
    monkeypatch.setenv("TWINBENCH_CACHE", str(tmp_path / "cache"))
    recipe = {"epochs": 3, "batch_size": 8, "lr": 5e-3, "weight_decay": 0.0, "warmup": 0.1, "freeze": [], "seed": 0}
    write_suite(family, tmp_path / "conf", checkpoints=None, finetune=recipe)
    assert bench("method=average", conf=tmp_path / "conf") == "ok"
    rows = store.read(bench.results)
    for row in rows:
        assert row["data"].startswith(f"local folder {row['task']}, sha256 ")
    (file,) = (bench.results / "experts").iterdir()
    assert file.stem == rows[0]["suite_id"]
    assert str(tmp_path) not in file.read_text() and str(family) not in file.read_text()
    found = store.experts(bench.results, file.stem)
    assert list(found) == list(CLASSES)
    for task, expert in found.items():
        history = json.loads((tmp_path / "cache" / "experts" / expert["expert"] / "training.json").read_text())
        assert {key: expert[key] for key in history} == history
        written = tmp_path / "cache" / "experts" / expert["expert"] / "model.safetensors"
        assert expert["weights"] == f"xxh3 {xxhash.xxh3_128(written.read_bytes()).hexdigest()}"
        told = {row["expert"] for row in rows if row["task"] == task}
        assert told == {f"fine-tuned, {expert['weights']}"}
        assert expert["rows"] == {"train": 40, "validation": 20}
        assert expert["data"] == next(row["data"] for row in rows if row["task"] == task)
    written = file.read_bytes(), file.stat().st_mtime_ns
    assert bench("method=pretrained", conf=tmp_path / "conf") == "ok"
    assert (file.read_bytes(), file.stat().st_mtime_ns) == written, "written once"
    assert bench("method=average", "split=validation", "suite.limit=2", conf=tmp_path / "conf") == "ok"
    (other,) = set((bench.results / "experts").iterdir()) - {file}
    assert json.loads(other.read_text()) == json.loads(written[0]), "a limit on scored rows is none on a training"
    file.unlink()
    assert bench("method=average", conf=tmp_path / "conf") == "skipped"
    assert file.read_bytes() == written[0], "records of before the file was kept get it as well"
    file.unlink()
    monkeypatch.setattr(prepare, "read", unreachable)
    assert bench("method=average", conf=tmp_path / "conf") == "skipped", "what is done stays done without its data"
    assert not file.exists()
    file.write_bytes(written[0])
    made = make(bench.results, suite="tiny")
    last = made["tables"]["experts_learned"].set_index("task")["last"]
    final = {task: [e for e in expert["curve"] if "eval_loss" in e][-1] for task, expert in found.items()}
    assert last["letters"] == 100 * final["letters"]["eval_accuracy"]
    assert last["size"] == 100 * final["size"]["eval_pearson_spearman"]
    assert made["figures"]["experts_learning"].exists()


def test_a_skipped_run_needs_no_expert_and_a_failed_one_has_no_data(bench, family):
    assert bench("method=average") == "ok"
    assert bench("method=average") == "skipped"
    assert not (bench.results / "experts").exists(), "these experts were trained elsewhere"
    assert bench("method=ties", "method.density=7") == "failed"
    assert [row["data"] for row in rows_of(bench.results, status="failed")] == [None]


def test_individual_scores_are_the_experts_own(bench, family):
    """Scored here by plain transformers, one text at a time."""
    import torch

    bench("method=individual")
    found = primary(bench.results)
    for task, classes in CLASSES.items():
        model = BertForSequenceClassification.from_pretrained(family / "experts" / task).eval()
        test = pd.read_parquet(family / "data" / task / "test.parquet")
        with torch.inference_mode():
            logits = [model(**tokenizer()(text, return_tensors="pt")).logits[0].numpy() for text in test["text"]]
        given = np.array([row.argmax() if classes else row[0] for row in logits])
        metric = "accuracy" if classes else "pearson_spearman"
        assert found[task] == pytest.approx(score(metric, test["label"].to_numpy(), given), abs=1e-5)


def test_protocols(bench):
    for protocol in ("strict", "paper", "blind"):
        assert bench("method=individual", f"protocol={protocol}") == "ok"
        assert bench("method=average", f"protocol={protocol}") == "ok"
    strict, paper = (primary(bench.results, method="individual", protocol=p) for p in ("strict", "paper"))
    assert strict == paper, "the known task's expert is whole under both"
    assert primary(bench.results, method="average", protocol="strict") != primary(
        bench.results, method="average", protocol="paper"
    ), "under paper the biases are the expert's own"
    blind = rows_of(bench.results, method="average", protocol="blind")
    predictions = store.predictions(bench.results, blind[0]["run_id"])
    lost = predictions[predictions["route"] != predictions["task"]]
    accuracy = {row["task"]: row["value"] for row in blind if row["metric"] == "router_accuracy"}
    for task, group in predictions.groupby("task"):
        assert accuracy[task] == pytest.approx((group["route"] == task).mean())
    assert (lost[lost["task"] != "size"]["prediction"] == -1).all()
    assert lost[lost["task"] == "size"]["prediction"].nunique() <= 1
    kept = predictions[predictions["route"] == predictions["task"]].set_index(["task", "row"])["prediction"]
    static = rows_of(bench.results, method="average", protocol="strict")[0]["run_id"]
    strict = store.predictions(bench.results, static).set_index(["task", "row"])["prediction"]
    pd.testing.assert_series_equal(kept, strict.loc[kept.index])


def test_what_does_not_change_the_number_does_not_change_the_run(bench):
    assert bench("method=ties") == "ok"
    for same in ("seed=7", "router=oracle", "device=cpu", "batch_size=3", "shared.scaling=0.9", "router.model.lr=1e-3"):
        assert bench("method=ties", same) == "skipped", same
    for other in ("method.density=0.5", "protocol=paper", "method.scope=tensor"):
        assert bench("method=ties", other) == "ok", other
    assert bench("method=ties", "force=true") == "ok"
    assert len(list((bench.results / "records").glob("*.jsonl"))) == 5
    runs = {row["run_id"] for row in store.read(bench.results)}
    assert len(runs) == 4, "a forced run is the same run, measured again"
    assert len({row["run_id"] for row in store.latest(store.read(bench.results))}) == 4


def test_a_run_of_experts_that_were_trained_anew_runs_again_and_says_why(bench, family, tmp_path, monkeypatch, capsys):
    """As a cache looks that another machine has filled: the same recipe, other weights."""
    monkeypatch.setenv("TWINBENCH_CACHE", str(tmp_path / "cache"))
    recipe = {"epochs": 1, "batch_size": 8, "lr": 5e-3, "weight_decay": 0.0, "warmup": 0.1, "freeze": [], "seed": 0}
    write_suite(family, tmp_path / "conf", checkpoints=None, finetune=recipe)
    assert bench("method=average", conf=tmp_path / "conf") == "ok"
    some = "method=average", "suite.scored=[size]", "suite.name=some"
    assert bench(*some, conf=tmp_path / "conf") == "ok"
    (folder,) = (tmp_path / "cache" / "experts").glob("letters-*")
    edit_weights(folder, lambda state: {name: 2 * weight for name, weight in state.items()})
    weights, manifest = (folder / "model.safetensors").read_bytes(), json.loads((folder / ".manifest").read_text())
    digest = xxhash.xxh3_128(weights).hexdigest()
    (folder / ".manifest").write_text(json.dumps(manifest | {"model.safetensors": [len(weights), digest]}))
    capsys.readouterr()
    (first,) = {row["time"] for row in rows_of(bench.results, suite="tiny")}
    for again, status in (("plan=true", "planned"), ("plan=false", "ok")):
        assert bench("method=average", again, conf=tmp_path / "conf") == status
        assert f": its experts have been trained anew since the record of {first}\n" in capsys.readouterr().out
    assert bench("method=average", conf=tmp_path / "conf") == "skipped"
    experts = {row["expert"] for row in store.latest(store.read(bench.results)) if row["task"] == "letters"}
    assert experts == {f"fine-tuned, xxh3 {digest}"}
    assert bench(*some, conf=tmp_path / "conf") == "ok", "this expert is merged, too, and not scored"
    assert {row["unscored"]["letters"] for row in rows_of(bench.results, suite="some")} > experts
    assert {row["suite"] for row in store.by_experts(store.read(bench.results))[1]} == {"tiny", "some"}
    assert bench(*some, conf=tmp_path / "conf") == "skipped"
    assert bench("method=dare", conf=tmp_path / "conf") == "ok"
    (folder / ".manifest").unlink()
    assert bench("method=average", conf=tmp_path / "conf") == "skipped", "what is damaged is no other expert"
    shutil.rmtree(tmp_path / "cache" / "experts")
    assert bench("method=average", conf=tmp_path / "conf") == "skipped", "a record needs no cache"
    monkeypatch.setattr(commands, "_bench", None)  # as in another process
    assert bench("method=ties", conf=tmp_path / "conf") == "ok", "this one trains them"
    capsys.readouterr()
    summary = make(bench.results, suite="tiny")["summary"]
    assert "Left out, measured with the experts of an earlier training: 1 of the runs, of dare." in summary
    shutil.rmtree(tmp_path / "cache" / "experts")
    with pytest.raises(ValueError, match=r"the experts letters, .* are no longer in the cache; run it again"):
        bench("method=magmax", conf=tmp_path / "conf")
    monkeypatch.setattr(commands, "_bench", None)
    export = f"export={tmp_path / 'exported'}"
    assert bench("method=average", export, conf=tmp_path / "conf") == "ok", "what is exported is measured"
    assert bench("method=dare", conf=tmp_path / "conf") == "ok"
    assert "Left out" not in make(bench.results, suite="tiny")["summary"]


def test_a_changed_method_runs_again_and_says_why(bench, capsys):
    """As a record looks that an older source of the method has left."""
    assert bench("method=dare") == "ok"
    (file,) = (bench.results / "records").iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    older = [row | {"run_id": "0" * 12, "source": "1" * 12, "time": "2026-01-01"} for row in rows]
    file.rename(file.with_name("0.jsonl")).write_text("".join(json.dumps(row) + "\n" for row in older))
    capsys.readouterr()
    why = ": its method's source has changed since the record of 2026-01-01\n"
    for again in ("plan=true", "plan=false"):
        assert bench("method=dare", again) == ("planned" if again == "plan=true" else "ok")
        assert capsys.readouterr().out.partition(" ")[2].count(why) == 1
    assert {row["source"] for row in store.read(bench.results)} == {"1" * 12, rows[0]["source"]}
    for other in ("method=dare", "method.density=0.5", "seed=1", "protocol=paper", "method=ties"):
        bench("method=dare", other, "plan=true")
    assert "has changed" not in capsys.readouterr().out, "another configuration, or one that is done"
    for record in (bench.results / "records").iterdir():
        record.unlink()
    store.write(bench.results, [{key: value for key, value in row.items() if key != "source"} for row in older])
    assert bench("method=dare", "plan=true") == "planned"
    assert "has changed" not in capsys.readouterr().out, "a record that names no source says nothing of it"


def test_other_data_is_another_suite(bench, family, tmp_path):
    assert bench("method=average") == "ok"
    shutil.copytree(family, tmp_path / "family")
    frame("letters", 31, seed=77).to_parquet(tmp_path / "family" / "data" / "letters" / "test.parquet")
    write_suite(tmp_path / "family", tmp_path / "conf")
    assert bench("method=average", conf=tmp_path / "conf") == "ok"
    assert len({row["suite_id"] for row in store.read(bench.results)}) == 2


def test_the_order_of_checkpoints_is_that_of_the_tasks(bench, family, tmp_path):
    assert bench("method=twin_merging", "router=oracle") == "ok"
    first = primary(bench.results)
    backwards = {task: {"path": str(family / "experts" / task)} for task in reversed(CLASSES)}
    write_suite(family, tmp_path / "conf", checkpoints=backwards)
    there = f"results_dir={tmp_path / 'other'}"
    assert bench("method=twin_merging", "router=oracle", there, conf=tmp_path / "conf") == "ok"
    assert primary(tmp_path / "other") == first


def test_batch_size_does_not_change_scores(bench, tmp_path):
    """Predictions, since a near tie of two rows may turn the order that Spearman's correlation counts."""
    found = []
    for results, size in ((bench.results, 16), (tmp_path / "other", 5)):
        assert bench("method=twin_merging", f"batch_size={size}", f"results_dir={results}") == "ok"
        (run_id,) = {row["run_id"] for row in rows_of(results)}
        found.append(store.predictions(results, run_id)["prediction"].to_numpy(dtype=float))
    assert found[0] == pytest.approx(found[1], abs=1e-3)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("protocol=strictly", "did you mean 'strict'"),
        ("+method.ranc_ratio=0.2", "did you mean 'rank_ratio'"),
        ("~method.rank_ratio", "twin_merging lacks rank_ratio"),
        ("method@shared=twin_merging", "needs a static method"),
        ("suite.base.path=nowhere", "nowhere does not exist"),
        ("router=risk protocol=blind", "under protocol=blind a row that goes to one is wrong; use router=text"),
        ("router=oracle protocol=blind", "goes by; choose router=mlp"),
        ("split=validation", "split=validation scores the rows that this router is trained on"),
        ("suite.checkpoints=null", "set one of finetune and checkpoints"),
        ("~suite.checkpoints.size", "checkpoints are of letters, colours, tasks letters, colours, size"),
        ("suite.base.pth=nowhere", "unknown keys pth"),
    ],
)
def test_mistakes_found_while_planning(bench, override, words):
    override = "+" + override if "pth" in override else override
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        bench(*override.split(), "plan=true")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method.rank_ratio=3"], r"rank_ratio must be in (0, 1], got 3"),
        (["method=ties", "method.density=2"], r"density must be in (0, 1], got 2"),
        (["router.model.dropout=1.5"], "router.model.dropout must be in [0, 1), got 1.5"),
        (["method=expert", "method.task=letter"], "did you mean 'letters'?"),
        (["device=cuda:9"], "no CUDA device"),
        (["suite.tasks.letters.metrics=[acuracy]"], "metrics must be of"),
        (["suite.tasks.colours.classes=[red,blue]"], "label must be a class id in [0, 1] or of red, blue; got 2"),
        (["suite.tasks.size.rows.test=99"], "rows must be in [1, 31] or null, got 99"),
    ],
)
def test_mistakes_found_before_merging_are_failed_records(bench, capfd, overrides, words):
    assert bench(*overrides) == "failed"
    (row,) = store.read(bench.results)
    assert words in row["error"]
    assert (row["status"], row["task"], row["value"]) == ("failed", None, None)
    said = capfd.readouterr().err
    assert words in said
    assert "Traceback" not in said


BROKEN = """
import numpy as np

from twinbench.merging.merged import Merged
from twinbench.weights.state_dict import StateDict


def merge(base, experts):
    return Merged(StateDict(base, lambda name: np.zeros(2).reshape(3)))
"""


def test_an_error_of_the_code_shows_its_traceback_and_one_of_the_user_a_line_and_the_sweep_goes_on(family, tmp_path):
    """Both are a ValueError: numpy's in a method that meets real tensors, and a hyperparameter out of range."""
    conf, results = tmp_path / "conf", tmp_path / "results"
    write_suite(family, conf)
    (tmp_path / "broken.py").write_text(BROKEN)
    (conf / "method").mkdir()
    (conf / "method" / "broken.yaml").write_text("_target_: broken.merge\n_partial_: true\n")
    ties = OmegaConf.load(ROOT / "conf" / "method" / "ties.yaml")
    OmegaConf.save(OmegaConf.merge(ties, {"density": 7}), conf / "method" / "dense.yaml")
    arguments = ["--config-dir", str(conf), "-m", "suite=tiny", "method=broken,dense,average", "allow=[broken]"]
    done = command(*arguments, f"results_dir={results}", "wandb.mode=disabled", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "2 failed, 1 ok" in done.stdout
    code, user = "cannot reshape array of size 2 into shape (3,)", "density must be in (0, 1], got 7"
    errors = {row["method"]: row["error"] for row in rows_of(results, status="failed")}
    assert errors == {"broken": f"ValueError: {code}", "dense": f"Mistake: {user}"}
    shown, _, rest = done.stderr.partition("\nValueError: ")
    assert "Traceback (most recent call last)" in shown and f'"{tmp_path / "broken.py"}", line 9' in shown
    first, *others = rest.splitlines()  # among the others may be progress bars
    told = [line.rpartition(": ")[2] for line in others if line.startswith("error: ")]
    assert first == code and told == [code, user]
    assert {row["method"] for row in rows_of(results, status="ok")} == {"average"}


@pytest.mark.parametrize("name", ["adamerging", "regmean_pp"])
def test_methods_that_run_the_model_leave_biases_to_the_experts_under_the_papers_protocol(bench, name):
    few = ["method.rows=20", "suite.only=[letters,colours]", *(["method.steps=2"] if name == "adamerging" else [])]
    assert bench(f"method={name}", "protocol=paper", *few) == "ok"


@pytest.mark.parametrize("name", [path.stem for path in YAMLS])
def test_every_method_runs(bench, name):
    """Its defaults, but for rows of a task, of which there are few here, for steps, and the expert that is named."""
    given = {"expert": ["method.task=letters"]}
    for reading in ("fisher", "regmean", "regmean_pp", "adamerging", "adamerging_tta"):
        given[reading] = ["method.rows=20"]
    for stepping in ("adamerging", "adamerging_tta"):
        given[stepping] += ["method.steps=3", "suite.only=[letters,colours]"]  # entropy is not defined for a regression
    assert bench(f"method={name}", *given.get(name, [])) == "ok"
    found = primary(bench.results, method=name)
    tasks = CLASSES.keys() - {"size"} if name.startswith("adamerging") else CLASSES.keys()
    assert found.keys() == tasks and np.isfinite(list(found.values())).all()
    (run_id,) = {row["run_id"] for row in rows_of(bench.results)}
    assert len(store.predictions(bench.results, run_id)) == 31 * len(tasks)


def test_what_a_workbench_remembers_changes_no_record(bench, tmp_path):
    """A sweep of runs that share merges, routers, features and passes, against one that forgets all but the newest."""
    runs = [
        ["method=individual"],
        ["method=average"],
        ["method=average", "protocol=paper"],
        ["method=average", "protocol=blind"],
        ["method=smile"],
        ["method=regmean", "method.rows=20"],
        ["method=twin_merging"],
        ["method=twin_merging", "protocol=paper"],
        ["method=twin_merging", "router=risk", "router.features.rows=20"],
        ["method=twin_merging", "router=grouped"],
        ["method=twin_merging", "method.rank_ratio=0.5", "method@shared=average"],
    ]
    found = {}
    for limit in ("null", "1"):
        for run_ in runs:
            there = f"results_dir={tmp_path / limit}"
            assert bench(*run_, f"workbench_bytes={limit}", there) == "ok", run_
        found[limit] = commands._bench[1].remembered_bytes()
    assert found["1"] < found["null"] / 10, "it has forgotten"
    timed = {
        "others_share",
        "time",
        "peak_memory_bytes",
        "merge_seconds",
        "router_seconds",
        "route_seconds",
        "eval_seconds",
    }
    kept, forgotten = (
        [{key: value for key, value in row.items() if key not in timed} for row in store.read(tmp_path / limit)]
        for limit in ("null", "1")
    )
    assert len({row["run_id"] for row in kept}) == len(runs)
    assert kept == forgotten
    for run_id in {row["run_id"] for row in kept}:
        pd.testing.assert_frame_equal(*(store.predictions(tmp_path / limit, run_id) for limit in ("null", "1")))


def test_a_sweep_reports_records_failures_and_sets_the_exit_code(family, tmp_path):
    """The real command, in a process of its own: a union of grids, one of whose jobs fails."""
    conf = tmp_path / "conf"
    write_suite(family, conf)
    grids = [
        "{method: 'individual,average,pretrained', protocol: 'strict,blind'}",
        "{method: ties, method.density: '0.2,7'}",
    ]
    (conf / "experiment").mkdir()
    (conf / "experiment" / "tiny.yaml").write_text(
        "# @package _global_\ndefaults: [{override /suite: tiny}]\n"
        f"hydra: {{mode: MULTIRUN, sweeper: {{blocks: [{', '.join(grids)}]}}}}\nrouter: {{model: {{epochs: 5}}}}\n"
    )
    arguments = ["--config-dir", str(conf), "experiment=tiny", f"results_dir={tmp_path / 'results'}"]
    planned = command(*arguments, "plan=true")
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.count("to run") == 8
    done = command(*arguments)
    assert done.returncode == 1, "one job of the sweep failed"
    assert "density must be in (0, 1], got 7" in done.stderr
    assert "Traceback" not in done.stderr
    results = tmp_path / "results"
    assert len({row["run_id"] for row in rows_of(results, status="ok")}) == 7
    assert len(rows_of(results, status="failed")) == 1
    page = (results / "reports" / "tiny" / "index.html").read_text()
    assert "individual" in page and "density must be in" in page
    logged = list((results / "wandb").glob("offline-run-*"))
    assert len(logged) == 8 + 1, "one W&B run a configuration, a failed one included, and one of the report"
    assert not (results / "sweeps").exists(), "an experiment with its suite's name has the suite's report"
    again = command(*arguments)
    assert again.stdout.count("skipped ") == 7
    assert len({row["run_id"] for row in rows_of(results, status="ok")}) == 7
    narrowed = command(*arguments, "method=average", "plan=true")
    assert narrowed.stdout.count("done") >= 2, "the command line narrows every grid of an experiment"
    assert "pretrained" not in narrowed.stdout


def test_a_sweep_of_refused_jobs_leaves_the_list_of_the_one_before(family, tmp_path):
    conf, results = tmp_path / "conf", tmp_path / "results"
    write_suite(family, conf)
    (conf / "experiment").mkdir()
    (conf / "experiment" / "few.yaml").write_text(
        "# @package _global_\ndefaults: [{override /suite: tiny}]\n"
        "hydra: {mode: MULTIRUN, sweeper: {blocks: [{method: 'individual,average'}]}}\n"
    )
    arguments = ["--config-dir", str(conf), "experiment=few", f"results_dir={results}", "wandb.mode=disabled"]
    assert command(*arguments, "router=nonsense").returncode == 1
    assert not (results / "sweeps").exists()
    assert command(*arguments).returncode == 0
    listed = store.sweep(results, "few")
    assert len(listed) == 2
    assert command(*arguments, "suite.base.folder=/nowhere").returncode == 1
    assert store.sweep(results, "few") == listed


def test_an_experiment_with_its_suites_name_shows_runs_that_have_another_suites(family, tmp_path):
    conf, results = tmp_path / "conf", tmp_path / "results"
    write_suite(family, conf)
    (conf / "experiment").mkdir()
    (conf / "experiment" / "more.yaml").write_text(
        "# @package _global_\ndefaults: [{override /suite: tiny}]\nsuite: {name: more}\n"
        "hydra: {mode: MULTIRUN, sweeper: {blocks: [{method: 'individual,average'}]}}\n"
    )
    arguments = ["--config-dir", str(conf), f"results_dir={results}", "wandb.mode=disabled"]
    assert command(*arguments, "suite=tiny", "method=individual").returncode == 0
    done = command(*arguments, "experiment=more")
    assert done.returncode == 0, done.stderr
    assert "1 skipped, 1 ok" in done.stdout
    of = {row["method"]: row["suite"] for row in rows_of(results)}
    assert of == {"individual": "tiny", "average": "more"}
    again = command(*arguments, "experiment=more", "method=individual")
    assert again.returncode == 0, again.stderr
    for which in ("suite", "experiment"):
        table = make(results, **{which: "more"})["tables"]["strict_normalized"]
        assert set(table["method"]) == {"individual", "average"}, "also after a sweep of some of its runs"
    assert len(store.sweep(results, "more")) == 1, "its own runs are known by their suite"


def test_an_experiment_reports_its_own_runs_and_chooses_on_the_validation_split(family, tmp_path):
    conf, results = tmp_path / "conf", tmp_path / "results"
    write_suite(family, conf)
    (conf / "experiment").mkdir()
    (conf / "experiment" / "curve.yaml").write_text(
        "# @package _global_\ndefaults: [{override /suite: tiny}]\nsplit: validation\n"
        "hydra: {mode: MULTIRUN, sweeper: {blocks: [{method: individual}, "
        "{method: task_arithmetic, method.scaling: '0.1,0.2,0.4'}]}}\n"
    )
    arguments = ["--config-dir", str(conf), f"results_dir={results}", "wandb.mode=disabled"]
    apart = command(*arguments, "suite=tiny", "method=average")
    assert apart.returncode == 0, apart.stderr
    done = command(*arguments, "experiment=curve")
    assert done.returncode == 0, done.stderr
    rows = rows_of(results, split="validation")
    assert {row["n"] for row in rows} == {20}
    assert {row["run_id"] for row in rows} == set(store.sweep(results, "curve"))
    frame = store.predictions(results, rows[0]["run_id"])
    assert set(frame["split"]) == {"validation"} and len(frame) == 20 * len(CLASSES)
    with pytest.raises(ValueError, match="no records of suite 'curve'"):
        make(results, suite="curve")
    text = (results / "reports" / "curve" / "leaderboard.md").read_text()
    assert "## strict protocol, validation split" in text
    assert "average" not in {line.split("|")[2].strip() for line in text.splitlines() if line.startswith("|")}
    before = {file.name: file.read_bytes() for file in (results / "reports" / "curve").rglob("*.*")}
    assert "strict_validation_normalized.csv" in before
    assert "counts in no average" in text.partition("Is each expert alive")[0], "the family's experts know nothing"
    again = [sys.executable, "-m", "twinbench.report", "experiment=curve", f"results_dir={results}"]
    subprocess.run(again, cwd=ROOT, env=OS_ENVIRON, check=True, capture_output=True)
    assert before == {file.name: file.read_bytes() for file in (results / "reports" / "curve").rglob("*.*")}
    subprocess.run([*again[:3], "suite=tiny", again[4]], cwd=ROOT, env=OS_ENVIRON, check=True, capture_output=True)
    text = (results / "reports" / "tiny" / "leaderboard.md").read_text()
    assert "average" in text and "validation split" not in text and "task_arithmetic" not in text


def test_what_is_scored_beside_the_test_counts_in_no_average(bench, family, tmp_path):
    shutil.copytree(family / "data" / "letters", tmp_path / "letters")
    frame("letters", 17, seed=5).to_parquet(tmp_path / "letters" / "elsewhere.parquet")
    write_suite(family, tmp_path / "conf")
    path = tmp_path / "conf" / "suite" / "tiny.yaml"
    suite = OmegaConf.load(path)
    suite.tasks.letters.sources.folder.path = str(tmp_path / "letters")
    suite.tasks.letters.data.also = ["elsewhere", "nowhere"]
    OmegaConf.save(suite, path)
    assert bench("method=individual", conf=tmp_path / "conf") == "ok"
    assert bench("method=twin_merging", conf=tmp_path / "conf") == "ok"
    for method in ("individual", "twin_merging"):
        beside = rows_of(bench.results, split="elsewhere", method=method)
        assert {row["metric"] for row in beside} >= {"accuracy", "f1"}
        assert {(row["task"], row["n"], row["primary"]) for row in beside} == {("letters", 17, False)}
        predicted = store.predictions(bench.results, beside[0]["run_id"])
        part = predicted[predicted["split"] == "elsewhere"]
        value = next(row["value"] for row in beside if row["metric"] == "accuracy")
        assert value == score("accuracy", part["label"].to_numpy(), part["prediction"].to_numpy())
        assert len(predicted) == 3 * 31 + 17
    made = make(bench.results, suite="tiny")
    secondary = made["tables"]["strict_secondary"]
    assert "accuracy on elsewhere" in set(secondary["metric"])
    routed = {metric for metric in secondary["metric"] if metric.startswith("routed_to/letters")}
    assert routed == {"routed_to/letters", "routed_to/letters on elsewhere"}
    found = blocks.blocks(store.latest(store.read(bench.results)))[0].find("twin_merging")
    assert set(tables.confusion(found, [(task, "") for task in CLASSES])) == set(CLASSES)
    assert set(made["tables"]["strict_raw"].columns) & {"letters (accuracy)", "colours (accuracy)"}


def test_a_suite_can_be_narrowed_to_some_tasks(bench, family, tmp_path):
    assert bench("method=twin_merging", "suite.only=[size,letters]", "+suite.limit=7") == "ok"
    rows = store.read(bench.results)
    assert list(dict.fromkeys(row["task"] for row in rows)) == ["size", "letters"]
    assert {row["n"] for row in rows} == {7}
    with pytest.raises(ValueError, match=r"unknown task in suite\.only 'letter'; did you mean 'letters'"):
        bench("suite.only=[letter]")
    assert bench("method=twin_merging", "suite.only=null") == "ok"
    assert len({row["suite_id"] for row in store.read(bench.results)}) == 2


def test_a_killed_sweep_resumes_where_it_was(family, tmp_path):
    conf, results = family / "conf", tmp_path / "results"
    methods = "individual,average,pretrained,task_arithmetic,ties,dare"
    arguments = ["--config-dir", str(conf), "-m", "suite=tiny", f"method={methods}", f"results_dir={results}"]
    arguments += ["wandb.mode=disabled", "batch_size=1"]
    process = subprocess.Popen([sys.executable, "run.py", *arguments], cwd=ROOT, env=OS_ENVIRON, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(list((results / "records").glob("*.jsonl"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = {path.name: path.read_bytes() for path in (results / "records").glob("*.jsonl")}
    finished = {row["run_id"] for row in store.read(results)}
    assert 2 <= len(finished) < 6, "killed in the middle"
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("skipped ") == len(finished)
    files = list((results / "records").glob("*.jsonl"))
    assert len(files) == 6, "finished runs are kept and none is measured twice"
    for name, content in kept.items():
        assert (results / "records" / name).read_bytes() == content
    assert {row["method"] for row in store.read(results)} == set(methods.split(","))


def stopped(number: int, arguments: list[str], begun) -> tuple[int, list[str]]:
    """Send a signal to `python run.py ARGUMENTS` once `begun()` is true; its exit code and lines of error."""
    process = subprocess.Popen(
        [sys.executable, "run.py", *arguments, "wandb.mode=disabled"],
        cwd=ROOT,
        env=OS_ENVIRON,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background ignores
    )
    deadline = time.monotonic() + 120
    while not begun() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    said = process.stderr.read().decode().rstrip("\n").split("\n")
    return process.wait(), [line.rpartition("\r")[2] for line in said]  # of a progress bar, what it ends as


def test_ctrl_c_in_a_sweep_says_what_is_done(family, tmp_path):
    files = tmp_path / "results" / "records"
    arguments = ["--config-dir", str(family / "conf"), "-m", "suite=tiny", "method=pretrained,average,ties,dare"]
    arguments += [f"results_dir={tmp_path / 'results'}", "batch_size=1"]
    code, said = stopped(signal.SIGINT, arguments, lambda: list(files.glob("*.jsonl")))
    kept = len(list(files.glob("*.jsonl")))
    assert (code, len(said)) == (130, 1), said
    assert said[0] in {f"stopped: {done} done, the same command goes on" for done in (kept - 1, kept)}
    assert 1 <= kept < 4
    assert not list((tmp_path / "results").rglob("*.part"))


def test_a_stopped_experiment_has_a_report_of_what_is_done(family, tmp_path):
    conf, results = tmp_path / "conf", tmp_path / "results"
    write_suite(family, conf)
    (conf / "experiment").mkdir()
    (conf / "experiment" / "long.yaml").write_text(
        "# @package _global_\ndefaults: [{override /suite: tiny}]\n"
        "hydra: {mode: MULTIRUN, sweeper: {blocks: [{method: 'individual,average,ties,dare'}]}}\n"
    )
    arguments = ["--config-dir", str(conf), "experiment=long", f"results_dir={results}", "batch_size=1"]
    code, said = stopped(signal.SIGTERM, arguments, (results / "sweeps" / "long.json").exists)
    assert code == 143, said
    done = store.sweep(results, "long")
    assert 1 <= len(done) < 4 and set(done) <= {row["run_id"] for row in rows_of(results, status="ok")}
    assert "individual" in (make(results, experiment="long")["folder"] / "index.html").read_text(encoding="utf-8")
    planned = command(*arguments, "plan=true").stdout.splitlines()[-1]
    assert re.fullmatch(
        r"\d done, \d planned: about .* (s|min) without training, as earlier runs on the same rows took", planned
    )
    ended = command(*arguments)
    assert ended.returncode == 0, ended.stderr
    assert set(store.sweep(results, "long")) == {row["run_id"] for row in store.read(results)}


def test_an_error_that_an_interrupt_caused_is_the_interrupt():
    """OmegaConf raises errors of its own while it cleans up after Ctrl-C; an error without one stays as it is."""

    def interrupted(error: type[Exception]):
        try:
            try:
                raise Terminated
            finally:
                raise error("while cleaning up")
        except error as first:
            raise ValueError("in other words") from first

    for error in (AttributeError, ValueError):
        with pytest.raises(Terminated), interrupt_first():
            interrupted(error)
    with pytest.raises(ValueError, match="a mistake"), interrupt_first():
        raise ValueError("a mistake") from KeyError("of the user's")


def test_sigterm_while_an_expert_is_trained_leaves_nothing_of_it(family, tmp_path, monkeypatch):
    monkeypatch.setitem(OS_ENVIRON, "TWINBENCH_CACHE", str(tmp_path / "cache"))
    recipe = {"epochs": 9999, "batch_size": 8, "lr": 5e-3, "weight_decay": 0.0, "warmup": 0.1, "freeze": [], "seed": 0}
    write_suite(family, tmp_path / "conf", checkpoints=None, finetune=recipe)
    arguments = ["--config-dir", str(tmp_path / "conf"), "suite=tiny", f"results_dir={tmp_path / 'results'}"]
    experts = tmp_path / "cache" / "experts"
    code, said = stopped(signal.SIGTERM, arguments, lambda: list(experts.glob(".letters-*[0-9a-f]")))
    assert (code, len(said)) == (143, 1), said
    assert said[0].startswith("stopped: what was finished is kept")
    assert not list(experts.iterdir())
    assert not list((tmp_path / "results" / "records").iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["method.densty=0.1"], "unknown key of method 'densty'; did you mean 'density'?"),
        (["-m", "method=ties,tise"], "unknown method 'tise'; did you mean 'ties'?"),
        (["suite.name=../.."], "suite.name '../..' is no name"),
        (["-m", "seed=0,1", "results_dir={there},{there}/b"], "results_dir has several values, and a sweep has one"),
        (["results_dir=Makefile"], "results_dir=Makefile cannot be written to: Not a directory"),
    ],
)
def test_a_refused_command_says_one_line_and_leaves_no_folder(arguments, said, tmp_path):
    there = tmp_path / "results"
    flags, given = [a for a in arguments if a == "-m"], [a.format(there=there) for a in arguments if a != "-m"]
    done = command(*flags, f"results_dir={there}", *given)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_plan_needs_no_folder_and_a_sweep_names_the_configuration_that_is_wrong(tmp_path):
    planned = command("-m", "method=ties", "method.density=0.2,abc", f"results_dir={tmp_path / 'results'}", "plan=true")
    assert planned.returncode == 1
    assert planned.stdout.count("to run ") == 1
    assert "method.density=abc results_dir=" in planned.stderr
    assert planned.stderr.endswith("method.density must be a finite number (float32), got 'abc'\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], {"torch", "transformers", "pandas", "matplotlib", "wandb"}),
        (["plan=true", "suite=demo"], {"torch", "transformers", "pandas", "matplotlib", "wandb"}),
        (["suite=tiny", "method=average", "wandb.mode=disabled"], {"datasets", "peft", "sklearn", "scipy.cluster"}),
    ],
)
def test_a_command_loads_no_library_that_it_does_not_need(family, tmp_path, arguments, heavy):
    """Help and plans no tensors; a run of experts that are there nothing of training, and of routers only its own."""
    script = (
        "import runpy, sys\n"
        "try: runpy.run_path('run.py', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        f"assert not {heavy} & sys.modules.keys()\n"
    )
    arguments = [f"hydra.searchpath=[file://{family / 'conf'}]", f"results_dir={tmp_path}", *arguments]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env=OS_ENVIRON,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_experts_of_tasks_that_are_not_scored_are_merged_all_the_same(bench):
    """Scores, and where a router sends the rows, are those of a run that scores all tasks."""
    twin = "method=twin_merging", "router=mlp"
    assert bench(*twin) == bench(*twin, "suite.scored=[size]", "suite.name=some") == "ok"
    every, some = (rows_of(bench.results, suite=name) for name in ("tiny", "some"))
    found, wanted = ({(r["task"], r["metric"]): r["value"] for r in rows} for rows in (some, every))
    assert {task for task, _ in wanted} > {task for task, _ in found} == {"size"}
    assert found == {key: value for key, value in wanted.items() if key[0] == "size"}
    assert {f"routed_to/{task}" for task in CLASSES} < {metric for _, metric in found}


def test_an_expert_with_nan_fails_by_name(bench, family, tmp_path):
    shutil.copytree(family, tmp_path / "family")
    edit_weights(
        tmp_path / "family" / "experts" / "size",
        lambda s: s | {"bert.pooler.dense.bias": float("nan") * s["bert.pooler.dense.bias"]},
    )
    write_suite(tmp_path / "family", tmp_path / "conf")
    assert bench("method=average", conf=tmp_path / "conf") == "failed"
    error = store.read(bench.results)[0]["error"]
    assert "expert size, head: NaN or infinite weights in bert.pooler.dense.bias" in error
