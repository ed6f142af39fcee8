"""What an edit should keep and what it should change: the two halves of an objective.

    minimise over Δ   Σ cost of preservation(Δ) + Σ_i (1/ρ_i) ‖Δ k_i − r_i‖²

ρ_i = 0 means Δ k_i = r_i. Preservation is a sum of terms: `SecondMoment(C) + Ridge(μ)`.
All are data; `solve` holds the mathematics. Tensors are kept by reference and must not
be changed while an objective uses them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from unified_edit.errors import IllConditioned, NonFiniteError, RecipeError

_ASYMMETRY = 1e-5
_NEGATIVE = 1e-6


class Preservation:
    """A term, or a sum of terms; made by the classes below and by `+`."""

    @property
    def terms(self) -> tuple[Preservation, ...]:
        return (self,)

    def __add__(self, other: Preservation) -> Preservation:
        if not isinstance(other, Preservation):
            return NotImplemented
        return PreservationSum((*self.terms, *other.terms))

    def same_as(self, other: Preservation) -> bool:
        """Whether both hold the same terms: the same numbers and tensor objects."""
        pairs = list(zip(self.terms, other.terms, strict=False))
        return len(self.terms) == len(other.terms) and all(
            _same_term(mine, theirs) for mine, theirs in pairs
        )


@dataclass(frozen=True, eq=False)
class PreservationSum(Preservation):
    """Several terms at once; `a + b` makes it."""

    parts: tuple[Preservation, ...]

    @property
    def terms(self) -> tuple[Preservation, ...]:
        return self.parts


@dataclass(frozen=True, eq=False)
class SecondMoment(Preservation):
    """Cost weight · tr(Δ C Δᵀ): what Δ does to the keys of background text."""

    matrix: Tensor
    """C [d_key, d_key], the uncentred *mean* of k kᵀ; symmetric, not negative."""
    weight: float = 1.0
    """How many background keys it stands for (MEMIT's λ when slacks are 1)."""

    def __post_init__(self) -> None:
        _check_symmetric(self.matrix, "the second moment C")
        _check_positive(self.weight, "the weight of SecondMoment")


@dataclass(frozen=True, eq=False)
class PreviousKeys(Preservation):
    """Cost weight · Σ ‖Δ k‖² over the keys of earlier edits: weight · tr(Δ C_p Δᵀ)."""

    second_moment: Tensor | None = None
    """C_p [d_key, d_key], the *sum* of k kᵀ; or else give `keys`."""
    keys: Tensor | None = None
    """[m, d_key]"""
    weight: float = 1.0
    """How many of the edits to be made one of them counts for."""

    def __post_init__(self) -> None:
        _check_positive(self.weight, "the weight of PreviousKeys")
        if (self.second_moment is None) == (self.keys is None):
            raise RecipeError("PreviousKeys takes either second_moment or keys")
        if self.second_moment is not None:
            _check_symmetric(self.second_moment, "the earlier keys' second moment")
        if self.keys is not None:
            if self.keys.ndim != 2 or not self.keys.is_floating_point():
                raise RecipeError(
                    "earlier keys must be a floating-point [m, d_key], got "
                    f"{list(self.keys.shape)} of {self.keys.dtype}"
                )
            if not bool(torch.isfinite(self.keys).all()):
                raise NonFiniteError("the keys of earlier edits hold NaN or infinity")


@dataclass(frozen=True, eq=False)
class Ridge(Preservation):
    """Cost μ ‖Δ‖_F²."""

    coefficient: float
    """μ"""

    def __post_init__(self) -> None:
        _check_positive(self.coefficient, "the coefficient of Ridge")


@dataclass(frozen=True, eq=False)
class NullSpace(Preservation):
    """Not a cost but a restriction: Δ = Δ U Uᵀ (AlphaEdit, Fang et al. 2025)."""

    basis: Tensor
    """U [d_key, r], orthonormal columns."""
    second_moment: Tensor | None = None
    """The mean C that U came from, or None; only to measure damage with."""

    def __post_init__(self) -> None:
        shape = list(self.basis.shape)
        if len(shape) != 2 or not 0 < shape[1] <= shape[0]:
            raise RecipeError(
                f"the basis of NullSpace must be [d_key, r] with 0 < r ≤ d_key, "
                f"got {shape}"
            )
        if not bool(torch.isfinite(self.basis).all()):
            raise NonFiniteError("the basis of NullSpace holds NaN or infinity")
        if self.second_moment is not None:
            _check_symmetric(self.second_moment, "the second moment of NullSpace")

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        second_moment: Tensor,
        *,
        threshold: float | None = None,
        relative: bool = True,
        energy: float | None = None,
    ) -> NullSpace:
        """The eigenvectors of C that background keys use least. Give one of two rules.

        Args:
            second_moment: C [d_key, d_key], the mean of k kᵀ.
            threshold: keep eigenvalues below this: times trace/d if `relative`, else
                as it is (AlphaEdit's code: 0.02, absolute, on the mean).
            energy: keep the smallest eigenvalues, as many as together hold at most
                this share of the trace; it does not depend on C's scale either.

        Raises:
            RecipeError: both rules or none, or nothing or everything would be kept.
            IllConditioned: C is not symmetric or has negative eigenvalues.
        """
        _check_symmetric(second_moment, "the second moment C")
        if (threshold is None) == (energy is None):
            raise RecipeError("NullSpace.of takes either threshold or energy")
        matrix = second_moment.double()
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        trace, size = float(values.sum()), values.shape[0]
        if float(values[0]) < -_NEGATIVE * float(values[-1]) or trace <= 0:
            raise IllConditioned(
                f"the second moment C has eigenvalues from {float(values[0]):.3g} to "
                f"{float(values[-1]):.3g}: not a mean of k kᵀ; collect it again"
            )
        if threshold is not None:
            _check_positive(threshold, "threshold")
            bound = threshold * trace / size if relative else threshold
            kept = int((values < bound).sum())
            rule = f"eigenvalues below {bound:.3g}"
        else:
            assert energy is not None
            _check_positive(energy, "energy")
            kept = int((values.cumsum(0) <= energy * trace).sum())
            rule = f"directions holding at most {energy:.3g} of the trace"
        if not 0 < kept < size:
            raise RecipeError(
                f"{rule}: {kept} of {size} directions; eigenvalues go from "
                f"{float(values[0]):.3g} to {float(values[-1]):.3g}, with mean "
                f"{trace / size:.3g}. Choose a rule that keeps some and not all"
            )
        return cls(vectors[:, :kept].contiguous(), second_moment)


