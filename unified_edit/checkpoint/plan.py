"""A patch before it touches its target: checked, then written as staged files.

What both ways of patching share. Knows the base folder, which it only reads, and the
folders into which it is told to write.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from covariance_cache.fingerprint import Sample, sample_of
from unified_edit.algebra.addition import Rounding
from unified_edit.algebra.update import RankKUpdate, UpdateSet
from unified_edit.checkpoint.files import STATE, NewFile
from unified_edit.checkpoint.layout import TensorEntry, new_header, to_tensor
from unified_edit.checkpoint.manifest import Manifest, UpdateRecord, update_names
from unified_edit.checkpoint.measure import TensorReport, check_fits
from unified_edit.checkpoint.measure import change as add_to
from unified_edit.checkpoint.sharded import Checkpoint
from unified_edit.checkpoint.splicing import LARGE, Background, Piece, splice
from unified_edit.errors import CheckpointMismatch, UpdateError

_OTHER_WEIGHTS = (
    *("*.safetensors", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.pth", "*.ckpt"),
    "pytorch_model*.bin",
)


@dataclass(frozen=True)
class Change:
    """One tensor to be patched."""

    entry: TensorEntry
    update: RankKUpdate
    transposed: bool
    """Stored as [d_key, d_value]."""


@dataclass(frozen=True)
class Plan:
    """A patch that was checked as far as can be without reading the weights."""

    checkpoint: Checkpoint
    manifest: Manifest | None
    """Of the base."""
    update: UpdateSet
    rounding: Rounding
    metadata: Mapping[str, Any]
    fingerprint: str
    """Of the base."""
    changes: Mapping[str, list[Change]]
    """By file, then by offset."""
    files: tuple[str, ...]
    """Every file of the base but this package's own."""

    def weights(self) -> tuple[str, ...]:
        """The files that hold weights, this model's or other copies of them."""
        return tuple(
            name
            for name in self.files
            if name in self.checkpoint.files
            or any(fnmatch(name, kind) for kind in _OTHER_WEIGHTS)
        )

    @property
    def earlier(self) -> tuple[UpdateRecord, ...]:
        """The base's own history."""
        return self.manifest.updates if self.manifest else ()


def make_plan(
    base: Path,
    manifest: Manifest | None,
    update: UpdateSet,
    *,
    rounding: Rounding,
    check_base: bool,
) -> Plan:
    """Checks everything that can be checked without reading the weights.

    Raises:
        as `patch`.
    """
    metadata = _plain(update.metadata)
    if not len(update):
        raise UpdateError("the update changes no tensor")
    checkpoint = Checkpoint.open(base)
    found: dict[str, Change] = {}
    for address, change in update:
        entry = checkpoint.editable(address)
        check_fits(entry, change, transposed=address.transposed)
        if entry.name in found:
            raise UpdateError(f"the update changes tensor {entry.name!r} twice")
        found[entry.name] = Change(entry, change, address.transposed)
    changes: dict[str, list[Change]] = {}
    for name, entry in checkpoint.tensors.items():
        if name in found:
            changes.setdefault(entry.file, []).append(found[name])
    fingerprint = checkpoint.fingerprint()
    if check_base:
        _check_base(base, fingerprint, metadata.get("base_fingerprint"))
    files = tuple(checkpoint.listing())
    return Plan(
        checkpoint, manifest, update, rounding, metadata, fingerprint, changes, files
    )


def _check_base(base: Path, fingerprint: str, wanted: Any) -> None:
    if wanted is None:
        raise CheckpointMismatch(
            f"{base}: its fingerprint is {fingerprint}, but the update does not say "
            "which model it was made for (no base_fingerprint in its metadata); turn "
            "the check of the base off if you are sure"
        )
    if wanted != fingerprint:
        raise CheckpointMismatch(
            f"{base}: its fingerprint is {fingerprint}, but the update was made for "
            f"{wanted}; patch the checkpoint that it was made from, or make the update "
            "again on this one (loading in another dtype than the files' changes the "
            "fingerprint too)"
        )


def write_staged(
    plan: Plan, shards: Path, state: Path
) -> tuple[UpdateRecord, tuple[TensorReport, ...]]:
    """Writes the patched shards into one folder, update and undo data into another.
    One pass over each shard, one tensor in memory at a time."""
    number = len(plan.earlier) + 1
    update_name, undo_name = update_names(number)
    reports: list[TensorReport] = []
    samples: dict[str, Sample] = {}
    entries = [part.entry for parts in plan.changes.values() for part in parts]

    def change(part: Change, data: bytearray) -> None:
        weight = to_tensor(part.entry, data)
        report = add_to(
            part.entry,
            weight,
            part.update,
            transposed=part.transposed,
            rounding=plan.rounding,
        )
        reports.append(report)
        samples[part.entry.name] = sample_of(weight)

    base = plan.checkpoint.folder
    size = sum((base / file).stat().st_size for file in plan.changes)
    with (
        NewFile(state / update_name) as kept,
        NewFile(state / undo_name) as undo,
        Background(threaded=size >= LARGE) as background,
    ):
        for data in UpdateSet(plan.update.updates, plan.metadata).parts():
            background.run(partial(kept.write, data))
        undo.write(new_header(entries, {"format": "pt"}))
        found = {
            file: splice(
                base / file,
                shards / file,
                [
                    Piece(
                        part.entry.begin,
                        part.entry.end,
                        partial(change, part),
                        undo.write,
                    )
                    for part in parts
                ],
                background,
            )
            for file, parts in plan.changes.items()
        }
    record = UpdateRecord(
        number=number,
        update=update_name,
        update_sha256=kept.digest.hexdigest(),
        undo=undo_name,
        undo_sha256=undo.digest.hexdigest(),
        base_fingerprint=plan.fingerprint,
        result_fingerprint=plan.checkpoint.fingerprint(samples),
        before={file: each.before for file, each in found.items()},
        after={file: each.after for file, each in found.items()},
        tensors=tuple(report.as_dict() for report in reports),
        rounding=plan.rounding,
        metadata=plan.metadata,
    )
    return record, tuple(reports)


def check_weights(plan: Plan, hashes: Mapping[str, str]) -> None:
    """Refuses to build on weights that changed since the last patch: its undo data
    would no longer fit them. Files that were not read, now or then, are believed."""
    if plan.manifest is None:
        return
    for name in plan.checkpoint.files:
        known = plan.manifest.files.get(name)
        if known is not None and hashes.get(name, known) != known:
            raise CheckpointMismatch(
                f"{plan.checkpoint.folder / name}: was changed since the last patch, "
                "which could then not be reverted; restore the file, or start from "
                f"the unpatched checkpoint (without its {STATE} folder)"
            )


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata as what JSON makes of it, so that manifest and update agree."""
    try:
        plain = json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UpdateError(f"the update's metadata is no JSON data: {error}") from error
    return dict(plain)
