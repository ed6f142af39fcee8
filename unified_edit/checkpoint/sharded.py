"""A checkpoint folder in the Hugging Face layout, read without transformers.

`config.json` and either `model.safetensors` or an index with its shards. Everything is
checked on opening; tensors are read one at a time, and nothing is ever written here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from covariance_cache.fingerprint import (
    Sample,
    as_sample,
    fingerprint_samples,
    sample_positions,
)
from unified_edit.algebra.update import WeightAddress
from unified_edit.checkpoint import strict_json
from unified_edit.checkpoint.files import (
    NOT_CHECKPOINT,
    listing,
    open_regular,
    reported,
    sha256_of,
)
from unified_edit.checkpoint.layout import (
    TensorEntry,
    read_header,
    read_tensor,
)
from unified_edit.errors import CheckpointError, UnsupportedModel

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EDITABLE_DTYPES = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class Checkpoint:
    """An opened, validated checkpoint folder. Made by `Checkpoint.open`."""

    folder: Path
    config: Mapping[str, Any]
    """Content of `config.json`."""
    tensors: Mapping[str, TensorEntry]
    """Every stored tensor by name, ordered by file and offset."""

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Reads the config, the index and every shard's header; no tensor data.

        Raises:
            CheckpointError: a file is missing or malformed, index and shards disagree,
                a tensor is stored twice, or the weights are pickle files.
        """
        folder = Path(folder)
        with reported(f"{folder}: cannot be read"):
            if not folder.is_dir():
                raise CheckpointError(f"{folder}: not a checkpoint folder")
            if not (folder / CONFIG).is_file():
                raise CheckpointError(f"{folder}: holds no {CONFIG}")
            config = _read_json(folder / CONFIG)
            single, index = folder / SINGLE, folder / INDEX
            if single.is_file() and index.is_file():
                raise CheckpointError(
                    f"{folder}: holds both {SINGLE} and {INDEX}; remove the one that "
                    "is not meant"
                )
            if single.is_file():
                return cls(folder, config, read_header(single))
            if index.is_file():
                return cls(folder, config, _read_shards(folder))
            pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        if pickles:
            raise CheckpointError(
                f"{folder}: its weights are pickle files ({pickles[0]}), which run "
                "code when read and are not opened here; load the model with "
                "transformers where you trust it, and save_pretrained() it as "
                "safetensors"
            )
        raise CheckpointError(f"{folder}: holds neither {SINGLE} nor {INDEX}")

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the weight files."""
        return tuple(dict.fromkeys(entry.file for entry in self.tensors.values()))

    def path_of(self, entry: TensorEntry) -> Path:
        """The file that holds this tensor."""
        return self.folder / entry.file

    def __getitem__(self, name: str) -> TensorEntry:
        try:
            return self.tensors[name]
        except KeyError:
            close = difflib.get_close_matches(name, self.tensors, n=1)
            hint = f"; the nearest name is {close[0]!r}" if close else ""
            raise CheckpointError(
                f"{self.folder}: stores no tensor {name!r}{hint}"
            ) from None

    def read(self, name: str) -> Tensor:
        """One tensor, as stored; only its bytes are read."""
        entry = self[name]
        return read_tensor(self.path_of(entry), entry)

    def resolve(self, address: WeightAddress) -> TensorEntry:
        """The stored tensor of an address: by its name or one of its aliases, exactly.

        Raises:
            CheckpointError: stored under none of the names, or under several.
        """
        names = dict.fromkeys((address.tensor, *address.aliases))
        stored = [name for name in names if name in self.tensors]
        if len(stored) > 1:
            raise CheckpointError(
                f"{self.folder}: stores one weight under several names, {stored}; "
                "which of them a model would load is not known: save it again with "
                "one of them"
            )
        return self[stored[0] if stored else address.tensor]

    def editable(self, address: WeightAddress) -> TensorEntry:
        """`resolve`, for a weight that is to be changed.

        Raises:
            UnsupportedModel: a quantized checkpoint, a dtype that is not a plain
                float, or a tensor that is not a matrix (experts stored together).
            CheckpointError: as `resolve`.
        """
        scheme = quantization_scheme(self.config)
        if scheme is not None:
            raise UnsupportedModel(
                f"{self.folder}: quantized with {scheme}; {_INSTEAD}"
            )
        entry = self.resolve(address)
        if entry.dtype not in EDITABLE_DTYPES:
            raise UnsupportedModel(
                f"{self.folder}: tensor {entry.name!r} is stored as {entry.dtype}, "
                f"only {', '.join(EDITABLE_DTYPES)} can be edited; {_INSTEAD}"
            )
        if len(entry.shape) != 2:
            raise UnsupportedModel(
                f"{self.folder}: tensor {entry.name!r} has shape {list(entry.shape)}, "
                "an edited weight is a matrix"
            )
        return entry

    def fingerprint(self, replaced: Mapping[str, Sample] | None = None) -> str:
        """`covariance_cache.fingerprint.model_fingerprint` of the model in this
        folder, from a few thousand values of each matrix.

        Args:
            replaced: samples (see `sample_of`) to use for some tensors instead of
                their stored values, as they will be after a patch.
        """
        replaced = replaced or {}
        samples = []
        with reported(f"{self.folder}: cannot be read"):
            for entry in self.tensors.values():
                if entry.name in replaced:
                    samples.append(replaced[entry.name])
                elif _is_sampled(entry):
                    samples.append(self._stored_sample(entry))
        return fingerprint_samples(samples)

    def _stored_sample(self, entry: TensorEntry) -> Sample:
        width = entry.torch_dtype.itemsize
        mapped = np.memmap(
            self.path_of(entry), np.uint8, "r", entry.begin, (entry.nbytes,)
        )
        positions = sample_positions(entry.nbytes // width)
        gathered = bytearray(mapped.reshape(-1, width)[positions].tobytes())
        return as_sample(
            entry.shape, torch.frombuffer(gathered, dtype=entry.torch_dtype)
        )

    def sha256(self) -> dict[str, str]:
        """SHA-256 of every file in the folder, by relative name."""
        with reported(f"{self.folder}: cannot be read"):
            return {name: sha256_of(self.folder / name) for name in self.listing()}

    def listing(self) -> list[str]:
        """Relative names of all files, sorted; without this package's own and `.git`.

        Raises:
            CheckpointError: a broken symlink, a symlinked folder, or no regular file.
        """
        return listing(self.folder)


_INSTEAD = (
    "adding a change to quantized values would lose most of it. Edit the original "
    "model in 16 or 32 bits, or save a dequantized copy, and quantize it afterwards"
)


def quantization_scheme(config: Mapping[str, Any]) -> str | None:
    """Name of the scheme that a model's config declares, or None."""
    declared = config.get("quantization_config") or config.get("compression_config")
    if not declared:
        return None
    named = declared.get("quant_method") if isinstance(declared, dict) else None
    return str(named or "an unnamed scheme")


