"""The command, killed at any moment and started again until it is done: the files are
those of a run that nobody killed, and nothing else is left.

This file is also what is run beside the tests: it imports everything once and forks a
process for each run of the command. Some are killed at a step that was chosen
(`Deaths`), some from outside at no step in particular; one is started as anyone would.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from statistics_helpers import TEXTS, make_model, make_tokenizer
from typer.testing import CliRunner

from covariance_cache import StatisticsStore, store
from covariance_cache.__main__ import app, main
from covariance_cache.checkpoint import Checkpoint

pytestmark = pytest.mark.slow

KILLED, PATIENCE = -signal.SIGKILL, 900
SHORT = {"tokens": 1000, "checkpoint-every": 3}
"""Nine batches, three checkpoints; the last one holds all of them."""
LONG = {"tokens": 12_000, "checkpoint-every": 1}
"""94 batches, and as many checkpoints: long enough to be killed from outside."""
WRITES = 5
"""Files of a short run: the checkpoints and two layers."""
STAGED = f".{Checkpoint.NAME}.tmp"


class Deaths:
    """Kills this very process, as `kill -9` does, at a chosen step of its work on a
    folder: before its n-th operation there, or in the midst of its n-th file."""

    def __init__(self, folder: str, before: int | None, within: int | None) -> None:
        self.folder = folder
        self.operations = self.files = 0
        self.before, self.within = before, within
        sys.addaudithook(self.see)
        self.write = store.save_file
        store.save_file = self.save_file  # type: ignore[assignment]

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Python tells of what it is about to do; what changes the folder counts."""
        if event not in ("os.rename", "os.remove"):
            return
        if Path(arguments[0]).is_relative_to(self.folder):
            if self.operations == self.before:
                os.kill(os.getpid(), signal.SIGKILL)
            self.operations += 1

    def save_file(self, tensors: Any, path: Path, **options: Any) -> None:
        self.write(tensors, path, **options)
        if self.files == self.within:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        self.files += 1


