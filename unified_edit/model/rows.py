"""Prompts cut at their subject's last token, and how they are put together into
forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from unified_edit.edits import Edit
from unified_edit.model.prompts import (
    Contexts,
    in_contexts,
    subject_prompts,
    targets_after,
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
    weight: float
    """In the mean over its edit's contexts, or over its KL prompts."""


def make_rows(
    tokenizer: Any,
    edits: Sequence[Edit],
    contexts: Contexts,
    kl_prompts: Sequence[str],
    kl_position: Literal["subject", "end"],
) -> list[list[Row]]:
    """For each edit its prompt in every context, the bare one first, and then its KL
    prompts."""
    filled, targets = [], []
    for edit in edits:
        for text in in_contexts(contexts, edit.template, edit.subject):
            filled.append(text)
            targets.append(edit.target)
    frame = contexts.frame
    prompts = subject_prompts(tokenizer, filled, frame)
    texts, alone = [text for text, _ in filled], [prompt.ids for prompt in prompts]
    answers = targets_after(tokenizer, texts, alone, targets, frame)
    rows: list[list[Row]] = [[] for _ in edits]
    for index, (prompt, target) in enumerate(zip(prompts, answers, strict=True)):
        owner, cut = index // len(contexts.templates), prompt.subject_end
        # The last label is only predicted, never read.
        whole, read = prompt.ids + target[:-1], len(prompt.ids) - 1 - cut
        weight = 1 / len(contexts.templates)
        rows[owner].append(Row(owner, whole[:cut], whole[cut:], target, read, weight))
    bare = Contexts(frame=frame)
    stay = [
        in_contexts(bare, prompt, edit.subject)[0]
        for edit in edits
        for prompt in kl_prompts
    ]
    for index, prompt in enumerate(subject_prompts(tokenizer, stay, frame)):
        owner, cut = index // len(kl_prompts), prompt.subject_end
        end = len(prompt.ids) if kl_position == "end" else cut + 1
        ids, weight = prompt.ids, 1 / len(kl_prompts)
        rows[owner].append(
            Row(owner, ids[:cut], ids[cut:end], (), end - 1 - cut, weight)
        )
    return rows


def chunks_of(rows: Sequence[Sequence[Row]], budget: int) -> list[range]:
    """Edits in consecutive parts of about equal size, each within a budget of suffix
    tokens, or of one edit."""
    sizes = [sum(len(row.suffix) for row in each) for each in rows]
    parts = -(-sum(sizes) // budget)
    goal = -(-sum(sizes) // max(parts, 1))
    chunks, start, size = [], 0, 0
    for index, more in enumerate(sizes):
        # Cut where the part comes nearest its goal, but never above the budget.
        over = size + more - goal
        if index > start and (size + more > budget or over > goal - size):
            chunks.append(range(start, index))
            start, size = index, 0
        size += more
    if sizes:
        chunks.append(range(start, len(sizes)))
    return chunks


def heads_of(rows: Sequence[Row]) -> list[tuple[int, ...]]:
    """What all edits' rows in a context begin with, before their subjects, for each
    context and KL prompt: it need run only once. Row i is in context i modulo their
    number."""
    edits = rows[-1].edit + 1
    contexts = len(rows) // edits
    if edits == 1:
        return [()] * contexts
    heads = []
    for context in range(contexts):
        prefixes = [row.prefix for row in rows[context::contexts]]
        # What the least and the greatest share, all share.
        first, last = min(prefixes), max(prefixes)
        pairs = enumerate(zip(first, last, strict=False))
        heads.append(first[: next((i for i, (a, b) in pairs if a != b), len(first))])
    return heads


def by_width(widths: Sequence[int], cost: int) -> list[list[int]]:
    """Indices in groups of like width, so that padded tokens plus `cost` for each
    group are fewest; groups by width ascending, order kept within."""
    distinct = sorted(set(widths))
    counts = [widths.count(width) for width in distinct]
    best, begins = [0], []
    for stop in range(1, len(distinct) + 1):
        costs = [
            best[start] + sum(counts[start:stop]) * distinct[stop - 1] + cost
            for start in range(stop)
        ]
        begins.append(costs.index(min(costs)))
        best.append(min(costs))
    groups: list[list[int]] = []
    stop = len(distinct)
    while stop:
        start = begins[stop - 1]
        wanted = set(distinct[start:stop])
        groups.append([i for i, width in enumerate(widths) if width in wanted])
        stop = start
    return groups[::-1]
