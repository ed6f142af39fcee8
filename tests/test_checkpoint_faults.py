"""A failure of every file-system call in turn, reads as well as writes.

Each command is run once to count its calls on files below the test's folder, through
`os`, `fcntl`, `mmap` and opened files; Python's audit events tell that none is missed.
Then each of these calls fails once, and the next one works again. Each call gets one of
EIO, ENOSPC and EACCES in turn, and each place in the sources that makes calls gets all
three in each command.
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
from unified_edit.checkpoint.journal import read_journal
from unified_edit.checkpoint.manifest import JOURNAL
from unified_edit.checkpoint.patch import history, patch, recover, revert, verify
from unified_edit.checkpoint.verify import VerifyReport
from unified_edit.errors import CheckpointError
from unified_edit.loading import Source

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
        self.count = 0
        self.calls: list[Call] = []
        self.functions: list[frozenset[str]] = []
        """What was running at each call; both are kept where none fails."""
        self.failed = self.struck = ""
        """The call that failed, and the same in words."""
        self.running: frozenset[str] = frozenset()
        """What was running then."""
        self.opened: dict[int, str] = {}
        """Descriptors that are open, and their paths."""
        self.written: set[int] = set()
        """Those of them that are open for writing."""
        self.escaped: list[tuple[str, str]] = []
        """What was done below the root without being counted."""
        self._within = 0

    def meet(self, name: str, path: str) -> bool:
        """Counts a call; whether it is to fail."""
        at, self.count = self.count, self.count + 1
        if self.at not in (None, at):
            return False
        self.running, place = _stack()
        if self.at is None:
            self.calls.append((name, place))
            self.functions.append(self.running)
            return False
        self.failed = name
        below, error = path[len(self.root) + 1 :], errno.errorcode[self.code]
        self.struck = f"{error}: {name} of {below} at {place}"
        return True

    @property
    def may_be_overlooked(self) -> bool:
        """Whether the call that failed is one whose failure changes nothing."""
        functions, name = self.running, self.failed
        return (
            # The change is complete; the next command tidies up.
            {"finish", "discard_leftovers"} <= functions
            or ("locked" in functions and name == "unlink")
            # Only to name the same file differently.
            or bool({"resolve", "realpath"} & functions)
            # Whether something is in the way: the rename refuses it, too.
            or ("_check_target" in functions and name == "lstat")
            # Whether os.walk meets a symlink: what uses it looks itself.
            or ("islink" in functions and bool({"walk", "_walk"} & functions))
            # Path.mkdir: it was there already.
            or "mkdir" in functions
        )

    def error(self, path: str) -> OSError:
        return OSError(self.code, os.strerror(self.code), path)

    def path_of(self, target: Any, dir_fd: int | None = None) -> str | None:
        """The absolute path that is meant, if it lies below the root."""
        if isinstance(target, int):
            return self.opened.get(target)
        path = os.fsdecode(target)
        if dir_fd is not None:
            path = os.path.join(self.opened.get(dir_fd, ""), path)
        below = path == self.root or path.startswith(self.root + os.sep)
        return path if below else None

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
            if name == "close" and args[0] not in self.written:  # nothing can go wrong
                del self.opened[args[0]]
                return real(*args)
            with self.within():
                if self.meet(name, path):
                    if name == "access":
                        return False
                    if name == "write":  # half of it reaches the disk
                        real(args[0], args[1][: len(args[1]) // 2])
                    if name == "close":  # as Linux does
                        real(*args)
                        del self.opened[args[0]]
                        self.written.remove(args[0])
                    raise self.error(path)
                result = real(*args, **kwargs)
                if name == "open":
                    self.opened[result] = path
                    if args[1] & (os.O_WRONLY | os.O_RDWR):
                        self.written.add(result)
                elif name == "close":
                    del self.opened[args[0]]
                    self.written.remove(args[0])
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


def _stack() -> tuple[frozenset[str], str]:
    """The functions that are running, and the file and line of the sources among
    them from where the call comes."""
    functions, place, frame = set(), "", sys._getframe(2)
    while frame.f_code is not struck.__code__:
        functions.add(frame.f_code.co_name)
        if not place and frame.f_code.co_filename.startswith(SOURCES):
            place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        assert frame.f_back is not None
        frame = frame.f_back
    return frozenset(functions), place


_REAL_OPEN, _REAL_FILE = io.open, io.FileIO
_watched: list[Faults] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    for faults in _watched:
        faults.see(event, arguments)


sys.addaudithook(_audit)


@pytest.fixture(autouse=True)
def reflinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that can share blocks; here, what is shared is copied."""

    def clone(target: int, request: int, source: int) -> int:
        os.sendfile(target, source, 0, os.fstat(source).st_size)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", clone)


