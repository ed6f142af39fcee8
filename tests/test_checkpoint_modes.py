"""Linked shards, rounding towards keys, recovery and history, on whole folders."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_kit import (
    address_of,
    disk,
    quick_fsync,  # noqa: F401
    random_update,
    save_checkpoint,
    tiny_model,
)
from typer.testing import CliRunner

from unified_edit.algebra.addition import added
from unified_edit.algebra.update import RankKUpdate, UpdateSet
from unified_edit.checkpoint import files
from unified_edit.checkpoint.patch import history, patch, recover, revert, verify
from unified_edit.checkpoint.sharded import Checkpoint
from unified_edit.cli import app
from unified_edit.errors import CheckpointError, UpdateError
from unified_edit.live import applied


def with_keys(update: UpdateSet, count: int = 4) -> UpdateSet:
    """The same update, with keys that it may be rounded towards."""
    generator = torch.Generator().manual_seed(11)
    updates = {
        address: RankKUpdate(
            change.left,
            change.right,
            torch.randn(count, change.shape[1], generator=generator),
            torch.randn(2, change.shape[1], generator=generator),
        )
        for address, change in update
    }
    return UpdateSet(updates, update.metadata)


def emulate_reflinks(monkeypatch: pytest.MonkeyPatch, failure: int | None) -> None:
    """The test's file system may share no blocks: a copy stands for it."""

    def ioctl(target: int, request: int, source: int) -> int:
        assert request == 0x40049409
        if failure is not None:
            raise OSError(failure, os.strerror(failure))
        os.write(target, os.pread(source, os.fstat(source).st_size, 0))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)