def serve() -> None:
    """Runs the command in a process of its own for each line of stdin."""
    # What the command would import while it runs.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = sys.argv[1]
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    CliRunner().invoke(app, ["show", folder])
    for line in sys.stdin:
        order = json.loads(line)
        process = os.fork()
        if not process:
            said = os.open(order["said"], os.O_WRONLY)
            os.dup2(said, 1)
            os.dup2(said, 2)
            if order["deaths"] is not None:
                Deaths(**order["deaths"])
            sys.argv = ["covariance_cache", *order["arguments"]]
            try:
                main()
            except SystemExit as end:
                sys.stdout.flush()
                os._exit(int(end.code or 0))  # to tidy up would take seconds
        if sys.stdin.readline() == "kill\n":
            os.kill(process, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        sys.stdout.write(f"{code}\n")
        sys.stdout.flush()


class Place:
    """A model, a text, and the process that forks others."""

    def __init__(self, path: Path) -> None:
        self.path, self.runs = path, 0
        make_model("llama").save_pretrained(path / "model")
        make_tokenizer(bos=True).save_pretrained(path / "model")
        # 46 times: enough for the longer runs.
        lines = [json.dumps({"text": f"{n} {t}"}) for n in range(46) for t in TEXTS]
        (path / "text.jsonl").write_text("\n".join(lines))
        self.server = subprocess.Popen(
            [sys.executable, __file__, str(path / "model")],
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.expected = {}
        for name, settings in (("short", SHORT), ("long", LONG)):
            result = CliRunner().invoke(app, self.command(path / name, settings))
            assert result.exit_code == 0, result.output
            self.expected[name] = files_of(path / name)

    def command(self, out: Path, settings: dict[str, Any]) -> list[str]:
        options = {
            "corpus": self.path / "text.jsonl",
            "layers": "0,2",
            "window": 32,
            "batch-size": 4,
            "out": out,
            **settings,
        }
        flags = [part for name, each in options.items() for part in (f"--{name}", each)]
        return [*map(str, ("collect", self.path / "model", *flags)), "--json"]

    def run(
        self,
        out: Path,
        settings: dict[str, Any],
        *,
        before: int | None = None,
        within: int | None = None,
        killer: Callable[[], None] | None = None,
    ) -> int:
        """Exit code of the command in a new process, which dies as it is told or is
        killed once `killer` returns; what it said is in `said`."""
        assert self.server.stdin and self.server.stdout
        self.runs += 1
        said = self.path / f"said {self.runs}"
        said.touch()
        deaths = {"folder": str(out), "before": before, "within": within}
        order = {
            "arguments": self.command(out, settings),
            "said": str(said),
            "deaths": None if before is within is None else deaths,
        }
        self.server.stdin.write(f"{json.dumps(order)}\n")
        self.server.stdin.flush()
        if killer is not None:
            killer()
        self.server.stdin.write("wait\n" if killer is None else "kill\n")
        self.server.stdin.flush()
        code = int(self.server.stdout.readline())
        self.said = said.read_text()
        assert code in (0, KILLED), self.said
        return code

    def finish(self, out: Path, settings: dict[str, Any]) -> None:
        """The same command once more, in this process."""
        result = CliRunner().invoke(app, self.command(out, settings))
        assert result.exit_code == 0, result.output


ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the other processes have
    place = Place(tmp_path_factory.mktemp("killed"))
    yield place
    place.server.communicate()  # it ends with its input
    torch.set_num_threads(threads)


def files_of(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in sorted(folder.glob("*"))}


def assert_whole(out: Path, expected: dict[str, bytes]) -> None:
    """After a death: whatever has a name of its own is complete."""
    for name, content in files_of(out).items():
        if name == Checkpoint.NAME:
            assert used(out / name) > 0
        elif not name.startswith("."):
            assert content == expected[name], name


def used(path: Path) -> int:
    """Tokens that a checkpoint holds."""
    with safe_open(str(path), "pt") as file:
        cursor = json.loads(file.metadata()["covariance_cache"])["cursor"]
        assert len(list(file.keys())) >= 8
    return int(cursor["used"])


def test_before_each_operation_on_the_folder(place: Place, tmp_path: Path) -> None:
    """Each time from the beginning, until the run gets through. That is within a
    checkpoint's writing, after its last use, and between the layers' files."""
    expected, left = place.expected["short"], []
    for before in range(200):
        out = tmp_path / str(before)
        code = place.run(out, SHORT, before=before)
        assert_whole(out, expected)
        left.append(frozenset(files_of(out)))
        if code == 0:
            break
        place.finish(out, SHORT)
        assert files_of(out) == expected, before
        shutil.rmtree(out)
    assert code == 0 and files_of(out) == expected
    # It was killed with and without a checkpoint, and beside each file being staged.
    first, second = sorted(expected)
    staged = [f".{name}.tmp" for name in (Checkpoint.NAME, first, second)]
    assert {state - {Checkpoint.NAME} for state in left} == {
        frozenset(),
        frozenset({staged[0]}),
        frozenset({staged[1]}),
        frozenset({first}),
        frozenset({first, staged[2]}),
        frozenset({first, second}),
    }
    assert {frozenset({Checkpoint.NAME, staged[0]}), frozenset({staged[0]})} <= {*left}
    # Once there is a checkpoint, it is there until all layers are.
    for state in left[left.index(frozenset({Checkpoint.NAME})) :]:
        assert Checkpoint.NAME in state or {first, second} <= state


def test_in_the_midst_of_each_file(place: Place, tmp_path: Path) -> None:
    expected = place.expected["short"]
    for within in range(WRITES + 1):
        out = tmp_path / str(within)
        code = place.run(out, SHORT, within=within)
        assert_whole(out, expected)
        assert (code == 0) == (within == WRITES)
        staged = [name for name in files_of(out) if name.startswith(".")]
        assert len(staged) == (within < WRITES)  # half a file lies there
        place.finish(out, SHORT)
        assert files_of(out) == expected, within


def test_again_and_again_until_it_is_done(place: Place, tmp_path: Path) -> None:
    """Each run dies one operation later than the one before, in what that one left."""
    expected, done, seen = place.expected["short"], 0, set()
    for before in range(200):
        code = place.run(tmp_path, SHORT, before=before)
        if code == 0:
            break
        assert_whole(tmp_path, expected)
        kept = tmp_path / Checkpoint.NAME
        now = used(kept) if kept.exists() else 0
        # Never back, but where all was done.
        assert now >= done or expected.keys() <= files_of(tmp_path).keys()
        done = now
        seen.add(now)
    assert before > 4 and files_of(tmp_path) == expected
    assert seen >= {0, 384, 1000}


def test_another_rhythm_of_checkpoints_leaves_nothing_either(
    place: Place, tmp_path: Path
) -> None:
    """Half a checkpoint lies there, and no other is ever written over it."""
    place.run(tmp_path, SHORT, within=1)
    assert STAGED in files_of(tmp_path)
    place.finish(tmp_path, SHORT | {"checkpoint-every": 100})
    assert files_of(tmp_path) == place.expected["short"]


def poll(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


def identity(path: Path) -> tuple[int, int] | None:
    """Which file of this name it is, if there is one."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def test_at_no_step_in_particular(place: Place, tmp_path: Path) -> None:
    """From outside: when the checkpoint appears, when it was replaced once and more
    often, and when another one is being written."""
    path, staged = tmp_path / Checkpoint.NAME, tmp_path / STAGED
    done = [0]

    def replaced(times: int) -> None:
        for _ in range(times):
            before = identity(path)
            poll(lambda: identity(path) not in (None, before))  # noqa: B023

    def later(delay: float) -> None:
        replaced(1)
        time.sleep(delay)

    killers: list[Callable[[], None]] = [
        *(lambda times=times: replaced(times) for times in (1, 3)),
        *(lambda: poll(staged.exists) for _ in range(2)),
        *(lambda delay=n / 700: later(delay) for n in range(4)),
    ]
    for killer in killers:
        code = place.run(tmp_path, LONG, killer=killer)
        assert_whole(tmp_path, place.expected["long"])
        if code == 0:  # so slow was the killer
            break
        done.append(used(path))
    assert done == sorted(done) and len(set(done)) > 2
    assert code == 0 or place.run(tmp_path, LONG) == 0
    assert files_of(tmp_path) == place.expected["long"]
    shown = re.search(r"\| ([\d.]+)(k?)/12\.0k \[00:00<\?", place.said)
    assert shown, place.said
    begun = float(shown[1]) * (1000 if shown[2] else 1)
    assert begun == pytest.approx(done[-1], rel=0.01)  # not from the beginning


def test_the_command_as_anyone_starts_it(place: Place, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "covariance_cache"]
    command += place.command(tmp_path, LONG)
    path = tmp_path / Checkpoint.NAME
    with subprocess.Popen(
        command,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        poll(lambda: path.exists() or process.poll() is not None)
        process.kill()
        said, _ = process.communicate()
    assert process.returncode == KILLED, said
    assert_whole(tmp_path, place.expected["long"])
    assert 0 < used(path) < LONG["tokens"]
    place.finish(tmp_path, LONG)
    assert files_of(tmp_path) == place.expected["long"]


def test_what_is_left_are_the_statistics_of_the_model(place: Place) -> None:
    """The runs that everything is compared with are what they shall be."""
    for name, settings in (("short", SHORT), ("long", LONG)):
        folder = StatisticsStore(place.path / name)
        loaded = folder.load(make_model("llama"), [0, 2], make_tokenizer(bos=True))
        assert [loaded[layer].count for layer in (0, 2)] == [settings["tokens"]] * 2
        assert sorted(place.expected[name]) == [
            "layer-000.safetensors",
            "layer-002.safetensors",
        ]


if __name__ == "__main__":
    serve()
    os._exit(0)
