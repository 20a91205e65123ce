"""What transformers opens of a folder, and what is copied from it: no code of its own, and no file from elsewhere."""

import json
import shutil
from pathlib import Path
from typing import Any

from twinbench.system.mistakes import Mistake

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def open_pretrained(kind: Any, folder: Path, **given) -> Any:
    """``kind.from_pretrained(folder, ...)`` of an Auto class: a configuration, a tokenizer or a model.

    Raises:
        ValueError: it takes code that the folder brings, or a file is broken.
    """
    try:
        return kind.from_pretrained(folder, trust_remote_code=False, **given)
    except Exception as error:  # the tokenizers library raises no narrower class for a broken file
        raise _refused(kind, folder, error) from error


def new_model(kind: Any, folder: Path, **given) -> Any:
    """``kind.from_config`` of an Auto class, with the folder's configuration: a model with new weights.

    Raises:
        ValueError: as `open_pretrained`, or the architecture has no such model.
    """
    from transformers import AutoConfig

    config = open_pretrained(AutoConfig, folder, **given)
    try:
        return kind.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise _refused(kind, folder, error) from error


def copy_tokenizer(tokenizer: Any, base: Path, folder: Path) -> list[Path]:
    """Copy the files that a tokenizer was opened from; one that has been used would write down its last call's padding.

    Returns:
        The copies.
    """
    names = dict.fromkeys((*tokenizer.vocab_files_names.values(), *SETTINGS))
    return [copied(base / name, folder / name) for name in names if (base / name).exists()]


def copied(file: Path, target: Path) -> Path:
    """Copy a file's content unless it is a link to somewhere outside of its folder, or of the hub's cache around it.

    Raises:
        ValueError: it is one; what it leads to may be nobody else's to read.
    """
    real, home = file.resolve().parent, file.parent.resolve()
    if real != home and real not in (parent / "blobs" for parent in home.parents):
        raise Mistake(f"{file}: a link out of its folder, to {file.resolve()}, is not copied; put the file there")
    shutil.copyfile(file, target)
    return target


def _refused(kind: Any, folder: Path, error: Exception) -> Mistake:
    why = "it has code of its own (auto_map), which is never run" if _has_code(folder) else str(error).split("\n")[0]
    return Mistake(f"{folder}: {kind.__name__} cannot open it: {why}")


def _has_code(folder: Path) -> bool:
    texts = (folder / name for name in ("config.json", "tokenizer_config.json"))
    try:
        return any("auto_map" in json.loads(file.read_bytes()) for file in texts if file.exists())
    except (OSError, ValueError, TypeError):
        return False
