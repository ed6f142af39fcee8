"""Random problems, and the published formulas written out densely with explicit
inverses: what the algebra is tested against. Nothing here uses `unified_edit.algebra`
but to build objectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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

LAMBDA, MU, ETA, WEIGHT = 7.0, 0.3, 2.0, 5.0
NULL_THRESHOLD = 1.0
"""Relative to the mean eigenvalue."""


@dataclass(frozen=True)
class Problem:
    """Keys [n, d_key], residuals [n, d_value], and everything around them."""

    K: Tensor
    R: Tensor
    C: Tensor
    Cp: Tensor
    W: Tensor
    rho: Tensor

    @property
    def U(self) -> Tensor:
        values, vectors = torch.linalg.eigh(self.C)
        return vectors[:, values < NULL_THRESHOLD * values.mean()]

    @property
    def P(self) -> Tensor:
        return self.U @ self.U.T


def make_problem(n: int, d_key: int, d_value: int, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scales = torch.linspace(0.4, 2.0, d_key, dtype=torch.float64)
    background = normal(6 * d_key, d_key) * scales + 0.2
    earlier = normal(d_key // 2 + 1, d_key)
    rho = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    rho[::3] = 0
    return Problem(
        K=normal(n, d_key),
        R=normal(n, d_value),
        C=background.T @ background / len(background),
        Cp=earlier.T @ earlier,
        W=normal(d_value, d_key),
        rho=rho,
    )


def eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[0], dtype=like.dtype)


def inv(matrix: Tensor) -> Tensor:
    return torch.linalg.inv(matrix)


def rome(p: Problem) -> Tensor:
    """Meng et al. 2022, eq. 2: Λ (C⁻¹k)ᵀ, Λ = (v* − Wk) / (C⁻¹k)ᵀk."""
    k, r = p.K[0], p.R[0]
    u = inv(p.C) @ k
    return torch.outer(r / (u @ k), u)


def emmet(p: Problem) -> Tensor:
    """Gupta et al. 2024: R (KᵀC⁻¹K)⁻¹ KᵀC⁻¹ with samples as columns."""
    K, R = p.K.T, p.R.T
    return R @ inv(K.T @ inv(p.C) @ K) @ K.T @ inv(p.C)


def emmet_code(p: Problem) -> Tensor:
    """The published code: λ_D on the n×n matrix, C scaled by w."""
    K, R, C = p.K.T, p.R.T, WEIGHT * p.C
    D = K.T @ inv(C) @ K
    return R @ inv(D + LAMBDA * eye(D)) @ K.T @ inv(C)


def memit(p: Problem) -> Tensor:
    """Meng et al. 2023, eq. 14: R Kᵀ (λC + KKᵀ)⁻¹ with samples as columns."""
    K, R = p.K.T, p.R.T
    return R @ K.T @ inv(LAMBDA * p.C + K @ K.T)


def memit_weighted(p: Problem) -> Tensor:
    K, R, D = p.K.T, p.R.T, torch.diag(_weights(p))
    return R @ D @ K.T @ inv(LAMBDA * p.C + K @ D @ K.T)


def memit_sequential(p: Problem) -> Tensor:
    K, R = p.K.T, p.R.T
    return R @ K.T @ inv(LAMBDA * p.C + p.Cp + K @ K.T)


def encore(p: Problem) -> Tensor:
    K, R = p.K.T, p.R.T
    return R @ K.T @ inv(LAMBDA * p.C + p.Cp + K @ K.T + MU * eye(p.C))


def alphaedit_first(p: Problem) -> Tensor:
    """Fang et al. 2025, eq. 14 with L2: Δᵀ = [P KKᵀ + L2·I]⁻¹ P K Rᵀ."""
    K, R, P = p.K.T, p.R.T, p.P
    return (inv(P @ K @ K.T + ETA * eye(P)) @ P @ K @ R.T).T


def alphaedit(p: Problem) -> Tensor:
    """Fang et al. 2025, eq. 14 with L2: Δᵀ = [P(KKᵀ + C_p) + L2·I]⁻¹ P K Rᵀ."""
    K, R, P = p.K.T, p.R.T, p.P
    return (inv(P @ (K @ K.T + p.Cp) + ETA * eye(P)) @ P @ K @ R.T).T


def mixed(p: Problem) -> Tensor:
    K, R = p.K.T, p.R.T
    return R @ inv(K.T @ inv(p.C) @ K + torch.diag(p.rho)) @ K.T @ inv(p.C)


def _weights(p: Problem) -> Tensor:
    return torch.linspace(0.5, 3, len(p.K), dtype=torch.float64)


@dataclass(frozen=True)
class Method:
    name: str
    objective: Callable[[Problem], Objective]
    formula: Callable[[Problem], Tensor]
    exact: bool = False
    """Has edits with ρ = 0: needs n ≤ d_key, and only the n×n form applies."""
    single: bool = False
    projected: bool = False


def _null(p: Problem) -> NullSpace:
    return NullSpace.of(p.C, threshold=NULL_THRESHOLD)


METHODS = (
    Method(
        "rome",
        lambda p: Objective(SecondMoment(p.C), Equality()),
        rome,
        exact=True,
        single=True,
    ),
    Method(
        "emmet", lambda p: Objective(SecondMoment(p.C), Equality()), emmet, exact=True
    ),
    Method(
        "emmet-code",
        lambda p: Objective(SecondMoment(p.C), LeastSquares(WEIGHT * LAMBDA)),
        emmet_code,
    ),
    Method(
        "memit", lambda p: Objective(SecondMoment(p.C), LeastSquares(LAMBDA)), memit
    ),
    Method(
        "memit-weighted",
        lambda p: Objective(SecondMoment(p.C), LeastSquares(LAMBDA, _weights(p))),
        memit_weighted,
    ),
    Method(
        "memit-sequential",
        lambda p: Objective(
            SecondMoment(p.C, weight=LAMBDA) + PreviousKeys(p.Cp), LeastSquares(1)
        ),
        memit_sequential,
    ),
    Method(
        "encore",
        lambda p: Objective(
            SecondMoment(p.C, weight=LAMBDA) + PreviousKeys(p.Cp) + Ridge(MU),
            LeastSquares(1),
        ),
        encore,
    ),
    Method(
        "alphaedit-first",
        lambda p: Objective(_null(p) + Ridge(ETA), LeastSquares(1)),
        alphaedit_first,
        projected=True,
    ),
    Method(
        "alphaedit",
        lambda p: Objective(
            _null(p) + PreviousKeys(p.Cp) + Ridge(ETA), LeastSquares(1)
        ),
        alphaedit,
        projected=True,
    ),
    Method(
        "mixed",
        lambda p: Objective(SecondMoment(p.C), Slack(p.rho)),
        mixed,
        exact=True,
    ),
)

SHAPES = ((1, 12, 8), (5, 12, 8), (6, 10, 10), (9, 16, 5), (30, 12, 8), (40, 8, 20))
"""(n, d_key, d_value): one edit, few, a square weight, more than d_value, more than
d_key, more than d_key with a wide value."""

CASES = tuple(
    (method, shape)
    for method in METHODS
    for shape in SHAPES
    if not (method.single and shape[0] > 1) and not (method.exact and shape[0] > 15)
)


def difference(actual: Tensor, expected: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float(((actual - expected).norm() / expected.norm()).detach())
