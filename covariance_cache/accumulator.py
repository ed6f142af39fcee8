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
# the rounding inside one block's product. For keys of one size it averages out (below
# 1e-7, tests/test_statistics_accumulator.py); where a few are a thousand times larger,
# what is small beside them is lost in their block (3e-7, benchmarks/statistics.py).
_PANEL = 512
_BLOCK_TOKENS = 1024
"""Rows multiplied in one float32 product; bounds the rounding inside it, also where a
processor's library adds them one after another."""
_HALF_BLOCK_TOKENS = 8192
"""The same for half-precision keys on a GPU, whose products are so fast that adding
them to the total would take as long."""
_HALF = (torch.float16, torch.bfloat16)


class SecondMomentAccumulator:
    """Sums k kᵀ over keys k, uncentred, in one pass of whatever length.

    Products are formed in `dtype`, totals are kept in float64. On a GPU half-precision
    keys are multiplied as they are: their products are exact in float32, in which the
    GPU adds them. Batches may be split in any way: the result differs by rounding
    alone, and not at all for the same batches.
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
        spans = _spans(d_key)
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

    def update(self, keys: Tensor) -> None:
        """Adds the keys of some tokens.

        Args:
            keys: [tokens, d_key] on the accumulator's device, of a dtype that `dtype`
                holds without loss.

        Raises:
            StatisticsError: wrong shape, device or dtype; nothing was added.
            NonFiniteActivations: NaN or infinity in a row; nothing was added.
        """
        self._check_keys(keys)
        if keys.numel() and not bool(is_finite(keys)):
            row = first_bad_row(keys)
            raise NonFiniteActivations(f"row {row} of the keys is not finite", row)
        self.add(keys)

    @torch.no_grad()
    def add(self, keys: Tensor) -> None:
        """`update` for keys that someone else checks to be finite: on a GPU it only
        queues the work.

        Raises:
            StatisticsError: wrong shape, device or dtype; nothing was added.
        """
        self._check_keys(keys)
        as_they_are = keys.is_cuda and keys.dtype in _HALF
        size = _HALF_BLOCK_TOKENS if as_they_are else _BLOCK_TOKENS
        with _full_precision():
            for block in torch.split(keys, size):
                block = block if as_they_are else block.to(self.dtype)
                for start, stop, panel in self._panels:
                    panel += _product(block[:, start:stop].T, block[:, start:])
        self.count += keys.shape[0]

    def _check_keys(self, keys: Tensor) -> None:
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
        return self._mean(self._total.clone())

    def finish(self) -> tuple[Tensor, int]:
        """`freeze` in the total's own memory, which is lost: no second matrix is made
        for a float32 mean. The accumulator is of no use afterwards."""
        return self._mean(self._total)

    def _mean(self, total: Tensor) -> tuple[Tensor, int]:
        if not self.count:
            raise StatisticsError("no keys were accumulated, so there is no mean")
        size, narrow = self.d_key, self.dtype == torch.float32
        # The float32 matrix fits where the float64 panels were: first all panels are
        # narrowed towards the front, then, from the last, spread to their own rows.
        flat = total.view(torch.float32) if narrow else total.new_empty(size * size)
        spread: list[tuple[int, int, int, int]] = []
        begin = 0
        for start, stop, panel in self._panels:
            end = begin + panel.numel()
            rows = (total[begin:end] / self.count).to(self.dtype)
            (flat if narrow else total)[begin:end] = rows
            spread.append((start, stop, begin, end))
            begin = end
        source = flat if narrow else total
        mean = flat[: size * size].view(size, size)
        for start, stop, begin, end in reversed(spread):
            rows = source[begin:end].clone().view(stop - start, size - start)
            if not bool(torch.isfinite(rows).all()):
                raise NonFiniteActivations(
                    f"the keys are finite, but products of them overflow {self.dtype}; "
                    "accumulate with dtype=torch.float64"
                )
            corner = rows[:, : stop - start].triu()
            mean[start:stop, start:] = rows
            mean[start:stop, start:stop] = corner + corner.triu(1).T
        for start, stop, *_ in spread:
            mean[stop:, start:stop] = mean[start:stop, stop:].T
        return mean, self.count

    def state(self) -> dict[str, Tensor]:
        """What `load_state` needs to go on from here. `total` is the live buffer, not
        a copy: write it before the next update."""
        return {"total": self._total, "count": torch.tensor(self.count)}

    def clear(self) -> None:
        """Forgets all keys."""
        self._total.zero_()
        self.count = 0

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


def _product(left: Tensor, right: Tensor) -> Tensor:
    if left.dtype in _HALF:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


def is_finite(keys: Tensor) -> Tensor:
    """Whether all of some keys are finite, as a tensor on their device: no waiting."""
    # One pass that makes no mask of the keys' size; NaN and infinity both survive it.
    smallest, largest = keys.aminmax()
    return torch.isfinite(smallest) & torch.isfinite(largest)


def first_bad_row(keys: Tensor) -> int | None:
    """Index of the first row [tokens, d_key] that is not finite."""
    bad = ~torch.isfinite(keys).all(dim=1)
    return int(bad.nonzero()[0]) if bool(bad.any()) else None


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


def _spans(d_key: int) -> list[tuple[int, int]]:
    return [(i, min(i + _PANEL, d_key)) for i in range(0, d_key, _PANEL)]


def total_bytes(d_key: int) -> int:
    """Memory for the running total over keys of this width: float64 panels on and
    right of the diagonal."""
    sizes = ((stop - start) * (d_key - start) for start, stop in _spans(d_key))
    return torch.float64.itemsize * sum(sizes)
