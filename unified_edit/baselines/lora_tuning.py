"""LoRA fine-tuning as an editor, by way of peft (an optional extra).

Source: Hu et al. 2022 (LoRA).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
from unified_edit.model.adapter import ModelAdapter
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
        UpdateError: a layer's change is lost in rounding to its weight's dtype.
        UnsupportedModel, NonFiniteError.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
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
        with _unwrapped(model, [name for _, name in named]), job.timed("descent"):
            with _seeded(job.adapter, chosen.seed):
                # The tuner alone: peft's model around it would change the config and
                # leave a hook on the embeddings.
                LoraModel(model, config, _ADAPTER)
            wanted = [p for p in model.parameters() if p.requires_grad]
            notes = descend(job, wanted, chosen, nullcontext, progress=progress)
            updates = {
                adapter.address(layer, name): _update(model.get_submodule(name))
                for layer, name in named
            }
        recipe = {"name": "lora", "layers": list(layers), **asdict(chosen)}
        return job.result(updates, recipe, "unvalidated", notes)


@contextmanager
def _unwrapped(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """The modules of these names are the same objects afterwards, whatever replaced
    them inside, and nothing of peft is left."""
    before = {name: model.get_submodule(name) for name in names}
    known = set(vars(model))
    try:
        yield
    finally:
        for name, module in before.items():
            place, _, own = name.rpartition(".")
            setattr(model.get_submodule(place), own, module)
        for attribute in set(vars(model)) - known:
            delattr(model, attribute)


@contextmanager
def _seeded(adapter: ModelAdapter, seed: int) -> Iterator[None]:
    """peft draws from torch's global generators: seeded inside, put back after it."""
    devices = {p.device for p in adapter.model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng([d.index for d in devices]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def _update(module: Any) -> RankKUpdate:
    """scaling · BA of one of peft's layers, in float32."""
    left = module.lora_B[_ADAPTER].weight.float() * module.scaling[_ADAPTER]
    return RankKUpdate(left.clone(), module.lora_A[_ADAPTER].weight.float().clone())
