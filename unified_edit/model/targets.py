"""Target values: what an edit should make the model compute at the subject.

All edits are optimised at once. δ enters at one position, the subject's last token,
of one layer's output, so what stands before it never changes: its attention keys and
values are computed once, and the loop runs only over the few tokens from the
subject's end to the target's end.

Source: Meng et al. 2022 (ROME), equation 4; Meng et al. 2023 (MEMIT), equation 16;
the loss as the published code has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from tqdm import tqdm
from transformers import DynamicCache

from covariance_cache.capture import evaluating
from unified_edit.edits import SLOT, Edit, fill
from unified_edit.errors import NonFiniteError, RecipeError
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.keys import hidden_of
from unified_edit.model.prompts import (
    Contexts,
    check_lengths,
    continuations,
    in_contexts,
    pad,
    subject_prompts,
)

Site = Literal["mlp_output", "block_output"]


@dataclass(frozen=True)
class TargetSettings:
    """How target values are optimised."""

    site: Site
    """Where δ is added: the edited MLP's output, or its block's."""
    steps: int = 25
    """Evaluations of the loss; at most `steps - 1` updates of δ."""
    learning_rate: float = 0.5
    """Adam's."""
    clamp: float = 0.75
    """Largest ‖δ‖ over the norm of the value it is added to."""
    weight_decay: float = 0.5
    """Weight of ‖δ‖ / ‖value‖² in the loss."""
    kl_factor: float = 0.0625
    """Weight of the KL divergence from the unedited model on `kl_prompts`."""
    kl_prompts: tuple[str, ...] = ("{} is a",)
    """What shall stay as it was, with `{}` for the subject."""
    kl_position: Literal["subject", "end"] = "subject"
    """Where the KL term reads the next token's distribution: at the subject's last
    token, as published code does, or at the prompt's end."""
    loss_threshold: float = 0.05
    """An edit is done when its loss is below."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.learning_rate <= 0 or self.clamp <= 0:
            raise RecipeError("steps, learning_rate and clamp must be positive")
        if self.weight_decay < 0 or self.kl_factor < 0:
            raise RecipeError("weight_decay and kl_factor must not be negative")
        if any(prompt.count(SLOT) != 1 for prompt in self.kl_prompts):
            raise RecipeError("each of kl_prompts must have one slot {}")


@dataclass(frozen=True, eq=False)
class Targets:
    """Optimised target values of a batch of edits, and how far each came."""

    values: Tensor
    """[n, d_value]: the value at the site plus δ; float32, or float64 as the model."""
    initial: Tensor
    """[n, d_value]: the value at the site, bare prompt, unedited model."""
    probability: Tensor
    """[n]: geometric mean over contexts and tokens of the target's probability."""
    initial_probability: Tensor
    """[n]: the same before the edit."""
    steps: Tensor
    """[n]: evaluations of the loss until the edit was done."""

    def select(self, *indices: int) -> Targets:
        """The targets of some of the edits."""
        names = self.__dataclass_fields__
        return Targets(*(getattr(self, name)[list(indices)] for name in names))


@dataclass(frozen=True)
class _Row:
    """One prompt of one edit, cut at the subject's last token."""

    edit: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    labels: tuple[int, ...]
    """Ids to predict, one after another from `read` on; empty in KL rows."""
    read: int
    """Index in `suffix` where the first label, or the KL term, is read."""


@dataclass(frozen=True, eq=False)
class _Chunk:
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

    def select(self, rows: Tensor) -> _Chunk:
        """The chunk of some rows only."""
        return _Chunk(
            self.edit[rows],
            self.suffix[rows],
            self.mask[rows],
            self.positions[rows],
            tuple((k[rows], v[rows]) for k, v in self.cache),
            self.reads[rows],
            self.labels[rows],
        )


