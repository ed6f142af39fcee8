"""What cannot be solved is refused, and the message names what to look at."""

from __future__ import annotations

import pytest
import torch
from algebra_helpers import LAMBDA, difference, emmet, make_problem

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
from unified_edit.errors import (
    EditError,
    IllConditioned,
    InfeasibleEdits,
    NonFiniteError,
    RecipeError,
)


def exact(p, keys=None, residuals=None, **given):
    return solve(
        Objective(SecondMoment(p.C), Equality()),
        keys=p.K if keys is None else keys,
        residuals=p.R if residuals is None else residuals,
        **given,
    )


@pytest.mark.parametrize("noise", [0.0, 1e-9, 1e-6])
def test_the_same_key_with_other_residuals_names_the_pair(noise: float):
    p = make_problem(6, 12, 8)
    keys = p.K.clone()
    keys[4] = keys[1] * (1 + noise)
    keys[4, 0] += noise
    names = ["Rome", "Oslo", "Lima", "Bern", "Quito", "Kyiv"]
    with pytest.raises(InfeasibleEdits, match=r"'Oslo'.*'Quito'|'Quito'.*'Oslo'") as e:
        exact(p, keys, names=names)
    assert e.value.edits == (1, 4)
    assert "Rome" not in str(e.value) and "slack" in str(e.value)


def test_every_conflicting_pair_is_named():
    p = make_problem(8, 12, 8)
    keys = p.K.clone()
    keys[7], keys[3] = keys[0], 2 * keys[5]
    with pytest.raises(InfeasibleEdits) as e:
        exact(p, keys)
    assert e.value.edits == (0, 3, 5, 7)


def test_more_equalities_than_directions():
    p = make_problem(15, 12, 8)
    with pytest.raises(InfeasibleEdits, match="15 edits .* only 12 free") as e:
        exact(p)
    assert len(e.value.edits) > 2
    small = make_problem(9, 12, 8)
    space = NullSpace.of(small.C, threshold=1.0)
    objective = Objective(space + Ridge(1), Equality())
    rank = space.basis.shape[1]
    assert rank < 9
    with pytest.raises(InfeasibleEdits, match=f"9 edits .* only {rank} free"):
        solve(objective, keys=small.K, residuals=small.R)


def test_a_repeated_edit_is_solved_once_and_reported():
    p = make_problem(6, 12, 8)
    keys, residuals = p.K.clone(), p.R.clone()
    keys[4], residuals[4] = keys[1], residuals[1]
    solution = exact(p, keys, residuals)
    assert solution.certificate.redundant in ((1,), (4,))
    assert solution.certificate.relative_residual_error < 1e-12
    assert solution.update.rank == 5
    once = [0, 1, 2, 3, 5]
    alone = exact(p, p.K[once], p.R[once])
    assert difference(solution.update.dense(), alone.update.dense()) < 1e-11


def test_consistent_edits_beyond_d_key_are_solved():
    p = make_problem(30, 12, 8)
    delta = make_problem(1, 12, 8, seed=5).W
    solution = exact(p, residuals=p.K @ delta.T)
    assert solution.update.rank == 8  # twelve equations left, never above d_value
    assert len(solution.certificate.redundant) == 18
    assert difference(solution.update.dense(), delta) < 1e-9
    # And where residuals cancel: what is left is judged by what went in.
    keys, residuals = p.K[:3].clone(), p.R[:3].clone()
    keys[2] = keys[0] - keys[1]
    residuals[1], residuals[2] = residuals[0], 1e-6 * residuals[2]
    assert len(exact(p, keys, residuals).certificate.redundant) == 1
    # And where a key's multiple asks for the residual's multiple.
    keys, residuals = p.K[:5].clone(), p.R[:5].clone()
    keys[3], residuals[3] = -2 * keys[0], -2 * residuals[0]
    assert exact(p, keys, residuals).certificate.relative_residual_error < 1e-12


def test_tolerance_decides_what_counts_as_one_key():
    p = make_problem(4, 12, 8)
    keys, residuals = p.K.clone(), p.R.clone()
    keys[2] = keys[0] + 1e-6 * make_problem(1, 12, 8, seed=5).K[0]
    residuals[2] = residuals[0] + 1e-3 * residuals[1]
    with pytest.raises(InfeasibleEdits):
        exact(p, keys, residuals)
    fine = solve(
        Objective(SecondMoment(p.C), Equality(tolerance=1e-7)),
        keys=keys,
        residuals=residuals,
    )
    assert fine.certificate.relative_residual_error < 1e-6
    assert fine.certificate.condition_number > 1e11  # and it says what that costs
    coarse = solve(
        Objective(SecondMoment(p.C), Equality(tolerance=1e-2)),
        keys=keys,
        residuals=residuals,
    )
    assert len(coarse.certificate.redundant) == 1
    assert 1e-5 < coarse.certificate.relative_residual_error < 1e-2