@contextmanager
def injected(faults: Faults) -> Iterator[None]:
    """Here the calls are counted and fail."""
    # Python 3.10's pathlib has calls of its own.
    accessor = getattr(pathlib, "_NormalAccessor", None)
    with pytest.MonkeyPatch.context() as patching:
        for name in CALLS:
            call = faults.wrap(name, getattr(os, name))
            patching.setattr(os, name, call)
            if name in vars(accessor or object):
                patching.setattr(accessor, name, staticmethod(call))
        patching.setattr(fcntl, "flock", faults.wrap("flock", fcntl.flock))
        patching.setattr(fcntl, "ioctl", faults.wrap("ioctl", fcntl.ioctl))
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
    twice = world.copy("once", place / "twice")
    patch(twice, world.updates[1])
    half = world.copy("once", place / "half")
    half_changed(half, lambda: patch(half, world.updates[1]))
    back = world.copy("twice", place / "back")
    half_changed(back, lambda: revert(back))
    early = world.copy("half", place / "early")
    shutil.copy2(once / "model-1.safetensors", early)
    (early / STATE / JOURNAL).unlink()
    # Patches the first shard alone: the second is linked.
    world.updates.append(random_update(plain, ADDRESSES[:1]))
    patch(plain, world.updates[2], place / "linked", unchanged="hardlink")
    patch(once, world.updates[1], place / "copied")
    world.disks = {path.name: disk(path) for path in place.iterdir()}
    assert world.disks["half"].keys() > world.disks["twice"].keys()
    assert world.disks["early"].keys() > world.disks["once"].keys()
    return world


@dataclass(frozen=True)
class Operation:
    """A command that changes the folder `m`, or makes the folder `out` beside it."""

    begin: str
    """What `m` is before."""
    end: str
    """What becomes of `m`, or what `out` is."""
    run: Callable[[World, Path], object]
    """The command, for the folder around both."""
    within: str = ""
    """The function in which calls fail; what is around it is another operation's."""

    @property
    def new(self) -> bool:
        """Whether it makes a new folder."""
        return self.end in ("copied", "linked")


def _linked(unchanged: Any) -> Callable[[World, Path], object]:
    return lambda world, path: patch(
        path / "m", world.updates[2], path / "out", unchanged=unchanged
    )


OPERATIONS = {
    "new folder": Operation(
        "once",
        "copied",
        lambda world, path: patch(path / "m", world.updates[1], path / "out"),
    ),
    "new folder, hardlink": Operation(
        "plain", "linked", _linked("hardlink"), "hard_link"
    ),
    "new folder, reflink": Operation("plain", "linked", _linked("reflink"), "reflink"),
    "in place": Operation(
        "plain", "once", lambda world, path: patch(path / "m", world.updates[0])
    ),
    "in place, on leftovers": Operation(
        "early",
        "twice",
        lambda world, path: patch(path / "m", world.updates[1]),
        "discard_leftovers",
    ),
    "revert": Operation("twice", "once", lambda world, path: revert(path / "m")),
    "revert all": Operation(
        "twice", "plain", lambda world, path: revert(path / "m", all_updates=True)
    ),
    "recover: finish a patch": Operation(
        "half", "twice", lambda world, path: recover(path / "m")
    ),
    "recover: undo a patch": Operation(
        "half", "once", lambda world, path: recover(path / "m", undo=True)
    ),
    "recover: finish a revert": Operation(
        "back", "once", lambda world, path: recover(path / "m")
    ),
    "recover: leftovers": Operation(
        "early", "once", lambda world, path: recover(path / "m")
    ),
}
STAGING, OUTER_LOCK = ".out.unified-edit-staging", ".out.unified-edit-lock"


def begun(world: World, operation: Operation, path: Path) -> None:
    """Puts there what the operation begins with, where it is not there already."""
    if not (path / "m").exists():
        world.copy(operation.begin, path / "m")
    if operation.new and not (path / STAGING).exists():  # somebody died here before
        shutil.copytree(path / "m" / "extra", path / STAGING / "extra")
        (path / OUTER_LOCK).touch()


