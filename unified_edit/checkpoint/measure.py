"""One tensor's change: computed, checked and measured. Knows no file."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from unified_edit.algebra.update import RankKUpdate, added
from unified_edit.checkpoint.layout import TensorEntry
from unified_edit.errors import CheckpointError, NonFiniteError, UpdateError

_ROW_BLOCK = 256


@dataclass(frozen=True)
class TensorReport:
    """What a patch did to one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As the file names it, e.g. `BF16`."""
    shard: str
    """The file that holds it."""
    rank: int
    """Of the update's factors."""
    update_norm: float
    """‖ΔW‖_F, before any rounding."""
    relative_change: float | None
    """‖ΔW‖_F / ‖W‖_F; None for a weight of zeros."""
    rounding_loss: float
    """‖(W' − W) − ΔW‖_F / ‖ΔW‖_F: the share that rounding to `dtype` lost."""
    changed_elements: int
    """How many stored values differ in any bit."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "shape": list(self.shape)}


def changed(
    entry: TensorEntry, before: Tensor, update: RankKUpdate, *, transposed: bool
) -> tuple[Tensor, TensorReport]:
    """The patched tensor, and the report about it.

    Args:
        before: [d_value, d_key], or [d_key, d_value] if `transposed`.

    Raises:
        NonFiniteError: the stored weight, the factors or the result are not finite.
        CheckpointError: not a single stored value would change.
    """
    if not bool(torch.isfinite(before).all()):
        raise NonFiniteError(
            f"{entry.file}: tensor {entry.name!r} holds NaN or infinity already; "
            "use an intact checkpoint"
        )
    try:
        after = added(before, update, transposed=transposed)
    except NonFiniteError as error:
        raise NonFiniteError(f"{entry.file}: tensor {entry.name!r}: {error}") from error
    count = _differing(before, after)
    norm = update.norm()
    weight_norm = float(torch.linalg.vector_norm(before, dtype=torch.float64))
    if not count:
        raise CheckpointError(
            f"{entry.file}: the update (‖ΔW‖ {norm:.3g} against ‖W‖ {weight_norm:.3g}) "
            f"changes nothing in tensor {entry.name!r} once rounded to {entry.dtype}; "
            "make a larger update, or patch a copy in float32"
        )
    report = TensorReport(
        entry.name,
        entry.shape,
        entry.dtype,
        entry.file,
        update.rank,
        norm,
        norm / weight_norm if weight_norm else None,
        _rounding_error(before, after, update, transposed) / norm if norm else 0.0,
        count,
    )
    return after, report


def check_fits(entry: TensorEntry, update: RankKUpdate, *, transposed: bool) -> None:
    """Refuses an update of another shape, before anything is read or written.

    Raises:
        UpdateError: naming tensor and both shapes.
    """
    expected = update.shape[::-1] if transposed else update.shape
    if entry.shape != expected:
        raise UpdateError(
            f"{entry.file}: tensor {entry.name!r} is {list(entry.shape)}, but the "
            f"update changes a weight stored as {list(expected)} "
            f"({'transposed' if transposed else 'not transposed'}); it was made for "
            "another model"
        )


def equal_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and dtype are the same, bit for bit."""
    return torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


def within_rounding(
    before: Tensor, one: Tensor, other: Tensor, update: RankKUpdate, *, transposed: bool
) -> bool:
    """Whether two results of `added(before, update)` differ by no more than the order
    of summation, which another processor or library may choose differently.

    The bound is the standard one for a sum of k products, k·u·(|L|·|R|), twice, and
    the rounding of the result to the weight's dtype.
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    work = torch.promote_types(before.dtype, torch.float32)
    sizes = RankKUpdate(update.left.abs(), update.right.abs())
    for block, part in _row_blocks(before, sizes, transposed):
        start, one_part, other_part = (
            tensor[block].to(torch.float64) for tensor in (before, one, other)
        )
        total = added(start.abs(), part, transposed=transposed)
        bound = total * (
            2 * (update.rank + 2) * torch.finfo(work).eps
        ) + 2 * torch.finfo(before.dtype).eps * torch.maximum(
            one_part.abs(), other_part.abs()
        )
        if bool(((one_part - other_part).abs() > bound).any()):
            return False
    return True


def _rounding_error(
    before: Tensor, after: Tensor, update: RankKUpdate, transposed: bool
) -> float:
    """‖(after − before) − ΔW‖_F, in more digits than the weight has."""
    work = torch.float64 if before.dtype.itemsize > 2 else torch.float32
    total = 0.0
    for block, part in _row_blocks(before, update, transposed):
        zeros = torch.zeros(before[block].shape, dtype=work)
        exact = added(zeros, part, transposed=transposed)
        lost = after[block].to(work) - before[block].to(work) - exact
        total += float(lost.double().square().sum())
    return math.sqrt(total)


def _row_blocks(
    weight: Tensor, update: RankKUpdate, transposed: bool
) -> list[tuple[slice, RankKUpdate]]:
    """Blocks of stored rows, each with the part of the update that changes it."""
    blocks = []
    for start in range(0, weight.shape[0], _ROW_BLOCK):
        block = slice(start, start + _ROW_BLOCK)
        if transposed:
            part = RankKUpdate(update.left, update.right[:, block])
        else:
            part = RankKUpdate(update.left[block], update.right)
        blocks.append((block, part))
    return blocks


def _differing(before: Tensor, after: Tensor) -> int:
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds[before.dtype.itemsize]
    return int((before.view(kind) != after.view(kind)).sum())
