"""What is known of a step: before it is written, from the solution, the sums so far and
the statistics alone; afterwards, from what the edited model says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from unified_edit.algebra.certificate import mean_second_moment, through
from unified_edit.algebra.regularize import Regularizer
from unified_edit.algebra.update import RankKUpdate
from unified_edit.engine import LayerSolution
from unified_edit.guard import Readings
from unified_edit.model.scoring import Score
from unified_edit.preparation import Prepared
from unified_edit.session_state import LayerState


def foresee(
    states: Mapping[int, LayerState],
    solved: Mapping[int, LayerSolution],
    prepared: Prepared,
    originals: Mapping[int, Tensor],
    scale: float,
) -> tuple[dict[int, LayerState], Readings]:
    """The layers as a share of the update would leave them, and what is known of it.

    Norms and damage are kept as sums, to which a step adds its own and a cross term
    through the factors: nothing of the size of ΔW is made for them.

    Args:
        originals: the unedited weights, seen as [d_value, d_key].
        scale: the share.
    """
    recipe, scales = prepared.recipe, prepared.scales
    assert scales is not None
    rule = Regularizer.parse(recipe.regularizer)
    layers: dict[int, LayerState] = {}
    damages, totals, leverages = [], [], []
    for layer, each in solved.items():
        kept, found, reference = states[layer], each.certificate, scales[layer]
        moment = mean_second_moment(prepared.layers[layer].preservation)
        device = originals[layer].device
        one = each.update.to(device=device)
        one = RankKUpdate(scale * one.left, one.right)
        # A state that was read from a file is on the CPU.
        before = None if kept.change is None else kept.change.to(device=device)
        square = kept.square + (scale * found.norm) ** 2
        damage = None
        if moment is not None and kept.damage is not None:
            assert reference.mean_square and found.preservation_damage is not None
            own = scale**2 * found.preservation_damage
            damages.append(own)
            damage = kept.damage + own * reference.mean_square
        if before is not None:
            square += 2 * _inner(before, one, None)
            if damage is not None:
                damage += 2 * _inner(before, one, moment)
        change = _joined(before, one)
        if rule is not None and rule.when == "total":
            change = rule(change, originals[layer])
            ratio = change.norm() ** 2 / square
            square, damage = square * ratio, damage and damage * ratio
        layers[layer] = replace(kept, change=change, square=square, damage=damage)
        if damage is not None and reference.mean_square:
            totals.append(damage / reference.mean_square)
        if recipe.preservation == "second_moment":
            least = recipe.preservation_weight * min(found.leverage)
            leverages.append(least / each.keys.shape[1])
    certificates = [each.certificate for each in solved.values()]
    return layers, Readings(
        leverage=min(leverages, default=None),
        condition=max(each.condition_number for each in certificates),
        relative_norm=scale * max(each.relative_norm or 0.0 for each in certificates),
        drift=max(layers[k].length / scales[k].norm for k in layers),
        damage=max(damages, default=None),
        total_damage=max(totals, default=None),
    )


def measured(
    readings: Readings,
    held: Sequence[Score],
    perplexity: float | None,
    known: tuple[float, float] | None,
) -> Readings:
    """With what only the edited model tells.

    Args:
        held: of sampled edits that held before the step.
        perplexity: on held-out text.
        known: the same of the unedited model, and before the step.
    """
    if perplexity is not None and known is not None:
        readings = replace(
            readings, canary=perplexity / known[1], total_canary=perplexity / known[0]
        )
    if held:
        share = sum(score.argmax for score in held) / len(held)
        readings = replace(readings, retention=share)
    return readings


def _inner(change: RankKUpdate, one: RankKUpdate, moment: Tensor | None) -> float:
    """tr(Δ C dᵀ) of the change so far and one more, or tr(Δ dᵀ); in float64, through
    the factors."""
    right = one.right.double()
    if moment is not None:
        right = through(right, moment.to(right.device))
    across = change.left.double().T @ one.left.double()
    return float((across * (change.right.double() @ right.T)).sum())


def _joined(change: RankKUpdate | None, one: RankKUpdate) -> RankKUpdate:
    """Both in one; once there are more factors than twice the rows, as the identity and
    the change itself, which is smaller."""
    if change is None:
        return one
    both = RankKUpdate(change.left, change.right).then(one)
    if both.rank <= 2 * both.shape[0]:
        return both
    dense = (both.left.double() @ both.right.double()).to(both.left.dtype)
    return RankKUpdate(torch.eye(len(dense)).to(dense), dense)
