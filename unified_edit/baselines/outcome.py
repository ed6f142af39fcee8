"""From an editor's change of some weights to what `edit` returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from covariance_cache.capture import evaluating
from covariance_cache.fingerprint import model_fingerprint
from covariance_cache.statistics import library_version
from unified_edit.algebra.update import RankKUpdate, UpdateSet, WeightAddress
from unified_edit.edits import Edit, check_edits
from unified_edit.engine import EditResult, outcomes_of
from unified_edit.errors import EditorError
from unified_edit.live import applied
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.frames import PLAIN, Frame
from unified_edit.model.hooks import frozen
from unified_edit.model.prompts import Contexts
from unified_edit.model.scoring import Score, score
from unified_edit.report import EditReport, notes_on_outcomes, timed


@dataclass(frozen=True, eq=False)
class Editing:
    """One call of an editor: a model, some edits, and how it was before."""

    adapter: ModelAdapter
    tokenizer: Any
    edits: Sequence[Edit]
    frame: Frame
    fingerprint: str
    """Of the model."""
    before: Sequence[Score] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each stage."""

    @property
    def prompts(self) -> list[str]:
        return [edit.text for edit in self.edits]

    @property
    def targets(self) -> list[str]:
        return [edit.target for edit in self.edits]

    def result(
        self,
        updates: Mapping[WeightAddress, RankKUpdate],
        recipe: Mapping[str, Any],
        origin: str,
        notes: Sequence[str] = (),
    ) -> EditResult:
        """The update with its report, measured with the update on the model.

        Args:
            updates: finite, of this model's weights.
            recipe: plain data: the editor's `name`, and its settings.

        Raises:
            UpdateError, NonFiniteError: as `apply`.
        """
        metadata = {
            "base_fingerprint": self.fingerprint,
            "recipe": dict(recipe),
            **Contexts(frame=self.frame).as_dict(),
            "edits": [edit.as_dict() for edit in self.edits],
            "version": library_version(),
        }
        # An editor may find nothing to do, as fine-tuning does where the loss is low.
        changed = {k: each for k, each in updates.items() if each.norm() != 0}
        found = UpdateSet(
            {k: each.compact().to(device="cpu") for k, each in changed.items()},
            metadata,
        )
        after = self.before
        if changed:
            with applied(self.adapter.model, found, check_base=False):
                after = self.scores()
        outcomes = outcomes_of(self.edits, self.before, None, after)
        report = EditReport(
            recipe=str(recipe["name"]),
            origin=origin,
            outcomes=outcomes,
            certificates={},
            notes=(*notes_on_outcomes(outcomes), *notes),
            seconds=self.seconds,
        )
        return EditResult(found, report)

    def timed(self, stage: str) -> Any:
        """Counts the wall time inside."""
        return timed(self.seconds, stage)

    def scores(self) -> Sequence[Score]:
        """Of the edits, on the model as it is."""
        return score(
            self.adapter, self.tokenizer, self.prompts, self.targets, frame=self.frame
        )


@contextmanager
def editing(
    model: nn.Module, tokenizer: Any, edits: Sequence[Edit], frame: Frame = PLAIN
) -> Iterator[Editing]:
    """A checked model in evaluation mode, its weights frozen inside, and checked edits.

    Raises:
        EditError: edits empty, repeated, contradictory, or not tokenizable.
        UnsupportedModel, NonFiniteError: the model.
    """
    check_edits(edits)
    adapter = ModelAdapter.of(model)
    adapter.check_finite()
    job = Editing(adapter, tokenizer, edits, frame, model_fingerprint(model))
    with frozen(model), evaluating(model):
        yield replace(job, before=job.scores())


def check_layers(layers: Sequence[int], count: int) -> None:
    """Refuses layers that a model of `count` does not have, and none at all.

    Raises:
        EditorError: naming them.
    """
    wrong = [layer for layer in layers if not 0 <= layer < count]
    if wrong or not layers or len(set(layers)) != len(layers):
        raise EditorError(
            f"layers {list(layers)}: name some of 0 to {count - 1}, each once"
        )
