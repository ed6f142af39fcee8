"""A failure of every file-system call in turn, reads as well as writes.

Each command is run once to count its calls on files below the test's folder, through
`os`, `fcntl`, `mmap` and opened files. Then each of these calls fails once, and the next
one works again: the n-th call of a command gets EIO, ENOSPC or EACCES in turn, and each
place in the sources that makes calls gets all three in each command.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import itertools
import mmap
import os
import pathlib
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from checkpoint_kit import disk, half_changed, quick_fsync, random_update  # noqa: F401
from test_checkpoint_crash import ADDRESSES, is_interrupted, small_checkpoint

from unified_edit.algebra.update import UpdateSet
from unified_edit.checkpoint import files
from unified_edit.checkpoint.files import LOCK, STATE
from unified_edit.checkpoint.patch import history, patch, recover, revert, verify
from unified_edit.errors import CheckpointError

ERRORS = (errno.EIO, errno.ENOSPC, errno.EACCES)
CALLS = [
    *("open", "read", "write", "fsync", "fchmod", "close", "access", "readlink"),
    *("replace", "rename", "mkdir", "unlink", "remove", "rmdir", "link", "symlink"),
    *("stat", "lstat", "fstat", "scandir", "listdir", "truncate", "utime", "chmod"),
]
"""Of `os`."""
SOURCES = str(Path(patch.__code__.co_filename).parent.parent)

Call = tuple[str, str]
"""What was called, and the file and line of the sources that did."""


class Faults:
    """Counts the calls on paths below `root`, and lets the `at`-th of them fail."""

    def __init__(self, root: Path, at: int | None = None, code: int = 0) -> None:
        self.root, self.at, self.code = str(root), at, code
        self.calls: list[Call] = []
        self.struck: tuple[str, str, str] | None = None
        """The call that failed, its path below the root, and its place."""
        self.opened: dict[int, str] = {}
        """Descriptors that are open, and their paths."""
        self.escaped: list[tuple[str, str]] = []
        """What was done below the root without being counted."""
        self._within = 0

    def meet(self, name: str, path: str) -> bool:
        """Counts a call; whether it is to fail."""
        at = len(self.calls)
        self.calls.append((name, _place()))
        if at != self.at:
            return False
        self.struck = (name, path[len(self.root) + 1 :], self.calls[at][1])
        return True

    def error(self, path: str) -> OSError:
        return OSError(self.code, os.strerror(self.code), path)

    def path_of(self, target: Any, dir_fd: int | None = None) -> str | None:
        """The absolute path that is meant, if it lies below the root."""
        if isinstance(target, int):
            return self.opened.get(target)
        path = os.fsdecode(os.fspath(target))
        if dir_fd is not None:
            path = os.path.join(self.opened.get(dir_fd, ""), path)
        path = os.path.abspath(path)
        return path if path == self.root or self._is_below(path) else None

    def _is_below(self, path: str) -> bool:
        return path.startswith(self.root + os.sep)

    @contextmanager
    def within(self) -> Iterator[None]:
        self._within += 1
        try:
            yield
        finally:
            self._within -= 1

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            path = self.path_of(args[0] if args else ".", kwargs.get("dir_fd"))
            if path is None:
                return real(*args, **kwargs)
            with self.within():
                if self.meet(name, path):
                    if name == "access":
                        return False
                    if name == "write":  # half of it reaches the disk
                        real(args[0], args[1][: len(args[1]) // 2])
                    if name == "close":  # as Linux does
                        real(*args)
                        del self.opened[args[0]]
                    raise self.error(path)
                result = real(*args, **kwargs)
                if name == "open":
                    self.opened[result] = path
                elif name == "close":
                    del self.opened[args[0]]
                return _Entries(self, path, result) if name == "scandir" else result

        return call

    def open(self, file: Any, mode: str = "r", buffering: int = -1, **more: Any) -> Any:
        """For `io.open`: a file whose every operation is counted."""
        path = self.path_of(file)
        if path is None:
            return _REAL_OPEN(file, mode, buffering, **more)
        assert mode == "rb", "written files are opened by os.open"
        with self.within():
            if self.meet("open", path):
                raise self.error(path)
            raw = _File(self, path, path)
        return raw if buffering == 0 else io.BufferedReader(raw)

    def file(self, file: Any, mode: str = "r", *args: Any, **more: Any) -> io.FileIO:
        """For `io.FileIO`, of a descriptor that was counted when it was opened."""
        path = self.path_of(file)
        if path is None:
            return _REAL_FILE(file, mode, *args, **more)
        assert isinstance(file, int) and mode == "r"
        with self.within():
            return _File(self, path, file)

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Python tells of what it is about to do."""
        audited = ("open", "os.", "fcntl.", "mmap.")
        # os.walk only announces calls that are counted.
        if self._within or not event.startswith(audited) or event == "os.walk":
            return
        if arguments and isinstance(arguments[0], int | str | bytes | os.PathLike):
            path = self.path_of(arguments[0])
            if path is not None:
                self.escaped.append((event, path))


