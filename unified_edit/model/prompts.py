"""Text to token ids: prompts with their subject's last token, targets, contexts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unified_edit.edits import SLOT, fill
from unified_edit.errors import NonFiniteError, PromptError
from unified_edit.model.adapter import ModelAdapter

TOKENS_PER_FORWARD = 8192


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt."""

    ids: tuple[int, ...]
    subject_end: int
    """Index in `ids` of the subject's last token: the one that holds the subject's
    last character."""


@dataclass(frozen=True)
class Contexts:
    """Prefixes put before each prompt so that an edit does not hang on one wording.
    Generated once from a seed, and stored with the update."""

    templates: tuple[str, ...] = (SLOT,)
    """Each with `{}` in the prompt's place; the first is the bare prompt."""

    def __post_init__(self) -> None:
        if not self.templates or self.templates[0] != SLOT:
            raise PromptError("contexts must begin with the bare prompt '{}'")
        for template in self.templates:
            if template.count(SLOT) != 1:
                raise PromptError(f"context {template!r} must have one slot {{}}")


@dataclass(frozen=True)
class ContextSettings:
    """How contexts are generated."""

    samples: tuple[tuple[str, int], ...] = ()
    """(seed text, length in tokens with the seed) of each prefix; an empty seed text
    stands for the tokenizer's beginning-of-text token."""
    top_k: int = 5
    """Sample among this many most probable tokens."""

    def __post_init__(self) -> None:
        if self.top_k < 1 or any(length < 1 for _, length in self.samples):
            raise PromptError("top_k and each context's length must be at least 1")


