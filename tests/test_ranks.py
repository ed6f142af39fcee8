"""Processes that share the targets: whatever their number, every one has the bits that
one process alone finds, or the error that it raises.

This file is also what is run beside the tests: it starts groups of processes with
torchrun's own agent, forked from a process that has imported everything, as each import
would take longer than `job` does. The command is started by `torchrun` itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_kit import disk
from cli_kit import answer, make_workplace
from model_kit import CONTEXTS, EDITS, make_model, make_tokenizer
from torch import Tensor

from covariance_cache.ranks import ALONE, Ranks, joined
from unified_edit.errors import NonFiniteError
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.descent import Targets, TargetSettings
from unified_edit.model.rows import Row, chunks_of, make_rows
from unified_edit.model.targets import optimize_targets
from unified_edit.target_cache import TargetCache

pytestmark = pytest.mark.slow

SETTINGS = TargetSettings("block_output", steps=4, clamp=3.0, learning_rate=0.3)
LAYER, BAD = 1, 3
BUDGETS = {"each edit alone": 1, "two chunks": 80, "one chunk": None}


class Watched(TargetCache):
    """Counts what it is asked."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reads = self.writes = 0

    def get(self, key: str) -> Targets | None:
        self.reads += 1
        return super().get(key)

    def put(self, key: str, targets: Targets) -> None:
        self.writes += 1
        super().put(key, targets)


def rows_of_edits(tokenizer: Any) -> list[list[Row]]:
    return make_rows(
        tokenizer, EDITS, CONTEXTS, SETTINGS.kl_prompts, SETTINGS.kl_position
    )


