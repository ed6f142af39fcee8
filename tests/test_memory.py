"""How many suffix tokens are held at once: what a graph holds is counted another way,
by walking it, and free memory is read as the system tells it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_kit import CONTEXTS, EDITS, Tiny
from torch import Tensor

from unified_edit.model import memory, partial
from unified_edit.model.descent import Targets, TargetSettings
from unified_edit.model.memory import MOST_TOKENS, affordable_tokens, free_memory
from unified_edit.model.rows import Row, chunks_of, make_rows
from unified_edit.model.suffixes import Chunk, as_buckets, run_whole
from unified_edit.model.targets import optimize_targets

CPU = torch.device("cpu")
SETTINGS = TargetSettings("block_output", steps=3, learning_rate=0.3)


def rows_of_edits(tiny: Tiny) -> list[list[Row]]:
    return make_rows(
        tiny.tokenizer, EDITS, CONTEXTS, SETTINGS.kl_prompts, SETTINGS.kl_position
    )


def chunk_of(tiny: Tiny, rows: list[list[Row]]) -> Chunk:
    """Edits after one pass over the whole of them."""
    numbered = [replace(row, edit=i) for i, each in enumerate(rows) for row in each]
    return run_whole(tiny.adapter, numbered, SETTINGS.site, 1)


@pytest.fixture
def frozen(tiny: Tiny) -> Iterator[Tiny]:
    """As while targets are optimised: the graph begins at δ."""
    tiny.model.requires_grad_(False)
    yield tiny
    tiny.model.requires_grad_(True)


@pytest.fixture
def chunk(frozen: Tiny) -> Chunk:
    return chunk_of(frozen, rows_of_edits(frozen))


def held_by_graph(chunk: Chunk) -> tuple[int, int]:
    """Bytes that the graph of one evaluation keeps, by what its nodes say they saved,
    and the tokens it ran over."""
    model = chunk.adapter.model
    weights = {
        parameter.untyped_storage().data_ptr() for parameter in model.parameters()
    }
    found: dict[int, int] = {}
    tokens, waiting, seen = 0, [], set()
    for bucket in as_buckets(chunk, range(chunk.rows[-1].edit + 1)):
        delta = torch.zeros(len(bucket.edits), chunk.values.shape[1])
        losses, _ = bucket.measure(delta.requires_grad_())
        waiting.append(losses.grad_fn)
        tokens += bucket.ids.numel()
    roots = list(waiting)  # what is saved lives as long as they
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for name in dir(node):
            value = getattr(node, name) if name.startswith("_saved_") else None
            for tensor in value if isinstance(value, (tuple, list)) else [value]:
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
        waiting += [after for after, _ in node.next_functions]
    assert len(seen) > 20 * len(roots)
    return sum(n for place, n in found.items() if place not in weights), tokens


def with_free(monkeypatch: pytest.MonkeyPatch, free: int | None) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: free)


@pytest.mark.parametrize("free", [None, 0, 1, 10_000, 300_000, 10**7, 10**9, 10**14])
def test_tokens_are_a_power_of_two_up_to_the_most(
    chunk: Chunk, free: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, free)
    tokens = affordable_tokens(chunk)
    assert 1 <= tokens <= MOST_TOKENS["cpu"]
    assert tokens & (tokens - 1) == 0
    if free is None or free >= 10**9:
        assert tokens == MOST_TOKENS["cpu"]
    if free is not None and free <= 1:
        assert tokens == 1


def test_tokens_grow_with_free_memory(
    chunk: Chunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for power in range(10, 32):
        with_free(monkeypatch, 2**power)
        found.append(affordable_tokens(chunk))
    assert found[0] == 1 and found[-1] == MOST_TOKENS["cpu"]
    # Twice the memory is twice the tokens, within the limits.
    between = [tokens for tokens in found if 1 < tokens < MOST_TOKENS["cpu"]]
    assert len(between) > 5
    start = found.index(between[0])
    assert found[start : start + len(between)] == between
    assert between == [between[0] << index for index in range(len(between))]


@pytest.mark.parametrize("cost", [0.0, 1e9], ids=["several groups", "one"])
def test_an_edits_graph_is_counted_right(
    frozen: Tiny, cost: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where free memory begins to suffice for 256 tokens tells what one is said to
    take."""
    monkeypatch.setitem(partial._PASS_COST, "cpu", cost)
    for rows in rows_of_edits(frozen):
        chunk = chunk_of(frozen, [rows])
        held, tokens = held_by_graph(chunk)
        expected = 256 * held / tokens / memory._SHARE
        with_free(monkeypatch, int(0.99 * expected))
        assert affordable_tokens(chunk) == 128
        with_free(monkeypatch, int(1.01 * expected))
        assert affordable_tokens(chunk) == 256