def struck(action: Callable[[], object], faults: Faults) -> CheckpointError | None:
    """Runs it while a call fails; what it raises."""
    with injected(faults):
        try:
            action()
            raised = None
        except CheckpointError as error:
            raised = error
    assert not faults.escaped, "not counted"
    assert not faults.opened, f"left open: {faults.opened}"
    if faults.at is not None:
        assert faults.struck, "the call was not reached"
        if raised is None:
            assert faults.may_be_overlooked, "went unnoticed"
        elif not faults.may_be_overlooked and faults.failed != "access":
            assert os.strerror(faults.code) in str(raised), f"says: {raised}"
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


def in_turn(
    path: Path,
    begin: Callable[[], object],
    action: Callable[[], object],
    judge: Callable[[CheckpointError | None, Faults, int], str],
    *,
    within: str = "",
    refused: bool = False,
) -> str:
    """Lets each call of `action` fail in turn, and judges what that did.

    Args:
        path: a folder in which `begin` makes what `action` works on, if it is not
            there already.
        judge: asserts and names the state; gets a number, too.
        within: only calls in this function.
        refused: without any failure, too, `action` raises.

    Returns:
        What was counted, in words.
    """
    begin()
    counted = Faults(path)
    assert (struck(action, counted) is not None) == refused
    runs = [
        (at, code)
        for at, code in schedule(counted.calls)
        if within in ("", *counted.functions[at])
    ]
    states: Counter[str] = Counter()
    problems: dict[str, str] = {}
    fresh = False
    for number, (at, code) in enumerate(runs):
        if not fresh:
            shutil.rmtree(path)
            path.mkdir()
        begin()
        faults = Faults(path, at, code)
        try:
            states[judge(struck(action, faults), faults, number)] += 1
            fresh = True
        except Exception as error:  # all of them are told
            reason = [*str(error).splitlines(), ""][0]
            problems[faults.struck] = f"{type(error).__name__}: {reason}"
            fresh = False
    listed = "\n".join(f"{call}: {reason}" for call, reason in problems.items())
    assert not problems, f"{len(problems)} of {len(runs)} failures:\n{listed}"
    assert {code for _, code in runs} == {*ERRORS}
    told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    calls = len({at for at, _ in runs})
    return f"{calls} calls, {len(runs)} failures: {told}"


def after_new_folder(
    world: World, operation: Operation, path: Path, raised: bool, number: int
) -> str:
    """Asserts that `out` is there as a whole or not at all, and names which."""
    base, out = path / "m", path / "out"
    assert disk(base) == world.disks[operation.begin], "the base"
    left = {each.name for each in path.iterdir()} - {"m"}
    if "out" in left:
        assert disk(out) == world.disks[operation.end], "incomplete"
        assert left <= {"out", OUTER_LOCK}, left
        shutil.rmtree(out)
        (path / OUTER_LOCK).unlink(missing_ok=True)
        return "complete, but raised" if raised else "complete"
    assert raised, "nothing was made"
    # At most what had been there before.
    assert left <= {STAGING, OUTER_LOCK}, left
    assert {*disk(path / STAGING)} <= {"extra", "extra/merges.txt"}
    if number % 4 == 0:
        operation.run(world, path)
        assert disk(out) == world.disks[operation.end], "made again"
        shutil.rmtree(out)
    elif left:
        assert recover(out).action == "removed"
    assert [each.name for each in path.iterdir()] == ["m"], "leftovers"
    return "absent"


def after_in_place(
    world: World, operation: Operation, path: Path, faults: Faults, number: int
) -> str:
    """Asserts that `m` is as before, as a whole what it should become, or says that
    it is neither; and that all is well after a recovery."""
    folder = path / "m"
    if is_interrupted(folder):
        journal = read_journal(folder)
        assert journal is not None
        undo = journal.patching and number % 2 == 0
        done = recover(folder, undo=undo)
        if done.action == "undone" and not undo:
            # The recovery that failed was to undo: what was staged is gone.
            assert operation.begin == "half" and operation.end == "once"
        ahead = journal.before if done.action == "undone" else journal.after
        name = STATES[len(ahead.updates) if ahead else 0]
        assert disk(folder) == world.disks[name], "recovered"
        shutil.rmtree(folder)
        return "interrupted"
    before, complete = dict(world.disks[operation.begin]), world.disks[operation.end]
    now = disk(folder)
    if now.pop(LOCK, None) is not None:
        assert LOCK in before or LOCK in faults.struck, "its lock"
    before.pop(LOCK, None)
    state = "complete" if now == complete else "unchanged"
    if now not in (before, complete):
        finishing = "finish" in faults.running
        assert finishing or operation.begin == "early", "neither nor"
        recover(folder)
        now = disk(folder)
        clean = {"early": "once"}.get(operation.begin, operation.begin)
        assert now in (world.disks[clean], complete), "neither nor, after a recovery"
        state = "complete" if now == complete else "unchanged"
        state += ", untidy"
    if now == complete:
        shutil.rmtree(folder)
    elif number % 4 == 0 or "untidy" in state:
        operation.run(world, path)
        assert disk(folder) == complete, "done again"
        shutil.rmtree(folder)
    return state


