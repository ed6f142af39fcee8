"""Adapters that PEFT can read, as updates; without PEFT."""

from __future__ import annotations

import json
import math
import operator
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unified_edit.algebra.update import RankKUpdate, UpdateSet, WeightAddress
from unified_edit.checkpoint.files import open_regular, reported, sha256_of
from unified_edit.checkpoint.layout import TensorEntry, read_header, read_tensor
from unified_edit.checkpoint.lora import (
    CONFIG,
    FORMAT,
    PREFIX,
    WEIGHTS,
    A,
    B,
    check_fingerprint,
    check_finite,
    check_shape,
    module_of,
)
from unified_edit.checkpoint.sharded import EDITABLE_DTYPES, Checkpoint
from unified_edit.errors import (
    CheckpointError,
)

_BARE = ("transformer.", "model.")
"""What tensor names lack in checkpoints that hold the bare decoder."""
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Of PEFT's `init_lora_weights`, those that leave the base's weights alone."""
_HARMLESS = frozenset(
    "alpha_pattern auto_mapping base_model_name_or_path bias corda_config eva_config "
    "ensure_weight_tying exclude_modules fan_in_fan_out inference_mode "
    "init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha "
    "lora_dropout lora_ga_config megatron_config megatron_core peft_type peft_version "
    "qalora_group_size r rank_pattern revision runtime_config target_modules task_type "
    "use_rslora velora_config".split()
)
"""PEFT's settings that are read here, or do not matter once an adapter is trained."""


def import_lora(folder: str | Path, *, base: str | Path) -> UpdateSet:
    """Reads a PEFT LoRA adapter as an update of the model in the folder `base`.

    What `export_lora` wrote comes back as the update that was exported. Of any other
    adapter `left` is scaling · B and `right` A, in float32 (float64 if stored so).

    Raises:
        CheckpointError: a file is unreadable or malformed, a tensor missing or unknown,
            or the adapter is more than low-rank changes of matrices.
        CheckpointMismatch: an exported adapter of another model.
        UnsupportedModel: the base is quantized.
        UpdateError: a weight of another shape or orientation.
        NonFiniteError: NaN or infinity in a factor.
    """
    path, checkpoint = Path(folder) / WEIGHTS, Checkpoint.open(base)
    config, pairs = _read_config(Path(folder)), _read_pairs(path)
    exported = _exported(path, pairs)
    transposed = bool(config.get("fan_in_fan_out"))
    updates: dict[WeightAddress, RankKUpdate] = {}
    changed: dict[str, str] = {}
    for module in sorted(pairs):
        a, b = (read_tensor(path, entry) for entry in pairs[module])
        scaling = _scaling(Path(folder) / CONFIG, config, module, a.shape[0])
        if exported is None:
            address = _address(path, module, transposed)
            wide = torch.float64 in (a.dtype, b.dtype)
            work = torch.float64 if wide else torch.float32
            update = RankKUpdate(b.to(work) * scaling, a.to(work))
        else:
            address, rank = exported.modules[module]
            if (scaling, transposed) != (1, address.transposed) or (
                bool(a[rank:].any()) or bool(b[:, rank:].any())
            ):
                raise CheckpointError(
                    f"{folder}: {module} was changed since unified-edit exported it; "
                    "export it again"
                )
            update = RankKUpdate(b[:, :rank].contiguous(), a[:rank].contiguous())
        check_finite(f"{path}: {module}", update)
        entry = checkpoint.editable(address)
        check_shape(checkpoint, entry, update, address.transposed)
        if changed.setdefault(entry.name, module) != module:
            raise CheckpointError(
                f"{path}: {changed[entry.name]} and {module} both change {entry.name!r}"
            )
        updates[address] = update
    metadata: Mapping[str, Any]
    if exported is None:
        name = config.get("base_model_name_or_path")
        source = {"sha256": sha256_of(path), "base_model_name_or_path": name}
        metadata = {"base_fingerprint": checkpoint.fingerprint(), "lora": source}
    else:
        metadata = exported.metadata
        if "base_fingerprint" in metadata:
            check_fingerprint(checkpoint, metadata["base_fingerprint"])
    return UpdateSet(updates, metadata)


