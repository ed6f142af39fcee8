"""Writes an update into a checkpoint folder: a new one, or in place.

Only the bytes of the patched tensors change: headers, metadata, other tensors and
sidecar files are copied as they are. Everything is staged and fsynced first. A new
folder appears by one rename; in place, the undo data and a journal are on disk before
the first file is replaced, so that `revert` can restore the folder from any moment.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from unified_edit.algebra.update import UpdateSet
from unified_edit.checkpoint.files import (
    LOCK,
    STATE,
    listing,
    locked,
    remove,
    remove_tree,
    replace,
    reported,
    sha256_of,
    splice,
    states_of,
    sync_folder,
    sync_tree,
    undone,
    write_json,
)
from unified_edit.checkpoint.manifest import (
    JOURNAL,
    MANIFEST,
    STAGED,
    Journal,
    Manifest,
    UpdateRecord,
    check_writable,
    discard_leftovers,
    read_manifest,
    read_own_manifest,
    withdraw,
    write_journal,
)
from unified_edit.checkpoint.measure import TensorReport
from unified_edit.checkpoint.plan import (
    Plan,
    check_weights,
    make_plan,
    write_staged,
)
from unified_edit.checkpoint.revert import RevertReport, revert
from unified_edit.checkpoint.sharded import CONFIG
from unified_edit.checkpoint.verify import VerifyReport, history, verify
from unified_edit.errors import CheckpointError, CheckpointMismatch

__all__ = ["PatchReport", "Patched", "history", "patch", "revert", "verify"]

_OTHER_WEIGHTS = (
    *("*.safetensors", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.pth", "*.ckpt"),
    "pytorch_model*.bin",
)


@dataclass(frozen=True)
class PatchReport:
    """What a patch did."""

    folder: str
    number: int
    """The update's place in the folder's history, from 1."""
    base_fingerprint: str
    result_fingerprint: str
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
    check_base: bool = True,
) -> Patched:
    """Writes `update` into a copy of the folder `base`, or into `base` itself.

    Args:
        out: the new folder, absent or empty; None patches in place.
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
    if out is None:
        return _patch_in_place(Path(base), update, check_base)
    out = Path(os.path.abspath(out))
    return _patch_copy(Path(base), update, check_base, out)


def _patch_copy(base: Path, update: UpdateSet, check_base: bool, out: Path) -> Patched:
    plan = make_plan(base, read_manifest(base), update, check_base=check_base)
    with reported(f"{out}: cannot be written, nothing was changed"):
        _check_target(base, out)
        with locked(out.parent / f".{out.name}.unified-edit-lock"):
            staging = out.parent / f".{out.name}.unified-edit-staging"
            remove_tree(staging)
            os.mkdir(staging)
            with undone(lambda: remove_tree(staging)):
                record, reports = _stage_copy(plan, staging)
                os.rename(staging, out)
            with reported(f"{out}: is complete, but may not survive a power cut"):
                sync_folder(out.parent)
    return Patched(out, base, _report(plan, out, record, reports))


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


def _stage_copy(
    plan: Plan, staging: Path
) -> tuple[UpdateRecord, tuple[TensorReport, ...]]:
    base = plan.checkpoint.folder
    state = staging / STATE
    os.mkdir(state)
    read = states_of(base, plan.files)
    record, reports = write_staged(plan, staging, state)
    hashes = {**record.after, CONFIG: sha256_of(base / CONFIG)}
    for name in plan.files:
        if name not in hashes:
            target = staging / name
            target.parent.mkdir(parents=True, exist_ok=True)
            hashes[name], _ = splice(base / name, target)
    check_weights(plan, {**hashes, **record.before})
    _copy_history(plan, state)
    write_json(state / MANIFEST, Manifest((*plan.earlier, record), hashes).as_dict())
    # The config goes last: until it is there, no loader takes the folder for a model.
    splice(base / CONFIG, staging / CONFIG)
    if states_of(base, listing(base)) != read or read_manifest(base) != plan.manifest:
        raise CheckpointError(f"{base}: was changed while it was read; patch it again")
    sync_tree(staging)
    return record, reports


def _copy_history(plan: Plan, state: Path) -> None:
    """Copies what the base's own updates need to be reverted in the new folder."""
    for record in plan.earlier:
        for name, expected in (
            (record.update, record.update_sha256),
            (record.undo, record.undo_sha256),
        ):
            source = plan.checkpoint.folder / STATE / name
            if splice(source, state / name)[0] != expected:
                raise CheckpointMismatch(
                    f"{source}: was changed since it was written; restore it"
                )


def _patch_in_place(base: Path, update: UpdateSet, check_base: bool) -> Patched:
    check_writable(base)
    with reported(f"{base}: cannot be written"), locked(base / LOCK):
        manifest = read_own_manifest(base)
        discard_leftovers(base, manifest)
        plan = make_plan(base, manifest, update, check_base=check_base)
        _check_no_symlinks(plan)
        with undone(lambda: withdraw(base, manifest)):
            record, reports, after = _stage_in_place(plan)
            write_journal(base, Journal(record, manifest))
        with reported(
            f"{base}: replacing its files was interrupted; call revert on it to get "
            "the original back"
        ):
            for name in record.after:
                replace(base / STATE / STAGED / name, base / name)
            write_json(base / STATE / MANIFEST, after.as_dict())
            remove(base / STATE / JOURNAL)
        with suppress(OSError):  # the patch is complete; the next one would tidy up
            discard_leftovers(base, after)
    return Patched(base, None, _report(plan, base, record, reports))


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
    others = {
        name: sha256_of(base / name) for name in plan.files if name not in plan.changes
    }
    check_weights(plan, {**others, **record.before})
    sync_tree(state)
    sync_folder(base)
    after = Manifest((*plan.earlier, record), {**others, **record.after})
    return record, reports, after


def _report(
    plan: Plan,
    folder: Path,
    record: UpdateRecord,
    reports: tuple[TensorReport, ...],
) -> PatchReport:
    notes = [
        f"{name} may hold weights too and was left as it was"
        for name in plan.files
        if name not in plan.checkpoint.files
        and any(fnmatch(name, kind) for kind in _OTHER_WEIGHTS)
    ]
    return PatchReport(
        folder=str(folder),
        number=record.number,
        base_fingerprint=record.base_fingerprint,
        result_fingerprint=record.result_fingerprint,
        tensors=reports,
        files=tuple(record.after),
        notes=tuple(notes),
    )
