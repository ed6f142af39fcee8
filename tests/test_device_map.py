"""Targets of a model whose blocks accelerate has put on their devices: its hooks are
forwards of their own on the modules, which a skipped block must get back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from model_kit import (
    CONTEXTS,
    EDITS,
    KINDS,
    LAYERS,
    assert_same_bits,
    make_model,
    make_tokenizer,
    state_of,
)
from torch import nn

from unified_edit.errors import NonFiniteError
from unified_edit.model.adapter import ModelAdapter, Site
from unified_edit.model.descent import Targets, TargetSettings
from unified_edit.model.targets import optimize_targets

accelerate = pytest.importorskip("accelerate")

LAYER = 1
SITES: tuple[Site, ...] = ("mlp_output", "block_output")
PARTS = {
    "gpt2": ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"),
    "llama": (
        "model.embed_tokens",
        "model.rotary_emb",
        "model.norm",
        "lm_head",
    ),
}
BLOCKS = {"gpt2": "transformer.h.{}", "llama": "model.layers.{}"}


def dispatched(model: Any, kind: str, devices: list[str], ends: str) -> Any:
    """The model with each block on its device, what is before and after them on
    another; all of them run where they are."""
    blocks = {BLOCKS[kind].format(i): device for i, device in enumerate(devices)}
    return accelerate.dispatch_model(
        model,
        {**dict.fromkeys(PARTS[kind], ends), **blocks},
        main_device=ends,
        force_hooks=True,
    )


def targets_of(model: Any, site: Site, steps: int = 5, **options: Any) -> Targets:
    settings = TargetSettings(site, steps=steps, clamp=4.0, learning_rate=0.3)
    return optimize_targets(
        ModelAdapter.of(model),
        make_tokenizer("llama"),
        EDITS,
        CONTEXTS,
        LAYER,
        settings,
        **options,
    )


def own_forwards(model: nn.Module) -> dict[str, Any]:
    """What instances have in place of their class's forward."""
    return {
        name: module.__dict__["forward"]
        for name, module in model.named_modules()
        if "forward" in module.__dict__
    }


def assert_identical(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one.keys() == two.keys()
    for name, forward in one.items():
        assert forward is two[name], name


class Counting(accelerate.hooks.ModelHook):  # type: ignore[misc, name-defined]
    """Counts how often accelerate runs a module."""

    def __init__(self) -> None:
        self.runs = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.runs += 1
        return args, kwargs


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_stay_and_targets_are_the_same_bits(kind: str, site: Site) -> None:
    expected = targets_of(make_model(kind), site)
    model = dispatched(make_model(kind), kind, ["cpu"] * LAYERS, "cpu")
    adapter = ModelAdapter.of(model)
    counters = [Counting() for _ in range(LAYERS)]
    for layer, counter in enumerate(counters):
        accelerate.hooks.add_hook_to_module(adapter.block(layer), counter, append=True)
    before, state = own_forwards(model), state_of(model)
    assert all(BLOCKS[kind].format(layer) in before for layer in range(LAYERS))
    found = targets_of(model, site)
    for name in Targets.__dataclass_fields__:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert_identical(own_forwards(model), before)
    assert_same_bits(model, state)
    # And blocks below δ were left out, hooks and all.
    skipped = LAYER + (site == "block_output")
    runs = [counter.runs for counter in counters]
    assert len(set(runs[:skipped])) == len(set(runs[skipped:])) == 1
    assert 0 < runs[0] < runs[-1] - 3


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_stay_when_a_step_fails(kind: str) -> None:
    """Only the step's own pass fails: blocks are being skipped then."""
    model = dispatched(make_model(kind), kind, ["cpu"] * LAYERS, "cpu")
    last = ModelAdapter.of(model).block(LAYERS - 1)
    before, passes = own_forwards(model), []

    def poison(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        passes.append(torch.is_grad_enabled())
        if not passes[-1]:
            return None
        assert own_forwards(model) != before
        bad = (output[0] if isinstance(output, tuple) else output) * math.nan
        return (bad, *output[1:]) if isinstance(output, tuple) else bad

    with last.register_forward_hook(poison), pytest.raises(NonFiniteError):
        targets_of(model, "block_output", token_budget=1000)
    assert passes[-1]
    assert_identical(own_forwards(model), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("devices", "ends"),
    [
        (["cpu", "cuda:0", "cuda:0"], "cpu"),
        (["cuda:0", "cuda:0", "cpu"], "cpu"),
        (["cpu", "cpu", "cuda:0"], "cpu"),
        (["cuda:0", "cpu", "cuda:0"], "cpu"),
        (["cuda:0"] * LAYERS, "cuda:0"),
    ],
    ids=["up", "down", "late", "between", "cuda"],
)
def test_blocks_on_two_devices(
    kind: str, site: Site, devices: list[str], ends: str
) -> None:
    """`ends` is the CPU where any block is: accelerate would move blocks that are on
    the CPU to another main device for each pass."""
    expected = targets_of(make_model(kind).double(), site)
    model = dispatched(make_model(kind).double(), kind, devices, ends)
    adapter = ModelAdapter.of(model)
    for layer, device in enumerate(devices):
        assert adapter.weight(layer).device == torch.device(device)
    before = own_forwards(model)
    # Chunks by budget, and as many tokens as free memory of both devices holds.
    for budget in (60, None):
        found = targets_of(model, site, token_budget=budget)
        assert_identical(own_forwards(model), before)
        for name in Targets.__dataclass_fields__:
            mine, other = getattr(found, name), getattr(expected, name)
            assert mine.device == torch.device("cpu") and mine.dtype == other.dtype
        assert torch.equal(found.steps, expected.steps)
        # Llama's norms are in float32, which devices round differently.
        tolerance = {"gpt2": 1e-6, "llama": 1e-3}[kind]
        for a, b in (
            (found.values - found.initial, expected.values - expected.initial),
            (found.initial, expected.initial),
            (found.probability, expected.probability),
        ):
            assert float((a - b).norm()) < tolerance * float(b.norm())
