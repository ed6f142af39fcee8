"""Earlier keys added to a factorization, and what acts on a finished update."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from algebra_helpers import LAMBDA, MU, difference, make_problem
from torch import Tensor

from unified_edit.algebra import earlier
from unified_edit.algebra.certificate import WeightScale, background_change
from unified_edit.algebra.earlier import EarlierKeys
from unified_edit.algebra.factorization import factorize
from unified_edit.algebra.objective import (
    Equality,
    LeastSquares,
    NullSpace,
    Objective,
    Preservation,
    PreviousKeys,
    Ridge,
    SecondMoment,
)
from unified_edit.algebra.regularize import Regularizer
from unified_edit.algebra.solve import solve
from unified_edit.algebra.update import RankKUpdate
from unified_edit.errors import RecipeError

D_KEY, D_VALUE = 24, 9


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def bases() -> dict[str, Preservation]:
    problem = make_problem(3, D_KEY, D_VALUE)
    null = NullSpace.of(problem.C, threshold=1.0)
    return {
        "memit_seq": SecondMoment(problem.C, weight=LAMBDA),
        "encore": SecondMoment(problem.C, weight=LAMBDA) + Ridge(MU),
        "alphaedit": null + Ridge(MU),
    }


BASES = bases()
every_base = pytest.mark.parametrize("name", sorted(BASES))


@every_base
@pytest.mark.parametrize(
    ("memorization", "form"),
    [
        (Equality(), "keys"),
        (LeastSquares(1.0), "keys"),
        (LeastSquares(1.0), "dimension"),
    ],
)
def test_an_extended_factorization_is_the_whole_one(
    name: str, memorization: Equality | LeastSquares, form: str
) -> None:
    batches = [normal(n, D_KEY, seed=n) for n in (1, 4, 2, 1)]
    weight = 0.7
    extended = factorize(BASES[name])
    for batch in batches:
        extended = extended.extended(PreviousKeys(keys=batch, weight=weight))
    moment = torch.cat(batches).T @ torch.cat(batches)
    whole = BASES[name] + PreviousKeys(moment, weight=weight)
    keys, residuals = normal(3, D_KEY, seed=50), normal(3, D_VALUE, seed=51)
    given = {"keys": keys, "residuals": residuals, "form": form}
    found = solve(
        Objective(extended.preservation, memorization), factorization=extended, **given
    )
    wanted = solve(Objective(whole, memorization), **given)
    assert difference(found.update.dense(), wanted.update.dense()) < 1e-11
    for mine, theirs in zip(
        found.certificate.leverage, wanted.certificate.leverage, strict=True
    ):
        assert mine == pytest.approx(theirs, rel=1e-10)


def test_the_keys_that_were_added_are_edits_with_nothing_to_change() -> None:
    """Earlier keys in M with ρ = 1 are edits of residual 0 in K."""
    moment = make_problem(1, D_KEY, D_VALUE).C
    before, keys = normal(5, D_KEY, seed=1), normal(2, D_KEY, seed=2)
    residuals = normal(2, D_VALUE, seed=3)
    extended = factorize(SecondMoment(moment, weight=LAMBDA)).extended(
        PreviousKeys(keys=before)
    )
    found = solve(
        Objective(extended.preservation, LeastSquares(1.0)),
        keys=keys,
        residuals=residuals,
        factorization=extended,
    )
    wanted = solve(
        Objective(SecondMoment(moment, weight=LAMBDA), LeastSquares(1.0)),
        keys=torch.cat([before, keys]),
        residuals=torch.cat([torch.zeros(5, D_VALUE).double(), residuals]),
    )
    assert difference(found.update.dense(), wanted.update.dense()) < 1e-11


def test_huge_and_repeated_keys_stay_exact() -> None:
    """1 − x·g cancels where h − xh(hᵀh) does not: an edit on a key that is there."""
    moment = make_problem(1, D_KEY, D_VALUE).C
    key = 1e4 * normal(1, D_KEY, seed=4)
    extended = factorize(SecondMoment(moment))
    for _ in range(3):
        extended = extended.extended(PreviousKeys(keys=key))
    dense = torch.linalg.inv(moment + 3 * key.T @ key)
    mine = extended.whiten(key).square().sum()
    assert float(mine) == pytest.approx(1 / 3, rel=1e-7)
    other = normal(1, D_KEY, seed=5)
    assert float(extended.whiten(other).square().sum()) == pytest.approx(
        float(other @ dense @ other.T), rel=1e-6
    )


@every_base
def test_keys_are_folded_once_they_are_many(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which changes no number, and factors once where extending did not."""
    factored = []

    def counted(preservation: Preservation) -> object:
        factored.append(preservation)
        return factorize(preservation)

    monkeypatch.setattr(earlier, "factorize", counted)
    held = EarlierKeys.of(BASES[name], 1.0)
    rank = held.factorization.rank
    keys = [normal(1, D_KEY, seed=n) for n in range(2 * rank)]
    for each in keys:
        held = held.added(each)
        assert held.count <= 0.4 * rank
    assert held.folded is not None
    per_fold = math.floor(0.4 * rank) + 1
    assert len(factored) == 1 + len(keys) // per_fold
    moment = torch.cat(keys).T @ torch.cat(keys)
    whole = factorize(BASES[name] + PreviousKeys(moment))
    probe = normal(4, D_KEY, seed=99)
    torch.testing.assert_close(
        held.factorization.whiten(probe) @ held.factorization.whiten(probe).T,
        whole.whiten(probe) @ whole.whiten(probe).T,
        rtol=1e-9,
        atol=1e-12,
    )
    assert held.factorization.preservation.terms[-1].weight == 1.0  # type: ignore[attr-defined]


