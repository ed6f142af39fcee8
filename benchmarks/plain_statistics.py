"""Second moments of keys in the plain way, as published code collects them: one pass
over the text for each layer, its keys widened to float32 and the whole of XᵀX added to
a float32 total. The yardstick of `benchmarks/statistics.py`.

Source: the layer statistics of the code published with Meng et al. 2022 (ROME) and 2023
(MEMIT). Shares nothing with `covariance_cache`. Kinder than theirs: the text comes as
token ids, and the module whose input is the key does not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _Stop(Exception):
    """Ends a forward pass."""


@torch.no_grad()
def stopped_forward(model: Any, module: nn.Module, ids: Tensor) -> Tensor:
    """Runs a model on token ids [rows, positions] up to a module, which does not run.

    Returns:
        The module's input.
    """
    seen: list[Tensor] = []

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])
        raise _Stop

    handle = module.register_forward_pre_hook(hook)
    try:
        model(input_ids=ids, use_cache=False)
    except _Stop:
        pass
    finally:
        handle.remove()
    return seen[0]


@torch.no_grad()
def plain_moments(
    model: Any,
    modules: Sequence[nn.Module],
    batches: Sequence[Tensor],
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """The mean of k kᵀ [d_key, d_key] over the inputs k of each module, each from a
    pass of its own over all batches [rows, positions] of token ids."""
    found = []
    for module in modules:
        total: Any = 0
        count = 0
        for ids in batches:
            keys = stopped_forward(model, module, ids).flatten(0, -2).to(dtype)
            total += keys.T @ keys
            count += len(keys)
        found.append(total / count)
    return found
