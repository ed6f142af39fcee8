"""When a sequentially edited model starts to forget, and when it collapses: rules that
can be stated, so that two readers of the same curves name the same number of edits.

Every fit is by least squares, and fits are compared by the Bayesian information
criterion, n·log(variance) + parameters·log(n), whose variance is at least `FLOOR`², so
that a perfect fit is not infinitely good. A place where a fit bends or breaks counts as
a parameter: a constant has 1, a straight line 2, a step and a hinge 3, a ramp 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unified_edit.errors import EditError

Values = NDArray[np.float64]
Series = Sequence[float | None]
"""One value a checkpoint; None and NaN are gaps."""

FLOOR = 0.01
"""Standard deviation below which a fit's error is no news."""
EVIDENCE = 10.0
"""By how much the criterion must prefer a change to a constant: "very strong"
evidence, because the change was looked for at every checkpoint."""
COLLAPSE, FORGETTING = 0.2, 0.05
"""Least falls that count."""
FEWEST_EDITS = 10
"""Edits below which S is too coarse for a limit: with one, a paraphrase decides."""
FEWEST = 4
"""Checkpoints below which nothing is said."""

RULES = f"""Edits held: those of the last checkpoint before S, over all edits so far and
{FEWEST_EDITS} at least, first falls below {{limit:g}}; “≥” where it never fell.

Collapse: the checkpoints are cut in two where two means miss general ability
({{ability}}) least. It counts if the mean falls by {COLLAPSE:g} or more, two means are
better than one by {EVIDENCE:g} in the Bayesian information criterion, and no straight
line or hinge is better still. The onset is the first checkpoint after the cut.

Forgetting: before the collapse, rewrite accuracy over all edits so far is flat, falls
in a straight line, and may then be flat again. It counts if it falls by
{FORGETTING:g} or more and that is better than a constant by {EVIDENCE:g}. The onset is
the last checkpoint before the fall. Errors below {FLOOR:g} are no news, and fewer than
{FEWEST} checkpoints say nothing."""
"""The same for readers of a page, to be formatted with the limit of S and what the
ability is."""


@dataclass(frozen=True)
class Held:
    """How many edits a model held."""

    edits: int
    ended: bool
    """False if it never fell below the limit: it held at least as many."""


@dataclass(frozen=True)
class Onsets:
    """Numbers of edits; None where nothing of the kind was found."""

    forgetting: int | None
    collapse: int | None


def held(edits: Sequence[int], s: Series, at_least: float = 0.8) -> Held:
    """The last checkpoint before S, over all facts edited so far, first falls below a
    limit; S that recovers later does not count, nor does S over fewer edits than
    `FEWEST_EDITS`.

    Args:
        edits: edits made before each checkpoint, ascending.
        s: S at each checkpoint.

    Raises:
        EditError: series of different lengths, or edits that do not ascend.
    """
    times, values = _measured(edits, s)
    last = 0
    for time, value in zip(times, values, strict=True):
        if value < at_least and time >= FEWEST_EDITS:
            return Held(last, ended=True)
        last = int(time)
    return Held(last, ended=False)


def onsets(
    edits: Sequence[int],
    retention: Series,
    ability: Series,
    *,
    collapse: float = COLLAPSE,
    forgetting: float = FORGETTING,
) -> Onsets:
    """Onset of gradual forgetting, and of collapse.

    Collapse is a step: of all ways to cut the checkpoints in two, the one whose two
    means miss `ability` least; it counts if the mean falls by `collapse` or more, the
    criterion prefers it to a constant by `EVIDENCE`, and no straight line or hinge is
    preferred to it. Its onset is the first checkpoint after the cut.

    Forgetting is a ramp on the checkpoints before the collapse: `retention` is flat
    until τ, falls in a straight line, and may be flat again from σ on. It counts if the
    criterion prefers it to a constant by `EVIDENCE` and it falls by `forgetting` or
    more. Its onset is τ, the last checkpoint before the fall.

    Fewer than `FEWEST` checkpoints with a value say nothing.

    Args:
        edits: edits made before each checkpoint, ascending.
        retention: how much of what was edited so far is still there.
        ability: something general, higher is better, such as the mean of skills and
            unrelated facts, or minus the logarithm of perplexity.
        collapse: the least fall of `ability` that is one.
        forgetting: the least fall of `retention` that is one.

    Raises:
        EditError: series of different lengths, or edits that do not ascend.
    """
    fallen = _collapse(*_measured(edits, ability), collapse)
    times, values = _measured(edits, retention)
    before = times < (math.inf if fallen is None else fallen)
    return Onsets(_forgetting(times[before], values[before], forgetting), fallen)


