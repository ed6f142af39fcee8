"""The comparison of editors, on a few records: that it measures what it says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks import compare


@pytest.fixture(scope="module")
def mend() -> compare.Bench:
    return compare.bench("mend", "gpt2")


def weights(here: compare.Bench) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in here.model.parameters()])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "UNRELATED", 20)
    monkeypatch.setattr(compare, "SAMPLED", 1)
    monkeypatch.setattr(compare, "_skills", lambda here: 0.5)


def test_single_edits_are_each_on_the_unedited_model(
    mend: compare.Bench, quick: None
) -> None:
    records, before = mend.world.records[:3], weights(mend)
    figures, intervals = compare.apart(mend, records, 1)
    assert torch.equal(weights(mend), before)
    backwards, _ = compare.apart(mend, records[::-1], 1)
    for metric in compare.METRICS:
        assert figures[metric] == pytest.approx(backwards[metric])
        low, high = intervals[metric]
        assert 0 <= low <= figures[metric] <= high <= 1
    assert figures["es"] > 0.6 and figures["skills"] == 0.5
    assert figures["seconds_per_edit"] > 0 and figures["entropy"] > 0
    assert figures["extra_memory"] >= 0


def test_a_sequence_is_the_sum_of_its_steps(mend: compare.Bench, quick: None) -> None:
    """Each step on the model as the ones before it left it, and nothing taken back."""
    records = mend.world.records[:2]
    before = {n: p.detach().clone() for n, p in mend.model.named_parameters()}
    seen: list[torch.Tensor] = []

    def watching(edits: Any) -> Any:
        seen.append(weights(mend))
        return mend.compute(edits)

    here = compare.Bench(mend.world, mend.model, mend.tokenizer, watching)
    try:
        figures, _ = compare.sequence(here, records)
        assert not torch.equal(seen[0], seen[1])
        assert not torch.equal(seen[1], weights(mend))
        assert not math.isnan(figures["s"])
    finally:
        with torch.no_grad():
            for name, parameter in mend.model.named_parameters():
                parameter.copy_(before[name])


def test_memory_is_what_the_work_takes() -> None:
    with compare.peak() as reading:
        # So much that no memory freed before can hold it.
        held = torch.ones(64 * 2**20)
        del held
    (found,) = reading
    assert math.isnan(found) or 200 < found < 300
