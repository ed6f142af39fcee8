"""The loop that optimises the target values of one chunk of edits.

Source: Meng et al. 2022 (ROME), equation 4; Meng et al. 2023 (MEMIT), equation 16;
the loss as the published code has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from unified_edit.edits import SLOT, Edit
from unified_edit.errors import NonFiniteError, RecipeError, UnsupportedModel
from unified_edit.model.adapter import Site
from unified_edit.model.suffixes import Bucket, Chunk, as_buckets

_CLAMPS: dict[Site, float] = {"mlp_output": 4.0, "block_output": 0.75}


@dataclass(frozen=True)
class TargetSettings:
    """How target values are optimised."""

    site: Site
    """Where δ is added: the edited MLP's output, or its block's."""
    steps: int = 25
    """Evaluations of the loss; at most `steps - 1` updates of δ."""
    learning_rate: float = 0.5
    """Adam's."""
    clamp: float | None = None
    """Largest ‖δ‖ over the norm of the value it is added to. None: 4 at the MLP's
    output, as in ROME, and 0.75 at the block's, as in MEMIT."""
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
    most_probable_stop: int | None = None
    """An edit is done, too, at this many evaluations in which every token of its target
    was the most probable one in every context: ENCORE's most-probable early
    stopping. None: no such rule."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("site", get_args(Site)),
            ("kl_position", ("subject", "end")),
        ):
            if getattr(self, name) not in choices:
                raise RecipeError(
                    f"{name} must be one of {choices}, not {getattr(self, name)!r}"
                )
        if type(self.steps) is not int:
            raise RecipeError(f"steps must be a whole number, not {self.steps!r}")
        # Written so that NaN is refused as well.
        if not (self.steps >= 1 and self.learning_rate > 0 and self.largest > 0):
            raise RecipeError("steps, learning_rate and clamp must be positive")
        if not (self.weight_decay >= 0 and self.kl_factor >= 0):
            raise RecipeError("weight_decay and kl_factor must not be negative")
        if math.isnan(self.loss_threshold):
            raise RecipeError("loss_threshold must be a number, 0 for no such rule")
        stop = self.most_probable_stop
        if stop is not None and not stop >= 1:
            raise RecipeError("most_probable_stop must be at least 1, or None")
        if any(prompt.count(SLOT) != 1 for prompt in self.kl_prompts):
            raise RecipeError("each of kl_prompts must have one slot {}")

    @property
    def largest(self) -> float:
        """The clamp, or the site's own."""
        return _CLAMPS[self.site] if self.clamp is None else self.clamp

    def at(self, site: Site) -> TargetSettings:
        """The same settings at a site, with nothing left to be chosen."""
        here = replace(self, site=site)
        return replace(here, clamp=here.largest)


@dataclass(frozen=True, eq=False)
class Targets:
    """Optimised target values of a batch of edits, on the CPU, and their way there."""

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


def descend(
    chunk: Chunk,
    edits: Sequence[Edit],
    which: Sequence[int],
    settings: TargetSettings,
    bar: Bar,
) -> Targets:
    """The loop over one chunk: `edits[which]`."""
    initial, nll, reached = chunk.values, chunk.nll, torch.zeros(len(which))
    norm = initial.norm(dim=1)
    delta = torch.zeros_like(initial, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=settings.learning_rate)
    steps = torch.zeros(len(which), dtype=torch.long)
    active, buckets = torch.arange(len(which)), as_buckets(chunk, range(len(which)))
    for step in range(1, settings.steps + 1):
        # A leaf for each row: the graph ends there, and rows are summed in order.
        leaves = [
            delta.detach()[active[bucket.edits].to(delta.device)].requires_grad_()
            for bucket in buckets
        ]
        measured = [b.measure(leaf) for b, leaf in zip(buckets, leaves, strict=True)]
        now, kl, wrong = _by_edit(buckets, measured, len(active))
        decay = settings.weight_decay * delta.norm(dim=1) / norm.square()
        loss = now + settings.kl_factor * kl + decay.detach().cpu()[active]
        _check_finite(chunk, loss, edits, [which[i] for i in active.tolist()])
        if step == 1:
            _check_same(chunk, now, edits, which)
            initial_nll = now
        nll = nll.index_copy(0, active, now)
        steps[active] = step
        reached[active] += wrong == 0
        done = loss < settings.loss_threshold
        if settings.most_probable_stop is not None:
            done |= reached[active] >= settings.most_probable_stop
        if step == settings.steps:
            done[:] = True
        bar.finished(now[done])
        if bool(done.all()):
            break
        gradient = _gradient(buckets, measured, leaves, ~done, settings.kl_factor)
        (delta.grad,) = torch.autograd.grad(decay.sum(), delta)
        moving = active.to(delta.device)
        delta.grad[moving] += gradient
        before = delta.detach().clone()
        optimizer.step()
        if bool(done.any()):
            # Finished edits leave the batch: their δ stays, their rows go.
            active = active[~done]
            buckets = as_buckets(chunk, active.tolist())
            moving = active.to(delta.device)
        with torch.no_grad():
            scale = settings.largest * norm / delta.norm(dim=1).clamp_min(1e-30)
            delta.mul_(scale.clamp_max(1.0)[:, None])
            # Adam's momentum would go on moving edits that are done.
            delta.copy_(before.index_copy(0, moving, delta[moving]))
    return Targets(
        values=(initial + delta).detach().cpu(),
        initial=initial.cpu(),
        probability=torch.exp(-nll),
        initial_probability=torch.exp(-initial_nll),
        steps=steps,
    )


