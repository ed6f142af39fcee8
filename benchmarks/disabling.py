"""Edits that wreck a model alone: what the guard knows of them before they are written.

    python benchmarks/disabling.py [--json] [--family gpt2] [--names 100] [--facts 50]

Edits of two kinds, each alone on the unedited model, by ROME's published code with its
own contexts: about names of one word that begin their prompt, and about the world's own
subjects. For each: how far its two keys agree (the denominator of the published code,
as a cosine), the predicted damage to preserved keys, and what the edit does to
perplexity on held-out text and to facts about other subjects. An edit wrecks the model
if a tenth of those facts is lost or perplexity rises by a tenth. Printed are how many
do, how many the default limit of `damage` refuses, and both kinds of error; the same
for one key (`rome`), whose denominator is positive.
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
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.report import machine, print_json, versions
from unified_edit.demo import load, world_statistics
from unified_edit.edits import Record
from unified_edit.engine import edit
from unified_edit.evaluate.stream import world_stream
from unified_edit.evaluate.world import World
from unified_edit.guard import Guard
from unified_edit.live import applied
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.keys import keys_at_subjects
from unified_edit.model.perplexity import Canary
from unified_edit.model.prompts import generate_contexts
from unified_edit.model.targets import optimize_targets
from unified_edit.preparation import prepare
from unified_edit.presets import ROME_CONTEXTS
from unified_edit.recipes import matching_preset, recipe

WORLD = Path(__file__).parents[1] / "examples" / "tinyworld"
LOST = 0.1
"""Share of other facts, or of perplexity, whose loss wrecks a model."""
ASKED = 120
"""Facts about other subjects that are asked after each edit."""


def chosen_records(world: World, names: int, facts: int) -> tuple[list[Record], Any]:
    """Records about names of one word, then about the world's subjects; and probes."""
    stream = world_stream(world, 2 * names, one_word_every=2)
    words = [r for r in stream.records if " " not in r.edit.subject]
    unique = {record.edit.subject: record for record in words}
    others = [r for r in stream.records if " " in r.edit.subject][:facts]
    return [*unique.values(), *others], stream


def measure(family: str, method: str, names: int, facts: int) -> list[dict[str, Any]]:
    """One row for each edit."""
    world = World.load(WORLD / "data")
    model, tokenizer = load(WORLD / family)
    preset = matching_preset(model.config)
    assert preset is not None
    records, stream = chosen_records(world, names, facts)
    edits = [record.edit for record in records]
    statistics = world_statistics(model, tokenizer, world, preset, progress=False)
    chosen = recipe(method, preset, contexts=ROME_CONTEXTS)
    (layer,) = chosen.layers
    adapter = ModelAdapter.of(model)
    contexts = generate_contexts(adapter, tokenizer, chosen.contexts, 0)
    prepared = prepare(chosen, statistics)
    whitened = [
        prepared.layers[layer].factorization.whiten(
            keys_at_subjects(adapter, tokenizer, edits, contexts, layer, average)
        )
        for average in ("flat", "clean")
    ]
    lengths = [rows.norm(dim=1) for rows in whitened]
    cosines = (whitened[0] * whitened[1]).sum(1) / (lengths[0] * lengths[1])
    targets = optimize_targets(
        adapter, tokenizer, edits, contexts, layer, chosen.targets, progress=True
    )
    canary = Canary.of(tokenizer, stream.texts)
    before = canary.perplexity(adapter)
    step = max(1, len(stream.probes.unrelated) // ASKED)
    asked = stream.probes.unrelated[::step]
    known = world.retention(model, tokenizer, asked)
    rows = []
    for index, record in enumerate(tqdm(records, desc=method)):
        result = edit(
            model,
            tokenizer,
            [record.edit],
            chosen,
            statistics,
            contexts=contexts,
            targets=targets.select(index),
            prepared=prepared,
        )
        certificate = result.report.certificates[layer]
        with applied(model, result.update):
            perplexity = canary.perplexity(adapter) / before
            kept = world.retention(model, tokenizer, asked) / known
        rows.append(
            {
                "subject": record.edit.subject,
                "one_word": " " not in record.edit.subject,
                "cosine": float(cosines[index]),
                "damage": certificate.preservation_damage,
                "relative_norm": certificate.relative_norm,
                "perplexity": perplexity,
                "kept": kept,
                "says_target": result.report.outcomes[0].says_target,
                "wrecks": perplexity > 1 + LOST or kept < 1 - LOST,
            }
        )
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of one method's edits."""
    limit = Guard().damage
    assert limit is not None
    wrecking = [row for row in rows if row["wrecks"]]
    harmless = [row for row in rows if not row["wrecks"]]
    refused = [row for row in rows if row["damage"] > limit]
    near_zero = [row for row in rows if abs(row["cosine"]) < 0.05]
    return {
        "edits": len(rows),
        "one_word": sum(row["one_word"] for row in rows),
        "wrecking": len(wrecking),
        "refused": len(refused),
        "wrecking_refused": sum(row["wrecks"] for row in refused),
        "harmless_refused": sum(not row["wrecks"] for row in refused),
        "near_zero_denominators": len(near_zero),
        "near_zero_that_wreck": sum(row["wrecks"] for row in near_zero),
        "least_damage_that_wrecks": min((r["damage"] for r in wrecking), default=None),
        "largest_harmless_damage": max((r["damage"] for r in harmless), default=None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--family", default="gpt2")
    parser.add_argument("--names", type=int, default=100)
    parser.add_argument("--facts", type=int, default=50)
    arguments = parser.parse_args()
    console = Console(stderr=arguments.json, width=120)
    begun = time.perf_counter()
    answer: dict[str, Any] = {}
    for method in ("rome_original", "rome"):
        rows = measure(arguments.family, method, arguments.names, arguments.facts)
        answer[method] = {**summary(rows), "rows": rows}
        table = Table(title=f"{arguments.family}, {method}", show_header=False)
        for name, value in summary(rows).items():
            table.add_row(
                name.replace("_", " "), "–" if value is None else f"{value:.4g}"
            )
        console.print(table)
    answer |= {
        "limit": Guard().damage,
        "seconds": time.perf_counter() - begun,
        "machine": machine(),
        "versions": versions(),
    }
    if arguments.json:
        print_json(answer)


if __name__ == "__main__":
    main()
