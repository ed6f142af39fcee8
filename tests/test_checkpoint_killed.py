"""Commands that change a checkpoint, killed with SIGKILL at random moments.

A process that has imported everything forks another one for each command, which is
killed after a random part of the time that the command takes. What it leaves must be
the folder as it was, the folder as it should become, or one of which every command
says that it was interrupted, and which a recovery, killed as well or not, makes one of
these.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_kit import (
    disk,
    half_changed,
    quick_fsync,  # noqa: F401
    random_update,
    write_shards,
)
from test_checkpoint_crash import ADDRESSES, is_interrupted

from unified_edit.checkpoint.files import STATE
from unified_edit.checkpoint.journal import read_journal
from unified_edit.checkpoint.manifest import JOURNAL
from unified_edit.checkpoint.patch import patch, recover, revert, verify
from unified_edit.checkpoint.sharded import Checkpoint
from unified_edit.errors import CheckpointError
from unified_edit.loading import Source

pytestmark = pytest.mark.slow

KILLS = 31
"""For each operation: so many that hit it while it ran."""
SPREAD = 1.2
"""Over how much of the usual duration the moments spread: some runs take longer."""
STATES = ("plain", "once", "twice")
"""By the number of updates."""
STAGING, OUTER_LOCK = ".out.unified-edit-staging", ".out.unified-edit-lock"
HEAD_START = 0.003
"""Seconds for which a command waits for who will kill it."""
SERVER = """
import gc, json, os, sys, time
import torch
from unified_edit.algebra.update import UpdateSet
from unified_edit.checkpoint.patch import patch, recover, revert

torch.set_num_threads(1)
updates = [UpdateSet.load(path) for path in sys.argv[1:]]
gc.freeze()
for line in sys.stdin:
    command, arguments, options = json.loads(line)
    process = os.fork()
    if not process:
        try:
            if command == "patch":
                arguments[1] = updates[arguments[1]]
            os.write(1, b"%d\\n" % os.getpid())
            time.sleep(HEAD_START)
            begin = time.perf_counter()
            {"patch": patch, "revert": revert, "recover": recover}[command](
                *arguments, **options
            )
            os.write(1, f"done {time.perf_counter() - begin}\\n".encode())
            os._exit(0)
        except BaseException as error:
            os.write(1, f"{type(error).__name__}: {error}\\n".encode())
            os._exit(1)
    sys.stdin.readline()
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    os.write(1, b"exit %d\\n" % code)
os._exit(0)  # to tidy up would take seconds
"""
"""Runs a command in a process of its own for each line of stdin; another line tells
that the process may be waited for."""


@dataclass
class World:
    """Folders that commands begin with, what should become of them, and the process
    that forks others."""

    place: Path
    server: subprocess.Popen[str]
    updates: list[Any]
    disks: dict[str, dict[str, str]]
    random: random.Random = field(default_factory=lambda: random.Random(2024))

    def copy(self, name: str, target: Path) -> Path:
        shutil.copytree(self.place / name, target)
        return target

    def run(
        self, within: float | None, command: str, *arguments: Any, **options: Any
    ) -> float | None:
        """Runs a command in a new process, and kills that after a random part of
        `within` seconds.

        Returns:
            The seconds that it took; None if it was hit before it was done.
        """
        assert self.server.stdin and self.server.stdout
        given = [str(each) if isinstance(each, Path) else each for each in arguments]
        self.server.stdin.write(json.dumps([command, given, options]) + "\n")
        self.server.stdin.flush()
        process = int(self.server.stdout.readline())
        if within is not None:
            # Later moments more often: files are replaced near the end.
            time.sleep(HEAD_START + within * self.random.random() ** 0.5)
            # It may have ended, but nobody has waited for it: the id is still its own.
            os.kill(process, signal.SIGKILL)
        self.server.stdin.write("\n")
        self.server.stdin.flush()
        said = []
        while not (line := self.server.stdout.readline()).startswith("exit "):
            assert line, "the server died"
            said.append(line)
        if said:
            assert len(said) == 1 and said[0].startswith("done "), said
            return float(said[0].split()[1])
        assert within is not None and int(line.split()[1]) == -signal.SIGKILL
        return None


def checkpoint(folder: Path) -> Path:
    """Three shards, the first two with a tensor to be patched, and sidecar files."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    shards = {
        "model-1.safetensors": {"a": weight(150, 200), "b": weight(30_000)},
        "model-2.safetensors": {"d": weight(30_000), "c": weight(200, 150)},
        "model-3.safetensors": {"e": weight(300, 200)},
    }
    write_shards(folder, shards)
    (folder / "extra").mkdir()
    (folder / "extra" / "merges.txt").write_bytes(b"\x00\xff raw")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """`plain`; `once` and `twice` patched; `half` way from once to twice, and `back`;
    `early`: once patched, where another patch died before its journal."""
    place = tmp_path_factory.mktemp("world")
    plain, once, twice = (place / name for name in STATES)
    checkpoint(plain)
    updates = [random_update(plain, ADDRESSES)]
    shutil.copytree(plain, once)
    patch(once, updates[0])
    updates.append(random_update(once, ADDRESSES, seed=1))
    shutil.copytree(once, twice)
    patch(twice, updates[1])
    half, back, early = (place / name for name in ("half", "back", "early"))
    shutil.copytree(once, half)
    half_changed(half, lambda: patch(half, updates[1]))
    shutil.copytree(twice, back)
    half_changed(back, lambda: revert(back))
    shutil.copytree(half, early)
    shutil.copy2(once / "model-1.safetensors", early)
    (early / STATE / JOURNAL).unlink()
    for unchanged in ("copy", "hardlink"):
        patch(once, updates[1], place / unchanged, unchanged=unchanged)  # type: ignore[arg-type]
    disks = {path.name: disk(path) for path in place.iterdir()}
    files = [u.save(place / f"{n}.safetensors") for n, u in enumerate(updates)]
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER.replace("HEAD_START", str(HEAD_START))]
        + [*map(str, files)],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield World(place, server, updates, disks)
    server.communicate()  # it ends with its input
    assert server.returncode == 0


