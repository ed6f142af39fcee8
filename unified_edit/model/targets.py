"""Target values: what an edit should make the model compute at the subject.

Of all edits of a call: what a store has is taken, the others are cut into chunks,
which processes may share. `suffixes` says what of the model runs, `descent` what is
optimised.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any, Protocol

import torch
from tqdm import tqdm

from covariance_cache.capture import evaluating
from covariance_cache.fingerprint import exact_fingerprint
from covariance_cache.ranks import ALONE, Ranks
from unified_edit.edits import Edit
from unified_edit.errors import EditError, RecipeError, UnifiedEditError
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.descent import Bar, Targets, TargetSettings, descend
from unified_edit.model.hooks import frozen
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
        settings: where a norm follows the MLP, its output is the site, whatever they
            say (`ModelAdapter.target_site`).
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
    if not edits:
        raise EditError("there are no edits to optimise targets for")
    if token_budget is not None and token_budget < 1:
        raise RecipeError(f"token_budget must be at least 1, not {token_budget}")
    settings = settings.at(adapter.target_site(settings.site))
    kl_prompts = settings.kl_prompts if settings.kl_factor else ()
    rows = make_rows(tokenizer, edits, contexts, kl_prompts, settings.kl_position)
    check_rows(adapter, [row.prefix + row.suffix for each in rows for row in each])
    job = _Job(adapter, edits, rows, layer, settings)
    keys = None if cache is None else job.keys()
    found: list[Targets | None] = [None] * len(edits)
    if cache is not None and keys is not None:
        # What one process finds, all know, so that all have the same to do.
        for here in ranks.gather([cache.get(key) for key in keys]):
            found = [
                a if a is not None else b for a, b in zip(found, here, strict=True)
            ]
    missing = [index for index, each in enumerate(found) if each is None]

    def keep(which: Sequence[int], fresh: Targets) -> None:
        if cache is not None and keys is not None:
            for place, index in enumerate(which):
                cache.put(keys[index], fresh.select(place))

    parts = [each for each in found if each is not None]
    order = [index for index, each in enumerate(found) if each is not None] + missing
    if missing:
        with frozen(adapter.model), evaluating(adapter.model):
            parts.append(_optimize(job, missing, token_budget, ranks, progress, keep))
    return _joined(parts).select(*torch.tensor(order).argsort().tolist())


@dataclass(frozen=True, eq=False)
class _Job:
    """Edits of one call, with their rows."""

    adapter: ModelAdapter
    edits: Sequence[Edit]
    rows: Sequence[Sequence[Row]]
    """Of each edit."""
    layer: int
    settings: TargetSettings

    def keys(self) -> list[str]:
        """For each edit a digest of all that its targets depend on."""
        model = exact_fingerprint(self.adapter.model)
        common = [_FORMAT, model, self.layer, asdict(self.settings)]
        keys = []
        for each in self.rows:
            content = [*common, [astuple(replace(row, edit=0)) for row in each]]
            text = json.dumps(content, sort_keys=True)
            keys.append(hashlib.sha256(text.encode()).hexdigest())
        return keys

    def chunk(self, which: Sequence[int]) -> Chunk:
        """Some of the edits, after their pass over whole prompts."""
        rows = [replace(r, edit=n) for n, i in enumerate(which) for r in self.rows[i]]
        return run_whole(self.adapter, rows, self.settings.site, self.layer)

    def chunks(self, which: Sequence[int], token_budget: int) -> list[list[int]]:
        """Some of the edits in parts, each within the budget."""
        parts = chunks_of([self.rows[index] for index in which], token_budget)
        return [[which[place] for place in part] for part in parts]


def _joined(parts: Sequence[Targets]) -> Targets:
    names = Targets.__dataclass_fields__
    return Targets(
        *(torch.cat([getattr(part, name) for part in parts]) for name in names)
    )


def _optimize(
    job: _Job,
    which: Sequence[int],
    token_budget: int | None,
    ranks: Ranks,
    progress: bool,
    keep: Callable[[Sequence[int], Targets], None],
) -> Targets:
    """Targets of some of the edits: chunks of them, shared over the processes; each
    chunk is given to `keep` as soon as it is done."""
    # A single edit is a chunk whatever it takes.
    if token_budget is None and len(which) > 1:
        token_budget = min(ranks.gather(affordable_tokens(job.chunk(which[:1]))))
    chunks = job.chunks(which, token_budget or 1)
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
                fresh = descend(job.chunk(chosen), job.edits, chosen, job.settings, bar)
                keep(chosen, fresh)
                done.append(fresh)
        except UnifiedEditError as error:
            failed = error  # The others wait below: all shall raise it.
    shares = ranks.gather((failed, done))
    for raised, _ in shares:
        if raised is not None:
            raise raised
    return _joined(
        [shares[i % ranks.world][1][i // ranks.world] for i in range(len(chunks))]
    )
