"""The engine: edits, a recipe and statistics in; an update and a report out.

plan → contexts → targets → for each layer: keys, residuals, solve → UpdateSet. The
model's weights change while residuals are spread over layers, and are the same bytes
again when `edit` returns, however it returns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from covariance_cache import KeyStatistics
from covariance_cache.capture import evaluating
from covariance_cache.fingerprint import model_fingerprint
from covariance_cache.ranks import ALONE, Ranks
from covariance_cache.statistics import library_version
from unified_edit.algebra.addition import added
from unified_edit.algebra.certificate import Certificate, recertified
from unified_edit.algebra.factorization import Factorization
from unified_edit.algebra.regularize import Regularizer
from unified_edit.algebra.solve import solve
from unified_edit.algebra.update import RankKUpdate, UpdateSet
from unified_edit.edits import Edit, check_edits
from unified_edit.errors import IllConditioned, RecipeError
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.descent import Targets
from unified_edit.model.frames import PLAIN
from unified_edit.model.keys import hidden_at_subjects, keys_at_subjects
from unified_edit.model.prompts import Contexts, generate_contexts
from unified_edit.model.scoring import Score, score
from unified_edit.model.targets import TargetStore, optimize_targets
from unified_edit.preparation import (
    Prepared,
    check_prepared,
    check_statistics,
    prepare,
)
from unified_edit.recipes import Recipe
from unified_edit.report import EditOutcome, EditReport, notes_on, timed


@dataclass(frozen=True, eq=False)
class EditResult:
    """An update, not yet applied, and its report."""

    update: UpdateSet
    report: EditReport


def edit(
    model: nn.Module,
    tokenizer: Any,
    edits: Sequence[Edit],
    recipe: Recipe,
    statistics: Mapping[int, KeyStatistics],
    *,
    contexts: Contexts | None = None,
    seed: int = 0,
    targets: Targets | None = None,
    keys: Tensor | None = None,
    prepared: Prepared | None = None,
    token_budget: int | None = None,
    target_cache: TargetStore | None = None,
    ranks: Ranks = ALONE,
    progress: bool = False,
) -> EditResult:
    """Computes the update that makes a model say the edits' targets. The model itself
    is the same afterwards; `apply`, `applied` or `patch` put the update to use.

    Args:
        statistics: for each of the recipe's layers, as `StatisticsStore.load` gives.
        contexts: prefixes to use; None generates them from `seed`.
        targets: values already optimised for these edits, contexts and settings.
        keys: [n, d_key] of these edits at the recipe's first layer, as
            `keys_at_subjects` gave them for the same contexts.
        prepared: what `prepare` made for this recipe and these statistics.
        token_budget: suffix tokens whose activations may be held while optimising
            targets; None chooses from free memory.
        target_cache: a `TargetCache`; target values found there are not optimised.
        ranks: processes that share the targets, each with the same model and
            arguments (`covariance_cache.ranks.joined`); all return the result.
        progress: show progress bars.

    Raises:
        EditError: edits empty, repeated, contradictory, or not tokenizable.
        RecipeError: layers or statistics that do not fit the model.
        UnsupportedModel, NonFiniteError, IllConditioned, InfeasibleEdits.
    """
    check_edits(edits)
    adapter = ModelAdapter.of(model)
    adapter.check_layers(recipe.layers)
    adapter.check_finite()
    given, site = recipe, adapter.target_site(recipe.targets.site)
    recipe = replace(recipe, targets=recipe.targets.at(site))
    fingerprint = model_fingerprint(model)
    seconds: dict[str, float] = {}
    check_statistics(adapter, recipe, statistics, fingerprint)
    with timed(seconds, "factorize"):
        if prepared is None:
            prepared = prepare(given, statistics, adapter.device)
        else:
            check_prepared(prepared, given, statistics)
    with evaluating(model):
        with timed(seconds, "contexts"):
            if contexts is None:
                # One process samples: another machine's rounding could say otherwise.
                mine = (
                    generate_contexts(adapter, tokenizer, recipe.contexts, seed)
                    if ranks.first
                    else None
                )
                contexts = ranks.gather(mine)[0]
                assert contexts is not None
            elif recipe.contexts.chat and contexts.frame == PLAIN:
                raise RecipeError(
                    f"{recipe.name}: its prompts stand in a chat template, the given "
                    "contexts have none; give Contexts(…, chat_frame(tokenizer))"
                )
        prompts, wanted = [e.text for e in edits], [e.target for e in edits]
        frame = contexts.frame
        before = score(adapter, tokenizer, prompts, wanted, frame=frame)
        with timed(seconds, "targets"):
            if targets is None:
                targets = optimize_targets(
                    adapter,
                    tokenizer,
                    edits,
                    contexts,
                    recipe.layers[-1],
                    recipe.targets,
                    token_budget=token_budget,
                    cache=target_cache,
                    ranks=ranks,
                    progress=progress,
                )
        if len(targets.values) != len(edits):
            raise RecipeError(
                f"there are {len(edits)} edits and {len(targets.values)} target "
                "values; give those optimised for these edits"
            )
        wide = (len(edits), adapter.matrix(recipe.layers[0]).shape[1])
        if keys is not None and keys.shape != wide:
            raise RecipeError(
                f"{len(edits)} edits have keys {list(wide)}, not {list(keys.shape)}; "
                "give those computed for these edits"
            )
        with timed(seconds, "solve"):
            solved = solve_layers(
                adapter,
                tokenizer,
                edits,
                recipe,
                prepared,
                contexts,
                targets,
                keys=keys,
                progress=progress,
            )
            updates = {adapter.address(k): each.update for k, each in solved.items()}
            certificates = {k: each.certificate for k, each in solved.items()}
            with _restoring(adapter, recipe.layers):
                for layer, each in solved.items():
                    _add(adapter, layer, each.update)
                after = score(adapter, tokenizer, prompts, wanted, frame=frame)
    outcomes = outcomes_of(edits, before, targets, after)
    report = EditReport(
        recipe=recipe.name,
        origin=recipe.origin,
        outcomes=outcomes,
        certificates=certificates,
        notes=(
            *notes_on(recipe, outcomes, certificates, statistics),
            *_note_on_site(adapter, given, site),
        ),
        seconds=seconds,
    )
    metadata = metadata_of(
        fingerprint, recipe, prepared, statistics, contexts, seed, edits
    )
    return EditResult(UpdateSet(updates, metadata), report)


def metadata_of(
    fingerprint: str,
    recipe: Recipe,
    prepared: Prepared,
    statistics: Mapping[int, KeyStatistics],
    contexts: Contexts,
    seed: int,
    edits: Sequence[Edit],
) -> dict[str, Any]:
    """What an update says of how it came about."""
    return {
        "base_fingerprint": fingerprint,
        "recipe": recipe.as_dict(),
        "statistics": {str(k): v for k, v in prepared.statistics.items()},
        "shrinkage": {str(k): str(statistics[k].shrinkage) for k in recipe.layers},
        "accepted_mismatches": {
            str(k): statistics[k].accepted_mismatch
            for k in recipe.layers
            if statistics[k].accepted_mismatch
        },
        **contexts.as_dict(),
        "seed": seed,
        "edits": [e.as_dict() for e in edits],
        "version": library_version(),
    }


@dataclass(frozen=True, eq=False)
class LayerSolution:
    """One layer's share of an edit."""

    update: RankKUpdate
    """In float32, on the CPU, regularized if the recipe says so."""
    certificate: Certificate
    """Of that update."""
    keys: Tensor
    """[n, d_key] of the edits, in float64, where the factorization is."""


