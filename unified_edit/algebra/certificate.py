"""What a solution proves about itself, measured on its factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from unified_edit.algebra.factorization import Factorization
from unified_edit.algebra.objective import NullSpace, Preservation, SecondMoment
from unified_edit.algebra.update import RankKUpdate

_FEW = 128
"""Rows of C that are converted at a time."""


@dataclass(frozen=True)
class WeightScale:
    """What a certificate is relative to: `of` the weight, or of another one, such as a
    sequence's unedited one."""

    norm: float
    """‖W‖_F"""
    mean_square: float | None
    """tr(WCWᵀ): the mean square of background values; None when no C is known."""

    @classmethod
    def of(cls, weight: Tensor, preservation: Preservation) -> WeightScale:
        """Of W [d_value, d_key], in its dtype."""
        moment = mean_second_moment(preservation)
        square = None
        if moment is not None:
            square = float((through(weight, moment) * weight).sum())
        return cls(float(weight.norm()), square)


@dataclass(frozen=True)
class Certificate:
    """Plain numbers, measured after the solve on the factors that it returns."""

    n: int
    """Number of edits."""
    form: str
    """"keys": an n×n system was solved; "dimension": one of the size of the free
    directions of a key."""
    redundant: tuple[int, ...]
    """Edits whose equality follows from others' and was left out of the system."""
    relative_residual_error: float
    """‖ΔK − R‖_F / ‖R‖_F over all edits, also the redundant; 0 when R = 0 is met."""
    residual_errors: tuple[float, ...]
    """Each edit's ‖Δk − r‖ / ‖r‖ (for r = 0: over the root mean square of all ‖r‖)."""
    worst_edit: int
    """Index of the largest of `residual_errors`."""
    preservation_damage: float | None
    """tr(ΔCΔᵀ): mean squared change of background values, relative to their mean
    square tr(WCWᵀ) if the weight was given; None when no C is known."""
    damage_is_relative: bool
    """Whether the weight was given."""
    condition_number: float
    """Of the system solved (1-norm estimate from below, seldom off by more than 3):
    the n×n one K M Kᵀ + diag(ρ), scaled to a unit diagonal, or the other form's
    I + Σ h hᵀ/ρ, h = L⁻¹Uᵀk."""
    preservation_condition: float
    """The same for the preservation matrix, whose Cholesky factor L is."""
    jitter: float
    """Added to the diagonal of the preservation matrix."""
    relative_jitter: float
    """The same over trace/d."""
    norm: float
    """‖ΔW‖_F"""
    relative_norm: float | None
    """‖ΔW‖_F / ‖W‖_F; None when the weight was not given."""
    leverage: tuple[float, ...]
    """Each edit's kᵀ M k: how far its key stands out from what is preserved. A small
    one makes an edit expensive."""

    @property
    def worst_residual_error(self) -> float:
        """The largest of `residual_errors`."""
        return self.residual_errors[self.worst_edit]

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain JSON data, with `worst_residual_error`."""
        data = asdict(self)
        data["worst_residual_error"] = self.worst_residual_error
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in data.items()
        }


def certify(
    update: RankKUpdate,
    *,
    keys: Tensor,
    residuals: Tensor,
    scale: WeightScale | None,
    factorization: Factorization,
    form: str,
    condition_number: float,
    redundant: tuple[int, ...],
    leverage: Sequence[float],
) -> Certificate:
    """Measures an update against what was asked; all tensors in the solve's dtype."""
    errors, total = _residual_errors(update, keys, residuals)
    norm = update.norm()
    damage = background_change(update, factorization.preservation)
    if damage is not None and scale is not None and scale.mean_square is not None:
        damage = _ratio(damage, scale.mean_square)
    return Certificate(
        n=len(errors),
        form=form,
        redundant=redundant,
        relative_residual_error=total,
        residual_errors=tuple(errors),
        worst_edit=max(range(len(errors)), key=errors.__getitem__),
        preservation_damage=damage,
        damage_is_relative=scale is not None,
        condition_number=condition_number,
        preservation_condition=factorization.condition_number,
        jitter=factorization.jitter.absolute,
        relative_jitter=factorization.jitter.relative,
        norm=norm,
        relative_norm=None if scale is None else _ratio(norm, scale.norm),
        leverage=tuple(leverage),
    )


def recertified(
    certificate: Certificate,
    update: RankKUpdate,
    *,
    keys: Tensor,
    residuals: Tensor,
    weight: Tensor | WeightScale,
    factorization: Factorization,
) -> Certificate:
    """The certificate of a solution that was changed afterwards: what depends on the
    update is measured anew, the rest is the solve's."""
    if isinstance(weight, Tensor):
        weight = WeightScale.of(weight, factorization.preservation)
    return certify(
        update,
        keys=keys,
        residuals=residuals,
        scale=weight,
        factorization=factorization,
        form=certificate.form,
        condition_number=certificate.condition_number,
        redundant=certificate.redundant,
        leverage=certificate.leverage,
    )


def background_change(update: RankKUpdate, preservation: Preservation) -> float | None:
    """tr(ΔCΔᵀ), the mean squared change of background values; None without a C."""
    moment = mean_second_moment(preservation)
    if moment is None:
        return None
    across = through(update.right, moment) @ update.right.T
    return float(((update.left.T @ update.left) * across).sum())


def through(rows: Tensor, moment: Tensor) -> Tensor:
    """rows · C [n, d_key] in the rows' dtype. C of another is converted by the few
    rows, which a cache holds, and never copied whole."""
    if moment.dtype == rows.dtype:
        return rows @ moment
    found = torch.zeros_like(rows)
    parts = zip(torch.split(rows, _FEW, 1), torch.split(moment, _FEW), strict=True)
    for part, few in parts:
        found.addmm_(part, few.to(rows.dtype))
    return found


def _residual_errors(
    update: RankKUpdate, keys: Tensor, residuals: Tensor
) -> tuple[list[float], float]:
    """Each edit's, and ‖ΔK − R‖ / ‖R‖ of all."""
    misses = (keys @ update.right.T) @ update.left.T - residuals
    lengths = residuals.norm(dim=1)
    total = float(residuals.norm())
    typical = total / len(lengths) ** 0.5
    errors = [
        _ratio(miss, length or typical)
        for miss, length in zip(
            misses.norm(dim=1).tolist(), lengths.tolist(), strict=True
        )
    ]
    return errors, _ratio(float(misses.norm()), total)


def mean_second_moment(preservation: Preservation) -> Tensor | None:
    """C of a preservation: its SecondMoment's, their weighted mean if it has several,
    else what its NullSpace came from, else None."""
    moments = [term for term in preservation.terms if isinstance(term, SecondMoment)]
    if len(moments) == 1:
        return moments[0].matrix
    if moments:
        total = sum(term.weight for term in moments)
        parts = [term.matrix.double() * (term.weight / total) for term in moments]
        return torch.stack(parts).sum(0)
    for term in preservation.terms:
        if isinstance(term, NullSpace):
            return term.second_moment
    return None


def _ratio(part: float, whole: float) -> float:
    if part == 0:
        return 0.0
    return part / whole if whole else float("inf")
