"""Causal tracing: which hidden states, at which tokens and layers, carry a fact.

A prompt runs three ways: clean; corrupted, with noise added to its subject's
embeddings; and corrupted with one state restored to what it was in the clean run. How
much of the answer's probability that brings back is the state's indirect effect.

Source: Meng et al. 2022 (ROME), section 2.1 and appendix B.1. There the probability is
that of one predicted token; here it is the product over all tokens of the answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from covariance_cache.capture import evaluating
from unified_edit.edits import Edit
from unified_edit.errors import EditError, RecipeError
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.frames import PLAIN, Frame
from unified_edit.model.hooks import wide
from unified_edit.model.prompts import (
    Contexts,
    check_rows,
    in_contexts,
    subject_prompts,
    subject_starts,
    targets_after,
)
from unified_edit.model.restoring import KINDS, Kind, Row, Runs, embedding_of, noise_of
from unified_edit.model.scoring import score

Role = Literal[
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first token after",
    "further tokens",
    "last token",
]
"""A token's part in its prompt. A subject of one token is its last; one token after the
subject is the last."""
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class TraceSettings:
    """How facts are traced."""

    noise: float = 3.0
    """Standard deviation of the noise, in those of the subjects' embeddings."""
    samples: int = 10
    """Of the noise, each run for every restored state; effects are means over them."""
    window: int | None = None
    """Layers in a window of MLPs or attentions; None: as large a part of the model as
    ROME's 10 of GPT2-XL's 48, and at least one."""
    kinds: tuple[Kind, ...] = KINDS
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.noise > 0 or math.isinf(self.noise):
            raise RecipeError(f"noise is a positive number, not {self.noise}")
        if self.samples < 1:
            raise RecipeError(f"samples must be at least 1, not {self.samples}")
        if self.window is not None and self.window < 1:
            raise RecipeError(f"the window is at least one layer, not {self.window}")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise RecipeError(
                f"kinds {unknown or 'none'}: there are {', '.join(KINDS)}"
            )

    def window_of(self, layers: int) -> int:
        """Layers in a window for a model of so many."""
        return self.window or max(1, round(layers * 10 / 48))


@dataclass(frozen=True, eq=False)
class Trace:
    """One fact, traced."""

    fact: Edit
    """Its target is the answer."""
    tokens: tuple[str, ...]
    """The prompt's, as text."""
    subject: range
    """Indices of the subject's tokens."""
    clean: float
    """The answer's probability."""
    corrupted: float
    """The same with noise, mean over samples."""
    restored: Mapping[Kind, Tensor]
    """The same with one state restored, [tokens, layers], float64."""

    @property
    def total_effect(self) -> float:
        """What the noise takes away."""
        return self.clean - self.corrupted

    def indirect_effect(self, kind: Kind) -> Tensor:
        """What restoring each state brings back, [tokens, layers]."""
        return self.restored[kind] - self.corrupted

    @property
    def roles(self) -> tuple[Role | None, ...]:
        """Each token's; None before the subject, where effects are zero."""
        return roles_of(self.subject, len(self.tokens))


@dataclass(frozen=True, eq=False)
class Traces:
    """Facts traced on one model."""

    traces: tuple[Trace, ...]
    """Of the facts that the model knows, or of all, in the order given."""
    unknown: tuple[int, ...]
    """Indices of facts that it does not know."""
    settings: TraceSettings
    window: int
    deviation: float
    """Standard deviation of the subjects' embeddings; the noise has `settings.noise`
    times as much."""


def roles_of(subject: range, count: int) -> tuple[Role | None, ...]:
    """Roles of a prompt's tokens, given which are the subject's."""
    found: list[Role | None] = [None] * count
    for index in range(subject.start, count):
        if index == subject.stop - 1:
            found[index] = "last subject token"
        elif index == subject.start:
            found[index] = "first subject token"
        elif index in subject:
            found[index] = "middle subject tokens"
        elif index == count - 1:
            found[index] = "last token"
        elif index == subject.stop:
            found[index] = "first token after"
        else:
            found[index] = "further tokens"
    return tuple(found)


