"""Checks a patched folder against its manifest, its updates and, at hand, its base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from unified_edit.algebra.addition import added
from unified_edit.algebra.update import UpdateSet
from unified_edit.checkpoint.files import STATE, listing, reported, sha256_of
from unified_edit.checkpoint.layout import (
    TensorEntry,
    read_bytes,
    read_header,
    read_tensor,
)
from unified_edit.checkpoint.manifest import (
    Manifest,
    UpdateRecord,
    originals,
    read_manifest,
)
from unified_edit.checkpoint.measure import equal_bits, within_rounding
from unified_edit.checkpoint.sharded import Checkpoint
from unified_edit.errors import CheckpointError, NonFiniteError, UpdateError


@dataclass(frozen=True)
class VerifyReport:
    """What a verification found."""

    folder: str
    updates: int
    """How many updates the folder's history has."""
    files: int
    """Files that the manifest names, all there."""
    unread: tuple[str, ...]
    """Weight files without a SHA-256, for they were linked or left: only comparing
    with a base tells whether they are what they were."""
    tensors: tuple[str, ...]
    """Patched tensors that were recomputed from their original bytes."""
    compared_with_base: int | None
    """Tensors compared with the base's, byte for byte; None without a base."""
    problems: tuple[str, ...]
    """One line each, naming the file or tensor; empty when all is well."""
    notes: tuple[str, ...]
    """What is no problem, but should be known."""

    @property
    def ok(self) -> bool:
        """Whether the folder is exactly what its history says."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        lists = {
            "unread": list(self.unread),
            "tensors": list(self.tensors),
            "problems": list(self.problems),
            "notes": list(self.notes),
        }
        return {**asdict(self), **lists, "ok": self.ok}


def history(folder: str | Path) -> tuple[UpdateRecord, ...]:
    """The updates in a folder, oldest first; empty if it was never patched.

    Raises:
        CheckpointError: no such folder, or a change of it was interrupted.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    return manifest.updates if manifest else ()


def verify(folder: str | Path, base: str | Path | None = None) -> VerifyReport:
    """Checks that every file is as the manifest says, and that every patched tensor is
    exactly its original bytes plus the update, for each update of the history.

    Args:
        base: the folder that was patched, or one from before any of the updates; then
            its tensors are compared too, byte for byte.

    Raises:
        CheckpointError: the folder was not patched, is being changed, or a change of
            it was interrupted. What is wrong in it is listed in the report instead.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise CheckpointError(
            f"{folder}: has no {STATE} folder, so it was not patched, or its history "
            "was removed"
        )
    reference = None if base is None else Checkpoint.open(base)
    compared = None
    with reported(f"{folder}: cannot be read"):
        findings = _check_files(folder, manifest)
        intact = not findings.problems
        try:
            checkpoint = Checkpoint.open(folder)
            for number in range(1, len(manifest.updates) + 1):
                _check_update(checkpoint, manifest.updates, number, intact, findings)
            last = manifest.updates[-1].result_fingerprint
            if checkpoint.fingerprint() != last:
                findings.problems.append(f"the model's fingerprint is not {last}")
            if reference is not None:
                compared = _compare(checkpoint, reference, manifest.updates, findings)
        except (CheckpointError, UpdateError) as error:
            findings.problems.append(str(error))
    return VerifyReport(
        folder=str(folder),
        updates=len(manifest.updates),
        files=len(manifest.files),
        unread=tuple(name for name, known in manifest.files.items() if known is None),
        tensors=tuple(dict.fromkeys(findings.recomputed)),
        compared_with_base=compared,
        problems=tuple(findings.problems),
        notes=tuple(findings.notes),
    )


@dataclass(frozen=True)
class _Findings:
    """Lists that the checks below add to."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    recomputed: list[str] = field(default_factory=list)


def _check_files(folder: Path, manifest: Manifest) -> _Findings:
    findings = _Findings()
    expected: dict[str, str | None] = dict(manifest.files)
    for record in manifest.updates:
        expected[f"{STATE}/{record.update}"] = record.update_sha256
        expected[f"{STATE}/{record.undo}"] = record.undo_sha256
    for name, sha256 in expected.items():
        path = folder / name
        if not path.is_file():
            findings.problems.append(f"{name}: is missing")
        elif sha256 is not None and (found := sha256_of(path)) != sha256:
            findings.problems.append(
                f"{name}: its SHA-256 is {found}, the manifest says {sha256}"
            )
    for name in listing(folder):
        if name not in expected:
            findings.problems.append(f"{name}: was added since the last patch")
    return findings


