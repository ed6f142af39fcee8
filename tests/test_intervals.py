"""The bootstrap against a loop over resamples, and against what it promises."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from unified_edit.evaluate import intervals
from unified_edit.evaluate.intervals import Interval, MeanScores, bootstrap

COLUMNS: dict[str, list[float | None]] = {
    "a": [1.0, 0.0, 1.0, 1.0, 0.0, 0.5, 0.25],
    "b": [0.1, None, 0.9, 0.4, None, 0.3, 0.8],
    "c": [None, None, None, None, None, 0.7, 0.2],
    "d": [None] * 7,
}


def plain(seed: int, count: int) -> dict[str, tuple[float, float]]:
    """One resample after another, all columns by the same records."""
    generator = np.random.default_rng(seed)
    found: dict[str, list[float]] = {"a": [], "b": [], "c": [], "s": []}
    for _ in range(count):
        rows = generator.integers(7, size=7)
        means = {}
        for name in "abc":
            known = [COLUMNS[name][i] for i in rows if COLUMNS[name][i] is not None]
            if known:
                means[name] = sum(known) / len(known)  # type: ignore[arg-type]
                found[name].append(means[name])
        if "b" in means:
            two = (means["a"], means["b"])
            s = 0.0 if 0 in two else 2 / (1 / two[0] + 1 / two[1])
            found["s"].append(s)
    return {
        name: (float(np.quantile(each, 0.025)), float(np.quantile(each, 0.975)))
        for name, each in found.items()
    }


@pytest.mark.parametrize("draws", [4_000_000, 50])
def test_equals_a_loop_over_resamples(
    draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intervals, "_DRAWS", draws)
    found = bootstrap(COLUMNS, harmonic=("a", "b"), seed=5)
    assert list(found) == ["s", "a", "b", "c"]
    for name, (low, high) in plain(5, 1000).items():
        assert math.isclose(found[name].low, low, rel_tol=1e-12)
        assert math.isclose(found[name].high, high, rel_tol=1e-12)
        assert low < found[name].mean < high
    assert found["b"].mean == 0.5
    assert found["s"].mean == 2 / (1 / found["a"].mean + 1 / 0.5)
    assert found["c"].as_list() == [found["c"].low, found["c"].high]


def test_seeds_and_levels() -> None:
    first = bootstrap(COLUMNS, seed=1)
    assert bootstrap(COLUMNS, seed=1) == first != bootstrap(COLUMNS, seed=2)
    half = bootstrap(COLUMNS, seed=1, level=0.5)["a"]
    assert first["a"].low < half.low < half.high < first["a"].high


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    truth, inside = 0.3, 0
    for trial in range(300):
        column = (generator.random(80) < truth).astype(float).tolist()
        found = bootstrap({"x": column}, seed=trial, resamples=400)["x"]
        inside += found.low <= truth <= found.high
    assert 0.90 < inside / 300 < 0.985


def test_what_there_is_nothing_to_draw_from() -> None:
    assert bootstrap({}) == bootstrap({"a": []}) == bootstrap({"a": [None]}) == {}
    assert bootstrap({"a": [0.4]}) == {"a": Interval(0.4, 0.4, 0.4)}
    # A mean that is 0 makes S 0, one that is not known leaves S out.
    zero = bootstrap({"a": [0.0, 0.0], "b": [1.0, 0.5]}, harmonic=("a", "b"))
    assert zero["s"] == Interval(0.0, 0.0, 0.0)
    assert "s" not in bootstrap({"a": [1.0], "b": [None]}, harmonic=("a", "b"))


@dataclass(frozen=True)
class Row:
    case_id: int
    x: float
    y: float | None
    note: str = ""


class Rows(MeanScores[Row]):
    harmonic: ClassVar[tuple[str, ...]] = ("x", "y")
    apart: ClassVar[tuple[str, ...]] = ("case_id", "note")


def test_means_and_intervals_have_the_same_names_and_values() -> None:
    scores = Rows((Row(7, 1.0, 0.5), Row(8, 0.5, None), Row(9, 0.0, 0.25)))
    means = scores.as_dict()
    assert means == {"s": 2 / (1 / 0.5 + 1 / 0.375), "x": 0.5, "y": 0.375}
    found = scores.intervals(seed=3)
    assert {name: each.mean for name, each in found.items()} == means
    assert found == bootstrap(scores.columns, harmonic=("x", "y"), seed=3)
    without = Rows((Row(7, 1.0, None),))
    assert without.as_dict() == {"x": 1.0} and list(without.intervals()) == ["x"]
    assert math.isnan(without.s) and math.isnan(without.mean("y"))
    assert scores.per_record()[1] == {"case_id": 8, "x": 0.5, "y": None, "note": ""}
