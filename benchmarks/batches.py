"""Batch sizes: EMMET's equality against MEMIT's least squares, and EMMET as published.

    python benchmarks/batches.py [--json] [--family gpt2] [--sizes 1 4 16 64 256 1024]

Each size is tried on batches of its own (24 of one edit, 12 of four, 6 of sixteen, 3 of
64, one of each larger size) from the world's stream, every batch on the unedited model;
figures are means over its records. Recipes: `emmet`; `memit` as tuned, on two
layers; `memit, one layer`, on EMMET's layer with EMMET's targets. The last, at
λ = w·λ_D, is what EMMET's published code makes of λ_D on the n × n matrix and C scaled
by w, which is written out densely here and compared. A batch that equality cannot hold
for, because two edits share a key, is counted as refused.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Run as a script: this folder, which comes first, would hide the standard
    # library's `statistics` behind the script of that name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.report import machine, print_json, versions
from unified_edit.demo import load, world_statistics
from unified_edit.edits import Record
from unified_edit.engine import EditResult
from unified_edit.errors import InfeasibleEdits
from unified_edit.evaluate.counterfact import CounterFactScores
from unified_edit.evaluate.stream import world_stream
from unified_edit.evaluate.trial import Trial, Trials
from unified_edit.evaluate.world import World
from unified_edit.recipes import Recipe, matching_preset, recipe

WORLD = Path(__file__).parents[1] / "examples" / "tinyworld"
COUNTS = {1: 24, 4: 12, 16: 6, 64: 3}
"""Batches of a size; one of any other."""
W, LAMBDA_D = 200.0, 0.1
"""EMMET's published w and λ_D: here w·λ_D is the preset's λ of MEMIT."""
SHOWN = (
    "s es ps ns rewrite_accuracy same_subject unrelated skills relative_norm"
).split()


def batches(records: Sequence[Record], size: int) -> list[Sequence[Record]]:
    """Disjoint ones, from the stream's begin."""
    count = COUNTS.get(size, 1)
    return [records[i * size : (i + 1) * size] for i in range(count)]


def published_difference(
    result: EditResult, trials: Trials, chosen: Recipe
) -> tuple[float, float]:
    """How far our update with λ = w·λ_D is from EMMET's published formula, for the same
    keys and residuals, relatively; and the largest residual error of `emmet`, from
    whose update the residuals are taken."""
    (layer,) = chosen.layers
    ((_, update),) = result.update
    assert update.keys is not None
    keys = update.keys.double()
    residuals = (keys @ update.right.double().T) @ update.left.double().T
    moment = trials.statistics[layer].second_moment.double()
    from unified_edit.algebra.solve import solve

    found = solve(chosen.objective(moment), keys=keys, residuals=residuals)
    expected = published(keys.T, residuals.T, moment)
    difference = (found.update.dense() - expected).norm() / expected.norm()
    worst = result.report.certificates[layer].worst_residual_error
    return float(difference), worst


def published(keys: Tensor, residuals: Tensor, moment: Tensor) -> Tensor:
    """R (D + λ_D I)⁻¹ Kᵀ (wC)⁻¹ with D = Kᵀ (wC)⁻¹ K; samples are columns."""
    inverse = torch.linalg.inv(W * moment)
    system = keys.T @ inverse @ keys
    system = system + LAMBDA_D * torch.eye(len(system)).double()
    return residuals @ torch.linalg.inv(system) @ keys.T @ inverse


def mean_row(trials: Sequence[Trial]) -> dict[str, float]:
    """Scores over all records of a size's batches, means of the rest."""
    scores = CounterFactScores(tuple(r for t in trials for r in t.scores.records))
    rows = [trial.row() for trial in trials]
    others = {
        name: sum(row[name] for row in rows) / len(rows)
        for name in rows[0]
        if name not in scores.as_dict()
    }
    intervals = {
        f"{name}_{side}": value
        for name in ("s", "es", "ps", "ns")
        for each in (scores.intervals()[name],)
        for side, value in (("low", each.low), ("high", each.high))
    }
    return {**scores.as_dict(), **intervals, **others}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--family", default="gpt2")
    parser.add_argument("--sizes", type=int, nargs="+")
    arguments = parser.parse_args()
    sizes = arguments.sizes or [1, 4, 16, 64, 256, 1024]
    console = Console(stderr=arguments.json, width=140)
    begun = time.perf_counter()
    world = World.load(WORLD / "data")
    model, tokenizer = load(WORLD / arguments.family)
    preset = matching_preset(model.config)
    assert preset is not None
    statistics = world_statistics(model, tokenizer, world, preset, progress=False)
    trials = Trials(model, tokenizer, world, statistics)
    soft = {"memorization": "least_squares", "preservation_weight": W * LAMBDA_D}
    recipes = {
        "emmet": recipe("emmet", preset),
        "memit": recipe("memit", preset),
        "memit, one layer": recipe("emmet", preset, **soft),
    }
    stream = world_stream(world, max(sizes))
    records = stream.records
    held_out = [f for f in world.facts if f[0] not in stream.probes.same_subject]
    answer: dict[str, Any] = {"refused": {}}
    differences = []
    for size in sizes:
        table = Table(title=f"{arguments.family}, batches of {size}")
        for name in ("recipe", *SHOWN):
            table.add_column(name.replace("_", " "), justify="right")
        for name, chosen in recipes.items():
            done: list[Trial] = []
            refused = 0
            for batch in batches(records, size):
                # Of other subjects, those that are never edited are asked.
                subjects = {record.edit.subject for record in batch}
                about = [fact for fact in world.facts if fact[0] in subjects]
                trials.world = replace(world, facts=(*held_out, *about))
                try:
                    trial, result = trials.batch(batch, chosen)
                except InfeasibleEdits:
                    refused += 1
                    continue
                done.append(trial)
                if name == "emmet":
                    differences.append(
                        published_difference(
                            result, trials, recipes["memit, one layer"]
                        )
                    )
            trials.forget()
            key = f"{name}_{size}".replace(", ", "_").replace(" ", "_")
            answer["refused"][key] = refused
            if not done:
                table.add_row(name, f"refused: {refused}")
                continue
            row = mean_row(done)
            answer |= {f"{key}_{metric}": value for metric, value in row.items()}
            table.add_row(name, *(f"{row[metric]:.3f}" for metric in SHOWN))
        console.print(table)
    answer |= {
        "published_emmet_difference": max(d for d, _ in differences),
        "worst_residual_error": max(e for _, e in differences),
        "seconds": time.perf_counter() - begun,
        "machine": machine(),
        "versions": versions(),
    }
    console.print(
        "EMMET's published code against MEMIT at λ = w·λ_D, largest relative "
        f"difference: {answer['published_emmet_difference']:.2g}"
    )
    if arguments.json:
        print_json(answer)


if __name__ == "__main__":
    main()