def test_what_was_saved_gives_the_same_bits_again() -> None:
    held = EarlierKeys.of(BASES["encore"], 0.5)
    for n in range(30):
        held = held.added(normal(1 + n % 3, D_KEY, seed=n))
    again = EarlierKeys.of(BASES["encore"], 0.5, folded=held.folded, recent=held.recent)
    probe = normal(4, D_KEY, seed=99)
    assert torch.equal(
        held.factorization.whiten(probe), again.factorization.whiten(probe)
    )


def test_a_weight_of_zero_forgets() -> None:
    held = EarlierKeys.of(BASES["memit_seq"], 0.0)
    assert held.added(normal(3, D_KEY)) is held


def test_extensions_need_keys_of_this_size() -> None:
    factorization = factorize(BASES["memit_seq"])
    for term in (
        PreviousKeys(keys=normal(2, D_KEY + 1)),
        PreviousKeys(torch.eye(D_KEY).double()),
    ):
        with pytest.raises(RecipeError, match=r"extended by keys \[n, 24\]"):
            factorization.extended(term)
    with pytest.raises(RecipeError, match="weight of PreviousKeys"):
        PreviousKeys(keys=normal(2, D_KEY), weight=0.0)


def test_damage_may_be_relative_to_another_weight() -> None:
    problem = make_problem(3, D_KEY, D_VALUE)
    objective = Objective(SecondMoment(problem.C, weight=LAMBDA), LeastSquares(1.0))
    scale = WeightScale.of(problem.W, objective.preservation)
    assert scale.norm == float(problem.W.norm())
    assert scale.mean_square == pytest.approx(
        float(torch.trace(problem.W @ problem.C @ problem.W.T))
    )
    given = {"keys": problem.K, "residuals": problem.R}
    by_weight = solve(objective, weight=problem.W, **given)
    by_scale = solve(objective, weight=scale, **given)
    assert by_weight.certificate == by_scale.certificate
    half = solve(objective, weight=replace(scale, norm=2 * scale.norm), **given)
    assert half.certificate.relative_norm == pytest.approx(
        by_scale.certificate.relative_norm / 2  # type: ignore[operator]
    )
    update = by_scale.update
    assert background_change(update, objective.preservation) == pytest.approx(
        float(torch.trace(update.dense() @ problem.C @ update.dense().T))
    )


# --- regularizers ---------------------------------------------------------------------