def test_conflicting_soft_edits_are_averaged():
    p = make_problem(4, 12, 8)
    keys = p.K.clone()
    keys[2] = keys[0]
    objective = Objective(SecondMoment(p.C), LeastSquares(LAMBDA))
    both = solve(objective, keys=keys, residuals=p.R)
    residuals = p.R.clone()
    residuals[0] = residuals[2] = (p.R[0] + p.R[2]) / 2
    mean = solve(objective, keys=keys, residuals=residuals)
    assert difference(both.update.dense(), mean.update.dense()) < 1e-11
    # One of the two hard: it wins, and nothing is refused.
    mixed = Objective(SecondMoment(p.C), Slack([0.0, 1.0, 1.0, 1.0]))
    certificate = solve(mixed, keys=keys, residuals=p.R).certificate
    assert certificate.residual_errors[0] < 1e-12 < certificate.residual_errors[2]


def test_keys_that_nothing_can_act_on():
    p = make_problem(4, 12, 8)
    keys, residuals = p.K.clone(), p.R.clone()
    keys[2] = 0
    with pytest.raises(InfeasibleEdits, match="edit 2: the key is zero") as e:
        exact(p, keys)
    assert e.value.edits == (2,)
    residuals[2] = 0
    assert exact(p, keys, residuals).certificate.redundant == (2,)
    space = NullSpace.of(p.C, threshold=1.0)
    keys[2] = torch.linalg.eigh(p.C)[1][:, -1]
    objective = Objective(space + Ridge(1), Equality())
    with pytest.raises(InfeasibleEdits, match="orthogonal to all"):
        solve(objective, keys=keys[1:3], residuals=p.R[1:3])
    every = solve(
        Objective(SecondMoment(p.C), Equality()), keys=0 * p.K, residuals=0 * p.R
    )
    assert every.update.rank == 0 and every.certificate.norm == 0


