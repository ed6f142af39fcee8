"""Whether equality constraints can all hold, and which of them say nothing new.

A linear dependence between keys that must be met exactly leaves two cases. Their
residuals follow the same dependence: the edit is a repetition and is left out of the
system (its constraint holds through the others). Or they do not: no Δ exists, and the
edits are named.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from unified_edit.algebra.linalg import dependence
from unified_edit.errors import InfeasibleEdits

_PARTNER = 0.1
_MOST_NAMED = 10


def redundant_edits(
    whitened: Tensor,
    residuals: Tensor,
    *,
    hard: list[int],
    unreachable: list[int],
    tolerance: float,
    label: Callable[[int], str],
) -> tuple[int, ...]:
    """Edits with ρ = 0 that follow from other edits with ρ = 0.

    Args:
        whitened: [n, r], rows h with h hᵀ = kᵀ M k.
        residuals: [n, d_value]
        hard: edits with ρ = 0.
        unreachable: those of them on whose key no allowed Δ acts (k = 0, or k
            orthogonal to the null space's basis).
        tolerance: sine of the angle up to which a key counts as dependent, and
            relative difference up to which residuals count as equal.
        label: how messages name an edit.

    Raises:
        InfeasibleEdits: some constraints contradict each other.
    """
    refused = [i for i in unreachable if bool(residuals[i].any())]
    if refused:
        raise InfeasibleEdits(
            f"{_list(refused, label)}: the key is zero, or orthogonal to all the "
            "directions that preservation leaves free, so nothing can change its "
            "value; use a larger null space, or give it slack",
            tuple(refused),
        )
    hard = sorted(set(hard).difference(unreachable))
    if len(hard) < 2:
        return tuple(unreachable)
    rows = whitened[hard]
    lengths = rows.norm(dim=1, keepdim=True)
    rows, targets = rows / lengths, residuals[hard] / lengths
    resolution = 8 * len(hard) * torch.finfo(whitened.dtype).eps
    floor = max(tolerance**2, resolution)
    split = dependence(rows @ rows.T, floor)
    if split.dependent:
        coefficients = split.coefficients.to(targets)
        wanted, kept = targets[list(split.dependent)], targets[list(split.kept)]
        gaps = (wanted - coefficients @ kept).norm(dim=1)
        scales = wanted.norm(dim=1) + coefficients.abs() @ kept.norm(dim=1)
        broken = (gaps > math.sqrt(floor) * scales).nonzero()[:, 0].tolist()
        if broken:
            conflicts = []
            for row in broken:
                partners = _partners(coefficients[row])
                conflicts.append(
                    (
                        hard[split.dependent[row]],
                        [hard[split.kept[column]] for column in partners],
                        float(gaps[row] / scales[row]),
                    )
                )
            rank = whitened.shape[1]
            raise _infeasible(conflicts, n=len(hard), rank=rank, label=label)
    return tuple(sorted([*unreachable, *(hard[i] for i in split.dependent)]))


def _partners(coefficients: Tensor) -> list[int]:
    sizes = coefficients.abs()
    partners: list[int] = (sizes >= _PARTNER * sizes.max()).nonzero()[:, 0].tolist()
    return partners


def _infeasible(
    conflicts: list[tuple[int, list[int], float]],
    *,
    n: int,
    rank: int,
    label: Callable[[int], str],
) -> InfeasibleEdits:
    named = sorted({i for edit, partners, _ in conflicts for i in [edit, *partners]})
    lines = []
    if n > rank:
        lines.append(
            f"{n} edits must hold exactly, but keys have only {rank} free directions"
        )
    for edit, partners, gap in conflicts[:_MOST_NAMED]:
        alone = len(partners) == 1
        relation = "the key of" if alone else "a key that combines those of"
        lines.append(
            f"{label(edit)} has {relation} {_list(partners, label)} but asks for "
            f"another residual (relative difference {gap:.2g})"
        )
    if len(conflicts) > _MOST_NAMED:
        lines.append(f"and {len(conflicts) - _MOST_NAMED} more")
    return InfeasibleEdits(
        "equality cannot hold for all edits: "
        + "; ".join(lines)
        + ". Remove edits, or give them slack (LeastSquares, Slack)",
        tuple(named),
    )


def _list(edits: list[int], label: Callable[[int], str]) -> str:
    shown = ", ".join(label(edit) for edit in edits[:_MOST_NAMED])
    more = len(edits) - _MOST_NAMED
    return f"{shown} and {more} more" if more > 0 else shown
