"""The layout of a safetensors file: its header read with every promise checked, its
tensors read one at a time, and headers written.

The format: 8 bytes little-endian length of the header, the header as JSON (`name` →
dtype, shape, data_offsets), then the tensors' bytes without gaps. Knows one file at a
time; `sharded` knows folders.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unified_edit.algebra.update import safetensors_header
from unified_edit.checkpoint import strict_json
from unified_edit.checkpoint.files import open_regular, read_at, reported
from unified_edit.errors import CheckpointError

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_DIMENSIONS = 64
_DTYPES: dict[str, tuple[int, torch.dtype | None]] = {
    "BOOL": (8, torch.bool),
    "U8": (8, torch.uint8),
    "I8": (8, torch.int8),
    "U16": (16, torch.uint16),
    "I16": (16, torch.int16),
    "U32": (32, torch.uint32),
    "I32": (32, torch.int32),
    "U64": (64, torch.uint64),
    "I64": (64, torch.int64),
    "F16": (16, torch.float16),
    "BF16": (16, torch.bfloat16),
    "F32": (32, torch.float32),
    "F64": (64, torch.float64),
    "C64": (64, torch.complex64),
    "F8_E4M3": (8, torch.float8_e4m3fn),
    "F8_E5M2": (8, torch.float8_e5m2),
    "F8_E8M0": (8, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F4": (4, None),
}
"""Name in the header → bits of one value, torch dtype where every torch has one."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies."""

    name: str
    dtype: str
    """The format's name, e.g. `BF16`."""
    shape: tuple[int, ...]
    file: str
    """File name, without folder."""
    begin: int
    """First byte, counted from the start of the file."""
    end: int
    """One past the last byte."""

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def torch_dtype(self) -> torch.dtype:
        """Raises CheckpointError where torch has no such dtype."""
        dtype = _DTYPES[self.dtype][1]
        if dtype is None:
            raise CheckpointError(
                f"{self.file}: tensor {self.name!r} is stored as {self.dtype}, which "
                "cannot be read as a torch tensor"
            )
        return dtype


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, ordered by offset.

    Raises:
        CheckpointError: the file cannot be read, or breaks the format: header longer
            than the file or than 100 MB, not a JSON object, a name twice, unknown
            dtype, shape that does not fit the bytes, offsets out of range, overlapping
            or with gaps.
    """
    with reported(f"{path}: cannot be read"), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < _LENGTH_BYTES:
            raise _malformed(path, f"it has {size} bytes, a header needs more")
        (length,) = struct.unpack("<Q", read_at(file, 0, _LENGTH_BYTES))
        if length > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
            raise _malformed(
                path, f"it claims a header of {length} bytes in a file of {size}"
            )
        raw = read_at(file, _LENGTH_BYTES, _LENGTH_BYTES + length)
    return _parse(path, raw, _LENGTH_BYTES + length, size)


def _parse(path: Path, raw: bytearray, start: int, size: int) -> dict[str, TensorEntry]:
    try:
        if raw[:1] != b"{":
            raise ValueError("it does not begin with '{'")
        header = strict_json.loads(raw, size)
    except ValueError as error:
        raise _malformed(path, f"its header is not a JSON object: {error}") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise _malformed(path, "its __metadata__ does not map text to text")
    entries = [_entry(path, name, info, start, size) for name, info in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    position = start
    for entry in entries:
        if entry.begin != position:
            kind = "overlaps another" if entry.begin < position else "follows a gap"
            raise _malformed(path, f"tensor {entry.name!r} {kind}")
        position = entry.end
    if position != size:
        raise _malformed(
            path, f"its tensors end at byte {position}, the file at byte {size}"
        )
    return {entry.name: entry for entry in entries}


def _entry(path: Path, name: str, info: Any, start: int, size: int) -> TensorEntry:
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        raise _malformed(
            path, f"tensor {name!r} needs exactly dtype, shape and data_offsets"
        )
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _malformed(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _malformed(
            path, f"tensor {name!r} has a shape or offsets that are no sizes"
        )
    begin, end = offsets
    available = size - start
    if not begin <= end <= available:
        raise _malformed(
            path,
            f"tensor {name!r} lies at bytes {begin} to {end} of {available}",
        )
    bits = _DTYPES[dtype][0] * _count(shape, limit=8 * available)
    if bits != 8 * (end - begin):
        raise _malformed(
            path,
            f"tensor {name!r} of dtype {dtype} and shape {shape[:8]} does not fill "
            f"its {end - begin} bytes",
        )
    if math.prod(max(each, 1) for each in shape[:_DIMENSIONS]) > 2**60 or (
        len(shape) > _DIMENSIONS
    ):
        # Of an empty tensor too: strides are products of the other sizes.
        raise _malformed(path, f"tensor {name!r} of shape {shape[:8]} is too large")
    return TensorEntry(name, dtype, tuple(shape), path.name, start + begin, start + end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 2**63 for item in value
    )


def _count(shape: list[int], limit: int) -> int:
    """Product of `shape`, given up above `limit`, so that it cannot explode."""
    if 0 in shape:
        return 0
    count = 1
    for size in shape:
        count *= size
        if count > limit:
            break
    return count


def _malformed(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: not a valid safetensors file: {reason}; download or save it again"
    )


def read_bytes(path: Path, entry: TensorEntry) -> bytearray:
    """The bytes of one tensor, and only those, from the file at `path`."""
    with reported(f"{path}: cannot be read"), open_regular(path) as file:
        return read_at(file, entry.begin, entry.end)


def read_tensor(path: Path, entry: TensorEntry) -> Tensor:
    """One tensor from the file at `path`."""
    return to_tensor(entry, read_bytes(path, entry))


def to_tensor(entry: TensorEntry, data: bytearray) -> Tensor:
    """`data` seen as the tensor that `entry` describes; shares its memory."""
    if not data:
        return torch.empty(entry.shape, dtype=entry.torch_dtype)
    return torch.frombuffer(data, dtype=entry.torch_dtype).reshape(entry.shape)


def new_header(entries: Iterable[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a file that holds these tensors in this order."""
    return safetensors_header(
        [(entry.name, entry.dtype, entry.shape, entry.nbytes) for entry in entries],
        metadata,
    )
