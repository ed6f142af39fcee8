"""Prompts cut at their subject's last token: the prefix is run once, and only the few
tokens from there to the target's end again and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from unified_edit.edits import Edit, fill
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.prompts import (
    Contexts,
    continuations,
    in_contexts,
    pad,
    subject_prompts,
)


@dataclass(frozen=True)
class Row:
    """One prompt of one edit, cut at the subject's last token."""

    edit: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    labels: tuple[int, ...]
    """Ids to predict, one after another from `read` on; empty in KL rows."""
    read: int
    """Index in `suffix` where the first label, or the KL term, is read."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rows as tensors, with the prefix's attention keys and values."""

    edit: Tensor
    """[rows], index of the row's edit in the chunk"""
    suffix: Tensor
    """[rows, width]"""
    mask: Tensor
    """[rows, prefix width + width]"""
    positions: Tensor
    """[rows, width]"""
    cache: tuple[tuple[Tensor, Tensor], ...]
    """For each layer [rows, heads, prefix width, head size], twice; empty where no
    row has a prefix."""
    reads: Tensor
    """[rows, most labels], positions in the suffix"""
    labels: Tensor
    """[rows, most labels], -1 where there is none"""

    def select(self, rows: Tensor) -> Chunk:
        """The chunk of some rows only."""
        return Chunk(
            self.edit[rows],
            self.suffix[rows],
            self.mask[rows],
            self.positions[rows],
            tuple((k[rows], v[rows]) for k, v in self.cache),
            self.reads[rows],
            self.labels[rows],
        )


def make_rows(
    tokenizer: Any,
    edits: Sequence[Edit],
    contexts: Contexts,
    kl_prompts: Sequence[str],
    kl_position: Literal["subject", "end"],
) -> list[Row]:
    """For each edit its prompt in every context, the bare one first, and then its KL
    prompts."""
    owners, filled, targets = [], [], []
    for index, edit in enumerate(edits):
        for text in in_contexts(contexts, edit.template, edit.subject):
            owners.append(index)
            filled.append(text)
            targets.append(edit.target)
    prompts = subject_prompts(tokenizer, filled)
    pairs = continuations(tokenizer, [text for text, _ in filled], targets)
    rows = []
    for owner, prompt, (ids, target) in zip(owners, prompts, pairs, strict=True):
        cut = prompt.subject_end
        # The last label is only predicted, never read.
        whole = ids + target[:-1]
        rows.append(Row(owner, whole[:cut], whole[cut:], target, len(ids) - 1 - cut))
    for index, edit in enumerate(edits):
        stay = [fill(template, edit.subject) for template in kl_prompts]
        for prompt in subject_prompts(tokenizer, stay):
            cut = prompt.subject_end
            end = len(prompt.ids) if kl_position == "end" else cut + 1
            rows.append(
                Row(index, prompt.ids[:cut], prompt.ids[cut:end], (), end - 1 - cut)
            )
    return rows


def prepare_chunk(adapter: ModelAdapter, rows: Sequence[Row], start: int) -> Chunk:
    """Tensors of a chunk; runs the prefixes once."""
    # Padded on the right: positions are explicit, so the gap before the suffix is
    # only masked, and no padding attends to nothing, which some kernels make NaN.
    prefix = pad([row.prefix for row in rows], adapter.device)
    suffix = pad([row.suffix for row in rows], adapter.device)
    cache: tuple[tuple[Tensor, Tensor], ...] = ()
    if prefix.ids.shape[1]:
        visible = prefix.mask.clone()
        visible[:, 0] = 1  # for rows without prefix
        with torch.no_grad():
            output = adapter.model(
                input_ids=prefix.ids,
                attention_mask=visible,
                position_ids=prefix.positions,
                past_key_values=DynamicCache(),
                use_cache=True,
                logits_to_keep=1,
            )
        cache = tuple((x.keys, x.values) for x in output.past_key_values.layers)
    most = max(max(len(row.labels) for row in rows), 1)
    reads = torch.zeros(len(rows), most, dtype=torch.long)
    labels = torch.full((len(rows), most), -1)
    for index, row in enumerate(rows):
        reads[index, 0] = row.read
        for offset, label in enumerate(row.labels):
            reads[index, offset] = row.read + offset
            labels[index, offset] = label
    before = prefix.mask.sum(1, keepdim=True)
    return Chunk(
        edit=torch.tensor([row.edit - start for row in rows], device=adapter.device),
        suffix=suffix.ids,
        mask=torch.cat([prefix.mask, suffix.mask], dim=1),
        positions=suffix.positions + before,
        cache=cache,
        reads=reads.to(adapter.device),
        labels=labels.to(adapter.device),
    )


def suffix_logits(adapter: ModelAdapter, chunk: Chunk) -> Tensor:
    """The model's own logits over the suffixes, [rows, width, vocabulary]."""
    # A fresh cache object each time: it grows by the suffix as it is used.
    cache = DynamicCache(chunk.cache) if chunk.cache else None
    output = adapter.model(
        input_ids=chunk.suffix,
        attention_mask=chunk.mask,
        position_ids=chunk.positions,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    logits = output.logits
    assert isinstance(logits, Tensor)
    return logits
