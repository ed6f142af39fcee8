"""Means of records' scores, and how far they might be off: a percentile bootstrap.

Records are drawn with replacement, all their scores together, and every mean is taken
again: the interval holds the middle 95 % of what comes out. It tells what another draw
of records might have given, for this model and this update; not what another seed,
another batch of edits or another model would. With few records it is too narrow, and of
a single one it is a point.

Source: Efron 1979; Efron and Tibshirani 1993, section 13.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np

LEVEL = 0.95
RESAMPLES = 1000
_DRAWS = 4_000_000
"""Drawn at once: bounds the memory, changes no number."""


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


Record = TypeVar("Record", bound=_Dataclass)


@dataclass(frozen=True)
class Interval:
    """A mean, and between what it lies."""

    mean: float
    low: float
    high: float

    def as_list(self) -> list[float]:
        """[low, high]."""
        return [self.low, self.high]


def bootstrap(
    columns: Mapping[str, Sequence[float | None]],
    *,
    harmonic: Sequence[str] = (),
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> dict[str, Interval]:
    """Intervals of each column's mean, and as `s` of a harmonic mean of means.

    Args:
        columns: one value for each record, None where it has none: a mean is over the
            records that have one, in a resample too. Columns without any are left out.
        harmonic: whose means' harmonic mean is `s`, drawn together.

    Returns:
        By name, `s` first.
    """
    names = list(columns)
    count = len(columns[names[0]]) if names else 0
    if not count:
        return {}
    values = np.array([columns[name] for name in names], dtype=np.float64).T
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)
    generator = np.random.default_rng(seed)
    means = np.empty((resamples, len(names)))
    step = max(1, _DRAWS // count)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = generator.integers(count, size=(rows, count))
        drawn += count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count)
        weights = times.reshape(rows, count).astype(np.float64)
        # A resample may hold none of the few records that have a value: then NaN.
        with np.errstate(invalid="ignore"):
            means[start : start + rows] = (weights @ filled) / (weights @ known)
    whole = {name: mean_of(columns[name]) for name in names}
    drawn_means = {name: means[:, index] for index, name in enumerate(names)}
    if harmonic:
        s = harmonic_mean([whole[name] for name in harmonic])
        parts = zip(*(drawn_means[name].tolist() for name in harmonic), strict=True)
        whole = {"s": s, **whole}
        drawn_means["s"] = np.array([harmonic_mean(each) for each in parts])
    tails = ((1 - level) / 2, (1 + level) / 2)
    found = {}
    for name, mean in whole.items():
        if not math.isnan(mean):
            sound = drawn_means[name][~np.isnan(drawn_means[name])]
            low, high = np.quantile(sound, tails) if len(sound) else (mean, mean)
            found[name] = Interval(mean, float(low), float(high))
    return found


def mean_of(values: Sequence[float | None]) -> float:
    """Mean of the values that are there; NaN if none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def harmonic_mean(parts: Sequence[float]) -> float:
    """NaN if a part is; else 0 if a part is."""
    if any(map(math.isnan, parts)):
        return math.nan
    if 0 in parts:
        return 0.0
    return len(parts) / sum(1 / part for part in parts)


@dataclass(frozen=True)
class MeanScores(Generic[Record]):
    """Means over records, each a dataclass of scores, None where it has none."""

    records: tuple[Record, ...]

    harmonic: ClassVar[tuple[str, ...]] = ()
    """Scores whose means' harmonic mean is S."""
    apart: ClassVar[tuple[str, ...]] = ("case_id",)
    """Fields of a record that are no scores."""

    @property
    def columns(self) -> dict[str, list[float | None]]:
        """Each score of every record."""
        names = [each.name for each in fields(self.records[0])] if self.records else []
        return {
            name: [getattr(record, name) for record in self.records]
            for name in names
            if name not in self.apart
        }

    def mean(self, name: str) -> float:
        """Mean of one score over the records that have it; NaN if none has."""
        return mean_of([getattr(record, name) for record in self.records])

    @property
    def s(self) -> float:
        """Harmonic mean of the means in `harmonic`; 0 if one of them is."""
        return harmonic_mean([self.mean(name) for name in self.harmonic])

    def as_dict(self) -> dict[str, float]:
        """S and the mean of every score; absent where no record has it."""
        means = {"s": self.s, **{name: self.mean(name) for name in self.columns}}
        return {name: value for name, value in means.items() if not math.isnan(value)}

    def intervals(self, seed: int = 0) -> dict[str, Interval]:
        """95 % intervals of what `as_dict` has; see `bootstrap`."""
        return bootstrap(self.columns, harmonic=self.harmonic, seed=seed)

    def per_record(self) -> list[dict[str, Any]]:
        """Every record's scores as plain data."""
        return [asdict(record) for record in self.records]
