"""The few file operations that the checkpoint package is made of.

Everything that changes the disk goes through here: new files are created exclusively
and never through a symlink, hashed as they are written, and fsynced before they count.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from unified_edit.errors import CheckpointError

STATE = ".unified-edit"
"""Folder inside a patched checkpoint that holds its manifest, updates and undo data."""
LOCK = ".unified-edit.lock"
"""Lock file inside a checkpoint while it is written in place."""
NOT_CHECKPOINT = frozenset({STATE, LOCK, ".git"})
"""Top-level names that are no part of a checkpoint's content."""
_CHUNK = 4 << 20
_FICLONE = 0x40049409
"""Linux's ioctl that shares one file's blocks with another."""
_CANNOT_LINK = frozenset(
    {
        *(errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOTTY),
        *(errno.EINVAL, errno.ENOSYS),
    }
)


@contextmanager
def undone(undo: Callable[[], None]) -> Iterator[None]:
    """Runs `undo` if an exception comes through; its own failure does not hide that
    exception, and leaves only files that the next command removes."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            undo()
        raise


@contextmanager
def reported(task: str) -> Iterator[None]:
    """Turns an OSError into a CheckpointError that says what was being done."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        where = "" if error.filename is None else f" ({error.filename})"
        raise CheckpointError(f"{task}: {reason}{where}") from error


class NewFile:
    """A file that did not exist: written once, hashed on the way, fsynced at the end.

    Used as a context manager; a file left by an exception is not fsynced and is the
    caller's to remove.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self.descriptor = os.open(path, flags, 0o666)
        self.digest = hashlib.sha256()

    def __enter__(self) -> NewFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    def finish(self) -> None:
        """Makes it durable, and closes it."""
        os.fsync(self.descriptor)
        self.close()

    def close(self) -> None:
        """Closes it; a second time does nothing."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.digest.update(data)
        view = memoryview(data)
        while view:
            view = view[os.write(self.descriptor, view) :]


def open_regular(path: Path) -> FileIO:
    """Opens a file to read it; never waits for a pipe or reads from a device.

    Raises:
        CheckpointError: no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(f"{path}: no regular file; put the file itself there")
        file = FileIO(descriptor, closefd=True)
    except BaseException:
        os.close(descriptor)
        raise
    file.name = str(path)
    return file


def hard_link(source: Path, target: Path) -> None:
    """Makes `target` another name of the file `source`; reads nothing.

    Raises:
        CheckpointError: `source` is a symlink, or the file system cannot.
    """
    if source.is_symlink():
        raise CheckpointError(
            f"{source}: is a symlink, as in a download cache that others share, and is "
            "not linked through; copy the unchanged files, or reflink them"
        )
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        raise CheckpointError(
            f"{source}: cannot be hard-linked to {target.parent} ({error.strerror}); "
            "choose a place on the same file system, or copy the unchanged files"
        ) from error


def reflink(source: Path, target: Path) -> None:
    """Makes `target` a file of its own that shares `source`'s blocks until one of them
    is written to; reads nothing. Keeps the mode bits.

    Raises:
        CheckpointError: the file system cannot.
    """
    with open_regular(source) as old, NewFile(target) as new:
        os.fchmod(new.descriptor, stat.S_IMODE(os.fstat(old.fileno()).st_mode))
        try:
            fcntl.ioctl(new.descriptor, _FICLONE, old.fileno())
        except OSError as error:
            if error.errno not in _CANNOT_LINK:
                raise
            raise CheckpointError(
                f"{source}: this file system cannot share blocks between files "
                f"({error.strerror}); hard-link the unchanged files, or copy them"
            ) from error


def read_at(file: FileIO, begin: int, end: int) -> bytearray:
    """The bytes of a range; does not move the file's position.

    Raises:
        CheckpointError: the file ends before.
    """
    data = bytearray(end - begin)
    read_into(file, begin, memoryview(data))
    return data


def read_into(file: FileIO, begin: int, view: memoryview) -> None:
    """`read_at` into memory that is there."""
    while view:
        got = os.preadv(file.fileno(), [view], begin)
        if not got:
            name = getattr(file, "name", "file")
            raise CheckpointError(f"{name}: ended {len(view)} bytes too early")
        view, begin = view[got:], begin + got


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while data := file.read(_CHUNK):
            digest.update(data)
    return digest.hexdigest()


def write_json(path: Path, data: Mapping[str, Any], *, readable: bool = False) -> None:
    """Puts a JSON file in place in one step; same data, same bytes.

    Args:
        readable: letters beyond ASCII as they are; the data must be valid texts.
    """
    text = json.dumps(
        data, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=not readable
    )
    replace(stage(path, text.encode() + b"\n"), path)


def stage(path: Path, data: bytes) -> Path:
    """Writes what is to become the file `path` beside it; returns where."""
    staged = path.with_name(f".{path.name}.tmp")
    staged.unlink(missing_ok=True)
    with NewFile(staged) as file:
        file.write(data)
    return staged


def replace(staged: Path, target: Path) -> None:
    """Moves a complete, fsynced file over `target`, and makes the move durable."""
    os.replace(staged, target)
    sync_folder(target.parent)


def remove(path: Path) -> None:
    """Removes a file, if there is one, and makes that durable."""
    if present(path):
        path.unlink()
        sync_folder(path.parent)


def present(path: Path) -> bool:
    """Whether there is anything of this name. Unlike `exists`, which takes any error
    for a no, raises OSError if it cannot be told."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def remove_tree(path: Path) -> None:
    """Removes a folder of ours (never what a symlink points to), if there is one.
    What makes a loader take it for a model goes first."""
    if not present(path):
        return
    if stat.S_ISDIR(os.lstat(path).st_mode):
        for name in ("config.json", "adapter_config.json"):
            (path / name).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink()


