"""Which layer and which bound fine-tuning needs on the embedded models.

    python benchmarks/fine_tuning.py [--json] [--family gpt2] [--records 25]

Tries FT, FT-L and LoRA on records 200 to 249 of the world (every other one by default),
apart from those that benchmarks/compare.py judges on, one edit at a time. Prints S and
its parts for each choice and, as `best_{method}`, the choice of the largest S among
those that take nineteen of twenty edits, or among all if none does.
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
from contextlib import nullcontext
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.compare import METRICS, WORLD, tuner
from benchmarks.report import machine, print_json, versions
from unified_edit import Record, applied, evaluate_counterfact
from unified_edit.demo import load
from unified_edit.evaluate.counterfact import CounterFactScores
from unified_edit.evaluate.world import World

FROM = 200
BOUNDS = (1e-3, 2e-3, 3e-3, 5e-3)
RATES = (5e-4, 1e-3, 5e-3)
TAKEN = 0.95


def choices(layers: int) -> list[tuple[str, tuple[int, ...], dict[str, Any]]]:
    """Method, layers, settings."""
    everywhere = tuple(range(layers))
    return [
        *(("ft", (layer,), {}) for layer in everywhere),
        *(
            ("ft_l", (layer,), {"norm_constraint": bound})
            for layer in everywhere
            for bound in BOUNDS
        ),
        *(("lora", everywhere, {"learning_rate": rate}) for rate in RATES),
    ]


def judged(
    model: Any, tokenizer: Any, records: Sequence[Record], compute: Any
) -> dict[str, float]:
    """S and its parts, and seconds an edit."""
    scores = []
    begun = time.perf_counter()
    for record in records:
        update = compute([record.edit]).update
        with applied(model, update) if len(update) else nullcontext():
            scores += evaluate_counterfact(
                model, tokenizer, [record], generations=False
            ).records
    seconds = (time.perf_counter() - begun) / len(records)
    found = CounterFactScores(tuple(scores)).as_dict()
    return {name: found[name] for name in METRICS} | {"seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--family", default="gpt2")
    parser.add_argument("--records", type=int, default=25)
    arguments = parser.parse_args()
    console = Console(stderr=arguments.json)
    world = World.load(WORLD / "data")
    model, tokenizer = load(WORLD / arguments.family)
    kept = world.records[FROM:]
    records = kept[:: max(1, len(kept) // arguments.records)][: arguments.records]
    table = Table(title=f"{arguments.family}, {len(records)} single edits")
    for column in ("method", "layers", "settings", *METRICS, "seconds"):
        table.add_column(column, justify="right")
    rows = []
    for method, layers, changes in choices(model.config.num_hidden_layers):
        compute = tuner(model, tokenizer, method, layers, changes)
        found = judged(model, tokenizer, records, compute)
        rows.append({"method": method, "layers": layers, "settings": changes, **found})
        said = ", ".join(f"{name} {value:g}" for name, value in changes.items())
        table.add_row(
            method,
            ",".join(map(str, layers)),
            said,
            *(f"{found[name]:.3f}" for name in (*METRICS, "seconds")),
        )
    console.print(table)
    best = {
        f"best_{method}": max(
            (row for row in rows if row["method"] == method),
            key=lambda row: (row["es"] >= TAKEN, row["s"]),
        )
        for method in ("ft", "ft_l", "lora")
    }
    if arguments.json:
        print_json({**best, "rows": rows, "machine": machine(), "versions": versions()})


if __name__ == "__main__":
    main()
