"""Compression against slow references, and on the matrices that break a careless SVD."""

import pytest
import torch

from twinbench.merging.compress import bernoulli, generator, magnitude, svd
from twinbench.weights.parts import LowRank, dense, is_zero, stored


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (16, 16), (1, 9), (9, 1)])
@pytest.mark.parametrize("rank", [1, 3, 100])
def test_svd_is_the_best_approximation(shape, rank):
    matrix = draw(*shape)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ v[:rank]
    part = svd(matrix, rank)
    assert part.left.shape == (shape[0], min(rank, *shape))
    assert part.right.shape == (min(rank, *shape), shape[1])
    torch.testing.assert_close(dense(part).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(30, 10), (10, 30)])
def test_a_smaller_rank_is_a_slice(shape):
    largest, small = svd(draw(*shape), 10), svd(draw(*shape), 4)
    torch.testing.assert_close(largest.left[:, :4] @ largest.right[:4], dense(small), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "matrix",
    [
        torch.eye(20),  # all singular values equal
        torch.ones(50, 7),  # rank 1
        torch.cat([torch.zeros(30, 8), draw(5, 8)]),  # zero rows
        1e18 * draw(20, 6),  # the Gram matrix overflows float32
        1e-18 * draw(20, 6),
        torch.diag(torch.tensor([1e4, 1.0, 1e-3, 0.0])),
    ],
)
def test_svd_at_full_rank_rebuilds_awkward_matrices(matrix):
    part = svd(matrix, min(matrix.shape))
    assert torch.isfinite(part.left).all() and torch.isfinite(part.right).all()
    error = (dense(part).double() - matrix.double()).norm() / matrix.double().norm()
    assert error < 1e-6


def test_an_eigenproblem_that_does_not_converge_is_solved_another_way(monkeypatch):
    matrix = draw(30, 12)
    expected = dense(svd(matrix, 5))

    def fail(_):
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    torch.testing.assert_close(dense(svd(matrix, 5)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(3, 12, 5), (3, 5, 12), (2, 3, 6, 6)])
def test_each_matrix_of_a_stack_is_factored_by_itself(shape):
    stack = draw(*shape)
    stack.flatten(0, -3)[1] = 0
    u, s, v = torch.linalg.svd(stack.double(), full_matrices=False)
    part = svd(stack, 2)
    torch.testing.assert_close(dense(part).double(), (u * s[..., None, :])[..., :2] @ v[..., :2, :], atol=1e-5, rtol=0)
    assert part.left.shape == (*shape[:-1], 2) and part.right.shape == (*shape[:-2], 2, shape[-1])
    for matrix, found in zip(stack.flatten(0, -3), dense(part).flatten(0, -3), strict=True):
        torch.testing.assert_close(found, dense(svd(matrix, 2)), atol=1e-6, rtol=0)


def test_small_singular_values_are_told_apart():
    values = torch.logspace(0, -5, 6, dtype=torch.float64)  # squared they lie below float32's rounding of the first
    rows, columns = (torch.linalg.qr(draw(size, 6, seed=size).double()).Q for size in (40, 12))
    matrix = (rows * values) @ columns.T
    residual = (matrix - dense(svd(matrix.float(), 5)).double()).norm()
    assert residual == pytest.approx(values[5].item(), rel=0.05)


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4), (2, 4, 5)])
def test_svd_of_zero_stores_nothing(shape):
    part = svd(torch.zeros(shape), 2)
    assert is_zero(part)
    assert torch.equal(dense(part), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(60, 24), (24, 60), (3, 24, 60)])
def test_an_adapter_takes_its_own_rank_and_no_more(shape):
    """The expert is the base plus a product of factors, rounded to float32, so its difference is of full rank."""
    *stack, d_out, d_in = shape
    base, change = draw(*shape), draw(*stack, d_out, 4, seed=1) @ draw(*stack, 4, d_in, seed=2)
    part = svd((base + 0.01 * change) - base, 20)
    assert part.left.shape[-1] == part.right.shape[-2] == 4
    torch.testing.assert_close(dense(part), 0.01 * change, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_svd_refuses_what_is_not_finite(bad):
    matrix = draw(4, 4)
    matrix[1, 2] = bad
    with pytest.raises(ValueError, match="cannot factor a matrix with NaN"):
        svd(matrix, 2)
    with pytest.raises(ValueError, match="rank"):
        svd(draw(4, 4), 0)


@pytest.mark.parametrize("shape", [(7, 9), (8, 8), (3, 1)])
def test_magnitude_keeps_the_largest(shape):
    matrix = draw(*shape)
    kept = dense(magnitude(matrix, 0.3))
    count = max(1, round(0.3 * matrix.numel()))
    threshold = matrix.abs().flatten().sort(descending=True).values[count - 1]
    assert torch.equal(kept, torch.where(matrix.abs() >= threshold, matrix, 0.0))
    assert torch.equal(dense(magnitude(matrix, 1.0)), matrix)


def test_bernoulli_keeps_the_mean_and_its_seed():
    matrix = torch.ones(200, 200)
    part = bernoulli(matrix, 0.25, generator(0, "task", "name"))
    assert set(dense(part).unique().tolist()) == {0.0, 4.0}
    assert abs(dense(part).mean() - 1) < 0.05
    assert torch.equal(dense(part), dense(bernoulli(matrix, 0.25, generator(0, "task", "name"))))
    assert not torch.equal(dense(part), dense(bernoulli(matrix, 0.25, generator(1, "task", "name"))))


def test_what_is_stored_of_a_part():
    whole = torch.tensor([[0.0, -3.0, 1.0], [2.0, 0.5, 0.0], [0.0, 0.0, 4.0]])
    sparse = magnitude(whole, 4 / 9)
    found = stored(sparse)
    assert found.keys() == {"values", "bits"} and found["values"].tolist() == [-3.0, 1.0, 2.0, 4.0]
    assert found["bits"].dtype == torch.uint8 and found["bits"].tolist() == [0b00001110, 0b1], "one bit per element"
    low = stored(LowRank(draw(2, 4).T[:3], draw(5, 2).T))
    assert {name: tensor.is_contiguous() for name, tensor in low.items()} == {"left": True, "right": True}
    assert stored(whole.T).keys() == {"delta"} and stored(whole.T)["delta"].is_contiguous()
    zeros = torch.zeros(2, 3)
    assert is_zero(zeros) and is_zero(magnitude(zeros, 0.5)) and is_zero(svd(zeros, 1))
    assert not any(map(is_zero, (whole, sparse, svd(whole, 1))))
