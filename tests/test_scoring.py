"""Teacher-forced scores and greedy continuations against one prompt at a time."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from model_kit import Tiny, greedy_word, make_model, make_tokenizer, target_ids

from unified_edit.errors import NonFiniteError, PromptError
from unified_edit.model import prompts as prompt_module
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.scoring import generate, score

PROMPTS = ["Ada Lovelace lives in", "x", "The “letters” say, in New York, that", "In"]
TARGETS = ["Lyon", "the cello was", "Oslo", "green apples and long letters"]


def plain_score(tiny: Tiny, prompt: str, target: str) -> tuple[float, bool]:
    ids = tiny.tokenizer(prompt)["input_ids"]
    wanted = target_ids(tiny.tokenizer, prompt, target)
    with torch.no_grad():
        logits = tiny.model(input_ids=torch.tensor([ids + wanted])).logits[0].double()
    nll, right = 0.0, True
    for offset, token in enumerate(wanted):
        row = logits[len(ids) - 1 + offset]
        nll -= float(row.log_softmax(0)[token]) / len(wanted)
        right = right and int(row.argmax()) == token
    return nll, right


def plain_greedy(tiny: Tiny, prompt: str, count: int) -> list[int]:
    ids = tiny.tokenizer(prompt)["input_ids"]
    said: list[int] = []
    while len(said) < count and 1 not in said:  # 1 ends the text
        with torch.no_grad():
            logits = tiny.model(input_ids=torch.tensor([ids + said])).logits
        said.append(int(logits[0, -1].argmax()))
    return said


@pytest.mark.parametrize("budget", [8192, 30])
def test_scores_equal_brute_force(
    tiny: Tiny, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_module, "TOKENS_PER_FORWARD", budget)
    pairs = [(p, t) for p in PROMPTS for t in TARGETS]
    found = score(
        tiny.adapter, tiny.tokenizer, [p for p, _ in pairs], [t for _, t in pairs]
    )
    for (prompt, target), each in zip(pairs, found, strict=True):
        nll, right = plain_score(tiny, prompt, target)
        assert math.isclose(each.nll, nll, rel_tol=1e-4), (prompt, target)
        assert each.argmax == right


def test_what_the_model_says_by_itself_is_argmax(tiny: Tiny) -> None:
    """Makes `argmax` true for once."""
    prompt, word = greedy_word(tiny)
    first, other = score(tiny.adapter, tiny.tokenizer, [prompt] * 2, [word, "Quito"])
    assert first.argmax and not other.argmax
    assert first.nll < other.nll


def test_generation_equals_a_greedy_loop(tiny: Tiny) -> None:
    said = generate(tiny.adapter, tiny.tokenizer, PROMPTS, 7)
    for prompt, text in zip(PROMPTS, said, strict=True):
        expected = plain_greedy(tiny, prompt, 7)
        assert text == tiny.tokenizer.decode(expected, skip_special_tokens=True)


def test_an_appended_end_token_does_not_end_the_prompt(tiny: Tiny) -> None:
    ending = make_tokenizer(tiny.kind, eos=True)
    arguments = (PROMPTS, 5)
    assert generate(tiny.adapter, ending, *arguments) == generate(
        tiny.adapter, tiny.tokenizer, *arguments
    )
    assert score(tiny.adapter, ending, PROMPTS, TARGETS) == score(
        tiny.adapter, tiny.tokenizer, PROMPTS, TARGETS
    )


def test_dropout_is_off_and_the_mode_restored() -> None:
    model = make_model("gpt2")
    tokenizer = make_tokenizer("gpt2")
    adapter = ModelAdapter.of(model)
    expected = score(adapter, tokenizer, PROMPTS, TARGETS)
    words = generate(adapter, tokenizer, PROMPTS, 5)
    model.train()
    model.transformer.h[1].eval()
    assert score(adapter, tokenizer, PROMPTS, TARGETS) == expected
    assert generate(adapter, tokenizer, PROMPTS, 5) == words
    assert model.training and model.transformer.h[0].mlp.training
    assert not model.transformer.h[1].mlp.training


def test_too_long_prompts_are_refused(tiny: Tiny) -> None:
    with pytest.raises(PromptError, match="96 positions"):
        score(tiny.adapter, tiny.tokenizer, ["x " * 100 + "x"], ["y"])
    with pytest.raises(PromptError, match="96 positions"):
        generate(tiny.adapter, tiny.tokenizer, ["x"], 96)


def test_nan_in_any_weight_is_named(tiny: Tiny) -> None:
    model = copy.deepcopy(tiny.model)
    name = tiny.adapter.address(1).tensor
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = math.nan
    with pytest.raises(NonFiniteError, match=name):
        score(ModelAdapter.of(model), tiny.tokenizer, ["Ada likes"], ["chess"])
