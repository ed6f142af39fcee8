"""The rules for how long edits hold, and for the onsets of forgetting and collapse."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from unified_edit.errors import EditError
from unified_edit.evaluate.onset import Held, Onsets, ability, averages, held, onsets

EVERY = 20
TIMES = list(range(0, 1000, EVERY))
FLAT = [1.0] * len(TIMES)
SEEDS = range(40)


def falling(start: int, by: float, until: int = TIMES[-1]) -> list[float]:
    """1, then a straight fall between two numbers of edits, then flat."""
    return [1 - by * min(max(0, t - start) / (until - start), 1) for t in TIMES]


def stepping(at: int, by: float) -> list[float]:
    """1, and from one number of edits on less."""
    return [1 - by * (t >= at) for t in TIMES]


def noisy(values: Sequence[float], deviation: float, seed: int) -> list[float]:
    draws = np.random.default_rng(seed).standard_normal(len(values))
    return [v + deviation * float(d) for v, d in zip(values, draws, strict=True)]


def forgetting(values: Sequence[float | None]) -> int | None:
    return onsets(TIMES[: len(values)], values, FLAT[: len(values)]).forgetting


def collapse(values: Sequence[float | None]) -> int | None:
    return onsets(TIMES[: len(values)], FLAT[: len(values)], values).collapse


def test_held_is_the_checkpoint_before_the_first_fall() -> None:
    edits = [0, 10, 20, 30, 40]
    assert held(edits, [None, 0.9, 0.85, 0.79, 0.95]) == Held(20, ended=True)
    assert held(edits, [None, 0.9, 0.8, 0.8, 0.8]) == Held(40, ended=False)
    assert held(edits, [None, 0.5, 0.9, 0.9, 0.9]) == Held(0, ended=True)
    # What was not measured was not seen to hold.
    assert held(edits, [None, 0.9, None, math.nan, 0.1]) == Held(10, ended=True)
    assert held(edits, [None, 0.9, 0.9, None, None]) == Held(20, ended=False)
    assert held(edits, [None] * 5) == held([], []) == Held(0, ended=False)


@pytest.mark.parametrize("seed", SEEDS)
def test_held_falls_as_the_limit_rises_and_later_checkpoints_change_nothing(
    seed: int,
) -> None:
    s = noisy(falling(200, 0.9), 0.1, seed)
    limits = [0.1 * n for n in range(1, 10)]
    counts = [held(TIMES, s, limit).edits for limit in limits]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    ended = held(TIMES, s)
    assert ended.ended
    for more in range(1, 10):
        upto = TIMES.index(ended.edits) + 1 + more
        assert held(TIMES[:upto], s[:upto]) == ended


@pytest.mark.parametrize("start", [0, 200, 400, 700])
def test_a_hinge_without_noise_is_found_where_it_bends(start: int) -> None:
    assert forgetting(falling(start, 0.5)) == start


@pytest.mark.parametrize("at", [EVERY, 300, 600, TIMES[-1]])
def test_a_step_without_noise_is_found_where_it_falls(at: int) -> None:
    assert collapse(stepping(at, 0.6)) == at


@pytest.mark.parametrize("seed", SEEDS)
def test_onsets_are_found_in_noise(seed: int) -> None:
    found = forgetting(noisy(falling(400, 0.5), 0.02, seed))
    assert found is not None and abs(found - 400) <= 3 * EVERY
    # Forgotten altogether, long before the end: the plateau is no part of the fall.
    found = forgetting(noisy(falling(200, 1.0, until=400), 0.02, seed))
    assert found is not None and abs(found - 200) <= 2 * EVERY
    assert collapse(noisy(stepping(500, 0.6), 0.05, seed)) == 500


@pytest.mark.parametrize("seed", SEEDS)
def test_gradual_forgetting_is_found_before_a_collapse_and_apart_from_it(
    seed: int,
) -> None:
    retention = [
        min(a, b) for a, b in zip(falling(200, 0.5), stepping(700, 0.9), strict=True)
    ]
    found = onsets(
        TIMES, noisy(retention, 0.02, seed), noisy(stepping(700, 0.7), 0.02, seed + 99)
    )
    assert found.collapse == 700
    assert found.forgetting is not None and abs(found.forgetting - 200) <= 4 * EVERY
    # A collapse that takes what was held until then is no gradual forgetting.
    sudden = stepping(700, 0.7)
    assert onsets(
        TIMES, noisy(sudden, 0.02, seed), noisy(sudden, 0.02, seed + 99)
    ) == Onsets(None, 700)


@pytest.mark.parametrize(
    "values",
    [falling(400, 0.8), falling(0, 0.8), [math.exp(-t / 200) for t in TIMES]],
    ids=["hinge", "line", "exponential"],
)
def test_what_falls_slowly_is_no_collapse(values: list[float]) -> None:
    assert collapse(values) is None
    assert all(collapse(noisy(values, 0.02, seed)) is None for seed in SEEDS)


@pytest.mark.parametrize("deviation", [0.0, 0.02, 0.05, 0.2])
@pytest.mark.parametrize("count", [4, 6, 12, 50])
def test_flat_series_raise_few_false_alarms(count: int, deviation: float) -> None:
    alarms = [0, 0]
    flat = [0.7] * count
    draws = 200
    for seed in range(draws):
        found = onsets(
            TIMES[:count],
            noisy(flat, deviation, seed),
            noisy(flat, deviation, seed + draws),
        )
        alarms[0] += found.forgetting is not None
        alarms[1] += found.collapse is not None
    # Four points can look like anything.
    most = 0.08 if count == 4 else 0.03
    assert max(alarms) <= most * draws
    assert deviation or alarms == [0, 0]


def test_small_falls_and_rises_are_none() -> None:
    assert forgetting(falling(400, 0.04)) is None
    assert forgetting(falling(400, 0.06)) == 400
    assert collapse(stepping(500, 0.19)) is None
    assert collapse(stepping(500, 0.21)) == 500
    assert onsets(TIMES, falling(400, -0.5), stepping(500, -0.6)) == Onsets(None, None)


def test_limits_are_arguments() -> None:
    hinge, step = falling(400, 0.3), stepping(500, 0.3)
    strict = onsets(TIMES, hinge, step, forgetting=0.35, collapse=0.35)
    assert strict == Onsets(None, None)
    assert onsets(TIMES, FLAT, stepping(500, 0.1), collapse=0.1 - 1e-9).collapse == 500


def test_fewer_than_four_measured_checkpoints_say_nothing() -> None:
    assert onsets([0, 1, 2], [1, 1, 0], [1, 1, 0]) == Onsets(None, None)
    assert onsets([0, 1, 2, 3], [1, 1, 1, 0], [1, 1, 1, 0]) == Onsets(None, 3)
    gap = [1, 1, None, 0]
    assert onsets([0, 1, 2, 3], gap, gap) == Onsets(None, None)
    assert onsets([], [], []) == Onsets(None, None)


@pytest.mark.parametrize("seed", range(10))
def test_gaps_are_as_if_there_had_been_no_checkpoint(seed: int) -> None:
    hinge, step = noisy(falling(300, 0.6), 0.02, seed), noisy(stepping(800, 0.6), 0, 0)
    kept = np.random.default_rng(seed).random(len(TIMES)) < 0.6
    for gap in (None, math.nan, math.inf):
        holed = [
            [v if k else gap for v, k in zip(each, kept, strict=True)]
            for each in (hinge, step)
        ]
        left = [
            [v for v, k in zip(each, kept, strict=True) if k]
            for each in (TIMES, hinge, step)
        ]
        found = onsets(TIMES, *holed)
        assert found == onsets([int(t) for t in left[0]], *left[1:])
        assert found.forgetting is not None and found.collapse is not None


@pytest.mark.parametrize("seed", range(20))
def test_onsets_follow_shifts_of_values_and_the_unit_of_edits(seed: int) -> None:
    hinge, step = (
        noisy(falling(400, 0.5), 0.03, seed),
        noisy(stepping(800, 0.5), 0.03, seed),
    )
    found = onsets(TIMES, hinge, step)
    lower = [[v - 0.25 for v in each] for each in (hinge, step)]
    assert onsets(TIMES, *lower) == found
    assert found.forgetting is not None and found.collapse is not None
    tenfold = onsets([10 * t for t in TIMES], hinge, step)
    assert tenfold == Onsets(10 * found.forgetting, 10 * found.collapse)


@pytest.mark.parametrize("seed", range(20))
def test_a_deeper_collapse_is_still_one_and_at_the_same_place(seed: int) -> None:
    found = [collapse(noisy(stepping(600, by), 0.05, seed)) for by in (0.3, 0.5, 0.9)]
    assert found[found.index(600) :] == [600] * (3 - found.index(600))
    assert found[-2:] == [600, 600]


def test_an_unknown_end_does_not_change_what_came_before_a_collapse() -> None:
    """The onset of forgetting depends on nothing after the collapse."""
    step, hinge = stepping(700, 0.7), noisy(falling(200, 0.5), 0.02, 0)
    for end in (0.0, 1.0, 5.0):
        after = [v if t < 700 else end for t, v in zip(TIMES, hinge, strict=True)]
        assert onsets(TIMES, after, step) == onsets(TIMES, hinge, step)


def test_malformed_series_are_refused() -> None:
    with pytest.raises(EditError, match="2 checkpoints, but 3 values"):
        held([0, 1], [1, 1, 1])
    with pytest.raises(EditError, match="ascend"):
        onsets([0, 20, 20, 40], FLAT[:4], FLAT[:4])


def test_ability_is_the_mean_of_what_there_is() -> None:
    nothing: list[float | None] = [None, None]
    assert averages([[1.0, 0.5], [0.5, None]]) == [0.75, None]
    assert ability([1, 0.5], [0.5, 0.5], [8, 9]) == (
        [0.75, 0.5],
        "skills and unrelated facts",
    )
    assert ability(nothing, [0.5, 0.25], [8, 9]) == ([0.5, 0.25], "unrelated facts")
    logs, name = ability(nothing, nothing, [math.e, None])
    assert (logs, name) == ([pytest.approx(-1), None], "perplexity")


def test_s_over_a_few_edits_is_no_news() -> None:
    assert held([0, 1, 9, 10, 20], [None, 0.5, 0.7, 0.9, 0.6]) == Held(10, ended=True)
    assert held([0, 1, 10], [None, 0.9, 0.5]) == Held(1, ended=True)
