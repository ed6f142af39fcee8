"""What a solution says about itself equals the dense definitions."""

from __future__ import annotations

import json

import pytest
import torch
from algebra_helpers import CASES, LAMBDA, Method, make_problem

from unified_edit.algebra.certificate import through
from unified_edit.algebra.factorization import factorize
from unified_edit.algebra.objective import (
    LeastSquares,
    NullSpace,
    Objective,
    PreviousKeys,
    Ridge,
    SecondMoment,
    Slack,
)
from unified_edit.algebra.solve import solve

EXACT = {"rel": 1e-9, "abs": 1e-12}


def memit(problem, **given):
    objective = Objective(SecondMoment(problem.C), LeastSquares(LAMBDA))
    return solve(objective, keys=problem.K, residuals=problem.R, **given)


@pytest.mark.parametrize(
    ("method", "shape"), CASES, ids=[f"{m.name}-{s}" for m, s in CASES]
)
def test_certificate_equals_dense_definitions(
    method: Method, shape: tuple[int, int, int]
):
    p = make_problem(*shape)
    objective = method.objective(p)
    certificate = solve(objective, keys=p.K, residuals=p.R, weight=p.W).certificate
    delta = method.formula(p)
    misses = p.K @ delta.T - p.R
    errors = misses.norm(dim=1) / p.R.norm(dim=1)
    assert certificate.n == shape[0]
    assert certificate.relative_residual_error == pytest.approx(
        float(misses.norm() / p.R.norm()), **EXACT
    )
    assert certificate.residual_errors == pytest.approx(errors.tolist(), **EXACT)
    assert certificate.worst_residual_error == max(certificate.residual_errors)
    damage = torch.trace(delta @ p.C @ delta.T) / torch.trace(p.W @ p.C @ p.W.T)
    assert certificate.preservation_damage == pytest.approx(float(damage), **EXACT)
    assert certificate.damage_is_relative
    assert certificate.norm == pytest.approx(float(delta.norm()), **EXACT)
    assert certificate.relative_norm == pytest.approx(
        float(delta.norm() / p.W.norm()), **EXACT
    )
    assert certificate.jitter == certificate.relative_jitter == 0
    assert certificate.redundant == ()
    # M by its definition, to check leverage and the size of the condition numbers.
    A, U = torch.zeros_like(p.C), torch.eye(shape[1], dtype=torch.float64)
    for term in objective.preservation.terms:
        if isinstance(term, SecondMoment):
            A = A + term.weight * term.matrix
        elif isinstance(term, PreviousKeys):
            A = A + term.second_moment
        elif isinstance(term, Ridge):
            A = A + term.coefficient * torch.eye(shape[1], dtype=torch.float64)
        elif isinstance(term, NullSpace):
            U = p.U
    inner = U.T @ A @ U
    M = U @ torch.linalg.inv(inner) @ U.T
    assert certificate.leverage == pytest.approx(
        (p.K @ M @ p.K.T).diagonal().tolist(), rel=1e-9
    )
    true = float(torch.linalg.cond(inner, 1))
    assert true / 3 < certificate.preservation_condition < true * (1 + 1e-6)
    slacks = objective.memorization.slacks(shape[0])
    rho = torch.tensor(slacks, dtype=torch.float64)
    if certificate.form == "keys":
        system = p.K @ M @ p.K.T + torch.diag(rho)
        scale = system.diagonal().rsqrt()
        system = scale[:, None] * system * scale
    else:
        H = torch.linalg.solve(torch.linalg.cholesky(inner), U.T @ p.K.T).T
        system = (
            torch.eye(len(inner), dtype=torch.float64) + H.T @ torch.diag(1 / rho) @ H
        )
    true = float(torch.linalg.cond(system, 1))
    assert true / 3 < certificate.condition_number < true * (1 + 1e-6)


def test_without_a_weight_the_damage_is_absolute():
    p = make_problem(5, 12, 8)
    certificate = memit(p).certificate
    relative = memit(p, weight=p.W).certificate
    assert not certificate.damage_is_relative
    assert certificate.relative_norm is None
    whole = float(torch.trace(p.W @ p.C @ p.W.T))
    assert certificate.preservation_damage == pytest.approx(
        relative.preservation_damage * whole
    )


