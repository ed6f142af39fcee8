"""The update: rank-k factors for named weights, and the one way to add them.

An update is immutable, knows nothing of a model or of a checkpoint's files, and is
what every other part of the project exchanges. `ΔW = left @ right`, seen as
[d_value, d_key]; `transposed` says that the weight is stored as [d_key, d_value].
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unified_edit.errors import NonFiniteError, UpdateError

FORMAT = "unified-edit/update/1"
_ROW_BLOCK = 1024
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> RankKUpdate:
        """The same factors in another dtype or on another device."""
        return RankKUpdate(
            self.left.to(device, dtype).contiguous(),
            self.right.to(device, dtype).contiguous(),
        )

    def then(self, later: RankKUpdate) -> RankKUpdate:
        """The update that makes this change and then `later`'s: factors joined."""
        if self.shape != later.shape:
            raise UpdateError(f"cannot join updates of {self.shape} and {later.shape}")
        return RankKUpdate(
            torch.cat([self.left, later.left], dim=1),
            torch.cat([self.right, later.right], dim=0),
        )


@torch.no_grad()
def added(weight: Tensor, update: RankKUpdate, *, transposed: bool) -> Tensor:
    """`weight + ΔW` as a new tensor: added in float32, or in float64 for a float64
    weight, by blocks of stored rows, and rounded once to the weight's dtype.

    Live edits and checkpoint patches both call this, so that they agree bit for bit.

    Args:
        weight: as stored, [d_value, d_key] or, if `transposed`, [d_key, d_value].

    Raises:
        UpdateError: shapes do not fit, or the weight is of a dtype that cannot be
            added to (integers and float8 mean a quantized checkpoint).
        NonFiniteError: a result is not finite in the weight's dtype.
    """
    expected = update.shape[::-1] if transposed else update.shape
    if tuple(weight.shape) != expected:
        raise UpdateError(
            f"the update changes a weight stored as {list(expected)}, "
            f"this one is {list(weight.shape)}"
        )
    if weight.dtype not in _DTYPES:
        raise UpdateError(
            f"a weight of {weight.dtype} cannot be added to, only {_dtype_names()}; "
            "patch a dequantized copy"
        )
    work = torch.promote_types(weight.dtype, torch.float32)
    factors = update.to(work, weight.device)
    rows, columns = factors.left, factors.right
    if transposed:
        rows, columns = columns.T.contiguous(), rows.T.contiguous()
    out = torch.empty_like(weight)
    for start in range(0, weight.shape[0], _ROW_BLOCK):
        block = slice(start, start + _ROW_BLOCK)
        # Not addmm: some libraries add the factors' products to the weight one by one.
        out[block] = weight[block].to(work) + rows[block] @ columns
    if not bool(torch.isfinite(out).all()):
        raise NonFiniteError(
            f"weight + ΔW is not finite in {weight.dtype}; the weight or the update "
            "holds NaN or infinity, or the sum overflows"
        )
    return out


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
        entries = sorted(self, key=lambda entry: (entry[0].layer, entry[0].tensor))
        tensors, storages = {}, set()
        for address, update in entries:
            for name, factor in (("left", update.left), ("right", update.right)):
                factor = factor.detach().cpu().contiguous()
                # safetensors refuses two tensors that share one storage.
                if factor.untyped_storage().data_ptr() in storages:
                    factor = factor.clone()
                storages.add(factor.untyped_storage().data_ptr())
                tensors[f"{address.tensor}/{name}"] = factor
        header = {
            "format": FORMAT,
            "addresses": [asdict(address) for address, _ in entries],
            "metadata": dict(self.metadata),
        }
        try:
            text = json.dumps(
                header, sort_keys=True, ensure_ascii=False, allow_nan=False
            )
        except (TypeError, ValueError) as error:
            raise UpdateError(
                f"an update's metadata must be plain, finite JSON data: {error}"
            ) from error
        staged = path.with_name(f".{path.name}.tmp")
        try:
            save_file(tensors, staged, metadata={"unified_edit": text})
            with staged.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(staged, path)
        except (OSError, SafetensorError) as error:
            raise UpdateError(f"{path}: cannot be written: {error}") from error
        finally:
            if staged.exists():
                staged.unlink()
        return path

    @classmethod
    def load(cls, path: str | Path) -> UpdateSet:
        """Reads a file that `save` wrote.

        Raises:
            UpdateError: missing, not a safetensors file, or not an update.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("unified_edit", "{}"))
                found = header.get("format") if isinstance(header, dict) else header
                if found != FORMAT:
                    raise UpdateError(
                        f"not an update file of format {FORMAT!r} (found {found!r})"
                    )
                addresses = [_address(entry) for entry in header["addresses"]]
                names = {
                    f"{address.tensor}/{factor}"
                    for address in addresses
                    for factor in ("left", "right")
                }
                if names != set(file.keys()):
                    odd = sorted(names.symmetric_difference(file.keys()))
                    raise UpdateError(f"header and tensors disagree about {odd}")
                updates = {
                    address: RankKUpdate(
                        file.get_tensor(f"{address.tensor}/left"),
                        file.get_tensor(f"{address.tensor}/right"),
                    )
                    for address in addresses
                }
                if len(updates) != len(addresses):
                    raise UpdateError("a tensor is named twice in the header")
                if not isinstance(header["metadata"], dict):
                    raise UpdateError("the header's metadata is not an object")
                return cls(updates, header["metadata"])
        except UpdateError as error:
            raise UpdateError(f"{path}: {error}") from error
        except (
            OSError,
            SafetensorError,
            ValueError,
            KeyError,
            TypeError,
            RecursionError,
        ) as error:
            raise UpdateError(
                f"{path}: cannot be read as an update: {error}"
            ) from error


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
