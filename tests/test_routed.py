"""One forward for a mixed batch equals a dense merge per sample: the definition, written out slowly."""

import pytest
import torch
from conftest import CLASSES, tokenizer
from transformers import BertForSequenceClassification

from baselines import task_arithmetic
from twinbench import twin_merging
from twinbench.compress import dense
from twinbench.merged import Merged, materialize
from twinbench.routed import attach
from twinbench.state_dict import read_checkpoint


@pytest.fixture(scope="module")
def parts(family):
    def backbone(folder):
        found = read_checkpoint(folder)
        return {name.removeprefix("bert."): found[name] for name in found if not name.startswith("classifier")}

    base = backbone(family / "base")
    experts = {task: backbone(family / "experts" / task) for task in CLASSES}
    shared = dict(task_arithmetic.merge(base, experts, scaling=0.3).shared)
    return base, experts, shared


TEXTS = ["w0 w1", "w30 w31 w32 w33 w34 w35 w36", "w5", "w9 w20 w39 w2 w14", "unknown words here"]
WEIGHTS = torch.tensor([[1, 0, 0], [0, 1, 0], [0.2, 0.3, 0.5], [0, 0, 1], [0.6, 0.4, 0]])


def model_and_batch(family):
    model = BertForSequenceClassification.from_pretrained(family / "experts" / "colours").eval()
    return model, tokenizer()(TEXTS, padding=True, return_tensors="pt")


def per_sample_dense(model, batch, merged: Merged, weights):
    """Rebuild all weights for each sample and run it alone."""
    rows = []
    for row, route in enumerate(weights):
        state = {name: tensor.clone() for name, tensor in merged.shared.items()}
        for weight, expert in zip(route, merged.exclusive.values(), strict=True):
            for name, part in expert.items():
                state[name] += weight * dense(part)
        model.bert.load_state_dict(state)
        length = int(batch["attention_mask"][row].sum())
        rows.append(model(**{key: value[row : row + 1, :length] for key, value in batch.items()}).logits)
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("compression", "rank_ratio", "density"),
    [("svd", 0.2, None), ("svd", 1.0, None), ("magnitude", None, 0.1), ("bernoulli", None, 0.5), ("none", None, None)],
)
@torch.inference_mode()
def test_mixed_batch_equals_per_sample_dense_merge(family, parts, compression, rank_ratio, density):
    base, experts, shared = parts
    settings = {"compression": compression, "rank_ratio": rank_ratio, "density": density, "seed": 0}
    merged = materialize(twin_merging.merge(base, experts, shared=shared, **settings))
    model, batch = model_and_batch(family)
    expected = per_sample_dense(model, batch, merged, WEIGHTS)
    model.bert.load_state_dict(shared)
    static = model(**batch).logits
    with attach(model.bert, merged.exclusive) as routes:
        routes.weights = WEIGHTS
        got = model(**batch).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert (got - static).abs().max() > 1e-2, "the exclusive parts matter here"
    assert torch.equal(model(**batch).logits, static), "afterwards the model is the shared expert again"


@torch.inference_mode()
def test_experts_of_different_kinds_and_ranks_share_a_batch(family, parts):
    base, experts, shared = parts

    def exclusive(task, **settings):
        settings = {"rank_ratio": None, "density": None, "seed": 0} | settings
        return twin_merging.merge(base, {task: experts[task]}, shared=shared, **settings).exclusive[task]

    mixed = {
        "letters": exclusive("letters", compression="svd", rank_ratio=0.1),
        "colours": exclusive("colours", compression="svd", rank_ratio=0.6),
        "size": exclusive("size", compression="magnitude", density=0.3),
    }
    merged = materialize(Merged(shared, mixed))
    model, batch = model_and_batch(family)
    expected = per_sample_dense(model, batch, merged, WEIGHTS)
    model.bert.load_state_dict(shared)
    with attach(model.bert, merged.exclusive) as routes:
        routes.weights = WEIGHTS
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=0)


def test_a_part_of_an_unknown_module_is_refused():
    convolution = torch.nn.Sequential(torch.nn.Conv1d(2, 2, 1))
    with (
        pytest.raises(ValueError, match="Conv1d"),
        attach(convolution, {"t": {"0.weight": torch.ones(2, 2, 1)}}),
    ):
        pass
    assert not convolution[0]._forward_hooks
