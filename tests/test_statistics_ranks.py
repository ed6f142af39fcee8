"""Processes that share a text: whatever their number, they collect what one process
collects alone, each has all of it, and what goes wrong in one of them ends them all.

This file is also what is run beside the tests: it starts groups of processes with
torchrun's own agent, forked from a process that has imported everything, as each import
would take longer than all that a group does. One group is started by `torchrun` itself.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from statistics_helpers import TEXTS, make_model, make_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from covariance_cache import (
    CorpusExhausted,
    KeyStatistics,
    NonFiniteActivations,
    Ranks,
    StatisticsStore,
    collect,
    joined,
)
from covariance_cache.__main__ import app, main
from covariance_cache.checkpoint import Checkpoint
from covariance_cache.corpus import Documents, packed_windows

pytestmark = pytest.mark.slow

WINDOW, BATCH = 32, 4
PATIENCE = 900
"""Seconds, in which what does not hang is done on the slowest machine."""
NINE = {"tokens": 1000}
"""31 full windows and a rest: seven batches, one of three windows, one short window."""
PASSES: dict[str, dict[str, Any]] = {
    "nine batches": NINE,
    "nine batches again": NINE,
    "ten batches": {"tokens": 1100},
    "one batch": {"tokens": 2 * WINDOW},
    "a file for each two": {**NINE, "checkpoint_every": 2},
    "a file for each": {**NINE, "checkpoint_every": 1},
    "the text ends": {"corpus": TEXTS[:9], "tokens": 10**6},
    "its own order": {**NINE, "seed": None},
    "float64": {**NINE, "dtype": torch.float64},
    "few tokens": {"tokens": 60, "batch_size": 1, "window": 16},  # shrunk
    "no report": {**NINE, "probes": 0},
}
STOPS = (1, 5, 12)
"""Documents after which a text breaks off; the first before any checkpoint."""


class Killed(BaseException):
    """What ends a run between two instructions."""


class Breaking(list[str]):
    """Texts that break off after some; at the same batch in every process."""

    def __init__(self, after: int) -> None:
        super().__init__(TEXTS)
        self.left = after

    def __getitem__(self, index: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise Killed
        return super().__getitem__(index)


def passed(ranks: Ranks, model: Any, **settings: Any) -> dict[int, Any]:
    """What a process gets from a pass, as plain data."""
    settings = {"window": WINDOW, "batch_size": BATCH} | settings
    corpus, dtype = settings.pop("corpus", TEXTS), settings.pop("dtype", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CorpusExhausted)
        found = collect(
            model if dtype is None else make_model("llama").to(dtype),
            make_tokenizer(bos=True),
            corpus,
            [0, 2],
            ranks=ranks,
            progress=False,
            **settings,
        )
    return {layer: plain(each) for layer, each in found.items()}


def plain(statistics: KeyStatistics) -> dict[str, Any]:
    return {
        "second moment": statistics.second_moment,
        "count": statistics.count,
        "provenance": asdict(statistics.provenance),
        "adequacy": statistics.adequacy and asdict(statistics.adequacy),
    }


def job(ranks: Ranks, folder: Path, theirs: list[Path]) -> dict[str, Any]:
    """All passes; passes that break off and are gone on with, also by processes of
    another number, which do that in `theirs`."""
    model, found = make_model("llama"), {}
    for name, settings in PASSES.items():
        kept = folder / name
        if "checkpoint_every" in settings:
            settings = {**settings, "checkpoint_dir": kept}
        found[name] = passed(ranks, model, **settings)
        assert not (ranks.first and list(kept.glob("*")))
    every = {**NINE, "checkpoint_every": 2}
    for stop in STOPS:
        settings = {**every, "checkpoint_dir": folder / f"stopped {stop}"}
        with pytest.raises(Killed):
            passed(ranks, model, corpus=Breaking(stop), **settings)
        if ranks.first and settings["checkpoint_dir"].exists():
            shutil.copytree(settings["checkpoint_dir"], folder / f"left {stop}")
        ranks.gather(None)
        found[f"stopped {stop}"] = passed(ranks, model, **settings)
    for number, each in enumerate(theirs):
        for stop in STOPS[1:]:
            copy = folder / f"copy {number} {stop}"
            if ranks.first:
                shutil.copytree(each / f"left {stop}", copy)
            ranks.gather(None)
            settings = {**every, "checkpoint_dir": copy}
            found[f"gone on {number} {stop}"] = passed(ranks, model, **settings)
            assert not (ranks.first and list(copy.iterdir()))
    return found


def run_job(folder: Path, theirs: list[Path]) -> None:
    with joined() as ranks:
        torch.save(job(ranks, folder, theirs), folder / f"{ranks.rank}.pt")


def run_command(arguments: list[str]) -> None:
    sys.argv = ["covariance_cache", *arguments]
    main()


def launch(group: dict[str, Any], logs: Path) -> dict[str, Any]:
    """Runs a group as `torchrun --standalone` does; how its processes ended."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    entry: Callable[..., None] = run_command if "command" in group else run_job
    arguments = (
        [group["command"]]
        if "command" in group
        else [Path(group["folder"]), [Path(each) for each in group["theirs"]]]
    )
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=group["world"],
        run_id=str(time.monotonic_ns()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
        monitor_interval=0.05,
        logs_specs=DefaultLogsSpecs(str(logs), redirects=Std.ALL),
    )
    codes, messages = {}, []
    start = time.monotonic()
    try:
        elastic_launch(config, entry)(*arguments)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        messages = [str(failure.message) for failure in error.failures.values()]
    return {"codes": codes, "messages": messages, "seconds": time.monotonic() - start}


