"""Writes an update into a checkpoint folder: a new one, or in place.

Only the bytes of the patched tensors change: headers, metadata, other tensors and
sidecar files are copied as they are. Everything is staged and fsynced first. A new
folder appears by one rename; in place, the undo data and a journal are on disk before
the first file is replaced, so that `recover` can finish or undo from any moment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from unified_edit.algebra.addition import ROUNDINGS, Rounding
from unified_edit.algebra.update import UpdateSet
from unified_edit.checkpoint.files import (
    LOCK,
    STATE,
    hard_link,
    listing,
    locked,
    reflink,
    reported,
    sha256_of,
    states_of,
    sync_folder,
    sync_tree,
    undone,
    write_json,
)
from unified_edit.checkpoint.journal import (
    STAGED,
    Journal,
    begin,
    check_writable,
    discard_leftovers,
    finish,
    withdraw,
)
from unified_edit.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    UpdateRecord,
    read_manifest,
    read_own_manifest,
)
from unified_edit.checkpoint.measure import TensorReport
from unified_edit.checkpoint.new_folder import new_folder
from unified_edit.checkpoint.plan import (
    Plan,
    check_weights,
    make_plan,
    write_staged,
)
from unified_edit.checkpoint.revert import RevertReport, recover, revert
from unified_edit.checkpoint.sharded import CONFIG
from unified_edit.checkpoint.splicing import splice
from unified_edit.checkpoint.verify import VerifyReport, history, verify
from unified_edit.errors import CheckpointError, CheckpointMismatch

__all__ = [
    "PatchReport",
    "Patched",
    "history",
    "patch",
    "recover",
    "revert",
    "verify",
]

Unchanged = Literal["copy", "hardlink", "reflink"]
"""How a new folder gets the weights that no update changes: as copies, as further
names of the base's files, or as files that share the base's blocks on the disk."""

UNCHANGED: tuple[str, ...] = get_args(Unchanged)


@dataclass(frozen=True)
class PatchReport:
    """What a patch did."""

    folder: str
    number: int
    """The update's place in the folder's history, from 1."""
    base_fingerprint: str
    result_fingerprint: str
    rounding: str
    """How patched weights were rounded."""
    tensors: tuple[TensorReport, ...]
    files: tuple[str, ...]
    """The files whose content changed."""
    notes: tuple[str, ...]
    """What somebody should know, e.g. other copies of the weights that were left."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            **asdict(self),
            "tensors": [tensor.as_dict() for tensor in self.tensors],
            "files": list(self.files),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Patched:
    """A patched folder."""

    path: Path
    base: Path | None
    """The folder it was made from; None if it was patched in place."""
    report: PatchReport

    def verify(self) -> VerifyReport:
        """`verify` of the folder, against its base where there is one."""
        return verify(self.path, self.base)

    def revert(self) -> RevertReport:
        """`revert` of the folder's last update."""
        return revert(self.path)


def patch(
    base: str | Path,
    update: UpdateSet,
    out: str | Path | None = None,
    *,
    unchanged: Unchanged = "copy",
    rounding: Rounding = "nearest",
    check_base: bool = True,
) -> Patched:
    """Writes `update` into a copy of the folder `base`, or into `base` itself.

    Args:
        out: the new folder, absent or empty; None patches in place.
        unchanged: how a new folder gets the weight files that the update does not
            touch. Linked ones are not read; sidecar files are always copied.
        rounding: of half-precision weights: `nearest`, or `keys`, which keeps what the
            patched weight does to the edits' keys (`algebra.rounding`).
        check_base: refuse an update whose metadata does not name this very model as
            its `base_fingerprint`.

    Raises:
        CheckpointError: a folder or file cannot be read or written, is malformed,
            symlinked (in place), in use, half-changed, or a tensor is missing or
            would not change. Also for everything below, the disk is as before, unless
            the message says that files were being replaced.
        CheckpointMismatch: the update was made for another model, or weights changed
            since the last patch.
        UnsupportedModel: the checkpoint is quantized.
        UpdateError: the update is empty, does not fit, or is no JSON-able data.
        NonFiniteError: NaN or infinity in a weight, before or after.
    """
    check_modes(unchanged, rounding)
    if out is None:
        return _patch_in_place(Path(base), update, rounding, check_base)
    out = Path(os.path.abspath(out))
    plan = make_plan(
        Path(base),
        read_manifest(Path(base)),
        update,
        rounding=rounding,
        check_base=check_base,
    )
    return _patch_copy(plan, out, unchanged)


def check_modes(unchanged: str, rounding: str) -> None:
    """Raises CheckpointError for a mode that does not exist."""
    for name, value, known in (
        ("unchanged files", unchanged, UNCHANGED),
        ("rounding", rounding, ROUNDINGS),
    ):
        if value not in known:
            raise CheckpointError(f"{name}: {value!r} is none of {', '.join(known)}")