def trace(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Edit],
    settings: TraceSettings | None = None,
    *,
    frame: Frame = PLAIN,
    known_only: bool = True,
    progress: bool = False,
) -> Traces:
    """Traces each fact that the model knows: all tokens of the answer are the most
    probable ones.

    The noise of a fact hangs on the seed and its prompt, not on the other facts; its
    size on the subjects of all of them.

    Args:
        facts: each with the true answer as its target.
        frame: around each prompt, such as a chat template.
        known_only: False traces the others as well, where little is to be seen.

    Raises:
        EditError: no facts.
        PromptError: one cannot be tokenized so, or is too long.
        NonFiniteError: NaN or infinity in the logits.
    """
    settings = settings or TraceSettings()
    adapter = ModelAdapter.of(model)
    if not facts:
        raise EditError("there are no facts to trace; give at least one")
    rows = rows_of(tokenizer, facts, frame)
    check_rows(adapter, [row.ids for row in rows])
    asked = [fact.text for fact in facts]
    answers = [fact.target for fact in facts]
    scores = score(adapter, tokenizer, asked, answers, frame=frame, progress=progress)
    unknown = tuple(i for i, each in enumerate(scores) if not each.argmax)
    traced = [i for i, each in enumerate(scores) if each.argmax or not known_only]
    layers = adapter.layer_count
    width = settings.window_of(layers)
    with torch.no_grad(), evaluating(model):
        deviation, dimension = _deviation(adapter, rows)
        size = settings.noise * deviation
        traces = []
        points = len(settings.kinds) * layers * sum(rows[i].prompt for i in traced)
        with tqdm(total=points, desc="tracing states", disable=not progress) as bar:
            for index in traced:
                row = rows[index]
                noise = noise_of(row, settings.samples, size, settings.seed, dimension)
                runs = Runs.of(adapter, row, settings.kinds, noise)
                restored = runs.restored(settings.kinds, width)
                bar.update(len(settings.kinds) * layers * row.prompt)
                clean, corrupted = float(runs.clean), float(runs.corrupted)
                traces.append(
                    Trace(
                        fact=row.fact,
                        tokens=_texts(tokenizer, row.ids[: row.prompt]),
                        subject=row.subject,
                        clean=clean,
                        corrupted=corrupted,
                        restored=restored,
                    )
                )
    return Traces(tuple(traces), unknown, settings, width, deviation)


def rows_of(tokenizer: Any, facts: Sequence[Edit], frame: Frame = PLAIN) -> list[Row]:
    """Facts as ids, with what stands around prompts.

    Raises:
        PromptError: one cannot be tokenized so.
    """
    bare = Contexts(frame=frame)
    filled = [
        row for fact in facts for row in in_contexts(bare, fact.template, fact.subject)
    ]
    prompts = subject_prompts(tokenizer, filled, frame)
    starts = subject_starts(
        tokenizer,
        [
            (text, end - len(f.subject))
            for (text, end), f in zip(filled, facts, strict=True)
        ],
        frame,
    )
    texts, alone = [text for text, _ in filled], [prompt.ids for prompt in prompts]
    targets = [fact.target for fact in facts]
    answers = targets_after(tokenizer, texts, alone, targets, frame)
    return [
        Row(
            fact=fact,
            ids=prompt.ids + answer[:-1],
            prompt=len(prompt.ids),
            subject=range(start, prompt.subject_end + 1),
            answer=answer,
        )
        for fact, prompt, start, answer in zip(
            facts, prompts, starts, answers, strict=True
        )
    ]


def _texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    options = {"clean_up_tokenization_spaces": False}
    return tuple(tokenizer.decode([each], **options) for each in ids)


def _deviation(adapter: ModelAdapter, rows: Sequence[Row]) -> tuple[float, int]:
    """Standard deviation over all entries of what the embedding returns for subjects'
    tokens, and how many entries that is for each."""
    ids = [row.ids[index] for row in rows for index in row.subject]
    # Some embeddings scale what they return: what enters the model counts.
    found = embedding_of(adapter)(torch.tensor(ids, device=adapter.device))
    return float(wide(found).double().std(correction=0)), found.shape[-1]
