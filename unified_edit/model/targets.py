"""Target values: what an edit should make the model compute at the subject.

All edits are optimised at once. δ enters at one position, the subject's last token,
of one layer's output, so what stands before it never changes: its attention keys and
values are computed once, and the loop runs only over the few tokens from the
subject's end to the target's end.

Source: Meng et al. 2022 (ROME), equation 4; Meng et al. 2023 (MEMIT), equation 16;
the loss as the published code has it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, replace
from typing import Any, Protocol

import torch
from torch import nn
from tqdm import tqdm

from covariance_cache.capture import evaluating
from covariance_cache.fingerprint import exact_fingerprint
from covariance_cache.ranks import ALONE, Ranks
from unified_edit.edits import Edit
from unified_edit.errors import (
    UnifiedEditError,
)
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.descent import Bar, Targets, TargetSettings, descend
from unified_edit.model.memory import affordable_tokens
from unified_edit.model.prompts import Contexts, check_rows
from unified_edit.model.rows import Row, chunks_of, make_rows
from unified_edit.model.suffixes import Chunk, run_whole

_FORMAT = "unified_edit/targets/1"
"""To be raised when the loop changes, so that what it found before is not taken."""


class TargetStore(Protocol):
    """Keeps targets of single edits by key; `unified_edit.target_cache` has one."""

    def get(self, key: str) -> Targets | None:
        """The targets of one edit, n = 1, or None."""

    def put(self, key: str, targets: Targets) -> None:
        """Keeps the targets of one edit."""


def optimize_targets(
    adapter: ModelAdapter,
    tokenizer: Any,
    edits: Sequence[Edit],
    contexts: Contexts,
    layer: int,
    settings: TargetSettings,
    *,
    token_budget: int | None = None,
    cache: TargetStore | None = None,
    ranks: Ranks = ALONE,
    progress: bool = False,
) -> Targets:
    """Optimises δ for every edit at once; edits do not influence each other.

    Args:
        layer: whose output δ is added to, at the subject's last token.
        token_budget: suffix tokens whose activations may be held at once; None
            chooses from the free memory of each device.
        cache: targets found there are not optimised; the others are put there.
        ranks: processes that share the edits, each with the same model and arguments;
            all return all targets. For one token budget the same as one process's,
            bit for bit.

    Raises:
        PromptError: subject not found, prompt too long.
        NonFiniteError: a loss is NaN or infinite; names the edit.
        UnsupportedModel: the model says something else when only suffixes run.
    """
    rows = make_rows(
        tokenizer,
        edits,
        contexts,
        settings.kl_prompts if settings.kl_factor else (),
        settings.kl_position,
    )
    check_rows(adapter, [row.prefix + row.suffix for each in rows for row in each])
    found: list[Targets | None] = [None] * len(edits)
    if cache is not None:
        keys = _keys(adapter, rows, layer, settings)
        # One process reads, so that all have the same to do.
        found = ranks.gather([cache.get(k) for k in keys] if ranks.first else None)[0]
    missing = [index for index, each in enumerate(found) if each is None]
    if missing:
        with _frozen(adapter.model):
            fresh = _optimize_all(
                adapter,
                rows,
                edits,
                missing,
                layer,
                settings,
                token_budget,
                ranks,
                progress,
            )
        for place, index in enumerate(missing):
            found[index] = each = fresh.select(place)
            if cache is not None and ranks.first:
                cache.put(keys[index], each)
    return _joined([each for each in found if each is not None])


def _keys(
    adapter: ModelAdapter,
    rows: Sequence[Sequence[Row]],
    layer: int,
    settings: TargetSettings,
) -> list[str]:
    """A digest of all that an edit's targets depend on."""
    common = json.dumps(
        [_FORMAT, exact_fingerprint(adapter.model), layer, asdict(settings)],
        sort_keys=True,
    )
    keys = []
    for each in rows:
        content = [astuple(replace(row, edit=0)) for row in each]
        keys.append(
            hashlib.sha256(f"{common}{json.dumps(content)}".encode()).hexdigest()
        )
    return keys


def _joined(parts: Sequence[Targets]) -> Targets:
    names = Targets.__dataclass_fields__
    return Targets(
        *(torch.cat([getattr(part, name) for part in parts]) for name in names)
    )


def _optimize_all(
    adapter: ModelAdapter,
    rows: Sequence[Sequence[Row]],
    edits: Sequence[Edit],
    which: Sequence[int],
    layer: int,
    settings: TargetSettings,
    token_budget: int | None,
    ranks: Ranks,
    progress: bool,
) -> Targets:
    """Targets of some of the edits: chunks of them, shared over the processes."""
    if token_budget is None:
        # A single edit is a chunk whatever it takes.
        first = _chunk(adapter, rows, which[:1], layer, settings)
        token_budget = affordable_tokens(first) if len(which) > 1 else 1
        token_budget = min(ranks.gather(token_budget))
    chunks = [
        [which[place] for place in chunk]
        for chunk in chunks_of([rows[index] for index in which], token_budget)
    ]
    mine = chunks[ranks.rank :: ranks.world]
    done: list[Targets] = []
    failed: UnifiedEditError | None = None
    with tqdm(
        total=sum(map(len, mine)),
        desc="targets" if ranks.world == 1 else f"targets, 1 of {ranks.world} shares",
        unit="edit",
        disable=not (progress and ranks.first),
    ) as shown:
        bar = Bar(shown)
        try:
            for chosen in mine:
                chunk = _chunk(adapter, rows, chosen, layer, settings)
                done.append(descend(chunk, edits, chosen, settings, bar))
        except UnifiedEditError as error:
            failed = error  # The others wait below: all shall raise it.
    shares = ranks.gather((failed, done))
    for raised, _ in shares:
        if raised is not None:
            raise raised
    return _joined(
        [shares[i % ranks.world][1][i // ranks.world] for i in range(len(chunks))]
    )


def _chunk(
    adapter: ModelAdapter,
    rows: Sequence[Sequence[Row]],
    which: Sequence[int],
    layer: int,
    settings: TargetSettings,
) -> Chunk:
    numbered = [replace(row, edit=n) for n, i in enumerate(which) for row in rows[i]]
    return run_whole(adapter, numbered, settings.site, layer)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Parameters without gradient inside, so that a graph begins at δ; evaluation
    mode, so that dropout is off. Both as before afterwards."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
