"""What a patched folder knows about itself.

`.unified-edit/manifest.json` lists the updates in order, and the SHA-256 of every file
that was read. `.unified-edit/journal.json` exists only while files of the folder are
being replaced (`journal`): then nothing else is to be believed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unified_edit.algebra.addition import ROUNDINGS, Rounding
from unified_edit.checkpoint import strict_json
from unified_edit.checkpoint.files import (
    LOCK,
    NOT_CHECKPOINT,
    STATE,
    open_regular,
    present,
    refuse_if_locked,
    reported,
)
from unified_edit.checkpoint.layout import TensorEntry, read_header
from unified_edit.checkpoint.sharded import is_file_name
from unified_edit.errors import CheckpointError

FORMAT = "unified-edit/checkpoint/2"
MANIFEST = "manifest.json"
JOURNAL = "journal.json"
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
    rounding: Rounding
    """How patched weights were rounded."""
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
        prints = (record.base_fingerprint, record.result_fingerprint)
        digests = (record.update_sha256, record.undo_sha256)
        if not all(isinstance(each, str) for each in (*prints, *digests)):
            raise ValueError(f"update {record.number}: a fingerprint is no text")
        if not isinstance(record.metadata, dict) or not all(
            isinstance(report, dict) for report in record.tensors
        ):
            raise ValueError(f"update {record.number}: metadata or tensors no objects")
        if record.rounding not in ROUNDINGS:
            raise ValueError(f"update {record.number}: rounding {record.rounding!r}")
        if not all(is_file_name(name) for name in record.before):
            raise ValueError(f"update {record.number} changed files outside the folder")
        return record


@dataclass(frozen=True)
class Manifest:
    """A folder's history and what each of its files should be."""

    updates: tuple[UpdateRecord, ...]
    """In the order in which they were applied."""
    files: Mapping[str, str | None]
    """Every file but this package's own, by relative name, with its SHA-256; None for
    weights that no update changes and that were not read, but linked or left."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        updates = [record.as_dict() for record in self.updates]
        return {"format": FORMAT, "updates": updates, "files": dict(self.files)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Manifest:
        """Raises KeyError, TypeError or ValueError for what `as_dict` did not give."""
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}, not {FORMAT!r}")
        _check_hashes({k: v for k, v in data["files"].items() if v is not None})
        for name in data["files"]:
            parts = name.split("/")
            if {"", ".", ".."} & {*parts} or parts[0] in NOT_CHECKPOINT or "\0" in name:
                raise ValueError(f"{name!r} is no file of a checkpoint")
        updates = tuple(UpdateRecord.from_dict(record) for record in data["updates"])
        numbers = [record.number for record in updates]
        if not numbers or numbers != list(range(1, len(numbers) + 1)):
            raise ValueError("its updates are not numbered 1, 2, …")
        return cls(updates, data["files"])


def update_names(number: int) -> tuple[str, str]:
    """File names, in `.unified-edit`, of update `number` and of its undo data."""
    return f"update-{number:04d}.safetensors", f"undo-{number:04d}.safetensors"


def refuse_unfinished(folder: Path) -> None:
    """For whoever is about to read a folder's weights.

    Raises:
        CheckpointError: no such folder, or a change of it is under way or was
            interrupted.
    """
    with reported(f"{folder}: cannot be read"):
        if not folder.is_dir():
            hint = ""
            if present(staging_of(folder)):
                hint = "; a patch into it was interrupted, recover removes what is left"
            raise CheckpointError(f"{folder}: not a checkpoint folder{hint}")
        refuse_if_locked(folder / LOCK)
    refuse_half_changed(folder)


def refuse_half_changed(folder: Path) -> None:
    """`refuse_unfinished`, for who holds the folder's lock."""
    with reported(f"{folder}: cannot be read"):
        unfinished = present(folder / STATE / JOURNAL)
    if unfinished:
        raise CheckpointError(
            f"{folder}: a change of this folder was interrupted, its files may be half "
            "replaced; recover it first"
        )


def staging_of(out: Path) -> Path:
    """Where a new folder is put together, beside its place."""
    return out.parent / f".{out.name}.unified-edit-staging"


def lock_of(out: Path) -> Path:
    """The lock file of who makes a new folder."""
    return out.parent / f".{out.name}.unified-edit-lock"


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, or None if it was never patched.

    Raises:
        CheckpointError: as `refuse_unfinished`, or the manifest cannot be read.
    """
    refuse_unfinished(folder)
    return read_own_manifest(folder)


def read_own_manifest(folder: Path) -> Manifest | None:
    """`read_manifest`, for who holds the folder's lock."""
    refuse_half_changed(folder)
    data = read_state(folder / STATE / MANIFEST)
    if data is None:
        return None
    with unreadable(folder / STATE / MANIFEST):
        return Manifest.from_dict(data)


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


def read_state(path: Path) -> Any:
    """The JSON data of one of this package's own files; None if it is absent."""
    with reported(f"{path}: cannot be read"):
        if not present(path):
            return None
        with open_regular(path) as file:
            raw = file.readall()
    with unreadable(path):
        return strict_json.loads(raw, len(raw))


@contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """Turns what `from_dict` raises into a CheckpointError that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not what this version writes ({error}); restore the folder from "
            "a copy, or use the version that wrote it"
        ) from error
