"""What acts on a finished update: regularizers that follow any recipe.

| written | what it does to ΔW |
|---|---|
| `rect:0.4` | RECT: keeps the share .4 of its entries that are largest beside W's |
| `prune:1.2` | PRUNE: singular values σ above W's largest s become log_b(σ/s) + s |
| `norm:0.5` | scales it down to ‖ΔW‖ ≤ .5 ‖W‖ |

In a sequence of edits RECT acts on each step's update, relative to the weight as it is.
The norm cap and PRUNE act on the whole change, relative to the unedited weight: the cap
after each step, PRUNE once, at the end.

Sources: Gu et al. 2024 (RECT); Ma et al. 2024 (PRUNE), whose condition and formula are
those of its code: once, at the end, W = W₀ + ΔW'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unified_edit.algebra.update import RankKUpdate
from unified_edit.errors import RecipeError

_WHEN: dict[str, Literal["step", "total", "end"]] = {
    "rect": "step",
    "norm": "total",
    "prune": "end",
}


@dataclass(frozen=True)
class Regularizer:
    """One rule with its number; `parse` reads it from text."""

    kind: Literal["rect", "prune", "norm"]
    number: float

    @classmethod
    def parse(cls, text: str) -> Regularizer | None:
        """`rect:0.4`, `prune:1.2`, `norm:0.5`; None for `none`.

        Raises:
            RecipeError: none of these, or a number out of range.
        """
        if text == "none":
            return None
        kind, _, number = text.partition(":")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        fits = {
            "rect": 0 < value <= 1,
            "prune": 1 < value < math.inf,
            "norm": 0 < value < math.inf,
        }
        if not fits.get(kind, False):
            raise RecipeError(
                f"regularizer {text!r}: expected none, rect:SHARE with 0 < SHARE ≤ 1, "
                "prune:BASE with BASE > 1, or norm:LIMIT with LIMIT > 0"
            )
        return cls(kind, value)  # type: ignore[arg-type]

    @property
    def when(self) -> Literal["step", "total", "end"]:
        """On what of a sequence it acts: each step's update, the whole change after
        each step, or the whole change once, at the end."""
        return _WHEN[self.kind]

    @torch.no_grad()
    def __call__(self, update: RankKUpdate, weight: Tensor) -> RankKUpdate:
        """The regularized update; keys and background as they were.

        Args:
            weight: W [d_value, d_key] that the update is relative to.

        Raises:
            RecipeError: of another shape.
        """
        if tuple(weight.shape) != update.shape:
            raise RecipeError(
                f"regularizing an update of {list(update.shape)} needs a weight seen "
                f"so, not {list(weight.shape)}"
            )
        wide = weight.detach().to(update.left.device, torch.float64)
        left, right = update.left.double(), update.right.double()
        if self.kind == "norm":
            size = update.norm()
            limit = self.number * float(wide.norm())
            if size > limit:
                left = left * (limit / size)
        elif self.kind == "prune":
            left, right = _pruned(left, right, wide, self.number)
        else:
            left, right = _rectified(left, right, wide, self.number)
        return RankKUpdate(left, right, update.keys, update.background).to(
            update.left.dtype
        )


def _rectified(
    left: Tensor, right: Tensor, weight: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """A mask has no low rank: the factors are the identity and the masked matrix."""
    dense = left @ right
    kept = max(1, round(share * dense.numel()))
    # An entry of W that is zero makes any change of it infinitely large: it is kept.
    ratio = (dense / weight).abs().nan_to_num(nan=0.0, posinf=math.inf).flatten()
    masked = torch.zeros_like(dense).flatten()
    chosen = ratio.topk(kept).indices
    masked[chosen] = dense.flatten()[chosen]
    identity = torch.eye(len(dense), dtype=dense.dtype, device=dense.device)
    return identity, masked.view_as(dense)


def _pruned(
    left: Tensor, right: Tensor, weight: Tensor, base: float
) -> tuple[Tensor, Tensor]:
    """Singular values by QR of the factors, so that ΔW is never made."""
    if min(left.shape) < left.shape[1]:  # more factors than rows: one of them is ΔW
        left, right = torch.eye(len(left)).to(left), left @ right
    outer, inner = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, values, vh = torch.linalg.svd(inner.R @ outer.R.T)
    largest = float(torch.linalg.matrix_norm(weight, 2))
    lowered = (values.log() - math.log(largest)) / math.log(base) + largest
    values = torch.where(values >= largest, lowered, values)
    # inner.R outer.Rᵀ is ΔWᵀ between the orthonormal bases.
    return outer.Q @ vh.T * values, u.T @ inner.Q.T
