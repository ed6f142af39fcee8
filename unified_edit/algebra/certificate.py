"""What a solution proves about itself, measured on its factors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from unified_edit.algebra.factorization import Factorization
from unified_edit.algebra.objective import NullSpace, Preservation, SecondMoment
from unified_edit.algebra.update import RankKUpdate


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
    weight: Tensor | None,
    factorization: Factorization,
    form: str,
    condition_number: float,
    redundant: tuple[int, ...],
    leverage: Tensor,
) -> Certificate:
    """Measures an update against what was asked; all tensors in the solve's dtype."""
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
    norm = update.norm()
    moment = mean_second_moment(factorization.preservation)
    damage = None
    if moment is not None:
        moment = moment.to(keys.dtype)
        inner = (update.left.T @ update.left) * (update.right @ moment @ update.right.T)
        damage = float(inner.sum())
        if weight is not None:
            damage = _ratio(damage, float(((weight @ moment) * weight).sum()))
    return Certificate(
        n=len(errors),
        form=form,
        redundant=redundant,
        relative_residual_error=_ratio(float(misses.norm()), total),
        residual_errors=tuple(errors),
        worst_edit=max(range(len(errors)), key=errors.__getitem__),
        preservation_damage=damage,
        damage_is_relative=weight is not None,
        condition_number=condition_number,
        preservation_condition=factorization.condition_number,
        jitter=factorization.jitter.absolute,
        relative_jitter=factorization.jitter.relative,
        norm=norm,
        relative_norm=None if weight is None else _ratio(norm, float(weight.norm())),
        leverage=tuple(leverage.tolist()),
    )


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
