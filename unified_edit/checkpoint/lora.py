"""Updates as LoRA adapters and adapters as updates, in PEFT's files but without PEFT.

An update's factors are an adapter's: `right` is A, `left` is B, and the scaling is 1.
"""

from __future__ import annotations

import json
import math
import operator
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from unified_edit.algebra.update import (
    RankKUpdate,
    UpdateSet,
    WeightAddress,
    tensor_bytes,
)
from unified_edit.checkpoint import files
from unified_edit.checkpoint.layout import (
    TensorEntry,
    new_header,
    read_header,
    read_tensor,
)
from unified_edit.checkpoint.sharded import Checkpoint, quantization_scheme
from unified_edit.errors import (
    CheckpointError,
    CheckpointMismatch,
    NonFiniteError,
    UpdateError,
)

FORMAT = "unified-edit/lora/1"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SERVER_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_BARE = ("transformer.", "model.")
"""What tensor names lack in checkpoints that hold the bare decoder."""
_DTYPES = dict(
    F16=torch.float16, BF16=torch.bfloat16, F32=torch.float32, F64=torch.float64
)
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
    modules = {_module(address): change.rank for address, change in entries}
    rank = max(modules.values(), default=0)
    if not rank:
        raise UpdateError("the update changes nothing, so there is no adapter to write")
    notes = _check_weights(checkpoint, entries)
    if check_base:
        _check_base(checkpoint, update.metadata.get("base_fingerprint"))
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
    with files.reported(f"{out}: cannot be written, nothing was changed"):
        _check_target(out, checkpoint.folder)
        with files.locked(out.parent / f".{out.name}.unified-edit-lock"):
            staging = out.parent / f".{out.name}.unified-edit-staging"
            files.remove_tree(staging)
            os.mkdir(staging)
            with files.undone(lambda: files.remove_tree(staging)):
                _write_weights(staging / WEIGHTS, entries, rank, text)
                size = (staging / WEIGHTS).stat().st_size
                with files.NewFile(staging / CONFIG) as file:
                    file.write(json.dumps(config, sort_keys=True, indent=1).encode())
                files.sync_folder(staging)
                os.rename(staging, out)
            with files.reported(f"{out}: is complete, but may not survive a power cut"):
                files.sync_folder(out.parent)
    return LoraReport(str(out), rank, served, modules, size, tuple(notes))


def _module(address: WeightAddress) -> str:
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
        _check_finite(address.tensor, update)
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
        if entry.dtype in _DTYPES:
            _check_shape(checkpoint, entry, update, address.transposed)
        else:
            notes.append(f"{entry.name}: is {entry.dtype}, its shape was not checked")
        if changed.setdefault(entry.name, address.tensor) != address.tensor:
            raise UpdateError(f"the update changes tensor {entry.name!r} twice")
    if scheme is not None:
        notes.append(f"the base is quantized with {scheme}: shapes were not checked")
    return notes


def _check_finite(name: str, update: RankKUpdate) -> None:
    if not all(bool(torch.isfinite(f).all()) for f in (update.left, update.right)):
        raise NonFiniteError(f"{name}: a factor holds NaN or infinity; make it again")


def _check_shape(
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


def _check_base(checkpoint: Checkpoint, wanted: Any) -> None:
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


def _check_target(out: Path, base: Path) -> None:
    if out.is_symlink() or (
        os.path.lexists(out) and (not out.is_dir() or any(out.iterdir()))
    ):
        raise CheckpointError(f"{out}: exists already; name a new folder or remove it")
    if not out.parent.is_dir():
        raise CheckpointError(f"{out.parent}: not a folder; make it first")
    if base.resolve() in (out.resolve(), *out.resolve().parents):
        raise CheckpointError(f"{out}: lies inside the base {base}; choose another")


def _write_weights(path: Path, entries: Entries, rank: int, text: str) -> None:
    factors, layout = {}, []
    for address, update in entries:
        for suffix, factor in ((_A, update.right), (_B, update.left)):
            factors[f"{_PREFIX}{_module(address)}{suffix}"] = factor
    # Wide dtypes first, as safetensors does, so that every tensor is aligned.
    order = sorted(factors, key=lambda name: (-factors[name].itemsize, name))
    named = {dtype: name for name, dtype in _DTYPES.items()}
    for name in order:
        factor, a = factors[name], name.endswith(_A)
        shape = (rank, factor.shape[1]) if a else (factor.shape[0], rank)
        size = math.prod(shape) * factor.itemsize
        layout.append(TensorEntry(name, named[factor.dtype], shape, path.name, 0, size))
    with files.NewFile(path) as file:
        file.write(new_header(layout, {"format": "pt", "unified_edit": text}))
        for entry in layout:  # one padded copy in memory at a time
            factor = factors[entry.name].detach().cpu()
            padded = torch.zeros(entry.shape, dtype=factor.dtype)
            padded[: factor.shape[0], : factor.shape[1]] = factor
            file.write(tensor_bytes(padded))


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
        _check_finite(f"{path}: {module}", update)
        entry = checkpoint.editable(address)
        _check_shape(checkpoint, entry, update, address.transposed)
        if changed.setdefault(entry.name, module) != module:
            raise CheckpointError(
                f"{path}: {changed[entry.name]} and {module} both change {entry.name!r}"
            )
        updates[address] = update
    metadata: Mapping[str, Any]
    if exported is None:
        name = config.get("base_model_name_or_path")
        source = {"sha256": files.sha256_of(path), "base_model_name_or_path": name}
        metadata = {"base_fingerprint": checkpoint.fingerprint(), "lora": source}
    else:
        metadata = exported.metadata
        if "base_fingerprint" in metadata:
            _check_base(checkpoint, metadata["base_fingerprint"])
    return UpdateSet(updates, metadata)


def _read_config(folder: Path) -> dict[str, Any]:
    """The adapter's settings, if they say no more than ΔW = scaling · B · A."""
    path, pickle = folder / CONFIG, folder / "adapter_model.bin"
    with files.reported(f"{folder}: cannot be read"):
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
    names = {name.removesuffix(_A).removesuffix(_B) for name in header}
    for name, entry in header.items():
        if not name.startswith(_PREFIX) or not name.endswith((_A, _B)):
            raise CheckpointError(
                f"{path}: tensor {name!r} is not {_PREFIX}….lora_A.weight or "
                "….lora_B.weight; adapters of embeddings, DoRA's, biases and whole "
                "modules cannot be imported"
            )
        if len(entry.shape) != 2 or entry.dtype not in _DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name!r} is {entry.dtype} {list(entry.shape)}, and "
                f"must be a matrix of {', '.join(_DTYPES)}"
            )
    for name in sorted(names):
        for suffix in (_A, _B):
            if name + suffix not in header:
                raise CheckpointError(
                    f"{path}: holds no tensor {name + suffix!r}; save it again"
                )
        if header[name + _A].shape[0] != header[name + _B].shape[1]:
            raise CheckpointError(f"{path}: A and B of {name!r} differ in rank")
    if not names:
        raise CheckpointError(f"{path}: holds no tensor; save the adapter again")
    return {n.removeprefix(_PREFIX): (header[n + _A], header[n + _B]) for n in names}


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
    with files.reported(f"{path}: cannot be read"), path.open("rb") as file:
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
            modules[_module(address)] = (address, operator.index(rank))
        if odd := sorted(modules.keys() ^ pairs.keys()):
            raise ValueError(f"it and the tensors disagree about {odd}")
        return _Exported(modules, dict(header["metadata"]))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: its `unified_edit` header cannot be used: {error}; export the "
            "update again"
        ) from error
