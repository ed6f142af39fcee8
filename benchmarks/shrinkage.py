"""Does shrinking C let fewer tokens suffice?

    python benchmarks/shrinkage.py [--json] [--plot FILE] [--from RESULTS] [--full]

Edits the two embedded models with C collected from 0.5 to 100 tokens for each dimension
of a key, used as it is and shrunk: 50 records at once by EMMET, MEMIT and AlphaEdit, 20
single ones by ROME. Targets and contexts are made once for all C. Beside S the table
shows the damage to background values, tr(ΔW C ΔWᵀ) / tr(W C Wᵀ), by three C:

held-out: of a text that no C was collected from (`data/corpus.txt`, 139,000 tokens).
collected: of the very text that this C was collected from, without shrinkage. What it
falls short of held-out is overfitting.
certified: what the certificate says, which is by this C, shrunk.

A figure of several layers is the worst of theirs. Texts to collect from are drawn from
the world's generator, each with a seed of its own: they are independent of one another
and of the held-out one, and 100 tokens a dimension can be had. A larger budget reads on
in the same text. Up to 2 tokens a dimension EMMET and MEMIT are tried with three texts
(`--texts`), and the table has mean and range; all else with the first of them, and
AlphaEdit with `none` and `oas` only. `--full` tries everything with all texts.

With `--json` one object is printed: `cells`, one for each edit or row of single edits,
with its figures or the words in which it was `refused`. `--plot` draws them (needs
matplotlib), `--from` takes them from such a file instead of measuring.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Run as a script: this folder, which comes first, would hide the standard
    # library's `statistics` behind the script of that name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import importlib
import json
import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from rich.console import Console
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.report import machine, print_json, versions
from benchmarks.shrinkage_report import chosen_cells, distinct, draw, table
from covariance_cache import KeyStatistics, collect
from covariance_cache.errors import CorpusExhausted
from unified_edit.algebra.update import RankKUpdate
from unified_edit.demo import FAMILIES, load
from unified_edit.edits import Record
from unified_edit.engine import EditResult, edit
from unified_edit.errors import IllConditioned, UnifiedEditError
from unified_edit.evaluate.counterfact import CounterFactScores, evaluate_counterfact
from unified_edit.evaluate.world import World
from unified_edit.live import applied
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.descent import Targets
from unified_edit.model.prompts import Contexts, generate_contexts
from unified_edit.model.targets import optimize_targets
from unified_edit.preparation import prepare
from unified_edit.presets import PRESETS
from unified_edit.recipes import Recipe, matching_preset, recipe

WORLD = Path(__file__).resolve().parents[1] / "examples" / "tinyworld"
BUDGETS = (0.5, 1.0, 2.0, 5.0, 10.0, 100.0)
"""Tokens for each dimension of a key."""
SHRINKAGES = ("none", "ridge:0.001", "ridge:0.01", "oas")
FEW_SHRINKAGES = ("none", "oas")
"""For AlphaEdit, whose eigenvectors take long."""
WINDOW = 64
MANY_TEXTS = 2.0
"""Up to this budget there are several texts."""
FIRST_SEED = 1000
"""Of the texts; the world's own corpus is drawn with another."""
UNRELATED = 220
"""Facts about other subjects that are asked after a batch."""
FEW_UNRELATED = 10
"""The same after a single edit."""
SCORES = "s es ps ns em pm nm same_subject unrelated".split()
DAMAGES = "held_out_damage collected_damage certified_damage".split()
FIGURES = (*SCORES, *DAMAGES, "relative_norm", "relative_jitter")


@dataclass(frozen=True)
class Case:
    """A recipe and what it is tried on."""

    method: str
    count: int
    """Records."""
    single: bool = False
    """One at a time, each on the unedited model; else all at once."""

    @property
    def name(self) -> str:
        return f"{self.method} {'single' if self.single else 'batch'}{self.count}"

    def wants(self, shrinkage: str, text: int) -> bool:
        """Whether it is tried so by default."""
        if self.method in ("emmet", "memit"):
            return True
        return not text and (self.method != "alphaedit" or shrinkage in FEW_SHRINKAGES)


@dataclass(frozen=True)
class Measure:
    """A second moment to measure damage by."""

    moment: Tensor
    """C [d_key, d_key], float64."""
    unchanged: float
    """tr(W C Wᵀ)"""

    def damage(self, update: RankKUpdate) -> float:
        """tr(ΔW C ΔWᵀ) / tr(W C Wᵀ), from the factors."""
        left, right = update.left.double(), update.right.double()
        change = (left.T @ left) * (right @ self.moment @ right.T)
        return float(change.sum()) / self.unchanged


