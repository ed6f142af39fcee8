"""Losses with gradients, and the gradients of linear maps in their two factors.

The gradient of a loss by the weight of a linear map y = Wx is Σ_t δ_t x_tᵀ, with x_t
the map's input and δ_t the loss's gradient by its output, over all tokens. Keeping the
two apart is what makes it small: tokens are few, weights are wide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.frames import PLAIN, Frame
from unified_edit.model.hooks import by_row, frozen, reading_at, wide
from unified_edit.model.prompts import (
    PaddedRows,
    check_logits,
    check_rows,
    continuations,
    pad,
)


@dataclass(frozen=True, eq=False)
class Labelled:
    """Prompts with what shall follow them."""

    rows: PaddedRows
    reads: tuple[Tensor, Tensor]
    """Row and column of each position that predicts a target's token, row by row; on
    the CPU, where they are counted."""
    labels: Tensor
    """[reads]: what it shall predict."""

    def __len__(self) -> int:
        return len(self.rows.ids)


@dataclass(frozen=True, eq=False)
class Factors:
    """Σ_t δ_t x_tᵀ of one linear map, for each row of a batch; padding is zero."""

    x: Tensor
    """[rows, tokens, d_in]"""
    delta: Tensor
    """[rows, tokens, d_out]"""


def labelled(
    adapter: ModelAdapter,
    tokenizer: Any,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    frame: Frame = PLAIN,
) -> Labelled:
    """Tokenizes `targets[i]` after `prompts[i]` in its frame.

    Raises:
        PromptError: a prompt cannot be tokenized so, or is too long.
    """
    framed = [frame.around(prompt) for prompt in prompts]
    pairs = continuations(tokenizer, framed, targets, frame)
    rows = [ids + target[:-1] for ids, target in pairs]
    check_rows(adapter, rows)
    # Padded on the right, where causal attention never looks: some versions of some
    # families go astray on rows that begin with padding, once there are gradients.
    reads = [
        (row, len(ids) - 1 + place)
        for row, (ids, target) in enumerate(pairs)
        for place in range(len(target))
    ]
    at, columns = torch.tensor(reads).T
    labels = [label for _, target in pairs for label in target]
    return Labelled(
        pad(rows, adapter.device),
        (at, columns),
        torch.tensor(labels, device=adapter.device),
    )


def nll(adapter: ModelAdapter, batch: Labelled) -> Tensor:
    """[rows] mean negative log-likelihood of each row's target, with its graph.

    Raises:
        NonFiniteError: NaN or infinity in the logits.
    """
    with reading_at(adapter.head, *batch.reads):
        logits = logits_of(adapter, batch.rows)[0]
    labels = batch.labels.to(logits.device)
    losses = nn.functional.cross_entropy(wide(logits), labels, reduction="none")
    counts = batch.reads[0].bincount(minlength=len(batch)).tolist()
    return torch.stack([each.mean() for each in torch.split(losses, counts)])


def logits_of(adapter: ModelAdapter, rows: PaddedRows, keep: int = 0) -> Tensor:
    """[rows, keep or width, vocabulary] of a forward pass, with its graph."""
    logits: Tensor = adapter.model(
        input_ids=rows.ids,
        attention_mask=rows.mask,
        # A copy: XGLM in transformers 5.0 adds its offset in place.
        position_ids=rows.positions.clone(),
        use_cache=False,
        logits_to_keep=keep,
    ).logits
    check_logits(adapter, logits)
    return logits


def decomposed(
    adapter: ModelAdapter, batch: Labelled, modules: Sequence[str]
) -> tuple[dict[str, Factors], Tensor]:
    """Of each row's mean negative log-likelihood, the gradient by the weights of some
    linear maps, in factors; and the losses [rows]. No parameter gets a gradient.

    Args:
        modules: names in the model.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook_of(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            # With frozen weights the graph begins here.
            kept = output if output.requires_grad else output.requires_grad_()
            seen[name] = (inputs[0].detach(), kept)
            return kept

        return hook

    hooks = {name: hook_of(name) for name in modules}
    with frozen(adapter.model), _hooked(adapter.model, hooks), torch.enable_grad():
        losses = nll(adapter, batch)
        outputs = [seen[name][1] for name in modules]
        deltas = torch.autograd.grad(losses.sum(), outputs)
    count = len(batch)
    return {
        name: Factors(by_row(seen[name][0], count), by_row(delta, count))
        for name, delta in zip(modules, deltas, strict=True)
    }, losses.detach()


@contextmanager
def with_changes(
    model: nn.Module, changes: Mapping[str, Factors], owners: Tensor | None = None
) -> Iterator[None]:
    """Linear maps inside return (W + Σ_t δ_t x_tᵀ) x for x: each row of a batch with a
    change of its own, none of which is ever formed.

    Args:
        changes: by the names of the modules.
        owners: [rows] of a forward pass, which change each has; None for row i the
            i-th.
    """

    def hook_of(change: Factors) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            x, delta = change.x.to(output.device), change.delta.to(output.device)
            if owners is not None:
                mine = owners.to(output.device)
                x, delta = x[mine], delta[mine]
            given = by_row(inputs[0], len(x)).to(x.dtype)
            more = torch.bmm(torch.bmm(given, x.transpose(1, 2)), delta)
            return output + more.to(output.dtype).view_as(output)

        return hook

    with _hooked(model, {name: hook_of(each) for name, each in changes.items()}):
        yield


@contextmanager
def with_matrices(model: nn.Module, changes: Mapping[str, Tensor]) -> Iterator[None]:
    """Linear maps inside return (W + ΔW) x, the same for all rows; W stays as it is.

    Args:
        changes: ΔW [d_out, d_in], by the names of the modules.
    """

    def hook_of(change: Tensor) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            more = nn.functional.linear(inputs[0].to(change.dtype), change)
            return output + more.to(output.dtype)

        return hook

    with _hooked(model, {name: hook_of(each) for name, each in changes.items()}):
        yield


@contextmanager
def _hooked(model: nn.Module, hooks: Mapping[str, Any]) -> Iterator[None]:
    """Forward hooks on the modules of these names."""
    with ExitStack() as stack:
        for name, hook in hooks.items():
            module = model.get_submodule(name)
            stack.enter_context(module.register_forward_hook(hook))
        yield
