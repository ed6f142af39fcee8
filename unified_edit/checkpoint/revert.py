"""Takes the last update back, or finishes taking back one that was interrupted.

The original bytes of the patched tensors are put into copies of the files; only when
each copy has the SHA-256 that the file had before the update are they moved into
place, under the same journal as an in-place patch. So reverting an interrupted patch,
an interrupted revert and a complete patch are one and the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unified_edit.checkpoint.files import (
    LOCK,
    STATE,
    locked,
    remove,
    remove_tree,
    replace,
    reported,
    sha256_of,
    splice,
    sync_tree,
    undone,
    write_json,
)
from unified_edit.checkpoint.layout import TensorEntry, read_bytes, read_header
from unified_edit.checkpoint.manifest import (
    JOURNAL,
    MANIFEST,
    STAGED,
    Journal,
    Manifest,
    UpdateRecord,
    check_writable,
    discard_leftovers,
    originals,
    read_journal,
    read_own_manifest,
    withdraw,
    write_journal,
)
from unified_edit.errors import CheckpointError, CheckpointMismatch


@dataclass(frozen=True)
class RevertReport:
    """What a revert did."""

    folder: str
    number: int
    """Of the update that was taken back."""
    interrupted: bool
    """Whether this undid a patch, or finished a revert, that had been interrupted."""
    files: Mapping[str, str]
    """SHA-256 of each restored file: what it was before the update."""
    fingerprint: str
    """Of the model that the folder holds now."""
    remaining: int
    """How many updates the folder still has."""
    notes: tuple[str, ...]
    """Files that the update did not change, but that somebody else did."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "notes": list(self.notes)}


def revert(folder: str | Path) -> RevertReport:
    """Restores the files that the folder's last update changed, byte for byte.

    Of a folder whose patch or revert was interrupted, restores what it was before that
    update. `.unified-edit` disappears with the last update.

    Raises:
        CheckpointError: nothing to take back, or a file cannot be read or written.
        CheckpointMismatch: a file is neither as the update left it nor as it was
            before, or the undo data do not restore it. Nothing is changed then.
    """
    folder = Path(folder)
    check_writable(folder)
    with reported(f"{folder}: cannot be reverted"), locked(folder / LOCK):
        notes: tuple[str, ...] = ()
        journal = read_journal(folder)
        interrupted = journal is not None
        if journal is None:
            manifest = read_own_manifest(folder)
            discard_leftovers(folder, manifest)
            if manifest is None:
                raise CheckpointError(f"{folder}: holds no update to revert")
            journal = Journal(manifest.updates[-1], _without_last(manifest))
            with undone(lambda: withdraw(folder, manifest)):
                _stage(folder, journal.record)
                notes = _notes(folder, manifest, journal.record)
                write_journal(folder, journal)
        else:
            _stage(folder, journal.record)
        _commit(folder, journal)
    record = journal.record
    return RevertReport(
        folder=str(folder),
        number=record.number,
        interrupted=interrupted,
        files=record.before,
        fingerprint=record.base_fingerprint,
        remaining=record.number - 1,
        notes=notes,
    )


def _without_last(manifest: Manifest) -> Manifest | None:
    *earlier, last = manifest.updates
    if not earlier:
        return None
    return Manifest(tuple(earlier), {**manifest.files, **last.before})


def _stage(folder: Path, record: UpdateRecord) -> None:
    staged = folder / STATE / STAGED
    remove_tree(staged)
    os.mkdir(staged)
    undo = originals(folder, [record])
    for name, before in record.before.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(
                f"{path}: missing, or a symlink, which is not written through; put "
                "the patched file back"
            )
        pieces = [
            (entry.begin, entry.end, _original(*undo[entry.name]))
            for entry in read_header(path).values()
            if entry.name in undo
        ]
        found, restored = splice(path, staged / name, pieces)
        if found not in (before, record.after[name]):
            raise CheckpointMismatch(
                f"{path}: was changed after the patch: its SHA-256 is {found}, the "
                f"update left {record.after[name]}; put the patched file back, then "
                "revert"
            )
        if restored != before:
            raise CheckpointMismatch(
                f"{folder / STATE / record.undo}: does not restore {name}, whose "
                f"SHA-256 would be {restored} instead of {before}; restore the undo "
                "file from a copy"
            )
    sync_tree(folder / STATE)


def _original(undo: Path, entry: TensorEntry) -> Callable[[bytearray], memoryview]:
    return lambda _: memoryview(read_bytes(undo, entry))


def _commit(folder: Path, journal: Journal) -> None:
    with reported(
        f"{folder}: replacing its files was interrupted; call revert again to finish"
    ):
        for name in journal.record.before:
            replace(folder / STATE / STAGED / name, folder / name)
        manifest = folder / STATE / MANIFEST
        if journal.manifest is None:
            remove(manifest)
        else:
            write_json(manifest, journal.manifest.as_dict())
        remove(folder / STATE / JOURNAL)
    with suppress(OSError):  # the revert is complete; the next command would tidy up
        discard_leftovers(folder, journal.manifest)


def _notes(folder: Path, manifest: Manifest, record: UpdateRecord) -> tuple[str, ...]:
    notes = []
    for name, expected in manifest.files.items():
        if name in record.before:
            continue
        path = folder / name
        if not path.is_file():
            notes.append(f"{name} was removed since the patch, and stays so")
        elif sha256_of(path) != expected:
            notes.append(f"{name} was changed since the patch, and stays so")
    return tuple(notes)
