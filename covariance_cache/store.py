"""A folder of statistics: one safetensors file per layer, replaced atomically."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from covariance_cache.adequacy import Adequacy
from covariance_cache.errors import StatisticsError, StatisticsMismatch
from covariance_cache.fingerprint import model_fingerprint, tokenizer_fingerprint
from covariance_cache.modules import key_width
from covariance_cache.shrinkage import Shrinkage
from covariance_cache.statistics import KeyStatistics, Provenance

FORMAT = "covariance_cache/statistics/1"
_PACKED = "upper_triangle"
_NAME = re.compile(r"layer-(\d+)\.safetensors")


def write_file(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    """Writes a safetensors file, staged beside `path`, synced and renamed over it.
    The header is JSON under one metadata key; same content, same bytes."""
    text = json.dumps(header, sort_keys=True, ensure_ascii=False, allow_nan=False)
    staged = _staged(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        staged.touch()
        mode = staged.stat().st_mode  # as any new file's here; safetensors narrows it
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            staged,
            metadata={"covariance_cache": text},
        )
        staged.chmod(mode)
        _sync(staged)
        os.replace(staged, path)
        _sync(path.parent)
    finally:
        staged.unlink(missing_ok=True)


def remove_file(path: Path) -> None:
    """Deletes a file that `write_file` wrote, and what a killed write of it left."""
    path.unlink(missing_ok=True)
    _staged(path).unlink(missing_ok=True)


def _staged(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def read_file(
    path: Path, expected_format: str, *, tensors: bool = True
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file that `write_file` wrote.

    Raises:
        StatisticsError: missing, unreadable, or of another format.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("covariance_cache", "{}"))
            found = header.get("format")
            if found != expected_format:
                raise StatisticsError(
                    f"{path}: expected a file of format {expected_format!r}, "
                    f"found {found!r}"
                )
            names = file.keys() if tensors else []
            return header, {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, ValueError, AttributeError) as error:
        raise StatisticsError(f"{path}: cannot be read: {error}") from error


class StatisticsStore:
    """Statistics of one model's layers in a folder, one file each."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def file(self, layer: int) -> Path:
        """Where a layer's statistics are, or would be."""
        return self.path / f"layer-{layer:03d}.safetensors"

    def layers(self) -> list[int]:
        """Layers that have a file, ascending.

        Raises:
            StatisticsError: no such folder.
        """
        if not self.path.is_dir():
            raise StatisticsError(f"{self.path}: no such folder of statistics")
        matches = (_NAME.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def save(self, statistics: KeyStatistics, *, packed: bool = False) -> Path:
        """Writes one layer's file, in place of an earlier one; the folder is made if
        need be. Same content, same bytes. A shrinkage is not written: it is chosen
        when the statistics are used.

        Args:
            packed: write one triangle only: half the bytes.
        """
        path = self.file(statistics.layer)
        matrix = statistics.second_moment
        name, tensor = (_PACKED, pack(matrix)) if packed else ("second_moment", matrix)
        header = {
            "format": FORMAT,
            "layer": statistics.layer,
            "count": statistics.count,
            "d_key": statistics.d_key,
            "normalization": "mean",
            "dtype": str(matrix.dtype).removeprefix("torch."),
            "packed": packed,
            "provenance": asdict(statistics.provenance),
            "adequacy": statistics.adequacy and asdict(statistics.adequacy),
        }
        write_file(path, {name: tensor}, header)
        return path

    def header(self, layer: int) -> dict[str, Any]:
        """Layer, count, d_key and provenance as plain data, the matrix unread."""
        return self._read(layer, tensors=False)[0]

    def open(self, layer: int) -> KeyStatistics:
        """One layer's statistics, whatever model they are of.

        Raises:
            StatisticsError: no file for this layer, or a damaged one.
        """
        header, tensors = self._read(layer, tensors=True)
        try:
            adequacy = header.get("adequacy")
            matrix = (
                unpack(tensors[_PACKED], header["d_key"])
                if header.get("packed")
                else tensors["second_moment"]
            )
            return KeyStatistics(
                layer=header["layer"],
                second_moment=matrix,
                count=header["count"],
                provenance=Provenance.from_header(header["provenance"]),
                adequacy=adequacy and Adequacy(**adequacy),
            )
        except (KeyError, TypeError, StatisticsError) as error:
            raise StatisticsError(f"{self.file(layer)}: {error}") from error

    def load(
        self,
        model: nn.Module,
        layers: Iterable[int],
        tokenizer: Any = None,
        *,
        shrinkage: Shrinkage | str = "none",
        accept_mismatch: bool = False,
    ) -> Mapping[int, KeyStatistics]:
        """Statistics of these layers, if they are this model's (and tokenizer's). The
        headers are read now, a layer's matrix when it is asked for.

        Args:
            shrinkage: with which to use them (`Shrinkage`).
            accept_mismatch: take another model's or tokenizer's statistics, of the
                same widths, all the same. What was accepted goes into the statistics'
                `accepted_mismatch`, and into every update made with them.

        Raises:
            StatisticsError: a layer has no file, or a damaged one.
            StatisticsMismatch: collected on another model, with another tokenizer, or
                on a module of another width; both sides are named.
        """
        if isinstance(shrinkage, str):
            shrinkage = Shrinkage.parse(shrinkage)
        live = model_fingerprint(model)
        words = None if tokenizer is None else tokenizer_fingerprint(tokenizer)
        accepted: dict[int, str | None] = {}
        for layer in layers:
            header = self.header(layer)
            try:
                self._check_width(header, model)
                accepted[layer] = self._mismatch(header, live, words)
            except (KeyError, TypeError, AttributeError) as error:
                raise StatisticsError(
                    f"{self.file(layer)}: its header is not what this version writes "
                    f"({error}); collect the statistics again"
                ) from error
            if accepted[layer] and not accept_mismatch:
                raise StatisticsMismatch(
                    f"{self.file(layer)} {accepted[layer]}; collect statistics of this "
                    "model with this tokenizer, or accept the mismatch explicitly"
                )
        return LoadedStatistics(self, accepted, live, shrinkage)

    def _read(
        self, layer: int, *, tensors: bool
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        path = self.file(layer)
        if layer not in self.layers():
            raise StatisticsError(
                f"{self.path} has no statistics of layer {layer} (it has "
                f"{self.layers()}); collect them first"
            )
        header, found = read_file(path, FORMAT, tensors=tensors)
        if header.get("layer") != layer:
            raise StatisticsError(
                f"{path}: holds layer {header.get('layer')}; was it renamed?"
            )
        return header, found

    def _check_width(self, header: Mapping[str, Any], model: nn.Module) -> None:
        path, name = self.file(header["layer"]), header["provenance"]["module"]
        module = dict(model.named_modules()).get(name)
        width = None if module is None else key_width(module)
        if width not in (None, header["d_key"]):
            raise StatisticsMismatch(
                f"{path} holds keys of {header['d_key']} dimensions, {name} of this "
                f"model takes {width}; collect statistics of this model"
            )

    def _mismatch(
        self, header: Mapping[str, Any], live: str, words: str | None
    ) -> str | None:
        kept = Provenance.from_header(header["provenance"])
        found = []
        if kept.model_fingerprint != live:
            found.append(
                f"was collected on model {kept.model_fingerprint[:12]}, this model is "
                f"{live[:12]}"
            )
        theirs = kept.tokenizer_fingerprint
        if words is not None and theirs not in (None, words):
            found.append(
                f"was collected with tokenizer {str(theirs)[:12]}, this tokenizer is "
                f"{words[:12]}"
            )
        return "; ".join(found) or None


class LoadedStatistics(Mapping[int, KeyStatistics]):
    """Layers of a store that were checked against a model; each is read when it is
    first asked for, and kept."""

    def __init__(
        self,
        store: StatisticsStore,
        accepted: Mapping[int, str | None],
        live: str,
        shrinkage: Shrinkage,
    ) -> None:
        self._store = store
        self._live = live
        self._accepted = dict(accepted)
        self._shrinkage = shrinkage
        self._opened: dict[int, KeyStatistics] = {}

    def __contains__(self, layer: object) -> bool:
        return layer in self._accepted  # without reading it

    def __getitem__(self, layer: int) -> KeyStatistics:
        if layer not in self._accepted:
            raise KeyError(layer)
        if layer not in self._opened:
            self._opened[layer] = replace(
                self._store.open(layer),
                shrinkage=self._shrinkage,
                accepted_mismatch=self._accepted[layer],
                accepted_for=self._live if self._accepted[layer] else None,
            )
        return self._opened[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._accepted)

    def __len__(self) -> int:
        return len(self._accepted)


def pack(matrix: Tensor) -> Tensor:
    """The upper triangle [d, d] → [d (d + 1) / 2], row after row."""
    size = matrix.shape[0]
    packed = matrix.new_empty(size * (size + 1) // 2)
    begin = 0
    for row in range(size):
        packed[begin : begin + size - row] = matrix[row, row:]
        begin += size - row
    return packed


def unpack(packed: Tensor, size: int) -> Tensor:
    """The symmetric matrix [d, d] of a packed triangle.

    Raises:
        StatisticsError: not a triangle of this size.
    """
    if size < 1 or packed.shape != (size * (size + 1) // 2,):
        raise StatisticsError(
            f"the packed triangle holds {list(packed.shape)} numbers, d_key {size} "
            f"needs {size * (size + 1) // 2}"
        )
    matrix = packed.new_empty(size, size)
    begin = 0
    for row in range(size):
        part = packed[begin : begin + size - row]
        matrix[row, row:] = part
        matrix[row:, row] = part
        begin += size - row
    return matrix
