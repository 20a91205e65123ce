"""Hidden states of the base for rows that train a router: the same for all methods and suites, so kept on disk."""

import json
import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from twinbench import workbench
from twinbench.assets.sources import cache_dir
from twinbench.routing import features
from twinbench.routing.recipe import Features
from twinbench.system import processes, source
from twinbench.weights.disk_cache import content_key, remembered
from twinbench.workbench import Workbench


def base_states(
    bench: Workbench, reads: Features, task: str, split: str, rows: int | None, make: Callable[[], tuple[Tensor, float]]
) -> tuple[Tensor, float]:
    """What ``make`` gives, the states and the seconds of their pass; of states that an earlier run kept, NaN seconds.

    The key holds what the states depend on: the weights that are read, the inputs and their texts, the settings of the
    pass, and the code.

    Args:
        reads: the layer that the router reads, and how its states are pooled.
        rows: how many of the first rows of the split; None is all.
    """
    suite, spec = bench.suite, bench.suite.tasks[task]
    if processes.count() > 1 or suite.factored:  # processes must agree on whether there is a pass
        return make()
    inputs = features.encodings(bench, task, split, content=reads.pool == "content")[:rows]
    texts = spec.splits[split][list(spec.columns)].iloc[:rows].to_json(orient="values")
    names = features.read_names(bench.module, reads.layer)
    weights = {name: suite.base[name] for name in suite.base if name in names}
    settings = [reads.layer, reads.pool, suite.dtype, bench.precision, bench.batch_size, bench.module.device.type]
    settings += [suite.tokenizer.padding_side, version("torch"), version("transformers")]
    kind = sorted(Path(suite.workload.module.__code__.co_filename).parent.glob("*.py"))  # how texts and module are made
    files = [Path(__file__), Path(__file__).with_name("learned.py"), Path(features.__file__), Path(workbench.__file__)]
    codes = [source.digest(file) for file in (*files, *kind)]
    config = (suite.base_folder / "config.json").read_text(encoding="utf-8")
    key = content_key(weights, json.dumps([inputs, texts, settings, codes, config]))
    took = [math.nan]

    def passed() -> dict[str, Tensor]:
        states, took[0] = make()
        return {"states": states}

    return remembered(cache_dir() / "hidden_states", key, ("states",), passed)["states"], took[0]
