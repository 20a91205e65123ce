"""An expert's low-rank parts as a PEFT LoRA adapter (Hu et al., arXiv 2106.09685) of the bare shared model.

LoRA adds ``scale * B A`` to a weight, which a part ``left @ right`` is with B = left, A = right and scale 1. PEFT keeps
an embedding's factors transposed. What LoRA has no place for, differences of vectors (biases, LayerNorm), stays apart.
"""

from collections import Counter
from collections.abc import Mapping

from torch import Tensor, nn

from twinbench.system.mistakes import Mistake
from twinbench.weights.lora import PREFIX
from twinbench.weights.parts import LowRank, Part


def split(parts: Mapping[str, Part], who: str) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """An expert's matrices and its vectors.

    Raises:
        ValueError: a matrix is not low-rank.
    """
    low = {name: part for name, part in parts.items() if isinstance(part, LowRank)}
    vectors = {name: part for name, part in parts.items() if isinstance(part, Tensor) and part.dim() < 2}
    other = [name for name in parts if name not in low and name not in vectors]
    if other:
        raise Mistake(
            f"expert {who}: {other[0]} is not low-rank, so no LoRA adapter can hold it; use method.compression=svd"
        )
    return low, vectors


def lora(parts: Mapping[str, LowRank], backbone: nn.Module) -> tuple[dict, dict[str, Tensor]]:
    """The adapter's configuration and its tensors, under PEFT's names.

    Args:
        parts: by parameter name of ``backbone``. PEFT refuses an adapter of nothing, so an expert without parts (it is
            the shared expert) gets one of zeros.

    Raises:
        ValueError: a part belongs to a module that is no Linear or Embedding.
    """
    parts = parts or _nothing(backbone)
    tensors, ranks = {}, {}
    for name, (left, right) in parts.items():
        owner, _, parameter = name.rpartition(".")
        module = backbone.get_submodule(owner)
        if parameter != "weight" or not isinstance(module, (nn.Linear, nn.Embedding)):
            kind = type(module).__name__
            raise Mistake(f"LoRA adapters hold the weights of Linear and Embedding; {name} belongs to a {kind}")
        key, ranks[owner] = f"{PREFIX}{owner}", right.shape[0]
        if isinstance(module, nn.Linear):
            tensors |= {f"{key}.lora_A.weight": right, f"{key}.lora_B.weight": left}
        else:
            tensors |= {f"{key}.lora_embedding_A": left.T, f"{key}.lora_embedding_B": right.T}
    return _config(ranks), tensors


def _config(ranks: Mapping[str, int]) -> dict:
    """The commonest rank as ``r``, the others as patterns; alpha follows the rank, which makes the scale 1."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{owner}": rank for owner, rank in ranks.items() if rank != common}  # ^: the whole name, not its end
    return {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
    }


def _nothing(backbone: nn.Module) -> dict[str, LowRank]:
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Linear):
            weight = module.weight
            zeros = LowRank(weight.new_zeros(weight.shape[0], 1), weight.new_zeros(1, weight.shape[1]))
            return {f"{name}.weight": zeros}
    raise Mistake(f"{type(backbone).__name__} has no Linear, so no LoRA adapter fits it")
