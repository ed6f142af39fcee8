"""An interrupted collection on disk: sums, cursor, and the settings they hold for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from covariance_cache.corpus import Cursor
from covariance_cache.errors import StatisticsError, StatisticsMismatch
from covariance_cache.layer import LayerSums
from covariance_cache.store import read_file, remove_file, write_file

_FORMAT = "covariance_cache/checkpoint/2"


class Checkpoint:
    """The state at the end of a batch, in one file that is replaced atomically."""

    NAME: ClassVar[str] = "collection.safetensors"
    """Name of the file in its folder."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """
        Args:
            path: of the file.
            settings: plain JSON data that a continuation must share.
        """
        self.path = path
        self.settings = dict(settings)

    def read(self, sums: Mapping[int, LayerSums]) -> Cursor:
        """Fills `sums` from the file and returns its cursor; does nothing and returns
        a cursor at the start if there is no file.

        Raises:
            StatisticsMismatch: left by a collection of other settings.
            StatisticsError: not a checkpoint, or a damaged one.
        """
        if not self.path.exists():
            return Cursor()
        header, tensors = read_file(self.path, _FORMAT)
        kept = header.get("settings", {})
        differing = [
            f"{name}: {kept.get(name)} there, {self.settings.get(name)} now"
            for name in sorted({*kept, *self.settings})
            if kept.get(name) != self.settings.get(name)
        ]
        if differing:
            raise StatisticsMismatch(
                f"{self.path} was left by a collection of other settings "
                f"({'; '.join(differing)}); finish it with those, or remove the file"
            )
        if header.get("digest") != _digest(header.get("cursor"), tensors):
            raise StatisticsError(f"{self.path} is damaged; remove the file")
        for layer, each in sums.items():
            start = f"{layer}/"
            each.load_state(
                {
                    name.removeprefix(start): tensor
                    for name, tensor in tensors.items()
                    if name.startswith(start)
                }
            )
        return Cursor(**header["cursor"])

    def write(self, sums: Mapping[int, LayerSums], cursor: Cursor) -> None:
        """Replaces the file by this state."""
        tensors = {
            f"{layer}/{name}": tensor.cpu()
            for layer, each in sums.items()
            for name, tensor in each.state().items()
        }
        header = {
            "format": _FORMAT,
            "settings": self.settings,
            "cursor": asdict(cursor),
            "digest": _digest(asdict(cursor), tensors),
        }
        write_file(self.path, tensors, header)

    def remove(self) -> None:
        """Deletes the file, once what it was kept for is done."""
        remove_file(self.path)


def _digest(cursor: Any, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(cursor, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()
