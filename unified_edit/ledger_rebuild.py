"""A ledger's checkpoint, made anew from the base."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from unified_edit.algebra.addition import Rounding, keys_to_keep
from unified_edit.algebra.update import UpdateSet
from unified_edit.checkpoint.patch import (
    Patched,
    Unchanged,
    check_modes,
    history,
    patch,
    revert,
)
from unified_edit.checkpoint.sharded import Checkpoint
from unified_edit.errors import CheckpointError, LedgerError, UpdateError
from unified_edit.ledger import Ledger


def rebuild(
    ledger: Ledger,
    update: UpdateSet | None,
    base: str | Path,
    out: str | Path,
    *,
    unchanged: Unchanged = "copy",
    rounding: Rounding = "nearest",
) -> Patched | None:
    """Makes `out` the base with the ledger's edits: a new folder, or one that an
    earlier rebuild made, whose updates are then taken back first. A crash between the
    two leaves the unedited base there, whole.

    Args:
        update: what `solve` gave; None for a ledger without edits, which leaves the
            base, in a folder that an earlier rebuild made.

    Returns:
        None where there were no edits.

    Raises:
        LedgerError: `out` holds something else.
        as `patch` and `revert`.
    """
    out = Path(out)
    check_modes(unchanged, rounding)
    if not out.is_dir() or not any(out.iterdir()):
        if update is None:
            raise LedgerError(
                f"{ledger.path}: holds no edits; its checkpoint is the base"
            )
        return patch(base, update, out, unchanged=unchanged, rounding=rounding)
    updates = history(out)
    last = updates[-1] if updates else None
    ours = last is not None and "ledger" in last.metadata
    found = None
    if last is not None and ours:
        found = last.base_fingerprint
    else:
        with suppress(CheckpointError):
            found = Checkpoint.open(out).fingerprint()
    # Without an update of ours it is what an emptied ledger left, or a crash.
    if found != ledger.base_fingerprint or out.resolve() == Path(base).resolve():
        raise LedgerError(
            f"{out}: is no checkpoint that a ledger of this base made; name a new "
            "folder, or remove this one"
        )
    if update is not None and rounding == "keys":
        _check_half(out, update)
    if ours:
        revert(out)
    return None if update is None else patch(out, update, rounding=rounding)


def _check_half(folder: Path, update: UpdateSet) -> None:
    """Refuses to round towards keys what would be refused after the revert only."""
    checkpoint = Checkpoint.open(folder)
    for address, change in update:
        entry = checkpoint.editable(address)
        try:
            keys_to_keep(entry.torch_dtype, change)
        except UpdateError as error:
            raise LedgerError(f"{folder}: tensor {entry.name!r}: {error}") from error
