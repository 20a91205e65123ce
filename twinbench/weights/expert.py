"""What is merged of a checkpoint: a whole model, or its encoder under the names that it has without a head.

The head is all that stands above the encoder's hidden states: the classifier, and the pooler below it. RoBERTa has that
layer in its classifier and BERT in the bare model; it is the same layer, so it is the task's own in both.
"""

import filecmp
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from twinbench.system.mistakes import Mistake
from twinbench.weights.lora import read_adapter
from twinbench.weights.pretrained import open_pretrained
from twinbench.weights.state_dict import SHOWN, Layout, StateDict, layout, listed, read_checkpoint, renamed
from twinbench.weights.write import DTYPES

VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json")


def open_expert(folder: Path, base: StateDict, reference: Layout, prefix: str = "") -> tuple[StateDict, Layout]:
    """Open a checkpoint, whole or made of the base by a LoRA adapter, and its layout.

    Args:
        reference: layout of ``base``.
        prefix: what an adapted model puts before the base's names.
    """
    if not is_adapter(folder):
        return read_checkpoint(folder), layout(folder)
    state = read_adapter(folder, renamed(base, {prefix + name: name for name in base}))
    entries = {prefix + name: entry for name, entry in reference.items()}
    code = {dtype: code for code, dtype in DTYPES.items()}
    added = {name: state[name] for name in state if name not in entries}
    return state, entries | {name: (code[tensor.dtype], tuple(tensor.shape)) for name, tensor in added.items()}


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def in_pooler(name: str) -> bool:
    """Whether a tensor of the bare model belongs to its pooler."""
    return name.startswith("pooler.")


def encoder(state: StateDict, entries: Layout) -> tuple[StateDict, Layout]:
    """A bare model and its layout without the pooler."""
    kept = [name for name in entries if not in_pooler(name)]
    return StateDict(kept, state.__getitem__), {name: entries[name] for name in kept}


def bare(state: StateDict, entries: Layout, prefix: str, own: list[str], who: str) -> tuple[StateDict, Layout]:
    """The bare model of a checkpoint under its own names, and its layout.

    A bare model has these names, a model with a head has them behind ``prefix``.

    Args:
        own: names that must be there.

    Raises:
        ValueError: some are missing.
    """
    prefixed = {name.removeprefix(prefix): name for name in entries if name.startswith(prefix)}
    names = prefixed or {name: name for name in entries if name in own or in_pooler(name)}
    names.pop("embeddings.position_ids", None)  # a constant buffer that older checkpoints carry
    missing = [name for name in own if name not in names]
    if missing:
        raise Mistake(f"{who} lacks {listed(missing)} of the architecture in its config.json")
    return renamed(state, names), {new: entries[old] for new, old in names.items()}


def check_vocabulary(base: Path, folder: Path, who: str) -> None:
    """Compare tokenizers; an expert's folder may come without one.

    Raises:
        ValueError: tokens differ; the first three that differ are named.
    """
    files = [name for name in VOCABULARIES if (folder / name).exists()]
    if all((base / name).exists() and filecmp.cmp(base / name, folder / name, shallow=False) for name in files):
        return
    ours, theirs = _vocabulary(base), _vocabulary.__wrapped__(folder)
    differing = [t for t in sorted(ours.keys() | theirs.keys()) if ours.get(t) != theirs.get(t)]
    if differing:
        shown = ", ".join(f"{t!r}: {theirs.get(t)} (base {ours.get(t)})" for t in differing[:SHOWN])
        raise Mistake(f"{who}: its tokenizer differs from the base's in {len(differing)} tokens: {shown}")


@lru_cache(maxsize=1)  # the base's, for all its experts
def _vocabulary(folder: Path) -> Mapping[str, int]:
    from transformers import AutoTokenizer  # takes seconds, and the files are mostly equal

    return open_pretrained(AutoTokenizer, folder).get_vocab()
