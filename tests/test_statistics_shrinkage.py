"""Shrinkage against the paper's own definitions (Chen, Wiesel, Eldar and Hero 2010):
from eigenvalues, by their iteration, and on samples of a known distribution."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from covariance_cache import KeyStatistics, Provenance, Shrinkage, StatisticsError
from covariance_cache.shrinkage import oas_intensity, traces

SOURCE = Provenance(model_fingerprint="f" * 64, module="h.0.mlp.c_proj")
SHRINKAGES = ("none", "oas", "ridge:0.25")


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def sample(truth: Tensor, count: int, seed: int, repeats: int = 1) -> Tensor:
    """Uncentred second moments [repeats, d, d] of `count` Gaussian keys each."""
    keys = (
        normal(repeats, count, len(truth), seed=seed) @ torch.linalg.cholesky(truth).T
    )
    return keys.mT @ keys / count


def autoregressive(size: int, correlation: float = 0.5) -> Tensor:
    """The paper's first example, Σ_ij = r^|i - j|."""
    index = torch.arange(size, dtype=torch.float64)
    return correlation ** (index[:, None] - index).abs()


def spread(size: int) -> Tensor:
    """Eigenvalues 1, 1/2, 1/3, … in a random basis, as real keys have them."""
    basis = torch.linalg.qr(normal(size, size, seed=99)).Q
    return basis / torch.arange(1, size + 1) @ basis.T


def intensity_of(matrix: Tensor, count: int) -> float:
    return oas_intensity(*traces(matrix), len(matrix), count)


def statistics(matrix: Tensor, count: int, shrinkage: str = "none") -> KeyStatistics:
    return KeyStatistics(0, matrix, count, SOURCE).shrunk(shrinkage)


class TestText:
    @pytest.mark.parametrize(
        "text", ["none", "oas", "ridge:0.01", "ridge:1e-300", "ridge:2.5", "ridge:3"]
    )
    def test_what_is_parsed_is_what_is_said(self, text: str) -> None:
        found = Shrinkage.parse(text)
        assert str(found).split(":")[0] == text.split(":")[0]
        assert Shrinkage.parse(str(found)) == found
        if ":" in text:
            assert found == Shrinkage("ridge", float(text.split(":")[1]))

    def test_no_digit_of_a_strength_is_lost(self) -> None:
        for strength in (0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, math.pi):
            assert Shrinkage.parse(str(Shrinkage("ridge", strength))) == Shrinkage(
                "ridge", strength
            )

    @pytest.mark.parametrize(
        "text",
        [
            *("", "OAS", " oas", "lasso", "oas:0.1", "none:1", "ridge", "ridge:"),
            *("ridge:0", "ridge:-1", "ridge:nan", "ridge:inf", "ridge:1,5", "ridge=1"),
        ],
    )
    def test_anything_else_is_refused_with_what_is_expected(self, text: str) -> None:
        with pytest.raises(StatisticsError, match=r"expected none, oas or ridge:NUMB"):
            Shrinkage.parse(text)
        with pytest.raises(StatisticsError, match="shrinkage"):
            statistics(torch.eye(2), 3, text)

    @pytest.mark.parametrize(
        ("kind", "strength"),
        [("lasso", 0), ("none", 1), ("oas", 0.5), ("ridge", 0), ("ridge", math.nan)],
    )
    def test_kinds_and_strengths_that_do_not_fit(
        self, kind: str, strength: float
    ) -> None:
        with pytest.raises(StatisticsError, match=kind):
            Shrinkage(kind, strength)  # type: ignore[arg-type]


def paper_intensity(matrix: Tensor, count: int) -> float:
    """Equation 23 from eigenvalues: of S with mean m, tr(S²) − tr²(S)/p is the sum of
    (λ − m)²."""
    values = torch.linalg.eigvalsh(matrix.double())
    size, mean = len(values), values.mean()
    above = (1 - 2 / size) * (values**2).sum() + values.sum() ** 2
    below = (count + 1 - 2 / size) * ((values - mean) ** 2).sum()
    return min(1.0, float(above / below))


# Fewer keys than dimensions, as many, more; one key.
SIZES = [(12, 1), (12, 3), (12, 12), (12, 200), (40, 10), (3, 1000), (2, 5)]


