"""What users get wrong, through the front door: each a clear error, and the model the
same bytes. Files and checkpoints have tests of their own."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_kit import CONTEXTS, EDITS, Tiny, assert_same_bits, state_of
from torch import nn
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

from unified_edit import (
    Edit,
    applied,
    edit,
    emmet,
    evaluate_counterfact,
    memit,
    recipe,
)
from unified_edit.errors import (
    EditError,
    InfeasibleEdits,
    NonFiniteError,
    PromptError,
    RecipeError,
    UnifiedEditError,
    UnsupportedModel,
    UpdateError,
)

GOOD = EDITS[:2]


@pytest.fixture(params=["memit", "emmet"])
def wanted(request: Any) -> Any:
    return recipe(request.param, layers=[1], steps=2)


@pytest.fixture
def model(tiny: Tiny) -> Iterator[Any]:
    """A copy that a test may spoil before the call; checked after it."""
    yield copy.deepcopy(tiny.model)


def refused(
    error: type[UnifiedEditError],
    message: str,
    model: Any,
    call: Callable[[], object],
) -> None:
    before = state_of(model)
    with pytest.raises(error, match=message):
        call()
    assert_same_bits(model, before)
    assert not any(module._forward_hooks for module in model.modules())


def test_unknown_architecture(gpt2: Tiny, wanted: Any) -> None:
    model = OpenAIGPTLMHeadModel(
        OpenAIGPTConfig(vocab_size=360, n_embd=8, n_layer=2, n_head=2)
    )
    refused(
        UnsupportedModel,
        "model type 'openai-gpt' is built otherwise than the decoders here",
        model,
        lambda: edit(model, gpt2.tokenizer, GOOD, wanted, gpt2.statistics),
    )


def test_something_that_is_no_language_model(gpt2: Tiny, wanted: Any) -> None:
    model = nn.Linear(3, 3)
    refused(
        UnsupportedModel,
        "None is not in the architecture table",
        model,
        lambda: edit(model, gpt2.tokenizer, GOOD, wanted, gpt2.statistics),
    )


def test_quantized_model(tiny: Tiny, model: Any, wanted: Any) -> None:
    model.config.quantization_config = {"quant_method": "gptq"}
    refused(
        UnsupportedModel,
        r"quantized \(gptq\).*[Ll]oad and edit the unquantized",
        model,
        lambda: edit(model, tiny.tokenizer, GOOD, wanted, tiny.statistics),
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("The cat is", "Ada", "x"), "subject is not in the prompt"),
        (("{} is", "Ada", ""), "target is empty"),
        (("Ada and Ada are", "Ada", "x"), "2 times"),
    ],
)
def test_malformed_edits_cannot_be_made(fields: Any, message: str) -> None:
    with pytest.raises(EditError, match=message):
        Edit(*fields)


def test_repeated_and_contradicting_edits(tiny: Tiny, model: Any, wanted: Any) -> None:
    contradiction = replace(GOOD[0], target="Quito")
    for edits, message in (
        ([], "no edits; give at least one"),
        ([*GOOD, GOOD[1]], "edit 2 repeats edit 1"),
        ([*GOOD, contradiction], "edits 0 and 2 contradict each other"),
    ):
        refused(
            EditError,
            message,
            model,
            lambda edits=edits: edit(  # type: ignore[misc]
                model, tiny.tokenizer, edits, wanted, tiny.statistics
            ),
        )


def test_equality_that_cannot_hold_names_the_edits(tiny: Tiny, model: Any) -> None:
    edits = [*GOOD, Edit("{} wants", GOOD[0].subject, "chess")]
    refused(
        InfeasibleEdits,
        # Either may be named as the one that conflicts with the other.
        "(?=.*edit 2 .*wants)(?=.*edit 0 .*lives in)",
        model,
        lambda: edit(
            model,
            tiny.tokenizer,
            edits,
            emmet(layers=[1], steps=2),
            tiny.statistics,
            contexts=CONTEXTS,
        ),
    )


def test_statistics_of_another_model(tiny: Tiny, model: Any, wanted: Any) -> None:
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    refused(
        RecipeError,
        "collected on the model [0-9a-f]+, this one is [0-9a-f]+; collect them",
        model,
        lambda: edit(model, tiny.tokenizer, GOOD, wanted, tiny.statistics),
    )


def test_statistics_of_an_edited_model_are_not_taken(tiny: Tiny, model: Any) -> None:
    """An edit changes the fingerprint, so a second edit on top is noticed."""
    settings = memit(layers=[1], steps=3)
    arguments = (tiny.tokenizer, GOOD, settings, tiny.statistics)
    result = edit(model, *arguments, contexts=CONTEXTS)
    with applied(model, result.update):
        with pytest.raises(RecipeError, match="collected on the model"):
            edit(model, *arguments, contexts=CONTEXTS)
        with pytest.raises(UpdateError, match="made for the model"):
            with applied(model, result.update):
                pass


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(
    tiny: Tiny, model: Any, wanted: Any, value: float
) -> None:
    """Also where an attention kernel would swallow it."""
    names = [n for n, p in model.named_parameters() if p.ndim == 2]
    for name in (names[0], names[2], tiny.adapter.address(1).tensor):
        parameter = model.get_parameter(name)
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter[0, 0] = value
        refused(
            NonFiniteError,
            f"{re.escape(name)} holds NaN or infinity",
            model,
            lambda: edit(model, tiny.tokenizer, GOOD, wanted, tiny.statistics),
        )
        with torch.no_grad():
            parameter.copy_(kept)


@pytest.mark.parametrize("layers", [[3], [1, 99], [-1]])
def test_layers_that_do_not_exist(tiny: Tiny, model: Any, layers: list[int]) -> None:
    refused(
        RecipeError,
        "the model has layers 0 to 2",
        model,
        lambda: edit(
            model, tiny.tokenizer, GOOD, memit(layers=layers), tiny.statistics
        ),
    )


def test_layers_without_statistics(tiny: Tiny, model: Any, wanted: Any) -> None:
    refused(
        RecipeError,
        r"no key statistics of \[1\]. Collect them",
        model,
        lambda: edit(model, tiny.tokenizer, GOOD, wanted, {}),
    )


def test_prompts_that_do_not_fit(tiny: Tiny, model: Any, wanted: Any) -> None:
    long = Edit("chess " * 99 + "{} is", "Ada", "x")
    refused(
        PromptError,
        "the model has 96 positions; shorten",
        model,
        lambda: edit(model, tiny.tokenizer, [long], wanted, tiny.statistics),
    )


def test_another_models_tokenizer(tiny: Tiny, model: Any, wanted: Any) -> None:
    """Ids beyond the embedding would be an index error deep in torch."""
    from model_kit import make_tokenizer

    other = make_tokenizer(tiny.kind)
    other.add_tokens([f"Lovelace{n}" for n in range(40)])
    beyond = [Edit("{} is", f"Lovelace{n}", "x") for n in (30, 31)]
    refused(
        PromptError,
        "the tokenizer made token id .* embeddings; is it this model's tokenizer",
        model,
        lambda: edit(model, other, beyond, wanted, tiny.statistics),
    )


def test_evaluating_bad_models(tiny: Tiny, model: Any) -> None:
    with pytest.raises(EditError, match="no records"):
        evaluate_counterfact(model, tiny.tokenizer, [])


def test_all_errors_are_of_one_family() -> None:
    from unified_edit import errors

    raised = [e for e in vars(errors).values() if isinstance(e, type)]
    assert len(raised) > 8
    assert all(issubclass(error, UnifiedEditError) for error in raised)