def _read_config(folder: Path) -> dict[str, Any]:
    """The adapter's settings, if they say no more than ΔW = scaling · B · A."""
    path, pickle = folder / CONFIG, folder / "adapter_model.bin"
    with reported(f"{folder}: cannot be read"):
        if pickle.is_file() and not (folder / WEIGHTS).is_file():
            raise CheckpointError(
                f"{pickle}: a pickle file, which runs code when read and is not opened "
                "here; load the adapter with PEFT where you trust it, and "
                "save_pretrained() it as safetensors"
            )
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder}: holds no {name}, so no PEFT adapter")
        try:
            config = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is not 'LORA'")
    init = config.get("init_lora_weights")
    if init not in _INITS:
        raise CheckpointError(
            f"{path}: init_lora_weights={init!r} changes the base's own "
            "weights, or is unknown, so the adapter is none of the base in the folder; "
            "save it with PEFT's path_initial_model_for_weight_conversion"
        )
    odd = [name for name, value in config.items() if value and name not in _HARMLESS]
    if (config.get("bias") or "none") != "none":
        odd.append("bias")
    if odd:
        raise CheckpointError(
            f"{path}: {odd[0]}={config[odd[0]]!r} makes the adapter more "
            "than low-rank changes of matrices, or is unknown here; use PEFT's "
            "merge_and_unload() and save the whole model instead"
        )
    return config


def _read_pairs(path: Path) -> dict[str, tuple[TensorEntry, TensorEntry]]:
    """Module → where its A and B lie."""
    header = read_header(path)
    names = {name.removesuffix(A).removesuffix(B) for name in header}
    for name, entry in header.items():
        if not name.startswith(PREFIX) or not name.endswith((A, B)):
            raise CheckpointError(
                f"{path}: tensor {name!r} is not {PREFIX}….lora_A.weight or "
                "….lora_B.weight; adapters of embeddings, DoRA's, biases and whole "
                "modules cannot be imported"
            )
        if len(entry.shape) != 2 or entry.dtype not in EDITABLE_DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name!r} is {entry.dtype} {list(entry.shape)}, and "
                f"must be a matrix of {', '.join(EDITABLE_DTYPES)}"
            )
    for name in sorted(names):
        for suffix in (A, B):
            if name + suffix not in header:
                raise CheckpointError(
                    f"{path}: holds no tensor {name + suffix!r}; save it again"
                )
        if header[name + A].shape[0] != header[name + B].shape[1]:
            raise CheckpointError(f"{path}: A and B of {name!r} differ in rank")
    if not names:
        raise CheckpointError(f"{path}: holds no tensor; save the adapter again")
    return {n.removeprefix(PREFIX): (header[n + A], header[n + B]) for n in names}


def _scaling(path: Path, config: Mapping[str, Any], module: str, stored: int) -> float:
    """alpha / r, or alpha / √r, of a module whose tensors have rank `stored`."""

    def chosen(pattern: str, default: str) -> Any:
        # PEFT's rule: the first key that matches a whole end of the module's name.
        values = config.get(pattern) or {}
        ends = (key for key in values if re.match(rf"(.*\.)?({key})$", module))
        return values.get(next(ends, module), config.get(default))

    try:
        rank, alpha = chosen("rank_pattern", "r"), chosen("alpha_pattern", "lora_alpha")
        if rank != stored or not stored:
            raise ValueError(f"rank {rank!r}, but its tensors have rank {stored}")
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        if not math.isfinite(scaling):
            raise ValueError(f"the scaling {scaling}")
    except (AttributeError, TypeError, ArithmeticError, ValueError, re.error) as error:
        raise CheckpointError(
            f"{path}: r, lora_alpha or their patterns are wrong for {module!r}: {error}"
        ) from error
    return float(scaling)


def _address(path: Path, module: str, transposed: bool) -> WeightAddress:
    layers = [int(part) for part in module.split(".") if part.isdecimal()]
    if len(layers) != 1:
        raise CheckpointError(
            f"{path}: the name {module!r} does not hold exactly one number, its layer; "
            "only a decoder block's own matrices can be imported"
        )
    name = f"{module}.weight"
    bare = [name.removeprefix(prefix) for prefix in _BARE if name.startswith(prefix)]
    return WeightAddress(name, layers[0], transposed, tuple(bare))


@dataclass(frozen=True)
class _Exported:
    """What `export_lora` keeps in the header of the weights' file."""

    modules: Mapping[str, tuple[WeightAddress, int]]
    """With each module's own rank."""
    metadata: Mapping[str, Any]


def _exported(path: Path, pairs: Mapping[str, Any]) -> _Exported | None:
    """None for an adapter that something else wrote."""
    with reported(f"{path}: cannot be read"), open_regular(path) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        texts = json.loads(file.read(length)).get("__metadata__", {})
    if "unified_edit" not in texts:
        return None
    try:
        header = json.loads(texts["unified_edit"])
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}, not {FORMAT!r}")
        modules = {}
        for entry, rank in zip(header["addresses"], header["ranks"], strict=True):
            address = WeightAddress(**{**entry, "aliases": tuple(entry["aliases"])})
            operator.index(address.layer)
            modules[module_of(address)] = (address, operator.index(rank))
        if odd := sorted(modules.keys() ^ pairs.keys()):
            raise ValueError(f"it and the tensors disagree about {odd}")
        return _Exported(modules, dict(header["metadata"]))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: its `unified_edit` header cannot be used: {error}; export the "
            "update again"
        ) from error
