"""Tasks without an expert, scored by a linear probe on what a merged model makes of their texts."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold, StratifiedKFold

from support.commands import composed, rows_of
from support.family import CLASSES, write_suite
from twinbench import prepare
from twinbench.command import run
from twinbench.plan import preflight
from twinbench.plan.identity import task_identity
from twinbench.plan.suite import narrowed, own_experts
from twinbench.records import store
from twinbench.system.mistakes import Mistake
from twinbench.workloads.classification import probe, settings


@pytest.fixture
def conf(family, tmp_path):
    """The tiny suite with two probed tasks, whose rows are those of `colours` and `size`."""
    write_suite(family, tmp_path / "conf")
    path = tmp_path / "conf" / "suite" / "tiny.yaml"
    suite = OmegaConf.load(path)
    suite.tasks.hues = {**suite.tasks.colours, "probe": True}
    suite.tasks.lengths = {**suite.tasks.size, "probe": True}
    OmegaConf.save(suite, path)
    return tmp_path / "conf"


NAMES = {"method": "ties", "shared": "average", "router": "mlp", "experiment": None}


def features(model, tokenizer, texts) -> np.ndarray:
    """Each text alone, without padding."""
    with torch.inference_mode():
        rows = [tokenizer(text, truncation=True, max_length=16, return_tensors="pt") for text in texts]
        return np.stack([model(**row).last_hidden_state[0].mean(0).numpy() for row in rows])


def fitted(model, train, labels, test) -> np.ndarray:
    centre, spread = train.mean(0), train.std(0)
    return model.fit((train - centre) / spread, labels).predict((test - centre) / spread)


def by_folds(kind, train, labels, test) -> np.ndarray:
    """Predictions under the penalty with the best mean score of five folds, written out."""
    split = StratifiedKFold(5) if kind is not Ridge else KFold(5)
    means = {}
    for penalty in (10 ** (n / 2) for n in range(-2, 9)):
        scores = []
        for inner, held in split.split(train, labels):
            said, truth = fitted(kind(penalty), train[inner], labels[inner], train[held]), labels[held]
            scores.append(r2_score(truth, said) if kind is Ridge else (said == truth).mean())
        means[penalty] = np.mean(scores)
    best = min(means, key=lambda penalty: (-round(means[penalty], 9), penalty))
    return fitted(kind(best), train, labels, test)


def test_a_probe_is_fitted_on_the_merged_models_features_of_the_training_rows(conf, tmp_path):
    cfg = composed(conf, tmp_path, "method=average")
    assert run(cfg).status == "ok"
    suite = prepare.opened(narrowed(OmegaConf.to_container(cfg, resolve=True)["suite"]), "cpu")
    assert list(suite.experts) == list(suite.heads) == list(CLASSES)
    model = suite.workload.module(suite, "cpu")
    mean = {name: sum(own[name] for own in suite.experts.values()) / len(CLASSES) for name in suite.base}
    model.load_state_dict(mean, strict=False)
    found = store.predictions(tmp_path, rows_of(tmp_path)[0]["run_id"])
    for task, kind in (("hues", lambda penalty: LogisticRegression(C=1 / penalty, max_iter=5000)), ("lengths", Ridge)):
        spec = suite.tasks[task]
        train, test = (features(model, suite.tokenizer, spec.splits[s]["text"]) for s in ("train", "test"))
        wanted = by_folds(kind, train, spec.labels("train"), test)
        given = found[found["task"] == task]["prediction"].to_numpy()
        assert given == pytest.approx(wanted, abs=1e-2) and len(set(wanted)) > 1


def test_a_probe_learns_what_features_tell_and_nothing_from_noise():
    draw = np.random.default_rng(0)
    labels, test = draw.integers(0, 2, 400), draw.integers(0, 2, 400)
    noise, other = draw.normal(size=(400, 8)), draw.normal(size=(400, 8))
    assert abs((probe.predictions(noise, labels, other, True) == test).mean() - 0.5) < 0.1
    told = [np.column_stack([rows, 0.1 * answers]) for rows, answers in ((noise, labels), (other, test))]
    assert (probe.predictions(told[0], labels, told[1], True) == test).mean() > 0.99, "whatever a feature's scale"
    values = probe.predictions(noise, noise[:, 0] * 3 + 1, other, False)
    assert np.corrcoef(values, other[:, 0])[0, 1] > 0.99


def test_more_rows_than_features_do_not_make_a_probe_worse():
    """At about as many rows as features a weakly penalized probe fits the noise; the folds find a stronger penalty."""
    draw = np.random.default_rng(0)
    topics, sizes = draw.normal(size=(4, 200)), (300, 1000)  # as of texts: few things to say, in many features
    about = [draw.normal(size=(size, 4)) for size in sizes]
    rows, test = (said @ topics + 2 * draw.normal(size=(len(said), 200)) for said in about)
    labels, answers = ((said[:, 0] + 0.3 * draw.normal(size=len(said)) > 0).astype(int) for said in about)
    few, many = ((probe.predictions(rows[:n], labels[:n], test, True) == answers).mean() for n in (100, 300))
    weak = (fitted(LogisticRegression(max_iter=5000), rows, labels, test) == answers).mean()
    assert many > few and many > weak + 0.02


def test_the_code_of_a_probe_counts_and_other_tasks_have_the_ids_that_they_had(conf, tmp_path, monkeypatch):
    suite = narrowed(OmegaConf.to_container(composed(conf, tmp_path, "method=average"), resolve=True)["suite"])
    before = {name: task_identity(suite, task) for name, task in suite["tasks"].items()}
    monkeypatch.setattr(settings, "PROBE", "twinbench.workloads.classification.costs")
    moved = [name for name, task in suite["tasks"].items() if task_identity(suite, task) != before[name]]
    assert moved == ["hues", "lengths"] and not any("probe" in before[name] for name in CLASSES)


@pytest.mark.parametrize("method", ["twin_merging", "pretrained", "smile"])
def test_routed_and_unmerged_models_are_probed_too(conf, tmp_path, method):
    assert run(composed(conf, tmp_path, f"method={method}")).status == "ok"
    scored = {row["task"]: row["value"] for row in rows_of(tmp_path) if row["primary"]}
    assert list(scored) == [*CLASSES, "hues", "lengths"] and np.isfinite(list(scored.values())).all()


def test_what_a_probed_task_cannot_be_is_said(conf, tmp_path):
    config = OmegaConf.to_container(composed(conf, tmp_path, "method=average"), resolve=True)
    assert own_experts(config["suite"]) == list(CLASSES)
    tasks = config["suite"]["tasks"]
    with pytest.raises(Mistake, match="task hues: set one of head and probe"):
        own_experts({"tasks": tasks | {"hues": tasks["hues"] | {"head": "size"}}})
    for override, words in (
        ("method=individual", "no expert of hues, lengths is merged"),
        (f"method=ties export={tmp_path / 'out'}", "hues, lengths has none"),
    ):
        with pytest.raises(Mistake, match=words):
            preflight.planned(composed(conf, tmp_path, *override.split()), NAMES)
