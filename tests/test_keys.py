"""Keys and hidden states against full forwards of one prompt at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_kit import (
    CONTEXTS,
    EDITS,
    LAYERS,
    Tiny,
    averaged_key,
    hidden_of_edit,
    make_model,
    make_tokenizer,
)

from unified_edit.edits import Edit
from unified_edit.errors import PromptError
from unified_edit.model import prompts
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.keys import (
    context_weights,
    hidden_at_subjects,
    keys_at_subjects,
)
from unified_edit.model.prompts import Contexts


@pytest.mark.parametrize("average", ["flat", "half", "clean"])
@pytest.mark.parametrize("contexts", [Contexts(), CONTEXTS], ids=["bare", "three"])
def test_keys_equal_brute_force(tiny64: Tiny, average: Any, contexts: Any) -> None:
    for layer in (0, LAYERS - 1):
        keys = keys_at_subjects(
            tiny64.adapter, tiny64.tokenizer, EDITS, contexts, layer, average
        )
        assert keys.dtype == torch.float64 and not keys.requires_grad
        for edit, key in zip(EDITS, keys, strict=True):
            expected = averaged_key(
                tiny64.model,
                tiny64.kind,
                tiny64.tokenizer,
                edit,
                layer,
                average,
                contexts,
            )
            assert torch.allclose(key, expected, rtol=1e-10, atol=1e-12)


def test_averages_differ(tiny: Tiny) -> None:
    found = [
        keys_at_subjects(tiny.adapter, tiny.tokenizer, EDITS, CONTEXTS, 1, average)
        for average in ("flat", "half", "clean")
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert float((found[a] - found[b]).norm()) > 1e-2 * float(found[a].norm())


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("average", ["flat", "half", "clean"])
def test_context_weights_sum_to_one(average: Any, count: int) -> None:
    weights = context_weights(average, count)
    assert weights.shape == (count,)
    assert abs(float(weights.sum()) - 1) < 1e-12
    if average == "half" and count > 1:
        assert float(weights[0]) == 0.5


def test_hidden_states_equal_brute_force(tiny64: Tiny) -> None:
    for layer in range(LAYERS):
        hidden = hidden_at_subjects(tiny64.adapter, tiny64.tokenizer, EDITS, layer)
        assert hidden.dtype == torch.float64
        for edit, state in zip(EDITS, hidden, strict=True):
            expected = hidden_of_edit(
                tiny64.model, tiny64.kind, tiny64.tokenizer, edit, layer
            )
            assert torch.allclose(state, expected, rtol=1e-10, atol=1e-12)


def test_one_and_many_agree_whatever_the_batches(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (CONTEXTS, 2, "half")
    together = keys_at_subjects(tiny.adapter, tiny.tokenizer, EDITS, *arguments)
    for edit, key in zip(EDITS, together, strict=True):
        (alone,) = keys_at_subjects(tiny.adapter, tiny.tokenizer, [edit], *arguments)
        assert torch.allclose(alone, key, rtol=1e-4, atol=1e-5)
    backwards = keys_at_subjects(tiny.adapter, tiny.tokenizer, EDITS[::-1], *arguments)
    assert torch.allclose(backwards.flip(0), together, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(prompts, "TOKENS_PER_FORWARD", 24)
    small = keys_at_subjects(tiny.adapter, tiny.tokenizer, EDITS, *arguments)
    assert torch.allclose(small, together, rtol=1e-4, atol=1e-5)


def test_what_follows_the_subject_does_not_matter(tiny: Tiny) -> None:
    edits = [Edit("{} is", "Ada Lovelace", "x"), Edit("{}'s red boat", "Ada", "x")]
    edits.append(Edit("{} likes chess and", "Ada Lovelace", "y"))
    keys = keys_at_subjects(tiny.adapter, tiny.tokenizer, edits, CONTEXTS, 1, "flat")
    assert torch.allclose(keys[0], keys[2], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(keys[0], keys[1], rtol=1e-2)


def test_the_prompt_padding_side_of_the_tokenizer_does_not_matter(tiny: Tiny) -> None:
    other = make_tokenizer(tiny.kind)
    other.pad_token, other.padding_side = "</s>", "left"
    first = keys_at_subjects(tiny.adapter, tiny.tokenizer, EDITS, CONTEXTS, 1, "half")
    again = keys_at_subjects(tiny.adapter, other, EDITS, CONTEXTS, 1, "half")
    assert torch.equal(first, again)


def test_eager_attention_gives_the_same_keys() -> None:
    tokenizer = make_tokenizer("llama")
    found = [
        keys_at_subjects(
            ModelAdapter.of(make_model("llama", attn_implementation=attention)),
            tokenizer,
            EDITS,
            CONTEXTS,
            2,
            "half",
        )
        for attention in ("eager", "sdpa")
    ]
    assert torch.allclose(*found, rtol=1e-4, atol=1e-5)


def test_a_prompt_longer_than_the_model_is_refused(tiny: Tiny) -> None:
    edit = Edit("{} is", "Ada " * 99 + "Ada", "x")
    with pytest.raises(PromptError, match="96 positions"):
        keys_at_subjects(tiny.adapter, tiny.tokenizer, [edit], Contexts(), 0, "clean")
