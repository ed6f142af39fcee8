"""A new folder that appears whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unified_edit.checkpoint.files import (
    locked,
    remove_tree,
    reported,
    sync_folder,
    sync_tree,
    undone,
)
from unified_edit.checkpoint.manifest import lock_of, staging_of
from unified_edit.errors import CheckpointError


@contextmanager
def new_folder(out: Path, base: Path) -> Iterator[Path]:
    """Gives a folder beside `out` to write into; when the block ends, it is fsynced
    and takes the name `out` in one step. After an exception nothing is left. The files
    in it must have been fsynced.

    Args:
        out: absolute; absent, or an empty folder.
        base: the folder that is read meanwhile.

    Raises:
        CheckpointError: `out` is taken, in use, inside `base`, or cannot be written.
    """
    with reported(f"{out}: cannot be written, nothing was changed"):
        _check_target(base, out)
        with locked(lock_of(out)):
            staging = staging_of(out)
            remove_tree(staging)
            os.mkdir(staging)
            with undone(lambda: remove_tree(staging)):
                yield staging
                sync_tree(staging)
                os.rename(staging, out)
            with reported(f"{out}: is complete, but may not survive a power cut"):
                sync_folder(out.parent)


def _check_target(base: Path, out: Path) -> None:
    if out.is_symlink() or (
        os.path.lexists(out) and (not out.is_dir() or any(out.iterdir()))
    ):
        raise CheckpointError(
            f"{out}: exists already; name a new folder, or remove this one"
        )
    if not out.parent.is_dir():
        raise CheckpointError(
            f"{out.parent}: not a folder, so {out.name} cannot be in it"
        )
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{out.parent}: is read-only; choose another place")
    if base.resolve() in (out.resolve(), *out.resolve().parents):
        raise CheckpointError(
            f"{out}: lies inside the base {base}; choose another place"
        )
