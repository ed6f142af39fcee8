"""Dense symmetric linear algebra: Cholesky factors with reported jitter, an estimate
of the condition number, and the rows of a Gram matrix that depend on the others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.linalg import lapack, solve_triangular
from torch import Tensor

from unified_edit.errors import IllConditioned, NonFiniteError, RecipeError

JitterRule = Literal["auto"] | float
"""How much of trace/d may be added to a diagonal: "auto" tries none first and then
`JITTER_LADDER` upwards; a number is added as it is; 0.0 allows none."""

JITTER_LADDER: dict[torch.dtype, tuple[float, ...]] = {
    torch.float64: (1e-12, 1e-11, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6),
    torch.float32: (1e-6, 1e-5, 1e-4, 1e-3),
}
_CONDITION_STEPS = 5


@dataclass(frozen=True)
class Jitter:
    """What was added to a diagonal before factoring; zeros if nothing was."""

    absolute: float = 0.0
    relative: float = 0.0
    """The same in units of trace/d, the mean eigenvalue."""


def cholesky_with_jitter(
    matrix: Tensor,
    *,
    jitter: JitterRule = "auto",
    what: str = "matrix",
    remedy: str = "",
) -> tuple[Tensor, Jitter]:
    """Lower factor L of `matrix + jitter.absolute · I = L Lᵀ`, and the jitter.

    A factor counts only if each pivot stands clear of the rounding error of the
    diagonal entry that it came from. So a singular matrix that passes by luck is
    treated as singular, and badly scaled rows are not.

    Args:
        matrix: [d, d], symmetric; only the lower triangle is read.
        jitter: what may be added, relative to trace/d.
        what: the matrix's name in messages.
        remedy: appended to the message of a failure.

    Raises:
        RecipeError: no such jitter.
        NonFiniteError: the matrix holds NaN or infinity.
        IllConditioned: not positive definite with what jitter is allowed.
    """
    if jitter != "auto" and not (math.isfinite(jitter) and jitter >= 0):
        raise RecipeError(f'jitter must be "auto" or a number ≥ 0, got {jitter}')
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteError(f"{what} holds NaN or infinity")
    size = matrix.shape[0]
    mean = float(matrix.diagonal().mean())
    ladder = (0.0, *JITTER_LADDER[matrix.dtype]) if jitter == "auto" else (jitter,)
    noise = 8 * math.sqrt(size) * torch.finfo(matrix.dtype).eps
    for relative in ladder if mean > 0 else ():
        attempt = matrix
        if relative:
            attempt = matrix.clone()
            attempt.diagonal().add_(relative * mean)
        factor, failed = torch.linalg.cholesky_ex(attempt)
        pivots, diagonal = factor.diagonal().square(), attempt.diagonal()
        if int(failed) == 0 and bool((pivots > noise * diagonal).all()):
            return factor, Jitter(relative * mean, float(relative))
    tried = f"jitter up to {ladder[-1]:g}·trace/d" if ladder[-1] else "no jitter"
    raise IllConditioned(
        f"{what} [{size}, {size}] is not positive definite in {matrix.dtype} with "
        f"{tried} (trace/d = {mean:.3g}). {remedy}".rstrip()
    )


def condition_estimate(matrix: Tensor, factor: Tensor) -> float:
    """Condition number in the 1-norm: ‖A‖₁ exactly, ‖A⁻¹‖₁ by the estimator of Hager
    and Higham (ACM TOMS 14, 1988), a lower bound that is seldom off by more than 3.

    Args:
        matrix: [d, d], symmetric.
        factor: [d, d], its lower Cholesky factor; only O(d²) work is done on it.
    """
    size = matrix.shape[0]

    def inverse(vector: Tensor) -> Tensor:
        return torch.cholesky_solve(vector[:, None], factor)[:, 0]

    probe = torch.full((size,), 1 / size, dtype=matrix.dtype, device=matrix.device)
    estimate = 0.0
    for _ in range(_CONDITION_STEPS):
        image = inverse(probe)
        estimate = max(estimate, float(image.abs().sum()))
        slope = inverse(torch.where(image < 0, -1.0, 1.0).to(matrix.dtype))
        steepest = int(slope.abs().argmax())
        if float(slope[steepest].abs()) <= float(slope @ probe):
            break
        probe = torch.zeros_like(probe)
        probe[steepest] = 1
    steps = torch.arange(size, dtype=matrix.dtype, device=matrix.device)
    # A second probe that no cancellation in A⁻¹ is likely to defeat.
    alternating = (1 - 2 * (steps % 2)) * (1 + steps / max(size - 1, 1))
    estimate = max(estimate, 2 * float(inverse(alternating).abs().sum()) / (3 * size))
    return estimate * float(torch.linalg.matrix_norm(matrix, 1))


@dataclass(frozen=True, eq=False)
class Dependence:
    """Which rows of a Gram matrix span the others."""

    kept: tuple[int, ...]
    """Independent rows, ascending."""
    dependent: tuple[int, ...]
    """The remaining rows, ascending."""
    coefficients: Tensor
    """[len(dependent), len(kept)] float64, CPU: each dependent row as a combination
    of the kept ones."""


def dependence(correlation: Tensor, floor: float) -> Dependence:
    """Splits the rows behind a Gram matrix by Cholesky with complete pivoting.

    Args:
        correlation: [n, n], Gram matrix of rows of norm one.
        floor: a row is dependent when its squared distance to the span of the rows
            taken before is at most this.
    """
    gram = correlation.double().cpu().numpy()
    packed, pivots, rank, _ = lapack.dpstrf(gram, tol=floor, lower=1)
    order = [int(pivot) - 1 for pivot in pivots]
    across = solve_triangular(
        packed[:rank, :rank], packed[rank:, :rank].T, lower=True, trans="T"
    ).T
    kept = sorted(range(rank), key=order.__getitem__)
    dependent = sorted(range(rank, len(order)), key=order.__getitem__)
    rows = [position - rank for position in dependent]
    return Dependence(
        kept=tuple(order[position] for position in kept),
        dependent=tuple(order[position] for position in dependent),
        coefficients=torch.from_numpy(across.copy())[rows][:, kept],
    )
