"""The half of the formula that no edit enters: M, factored once per layer and
preservation, and used for every batch.

    A = Σ terms' matrices,   U = the null space's basis, or I
    L Lᵀ = Uᵀ A U,           M = U (L Lᵀ)⁻¹ Uᵀ

Neither A⁻¹ nor M is formed. A key k becomes the row h = L⁻¹ Uᵀ k, with h hᵀ = kᵀ M k.
Keys of earlier edits are added by `extended`, which factors nothing anew.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unified_edit.algebra.extension import Extension, extended
from unified_edit.algebra.linalg import (
    JITTER_LADDER,
    Jitter,
    JitterRule,
    cholesky_with_jitter,
    condition_estimate,
)
from unified_edit.algebra.objective import (
    NullSpace,
    Preservation,
    PreviousKeys,
    Ridge,
    SecondMoment,
)
from unified_edit.errors import RecipeError

_log = logging.getLogger(__name__)
_ORTHONORMAL = 1e-5


@dataclass(frozen=True, eq=False)
class Factorization:
    """M of a preservation, as a Cholesky factor; from `factorize`."""

    preservation: Preservation
    factor: Tensor
    """L [r, r], lower; r = d_key without a null space."""
    basis: Tensor | None
    """U [d_key, r], or None for the identity."""
    jitter: Jitter
    """What was added to the diagonal of Uᵀ A U."""
    condition_number: float
    """Of Uᵀ A U, in the 1-norm; an estimate from below, seldom off by more than 3. Of
    what was factored: keys that `extended` added are not in it."""
    extension: Extension | None = None
    """Keys added since."""

    @property
    def rank(self) -> int:
        """r, the number of directions in which Δ may act."""
        return self.factor.shape[0]

    @property
    def d_key(self) -> int:
        return self.rank if self.basis is None else self.basis.shape[0]

    def directions(self) -> Tensor:
        """Uᵀ [r, d_key]."""
        if self.basis is not None:
            return self.basis.T
        like = self.factor
        return torch.eye(self.rank, dtype=like.dtype, device=like.device)

    def whiten(self, keys: Tensor) -> Tensor:
        """Rows h = L⁻¹ Uᵀ k [n, r] of keys [n, d_key]; H Hᵀ = K M Kᵀ."""
        inside = keys if self.basis is None else keys @ self.basis
        rows: Tensor = torch.linalg.solve_triangular(self.factor, inside.T, upper=False)
        return rows.T if self.extension is None else self.extension.apply(rows.T)

    def unwhiten(self, rows: Tensor) -> Tensor:
        """rows · L⁻¹ Uᵀ [m, d_key] of rows [m, r]; `unwhiten(whiten(K))` is K M."""
        inside = self.backward(rows)
        return inside if self.basis is None else inside @ self.basis.T

    def backward(self, rows: Tensor) -> Tensor:
        """rows · L⁻¹ [m, r] of rows [m, r]: `unwhiten` within the free directions."""
        if self.extension is not None:
            rows = self.extension.apply_transposed(rows)
        inside: Tensor = torch.linalg.solve_triangular(
            self.factor, rows, upper=False, left=False
        )
        return inside

    def extended(self, previous: PreviousKeys) -> Factorization:
        """The factorization of this preservation and further keys, in O(m d) of
        operations for each key, m of them added so far; the factor is shared.

        Args:
            previous: by `keys`, not by their second moment.

        Raises:
            RecipeError: a term without keys, or of another d_key.
        """
        if previous.keys is None or previous.keys.shape[1] != self.d_key:
            raise RecipeError(
                f"a factorization of d_key = {self.d_key} is extended by keys "
                f"[n, {self.d_key}]"
            )
        keys = previous.keys.to(self.factor)
        whitened = previous.weight**0.5 * self.whiten(keys)
        return replace(
            self,
            preservation=self.preservation + previous,
            extension=extended(self.extension, whitened),
        )


@torch.no_grad()
def factorize(
    preservation: Preservation,
    *,
    dtype: torch.dtype = torch.float64,
    jitter: JitterRule = "auto",
) -> Factorization:
    """Factors a preservation for `solve`. O(d_key³), independent of the edits.

    Args:
        preservation: at least one cost (SecondMoment, PreviousKeys, Ridge) and at
            most one NullSpace, of one d_key and device.
        dtype: float64 or float32; terms are converted to it.
        jitter: what may be added to the diagonal of a singular matrix, relative to
            trace/d: "auto", 0.0 (nothing) or a number. Whatever is added is in the
            result, in every certificate, and logged as a warning.

    Raises:
        RecipeError: the terms do not fit each other.
        IllConditioned: not positive definite with what jitter is allowed.
    """
    if dtype not in JITTER_LADDER:
        raise RecipeError(f"solve in float64 or float32, not {dtype}")
    spaces = [term for term in preservation.terms if isinstance(term, NullSpace)]
    if len(spaces) > 1:
        raise RecipeError(f"one NullSpace at most, got {len(spaces)}")
    if len(spaces) == len(preservation.terms):
        raise RecipeError(
            "NullSpace says where an update may act, not what it costs: add Ridge, "
            "PreviousKeys or SecondMoment"
        )
    size, device = _size_and_device(preservation)
    basis = spaces[0].basis.to(dtype) if spaces else None
    if basis is not None:
        _check_orthonormal(basis)
    rank = size if basis is None else basis.shape[1]
    matrix = torch.zeros((rank, rank), dtype=dtype, device=device)
    for term in preservation.terms:
        _add_cost(matrix, term, basis)
    factor, added = cholesky_with_jitter(
        matrix,
        jitter=jitter,
        what="the preservation matrix",
        remedy="Collect statistics over more tokens (several times d_key), shrink "
        "them, or add Ridge",
    )
    if added.relative:
        _log.warning(
            "the preservation matrix is singular: added %.3g (%.0e of trace/d) to "
            "its diagonal",
            added.absolute,
            added.relative,
        )
        matrix.diagonal().add_(added.absolute)
    condition = condition_estimate(matrix, factor)
    return Factorization(preservation, factor, basis, added, condition)


def _add_cost(matrix: Tensor, term: Preservation, basis: Tensor | None) -> None:
    """Adds Uᵀ A_term U to `matrix` in place."""
    if isinstance(term, Ridge):
        matrix.diagonal().add_(term.coefficient)
    elif isinstance(term, PreviousKeys) and term.keys is not None:
        keys = term.keys.to(matrix.dtype)
        keys = keys if basis is None else keys @ basis
        matrix.addmm_(keys.T, keys, alpha=term.weight)
    elif isinstance(term, SecondMoment | PreviousKeys):
        if isinstance(term, SecondMoment):
            moment, weight = term.matrix, term.weight
        else:
            assert term.second_moment is not None
            moment, weight = term.second_moment, term.weight
        moment = moment.to(matrix.dtype)
        moment = moment if basis is None else basis.T @ moment @ basis
        # The mean with the mirror image, so that rounding of C stays symmetric.
        matrix.add_(moment, alpha=weight / 2).add_(moment.T, alpha=weight / 2)
    elif not isinstance(term, NullSpace):
        raise RecipeError(f"{type(term).__name__} is not a term that solve knows")


def _size_and_device(preservation: Preservation) -> tuple[int, torch.device]:
    """d_key and device that all terms' tensors share (Ridge alone has none)."""
    tensors = {}
    for term in preservation.terms:
        for name in ("matrix", "second_moment", "keys", "basis"):
            tensor = getattr(term, name, None)
            if isinstance(tensor, Tensor):
                size = tensor.shape[1 if name == "keys" else 0]
                tensors[f"{type(term).__name__}.{name}"] = (size, tensor.device)
    if not tensors:
        raise RecipeError(
            "Ridge alone does not say how large a key is: use "
            "SecondMoment(torch.eye(d_key), weight=μ)"
        )
    if len(set(tensors.values())) > 1:
        found = ", ".join(f"{n}: {s} on {d}" for n, (s, d) in tensors.items())
        raise RecipeError(f"terms differ in d_key or device: {found}")
    return next(iter(tensors.values()))


def _check_orthonormal(basis: Tensor) -> None:
    gram = basis.T @ basis
    gram.diagonal().sub_(1)
    error = float(gram.abs().max())
    if error > _ORTHONORMAL:
        raise RecipeError(
            f"the basis of NullSpace is not orthonormal: UᵀU differs from I by "
            f"{error:.3g}; make it with NullSpace.of"
        )