class Memorization:
    """How exactly each edit must hold: a slack ρ_i ≥ 0 per edit."""

    tolerance: float = 1e-4

    def slacks(self, n: int) -> tuple[float, ...]:
        """ρ of n edits.

        Raises:
            RecipeError: made for another number of edits.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Equality(Memorization):
    """Δ k_i = r_i for every edit (ROME, EMMET): ρ = 0."""

    tolerance: float = 1e-4
    """Keys that agree to this sine of their angle, in the metric of preservation, are
    one key; their residuals must then agree to this as well, relatively. float32
    solves cannot tell apart less than √(8 n · eps), and take that."""

    def __post_init__(self) -> None:
        _check_positive(self.tolerance, "tolerance")

    def slacks(self, n: int) -> tuple[float, ...]:
        return (0.0,) * n


@dataclass(frozen=True)
class LeastSquares(Memorization):
    """Cost Σ (w_i/λ) ‖Δ k_i − r_i‖² (MEMIT): ρ_i = λ / w_i."""

    preservation_weight: float
    """λ, counted in background keys."""
    weights: Sequence[float] | Tensor | None = None
    """w [n], positive; None means 1 for each edit."""

    def __post_init__(self) -> None:
        _check_positive(self.preservation_weight, "preservation_weight")
        if self.weights is not None:
            weights = _numbers(self.weights)
            object.__setattr__(self, "weights", weights)
            for index, weight in enumerate(weights):
                _check_positive(weight, f"weight {index} of LeastSquares")

    def slacks(self, n: int) -> tuple[float, ...]:
        if self.weights is None:
            return (float(self.preservation_weight),) * n
        weights = _numbers(self.weights)
        _check_count(weights, n, "weights of LeastSquares")
        return tuple(self.preservation_weight / weight for weight in weights)


@dataclass(frozen=True)
class Slack(Memorization):
    """A slack of its own for each edit: 0 for those that must hold exactly."""

    slack: Sequence[float] | Tensor
    """ρ [n], each ≥ 0."""
    tolerance: float = 1e-4
    """As in `Equality`, for the edits with ρ = 0."""

    def __post_init__(self) -> None:
        slacks = _numbers(self.slack)
        object.__setattr__(self, "slack", slacks)
        for index, slack in enumerate(slacks):
            if not (math.isfinite(slack) and slack >= 0):
                raise RecipeError(f"slack {index} must be ≥ 0, got {slack}")
        _check_positive(self.tolerance, "tolerance")

    def slacks(self, n: int) -> tuple[float, ...]:
        slacks = _numbers(self.slack)
        _check_count(slacks, n, "slacks")
        return slacks


@dataclass(frozen=True, eq=False)
class Objective:
    """Preservation chooses M, memorization chooses ρ; `solve` does the rest."""

    preservation: Preservation
    memorization: Memorization


def _same_term(mine: Preservation, theirs: Preservation) -> bool:
    if type(mine) is not type(theirs):
        return False
    for item in fields(mine):  # type: ignore[arg-type]  # every term is a dataclass
        a, b = getattr(mine, item.name), getattr(theirs, item.name)
        if a is not b and (isinstance(a, Tensor) or isinstance(b, Tensor) or a != b):
            return False
    return True


def _numbers(values: Sequence[float] | Tensor) -> tuple[float, ...]:
    if isinstance(values, Tensor):
        if values.ndim != 1:
            raise RecipeError(f"expected one number per edit, got {list(values.shape)}")
        values = values.tolist()
    return tuple(float(value) for value in values)


def _check_count(values: Sequence[float], n: int, what: str) -> None:
    if len(values) != n:
        raise RecipeError(f"{len(values)} {what} were given for {n} edits")


def _check_positive(value: float, what: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise RecipeError(f"{what} must be a finite number above 0, got {value}")


@torch.no_grad()
def _check_symmetric(matrix: Tensor, what: str) -> None:
    shape = list(matrix.shape)
    if len(shape) != 2 or shape[0] != shape[1] or not matrix.is_floating_point():
        raise RecipeError(
            f"{what} must be a floating-point [d_key, d_key], got {shape} of "
            f"{matrix.dtype}"
        )
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteError(f"{what} holds NaN or infinity")
    scale = float(matrix.diagonal().abs().max())
    asymmetry = float((matrix - matrix.T).abs().max())
    if asymmetry > _ASYMMETRY * scale:
        raise IllConditioned(
            f"{what} is not symmetric: entries differ from their mirror images by "
            f"up to {asymmetry:.3g}, the largest diagonal entry is {scale:.3g}. It "
            "should be an average of k kᵀ; collect it again"
        )
    if float(matrix.diagonal().min()) < 0:
        raise IllConditioned(
            f"{what} has a negative diagonal entry and cannot be an average of k kᵀ; "
            "collect it again"
        )
