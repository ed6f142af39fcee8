"""Averages of causal traces by token role, with intervals, and both as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from unified_edit.errors import EditError
from unified_edit.evaluate.intervals import Interval, bootstrap
from unified_edit.model.restoring import Kind
from unified_edit.model.tracing import ROLES, Role, Trace, Traces


@dataclass(frozen=True)
class RoleEffects:
    """Average indirect effects of one kind at the tokens of one role."""

    facts: int
    """How many have such a token."""
    layers: tuple[Interval, ...]
    """For each layer the mean over facts; of a fact with several such tokens the mean
    over them counts."""

    @property
    def peak(self) -> int:
        """The layer with the highest mean."""
        return max(range(len(self.layers)), key=lambda i: self.layers[i].mean)


@dataclass(frozen=True)
class AverageEffects:
    """What traces say together."""

    facts: int
    clean: Interval
    """Probability of the answer."""
    total: Interval
    """Average total effect: what the noise takes away of it."""
    indirect: Mapping[Kind, Mapping[Role, RoleEffects]]
    """Average indirect effects; a role that no fact has is absent."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "facts": self.facts,
            "clean": asdict(self.clean),
            "total_effect": asdict(self.total),
            "indirect_effects": {
                kind: {
                    role: {
                        "facts": each.facts,
                        "mean": [at.mean for at in each.layers],
                        "low": [at.low for at in each.layers],
                        "high": [at.high for at in each.layers],
                    }
                    for role, each in roles.items()
                }
                for kind, roles in self.indirect.items()
            },
        }


def average_effects(traces: Traces, seed: int = 0) -> AverageEffects:
    """Means over facts with 95 % bootstrap intervals.

    Source: Meng et al. 2022 (ROME), section 2.1 and figure 2: ATE and AIE.

    Raises:
        EditError: no fact was traced.
    """
    facts = traces.traces
    if not facts:
        raise EditError(
            f"no fact was traced: the model knows none of the {len(traces.unknown)} "
            "given; give facts that it completes by itself"
        )
    whole = bootstrap(
        {
            "clean": [each.clean for each in facts],
            "total": [each.total_effect for each in facts],
        },
        seed=seed,
    )
    indirect: dict[Kind, dict[Role, RoleEffects]] = {}
    for kind in traces.settings.kinds:
        indirect[kind] = {}
        for role in ROLES:
            rows = [_at_role(each, kind, role) for each in facts]
            known = [row for row in rows if row is not None]
            if known:
                table = torch.stack(known).T
                columns = {str(i): each.tolist() for i, each in enumerate(table)}
                layers = tuple(bootstrap(columns, seed=seed).values())
                indirect[kind][role] = RoleEffects(len(known), layers)
    return AverageEffects(len(facts), whole["clean"], whole["total"], indirect)


def _at_role(trace: Trace, kind: Kind, role: Role) -> Tensor | None:
    """Mean effect over a fact's tokens of a role, [layers]."""
    at = [index for index, each in enumerate(trace.roles) if each == role]
    return trace.indirect_effect(kind)[at].mean(0) if at else None


def as_dict(traces: Traces) -> dict[str, Any]:
    """Settings, and every fact's effects, as plain JSON data."""
    return {
        "settings": {**asdict(traces.settings), "window": traces.window},
        "embedding_deviation": traces.deviation,
        "unknown": list(traces.unknown),
        "facts": [
            {
                "prompt": each.fact.text,
                "subject": each.fact.subject,
                "answer": each.fact.target,
                "tokens": list(each.tokens),
                "subject_tokens": [each.subject.start, each.subject.stop],
                "clean": each.clean,
                "corrupted": each.corrupted,
                "restored": {
                    kind: table.tolist() for kind, table in each.restored.items()
                },
            }
            for each in traces.traces
        ],
    }
