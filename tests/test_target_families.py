"""Suffixes alone must say what whole prompts say in any family: windows, alibi, soft
caps, parallel blocks, tuples. The loop knows no family, so neither does this test: its
record and a random model are all that each one gets.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, VARIANTS, WINDOW, Family
from model_kit import CONTEXTS, EDITS, make_tokenizer
from torch import Tensor, nn

from benchmarks.plain_targets import plain_rows, plain_target
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.descent import TargetSettings
from unified_edit.model.targets import optimize_targets

ALL = {**FAMILIES, **VARIANTS}
LAYER = 1
CHOSEN = [EDITS[0], EDITS[2], EDITS[3]]
"""Subject first, last, quoted."""
SETTINGS = TargetSettings(
    "block_output",
    steps=3,
    learning_rate=0.3,
    clamp=4.0,
    kl_factor=0.5,
    kl_prompts=("{} is a", "Some say that {} was"),
    kl_position="end",
)


def keep_softmax_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention takes its softmax in float32, also where scores are float64: its
    rounding would hide small mistakes, and the mask's lowest float64 overflows."""
    softmax = nn.functional.softmax

    def wide(input: Tensor, dim: int, *_: Any, dtype: Any = None, **__: Any) -> Tensor:
        return softmax(
            input, dim, dtype=None if input.dtype == torch.float64 else dtype
        )

    monkeypatch.setattr(nn.functional, "softmax", wide)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer("llama")


@pytest.mark.parametrize("name", ALL)
def test_a_family_equals_the_plain_loop(
    name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = ALL[name]
    model = family.make()
    adapter = ModelAdapter.of(model)
    keep_softmax_wide(monkeypatch)
    if family.windowless is not None:
        _assert_windows_matter(family, model, tokenizer)
    # Sites differ in where δ is added alone: of the other one, one edit says enough.
    asked = {"mlp_output": CHOSEN[-1:], adapter.target_site("block_output"): CHOSEN}
    for site, edits in asked.items():
        settings = TargetSettings(**{**vars(SETTINGS), "site": site})
        found = optimize_targets(adapter, tokenizer, edits, CONTEXTS, LAYER, settings)
        for index, edit in enumerate(edits):
            rows = plain_rows(tokenizer, edit, CONTEXTS, settings)
            plain = plain_target(model, adapter.site(site, LAYER), rows, settings)
            expected = plain.value - plain.initial
            delta = found.values[index] - found.initial[index]
            size = float(expected.norm())
            assert size > 0.3
            error = float((delta - expected).norm()) / size
            assert error < family.tolerance, (site, index)
            for mine, other in (
                (found.initial_probability[index], plain.probabilities[0]),
                (found.probability[index], plain.probabilities[-1]),
            ):
                assert float(mine) == pytest.approx(other, rel=family.tolerance)


def _assert_windows_matter(family: Family, model: Any, tokenizer: Any) -> None:
    """Or else a window that is counted wrongly would not show."""
    assert family.windowless is not None
    other = family.make(**family.windowless)
    other.load_state_dict(model.state_dict())
    ids = torch.tensor([tokenizer(CHOSEN[0].text)["input_ids"]])
    with torch.no_grad():
        difference = model(input_ids=ids).logits - other(input_ids=ids).logits
    assert float(difference[:, WINDOW:].abs().max()) > 0.01
    assert float(difference[:, : WINDOW - 1].abs().max()) < 1e-6
