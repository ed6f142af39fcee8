"""Copies of files with some byte ranges replaced.

What is only read, hashed and written goes to a second thread, so that a large patch
computes meanwhile: hashing and file operations do not hold the interpreter's lock.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from unified_edit.checkpoint.files import NewFile, open_regular, read_at, read_into

_CHUNK = 1 << 18
LARGE = 64 << 20
"""Bytes from which a second thread is worth it."""


class Background:
    """Runs jobs one after another, on a thread of their own or at once.

    A context manager: leaving it waits for all jobs and raises the first error; after
    an exception jobs that have not begun are dropped. Then it closes what it was told
    to, in either case.
    """

    def __init__(self, *, threaded: bool) -> None:
        self._pool = ThreadPoolExecutor(1) if threaded else None
        self._jobs: deque[Future[None]] = deque()
        self._large: Future[None] | None = None
        self._files = ExitStack()

    def run(self, job: Callable[[], None], *, large: bool = False) -> None:
        """Raises what an earlier job raised.

        Args:
            large: it holds much memory, which `wait_for_memory` waits for.
        """
        if self._pool is None:
            job()
            return
        while self._jobs and self._jobs[0].done():
            self._jobs.popleft().result()
        future = self._pool.submit(job)
        self._jobs.append(future)
        if large:
            self._large = future

    def wait_for_memory(self) -> None:
        """Waits until no job holds much memory."""
        if self._large is not None:
            self._large.result()

    def closing(self, close: Callable[[], None]) -> None:
        """Calls `close` when all is done."""
        self._files.callback(close)

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._files:
            try:
                if kind is None:
                    for job in self._jobs:
                        job.result()
            finally:
                if self._pool is not None:
                    self._pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class Piece:
    """A byte range to be replaced."""

    begin: int
    end: int
    change: Callable[[bytearray], None]
    """Changes its bytes, in place."""
    aside: Callable[[memoryview], None] | None = None
    """Gets the bytes as they were, a part at a time."""


class Spliced:
    """What `splice` found; known once its background is done."""

    def __init__(self, new: NewFile) -> None:
        self._new = new
        self._before: Any = None

    @property
    def before(self) -> str:
        """SHA-256 of the source."""
        return self.after if self._before is None else str(self._before.hexdigest())

    @property
    def after(self) -> str:
        """SHA-256 of the target."""
        return self._new.digest.hexdigest()

    def copy(self, old: FileIO, begin: int, end: int) -> None:
        """Passes a range on."""
        for data in _parts(old, begin, end):
            if self._before is not None:
                self._before.update(data)
            self._new.write(data)

    def take(self, old: FileIO, piece: Piece) -> None:
        """Hashes a range that is going to be replaced."""
        if self._before is None:
            self._before = self._new.digest.copy()
        for data in _parts(old, piece.begin, piece.end):
            self._before.update(data)
            if piece.aside is not None:
                piece.aside(data)


def splice(
    source: Path,
    target: Path,
    pieces: Iterable[Piece] = (),
    background: Background | None = None,
) -> Spliced:
    """Copies `source` to the new file `target` with some byte ranges replaced, in one
    pass; without pieces, a plain copy. Keeps the mode bits.

    Args:
        pieces: in ascending order, without overlap. Only one is in memory at a time.
        background: to read, hash and write in; by default at once. The file is whole
            when it is done.
    """
    if background is None:
        with Background(threaded=False) as at_once:
            return splice(source, target, pieces, at_once)
    old = open_regular(source)
    background.closing(old.close)
    new = NewFile(target)
    background.closing(new.close)
    status = os.fstat(old.fileno())
    os.fchmod(new.descriptor, stat.S_IMODE(status.st_mode))
    found = Spliced(new)
    position = 0
    for piece in pieces:
        background.run(partial(found.copy, old, position, piece.begin))
        background.run(partial(found.take, old, piece))
        data = bytearray()  # gives up the last one
        background.wait_for_memory()
        data = read_at(old, piece.begin, piece.end)
        piece.change(data)
        background.run(partial(new.write, data), large=True)
        position = piece.end
    background.run(partial(found.copy, old, position, status.st_size))
    background.run(partial(_finish, old, new))
    return found


def _parts(old: FileIO, begin: int, end: int) -> Iterable[memoryview]:
    """A range by parts, each to be used before the next is taken."""
    buffer = memoryview(bytearray(min(_CHUNK, end - begin)))
    for start in range(begin, end, _CHUNK):
        part = buffer[: min(end, start + _CHUNK) - start]
        read_into(old, start, part)
        yield part


def _finish(old: FileIO, new: NewFile) -> None:
    new.finish()
    old.close()
