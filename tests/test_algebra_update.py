"""The update: norms, adding to weights, and its file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unified_edit.algebra.addition import added
from unified_edit.algebra.update import (
    RankKUpdate,
    UpdateSet,
    WeightAddress,
)
from unified_edit.errors import NonFiniteError, UpdateError


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def make_update(
    d_value: int = 6, d_key: int = 9, rank: int = 3, seed: int = 0
) -> RankKUpdate:
    return RankKUpdate(
        normal(d_value, rank, seed=seed), normal(rank, d_key, seed=seed + 1)
    )


def make_set() -> UpdateSet:
    addresses = (
        WeightAddress("h.3.mlp.weight", 3, True, ("lm.h.3.mlp.weight",)),
        WeightAddress("h.11.mlp.weight", 11, False),
    )
    updates = {a: make_update(seed=i) for i, a in enumerate(addresses)}
    metadata = {
        "recipe": {"name": "memit", "layers": [3, 11], "λ": 15000.5},
        "seed": 7,
        "contexts": ["", "Ünder the sea. "],
        "statistics": None,
    }
    return UpdateSet(updates, metadata)


@pytest.mark.parametrize("shape", [(6, 9, 3), (5, 5, 5), (3, 4, 20), (2500, 3, 2)])
def test_norm_and_shape(shape: tuple[int, int, int]):
    update = make_update(*shape)
    assert update.norm() == pytest.approx(float(update.dense().norm()), rel=1e-13)
    assert update.shape == shape[:2] and update.rank == shape[2]
    half = update.to(torch.float16)
    product = half.left.double() @ half.right.double()
    assert half.norm() == pytest.approx(float(product.norm()), rel=1e-13)


def test_norm_of_nothing_and_of_what_was_taken_back():
    assert RankKUpdate(torch.zeros(4, 0), torch.zeros(0, 5)).norm() == 0
    update = make_update()
    back = update.then(RankKUpdate(-update.left, update.right))
    assert back.rank == 6
    assert back.norm() < 1e-14 * update.norm()


def test_then_adds_up():
    first, second = make_update(rank=2), make_update(rank=3, seed=5)
    joined = first.then(second)
    assert torch.allclose(joined.dense(), first.dense() + second.dense())
    with pytest.raises(UpdateError, match=r"\(6, 9\) and \(9, 6\)"):
        first.then(make_update(9, 6))


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        (torch.ones(3, 2), torch.ones(3, 4), r"\(3, 2\) and \(3, 4\)"),
        (torch.ones(3), torch.ones(3, 4), "factors must be"),
        (torch.ones(3, 2), torch.ones(2, 4).double(), "share dtype"),
        (torch.ones(3, 2), torch.ones(2, 4, device="meta"), "share dtype and device"),
        (torch.ones(3, 2).int(), torch.ones(2, 4).int(), "int32"),
    ],
)
def test_ill_fitting_factors_are_refused(left: Tensor, right: Tensor, message: str):
    with pytest.raises(UpdateError, match=message):
        RankKUpdate(left, right)


@pytest.mark.parametrize("shape", [(6, 9, 3), (8, 8, 2), (1100, 5, 4), (5, 1100, 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_added_in_either_orientation(shape: tuple[int, int, int], transposed: bool):
    update = make_update(*shape)
    stored = normal(*(update.shape[::-1] if transposed else update.shape), seed=9)
    before = stored.clone()
    result = added(stored, update, transposed=transposed)
    delta = update.dense().T if transposed else update.dense()
    assert torch.allclose(result, before + delta, rtol=0, atol=1e-13)
    assert torch.equal(stored, before)


def test_orientation_of_a_square_weight_is_told_and_not_guessed():
    update = make_update(8, 8)
    weight = normal(8, 8, seed=9)
    straight = added(weight, update, transposed=False)
    turned = added(weight, update, transposed=True)
    assert not torch.allclose(straight, turned)
    assert torch.allclose(turned - weight, (straight - weight).T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_added_rounds_once(dtype: torch.dtype):
    # Each change is a fifth of the spacing of the weight's dtype: added one by one,
    # or rounded before it is added, nothing would be left of it.
    step = torch.finfo(dtype).eps / 5
    weight = torch.ones(4, 7, dtype=dtype)
    update = RankKUpdate(
        torch.full((4, 4), step, dtype=torch.float64),
        torch.ones(4, 7, dtype=torch.float64),
    )
    result = added(weight, update, transposed=False)
    assert result.dtype == dtype
    assert torch.equal(result, weight + torch.finfo(dtype).eps)
    big = normal(64, 48, seed=2, dtype=dtype)
    change = make_update(64, 48)
    exact = (big.double() + change.dense()).to(dtype)
    ours = added(big, change, transposed=False)
    if dtype == torch.float32:  # one rounding of the sum, float32 ones of the product
        assert torch.allclose(ours, exact, rtol=0, atol=2e-6)
    else:
        assert float((ours != exact).float().mean()) < 0.01


def test_added_never_joins_a_graph_and_keeps_a_parameter_as_it_was():
    weight = nn.Parameter(normal(6, 9))
    before = weight.detach().clone()
    result = added(weight, make_update(), transposed=False)
    assert not result.requires_grad
    assert torch.equal(weight, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_is_refused(bad: float):
    update, weight = make_update(), normal(6, 9)
    for holder in (update.left, update.right, weight):
        kept = float(holder[1, 1])
        holder[1, 1] = bad
        with pytest.raises(NonFiniteError, match="not finite in torch.float64"):
            added(weight, update, transposed=False)
        holder[1, 1] = kept
    added(weight, update, transposed=False)
    with pytest.raises(NonFiniteError, match="float16"):  # 65504 is the largest
        large = RankKUpdate(update.left * 1e5, update.right)
        added(weight.half(), large, transposed=False)


def test_added_refuses_what_does_not_fit():
    update = make_update()
    with pytest.raises(UpdateError, match=r"\[6, 9\], this one is \[9, 6\]"):
        added(normal(9, 6), update, transposed=False)
    with pytest.raises(UpdateError, match=r"\[9, 6\], this one is \[6, 9\]"):
        added(normal(6, 9), update, transposed=True)
    for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn):
        with pytest.raises(UpdateError, match="cannot be added to.*dequantized"):
            added(torch.zeros(6, 9).to(dtype), update, transposed=False)


def test_file_round_trip(tmp_path: Path):
    saved = make_set()
    path = saved.save(tmp_path / "update.safetensors")
    loaded = UpdateSet.load(path)
    assert list(loaded.updates) == list(saved.updates)
    assert loaded.metadata == saved.metadata
    assert len(loaded) == 2
    for (address, ours), (_, theirs) in zip(saved, loaded, strict=True):
        assert torch.equal(ours.left, theirs.left), address
        assert torch.equal(ours.right, theirs.right)
        assert theirs.left.dtype == torch.float64
    assert os.listdir(tmp_path) == ["update.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_file_keeps_dtype(tmp_path: Path, dtype: torch.dtype):
    address = WeightAddress("w", 0, False)
    update = make_update().to(dtype)
    path = UpdateSet({address: update}).save(tmp_path / "u")
    loaded = UpdateSet.load(str(path)).updates[address]
    assert loaded.left.dtype == dtype and torch.equal(loaded.right, update.right)


def test_same_content_same_bytes(tmp_path: Path):
    one = make_set()
    turned = UpdateSet(
        dict(reversed(one.updates.items())), dict(reversed(one.metadata.items()))
    )
    first = one.save(tmp_path / "a").read_bytes()
    assert turned.save(tmp_path / "b").read_bytes() == first
    assert UpdateSet.load(tmp_path / "a").save(tmp_path / "c").read_bytes() == first
    other = UpdateSet(one.updates, {**one.metadata, "seed": 8})
    assert other.save(tmp_path / "d").read_bytes() != first


def test_factors_that_share_memory_or_are_views(tmp_path: Path):
    joint = normal(3, 20)
    update = RankKUpdate(joint[:, :6].T, joint[:, 6:15])
    tied = RankKUpdate(joint[:, :6].T, joint[:, 6:15])
    both = {WeightAddress("a", 0, False): update, WeightAddress("b", 1, True): tied}
    both[WeightAddress("c", 2, True)] = update
    square = normal(4, 4)
    both[WeightAddress("d", 3, True)] = RankKUpdate(square, square)
    loaded = UpdateSet.load(UpdateSet(both).save(tmp_path / "u"))
    for address, theirs in loaded:
        assert torch.equal(theirs.dense(), both[address].dense())


def test_saving_replaces_only_when_it_succeeds(tmp_path: Path):
    path = make_set().save(tmp_path / "u")
    before = path.read_bytes()
    updates = make_set().updates
    for bad in ({"x": float("nan")}, {"x": object()}, {"x": {1, 2}}):
        with pytest.raises(UpdateError, match="plain, finite JSON"):
            UpdateSet(updates, bad).save(path)
    with pytest.raises(UpdateError, match="cannot be written"):
        make_set().save(tmp_path / "nowhere" / "u")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UpdateError, match="folder: cannot be written"):
        make_set().save(tmp_path / "folder")
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["folder", "u"]


def test_a_tensor_named_twice_is_refused():
    update = make_update()
    twice = {WeightAddress("w", 0, False): update, WeightAddress("w", 1, False): update}
    with pytest.raises(UpdateError, match="named twice"):
        UpdateSet(twice)


def rewritten(
    path: Path, change: Any, tensors: dict[str, Tensor] | None = None
) -> None:
    """Rewrites an update file with its header changed in place by `change`."""
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["unified_edit"])
    kept = load_file(path)
    result = change(header)
    save_file(
        kept if tensors is None else {**kept, **tensors},
        path,
        metadata={"unified_edit": json.dumps(header if result is None else result)},
    )


def first(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = header["addresses"][0]
    return entry


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.update(format="unified-edit/update/99"),
        lambda h: h.pop("format"),
        lambda h: h.pop("addresses"),
        lambda h: h.pop("metadata"),
        lambda h: h.update(metadata=[1]),
        lambda h: h.update(addresses={}),
        lambda h: h.update(addresses=[3]),
        lambda h: h["addresses"].pop(),
        lambda h: h["addresses"].append(dict(first(h))),
        lambda h: h["addresses"].append({**first(h), "layer": 4}),
        lambda h: first(h).update(tensor="elsewhere"),
        lambda h: first(h).update(tensor=3),
        lambda h: first(h).update(layer="3"),
        lambda h: first(h).update(layer=True),
        lambda h: first(h).update(transposed="no"),
        lambda h: first(h).update(transposed=0),
        lambda h: first(h).update(aliases="abc"),
        lambda h: first(h).update(aliases=[1]),
        lambda h: first(h).update(aliases=None),
        lambda h: first(h).pop("aliases"),
        lambda h: first(h).update(surprise=1),
        lambda h: [1, 2],
        lambda h: "text",
    ],
)
def test_malformed_headers_are_refused_by_path(tmp_path: Path, change: Any):
    path = make_set().save(tmp_path / "u.safetensors")
    rewritten(path, lambda header: None)
    UpdateSet.load(path)  # rewriting alone does no harm
    rewritten(path, change)
    with pytest.raises(UpdateError, match="u.safetensors"):
        UpdateSet.load(path)


def test_malformed_tensors_are_refused(tmp_path: Path):
    name = "h.3.mlp.weight"
    for tensors in (
        {f"{name}/left": torch.ones(6, 5, dtype=torch.float64)},
        {f"{name}/left": torch.ones(6, 3)},
        {f"{name}/left": torch.ones(3)},
        {
            f"{name}/left": torch.ones(6, 3, dtype=torch.int64),
            f"{name}/right": torch.ones(3, 9, dtype=torch.int64),
        },
        {"stray": torch.ones(1)},
    ):
        path = make_set().save(tmp_path / "u.safetensors")
        rewritten(path, lambda header: None, tensors)
        with pytest.raises(UpdateError, match="u.safetensors"):
            UpdateSet.load(path)


def test_files_that_are_no_updates(tmp_path: Path):
    whole = make_set().save(tmp_path / "whole").read_bytes()
    path = tmp_path / "u.safetensors"
    contents = [b"", b"{}", b"\x00" * 64, whole[: len(whole) // 2], whole[:-1]]
    contents.append(b"\xff" * 8 + whole[8:])
    contents.append(whole + b"x")
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(UpdateError, match="u.safetensors"):
            UpdateSet.load(path)
    save_file({"w": torch.ones(2, 2)}, path)
    with pytest.raises(UpdateError, match="not an update file"):
        UpdateSet.load(path)
    save_file({"w": torch.ones(2, 2)}, path, metadata={"unified_edit": "[" * 100_000})
    with pytest.raises(UpdateError, match="u.safetensors"):
        UpdateSet.load(path)
    for missing in (tmp_path / "missing", tmp_path):
        with pytest.raises(UpdateError, match=missing.name):
            UpdateSet.load(missing)