class TestIntensity:
    @pytest.mark.parametrize(("size", "count"), SIZES)
    @pytest.mark.parametrize("truth", [autoregressive, spread])
    def test_is_the_papers_closed_form(self, truth, size: int, count: int) -> None:
        for seed in range(5):
            matrix = sample(truth(size), count, seed)[0]
            expected = paper_intensity(matrix, count)
            assert math.isclose(intensity_of(matrix, count), expected, rel_tol=1e-10)

    def test_traces_are_summed_in_float64_over_blocks_of_rows(self) -> None:
        keys = (normal(40, 1100) + 0.5).float()  # more rows than a block has
        matrix = keys.T @ keys / 40
        wide = matrix.double()
        trace, square = traces(matrix)
        assert math.isclose(trace, float(wide.trace()), rel_tol=1e-12)
        assert math.isclose(square, float((wide @ wide).trace()), rel_tol=1e-12)

    @pytest.mark.parametrize(("size", "count"), SIZES)
    @pytest.mark.parametrize("begin", [0.0, 0.3, 0.9, 0.999])
    def test_the_papers_iteration_ends_there_from_anywhere(
        self, size: int, count: int, begin: float
    ) -> None:
        """Equations 18 and 19: Σ_j = (1 − ρ_j) S + ρ_j F takes the unknown Σ's place in
        the best intensity there is."""
        for truth in (autoregressive(size), spread(size)):
            moment = sample(truth, count, seed=7)[0]
            target = moment.trace() / size * torch.eye(size, dtype=torch.float64)
            rho = begin
            for _ in range(3000):
                before, mixed = rho, (1 - rho) * moment + rho * target
                rho = best_intensity(mixed @ moment, mixed, size, count)
                if rho == before:
                    break
            # Where one is the limit, it is reached as slowly as it is nearly not.
            assert math.isclose(rho, intensity_of(moment, count), rel_tol=1e-6)

    def test_the_iteration_is_about_the_intensity_of_least_error(self) -> None:
        """What the iteration puts its guess into is, with the true Σ, the ρ that
        minimises E‖(1 − ρ) S + ρ F − Σ‖² for Gaussian keys: here by sampling."""
        for size, count in ((8, 3), (8, 8), (5, 20)):
            truth = spread(size)
            moments = sample(truth, count, seed=1, repeats=40_000)
            means = moments.diagonal(dim1=1, dim2=2).mean(dim=1)
            targets = means[:, None, None] * torch.eye(size)
            away = moments - targets
            # The error is a parabola in ρ; this is where its slope is zero.
            lowest = ((moments - truth) * away).mean() / (away * away).mean()
            expected = best_intensity(truth @ truth, truth, size, count)
            assert math.isclose(expected, float(lowest), rel_tol=0.03)

    def test_vanishes_as_keys_are_added_like_one_over_their_number(self) -> None:
        truth = spread(10)
        trace, square = float(truth.trace()), float((truth @ truth).trace())
        limit = (0.8 * square + trace**2) / (square - trace**2 / 10)
        found = {}
        for count in (1_000, 10_000, 100_000):
            moment = sample(truth, count, seed=2)[0]
            found[count] = intensity_of(moment, count)
        assert math.isclose(100_000 * found[100_000], limit, rel_tol=0.05)
        assert math.isclose(found[1_000], 100 * found[100_000], rel_tol=0.1)
        assert found[100_000] < 1e-3 < found[1_000]

    @pytest.mark.parametrize("size", [1, 2, 33, 1100])
    @pytest.mark.parametrize("count", [1, 10**9])
    def test_is_one_for_a_multiple_of_the_identity(self, size: int, count: int) -> None:
        for scale in (1.0, 0.1, 3.7e-6):
            assert intensity_of(scale * torch.eye(size), count) == 1
            assert intensity_of(scale * torch.eye(size).double(), count) == 1

    def test_does_not_depend_on_the_keys_scale(self) -> None:
        matrix = sample(spread(12), 9, seed=3)[0]
        expected = intensity_of(matrix, 9)
        assert 0 < expected < 1
        assert intensity_of(matrix * 2.0**-40, 9) == expected
        assert math.isclose(intensity_of(matrix * 1e8, 9), expected, rel_tol=1e-12)
        scale, shift = Shrinkage("oas").weights(matrix, 9)
        assert Shrinkage("oas").weights(matrix * 16, 9) == (scale, 16 * shift)
        ridge = Shrinkage("ridge", 0.1)
        assert ridge.weights(matrix * 16, 9)[1] == 16 * ridge.weights(matrix, 9)[1]


def best_intensity(product: Tensor, sigma: Tensor, size: int, count: int) -> float:
    """The intensity of least error, from tr(Σ²) (or what is put in its place) and
    tr(Σ)."""
    square, trace = float(product.trace()), float(sigma.trace())
    above = (1 - 2 / size) * square + trace**2
    return above / ((count + 1 - 2 / size) * square + (1 - count / size) * trace**2)


