"""The one formula: an objective, keys and residuals in, a rank-k update out.

Rows are samples: keys K [n, d_key], residuals R [n, d_value].

    ΔW = Rᵀ (K M Kᵀ + diag(ρ))⁻¹ K M

With H = K U L⁻ᵀ from the factorization, M = U (L Lᵀ)⁻¹ Uᵀ, this is solved in one of two
equal forms, by Cholesky:

    keys:       Rᵀ (H Hᵀ + diag(ρ))⁻¹ · H L⁻¹ Uᵀ                    an n×n system
    dimension:  Rᵀ diag(1/ρ) H (I + Hᵀ diag(1/ρ) H)⁻¹ · L⁻¹ Uᵀ      r×r, all ρ > 0

Sources: ROME (Meng et al. 2022, eq. 2), MEMIT (Meng et al. 2023, eq. 14), EMMET (Gupta
et al. 2024), AlphaEdit (Fang et al. 2025, eq. 14).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unified_edit.algebra.certificate import Certificate, WeightScale, certify
from unified_edit.algebra.factorization import Factorization, factorize
from unified_edit.algebra.feasibility import redundant_edits
from unified_edit.algebra.linalg import cholesky_with_jitter, condition_estimate
from unified_edit.algebra.objective import Objective
from unified_edit.algebra.update import RankKUpdate
from unified_edit.errors import EditError, NonFiniteError, RecipeError

__all__ = ["Certificate", "Factorization", "Form", "Solution", "factorize", "solve"]

Form = Literal["auto", "keys", "dimension"]


@dataclass(frozen=True, eq=False)
class Solution:
    """An update and what it proves about itself."""

    update: RankKUpdate
    """Of rank n less the redundant edits, but never above d_value, nor in the
    "dimension" form above the number of free directions."""
    certificate: Certificate


@torch.no_grad()
def solve(
    objective: Objective,
    *,
    keys: Tensor,
    residuals: Tensor,
    weight: Tensor | WeightScale | None = None,
    factorization: Factorization | None = None,
    dtype: torch.dtype = torch.float64,
    form: Form = "auto",
    names: Sequence[str] | None = None,
) -> Solution:
    """The minimiser of an objective, in closed form.

    Args:
        objective: what to preserve and how exactly to memorise.
        keys: K [n, d_key], floating point; converted to `dtype`.
        residuals: R [n, d_value], what Δ should add to each key's value.
        weight: W [d_value, d_key], only to make the certificate relative; or what it
            is relative to, if known.
        factorization: of the same preservation, to factor once for many batches.
        dtype: of the solve and of the update: float64, or float32.
        form: "auto" takes what needs fewer operations. Both share the factorization
            and the whitening, so those do not enter the comparison.
        names: one for each edit, for messages.

    Raises:
        EditError: keys, residuals, weight or names do not fit each other.
        NonFiniteError: a key, residual or the result is not finite.
        RecipeError: objective, factorization, dtype or form do not fit.
        IllConditioned: a system is not positive definite.
        InfeasibleEdits: equality constraints contradict each other.
    """
    if factorization is None:
        factorization = factorize(objective.preservation, dtype=dtype)
    elif not factorization.preservation.same_as(objective.preservation):
        raise RecipeError("the factorization belongs to another preservation")
    elif factorization.factor.dtype != dtype:
        raise RecipeError(
            f"the factorization is {factorization.factor.dtype}, the solve {dtype}"
        )

    def label(edit: int) -> str:
        return f"edit {edit}" if names is None else f"edit {edit} ({names[edit]!r})"

    seen = weight if isinstance(weight, Tensor) else None
    n = _check_shapes(keys, residuals, seen, names, factorization)
    for what, rows in (("key", keys), ("residual", residuals)):
        bad = (~torch.isfinite(rows).all(dim=1)).nonzero()[:, 0].tolist()
        if bad:
            raise NonFiniteError(f"the {what} of {label(bad[0])} is not finite")
    if seen is not None and not bool(torch.isfinite(seen).all()):
        raise NonFiniteError("the weight holds NaN or infinity")

    keys, residuals = keys.to(dtype), residuals.to(dtype)
    slacks = objective.memorization.slacks(n)
    hard = [edit for edit, slack in enumerate(slacks) if slack == 0]
    whitened = factorization.whiten(keys)
    tolerance = objective.memorization.tolerance
    redundant = redundant_edits(
        whitened,
        residuals,
        hard=hard,
        unreachable=_unreachable(factorization, keys, hard, tolerance),
        tolerance=tolerance,
        label=label,
    )
    kept = sorted(set(range(n)).difference(redundant))
    chosen = _choose_form(
        form, len(kept), factorization.rank, residuals.shape[1], exact=bool(hard)
    )
    by = _by_keys if chosen == "keys" else _by_dimension
    rho = torch.tensor([slacks[edit] for edit in kept], dtype=dtype, device=keys.device)
    left, right, condition = by(whitened[kept], residuals[kept], rho, factorization)
    if not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise NonFiniteError(
            f"the update is not finite in {dtype}: keys, residuals or weights of the "
            "objective are too large or too small for it"
        )
    update = RankKUpdate(left.contiguous(), right.contiguous())
    if isinstance(weight, Tensor):
        weight = WeightScale.of(weight.detach().to(dtype), objective.preservation)
    certificate = certify(
        update,
        keys=keys,
        residuals=residuals,
        scale=weight,
        factorization=factorization,
        form=chosen,
        condition_number=condition,
        redundant=redundant,
        leverage=whitened.square().sum(1).tolist(),
    )
    return Solution(update, certificate)


def _by_keys(
    whitened: Tensor, residuals: Tensor, rho: Tensor, factorization: Factorization
) -> tuple[Tensor, Tensor, float]:
    """Factors, and the condition number, through the n×n system."""
    n, d_value = residuals.shape
    if n == 0:  # every edit is redundant: nothing to change
        empty = whitened.new_zeros(d_value, 0), factorization.unwhiten(whitened)
        return *empty, 1.0
    system = whitened @ whitened.T
    system.diagonal().add_(rho)
    scale = system.diagonal().rsqrt()
    system = scale[:, None] * system * scale
    factor, _ = cholesky_with_jitter(
        system,
        jitter=0.0,
        what="the system of the keys, K M Kᵀ + diag(ρ) scaled to a unit diagonal,",
        remedy="Keys are nearly dependent for the slack they have: raise "
        "preservation_weight or slack, or remove near-duplicates",
    )
    scaled = torch.cholesky_solve(scale[:, None] * residuals, factor)
    left = (scale[:, None] * scaled).T
    condition = condition_estimate(system, factor)
    if n <= d_value:
        return left, factorization.unwhiten(whitened), condition
    identity = torch.eye(d_value, dtype=left.dtype, device=left.device)
    return identity, factorization.unwhiten(left @ whitened), condition


def _by_dimension(
    whitened: Tensor, residuals: Tensor, rho: Tensor, factorization: Factorization
) -> tuple[Tensor, Tensor, float]:
    """Factors, and the condition number, through the system of the size of L."""
    (n, rank), d_value = whitened.shape, residuals.shape[1]
    root = rho.rsqrt()[:, None]
    pulled = root * whitened
    system = pulled.T @ pulled
    system.diagonal().add_(1)
    factor, _ = cholesky_with_jitter(
        system,
        jitter=0.0,
        what="the system I + Σ h hᵀ/ρ",
        remedy='Slacks are too small for this form: use form="keys"',
    )
    condition = condition_estimate(system, factor)
    if n <= min(rank, d_value):
        rows = torch.cholesky_solve((root * pulled).T, factor).T
        return residuals.T, factorization.unwhiten(rows), condition
    rows = torch.cholesky_solve(pulled.T @ (root * residuals), factor).T
    if d_value <= rank:
        identity = torch.eye(d_value, dtype=rows.dtype, device=rows.device)
        return identity, factorization.unwhiten(rows), condition
    return factorization.backward(rows), factorization.directions(), condition


def _choose_form(
    form: Form, n: int, rank: int, d_value: int, *, exact: bool
) -> Literal["keys", "dimension"]:
    if form not in ("auto", "keys", "dimension"):
        raise RecipeError(f'form must be "auto", "keys" or "dimension", not {form!r}')
    if form == "dimension" and exact:
        raise RecipeError(
            'form="dimension" divides by the slack: it needs ρ > 0 for every edit; '
            'equality needs form="keys"'
        )
    if form != "auto":
        return form
    if exact:
        return "keys"
    # Gram matrix, Cholesky, right-hand sides, and mapping back with Lᵀ.
    columns = min(n, d_value)
    by_keys = n**2 * rank + n**3 / 3 + 2 * n**2 * d_value + columns * rank**2
    by_dimension = (
        n * rank**2
        + rank**3 / 3
        + 2 * n * rank * columns
        + 2 * rank**2 * columns
        + columns * rank**2
    )
    return "keys" if by_keys <= by_dimension else "dimension"


def _unreachable(
    factorization: Factorization, keys: Tensor, hard: list[int], tolerance: float
) -> list[int]:
    """Edits among `hard` whose key has next to nothing in the free directions."""
    if not hard:
        return []
    rows = keys[hard]
    inside = rows if factorization.basis is None else rows @ factorization.basis
    outside = inside.norm(dim=1) <= tolerance * rows.norm(dim=1)
    return [hard[row] for row in outside.nonzero()[:, 0].tolist()]


def _check_shapes(
    keys: Tensor,
    residuals: Tensor,
    weight: Tensor | None,
    names: Sequence[str] | None,
    factorization: Factorization,
) -> int:
    """Number of edits, once everything fits."""
    for what, rows in (("keys", keys), ("residuals", residuals)):
        if rows.ndim != 2 or not rows.is_floating_point():
            raise EditError(
                f"{what} must be a floating-point matrix with a row for each edit, "
                f"got {list(rows.shape)} of {rows.dtype}"
            )
    n, d_key = keys.shape
    if n == 0 or residuals.shape[0] != n:
        raise EditError(
            f"{n} keys and {residuals.shape[0]} residuals: there must be one of each "
            "per edit, and one edit at least"
        )
    if d_key != factorization.d_key:
        raise EditError(
            f"keys have d_key = {d_key}, what is preserved has {factorization.d_key}: "
            "statistics of another layer or model?"
        )
    if weight is not None and tuple(weight.shape) != (residuals.shape[1], d_key):
        raise EditError(
            f"the weight must be seen as [d_value, d_key] = "
            f"[{residuals.shape[1]}, {d_key}], got {list(weight.shape)}"
        )
    if names is not None and len(names) != n:
        raise EditError(f"{len(names)} names were given for {n} edits")
    devices = {"keys": keys.device, "residuals": residuals.device}
    devices["preservation"] = factorization.factor.device
    if weight is not None:
        devices["weight"] = weight.device
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{what} on {device}" for what, device in devices.items())
        raise EditError(f"all tensors must be on one device: {found}")
    return n
