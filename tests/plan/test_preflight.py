"""Mistakes in a configuration: each is one line with the key, the value and what is legal, found without torch."""

import copy
import functools
import operator

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from support.commands import ROOT
from support.family import write_suite
from twinbench.plan import preflight
from twinbench.system.errors import MISTAKES, one_line

GROUPS = ("suite", "method", "router", "experiment")
PARSER = OverridesParser.create()


@functools.cache
def composed(conf, *groups: str):
    """What ``python run.py GROUPS`` composes, and the names of what it chose; composing takes a quarter of a second."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        own = [] if conf is None else [f"hydra.searchpath=[file://{conf}]", "suite=tiny"]
        cfg = compose("config", [*own, *groups], return_hydra_config=True)
    return preflight.composed(cfg, cfg.hydra.runtime.choices)


def refusal(conf, *overrides: str) -> str:
    """What ``python run.py OVERRIDES`` is told before anything is made, or nothing."""
    groups = [override for override in overrides if override.partition("=")[0] in GROUPS]
    try:
        config, names = composed(conf, *groups)
        config = copy.deepcopy(config)
        for override in PARSER.parse_overrides([override for override in overrides if override not in groups]):
            *above, key = override.key_or_group.split(".")
            node = functools.reduce(operator.getitem, above, config)
            if override.is_delete():
                del node[key]
            else:
                node[key] = override.value()
        preflight.check(config, names)
    except MISTAKES as error:
        return one_line(error)
    return ""


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("methd=ties", "unknown key 'methd'; did you mean 'method'?"),
        ("method.rank_rato=1", "unknown key of method 'rank_rato'; did you mean 'rank_ratio'? Known: compression, "),
        ("method.densty=1", "unknown key of method 'densty'; did you mean 'density'? Known: compression, "),
        ("suite.base.hub=x", "unknown key of suite.base 'hub'; +suite.base.hub=VALUE adds it. Known: path."),
        ("suite.tasks.size.data.trian=x", "unknown key of suite.tasks.size.data 'trian'; did you mean 'train'?"),
        ("+task=sst22", "unknown task 'sst22'; did you mean 'sst2'?"),
        ("method=tiess", "unknown method 'tiess'; did you mean 'ties'?"),
        ("router=mpl", "unknown router 'mpl'; did you mean 'mlp'?"),
        ("experiment=demmo", "unknown experiment 'demmo'; did you mean 'demo'?"),
        ("bare", "'bare' cannot be read: arguments are KEY=VALUE"),
        ("results_dir=ü", "'results_dir=ü' cannot be read: arguments are KEY=VALUE"),
        ("results_dir=a,b", "'results_dir=a,b' has several values: KEY=[A,B] is a list, KEY='{a: A, b: B}' gives"),
        ("results_dir=${x}", "results_dir: Interpolation key 'x' not found"),
        ("results_dir=${oc.env:NOT_SET}", "Environment variable 'NOT_SET' not found"),
        ("method=expert", "method.task is missing; give method.task=VALUE"),
        ("~method", "method must be one of the choices of python run.py --help, got None"),
    ],
)
def test_what_hydra_says_over_many_lines(family, override, words):
    with pytest.raises(MISTAKES) as caught:
        preflight.check(*composed(family / "conf", override))
    said = one_line(caught.value)
    assert words in said
    assert "\n" not in said


SHIPPED = [
    (group, path.stem) for group in ("suite", "router") for path in sorted((ROOT / "conf" / group).glob("*.yaml"))
]


@pytest.mark.parametrize(("group", "name"), SHIPPED)
def test_what_we_ship_is_not_refused(group, name):
    assert refusal(None, f"{group}={name}") == ""  # commits that lack are the plan's to name, all in one line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=-1", "seed must be a whole number in [0, 2^32), got -1"),
        ("seed=1.5", "seed must be a whole number in [0, 2^32), got 1.5"),
        ("seed=abc", "seed must be a whole number in [0, 2^32), got 'abc'"),
        ("seed=4294967296", "seed must be a whole number in [0, 2^32), got 4294967296"),
        ("seed=true", "seed must be a whole number in [0, 2^32), got True"),
        ("seed=", "seed must be a whole number in [0, 2^32), got ''"),
        ("force=abc", "force must be true or false, got 'abc'"),
        ("force=flase", "force must be true or false, got 'flase'"),
        ("plan=1", "plan must be true or false, got 1"),
        ("device=tpu", "device must be cpu, cuda, cuda:N or null, got 'tpu'"),
        ("device=cuda:x", "device must be cpu, cuda, cuda:N or null, got 'cuda:x'"),
        ("batch_size=0", "batch_size must be a whole number of at least 1, got 0"),
        ("batch_size=-3", "batch_size must be a whole number of at least 1, got -3"),
        ("batch_size=2.5", "batch_size must be a whole number of at least 1, got 2.5"),
        ("wandb.mode=onlin", "unknown wandb.mode 'onlin'; did you mean 'online'?"),
        ("wandb=3", "wandb must map keys to values, got 3"),
        ("results_dir=", "results_dir must be a folder, got ''"),
        ("results_dir=null", "results_dir must be a folder, got None"),
        ("results_dir={a: 1}", "results_dir must be a folder, got {'a': 1}"),
        ("export=", "export must be a new folder or null, got ''"),
        ("method.scaling=nan  method=task_arithmetic", "method.scaling must be a finite number (float32), got nan"),
        ("method.scaling=inf  method=task_arithmetic", "method.scaling must be a finite number (float32), got inf"),
        ("method.scaling=1e300  method=ties", "method.scaling must be a finite number (float32), got 1e+300"),
        ("method.scaling=high  method=ties", "method.scaling must be a finite number (float32), got 'high'"),
        ("method.density=abc  method=ties", "method.density must be a finite number (float32), got 'abc'"),
        ("method.density=null  method=ties", "method.density must be a finite number (float32), got None"),
        ("method.density=true  method=ties", "method.density must be a finite number (float32), got True"),
        ("method.scope=3  method=ties", "method.scope must be a name, got 3"),
        ("method.rank_ratio=nan", "method.rank_ratio must be a finite number (float32) or null, got nan"),
        ("method.rank_ratio=1e-1x", "method.rank_ratio must be a finite number (float32) or null, got '1e-1x'"),
        ("shared.scaling=nan", "shared.scaling must be a finite number (float32), got nan"),
        ("router.model.lr=abc", "router.model.lr must be a finite number (float32), got 'abc'"),
        ("router.model.epochs=1.5", "router.model.epochs must be a whole number, got 1.5"),
        ("+router.features.layr=1", "unknown key of router.features 'layr'; did you mean 'layer'?"),
        ("+method.densty=0.1  method=ties", "unknown hyperparameter of ties 'densty'; did you mean 'density'?"),
        ("~method.density  method=ties", "ties lacks density; it takes aggregate, density, scaling, scope"),
    ],
)
def test_bad_values_of_a_run(family, override, words):
    said = refusal(family / "conf", *override.split("  "))
    assert words in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("suite.only=letters", "suite.only must be a list of tasks or null, as in suite.only=[letters]; got 'letters'"),
        ("+suite.merged=letters", "as in suite.merged=[letters]; got 'letters'"),
        ("+suite.corrupted=1.5", "suite.corrupted must be in (0, 1] or null, got 1.5"),
        ("+suite.limit=0", "suite.limit must be a whole number of at least 1 or null, got 0"),
        ("+suite.limit=2.5", "suite.limit must be a whole number of at least 1 or null, got 2.5"),
        ("+suite.limt=2", "unknown key of suite 'limt'; did you mean 'limit'?"),
        ("~suite.finetune", "suite lacks finetune; begin its defaults with /workload@_here_: classification or"),
        ("~suite.checkpoints", "suite lacks checkpoints; begin its defaults with"),
        ("~suite.tasks", "suite lacks tasks; begin its defaults with"),
        ("suite.tasks=null", "suite.tasks must map keys to values, got None"),
        ("suite.base=x", "suite.base must map keys to values such as {path: DIR}, got 'x'"),
        ("suite.checkpoints.size=x", "suite.checkpoints.size must map keys to values such as {path: DIR}, got 'x'"),
        ("suite.name=../../..", "suite.name '../../..' is no name"),
        ("suite.name=null", "suite.name None is no name"),
        ("suite.name=/etc", "suite.name '/etc' is no name"),
        ("suite.name=.hidden", "suite.name '.hidden' is no name"),
        ("+suite.tasks={../../t: {}}", "task '../../t' is no name"),
        ("~suite.tasks.size.rows", "suite.tasks.size lacks rows"),
        ("~suite.tasks.size.classes", "suite.tasks.size lacks classes, a list of names, [A, B] or null"),
        ("~suite.tasks.size.data", "suite.tasks.size lacks data, keys with values, {KEY: VALUE}"),
        ("~suite.tasks.size.data._target_", "suite.tasks.size.data lacks _target_"),
        ("+suite.tasks.size.clases=[a]", "unknown key of suite.tasks.size 'clases'; did you mean 'classes'?"),
        (
            "suite.tasks.letters.classes=a",
            "suite.tasks.letters.classes must be a list of names, [A, B] or null, got 'a'",
        ),
        ("suite.tasks.letters.classes=[false, true]", "suite.tasks.letters.classes must be a list of names"),
        ("suite.tasks.size.rows.train=0.5", "suite.tasks.size.rows.train must be a whole number or null, got 0.5"),
        ("suite.tasks.size.rows.validation=null", "suite.tasks.size.rows.validation must be a whole number, got None"),
        ("suite.tasks.size.max_length=0", "suite.tasks.size.max_length must be a whole number of at least 1, got 0"),
        ("suite.tasks.size.max_length=33", "size.max_length must be at most 32, the base's positions, got 33"),
        ("+suite.tasks.size.data.lable=x", "unknown key of suite.tasks.size.data 'lable'; did you mean 'label'?"),
        ("~suite.tasks.size.data._partial_", "suite.tasks.size.data._partial_ must be true beside _target_="),
        ("~method._partial_", "method._partial_ must be true beside _target_=twinbench.merging.twin_merging.merge"),
        ("+router.model._partial_=true", "router.model._partial_ must be false beside _target_=twinbench.routing.mlp"),
        ("+method._args_=[1]", "method._args_: beside _target_ only _partial_ has a meaning"),
    ],
)
def test_bad_suites(family, override, words):
    said = refusal(family / "conf", override)
    assert words in said
    assert "\n" not in said


RECIPE = {"epochs": 3, "batch_size": 8, "lr": 5e-3, "weight_decay": 0.0, "warmup": 0.1, "freeze": [], "seed": 0}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("~suite.finetune.freeze", "suite.finetune lacks freeze, a list of names, [A, B]; its keys are epochs,"),
        ("+suite.finetune.epoch=3", "unknown key of suite.finetune 'epoch'; did you mean 'epochs'?"),
        ("suite.finetune.lr=abc", "suite.finetune.lr must be a finite number (float32), got 'abc'"),
        ("suite.finetune.seed=-1", "suite.finetune.seed must be a whole number in [0, 2^32), got -1"),
        (
            "+suite.tasks.size.finetune={epocs: 2}",
            "unknown key of suite.tasks.size.finetune 'epocs'; did you mean 'epochs'",
        ),
        ("+suite.tasks.size.finetune=3", "suite.tasks.size.finetune must be keys with values, {KEY: VALUE}, got 3"),
        ("suite.finetune=3", "suite.finetune must map keys to values, got 3"),
    ],
)
def test_bad_recipes(family, tmp_path, override, words):
    write_suite(family, tmp_path, checkpoints=None, finetune=RECIPE)
    assert refusal(tmp_path) == ""
    said = refusal(tmp_path, override)
    assert words in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method._target_=os.system", "method._target_=os.system: only functions in baselines and twinbench"),
        ("method._target_=this.x.y", "for a package of your own add allow=[PACKAGE]"),
        ("method._target_=twinbenchmark.x", "only functions in baselines and twinbench"),
        (
            "method._target_=twinbench.merge.pd.read_pickle",
            "there is no Python module twinbench.merge.pd",
        ),
        ("method._target_=twinbench.assets.sources.Path", "has no function or class Path"),
        ("router.model._target_=baselines.ties.merge", "_target_=baselines.ties.merge: only functions in twinbench"),
        ("suite.tasks.size.data._target_=pandas.read_pickle", "only functions in twinbench.tasks"),
        (
            "+method.x={y: [{_target_: twinbench.routing.router.Mlp}]}",
            "method.x.y.0._target_=twinbench.routing.router.Mlp: nothing is made",
        ),
        ("+suite.base.x={_target_: os.system}", "suite.base.x._target_=os.system: only functions in"),
    ],
)
def test_what_may_be_named_by_target(family, override, words):
    said = refusal(family / "conf", override)
    assert words in said
    assert "\n" not in said


def test_a_package_that_the_user_allows(family):
    override = "method._target_=json.tool.main"
    assert "only functions in" in refusal(family / "conf", override, "method._partial_=true")
    assert "unknown hyperparameter of twin_merging" in refusal(family / "conf", override, "allow=[json]"), "read"
    assert "allow must be a list of names" in refusal(family / "conf", "allow=json")


@pytest.mark.parametrize("content", ['{"a"', "[1]"])
def test_a_broken_configuration_of_the_base_is_named(family, tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    said = refusal(family / "conf", f"suite.base.path={tmp_path}")
    assert said.startswith(f"{tmp_path / 'config.json'}: not a model's configuration, which is a JSON object (")
