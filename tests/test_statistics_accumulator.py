import pytest
import torch
from statistics_helpers import random_keys

from covariance_cache import (
    NonFiniteActivations,
    SecondMomentAccumulator,
    StatisticsError,
)


def brute_force(keys: torch.Tensor) -> torch.Tensor:
    wide = keys.double()
    return wide.T @ wide / len(keys)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def fed(*batches: torch.Tensor, **settings: torch.dtype) -> SecondMomentAccumulator:
    accumulator = SecondMomentAccumulator(batches[0].shape[1], **settings)
    for batch in batches:
        accumulator.update(batch)
    return accumulator


# 1,100 is wider than two panels and no multiple of one.
@pytest.mark.parametrize("d_key", [1, 7, 512, 1100])
def test_equals_a_float64_brute_force_uncentred(d_key):
    keys = random_keys(300, d_key)
    mean, count = fed(keys).freeze()
    assert count == 300
    assert mean.dtype == torch.float32
    assert torch.equal(mean, mean.T)
    assert relative_error(mean, brute_force(keys)) < 1e-6


def test_float64_products_are_exact_to_float64():
    keys = random_keys(500, 600).double()
    mean, _ = fed(keys, dtype=torch.float64).freeze()
    assert mean.dtype == torch.float64
    assert relative_error(mean, brute_force(keys)) < 1e-14


def test_half_precision_keys_lose_nothing():
    keys = random_keys(200, 16).bfloat16()
    mean, _ = fed(keys).freeze()
    assert relative_error(mean, brute_force(keys)) < 1e-6


def test_stays_accurate_where_a_float32_total_does_not():
    # Many small batches: what a float32 sum loses grows with their number.
    keys = random_keys(64_000, 8)
    accumulator, naive = SecondMomentAccumulator(8), torch.zeros(8, 8)
    for batch in keys.split(8):
        accumulator.update(batch)
        naive += batch.T @ batch
    mean, count = accumulator.freeze()
    expected = brute_force(keys)
    assert relative_error(mean, expected) < 1e-7
    assert relative_error(naive / count, expected) > 1e-6


def test_one_long_batch_is_as_accurate():
    keys = random_keys(200_000, 8)
    mean, _ = fed(keys).freeze()
    assert relative_error(mean, brute_force(keys)) < 1e-7


@pytest.mark.parametrize("sizes", [[1] * 60, [59, 1], [20, 40], [0, 60]])
def test_splitting_batches_changes_only_rounding(sizes):
    keys = random_keys(60, 30)
    mean, count = fed(*keys.split(sizes)).freeze()
    whole, _ = fed(keys).freeze()
    assert count == 60
    assert relative_error(mean, whole.double()) < 1e-6


def test_merging_equals_concatenating():
    keys = random_keys(100, 30)
    merged = fed(keys[:35])
    merged.merge(fed(keys[35:]))
    mean, count = merged.freeze()
    assert count == 100
    assert relative_error(mean, brute_force(keys)) < 1e-6
    # At batch boundaries it is the same sums in the same order: no rounding at all.
    assert torch.equal(mean, fed(keys[:35], keys[35:]).freeze()[0])


def test_freezing_is_a_copy_and_the_sum_goes_on():
    keys = random_keys(40, 5)
    accumulator = fed(keys[:20])
    early = accumulator.freeze()[0]
    kept = early.clone()
    accumulator.update(keys[20:])
    assert torch.equal(early, kept)
    assert relative_error(accumulator.freeze()[0], brute_force(keys)) < 1e-6


def test_a_saved_state_goes_on_bit_for_bit():
    keys = random_keys(90, 600)
    first = fed(keys[:40])
    second = SecondMomentAccumulator(600)
    second.load_state({name: value.clone() for name, value in first.state().items()})
    first.update(keys[40:])
    second.update(keys[40:])
    assert first.count == second.count == 90
    assert torch.equal(first.freeze()[0], second.freeze()[0])
    with pytest.raises(StatisticsError, match="600-dimensional|5-dimensional"):
        SecondMomentAccumulator(5).load_state(first.state())


def test_a_process_wide_permission_for_low_precision_is_neither_used_nor_lost():
    before = torch.get_float32_matmul_precision()
    keys = random_keys(300, 64)
    try:
        torch.set_float32_matmul_precision("medium")
        mean, _ = fed(keys).freeze()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert relative_error(mean, brute_force(keys)) < 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_refuses_non_finite_keys_and_names_the_row(value):
    accumulator = fed(random_keys(10, 4))
    keys = random_keys(10, 4)
    keys[6, 2] = value
    with pytest.raises(NonFiniteActivations, match="row 6") as caught:
        accumulator.update(keys)
    assert caught.value.row == 6
    assert accumulator.count == 10
    assert torch.equal(accumulator.freeze()[0], fed(random_keys(10, 4)).freeze()[0])


def test_finite_keys_whose_sum_overflows_are_no_false_alarm():
    keys = torch.full((4, 2), 1e38)
    accumulator = fed(keys.double(), dtype=torch.float64)
    assert torch.isfinite(accumulator.freeze()[0]).all()
    with pytest.raises(NonFiniteActivations, match="overflow"):
        fed(keys).freeze()


@pytest.mark.parametrize("shape", [(3, 5), (4,), (1, 3, 4)])
def test_refuses_keys_of_another_shape(shape):
    with pytest.raises(StatisticsError, match=r"\[tokens, 4\]"):
        SecondMomentAccumulator(4).update(torch.ones(shape))


def test_refuses_what_it_would_have_to_round_or_guess():
    with pytest.raises(StatisticsError, match="float64"):
        SecondMomentAccumulator(4).update(torch.ones(3, 4, dtype=torch.float64))
    with pytest.raises(StatisticsError, match="bfloat16"):
        SecondMomentAccumulator(4, dtype=torch.bfloat16)
    with pytest.raises(StatisticsError, match="meta"):
        SecondMomentAccumulator(4).update(torch.ones(3, 4, device="meta"))
    with pytest.raises(StatisticsError, match="at least 1"):
        SecondMomentAccumulator(0)
    with pytest.raises(StatisticsError, match="no keys"):
        SecondMomentAccumulator(4).freeze()
    with pytest.raises(StatisticsError, match="cannot merge"):
        SecondMomentAccumulator(4).merge(SecondMomentAccumulator(5))


def test_holds_no_graph():
    keys = random_keys(5, 4).requires_grad_()
    assert not fed(keys).freeze()[0].requires_grad