def say(logs: Path, stream: str) -> dict[int, str]:
    """What each process of a group said."""
    return {
        int(path.parent.name): path.read_text()
        for path in logs.glob(f"*/attempt_0/*/{stream}.log")
    }


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what was said; none of the processes may wait for ever."""
    try:
        said, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        pytest.fail(f"did not end: {process.args}")
    return process.returncode, said


def stop(process: subprocess.Popen[str]) -> None:
    """Ends what still runs; an agent that is asked to ends its processes as well."""
    if process.poll() is None:
        process.terminate()
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def start(*arguments: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def files_of(folder: Path) -> dict[str, str]:
    """Name and content of all files of a folder."""
    return {each.name: each.read_bytes().hex() for each in sorted(folder.glob("*"))}


LETTER = make_tokenizer()("Q")["input_ids"][0]


def overflowing() -> Any:
    """A model in which a letter's key, and no other, is infinite in layer 1: the letter
    alone has a number at a place of the hidden state that nothing else writes to, and
    that layer's gate multiplies it by the largest number."""
    model, place = make_model("llama"), 15
    with torch.no_grad():
        model.model.embed_tokens.weight[:, place] = 0
        model.model.embed_tokens.weight[LETTER, place] = 10
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[place] = 0
            layer.mlp.down_proj.weight[place] = 0
        model.model.layers[1].mlp.up_proj.weight[0, place] = 3e38
    return model


def text_with_letter(path: Path, batch: int) -> str:
    """Writes the texts with a letter in this batch of theirs; where it is, in words."""
    for changed in range(len(TEXTS)):
        texts = [text.strip() for text in TEXTS]
        texts[changed] = f"{texts[changed][:-5]}Q{texts[changed][-4:]}"
        path.write_text("\n\n".join(texts))
        documents = Documents(path, seed=0)
        windows = packed_windows(
            make_tokenizer(bos=True), documents, length=WINDOW, budget=NINE["tokens"]
        )
        for number, window in enumerate(windows):
            if LETTER in window.ids and number // BATCH == batch:
                return (
                    f"token {window.ids.index(LETTER)} of the window of {WINDOW} that "
                    f"ends {window.end.token} tokens into "
                    f"{documents.where(window.end.opened - 1)};"
                )
    raise AssertionError(batch)