STATES = ("plain", "once", "twice")
"""By the number of updates."""


@pytest.mark.parametrize("name", OPERATIONS)
def test_whatever_fails(
    name: str, world: World, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    operation, path = OPERATIONS[name], tmp_path / "here"
    path.mkdir()

    def judge(raised: CheckpointError | None, faults: Faults, number: int) -> str:
        if operation.new:
            return after_new_folder(world, operation, path, bool(raised), number)
        state = after_in_place(world, operation, path, faults, number)
        assert raised or state.startswith("complete"), state
        return f"{state}, but raised" if raised and "complete" in state else state

    told = in_turn(
        path,
        lambda: begun(world, operation, path),
        lambda: operation.run(world, path),
        judge,
        within=operation.within,
    )
    tell(f"{name}: {told}")


def test_recovery_of_a_new_folder(
    world: World, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    """What a dead process left beside the place of a folder that it did not make."""
    path = tmp_path / "here"
    path.mkdir()

    def judge(raised: CheckpointError | None, faults: Faults, number: int) -> str:
        left = {each.name for each in path.iterdir()} - {"m"}
        if raised is None:
            assert left <= ({OUTER_LOCK} if faults.may_be_overlooked else set())
        if left:
            assert recover(path / "out").action == "removed"
        assert [each.name for each in path.iterdir()] == ["m"]
        state = "left" if STAGING in left else "removed"
        return f"{state}, but raised" if raised and state == "removed" else state

    operation = OPERATIONS["new folder"]
    told = in_turn(
        path,
        lambda: begun(world, operation, path),
        lambda: recover(path / "out"),
        judge,
    )
    tell(f"recover: a new folder: {told}")


READERS: dict[str, Callable[[World, Path], object]] = {
    "history": lambda world, path: history(path / "m"),
    "verify": lambda world, path: verify(path / "m", world.place / "plain"),
    "load": lambda world, path: Source.of(str(path / "m")),
    "patch": lambda world, path: patch(path / "m", world.updates[1]),
    "patch, new folder": OPERATIONS["new folder"].run,
    "revert": OPERATIONS["revert"].run,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("begin", ["half", "back"])
def test_a_half_changed_folder_is_never_taken_for_a_whole_one(
    begin: str,
    name: str,
    world: World,
    tmp_path: Path,
    tell: Callable[[str], None],
) -> None:
    path = tmp_path / "here"
    path.mkdir()

    def judge(raised: CheckpointError | None, faults: Faults, number: int) -> str:
        assert raised, "was taken for a whole one"
        now, before = disk(path / "m"), world.disks[begin]
        # The lock of the dead may be gone.
        assert [each.name for each in path.iterdir()] == ["m"]
        assert {**now, LOCK: before[LOCK]} == before, "was changed"
        return "refused"

    told = in_turn(
        path,
        lambda: (path / "m").exists() or world.copy(begin, path / "m"),
        lambda: READERS[name](world, path),
        judge,
        refused=True,
    )
    tell(f"{name} of a half-changed folder: {told}")


def test_verification_never_says_that_all_is_well_unless_it_read_all(
    world: World, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    path = tmp_path / "here"
    path.mkdir()
    reports: list[VerifyReport] = []

    def action() -> None:
        reports.clear()
        reports.append(verify(path / "m"))
        if not reports[0].ok:  # said in another way
            raise CheckpointError("; ".join(reports[0].problems))

    def judge(raised: CheckpointError | None, faults: Faults, number: int) -> str:
        assert disk(path / "m") == world.disks["twice"]
        return "well" if raised is None else "said" if reports else "raised"

    told = in_turn(
        path,
        lambda: (path / "m").exists() or world.copy("twice", path / "m"),
        action,
        judge,
    )
    tell(f"verify: {told}")
