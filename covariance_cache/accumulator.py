"""The streaming sum of k kᵀ: update, merge, freeze. Knows tensors only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from covariance_cache.errors import NonFiniteActivations, StatisticsError

# The sum is symmetric, so only its panels on and right of the diagonal are computed
# and kept: half the products, and half the numbers. That half pays for keeping them in
# float64, at the memory of one full float32 matrix (4 · d_key² bytes, and 4 · d_key
# for each row of a panel). A float32 total loses digits with every addition (about
# 1e-6 after 2 million tokens, growing with their number); in float64 what is left is
# the rounding inside one block's product, which is random and averages out (below 1e-7,
# measured in tests/test_statistics_accumulator.py).
_PANEL = 512
_BLOCK_TOKENS = 1024
"""Rows multiplied in one float32 product; bounds the rounding inside it, also where a
processor's library adds them one after another."""


class SecondMomentAccumulator:
    """Sums k kᵀ over keys k, uncentred, in one pass of whatever length.

    Products are formed in `dtype`, totals are kept in float64. Batches may be split in
    any way: the result differs by rounding alone, and not at all for the same batches.
    """

    def __init__(
        self,
        d_key: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """
        Args:
            d_key: width of the keys.
            dtype: float32 or float64, of the products and of the frozen mean.
            device: where keys will come from and totals are kept.
        """
        if d_key < 1:
            raise StatisticsError(f"d_key must be at least 1, got {d_key}")
        if dtype not in (torch.float32, torch.float64):
            raise StatisticsError(
                f"second moments are accumulated in float32 or float64, not in {dtype}"
            )
        self.d_key = d_key
        self.dtype = dtype
        self.count = 0
        spans = [(i, min(i + _PANEL, d_key)) for i in range(0, d_key, _PANEL)]
        sizes = [(stop - start) * (d_key - start) for start, stop in spans]
        self._total = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        self._panels = [
            (start, stop, part.view(stop - start, d_key - start))
            for (start, stop), part in zip(
                spans, torch.split(self._total, sizes), strict=True
            )
        ]

    @property
    def device(self) -> torch.device:
        """Where the totals are."""
        return self._total.device

    @torch.no_grad()
    def update(self, keys: Tensor) -> None:
        """Adds the keys of some tokens.

        Args:
            keys: [tokens, d_key] on the accumulator's device, of a dtype that `dtype`
                holds without loss.

        Raises:
            StatisticsError: wrong shape, device or dtype; nothing was added.
            NonFiniteActivations: NaN or infinity in a row; nothing was added.
        """
        if keys.ndim != 2 or keys.shape[1] != self.d_key:
            raise StatisticsError(
                f"keys must be [tokens, {self.d_key}], got {list(keys.shape)}"
            )
        if keys.device != self.device:
            raise StatisticsError(
                f"keys are on {keys.device}, their accumulator is on {self.device}"
            )
        if torch.promote_types(keys.dtype, self.dtype) != self.dtype:
            raise StatisticsError(
                f"keys are {keys.dtype}, which would be rounded to {self.dtype}; "
                "make the accumulator with dtype=torch.float64"
            )
        keys = keys.to(self.dtype)
        _check_finite(keys)
        with _full_precision():
            for block in torch.split(keys, _BLOCK_TOKENS):
                for start, stop, panel in self._panels:
                    panel += block[:, start:stop].T @ block[:, start:]
        self.count += keys.shape[0]

    def merge(self, other: SecondMomentAccumulator) -> None:
        """Adds what `other` has seen, as if its keys had been given to this one."""
        if (self.d_key, self.dtype) != (other.d_key, other.dtype):
            raise StatisticsError(
                f"cannot merge sums of {other.d_key}-dimensional {other.dtype} keys "
                f"into sums of {self.d_key}-dimensional {self.dtype} keys"
            )
        self._total += other._total.to(self.device)
        self.count += other.count

    def freeze(self) -> tuple[Tensor, int]:
        """The mean of k kᵀ, [d_key, d_key] in `dtype`, exactly symmetric, and the
        number of keys it is the mean of. A new tensor; the accumulator may go on.

        Raises:
            StatisticsError: no key was given.
            NonFiniteActivations: the squares overflow `dtype`.
        """
        if not self.count:
            raise StatisticsError("no keys were accumulated, so there is no mean")
        mean = self._total.new_empty(self.d_key, self.d_key, dtype=self.dtype)
        for start, stop, panel in self._panels:
            rows = (panel / self.count).to(self.dtype)
            corner = rows[:, : stop - start].triu()
            mean[start:stop, start:] = rows
            mean[start:, start:stop] = rows.T
            mean[start:stop, start:stop] = corner + corner.triu(1).T
        if not bool(torch.isfinite(mean).all()):
            raise NonFiniteActivations(
                f"the keys are finite, but products of them overflow {self.dtype}; "
                "accumulate with dtype=torch.float64"
            )
        return mean, self.count

    def state(self) -> dict[str, Tensor]:
        """What `load_state` needs to go on from here. `total` is the live buffer, not
        a copy: write it before the next update."""
        return {"total": self._total, "count": torch.tensor(self.count)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes the place of an accumulator of the same width.

        Raises:
            StatisticsError: a state of another width or kind.
        """
        total, count = state["total"], state["count"]
        if total.shape != self._total.shape or total.dtype != self._total.dtype:
            raise StatisticsError(
                f"the saved sum holds {list(total.shape)} numbers of {total.dtype}, "
                f"{self.d_key}-dimensional keys need {list(self._total.shape)} of "
                f"{self._total.dtype}"
            )
        self._total.copy_(total)
        self.count = int(count)


def _check_finite(keys: Tensor) -> None:
    # One reduction without a mask of the keys' size; a NaN or an infinity survives it.
    if bool(torch.isfinite(keys.sum())):
        return
    bad = ~torch.isfinite(keys).all(dim=1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise NonFiniteActivations(f"row {row} of the keys is not finite", row)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Keeps a process-wide permission for TF32 or bfloat16 products out of the sums."""
    # torch before 2.9 has one setting, later ones a setting for each backend, and
    # refuse to read the first while the others differ.
    backends = [torch.backends.cuda, torch.backends.mkldnn]
    settings: list[Any] = [getattr(backend, "matmul", None) for backend in backends]
    settings = [each for each in settings if hasattr(each, "fp32_precision")]
    if not settings:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    saved = [each.fp32_precision for each in settings]
    try:
        for each in settings:
            each.fp32_precision = "ieee"
        yield
    finally:
        for each, precision in zip(settings, saved, strict=True):
            each.fp32_precision = precision
