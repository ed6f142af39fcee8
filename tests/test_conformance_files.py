"""Every family's edits in files: the live model, the patched checkpoint and the PEFT
adapter say the same, and what was changed is taken back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import (
    FAMILIES,
    FEW,
    LAYER,
    VARIANTS,
    Built,
    build,
    logits_of,
    skip_if_unreadable,
)
from model_kit import EDITS, assert_same_bits, state_of

from covariance_cache.__main__ import auto_class
from unified_edit import applied, apply, export_lora, patch, revert
from unified_edit.checkpoint.sharded import Checkpoint

PROMPTS = [each.text for each in EDITS[:3]]


@pytest.fixture(scope="module")
def built(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Of every family in turn, with few layers."""
    family = {**FAMILIES, **VARIANTS}[request.param]
    return build(family, tmp_path_factory.mktemp("model"), layers=FEW)


def load(folder: Path, like: Any) -> Any:
    """With the same kernels, whose last bits differ."""
    kernels = like.config._attn_implementation
    return (
        auto_class(like.config)
        .from_pretrained(folder, dtype=like.dtype, attn_implementation=kernels)
        .eval()
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_live_patched_and_adapted_models_agree(built: Built, tmp_path: Path) -> None:
    skip_if_unreadable(built.family)
    model, tokenizer = built.model, built.tokenizer
    update = built.edit(steps=3).update
    state, before = state_of(model), logits_of(model, PROMPTS, tokenizer)
    with applied(model, update):
        live = logits_of(model, PROMPTS, tokenizer)
    assert_same_bits(model, state)
    assert float((live - before).abs().max()) > 1e-3

    stored = Checkpoint.open(built.folder)
    sums = stored.sha256()
    patched = patch(built.folder, update, out=tmp_path / "patched")
    assert patched.verify().ok
    again = load(patched.path, model)
    assert torch.equal(logits_of(again, PROMPTS, tokenizer), live)

    adapter = export_lora(update, tmp_path / "adapter", base=built.folder)
    adapted = peft.PeftModel.from_pretrained(load(built.folder, model), adapter.folder)
    error = (logits_of(adapted, PROMPTS, tokenizer) - live).abs().max()
    assert float(error) < 1e-4 * float(live.abs().max())

    revert(patched.path)
    assert Checkpoint.open(patched.path).sha256() == sums


SOME = ("gpt2", "gptj", "llama", "gemma2", "opt")
HALVES = [
    *((name, torch.bfloat16) for name in FAMILIES),
    *((name, torch.float16) for name in SOME),
]


@pytest.mark.parametrize(("name", "dtype"), HALVES)
def test_half_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    skip_if_unreadable(FAMILIES[name])
    # Files know no families: some of them will do.
    family, files = FAMILIES[name], name in SOME
    built = build(family, tmp_path / "model", files, dtype=dtype, layers=FEW)
    model, tokenizer = built.model, built.tokenizer
    result = built.edit(steps=3)
    state = state_of(model)
    with applied(model, result.update):
        live = logits_of(model, PROMPTS, tokenizer)
        changed = [
            each
            for each, tensor in model.state_dict().items()
            if not torch.equal(tensor, state[each])
        ]
    assert bool(torch.isfinite(live).all())
    assert changed == [built.adapter.address(LAYER).tensor]
    assert_same_bits(model, state)
    if name not in SOME:
        return
    patched = patch(built.folder, result.update, out=tmp_path / "patched")
    again = load(patched.path, model)
    apply(model, result.update)
    for tensor_name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[tensor_name], tensor), tensor_name
