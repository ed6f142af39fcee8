"""Updates as LoRA adapters and adapters as updates, in PEFT's files but without PEFT.

An update's factors are an adapter's: `right` is A, `left` is B, and the scaling is 1.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from unified_edit.algebra.update import (
    DTYPE_NAMES,
    RankKUpdate,
    UpdateSet,
    WeightAddress,
    tensor_bytes,
)
from unified_edit.checkpoint.files import NewFile
from unified_edit.checkpoint.layout import (
    TensorEntry,
    new_header,
)
from unified_edit.checkpoint.new_folder import new_folder
from unified_edit.checkpoint.sharded import (
    EDITABLE_DTYPES,
    Checkpoint,
    quantization_scheme,
)
from unified_edit.errors import (
    CheckpointMismatch,
    NonFiniteError,
    UpdateError,
)

FORMAT = "unified-edit/lora/1"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SERVER_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
Entries = Sequence[tuple[WeightAddress, RankKUpdate]]


@dataclass(frozen=True)
class LoraReport:
    """What an export wrote."""

    folder: str
    rank: int
    """The adapter's, to which each module's factors are padded with zeros."""
    server_rank: int | None
    """What vLLM needs as --max-lora-rank; None if it allows none so large."""
    modules: Mapping[str, int]
    """Module → its own rank."""
    bytes: int
    """Size of the weights' file."""
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "notes": list(self.notes)}


