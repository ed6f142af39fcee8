"""A factorization extended by keys, without factoring anew.

With A = L Lᵀ and H = K L⁻ᵀ, the keys K added to A give

    A + KᵀK = L (I + HᵀH) Lᵀ = (L S) (L S)ᵀ,   S = (I + HᵀH)^½ = (I − QᵀQ)⁻¹

where Q has as many rows as K. Keys added one after another give a product of such
roots, kept in the compact form I − Pᵀ B P that products of reflections have (Schreiber
and Van Loan 1989): adding n keys to m costs O((n + m) n d), and using them O(m d).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Extension:
    """E = I − Pᵀ B P = S₁⁻¹ S₂⁻¹ …; with h a row whitened by L, h E is whitened by what
    was added too."""

    rows: Tensor
    """P [m, r]"""
    mixing: Tensor
    """B [m, m], upper triangular."""

    def apply(self, rows: Tensor) -> Tensor:
        """Rows · E [n, r]."""
        return rows - ((rows @ self.rows.T) @ self.mixing) @ self.rows

    def apply_transposed(self, rows: Tensor) -> Tensor:
        """Rows · Eᵀ [n, r]."""
        return rows - ((rows @ self.rows.T) @ self.mixing.T) @ self.rows


def extended(extension: Extension | None, whitened: Tensor) -> Extension:
    """The extension with further keys.

    Args:
        extension: what was added before, or None.
        whitened: [n, r] the new keys, whitened by all that was there before.
    """
    values, vectors = torch.linalg.eigh(whitened @ whitened.T)
    root = (1 + values.clamp_min(0)).sqrt()
    # (1 − 1/√(1+λ)) / λ, which needs no division by a vanishing λ.
    scales = (1 / (root * (1 + root))).sqrt()
    fresh = scales[:, None] * (vectors.T @ whitened)
    unit = torch.eye(len(fresh), dtype=fresh.dtype, device=fresh.device)
    if extension is None:
        return Extension(fresh, unit)
    across = -extension.mixing @ (extension.rows @ fresh.T)
    zero = torch.zeros_like(across.T)
    mixing = torch.cat(
        [torch.cat([extension.mixing, across], 1), torch.cat([zero, unit], 1)]
    )
    return Extension(torch.cat([extension.rows, fresh]), mixing)