def solve_layers(
    adapter: ModelAdapter,
    tokenizer: Any,
    edits: Sequence[Edit],
    recipe: Recipe,
    prepared: Prepared,
    contexts: Contexts,
    targets: Targets,
    *,
    keys: Tensor | None = None,
    progress: bool = False,
) -> dict[int, LayerSolution]:
    """Keys, residuals and solution of every layer, from the first to the last, each on
    the model as the layers before it left it. The weights are the same bytes
    afterwards.

    Args:
        recipe: with its targets' site resolved.
        keys: of the first layer, if known.
    """
    found: dict[int, LayerSolution] = {}
    # The last one's is solved and never written.
    with _restoring(adapter, recipe.layers[:-1]):
        for index, layer in enumerate(
            tqdm(recipe.layers, desc="layers", disable=not progress)
        ):
            found[layer] = _edit_layer(
                adapter,
                tokenizer,
                edits,
                recipe,
                prepared,
                contexts,
                targets,
                layer,
                keys=None if index else keys,
                remaining=len(recipe.layers) - index,
            )
    return found


def outcomes_of(
    edits: Sequence[Edit],
    before: Sequence[Score],
    targets: Targets | None,
    after: Sequence[Score],
) -> tuple[EditOutcome, ...]:
    """What became of each edit, by its scores on both sides."""
    aims = [None] * len(edits) if targets is None else targets.probability.tolist()
    return tuple(
        EditOutcome(
            edit=e,
            before=math.exp(-b.nll),
            optimised=p,
            after=math.exp(-a.nll),
            says_target=a.argmax,
            said_target=b.argmax,
        )
        for e, b, p, a in zip(edits, before, aims, after, strict=True)
    )


