"""A quantized GGUF file as a Hugging Face folder: dequantized to float32 safetensors once, and kept in the cache."""

from pathlib import Path

from twinbench.system.cached import made
from twinbench.system.mistakes import Mistake
from twinbench.weights.pretrained import open_pretrained


def dequantized(file: Path, folder: Path) -> Path:
    """Return ``folder``, which holds the model of a GGUF file and its tokenizer; made at the first call.

    The weights are those that the quantization kept, not the original ones.

    Raises:
        ValueError: the file is no GGUF model that transformers knows.
    """
    return made(folder, lambda part: _dequantize(file, part))


def _dequantize(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"dequantizing {file.name}, once", flush=True)
    try:
        read = open_pretrained(AutoModelForCausalLM, file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = open_pretrained(AutoTokenizer, file.parent, gguf_file=file.name)
    except ValueError as error:
        raise Mistake(f"{file.name} is no GGUF model that can be read: {error}") from error
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
