"""Rounding a matrix so that what it does to some keys survives.

Rounding each value to the nearest loses, at a key, the sum of d_key independent errors.
Here columns are rounded one after another, and what the columns so far have lost at the
keys is given to those that remain: the entries of a row that are not yet rounded move
by the smallest step (ε-regularized least squares) that restores the row's products with
the keys. This is the error feedback of optimal quantization (Hassibi and Stork 1993;
GPTQ, Frantar et al. 2023) for the Hessian KᵀK + ε(BᵀB + I): B are the leading
directions of the second moment C of the preserved keys, which are kept too, and I
stands for the others. Its low rank is used, n × n systems instead of d_key × d_key:

    correction of column j = −(error at the keys) · (εI + Σ_{i ≥ j} k_i k_iᵀ)⁻¹ k_j

with k_j the column of K and √ε·B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_REGULARIZATION = 1.5
"""ε in units of (n / d_key)². Less serves the edits' keys better and others worse;
`benchmarks/rounding.py` shows both."""
_COLUMNS = 64
_LEADING = 16
"""Directions of C that are kept."""
_ITERATIONS = 12


@dataclass(frozen=True, eq=False)
class Feedback:
    """What rounding towards some keys needs to know of them; from `feedback`."""

    order: Tensor
    """[d_key] in which columns are rounded: those that the keys use most come first,
    so that the last errors, which nothing can make up for, are the smallest."""
    keys: Tensor
    """[n + m, d_key], the edits' of unit length, columns in that order."""
    gains: Tensor
    """[n + m, d_key]: (εI + Σ_{i ≥ j} k_i k_iᵀ)⁻¹ k_j in column j."""


@torch.no_grad()
def leading(second_moment: Tensor, count: int = _LEADING) -> Tensor:
    """The leading directions B [count, d_key] of C, so scaled that BᵀB + I is about C
    over the mean of its other eigenvalues; by subspace iteration, in float64.

    Args:
        second_moment: C [d_key, d_key], symmetric, not negative.
    """
    wide = second_moment.to(torch.float64)
    size = len(wide)
    count = min(count, size // 4)
    start = torch.randn(
        size, 2 * count, dtype=wide.dtype, generator=torch.Generator().manual_seed(0)
    )
    basis = torch.linalg.qr(start.to(wide.device)).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(wide @ basis).Q
    values, vectors = torch.linalg.eigh(basis.T @ wide @ basis)
    values, vectors = values[-count:] if count else values[:0], vectors[:, -count:]
    others = (wide.trace() - values.sum()) / (size - count)
    scales = (values / others.clamp_min(torch.finfo(wide.dtype).tiny)).clamp_min(0)
    found: Tensor = basis @ vectors[:, : len(values)] * scales.sqrt()
    return found.T.contiguous()


@torch.no_grad()
def feedback(
    keys: Tensor,
    background: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Feedback:
    """Prepares the rounding for some keys, in float64.

    Args:
        keys: [n, d_key].
        background: [m, d_key], what `leading` gave.
        dtype: to keep the result in.
    """
    wide = keys.to(torch.float64)
    # A key's scale is no reason to serve it better.
    wide = wide / wide.norm(dim=1, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
    epsilon = _REGULARIZATION * (wide.shape[0] / wide.shape[1]) ** 2
    if background is not None:
        wide = torch.cat([wide, background.to(wide) * epsilon**0.5])
    count, size = wide.shape
    order = wide.square().sum(dim=0).argsort(descending=True, stable=True)
    ordered = wide[:, order].contiguous()
    # (εI + Σ k kᵀ)⁻¹ over the columns behind the present block, as recursive least
    # squares keeps it: from the last block to the first, columns are only added.
    behind = torch.eye(count, dtype=wide.dtype, device=wide.device) / epsilon
    gains = torch.empty_like(ordered, dtype=dtype)
    for start in reversed(range(0, size, _COLUMNS)):
        block = ordered[:, start : start + _COLUMNS].flip(1)
        reached = behind @ block
        system = block.T @ reached
        system.diagonal().add_(1)
        factor = torch.linalg.cholesky(system)
        # Row m of L⁻¹ reachedᵀ, over L_mm, solves the system of the first m columns.
        half = torch.linalg.solve_triangular(factor, reached.T, upper=False)
        rows = half / factor.diagonal()[:, None]
        gains[:, start : start + _COLUMNS] = rows.flip(0).T
        behind -= half.T @ half
    return Feedback(order, ordered.to(dtype), gains)


@torch.no_grad()
def rounded(rows: Tensor, towards: Feedback, dtype: torch.dtype) -> Tensor:
    """Rows [m, d_key] rounded to `dtype`, each value to the one nearest to what makes
    up for its row's errors so far. Rows do not depend on each other.

    Args:
        rows: exact values, of the feedback's dtype.
    """
    out = torch.empty_like(rows, dtype=dtype)
    error = rows.new_zeros(rows.shape[0], towards.keys.shape[0])
    for start in range(0, rows.shape[1], _COLUMNS):
        where = towards.order[start : start + _COLUMNS]
        keys = towards.keys[:, start : start + _COLUMNS]
        gains = towards.gains[:, start : start + _COLUMNS]
        # Columns as rows of memory: they are taken one at a time.
        exact = rows[:, where].T.contiguous()
        wanted = exact - gains.T @ error.T
        within = keys.T @ gains
        errors = torch.empty_like(exact)
        values = torch.empty_like(exact, dtype=dtype)
        for column in range(len(where)):
            if column:
                wanted[column] -= within[:column, column] @ errors[:column]
            values[column] = wanted[column].to(dtype)
            errors[column] = values[column].to(rows.dtype) - exact[column]
        out[:, where] = values.T
        error += errors.T @ keys.T
    return out
