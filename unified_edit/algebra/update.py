"""The update: rank-k factors for named weights, and its file.

An update is immutable, knows nothing of a model or of a checkpoint's files, and is
what every other part of the project exchanges. `ΔW = left @ right`, seen as
[d_value, d_key]; `transposed` says that the weight is stored as [d_key, d_value].
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unified_edit.errors import UpdateError

FORMAT = "unified-edit/update/1"
FIELDS = ("left", "right", "keys", "background")
"""The tensors of an update; it may lack the last two."""
_ROW_BLOCK = 1024
DTYPE_NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
"""Dtypes of factors and of weights that can be edited, with safetensors' names."""
_DTYPES = tuple(DTYPE_NAMES)


@dataclass(frozen=True)
class WeightAddress:
    """Where an edited weight lives, in a module tree and in a checkpoint's files."""

    tensor: str
    """Name in the model's state dict, e.g. `transformer.h.5.mlp.c_proj.weight`."""
    layer: int
    """Index of the decoder block."""
    transposed: bool
    """Stored as [d_key, d_value] (GPT-2's `Conv1D`) instead of [d_value, d_key]."""
    aliases: tuple[str, ...] = ()
    """Other names under which checkpoints hold the same tensor."""


@dataclass(frozen=True, eq=False)
class RankKUpdate:
    """Factors of one weight's change: `ΔW = left @ right`."""

    left: Tensor
    """[d_value, k]"""
    right: Tensor
    """[k, d_key]"""
    keys: Tensor | None = None
    """[n, d_key], one row for each edit: where the change is meant to hold."""
    background: Tensor | None = None
    """[m, d_key], the leading directions of C (`algebra.rounding.leading`): where the
    weight should otherwise stay what it is."""

    def __post_init__(self) -> None:
        shapes = (tuple(self.left.shape), tuple(self.right.shape))
        if self.left.ndim != 2 or self.right.ndim != 2 or shapes[0][1] != shapes[1][0]:
            raise UpdateError(
                f"factors must be [d_value, k] and [k, d_key], got {shapes[0]} "
                f"and {shapes[1]}"
            )
        if self.left.dtype not in _DTYPES:
            raise UpdateError(
                f"factors must be one of {_dtype_names()}, got {self.left.dtype}"
            )
        if self.left.dtype != self.right.dtype or self.left.device != self.right.device:
            raise UpdateError(
                "both factors must share dtype and device, got "
                f"{self.left.dtype} on {self.left.device} and "
                f"{self.right.dtype} on {self.right.device}"
            )
        for name in ("keys", "background"):
            rows = getattr(self, name)
            if rows is not None and (
                rows.ndim != 2
                or rows.shape[1] != shapes[1][1]
                or rows.dtype not in _DTYPES
            ):
                raise UpdateError(
                    f"{name} must be [n, {shapes[1][1]}] of {_dtype_names()}, got "
                    f"{tuple(rows.shape)} of {rows.dtype}"
                )

    @property
    def rank(self) -> int:
        """Number of columns of `left`; an upper bound of ΔW's rank."""
        return self.left.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_value, d_key)."""
        return self.left.shape[0], self.right.shape[1]

    @torch.no_grad()
    def norm(self) -> float:
        """‖ΔW‖_F in float64, by blocks of rows, so that ΔW is never whole in memory.

        The products that cancel are summed before they are squared: a change that was
        taken back has norm 0 up to rounding of its factors, not to its square root.
        """
        left, right = self.left.double(), self.right.double()
        blocks = [
            float((left[start : start + _ROW_BLOCK] @ right).norm())
            for start in range(0, left.shape[0], _ROW_BLOCK)
        ]
        return math.hypot(*blocks)

    def dense(self) -> Tensor:
        """ΔW [d_value, d_key], materialised; for tests and small weights."""
        return self.left @ self.right

    @classmethod
    def of_matrix(cls, change: Tensor) -> RankKUpdate:
        """ΔW [d_value, d_key] that has no fewer factors, exactly: times the identity
        of its shorter side."""
        rows, columns = change.shape
        one = torch.eye(min(rows, columns), dtype=change.dtype, device=change.device)
        return cls(one, change) if rows <= columns else cls(change, one)

    def compact(self) -> RankKUpdate:
        """The same change, in no more factors than its shorter side."""
        if self.rank <= min(self.shape):
            return self
        found = self.of_matrix(self.dense())
        return RankKUpdate(found.left, found.right, self.keys, self.background)

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> RankKUpdate:
        """The same factors and keys in another dtype or on another device."""
        moved = (getattr(self, name) for name in FIELDS)
        return RankKUpdate(
            *(None if t is None else t.to(device, dtype).contiguous() for t in moved)  # type: ignore[arg-type]
        )

    def then(self, later: RankKUpdate) -> RankKUpdate:
        """The update that makes this change and then `later`'s: factors joined, and
        keys where both have them; the background is this one's."""
        if self.shape != later.shape:
            raise UpdateError(f"cannot join updates of {self.shape} and {later.shape}")
        known = self.keys is not None and later.keys is not None
        return RankKUpdate(
            torch.cat([self.left, later.left], dim=1),
            torch.cat([self.right, later.right], dim=0),
            torch.cat([self.keys, later.keys]) if known else None,  # type: ignore[list-item]
            self.background,
        )


