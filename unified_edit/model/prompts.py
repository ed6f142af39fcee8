"""Text to token ids: prompts with their subject's last token, targets, contexts."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from unified_edit.edits import SLOT, fill
from unified_edit.errors import NonFiniteError, PromptError
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.frames import PLAIN, Frame, chat_frame

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
    frame: Frame = PLAIN
    """Around each prompt with its prefix."""

    def __post_init__(self) -> None:
        if not self.templates or self.templates[0] != SLOT:
            raise PromptError("contexts must begin with the bare prompt '{}'")
        for template in self.templates:
            if template.count(SLOT) != 1:
                raise PromptError(f"context {template!r} must have one slot {{}}")

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data; a plain frame is left out."""
        frame = {} if self.frame == PLAIN else {"frame": asdict(self.frame)}
        return {"contexts": list(self.templates), **frame}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Contexts:
        """From what `as_dict` gave, among other data such as an update's metadata."""
        return cls(tuple(data["contexts"]), Frame(**data.get("frame", {})))


@dataclass(frozen=True)
class ContextSettings:
    """How contexts are generated."""

    samples: tuple[tuple[str, int], ...] = ()
    """(seed text, length in tokens with the seed) of each prefix; an empty seed text
    stands for the tokenizer's beginning-of-text token."""
    top_k: int = 5
    """Sample among this many most probable tokens."""
    chat: bool = False
    """Prompts, with their prefixes, are put in the tokenizer's chat template."""

    def __post_init__(self) -> None:
        if type(self.chat) is not bool:
            raise PromptError(f"chat is true or false, not {self.chat!r}")
        if self.top_k < 1 or any(length < 1 for _, length in self.samples):
            raise PromptError("top_k and each context's length must be at least 1")


def tokenize(
    tokenizer: Any, texts: Sequence[str], *, special: bool = True
) -> list[tuple[tuple[int, ...], list[tuple[int, int]]]]:
    """Ids and character offsets of each text, with the special tokens that the
    tokenizer puts before it (if `special`), without those that it appends (EOS: nothing
    continues after it), without padding or truncation.

    Raises:
        PromptError: the tokenizer gives no offsets (a slow tokenizer), or a text is no
            Unicode.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise PromptError(
            f"{type(tokenizer).__name__} gives no character offsets, so a subject's "
            "tokens cannot be found reliably; load the fast tokenizer (use_fast=True)"
        )
    if not texts:  # which tokenizers do not take
        return []
    for text in texts:
        if text.encode(errors="ignore").decode() != text:
            raise PromptError(
                f"{text!a} holds half of a character (a lone surrogate), which no "
                "tokenizer takes; mend the text"
            )
    encoded = tokenizer(
        list(texts),
        add_special_tokens=special,
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


def subject_prompts(
    tokenizer: Any, filled: Sequence[tuple[str, int]], frame: Frame = PLAIN
) -> list[Prompt]:
    """Tokenized prompts from (text, index of the character after the subject).

    Args:
        filled: each in its frame already, as `in_contexts` gives them.

    Raises:
        PromptError: no token holds the subject's last character.
    """
    prompts = []
    encoded = tokenize(tokenizer, [text for text, _ in filled], special=frame.special)
    for (text, end), (ids, offsets) in zip(filled, encoded, strict=True):
        holder = _holder(text, end, offsets)
        if holder is None:
            raise PromptError(
                f"no token of {text!r} holds the subject's last character "
                f"{text[end - 1]!r}; the tokenizer drops it"
            )
        prompts.append(Prompt(ids, holder))
    return prompts


def subject_starts(
    tokenizer: Any, filled: Sequence[tuple[str, int]], frame: Frame = PLAIN
) -> list[int]:
    """Index of the first token that holds a subject's first character, of (text, index
    of that character), each in its frame already; for texts that `subject_prompts`
    takes."""
    found = []
    encoded = tokenize(tokenizer, [text for text, _ in filled], special=frame.special)
    for (text, begin), (ids, offsets) in zip(filled, encoded, strict=True):
        first = next(i for i, (_, stop) in enumerate(offsets) if stop > begin)
        start, stop = offsets[first]
        run = [i for i, each in enumerate(offsets) if tuple(each) == (start, stop)]
        # As in `_holder`.
        if len(run) == len(text[start:stop].encode()):
            first = run[0] + len(text[start:begin].encode())
        # The space that a tokenizer puts before a text may have the offsets of what
        # follows it.
        while not tokenizer.decode([ids[first]]).strip():
            first += 1
        found.append(first)
    return found


def _holder(text: str, end: int, offsets: Sequence[tuple[int, int]]) -> int | None:
    """Index of the last token that stands for the character before `end`."""
    found = [i for i, (start, stop) in enumerate(offsets) if start < end <= stop]
    if not found:
        # A normalizer put it into the character before, whose token is the one.
        before, last = text[: end - 1], text[end - 1]
        apart = unicodedata.normalize("NFC", before) + last
        melted = before and unicodedata.normalize("NFC", before + last) != apart
        return _holder(text, end - 1, offsets) if melted else None
    start, stop = offsets[found[-1]]
    run = [index for index in found if tuple(offsets[index]) == (start, stop)]
    beyond = len(text[end:stop].encode())
    # Unknown characters in a row may be bytes that all have the row's offsets.
    if len(run) == len(text[start:stop].encode()):
        return run[-1] - beyond
    return found[-1]


def in_contexts(
    contexts: Contexts, template: str, subject: str
) -> list[tuple[str, int]]:
    """The prompt in each context, in its frame: (text, index of the character after
    the subject)."""
    text, end = fill(template, subject)
    frame = contexts.frame
    rows = []
    for context in contexts.templates:
        before, _, after = context.partition(SLOT)
        framed = frame.around(before + text + after)
        rows.append((framed, len(frame.before) + len(before) + end))
    return rows


def continuations(
    tokenizer: Any,
    prompts: Sequence[str],
    targets: Sequence[str],
    frame: Frame = PLAIN,
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Ids of each prompt, and of the target that follows it after the frame's joint.

    Args:
        prompts: each in its frame already.

    Raises:
        PromptError: as `targets_after`.
    """
    alone = [ids for ids, _ in tokenize(tokenizer, prompts, special=frame.special)]
    after = targets_after(tokenizer, prompts, alone, targets, frame)
    return list(zip(alone, after, strict=True))


