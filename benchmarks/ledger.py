"""What a ledger saves: adding many edits, and rebuilding the checkpoint without one.

    python benchmarks/ledger.py [--json] [--edits 1000] [--family gpt2] [--recipe memit]

On the embedded world's model; by default by `memit`, whose least squares take any
number of edits. Each edit gives another fact of the world a new object, so that no two
contradict each other. `add_seconds` is what optimising all targets took;
`rebuild_seconds` what it took to read the ledger without one edit, solve for the others
and bring the checkpoint to them. `identical` says that this update and this checkpoint
are, byte for byte, those of a fresh ledger that holds only the others' kept values,
joined in another order; the exit code is 1 if they are not. `others_said` is the share
of the other new facts that this checkpoint says: a thousand are more than so small a
model can be given, several of them about one subject and with one key.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Run as a script: this folder, which comes first, would hide the standard
    # library's `statistics` behind the script of that name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import hashlib
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from benchmarks.report import figures_table, machine, print_json, timed, versions
from unified_edit.demo import FAMILIES, load, world_statistics
from unified_edit.edits import Edit
from unified_edit.engine import EditResult
from unified_edit.evaluate.world import World
from unified_edit.ledger import Ledger
from unified_edit.ledger_rebuild import rebuild
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.scoring import score
from unified_edit.recipes import RECIPES, Recipe, matching_preset, recipe

WORLD = Path(__file__).parents[1] / "examples" / "tinyworld"
SEED = 0


def chosen_facts(world: World, count: int) -> dict[Edit, str]:
    """Edits of different facts, each to another object of its relation, with what the
    fact was."""
    if not 2 <= count <= len(world.facts):
        raise SystemExit(f"--edits must be 2 to {len(world.facts)}, the world's facts")
    objects: dict[str, list[str]] = {}
    for _, relation, answer in world.facts:
        known = objects.setdefault(relation, [])
        if answer not in known:
            known.append(answer)
    pick = random.Random(SEED)
    edits = {}
    for subject, relation, answer in pick.sample(world.facts, count):
        others = [each for each in objects[relation] if each != answer]
        prompt = world.templates[relation][0]
        edits[Edit(prompt, subject, pick.choice(others))] = answer
    return edits


@dataclass(frozen=True)
class Bench:
    """The model with what editing it needs."""

    base: Path
    model: Any
    tokenizer: Any
    statistics: dict[int, Any]
    recipe: Recipe

    @classmethod
    def of(cls, base: Path, world: World, method: str) -> Bench:
        model, tokenizer = load(base)
        preset = matching_preset(model.config)
        assert preset is not None
        statistics = world_statistics(model, tokenizer, world, preset, progress=False)
        return cls(base, model, tokenizer, statistics, recipe(method, preset))

    def begin(self, path: Path) -> Ledger:
        return Ledger.create(
            path,
            self.model,
            self.tokenizer,
            self.recipe,
            self.statistics,
            base=str(self.base),
            statistics_folder="in memory",
            seed=SEED,
        )

    def solve(self, ledger: Ledger) -> EditResult:
        return ledger.solve(self.model, self.tokenizer, self.statistics)

    def says(self, folder: Path, pairs: Sequence[tuple[str, str]]) -> float:
        """Share of continuations that the checkpoint says greedily."""
        adapter = ModelAdapter.of(load(folder)[0])
        texts, targets = zip(*pairs, strict=True)
        found = score(adapter, self.tokenizer, texts, targets)
        return sum(each.argmax for each in found) / len(found)


def measure(family: str, method: str, count: int, folder: Path) -> dict[str, Any]:
    """Figures of one model. `folder` is for the ledgers and checkpoints."""
    world = World.load(WORLD / "data")
    bench = Bench.of(WORLD / family, world, method)
    facts = chosen_facts(world, count)
    edits, out = list(facts), folder / "checkpoint"

    empty = bench.begin(folder / "ledger.json")
    add_seconds, full = timed(
        lambda: empty.add(bench.model, bench.tokenizer, edits), "cpu"
    )
    first_seconds, _ = timed(
        lambda: rebuild(full, bench.solve(full).update, bench.base, out), "cpu"
    )

    struck = full.entries[count // 2]
    remove_seconds, _ = timed(lambda: full.remove([struck.id]), "cpu")
    read_seconds, rest = timed(lambda: Ledger.read(full.path), "cpu")
    solve_seconds, result = timed(lambda: bench.solve(rest), "cpu")
    patch_seconds, _ = timed(
        lambda: rebuild(rest, result.update, bench.base, out), "cpu"
    )
    rebuild_seconds = read_seconds + solve_seconds + patch_seconds

    kept = {entry.edit: rest.packed_values(entry) for entry in rest.entries}
    order = random.Random(SEED + 1).sample(list(kept), len(kept))
    alone = bench.begin(folder / "alone.json").join(
        {edit: kept[edit] for edit in order}
    )
    expected = bench.solve(alone).update
    rebuild(alone, expected, bench.base, folder / "alone")
    identical = (
        b"".join(result.update.parts()) == b"".join(expected.parts())
        and hashes(out) == hashes(folder / "alone")
        and rest.digest == alone.digest
    )
    others = [(entry.edit.text, entry.edit.target) for entry in rest.entries]
    old = (struck.edit.text, facts[struck.edit])
    figures = {
        "edits": count,
        "family": family,
        "recipe": method,
        "identical": identical,
        "rebuild_seconds": rebuild_seconds,
        "add_seconds": add_seconds,
        "add_over_rebuild": add_seconds / rebuild_seconds,
        "read_seconds": read_seconds,
        "solve_seconds": solve_seconds,
        "patch_seconds": patch_seconds,
        "remove_seconds": remove_seconds,
        "first_rebuild_seconds": first_seconds,
        "others_said": bench.says(out, others),
        "struck_fact_said_as_before": bench.says(out, [old]) == 1.0,
    }
    add_one_seconds, _ = timed(
        lambda: rest.add(bench.model, bench.tokenizer, [struck.edit]), "cpu"
    )
    files = [path.stat().st_size for path in rest.values.iterdir()]
    return {
        **figures,
        "add_one_seconds": add_one_seconds,
        "ledger_bytes": full.path.stat().st_size,
        "values_bytes": sum(files),
    }


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--family", choices=FAMILIES, default="gpt2")
    parser.add_argument("--recipe", choices=list(RECIPES), default="memit")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(
            arguments.family, arguments.recipe, arguments.edits, Path(folder)
        )
    found |= {"machine": machine(), "versions": versions()}
    if arguments.json:
        print_json(found)
    else:
        numbers = {k: v for k, v in found.items() if not isinstance(v, (bool, str))}
        title = f"{arguments.family}, {arguments.recipe}, {arguments.edits} edits"
        console = Console()
        console.print(figures_table(title, numbers))
        # As JSON has them.
        console.print(f"identical: {str(found['identical']).lower()}")
        console.print(f"{found['machine']}; {found['versions']}")
    if not found["identical"]:
        raise SystemExit("error: the other edits alone give other bytes")


if __name__ == "__main__":
    main()
