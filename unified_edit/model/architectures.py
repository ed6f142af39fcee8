"""The architecture table: one frozen record per `model_type`. Data only; a model
whose type is not here is refused, never guessed at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from covariance_cache.modules import KEY_MODULES


@dataclass(frozen=True)
class Architecture:
    """Where a family keeps what an edit touches. `{}` stands for the layer."""

    model_type: str
    """`model_type` of the transformers config."""
    block: str
    """The decoder block; its output is the residual stream."""
    down_projection: str
    """The MLP's down-projection: its input is the key, its output the value."""
    storage: Literal["Linear", "Conv1D"]
    """`Linear` stores [d_value, d_key], `Conv1D` its transpose. Never told by shape:
    a square weight would tell nothing."""
    base_prefix: str
    """What tensor names begin with in a full model's state dict and may lack in the
    files of checkpoints that hold the bare decoder."""


def _family(
    model_type: str,
    block: str,
    storage: Literal["Linear", "Conv1D"],
    base_prefix: str,
) -> Architecture:
    return Architecture(
        model_type, block, KEY_MODULES[model_type], storage, base_prefix
    )


ARCHITECTURES: dict[str, Architecture] = {
    record.model_type: record
    for record in (
        _family("gpt2", "transformer.h.{}", "Conv1D", "transformer."),
        _family("llama", "model.layers.{}", "Linear", "model."),
    )
}
