"""What a plan knows of language models: their keys in a configuration, and which of these change a number. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import yaml

from twinbench.assets.headers import parameters
from twinbench.assets.sources import by_content, found, origin
from twinbench.system import source
from twinbench.system.mistakes import Mistake

if TYPE_CHECKING:  # it imports torch
    from twinbench.suite import Task

SPEC = "twinbench.workloads.generation.data.Spec"  # keys of a task
RECIPE = "twinbench.workloads.generation.finetune.Recipe"  # keys of ``finetune``
KEYS = ("tokenizer", "dtype", "device_map", "factored", "parameters")  # of a suite, beside those that every suite has
LOADED = False  # lm-eval reads a task's rows
HEADS = False  # all of a model is merged
EXPORTED = False
LM_EVAL = Path(__file__).parents[2] / "tasks" / "lm_eval"
PREFIX = "twinbench_"  # and the name of a file there: one of our own lm-eval tasks
SCORING = (  # they train no expert
    *("metric_list", "process_results", "filter_list", "generation_kwargs", "repeats"),
    *("should_decontaminate", "doc_to_decontamination_query"),
)
GB = 10**9


def check(suite: Mapping) -> None:
    """Nothing is wrong with the suite's own keys that opening it does not tell."""


def identity(suite: Mapping) -> dict:
    """The suite's own keys that change a number."""
    return {"dtype": suite["dtype"], "factored": suite["factored"]}


def task_identity(task: Mapping, *, training: bool) -> dict:
    """What a task's own keys stand for, beside their values: the content of its lm-eval task.

    Args:
        training: only what trains an expert counts.
    """
    return {"lm_eval": _lm_eval(task["lm_eval"], SCORING if training else ())}


def learned(task: "Task") -> tuple[str, str]:
    """What the learning curve of an expert shows: its loss with the unit, and its metric."""
    return "cross-entropy of the answers (nats per token)", "token_accuracy"


def needs(suite: Mapping, folders: Mapping[str, Path]) -> list[str]:
    """What must be there before anything runs, in a few lines for a person: files to fetch, and memory.

    Args:
        folders: per expert that is fine-tuned here where the cache keeps it.

    Raises:
        ValueError, FileNotFoundError: a malformed source, or a local one that is not there.
    """
    sources = {"base": suite["base"], "tokenizer": suite["tokenizer"]}
    if suite["checkpoints"] is not None:
        sources |= {f"expert {name}": source for name, source in suite["checkpoints"].items()}
    said = {what: f"{origin(source)}: {_state(source)}" for what, source in sources.items() if source}
    if suite["checkpoints"] is None:
        lacking = [name for name, folder in folders.items() if not folder.exists()]
        said["experts"] = f"to be trained: {', '.join(lacking)}" if lacking else "trained, here"
    said["memory"] = _memory(suite)
    return [f"{suite['name']} needs", *(f"  {what:20} {words}" for what, words in said.items())]


def _state(source: Mapping) -> str:
    return "here" if found(source) else "to be fetched"


def _memory(suite: Mapping) -> str:
    folder = found(suite["base"])
    count = (parameters(folder) if folder and folder.is_dir() else None) or suite["parameters"]
    if not count:
        return "unknown (suite.parameters, the number of the base's weights, is not given)"
    dtype, ram = suite["dtype"], psutil.virtual_memory().total / GB
    sizes = {"float32": 4 * count / GB, "bfloat16": 2 * count / GB, "float16": 2 * count / GB}
    fits = "fits" if sizes.get(dtype, sizes["float32"]) < ram else "does not fit"
    merges = "as factors" if suite["factored"] else "dense, each as large or larger, in RAM"
    return (
        f"{int(count):,} weights: {sizes['float32']:.1f} GB in float32, {sizes['bfloat16']:.1f} GB in bfloat16; "
        f"one model in this suite's {dtype} {fits} into this machine's {ram:.1f} GB of RAM; "
        f"merges are beside it {merges}"
    )


def _lm_eval(name: str, without: tuple[str, ...]) -> object:
    """What an lm-eval task is: of one of ours, or of a YAML file, its content; of those that lm-eval has, the name.

    Args:
        without: keys that do not count.
    """
    file = LM_EVAL / f"{name.removeprefix(PREFIX)}.yaml" if name.startswith(PREFIX) else Path(name)
    if not name.startswith(PREFIX) and file.suffix != ".yaml":
        return name
    if not file.exists():
        raise FileNotFoundError(f"lm_eval: there is no file {file}")
    return by_content({key: value for key, value in _written(file).items() if key not in without})


def _written(file: Path, inside: tuple[Path, ...] = ()) -> dict:
    """An lm-eval YAML file and what it includes, as lm-eval reads them, with the source of every ``!function``.

    Raises:
        ValueError: it includes itself.
        FileNotFoundError: there is no such file.
    """
    if file.resolve() in inside:
        raise Mistake(f"{file}: it includes itself")

    class Loader(yaml.SafeLoader):
        """Knows ``!function``."""

    Loader.add_constructor("!function", lambda loader, node: _function(loader.construct_scalar(node), file.parent))
    try:
        own = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except yaml.YAMLError as error:
        raise Mistake(f"{file}: not YAML ({error})") from error
    if not isinstance(own, dict):
        raise Mistake(f"{file}: an lm-eval task is a mapping, got {type(own).__name__}")
    included = own.pop("include", [])
    found = {}
    for other in included if isinstance(included, list) else [included]:
        found |= _written(file.parent / other, (*inside, file.resolve()))
    return found | own


def _function(name: str, folder: Path) -> list[str]:
    """A function's name and the source of its module: a file beside the YAML file, or else a module."""
    module, _, function = name.rpartition(".")
    file = folder / f"{module.replace('.', '/')}.py"
    return [function, source.digest(file) if file.exists() else source.code(module)]
