"""Which architectures routed inference takes: tiny random models of each, against a dense merge per sample.

    PYTHONPATH=.:tests .venv/bin/python tests/routing/architectures.py

Writes docs/architectures.md; tests/routing/test_architectures.py checks it.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from twinbench.merging.merged import Merged
from twinbench.routing.attach import attach
from twinbench.weights.parts import LowRank

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"
EXPERTS, SCALING, RANK_RATIO = 3, 0.3, 0.3
TOLERANCE = 1e-4  # of the largest logit
WEIGHTS = torch.tensor([[0.2, 0.3, 0.5], [0, 1, 0], [0.9998, 1e-4, 1e-4], [0.6, 0.1, 0.3]])
SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "num_labels": 3,
}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
RELATIVE = {"relative_attention": True, "max_relative_positions": 8, "position_biased_input": False}
V3 = RELATIVE | {"position_buckets": 4, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
BOTH_WAYS = {"pos_att_type": ["c2p", "p2c"]}

CLASSIFIERS = {
    "BERT": ("bert", {}),
    "RoBERTa": ("roberta", {}),
    "XLM-R": ("xlm-roberta", {}),
    "MPNet": ("mpnet", {}),
    "DistilBERT": ("distilbert", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}),
    "ELECTRA": ("electra", {"embedding_size": 8}),
    "ALBERT": ("albert", {"embedding_size": 8}),
    "ModernBERT": ("modernbert", {"cls_token_id": 0, "sep_token_id": 2, "local_attention": 6}),
    "DeBERTa v1": ("deberta", {}),
    "DeBERTa v1, relative attention": ("deberta", RELATIVE | BOTH_WAYS),
    "DeBERTa v2": ("deberta-v2", {}),
    "DeBERTa v2, relative attention": ("deberta-v2", RELATIVE | BOTH_WAYS),
    "DeBERTa v3": ("deberta-v2", V3 | BOTH_WAYS),
    "Longformer": ("longformer", {"attention_window": 4}),
    "BigBird": ("big_bird", {"attention_type": "original_full"}),
    "XLNet": ("xlnet", {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "max_position_embeddings": None}),
    "T5 encoder": ("t5", {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}),
    "Llama classifier": ("llama", GROUPED),
    "Qwen2 classifier": ("qwen2", GROUPED),
}
CAUSAL = {
    "Llama": ("llama", GROUPED),
    "Qwen2": ("qwen2", GROUPED),
    "Qwen3": ("qwen3", GROUPED),
    "Mistral": ("mistral", GROUPED),
    "Gemma 1": ("gemma", GROUPED),
    "Gemma 2": ("gemma2", GROUPED | {"query_pre_attn_scalar": 8, "sliding_window": 6}),
    "Gemma 3": ("gemma3_text", GROUPED | {"query_pre_attn_scalar": 8, "sliding_window": 6}),
    "GPT-2": ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "n_positions": 40}),
    "GPT-NeoX": ("gpt_neox", {}),
    "Phi": ("phi", {}),
    "OPT": ("opt", {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "BioGPT": ("biogpt", {}),
    "OLMo": ("olmo", GROUPED),
    "OLMo 2": ("olmo2", GROUPED),
    "Falcon": ("falcon", {"ffn_hidden_size": 24}),
    "Cohere": ("cohere", GROUPED | {"use_qk_norm": True}),
    "Nemotron": ("nemotron", GROUPED),
    "Mixtral": ("mixtral", {"num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "Qwen3-MoE": ("qwen3_moe", GROUPED | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}),
    "Mamba": ("mamba", {"state_size": 4, "conv_kernel": 3}),
}
ENCODERS = ("T5 encoder",)


class Case(NamedTuple):
    name: str
    kind: str  # "classification", "causal, tied" or "causal, untied"


class Outcome(NamedTuple):
    refused: str | None
    error: float
    effect: float


def cases() -> list[Case]:
    causal = [Case(name, f"causal, {tying}") for name in CAUSAL for tying in ("tied", "untied")]
    return [Case(name, "classification") for name in CLASSIFIERS] + causal


def built(case: Case) -> tuple[nn.Module, nn.Module]:
    """A random model, and what of it is merged."""
    torch.manual_seed(0)
    kind, changes = (CLASSIFIERS if case.kind == "classification" else CAUSAL)[case.name]
    given = {key: value for key, value in (SIZES | changes).items() if value is not None}
    config = AutoConfig.for_model(kind, **given)
    config.tie_word_embeddings = case.kind == "causal, tied"
    if case.name in ENCODERS:
        model = encoder(config)
    else:
        auto = AutoModelForSequenceClassification if case.kind == "classification" else AutoModelForCausalLM
        model = auto.from_config(config)
    model = model.eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape)
    return model, model.base_model if case.kind == "classification" else model


def encoder(config) -> nn.Module:
    from transformers import T5EncoderModel

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_model, self.head = T5EncoderModel(config), nn.Linear(config.d_model, 3)

        def forward(self, **batch):
            hidden = self.base_model(**batch).last_hidden_state
            return Logits(self.head(hidden[:, 0]))

    return Classifier()


class Logits(NamedTuple):
    logits: Tensor


def random_batch(causal: bool) -> dict[str, Tensor]:
    lengths, width = torch.tensor([9, 5, 12, 7])[:, None], torch.arange(12)
    mask = width >= 12 - lengths if causal else width < lengths
    ids = torch.randint(3, 60, (4, 12)).where(mask, 1)
    return {"input_ids": ids, "attention_mask": mask.long()}


def experts_of(backbone: nn.Module) -> tuple[dict[str, Tensor], list[dict]]:
    """A shared expert by task arithmetic, and every expert's compressed difference from it."""
    base = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    experts = [{name: p + 0.1 * torch.randn(p.shape) for name, p in base.items()} for _ in range(EXPERTS)]
    shared = {name: p + SCALING * sum(expert[name] - p for expert in experts) for name, p in base.items()}
    return shared, [{name: compressed(expert[name] - shared[name]) for name in base} for expert in experts]