@dataclass(frozen=True, eq=False)
class UpdateSet:
    """One change of a model: an update for each edited weight, and what made it."""

    updates: Mapping[WeightAddress, RankKUpdate]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON data: `base_fingerprint`, `recipe`, `statistics`, `contexts`,
    `seed`, `version`, `edits`. Saved in the file's header."""

    def __post_init__(self) -> None:
        names = [address.tensor for address in self.updates]
        if len(set(names)) != len(names):
            raise UpdateError(f"a tensor is named twice in one update set: {names}")

    def __iter__(self) -> Iterator[tuple[WeightAddress, RankKUpdate]]:
        return iter(self.updates.items())

    def __len__(self) -> int:
        return len(self.updates)

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file, atomically; same content, same bytes.

        Raises:
            UpdateError: the metadata is not plain JSON, or the file cannot be written.
        """
        path = Path(path)
        parts = self.parts()
        staged = path.with_name(f".{path.name}.tmp")
        try:
            with staged.open("wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged, path)
        except OSError as error:
            raise UpdateError(f"{path}: cannot be written: {error}") from error
        finally:
            staged.unlink(missing_ok=True)
        return path

    def parts(self) -> Iterator[bytes | memoryview]:
        """What `save` writes, one tensor at a time.

        Raises:
            UpdateError: the metadata is not plain JSON.
        """
        entries = sorted(self, key=lambda entry: (entry[0].layer, entry[0].tensor))
        tensors = {
            f"{address.tensor}/{field}": tensor
            for address, update in entries
            for field in FIELDS
            if (tensor := getattr(update, field)) is not None
        }
        header = {
            "format": FORMAT,
            "addresses": [asdict(address) for address, _ in entries],
            "metadata": dict(self.metadata),
        }
        described = [
            (name, DTYPE_NAMES[tensor.dtype], tensor.shape, tensor.nbytes)
            for name, tensor in tensors.items()
        ]
        try:
            text = json.dumps(
                header, sort_keys=True, ensure_ascii=False, allow_nan=False
            )
            head = safetensors_header(described, {"unified_edit": text})
        except (TypeError, ValueError) as error:
            raise UpdateError(
                f"an update's metadata must be plain, finite JSON data: {error}"
            ) from error
        return itertools.chain([head], map(tensor_bytes, tensors.values()))

    @classmethod
    def load(cls, path: str | Path) -> UpdateSet:
        """Reads a file that `save` wrote.

        Raises:
            UpdateError: missing, not a safetensors file, or not an update.
        """
        try:
            if not Path(path).is_file():
                raise UpdateError("cannot be read as an update: no such file")
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("unified_edit", "{}"))
                found = header.get("format") if isinstance(header, dict) else header
                if found != FORMAT:
                    raise UpdateError(
                        f"not an update file of format {FORMAT!r} (found {found!r})"
                    )
                addresses = [_address(entry) for entry in header["addresses"]]
                stored = set(file.keys())
                needed, allowed = (
                    {f"{each.tensor}/{field}" for each in addresses for field in fields}
                    for fields in (FIELDS[:2], FIELDS)
                )
                odd = sorted((needed - stored) | (stored - allowed))
                if odd:
                    raise UpdateError(f"header and tensors disagree about {odd}")
                updates = {
                    address: RankKUpdate(
                        **{
                            field: file.get_tensor(f"{address.tensor}/{field}")
                            for field in FIELDS
                            if f"{address.tensor}/{field}" in stored
                        }
                    )
                    for address in addresses
                }
                if len(updates) != len(addresses):
                    raise UpdateError("a tensor is named twice in the header")
                if not isinstance(header["metadata"], dict):
                    raise UpdateError("the header's metadata is not an object")
                json.dumps(header, ensure_ascii=False).encode()  # no lone surrogates
                return cls(updates, header["metadata"])
        except UpdateError as error:
            raise UpdateError(f"{path}: {_printable(error)}") from error
        except (
            OSError,
            SafetensorError,
            ValueError,
            KeyError,
            TypeError,
            RecursionError,
        ) as error:
            raise UpdateError(
                f"{path}: cannot be read as an update: {_printable(error)}"
            ) from error


def _printable(error: Exception) -> str:
    """Its message without what no terminal can show."""
    return str(error).encode(errors="backslashreplace").decode()


def safetensors_header(
    tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]
) -> bytes:
    """Length and header of a safetensors file that holds tensors in this order.

    Args:
        tensors: name, the format's name of the dtype, shape and bytes of each.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, dtype, shape, nbytes in tensors:
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + nbytes],
        }
        position += nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor as a file holds it; shares the memory of a contiguous CPU tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def _address(entry: Any) -> WeightAddress:
    """A weight address from the header, with every type checked."""
    address = WeightAddress(**{**entry, "aliases": tuple(entry["aliases"])})
    texts = (address.tensor, *address.aliases)
    if (
        not isinstance(entry["aliases"], list)
        or not all(isinstance(text, str) for text in texts)
        or type(address.layer) is not int
        or type(address.transposed) is not bool
    ):
        raise UpdateError(f"malformed weight address in the header: {entry}")
    return address


def _dtype_names() -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