def optimize_targets(
    adapter: ModelAdapter,
    tokenizer: Any,
    edits: Sequence[Edit],
    contexts: Contexts,
    layer: int,
    settings: TargetSettings,
    *,
    token_budget: int = 16384,
    progress: bool = False,
) -> Targets:
    """Optimises δ for every edit at once; edits do not influence each other.

    Args:
        layer: whose output δ is added to, at the subject's last token.
        token_budget: tokens that one forward may hold, prefixes included.

    Raises:
        PromptError: subject not found, prompt too long.
        NonFiniteError: a loss is NaN or infinite; names the edit.
    """
    rows = _rows(tokenizer, edits, contexts, settings)
    check_lengths(adapter, [row.prefix + row.suffix for row in rows])
    by_edit: list[list[_Row]] = [[] for _ in edits]
    for row in rows:
        by_edit[row.edit].append(row)
    found: list[Targets] = []
    start = 0
    with (
        _frozen(adapter.model),
        tqdm(
            total=len(edits), desc="targets", unit="edit", disable=not progress
        ) as bar,
    ):
        while start < len(edits):
            stop, count, longest = start, 0, 0
            while stop < len(edits):
                more = by_edit[stop]
                longest = max(longest, *(len(r.prefix + r.suffix) for r in more))
                count += len(more)
                if stop > start and count * longest > token_budget:
                    break
                stop += 1
            chunk = [row for group in by_edit[start:stop] for row in group]
            found.append(
                _optimize(adapter, chunk, edits, start, stop, layer, settings, bar)
            )
            start = stop
    return Targets(
        *(
            torch.cat([getattr(part, name) for part in found])
            for name in Targets.__dataclass_fields__
        )
    )


def _rows(
    tokenizer: Any,
    edits: Sequence[Edit],
    contexts: Contexts,
    settings: TargetSettings,
) -> list[_Row]:
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
        rows.append(_Row(owner, whole[:cut], whole[cut:], target, len(ids) - 1 - cut))
    for index, edit in enumerate(edits if settings.kl_factor else ()):
        stay = [fill(template, edit.subject) for template in settings.kl_prompts]
        for prompt in subject_prompts(tokenizer, stay):
            cut = prompt.subject_end
            end = len(prompt.ids) if settings.kl_position == "end" else cut + 1
            rows.append(
                _Row(index, prompt.ids[:cut], prompt.ids[cut:end], (), end - 1 - cut)
            )
    return rows


def _optimize(
    adapter: ModelAdapter,
    rows: Sequence[_Row],
    edits: Sequence[Edit],
    start: int,
    stop: int,
    layer: int,
    settings: TargetSettings,
    bar: Any,
) -> Targets:
    """The loop over one chunk of edits, `edits[start:stop]`."""
    everything = _prepare(adapter, rows, start)
    count = stop - start
    site = (
        adapter.down_projection(layer)
        if settings.site == "mlp_output"
        else adapter.block(layer)
    )
    with torch.no_grad(), _adding(site, None) as seen:
        logits = _logits(adapter, everything)
    # The first row of each edit is the bare prompt.
    first = torch.tensor(
        [
            next(i for i, row in enumerate(rows) if row.edit == start + e)
            for e in range(count)
        ]
    )
    initial = _wide(seen[0][first.to(seen[0].device), 0])
    reference = _at(logits, everything.reads[:, :1])[:, 0]
    del logits, seen

    norm = initial.norm(dim=1)
    delta = torch.zeros_like(initial, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=settings.learning_rate)
    probability = torch.zeros(count, dtype=initial.dtype)
    initial_probability = probability
    steps = torch.zeros(count, dtype=torch.long)
    active = torch.ones(count, dtype=torch.bool)
    chunk, kept = everything, torch.arange(len(rows), device=everything.edit.device)
    for step in range(settings.steps):
        with _adding(site, delta[chunk.edit.to(delta.device)]):
            logits = _logits(adapter, chunk)
        loss, nll = _losses(logits, chunk, reference[kept], settings, count)
        loss = loss + settings.weight_decay * (delta.norm(dim=1) / norm.square()).to(
            loss.device
        )
        _check_finite(adapter, loss, active, edits, start)
        now = torch.exp(-nll.detach()).cpu()
        probability = torch.where(active, now, probability)
        if step == 0:
            initial_probability = now.clone()
        steps += active
        done = active & (loss.detach().cpu() < settings.loss_threshold)
        if step == settings.steps - 1:
            done = active.clone()
        if bool(done.any()):
            bar.update(int(done.sum()))
            active &= ~done
            if not bool(active.any()):
                break
            # Finished edits leave the batch: their δ stays, their rows go.
            alive = active.to(everything.edit.device)[everything.edit]
            kept = alive.nonzero()[:, 0]
            chunk = everything.select(kept)
        index = active.nonzero()[:, 0].to(loss.device)
        (gradient,) = torch.autograd.grad(loss[index].sum(), delta)
        before = delta.detach().clone()
        delta.grad = gradient
        optimizer.step()
        with torch.no_grad():
            scale = settings.clamp * norm / delta.norm(dim=1).clamp_min(1e-30)
            delta.mul_(scale.clamp_max(1.0)[:, None])
            # Adam's momentum would go on moving edits that are done.
            moving = active.to(delta.device)[:, None]
            delta.copy_(torch.where(moving, delta, before))
        bar.set_postfix(probability=f"{float(probability.mean()):.3f}")
    return Targets(
        (initial + delta).detach(), initial, probability, initial_probability, steps
    )


