"""Parts stand for the tensors that they were made of, and are stored in the bytes that their kind needs."""

import pytest
import torch
from safetensors.torch import save_file

from twinbench.merging.merged import (
    Merged,
    exclusive_bytes,
    exclusive_kind,
    gate_bytes,
    materialize,
    shared_bytes,
    with_route,
)
from twinbench.weights.parts import LowRank, Masked, Sparse, dense, is_zero, kind, packed, stored, unpacked
from twinbench.weights.state_dict import StateDict


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1,), (8,), (9,), (3, 5), (2, 3, 4)])
def test_a_mask_takes_one_bit_per_element(shape):
    mask = draw(*shape) > 0
    bits = packed(mask)
    assert bits.dtype == torch.uint8 and len(bits) == -(-mask.numel() // 8)
    assert torch.equal(unpacked(bits, mask.numel()).view(shape), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_masked_part_is_its_share_of_the_common_tensor(dtype):
    of, mask = draw(5, 7).to(dtype), draw(5, 7, seed=1) > 0
    part = Masked(packed(mask), torch.tensor(0.75), of)
    assert torch.equal(dense(part), (0.75 * of) * mask) and dense(part).dtype == dtype
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored(part).items()} == {
        "bits": (torch.uint8, (5,)),
        "scale": (torch.float32, ()),
    }, "the common tensor is not the part's own"


def test_kinds_and_zeros():
    of, some, none = draw(3, 4), packed(draw(3, 4) > 0), packed(torch.zeros(3, 4))
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    kinds = {
        "dense": (of, torch.zeros(3, 4)),
        "low-rank": (LowRank(draw(3, 1), draw(1, 4)), LowRank(draw(3, 0), draw(0, 4))),
        "sparse": (Sparse(draw(1), packed(torch.arange(12) == 3), (3, 4)), Sparse(draw(0), none, (3, 4))),
        "mask": (Masked(some, one, of), Masked(none, one, of)),
    }
    for name, (full, nothing) in kinds.items():
        assert kind(full) == kind(nothing) == name
        assert not is_zero(full) and dense(full).any()
        assert is_zero(nothing) and not dense(nothing).any() and dense(nothing).shape == (3, 4)
    assert is_zero(Masked(some, zero, of)) and is_zero(Masked(some, one, 0 * of))


def merged_of_masks(log=None) -> Merged:
    """Two masks of one common tensor, made on access, and a name that nobody changes."""
    base = {"w": draw(4, 6), "still": torch.ones(3)}
    held = {}

    def common(name: str) -> torch.Tensor:
        if name not in held:
            held.clear()
            held[name] = draw(4, 6, seed=2) if name == "w" else torch.zeros(3)
            (log if log is not None else []).append(name)
        return held[name]

    def part(name: str, seed: int) -> Masked:
        return Masked(packed(draw(*base[name].shape, seed=seed) > 0), torch.tensor(2.0), common(name))

    exclusive = {t: StateDict(base, lambda name, s=s: part(name, s)) for t, s in (("a", 3), ("b", 4))}
    return Merged(base, exclusive, common=StateDict(base, common))


def test_parts_and_common_share_one_tensor_that_is_made_once():
    made = []
    merged = materialize(merged_of_masks(made))
    assert made == ["w", "still"], "name by name: no expert makes it again"
    assert merged.exclusive["a"]["w"].of is merged.exclusive["b"]["w"].of is merged.common["w"]
    assert list(merged.common) == list(merged.exclusive["a"]) == ["w"], "what is zero is left out"
    assert list(merged.shared) == ["w", "still"]


def test_bytes_of_masks_are_those_of_the_files(tmp_path):
    merged = materialize(merged_of_masks())

    def written(tensors: dict) -> int:
        save_file(tensors, tmp_path / "file.safetensors")
        return (tmp_path / "file.safetensors").stat().st_size

    own = [written({f"w.{k}": t for k, t in stored(parts["w"]).items()}) for parts in merged.exclusive.values()]
    assert (exclusive_bytes(merged), exclusive_kind(merged)) == (sum(own), "mask")
    assert shared_bytes(merged) == written(merged.shared) + written(merged.common), "common is written once"
    low = LowRank(draw(4, 1), draw(1, 6))
    always = Merged(merged.shared, always=({"w": low}, {"w": low}))
    assert shared_bytes(always) == written(merged.shared) + 2 * written({"w.left": low.left, "w.right": low.right})
    assert (exclusive_bytes(always), exclusive_kind(always), gate_bytes(always)) == (0, "none", 0)


def test_gates_are_counted_as_they_would_be_written(tmp_path):
    class Constant:
        def stored(self):
            return {"directions": torch.ones(2, 3)}

    merged = materialize(Merged({"w": torch.ones(1)}, gates={"w": Constant()}))
    save_file({"w.directions": torch.ones(2, 3)}, tmp_path / "gates.safetensors")
    assert gate_bytes(merged) == (tmp_path / "gates.safetensors").stat().st_size


@pytest.mark.parametrize("kept", [True, False])
def test_a_route_adds_what_is_always_there(kept):
    shared, low = {"w": draw(4, 6), "v": draw(3)}, LowRank(draw(4, 2), draw(2, 6))
    merged = Merged(shared, {"a": {"w": draw(4, 6, seed=1)}, "b": {"v": draw(3, seed=1)}}, ({"w": low}, {"v": draw(3)}))
    found = with_route(materialize(merged) if kept else merged, [0.0, 0.5])
    assert torch.equal(found["w"], shared["w"] + dense(low))
    torch.testing.assert_close(found["v"], shared["v"] + draw(3) + 0.5 * draw(3, seed=1))
    with pytest.raises(ValueError, match="longer"):
        with_route(merged, [1.0])
