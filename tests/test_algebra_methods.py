"""Every published method is the one formula: theorems, in float64."""

from __future__ import annotations

import pytest
import torch
from algebra_helpers import (
    CASES,
    ETA,
    LAMBDA,
    METHODS,
    MU,
    WEIGHT,
    Method,
    difference,
    emmet,
    emmet_code,
    make_problem,
    memit,
)

from unified_edit.algebra.factorization import factorize
from unified_edit.algebra.objective import (
    Equality,
    LeastSquares,
    NullSpace,
    Objective,
    PreviousKeys,
    Ridge,
    SecondMoment,
    Slack,
)
from unified_edit.algebra.solve import solve
from unified_edit.errors import RecipeError

SLACK_PER_EDIT = ("mixed", "memit-weighted")

cases = pytest.mark.parametrize(
    ("method", "shape"), CASES, ids=[f"{m.name}-{s}" for m, s in CASES]
)
soft_cases = pytest.mark.parametrize(
    ("method", "shape"),
    [(m, s) for m, s in CASES if not m.exact],
    ids=[f"{m.name}-{s}" for m, s in CASES if not m.exact],
)


@cases
def test_equals_the_published_formula(method: Method, shape: tuple[int, int, int]):
    problem = make_problem(*shape)
    solution = solve(method.objective(problem), keys=problem.K, residuals=problem.R)
    assert solution.update.shape == (shape[2], shape[1])
    assert difference(solution.update.dense(), method.formula(problem)) < 1e-11


@soft_cases
def test_both_forms_agree(method: Method, shape: tuple[int, int, int]):
    problem = make_problem(*shape)
    objective = method.objective(problem)
    by_keys, by_dimension = (
        solve(objective, keys=problem.K, residuals=problem.R, form=form)
        for form in ("keys", "dimension")
    )
    assert by_keys.certificate.form == "keys"
    assert by_dimension.certificate.form == "dimension"
    assert difference(by_keys.update.dense(), by_dimension.update.dense()) < 1e-11
    n, d_key, d_value = shape
    rank = problem.U.shape[1] if method.projected else d_key
    assert by_keys.update.rank == min(n, d_value)
    assert by_dimension.update.rank == min(n, rank, d_value)


@pytest.mark.parametrize(
    ("method", "shape"), [(m, s) for m, s in CASES if m.name not in SLACK_PER_EDIT]
)
def test_permuting_edits_changes_nothing(method: Method, shape: tuple[int, int, int]):
    problem = make_problem(*shape)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(1))
    objective = method.objective(problem)
    plain = solve(objective, keys=problem.K, residuals=problem.R)
    mixed = solve(objective, keys=problem.K[order], residuals=problem.R[order])
    assert difference(mixed.update.dense(), plain.update.dense()) < 1e-11
    leverage = torch.tensor(plain.certificate.leverage)[order]
    assert torch.tensor(mixed.certificate.leverage).allclose(leverage)


def test_permuting_edits_with_their_slacks():
    problem = make_problem(7, 12, 8)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    C = SecondMoment(problem.C)
    plain = solve(Objective(C, Slack(problem.rho)), keys=problem.K, residuals=problem.R)
    moved = solve(
        Objective(C, Slack(problem.rho[order])),
        keys=problem.K[order],
        residuals=problem.R[order],
    )
    assert difference(moved.update.dense(), plain.update.dense()) < 1e-11


@cases
def test_a_factorization_is_reused(method: Method, shape: tuple[int, int, int]):
    problem = make_problem(*shape)
    objective = method.objective(problem)
    factorization = factorize(objective.preservation)
    for part in (slice(None), slice(0, 1)):
        memorization = objective.memorization
        if part.stop == 1 and method.name in SLACK_PER_EDIT:
            memorization = LeastSquares(LAMBDA)
        now = Objective(objective.preservation, memorization)
        given = {"keys": problem.K[part], "residuals": problem.R[part]}
        first = solve(now, factorization=factorization, **given)
        fresh = solve(now, **given)
        assert torch.equal(first.update.left, fresh.update.left)
        assert torch.equal(first.update.right, fresh.update.right)


