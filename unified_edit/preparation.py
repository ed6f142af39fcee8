"""What is done once for many batches of edits: statistics are checked, preservation is
factored for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from covariance_cache import KeyStatistics
from covariance_cache.shrinkage import Shrinkage
from unified_edit.algebra.certificate import WeightScale
from unified_edit.algebra.earlier import EarlierKeys
from unified_edit.algebra.objective import Objective
from unified_edit.algebra.rounding import leading
from unified_edit.errors import RecipeError
from unified_edit.model.adapter import ModelAdapter
from unified_edit.recipes import Recipe


@dataclass(frozen=True, eq=False)
class Prepared:
    """Factorizations, to be used for many batches of edits."""

    recipe: Recipe
    statistics: dict[int, str]
    """Fingerprints of the statistics, by layer."""
    layers: dict[int, EarlierKeys]
    """What is preserved, factored, with the keys of earlier edits."""
    background: dict[int, Tensor]
    """[m, d_key] leading directions of each layer's C, for rounding towards keys."""
    scales: dict[int, WeightScale] | None = None
    """What certificates are relative to; None takes the weights as they are."""

    def objective(self, layer: int) -> Objective:
        """Of the next batch at a layer."""
        factorization = self.layers[layer].factorization
        return Objective(factorization.preservation, self.recipe.memorize())

    def added(self, keys: Mapping[int, Tensor]) -> Prepared:
        """With the keys [n, d_key] of a batch, which the next solve shall know."""
        layers = {layer: self.layers[layer].added(keys[layer]) for layer in self.layers}
        return replace(self, layers=layers)


def prepare(
    recipe: Recipe,
    statistics: Mapping[int, KeyStatistics],
    device: torch.device | str | None = None,
) -> Prepared:
    """Factors each layer's preservation once, in float64; `edit` takes it as
    `prepared`. Worth it where several batches share a recipe and statistics.

    Raises:
        RecipeError: statistics of a layer are missing.
        IllConditioned: C is not positive definite, even with jitter.
    """
    check_present(recipe, statistics)
    layers, background = {}, {}
    for layer in recipe.layers:
        second_moment = statistics[layer].regularized(device)
        background[layer] = leading(second_moment)
        preservation = recipe.preserve(second_moment)
        layers[layer] = EarlierKeys.of(preservation, recipe.earlier_weight)
    prints = {layer: statistics[layer].fingerprint() for layer in recipe.layers}
    return Prepared(recipe, prints, layers, background)


def check_present(recipe: Recipe, statistics: Mapping[int, KeyStatistics]) -> None:
    """Refuses a recipe with layers that there are no statistics of."""
    missing = [layer for layer in recipe.layers if layer not in statistics]
    if missing:
        raise RecipeError(
            f"{recipe.name} edits layers {list(recipe.layers)}; there are no key "
            f"statistics of {missing}. Collect them with python -m covariance_cache"
        )


def check_prepared(
    prepared: Prepared, recipe: Recipe, statistics: Mapping[int, KeyStatistics]
) -> None:
    """Refuses what was prepared for another recipe or other statistics."""
    prints = {layer: statistics[layer].fingerprint() for layer in recipe.layers}
    if prepared.recipe != recipe or prepared.statistics != prints:
        raise RecipeError(
            f"{recipe.name}: `prepared` was made for another recipe or other "
            "statistics; call prepare() with these"
        )


def check_statistics(
    adapter: ModelAdapter,
    recipe: Recipe,
    statistics: Mapping[int, KeyStatistics],
    fingerprint: str,
) -> None:
    """Refuses statistics that are not this model's, or too few to be used.

    Raises:
        RecipeError: naming the layer, and what is there and what is needed.
    """
    check_present(recipe, statistics)
    for layer in recipe.layers:
        found = statistics[layer]
        if found.layer != layer:
            raise RecipeError(
                f"layer {layer}: the statistics given for it are layer {found.layer}'s"
            )
        d_key = adapter.matrix(layer).shape[1]
        if found.d_key != d_key:
            raise RecipeError(
                f"layer {layer}: keys have {d_key} dimensions, the statistics "
                f"{found.d_key}; they are another model's"
            )
        if found.count < d_key and found.shrinkage == Shrinkage():
            raise RecipeError(
                f"layer {layer}: the statistics count {found.count} keys of {d_key} "
                f"dimensions, so C is singular; collect at least {d_key} tokens, "
                f"better {10 * d_key}, or use them with shrinkage"
            )
        made_for = found.provenance.model_fingerprint
        if fingerprint not in (made_for, found.accepted_for):
            raise RecipeError(
                f"layer {layer}: the statistics were collected on the model "
                f"{made_for}, this one is {fingerprint}; collect them on this one"
            )