class Place:
    """All that was run: one process here, groups of processes beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        make_model("llama").save_pretrained(path / "model")
        make_tokenizer(bos=True).save_pretrained(path / "model")
        overflowing().save_pretrained(path / "overflowing")
        make_tokenizer(bos=True).save_pretrained(path / "overflowing")
        self.text = path / "text.txt"
        self.text.write_text("\n\n".join(text.strip() for text in TEXTS))
        self.bad = {batch: path / f"bad {batch}.txt" for batch in (1, 5)}
        self.wheres = {n: text_with_letter(each, n) for n, each in self.bad.items()}

        self.folder("alone").mkdir()
        self.alone = job(Ranks(), self.folder("alone"), [])
        groups = {
            "two": self.job(2, ["alone"]),
            "three": self.job(3, ["two"]),
            "command 1": self.group(1, "command 1"),
            "command 2": self.group(2, "command 2"),
            "kept 2": self.group(2, "kept 2", checkpoint_every=2),
            "kept 3": self.group(3, "kept 3", checkpoint_every=2),
            "bad 1": self.group(
                2, "bad 1", model=path / "overflowing", corpus=self.bad[1], layers="0-2"
            ),
            "bad 5": self.group(
                2,
                "bad 5",
                model=path / "overflowing",
                corpus=self.bad[5],
                layers="0-2",
                checkpoint_every=2,
            ),
            # Finds what that one left.
            "other settings": self.group(
                2,
                "bad 5",
                model=path / "overflowing",
                corpus=self.bad[5],
                layers="0-2",
                batch_size=2,
            ),
            "no such layer": self.group(2, "nothing", layers="3"),
        }
        (path / "groups.json").write_text(json.dumps(groups))
        beside = start(__file__, path)
        torchrun = start(
            *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2),
            *("--redirects", 3, "--log-dir", path / "logs" / "torchrun"),
            *("-m", "covariance_cache"),
            *self.command("torchrun", checkpoint_every=2),
        )
        try:
            code, said = finish(beside)
            assert code == 0, said
            self.ended = json.loads((path / "ended.json").read_text())
            self.torchrun, self.said = finish(torchrun)
        finally:
            stop(beside)
            stop(torchrun)

    def folder(self, name: str) -> Path:
        return self.path / name

    def command(self, out: str, model: Path | None = None, **changes: Any) -> list[str]:
        options = {
            "corpus": self.text,
            "layers": "0,2",
            "window": WINDOW,
            "batch-size": BATCH,
            "out": self.folder(out),
            **NINE,
            **{name.replace("_", "-"): value for name, value in changes.items()},
        }
        flags = [part for name, each in options.items() for part in (f"--{name}", each)]
        return [*map(str, ("collect", model or self.folder("model"), *flags)), "--json"]

    def group(self, world: int, out: str, **changes: Any) -> dict[str, Any]:
        command = self.command(out, **changes)
        return {"world": world, "command": command, "folder": str(self.folder(out))}

    def job(self, world: int, theirs: list[str]) -> dict[str, Any]:
        folder = self.folder({2: "two", 3: "three"}[world])
        folder.mkdir()
        places = [str(self.folder(each)) for each in theirs]
        return {"world": world, "folder": str(folder), "theirs": places}

    def found(self, world: int) -> list[dict[str, Any]]:
        """What each process of a group got."""
        name = {2: "two", 3: "three"}[world]
        assert self.ended[name]["codes"] == {}, self.ended[name]["messages"]
        return [
            torch.load(self.folder(name) / f"{rank}.pt", weights_only=True)
            for rank in range(world)
        ]

    def say(self, name: str, stream: str) -> dict[int, str]:
        return say(self.path / "logs" / name, stream)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each process of a group has
    yield Place(tmp_path_factory.mktemp("ranks"))
    torch.set_num_threads(threads)


def same(one: Any, two: Any) -> bool:
    """Equal, tensors to the bit."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    return bool(one == two)


def assert_close(found: dict[int, Any], expected: dict[int, Any]) -> None:
    """Equal but for the order of sums in float64, which rounds the mean otherwise."""
    assert list(found) == list(expected) == [0, 2]
    for layer, other in expected.items():
        mine = found[layer]
        assert mine["count"] == other["count"]
        assert mine["provenance"] == other["provenance"]
        one, two = mine["second moment"], other["second moment"]
        assert one.dtype == two.dtype and torch.equal(one, one.T)
        error = float((one - two).norm() / two.norm())
        assert error <= torch.finfo(two.dtype).eps, layer
        if other["adequacy"] is None:
            assert mine["adequacy"] is None
            continue
        one, two = mine["adequacy"], other["adequacy"]
        assert one.keys() == two.keys()
        for name, value in two.items():
            if isinstance(value, float):  # C⁻¹ makes more of the rounding
                assert one[name] == pytest.approx(value, rel=1e-3), name
            else:
                assert one[name] == value, name


