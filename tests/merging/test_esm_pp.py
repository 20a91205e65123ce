"""ESM++ against its equation, its limits, and a route that a text's padding does not change."""

import pytest
import torch

from baselines import esm_pp
from support.methods import grams, means, models
from twinbench.merging.gates import Prototypes, text_means
from twinbench.merging.merged import Merged, materialize
from twinbench.routing.layerwise import gated
from twinbench.weights.parts import LowRank, dense

LAYERS = ("up.weight", "down.weight")


def merged(base, experts, rank=2, shared=None) -> Merged:
    ask = {"gram": lambda task, rows: grams(base, f"{task} {rows}"), "means": lambda task, rows: means(base, task)}
    return materialize(esm_pp.merge(base, experts, shared=base if shared is None else shared, rank=rank, rows=5, **ask))


def test_parts_are_the_leading_directions_of_the_outputs_that_are_lacking():
    base, experts = models()
    shared = {name: tensor + 0.01 for name, tensor in base.items()}
    found = merged(base, experts, shared=shared)
    assert found.gates.keys() == set(LAYERS) and found.shared == shared
    for task, expert in experts.items():
        assert found.exclusive[task].keys() == set(LAYERS), "biases and embeddings are the shared model's"
        for name in LAYERS:
            delta = (expert[name] - shared[name]).double()
            gram = grams(base, f"{task} 5")[name].double()
            vectors = torch.linalg.eigh(delta @ gram @ delta.T).eigenvectors.flip(1)[:, :2]
            got = dense(found.exclusive[task][name]).double()
            torch.testing.assert_close(got, vectors @ vectors.T @ delta, atol=1e-5, rtol=0)


def test_no_part_of_that_rank_is_nearer_on_the_inputs():
    """The best rank-r fit of ``delta X`` (Eckart-Young): what is left of the outputs is their tail."""
    base, experts = models(count=1)
    delta = (experts["task0"]["up.weight"] - base["up.weight"]).double()
    gram = grams(base, "task0 5")["up.weight"].double()
    left = delta - dense(merged(base, experts).exclusive["task0"]["up.weight"]).double()
    lost = (left @ gram @ left.T).trace()
    values = torch.linalg.eigvalsh(delta @ gram @ delta.T).flip(0)
    torch.testing.assert_close(lost, values[2:].sum(), atol=1e-8, rtol=1e-4)


def test_full_rank_and_the_known_task_are_the_experts_layers():
    base, experts = models()
    found = merged(base, experts, rank=100)
    for task, expert in experts.items():
        for name in LAYERS:
            torch.testing.assert_close(base[name] + dense(found.exclusive[task][name]), expert[name], atol=1e-5, rtol=0)


def test_a_gate_picks_the_nearest_mean_for_a_whole_text():
    gate = Prototypes(torch.nn.functional.normalize(torch.tensor([[2.0, 0.1], [0.0, 5.0]])))
    x = torch.tensor([[[1.0, 0], [3, 1], [0, 50]], [[0.0, 1], [1, 1], [1, 2]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert gate.weights(x, mask).tolist() == [[[1, 0]] * 3, [[0, 1]] * 3], "padding would have been the largest"
    assert gate.weights(x)[0].tolist() == [[0, 1]] * 3
    assert gate.weights(torch.tensor([[1.0, 0], [0, 1]])).tolist() == [[1, 0], [0, 1]], "a pooler sees a row per text"
    with torch.autocast("cpu", torch.bfloat16):
        assert gate.weights(x.bfloat16(), mask).dtype == torch.float32


def test_means_of_texts_whose_padding_is_not_known_are_refused():
    with pytest.raises(ValueError, match=r"got \(2, 4, 3\) and a mask of \(2, 5\) tokens"):
        text_means(torch.zeros(2, 4, 3), torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"got \(8, 3\) and a mask"):
        text_means(torch.zeros(8, 3), torch.ones(2, 4, dtype=torch.bool))


class Texts(torch.nn.Module):
    """A layer over tokens, as an encoder calls it."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2, bias=False)

    def forward(self, inputs_embeds, attention_mask):
        return self.layer(inputs_embeds)


@torch.inference_mode()
def test_the_model_hands_its_mask_to_the_gates():
    model = Texts()
    torch.nn.init.eye_(model.layer.weight)
    parts = {
        task: {"layer.weight": LowRank(torch.full((2, 1), 10.0**t), torch.eye(2)[t : t + 1])}
        for t, task in enumerate("ab")
    }
    whole = Merged({}, parts, gates={"layer.weight": Prototypes(torch.eye(2))})
    x, mask = torch.tensor([[[1.0, 0], [0, 9]], [[0.0, 1], [0, 1]]]), torch.tensor([[1, 0], [1, 1]])
    with gated(model, whole):
        found = model(inputs_embeds=x, attention_mask=mask)
        again = model(inputs_embeds=x[:1, :1], attention_mask=mask[:1, :1])
    assert found[0, 0].tolist() == [2, 1], "expert a adds 1 * x[0] to both"
    assert found[1].tolist() == [[10, 11], [10, 11]], "expert b adds 10 * x[1] to both"
    assert again[0, 0].tolist() == [2, 1]