@pytest.mark.parametrize("unchanged", ["hardlink", "reflink"])
def test_untouched_shards_are_linked_and_not_read(
    tmp_path: Path, unchanged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if unchanged == "reflink":
        emulate_reflinks(monkeypatch, None)
    base = save_checkpoint(tmp_path / "m", "llama", sharded=True)
    update = random_update(base, [address_of("llama", 1)])
    copied = patch(base, update, tmp_path / "copied")
    read: set[str] = set()
    real = files.open_regular

    def spying(path: Path) -> Any:
        read.add(path.name)
        return real(path)

    touched = copied.report.files
    untouched = set(Checkpoint.open(base).files) - {*touched}
    assert untouched
    monkeypatch.setattr("unified_edit.checkpoint.splicing.open_regular", spying)
    monkeypatch.setattr(files, "sha256_of", lambda path: spying(path) and "")
    linked = patch(base, update, tmp_path / "linked", unchanged=unchanged)
    assert not read & untouched and {*touched} <= read
    monkeypatch.undo()

    ours, theirs = disk(linked.path), disk(copied.path)
    manifest = ".unified-edit/manifest.json"
    assert ours.pop(manifest) != theirs.pop(manifest) and ours == theirs
    for name in untouched:
        same = os.path.samefile(base / name, linked.path / name)
        assert same == (unchanged == "hardlink")
    for name in ("README.md", "config.json", *touched):
        assert not os.path.samefile(base / name, linked.path / name)
    assert bool(linked.report.notes) == (unchanged == "hardlink")
    checked = verify(linked.path, base)
    assert checked.ok and set(checked.unread) == untouched
    # Nothing that is done to the new folder reaches the base.
    pristine = disk(base)
    second = random_update(
        linked.path, [address_of("llama", step) for step in range(3)]
    )
    patch(linked.path, second)
    revert(linked.path, all_updates=True)
    assert disk(base) == pristine
    assert disk(linked.path) == pristine


def test_a_changed_linked_shard_is_found_with_the_base(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "m", "llama", sharded=True)
    update = random_update(base, [address_of("llama", 1)])
    out = patch(base, update, tmp_path / "out", unchanged="hardlink").path
    (name,) = list(verify(out).unread)[:1]
    data = bytearray((out / name).read_bytes())
    data[-1] ^= 1
    (out / name).unlink()  # another file now, as by another tool
    (out / name).write_bytes(data)
    problems = verify(out, base).problems
    assert any("differs from the base's" in problem for problem in problems)


def test_what_cannot_be_linked_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_checkpoint(tmp_path / "m", "llama", sharded=True)
    update = random_update(base, [address_of("llama", 1)])
    emulate_reflinks(monkeypatch, errno.EOPNOTSUPP)
    with pytest.raises(CheckpointError, match="cannot share blocks.*copy them"):
        patch(base, update, tmp_path / "out", unchanged="reflink")

    def across(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", across)
    with pytest.raises(CheckpointError, match="cannot be hard-linked.*same file sys"):
        patch(base, update, tmp_path / "out", unchanged="hardlink")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="'move' is none of copy, hardlink"):
        patch(base, update, tmp_path / "out", unchanged="move")  # type: ignore[arg-type]
    assert {path.name for path in tmp_path.iterdir()} == {"m"}


def test_a_download_cache_is_never_linked_through(tmp_path: Path) -> None:
    """Shards behind symlinks, as in the hub's cache: copied, not linked."""
    blobs = save_checkpoint(tmp_path / "blobs", "llama", sharded=True)
    base = tmp_path / "snapshot"
    base.mkdir()
    for path in blobs.iterdir():
        if path.is_file():
            (base / path.name).symlink_to(path)
    update = random_update(base, [address_of("llama", 1)])
    before = disk(blobs)
    with pytest.raises(CheckpointError, match="is a symlink.*not linked through"):
        patch(base, update, tmp_path / "out", unchanged="hardlink")
    out = patch(base, update, tmp_path / "out")
    assert out.verify().ok and disk(blobs) == before
    assert not any(path.is_symlink() for path in out.path.rglob("*"))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_kept_in_the_history(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    base = save_checkpoint(tmp_path / "m", family, dtype)
    address = address_of(family, 1)
    update = with_keys(random_update(base, [address]))
    reports = {}
    for rounding in ("nearest", "keys"):
        patched = patch(base, update, tmp_path / rounding, rounding=rounding)  # type: ignore[arg-type]
        (reports[rounding],) = patched.report.tensors
        stored = Checkpoint.open(base).read(address.tensor)
        after = Checkpoint.open(patched.path).read(address.tensor)
        expected = added(
            stored,
            update.updates[address],
            transposed=address.transposed,
            rounding=rounding,  # type: ignore[arg-type]
        )
        assert torch.equal(after, expected)
        assert history(patched.path)[0].rounding == rounding
        assert patched.verify().ok
        model = tiny_model(family).to(dtype)
        with applied(model, update, rounding=rounding, check_base=False):  # type: ignore[arg-type]
            assert torch.equal(model.get_parameter(address.tensor), expected)
        # The report, from its definition.
        change = update.updates[address]
        assert change.keys is not None
        error = after.double() - stored.double()
        error = (error.T if address.transposed else error) - change.dense().double()
        keys = change.keys.double().T
        lost = (error @ keys).norm(dim=0) / (change.dense().double() @ keys).norm(dim=0)
        report = reports[rounding]
        assert report.worst_key_error == pytest.approx(float(lost.max()), rel=1e-3)
        assert report.median_key_error == pytest.approx(float(lost.median()), rel=1e-3)
    assert reports["keys"].median_key_error < reports["nearest"].median_key_error
    patch(base, update, rounding="keys")
    assert (
        disk(base)["model.safetensors"] == disk(tmp_path / "keys")["model.safetensors"]
    )
    revert(base)


def test_rounding_towards_keys_without_them_changes_nothing(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "m", "llama", torch.bfloat16)
    update = random_update(base, [address_of("llama", 1)])
    pristine = disk(tmp_path)
    for out in (None, tmp_path / "out"):
        with pytest.raises(UpdateError, match=r"down_proj.*needs the edits' keys"):
            patch(base, update, out, rounding="keys")
    assert disk(tmp_path) == pristine


def test_all_updates_come_off_at_once(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "m", "gpt2", sharded=True)
    pristine = disk(base)
    for step in range(3):
        # Layer 1 every time; some files in one update only.
        addresses = [address_of("gpt2", layer) for layer in {1, step}]
        patch(base, random_update(base, addresses, seed=step))
    report = revert(base, all_updates=True)
    assert report.numbers == (3, 2, 1) and report.remaining == 0
    assert disk(base) == pristine
    assert Checkpoint.open(base).fingerprint() == report.fingerprint
    with pytest.raises(CheckpointError, match="holds no update"):
        revert(base, all_updates=True)


def test_recover_when_there_is_nothing_to_recover(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "m")
    before = disk(base)
    assert recover(base).action == "nothing"
    patched = patch(base, random_update(base, [address_of("gpt2", 0)]))
    (base / ".unified-edit" / "staged").mkdir()
    report = recover(base)
    assert (report.action, report.updates) == ("removed", 1)
    assert patched.verify().ok
    patched.revert()
    assert disk(base) == before
    with pytest.raises(CheckpointError, match="no such folder, and nothing left"):
        recover(tmp_path / "never")


def run(*arguments: Any) -> str:
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_commands(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "m", "llama", torch.bfloat16, sharded=True)
    update = with_keys(random_update(base, [address_of("llama", 1)]))
    update.save(tmp_path / "u")
    out = tmp_path / "out"
    options = ("--unchanged", "hardlink", "--rounding", "keys")
    told = run("patch", base, tmp_path / "u", "--out", out, *options)
    assert "patched, update 1" in told and "second name" in told
    shown = run("show", out)
    assert "update 1: memit, 1 edits, rounded to keys" in shown
    assert "Île is in → Rome" in shown
    assert update.metadata["base_fingerprint"] in shown
    assert '"rounding": "keys"' in run("show", out, "--json")
    assert "give --base to compare" in run("verify", out)
    assert "tensors compared with the base's" in run("verify", out, "--base", base)
    assert "nothing was interrupted" in run("recover", out)
    again = random_update(out, [address_of("llama", 0)])
    again.save(tmp_path / "u2")
    run("patch", out, tmp_path / "u2", "--in-place")
    assert "updates 2, 1 taken back" in run("revert", out, "--all")
    assert "never patched" in run("show", out)
    assert disk(out) == disk(base)
