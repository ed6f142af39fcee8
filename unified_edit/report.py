"""What an edit did and what it proves, for people and as data."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from covariance_cache.shrinkage import Shrinkage
from covariance_cache.statistics import KeyStatistics
from unified_edit.algebra.certificate import Certificate
from unified_edit.edits import Edit
from unified_edit.recipes import Recipe

_ENOUGH = 5
"""Tokens per dimension from which shrinking C changes little (docs/shrinkage.md)."""


@dataclass(frozen=True)
class EditOutcome:
    """What became of one edit, on its bare prompt, teacher-forced."""

    edit: Edit
    before: float
    """Geometric mean probability of the target's tokens before the edit."""
    optimised: float | None
    """The same over all contexts with the target value in place: what was aimed at.
    None where no target value was."""
    after: float
    """The same as `before`, with the update applied."""
    says_target: bool
    """After the edit every token of the target is the most probable one."""
    said_target: bool
    """So it was before the edit."""


@dataclass(frozen=True)
class EditReport:
    """What `edit` did and what it proves."""

    recipe: str
    origin: str
    """Whether the recipe's hyperparameters are published, tuned here or unvalidated."""
    outcomes: tuple[EditOutcome, ...]
    certificates: dict[int, Certificate]
    """For each edited layer, what its solution proves about itself."""
    notes: tuple[str, ...]
    """What a user should look at."""
    seconds: dict[str, float]
    """Wall time of each stage."""

    @property
    def success(self) -> float:
        """Share of edits whose target the edited model says."""
        return sum(o.says_target for o in self.outcomes) / len(self.outcomes)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            **asdict(self),
            "certificates": {k: c.as_dict() for k, c in self.certificates.items()},
            "success": self.success,
        }

    def __str__(self) -> str:
        lines = [
            f"{self.recipe} ({self.origin}): {len(self.outcomes)} edits in "
            f"{sum(self.seconds.values()):.1f} s; the model now says "
            f"{sum(o.says_target for o in self.outcomes)} of their targets"
        ]
        for layer, found in self.certificates.items():
            damage = found.preservation_damage
            lines.append(
                f"  layer {layer}: ‖ΔW‖/‖W‖ {found.relative_norm:.3g}, damage to "
                f"preserved keys {'unknown' if damage is None else f'{damage:.2g}'}, "
                f"residual error {found.relative_residual_error:.2g}, condition "
                f"{found.condition_number:.2g}, jitter {found.relative_jitter:.1g}"
            )
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the wall time inside to a stage's."""
    begun = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - begun


def notes_on(
    recipe: Recipe,
    outcomes: Sequence[EditOutcome],
    certificates: Mapping[int, Certificate],
    statistics: Mapping[int, KeyStatistics],
) -> tuple[str, ...]:
    """What a user should look at: edits that were so before or did not take, jitter,
    redundant edits, statistics of another model, hyperparameters nobody validated."""
    notes = notes_on_outcomes(outcomes)
    for layer, certificate in certificates.items():
        if certificate.jitter:
            notes.append(
                f"layer {layer}: C needed jitter of {certificate.relative_jitter:.1g} "
                "of its mean diagonal; collect more tokens"
            )
        if certificate.redundant:
            notes.append(
                f"layer {layer}: edits {list(certificate.redundant)} follow from others"
            )
    for layer in recipe.layers:
        used = statistics[layer]
        if used.accepted_mismatch:
            notes.append(
                f"layer {layer}: accepted statistics whose file "
                f"{used.accepted_mismatch}"
            )
        per_dimension = used.count / used.d_key
        if per_dimension < _ENOUGH and used.shrinkage == Shrinkage():
            notes.append(
                f"layer {layer}: C is of {per_dimension:.1f} tokens per dimension and "
                "not shrunk; shrink it (oas), or collect more, to damage less"
            )
    if recipe.origin == "unvalidated":
        notes.append("these hyperparameters are not validated for this model")
    return tuple(notes)


def notes_on_outcomes(outcomes: Sequence[EditOutcome]) -> list[str]:
    """Of them those on edits: that were so before, or did not take."""
    notes = []
    for index, outcome in enumerate(outcomes):
        name = f"edit {index} ({outcome.edit.text!r} → {outcome.edit.target!r})"
        if outcome.said_target:
            notes.append(f"{name}: the model said so before the edit")
        if not outcome.says_target:
            note = f"{name}: the edited model does not say it (p {outcome.after:.2g})"
            if outcome.optimised is not None:
                reached = "was" if outcome.optimised > 0.5 else "was not"
                note += (
                    f"; its target value {reached} found (p {outcome.optimised:.2g})"
                )
            notes.append(note)
    return notes