def tokenize(
    tokenizer: Any, texts: Sequence[str]
) -> list[tuple[tuple[int, ...], list[tuple[int, int]]]]:
    """Ids and character offsets of each text, with the special tokens that the
    tokenizer puts before it, without those that it appends (EOS: nothing continues
    after it), without padding or truncation.

    Raises:
        PromptError: the tokenizer gives no offsets (a slow tokenizer).
    """
    if not getattr(tokenizer, "is_fast", False):
        raise PromptError(
            f"{type(tokenizer).__name__} gives no character offsets, so a subject's "
            "tokens cannot be found reliably; load the fast tokenizer (use_fast=True)"
        )
    if not texts:  # which tokenizers do not take
        return []
    encoded = tokenizer(
        list(texts),
        return_offsets_mapping=True,
        padding=False,
        truncation=False,
        verbose=False,
    )
    found = []
    for ids, offsets in zip(
        encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        stop = len(ids)
        while stop > 1 and tuple(offsets[stop - 1]) == (0, 0):
            stop -= 1
        found.append((tuple(ids[:stop]), offsets[:stop]))
    return found


def subject_prompts(tokenizer: Any, filled: Sequence[tuple[str, int]]) -> list[Prompt]:
    """Tokenized prompts from (text, index of the character after the subject).

    Raises:
        PromptError: no token holds the subject's last character.
    """
    prompts = []
    encoded = tokenize(tokenizer, [text for text, _ in filled])
    for (text, end), (ids, offsets) in zip(filled, encoded, strict=True):
        holders = [
            index for index, (start, stop) in enumerate(offsets) if start < end <= stop
        ]
        if not holders:
            raise PromptError(
                f"no token of {text!r} holds the subject's last character "
                f"{text[end - 1]!r}; the tokenizer drops it"
            )
        prompts.append(Prompt(ids, holders[-1]))
    return prompts


def in_contexts(
    contexts: Contexts, template: str, subject: str
) -> list[tuple[str, int]]:
    """The prompt in each context: (text, index of the character after the subject)."""
    text, end = fill(template, subject)
    rows = []
    for context in contexts.templates:
        before, _, after = context.partition(SLOT)
        rows.append((before + text + after, len(before) + end))
    return rows


def continuations(
    tokenizer: Any, prompts: Sequence[str], targets: Sequence[str]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Ids of each prompt and of the target that follows it after one space.

    The target's ids are what is left of `prompt + " " + target` after the prompt's
    ids, so that BOS and prepended spaces never come into a target.

    Raises:
        PromptError: the prompt has no ids, or they are not a prefix of the whole's.
    """
    alone = tokenize(tokenizer, prompts)
    whole = tokenize(
        tokenizer,
        [f"{p} {t}" for p, t in zip(prompts, targets, strict=True)],
    )
    pairs = []
    for prompt, target, (ids, _), (full, _) in zip(
        prompts, targets, alone, whole, strict=True
    ):
        if not ids:
            raise PromptError(
                "the prompt is empty and the tokenizer puts no token before it, so "
                f"nothing predicts {target!r}; give a prompt"
            )
        if full[: len(ids)] != ids or len(full) == len(ids):
            raise PromptError(
                f"the tokens of {prompt!r} change when {target!r} follows; end the "
                "prompt at a word's end, without the space before the target"
            )
        pairs.append((ids, full[len(ids) :]))
    return pairs


def check_rows(adapter: ModelAdapter, rows: Sequence[Sequence[int]]) -> None:
    """Refuses rows longer than the model's positions, and ids that it has no embedding
    for: both would fail deep inside, or not at all.

    Raises:
        PromptError: naming the longest, or the largest.
    """
    limit = getattr(adapter.model.config, "max_position_embeddings", None)
    longest = max(map(len, rows), default=0)
    if limit is not None and longest > limit:
        raise PromptError(
            f"a prompt with its context and target has {longest} tokens, the model "
            f"has {limit} positions; shorten the prompt or the contexts"
        )
    embeddings: Any = adapter.model.get_input_embeddings()  # type: ignore[operator]
    largest = max((max(row) for row in rows if len(row)), default=0)
    if largest >= embeddings.num_embeddings:
        raise PromptError(
            f"the tokenizer made token id {largest}, the model has "
            f"{embeddings.num_embeddings} embeddings; is it this model's tokenizer?"
        )


@dataclass(frozen=True)
class PaddedRows:
    """Rows of ids padded to one width, with what a forward pass needs."""

    ids: Tensor
    """[rows, width]"""
    mask: Tensor
    """[rows, width]: 1 where there is a token."""
    positions: Tensor
    """[rows, width]: position ids; padding repeats a neighbour's."""


def pad(
    rows: Sequence[Sequence[int]], device: torch.device, *, left: bool = False
) -> PaddedRows:
    """Pads on the right, or on the left; independent of any tokenizer's settings."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)[:, None]
    width = int(lengths.max()) if len(rows) else 0
    gaps = [[0] * (width - len(row)) for row in rows]
    padded = [
        [*gap, *row] if left else [*row, *gap]
        for row, gap in zip(rows, gaps, strict=True)
    ]
    ids = torch.tensor(padded, dtype=torch.long).view(len(rows), width)
    column = torch.arange(width)
    mask = (column >= width - lengths if left else column < lengths).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return PaddedRows(ids.to(device), mask.to(device), positions.to(device))


def buckets(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches of like length, each within the budget of tokens."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    return within([order], lengths)


def within(
    groups: Sequence[Sequence[int]], lengths: Sequence[int]
) -> Iterator[list[int]]:
    """Groups of indices cut where padded tokens would exceed the budget."""
    for group in groups:
        chosen: list[int] = []
        longest = 0
        for index in group:
            longest = max(longest, lengths[index])
            if chosen and (len(chosen) + 1) * longest > TOKENS_PER_FORWARD:
                yield chosen
                chosen, longest = [], lengths[index]
            chosen.append(index)
        if chosen:
            yield chosen


@torch.no_grad()
def generate_contexts(
    adapter: ModelAdapter, tokenizer: Any, settings: ContextSettings, seed: int
) -> Contexts:
    """Samples the contexts' prefixes from the model itself: the bare prompt first,
    then one template for each of `settings.samples`, "<text>. {}".

    Source: Meng et al. 2023 (MEMIT), section 4.3; there unseeded.
    """
    generator = torch.Generator().manual_seed(seed)
    templates = [SLOT]
    for text, length in settings.samples:
        ids = list(tokenize(tokenizer, [text])[0][0]) if text else []
        if not ids:
            start = tokenizer.bos_token_id
            start = tokenizer.eos_token_id if start is None else start
            if start is None:
                raise PromptError(
                    "the tokenizer has neither BOS nor EOS to begin a context with; "
                    "give the contexts seed words"
                )
            ids = [start]
        special = set(tokenizer.all_special_ids)
        seeds = sum(token not in special for token in ids)
        for _ in range(length - max(seeds, 1)):
            row = torch.tensor([ids], device=adapter.device)
            logits = adapter.model(
                input_ids=row, use_cache=False, logits_to_keep=1
            ).logits[0, -1]
            if not bool(torch.isfinite(logits).all()):
                raise NonFiniteError(
                    f"the model's logits are not finite: {adapter.why_not_finite()}"
                )
            top = logits.float().cpu().topk(min(settings.top_k, logits.shape[-1]))
            choice = torch.multinomial(top.values.softmax(-1), 1, generator=generator)
            ids.append(int(top.indices[choice]))
        prefix = tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        prefix = " ".join(prefix.replace("{", " ").replace("}", " ").split())
        templates.append(f"{prefix}. {SLOT}" if prefix else SLOT)
    return Contexts(tuple(templates))
