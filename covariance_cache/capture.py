"""Inputs of named modules during one forward pass, stopped once all were seen."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from covariance_cache.errors import CaptureError


class _AllSeen(Exception):
    """Unwinds the forward pass; never leaves `capture_inputs`."""


def find_modules(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules of these names.

    Raises:
        CaptureError: no such module; the nearest names are listed.
    """
    modules = dict(model.named_modules())
    found = {}
    for name in names:
        if name not in modules:
            near = difflib.get_close_matches(name, modules, n=3)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise CaptureError(f"{type(model).__name__} has no module {name!r}{hint}")
        found[name] = modules[name]
    if not found:
        raise CaptureError("no module was named, so there is nothing to capture")
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; each module gets its own flag back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def capture_inputs(
    model: nn.Module, names: Iterable[str], handler: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Hands the first input tensor of each named module to `handler(name, tensor)`
    while the body runs the model once, and ends the body as soon as the last of them
    has been seen: that module and what follows it do not run.

    The handler may keep, copy or consume the tensor at once; it comes as the module
    gets it, with its graph if gradients are on. For a down-projection it is the key,
    [batch, positions, d_key].

    Raises:
        CaptureError: no module of a name; a module that the body never reached or
            that ran twice; one that got no tensor.
    """
    modules = find_modules(model, names)
    waiting = set(modules)

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in waiting:
                raise CaptureError(
                    f"{name} ran twice before {', '.join(sorted(waiting))} ran once; "
                    "run one forward pass, of a model that runs each module once"
                )
            inputs = (*args, *kwargs.values())
            tensor = next((each for each in inputs if torch.is_tensor(each)), None)
            if tensor is None:
                raise CaptureError(f"{name} was called without a tensor")
            handler(name, tensor)
            waiting.remove(name)
            if not waiting:
                raise _AllSeen

        return hook

    handles = [
        module.register_forward_pre_hook(hook_of(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield
    except _AllSeen:
        return
    finally:
        for handle in handles:
            handle.remove()
    raise CaptureError(f"the forward pass never reached {', '.join(sorted(waiting))}")


def captured_inputs(
    model: nn.Module, names: Iterable[str], run: Callable[[], Any]
) -> dict[str, Tensor]:
    """The first input tensor of each named module, by name in order of execution,
    while `run()` calls the model once; see `capture_inputs`.

    Example:
        `captured_inputs(model, names, lambda: model(**batch))[name][rows, positions]`
    """
    inputs: dict[str, Tensor] = {}
    with capture_inputs(model, names, inputs.__setitem__):
        run()
    return inputs
