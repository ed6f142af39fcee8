"""Recipes tried on a world: what a batch, or one edit at a time, does to a model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from tqdm import tqdm

from covariance_cache import KeyStatistics
from unified_edit.edits import Record
from unified_edit.engine import EditResult, edit
from unified_edit.evaluate.counterfact import CounterFactScores, evaluate_counterfact
from unified_edit.evaluate.world import World
from unified_edit.live import applied
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.descent import Targets
from unified_edit.model.prompts import Contexts, generate_contexts
from unified_edit.model.targets import optimize_targets
from unified_edit.preparation import Prepared, prepare
from unified_edit.recipes import Recipe

UNRELATED = 100
"""Facts about other subjects that are asked after each single edit."""


@dataclass(frozen=True)
class Trial:
    """What one recipe did, and what was so before."""

    recipe: str
    scores: CounterFactScores
    same_subject: float
    """Share of the other facts about edited subjects that the model still completes."""
    unrelated: float
    """The same for facts about subjects that were not edited."""
    unrelated_before: float
    skills: float | None
    """Mean over skills; None when not asked."""
    seconds_per_edit: float
    """Contexts, targets, factorization and solve, over the number of edits."""
    relative_norm: float
    """Largest ‖ΔW‖/‖W‖ of a layer (single edits: the mean of it)."""

    def row(self) -> dict[str, float]:
        """All figures by name."""
        found = {
            **self.scores.as_dict(),
            "same_subject": self.same_subject,
            "unrelated": self.unrelated,
            "unrelated_before": self.unrelated_before,
            "seconds_per_edit": self.seconds_per_edit,
            "relative_norm": self.relative_norm,
        }
        return found if self.skills is None else {**found, "skills": self.skills}


@dataclass
class Trials:
    """Tries recipes on one model of a world. Contexts and targets that recipes share
    are made once; the time they took counts for each."""

    model: nn.Module
    tokenizer: Any
    world: World
    statistics: Mapping[int, KeyStatistics]
    seed: int = 0
    progress: bool = False
    _made: dict[Any, tuple[Contexts, Targets, float]] = field(default_factory=dict)
    _before: dict[tuple[tuple[str, str], ...], float] = field(default_factory=dict)

    def batch(
        self, records: Sequence[Record], recipe: Recipe
    ) -> tuple[Trial, EditResult]:
        """All records at once."""
        contexts, targets, seconds = self._targets(records, recipe)
        result = edit(
            self.model,
            self.tokenizer,
            [record.edit for record in records],
            recipe,
            self.statistics,
            contexts=contexts,
            seed=self.seed,
            targets=targets,
        )
        seconds += sum(result.report.seconds.values())
        unrelated = self.world.unrelated(records)
        before = self._said_before(unrelated)
        with applied(self.model, result.update):
            skills = self.world.skill_scores(self.model, self.tokenizer)
            trial = Trial(
                recipe=recipe.name,
                scores=evaluate_counterfact(self.model, self.tokenizer, records),
                same_subject=self._said(self.world.same_subject(records)),
                unrelated=self._said(unrelated),
                unrelated_before=before,
                skills=sum(skills.values()) / len(skills),
                seconds_per_edit=seconds / len(records),
                relative_norm=_largest_norm(result),
            )
        return trial, result

    def singles(self, records: Sequence[Record], recipe: Recipe) -> Trial:
        """One record at a time, each on the unedited model."""
        contexts, targets, seconds = self._targets(records, recipe)
        begun = time.perf_counter()
        prepared = prepare(recipe, self.statistics)
        seconds += time.perf_counter() - begun
        results = one_at_a_time(
            self.model,
            self.tokenizer,
            records,
            recipe,
            self.statistics,
            contexts=contexts,
            targets=targets,
            prepared=prepared,
            seed=self.seed,
        )
        bar = tqdm(results, recipe.name, len(records), disable=not self.progress)
        rows = [
            self._single(record, result, recipe, index)
            for index, (record, result) in enumerate(zip(records, bar, strict=True))
        ]
        count = len(rows)
        return Trial(
            recipe=recipe.name,
            scores=CounterFactScores(tuple(s for t in rows for s in t.scores.records)),
            same_subject=sum(t.same_subject for t in rows) / count,
            unrelated=sum(t.unrelated for t in rows) / count,
            unrelated_before=sum(t.unrelated_before for t in rows) / count,
            skills=None,
            seconds_per_edit=(seconds + sum(t.seconds_per_edit for t in rows)) / count,
            relative_norm=sum(t.relative_norm for t in rows) / count,
        )

    def _single(
        self, record: Record, result: EditResult, recipe: Recipe, index: int
    ) -> Trial:
        others = self.world.unrelated([record])
        stride = max(1, len(others) // UNRELATED)
        asked = others[index % stride :: stride]
        before = self._said_before(asked)
        with applied(self.model, result.update):
            return Trial(
                recipe=recipe.name,
                scores=evaluate_counterfact(self.model, self.tokenizer, [record]),
                same_subject=self._said(self.world.same_subject([record])),
                unrelated=self._said(asked),
                unrelated_before=before,
                skills=None,
                seconds_per_edit=sum(result.report.seconds.values()),
                relative_norm=_largest_norm(result),
            )

    def forget(self) -> None:
        """Drops kept targets: those of batches that will not be tried again."""
        self._made.clear()

    def _said(self, prompts: Sequence[tuple[str, str]]) -> float:
        return self.world.retention(self.model, self.tokenizer, prompts)

    def _said_before(self, prompts: Sequence[tuple[str, str]]) -> float:
        """The same, on the unedited model: the recipes share it."""
        key = tuple(prompts)
        if key not in self._before:
            self._before[key] = self._said(prompts)
        return self._before[key]

    def _targets(
        self, records: Sequence[Record], recipe: Recipe
    ) -> tuple[Contexts, Targets, float]:
        edits = tuple(record.edit for record in records)
        key = (edits, recipe.contexts, recipe.targets, recipe.layers[-1])
        if key not in self._made:
            begun = time.perf_counter()
            adapter = ModelAdapter.of(self.model)
            contexts = generate_contexts(
                adapter, self.tokenizer, recipe.contexts, self.seed
            )
            targets = optimize_targets(
                adapter,
                self.tokenizer,
                edits,
                contexts,
                recipe.layers[-1],
                recipe.targets,
                progress=self.progress,
            )
            self._made[key] = contexts, targets, time.perf_counter() - begun
        return self._made[key]


def one_at_a_time(
    model: nn.Module,
    tokenizer: Any,
    records: Sequence[Record],
    recipe: Recipe,
    statistics: Mapping[int, KeyStatistics],
    *,
    contexts: Contexts,
    targets: Targets,
    prepared: Prepared | None = None,
    seed: int = 0,
) -> Iterator[EditResult]:
    """Each record's edit alone, on the unedited model.

    Args:
        targets: of all records.
        prepared: what `prepare` made for this recipe and these statistics.
    """
    prepared = prepared or prepare(recipe, statistics)
    for index, record in enumerate(records):
        yield edit(
            model,
            tokenizer,
            [record.edit],
            recipe,
            statistics,
            contexts=contexts,
            seed=seed,
            targets=targets.select(index),
            prepared=prepared,
        )


def _largest_norm(result: EditResult) -> float:
    norms = [c.relative_norm for c in result.report.certificates.values()]
    return max(norm for norm in norms if norm is not None)
