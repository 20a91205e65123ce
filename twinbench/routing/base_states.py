"""Hidden states of the base for rows that train a router: the same for all methods and suites, so kept on disk."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from twinbench.assets.sources import cache_dir
from twinbench.routing import features
from twinbench.system import processes, source
from twinbench.weights.disk_cache import content_key, remembered
from twinbench.workbench import Workbench


def base_states(
    bench: Workbench, reads, task: str, split: str, rows: int | None, make: Callable[[], tuple[Tensor, float]]
) -> tuple[Tensor, float]:
    """What ``make`` gives, the states and the seconds of their pass, or what an earlier run kept of the same pass.

    The key holds what the states depend on: the weights that are read, the inputs and their texts, the settings of the
    pass, and the code.

    Args:
        reads: the router's `Features`.
        rows: how many of the first rows of the split; None is all.
    """
    suite, spec = bench.suite, bench.suite.tasks[task]
    if processes.count() > 1 or suite.factored:  # processes must agree on whether there is a pass
        return make()
    inputs = features.encodings(bench, task, split, content=reads.pool == "content")[:rows]
    texts = spec.splits[split][list(spec.columns)].iloc[:rows].to_json(orient="values")
    names = features.read_names(bench.module, reads.layer)
    weights = {name: tensor for name, tensor in suite.base.items() if name in names}
    settings = [reads.layer, reads.pool, suite.dtype, bench.precision, bench.batch_size, bench.module.device.type]
    codes = [source.digest(Path(file)) for file in (features.__file__, __file__)]
    config = (suite.base_folder / "config.json").read_text(encoding="utf-8")
    key = content_key(weights, json.dumps([inputs, texts, settings, codes, config]))

    def made() -> dict[str, Tensor]:
        states, seconds = make()
        return {"states": states, "seconds": torch.tensor([seconds], dtype=torch.float64)}

    kept = remembered(cache_dir() / "hidden_states", key, ("states", "seconds"), made)
    return kept["states"], float(kept["seconds"])
