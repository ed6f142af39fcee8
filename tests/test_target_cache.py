"""Optimised targets on disk: what is known is not optimised again and comes back bit
for bit; whatever it depends on makes it unknown; files are whole or not there."""

from __future__ import annotations

import copy
import math
import os
import re
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_kit import (
    CONTEXTS,
    EDITS,
    Tiny,
    assert_same_bits,
    make_model,
    make_tokenizer,
)
from safetensors.torch import load_file, save_file
from torch import nn

from unified_edit.engine import edit
from unified_edit.errors import NonFiniteError, UnifiedEditError
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.descent import Targets, TargetSettings
from unified_edit.model.prompts import Contexts
from unified_edit.model.targets import optimize_targets
from unified_edit.recipes import recipe
from unified_edit.target_cache import TargetCache

SETTINGS = TargetSettings("block_output", steps=3, learning_rate=0.3)


def optimized(tiny: Tiny, cache: TargetCache | None = None, **changes: Any) -> Targets:
    wanted = {
        "adapter": tiny.adapter,
        "tokenizer": tiny.tokenizer,
        "edits": EDITS,
        "contexts": CONTEXTS,
        "layer": 1,
        "settings": SETTINGS,
        "token_budget": 4096,  # so that nothing runs to find one
    }
    return optimize_targets(**{**wanted, **changes}, cache=cache)


@contextmanager
def passes_of(model: nn.Module) -> Iterator[list[tuple[int, bool]]]:
    """Of each forward pass: how many rows, and whether a δ is optimised through it."""
    seen: list[tuple[int, bool]] = []

    def hook(_: nn.Module, __: Any, given: dict[str, Any], output: Any) -> None:
        seen.append((len(given["input_ids"]), output.logits.requires_grad))

    handle = model.register_forward_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def assert_same_targets(found: Targets | None, expected: Targets) -> None:
    for name in Targets.__dataclass_fields__:
        one, other = getattr(found, name), getattr(expected, name)
        assert one.dtype == other.dtype and torch.equal(one, other), name


def files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("site", ["mlp_output", "block_output"])
def test_a_second_run_runs_nothing_and_gives_the_same_bits(
    tiny: Tiny, site: Any, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, site=site)
    without = optimized(tiny, settings=settings)
    first = optimized(tiny, TargetCache(tmp_path), settings=settings)
    assert_same_targets(first, without)
    for order in ([0, 1, 2, 3, 4], [3, 0, 4, 1, 2, 0], [4]):
        some, cache = [EDITS[index] for index in order], TargetCache(str(tmp_path))
        with passes_of(tiny.model) as passes:
            again = optimized(tiny, cache, edits=some, settings=settings)
        assert passes == []
        assert_same_targets(again, without.select(*order))


def test_float64_comes_back_as_float64_and_is_not_float32s(
    tiny64: Tiny, tmp_path: Path
) -> None:
    cache = TargetCache(tmp_path)
    first = optimized(tiny64, cache)
    with passes_of(tiny64.model) as passes:
        assert_same_targets(optimized(tiny64, cache), first)
    assert passes == [] and first.values.dtype == torch.float64
    narrow = ModelAdapter.of(copy.deepcopy(tiny64.model).float())
    found = optimized(tiny64, cache, adapter=narrow)
    assert found.values.dtype == torch.float32
    assert len(files_in(tmp_path)) == 2 * len(EDITS)


def test_files_are_named_by_keys_and_nothing_else_is_left(
    gpt2: Tiny, tmp_path: Path
) -> None:
    cache = TargetCache(tmp_path / "not" / "yet")
    found = optimized(gpt2, cache)
    assert len(files_in(tmp_path)) == len(EDITS)
    for path in files_in(tmp_path):
        assert re.fullmatch("[0-9a-f]{64}", path.stem)
        assert path == cache.file(path.stem)
        assert path == tmp_path / "not" / "yet" / path.stem[:2] / path.name
        same = (found.values == load_file(path)["values"]).all(dim=1)
        assert_same_targets(cache.get(path.stem), found.select(int(same.nonzero())))


