"""Shrinkage of a second moment towards a multiple of the identity.

    C' = scale · C + shift · I

A mean over few tokens spreads its eigenvalues too far: the smallest come out too small
(zero, with fewer tokens than dimensions), and C⁻¹ is made of them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from covariance_cache.errors import StatisticsError

_ROWS = 1024
_RIDGE = re.compile(r"ridge:(.+)")


@dataclass(frozen=True)
class Shrinkage:
    """Which multiple of the identity is mixed in.

    Raises:
        StatisticsError: unknown kind, or a strength that it does not take.
    """

    kind: Literal["none", "ridge", "oas"] = "none"
    """`none`: C as it is. `ridge`: adds strength · trace(C)/d · I. `oas`: the mix that
    the oracle approximating shrinkage estimator finds from the data (`oas_intensity`).
    """
    strength: float = 0.0
    """Of a ridge, in units of the mean eigenvalue."""

    def __post_init__(self) -> None:
        if self.kind not in ("none", "ridge", "oas"):
            raise StatisticsError(
                f"no shrinkage {self.kind!r}; there are none, ridge and oas"
            )
        fits = self.strength > 0 if self.kind == "ridge" else self.strength == 0
        if not (fits and math.isfinite(self.strength)):
            raise StatisticsError(
                f"a ridge needs a strength above 0, none and oas take none; got "
                f"{self.kind} with {self.strength}"
            )

    @classmethod
    def parse(cls, text: str) -> Shrinkage:
        """`none`, `oas` or `ridge:0.01` → shrinkage.

        Raises:
            StatisticsError: anything else.
        """
        match = _RIDGE.fullmatch(text)
        try:
            return cls("ridge", float(match[1])) if match else cls(text)  # type: ignore[arg-type]
        except (ValueError, StatisticsError) as error:
            raise StatisticsError(
                f"shrinkage {text!r}: expected none, oas or ridge:NUMBER, such as "
                f"ridge:0.01 ({error})"
            ) from None

    def __str__(self) -> str:
        return f"ridge:{float(self.strength)!r}" if self.kind == "ridge" else self.kind

    def weights(self, matrix: Tensor, count: int) -> tuple[float, float]:
        """Scale and shift for this second moment [d, d], a mean of `count` keys."""
        size = matrix.shape[0]
        mean = float(matrix.diagonal().sum(dtype=torch.float64)) / size
        if self.kind == "none":
            return 1.0, 0.0
        if self.kind == "ridge":
            return 1.0, self.strength * mean
        intensity = oas_intensity(*traces(matrix), size, count)
        return 1 - intensity, intensity * mean


def traces(matrix: Tensor) -> tuple[float, float]:
    """trace(C) and trace(C²) of a symmetric matrix [d, d], summed in float64."""
    trace = float(matrix.diagonal().sum(dtype=torch.float64))
    # By blocks of rows, which need no second matrix of this size in float64.
    square = sum(
        float(rows.double().square().sum()) for rows in torch.split(matrix, _ROWS)
    )
    return trace, square


def oas_intensity(trace: float, square: float, size: int, count: int) -> float:
    """Share of the identity in the oracle approximating shrinkage estimate, from 0 (the
    data are enough) to 1.

    Chen, Wiesel, Eldar and Hero, "Shrinkage Algorithms for MMSE Covariance Estimation"
    (IEEE TSP 58, 2010), eq. 23; for independent Gaussian keys about zero. Keys are
    neither: docs/statistics.md has what that means in practice.

    Args:
        trace: trace(C).
        square: trace(C²).
        size: d, the dimensions.
        count: number of keys that C is the mean of.
    """
    spread = square - trace**2 / size
    if spread <= 0:
        return 1.0
    upper = (1 - 2 / size) * square + trace**2
    return min(1.0, upper / ((count + 1 - 2 / size) * spread))