def _edit_layer(
    adapter: ModelAdapter,
    tokenizer: Any,
    edits: Sequence[Edit],
    recipe: Recipe,
    prepared: Prepared,
    contexts: Contexts,
    targets: Targets,
    layer: int,
    *,
    keys: Tensor | None,
    remaining: int,
) -> LayerSolution:
    """Solves one layer on the model as edited so far, and edits it if others remain."""
    average = recipe.key_average
    factorization = prepared.layers[layer].factorization
    # Where the factor is: a layer may be on another device.
    device = factorization.factor.device
    if keys is None:
        keys = keys_at_subjects(adapter, tokenizer, edits, contexts, layer, average)
    keys = keys.to(device, torch.float64)
    # The key that the current value belongs to; the same one, but in ROME's code.
    reached = keys
    if recipe.published_denominator:
        reached = keys_at_subjects(
            adapter, tokenizer, edits, contexts, layer, "clean"
        ).to(device)
    share = 1.0
    if recipe.targets.site == "mlp_output":
        current = _value(adapter, layer, reached)
    else:
        share = adapter.residual_scale(layer)
        last = recipe.layers[-1]
        current = hidden_at_subjects(
            adapter, tokenizer, edits, last, contexts.frame
        ).to(device)
    missing = targets.values.to(device, torch.float64) - current
    residuals = missing / (remaining * share)
    if recipe.published_denominator:
        residuals = _two_key_residuals(factorization, keys, reached, residuals)
    weight = adapter.matrix(layer).to(device, torch.float64)
    scale = None if prepared.scales is None else prepared.scales[layer]
    solution = solve(
        prepared.objective(layer),
        keys=keys,
        residuals=residuals,
        weight=weight if scale is None else scale,
        factorization=factorization,
        names=[f"{e.text} → {e.target}" for e in edits],
    )
    # float32 factors: half the bytes, and far below any weight's own rounding.
    found = solution.update
    update = RankKUpdate(
        found.left, found.right, keys, prepared.background[layer].to(device)
    ).to(torch.float32)
    if remaining > 1:  # the layers after it see it
        _add(adapter, layer, update)
    certificate = solution.certificate
    regularizer = Regularizer.parse(recipe.regularizer)
    if regularizer is not None:
        # Later layers see the update as it was solved for: as published code has it.
        update = regularizer(update, weight)
        certificate = recertified(
            certificate,
            update.to(torch.float64),
            keys=keys,
            residuals=residuals,
            weight=weight if scale is None else scale,
            factorization=factorization,
        )
    return LayerSolution(update.to(device="cpu"), certificate, keys)


def _add(adapter: ModelAdapter, layer: int, update: RankKUpdate) -> None:
    """Adds an update to a layer's weight, in place."""
    address = adapter.address(layer)
    with torch.no_grad():
        weight = adapter.weight(layer)
        here = update.to(device=weight.device)
        weight.copy_(added(weight.detach(), here, transposed=address.transposed))


def _note_on_site(adapter: ModelAdapter, given: Recipe, site: str) -> list[str]:
    if site == given.targets.site:
        return []
    return [
        f"{adapter.architecture.model_type} normalises what its MLPs return: targets "
        "are optimised at the down-projection's output, not at the block's"
    ]


def _value(adapter: ModelAdapter, layer: int, keys: Tensor) -> Tensor:
    """The down-projection's output [n, d_value] at keys, in float64."""
    bias = adapter.down_projection(layer).bias
    values = keys @ adapter.matrix(layer).to(keys).T
    return values + bias.detach().to(keys) if isinstance(bias, Tensor) else values


def _two_key_residuals(
    factorization: Factorization, keys: Tensor, reached: Tensor, residuals: Tensor
) -> Tensor:
    """Residuals with which the one formula gives ROME's published code's update
    Rᵀ (K M K_uᵀ)⁻¹ K M, where K are averaged and K_u bare prompts' keys.

    Raises:
        IllConditioned: the denominator vanishes; names the condition.
    """
    whitened = factorization.whiten(keys)
    gram = whitened @ whitened.T
    mixed = whitened @ factorization.whiten(reached).T
    solved, singular = torch.linalg.solve_ex(mixed.T, residuals)
    if bool(singular):
        raise IllConditioned(
            "rome_original: the denominator K M K_uᵀ is zero or singular, as the "
            "published code's can be; use rome, which has one key"
        )
    rescaled: Tensor = gram @ solved
    return rescaled


@contextmanager
def _restoring(adapter: ModelAdapter, layers: Sequence[int]) -> Iterator[None]:
    """The layers' weights are the same bytes afterwards."""
    originals = {layer: adapter.weight(layer).detach().clone() for layer in layers}
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, original in originals.items():
                adapter.weight(layer).copy_(original)
