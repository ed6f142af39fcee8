"""Rounding towards the edits' keys against rounding to nearest, in half precision.

    python benchmarks/rounding.py [--json] [--edits 50] [--cases …]

Each case has weights W in bfloat16 or float16, an update ΔW with its keys, and the
second moment of other keys. For E = W' − (W + ΔW), the error of rounding alone:

- key error: rms over the edits of ‖E k‖; its gain is nearest over towards keys (also
  of the worst edit);
- damage: tr(E C Eᵀ), towards keys over nearest (`preservation_ratio`), and of the whole
  change, tr((ΔW + E) C (ΔW + E)ᵀ) (`total_damage_ratio`).

Cases are the embedded models' edited weights with a batch of real edits, C their
statistics', and random weights of 4096 × 14336 with keys like an MLP's. In the answer
`key_error_gain` is the smallest of all cases, `preservation_ratio` the largest.
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
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.report import machine, print_json, versions
from unified_edit.algebra.addition import Rounding, added
from unified_edit.algebra.update import RankKUpdate
from unified_edit.demo import FAMILIES, load, world_statistics
from unified_edit.engine import edit
from unified_edit.evaluate.world import World
from unified_edit.model.adapter import ModelAdapter
from unified_edit.recipes import matching_preset, recipe

WORLD = Path(__file__).parents[1] / "examples" / "tinyworld"
METHODS = ("memit", "emmet")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
RANDOM = (100, 300, 1000)
"""Keys of the random cases."""
ROWS, D_KEY = 4096, 14336
BACKGROUND = 4000
"""Other keys of the random cases."""


@dataclass(frozen=True)
class Figures:
    """One case."""

    case: str
    dtype: str
    edits: int
    d_key: int
    key_error_gain: float
    worst_key_error_gain: float
    key_error: float
    """rms of ‖E k‖ / rms of ‖ΔW k‖, towards keys."""
    preservation_ratio: float
    total_damage_ratio: float
    seconds_nearest: float
    seconds_keys: float


@dataclass(frozen=True)
class Case:
    """What is rounded, and keys whose values should stay."""

    name: str
    weight: Tensor
    """[d_value, d_key] in float32."""
    update: RankKUpdate
    root: Tensor
    """[m, d_key] with C = rootᵀ root."""


def measure(case: Case, dtype: str) -> Figures:
    """Both ways of rounding, on the same sum."""
    weight = case.weight.to(DTYPES[dtype])
    change = case.update.dense()
    exact = weight.float() + change
    keys = case.update.keys
    assert keys is not None
    errors, damages, totals, seconds = {}, {}, {}, {}
    roundings: tuple[Rounding, ...] = ("nearest", "keys")
    for rounding in roundings:
        begun = time.perf_counter()
        after = added(weight, case.update, transposed=False, rounding=rounding)
        seconds[rounding] = time.perf_counter() - begun
        error = after.float() - exact
        errors[rounding] = (error @ keys.T).double().norm(dim=0)
        spread = error @ case.root.T
        damages[rounding] = float(spread.double().square().sum())
        totals[rounding] = float(
            (spread + change @ case.root.T).double().square().sum()
        )
    meant = (change @ keys.T).double().norm()
    return Figures(
        case=case.name,
        dtype=dtype,
        edits=len(keys),
        d_key=keys.shape[1],
        key_error_gain=float(errors["nearest"].norm() / errors["keys"].norm()),
        worst_key_error_gain=float(errors["nearest"].max() / errors["keys"].max()),
        key_error=float(errors["keys"].norm() / meant),
        preservation_ratio=damages["keys"] / damages["nearest"],
        total_damage_ratio=totals["keys"] / totals["nearest"],
        seconds_nearest=seconds["nearest"],
        seconds_keys=seconds["keys"],
    )


def embedded(family: str, edits: int) -> Iterator[Case]:
    """A batch of edits on an embedded model, by each method and layer."""
    world = World.load(WORLD / "data")
    model, tokenizer = load(WORLD / family)
    preset = matching_preset(model.config)
    assert preset is not None
    statistics = world_statistics(model, tokenizer, world, preset, progress=False)
    adapter = ModelAdapter.of(model)
    wanted = [record.edit for record in world.records[:edits]]
    for method in METHODS:
        chosen = recipe(method, preset)
        result = edit(model, tokenizer, wanted, chosen, statistics)
        for layer in chosen.layers:
            second_moment = statistics[layer].regularized().double()
            root = torch.linalg.cholesky(second_moment).T.float().contiguous()
            update = result.update.updates[adapter.address(layer)]
            name = f"{family} {method} layer {layer}"
            yield Case(name, adapter.matrix(layer).float(), update, root)


def random_case(count: int) -> Case:
    """Weights of a published size; keys as a GELU over mixed features gives them."""
    generator = torch.Generator().manual_seed(count)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    features = 2048
    mixing = normal(features, D_KEY) / features**0.5
    scales = torch.logspace(0.5, -0.5, features)

    def keys(number: int) -> Tensor:
        return torch.nn.functional.gelu((normal(number, features) * scales) @ mixing)

    mine = keys(count)
    gram = mine @ mine.T
    gram.diagonal().add_(float(gram.diagonal().mean()) * 0.1)
    right = torch.linalg.solve(gram, mine)
    left = normal(ROWS, count) * 0.2
    weight = normal(ROWS, D_KEY) * 0.02
    root = keys(BACKGROUND) / BACKGROUND**0.5
    name = f"random {ROWS} × {D_KEY}"
    return Case(name, weight, RankKUpdate(left, right, mine), root)


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--cases", nargs="*", default=[*FAMILIES, "random"])
    arguments = parser.parse_args()
    console = Console(stderr=arguments.json)
    found = []

    def cases() -> Iterator[Case]:
        for family in FAMILIES:
            if family in arguments.cases:
                yield from embedded(family, arguments.edits)
        for count in RANDOM if "random" in arguments.cases else ():
            yield random_case(count)

    table = Table("case", "dtype", "edits", "gain", "worst", "damage", "total", "s")
    for case in cases():
        for dtype in DTYPES:
            one = measure(case, dtype)
            found.append(one)
            table.add_row(
                one.case,
                dtype,
                str(one.edits),
                f"{one.key_error_gain:.1f}",
                f"{one.worst_key_error_gain:.1f}",
                f"{one.preservation_ratio:.3f}",
                f"{one.total_damage_ratio:.4f}",
                f"{one.seconds_keys:.1f}",
            )
    console.print(table)
    if arguments.json:
        print_json(
            {
                "key_error_gain": min(each.key_error_gain for each in found),
                "preservation_ratio": max(each.preservation_ratio for each in found),
                "total_damage_ratio": max(each.total_damage_ratio for each in found),
                "cases": [asdict(each) for each in found],
                "machine": machine(),
                "versions": versions(),
            }
        )


if __name__ == "__main__":
    main()