@pytest.mark.parametrize("truth", [autoregressive(30), spread(30)], ids=["ar", "1/k"])
@pytest.mark.parametrize("count", [4, 15, 30, 90])
def test_few_keys_are_better_shrunk_and_nearly_as_well_as_can_be(
    truth: Tensor, count: int
) -> None:
    """Mean squared error over 200 draws, against the raw mean and the best ρ of a
    grid, which knows the truth."""
    repeats = 200
    moments = sample(truth, count, seed=count, repeats=repeats)
    shrunk = torch.stack(
        [statistics(each, count, "oas").regularized() for each in moments]
    )

    def error(estimates: Tensor) -> float:
        return float((estimates - truth).square().sum(dim=(1, 2)).mean())

    means = moments.diagonal(dim1=1, dim2=2).mean(dim=1)
    targets = means[:, None, None] * torch.eye(30)
    grid = torch.linspace(0, 1, 201).tolist()
    oracle = min(error((1 - rho) * moments + rho * targets) for rho in grid)
    raw, found = error(moments), error(shrunk)
    assert oracle < raw
    assert found < raw
    # The rest is the price of not knowing Σ: in the paper's figures as small as here.
    assert raw - found > 0.8 * (raw - oracle)
    assert found < 1.15 * oracle


class TestRegularized:
    @pytest.fixture(params=[torch.float32, torch.float64])
    def matrix(self, request: pytest.FixtureRequest) -> Tensor:
        # Fewer keys than dimensions: singular.
        return sample(spread(24), 10, seed=5)[0].to(request.param)

    def test_oas_is_the_dense_formula(self, matrix: Tensor) -> None:
        rho = paper_intensity(matrix, 10)
        wide = matrix.double()
        identity = torch.eye(24, dtype=torch.float64)
        expected = (1 - rho) * wide + rho * wide.trace() / 24 * identity
        assert 0.01 < rho < 0.99
        found = statistics(matrix, 10, "oas").regularized()
        assert found.dtype == torch.float64
        assert float((found - expected).abs().max()) < 1e-13 * float(expected.max())
        # A mix of two matrices of one trace.
        assert math.isclose(float(found.trace()), float(wide.trace()), rel_tol=1e-13)

    def test_ridge_is_the_dense_formula(self, matrix: Tensor) -> None:
        wide = matrix.double()
        identity = torch.eye(24, dtype=torch.float64)
        expected = wide + 0.25 * wide.trace() / 24 * identity
        found = statistics(matrix, 10, "ridge:0.25").regularized()
        assert float((found - expected).abs().max()) < 1e-14 * float(expected.max())

    def test_none_is_the_same_bits(self, matrix: Tensor) -> None:
        found = statistics(matrix, 10).regularized()
        assert torch.equal(found, matrix.double())
        as_stored = statistics(matrix, 10).regularized(dtype=matrix.dtype)
        assert torch.equal(
            as_stored.view(torch.uint8), matrix.contiguous().view(torch.uint8)
        )

    @pytest.mark.parametrize("shrinkage", SHRINKAGES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_stored_mean_is_neither_changed_nor_shared(
        self, matrix: Tensor, shrinkage: str, dtype: torch.dtype
    ) -> None:
        kept = matrix.clone()
        found = statistics(matrix, 10, shrinkage)
        assert found.second_moment is matrix  # nor copied
        result = found.regularized(dtype=dtype)
        assert torch.equal(matrix, kept)
        again = result.clone()
        result.mul_(0).sub_(3)
        assert torch.equal(matrix, kept)
        assert torch.equal(found.regularized("cpu", dtype), again)

    @pytest.mark.parametrize("shrinkage", SHRINKAGES[1:])
    def test_is_positive_definite_with_too_few_keys(
        self, matrix: Tensor, shrinkage: str
    ) -> None:
        wide = matrix.double()
        mean = float(wide.trace()) / 24
        assert float(torch.linalg.eigvalsh(wide)[0]) < 1e-7 * mean
        found = statistics(matrix, 10, shrinkage).regularized()
        torch.linalg.cholesky(found)  # raises unless it is
        lifted = paper_intensity(matrix, 10) if shrinkage == "oas" else 0.25
        smallest = float(torch.linalg.eigvalsh(found)[0])
        assert math.isclose(smallest, lifted * mean, rel_tol=1e-5)

    def test_one_matrix_is_made_for_all_three(self, matrix: Tensor) -> None:
        """Eigenvectors stay: all three commute with C."""
        wide = matrix.double()
        for shrinkage in SHRINKAGES:
            found = statistics(matrix, 10, shrinkage).regularized()
            products = found @ wide, wide @ found
            assert torch.allclose(*products, rtol=0, atol=1e-12 * float(wide.max()))
            assert torch.equal(found, found.T)


def test_the_fingerprint_tells_shrinkages_apart() -> None:
    base = statistics(sample(spread(6), 20, seed=1)[0], 20)
    texts = ("none", "oas", "ridge:0.1", "ridge:0.2")
    prints = {text: base.shrunk(text).fingerprint() for text in texts}
    assert prints["none"] == base.fingerprint()
    for one, other in itertools.combinations(texts, 2):
        assert prints[one] != prints[other]
    back = base.shrunk("oas").shrunk(Shrinkage("ridge", 0.1))
    assert back.fingerprint() == prints["ridge:0.1"]
    assert back.shrunk("none").fingerprint() == base.fingerprint()
