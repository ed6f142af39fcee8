"""The benchmark of the statistics measures equal work, sees a wrong sum and a peak, and
leaves the standard library's `statistics` where it was."""

from __future__ import annotations

import json
import math
import mmap
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import statistics as benchmark
from benchmarks.plain_statistics import plain_moments, stopped_forward
from covariance_cache import SecondMomentAccumulator

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["gpt2_small_shape", "llama_8b_shape"])
def test_plain_way_and_collect_do_the_same_work(name: str) -> None:
    case = benchmark.tiny(name)
    tokens = 5 * case.window * case.batch_size // 2 + 3  # part of a batch, of a window
    batches = case.batches(tokens)
    assert sum(batch.numel() for batch in batches) == tokens
    assert [batch.shape[0] for batch in batches] == [4, 4, 2, 1]
    found = case.collect(tokens)
    moments = plain_moments(case.model, case.modules, batches, torch.float64)
    for each, moment in zip(found.values(), moments, strict=True):
        assert each.count == tokens
        assert benchmark.relative(each.second_moment, moment) < 1e-6


def test_forward_stops_at_the_key() -> None:
    case = benchmark.tiny("gpt2_small_shape")
    ran: list[int] = []
    for number, module in enumerate(case.modules):
        module.register_forward_hook(lambda *_, number=number: ran.append(number))
    (ids,) = case.batches(case.window)
    keys = stopped_forward(case.model, case.modules[2], ids)
    assert keys.shape == (*ids.shape, case.d_key)
    assert ran == [0, 1]


def test_a_wrong_sum_shows_as_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    frobenius, diagonal = benchmark.errors(5000, 200, torch.float32)
    assert 0 < frobenius < 1e-6 and 0 < diagonal < 1e-5

    class Scaled(SecondMomentAccumulator):
        def freeze(self) -> tuple[torch.Tensor, int]:
            mean, count = super().freeze()
            return mean * (1 + 1e-4), count

    monkeypatch.setattr(benchmark, "SecondMomentAccumulator", Scaled)
    found = benchmark.errors(5000, 200, torch.float32)
    assert found == pytest.approx((1e-4, 1e-4), rel=0.1)


def test_peak_counts_what_was_freed_and_not_what_was_there() -> None:
    before = mapped(120_000_000)
    with benchmark.ResidentPeak() as watch, mapped(60_000_000):
        time.sleep(0.1)  # where the kernel keeps no peak, it is looked for
    before.close()
    assert 55e6 < watch.peak < 90e6


def mapped(size: int) -> mmap.mmap:
    """Memory that was nobody's before: an allocator may have some left."""
    memory = mmap.mmap(-1, size)
    for page in range(0, size, mmap.PAGESIZE):
        memory[page] = 1
    return memory


def test_figures_of_a_case() -> None:
    figures = benchmark.measure(benchmark.tiny("gpt2_small_shape"), rounds=1)
    assert {*benchmark.FALLING, "overhead_ratio"} < {*figures}
    assert all(math.isfinite(value) for value in figures.values())
    shares = [value for key, value in figures.items() if key.endswith("_share")]
    assert sum(shares) == pytest.approx(1)
    # Five stopped forwards of 1 to 5 blocks for one of 5; the last lacks a product.
    assert 1 < figures["flops_ratio"] < 4


def test_device_path_runs_on_the_cpu() -> None:
    figures = benchmark.on_device(benchmark.tiny("llama_8b_shape"), 1, [4, 8])
    assert {"matmul_fraction", "batch_8_tokens_per_second"} < {*figures}
    assert figures["max_relative_error"] < 1e-6
    assert all(math.isfinite(value) for value in figures.values())


def test_script_prints_one_flat_object() -> None:
    command = [sys.executable, ROOT / "benchmarks" / "statistics.py", "--tiny"]
    done = subprocess.run(
        [*command, "--json", "--cases", "accuracy"], capture_output=True, check=True
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    assert answer["max_relative_error"] == answer["accuracy_max_relative_error"]
    assert not any(isinstance(value, dict | list) for value in answer.values())


def test_scripts_get_the_standard_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ROOT / "benchmarks"
    monkeypatch.delitem(sys.modules, "statistics", raising=False)
    # As `python benchmarks/targets.py` starts.
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    script = runpy.run_path(str(folder / "targets.py"))
    assert Path(script["statistics"].__file__).parent != folder
    assert script["statistics"].median([3, 1, 2]) == 2