def _patch_copy(plan: Plan, out: Path, unchanged: Unchanged) -> Patched:
    base = plan.checkpoint.folder
    with new_folder(out, base) as staging:
        record, reports, linked = _stage_copy(plan, staging, unchanged)
    notes = _notes(plan)
    if linked and unchanged == "hardlink":
        notes += (
            f"{len(linked)} weight files are the base's own under a second name: what "
            "writes into one of them, instead of replacing it, changes both",
        )
    return Patched(out, base, _report(plan, out, record, reports, notes))


def _stage_copy(
    plan: Plan, staging: Path, unchanged: Unchanged
) -> tuple[UpdateRecord, tuple[TensorReport, ...], set[str]]:
    base = plan.checkpoint.folder
    state = staging / STATE
    os.mkdir(state)
    read = states_of(base, plan.files)
    record, reports = write_staged(plan, staging, state)
    linked = set() if unchanged == "copy" else {*plan.weights()} - {*plan.changes}
    hashes: dict[str, str] = {**record.after, CONFIG: sha256_of(base / CONFIG)}
    for name in plan.files:
        if name in hashes:
            continue
        target = staging / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name not in linked:
            hashes[name] = splice(base / name, target).after
        elif unchanged == "hardlink":
            hard_link(base / name, target)
        else:
            reflink(base / name, target)
    check_weights(plan, {**hashes, **record.before})
    _copy_history(plan, state)
    write_json(state / MANIFEST, _manifest(plan, record, hashes).as_dict())
    # The config goes last: until it is there, no loader takes the folder for a model.
    splice(base / CONFIG, staging / CONFIG)
    if states_of(base, listing(base)) != read or read_manifest(base) != plan.manifest:
        raise CheckpointError(f"{base}: was changed while it was read; patch it again")
    return record, reports, linked


def _manifest(plan: Plan, record: UpdateRecord, hashes: Mapping[str, str]) -> Manifest:
    """The folder's next one. A file that was not read is what it was, if that was
    known."""
    known = plan.manifest.files if plan.manifest else {}
    files = {name: hashes.get(name, known.get(name)) for name in plan.files}
    return Manifest((*plan.earlier, record), files)


def _copy_history(plan: Plan, state: Path) -> None:
    """Copies what the base's own updates need to be reverted in the new folder."""
    for record in plan.earlier:
        for name, expected in (
            (record.update, record.update_sha256),
            (record.undo, record.undo_sha256),
        ):
            source = plan.checkpoint.folder / STATE / name
            if splice(source, state / name).before != expected:
                raise CheckpointMismatch(
                    f"{source}: was changed since it was written; restore it"
                )


def _patch_in_place(
    base: Path, update: UpdateSet, rounding: Rounding, check_base: bool
) -> Patched:
    check_writable(base)
    with reported(f"{base}: cannot be written"), locked(base / LOCK):
        manifest = read_own_manifest(base)
        discard_leftovers(base, manifest)
        plan = make_plan(
            base, manifest, update, rounding=rounding, check_base=check_base
        )
        _check_no_symlinks(plan)
        with undone(lambda: withdraw(base, manifest)):
            record, reports, after = _stage_in_place(plan)
            journal = Journal(manifest, after)
            begin(base, journal)
        finish(base, journal)
    return Patched(base, None, _report(plan, base, record, reports, _notes(plan)))


def _check_no_symlinks(plan: Plan) -> None:
    folder = plan.checkpoint.folder
    for name in plan.changes:
        if (folder / name).is_symlink():
            raise CheckpointError(
                f"{folder / name}: is a symlink, as in a download cache that others "
                "share, and is not written through; patch into a new folder"
            )


def _stage_in_place(
    plan: Plan,
) -> tuple[UpdateRecord, tuple[TensorReport, ...], Manifest]:
    base = plan.checkpoint.folder
    state, staged = base / STATE, base / STATE / STAGED
    state.mkdir(exist_ok=True)
    os.mkdir(staged)
    record, reports = write_staged(plan, staged, state)
    weights = plan.weights()
    sidecars = {
        name: sha256_of(base / name) for name in plan.files if name not in weights
    }
    check_weights(plan, record.before)
    sync_tree(state)
    sync_folder(base)
    return record, reports, _manifest(plan, record, {**sidecars, **record.after})


def _notes(plan: Plan) -> tuple[str, ...]:
    return tuple(
        f"{name} may hold weights too and was left as it was"
        for name in plan.weights()
        if name not in plan.checkpoint.files
    )


def _report(
    plan: Plan,
    folder: Path,
    record: UpdateRecord,
    reports: tuple[TensorReport, ...],
    notes: tuple[str, ...],
) -> PatchReport:
    return PatchReport(
        folder=str(folder),
        number=record.number,
        base_fingerprint=record.base_fingerprint,
        result_fingerprint=record.result_fingerprint,
        rounding=plan.rounding,
        tensors=reports,
        files=tuple(record.after),
        notes=notes,
    )
