"""A sequence of edits on one loaded model: guarded, saved, resumed, forked.

The model's weights are always the unedited ones plus one change in factors, added in
one go: what a step rounds away does not pile up, the sequence's update patches files to
the same bits, and taking it back restores the original ones.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from covariance_cache import KeyStatistics
from covariance_cache.capture import evaluating
from covariance_cache.fingerprint import model_fingerprint
from unified_edit.algebra.addition import added
from unified_edit.algebra.certificate import WeightScale
from unified_edit.algebra.earlier import EarlierKeys
from unified_edit.algebra.regularize import Regularizer
from unified_edit.algebra.update import RankKUpdate, UpdateSet
from unified_edit.edits import Edit, check_edits
from unified_edit.engine import (
    LayerSolution,
    metadata_of,
    outcomes_of,
    solve_layers,
)
from unified_edit.errors import IllConditioned, NonFiniteError, SessionError
from unified_edit.foresight import foresee, measured
from unified_edit.guard import SMALLEST, Guard, Readings
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.descent import Targets
from unified_edit.model.perplexity import Canary
from unified_edit.model.prompts import Contexts, generate_contexts
from unified_edit.model.scoring import Score, score
from unified_edit.model.targets import TargetStore, optimize_targets
from unified_edit.preparation import check_statistics, prepare
from unified_edit.recipes import Recipe
from unified_edit.report import EditReport, notes_on, timed
from unified_edit.session_state import Decision, LayerState, SequenceState, Step

_log = logging.getLogger(__name__)


class EditSession:
    """A sequence of edits on a model, which it changes in place.

    `begin` starts one, `step` edits, `update` is all that was changed, `save` and
    `resume` carry it over processes, `fork` to another copy of the model, `revert`
    restores the unedited weights. Nothing is shared between sessions.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        statistics: Mapping[int, KeyStatistics],
        state: SequenceState,
        *,
        canary: Canary | None = None,
    ) -> None:
        """A session from its state.

        Args:
            model: the unedited one; it is edited as the state says.
            canary: the same held-out text as before.

        Raises:
            SessionError: another model or other statistics than the state's.
        """
        fingerprint = model_fingerprint(model)
        if fingerprint != state.base_fingerprint:
            raise SessionError(
                f"the session edits the model {state.base_fingerprint}, this one is "
                f"{fingerprint}; load the unedited model"
            )
        adapter = ModelAdapter.of(model)
        check_statistics(adapter, state.recipe, statistics, fingerprint)
        prepared = prepare(state.recipe, statistics, adapter.device)
        if prepared.statistics != dict(state.statistics):
            raise SessionError(
                f"the session was begun with the statistics {dict(state.statistics)}, "
                f"these are {prepared.statistics}; load those"
            )
        if (canary is None) != (state.perplexity is None):
            raise SessionError(
                "the session was begun "
                + ("with" if canary is None else "without")
                + " held-out text; resume it so"
            )
        layers, scales = {}, {}
        for layer, held in prepared.layers.items():
            kept = state.layers[layer]
            layers[layer] = EarlierKeys.of(
                held.preservation,
                held.weight,
                factorization=held.factorization,
                folded=None if kept.folded is None else kept.folded.to(adapter.device),
                recent=tuple(keys.to(adapter.device) for keys in kept.recent),
            )
            weight = adapter.matrix(layer).detach().double()
            scales[layer] = WeightScale.of(weight, held.preservation)
        self.model, self.tokenizer, self.state = model, tokenizer, state
        self._adapter, self._statistics, self._canary = adapter, statistics, canary
        self._prepared = replace(prepared, layers=layers, scales=scales)
        self._originals = {
            layer: adapter.weight(layer).detach().clone() for layer in layers
        }
        self._regularizer = rule = Regularizer.parse(state.recipe.regularizer)
        self._ended, self._unfinished = False, state.recipe
        if rule is not None and rule.when != "step":
            self._unfinished = replace(state.recipe, regularizer="none")
        self._write({layer: kept.change for layer, kept in state.layers.items()})

    @classmethod
    def begin(
        cls,
        model: nn.Module,
        tokenizer: Any,
        recipe: Recipe,
        statistics: Mapping[int, KeyStatistics],
        *,
        guard: Guard | None = None,
        canary: Canary | None = None,
        contexts: Contexts | None = None,
        seed: int = 0,
    ) -> EditSession:
        """An empty session.

        Args:
            guard: limits of each step; None takes the defaults of `Guard`.
            canary: held-out text, which the guard measures perplexity on; without one
                it does not.
            contexts: prefixes to use; None generates them from `seed`.

        Raises:
            as `edit`.
        """
        adapter = ModelAdapter.of(model)
        adapter.check_layers(recipe.layers)
        adapter.check_finite()
        site = adapter.target_site(recipe.targets.site)
        recipe = replace(recipe, targets=recipe.targets.at(site))
        fingerprint = model_fingerprint(model)
        check_statistics(adapter, recipe, statistics, fingerprint)
        if contexts is None:
            with evaluating(model):
                contexts = generate_contexts(adapter, tokenizer, recipe.contexts, seed)
        perplexity = None
        if canary is not None:
            before = canary.perplexity(adapter)
            perplexity = (before, before)
        prints = {layer: statistics[layer].fingerprint() for layer in recipe.layers}
        state = SequenceState(
            fingerprint,
            recipe,
            prints,
            contexts,
            seed,
            guard or Guard(),
            {layer: LayerState(None) for layer in recipe.layers},
            perplexity=perplexity,
        )
        return cls(model, tokenizer, statistics, state, canary=canary)

    @classmethod
    def resume(
        cls,
        path: str | Path,
        model: nn.Module,
        tokenizer: Any,
        statistics: Mapping[int, KeyStatistics],
        *,
        canary: Canary | None = None,
    ) -> EditSession:
        """A saved session, on the unedited model: its next steps are, bit for bit, what
        they would have been. Raises SessionError as the constructor, and for a file
        that is no session's."""
        state = SequenceState.load(path)
        return cls(model, tokenizer, statistics, state, canary=canary)

    def save(self, path: str | Path) -> Path:
        """Writes the state as one file, whole or not at all."""
        return self.state.save(path)

    def fork(self, model: nn.Module) -> EditSession:
        """Another session from this state, on another, unedited copy of the model."""
        if model is self.model:
            raise SessionError("a fork needs a copy of the model of its own")
        return EditSession(
            model, self.tokenizer, self._statistics, self.state, canary=self._canary
        )

    def revert(self) -> None:
        """The unedited weights, bit for bit, and the session's end; the state stays, to
        be saved or forked."""
        self._put(self._originals)
        self._ended = True

    @property
    def drift(self) -> dict[int, float]:
        """‖W_t − W₀‖ / ‖W₀‖ of each layer."""
        return {
            layer: kept.length / self._scale(layer).norm
            for layer, kept in self.state.layers.items()
        }

    @property
    def update(self) -> UpdateSet:
        """All that was changed, finished as the recipe says (PRUNE acts here, once)."""
        changes = {
            self._adapter.address(layer): change
            for layer, change in self._finished().items()
            if change is not None
        }
        metadata = metadata_of(
            self.state.base_fingerprint,
            self.state.recipe,
            self._prepared,
            self._statistics,
            self.state.contexts,
            self.state.seed,
            self.state.edits,
        )
        return UpdateSet(changes, metadata)

    @contextmanager
    def finished(self) -> Iterator[None]:
        """The model with `update` inside: other weights only where the recipe's
        regularizer acts once, at the end."""
        if self._regularizer is None or self._regularizer.when != "end":
            yield
            return
        self._write(self._finished())
        try:
            yield
        finally:
            self._write({k: kept.change for k, kept in self.state.layers.items()})

    def step(
        self,
        edits: Sequence[Edit],
        *,
        targets: Targets | None = None,
        token_budget: int | None = None,
        target_cache: TargetStore | None = None,
        progress: bool = False,
    ) -> Step:
        """Makes some edits together, if the guard lets them.

        Args:
            targets: values already optimised for these edits on the model as it is.
            token_budget, target_cache: as of `edit`.

        Raises:
            EditError: edits empty, repeated or contradictory.
            as `edit`, but for what the guard knows how to take: a system that cannot
            be solved, or a model whose outputs are not finite, is a refused step.
        """
        if self._ended:
            raise SessionError("the session was reverted; fork it, or resume it")
        check_edits(edits)
        state, adapter = self.state, self._adapter
        seconds: dict[str, float] = {}
        sample = self._sample(edits)
        with evaluating(self.model):
            with timed(seconds, "guard"):
                before = self._score([*edits, *sample])
            if targets is None:
                with timed(seconds, "targets"):
                    targets = optimize_targets(
                        adapter,
                        self.tokenizer,
                        edits,
                        state.contexts,
                        state.recipe.layers[-1],
                        state.recipe.targets,
                        token_budget=token_budget,
                        cache=target_cache,
                        progress=progress,
                    )
            try:
                with timed(seconds, "solve"):
                    solved = solve_layers(
                        adapter,
                        self.tokenizer,
                        edits,
                        self._unfinished,
                        self._prepared,
                        state.contexts,
                        targets,
                    )
                    keys = {layer: each.keys for layer, each in solved.items()}
                    prepared = self._prepared.added(keys)
            except (IllConditioned, NonFiniteError) as error:
                return self._refuse(edits, (str(error),), None, seconds)
            holding = [
                one
                for one, score in zip(sample, before[len(edits) :], strict=True)
                if score.argmax
            ]
            tried = self._try(solved, edits, holding, seconds)
        reasons = tuple(tried.broken.values())
        if not tried.made:
            return self._refuse(edits, reasons, tried.readings, seconds)
        self._prepared = prepared
        layers = {
            layer: replace(kept, folded=held.folded, recent=held.recent)
            for layer, kept in tried.layers.items()
            for held in (prepared.layers[layer],)
        }
        perplexity = state.perplexity
        if perplexity is not None and tried.perplexity is not None:
            perplexity = (perplexity[0], tried.perplexity)
        self.state = replace(
            state,
            layers=layers,
            edits=(*state.edits, *edits),
            steps=state.steps + 1,
            perplexity=perplexity,
        )
        outcomes = outcomes_of(
            edits, before[: len(edits)], targets, tried.scores[: len(edits)]
        )
        certificates = {layer: each.certificate for layer, each in solved.items()}
        recipe = state.recipe
        report = EditReport(
            recipe=recipe.name,
            origin=recipe.origin,
            outcomes=outcomes,
            certificates=certificates,
            notes=notes_on(recipe, outcomes, certificates, self._statistics),
            seconds=seconds,
        )
        decision: Decision = "accepted"
        if tried.scale < 1:
            decision = "shrunk"
        elif reasons:
            decision = "warned"
            _log.warning("step %d: %s", state.steps, "; ".join(reasons))
        reasons = (*tried.before_shrinking, *reasons)
        found = (tried.scale, tried.readings, report, seconds)
        return Step(tuple(edits), decision, reasons, *found)

    def skip(self, edits: Sequence[Edit], reason: str) -> Step:
        """Counts a step that could not be tried as a refused one."""
        return self._refuse(edits, (reason,), None, {})

    def _refuse(
        self,
        edits: Sequence[Edit],
        reasons: tuple[str, ...],
        readings: Readings | None,
        seconds: dict[str, float],
    ) -> Step:
        state = self.state
        _log.warning("step %d is refused: %s", state.steps, "; ".join(reasons))
        self.state = replace(state, steps=state.steps + 1, refused=state.refused + 1)
        return Step(tuple(edits), "refused", reasons, 0.0, readings, None, seconds)

    def _try(
        self,
        solved: Mapping[int, LayerSolution],
        edits: Sequence[Edit],
        holding: Sequence[Edit],
        seconds: dict[str, float],
    ) -> _Tried:
        """Puts an update on the model, if the guard lets it, and measures; the weights
        are as before where it does not."""
        guard = self.state.guard
        weights = {k: self._adapter.weight(k).detach().clone() for k in solved}
        originals = {layer: self._original(layer) for layer in solved}
        scale = 1.0
        first: tuple[str, ...] = ()
        while True:
            with timed(seconds, "guard"):
                layers, readings = foresee(
                    self.state.layers, solved, self._prepared, originals, scale
                )
                broken = guard.broken(readings)
            scores: list[Score] = []
            perplexity = None
            if not broken or guard.on_limit == "warn":
                try:
                    with timed(seconds, "apply"):
                        self._write({k: each.change for k, each in layers.items()})
                    with timed(seconds, "guard"):
                        scores = self._score([*edits, *holding])
                        perplexity = self._perplexity()
                    held, known = scores[len(edits) :], self.state.perplexity
                    readings = measured(readings, held, perplexity, known)
                    broken = guard.broken(readings)
                except NonFiniteError as error:
                    broken = {"finite": str(error)}
                except BaseException:
                    self._put(weights)
                    raise
            made = not broken or (guard.on_limit == "warn" and "finite" not in broken)
            if made:
                break
            self._put(weights)
            smaller = guard.on_limit == "shrink" and scale > SMALLEST
            if not (smaller and guard.helped_by_less(broken)):
                break
            first = first or tuple(broken.values())
            scale /= 2
        return _Tried(made, scale, layers, readings, broken, first, scores, perplexity)

    def _sample(self, edits: Sequence[Edit]) -> list[Edit]:
        """Some of the standing edits, but for those that are made anew; the same for
        the same state."""
        state = self.state
        if not state.reads:
            return []
        fresh = {edit.text for edit in edits}
        known = [edit for edit in state.standing if edit.text not in fresh]
        chosen = random.Random(f"{state.seed} {state.steps}")
        return chosen.sample(known, min(state.guard.sample, len(known)))

    def _score(self, edits: Sequence[Edit]) -> list[Score]:
        prompts, targets = [e.text for e in edits], [e.target for e in edits]
        frame = self.state.contexts.frame
        return score(self._adapter, self.tokenizer, prompts, targets, frame=frame)

    def _perplexity(self) -> float | None:
        guard = self.state.guard
        if self._canary is None or not (guard.reads_text and self.state.reads):
            return None
        return self._canary.perplexity(self._adapter)

    def _scale(self, layer: int) -> WeightScale:
        assert self._prepared.scales is not None
        return self._prepared.scales[layer]

    def _original(self, layer: int) -> Tensor:
        """The unedited weight, seen as [d_value, d_key]."""
        original = self._originals[layer]
        return original.T if self._adapter.address(layer).transposed else original

    def _finished(self) -> dict[int, RankKUpdate | None]:
        """The layers' changes, with what the regularizer does at the end."""
        changes = {layer: kept.change for layer, kept in self.state.layers.items()}
        rule = self._regularizer
        if rule is None or rule.when != "end":
            return changes
        return {
            layer: None if change is None else rule(change, self._original(layer))
            for layer, change in changes.items()
        }

    @torch.no_grad()
    def _write(self, changes: Mapping[int, RankKUpdate | None]) -> None:
        """The unedited weights plus these changes, or none of them.

        Raises:
            NonFiniteError: a weight would not be finite.
        """
        results = {}
        for layer, change in changes.items():
            original = self._originals[layer]
            if change is None:
                results[layer] = original
                continue
            transposed = self._adapter.address(layer).transposed
            here = change.to(device=original.device)
            results[layer] = added(original, here, transposed=transposed)
        self._put(results)

    @torch.no_grad()
    def _put(self, weights: Mapping[int, Tensor]) -> None:
        for layer, weight in weights.items():
            self._adapter.weight(layer).copy_(weight)


@dataclass(frozen=True, eq=False)
class _Tried:
    """An update that was put on the model, or was not."""

    made: bool
    scale: float
    layers: dict[int, LayerState]
    readings: Readings
    broken: dict[str, str]
    before_shrinking: tuple[str, ...]
    scores: list[Score]
    """Of the edits, then of earlier ones; empty if it was not tried on the model."""
    perplexity: float | None