def compressed(delta: Tensor) -> Tensor | LowRank:
    if delta.dim() < 2:
        return delta
    rank = max(1, int(RANK_RATIO * min(delta.shape[-2:])))
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    return LowRank((u * s[..., None, :])[..., :rank].float(), v[..., :rank, :].float())


def load(backbone: nn.Module, shared: dict[str, Tensor], parts: list[dict], weights: list[float]) -> None:
    """The dense merge of one route, in the model."""
    for name, parameter in backbone.named_parameters():
        total = shared[name].double()
        for weight, expert in zip(weights, parts, strict=True):
            part = expert[name]
            total = total + weight * (part.left.double() @ part.right.double() if isinstance(part, LowRank) else part)
        parameter.copy_(total)


@torch.inference_mode()
def tried(case: Case) -> Outcome:
    """Compare routed logits with the dense merge, in batches of 4, 2 and 1."""
    model, backbone = built(case)
    shared, parts = experts_of(backbone)
    batch = random_batch(case.kind != "classification")
    rows = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(4)]
    expected = []
    for row, weights in zip(rows, WEIGHTS.tolist(), strict=True):
        load(backbone, shared, parts, weights)
        expected.append(model(**row).logits)
    load(backbone, shared, parts, [0.0] * EXPERTS)
    mask = batch["attention_mask"].bool() if case.kind != "classification" else torch.ones(4, dtype=torch.bool)
    expected, static = torch.cat(expected)[mask], model(**batch).logits[mask]
    found = []
    try:
        with attach(backbone, Merged({}, {str(t): expert for t, expert in enumerate(parts)})) as routes:
            for size in (4, 2, 1):
                pieces = []
                for start in range(0, 4, size):
                    routes.weights = WEIGHTS[start : start + size]
                    pieces.append(model(**{key: v[start : start + size] for key, v in batch.items()}).logits)
                found.append(torch.cat(pieces)[mask])
    except ValueError as error:
        return Outcome(str(error), 0.0, 0.0)
    scale = expected.abs().max()
    error = max((logits - expected).abs().max() for logits in found) / scale
    return Outcome(None, error.item(), ((static - expected).abs().max() / scale).item())


def table(outcomes: dict[Case, Outcome]) -> str:
    """The page of all outcomes."""
    lines = [
        "# Architectures that routed inference takes\n",
        "Tiny random models: hidden size 16, two layers, three experts that differ from the base in every tensor.",
        "A batch of four padded texts has four routes: soft, one-hot and nearly one-hot. It runs in batches of 4, 2",
        "and 1, and each text is compared with a dense merge. Error: the largest difference of a logit from the dense",
        "merge, as a share of the largest logit. Effect: the same of the shared model, which has no parts. An error",
        "above 1e-4 fails the test. What is refused is refused by the first batch, before anything is scored.\n",
        "Made by `PYTHONPATH=.:tests .venv/bin/python tests/routing/architectures.py`, checked by",
        "`tests/routing/test_architectures.py`.\n",
        "| architecture | model | works | error | effect | refused because |",
        "| --- | --- | --- | ---: | ---: | --- |",
    ]
    for case, (refused, error, effect) in outcomes.items():
        found = "| no | | |" if refused else f"| yes | {error:.0e} | {effect:.2f} |"
        lines.append(f"| {case.name} | {case.kind} {found} {refused or ''} |".replace("  |", " |"))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table({case: tried(case) for case in cases()}))
