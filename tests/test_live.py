"""Updates on a loaded model: in force inside, the same bits outside."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from model_kit import KINDS, Tiny, assert_same_bits, make_model, state_of, weight_of

from covariance_cache import model_fingerprint
from unified_edit.algebra.update import RankKUpdate, UpdateSet
from unified_edit.errors import NonFiniteError, UpdateError
from unified_edit.live import applied, apply, revert
from unified_edit.model.adapter import ModelAdapter


def some_update(
    model: Any, layers: tuple[int, ...] = (0, 2), seed: int = 0, scale: float = 0.05
) -> UpdateSet:
    adapter = ModelAdapter.of(model)
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for layer in layers:
        d_value, d_key = adapter.matrix(layer).shape
        updates[adapter.address(layer)] = RankKUpdate(
            scale * torch.randn(d_value, 2, generator=generator),
            torch.randn(2, d_key, generator=generator),
        )
    return UpdateSet(updates, {"base_fingerprint": model_fingerprint(model)})


@pytest.fixture(params=KINDS)
def model(request: Any) -> Any:
    return make_model(request.param)


def kind_of(model: Any) -> str:
    return str(model.config.model_type)


def test_apply_adds_exactly_the_update_and_reports_it(model: Any) -> None:
    update = some_update(model)
    before = {i: weight_of(model, kind_of(model), i).clone() for i in range(3)}
    others = state_of(model)
    handle = apply(model, update)
    assert set(handle.changes) == {address.tensor for address, _ in update}
    for address, factors in update:
        weight = weight_of(model, kind_of(model), address.layer)
        expected = before[address.layer].double() + factors.dense().double()
        assert torch.allclose(weight.double(), expected, atol=1e-6)
        norm = float(factors.dense().norm() / before[address.layer].norm())
        assert math.isclose(handle.changes[address.tensor], norm, rel_tol=1e-4)
    for name, tensor in model.state_dict().items():
        if name not in handle.changes:
            assert torch.equal(tensor, others[name]), name
    revert(handle)
    assert_same_bits(model, others)


def test_outputs_change_inside_and_not_outside(model: Any) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with applied(model, some_update(model)):
            inside = model(input_ids=ids).logits
        after = model(input_ids=ids).logits
    assert not torch.allclose(inside, before, atol=1e-3)
    assert torch.equal(after, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_rounded_once_and_reverted(
    model: Any, dtype: torch.dtype
) -> None:
    model = model.to(dtype)
    before = state_of(model)
    update = some_update(model)
    with applied(model, update) as handle:
        for address, factors in update:
            weight = model.get_parameter(address.tensor)
            assert weight.dtype == dtype
            change = factors.dense().T if address.transposed else factors.dense()
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            exact = before[address.tensor].to(wide) + change.to(wide)
            # One rounding: off by at most one unit of the last place.
            error = (weight.to(wide) - exact).abs()
            assert bool((error <= torch.finfo(dtype).eps * exact.abs() + 1e-6).all())
            assert handle.changes[address.tensor] > 0
    assert_same_bits(model, before)


def test_nested_updates_revert_in_turn(model: Any) -> None:
    before = state_of(model)
    first = some_update(model, seed=1)
    with applied(model, first):
        middle = state_of(model)
        with applied(model, some_update(model, seed=2)):
            pass
        assert_same_bits(model, middle)
        with applied(model, first, check_base=False):
            pass
        assert_same_bits(model, middle)
    assert_same_bits(model, before)


def test_out_of_order_is_refused_and_changes_nothing(model: Any) -> None:
    before = state_of(model)
    first = apply(model, some_update(model, (0, 2), seed=1))
    second = apply(model, some_update(model, (2,), seed=2))
    now = state_of(model)
    with pytest.raises(UpdateError, match="changed after this update was applied"):
        first.revert()
    assert_same_bits(model, now)
    second.revert()
    first.revert()
    assert_same_bits(model, before)


def test_a_second_revert_does_nothing(model: Any) -> None:
    before = state_of(model)
    handle = apply(model, some_update(model))
    handle.revert()
    handle.revert()
    assert_same_bits(model, before)
    with applied(model, some_update(model)) as inside:
        inside.revert()  # by hand, and again at the end of the block
    assert_same_bits(model, before)


def test_an_exception_inside_still_reverts(model: Any) -> None:
    before = state_of(model)
    with pytest.raises(KeyError, match="mine"):
        with applied(model, some_update(model)):
            raise KeyError("mine")
    assert_same_bits(model, before)


def test_another_model_is_refused(model: Any) -> None:
    other = make_model(kind_of(model), seed=9)
    update, before = some_update(other), state_of(model)
    with pytest.raises(UpdateError, match="made for the model .* this one is"):
        apply(model, update)
    assert_same_bits(model, before)
    with applied(model, update, check_base=False) as handle:
        assert len(handle.changes) == 2
    assert_same_bits(model, before)
    anonymous = UpdateSet(update.updates)
    with pytest.raises(UpdateError, match="made for the model None"):
        apply(model, anonymous)


def test_another_architecture_is_refused() -> None:
    update = some_update(make_model("gpt2"))
    with pytest.raises(UpdateError, match="no parameter 'transformer.h.0.mlp.c_proj"):
        apply(make_model("llama"), update, check_base=False)


def test_all_tensors_or_none(model: Any) -> None:
    """The second tensor does not fit; the first is not changed either."""
    update = some_update(model)
    (first, good), (second, _) = update
    before = state_of(model)
    for wrong, kind in (
        (RankKUpdate(torch.ones(3, 1), torch.ones(1, 4)), UpdateError),
        (RankKUpdate(good.left * math.inf, good.right), NonFiniteError),
        (RankKUpdate(good.left * 0, good.right), UpdateError),
    ):
        broken = UpdateSet({first: good, second: wrong}, update.metadata)
        with pytest.raises(kind):
            apply(model, broken)
        assert_same_bits(model, before)


@pytest.mark.parametrize("scale", [0.0, 1e-12])
def test_an_update_that_changes_nothing_is_refused(model: Any, scale: float) -> None:
    before = state_of(model)
    with pytest.raises(UpdateError, match="changes nothing in .*zero or is lost"):
        apply(model, some_update(model, scale=scale))
    assert_same_bits(model, before)


def test_an_update_of_no_tensor_is_refused(model: Any) -> None:
    empty = UpdateSet({}, {"base_fingerprint": model_fingerprint(model)})
    with pytest.raises(UpdateError, match="changes no tensor"):
        apply(model, empty)


def test_the_update_and_copies_of_the_model_are_left_alone(tiny: Tiny) -> None:
    model = copy.deepcopy(tiny.model)
    update = some_update(model)
    factors = [(u.left.clone(), u.right.clone()) for _, u in update]
    with applied(model, update):
        assert torch.equal(
            tiny.model.get_input_embeddings().weight,
            model.get_input_embeddings().weight,
        )
    for (left, right), (_, each) in zip(factors, update, strict=True):
        assert torch.equal(each.left, left) and torch.equal(each.right, right)
