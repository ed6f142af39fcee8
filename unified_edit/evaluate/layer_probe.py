"""Which layers a recipe edits best: measured, on records kept apart from the edits.

At each candidate, one layer or a window of adjacent ones, every record is edited alone
on the unedited model and scored as CounterFact is. Key statistics of all layers come
from one pass over text, and the targets of all records are optimised in one batch, so a
candidate costs little more than scoring.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from tqdm import tqdm

from covariance_cache import KeyStatistics
from unified_edit.edits import Record
from unified_edit.engine import EditResult
from unified_edit.errors import EditError, RecipeError
from unified_edit.evaluate.counterfact import (
    CounterFactScores,
    RecordScores,
    evaluate_counterfact,
)
from unified_edit.evaluate.intervals import Interval, mean_of
from unified_edit.evaluate.trial import one_at_a_time
from unified_edit.live import applied
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.prompts import Contexts, generate_contexts
from unified_edit.model.targets import optimize_targets
from unified_edit.recipes import Recipe


@dataclass(frozen=True)
class Candidate:
    """Some layers, tried."""

    layers: tuple[int, ...]
    scores: CounterFactScores
    intervals: dict[str, Interval]
    """Of S and every score, by name."""
    damage: float
    """Mean over edits of the largest predicted damage of a layer: how much of the mean
    square of background values changes."""
    relative_norm: float
    """Mean over edits of the largest ‖ΔW‖/‖W‖ of a layer."""

    @property
    def s(self) -> Interval:
        """S with its interval."""
        return self.intervals["s"]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        scores = {
            name: {"mean": each.mean, "interval": each.as_list()}
            for name, each in self.intervals.items()
        }
        return {
            "layers": list(self.layers),
            "scores": scores,
            "damage": self.damage,
            "relative_norm": self.relative_norm,
        }


@dataclass(frozen=True)
class LayerChoice:
    """Layers for a recipe, and what speaks for them."""

    recipe: Recipe
    """With the layers chosen."""
    candidates: tuple[Candidate, ...]
    """All that were tried, in order of layers."""
    best: Candidate
    """The one with the highest S."""
    chosen: Candidate
    """Of those that are as good, for S as far as the records tell, the one that
    changes least of what the layer does for other text."""
    records: int
    """How many were edited at each candidate."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Those chosen."""
        return self.chosen.layers

    @property
    def reason(self) -> str:
        """The choice in words."""
        s, name = self.best.s, _name(self.best.layers)
        said = (
            f"S is highest at {name}: {s.mean:.3f} ({s.low:.3f} to {s.high:.3f}, "
            f"{self.records} records)"
        )
        if self.chosen is self.best:
            return said
        alike = sum(each.s.mean >= s.low for each in self.candidates)
        return (
            f"{said}; {alike} candidates are within that, and of these "
            f"{_name(self.layers)}, S {self.chosen.s.mean:.3f}, changes the least of "
            f"other text ({self.chosen.damage:.2g} against {self.best.damage:.2g})"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "layers": list(self.layers),
            "reason": self.reason,
            "best": list(self.best.layers),
            "records": self.records,
            "recipe": self.recipe.as_dict(),
            "candidates": [each.as_dict() for each in self.candidates],
        }


def windows_of(count: int, width: int) -> list[tuple[int, ...]]:
    """All windows of adjacent layers of so many."""
    return [tuple(range(i, i + width)) for i in range(count - width + 1)]