def ability(
    skills: Series, unrelated: Series, perplexity: Series
) -> tuple[list[float | None], str]:
    """What a collapse is looked for in, and its name: the mean of skills and unrelated
    facts, of which one may be missing; without both, minus log perplexity."""
    both = {"skills": skills, "unrelated facts": unrelated}
    parts = {name: each for name, each in both.items() if there(each)}
    if parts:
        return averages(list(parts.values())), " and ".join(parts)
    return [-math.log(p) if p and p > 0 else None for p in perplexity], "perplexity"


def there(series: Series) -> bool:
    """Whether anything was measured."""
    return any(each is not None for each in series)


def averages(series: Sequence[Series]) -> list[float | None]:
    """Means of several series at each checkpoint where all have a value."""
    found: list[float | None] = []
    for values in zip(*series, strict=True):
        known = [each for each in values if each is not None]
        found.append(sum(known) / len(known) if len(known) == len(values) else None)
    return found


def _collapse(times: Values, values: Values, least: float) -> int | None:
    if len(times) < FEWEST:
        return None
    cuts = range(1, len(times))
    errors = [_spread(values[:cut]) + _spread(values[cut:]) for cut in cuts]
    best = int(np.argmin(errors))
    cut = cuts[best]
    step = _criterion(errors[best], values, 3)
    if values[:cut].mean() - values[cut:].mean() < least:
        return None
    if step > _criterion(_spread(values), values, 1) - EVIDENCE:
        return None
    # Falls that take their time: straight, after a while, or ending in a plateau.
    rivals = [
        _criterion(_slope(times, values)[0], values, 2),
        _criterion(_hinge(times, values), values, 3),
        _criterion(_hinge(-times[::-1], -values[::-1]), values, 3),
    ]
    # A hinge at the last checkpoint but one is a step, to the last bits.
    return None if step > min(rivals) + 1e-6 else int(times[cut])


def _forgetting(times: Values, values: Values, least: float) -> int | None:
    if len(times) < FEWEST:
        return None
    limit = _criterion(_spread(values), values, 1) - EVIDENCE
    fits = []
    for last in range(1, len(times)):
        # Flat again from `last` on; only a hinge if that is the last of all.
        parameters = 3 if last == len(times) - 1 else 4
        errors, falls = _ramps(times, values, last)
        first = int(np.argmin(np.where(falls < least, np.inf, errors)))
        value = _criterion(errors[first], values, parameters)
        if falls[first] >= least and value <= limit:
            # Below the floor criteria are equal, and the errors decide.
            fits.append((value, errors[first], times[first]))
    return int(min(fits)[2]) if fits else None


def _measured(edits: Sequence[int], series: Series) -> tuple[Values, Values]:
    """Checkpoints that have a finite value, and their values."""
    if len(edits) != len(series):
        raise EditError(f"{len(edits)} checkpoints, but {len(series)} values")
    times = np.array(edits, dtype=np.float64)
    if (np.diff(times) <= 0).any():
        raise EditError(
            "the numbers of edits must ascend from checkpoint to checkpoint"
        )
    values = np.array([math.nan if each is None else each for each in series])
    known = np.isfinite(values)
    return times[known], values[known].astype(np.float64)


def _criterion(error: float, values: Values, parameters: int) -> float:
    """Bayesian information criterion of a fit; lower is better."""
    count = len(values)
    variance = max(error / count, FLOOR**2)
    return count * math.log(variance) + parameters * math.log(count)


def _spread(values: Values) -> float:
    """Summed squared error of a constant."""
    return float(((values - values.mean()) ** 2).sum())


def _slope(x: Values, values: Values) -> tuple[float, float]:
    """Summed squared error of a straight line, and its slope."""
    x, y = x - x.mean(), values - values.mean()
    slope = float(x @ y / (x @ x))
    return float(((y - slope * x) ** 2).sum()), slope


def _hinge(times: Values, values: Values) -> float:
    """Summed squared error of the best hinge that is flat and then falls."""
    return float(_ramps(times, values, len(times) - 1)[0].min())


def _ramps(times: Values, values: Values, last: int) -> tuple[Values, Values]:
    """For ramps that end at checkpoint `last` and begin at each before it: summed
    squared error, and by how much it falls. One that would rise is a constant."""
    x = (np.minimum(times, times[last]) - times[0]) / (times[-1] - times[0])
    y = values - values.mean()
    # x as it is but for the checkpoints before the ramp, which are moved to its begin.
    before = np.arange(1, last + 1)
    begin, count = x[:last], len(x)
    sums = x.sum() + before * begin - np.cumsum(begin)
    squares = x @ x + before * begin**2 - np.cumsum(begin**2)
    products = x @ y + begin * np.cumsum(y[:last]) - np.cumsum(begin * y[:last])
    slopes = np.minimum(products / (squares - sums**2 / count), 0.0)
    errors = np.maximum(y @ y - np.abs(slopes * products), 0.0)
    return errors, -slopes * (x[last] - begin)
