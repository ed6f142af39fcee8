"""Keys and hidden states at subjects' last tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from covariance_cache.capture import capture_inputs
from unified_edit.edits import Edit
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.frames import PLAIN, Frame
from unified_edit.model.hooks import by_row, stopping_at
from unified_edit.model.prompts import (
    Contexts,
    PaddedRows,
    Prompt,
    buckets,
    check_rows,
    in_contexts,
    pad,
    subject_prompts,
)

KeyAverage = Literal["flat", "half", "clean"]
"""How keys are averaged over contexts: all alike; half the bare prompt's and half the
mean of the others; or the bare prompt's alone."""


def context_weights(average: KeyAverage, count: int) -> Tensor:
    """Weights [count] of the contexts' keys, the bare prompt's first; they sum to 1."""
    weights = torch.zeros(count, dtype=torch.float64)
    if average == "clean" or count == 1:
        weights[0] = 1
    elif average == "flat":
        weights[:] = 1 / count
    else:
        weights[0] = 0.5
        weights[1:] = 0.5 / (count - 1)
    return weights


def keys_at_subjects(
    adapter: ModelAdapter,
    tokenizer: Any,
    edits: Sequence[Edit],
    contexts: Contexts,
    layer: int,
    average: KeyAverage,
) -> Tensor:
    """Keys [n, d_key] of a layer's MLP at the subjects' last tokens, averaged over
    contexts, in float64 on the layer's device.

    Source: Meng et al. 2022 (ROME), equation 3.
    """
    weights = context_weights(average, len(contexts.templates))
    kept = zip(contexts.templates, weights, strict=True)
    used = replace(contexts, templates=tuple(t for t, w in kept if w > 0))
    rows = _rows(adapter, tokenizer, edits, used)
    name = adapter.key_module(layer)
    keys = _at_subjects(
        adapter, rows, lambda keep: capture_inputs(adapter.model, [name], keep)
    )
    grouped = keys.double().view(len(edits), len(used.templates), -1)
    return torch.einsum("ncd,c->nd", grouped, weights[weights > 0].to(keys.device))


def hidden_at_subjects(
    adapter: ModelAdapter,
    tokenizer: Any,
    edits: Sequence[Edit],
    layer: int,
    frame: Frame = PLAIN,
) -> Tensor:
    """A block's output [n, d_value] at the subjects' last tokens in the bare prompts,
    in float64."""
    rows = _rows(adapter, tokenizer, edits, Contexts(frame=frame))
    block = adapter.block(layer)
    return _at_subjects(
        adapter,
        rows,
        lambda keep: stopping_at(block, lambda hidden: keep("", hidden)),
    ).double()


def _rows(
    adapter: ModelAdapter, tokenizer: Any, edits: Sequence[Edit], contexts: Contexts
) -> list[Prompt]:
    """Prompts up to the subject's last token, edit by edit, context by context: what
    follows the subject cannot change its key."""
    filled = [
        row for e in edits for row in in_contexts(contexts, e.template, e.subject)
    ]
    prompts = subject_prompts(tokenizer, filled, contexts.frame)
    rows = [Prompt(p.ids[: p.subject_end + 1], p.subject_end) for p in prompts]
    check_rows(adapter, [row.ids for row in rows])
    return rows


@torch.no_grad()
def _at_subjects(
    adapter: ModelAdapter,
    rows: Sequence[Prompt],
    capturing: Callable[[Callable[[str, Tensor], None]], Any],
) -> Tensor:
    """What `capturing` sees at each row's last token, [rows, d], in rows' order."""
    found: list[Tensor | None] = [None] * len(rows)
    for chosen in buckets([len(row.ids) for row in rows]):
        batch = pad([rows[index].ids for index in chosen], adapter.device)
        ends = torch.tensor([rows[index].subject_end for index in chosen])

        def keep(
            _name: str,
            tensor: Tensor,
            chosen: list[int] = chosen,
            ends: Tensor = ends,
        ) -> None:
            index = torch.arange(len(chosen), device=tensor.device)
            picked = by_row(tensor, len(chosen))[index, ends.to(tensor.device)]
            for row, vector in zip(chosen, picked, strict=True):
                found[row] = vector

        with capturing(keep):
            _forward(adapter, batch)
    return torch.stack([vector for vector in found if vector is not None])


def _forward(adapter: ModelAdapter, batch: PaddedRows) -> None:
    adapter.model(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
        logits_to_keep=1,
    )