@pytest.mark.parametrize("free", [4 * 10**5, 10**6, 2 * 10**6])
def test_what_is_promised_fits(
    frozen: Tiny, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One edit stands for all: whatever edits make up a part, its graph holds about
    what they were reckoned to, and no more than half of what is free."""
    # A pass through a block of real size costs less than padding rows for it.
    monkeypatch.setitem(partial._PASS_COST, "cpu", 0.0)
    with_free(monkeypatch, free)
    rows = rows_of_edits(frozen) * 4
    budget = affordable_tokens(chunk_of(frozen, rows[:1]))
    assert 1 < budget < MOST_TOKENS["cpu"]
    parts = [rows[part.start : part.stop] for part in chunks_of(rows, budget)]
    assert len(parts) > 1
    for part in parts:
        held, tokens = held_by_graph(chunk_of(frozen, part))
        assert tokens == sum(len(row.suffix) for each in part for row in each)
        assert held < 1.1 * free / 2 or len(part) == 1
    # The budget is no less than it must be; a power of two loses at most half.
    held, tokens = held_by_graph(chunk_of(frozen, rows))
    assert 0.35 * free / 2 < budget * held / tokens < 1.1 * free / 2


def test_measuring_leaves_no_gradient_and_no_graph(chunk: Chunk) -> None:
    before = affordable_tokens(chunk)
    assert affordable_tokens(chunk) == before
    assert chunk.values.grad is None and not chunk.values.requires_grad
    assert all(p.grad is None for p in chunk.adapter.model.parameters())


def optimized(tiny: Tiny, budget: int | None) -> tuple[Targets, int]:
    """Targets, and the most rows that were in a pass for δ."""
    most = [0]

    def hook(_: Any, __: Any, given: dict[str, Any], output: Any) -> None:
        if output.logits.requires_grad:
            most[0] = max(most[0], len(given["input_ids"]))

    handle = tiny.model.register_forward_hook(hook, with_kwargs=True)
    try:
        found = optimize_targets(
            tiny.adapter,
            tiny.tokenizer,
            EDITS,
            CONTEXTS,
            1,
            SETTINGS,
            token_budget=budget,
        )
    finally:
        handle.remove()
    return found, most[0]


def assert_same(one: Targets, other: Targets) -> None:
    for name in Targets.__dataclass_fields__:
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_the_budget_is_found_where_none_is_given(
    tiny: Tiny, chunk: Chunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = len(CONTEXTS.templates) + len(SETTINGS.kl_prompts)
    sizes = rows_of_edits(tiny)
    # As a rule all edits are one part, the same whatever is free.
    found, most = optimized(tiny, None)
    assert most == rows * len(EDITS)
    assert_same(found, optimized(tiny, MOST_TOKENS["cpu"])[0])
    for free in (0, 4 * 10**5):
        with_free(monkeypatch, free)
        budget = affordable_tokens(chunk)
        parts = [len(part) for part in chunks_of(sizes, budget)]
        assert len(parts) == len(EDITS) if free == 0 else 1 < len(parts) < len(EDITS)
        found, most = optimized(tiny, None)
        assert most == rows * max(parts)
        assert_same(found, optimized(tiny, budget)[0])


linux = pytest.mark.skipif(
    not Path("/proc/meminfo").exists(), reason="not a Linux system"
)


@linux
def test_free_memory_is_what_the_system_says() -> None:
    def said(name: str) -> int:
        (kilobytes,) = re.findall(
            rf"^{name}:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE
        )
        return 1024 * int(kilobytes)

    slack = said("MemTotal") // 10  # others work beside
    found = free_memory(CPU)
    assert found is not None and 0 < found <= said("MemAvailable") + slack
    limit = Path("/sys/fs/cgroup/memory.max")
    if not limit.exists() or limit.read_text().strip() == "max":
        assert found >= said("MemAvailable") - slack


def test_free_memory_of_other_devices_is_not_the_cpus() -> None:
    assert free_memory(torch.device("meta")) is None


def test_meminfo(tmp_path: Path) -> None:
    path = tmp_path / "meminfo"
    assert memory._available(path) is None
    path.write_text("MemTotal:       200 kB\nMemAvailable:    123 kB\nBuffers: 4 kB\n")
    assert memory._available(path) == 123 * 1024
    path.write_text("MemTotal:       200 kB\n")  # Linux before 3.14
    assert memory._available(path) is None


def test_control_groups(tmp_path: Path) -> None:
    assert memory._cgroup(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000000\n")
    assert memory._cgroup(tmp_path) is None
    (tmp_path / "memory.current").write_text("400000\n")
    assert memory._cgroup(tmp_path) == 600_000
    (tmp_path / "memory.current").write_text("1000001\n")
    assert memory._cgroup(tmp_path) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._cgroup(tmp_path) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_free_memory_of_a_gpu_counts_what_torch_has_not_given_out() -> None:
    device = torch.device("cuda")
    before = free_memory(device)
    taken = torch.ones(1 << 28, dtype=torch.uint8, device=device)
    during = free_memory(device)
    del taken  # torch keeps it reserved
    after = free_memory(device)
    assert before is not None and during is not None and after is not None
    assert before - during >= 1 << 28
    assert after - during >= 1 << 28