@pytest.mark.parametrize("world", [2, 3])
def test_as_many_as_there_are_collect_the_same(place: Place, world: int) -> None:
    processes = place.found(world)
    for rank, mine in enumerate(processes):
        assert same(mine, processes[0]), rank  # the bits, and the report
    for name in PASSES:
        assert_close(processes[0][name], place.alone[name])
    assert same(processes[0]["nine batches again"], processes[0]["nine batches"])
    # With one batch only one process has a share: nothing is added in another order.
    assert same(processes[0]["one batch"], place.alone["one batch"])
    # A file for each batch: the first of the processes reads them all.
    assert same(processes[0]["a file for each"], place.alone["nine batches"])


def test_the_passes_are_what_they_shall_be(place: Place) -> None:
    counts = {name: each[0]["count"] for name, each in place.alone.items()}
    assert counts["nine batches"] == 1000 and counts["ten batches"] == 1100
    assert counts["one batch"] == 64
    assert 300 < counts["the text ends"] < 2000
    change = {n: (a[0]["adequacy"] or {}).get("change") for n, a in place.alone.items()}
    assert {name for name, each in change.items() if each is None} == {
        "no report",
        "the text ends",  # before half the budget
    }
    assert place.alone["few tokens"][0]["adequacy"]["change_shrinkage"] == "oas"
    for name in ("a file for each two", "a file for each"):
        assert same(place.alone[name], place.alone["nine batches"])
    left = [place.folder(each) / f"left {STOPS[0]}" for each in ("alone", "two")]
    assert not any(each.exists() for each in left)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_what_broke_off_is_gone_on_with(place: Place, world: int) -> None:
    """To the bit by as many processes; by another number, but for rounding."""
    found = place.alone if world == 1 else place.found(world)[0]
    for stop in STOPS:
        assert same(found[f"stopped {stop}"], found["a file for each two"]), stop
    for stop in STOPS[1:]:
        if world > 1:  # one process's by two, and two's by three
            assert_close(found[f"gone on 0 {stop}"], place.alone["nine batches"])


@pytest.mark.parametrize("theirs", ["two", "three"])
def test_one_process_goes_on_with_what_several_left(
    place: Place, tmp_path: Path, theirs: str
) -> None:
    used = set()
    for stop in STOPS[1:]:
        folder = tmp_path / str(stop)
        shutil.copytree(place.folder(theirs) / f"left {stop}", folder)
        with safe_open(str(folder / Checkpoint.NAME), "pt") as file:
            used.add(json.loads(file.metadata()["covariance_cache"])["cursor"]["used"])
        settings = {**NINE, "checkpoint_every": 2, "checkpoint_dir": folder}
        found = passed(Ranks(), make_model("llama"), **settings)
        assert_close(found, place.alone["nine batches"])
        assert not list(folder.iterdir())
    assert used == {256, 768}  # before the half, and after it


def test_the_command_of_one_process_of_torchrun_is_the_command(
    place: Place, tmp_path: Path
) -> None:
    assert place.ended["command 1"]["codes"] == {}
    settings = {"window": WINDOW, "batch_size": BATCH, **NINE, "progress": False}
    model, tokenizer = make_model("llama"), make_tokenizer(bos=True)
    for each in collect(model, tokenizer, place.text, [0, 2], **settings).values():
        StatisticsStore(tmp_path).save(each)
    assert files_of(place.folder("command 1")) == files_of(tmp_path)
    assert len(files_of(tmp_path)) == 2


@pytest.mark.parametrize("name", ["command 2", "kept 2", "kept 3"])
def test_the_command_of_several(place: Place, name: str) -> None:
    """One of them writes, and answers."""
    assert place.ended[name]["codes"] == {}, place.say(name, "stderr")
    alone, shared = (StatisticsStore(place.folder(n)) for n in ("command 1", name))
    names = [each.name for each in sorted(shared.path.iterdir())]
    assert names == ["layer-000.safetensors", "layer-002.safetensors"]
    assert_close(
        {layer: plain(shared.open(layer)) for layer in (0, 2)},
        {layer: plain(alone.open(layer)) for layer in (0, 2)},
    )
    said = place.say(name, "stdout")
    assert sorted(said) == list(range(int(name[-1])))
    assert [bool(each) for _, each in sorted(said.items())][1:] == [False] * (
        len(said) - 1
    )
    layers = json.loads(said[0])["layers"]
    assert [entry["layer"] for entry in layers] == [0, 2]
    # One bar, of the text that all of them read.
    bars = {rank for rank, s in place.say(name, "stderr").items() if "collecting" in s}
    assert bars == {0}