def written_out(name: str, p, delta: torch.Tensor) -> torch.Tensor:
    """The cost that a least-squares method claims to minimise."""
    misses = (p.K @ delta.T - p.R).square().sum()
    background = torch.trace(delta @ p.C @ delta.T)
    earlier = torch.trace(delta @ p.Cp @ delta.T)
    size = delta.square().sum()
    return {
        "emmet-code": WEIGHT * LAMBDA * background + misses,
        "memit": LAMBDA * background + misses,
        "memit-sequential": LAMBDA * background + earlier + misses,
        "encore": LAMBDA * background + earlier + MU * size + misses,
        "alphaedit-first": ETA * size + misses,
        "alphaedit": earlier + ETA * size + misses,
    }[name]


@pytest.mark.parametrize("shape", [(5, 12, 8), (6, 10, 10), (30, 12, 8)])
@pytest.mark.parametrize(
    "method",
    [m for m in METHODS if not m.exact and m.name != "memit-weighted"],
    ids=lambda m: m.name,
)
def test_least_squares_is_stationary_and_minimal(
    method: Method, shape: tuple[int, int, int]
):
    problem = make_problem(*shape)
    solution = solve(method.objective(problem), keys=problem.K, residuals=problem.R)
    delta = solution.update.dense().requires_grad_()
    cost = written_out(method.name, problem, delta)
    (gradient,) = torch.autograd.grad(cost, delta)
    free = problem.P if method.projected else torch.eye(shape[1], dtype=torch.float64)
    scale = float((problem.R.T @ problem.K).norm())
    assert float((gradient @ free).norm()) < 1e-11 * scale
    if method.projected:  # the restriction binds: the full gradient does not vanish
        assert float(gradient.norm()) > 1e-3 * scale
    generator = torch.Generator().manual_seed(3)
    for size in (1e-3, 0.1, 1.0):
        step = torch.randn(delta.shape, generator=generator, dtype=torch.float64)
        moved = delta + size * step @ free
        assert written_out(method.name, problem, moved) > cost


@pytest.mark.parametrize("shape", [(1, 12, 8), (5, 12, 8), (6, 10, 10), (9, 16, 5)])
def test_equality_is_met_and_costs_least(shape: tuple[int, int, int]):
    problem = make_problem(*shape)
    objective = Objective(SecondMoment(problem.C), Equality())
    solution = solve(objective, keys=problem.K, residuals=problem.R)
    delta = solution.update.dense().requires_grad_()
    assert difference(problem.K @ delta.T, problem.R) < 1e-12
    # Lagrange: the gradient is a combination of the keys, Λᵀ K.
    cost = torch.trace(delta @ problem.C @ delta.T)
    (gradient,) = torch.autograd.grad(cost, delta)
    off = torch.eye(shape[1]) - torch.linalg.pinv(problem.K) @ problem.K
    assert float((gradient @ off).norm()) < 1e-11 * float(gradient.norm())
    # No feasible step, one that leaves the edited keys alone, makes it cheaper.
    generator = torch.Generator().manual_seed(3)
    for size in (1e-3, 0.1, 1.0):
        step = torch.randn(delta.shape, generator=generator, dtype=torch.float64) @ off
        moved = delta + size * step
        assert difference(problem.K @ moved.T, problem.R) < 1e-10
        assert torch.trace(moved @ problem.C @ moved.T) > cost


def test_nothing_beats_the_optimum_on_its_own_cost():
    problem = make_problem(5, 12, 8)
    found = {}
    for method in METHODS:
        if not method.single:
            update = solve(
                method.objective(problem), keys=problem.K, residuals=problem.R
            ).update
            found[method.name] = update.dense()
    for name in ("memit", "memit-sequential", "encore", "emmet-code"):
        own = written_out(name, problem, found[name])
        for other, delta in found.items():
            assert written_out(name, problem, delta) > own or other == name