def test_only_unknown_edits_are_optimised(tiny: Tiny, tmp_path: Path) -> None:
    cache = TargetCache(tmp_path)
    known, unknown = [1, 3], [0, 2, 4]
    first = optimized(tiny, cache, edits=[EDITS[index] for index in known])
    with passes_of(tiny.model) as passes:
        found = optimized(tiny, cache)
    rows = len(CONTEXTS.templates) + len(SETTINGS.kl_prompts)
    assert found.steps.tolist() == [SETTINGS.steps] * len(EDITS)
    assert sum(count for count, by_delta in passes if by_delta) == (
        SETTINGS.steps * len(unknown) * rows
    )
    alone = optimized(tiny, edits=[EDITS[index] for index in unknown])
    assert_same_targets(found.select(*known), first)
    assert_same_targets(found.select(*unknown), alone)


def test_what_was_done_before_an_error_is_kept(llama: Tiny, tmp_path: Path) -> None:
    """The third subject's embedding is NaN: of its edit, and of those after it, nothing
    is known."""
    (token,) = llama.tokenizer(" Nunes", add_special_tokens=False)["input_ids"]
    model = copy.deepcopy(llama.model)
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = math.nan
    damaged, cache = ModelAdapter.of(model), TargetCache(tmp_path)
    with pytest.raises(NonFiniteError, match="edit 2 "):
        optimized(llama, cache, adapter=damaged, token_budget=1)
    assert len(files_in(tmp_path)) == 2
    with passes_of(model) as passes:
        found = optimized(llama, cache, adapter=damaged, edits=EDITS[:2])
    assert passes == []
    for index in range(2):
        alone = optimized(llama, adapter=damaged, edits=EDITS[index : index + 1])
        assert_same_targets(found.select(index), alone)


def test_recipes_with_the_same_target_settings_share_targets(
    tiny: Tiny, tmp_path: Path
) -> None:
    cache = TargetCache(tmp_path)

    def run(method: str, **changes: Any) -> tuple[list[float], int]:
        """Each edit's `optimised` in the report, and how many passes it took."""
        wanted = recipe(method, **{"layers": [0, 1], "steps": 3, **changes})
        with passes_of(tiny.model) as passes:
            result = edit(
                tiny.model,
                tiny.tokenizer,
                EDITS,
                wanted,
                tiny.statistics,
                contexts=CONTEXTS,
                target_cache=cache,
            )
        optimised = [outcome.optimised for outcome in result.report.outcomes]
        return optimised, sum(by_delta for _, by_delta in passes)

    first, passes = run("memit")
    assert passes >= 3
    # From now on the files lie, so that who reads them can be told.
    for path in files_in(tmp_path):
        held = load_file(path)
        held["probability"] = 1 + held["probability"]
        save_file(held, path)
    expected = [1 + probability for probability in first]
    for method, changes in (
        ("memit", {"preservation_weight": 3.0}),
        ("memit", {"layers": [1], "key_average": "clean"}),
        ("emmet", {"layers": [1]}),
        ("alphaedit", {"ridge": 2.0, "null_space_threshold": 0.5}),
    ):
        assert run(method, **changes) == (pytest.approx(expected), 0), (method, changes)
    for method, changes in (
        ("memit", {"layers": [0, 1, 2]}),
        ("rome", {"layers": [1]}),
    ):
        optimised, passes = run(method, **changes)
        assert passes >= 3 and max(optimised) < 1, (method, changes)


def _with_one_weight_changed(gpt2: str, llama: str) -> Callable[[Tiny], Any]:
    def change(tiny: Tiny) -> dict[str, Any]:
        model = copy.deepcopy(tiny.model)
        name = gpt2 if tiny.kind == "gpt2" else llama
        with torch.no_grad():
            value = model.get_parameter(name).view(-1)[5]
            value.copy_(torch.nextafter(value, torch.tensor(9.0)))
        return {"adapter": ModelAdapter.of(model)}

    return change