def test_torchrun_itself_gives_the_same_bytes(place: Place) -> None:
    assert place.torchrun == 0, (place.said, place.say("torchrun", "stderr"))
    files = files_of(place.folder("torchrun"))
    assert files == files_of(place.folder("kept 2")) and len(files) == 2
    said = place.say("torchrun", "stdout")
    assert sorted(said) == [0, 1] and said[1] == ""
    assert json.loads(said[0])["layers"][0]["count"] == NINE["tokens"]


@pytest.mark.parametrize("batch", [1, 5])
def test_a_bad_key_that_one_process_sees_stops_all(place: Place, batch: int) -> None:
    name = f"bad {batch}"
    ended, said = place.ended[name], place.say(name, "stderr")
    # Whoever was seen to end first: the one that raised, or the one it left alone.
    assert ended["codes"] and set(ended["codes"].values()) == {1}, said
    message = (
        "error: layer 1 (model.layers.1.mlp.down_proj): the first key that is not "
        f"finite is at {' '.join(place.wheres[batch].split())}"
    )
    assert message in said[1]
    assert "Traceback" not in said[1]
    assert "not finite" not in said[0]
    assert ended["seconds"] < PATIENCE / 4
    # No layer's file, and none of a batch that was bad.
    assert list(ended["files"]) == [Checkpoint.NAME] * (batch > 1)
    if batch > 1:
        path = place.folder(name) / Checkpoint.NAME
        with safe_open(str(path), "pt") as file:
            header = json.loads(file.metadata()["covariance_cache"])
            tensors = [file.get_tensor(key) for key in file.keys()]
        assert header["cursor"]["used"] == 4 * BATCH * WINDOW
        assert all(bool(torch.isfinite(each).all()) for each in tensors)
    assert place.say(name, "stdout") == {0: "", 1: ""}


def test_the_bad_text_is_bad_where_it_shall_be(place: Place) -> None:
    """One process finds the same key, and the model is good for any other text."""
    model, tokenizer = overflowing(), make_tokenizer(bos=True)
    settings = {"window": WINDOW, "batch_size": BATCH, **NINE, "progress": False}
    for batch, path in place.bad.items():
        with pytest.raises(NonFiniteActivations) as caught:
            collect(model, tokenizer, path, range(3), **settings)
        assert f"layer 1 (model.layers.1.mlp.down_proj): {''}" in str(caught.value)
        assert place.wheres[batch] in str(caught.value)
    assert collect(model, tokenizer, place.text, [1], **settings)[1].count == 1000


def test_an_error_before_the_pass_ends_all(place: Place) -> None:
    ended, said = place.ended["other settings"], place.say("other settings", "stderr")
    assert ended["codes"] and set(ended["codes"].values()) == {1}, said
    line = said[0].strip().splitlines()[-1]
    assert line.startswith("error: ") and "batch_size: 4 there, 2 now" in line
    assert ended["seconds"] < PATIENCE / 4
    assert ended["files"] == place.ended["bad 5"]["files"]

    ended, said = place.ended["no such layer"], place.say("no such layer", "stderr")
    assert ended["codes"] and set(ended["codes"].values()) == {1}
    for rank in ended["codes"]:
        assert "error: layer 3 does not exist" in said[int(rank)]
    assert ended["files"] == {}


if __name__ == "__main__":
    _path = Path(sys.argv[1])
    _ended = {}
    # What the groups would import, each process of them again.
    AutoModelForCausalLM.from_pretrained(_path / "model")
    AutoTokenizer.from_pretrained(_path / "model")
    CliRunner().invoke(app, ["show", str(_path)])
    for _name, _group in json.loads((_path / "groups.json").read_text()).items():
        _ended[_name] = launch(_group, _path / "logs" / _name)
        if "command" in _group:
            _ended[_name]["files"] = files_of(Path(_group["folder"]))
    (_path / "ended.json").write_text(json.dumps(_ended))
