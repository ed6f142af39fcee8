"""Rounding towards keys: against the definition, and against rounding to nearest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unified_edit.algebra.addition import added
from unified_edit.algebra.rounding import feedback, leading, rounded
from unified_edit.algebra.update import RankKUpdate
from unified_edit.errors import NonFiniteError, UpdateError

HALF = [torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def keys_like(count: int, size: int, seed: int = 0) -> Tensor:
    """Keys as a GELU gives them: with a common direction, and unlike columns."""
    mixing = normal(64, size, seed=99) * torch.logspace(0, -1, size).double()
    return torch.nn.functional.gelu(normal(count, 64, seed=seed) @ mixing)


def case(rows: int, size: int, count: int) -> tuple[Tensor, RankKUpdate, Tensor]:
    """Weights, an update with keys and background, and C's root."""
    keys = keys_like(count, size)
    root = keys_like(4 * size, size, seed=1) / (4 * size) ** 0.5
    right = torch.linalg.solve(
        keys @ keys.T + 0.1 * torch.eye(count).double(), keys
    ).float()
    background = leading(root.T @ root)
    update = RankKUpdate(
        normal(rows, count, seed=2).float() * 0.1, right, keys.float(), background
    )
    return normal(rows, size, seed=3).float() * 0.02, update, root


@pytest.mark.parametrize(("count", "size", "extra"), [(3, 40, 0), (7, 150, 4)])
def test_gains_are_the_definition(count: int, size: int, extra: int) -> None:
    """(εI + Σ_{i ≥ j} k_i k_iᵀ)⁻¹ k_j, by a dense solve for each column."""
    keys = keys_like(count, size)
    background = normal(extra, size, seed=5) if extra else None
    found = feedback(keys, background, torch.float64)
    epsilon = 1.5 * (count / size) ** 2
    wide = keys / keys.norm(dim=1, keepdim=True)
    if background is not None:
        wide = torch.cat([wide, background * epsilon**0.5])
    ordered = wide[:, found.order]
    assert torch.allclose(found.keys, ordered, rtol=0, atol=1e-15)
    energy = ordered.square().sum(dim=0)
    assert bool((energy[:-1] >= energy[1:]).all())
    identity = torch.eye(len(wide), dtype=torch.float64)
    for j in range(size):
        rest = ordered[:, j:]
        expected = torch.linalg.solve(epsilon * identity + rest @ rest.T, ordered[:, j])
        assert torch.allclose(found.gains[:, j], expected, rtol=1e-8, atol=1e-10), j


def test_each_correction_is_the_least_squares_one() -> None:
    """One column at a time in plain loops, as optimal quantization is written down:
    the remaining entries take the smallest step that restores the keys' products."""
    size, count = 90, 4
    keys = keys_like(count, size)
    towards = feedback(keys, dtype=torch.float64)
    row = normal(1, size, seed=4)
    epsilon = 1.5 * (count / size) ** 2
    wanted, expected = row.clone(), torch.empty_like(row)
    hessian = keys / keys.norm(dim=1, keepdim=True)
    done: list[int] = []
    for j in towards.order.tolist():
        done.append(j)
        expected[0, j] = wanted[0, j].bfloat16().double()
        left = [k for k in range(size) if k not in done]
        if not left:
            break
        lost = (expected[:, done] - row[:, done]) @ hessian[:, done].T
        system = hessian[:, left] @ hessian[:, left].T
        system.diagonal().add_(epsilon)
        step = torch.linalg.solve(system, lost.T).T @ hessian[:, left]
        wanted[:, left] = row[:, left] - step
    found = rounded(row, towards, torch.bfloat16).double()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("transposed", [False, True])
