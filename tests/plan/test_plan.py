"""What a plan says of a configuration in a line, where its experts come from, and what it refuses."""

import dataclasses
import json
import re

import pytest

from support.commands import planned, read
from twinbench.plan.exportable import check_export
from twinbench.plan.identity import expert_id, origins
from twinbench.plan.signature import FOLDER, NAMED, prepared_needs


def test_a_label_has_what_was_chosen_and_leaves_out_what_was_not():
    routed = "demo strict twin_merging compression=svd rank_ratio=0.1 method@shared=task_arithmetic shared.scaling=0.3"
    assert planned("suite=demo").label == f"{routed} router=mlp seed=0"
    static = planned("suite=demo", "method=average", "protocol=paper", "split=validation")
    assert static.label == "demo paper  average split=validation"


def test_an_expert_comes_from_a_checkpoint_or_from_a_recipe():
    suite = read("suite=demo")[0]["suite"]
    found = origins(suite)
    assert list(found) == list(suite["tasks"])
    for task, origin in found.items():
        recipe = json.loads(origin.removeprefix("the base, fine-tuned by twinbench as ").rpartition(": ")[0])
        assert recipe["epochs"] == suite["finetune"]["epochs"] and origin.endswith(expert_id(suite, task))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("suite=generative_smollm protocol=paper", "these experts have no heads; use strict"),
        ("suite=generative_smollm router=risk", "these experts have no heads; use router=mlp"),
        ("router=risk protocol=blind", "a row that goes to one is wrong"),
        ("suite.merged=[trec,sms] protocol=blind", "protocol=blind, and no expert of sst2, tweet is merged"),
        ("suite.merged=[trec,sms] suite.scored=[sms,tweet] method=individual", "no expert of tweet is merged"),
        ("suite.scored=[tweet] router=dawin", "tweet has no classes there"),
        ("suite.merged=[trec,sms] method=individual", "method=individual goes by the known task, and no expert"),
        ("suite.merged=[trec,sms] router=oracle", "method=twin_merging goes by the known task, and no expert"),
        ("method@shared=individual", "method@shared=individual: the shared expert needs a static method"),
        (
            "suite=generative_smollm method=fisher",
            "method=fisher needs fisher, which is not defined for the models of suite generative_smollm; choose",
        ),
        ("suite=generative_smollm method@shared=adamerging", "method@shared=adamerging needs entropy, which is not"),
        ("suite=generative_smollm method=regmean suite.factored=true", "method=regmean needs gram, which runs experts"),
        ("method=adamerging", r"needs entropy, and tweet has no classes: leave it out with suite\.only"),
        ("method@shared=adamerging_tta", "method@shared=adamerging_tta needs scored_entropy, and tweet has no classes"),
        ("split=dev", "unknown split 'dev'"),
        ("suite.scored=[trek]", "unknown task in suite.scored 'trek'; did you mean 'trec'"),
        ("suite.scored=[]", "suite.scored must list at least one task, or be null"),
        ("suite.scaled={trek:2}", "unknown task in suite.scaled 'trek'; did you mean 'trec'"),
        ("suite.scaled={trec:x}", "suite.scaled.trec must be a finite number, got 'x'"),
        ("suite.merged=[sms] suite.scaled={trec:2}", "unknown task in suite.scaled 'trec'"),
        ("suite=glue_roberta", "is read at commits .*suite.revision=COMMIT of lu-vae/roberta-glue"),
    ],
)
def test_what_cannot_be_measured_is_refused(overrides, words):
    with pytest.raises(ValueError, match=words):
        planned(*overrides.split())


@pytest.mark.parametrize("argument", sorted(NAMED))
def test_a_prepared_argument_names_what_it_calls_of_a_workload(argument):
    text = (FOLDER / f"{argument}.py").read_text(encoding="utf-8")
    if found := re.search(r"from twinbench\.prepared\.(\w+) import gradients", text):
        text = (FOLDER / f"{found[1]}.py").read_text(encoding="utf-8")
    assert {*re.findall(r"workload\.(\w+)\(", text)} == set(prepared_needs(argument))


def test_the_known_task_takes_the_place_of_every_route():
    gates, known = planned("method=smile"), planned("method=smile", "router=oracle")
    assert (gates.route, gates.router) == ("layer", None)
    assert (known.route, known.router) == ("task", {"name": "oracle"})
    assert gates.run_id == planned("method=smile", "router=text").run_id != known.run_id
    assert planned("method=average", "router=oracle").route is None
    with pytest.raises(ValueError, match="method=smile goes by the known task, and no expert of sst2, tweet"):
        planned("method=smile", "router=oracle", "suite.merged=[trec,sms]")


