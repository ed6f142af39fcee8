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
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from tqdm import tqdm

from covariance_cache.capture import evaluating
from unified_edit.edits import SLOT, Edit
from unified_edit.errors import NonFiniteError, RecipeError
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.keys import hidden_of
from unified_edit.model.prompts import (
    Contexts,
    check_rows,
)
from unified_edit.model.rows import Chunk, Row, make_rows, prepare_chunk, suffix_logits

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
        for name, choices in (
            ("site", get_args(Site)),
            ("kl_position", ("subject", "end")),
        ):
            if getattr(self, name) not in choices:
                raise RecipeError(
                    f"{name} must be one of {choices}, not {getattr(self, name)!r}"
                )
        # Written so that NaN is refused as well.
        if not (self.steps >= 1 and self.learning_rate > 0 and self.clamp > 0):
            raise RecipeError("steps, learning_rate and clamp must be positive")
        if not (self.weight_decay >= 0 and self.kl_factor >= 0):
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
    rows = make_rows(
        tokenizer,
        edits,
        contexts,
        settings.kl_prompts if settings.kl_factor else (),
        settings.kl_position,
    )
    check_rows(adapter, [row.prefix + row.suffix for row in rows])
    by_edit: list[list[Row]] = [[] for _ in edits]
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


def _optimize(
    adapter: ModelAdapter,
    rows: Sequence[Row],
    edits: Sequence[Edit],
    start: int,
    stop: int,
    layer: int,
    settings: TargetSettings,
    bar: Any,
) -> Targets:
    """The loop over one chunk of edits, `edits[start:stop]`."""
    everything = prepare_chunk(adapter, rows, start)
    count = stop - start
    site = (
        adapter.down_projection(layer)
        if settings.site == "mlp_output"
        else adapter.block(layer)
    )
    with torch.no_grad(), _adding(site, None) as seen:
        logits = suffix_logits(adapter, everything)
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
            logits = suffix_logits(adapter, chunk)
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
    chunk: Chunk,
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