def test_keys_are_kept_and_the_others_too(dtype: torch.dtype, transposed: bool) -> None:
    weight, update, root = case(64, 1024, 60)
    exact = weight.to(dtype).float() + update.dense()
    assert update.keys is not None
    stored = weight.to(dtype).T.contiguous() if transposed else weight.to(dtype)
    lost, damage = {}, {}
    for rounding in ("nearest", "keys"):
        after = added(stored, update, transposed=transposed, rounding=rounding)
        assert after.dtype == dtype and after.shape == stored.shape
        error = ((after.T if transposed else after).float() - exact).double()
        lost[rounding] = (error @ update.keys.double().T).norm(dim=0)
        damage[rounding] = float((error @ root.T).square().sum())
        # To a neighbour, or a few steps from it: never far away.
        steps = error.abs() / (torch.finfo(dtype).eps * exact.abs().double() + 1e-6)
        assert float((steps > 4).double().mean()) < 0.05
    assert float(lost["nearest"].norm() / lost["keys"].norm()) > 5
    assert float(lost["nearest"].max() / lost["keys"].max()) > 3
    assert damage["keys"] < 1.05 * damage["nearest"]


def test_both_orientations_give_the_same_numbers() -> None:
    weight, update, _ = case(300, 200, 5)  # more rows than one block
    half = weight.bfloat16()
    straight = added(half, update, transposed=False, rounding="keys")
    turned = added(half.T.contiguous(), update, transposed=True, rounding="keys")
    assert torch.equal(straight, turned.T)
    again = added(half, update, transposed=False, rounding="keys")
    assert torch.equal(straight, again)


def test_without_background_it_works_too() -> None:
    weight, update, _ = case(16, 256, 8)
    bare = RankKUpdate(update.left, update.right, update.keys)
    after = added(weight.bfloat16(), bare, transposed=False, rounding="keys")
    assert bool(torch.isfinite(after).all())
    assert not torch.equal(
        after, added(weight.bfloat16(), update, transposed=False, rounding="keys")
    )


def test_a_silent_or_repeated_key_does_no_harm() -> None:
    weight, update, _ = case(8, 128, 6)
    assert update.keys is not None
    update.keys[1] = 0
    update.keys[2] = update.keys[3]
    after = added(weight.half(), update, transposed=False, rounding="keys")
    assert bool(torch.isfinite(after).all())


@pytest.mark.parametrize("size", [3, 64, 300])
def test_leading_directions_are_those_of_a_dense_decomposition(size: int) -> None:
    root = keys_like(3 * size, size)
    second_moment = root.T @ root
    found = leading(second_moment, 8)
    count = min(8, size // 4)
    assert found.shape == (count, size)
    if not count:
        return
    values, vectors = torch.linalg.eigh(second_moment)
    top = vectors[:, -count:] * values[-count:].sqrt()
    others = values[:-count].mean()
    expected = top @ top.T / others
    # Exact up to how well the last of them are told from those that follow.
    assert torch.allclose(found.T @ found, expected, rtol=0, atol=1e-2 * expected.max())
    assert torch.equal(found, leading(second_moment, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_needs_no_such_thing(dtype: torch.dtype) -> None:
    weight, update, _ = case(8, 64, 3)
    with pytest.raises(UpdateError, match="is for half precision.*round to nearest"):
        added(weight.to(dtype), update, transposed=False, rounding="keys")


def test_refusals() -> None:
    weight, update, _ = case(8, 64, 3)
    bare = RankKUpdate(update.left, update.right)
    with pytest.raises(UpdateError, match="needs the edits' keys"):
        added(weight.half(), bare, transposed=False, rounding="keys")
    with pytest.raises(UpdateError, match="'up'; choose one of nearest, keys"):
        added(weight.half(), update, transposed=False, rounding="up")  # type: ignore[arg-type]
    huge = RankKUpdate(update.left * 1e8, update.right, update.keys)
    with pytest.raises(NonFiniteError, match="float16"):
        added(weight.half(), huge, transposed=False, rounding="keys")
    with pytest.raises(UpdateError, match=r"keys must be \[n, 64\]"):
        RankKUpdate(update.left, update.right, normal(3, 63))
    with pytest.raises(UpdateError, match=r"background must be \[n, 64\]"):
        RankKUpdate(update.left, update.right, update.keys, normal(64))
