"""The one way in which an update is added to a weight, and rounded.

Live edits and checkpoint patches both go through `blocks`, so that they agree bit for
bit. W and ΔW are seen as [d_value, d_key]; ΔW is never whole in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from unified_edit.algebra.rounding import feedback, rounded
from unified_edit.algebra.update import DTYPE_NAMES, RankKUpdate
from unified_edit.errors import NonFiniteError, UpdateError

Rounding = Literal["nearest", "keys"]
"""How a half-precision weight is rounded: each value to the nearest, or so that what
the weight does to the edits' own keys survives (`algebra.rounding`)."""

ROUNDINGS: tuple[str, ...] = get_args(Rounding)
_HALF = (torch.float16, torch.bfloat16)
_ROWS = 512
_CACHED = 1 << 15
"""Values that are worked on at a time."""


@dataclass(frozen=True, eq=False)
class Block:
    """Some rows of W, before and after."""

    rows: slice
    """Of d_value."""
    before: Tensor
    """[rows, d_key] in the weight's dtype; a view of the weight."""
    change: Tensor
    """[rows, d_key] of ΔW, in float32, or float64 for a float64 weight."""
    after: Tensor
    """[rows, d_key] in the weight's dtype."""


@torch.no_grad()
def blocks(
    weight: Tensor,
    update: RankKUpdate,
    *,
    transposed: bool,
    rounding: Rounding = "nearest",
) -> Iterator[Block]:
    """`weight + ΔW` by blocks of rows: added in float32, or in float64 for a float64
    weight, and rounded once. A block may be written over before the next is taken.

    Args:
        weight: as stored, [d_value, d_key] or, if `transposed`, [d_key, d_value].

    Raises:
        UpdateError: shapes do not fit, the weight is of a dtype that cannot be added
            to (integers and float8 mean a quantized checkpoint), or rounding towards
            keys that the update does not have, or of a weight in full precision.
        NonFiniteError: a result is not finite in the weight's dtype.
    """
    expected = update.shape[::-1] if transposed else update.shape
    if tuple(weight.shape) != expected:
        raise UpdateError(
            f"the update changes a weight stored as {list(expected)}, "
            f"this one is {list(weight.shape)}"
        )
    if weight.dtype not in DTYPE_NAMES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES)
        raise UpdateError(
            f"a weight of {weight.dtype} cannot be added to, only {names}; "
            "patch a dequantized copy"
        )
    work = torch.promote_types(weight.dtype, torch.float32)
    towards = None
    if rounding == "keys":
        towards = feedback(
            keys_to_keep(weight.dtype, update).to(weight.device),
            update.background,
            work,
        )
    elif rounding != "nearest":
        raise UpdateError(
            f"unknown rounding {rounding!r}; choose one of {', '.join(ROUNDINGS)}"
        )
    left = update.left.to(weight.device, work)
    right = update.right.to(weight.device, work).contiguous()
    matrix = weight.T if transposed else weight
    for start in range(0, matrix.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        before = matrix[rows]
        # Not addmm: some libraries add the factors' products to the weight one by one.
        change = left[rows].contiguous() @ right
        if towards is None:
            after = torch.empty_like(change, dtype=weight.dtype)
            for few in few_rows(change):
                after[few] = change[few] + before[few].to(work)
        else:
            after = rounded(change + before.to(work), towards, weight.dtype)
        # NaN and infinity are an extreme, or make one.
        if not bool(torch.isfinite(torch.stack(torch.aminmax(after))).all()):
            raise NonFiniteError(
                f"weight + ΔW is not finite in {weight.dtype}; the weight or the "
                "update holds NaN or infinity, or the sum overflows"
            )
        yield Block(rows, before, change, after)


def few_rows(matrix: Tensor) -> Iterator[slice]:
    """Rows of a matrix by the few, on a CPU: what is made of them stays in its cache,
    and takes one thread, so that none waits for another. All of them elsewhere."""
    count, width = matrix.shape
    step = max(1, _CACHED // max(1, width)) if matrix.device.type == "cpu" else count
    return (slice(start, start + step) for start in range(0, count, max(1, step)))


def added(
    weight: Tensor,
    update: RankKUpdate,
    *,
    transposed: bool,
    rounding: Rounding = "nearest",
) -> Tensor:
    """`weight + ΔW` as a new tensor; arguments and errors as of `blocks`."""
    out = torch.empty_like(weight, requires_grad=False)
    for block in blocks(weight, update, transposed=transposed, rounding=rounding):
        (out.T if transposed else out)[block.rows] = block.after
    return out


def keys_to_keep(dtype: torch.dtype, update: RankKUpdate) -> Tensor:
    """The keys that a weight of this dtype is rounded towards.

    Raises:
        UpdateError: the weight is in full precision, or the update has no keys.
    """
    if dtype not in _HALF:
        raise UpdateError(
            f"rounding towards keys is for half precision, this weight is "
            f"{dtype}; round to nearest"
        )
    if update.keys is None or not len(update.keys):
        raise UpdateError(
            "rounding towards keys needs the edits' keys, which this update does not "
            "hold; round to nearest, or compute the update again"
        )
    return update.keys
