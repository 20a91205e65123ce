"""SMILE: which layers it takes, its parts and gates against a plain SVD, and what they take on disk."""

import pytest
import torch
from safetensors.torch import save_file

from baselines import smile
from support.methods import models
from twinbench.merging.compress import basis, svd
from twinbench.merging.gates import Projections
from twinbench.merging.merged import exclusive_bytes, exclusive_kind, gate_bytes, materialize
from twinbench.weights.parts import dense, stored

LINEAR = {"up.weight", "up.bias", "down.weight"}


def merged(base, experts, **changes):
    return materialize(smile.merge(base, experts, **{"rank": 3, "gate_rank": 2, "top_k": 1, "basis": basis} | changes))


def test_linear_layers_get_parts_and_all_else_stays_the_bases():
    base, experts = models()
    base["enc.word_embeddings.weight"], base["norm.bias"], base["conv.weight"] = (torch.zeros(4, 8) for _ in range(3))
    base |= {"conv.weight": torch.zeros(4, 8, 2), "wte.weight": torch.zeros(4, 8), "norm.bias": torch.zeros(8)}
    base["enc.relative_attention_bias.weight"] = torch.zeros(4, 8)
    experts = {t: {n: e.get(n, torch.ones_like(tensor)) for n, tensor in base.items()} for t, e in experts.items()}
    found = merged(base, experts)
    assert all(found.shared[name] is base[name] for name in base)
    assert all(parts.keys() == LINEAR for parts in found.exclusive.values())
    assert found.gates.keys() == {"up.weight", "down.weight"}