def _by_edit(
    buckets: Sequence[Bucket], measured: Sequence[tuple[Tensor, Tensor]], count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean NLL and KL of each edit, and how many of its labels are not the most
    probable token; [count], on the CPU, where sums have one order."""
    nll, kl, wrong = torch.zeros(3, count, dtype=torch.float64)
    for bucket, (losses, right) in zip(buckets, measured, strict=True):
        reads, labels = bucket.reads, len(bucket.reads.labels)
        weighted = losses.detach().cpu() * reads.weights
        nll.index_add_(0, reads.edits[:labels], weighted[:labels])
        kl.index_add_(0, reads.edits[labels:], weighted[labels:])
        wrong.index_add_(0, reads.edits[:labels], (~right.cpu()).double())
    return nll, kl, wrong


def _gradient(
    buckets: Sequence[Bucket],
    measured: Sequence[tuple[Tensor, Tensor]],
    leaves: Sequence[Tensor],
    wanted: Tensor,
    kl_factor: float,
) -> Tensor:
    """Of each edit's loss by its δ [edits, d_value]; zero where it is not wanted."""
    total: Any = 0
    for bucket, (losses, _) in zip(buckets, measured, strict=True):
        reads = bucket.reads
        weights = reads.weights * wanted[reads.edits]
        weights[len(reads.labels) :] *= kl_factor
        total = total + (losses * weights.to(losses)).sum()
    by_row = torch.cat(torch.autograd.grad(total, leaves))
    # Every edit has as many rows as any other.
    order = torch.cat([bucket.edits for bucket in buckets]).argsort(stable=True)
    return by_row[order.to(by_row.device)].view(len(wanted), -1, by_row.shape[1]).sum(1)


def _check_finite(
    chunk: Chunk, loss: Tensor, edits: Sequence[Edit], which: Sequence[int]
) -> None:
    for value, index in zip(loss.tolist(), which, strict=True):
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the loss of edit {index} ({edits[index]}) is not finite: "
                f"{chunk.adapter.why_not_finite()}"
            )


def _check_same(
    chunk: Chunk, now: Tensor, edits: Sequence[Edit], which: Sequence[int]
) -> None:
    """The suffixes alone must say what whole prompts say."""
    whole, dtype = chunk.nll, chunk.adapter.weight(chunk.layer).dtype
    allowed = 4 * math.sqrt(torch.finfo(dtype).eps) * (1 + whole)
    worst = int(((now - whole).abs() - allowed).argmax())
    if bool((now - whole).abs()[worst] > allowed[worst]):
        raise UnsupportedModel(
            f"edit {which[worst]} ({edits[which[worst]]}): the target's loss over the "
            f"whole prompt is {float(whole[worst]):.4g}, and from the subject on, with "
            f"the prefix cached, {float(now[worst]):.4g}; this model's layers hand on "
            "more than hidden states and attention keys, so its targets cannot be "
            "optimised"
        )


class Bar:
    """Edits done, their mean probability, edits per second."""

    def __init__(self, bar: Any) -> None:
        self.bar, self.total = bar, 0.0

    def finished(self, nll: Tensor) -> None:
        """Counts edits that are done, by their targets' NLL."""
        if len(nll):
            self.total += float(torch.exp(-nll).sum())
            mean = self.total / (self.bar.n + len(nll))
            self.bar.set_postfix(probability=f"{mean:.3f}", refresh=False)
            self.bar.update(len(nll))