def sync_folder(path: Path) -> None:
    """fsyncs a folder, so that the names in it survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """fsyncs a folder and the folders below it; the files were fsynced when written."""
    for folder, _, _ in os.walk(path, onerror=_raise):
        sync_folder(Path(folder))


def _raise(error: OSError) -> None:
    raise error


def listing(folder: Path) -> list[str]:
    """Relative names of a checkpoint's files, sorted, `/` between folders. Leaves out
    this package's own files and `.git`.

    Raises:
        CheckpointError: something that is neither a file nor a folder, or a folder
            behind a symlink.
    """
    names = []
    with reported(f"{folder}: cannot be read"):
        for parent, folders, files in os.walk(folder, onerror=_raise):
            if Path(parent) == folder:
                folders[:] = [name for name in folders if name not in NOT_CHECKPOINT]
                files = [name for name in files if name not in NOT_CHECKPOINT]
            for name in folders:
                if (Path(parent) / name).is_symlink():
                    raise CheckpointError(
                        f"{Path(parent) / name}: a folder behind a symlink; put the "
                        "folder itself in its place, or remove it"
                    )
            for name in files:
                path = Path(parent) / name
                if not path.is_file():
                    raise CheckpointError(
                        f"{path}: a broken symlink or no regular file; remove it"
                    )
                names.append(path.relative_to(folder).as_posix())
    return sorted(names)


def states_of(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of change of each file; equal twice: nobody wrote them."""
    found = {}
    for name in names:
        status = (folder / name).stat()
        found[name] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file `path` while it runs, and removes it afterwards.

    Raises:
        CheckpointError: somebody else holds it.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _still_there(path, descriptor):
                break
        except BlockingIOError as error:
            os.close(descriptor)
            raise _in_use(path) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        yield
    finally:
        try:
            with suppress(OSError):  # a lock file that nobody holds is harmless
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _still_there(path: Path, descriptor: int) -> bool:
    """False if the last holder removed the file between our opening and locking it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def refuse_if_locked(path: Path) -> None:
    """For readers: an error if a writer holds the lock file `path`."""
    try:
        descriptor = os.open(
            path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        )
    except FileNotFoundError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _in_use(path) from error
    finally:
        os.close(descriptor)


def _in_use(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: another process is writing this checkpoint; wait until it is done"
    )
