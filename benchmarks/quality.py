"""What every recipe does to the two embedded models: one edit at a time, and a batch.

    python benchmarks/quality.py [--json] [--singles 200] [--batch 50]

Prints a table for each model, or with `--json` one object with the keys
`{gpt2|llama}_{single|batch50}_{recipe}_{es|ps|ns|s|…}`, `{gpt2|llama}_recall` and
`{gpt2|llama}_skills`. Singles are 200 different records, each on the unedited model;
the batch is the first 50 records at once.
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

from rich.console import Console
from rich.table import Table

from benchmarks.report import machine, print_json, versions
from unified_edit.demo import FAMILIES, METHODS, load, world_statistics
from unified_edit.evaluate.trial import Trials
from unified_edit.evaluate.world import World
from unified_edit.recipes import matching_preset, recipe

WORLD = Path(__file__).parents[1] / "examples" / "tinyworld"
COLUMNS = (
    "s es ps ns rewrite_generation paraphrase_generation same_subject unrelated "
    "unrelated_before seconds_per_edit relative_norm"
).split()


def measure(
    family: str, methods: list[str], singles: int, batch: int, console: Console
) -> dict[str, float]:
    """Figures of one model, by key; prints its tables."""
    world = World.load(WORLD / "data")
    model, tokenizer = load(WORLD / family)
    preset = matching_preset(model.config)
    assert preset is not None
    statistics = world_statistics(model, tokenizer, world, preset, progress=False)
    trials = Trials(model, tokenizer, world, statistics, progress=True)
    skills = world.skill_scores(model, tokenizer)
    found = {
        f"{family}_recall": world.recall(model, tokenizer),
        f"{family}_skills": min(skills.values()),
    }
    console.print({**found, "skills": skills})
    for kind, count in (("single", singles), (f"batch{batch}", batch)):
        if not count:
            continue
        table = Table(title=f"{family}, {kind}")
        for name in ("recipe", *COLUMNS):
            table.add_column(name.replace("_", " "), justify="right")
        for method in methods:
            chosen = recipe(method, preset)
            records = world.records[:count]
            if kind == "single":
                trial = trials.singles(records, chosen)
            else:
                trial, _ = trials.batch(records, chosen)
            row = trial.row()
            found |= {f"{family}_{kind}_{method}_{k}": v for k, v in row.items()}
            table.add_row(method, *(f"{row[name]:.3f}" for name in COLUMNS))
        console.print(table)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--singles", type=int, default=200)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    arguments = parser.parse_args()
    console = Console(stderr=arguments.json, width=160)
    begun = time.perf_counter()
    found: dict[str, float | str] = {}
    for family in arguments.families:
        found |= measure(
            family, arguments.methods, arguments.singles, arguments.batch, console
        )
    found |= {
        "seconds": time.perf_counter() - begun,
        "machine": machine(),
        "versions": versions(),
    }
    if arguments.json:
        print_json(found)


if __name__ == "__main__":
    main()