def test_singular_second_moment_without_jitter():
    few = torch.randn(
        7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    C = SecondMoment(few.T @ few / 7)
    with pytest.raises(IllConditioned, match="not positive definite.*more tokens"):
        factorize(C, jitter=0.0)
    much = factorize(C, jitter=2.0)
    assert much.jitter.relative == 2.0
    shifted = C.matrix + much.jitter.absolute * torch.eye(12, dtype=torch.float64)
    true = float(torch.linalg.cond(shifted, 1))
    assert true / 1.2 < much.condition_number < true * (1 + 1e-9)
    assert factorize(C + Ridge(0.1), jitter=0.0).jitter.absolute == 0
    with pytest.raises(RecipeError, match="jitter must be"):
        factorize(C, jitter=-1.0)


def test_bad_second_moments():
    p = make_problem(4, 12, 8)
    indefinite = p.C - 1.5 * torch.linalg.eigvalsh(p.C)[0] * torch.eye(12)
    with pytest.raises(IllConditioned, match=r"not positive definite .* jitter up to"):
        factorize(SecondMoment(indefinite))
    with pytest.raises(IllConditioned, match="negative diagonal"):
        SecondMoment(-p.C)
    lopsided = p.C.clone()
    lopsided[0, 1] += 0.1
    with pytest.raises(IllConditioned, match="not symmetric"):
        SecondMoment(lopsided)
    with pytest.raises(IllConditioned, match="eigenvalues from -"):
        NullSpace.of(indefinite, threshold=1.0)
    with pytest.raises(RecipeError, match=r"\[12, 8\]"):
        SecondMoment(p.C[:, :8])
    holed = p.C.clone()
    holed[3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="second moment C"):
        SecondMoment(holed)
    with pytest.raises(IllConditioned):
        factorize(SecondMoment(0 * p.C))


def test_rounding_in_a_float32_second_moment_is_no_asymmetry():
    p = make_problem(4, 12, 8)
    rounded = p.C.float()
    rounded[0, 1] *= 1 + 2e-7
    factors = [factorize(SecondMoment(C)).factor for C in (rounded, rounded.T)]
    assert torch.equal(*factors)  # neither triangle is taken before the other
    objective = Objective(SecondMoment(rounded), Equality())
    delta = solve(objective, keys=p.K, residuals=p.R).update.dense()
    assert difference(delta, emmet(p)) < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_edits_are_named(bad: float):
    p = make_problem(4, 12, 8)
    names = ["a", "b", "c", "d"]
    for name in ("keys", "residuals"):
        given = {"keys": p.K.clone(), "residuals": p.R.clone()}
        given[name][2, 1] = bad
        with pytest.raises(NonFiniteError, match=r"edit 2 \('c'\)"):
            exact(p, **given, names=names)
    weight = p.W.clone()
    weight[0, 0] = bad
    with pytest.raises(NonFiniteError, match="weight"):
        exact(p, weight=weight)


def test_overflow_is_refused():
    p = make_problem(4, 12, 8)
    objective = Objective(SecondMoment(p.C), LeastSquares(LAMBDA))
    with pytest.raises(NonFiniteError):
        solve(objective, keys=p.K, residuals=p.R * 1e39, dtype=torch.float32)


def test_ill_fitting_edits():
    p = make_problem(4, 12, 8)
    for message, given in (
        ("d_key = 11", {"keys": p.K[:, :11]}),
        ("4 keys and 3 residuals", {"residuals": p.R[:3]}),
        ("0 keys", {"keys": p.K[:0], "residuals": p.R[:0]}),
        (r"\[4, 12, 1\]", {"keys": p.K[:, :, None]}),
        ("int64", {"residuals": p.R.long()}),
        (r"\[12, 8\]", {"weight": p.W.T}),
        ("3 names", {"names": ["a", "b", "c"]}),
        ("residuals on meta", {"residuals": p.R.to("meta")}),
    ):
        with pytest.raises(EditError, match=message):
            exact(p, **given)


def test_ill_fitting_objectives():
    p = make_problem(4, 12, 8)
    C, U = SecondMoment(p.C), NullSpace.of(p.C, threshold=1.0)
    given = {"keys": p.K, "residuals": p.R}
    soft = LeastSquares(LAMBDA)
    for message, preservation in (
        ("what it costs", U),
        ("one NullSpace at most", U + U + C),
        ("Ridge alone", Ridge(1)),
        ("differ in d_key", C + PreviousKeys(keys=p.R)),
        ("not orthonormal", NullSpace(U.basis * 1.1) + C),
    ):
        with pytest.raises(RecipeError, match=message):
            solve(Objective(preservation, soft), **given)
    for message, memorization in (
        ("3 slacks were given for 4 edits", Slack([1.0, 0.0, 1.0])),
        ("3 weights", LeastSquares(1, [1.0, 2.0, 3.0])),
    ):
        with pytest.raises(RecipeError, match=message):
            solve(Objective(C, memorization), **given)
    with pytest.raises(RecipeError, match="divides by the slack"):
        solve(Objective(C, Equality()), form="dimension", **given)
    with pytest.raises(RecipeError, match="form must be"):
        solve(Objective(C, soft), form="primal", **given)
    with pytest.raises(RecipeError, match="float64 or float32"):
        solve(Objective(C, soft), dtype=torch.bfloat16, **given)
    with pytest.raises(RecipeError, match="another preservation"):
        solve(Objective(C, soft), factorization=factorize(C + Ridge(1)), **given)
    with pytest.raises(RecipeError, match=r"torch\.float64, the solve torch\.float32"):
        solve(
            Objective(C, soft),
            factorization=factorize(C),
            dtype=torch.float32,
            **given,
        )
    again = SecondMoment(p.C)  # the same tensor in another term is the same thing
    solve(Objective(again, soft), factorization=factorize(C), **given)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LeastSquares(0),
        lambda: LeastSquares(float("nan")),
        lambda: LeastSquares(1, [1.0, 0.0]),
        lambda: LeastSquares(1, torch.ones(2, 2)),
        lambda: Slack([1.0, -1.0]),
        lambda: Slack(torch.tensor([float("inf")])),
        lambda: Equality(tolerance=0),
        lambda: Ridge(-1),
        lambda: SecondMoment(torch.eye(2), weight=0),
        lambda: PreviousKeys(),
        lambda: PreviousKeys(torch.eye(2), torch.eye(2)),
        lambda: PreviousKeys(keys=torch.ones(3)),
        lambda: NullSpace(torch.ones(2, 3)),
        lambda: NullSpace.of(torch.eye(2), threshold=0.0),
    ],
)
def test_settings_are_checked_at_once(make):
    with pytest.raises(RecipeError):
        make()