@dataclass
class Bench:
    """A model of the world and what is measured on it. Targets are made once for the
    recipes and statistics that share them."""

    model: nn.Module
    tokenizer: Any
    world: World
    _made: dict[Any, tuple[Contexts, Targets]] = field(default_factory=dict)

    @classmethod
    def of(cls, family: str) -> Bench:
        """Of an embedded model."""
        return cls(*load(WORLD / family), World.load(WORLD / "data"))

    @cached_property
    def preset(self) -> str:
        found = matching_preset(self.model.config)
        assert found is not None
        return found

    @cached_property
    def adapter(self) -> ModelAdapter:
        return ModelAdapter.of(self.model)

    @cached_property
    def layers(self) -> list[int]:
        """All that recipes edit."""
        settings = PRESETS[self.preset].settings.values()
        return sorted({layer for each in settings for layer in each["layers"]})

    @cached_property
    def d_key(self) -> int:
        return max(self.adapter.matrix(layer).shape[1] for layer in self.layers)

    @cached_property
    def held_out(self) -> dict[int, Measure]:
        """By C of the world's own corpus, all of it."""
        return self.measures(self.collect(self.world.corpus, None))

    def measures(self, statistics: Mapping[int, KeyStatistics]) -> dict[int, Measure]:
        """By C as it was collected, for each layer."""
        found = {}
        for layer, each in statistics.items():
            moment = each.second_moment.double()
            weight = self.adapter.matrix(layer).detach().double()
            found[layer] = Measure(moment, float(((weight @ moment) * weight).sum()))
        return found

    def collect(self, text: Any, tokens: int | None) -> dict[int, KeyStatistics]:
        """Key statistics of a text; of all of it, if no number of tokens is given."""
        with warnings.catch_warnings():
            warnings.simplefilter("error" if tokens else "ignore", CorpusExhausted)
            return collect(
                self.model,
                self.tokenizer,
                text,
                self.layers,
                tokens=tokens or 10**9,
                window=WINDOW,
                seed=None,
                probes=0,
                progress=False,
            )

    def cell(
        self,
        case: Case,
        statistics: Mapping[int, KeyStatistics],
        collected: Mapping[int, Measure],
        shrinkage: str,
    ) -> dict[str, Any]:
        """A case's figures, or why it was refused."""
        used = {layer: each.shrunk(shrinkage) for layer, each in statistics.items()}
        records = self.world.records[: case.count]
        chosen = recipe(case.method, self.preset)
        begun = time.perf_counter()
        try:
            updates = self._updates(case, records, chosen, used)
            tried = [
                self._measured(case, index, asked, result, collected)
                for index, (asked, result) in enumerate(updates)
            ]
        except UnifiedEditError as error:
            return {"refused": str(error)}
        scores = CounterFactScores(
            tuple(score for found, _ in tried for score in found.records)
        )
        figures = scores.as_dict()
        for name in tried[0][1]:
            figures[name] = sum(each[name] for _, each in tried) / len(tried)
        return {
            **{name: float(f"{figures[name]:.5g}") for name in FIGURES},
            "seconds": round(time.perf_counter() - begun, 1),
        }

    def _updates(
        self,
        case: Case,
        records: Sequence[Record],
        chosen: Recipe,
        used: Mapping[int, KeyStatistics],
    ) -> Iterator[tuple[Sequence[Record], EditResult]]:
        """Records, and the edit of them, which is not applied."""
        contexts, targets = self._targets(records, chosen)
        try:
            prepared = prepare(chosen, used)
        except IllConditioned:
            prepared = None  # `edit` may have another reason to refuse
        groups = [[each] for each in records] if case.single else [records]
        for index, group in enumerate(groups):
            yield (
                group,
                edit(
                    self.model,
                    self.tokenizer,
                    [record.edit for record in group],
                    chosen,
                    used,
                    contexts=contexts,
                    targets=targets.select(index) if case.single else targets,
                    prepared=prepared,
                ),
            )

    def _targets(
        self, records: Sequence[Record], chosen: Recipe
    ) -> tuple[Contexts, Targets]:
        key = (len(records), chosen.contexts, chosen.targets, chosen.layers[-1])
        if key not in self._made:
            contexts = generate_contexts(
                self.adapter, self.tokenizer, chosen.contexts, seed=0
            )
            self._made[key] = (
                contexts,
                optimize_targets(
                    self.adapter,
                    self.tokenizer,
                    [record.edit for record in records],
                    contexts,
                    chosen.layers[-1],
                    chosen.targets,
                ),
            )
        return self._made[key]

    def _measured(
        self,
        case: Case,
        index: int,
        records: Sequence[Record],
        result: EditResult,
        collected: Mapping[int, Measure],
    ) -> tuple[CounterFactScores, dict[str, float]]:
        certificates = result.report.certificates
        layers: list[dict[str, Any]] = [
            {
                "held_out_damage": self.held_out[at.layer].damage(update),
                "collected_damage": collected[at.layer].damage(update),
                "certified_damage": certificates[at.layer].preservation_damage,
                "relative_norm": certificates[at.layer].relative_norm,
                "relative_jitter": certificates[at.layer].relative_jitter,
            }
            for at, update in result.update
        ]
        others = self.world.unrelated(records)
        # Other facts after each single edit, so that together they are many.
        stride = len(others) // (FEW_UNRELATED if case.single else UNRELATED)
        with applied(self.model, result.update):
            scores = evaluate_counterfact(
                self.model, self.tokenizer, records, generations=False
            )
            said = {
                "same_subject": self._said(self.world.same_subject(records)),
                "unrelated": self._said(others[index % stride :: stride]),
            }
        worst = {name: max(each[name] for each in layers) for name in layers[0]}
        return scores, {**said, **worst}

    def _said(self, prompts: Sequence[tuple[str, str]]) -> float:
        return self.world.retention(self.model, self.tokenizer, prompts)


