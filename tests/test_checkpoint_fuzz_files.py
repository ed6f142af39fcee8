"""What is malformed about files themselves: pipes, sockets, devices, folders and links
where a file should be, and contents made to cost memory or time.

Every case runs in a forked process with an alarm, so that a hang is found whoever
causes it, and so that memory is measured for this case alone.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint_fuzz import (
    CONFIG,
    INDEX,
    PATCH,
    READ,
    SHARDS,
    SINGLE,
    STATE,
    joined,
    make_update,
    write_checkpoint,
)

from unified_edit.algebra.update import UpdateSet
from unified_edit.checkpoint.layout import read_header
from unified_edit.checkpoint.patch import history, patch, revert, verify
from unified_edit.checkpoint.revert import recover
from unified_edit.checkpoint.sharded import Checkpoint
from unified_edit.errors import UpdateError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not sys.platform.startswith("linux"), reason="needs /proc and /dev"
    ),
]

SECONDS = 10
MANY = 12
"""Failures after which no more cases are tried: each may cost SECONDS."""
ALLOWANCE = 64 << 20
"""Memory that reading may take beyond the file's size."""

Call = tuple[str, tuple[type[Exception], ...], Callable[[], Any]]


def outcome_of(call: Call) -> str:
    """How one call ended: a result, an error that it may raise, or a failure."""
    name, allowed, run = call
    try:
        run()
    except allowed as error:
        str(error).encode()
        return "refused"
    except BaseException as error:
        return f"FAILED {name}: {type(error).__name__}: {ascii(str(error))[:200]}"
    return "accepted"


def forked(calls: list[Call]) -> list[str]:
    """The outcome of each call, in a process of their own; a call that takes too long
    loses its process, and the next gets another."""
    outcomes: list[str] = []
    while len(outcomes) < len(calls):
        receive, send = os.pipe()
        child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            limit = status("VmData") + (1 << 30)  # a device that never ends
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
            for call in calls[len(outcomes) :]:
                signal.alarm(SECONDS)
                os.write(send, json.dumps(outcome_of(call)).encode() + b"\n")
            os._exit(0)
        os.close(send)
        with open(receive, "rb") as lines:
            outcomes += [json.loads(line) for line in lines]
        _, code = os.waitpid(child, 0)
        if code:
            outcomes.append(f"{ended(code)}: {calls[len(outcomes)][0]}")
    return outcomes


def ended(code: int) -> str:
    """What ended a process that did not say."""
    number = os.WTERMSIG(code) if os.WIFSIGNALED(code) else code
    return "FAILED hangs" if number == signal.SIGALRM else f"FAILED died of {number}"


# ---------------------------------------------------------------- special files


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's whole path has to be short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def _link_to_a_pipe(path: Path) -> None:
    os.mkfifo(f"{path}.pipe")
    path.symlink_to(f"{path}.pipe")


def _full_folder(path: Path) -> None:
    path.mkdir()
    (path / "something").write_text("x")


SPECIAL: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "link to a pipe": _link_to_a_pipe,
    "socket": _socket,
    "folder": _full_folder,
    "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path.name),
}
PLACES = (
    *(CONFIG, SINGLE, INDEX, SHARDS[0], "README.md", STATE, f"{STATE}.lock"),
    *(f"{STATE}/manifest.json", f"{STATE}/journal.json"),
    *(f"{STATE}/update-0001.safetensors", f"{STATE}/undo-0001.safetensors"),
    *("../.out.unified-edit-lock", "../.out.unified-edit-staging", "../out"),
)


def listed(folder: Path) -> list[str]:
    return sorted(
        os.path.join(parent, name)
        for parent, folders, files in os.walk(folder)
        for name in (*folders, *files)
    )


def special_case(root: Path, kind: str, place: str) -> list[str]:
    """Asks everything of a folder with something special at one place."""
    base = root / "base" / str(place in (INDEX, SHARDS[0]))
    root, patched = root / "case", root / "patched"
    folder, out = root / "folder", root / "out"
    shutil.copytree(patched if place.startswith((STATE, "README")) else base, folder)
    again = make_update(folder)
    path = folder / place
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    SPECIAL[kind](path)
    before = listed(root)

    def refused_or_whole() -> None:
        """A refused patch leaves nothing."""
        try:
            patch(folder, again, out)
        except PATCH:
            assert listed(root) == before
            raise
        assert verify(out).ok
        shutil.rmtree(out)

    reading: list[Call] = [
        ("read_header", READ, lambda: read_header(path)),
        ("UpdateSet.load", (UpdateError,), lambda: UpdateSet.load(path)),
        ("open", READ, lambda: Checkpoint.open(folder)),
        ("history", READ, lambda: history(folder)),
        ("verify with base", READ, lambda: verify(folder, base)),
        ("patch", PATCH, refused_or_whole),
        ("patch in place", PATCH, lambda: patch(folder, again)),
        ("recover", READ, lambda: recover(folder)),
        ("revert", READ, lambda: revert(folder)),
    ]
    return forked(reading)