def recommend(
    model: nn.Module,
    tokenizer: Any,
    records: Sequence[Record],
    recipe: Recipe,
    statistics: Mapping[int, KeyStatistics],
    *,
    width: int | None = None,
    candidates: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> LayerChoice:
    """Tries a recipe at each candidate and chooses.

    Args:
        records: in CounterFact's schema, with paraphrases and neighbours; none that is
            to be edited later, or the choice will have seen it.
        recipe: whose layers are wanted.
        statistics: by layer; of those to be tried.
        width: adjacent layers in a window; None for as many as the recipe has layers,
            or one.
        candidates: None tries all windows in which every layer has statistics.
        seed: of the contexts and the intervals.

    Raises:
        EditError: no records, or some without paraphrases or neighbours.
        RecipeError: layers that do not exist, or whose statistics are missing.
        UnsupportedModel, PromptError, NonFiniteError, IllConditioned.
    """
    adapter = ModelAdapter.of(model)
    if candidates is None:
        width = width or len(recipe.layers) or 1
        windows = windows_of(adapter.layer_count, width)
        candidates = [each for each in windows if set(each) <= set(statistics)]
    tried = [tuple(each) for each in candidates]
    _check(adapter, records, tried, statistics)
    contexts = generate_contexts(adapter, tokenizer, recipe.contexts, seed)
    site = adapter.target_site(recipe.targets.site)
    edits = [record.edit for record in records]
    targets = {}
    total = len(tried) * len(records)
    found = []
    with tqdm(total=total, desc="editing at layers", disable=not progress) as bar:
        for layers in tried:
            chosen = replace(recipe, layers=layers, origin="unvalidated")
            if layers[-1] not in targets:
                targets[layers[-1]] = optimize_targets(
                    adapter,
                    tokenizer,
                    edits,
                    contexts,
                    layers[-1],
                    recipe.targets.at(site),
                )
            results = one_at_a_time(
                model,
                tokenizer,
                records,
                chosen,
                {layer: statistics[layer] for layer in layers},
                contexts=contexts,
                targets=targets[layers[-1]],
                seed=seed,
            )
            found.append(
                _candidate(
                    model, tokenizer, records, layers, results, contexts, seed, bar
                )
            )
    return choice_among(recipe, found, len(records))


def choice_among(
    recipe: Recipe, candidates: Sequence[Candidate], records: int
) -> LayerChoice:
    """The highest S; and of those within its interval the least damage."""
    best = max(candidates, key=lambda each: each.s.mean)
    alike = [each for each in candidates if each.s.mean >= best.s.low]
    chosen = min(alike, key=lambda each: each.damage)
    return LayerChoice(
        recipe=replace(
            recipe,
            layers=chosen.layers,
            origin="unvalidated",
            source=f"layers located on {records} records",
        ),
        candidates=tuple(candidates),
        best=best,
        chosen=chosen,
        records=records,
    )


def _candidate(
    model: nn.Module,
    tokenizer: Any,
    records: Sequence[Record],
    layers: tuple[int, ...],
    results: Iterable[EditResult],
    contexts: Contexts,
    seed: int,
    bar: Any,
) -> Candidate:
    """Scores each record with its own edit alone."""
    rows: list[RecordScores] = []
    damage, norms = [], []
    for record, result in zip(records, results, strict=True):
        with applied(model, result.update):
            scored = evaluate_counterfact(
                model, tokenizer, [record], generations=False, frame=contexts.frame
            )
        rows += scored.records
        certificates = result.report.certificates.values()
        damage.append(max(each.preservation_damage or 0.0 for each in certificates))
        norms.append(max(each.relative_norm or 0.0 for each in certificates))
        bar.update()
    scores = CounterFactScores(tuple(rows))
    intervals = scores.intervals(seed)
    return Candidate(layers, scores, intervals, mean_of(damage), mean_of(norms))


def _check(
    adapter: ModelAdapter,
    records: Sequence[Record],
    candidates: Sequence[tuple[int, ...]],
    statistics: Mapping[int, KeyStatistics],
) -> None:
    if not records:
        raise EditError("there are no records to try layers on; give at least one")
    for index, record in enumerate(records):
        if not record.paraphrase_prompts or not record.neighborhood_prompts:
            raise EditError(
                f"record {index} ({record.edit.text!r}) has no paraphrases or no "
                "neighbours, without which no layer is better than another; give "
                "CounterFact records"
            )
    if not candidates:
        raise RecipeError(
            f"there are statistics of layers {sorted(statistics)}, and no window of "
            "the recipe's width in them; collect those of all layers in one pass"
        )
    for layers in candidates:
        adapter.check_layers(layers)
    missing = sorted({i for each in candidates for i in each} - set(statistics))
    if missing:
        raise RecipeError(
            f"layers {missing} have no key statistics; collect those of all layers to "
            "be tried, which takes one pass, or name candidates"
        )


def _name(layers: Sequence[int]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    return f"layers {layers[0]} to {layers[-1]}"
