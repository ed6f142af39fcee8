"""A ledger's edits, and the small files with their values."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from unified_edit.checkpoint.files import stage
from unified_edit.edits import Edit
from unified_edit.errors import LedgerError
from unified_edit.model.descent import Targets

_ID = 12
"""Hexadecimal digits of an edit's id."""


@dataclass(frozen=True)
class Entry:
    """One edit of a ledger."""

    edit: Edit
    values_sha256: str
    """Of the file with its target and key."""

    @property
    def id(self) -> str:
        """Digest of the edit's prompt, subject and target."""
        text = json.dumps(self.edit.as_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:_ID]

    def as_dict(self) -> dict[str, str]:
        """Plain JSON data."""
        return {
            "id": self.id,
            **self.edit.as_dict(),
            "values_sha256": self.values_sha256,
        }


def ordered(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    return tuple(sorted(entries, key=lambda entry: entry.id))


def check_types(data: Mapping[str, Any]) -> None:
    """Raises TypeError for texts that are none; the recipe checks itself."""
    used = data["statistics"]
    texts = (
        *(data["base"], data["base_fingerprint"], data["dtype"]),
        *(used["folder"], used["shrinkage"], *used["fingerprints"].values()),
        *(each["values_sha256"] for each in data["edits"]),
    )
    if not all(isinstance(each, str) for each in texts):
        raise TypeError("a name or fingerprint in it is no text")
    if type(data["seed"]) is not int:
        raise TypeError(f"its seed is {data['seed']!r}")


def read_entry(data: Mapping[str, Any]) -> Entry:
    entry = Entry(
        Edit(data["prompt"], data["subject"], data["target"]), data["values_sha256"]
    )
    if data["id"] != entry.id:
        raise ValueError(
            f"edit {data['id']!r} ({entry.edit.text!r}) was changed by hand; remove it "
            "and add the new one"
        )
    return entry


def tidy(values: Path, entries: Iterable[Entry]) -> None:
    """Removes values that belong to none of the entries."""
    named = {f"{entry.id}.safetensors" for entry in entries}
    for found in values.iterdir():
        if found.name not in named:
            found.unlink()


def put(path: Path, data: bytes) -> None:
    """Puts a file in place in one step; durable once its folder is synced."""
    os.replace(stage(path, data), path)


def packed(targets: Targets, keys: Tensor) -> bytes:
    tensors = {name: getattr(targets, name) for name in Targets.__dataclass_fields__}
    kept = {name: each.cpu().contiguous() for name, each in tensors.items()}
    return save({**kept, "keys": keys.cpu().contiguous()})


def unpacked(data: bytes) -> dict[str, Tensor]:
    """Raises LedgerError for what `packed` did not write."""
    try:
        found = load(data)
    except SafetensorError as error:
        raise LedgerError(f"values of an edit cannot be read: {error}") from error
    names = {*Targets.__dataclass_fields__, "keys"}
    if found.keys() != names or any(len(each) != 1 for each in found.values()):
        raise LedgerError(
            f"values of an edit hold {sorted(found)}, and must hold one row each of "
            f"{sorted(names)}"
        )
    return found
