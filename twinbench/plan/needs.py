"""What a generative suite needs before anything of it runs: files to fetch, and memory. It loads nothing."""

from collections.abc import Mapping

import psutil

from twinbench.assets.headers import parameters
from twinbench.assets.sources import found, origin
from twinbench.plan.identity import expert_folder
from twinbench.plan.suite import own_experts

GB = 10**9


def lines(suite: Mapping) -> list[str]:
    """A few lines for a person.

    Raises:
        ValueError, FileNotFoundError: a malformed source, or a local one that is not there.
    """
    sources = {"base": suite["base"], "tokenizer": suite.get("tokenizer")}
    if suite["checkpoints"] is not None:
        sources |= {f"expert {name}": suite["checkpoints"][name] for name in own_experts(suite)}
    said = {what: f"{origin(source)}: {_state(source)}" for what, source in sources.items() if source}
    if suite["checkpoints"] is None:
        folders = {name: expert_folder(suite, name) for name in own_experts(suite)}
        lacking = [name for name, folder in folders.items() if not folder.exists()]
        said["experts"] = f"to be trained: {', '.join(lacking)}" if lacking else "trained, here"
    said["memory"] = _memory(suite)
    return [f"{suite['name']} needs", *(f"  {what:20} {words}" for what, words in said.items())]


def _state(source: Mapping) -> str:
    return "here" if found(source) else "to be fetched"


def _memory(suite: Mapping) -> str:
    folder = found(suite["base"])
    count = (parameters(folder) if folder and folder.is_dir() else None) or suite.get("parameters")
    if not count:
        return "unknown (suite.parameters, the number of the base's weights, is not given)"
    dtype, ram = suite.get("dtype", "float32"), psutil.virtual_memory().total / GB
    sizes = {"float32": 4 * count / GB, "bfloat16": 2 * count / GB, "float16": 2 * count / GB}
    fits = "fits" if sizes.get(dtype, sizes["float32"]) < ram else "does not fit"
    merges = "as factors" if suite.get("factored") else "dense, each as large or larger, in RAM"
    return (
        f"{int(count):,} weights: {sizes['float32']:.1f} GB in float32, {sizes['bfloat16']:.1f} GB in bfloat16; "
        f"one model in this suite's {dtype} {fits} into this machine's {ram:.1f} GB of RAM; "
        f"merges are beside it {merges}"
    )
