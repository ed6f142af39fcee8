"""One tensor's change: computed, checked and measured. Knows no file."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from unified_edit.algebra.addition import Rounding, blocks, few_rows
from unified_edit.algebra.update import RankKUpdate
from unified_edit.checkpoint.layout import TensorEntry
from unified_edit.errors import CheckpointError, NonFiniteError, UpdateError

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    worst_key_error: float | None
    """Largest ‖(W' − W − ΔW) k‖ / ‖ΔW k‖ over the edits' own keys: the share of an
    edit that rounding lost; None for an update without keys."""
    median_key_error: float | None
    """The median of the same."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "shape": list(self.shape)}


def change(
    entry: TensorEntry,
    weight: Tensor,
    update: RankKUpdate,
    *,
    transposed: bool,
    rounding: Rounding,
) -> TensorReport:
    """Adds the update to `weight` itself and reports what that did. One product of
    the factors serves both; with keys, one more tells what rounding did to them.

    Args:
        weight: [d_value, d_key], or [d_key, d_value] if `transposed`. Half-changed
            after an error.

    Raises:
        NonFiniteError: the stored weight, the factors or the result are not finite.
        CheckpointError: not a single stored value would change.
        UpdateError: as `algebra.addition.blocks`.
    """
    matrix = weight.T if transposed else weight
    # Beyond 16 bits the weight has as many digits as the product.
    work = torch.float64 if weight.dtype.itemsize > 2 else torch.float32
    keys = None if update.keys is None else update.keys.to(torch.float32).T
    kind = _INTEGERS[weight.dtype.itemsize]
    before = lost = intended = 0.0
    missed = torch.zeros(0 if keys is None else keys.shape[1], dtype=torch.float64)
    count = 0
    try:
        for block in blocks(weight, update, transposed=transposed, rounding=rounding):
            error = None if keys is None else torch.empty_like(block.change)
            for rows in few_rows(block.change):
                old, new = block.before[rows], block.after[rows]
                count += int((old.view(kind) != new.view(kind)).count_nonzero())
                was, meant = old.to(work), block.change[rows].to(work)
                missing = (new.to(work) - was).sub_(meant)
                if error is not None:
                    error[rows] = missing
                lost += _square(missing)
                before += _square(was)
                intended += _square(meant)
            if keys is not None and error is not None:
                missed += (error.float() @ keys).double().square().sum(dim=0)
            matrix[block.rows] = block.after
    except (NonFiniteError, UpdateError) as error:
        reason = str(error)
        if not bool(torch.isfinite(weight).all()):
            reason = "holds NaN or infinity already; use an intact checkpoint"
        raise type(error)(f"{entry.file}: tensor {entry.name!r}: {reason}") from error
    norm, weight_norm = math.sqrt(intended), math.sqrt(before)
    worst, median = _key_errors(update, missed)
    sizes = (norm, weight_norm, lost, worst or 0.0, median or 0.0)
    if not all(map(math.isfinite, sizes)):
        raise NonFiniteError(
            f"{entry.file}: tensor {entry.name!r}: the update is too large to be "
            f"measured (‖ΔW‖ {norm:.3g})"
        )
    if not count:
        raise CheckpointError(
            f"{entry.file}: the update (‖ΔW‖ {norm:.3g} against ‖W‖ {weight_norm:.3g}) "
            f"changes nothing in tensor {entry.name!r} once rounded to {entry.dtype}; "
            "make a larger update, round towards its keys, or patch a copy in float32"
        )
    return TensorReport(
        name=entry.name,
        shape=entry.shape,
        dtype=entry.dtype,
        shard=entry.file,
        rank=update.rank,
        update_norm=norm,
        relative_change=norm / weight_norm if weight_norm else None,
        rounding_loss=math.sqrt(lost) / norm if norm else 0.0,
        changed_elements=count,
        worst_key_error=worst,
        median_key_error=median,
    )


def _square(tensor: Tensor) -> float:
    """Sum of squares; of few values, for it is added up in their own dtype."""
    return float(torch.linalg.vector_norm(tensor)) ** 2


def _key_errors(
    update: RankKUpdate, missed: Tensor
) -> tuple[float | None, float | None]:
    """‖E k‖ / ‖ΔW k‖ of the worst and of the median key, for ‖E k‖² in `missed`."""
    if update.keys is None or not len(update.keys):
        return None, None
    wide = torch.promote_types(update.left.dtype, torch.float32)
    meant = (update.keys.to(wide) @ update.right.to(wide).T) @ update.left.to(wide).T
    sizes = torch.linalg.vector_norm(meant, dim=1).double()
    shares = missed.sqrt() / sizes.clamp_min(torch.finfo(torch.float64).tiny)
    return float(shares.max()), float(shares.median())


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
    before: Tensor,
    one: Tensor,
    other: Tensor,
    update: RankKUpdate,
    *,
    transposed: bool,
    rounding: Rounding,
) -> bool:
    """Whether two results of adding `update` to `before` differ by no more than the
    order of summation, which another processor or library may choose differently.

    For rounding to nearest the bound is the standard one for a sum of k products,
    k·u·(|L|·|R|), twice, and the rounding of the result to the weight's dtype. Rounding
    towards keys passes a difference on to all later columns: there both results must
    lose as much, to a tenth, of the whole and of each key.
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if rounding == "keys":
        mine, theirs = (
            _losses(before, result, update, transposed) for result in (one, other)
        )
        return bool((mine <= 1.1 * theirs + 1e-6 * mine.max()).all()) and bool(
            (theirs <= 1.1 * mine + 1e-6 * mine.max()).all()
        )
    work = torch.promote_types(before.dtype, torch.float32)
    sizes = RankKUpdate(update.left.abs(), update.right.abs())
    turned = [tensor.T if transposed else tensor for tensor in (one, other)]
    # |W| + |L|·|R|, in float64
    for block in blocks(before.abs().double(), sizes, transposed=transposed):
        one_part, other_part = (tensor[block.rows].double() for tensor in turned)
        bound = block.after * (
            2 * (update.rank + 2) * torch.finfo(work).eps
        ) + 2 * torch.finfo(before.dtype).eps * torch.maximum(
            one_part.abs(), other_part.abs()
        )
        if bool(((one_part - other_part).abs() > bound).any()):
            return False
    return True


def _losses(
    before: Tensor, after: Tensor, update: RankKUpdate, transposed: bool
) -> Tensor:
    """‖E‖_F and ‖E k‖ of each key, for E = after − before − ΔW."""
    assert update.keys is not None
    turned = after.T if transposed else after
    keys = update.keys.to(torch.float32).T
    total = torch.zeros(1 + keys.shape[1], dtype=torch.float64)
    for block in blocks(before.float(), update, transposed=transposed):
        error = turned[block.rows].float() - block.after
        total[0] += sum(_square(error[rows]) for rows in few_rows(error))
        total[1:] += (error @ keys).double().square().sum(dim=0)
    return total.sqrt()
