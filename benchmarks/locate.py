"""How fast facts are traced, against the loop of the definition, and the same effects.

    python benchmarks/locate.py [--json] [--rounds 3] [--cases …]

Each case is measured in this one process, by turns: the package's `trace`, and
`plain_tracing.py`, one forward of a clean row and all samples for each restored state.
Ratios are of medians. FLOPs are counted by torch. `ratio` is the least of the cases',
`max_difference` the largest of any restored probability.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Run as a script: this folder, which comes first, would hide the standard
    # library's `statistics` behind the script of that name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, GPT2Config

from benchmarks.models import random_model
from benchmarks.plain_tracing import plain_trace
from benchmarks.report import figures_table, machine, print_json, timed, versions
from unified_edit.demo import load
from unified_edit.edits import Edit
from unified_edit.evaluate.world import World
from unified_edit.facts import read_facts
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.restoring import Kind, noise_of
from unified_edit.model.tracing import Traces, TraceSettings, rows_of, trace

T = TypeVar("T")
WORLD = Path(__file__).parents[1] / "examples" / "tinyworld"
DATA = Path(os.environ.get("UNIFIED_EDIT_DATA", "../shared/data"))


@dataclass(frozen=True, eq=False)
class Case:
    """A model and facts."""

    model: nn.Module
    tokenizer: Any
    facts: Sequence[Edit]
    rounds: int | None = None
    """Where the loop takes long."""


def embedded(family: str) -> Case:
    """An embedded model and ten facts that it knows."""
    model, tokenizer = load(WORLD / family)
    records = World.load(WORLD / "data").records[:10]
    facts = [Edit(r.edit.prompt, r.edit.subject, r.target_true) for r in records]
    return Case(model, tokenizer, facts)


def small() -> Case:
    """Four layers of GPT-2 small's shape, weights random, and one of ROME's facts."""
    model = random_model(GPT2Config(n_layer=4), "cpu", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tokenizers" / "gpt2")
    return Case(model, tokenizer, read_facts(DATA / "known_1000.json")[:1], 1)


CASES: dict[str, Callable[[], Case]] = {
    "embedded_gpt2": lambda: embedded("gpt2"),
    "embedded_llama": lambda: embedded("llama"),
    "gpt2_small_four_layers": small,
}
SETTINGS = TraceSettings()


def ours(case: Case) -> Traces:
    """All facts by the package."""
    # What a random model completes is none of its facts.
    return trace(case.model, case.tokenizer, case.facts, SETTINGS, known_only=False)


def plain(case: Case, deviation: float) -> list[Any]:
    """All facts by the definition's loop, with the same noise."""
    adapter = ModelAdapter.of(case.model)
    layers = range(adapter.layer_count)
    modules: dict[Kind, list[nn.Module]] = {
        "hidden": [adapter.block(layer) for layer in layers],
        "mlp": [adapter.down_projection(layer) for layer in layers],
        "attention": [adapter.attention(layer) for layer in layers],
    }
    found = []
    for row in rows_of(case.tokenizer, case.facts):
        noise = noise_of(
            row,
            SETTINGS.samples,
            SETTINGS.noise * deviation,
            SETTINGS.seed,
            adapter.config.hidden_size,
        )
        window = SETTINGS.window_of(len(layers))
        found.append(
            plain_trace(
                case.model, row.ids, row.prompt, row.answer, noise, modules, window
            )
        )
    return found


def difference(traces: Traces, loops: Sequence[Any]) -> float:
    """The largest of any probability."""
    worst = 0.0
    for mine, (clean, corrupted, restored) in zip(traces.traces, loops, strict=True):
        worst = max(worst, abs(mine.clean - clean), abs(mine.corrupted - corrupted))
        for kind, table in restored.items():
            worst = max(worst, float((mine.restored[kind] - table).abs().max()))
    return worst


def counted(work: Callable[[], T]) -> tuple[float, T]:
    """FLOPs of matrix products, in billions, and what `work` returned."""
    with FlopCounterMode(display=False) as counter:
        found = work()
    return counter.get_total_flops() / 1e9, found


def measure(case: Case, rounds: int) -> dict[str, float]:
    """Figures of one case."""
    case.model.requires_grad_(False)
    # Also a warm-up, for counting takes time.
    gflops, first = counted(lambda: ours(case))
    plain_gflops, loops = counted(lambda: plain(case, first.deviation))
    mine, loop = [], []
    for _ in range(case.rounds or rounds):
        mine.append(timed(lambda: ours(case), "cpu")[0])
        loop.append(timed(lambda: plain(case, first.deviation), "cpu")[0])
    states = sum(t.numel() for each in first.traces for t in each.restored.values())
    return {
        "facts": len(case.facts),
        "states": states,
        "seconds": statistics.median(mine),
        "plain_seconds": statistics.median(loop),
        "ratio": statistics.median(loop) / statistics.median(mine),
        "gflops": gflops,
        "plain_gflops": plain_gflops,
        "flops_ratio": plain_gflops / gflops,
        "max_difference": difference(first, loops),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    console = Console(stderr=arguments.json)
    cases = {}
    for name in arguments.cases:
        cases[name] = measure(CASES[name](), arguments.rounds)
        console.print(figures_table(name, cases[name]))
    answer = {
        "ratio": min(each["ratio"] for each in cases.values()),
        "max_difference": max(each["max_difference"] for each in cases.values()),
        "cases": cases,
        "machine": machine(),
        "versions": versions(),
    }
    console.print(f"ratio {answer['ratio']:.2f}")
    if arguments.json:
        print_json(answer)


if __name__ == "__main__":
    main()
