"""A folder of statistics: one safetensors file per layer, replaced atomically."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from covariance_cache.errors import StatisticsError, StatisticsMismatch
from covariance_cache.fingerprint import model_fingerprint, tokenizer_fingerprint
from covariance_cache.modules import key_width
from covariance_cache.statistics import KeyStatistics, Provenance

FORMAT = "covariance_cache/statistics/1"
_NAME = re.compile(r"layer-(\d+)\.safetensors")


def write_file(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    """Writes a safetensors file, staged beside `path`, synced and renamed over it.
    The header is JSON under one metadata key; same content, same bytes."""
    text = json.dumps(header, sort_keys=True, ensure_ascii=False, allow_nan=False)
    staged = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            staged,
            metadata={"covariance_cache": text},
        )
        with staged.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


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

    def save(self, statistics: KeyStatistics) -> Path:
        """Writes one layer's file, in place of an earlier one; the folder is made if
        need be. Same content, same bytes."""
        path = self.file(statistics.layer)
        header = {
            "format": FORMAT,
            "layer": statistics.layer,
            "count": statistics.count,
            "d_key": statistics.d_key,
            "provenance": asdict(statistics.provenance),
        }
        write_file(path, {"second_moment": statistics.second_moment}, header)
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
            return KeyStatistics(
                layer=header["layer"],
                second_moment=tensors["second_moment"],
                count=header["count"],
                provenance=Provenance(**header["provenance"]),
            )
        except (KeyError, TypeError, StatisticsError) as error:
            raise StatisticsError(f"{self.file(layer)}: {error}") from error

    def load(
        self, model: nn.Module, layers: Iterable[int], tokenizer: Any = None
    ) -> dict[int, KeyStatistics]:
        """Statistics of these layers, if they are this model's (and tokenizer's).

        Raises:
            StatisticsError: a layer has no file, or a damaged one.
            StatisticsMismatch: collected on another model, with another tokenizer, or
                on a module of another width; both sides are named.
        """
        live = model_fingerprint(model)
        words = None if tokenizer is None else tokenizer_fingerprint(tokenizer)
        loaded = {}
        for layer in layers:
            # The header is checked first: a wrong matrix may be gigabytes.
            header = self.header(layer)
            self._check(header, model, live, words)
            loaded[layer] = self.open(layer)
        return loaded

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

    def _check(
        self,
        header: Mapping[str, Any],
        model: nn.Module,
        live: str,
        words: str | None,
    ) -> None:
        path, kept = self.file(header["layer"]), Provenance(**header["provenance"])
        module = dict(model.named_modules()).get(kept.module)
        width = None if module is None else key_width(module)
        if kept.model_fingerprint != live or width not in (None, header["d_key"]):
            raise StatisticsMismatch(
                f"{path} was collected on model {kept.model_fingerprint[:12]} "
                f"(d_key {header['d_key']} at {kept.module}), this model is "
                f"{live[:12]} (d_key {width or 'unknown'} there); collect "
                "statistics of this model"
            )
        if words is not None and kept.tokenizer_fingerprint not in (None, words):
            raise StatisticsMismatch(
                f"{path} was collected with tokenizer "
                f"{kept.tokenizer_fingerprint[:12]}, this tokenizer is {words[:12]}; "
                "collect statistics with this tokenizer"
            )