def job(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """What one of the processes finds: targets by budget, with a bar, with a cache;
    the error of one edit; and targets again after it."""
    tokenizer = make_tokenizer("llama")
    model = make_model("llama", len(tokenizer))
    adapter = ModelAdapter.of(model)

    def targets(edits: Any = EDITS, budget: int | None = 1, **options: Any) -> Any:
        found = optimize_targets(
            adapter, tokenizer, edits, CONTEXTS, LAYER, SETTINGS,
            token_budget=budget, ranks=ranks, **options,
        )  # fmt: skip
        return vars(found)

    found = {name: targets(budget=budget) for name, budget in BUDGETS.items()}

    shown = StringIO()
    with redirect_stderr(shown):
        found["with a bar"] = targets(progress=True)

    cache = Watched(folder / "cache")
    asked = []
    for name, edits in (("cold", EDITS[:2]), ("half warm", EDITS), ("warm", EDITS)):
        found[name] = targets(edits, cache=cache)
        asked.append((cache.reads, cache.writes))
    # Where folders are not shared, each process has what it found itself.
    own = Watched(folder / f"own {ranks.rank}")
    for name in ("own, cold", "own, warm"):
        found[name] = targets(cache=own)
        asked.append((own.reads, own.writes))

    # A token of one edit only, in a model whose head is not tied to the embedding.
    rows = rows_of_edits(tokenizer)
    tokens = [{t for row in each for t in row.prefix + row.suffix} for each in rows]
    others = set().union(*tokens[:BAD], *tokens[BAD + 1 :])
    embedding = model.get_input_embeddings().weight.data
    good = embedding.clone()
    embedding[min(tokens[BAD] - others)] = float("nan")
    with pytest.raises(NonFiniteError) as caught:
        targets()
    found["error"] = str(caught.value)
    embedding.copy_(good)
    found["afterwards"] = targets(budget=BUDGETS["two chunks"])
    return {
        "found": found,
        "shown": shown.getvalue(),
        "asked": asked,
        "gathered": ranks.gather(f"of {ranks.rank}"),
        "is": [ranks.rank, ranks.world, ranks.local, ranks.first],
    }


def same(one: Any, two: Any) -> bool:
    """Equal, tensors to the bit."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    return bool(one == two)


def launch(world: int, folder: Path) -> None:
    """Runs `job` as `torchrun --standalone` does; what they say goes to a folder."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world,
        run_id=str(time.monotonic_ns()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
        monitor_interval=0.05,
        logs_specs=DefaultLogsSpecs(str(folder / "logs"), redirects=Std.ALL),
    )
    elastic_launch(config, run_job)(folder)


def run_job(folder: Path) -> None:
    with joined() as ranks:
        torch.save(job(folder, ranks), folder / f"{ranks.rank}.pt")


def python(*arguments: Any) -> str:
    """What a program and its processes say on stdout; none may wait for ever."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As many as each process of `torchrun` has: more could sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, job(folder, Ranks())


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What groups of two and of three processes left."""
    folders = {world: tmp_path_factory.mktemp(f"{world}") for world in (2, 3)}
    python(__file__, *(f"{world}:{folder}" for world, folder in folders.items()))
    return folders


def test_the_shares_are_what_they_shall_be() -> None:
    """More chunks than processes, and more processes than chunks."""
    rows = rows_of_edits(make_tokenizer("llama"))
    assert len(chunks_of(rows, BUDGETS["each edit alone"] or 0)) == len(EDITS) > 3
    assert len(chunks_of(rows, BUDGETS["two chunks"] or 0)) == 2


@pytest.mark.parametrize("world", [2, 3])
def test_every_process_has_what_one_alone_finds(
    alone: tuple[Path, dict[str, Any]], groups: dict[int, Path], world: int
) -> None:
    (folder, expected), theirs = alone, groups[world]
    assert f"edit {BAD} " in expected["found"]["error"]
    assert "embed_tokens" in expected["found"]["error"]
    said = list(theirs.glob("logs/*/attempt_0/*/stdout.log"))
    assert [each.read_text() for each in said] == [""] * world
    for rank in range(world):
        mine = torch.load(theirs / f"{rank}.pt", weights_only=True)
        for name, found in expected["found"].items():
            assert same(mine["found"][name], found), (rank, name)
        assert mine["gathered"] == [f"of {each}" for each in range(world)]
        assert mine["is"] == [rank, world, rank, rank == 0]
        first, second, all_of_them = (len(range(rank, n, world)) for n in (2, 3, 5))
        assert mine["asked"] == [
            (2, first),
            (7, first + second),
            (12, first + second),
            (5, all_of_them),
            (10, all_of_them),  # what another process has is not optimised again
        ]
        if rank:
            assert mine["shown"] == ""  # one process speaks for all
        else:
            assert f"targets, 1 of {world} shares: 100%" in mine["shown"]
            assert f" {all_of_them}/{all_of_them} " in mine["shown"]
    files = disk(theirs / "cache")
    assert files == disk(folder / "cache")
    assert sum(name.endswith(".safetensors") for name in files) == len(EDITS)


def test_one_process_asks_nobody(alone: tuple[Path, dict[str, Any]]) -> None:
    _, found = alone
    assert found["is"] == [0, 1, 0, True] and found["gathered"] == ["of 0"]
    assert f" {len(EDITS)}/{len(EDITS)} " in found["shown"]
    assert "targets: 100%" in found["shown"]
    assert found["asked"] == [(2, 2), (7, 5), (12, 5), (5, 5), (10, 5)]
    # Edits alone in their chunks have the same targets, cached or not.
    for name in ("with a bar", "half warm", "warm", "own, cold", "own, warm"):
        assert same(found["found"][name], found["found"]["each edit alone"]), name
    assert same(found["found"]["afterwards"], found["found"]["two chunks"])


def test_the_command_writes_and_answers_once(tmp_path: Path) -> None:
    place = make_workplace(tmp_path, "gpt2")
    budget = {"token-budget": 60}
    shared, own, plain = (tmp_path / f"{n}.safetensors" for n in ("a", "b", "c"))
    arguments = place.editing(out=shared, **budget, **{"target-cache": tmp_path / "a"})
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    stdout = python(*torchrun, "-m", "unified_edit", *arguments, "--json")
    assert stdout.count("\n") == 1
    said = json.loads(stdout)
    assert said["update"] == str(shared)
    cached = place.editing(out=own, **budget, **{"target-cache": tmp_path / "b"})
    one = answer(*cached)
    for each in (said, one):
        del each["update"], each["report"]["seconds"]
    assert said == one
    assert disk(tmp_path / "a") == disk(tmp_path / "b") != {}
    answer(*place.editing(out=plain, **budget))
    assert shared.read_bytes() == own.read_bytes() == plain.read_bytes()


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (None, "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if size is not None:
            monkeypatch.setenv("WORLD_SIZE", size)
        with joined() as ranks:
            assert ranks == ALONE == Ranks() and ranks.first
            assert not dist.is_initialized()
            mine = object()
            (back,) = ranks.gather(mine)
            assert back is mine


def test_devices() -> None:
    assert Ranks().device("cuda") == "cuda"
    second = Ranks(rank=5, world=8, local=1)
    assert not second.first
    assert second.device("cuda") == "cuda:1"
    for name in ("cpu", "cuda:0", "mps"):
        assert second.device(name) == Ranks().device(name) == name


if __name__ == "__main__":
    for _group in sys.argv[1:]:
        _world, _, _folder = _group.partition(":")
        launch(int(_world), Path(_folder))
