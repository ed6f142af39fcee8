"""A change of a folder's files that is all or nothing.

New files are staged below `.unified-edit` and fsynced; then the journal is written,
which says what is being done; then the files are moved over the old ones, the manifest
is replaced, and the journal is removed. Whoever finds a journal finds a folder that is
neither the old one nor the new, and everything that is needed to finish.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unified_edit.checkpoint.files import (
    STATE,
    present,
    remove,
    remove_tree,
    replace,
    reported,
    write_json,
)
from unified_edit.checkpoint.manifest import (
    FORMAT,
    JOURNAL,
    MANIFEST,
    Manifest,
    UpdateRecord,
    read_state,
    unreadable,
)
from unified_edit.errors import CheckpointError

STAGED = "staged"
"""Folder below `.unified-edit` where files wait to take their places."""


@dataclass(frozen=True)
class Journal:
    """A change that was begun, from one state of a folder to another."""

    before: Manifest | None
    """None for a folder without history."""
    after: Manifest | None

    def __post_init__(self) -> None:
        if not self.records:
            raise ValueError("it changes nothing")
        shorter, longer = self._histories()
        if longer[: len(shorter)] != shorter:
            raise ValueError("it belongs to two histories")

    @property
    def patching(self) -> bool:
        """Whether updates are applied, or else taken back."""
        return len(self._updates(False)) > len(self._updates(True))

    @property
    def records(self) -> tuple[UpdateRecord, ...]:
        """The updates that are applied or taken back, oldest first."""
        shorter, longer = self._histories()
        return longer[len(shorter) :]

    @property
    def old(self) -> dict[str, str]:
        """SHA-256 before the change, of each file that is replaced."""
        return self._hashes(original=self.patching)

    @property
    def new(self) -> dict[str, str]:
        """SHA-256 after the change, of each file that is replaced."""
        return self._hashes(original=not self.patching)

    def _updates(self, before: bool) -> tuple[UpdateRecord, ...]:
        manifest = self.before if before else self.after
        return manifest.updates if manifest else ()

    def _histories(self) -> list[tuple[UpdateRecord, ...]]:
        """The updates of both states, the fewer first."""
        return sorted((self._updates(True), self._updates(False)), key=len)

    def _hashes(self, *, original: bool) -> dict[str, str]:
        found: dict[str, str] = {}
        for record in reversed(self.records) if original else self.records:
            found |= record.before if original else record.after
        return found

    def reversed(self) -> Journal:
        """The change that takes this one back."""
        return Journal(before=self.after, after=self.before)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "format": FORMAT,
            "before": self.before and self.before.as_dict(),
            "after": self.after and self.after.as_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Journal:
        """Raises KeyError, TypeError or ValueError for what `as_dict` did not give."""
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}, not {FORMAT!r}")
        return cls(
            *(
                data[name] and Manifest.from_dict(data[name])
                for name in ("before", "after")
            )
        )


def read_journal(folder: Path) -> Journal | None:
    """What was being done when a change of the folder was interrupted, if one was."""
    data = read_state(folder / STATE / JOURNAL)
    if data is None:
        return None
    with unreadable(folder / STATE / JOURNAL):
        return Journal.from_dict(data)


def begin(folder: Path, journal: Journal) -> None:
    """From here on, until the journal is removed, the folder counts as half-changed."""
    write_json(folder / STATE / JOURNAL, journal.as_dict())


def finish(folder: Path, journal: Journal) -> None:
    """Moves what is staged into place; what is not staged any more was moved before."""
    with reported(f"{folder}: replacing its files was interrupted; recover it"):
        for name in journal.new:
            staged = folder / STATE / STAGED / name
            if present(staged):
                replace(staged, folder / name)
        manifest = folder / STATE / MANIFEST
        if journal.after is None:
            remove(manifest)
        else:
            write_json(manifest, journal.after.as_dict())
        remove(folder / STATE / JOURNAL)
    with suppress(OSError):  # the change is complete; the next command would tidy up
        discard_leftovers(folder, journal.after)


def withdraw(folder: Path, manifest: Manifest | None) -> None:
    """Takes back what was staged in `folder`, before any of its files was replaced."""
    remove(folder / STATE / JOURNAL)  # first: it needs the undo data
    discard_leftovers(folder, manifest)


def discard_leftovers(folder: Path, manifest: Manifest | None) -> None:
    """Removes from `.unified-edit` what no manifest names, and the folder itself if
    nothing is left in it. Only for who holds the lock and sees no journal."""
    state = folder / STATE
    if not present(state):
        return
    kept = set() if manifest is None else {MANIFEST}
    for record in manifest.updates if manifest else ():
        kept |= {record.update, record.undo}
    for path in state.iterdir():
        if path.name not in kept:
            remove_tree(path)
    if not kept:
        state.rmdir()


def check_writable(folder: Path) -> None:
    """Refuses a folder that cannot be changed in place.

    Raises:
        CheckpointError: no folder, read-only, or its state lies behind a symlink.
    """
    with reported(f"{folder}: cannot be read"):
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: not a checkpoint folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise CheckpointError(
                f"{folder}: is read-only, so it cannot be changed in place; patch it "
                "into a new folder"
            )
        if (folder / STATE).is_symlink():
            raise CheckpointError(
                f"{folder / STATE}: is a symlink, which is not written through; put "
                "the folder itself in its place"
            )