def targets_after(
    tokenizer: Any,
    prompts: Sequence[str],
    encoded: Sequence[tuple[int, ...]],
    targets: Sequence[str],
    frame: Frame = PLAIN,
) -> list[tuple[int, ...]]:
    """Ids of each target after its prompt: what is left of `prompt + joint + target`
    after the prompt's ids, so that BOS and prepended spaces never come into a target.

    Args:
        prompts: each in its frame already.
        encoded: their ids.

    Raises:
        PromptError: the prompt has no ids, or they are not a prefix of the whole's.
    """
    whole = tokenize(
        tokenizer,
        [p + frame.joint + t for p, t in zip(prompts, targets, strict=True)],
        special=frame.special,
    )
    found = []
    for prompt, target, ids, (full, _) in zip(
        prompts, targets, encoded, whole, strict=True
    ):
        if not ids:
            raise PromptError(
                "the prompt is empty and the tokenizer puts no token before it, so "
                f"nothing predicts {target!r}; give a prompt"
            )
        if full[: len(ids)] != ids or len(full) == len(ids):
            what_to_do = (
                "end the prompt at a word's end, without the space before the target"
                if frame == PLAIN
                else "what follows a prompt must end where a token ends"
            )
            raise PromptError(
                f"the tokens of {prompt!r} change when {target!r} follows; {what_to_do}"
            )
        found.append(full[len(ids) :])
    return found


def check_rows(adapter: ModelAdapter, rows: Sequence[Sequence[int]]) -> None:
    """Refuses rows longer than the model's positions, and ids that it has no embedding
    for: both would fail deep inside, or not at all.

    Raises:
        PromptError: naming the longest, or the largest.
    """
    limit = getattr(adapter.config, "max_position_embeddings", None)
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


def check_logits(adapter: ModelAdapter, logits: Tensor) -> None:
    """Refuses NaN and infinity, which would be compared or drawn from silently.

    Raises:
        NonFiniteError: naming where they come from.
    """
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError(
            f"the model's logits are not finite: {adapter.why_not_finite()}"
        )


def next_token(logits: Tensor, top_k: int, generator: torch.Generator) -> int:
    """A token drawn from the `top_k` most probable ones.

    Args:
        logits: [vocabulary], of one position.
    """
    top = logits.float().cpu().topk(min(top_k, logits.shape[-1]))
    choice = torch.multinomial(top.values.softmax(-1), 1, generator=generator)
    return int(top.indices[choice])


@torch.no_grad()
def generate_contexts(
    adapter: ModelAdapter, tokenizer: Any, settings: ContextSettings, seed: int
) -> Contexts:
    """Samples the contexts' prefixes from the model itself: the bare prompt first,
    then one template for each of `settings.samples`, "<text>. {}".

    Source: Meng et al. 2023 (MEMIT), section 4.3; there unseeded.

    Raises:
        PromptError: nothing to begin with, or no usable chat template.
    """
    frame = chat_frame(tokenizer) if settings.chat else PLAIN
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
            check_logits(adapter, logits)
            ids.append(next_token(logits, settings.top_k, generator))
        prefix = tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        prefix = " ".join(prefix.replace("{", " ").replace("}", " ").split())
        templates.append(f"{prefix}. {SLOT}" if prefix else SLOT)
    return Contexts(tuple(templates), frame)