class _Entries:
    """What `os.scandir` gives: reading the folder may fail too."""

    def __init__(self, faults: Faults, path: str, entries: Any) -> None:
        self.faults, self.path, self.entries = faults, path, entries
        self.begun = False

    def __enter__(self) -> _Entries:
        return self

    def __exit__(self, *_: object) -> None:
        self.entries.close()

    def close(self) -> None:
        self.entries.close()

    def __iter__(self) -> _Entries:
        return self

    def __next__(self) -> os.DirEntry[str]:
        if not self.begun:
            self.begun = True
            if self.faults.meet("readdir", self.path):
                raise self.faults.error(self.path)
        entry: os.DirEntry[str] = next(self.entries)
        return entry


class _File(io.FileIO):
    def __init__(self, faults: Faults, path: str, file: str | int) -> None:
        super().__init__(file, "rb")
        self.faults, self.path = faults, path
        faults.opened[self.fileno()] = path

    def _meet(self, name: str) -> None:
        if self.faults.meet(name, self.path):
            raise self.faults.error(self.path)

    def read(self, size: int | None = -1) -> Any:
        self._meet("read")
        return super().read(-1 if size is None else size)

    def readall(self) -> Any:
        self._meet("read")
        return super().readall()

    def readinto(self, buffer: Any) -> Any:
        self._meet("read")
        return super().readinto(buffer)

    def seek(self, *args: int) -> int:
        self._meet("seek")
        return super().seek(*args)

    def close(self) -> None:
        if not self.closed:
            descriptor = self.fileno()
            super().close()
            del self.faults.opened[descriptor]


def _place() -> str:
    """File and line in the sources from where this was called."""
    frame = sys._getframe(1)
    while not frame.f_code.co_filename.startswith(SOURCES):
        assert frame.f_back is not None
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


_REAL_OPEN, _REAL_FILE = io.open, io.FileIO
_watched: list[Faults] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    for faults in _watched:
        faults.see(event, arguments)


sys.addaudithook(_audit)


@contextmanager
def injected(faults: Faults, *, reflinks: bool) -> Iterator[None]:
    """Here the calls are counted and fail.

    Args:
        reflinks: sharing blocks works, as on file systems that can; here the copy is
            a real one.
    """
    write = os.write

    def clone(target: int, request: int, source: int) -> int:
        while data := os.pread(source, 1 << 20, os.lseek(target, 0, os.SEEK_CUR)):
            write(target, data)
        return 0

    # Python 3.10's pathlib has calls of its own.
    accessor = getattr(pathlib, "_NormalAccessor", None)
    with pytest.MonkeyPatch.context() as patching:
        for name in CALLS:
            call = faults.wrap(name, getattr(os, name))
            patching.setattr(os, name, call)
            if name in vars(accessor or object):
                patching.setattr(accessor, name, staticmethod(call))
        patching.setattr(fcntl, "flock", faults.wrap("flock", fcntl.flock))
        ioctl = clone if reflinks else fcntl.ioctl
        patching.setattr(fcntl, "ioctl", faults.wrap("ioctl", ioctl))
        patching.setattr(mmap, "mmap", faults.wrap("mmap", mmap.mmap))
        patching.setattr(io, "open", faults.open)
        patching.setattr(builtins, "open", faults.open)
        patching.setattr(files, "FileIO", faults.file)
        if accessor is not None:
            patching.setattr(accessor, "open", staticmethod(faults.open))
        _watched.append(faults)
        try:
            yield
        finally:
            _watched.remove(faults)


@dataclass
class World:
    """Folders that commands begin with, and what should become of them."""

    place: Path
    updates: list[UpdateSet] = field(default_factory=list)
    disks: dict[str, dict[str, str]] = field(default_factory=dict)

    def copy(self, name: str, target: Path) -> Path:
        shutil.copytree(self.place / name, target)
        return target


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """`plain`; `once` and `twice` patched; `half` way from once to twice, and `back`;
    `early`: once patched, where another patch died before its journal."""
    world = World(tmp_path_factory.mktemp("world"))
    place = world.place
    plain = small_checkpoint(place / "plain")
    (plain / "extra").mkdir()
    (plain / "extra" / "merges.txt").write_bytes(b"\x00\xff raw")
    once = world.copy("plain", place / "once")
    world.updates.append(random_update(once, ADDRESSES))
    patch(once, world.updates[0])
    world.updates.append(random_update(once, ADDRESSES, seed=1))
    patch(world.copy("once", place / "twice"), world.updates[1])
    half = world.copy("once", place / "half")
    half_changed(half, lambda: patch(half, world.updates[1]))
    back = world.copy("twice", place / "back")
    half_changed(back, lambda: revert(back))
    early = world.copy("half", place / "early")
    for path in once.glob("*.safetensors"):
        shutil.copy2(path, early)
    (early / STATE / "journal.json").unlink()
    # The base's second shard is linked, its first is patched.
    world.updates.append(random_update(plain, ADDRESSES[:1]))
    for unchanged in ("copy", "hardlink"):
        out = place / f"new, {unchanged}"
        patch(plain, world.updates[2], out, unchanged=unchanged)  # type: ignore[arg-type]
    patch(once, world.updates[1], place / "new, twice")
    world.disks = {path.name: disk(path) for path in place.iterdir()}
    return world


