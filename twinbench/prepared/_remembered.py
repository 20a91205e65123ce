"""What is measured of an expert on its own training rows, remembered on disk."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from twinbench.assets.sources import cache_dir
from twinbench.system import source
from twinbench.weights.disk_cache import content_key, remembered
from twinbench.weights.state_dict import StateDict


def measured(
    bench, expert: str, rows: int, file: str, names: Iterable[str], make: Callable[[], Mapping[str, Tensor]]
) -> StateDict:
    """Tensors by name, read on access; measured where they are not remembered.

    The key holds what they depend on: the expert with its head, the inputs, the model's configuration and dtype, and
    the code that measures.

    Args:
        rows: how many of the first training rows of the expert's task.
        file: of the code that measures; its stem is the argument's name.
        names: of the tensors that ``make`` measures.
    """
    suite, code = bench.suite, Path(file)

    def key() -> str:
        inputs = {}
        for row, batch in enumerate(suite.workload.batches(bench, expert, "train", rows, 1)):
            inputs |= {f"row {row} {name}": tensor for name, tensor in batch.items()}
        read = {**inputs, **suite.heads.get(expert, {}), **suite.experts[expert]}
        kind = Path(suite.workload.batches.__code__.co_filename)  # with what else it says of its models' statistics
        codes = [source.digest(file) for file in (code, kind, Path(__file__))]
        config = (suite.base_folder / "config.json").read_text(encoding="utf-8")
        return content_key(read, "\n".join([*codes, suite.dtype, bench.precision, config]))

    found = bench.remember(("prepared", code.stem, expert, rows), key)
    return remembered(cache_dir() / code.stem, found, names, make)