def test_damage_with_several_second_moments_or_with_none():
    p = make_problem(5, 12, 8)
    other = torch.diag(torch.linspace(1, 2, 12, dtype=torch.float64))
    both = SecondMoment(p.C, weight=3) + SecondMoment(other, weight=1)
    solution = solve(Objective(both, LeastSquares(2)), keys=p.K, residuals=p.R)
    delta = solution.update.dense()
    mean = (3 * p.C + other) / 4
    assert solution.certificate.preservation_damage == pytest.approx(
        float(torch.trace(delta @ mean @ delta.T))
    )
    objective = Objective(PreviousKeys(p.Cp) + Ridge(1), LeastSquares(1))
    nothing = solve(objective, keys=p.K, residuals=p.R).certificate
    assert nothing.preservation_damage is None


def test_certificate_is_plain_json():
    p = make_problem(5, 12, 8)
    data = memit(p, weight=p.W).certificate.as_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["worst_residual_error"] == max(data["residual_errors"])


def test_an_edit_that_asks_for_nothing_has_an_error_of_its_own():
    p = make_problem(4, 12, 8)
    residuals = p.R.clone()
    residuals[2] = 0
    objective = Objective(SecondMoment(p.C), LeastSquares(LAMBDA))
    solution = solve(objective, keys=p.K, residuals=residuals)
    moved = solution.update.dense() @ p.K[2]
    typical = residuals.norm() / 2  # root mean square over four edits
    assert solution.certificate.residual_errors[2] == pytest.approx(
        float(moved.norm() / typical)
    )
    still = solve(objective, keys=p.K, residuals=0 * p.R, weight=p.W).certificate
    assert still.relative_residual_error == still.norm == 0
    assert still.preservation_damage == 0


def test_the_cheaper_form_is_taken():
    for shape, form in (
        ((5, 40, 8), "keys"),
        ((60, 40, 8), "dimension"),
        ((200, 16, 8), "dimension"),
    ):
        assert memit(make_problem(*shape)).certificate.form == form
    # One edit that must hold exactly rules the cheaper form out.
    p = make_problem(60, 12, 8)
    mostly_soft = Objective(SecondMoment(p.C), Slack([0.0] + [1.0] * 59))
    certificate = solve(mostly_soft, keys=p.K, residuals=p.R).certificate
    assert certificate.form == "keys"
    assert certificate.residual_errors[0] < 1e-12


def test_jitter_on_a_singular_second_moment_is_reported(caplog):
    p = make_problem(3, 12, 8)
    few = torch.randn(
        7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    C = few.T @ few / 7
    objective = Objective(SecondMoment(C), LeastSquares(LAMBDA))
    solution = solve(objective, keys=p.K, residuals=p.R)
    certificate = solution.certificate
    assert 1e-12 <= certificate.relative_jitter <= 1e-10
    mean = float(C.diagonal().mean())
    assert certificate.jitter == pytest.approx(certificate.relative_jitter * mean)
    assert "added" in caplog.text
    shifted = C + certificate.jitter * torch.eye(12, dtype=torch.float64)
    true = float(torch.linalg.cond(shifted, 1))
    assert true / 3 < certificate.preservation_condition < true * 1.01
    # It is the solution for exactly the matrix that the certificate tells of.
    objective = Objective(SecondMoment(shifted), LeastSquares(LAMBDA))
    same = solve(objective, keys=p.K, residuals=p.R)
    assert same.certificate.jitter == 0
    assert torch.allclose(same.update.dense(), solution.update.dense(), rtol=1e-4)


def test_same_inputs_same_bytes():
    p = make_problem(9, 16, 5)
    objective = Objective(SecondMoment(p.C), LeastSquares(LAMBDA))
    factorization = factorize(objective.preservation)
    one = memit(p)
    two = solve(objective, keys=p.K, residuals=p.R, factorization=factorization)
    assert torch.equal(one.update.left, two.update.left)
    assert torch.equal(one.update.right, two.update.right)
    assert one.certificate == two.certificate


@pytest.mark.parametrize("size", [1, 127, 128, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_times_a_moment_of_another_precision(
    size: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(3, size, dtype=torch.float64, generator=generator)
    moment = torch.randn(size, size, dtype=torch.float64, generator=generator)
    moment = moment.to(dtype)
    expected = rows @ moment.double()
    assert torch.allclose(through(rows, moment), expected, rtol=1e-12, atol=1e-12)