def _prepare(adapter: ModelAdapter, rows: Sequence[_Row], start: int) -> _Chunk:
    """Tensors of a chunk; runs the prefixes once."""
    prefix = pad([row.prefix for row in rows], adapter.device, left=True)
    suffix = pad([row.suffix for row in rows], adapter.device)
    cache: tuple[tuple[Tensor, Tensor], ...] = ()
    if prefix.ids.shape[1]:
        with torch.no_grad():
            output = adapter.model(
                input_ids=prefix.ids,
                attention_mask=prefix.mask,
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
    return _Chunk(
        edit=torch.tensor([row.edit - start for row in rows], device=adapter.device),
        suffix=suffix.ids,
        mask=torch.cat([prefix.mask, suffix.mask], dim=1),
        positions=suffix.positions + before,
        cache=cache,
        reads=reads.to(adapter.device),
        labels=labels.to(adapter.device),
    )


def _logits(adapter: ModelAdapter, chunk: _Chunk) -> Tensor:
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


def _at(logits: Tensor, reads: Tensor) -> Tensor:
    """Log-probabilities at `reads` [rows, m] → [rows, m, vocabulary]."""
    reads = reads.to(logits.device)
    rows = torch.arange(len(logits), device=logits.device)[:, None]
    return log_softmax(_wide(logits[rows, reads]), dim=-1)


def _wide(tensor: Tensor) -> Tensor:
    """In float32, or in float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _losses(
    logits: Tensor,
    chunk: _Chunk,
    reference: Tensor,
    settings: TargetSettings,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Loss without weight decay [count], and the targets' mean token NLL [count]; zero
    for edits without rows."""
    edit = chunk.edit.to(logits.device)
    labels = chunk.labels.to(logits.device)
    is_kl = labels[:, 0] < 0
    read = _at(logits, chunk.reads)
    valid = labels >= 0
    picked = read.gather(2, labels.clamp_min(0)[:, :, None])[:, :, 0]
    # Each row's mean over the target's tokens, each edit's mean over its rows.
    row_nll = -(picked * valid).sum(1) / valid.sum(1).clamp_min(1)
    nll = _mean_by_edit(row_nll, edit, ~is_kl, count)
    if not bool(is_kl.any()):
        return nll, nll
    now = read[:, 0]
    row_kl = (now.exp() * (now - reference)).sum(1)
    kl = _mean_by_edit(row_kl, edit, is_kl, count)
    return nll + settings.kl_factor * kl, nll


def _mean_by_edit(values: Tensor, edit: Tensor, rows: Tensor, count: int) -> Tensor:
    total, number = values.new_zeros(count), values.new_zeros(count)
    total = total.index_add(0, edit[rows], values[rows])
    number = number.index_add(0, edit[rows], torch.ones_like(values[rows]))
    return total / number.clamp_min(1)


def _check_finite(
    adapter: ModelAdapter,
    loss: Tensor,
    active: Tensor,
    edits: Sequence[Edit],
    start: int,
) -> None:
    bad = (~torch.isfinite(loss.detach().cpu()) & active).nonzero()[:, 0].tolist()
    if bad:
        raise NonFiniteError(
            f"the loss of edit {start + bad[0]} ({edits[start + bad[0]]}) is not "
            f"finite: {adapter.why_not_finite()}"
        )


@contextmanager
def _adding(site: nn.Module, delta: Tensor | None) -> Iterator[list[Tensor]]:
    """Adds δ [rows, d_value] to the first position of the module's output; yields a
    list that receives the output as it was."""
    seen: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = hidden_of(output)
        seen.append(hidden.detach())
        if delta is None:
            return None
        moved = hidden[:, :1] + delta.to(hidden.device, hidden.dtype)[:, None]
        changed = torch.cat([moved, hidden[:, 1:]], dim=1)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = site.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


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
