"""Forward passes over the ends of prompts: the positions before are in a cache, and
blocks that need not run return what they returned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.hooks import reading_at, running_at

_PASS_COST = {"cpu": 1.5e7, "cuda": 1e11}
"""What starting a block's pass costs on a device, in parameters × tokens: rows of
unlike width share a pass where padding them costs less. Measured on two CPU cores; on
CUDA reckoned from 0.25 ms at 400 TFLOP/s."""


def pass_cost(adapter: ModelAdapter) -> int:
    """Of one more pass, in tokens."""
    size = sum(parameter.numel() for parameter in adapter.block(0).parameters())
    return round(_PASS_COST.get(adapter.device.type, _PASS_COST["cuda"]) / size)


class _Prefix(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer's attention keys and values of the prefixes. It never grows, so that one
    object serves every step."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        keys = torch.cat([self.keys, key_states], dim=-2)
        return keys, torch.cat([self.values, value_states], dim=-2)


def keys_and_values(cache: Any) -> tuple[tuple[Tensor, Tensor], ...]:
    """Each layer's attention keys and values, of a cache in which every layer has
    them: transformers tells several kinds apart, and another fails."""
    return tuple((kept.keys, kept.values) for kept in cache.layers)


def prefix_cache(
    prefix: int, pairs: Sequence[tuple[Tensor, Tensor]], skipped: int
) -> Cache | None:
    """What so many positions before the ones that run have left; None if there are
    none.

    Args:
        pairs: attention keys and values [rows, heads, prefix, head size] of each layer
            that runs.
        skipped: how many layers below do not.
    """
    if not prefix:
        return None
    # Models ask the first layer for the length, also where it does not run.
    empty = torch.empty(()).expand(1, 1, prefix, 1)
    layers: list[Any] = [_Prefix(empty, empty) for _ in range(skipped)]
    return Cache(layers=[*layers, *(_Prefix(*pair) for pair in pairs)])


def all_but_gaps(mask: Tensor, ids: Tensor) -> Tensor:
    """The mask [rows, columns + width] of ids after a cache's columns. Padding on the
    right may be seen: only other padding stands behind it, and a row that saw nothing
    would be NaN for some attention kernels."""
    return torch.cat([mask.to(ids), torch.ones_like(ids)], dim=1)


@contextmanager
def reading(
    adapter: ModelAdapter, layer: int, rows: Tensor, columns: Tensor
) -> Iterator[None]:
    """Logits come as [1, reads, vocabulary]. Above the last attention, where positions
    no longer meet, only those run that are read; unless `layer`, whose MLP's output is
    looked at or changed, is the last one."""
    last = adapter.layer_count - 1
    mlp = adapter.mlp(last) if layer < last else None
    with ExitStack() as hooks:
        if mlp is not None:
            hooks.enter_context(running_at(mlp, rows, columns))
        hooks.enter_context(reading_at(adapter.head, rows, columns))
        yield


def take(tensor: Tensor, rows: Tensor) -> Tensor:
    """Rows of a tensor, by index, wherever it is."""
    return tensor.index_select(0, rows.to(tensor.device))