def test_parts_are_the_truncated_svd_and_the_bias_difference():
    base, experts = models()
    for rank in (1, 3, 8, 100):
        for task, parts in merged(base, experts, rank=rank).exclusive.items():
            for name in ("up.weight", "down.weight"):
                u, s, vt = torch.linalg.svd(experts[task][name] - base[name], full_matrices=False)
                torch.testing.assert_close(dense(parts[name]), u[:, :rank] * s[:rank] @ vt[:rank], atol=1e-5, rtol=0)
                assert parts[name].right.shape[0] == min(rank, 8)
            assert torch.equal(parts["up.bias"], experts[task]["up.bias"] - base["up.bias"])


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (8, 8)])
def test_directions_are_right_singular_vectors_of_tall_wide_and_square_matrices(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    _, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    for k in (1, 3, 8):
        found = smile.directions(svd(matrix, k))
        torch.testing.assert_close(found @ found.T, torch.eye(k), atol=1e-5, rtol=0)
        torch.testing.assert_close((found * vt[:k]).sum(1).abs(), torch.ones(k), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_a_direction_that_is_rounding_is_none(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape[0], 2) @ torch.randn(2, shape[1])
    found = smile.directions(svd(matrix, 5))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    x = torch.randn(shape[1])
    torch.testing.assert_close((found @ x).norm(), (torch.linalg.pinv(matrix) @ matrix @ x).norm(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_gate_is_its_equation(top_k):
    base, experts = models()
    x = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(2))
    got = merged(base, experts, top_k=top_k).gates["up.weight"].weights(x)
    tau = [experts[task]["up.weight"] - base["up.weight"] for task in experts]
    vectors = [torch.linalg.svd(matrix).Vh[:2] for matrix in tau]
    for row in range(5):
        for token in range(4):
            probabilities = torch.stack([(v @ x[row, token]).norm() for v in vectors]).softmax(0)
            kept = probabilities.sort(descending=True).indices[:top_k]
            wanted = torch.zeros(3).index_copy(0, kept, probabilities[kept] / probabilities[kept].sum())
            torch.testing.assert_close(got[row, token], wanted, atol=1e-5, rtol=0)


def test_experts_that_tie_share_an_input():
    gate = Projections(torch.tensor([[[1.0, 0]], [[0, 1.0]], [[0, 1.0]]]), 1)
    wanted = torch.tensor([[1, 0, 0], [0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(gate.weights(torch.tensor([[2.0, 1], [1, 2], [0, 0]])), wanted)


def test_a_gate_works_in_float32_under_autocast_and_on_bfloat16():
    gate = Projections(torch.tensor([[[1.0, 0]], [[0.0, 1.0]]]), 2)
    x = torch.tensor([[300.0, 300.5]])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gate.weights(x), torch.tensor([[-0.5, 0.0]]).softmax(-1))
    assert gate.weights(x.bfloat16()).dtype == torch.float32


def test_an_unchanged_layer_has_no_gate_and_an_unchanged_expert_draws_no_input():
    base, experts = models()
    for task in experts:
        experts[task]["up.weight"], experts[task]["up.bias"] = base["up.weight"], base["up.bias"]
    experts["task1"]["down.weight"] = base["down.weight"]
    found = merged(base, experts)
    assert found.gates.keys() == {"down.weight"}
    assert [set(parts) for parts in found.exclusive.values()] == [{"down.weight"}, set(), {"down.weight"}]
    weights = found.gates["down.weight"].weights(torch.randn(50, 12))
    assert not weights[:, 1].any() and (weights.sum(1) == 1).all()


def test_a_layer_whose_bias_alone_changes_shares_it_among_all():
    base, experts = models()
    experts = {t: base | {"up.bias": expert["up.bias"]} for t, expert in experts.items()}
    found = merged(base, experts)
    assert found.gates.keys() == {"up.weight"}
    assert all(parts.keys() == {"up.bias"} for parts in found.exclusive.values())
    torch.testing.assert_close(found.gates["up.weight"].weights(torch.randn(4, 8)), torch.full((4, 3), 1 / 3))


def test_what_is_stored_is_counted_to_the_byte(tmp_path):
    base, experts = models()
    found = merged(base, experts)
    assert found.gates["up.weight"].directions.shape == (3, 2, 8)
    save_file({f"{n}.directions": gate.directions for n, gate in found.gates.items()}, tmp_path / "gates.safetensors")
    assert gate_bytes(found) == (tmp_path / "gates.safetensors").stat().st_size
    tensors = sum(4 * gate.directions.numel() for gate in found.gates.values())
    assert tensors == 4 * 3 * 2 * (8 + 12)
    own = [
        {f"{n}.{k}": t for n, part in parts.items() for k, t in stored(part).items()}
        for parts in found.exclusive.values()
    ]
    sizes = 0
    for tensors in own:
        save_file(tensors, tmp_path / "own.safetensors")
        sizes += (tmp_path / "own.safetensors").stat().st_size
    assert exclusive_bytes(found) == sizes
    assert exclusive_kind(found) == "low-rank + dense vectors"
    assert merged(base, experts, gate_rank=100).gates["down.weight"].directions.shape == (3, 8, 12)


def test_a_basis_that_remembers_is_asked():
    base, experts = models(count=1)
    asked = []

    def remembered(matrix):
        asked.append(matrix.clone())
        return basis(matrix)

    merged(base, experts, basis=remembered)
    wanted = [experts["task0"][name] - base[name] for name in ("up.weight", "down.weight")]
    for matrix in asked:
        assert any(torch.equal(matrix, other) for other in wanted)
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("name", "linear"),
    [
        ("embeddings.word_embeddings.weight", False),
        ("encoder.relative_attention_bias.weight", False),
        ("model.embed_tokens.weight", False),
        ("transformer.wte.weight", False),
        ("shared.weight", False),
        ("embeddings_project.weight", True),  # ELECTRA's
        ("encoder.embedding_hidden_mapping_in.weight", True),  # ALBERT's
        ("encoder.layer.0.attention.self.query.weight", True),
        ("encoder.layer.0.attention.self.query.bias", False),
    ],
)
def test_embeddings_are_told_by_their_modules_own_name(name, linear):
    assert smile.is_linear(name, torch.zeros(2, 3)) is linear
    assert not smile.is_linear(name, torch.zeros(3))