@dataclass(frozen=True)
class Operation:
    """A command, in a folder of its own."""

    begin: str
    """The folder that it is given, as `m`."""
    run: Callable[[World, Path], object]
    """The command, for the folder around `m`."""
    end: str
    """What becomes of `m`, or what the new folder `out` becomes."""
    new: bool = False
    """It makes a new folder."""


def _new(unchanged: Any) -> Callable[[World, Path], object]:
    return lambda world, path: patch(
        path / "m", world.updates[2], path / "out", unchanged=unchanged
    )


OPERATIONS = {
    "new folder, copy": Operation("plain", _new("copy"), "new, copy", new=True),
    "new folder, hardlink": Operation(
        "plain", _new("hardlink"), "new, hardlink", new=True
    ),
    "new folder, reflink": Operation(
        "plain", _new("reflink"), "new, hardlink", new=True
    ),
    "new folder, with history": Operation(
        "once",
        lambda world, path: patch(path / "m", world.updates[1], path / "out"),
        "new, twice",
        new=True,
    ),
    "in place": Operation(
        "plain", lambda world, path: patch(path / "m", world.updates[0]), "once"
    ),
    "in place, with history": Operation(
        "once", lambda world, path: patch(path / "m", world.updates[1]), "twice"
    ),
    "in place, after a death": Operation(
        "early", lambda world, path: patch(path / "m", world.updates[1]), "twice"
    ),
    "revert": Operation("twice", lambda world, path: revert(path / "m"), "once"),
    "revert all": Operation(
        "twice", lambda world, path: revert(path / "m", all_updates=True), "plain"
    ),
    "recover a patch": Operation(
        "half", lambda world, path: recover(path / "m"), "twice"
    ),
    "recover, undo": Operation(
        "half", lambda world, path: recover(path / "m", undo=True), "once"
    ),
    "recover a revert": Operation(
        "back", lambda world, path: recover(path / "m"), "once"
    ),
    "recover leftovers": Operation(
        "early", lambda world, path: recover(path / "m"), "once"
    ),
}


def begun(world: World, operation: Operation, path: Path) -> None:
    path.mkdir()
    world.copy(operation.begin, path / "m")
    if operation.new:  # and somebody died here before
        world.copy("half", path / ".out.unified-edit-staging")
        (path / ".out.unified-edit-lock").touch()


def struck(
    action: Callable[[], object], faults: Faults, *, reflinks: bool = True
) -> CheckpointError | None:
    """Runs it while a call fails; what it raises."""
    with injected(faults, reflinks=reflinks):
        try:
            action()
            raised = None
        except CheckpointError as error:
            raised = error
    assert not faults.opened, "left open"
    return raised


def schedule(calls: list[Call]) -> Iterator[tuple[int, int]]:
    """Which call fails, and how: each at least once, each place in every way."""
    turns = {call: itertools.cycle(ERRORS) for call in calls}
    met: Counter[Call] = Counter()
    total = Counter(calls)
    for at, call in enumerate(calls):
        met[call] += 1
        yield at, next(turns[call])
        if met[call] == total[call]:  # the last one here
            for _ in range(total[call], len(ERRORS)):
                yield at, next(turns[call])


@pytest.mark.parametrize("name", OPERATIONS)
def test_explore(world, tmp_path, capsys, name):
    operation = OPERATIONS[name]
    begun(world, operation, tmp_path / "0")
    counted = Faults(tmp_path / "0")
    assert struck(lambda: operation.run(world, tmp_path / "0"), counted) is None
    assert not counted.escaped, counted.escaped
    runs = list(schedule(counted.calls))
    import time
    t = time.time()
    odd = Counter()
    for number, (at, code) in enumerate(runs, 1):
        path = tmp_path / str(number)
        begun(world, operation, path)
        faults = Faults(path, at, code)
        try:
            err = struck(lambda: operation.run(world, path), faults)
        except Exception as e:
            odd[("BARE", repr(e)[:60], *faults.struck)] += 1
            err = e
        if err is None:
            odd[("TOLERATED", *faults.struck)] += 1
        shutil.rmtree(path)
    with capsys.disabled():
        print("\n", name, len(counted.calls), len(runs), len(set(counted.calls)), time.time() - t)
        for k, v in sorted(odd.items()):
            print("   ", v, k)
