"""What a failure or a crash at any file-system call leaves behind.

Every call that changes the disk is counted; then each in turn fails, either once with
an error (a full disk), or for good (the process is dead: nothing after it happens).
"""

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_kit import (
    disk,
    quick_fsync,  # noqa: F401
    random_update,
    write_shards,
)

from unified_edit.algebra.update import UpdateSet, WeightAddress
from unified_edit.checkpoint import patch as patch_module
from unified_edit.checkpoint.files import LOCK, locked, sha256_of
from unified_edit.checkpoint.journal import read_journal
from unified_edit.checkpoint.patch import (
    Patched,
    history,
    patch,
    recover,
    revert,
    verify,
)
from unified_edit.checkpoint.sharded import Checkpoint
from unified_edit.errors import CheckpointError

ADDRESSES = [WeightAddress("a", 0, False), WeightAddress("c", 1, True)]
CALLS = [
    *("open", "write", "fsync", "fchmod", "replace", "rename", "mkdir", "unlink"),
    "rmdir",
]
JOURNAL = Path(".unified-edit") / "journal.json"


class Crash(BaseException):
    """The process dies here."""


class Faults:
    """Lets the `at`-th of the counted calls fail; counts them all."""

    def __init__(self, at: int | None, *, crash: bool) -> None:
        self.at = at
        self.crash = crash
        self.count = 0
        self.struck = False

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            strike = self.count == self.at
            self.count += 1
            if strike or (self.crash and self.struck):
                if strike and name == "write":  # half of it reaches the disk
                    real(args[0], args[1][: len(args[1]) // 2])
                self.struck = True
                if self.crash:
                    raise Crash
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        return call


@contextmanager
def faults(at: int | None = None, *, crash: bool = False) -> Iterator[Faults]:
    injected = Faults(at, crash=crash)
    with pytest.MonkeyPatch.context() as patching:
        for name in CALLS:
            patching.setattr(os, name, injected.wrap(name, getattr(os, name)))
        yield injected


def each_fault(*, crash: bool) -> Iterator[Callable[[Callable[[], object]], bool]]:
    """For each counted call in turn, a runner in which it fails; ends when all have.
    The runner returns whether what it ran got through without an exception."""
    at = 0
    while True:
        reached = []

        def run(action: Callable[[], object], at: int = at) -> bool:
            with faults(at, crash=crash) as injected:
                try:
                    action()
                    through = True
                except (CheckpointError, Crash) as error:
                    assert isinstance(error, Crash) == crash
                    through = False
            reached.append(injected.struck)  # noqa: B023
            return through

        yield run
        if not reached[0]:
            assert at > 10, "the faults were not injected"
            return
        at += 1


def small_checkpoint(folder: Path) -> Path:
    """Two shards, a tensor to be patched in each, and two sidecar files."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    shards = {
        "model-1.safetensors": {"a": random(4, 6), "b": random(5)},
        "model-2.safetensors": {"c": random(6, 4), "d": random(3, 3)},
    }
    write_shards(folder, shards)
    (folder / "README.md").write_text("a card\n")
    return folder


def weights(folder: Path) -> dict[str, str]:
    """SHA-256 of what a loader would read."""
    return Checkpoint.open(folder).sha256()


def is_interrupted(folder: Path) -> bool:
    """Whether a journal was left; then every command has to say so."""
    if not (folder / JOURNAL).exists():
        return False
    update = UpdateSet({}, {})
    for command in (
        lambda: history(folder),
        lambda: verify(folder),
        lambda: patch(folder, update),
        lambda: patch(folder, update, folder.parent / "never"),
        lambda: revert(folder),
    ):
        with pytest.raises(CheckpointError, match="interrupted.*recover it first"):
            command()
    return True


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("crash", [False, True])
def test_new_folder_is_complete_or_absent(
    tmp_path: Path, crash: bool, stacked: bool
) -> None:
    base = small_checkpoint(tmp_path / "m")
    if stacked:
        patch(base, random_update(base, ADDRESSES))
    update = random_update(base, ADDRESSES, seed=1)
    complete = disk(patch(base, update, tmp_path / "reference").path)
    pristine = disk(base)
    outcomes = set()
    for number, run in enumerate(each_fault(crash=crash)):
        parent = tmp_path / str(number)
        parent.mkdir()
        out = parent / "out"
        through = run(lambda out=out: patch(base, update, out))
        assert disk(base) == pristine
        outcomes.add((through, out.exists()))
        if out.exists():
            assert disk(out) == complete
        else:
            assert not through
        left = {path.name for path in parent.iterdir()} - {"out"}
        if not crash:
            # Only removing the lock file itself may fail and leave it.
            assert left <= {".out.unified-edit-lock"}
        staging = parent / ".out.unified-edit-staging"
        if (staging / "config.json").exists() and disk(staging) != complete:
            # The config's last bytes: no loader can take them for a model.
            with pytest.raises(CheckpointError, match="not valid JSON"):
                Checkpoint.open(staging)
        if not out.exists():
            assert disk(patch(base, update, out).path) == complete
            assert {path.name for path in parent.iterdir()} == {"out"}
        shutil.rmtree(parent)
    assert {(False, False), (True, True)} <= outcomes


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("crash", [False, True])
def test_in_place_can_always_be_restored(
    tmp_path: Path, crash: bool, stacked: bool
) -> None:
    base = small_checkpoint(tmp_path / "m")
    if stacked:
        patch(base, random_update(base, ADDRESSES))
    pristine, original = disk(base), weights(base)
    update = random_update(base, ADDRESSES, seed=1)
    done = patch(base, update, tmp_path / "reference").path
    complete, edited = disk(done), weights(done)
    outcomes = set()
    for number, run in enumerate(each_fault(crash=crash)):
        folder = tmp_path / f"f{number}"
        shutil.copytree(base, folder)
        through = run(lambda folder=folder: patch(folder, update))
        if is_interrupted(folder):
            outcomes.add("interrupted")
            assert not through
            undone = tmp_path / f"u{number}"
            shutil.copytree(folder, undone)
            assert recover(folder).action == "finished"
            assert disk(folder) == complete and verify(folder).ok
            report = recover(undone, undo=True)
            assert report.action == "undone" and report.updates == stacked
            assert disk(undone) == pristine
        elif weights(folder) == edited:
            outcomes.add("complete")
            assert verify(folder).ok
            assert revert(folder).numbers == (1 + stacked,)
            assert disk(folder) == pristine
        else:
            outcomes.add("unchanged")
            assert not through
            assert weights(folder) == original
            if not crash:
                assert disk(folder) == pristine
            patch(folder, update)
            assert disk(folder) == complete
        shutil.rmtree(folder)
    assert outcomes == {"interrupted", "complete", "unchanged"}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("crash", [False, True])
def test_revert_can_always_be_finished(
    tmp_path: Path, crash: bool, stacked: bool
) -> None:
    base = small_checkpoint(tmp_path / "m")
    if stacked:
        patch(base, random_update(base, ADDRESSES))
    pristine, original = disk(base), weights(base)
    update = random_update(base, ADDRESSES, seed=1)
    patched = patch(base, update, tmp_path / "patched").path
    edited = weights(patched)
    outcomes = set()
    for number, run in enumerate(each_fault(crash=crash)):
        folder = tmp_path / f"f{number}"
        shutil.copytree(patched, folder)
        through = run(lambda folder=folder: revert(folder))
        if is_interrupted(folder):
            outcomes.add("interrupted")
            assert not through
            assert recover(folder).action == "reverted"
            assert disk(folder) == pristine
        elif weights(folder) == edited:
            outcomes.add("unchanged")
            assert not through
            assert verify(folder).ok
            if not crash:
                assert disk(folder) == disk(patched)
            revert(folder)
            assert disk(folder) == pristine
        else:
            outcomes.add("complete")
            assert weights(folder) == original
            again = patch(folder, update)
            assert again.verify().ok
            again.revert()
            assert disk(folder) == pristine
        shutil.rmtree(folder)
    assert outcomes == {"interrupted", "complete", "unchanged"}


def half_patched(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A folder whose in-place patch died between its two shards, and the original."""
    base = small_checkpoint(tmp_path / "m")
    pristine, original = disk(base), weights(base)
    update = random_update(base, ADDRESSES)
    edited = weights(patch(base, update, tmp_path / "reference").path)
    for run in each_fault(crash=True):
        folder = tmp_path / "half"
        shutil.copytree(base, folder)
        run(lambda folder=folder: patch(folder, update))
        now = weights(folder)
        changed = [name for name in now if now[name] != original[name]]
        if len(changed) == 1 and now[changed[0]] == edited[changed[0]]:
            return folder, pristine
        shutil.rmtree(folder)
    raise AssertionError("no crash left one shard of two replaced")


def _is_patching(folder: Path) -> bool:
    journal = read_journal(folder)
    return journal is not None and journal.patching


@pytest.mark.parametrize("undo", [False, True])
@pytest.mark.parametrize("crash", [False, True])
def test_recovery_may_be_interrupted_too(
    tmp_path: Path, crash: bool, undo: bool
) -> None:
    half, pristine = half_patched(tmp_path)
    complete = disk(tmp_path / "reference")
    finished = 0
    for number, run in enumerate(each_fault(crash=crash)):
        folder = tmp_path / f"f{number}"
        shutil.copytree(half, folder)
        run(lambda folder=folder: recover(folder, undo=undo))
        if is_interrupted(folder):
            recover(folder, undo=undo and _is_patching(folder))
        else:
            finished += 1
            recover(folder)
        assert disk(folder) in (pristine, complete)
        # What is undone is undone: only finishing may end in the other state.
        assert disk(folder) == pristine or not undo
        shutil.rmtree(folder)
    assert finished


def test_foreign_change_in_a_half_patched_folder_is_not_overwritten(
    tmp_path: Path,
) -> None:
    half, pristine = half_patched(tmp_path)
    shard = half / "model-2.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    damaged = weights(half)
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors: was changed"):
        recover(half, undo=True)
    assert weights(half) == damaged and is_interrupted(half)
    shard.write_bytes(good)
    recover(half, undo=True)
    assert disk(half) == pristine


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "other"}', "\x00"])
def test_unreadable_journal_is_no_licence_to_guess(
    tmp_path: Path, content: str
) -> None:
    base = small_checkpoint(tmp_path / "m")
    (base / JOURNAL.parent).mkdir()
    (base / JOURNAL).write_text(content)
    before = disk(base)
    assert is_interrupted(base)
    with pytest.raises(CheckpointError, match=r"journal\.json: not what"):
        recover(base)
    assert disk(base) == before


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EIO])
def test_the_error_says_why(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small_checkpoint(tmp_path / "m")
    update = random_update(base, ADDRESSES)
    pristine = disk(tmp_path)
    real = os.open

    def refuse(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(code, os.strerror(code), str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    for out in (None, tmp_path / "out"):
        with pytest.raises(CheckpointError, match=f"cannot be .*{os.strerror(code)}"):
            patch(base, update, out)
    assert disk(tmp_path) == pristine


def test_two_writers_are_kept_apart(tmp_path: Path) -> None:
    base = small_checkpoint(tmp_path / "m")
    update = random_update(base, ADDRESSES)
    out = patch(base, update, tmp_path / "out").path
    before = disk(tmp_path)
    with locked(out / LOCK), locked(tmp_path / ".new.unified-edit-lock"):
        for command in (
            lambda: patch(out, update),
            lambda: patch(out, update, tmp_path / "other"),
            lambda: patch(base, update, tmp_path / "new"),
            lambda: revert(out),
            lambda: verify(out),
            lambda: history(out),
        ):
            with pytest.raises(CheckpointError, match="another process is writing"):
                command()
    assert disk(tmp_path) == before


def test_lock_file_of_a_dead_process_is_no_obstacle(tmp_path: Path) -> None:
    base = small_checkpoint(tmp_path / "m")
    pristine = disk(base)
    (base / LOCK).touch()
    patched = patch(base, random_update(base, ADDRESSES))
    assert not (base / LOCK).exists()
    (base / LOCK).touch()
    assert patched.verify().ok
    patched.revert()
    assert disk(base) == pristine


def test_racing_threads_make_one_folder(tmp_path: Path) -> None:
    base = small_checkpoint(tmp_path / "m")
    update = random_update(base, ADDRESSES)
    results: list[Patched | CheckpointError] = []
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        try:
            results.append(patch(base, update, tmp_path / "out"))
        except CheckpointError as error:
            results.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [result for result in results if isinstance(result, Patched)]
    assert len(results) == 4 and len(winners) == 1
    assert winners[0].verify().ok
    assert {path.name for path in tmp_path.iterdir()} == {"m", "out"}


def test_base_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small_checkpoint(tmp_path / "m")
    real = patch_module.write_staged

    def meddling(*args: Any) -> Any:
        (base / "README.md").write_text("changed meanwhile\n")
        return real(*args)

    monkeypatch.setattr(patch_module, "write_staged", meddling)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        patch(base, random_update(base, ADDRESSES), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"m"}


def test_journal_and_undo_are_on_disk_before_the_first_file_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And everything that is moved into place was fsynced, its folder afterwards."""
    base = small_checkpoint(tmp_path / "m")
    update = random_update(base, ADDRESSES)
    synced: set[tuple[int, int]] = set()
    moves: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        status = os.fstat(descriptor)
        synced.add((status.st_dev, status.st_ino))

    def replace(source: Path, target: Path) -> None:
        status = os.stat(source)
        assert (status.st_dev, status.st_ino) in synced, source
        if Path(target).parent == base:
            journal = json.loads((base / JOURNAL).read_text())
            record = (journal["after"] or journal["before"])["updates"][0]
            undo = base / ".unified-edit" / record["undo"]
            assert sha256_of(undo) == record["undo_sha256"]
            for path in (undo, base / JOURNAL, undo.parent):
                status = os.stat(path)
                assert (status.st_dev, status.st_ino) in synced, path
        moves.append(Path(target).name)
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    patch(base, update)
    shards = ["model-1.safetensors", "model-2.safetensors"]
    assert moves == [
        *("journal.json", *shards),
        "manifest.json",
    ]
    moves.clear()
    revert(base)
    assert moves == ["journal.json", *shards]
