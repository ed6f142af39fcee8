"""LoRA fine-tuning as an editor, by way of peft (an optional extra).

Source: Hu et al. 2022 (LoRA).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from unified_edit.algebra.update import RankKUpdate
from unified_edit.baselines.fine_tune import Descent, descend
from unified_edit.baselines.outcome import check_layers, editing
from unified_edit.edits import Edit
from unified_edit.engine import EditResult
from unified_edit.errors import EditorError
from unified_edit.model.frames import PLAIN, Frame

_ADAPTER = "default"


@dataclass(frozen=True)
class LoraSettings(Descent):
    """LoRA on all linear maps of some layers' MLPs."""

    learning_rate: float = 5e-3
    rank: int = 8
    """Of each map's change."""
    alpha: float = 16.0
    """The change is α / rank · BA."""
    seed: int = 0
    """Of A's random start; B begins at zero."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or not self.alpha > 0:
            raise EditorError("rank and alpha must be positive")


def lora_tune(
    model: nn.Module,
    tokenizer: Any,
    edits: Sequence[Edit],
    layers: Sequence[int],
    settings: LoraSettings | None = None,
    *,
    frame: Frame = PLAIN,
    progress: bool = False,
) -> EditResult:
    """The update that LoRA fine-tuning finds for some edits, in its own factors. The
    model itself, its modules too, is the same afterwards.

    Raises:
        EditorError: peft is not installed, layers that the model does not have, or a
            loss that is not finite.
        EditError: edits empty, repeated, contradictory, or not tokenizable.
        UnsupportedModel, NonFiniteError.
    """
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ImportError as error:
        raise EditorError(
            "LoRA fine-tuning needs peft: pip install 'unified-edit[lora]'"
        ) from error
    chosen = settings or LoraSettings()
    with editing(model, tokenizer, edits, frame) as job:
        adapter = job.adapter
        check_layers(layers, adapter.layer_count)
        named = [(k, name) for k in layers for name in adapter.mlp_modules(k)]
        config = LoraConfig(
            r=chosen.rank,
            lora_alpha=chosen.alpha,  # type: ignore[arg-type]
            target_modules=[name for _, name in named],
            fan_in_fan_out=adapter.architecture.storage == "Conv1D",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(chosen.seed)
            wrapped: Any = get_peft_model(model, config)
        assert isinstance(wrapped, PeftModel)
        try:
            with job.timed("descent"):
                wanted = [p for p in wrapped.parameters() if p.requires_grad]
                notes = descend(job, wanted, chosen, nullcontext, progress=progress)
            updates = {
                adapter.address(layer, name): _update(model.get_submodule(name))
                for layer, name in named
            }
        finally:
            wrapped.unload()
        recipe = {"name": "lora", "layers": list(layers), **asdict(chosen)}
        return job.result(updates, recipe, "unvalidated", notes)


@torch.no_grad()
def _update(module: Any) -> RankKUpdate:
    """scaling · BA of one of peft's layers, in float32."""
    left = module.lora_B[_ADAPTER].weight.float() * module.scaling[_ADAPTER]
    return RankKUpdate(left.clone(), module.lora_A[_ADAPTER].weight.float().clone())