def test_mixed_slack_meets_the_hard_edits_and_weighs_the_soft():
    problem = make_problem(7, 12, 8)
    objective = Objective(SecondMoment(problem.C), Slack(problem.rho))
    solution = solve(objective, keys=problem.K, residuals=problem.R)
    delta = solution.update.dense().requires_grad_()
    hard = problem.rho == 0
    misses = problem.K @ delta.T - problem.R
    assert misses[hard].norm() < 1e-12
    assert misses[~hard].norm() > 1e-3
    soft = (misses[~hard].square().sum(1) / problem.rho[~hard]).sum()
    cost = torch.trace(delta @ problem.C @ delta.T) + soft
    (gradient,) = torch.autograd.grad(cost, delta)
    hard_keys = problem.K[hard]
    off = torch.eye(12) - torch.linalg.pinv(hard_keys) @ hard_keys
    assert float((gradient @ off).norm()) < 1e-11 * float(gradient.norm())


def test_slack_joins_equality_and_least_squares():
    problem = make_problem(6, 12, 8)
    C = SecondMoment(problem.C)
    given = {"keys": problem.K, "residuals": problem.R}
    for slack, same in (
        ([0.0] * 6, Equality()),
        ([LAMBDA] * 6, LeastSquares(LAMBDA)),
        (
            [LAMBDA / w for w in range(1, 7)],
            LeastSquares(LAMBDA, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        ),
    ):
        ours = solve(Objective(C, Slack(slack)), **given).update.dense()
        theirs = solve(Objective(C, same), **given).update.dense()
        assert torch.equal(ours, theirs)


def test_least_squares_tends_to_equality():
    problem = make_problem(5, 12, 8)
    gaps = []
    for weight in (1e-2, 1e-4, 1e-6, 1e-8):
        solution = solve(
            Objective(SecondMoment(problem.C), LeastSquares(weight)),
            keys=problem.K,
            residuals=problem.R,
        )
        gaps.append(difference(solution.update.dense(), emmet(problem)))
    assert gaps[-1] < 1e-7
    for larger, smaller in zip(gaps[:-1], gaps[1:], strict=True):
        assert 50 < larger / smaller < 200  # linear in λ


def test_emmet_does_not_depend_on_the_scale_of_c_and_memit_does():
    problem = make_problem(5, 12, 8)
    given = {"keys": problem.K, "residuals": problem.R}
    scaled = SecondMoment(problem.C * 1e4)
    assert (
        difference(
            solve(Objective(scaled, Equality()), **given).update.dense(), emmet(problem)
        )
        < 1e-11
    )
    softer = solve(Objective(scaled, LeastSquares(LAMBDA)), **given).update.dense()
    assert difference(softer, memit(problem)) > 0.5
    assert difference(emmet_code(problem), emmet(problem)) > 1e-2


def test_weight_of_the_second_moment_is_lambda():
    problem = make_problem(5, 12, 8)
    given = {"keys": problem.K, "residuals": problem.R}
    outside = Objective(SecondMoment(problem.C), LeastSquares(LAMBDA))
    inside = Objective(SecondMoment(problem.C, weight=LAMBDA), LeastSquares(1))
    assert (
        difference(
            solve(inside, **given).update.dense(),
            solve(outside, **given).update.dense(),
        )
        < 1e-12
    )


@pytest.mark.parametrize("name", ["alphaedit", "alphaedit-first"])
@pytest.mark.parametrize("shape", [(5, 12, 8), (30, 12, 8)])
def test_null_space_holds_the_update(name: str, shape: tuple[int, int, int]):
    problem = make_problem(*shape)
    method = next(m for m in METHODS if m.name == name)
    delta = solve(
        method.objective(problem), keys=problem.K, residuals=problem.R
    ).update.dense()
    assert difference(delta @ problem.P, delta) < 1e-12
    loud = torch.linalg.eigh(problem.C)[1][:, problem.U.shape[1] :]
    assert float((delta @ loud).norm()) < 1e-12 * float(delta.norm())


def test_null_space_with_equality():
    problem = make_problem(3, 12, 8)
    space = NullSpace.of(problem.C, threshold=1.0)
    objective = Objective(space + SecondMoment(problem.C), Equality())
    solution = solve(objective, keys=problem.K, residuals=problem.R)
    U, K, R = problem.U, problem.K.T, problem.R.T
    M = U @ torch.linalg.inv(U.T @ problem.C @ U) @ U.T
    expected = R @ torch.linalg.inv(K.T @ M @ K) @ K.T @ M
    assert difference(solution.update.dense(), expected) < 1e-11


def test_null_space_rules():
    values = torch.tensor([0.01, 0.02, 0.07, 0.4, 1.5, 8.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    vectors = torch.linalg.qr(noise)[0]
    C = vectors @ torch.diag(values) @ vectors.T
    kept = {
        3: [{"threshold": 0.2, "relative": False}, {"threshold": 0.1}],
        2: [{"threshold": 0.05, "relative": False}, {"energy": 0.005}],
        5: [{"energy": 0.21}, {"threshold": 1.0}],
    }
    for count, rules in kept.items():
        for rule in rules:
            basis = NullSpace.of(C, **rule).basis
            assert basis.shape == (6, count)
            quiet = vectors[:, :count]
            assert difference(basis @ basis.T, quiet @ quiet.T) < 1e-10
            scaled = NullSpace.of(C * 1e3, **rule) if "relative" not in rule else None
            assert scaled is None or scaled.basis.shape == (6, count)
    for rule in (
        {"threshold": 1e-3, "relative": False},
        {"threshold": 100.0},
        {"energy": 1.0},
        {"energy": 1e-5},
    ):
        with pytest.raises(RecipeError, match=r"of 6 directions"):
            NullSpace.of(C, **rule)
    with pytest.raises(RecipeError, match="either threshold or energy"):
        NullSpace.of(C)
    with pytest.raises(RecipeError, match="either threshold or energy"):
        NullSpace.of(C, threshold=1.0, energy=0.1)


def test_previous_keys_by_keys_or_by_their_sum():
    problem = make_problem(5, 12, 8)
    generator = torch.Generator().manual_seed(9)
    earlier = torch.randn(7, 12, generator=generator, dtype=torch.float64)
    space = NullSpace.of(problem.C, threshold=1.0)
    for rest in (SecondMoment(problem.C), space + Ridge(ETA)):
        by_keys, by_sum = (
            solve(
                Objective(rest + term, LeastSquares(1)),
                keys=problem.K,
                residuals=problem.R,
            ).update.dense()
            for term in (PreviousKeys(keys=earlier), PreviousKeys(earlier.T @ earlier))
        )
        assert difference(by_keys, by_sum) < 1e-12


def test_float32_is_possible_and_less_exact():
    problem = make_problem(5, 12, 8)
    objective = Objective(SecondMoment(problem.C.float()), LeastSquares(LAMBDA))
    given = {"keys": problem.K.float(), "residuals": problem.R.float()}
    for form in ("keys", "dimension"):
        single = solve(objective, dtype=torch.float32, form=form, **given)
        assert single.update.left.dtype == torch.float32
        assert 1e-9 < difference(single.update.dense(), memit(problem)) < 1e-5
    double = solve(objective, **given)  # float32 in, float64 solve
    assert double.update.left.dtype == torch.float64


@pytest.mark.gpu
def test_cuda_equals_cpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for method, shape in CASES:
        if method.name in ("mixed", "memit-weighted", "alphaedit", "emmet"):
            problem = make_problem(*shape)
            there = type(problem)(**{k: v.cuda() for k, v in vars(problem).items()})
            ours = solve(
                method.objective(there),
                keys=there.K,
                residuals=there.R,
                weight=there.W,
            )
            assert ours.update.left.is_cuda
            assert difference(ours.update.dense().cpu(), method.formula(problem)) < 1e-9