def told(tell: Callable[[str], None], name: str, states: Counter[str]) -> None:
    kills = sum(states[state] for state in states if not state.startswith("("))
    found = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    tell(f"{name}: {kills} killed: {found}")


@pytest.mark.parametrize("unchanged", ["copy", "hardlink"])
def test_new_folder(
    unchanged: str, world: World, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    base, out = world.copy("once", tmp_path / "m"), tmp_path / "out"
    staging, outer_lock = tmp_path / STAGING, tmp_path / OUTER_LOCK
    pristine, complete = world.disks["once"], world.disks[unchanged]
    order = ("patch", base, 1, out)
    times = []
    for _ in range(3):
        times.append(world.run(None, *order, unchanged=unchanged) or 0)
        assert disk(out) == complete
        shutil.rmtree(out)
    duration = statistics.median(times)
    states: Counter[str] = Counter()
    for _ in range(30 * KILLS):
        found = "on leftovers" if staging.exists() else ""
        killed = world.run(SPREAD * duration, *order, unchanged=unchanged) is None
        assert disk(base) == pristine
        left = {path.name for path in tmp_path.iterdir()} - {"m"}
        if not killed:
            assert left == {"out"} and disk(out) == complete
            shutil.rmtree(out)
            continue
        if out.exists():
            assert disk(out) == complete and left <= {"out", OUTER_LOCK}
            assert verify(out, base).ok
            shutil.rmtree(out)
            outer_lock.unlink(missing_ok=True)
            states[f"complete {found}".strip()] += 1
        else:
            assert left <= {STAGING, OUTER_LOCK}
            if staging.exists() and disk(staging) != complete:
                # No loader can take it for a model.
                with pytest.raises(CheckpointError):
                    Checkpoint.open(staging)
            states[f"absent {found}".strip()] += 1
            after = world.random.randrange(3)
            if after == 0 and left:
                recover(out)
                assert {path.name for path in tmp_path.iterdir()} == {"m"}
            elif after == 1:
                patch(base, world.updates[1], out, unchanged=unchanged)  # type: ignore[arg-type]
                assert disk(out) == complete
                assert {path.name for path in tmp_path.iterdir()} == {"m", "out"}
                shutil.rmtree(out)
        if sum(states.values()) == KILLS:
            break
    assert sum(states.values()) == KILLS
    told(tell, f"new folder, {unchanged}", states)


@dataclass(frozen=True)
class Operation:
    """A command that changes the folder `m`."""

    begin: str
    end: str
    order: Callable[[Path], tuple[Any, ...]]
    options: dict[str, Any] = field(default_factory=dict)


OPERATIONS = {
    "in place": Operation("plain", "once", lambda folder: ("patch", folder, 0)),
    "in place, with history": Operation(
        "early", "twice", lambda folder: ("patch", folder, 1)
    ),
    "revert": Operation("twice", "once", lambda folder: ("revert", folder)),
    "revert all": Operation(
        "twice", "plain", lambda folder: ("revert", folder), {"all_updates": True}
    ),
    "recover: finish a patch": Operation(
        "half", "twice", lambda folder: ("recover", folder)
    ),
    "recover: undo a patch": Operation(
        "half", "once", lambda folder: ("recover", folder), {"undo": True}
    ),
    "recover: finish a revert": Operation(
        "back", "once", lambda folder: ("recover", folder)
    ),
    "recover: leftovers": Operation(
        "early", "once", lambda folder: ("recover", folder)
    ),
}


def recovered(world: World, folder: Path, duration: float) -> tuple[str, int]:
    """Recovers it in this process, or in others that are killed until one is not.

    Returns:
        Which of `STATES` it has become, and how many were killed.
    """
    killed = 0
    often = world.random.random() < 0.5
    while (journal := read_journal(folder)) is not None:
        undo = journal.patching and world.random.random() < 0.5
        if not often:
            done = recover(folder, undo=undo)
            # A patch of which nothing is staged any more is undone in any case.
            assert done.action == "undone" or not undo
            return STATES[done.updates], 0
        if world.run(2 * duration, "recover", folder, undo=undo) is not None:
            assert not (folder / STATE / JOURNAL).exists()
        else:
            killed += 1
            assert is_interrupted(folder) == (folder / STATE / JOURNAL).exists()
    done = recover(folder)
    assert done.action in ("nothing", "removed")
    return STATES[done.updates], killed


@pytest.mark.parametrize("name", OPERATIONS)
def test_in_place(
    name: str, world: World, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    operation, folder = OPERATIONS[name], tmp_path / "m"
    order, options = operation.order(folder), operation.options
    complete = world.disks[operation.end]
    before = {"early": "once", "half": "", "back": ""}.get(
        operation.begin, operation.begin
    )
    times = []
    for _ in range(3):
        world.copy(operation.begin, folder)
        times.append(world.run(None, *order, **options) or 0)
        assert disk(folder) == complete
        shutil.rmtree(folder)
    duration = statistics.median(times)
    states: Counter[str] = Counter()
    for _ in range(60 * KILLS):
        world.copy(operation.begin, folder)
        killed = world.run(SPREAD * duration, *order, **options) is None
        if not killed:
            assert disk(folder) == complete
        elif is_interrupted(folder):
            states["interrupted"] += 1
            with pytest.raises(CheckpointError, match="interrupted"):
                Source.of(str(folder))
            state, again = recovered(world, folder, duration)
            if again:
                states["(recoveries killed)"] += again
            assert disk(folder) == world.disks[state]
            # Only a patch can be undone.
            patching = {"plain": ("plain",), "early": ("once",), "half": STATES[1:]}
            assert state in (operation.end, *patching.get(operation.begin, ()))
        else:
            state, _ = recovered(world, folder, duration)
            assert disk(folder) == world.disks[state]
            assert state in (before, operation.end)
            if state == operation.end and state != before:
                states["complete"] += 1
                assert state == "plain" or verify(folder).ok
            else:
                states["unchanged"] += 1
                world.run(None, *order, **options)
                assert disk(folder) == complete
        shutil.rmtree(folder)
        if sum(states[state] for state in states if state[0] != "(") == KILLS:
            break
    assert sum(states[state] for state in states if state[0] != "(") == KILLS
    if operation.begin in ("half", "back"):
        assert "unchanged" not in states and states["interrupted"]
    told(tell, name, states)


def test_there_are_300_kills() -> None:
    assert KILLS * (2 + len(OPERATIONS)) >= 300
