"""What is looked at, changed or left out in one forward pass, and put back after it.
Each is a context manager."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class _Reached(Exception):
    """Unwinds the forward pass once the wanted output is there."""


def hidden_of(output: Any) -> Tensor:
    """A block's hidden states: blocks return a tensor, or a tuple that begins with
    it, depending on the version of transformers."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


@contextmanager
def stopping_at(module: nn.Module, handler: Callable[[Tensor], None]) -> Iterator[None]:
    """Hands the module's output to `handler` and ends the body there."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        handler(hidden_of(output))
        raise _Reached

    with suppress(_Reached), module.register_forward_hook(hook):
        yield


def wide(tensor: Tensor) -> Tensor:
    """In float32, or in float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def by_row(hidden: Tensor, rows: int) -> Tensor:
    """[rows, width, d], also of what a module sees flattened: OPT's fc2."""
    return hidden.view(rows, -1, hidden.shape[-1]) if hidden.ndim == 2 else hidden


def add_first(hidden: Tensor, delta: Tensor) -> Tensor:
    """δ [rows, d_value] added to the first position, rounded once."""
    first = wide(hidden[:, :1]) + delta.to(hidden.device)[:, None]
    return torch.cat([first.to(hidden.dtype), hidden[:, 1:]], dim=1)


def seeing(module: nn.Module, seen: dict[str, Any], name: str) -> RemovableHandle:
    """Keeps what a module returns, as it was then: some models go on in place."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = hidden_of(output).clone()
        seen[name] = (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return module.register_forward_hook(hook)


def adding(module: nn.Module, delta: Tensor) -> RemovableHandle:
    """Adds δ to the first position of what a module returns."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = hidden_of(output)
        changed = add_first(by_row(hidden, len(delta)), delta).view_as(hidden)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return module.register_forward_hook(hook)


@contextmanager
def returning(
    blocks: Sequence[nn.Module], hidden: Tensor, extras: int | None
) -> Iterator[None]:
    """Blocks return `hidden` instead of running."""
    # What else they return is by-products, attention weights for one: a model that
    # needed them would fail on None, not go astray.
    output = hidden if extras is None else (hidden, *[None] * extras)

    def forward(*_: Any, **__: Any) -> Any:
        return output

    # An instance may have a forward of its own already, as accelerate's hooks set.
    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.__dict__["forward"] = forward
        yield
    finally:
        for block, before in zip(blocks, own, strict=True):
            if before is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = before


def reading_at(head: nn.Module, rows: Tensor, columns: Tensor) -> RemovableHandle:
    """The head sees [1, reads, d] instead of all positions: a vocabulary is wide."""

    def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_picked(inputs[0], rows, columns), *inputs[1:])

    return head.register_forward_pre_hook(hook)


@contextmanager
def running_at(module: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """A module that treats each position alone runs at some only; it returns zero at
    the others."""
    whole: list[torch.Size] = []

    def before(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        whole.append(inputs[0].shape)
        # Some take the residual as well.
        return tuple(
            _picked(x, rows, columns) if torch.is_tensor(x) and x.ndim == 3 else x
            for x in inputs
        )

    def after(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        zeros = output.new_zeros(*whole.pop()[:2], output.shape[-1])
        index = (rows.to(output.device), columns.to(output.device))
        return zeros.index_put(index, output[0])

    with (
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after),
    ):
        yield


def _picked(hidden: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[1, reads, d] of [rows, width, d]."""
    return hidden[rows.to(hidden.device), columns.to(hidden.device)][None]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter wants a gradient inside, so that a graph begins where something else
    does; as before afterwards."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
