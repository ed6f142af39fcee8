"""Cholesky with jitter, condition estimates, dependent rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unified_edit.algebra.linalg import (
    JITTER_LADDER,
    Jitter,
    cholesky_with_jitter,
    condition_estimate,
    dependence,
)
from unified_edit.errors import IllConditioned, NonFiniteError


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def positive(size: int, spread: float, seed: int = 0) -> Tensor:
    """A random symmetric matrix with condition number 10^spread in the 2-norm."""
    vectors = torch.linalg.qr(normal(size, size, seed=seed))[0]
    values = torch.logspace(-spread, 0, size, dtype=torch.float64)
    matrix = vectors @ torch.diag(values) @ vectors.T
    return (matrix + matrix.T) / 2


def test_a_positive_definite_matrix_gets_no_jitter():
    matrix = positive(20, 6)
    factor, jitter = cholesky_with_jitter(matrix)
    assert jitter == Jitter(0.0, 0.0)
    assert torch.allclose(factor @ factor.T, matrix, rtol=0, atol=1e-15)
    assert torch.equal(factor, factor.tril())


@pytest.mark.parametrize("rank", [1, 5, 19])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_jitter_is_the_least_that_suffices_and_relative(rank: int, scale: float):
    rows = normal(rank, 20) * scale**0.5
    matrix = rows.T @ rows
    before = matrix.clone()
    with pytest.raises(IllConditioned, match=r"\[20, 20\].*no jitter.*be careful"):
        cholesky_with_jitter(matrix, jitter=0.0, remedy="be careful")
    factor, jitter = cholesky_with_jitter(matrix)
    assert torch.equal(matrix, before)
    assert jitter.relative in JITTER_LADDER[torch.float64]
    assert jitter.relative <= 1e-11
    assert jitter.absolute == jitter.relative * float(matrix.diagonal().mean())
    shifted = matrix + jitter.absolute * torch.eye(20, dtype=torch.float64)
    assert torch.allclose(factor @ factor.T, shifted, rtol=0, atol=1e-14 * scale * 20)


def test_a_given_jitter_is_added_as_it_is():
    matrix = positive(6, 1)
    factor, jitter = cholesky_with_jitter(matrix, jitter=0.5)
    mean = float(matrix.diagonal().mean())
    assert jitter == Jitter(0.5 * mean, 0.5)
    shifted = matrix + 0.5 * mean * torch.eye(6, dtype=torch.float64)
    assert torch.allclose(factor @ factor.T, shifted, rtol=0, atol=1e-14)


def test_badly_scaled_is_not_singular():
    scale = torch.logspace(-9, 9, 12, dtype=torch.float64)
    matrix = scale[:, None] * positive(12, 2) * scale
    factor, jitter = cholesky_with_jitter(matrix, jitter=0.0)
    assert jitter.absolute == 0
    assert torch.allclose(factor @ factor.T / matrix, torch.ones(12, 12).double())


def test_a_negative_eigenvalue_is_never_jittered_away():
    matrix = positive(10, 1)
    values = torch.linalg.eigvalsh(matrix)
    bent = matrix - (values[0] + 1e-4) * torch.eye(10, dtype=torch.float64)
    with pytest.raises(IllConditioned, match="jitter up to 1e-06"):
        cholesky_with_jitter(bent)
    with pytest.raises(IllConditioned):
        cholesky_with_jitter(torch.zeros(3, 3, dtype=torch.float64))
    matrix[1, 1] = float("inf")
    with pytest.raises(NonFiniteError, match="the thing"):
        cholesky_with_jitter(matrix, what="the thing")


@pytest.mark.parametrize("size", [1, 2, 7, 60])
@pytest.mark.parametrize("spread", [0.0, 3.0, 9.0])
def test_condition_estimate_is_close_and_from_below(size: int, spread: float):
    for seed in range(10):
        matrix = positive(size, spread, seed)
        estimate = condition_estimate(matrix, torch.linalg.cholesky(matrix))
        true = float(torch.linalg.cond(matrix, 1))
        assert true / 3 < estimate < true * (1 + 1e-5)


def test_condition_estimate_is_exact_for_a_diagonal():
    values = torch.tensor([4.0, 0.5, 100.0, 3.0], dtype=torch.float64)
    estimate = condition_estimate(torch.diag(values), torch.diag(values.sqrt()))
    assert estimate == pytest.approx(200)


def test_condition_estimate_is_not_fooled_by_a_flat_start():
    # A⁻¹ 1 = 1 though A⁻¹ is huge: the estimator's first probe sees nothing.
    sign = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    inverse = torch.eye(8, dtype=torch.float64) + 1e4 * torch.outer(sign, sign)
    matrix = torch.linalg.inv(inverse)
    estimate = condition_estimate(matrix, torch.linalg.cholesky(matrix))
    assert estimate > float(torch.linalg.cond(matrix, 1)) / 3


def unit_rows(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def test_dependence_finds_repetitions_and_combinations():
    rows = unit_rows(normal(7, 10))
    rows[5] = rows[2]
    rows[3] = unit_rows((2 * rows[0] - rows[6])[None])[0]
    split = dependence(rows @ rows.T, 1e-10)
    assert sorted(split.kept + split.dependent) == list(range(7))
    assert len(split.dependent) == 2
    assert len({2, 5} & set(split.dependent)) == 1
    assert len({0, 3, 6} & set(split.dependent)) == 1
    rebuilt = split.coefficients @ rows[list(split.kept)]
    assert torch.allclose(rebuilt, rows[list(split.dependent)], atol=1e-12)


def test_dependence_of_more_rows_than_dimensions():
    rows = unit_rows(normal(15, 6))
    split = dependence(rows @ rows.T, 1e-10)
    assert len(split.kept) == 6
    rebuilt = split.coefficients @ rows[list(split.kept)]
    assert torch.allclose(rebuilt, rows[list(split.dependent)], atol=1e-11)


def test_dependence_measures_squared_distance():
    rows = unit_rows(normal(2, 10))
    rows[1] = unit_rows((rows[0] + 1e-3 * rows[1])[None])[0]
    cosine = float(rows[0] @ rows[1])
    distance = 1 - cosine**2
    assert dependence(rows @ rows.T, distance * 0.99).dependent == ()
    assert len(dependence(rows @ rows.T, distance * 1.01).dependent) == 1
    assert dependence(torch.eye(4), 1e-8).kept == (0, 1, 2, 3)
