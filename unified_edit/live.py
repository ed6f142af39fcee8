"""Updates on a loaded model: apply, revert, and both around a block of code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from covariance_cache.fingerprint import model_fingerprint
from unified_edit.algebra.addition import Rounding, added
from unified_edit.algebra.update import UpdateSet
from unified_edit.errors import UpdateError


@dataclass(eq=False)
class Applied:
    """An update in force on a model. `revert()` restores the same bytes."""

    model: nn.Module
    changes: dict[str, float]
    """For each tensor, ‖change‖ / ‖weight‖ as it came out after rounding."""
    _originals: dict[str, Tensor] = field(repr=False)
    _edited: dict[str, Tensor] = field(repr=False)

    def revert(self) -> None:
        """Puts the original weights back, bit for bit. A second call does nothing.

        Raises:
            UpdateError: a weight was changed since; nothing is reverted then.
        """
        for name in self._originals:
            now = self.model.get_parameter(name)
            if not torch.equal(now.detach(), self._edited[name].to(now.device)):
                raise UpdateError(
                    f"{name} changed after this update was applied; revert what came "
                    "later first"
                )
        _write(self.model, self._originals)
        self._originals, self._edited = {}, {}


def apply(
    model: nn.Module,
    update: UpdateSet,
    *,
    rounding: Rounding = "nearest",
    check_base: bool = True,
) -> Applied:
    """Adds an update to a loaded model's weights in place: all of them, or none.

    Args:
        rounding: of half-precision weights, as `patch` does.
        check_base: refuse a model other than the one the update was made for.

    Raises:
        UpdateError: another model, a tensor missing, wrong shape, or no change.
        NonFiniteError: a result is not finite.
    """
    if check_base:
        wanted, found = (
            update.metadata.get("base_fingerprint"),
            model_fingerprint(model),
        )
        if wanted != found:
            raise UpdateError(
                f"the update was made for the model {wanted}, this one is {found}: "
                "other weights, or loaded in another dtype. Load the model it was made "
                "for, or pass check_base=False"
            )
    if not len(update):
        raise UpdateError("the update changes no tensor, so there is nothing to apply")
    originals: dict[str, Tensor] = {}
    edited: dict[str, Tensor] = {}
    changes: dict[str, float] = {}
    for address, factors in update:
        try:
            weight = model.get_parameter(address.tensor).detach()
        except AttributeError as error:
            raise UpdateError(
                f"the model has no parameter {address.tensor!r}, which the update "
                "changes; it was made for another architecture"
            ) from error
        try:
            result = added(
                weight, factors, transposed=address.transposed, rounding=rounding
            )
        except UpdateError as error:
            raise UpdateError(f"{address.tensor}: {error}") from error
        if torch.equal(result, weight):
            raise UpdateError(
                f"the update changes nothing in {address.tensor}: it is zero or is "
                f"lost in rounding to {weight.dtype}"
            )
        originals[address.tensor] = weight.clone()
        edited[address.tensor] = result
        difference = (result.double() - weight.double()).norm()
        changes[address.tensor] = float(difference / weight.double().norm())
    _write(model, edited)
    return Applied(model, changes, originals, edited)


def revert(update: Applied) -> None:
    """Takes back what `apply` did; the same as `update.revert()`."""
    update.revert()


@contextmanager
def applied(
    model: nn.Module,
    update: UpdateSet,
    *,
    rounding: Rounding = "nearest",
    check_base: bool = True,
) -> Iterator[Applied]:
    """Edited inside, bit-identical outside."""
    handle = apply(model, update, rounding=rounding, check_base=check_base)
    try:
        yield handle
    finally:
        handle.revert()


@torch.no_grad()
def _write(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        model.get_parameter(name).copy_(tensor)