def _is_sampled(entry: TensorEntry) -> bool:
    return (
        len(entry.shape) == 2
        and entry.nbytes > 0
        and entry.dtype.startswith(("F", "BF"))
    )


def _read_shards(folder: Path) -> dict[str, TensorEntry]:
    index = folder / INDEX
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    shards: dict[str, dict[str, TensorEntry]] = {}
    for name, shard in weight_map.items():
        if not is_file_name(shard):
            raise CheckpointError(
                f"{index}: tensor {name!r} is said to be in {shard!r}, which is not "
                "the name of a file in this folder"
            )
        if shard not in shards:
            if not (folder / shard).is_file():
                raise CheckpointError(
                    f"{folder}: shard {shard!r} is missing; download it again (the "
                    f"index needs it for {name!r})"
                )
            shards[shard] = read_header(folder / shard)
        if name not in shards[shard]:
            raise CheckpointError(
                f"{folder / shard}: holds no tensor {name!r}, though the index says "
                "so; download shards and index again"
            )
    tensors: dict[str, TensorEntry] = {}
    for shard in sorted(shards):
        for name, entry in shards[shard].items():
            if weight_map.get(name) != shard:
                told = weight_map.get(name)
                said = "does not list it" if told is None else f"says {told!r}"
                raise CheckpointError(
                    f"{folder / shard}: holds tensor {name!r}, but the index {said}; "
                    "download shards and index again"
                )
            tensors[name] = entry
    return tensors


def is_file_name(name: Any) -> bool:
    """Whether `name` is a plain file name that can be a checkpoint's: it cannot lead
    out of a folder, nor to this package's own files."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..", *NOT_CHECKPOINT)
        and not set(name) & set("/\\\0")
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            raw = file.readall()
        data = strict_json.loads(raw, len(raw))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return data