def all_special_cases(root: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for sharded in (False, True):
        write_checkpoint(root / "base" / str(sharded), sharded=sharded)
    single = root / "base" / "False"
    patch(single, make_update(single), root / "patched")
    for kind, place in product(SPECIAL, PLACES):
        failed = [o for outcomes in found.values() for o in outcomes if "FAILED" in o]
        if len(failed) < MANY:
            (root / "case").mkdir()
            found[f"{kind} as {place}"] = special_case(root, kind, place)
            shutil.rmtree(root / "case")
    return found


# ---------------------------------------------------------------- memory and time


def entries(count: int, more: str = "") -> bytes:
    info = '{"dtype":"F32","shape":[0,64],"data_offsets":[0,0]}'
    names = (f'"model.layers.{number}.weight":{info}' for number in range(count))
    return ("{" + ",".join(names) + more + "}").encode()


def one(shape: str, offsets: str = "[0,0]") -> bytes:
    return (
        f'{{"w":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}'.encode()
    )


GIB4 = 4 << 30
CLAIMS = (10**8, 10**8 + 1, 2**31, GIB4 - 8, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
LISTS = b'{"w":[' + b"[]," * (5 << 18) + b"[]]}"
DEEP = b'{"w":' + b"[" * (5 << 20)
FILES: dict[str, tuple[bytes, int | None]] = {
    **{
        f"small file claims {claim}": (joined(b"{}", b"", claim), None)
        for claim in CLAIMS
    },
    **{
        f"4 GB file claims {claim}": (joined(b"{}", b"", claim), GIB4)
        for claim in CLAIMS
    },
    "4 GB file of zeros": (b"", GIB4),
    "4 GB tensor": (joined(one("[1073741824]", "[0,4294967296]"), b""), GIB4),
    "100000 tensors": (joined(entries(100_000), b""), None),
    "20000 tensors, the last twice": (
        joined(entries(20_000, ',"w":1,"w":1'), b""),
        None,
    ),
    "shape of a million ones": (joined(one("[" + "1," * 10**6 + "0]"), b""), None),
    "shape of a million": (joined(one("[" + "300," * 10**6 + "300]"), b""), None),
    "shape whose product explodes": (
        joined(one("[" + "9223372036854775807," * 10**5 + "9]"), b""),
        None,
    ),
    "a million lists": (joined(LISTS, b""), None),
    "brackets five million deep": (joined(DEEP, b""), None),
    "a number of five million digits": (
        joined(one("[" + "9" * (5 << 20) + "]"), b""),
        None,
    ),
    "a name of 5 MB": (joined(b'{"' + b"n" * (5 << 20) + b'":1}', b""), None),
    "metadata of 5 MB": (
        joined(
            b'{"__metadata__":{"a":"' + b"n" * (5 << 20) + b'\xf0\x9f\x98\x80"}}', b""
        ),
        None,
    ),
}
"""Name → what a weight file begins with, and the size that it is stretched to."""


def jsons() -> Iterator[tuple[str, str, bytes]]:
    """Case, file, content."""
    names = (f'"model.layers.{n}.weight":"{SHARDS[0]}"' for n in range(300_000))
    text = '{"weight_map":{' + ",".join(names) + "}}"
    yield "index of 300000", INDEX, text.encode()
    names = (f'"model.layers.{n}.weight":"shard-{n}"' for n in range(20_000))
    text = '{"weight_map":{' + ",".join(names) + ',"w":"a","w":"b"}}'
    yield "index, the last name twice", INDEX, text.encode()
    for name in (CONFIG, INDEX, f"{STATE}/manifest.json"):
        yield f"a million lists as {name}", name, LISTS
        yield f"brackets five million deep as {name}", name, DEEP
        yield f"16 MB of zeros as {name}", name, bytes(16 << 20)


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise AssertionError(field)


def cost(path: Path, call: Call) -> dict[str, Any]:
    """Outcome, seconds, and the peak of memory; memory that is asked for beyond the
    allowance, be it touched or not, is not given."""
    size = path.stat().st_size
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        start, used = time.monotonic(), status("VmRSS")
        limit = status("VmData") + size + ALLOWANCE
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        outcome = outcome_of(call)
        report = [outcome, time.monotonic() - start, status("VmHWM") - used]
        os.write(send, json.dumps(report).encode())
        os._exit(0)
    os.close(send)
    with open(receive, "rb") as lines:
        told = lines.read()
    _, code = os.waitpid(child, 0)
    outcome, seconds, peak = json.loads(told) if told else (ended(code), SECONDS, 0)
    return {
        **{"call": call[0], "outcome": outcome, "seconds": seconds},
        **{"peak": peak, "size": size},
    }


def all_costs(root: Path) -> dict[str, list[dict[str, Any]]]:
    found = {}
    folder = root / "single"
    write_checkpoint(folder, sharded=False)
    path = folder / SINGLE
    for case, (content, size) in FILES.items():
        path.write_bytes(content)
        if size is not None:
            os.truncate(path, len(content) + size)
        found[case] = [
            cost(path, ("read_header", READ, lambda: read_header(path))),
            cost(path, ("load", (UpdateError,), lambda: UpdateSet.load(path))),
        ]
        if case.startswith("4 GB"):
            named = ("fingerprint", READ, lambda: Checkpoint.open(folder).fingerprint())
            found[case].append(cost(path, named))
    for number, (case, name, content) in enumerate(jsons()):
        base, folder = root / f"base-{number}", root / f"folder-{number}"
        write_checkpoint(base, sharded=name == INDEX)
        patch(base, make_update(base), folder)
        (folder / name).write_bytes(content)
        calls: list[Call] = [("open", READ, lambda f=folder: Checkpoint.open(f))]
        if name.startswith(STATE):
            calls = [("history", READ, lambda f=folder: history(f))]
        found[case] = [cost(folder / name, call) for call in calls]
    return found


# ---------------------------------------------------------------- the tests


def in_a_process(function: str, root: Path) -> Any:
    """Runs one of the functions above in a Python of its own, which may fork: it has
    one thread and no test runner."""
    code = (
        "import json, os, sys; from pathlib import Path\n"
        "os.fsync = lambda descriptor: None\n"
        f"import {Path(__file__).stem} as cases\n"
        f"found = cases.{function}(Path(sys.argv[1]))\n"
        "print(json.dumps(found))\n"
    )
    here = Path(__file__).parent
    paths = os.pathsep.join((str(here), str(here.parent)))
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(root)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_special_files(tmp_path: Path, tell: Callable[[str], None]) -> None:
    """Nothing hangs on a pipe, reads a device to its end, or dies of what it finds."""
    found = in_a_process("all_special_cases", tmp_path)
    counts = Counter(
        outcome.split()[0] for outcomes in found.values() for outcome in outcomes
    )
    tell(f"special files: {len(found)} cases, calls: {dict(counts)}")
    failures = [
        f"{case}: {outcome}"
        for case, outcomes in found.items()
        for outcome in outcomes
        if outcome.startswith("FAILED")
    ]
    assert not failures, "\n".join(failures)
    assert len(found) == len(SPECIAL) * len(PLACES)
    assert counts["accepted"] > 100 and counts["refused"] > 100


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", [CONFIG, SINGLE, f"{STATE}/manifest.json"])
def test_unreadable_files_are_refused(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path / "base", sharded=False)
    update = make_update(tmp_path / "base")
    patch(tmp_path / "base", update, tmp_path / "folder")
    (tmp_path / "folder" / name).chmod(0)
    with pytest.raises(READ, match="ermission"):
        verify(tmp_path / "folder")
        Checkpoint.open(tmp_path / "folder")


def test_memory_and_time(tmp_path: Path, tell: Callable[[str], None]) -> None:
    """Reading takes no more than the file's size and 64 MB, whatever a file claims."""
    found = in_a_process("all_costs", tmp_path)
    rows = [(case, told) for case, costs in found.items() for told in costs]
    rows.sort(key=lambda row: row[1]["size"] - row[1]["peak"])
    lines = [
        f"{told['peak'] / 2**20:6.1f} MB for a file of {told['size'] / 2**20:.1f} MB, "
        f"{told['seconds']:.1f} s, {told['call']}, {case}: {told['outcome']}"
        for case, told in rows
    ]
    for line in (f"memory: {len(rows)} calls; the worst:", *lines[:6]):
        tell(line)
    failures = [
        line
        for line, (_, told) in zip(lines, rows, strict=True)
        if told["outcome"].startswith("FAILED")
        or told["peak"] > told["size"] + ALLOWANCE
    ]
    assert not failures, "\n".join(failures)
    assert {told["outcome"] for _, told in rows} == {"accepted", "refused"}