def _with_config(gpt2: dict[str, Any], llama: dict[str, Any]) -> Callable[[Tiny], Any]:
    def change(tiny: Tiny) -> dict[str, Any]:
        config = gpt2 if tiny.kind == "gpt2" else llama
        model = make_model(tiny.kind, len(tiny.tokenizer), **config)
        assert_same_bits(model, tiny.model.state_dict())
        return {"adapter": ModelAdapter.of(model)}

    return change


def _with_another_tokenizer(tiny: Tiny) -> dict[str, Any]:
    tokenizer = make_tokenizer(tiny.kind, texts=["these letters are other ones"] * 9)
    assert len(tokenizer) <= len(tiny.tokenizer)
    return {"tokenizer": tokenizer}


def _edits(**changes: str) -> Callable[[Tiny], Any]:
    return lambda _: {"edits": [replace(each, **changes) for each in EDITS[:2]]}


CHANGES: dict[str, Callable[[Tiny], dict[str, Any]]] = {
    "a layer norm's weight": _with_one_weight_changed(
        "transformer.h.2.ln_1.weight", "model.layers.2.input_layernorm.weight"
    ),
    "an MLP's weight below": _with_one_weight_changed(
        "transformer.h.0.mlp.c_fc.weight", "model.layers.0.mlp.up_proj.weight"
    ),
    "an embedding": _with_one_weight_changed(
        "transformer.wte.weight", "model.embed_tokens.weight"
    ),
    "what the norm adds": _with_config(
        {"layer_norm_epsilon": 1e-3}, {"rms_norm_eps": 1e-3}
    ),
    "how positions turn, scores scale": _with_config(
        {"scale_attn_by_inverse_layer_idx": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "attention's code": _with_config(*[{"attn_implementation": "eager"}] * 2),
    "tokenizer": _with_another_tokenizer,
    "prompts": _edits(prompt="{} once said"),
    "subjects": _edits(subject="Carla Nunes"),
    "targets": _edits(target="Lyon"),
    "a context": lambda _: {"contexts": Contexts((*CONTEXTS.templates[:2], "Or. {}"))},
    "more contexts": lambda _: {"contexts": Contexts((*CONTEXTS.templates, "Or. {}"))},
    "layer": lambda _: {"layer": 0},
}
FIELDS: dict[str, Any] = {
    "site": "mlp_output",
    "steps": 2,
    "learning_rate": 0.4,
    "clamp": 0.5,
    "weight_decay": 0.25,
    "kl_factor": 0.125,
    "kl_prompts": ("{} was a",),
    "kl_position": "end",
    "loss_threshold": 0.25,
    "most_probable_stop": 1,
}


@pytest.mark.parametrize("name", [*CHANGES, *FIELDS])
def test_whatever_changes_is_a_miss(tiny: Tiny, name: str, tmp_path: Path) -> None:
    assert FIELDS.keys() == {field.name for field in fields(TargetSettings)}
    cache = TargetCache(tmp_path)
    optimized(tiny, cache, edits=EDITS[:2])
    before = {path: path.read_bytes() for path in files_in(tmp_path)}
    settings = replace(SETTINGS, **{name: FIELDS[name]} if name in FIELDS else {})
    changed: dict[str, Any] = {"edits": EDITS[:2], "settings": settings}
    changed |= CHANGES[name](tiny) if name in CHANGES else {}
    assert_same_targets(optimized(tiny, cache, **changed), optimized(tiny, **changed))
    assert len(files_in(tmp_path)) == 4
    assert all(path.read_bytes() == held for path, held in before.items())


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "cut in its header": lambda path: path.write_bytes(path.read_bytes()[:11]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("these are no tensors, but a long text"),
    "other tensors": lambda path: save_file({"values": torch.ones(1, 16)}, path),
    "one too many": lambda path: save_file(
        {**load_file(path), "more": torch.ones(1)}, path
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_replaced(
    gpt2: Tiny, damage: str, tmp_path: Path
) -> None:
    cache = TargetCache(tmp_path)
    first = optimized(gpt2, cache)
    (path,) = (
        path
        for path in files_in(tmp_path)
        if torch.equal(load_file(path)["values"], first.select(2).values)
    )
    DAMAGES[damage](path)
    with pytest.warns(UserWarning, match=re.escape(str(path))) as warned:
        found = optimized(gpt2, cache)
    assert len(warned) == 1
    assert_same_targets(found.select(2), optimized(gpt2, edits=EDITS[2:3]))
    assert_same_targets(found.select(0, 1, 3, 4), first.select(0, 1, 3, 4))
    with passes_of(gpt2.model) as passes:
        again = optimized(gpt2, cache)
    assert passes == []
    assert_same_targets(again, found)
    assert len(files_in(tmp_path)) == len(EDITS)


KEY = "ab" + 62 * "0"


@pytest.fixture
def held(gpt2: Tiny) -> Targets:
    return optimized(gpt2, edits=EDITS[:1])


def test_what_stands_in_a_place_is_named_and_left(
    gpt2: Tiny, held: Targets, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UnifiedEditError, match=re.escape(str(tmp_path / "file"))):
        optimized(gpt2, TargetCache(tmp_path / "file"))
    path = TargetCache(tmp_path).file(KEY)
    path.mkdir(parents=True)
    with pytest.raises(UnifiedEditError, match=re.escape(str(path))):
        TargetCache(tmp_path).put(KEY, held)
    assert files_in(tmp_path) == {tmp_path / "file"} and path.is_dir()
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_serves_but_takes_nothing(
    held: Targets, tmp_path: Path
) -> None:
    cache = TargetCache(tmp_path)
    cache.put(KEY, held)
    (folder,) = tmp_path.iterdir()
    for key, place in ((KEY, folder), (KEY[::-1], tmp_path)):
        place.chmod(0o500)
        assert_same_targets(cache.get(KEY), held)
        with pytest.raises(UnifiedEditError, match="Permission denied"):
            cache.put(key, held)
        place.chmod(0o700)
    assert files_in(tmp_path) == {cache.file(KEY)}


@contextmanager
def _files_end_at(size: int) -> Iterator[None]:
    """The system refuses what would make a file longer, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
def test_no_room_for_a_file_leaves_none(
    held: Targets, share: float, tmp_path: Path
) -> None:
    cache = TargetCache(tmp_path)
    cache.put("ab" + 62 * "1", held)
    (kept,) = files_in(tmp_path)
    room = int(share * kept.stat().st_size)
    with _files_end_at(room), pytest.raises(Exception, match="(?i)too large"):
        cache.put(KEY, held)
    assert files_in(tmp_path) == {kept}
    assert cache.get(KEY) is None
    cache.put(KEY, held)
    assert_same_targets(cache.get(KEY), held)


@pytest.mark.parametrize("there", [False, True], ids=["new", "again"])
def test_a_process_killed_while_it_writes_leaves_no_half_file(
    held: Targets, there: bool, tmp_path: Path
) -> None:
    """The child is killed by the system in the midst of writing its file."""
    cache = TargetCache(tmp_path)
    if there:
        cache.put(KEY, held)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads and fork
        child = os.fork()
    if not child:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            with _files_end_at(200):
                cache.put(KEY, held)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXFSZ
    assert (cache.get(KEY) is not None) == there
    if not there:
        cache.put(KEY, held)
    assert_same_targets(cache.get(KEY), held)


def test_a_file_of_something_else_is_a_miss(tmp_path: Path) -> None:
    cache = TargetCache(tmp_path)
    good = Targets(
        values=torch.ones(1, 3),
        initial=torch.zeros(1, 3),
        probability=torch.ones(1),
        initial_probability=torch.ones(1),
        steps=torch.ones(1, dtype=torch.long),
    )
    cache.put("ab", good)
    found = cache.get("ab")
    assert found is not None and torch.equal(found.values, good.values)
    two = Targets(**{n: torch.cat([getattr(good, n)] * 2) for n in vars(good)})
    for wrong in (replace(good, values=good.values * math.nan), two):
        cache.put("ab", wrong)
        with pytest.warns(UserWarning, match="cannot be used"):
            assert cache.get("ab") is None
