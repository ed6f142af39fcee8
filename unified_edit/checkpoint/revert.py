"""Takes updates back, and finishes or undoes what a crash left.

The original bytes of the patched tensors are put into copies of the files; only when
each copy has the SHA-256 that the file had before the updates are they moved into
place, under the same journal as an in-place patch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unified_edit.checkpoint.files import (
    LOCK,
    STATE,
    locked,
    present,
    remove_tree,
    reported,
    sha256_of,
    sync_tree,
    undone,
)
from unified_edit.checkpoint.journal import (
    STAGED,
    Journal,
    begin,
    check_writable,
    discard_leftovers,
    finish,
    read_journal,
    withdraw,
)
from unified_edit.checkpoint.layout import TensorEntry, read_bytes, read_header
from unified_edit.checkpoint.manifest import (
    Manifest,
    lock_of,
    originals,
    read_own_manifest,
    staging_of,
)
from unified_edit.checkpoint.splicing import Piece, splice
from unified_edit.errors import CheckpointError, CheckpointMismatch


@dataclass(frozen=True)
class RevertReport:
    """What a revert did."""

    folder: str
    numbers: tuple[int, ...]
    """Of the updates that were taken back, the last first."""
    files: Mapping[str, str]
    """SHA-256 of each restored file: what it was before those updates."""
    fingerprint: str
    """Of the model that the folder holds now."""
    remaining: int
    """How many updates the folder still has."""
    notes: tuple[str, ...]
    """Files that the updates did not change, but that somebody else did."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            **asdict(self),
            "numbers": list(self.numbers),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class RecoverReport:
    """What a recovery did."""

    folder: str
    action: str
    """`finished` or `undone` a patch in place, `reverted` (a revert is finished),
    `removed` leftovers of what had changed nothing yet, or `nothing`."""
    updates: int
    """How many updates the folder has now."""
    files: tuple[str, ...]
    """What was put into place, or removed."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "files": list(self.files)}


def revert(folder: str | Path, *, all_updates: bool = False) -> RevertReport:
    """Restores the files that the folder's last update changed, byte for byte.
    `.unified-edit` disappears with the first update.

    Args:
        all_updates: take back every update of the folder's history at once.

    Raises:
        CheckpointError: nothing to take back, a change was interrupted, or a file
            cannot be read or written.
        CheckpointMismatch: a file is not as the updates left it, or the undo data do
            not restore it. Nothing is changed then.
    """
    folder = Path(folder)
    check_writable(folder)
    with reported(f"{folder}: cannot be reverted"), locked(folder / LOCK):
        manifest = read_own_manifest(folder)
        discard_leftovers(folder, manifest)
        if manifest is None:
            raise CheckpointError(f"{folder}: holds no update to revert")
        kept = 0 if all_updates else len(manifest.updates) - 1
        journal = Journal(manifest, _shortened(manifest, kept))
        with undone(lambda: withdraw(folder, manifest)):
            _stage_originals(folder, journal)
            notes = _notes(folder, manifest, journal)
            begin(folder, journal)
        finish(folder, journal)
    return RevertReport(
        folder=str(folder),
        numbers=tuple(record.number for record in reversed(journal.records)),
        files=journal.new,
        fingerprint=journal.records[0].base_fingerprint,
        remaining=kept,
        notes=notes,
    )


def recover(folder: str | Path, *, undo: bool = False) -> RecoverReport:
    """Finishes what a crash interrupted: a patch in place whose files are all there,
    or a revert. A patch whose files are not all there is undone.

    Args:
        folder: of a patch in place or a revert, or the new folder of a patch, which
            does not exist yet: then what was staged for it is removed.
        undo: undo an interrupted patch, even if it could be finished.

    Raises:
        CheckpointError: no such folder and nothing left of one, somebody is writing
            it, a file cannot be read or written, or `undo` of a revert.
        CheckpointMismatch: a file is neither as before the change nor as after it, or
            the undo data do not restore it. Nothing is changed then.
    """
    folder = Path(os.path.abspath(folder))
    with reported(f"{folder}: cannot be recovered"):
        return _recover(folder, undo)


def _recover(folder: Path, undo: bool) -> RecoverReport:
    beside = _remove_beside(folder)
    if not present(folder):
        if not beside:
            raise CheckpointError(
                f"{folder}: there is no such folder, and nothing left of a patch into "
                "it"
            )
        return RecoverReport(str(folder), "removed", 0, beside)
    check_writable(folder)
    with locked(folder / LOCK):
        journal = read_journal(folder)
        if journal is None:
            manifest = read_own_manifest(folder)
            kept = len(manifest.updates) if manifest else 0
            before = _contents(folder / STATE)
            discard_leftovers(folder, manifest)
            gone = (*beside, *sorted(before - _contents(folder / STATE)))
            action = "removed" if gone else "nothing"
            return RecoverReport(str(folder), action, kept, gone)
        action = "finished" if journal.patching else "reverted"
        if undo and not journal.patching:
            raise CheckpointError(
                f"{folder}: a revert was interrupted, which can only be finished; "
                "recover it without undo, then patch again"
            )
        if undo or not journal.patching or not _is_staged(folder, journal):
            if journal.patching:
                action, journal = "undone", journal.reversed()
            _stage_originals(folder, journal)
            begin(folder, journal)
        finish(folder, journal)
    kept = len(journal.after.updates) if journal.after else 0
    return RecoverReport(str(folder), action, kept, tuple(journal.new))


def _remove_beside(out: Path) -> tuple[str, ...]:
    """Removes what a patch into `out` may have left beside it; returns its names."""
    left = [path for path in (staging_of(out), lock_of(out)) if present(path)]
    if left:
        with locked(lock_of(out)):
            remove_tree(staging_of(out))
    return tuple(path.name for path in left)


def _contents(state: Path) -> set[str]:
    return {path.name for path in state.iterdir()} if present(state) else set()


def _is_staged(folder: Path, journal: Journal) -> bool:
    """Whether each file of a patch is staged, or in its place already."""
    for name, expected in journal.new.items():
        staged = folder / STATE / STAGED / name
        path = staged if staged.is_file() else folder / name
        if not path.is_file() or sha256_of(path) != expected:
            return False
    return True


def _shortened(manifest: Manifest, kept: int) -> Manifest | None:
    """The manifest with the first `kept` updates only."""
    if not kept:
        return None
    files = dict(manifest.files)
    for record in reversed(manifest.updates[kept:]):
        files |= record.before
    return Manifest(manifest.updates[:kept], files)


def _stage_originals(folder: Path, journal: Journal) -> None:
    """Stages what the files were before the journal's updates."""
    staged = folder / STATE / STAGED
    remove_tree(staged)
    os.mkdir(staged)
    undo = originals(folder, journal.records)
    for name, before in journal.new.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(
                f"{path}: missing, or a symlink, which is not written through; put "
                "the patched file back"
            )
        pieces = [
            Piece(entry.begin, entry.end, _original(*undo[entry.name]))
            for entry in read_header(path).values()
            if entry.name in undo
        ]
        spliced = splice(path, staged / name, pieces)
        found, restored = spliced.before, spliced.after
        if found not in (before, journal.old[name]):
            raise CheckpointMismatch(
                f"{path}: was changed after the patch: its SHA-256 is {found}, the "
                f"update left {journal.old[name]}; put the patched file back, then "
                "try again"
            )
        if restored != before:
            sources = sorted({undo[e][0].name for e in read_header(path) if e in undo})
            raise CheckpointMismatch(
                f"{folder / STATE}: {', '.join(sources) or 'no undo file'} does not "
                f"restore {name}, whose SHA-256 would be {restored} instead of "
                f"{before}; restore the undo file from a copy"
            )
    sync_tree(folder / STATE)


def _original(undo: Path, entry: TensorEntry) -> Callable[[bytearray], None]:
    def put(data: bytearray) -> None:
        original = read_bytes(undo, entry)
        if len(original) != len(data):
            raise CheckpointMismatch(
                f"{undo}: tensor {entry.name!r} has {len(original)} bytes, the patched "
                f"one has {len(data)}; restore the undo file from a copy"
            )
        data[:] = original

    return put


def _notes(folder: Path, manifest: Manifest, journal: Journal) -> tuple[str, ...]:
    notes = []
    for name, expected in manifest.files.items():
        if name in journal.new:
            continue
        path = folder / name
        if not path.is_file():
            notes.append(f"{name} was removed since the patch, and stays so")
        elif expected is not None and sha256_of(path) != expected:
            notes.append(f"{name} was changed since the patch, and stays so")
    return tuple(notes)