def test_which_tasks_are_scored_is_of_the_suite_and_trains_no_other_experts():
    suite, every = planned("suite=demo"), "[tweet,sms,trec,sst2]"
    some = planned("suite=demo", "suite.scored=[sst2,sms]")
    assert planned("suite=demo", f"suite.scored={every}").run_id == suite.run_id
    assert some.suite_id != suite.suite_id != planned("suite=demo", "suite.only=[sst2,sms]").suite_id
    assert origins(some.config["suite"]) == origins(suite.config["suite"])


def test_a_task_that_is_neither_scored_nor_merged_is_in_no_runs_way():
    some = "suite.merged=[trec,sms]", "suite.scored=[trec,sms]"
    assert planned(*some, "method=individual").protocol == planned(*some, "router=oracle").protocol == "strict"
    assert planned(*some, "router=dawin").router["name"] == "dawin"


def test_unseen_tasks_are_scored_under_strict():
    for method in ("average", "twin_merging"):
        assert planned("suite.merged=[trec,sms]", f"method={method}").protocol == "strict"


def test_a_refused_export_does_not_send_to_a_command_that_refuses_too(tmp_path):
    config, _ = read("method=twin_merging")
    twin = planned("method=twin_merging")
    leaf = dataclasses.replace(
        twin.leaves["method"], takes=dataclasses.replace(twin.leaves["method"].takes, route="task")
    )
    known = dataclasses.replace(twin, method="emr", leaves={"method": leaf})
    with pytest.raises(ValueError, match="method=emr gives each task a model of its own, and no command writes these"):
        check_export(known, tmp_path, config["suite"])
    causal, _ = read("suite=generative_smollm")
    with pytest.raises(ValueError, match="method=twin_merging of workload=generation cannot be written to disk yet"):
        check_export(planned("method=twin_merging"), tmp_path, causal["suite"])
    with pytest.raises(ValueError, match=r"twinbench\.merge method=average merges models of workload=generation"):
        check_export(planned("method=average"), tmp_path, causal["suite"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("suite=demo", None),
        ("method=average", None),
        ("router=oracle", None),
        ("protocol=paper", "protocol=paper keeps every task's own biases"),
        ("method=individual", "method=individual has nothing to export"),
        ("method=smile", "method=smile gives each linear layer experts of its own, and no command writes these"),
        ("router=risk", "minimum_risk=false"),
        ("router=knn", "export writes routers of linear layers, such as router=mlp, got router.model Knn"),
        ("method=average protocol=blind router=prototypes", "such as router=mlp, got router.model Prototypes"),
        ("method=average router=knn", None),
        ("router.features.source=base", "a router of the shared expert's hidden states"),
        ("router.features.characters=64", "a router of the shared expert's hidden states"),
        ("method.compression=none method.rank_ratio=null", "method.compression=svd, got none"),
    ],
)
def test_what_is_more_than_a_shared_model_with_adapters_is_not_exported(tmp_path, overrides, words):
    config, _ = read(*overrides.split())
    job = planned(*overrides.split())
    for folder in (tmp_path, tmp_path / "new"):
        if words is None:
            check_export(job, folder, config["suite"])
        else:
            with pytest.raises(ValueError, match=words):
                check_export(job, folder, config["suite"])
    if words is None:
        (tmp_path / "mine").touch()
        for taken in (tmp_path, tmp_path / "mine"):
            with pytest.raises(ValueError, match="must be a new or empty folder, and something is there"):
                check_export(job, taken, config["suite"])


@pytest.mark.parametrize(
    ("overrides", "seed"),
    [
        ("router=mlp", 7),
        ("router=knn", None),
        ("router=prototypes", None),
        ("router=knn router.use.groups=2", 7),
        ("router=knn method.compression=bernoulli method.rank_ratio=null method.density=0.2", 7),
        ("method=average protocol=blind router=prototypes", None),
    ],
)
def test_a_router_has_a_seed_where_its_model_its_groups_or_its_method_draws(overrides, seed):
    """The paper's groups begin at random centres, whichever model they group the logits of."""
    first, other = (planned(*overrides.split(), f"seed={number}") for number in (7, 8))
    assert first.seed == seed
    assert (first.run_id == other.run_id) == (seed is None)