def an_update(rank: int, scale: float = 1.0, seed: int = 0) -> RankKUpdate:
    left, right = normal(D_VALUE, rank, seed=seed), normal(rank, D_KEY, seed=seed + 1)
    return RankKUpdate(scale * left, right, normal(2, D_KEY), normal(3, D_KEY))


@pytest.mark.parametrize("rank", [1, 4, 30])
@pytest.mark.parametrize("text", ["rect:0.4", "rect:1", "prune:1.2", "norm:0.5"])
def test_regularizers_follow_their_definitions(rank: int, text: str) -> None:
    weight, update = normal(D_VALUE, D_KEY, seed=7), an_update(rank)
    rule = Regularizer.parse(text)
    assert rule is not None
    found = rule(update, weight)
    delta = update.dense()
    if rule.kind == "rect":
        # The published snippet: threshold by quantile of |Δ / W|, in the dense matrix.
        kept = round(rule.number * delta.numel())
        bound = (delta / weight).abs().flatten().sort(descending=True).values[kept - 1]
        wanted = torch.where((delta / weight).abs() >= bound, delta, 0.0)
        assert torch.equal(found.dense(), wanted)
        assert int((found.dense() != 0).sum()) == kept
    elif rule.kind == "prune":
        u, values, vh = torch.linalg.svd(delta, full_matrices=False)
        largest = torch.linalg.svdvals(weight)[0]
        lowered = [
            math.log(v / largest, rule.number) + largest if v >= largest else v
            for v in values.tolist()
        ]
        wanted = u * torch.tensor(lowered).double() @ vh
        assert difference(found.dense(), wanted) < 1e-11
        assert found.rank <= min(rank, D_VALUE)
    else:
        assert found.norm() == pytest.approx(
            min(update.norm(), 0.5 * float(weight.norm()))
        )
        assert difference(found.dense() / found.norm(), delta / delta.norm()) < 1e-12
    assert found.keys is not None and torch.equal(found.keys, normal(2, D_KEY))
    assert found.background is not None and found.left.dtype == torch.float64


def test_small_updates_are_left_as_they_are() -> None:
    weight, small = normal(D_VALUE, D_KEY, seed=7), an_update(2, scale=1e-3)
    for text in ("prune:1.2", "norm:0.5"):
        rule = Regularizer.parse(text)
        assert rule is not None and rule.when != "step"
        assert difference(rule(small, weight).dense(), small.dense()) < 1e-12


def test_prune_lowers_what_is_above_the_weights_largest() -> None:
    weight, large = normal(D_VALUE, D_KEY, seed=7), an_update(4, scale=20.0)
    rule = Regularizer.parse("prune:2")
    assert rule is not None
    largest = float(torch.linalg.svdvals(weight)[0])
    before = torch.linalg.svdvals(large.dense())[:4]
    after = torch.linalg.svdvals(rule(large, weight).dense())[:4]
    assert bool((before > largest).all()) and bool((after < before).all())
    assert bool((after >= largest).all())
    assert float(after[0]) - largest == pytest.approx(
        math.log2(float(before[0]) / largest)
    )


def test_rect_keeps_changes_of_what_was_zero() -> None:
    weight, update = normal(2, 3, seed=7), an_update(1)
    weight[0, 0] = 0
    update = RankKUpdate(update.left[:2], update.right[:, :3])
    rule = Regularizer.parse("rect:0.2")
    assert rule is not None and rule.when == "step"
    found = rule(update, weight).dense()
    assert found[0, 0] == update.dense()[0, 0]
    assert int((found != 0).sum()) == 1


@pytest.mark.parametrize(
    "text",
    ["rect", "rect:0", "rect:1.5", "prune:1", "prune:nan", "norm:-1", "norm:inf", ""],
)
def test_other_rules_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="expected none, rect:SHARE"):
        Regularizer.parse(text)
    assert Regularizer.parse("none") is None


def test_a_weight_of_another_shape_is_refused() -> None:
    rule = Regularizer.parse("norm:0.5")
    assert rule is not None
    with pytest.raises(RecipeError, match=r"\[9, 24\] needs a weight seen so"):
        rule(an_update(1), normal(D_KEY, D_VALUE))
