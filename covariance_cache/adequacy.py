"""What a number of tokens bought: is C steady enough to be solved with?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.linalg import lapack
from torch import Tensor

from covariance_cache.shrinkage import Shrinkage, oas_intensity, traces

_ROWS = 1024


@dataclass(frozen=True)
class Adequacy:
    """Measures of a layer's second moment. None where one does not exist."""

    tokens_per_dimension: float
    """Keys counted / d_key."""
    effective_rank: float
    """trace(C)² / trace(C²): how many equal directions would be as concentrated."""
    condition: float | None
    """Condition number of C in the 1-norm, estimated from below; None where C is
    numerically singular."""
    shrinkage_intensity: float
    """What `oas` would mix in, from 0 to 1."""
    first_position_share: float | None
    """Share of trace(C) that the first positions of the windows hold."""
    change: float | None
    """How much the solution for a probe key moved between half the tokens and all of
    them: the median over probe keys k of ‖u_all - u_half‖ / ‖u_all‖, where
    u = C⁻¹k / (kᵀC⁻¹k) is the row of the update that writes one edit at k."""
    change_shrinkage: str | None
    """With which shrinkage: none, or oas where half the tokens were too few."""


@dataclass(frozen=True, eq=False)
class Half:
    """Solutions for probe keys at half the tokens."""

    count: int
    """Keys counted so far."""
    probes: Tensor
    """[n, d_key] keys."""
    solutions: Tensor | None
    """[n, d_key] float64; None where C was singular."""

    @classmethod
    def of(cls, second_moment: Tensor, count: int, probes: Tensor) -> Half:
        """From the second moment of the first half."""
        factor = cholesky(second_moment, count, cls.shrinkage(count, probes.shape[1]))
        found = None if factor is None else solutions(factor, probes)
        return cls(count, probes, found)

    @staticmethod
    def shrinkage(count: int, d_key: int) -> Shrinkage:
        """With which both halves are solved: none, if half the tokens can be."""
        return Shrinkage() if count >= d_key else Shrinkage("oas")


def measure(
    second_moment: Tensor,
    count: int,
    *,
    first_position_share: float | None = None,
    half: Half | None = None,
) -> Adequacy:
    """Adequacy of a second moment [d_key, d_key], a mean of `count` keys. One more
    matrix of this size is made at a time, in float64."""
    size = second_moment.shape[0]
    trace, square = traces(second_moment)
    factor = cholesky(second_moment, count, Shrinkage())
    number = None if factor is None else condition(second_moment, factor)
    change = shrinkage = None
    if half is not None and half.solutions is not None:
        shrinkage = half.shrinkage(half.count, size)
        if shrinkage != Shrinkage():
            factor = None  # frees it before the next
            factor = cholesky(second_moment, count, shrinkage)
        if factor is not None:
            change = relative_change(half.solutions, solutions(factor, half.probes))
    return Adequacy(
        tokens_per_dimension=count / size,
        effective_rank=trace**2 / square if square > 0 else 0.0,
        condition=number,
        shrinkage_intensity=oas_intensity(trace, square, size, count),
        first_position_share=first_position_share,
        change=change,
        change_shrinkage=None if change is None else str(shrinkage),
    )


def cholesky(matrix: Tensor, count: int, shrinkage: Shrinkage) -> Tensor | None:
    """Lower factor in float64 of a second moment, shrunk; None if it is singular to
    working precision. One matrix [d, d] of float64 is made, no more."""
    scale, shift = shrinkage.weights(matrix, count)
    if not shift and count < matrix.shape[0]:
        return None  # singular, whatever rounding makes of it
    shrunk = matrix.to(torch.float64, copy=True).mul_(scale)
    shrunk.diagonal().add_(shift)
    # The mean was rounded to its own dtype: smaller pivots are made of that rounding.
    noise = torch.finfo(matrix.dtype).eps * shrunk.diagonal()
    failed = shrunk.new_empty((), dtype=torch.int32)
    factor: Tensor = torch.linalg.cholesky_ex(shrunk, out=(shrunk, failed))[0]
    if int(failed) or not bool((factor.diagonal().square() > noise).all()):
        return None
    return factor


def solutions(factor: Tensor, probes: Tensor) -> Tensor:
    """u = C⁻¹k / (kᵀC⁻¹k) [n, d] in float64 for probe keys [n, d]. For one edit at k
    with residual r the update is r uᵀ. Counting k itself in C changes nothing."""
    rows = probes.to(factor)
    solved = torch.cholesky_solve(rows.T, factor).T
    leverage = (rows * solved).sum(dim=1, keepdim=True)
    return solved / leverage


def relative_change(half: Tensor, full: Tensor) -> float | None:
    """Median over rows of ‖full - half‖ / ‖full‖, without those of a key that is zero,
    which has no solution; None if no row is left."""
    changes = (full - half).norm(dim=1) / full.norm(dim=1)
    known = changes[torch.isfinite(changes)]
    return float(known.median()) if len(known) else None


def condition(matrix: Tensor, factor: Tensor) -> float | None:
    """Condition number in the 1-norm, ‖C⁻¹‖₁ estimated from below by LAPACK's pocon;
    None beyond float64's range.

    Args:
        matrix: [d, d], symmetric.
        factor: [d, d], its lower Cholesky factor; only O(d²) work is done on it.
    """
    norm = max(
        float(rows.double().abs().sum(dim=1).max())
        for rows in torch.split(matrix, _ROWS)
    )
    # LAPACK counts by columns: the transpose, and so an upper factor, without a copy.
    reciprocal, _ = lapack.dpocon(factor.cpu().numpy().T, norm, uplo="U")
    return 1 / float(reciprocal) if reciprocal > 0 else None
