"""The adequacy report's measures against their definitions written out densely, and
the accumulator's ways that the pass relies on."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from statistics_helpers import random_keys
from torch import Tensor

from covariance_cache import (
    Adequacy,
    KeyStatistics,
    Provenance,
    SecondMomentAccumulator,
    Shrinkage,
    StatisticsError,
)
from covariance_cache.adequacy import (
    Half,
    cholesky,
    condition,
    measure,
    relative_change,
    solutions,
)
from covariance_cache.shrinkage import oas_intensity, traces
from unified_edit.algebra.objective import Equality, Objective, SecondMoment
from unified_edit.algebra.solve import solve

SOURCE = Provenance(model_fingerprint="f" * 64, module="h.0.mlp.c_proj")
NONE, OAS = Shrinkage(), Shrinkage("oas")


def moment(count: int, d_key: int, seed: int = 0, *, wide: bool = True) -> Tensor:
    """Of keys whose eigenvalues spread over some four orders of magnitude."""
    keys = random_keys(count, d_key, seed).double() * torch.logspace(0, -2, d_key)
    mean = keys.T @ keys / count
    return mean if wide else mean.float()


def factor_of(matrix: Tensor, count: int, shrinkage: Shrinkage = NONE) -> Tensor:
    factor = cholesky(matrix, count, shrinkage)
    assert factor is not None
    return factor


class TestMeasures:
    @pytest.mark.parametrize("d_key", [1, 5, 1100])
    @pytest.mark.parametrize("scale", [1.0, 1e-6])
    def test_the_identity_has_full_rank(self, d_key: int, scale: float) -> None:
        found = measure(scale * torch.eye(d_key), 3 * d_key)
        assert found.tokens_per_dimension == 3
        assert math.isclose(found.effective_rank, d_key, rel_tol=1e-12)
        assert found.condition is not None
        assert math.isclose(found.condition, 1, rel_tol=1e-12)
        assert found.shrinkage_intensity == 1

    def test_one_direction_has_rank_one_and_no_inverse(self) -> None:
        key = random_keys(1, 40)
        found = measure(key.T @ key, 100)
        assert math.isclose(found.effective_rank, 1, rel_tol=1e-6)
        assert found.condition is None and found.tokens_per_dimension == 2.5

    @pytest.mark.parametrize("wide", [False, True])
    def test_effective_rank_is_of_the_eigenvalues(self, wide: bool) -> None:
        matrix = moment(500, 60, wide=wide)
        values = torch.linalg.eigvalsh(matrix.double())
        expected = float(values.sum() ** 2 / (values**2).sum())
        found = measure(matrix, 500)
        assert 1 < expected < 60
        assert math.isclose(found.effective_rank, expected, rel_tol=1e-6)
        assert found.shrinkage_intensity == oas_intensity(*traces(matrix), 60, 500)

    def test_what_only_a_pass_sees_is_passed_on_or_unknown(self) -> None:
        matrix = moment(200, 10)
        bare = measure(matrix, 200)
        assert bare.first_position_share is None
        assert bare.change is None and bare.change_shrinkage is None
        assert measure(matrix, 200, first_position_share=0.25) == dataclasses.replace(
            bare, first_position_share=0.25
        )

    def test_nothing_is_measured_twice(self) -> None:
        matrix = moment(50, 10, wide=False)
        told = measure(matrix, 50, first_position_share=0.125)
        assert KeyStatistics(0, matrix, 50, SOURCE, told).measured() is told
        assert KeyStatistics(0, matrix, 50, SOURCE).measured() == measure(matrix, 50)

    def test_the_matrix_is_left_alone(self) -> None:
        for wide in (False, True):  # in float64 no conversion makes a copy
            matrix = moment(50, 10, wide=wide)
            kept = matrix.clone()
            half = Half.of(matrix, 50, random_keys(3, 10))
            measure(matrix, 50, half=half)
            cholesky(matrix, 50, OAS)
            assert torch.equal(matrix, kept)


class TestCondition:
    @pytest.mark.parametrize("d_key", [2, 30, 200])
    @pytest.mark.parametrize("turned", [False, True], ids=["by neuron", "mixed"])
    def test_is_the_one_norm_condition_from_below(
        self, d_key: int, turned: bool
    ) -> None:
        """Also where the weak directions are mixtures, which no diagonal shows."""
        for seed in range(5):
            matrix = moment(4 * d_key, d_key, seed)
            if turned:
                noise = random_keys(d_key, d_key, seed + 50).double()
                basis = torch.linalg.qr(noise).Q
                matrix = basis @ matrix @ basis.T
                matrix = (matrix + matrix.T) / 2
            exact = float(torch.linalg.cond(matrix, 1))
            found = measure(matrix, 4 * d_key).condition
            assert found is not None and exact > 10
            assert exact / 3 < found <= exact * (1 + 1e-8)

    # 1,100: the norm is taken by blocks of rows; the last one counts as well.
    @pytest.mark.parametrize("d_key", [1, 7, 1100])
    def test_of_a_diagonal_is_exact(self, d_key: int) -> None:
        diagonal = torch.linspace(1, 3, d_key, dtype=torch.float64)
        matrix = torch.diag(diagonal)
        expected = float(diagonal.max() / diagonal.min())
        found = condition(matrix, factor_of(matrix, 2 * d_key))
        assert math.isclose(found, expected, rel_tol=1e-12)

    def test_does_not_depend_on_the_scale(self) -> None:
        matrix = moment(100, 20)
        expected = measure(matrix, 100).condition
        for scale in (1e-30, 1e20):
            found = measure(matrix * scale, 100).condition
            assert found is not None and expected is not None
            assert math.isclose(found, expected, rel_tol=1e-9)

    def test_directions_of_unlike_scale_are_not_singular(self) -> None:
        """Each pivot is judged by its own diagonal, so a weak neuron is no noise."""
        matrix = torch.diag(torch.tensor([1.0, 1e-30, 1e8]))
        found = measure(matrix, 10).condition
        assert found is not None
        assert math.isclose(found, 1e38, rel_tol=1e-5)

    @pytest.mark.parametrize("wide", [False, True])
    def test_of_fewer_keys_than_dimensions_there_is_none(self, wide: bool) -> None:
        """What rounding makes of zero is not taken for an eigenvalue, however it falls
        out."""
        for seed in range(20):
            for count in (1, 20, 29):
                matrix = moment(count, 30, seed, wide=wide)
                assert measure(matrix, count).condition is None
                assert cholesky(matrix, count, OAS) is not None

    def test_of_a_neuron_that_never_fires_there_is_none(self) -> None:
        matrix = moment(100, 10)
        matrix[4] = matrix[:, 4] = 0
        assert measure(matrix, 100).condition is None
        zero = measure(torch.zeros(3, 3), 5)
        assert zero.condition is None and zero.effective_rank == 0


class TestSolutions:
    @pytest.fixture
    def problem(self) -> tuple[Tensor, Tensor, Tensor]:
        """C, keys and their solutions."""
        matrix, keys = moment(300, 24), random_keys(6, 24, seed=1).double()
        return matrix, keys, solutions(factor_of(matrix, 300), keys)

    def test_is_least_in_c_among_all_that_give_one_at_the_key(self, problem) -> None:
        """min uᵀCu subject to uᵀk = 1. Its conditions: Cu is a multiple of k, and the
        constraint holds; the objective is convex, so no other way is lower."""
        matrix, keys, found = problem
        generator = torch.Generator().manual_seed(2)
        for key, u in zip(keys, found, strict=True):
            assert math.isclose(float(u @ key), 1, rel_tol=1e-11)
            gradient = matrix @ u
            multiplier = gradient @ u  # uᵀCu, as uᵀk = 1
            assert float((gradient - multiplier * key).norm()) < 1e-11 * float(
                gradient.norm()
            )
            for _ in range(50):
                step = torch.randn(24, generator=generator, dtype=torch.float64)
                step -= (step @ key) / (key @ key) * key
                for size in (1e-3, 1.0):
                    other = u + size * step * u.norm() / step.norm()
                    assert float(other @ matrix @ other) > float(multiplier)

    def test_is_the_dense_formula(self, problem) -> None:
        matrix, keys, found = problem
        inverse = torch.linalg.inv(matrix)
        for key, u in zip(keys, found, strict=True):
            expected = inverse @ key / (key @ inverse @ key)
            assert float((u - expected).norm()) < 1e-9 * float(expected.norm())

    @pytest.mark.parametrize("weight", [1 / 300, 1.0, 30.0])
    def test_counting_the_key_itself_changes_nothing(self, problem, weight) -> None:
        matrix, keys, found = problem
        for key, u in zip(keys, found, strict=True):
            more = matrix + weight * torch.outer(key, key)
            again = solutions(factor_of(more, 301), key[None])[0]
            assert float((again - u).norm()) < 1e-9 * float(u.norm())

    def test_scales_of_c_and_of_the_key(self, problem) -> None:
        matrix, keys, found = problem
        scaled = solutions(factor_of(64 * matrix, 300), keys)
        assert torch.allclose(scaled, found, rtol=1e-12)
        longer = solutions(factor_of(matrix, 300), 4 * keys)
        assert torch.allclose(4 * longer, found, rtol=1e-12)

    def test_is_the_row_of_the_update_that_writes_one_edit(self, problem) -> None:
        matrix, keys, found = problem
        residual = torch.linspace(-1, 2, 5, dtype=torch.float64)
        for key, u in zip(keys, found, strict=True):
            update = solve(
                Objective(SecondMoment(matrix), Equality()),
                keys=key[None],
                residuals=residual[None],
            ).update.dense()
            expected = torch.outer(residual, u)
            assert float((update - expected).norm()) < 1e-9 * float(expected.norm())


class TestChange:
    def test_zero_for_equal_solutions(self) -> None:
        keys = random_keys(4, 8)
        assert relative_change(keys, keys) == 0

    def test_is_the_median_over_rows_relative_to_all_the_tokens(self) -> None:
        full = torch.eye(3, 4).double() * torch.tensor([[1.0], [10.0], [100.0]])
        half = full.clone()
        half[0, 3], half[1, 3], half[2, 3] = 0.7, 2.0, 10.0  # 70 %, 20 %, 10 %
        assert math.isclose(relative_change(half, full), 0.2)
        assert math.isclose(relative_change(half[:1], full[:1]), 0.7)
        assert relative_change(2 * full, full) == 1

    @pytest.mark.parametrize(
        ("before", "after", "shrinkage"),
        [(80, 160, "none"), (12, 24, "oas"), (12, 60, "oas"), (20, 40, "none")],
    )
    def test_compares_the_two_halves_with_one_shrinkage(
        self, before: int, after: int, shrinkage: str
    ) -> None:
        keys, probes = random_keys(after, 20, seed=3), random_keys(5, 20, seed=4)
        parts = [keys[:size].double() for size in (before, after)]
        moments = [(part.T @ part / len(part)) for part in parts]
        rows = []
        for each, count in zip(moments, (before, after), strict=True):
            stats = KeyStatistics(0, each, count, SOURCE).shrunk(shrinkage)
            solved = torch.linalg.solve(stats.regularized(), probes.double().T).T
            rows.append(solved / (solved * probes).sum(dim=1, keepdim=True))
        moved = (rows[1] - rows[0]).norm(dim=1) / rows[1].norm(dim=1)
        half = Half.of(moments[0], before, probes)
        assert (half.count, half.probes is probes) == (before, True)
        found = measure(moments[1], after, half=half)
        assert found.change_shrinkage == shrinkage
        assert found.change is not None and found.change > 0.01
        assert math.isclose(found.change, float(moved.sort().values[2]), rel_tol=1e-8)
        # The condition is of C itself in any case.
        assert found.condition == measure(moments[1], after).condition

    def test_nothing_moved(self) -> None:
        matrix = moment(90, 20)
        half = Half.of(matrix, 90, random_keys(5, 20))
        found = measure(matrix, 90, half=half)
        assert found.change == 0 and found.change_shrinkage == "none"

    def test_a_half_that_cannot_be_solved_is_no_measure(self) -> None:
        """Enough tokens, but the same few again and again."""
        keys = random_keys(10, 20).repeat(4, 1)
        half = Half.of(keys.T @ keys / 40, 40, random_keys(5, 20))
        assert half.solutions is None
        found = measure(moment(80, 20, wide=False), 80, half=half)
        assert found.change is None and found.change_shrinkage is None
        assert found.condition is not None

    def test_a_probe_that_is_zero_leaves_a_report_that_can_be_written(self) -> None:
        """A layer of rectified neurons may be silent at a token."""
        probes = random_keys(5, 20)
        probes[2] = 0
        for count in (90, 15):
            half = Half.of(moment(count, 20), count, probes)
            found = measure(moment(2 * count, 20), 2 * count, half=half)
            text = json.dumps(dataclasses.asdict(found), allow_nan=False)
            assert Adequacy(**json.loads(text)) == found


# One panel of 512 rows and less, just more, two and three, none a multiple.
WIDTHS = (1, 511, 512, 513, 1100, 1537)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d_key", WIDTHS)
class TestFinish:
    def test_gives_the_bits_of_freeze(self, d_key: int, dtype: torch.dtype) -> None:
        keys = random_keys(30, d_key).to(dtype)
        accumulator = SecondMomentAccumulator(d_key, dtype)
        accumulator.add(keys)
        frozen, count = accumulator.freeze()
        total = accumulator.state()["total"].data_ptr()
        mean, same = accumulator.finish()
        assert count == same == 30
        assert mean.shape == (d_key, d_key) and mean.dtype == dtype
        assert torch.equal(mean, frozen) and torch.equal(mean, mean.T)
        assert mean.is_contiguous()
        expected = keys.double().T @ keys.double() / 30
        error = float((mean.double() - expected).norm() / expected.norm())
        assert error < (1e-6 if dtype == torch.float32 else 1e-14)
        # In the total's own memory, which a frozen copy never is in.
        if dtype == torch.float32:
            assert mean.data_ptr() == total
        assert frozen.data_ptr() != total

    def test_add_is_update_without_the_check(
        self, d_key: int, dtype: torch.dtype
    ) -> None:
        one, two = (SecondMomentAccumulator(d_key, dtype) for _ in range(2))
        for batch in random_keys(30, d_key).to(dtype).split([11, 1, 18]):
            one.add(batch)
            two.update(batch)
        assert one.count == two.count == 30
        assert torch.equal(one.state()["total"], two.state()["total"])


def test_add_refuses_what_update_refuses_but_what_is_not_finite() -> None:
    accumulator = SecondMomentAccumulator(4)
    for keys in (torch.ones(3, 5), torch.ones(4), torch.ones(3, 4).double()):
        with pytest.raises(StatisticsError):
            accumulator.add(keys)
    assert accumulator.count == 0 and not bool(accumulator.state()["total"].any())
    accumulator.add(torch.full((2, 4), math.nan))
    assert accumulator.count == 2


@pytest.mark.parametrize("d_key", [5, 600])
def test_cleared_is_as_new(d_key: int) -> None:
    accumulator = SecondMomentAccumulator(d_key)
    accumulator.update(random_keys(40, d_key, seed=1))
    accumulator.clear()
    assert accumulator.count == 0
    with pytest.raises(StatisticsError, match="no keys"):
        accumulator.freeze()
    with pytest.raises(StatisticsError, match="no keys"):
        accumulator.finish()
    fresh = SecondMomentAccumulator(d_key)
    for each in (accumulator, fresh):
        each.update(random_keys(20, d_key, seed=2))
    assert torch.equal(accumulator.finish()[0], fresh.finish()[0])
    assert accumulator.count == 20