def _check_update(
    checkpoint: Checkpoint,
    updates: Sequence[UpdateRecord],
    number: int,
    intact: bool,
    findings: _Findings,
) -> None:
    """Recomputes what update `number` made of each tensor's original bytes.

    Args:
        intact: every file has the SHA-256 that the patch wrote. Then a difference that
            another order of summation explains is a note, and no problem.
    """
    state = checkpoint.folder / STATE
    record = updates[number - 1]
    undo = read_header(state / record.undo)
    later = originals(checkpoint.folder, updates[number:])
    patched = set()
    for address, update in UpdateSet.load(state / record.update):
        names = [n for n in (address.tensor, *address.aliases) if n in undo]
        if not names:
            findings.problems.append(f"{record.undo}: holds no {address.tensor!r}")
            continue
        name = names[0]
        patched.add(name)
        before = read_tensor(state / record.undo, undo[name])
        after = _tensor_at(checkpoint, later, name)
        try:
            expected = added(
                before,
                update,
                transposed=address.transposed,
                rounding=record.rounding,
            )
        except (UpdateError, NonFiniteError) as error:
            findings.problems.append(f"update {number}, tensor {name!r}: {error}")
            continue
        findings.recomputed.append(name)
        if _same(expected, after):
            continue
        if intact and within_rounding(
            before,
            expected,
            after,
            update,
            transposed=address.transposed,
            rounding=record.rounding,
        ):
            findings.notes.append(
                f"update {number}, tensor {name!r}: recomputed here it differs by the "
                "rounding of another order of summation, as on another processor; the "
                "file is as it was written"
            )
        else:
            findings.problems.append(
                f"update {number}, tensor {name!r}: is not what its original bytes "
                "and the update give"
            )
    for name in undo.keys() - patched:
        findings.problems.append(f"{record.undo}: holds {name!r}, which has no update")


def _compare(
    checkpoint: Checkpoint,
    base: Checkpoint,
    updates: Sequence[UpdateRecord],
    findings: _Findings,
) -> int:
    """Compares every tensor of `base`, a state of the folder's history, with the
    folder's bytes of that state; returns how many there are."""
    fingerprint = base.fingerprint()
    states = [record.base_fingerprint for record in updates]
    states.append(updates[-1].result_fingerprint)
    if fingerprint not in states:
        findings.problems.append(
            f"{base.folder}: its fingerprint is {fingerprint}, which is no state of "
            f"this folder's history ({', '.join(states)})"
        )
        return 0
    before = originals(checkpoint.folder, updates[states.index(fingerprint) :])
    for name in base.tensors.keys() ^ checkpoint.tensors.keys():
        findings.problems.append(f"tensor {name!r}: only one of folder and base has it")
    shared = [name for name in base.tensors if name in checkpoint.tensors]
    for name in shared:
        if name not in before and _is_one_file(checkpoint, base, name):
            continue
        there = base[name]
        path, here = before.get(name) or (
            checkpoint.path_of(checkpoint[name]),
            checkpoint[name],
        )
        alike = (here.dtype, here.shape) == (there.dtype, there.shape)
        # Bytes: a checkpoint may hold dtypes that torch does not know.
        if not alike or read_bytes(path, here) != read_bytes(
            base.path_of(there), there
        ):
            findings.problems.append(f"tensor {name!r}: differs from the base's")
    return len(shared)


def _is_one_file(checkpoint: Checkpoint, base: Checkpoint, name: str) -> bool:
    """Whether both have the tensor at the same place of one hard-linked file."""
    mine, theirs = checkpoint[name], base[name]
    return mine == theirs and checkpoint.path_of(mine).samefile(base.path_of(theirs))


def _tensor_at(
    checkpoint: Checkpoint, originals: Mapping[str, tuple[Path, TensorEntry]], name: str
) -> Tensor:
    """A tensor as it was before some updates (`manifest.originals`), else as now."""
    return read_tensor(*originals[name]) if name in originals else checkpoint.read(name)


def _same(one: Tensor, other: Tensor) -> bool:
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and equal_bits(one, other)