def export_lora(
    update: UpdateSet,
    out: str | Path,
    *,
    base: str | Path,
    base_name: str | None = None,
    check_base: bool = True,
) -> LoraReport:
    """Writes `update` as a PEFT adapter into the new folder `out`, exactly; its `keys`
    are left out.

    Args:
        base: folder of the model that the adapter is for; may be quantized.
        base_name: what the adapter calls it; by default `base` as given.
        check_base: refuse an update that was made for another model. A quantized base
            needs False: its fingerprint is never that of the model that was edited.

    Raises:
        CheckpointError: base unreadable, a tensor missing, `out` in use or unwritable.
        CheckpointMismatch: the update was made for another model.
        UpdateError: the update is empty, does not fit, mixes transposed weights with
            others, or its metadata is no JSON data.
        NonFiniteError: NaN or infinity in a factor.
    """
    out, checkpoint = Path(os.path.abspath(out)), Checkpoint.open(base)
    entries = sorted(update, key=lambda entry: (entry[0].layer, entry[0].tensor))
    modules = {module_of(address): change.rank for address, change in entries}
    rank = max(modules.values(), default=0)
    if not rank:
        raise UpdateError("the update changes nothing, so there is no adapter to write")
    notes = _check_weights(checkpoint, entries)
    if check_base:
        check_fingerprint(checkpoint, update.metadata.get("base_fingerprint"))
    served = next((allowed for allowed in SERVER_RANKS if allowed >= rank), None)
    if served is None:
        notes.append(
            f"rank {rank} is more than vLLM allows ({SERVER_RANKS[-1]}): patch the "
            "checkpoint instead, or split the edits over several adapters"
        )
    config = {
        "base_model_name_or_path": str(base) if base_name is None else base_name,
        "bias": "none",
        "fan_in_fan_out": entries[0][0].transposed,
        "inference_mode": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(modules),
        "task_type": "CAUSAL_LM",
    }
    header = {
        "format": FORMAT,
        "addresses": [asdict(address) for address, _ in entries],
        "ranks": list(modules.values()),
        "metadata": dict(update.metadata),
    }
    try:
        text = json.dumps(header, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UpdateError(f"the update's metadata is no JSON data: {error}") from error
    with new_folder(out, checkpoint.folder) as staging:
        _write_weights(staging / WEIGHTS, entries, rank, text)
        size = (staging / WEIGHTS).stat().st_size
        with NewFile(staging / CONFIG) as file:
            file.write(json.dumps(config, sort_keys=True, indent=1).encode())
    return LoraReport(str(out), rank, served, modules, size, tuple(notes))


def module_of(address: WeightAddress) -> str:
    """PEFT names modules as the loaded model does, whatever the files call them."""
    if not address.tensor.endswith(".weight"):
        raise UpdateError(
            f"{address.tensor!r} is not a module's `.weight`, which is all that an "
            "adapter can change; patch the checkpoint instead"
        )
    return address.tensor.removesuffix(".weight")


def _check_weights(checkpoint: Checkpoint, entries: Entries) -> list[str]:
    """Checks the factors against the base; returns notes on what cannot be checked."""
    scheme, first, notes = quantization_scheme(checkpoint.config), entries[0][0], []
    changed: dict[str, str] = {}
    for address, update in entries:
        check_finite(address.tensor, update)
        if address.transposed != first.transposed:
            raise UpdateError(
                f"{first.tensor!r} and {address.tensor!r} are stored in different "
                "orientations, and an adapter has one; export them as two updates"
            )
        modules = [n.removesuffix("weight") for n in (address.tensor, *address.aliases)]
        if scheme is not None and any(
            name.startswith(tuple(modules)) for name in checkpoint.tensors
        ):
            continue  # packed values have names, shapes and numbers of their own
        entry = checkpoint.resolve(address)
        if entry.dtype in EDITABLE_DTYPES:
            check_shape(checkpoint, entry, update, address.transposed)
        else:
            notes.append(f"{entry.name}: is {entry.dtype}, its shape was not checked")
        if changed.setdefault(entry.name, address.tensor) != address.tensor:
            raise UpdateError(f"the update changes tensor {entry.name!r} twice")
    if scheme is not None:
        notes.append(f"the base is quantized with {scheme}: shapes were not checked")
    return notes


def check_finite(name: str, update: RankKUpdate) -> None:
    if not all(bool(torch.isfinite(f).all()) for f in (update.left, update.right)):
        raise NonFiniteError(f"{name}: a factor holds NaN or infinity; make it again")


def check_shape(
    checkpoint: Checkpoint, entry: TensorEntry, update: RankKUpdate, transposed: bool
) -> None:
    expected = update.shape[::-1] if transposed else update.shape
    if entry.shape != expected:
        turned = entry.shape == expected[::-1]
        raise UpdateError(
            f"{checkpoint.folder}: tensor {entry.name!r} is stored as "
            f"{list(entry.shape)}, but with fan_in_fan_out={transposed} the factors "
            f"change one of {list(expected)}; "
            + (f"it must be {not transposed}" if turned else "they are another model's")
        )


def check_fingerprint(checkpoint: Checkpoint, wanted: Any) -> None:
    scheme = quantization_scheme(checkpoint.config)
    if scheme is not None:
        raise CheckpointMismatch(
            f"{checkpoint.folder}: is quantized with {scheme}, so whether it was made "
            f"from {wanted}, which was edited, cannot be told; if you know that it "
            "was, pass check_base=False"
        )
    found = checkpoint.fingerprint()
    if wanted != found:
        raise CheckpointMismatch(
            f"{checkpoint.folder}: its fingerprint is {found}, but the update was made "
            f"for {wanted}; name the model that it was made for (loading in another "
            "dtype than the files' changes the fingerprint too)"
        )


def _write_weights(path: Path, entries: Entries, rank: int, text: str) -> None:
    factors, layout = {}, []
    for address, update in entries:
        for suffix, factor in ((A, update.right), (B, update.left)):
            factors[f"{PREFIX}{module_of(address)}{suffix}"] = factor
    # Wide dtypes first, as safetensors does, so that every tensor is aligned.
    order = sorted(factors, key=lambda name: (-factors[name].itemsize, name))
    for name in order:
        factor, a = factors[name], name.endswith(A)
        shape = (rank, factor.shape[1]) if a else (factor.shape[0], rank)
        size = math.prod(shape) * factor.itemsize
        layout.append(
            TensorEntry(name, DTYPE_NAMES[factor.dtype], shape, path.name, 0, size)
        )
    with NewFile(path) as file:
        file.write(new_header(layout, {"format": "pt", "unified_edit": text}))
        for entry in layout:  # one padded copy in memory at a time
            factor = factors[entry.name].detach().cpu()
            padded = torch.zeros(entry.shape, dtype=factor.dtype)
            padded[: factor.shape[0], : factor.shape[1]] = factor
            file.write(tensor_bytes(padded))