def generated_text(tokens: int, seed: int) -> list[str]:
    """Documents of the world, enough for so many tokens."""
    if str(WORLD) not in sys.path:
        sys.path.append(str(WORLD))
    generator = importlib.import_module("world")
    # A document has some 54 tokens.
    documents: list[str] = generator.corpus(generator.build(), 20 + tokens // 40, seed)
    return documents


def measure(
    family: str,
    cases: Sequence[Case],
    budgets: Sequence[float],
    shrinkages: Sequence[str],
    texts: int,
    full: bool,
) -> list[dict[str, Any]]:
    """Every cell of one model."""
    bench = Bench.of(family)
    plan = [
        (budget, text, case, shrinkage)
        for budget in budgets
        for text in range(texts if full or budget <= MANY_TEXTS else 1)
        for case in cases
        for shrinkage in shrinkages
        if full or case.wants(shrinkage, text)
    ]
    cells: list[dict[str, Any]] = []
    at = None
    for budget, text, case, shrinkage in tqdm(plan, desc=family):
        if at != (budget, text):
            at = (budget, text)
            tokens = round(budget * bench.d_key)
            seed = FIRST_SEED + text
            statistics = bench.collect(generated_text(tokens, seed), tokens)
            collected = bench.measures(statistics)
        place = {
            "model": family,
            "case": case.name,
            "tokens": tokens,
            "tokens_per_dimension": budget,
            "shrinkage": shrinkage,
            "text": text,
        }
        cells.append({**place, **bench.cell(case, statistics, collected, shrinkage)})
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--from", type=Path, dest="results", metavar="RESULTS")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--shrinkages", nargs="+", default=list(SHRINKAGES))
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--singles", type=int, default=20)
    arguments = parser.parse_args()
    console = Console(stderr=arguments.json, width=160)
    # Jitter is among the figures.
    logging.getLogger("unified_edit").setLevel(logging.ERROR)
    if arguments.results:
        answer = json.loads(arguments.results.read_text(encoding="utf-8"))
    else:
        begun = time.perf_counter()
        cases = [
            Case("emmet", arguments.batch),
            Case("memit", arguments.batch),
            Case("alphaedit", arguments.batch),
            Case("rome", arguments.singles, single=True),
        ]
        cases = [case for case in cases if case.count]
        found = [
            cell
            for family in arguments.families
            for cell in measure(
                family,
                cases,
                arguments.budgets,
                arguments.shrinkages,
                arguments.texts,
                arguments.full,
            )
        ]
        answer = {
            "command": " ".join(["python benchmarks/shrinkage.py", *sys.argv[1:]]),
            "seconds": time.perf_counter() - begun,
            "machine": machine(),
            "versions": versions(),
            "cells": found,
        }
    cells = answer["cells"]
    for family in distinct(cells, "model"):
        for case in distinct(chosen_cells(cells, model=family), "case"):
            console.print(table(cells, family, case))
    if arguments.plot:
        draw(cells, arguments.plot)
    if arguments.json:
        print_json(answer)


if __name__ == "__main__":
    main()
