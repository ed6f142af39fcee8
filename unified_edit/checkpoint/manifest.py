"""What a patched folder knows about itself, and the journal of a change under way.

`.unified-edit/manifest.json` lists the updates in order and the SHA-256 of every file.
`.unified-edit/journal.json` exists only while files of the folder are being replaced:
whoever finds one finds a folder that is neither the old one nor the new.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unified_edit.checkpoint.files import (
    LOCK,
    STATE,
    refuse_if_locked,
    remove,
    remove_tree,
    reported,
    write_json,
)
from unified_edit.checkpoint.layout import TensorEntry, read_header
from unified_edit.checkpoint.sharded import is_file_name
from unified_edit.errors import CheckpointError

FORMAT = "unified-edit/checkpoint/1"
MANIFEST = "manifest.json"
JOURNAL = "journal.json"
STAGED = "staged"
"""Folder below `.unified-edit` where files wait to take their places."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class UpdateRecord:
    """One update in a folder's history."""

    number: int
    """Counts from 1."""
    update: str
    """File in `.unified-edit` with the update."""
    update_sha256: str
    undo: str
    """File in `.unified-edit` with the patched tensors' bytes from before."""
    undo_sha256: str
    base_fingerprint: str
    """Of the model before this update."""
    result_fingerprint: str
    """Of the model after it."""
    before: Mapping[str, str]
    """SHA-256 of each file that the update changed, before it."""
    after: Mapping[str, str]
    """The same files' SHA-256 after it."""
    tensors: tuple[Mapping[str, Any], ...]
    """The report of each patched tensor (`TensorReport.as_dict`)."""
    metadata: Mapping[str, Any]
    """The update's own: recipe, edits, statistics, contexts, seed."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> UpdateRecord:
        """Raises KeyError, TypeError or ValueError for what `as_dict` did not give."""
        record = cls(**{**data, "tensors": tuple(data["tensors"])})
        names = update_names(record.number)
        if type(record.number) is not int or names != (record.update, record.undo):
            raise ValueError(f"update {record.number!r} has wrong file names")
        if record.before.keys() != record.after.keys() or not record.before:
            raise ValueError(f"update {record.number} is unclear about what it changed")
        for hashes in (record.before, record.after):
            _check_hashes(hashes)
        if not all(is_file_name(name) for name in record.before):
            raise ValueError(f"update {record.number} changed files outside the folder")
        return record


@dataclass(frozen=True)
class Manifest:
    """A folder's history and what each of its files should be."""

    updates: tuple[UpdateRecord, ...]
    """In the order in which they were applied."""
    files: Mapping[str, str]
    """SHA-256 of every file but this package's own, by relative name."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        updates = [record.as_dict() for record in self.updates]
        return {"format": FORMAT, "updates": updates, "files": dict(self.files)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Manifest:
        """Raises KeyError, TypeError or ValueError for what `as_dict` did not give."""
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}, not {FORMAT!r}")
        _check_hashes(data["files"])
        updates = tuple(UpdateRecord.from_dict(record) for record in data["updates"])
        numbers = [record.number for record in updates]
        if not numbers or numbers != list(range(1, len(numbers) + 1)):
            raise ValueError("its updates are not numbered 1, 2, …")
        return cls(updates, data["files"])


@dataclass(frozen=True)
class Journal:
    """A change of a folder that was begun: undoing `record` restores `manifest`."""

    record: UpdateRecord
    manifest: Manifest | None
    """Of the folder without the record's update; None if it then has no history."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        manifest = self.manifest and self.manifest.as_dict()
        record = self.record.as_dict()
        return {"format": FORMAT, "record": record, "manifest": manifest}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Journal:
        """Raises KeyError, TypeError or ValueError for what `as_dict` did not give."""
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}, not {FORMAT!r}")
        manifest = data["manifest"] and Manifest.from_dict(data["manifest"])
        return cls(UpdateRecord.from_dict(data["record"]), manifest)


def update_names(number: int) -> tuple[str, str]:
    """File names, in `.unified-edit`, of update `number` and of its undo data."""
    return f"update-{number:04d}.safetensors", f"undo-{number:04d}.safetensors"


def check_writable(folder: Path) -> None:
    """Refuses a folder that cannot be changed in place.

    Raises:
        CheckpointError: no folder, read-only, or its state lies behind a symlink.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a checkpoint folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"{folder}: is read-only, so it cannot be changed in place; patch it into "
            "a new folder"
        )
    if (folder / STATE).is_symlink():
        raise CheckpointError(
            f"{folder / STATE}: is a symlink, which is not written through; put the "
            "folder itself in its place"
        )


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, or None if it was never patched.

    Raises:
        CheckpointError: no such folder, a change of it was interrupted or is under
            way, or the manifest cannot be read.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a checkpoint folder")
    with reported(f"{folder}: cannot be read"):
        refuse_if_locked(folder / LOCK)
    return read_own_manifest(folder)


def read_own_manifest(folder: Path) -> Manifest | None:
    """`read_manifest`, for who holds the folder's lock."""
    if (folder / STATE / JOURNAL).exists():
        raise CheckpointError(
            f"{folder}: a patch or revert of this folder was interrupted, its files "
            "may be half replaced; call revert on it first"
        )
    data = _read(folder / STATE / MANIFEST)
    if data is None:
        return None
    try:
        return Manifest.from_dict(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unreadable(folder / STATE / MANIFEST, error) from error


def read_journal(folder: Path) -> Journal | None:
    """What was being done when a change of the folder was interrupted, if one was."""
    data = _read(folder / STATE / JOURNAL)
    if data is None:
        return None
    try:
        return Journal.from_dict(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unreadable(folder / STATE / JOURNAL, error) from error


def write_journal(folder: Path, journal: Journal) -> None:
    """From here on, until the journal is removed, the folder counts as half-changed."""
    write_json(folder / STATE / JOURNAL, journal.as_dict())


def discard_leftovers(folder: Path, manifest: Manifest | None) -> None:
    """Removes from `.unified-edit` what no manifest names, and the folder itself if
    nothing is left in it. Only for who holds the lock and sees no journal."""
    state = folder / STATE
    if not state.is_dir():
        return
    kept = set() if manifest is None else {MANIFEST}
    for record in manifest.updates if manifest else ():
        kept |= {record.update, record.undo}
    for path in state.iterdir():
        if path.name not in kept:
            remove_tree(path)
    if not kept:
        state.rmdir()


def withdraw(folder: Path, manifest: Manifest | None) -> None:
    """Takes back what was staged in `folder`, before any of its files was replaced."""
    remove(folder / STATE / JOURNAL)  # first: it needs the undo data
    discard_leftovers(folder, manifest)


def originals(
    folder: Path, updates: Sequence[UpdateRecord]
) -> dict[str, tuple[Path, TensorEntry]]:
    """Where the bytes lie that tensors had before `updates`, the last ones of the
    folder's history; a tensor that is not named has the bytes it has now."""
    found: dict[str, tuple[Path, TensorEntry]] = {}
    for record in reversed(updates):
        undo = folder / STATE / record.undo
        for name, entry in read_header(undo).items():
            found[name] = (undo, entry)
    return found


def _check_hashes(hashes: Mapping[str, Any]) -> None:
    for name, value in hashes.items():
        if not isinstance(value, str) or not _SHA256.fullmatch(value):
            raise ValueError(f"{name!r} has no SHA-256 but {value!r}")


def _read(path: Path) -> Any:
    with reported(f"{path}: cannot be read"):
        if not path.exists():
            return None
        try:
            return json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: not what this version writes ({error}); restore the folder from a "
        "copy, or use the version that wrote it"
    )
