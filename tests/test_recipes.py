"""Recipes as data: published hyperparameters, labels, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from unified_edit import recipes
from unified_edit.algebra.objective import (
    Equality,
    LeastSquares,
    NullSpace,
    Ridge,
    SecondMoment,
)
from unified_edit.errors import RecipeError
from unified_edit.model.descent import TargetSettings
from unified_edit.model.prompts import ContextSettings
from unified_edit.presets import PRESETS
from unified_edit.recipes import (
    RECIPES,
    Recipe,
    matching_preset,
    preset_key,
    recipe,
)

PUBLISHED = ("gpt2-xl", "gpt-j", "llama-2-7b", "llama-3-8b")

# (layers, steps, learning rate, clamp, weight decay), for each of PUBLISHED.
ROME = [
    ((17,), 20, 0.5, 4.0, 0.5),
    ((5,), 20, 0.5, 4.0, 0.5),
    ((5,), 25, 0.5, 4.0, 1e-3),
    ((5,), 25, 0.5, 4.0, 1e-3),
]
MEMIT = [
    ((13, 14, 15, 16, 17), 20, 0.5, 0.75, 0.5),
    ((3, 4, 5, 6, 7, 8), 25, 0.5, 0.75, 0.5),
    ((4, 5, 6, 7, 8), 25, 0.5, 4.0, 1e-3),
    ((4, 5, 6, 7, 8), 25, 0.1, 0.75, 0.5),
]
EMMET = [
    ((17,), 20, 0.5, 0.75, 0.5),
    ((5,), 25, 0.5, 0.75, 0.5),
    ((5,), 25, 0.5, 4.0, 1e-3),
    None,
]
ENCORE = [MEMIT[0], None, *[((4, 5, 6, 7, 8), 25, 0.5, 0.75, 0.5)] * 2]
MEMIT_WEIGHT = [20_000.0, 15_000.0, 15_000.0, 15_000.0]
TABLE = {
    "rome": ROME,
    "r_rome": ROME,
    "p_rome": ROME,
    "rome_original": ROME,
    "memit": MEMIT,
    "alphaedit": MEMIT,
    "emmet": EMMET,
    "memit_seq": MEMIT,
    "emmet_seq": EMMET,
    "encore": ENCORE,
}


def test_the_table_covers_every_recipe_and_preset() -> None:
    assert set(TABLE) == set(RECIPES)
    assert set(PUBLISHED) <= set(PRESETS)


@pytest.mark.parametrize("preset", PUBLISHED)
@pytest.mark.parametrize("name", sorted(TABLE))
def test_published_hyperparameters(name: str, preset: str) -> None:
    expected = TABLE[name][PUBLISHED.index(preset)]
    if expected is None:
        with pytest.raises(RecipeError, match=f"no hyperparameters of {name}"):
            recipe(name, preset)
        return
    found = recipe(name, preset)
    inner = found.targets
    values = (inner.steps, inner.learning_rate, inner.largest, inner.weight_decay)
    assert (found.layers, *values) == expected
    assert inner.kl_factor == 0.0625 and inner.kl_prompts == ("{} is a",)
    assert inner.kl_position == "subject" and inner.loss_threshold == 0.05
    assert found.name == name and found.origin == "published" and found.source
    if name == "memit":
        weight = MEMIT_WEIGHT[PUBLISHED.index(preset)]
        assert found.preservation_weight == weight
    if name == "encore":
        stops = [(10.0, 4), None, (10.0, 3), (20.0, 2)]
        stop = stops[PUBLISHED.index(preset)]
        assert (found.ridge, found.targets.most_probable_stop) == stop
    if name == "alphaedit":
        assert found.null_space_threshold == 0.02 and not found.null_space_relative
        assert found.ridge == 10.0 and found.preservation_weight == 1.0


def test_every_preset_builds_every_method_it_has() -> None:
    for preset, data in PRESETS.items():
        for name in RECIPES:
            if preset_key(name) in data.settings:
                found = recipe(name, preset)
                assert found.origin == data.origin
                assert max(found.layers) < data.layers
                json.dumps(found.as_dict(), allow_nan=False)


def test_what_makes_each_method_itself() -> None:
    found = {name: recipe(name, layers=[1]) for name in RECIPES}
    for name in ("rome", "r_rome", "p_rome", "rome_original"):
        assert found[name].targets.site == "mlp_output"
        assert found[name].memorization == "equality"
        lengths = [length for _, length in found[name].contexts.samples]
        assert lengths == [5] * 10 + [10] * 10
        assert {text for text, _ in found[name].contexts.samples} == {""}
    assert found["rome"].key_average == found["rome_original"].key_average == "flat"
    assert found["p_rome"].key_average == "clean"
    assert found["rome_original"].published_denominator
    assert replace(found["r_rome"], name="rome") == found["rome"]
    for name in ("memit", "memit_seq", "emmet", "emmet_seq", "alphaedit", "encore"):
        assert found[name].targets.site == "block_output"
        assert found[name].key_average == "half"
        assert found[name].contexts.samples == tuple(
            (word, 10) for word in ("The", "Therefore", "Because", "I", "You")
        )
        assert not found[name].published_denominator
    assert found["emmet"].memorization == "equality"
    assert found["memit"].memorization == "least_squares"
    assert found["alphaedit"].preservation == "null_space"
    looking_back = {name for name in found if found[name].earlier_weight}
    assert looking_back == {"memit_seq", "emmet_seq", "alphaedit", "encore"}
    for name in ("memit", "emmet"):
        same = {"name": name, "earlier_weight": 0.0, "preservation_weight": 1.0}
        alone = replace(found[f"{name}_seq"], **same)
        assert alone == replace(found[name], preservation_weight=1.0)
    assert found["encore"].targets.most_probable_stop and found["encore"].ridge


def test_functions_are_the_same_as_names() -> None:
    for name in RECIPES:
        function = getattr(recipes, name)
        assert function(layers=[2]) == recipe(name, layers=[2])
        assert function("gpt2-xl") == recipe(name, "gpt2-xl")


def test_changes_are_labelled_unvalidated() -> None:
    changed = recipe("memit", "gpt2-xl", clamp=1.0)
    assert changed.origin == "unvalidated" and changed.targets.clamp == 1.0
    assert changed.source == "gpt2-xl, changed"
    assert changed.layers == (13, 14, 15, 16, 17)
    assert recipe("memit", "gpt2-xl", layers=[13]).origin == "unvalidated"
    # Naming the published value is no change.
    assert recipe("memit", "gpt2-xl", steps=20).origin == "published"
    assert recipe("memit", layers=range(13, 18)).origin == "unvalidated"


def test_changes_reach_the_recipe_and_its_targets() -> None:
    found = recipe(
        "memit", layers=range(3, 6), preservation_weight=7.0, learning_rate=0.2
    )
    assert found.layers == (3, 4, 5)
    assert found.preservation_weight == 7.0 and found.targets.learning_rate == 0.2
    # Nothing is shared between recipes.
    assert recipe("memit", layers=[3]).targets.learning_rate == 0.5


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (("menit",), {"layers": [1]}, "unknown recipe 'menit'; known: .*memit"),
        (("memit", "gpt-5"), {}, "unknown preset 'gpt-5'; known: .*gpt2-xl"),
        (("memit",), {}, "memit: which layers"),
        (("memit",), {"layers": [1], "clmp": 1}, "unknown settings clmp"),
        (("memit",), {"layers": [1], "name": "mine"}, "unknown settings name"),
        (("memit",), {"layers": []}, "at least one"),
        (("memit",), {"layers": [2, 1]}, "ascending"),
        (("memit",), {"layers": [1, 1]}, "without repeats"),
        (("rome",), {"layers": [1, 2]}, "MLP's output is one layer's"),
        (("memit",), {"layers": [1], "preservation_weight": 0}, "must be positive"),
        (
            ("memit",),
            {"layers": [1], "preservation_weight": float("nan")},
            "must be positive",
        ),
        (("memit",), {"layers": [1], "ridge": -1.0}, "ridge"),
        (("alphaedit",), {"layers": [1], "ridge": 0.0}, "positive with a null space"),
        (("memit",), {"layers": [1], "published_denominator": True}, "needs equality"),
        (("memit",), {"layers": [1], "steps": 0}, "must be positive"),
    ],
)
def test_refusals(
    arguments: tuple[str, ...], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(*arguments, **changes)


def test_objectives() -> None:
    keys = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    moment = (keys * torch.tensor([0.01, 1.0, 2.0, 3.0])).double()
    moment = moment.T @ moment / 60

    memit = recipe("memit", layers=[1], preservation_weight=5.0).objective(moment)
    (term,) = memit.preservation.terms
    assert isinstance(term, SecondMoment) and term.matrix is moment
    assert term.weight == 5.0
    assert isinstance(memit.memorization, LeastSquares)
    assert memit.memorization.slacks(2) == (1.0, 1.0)

    emmet = recipe("emmet", layers=[1], ridge=0.3).objective(moment)
    first, second = emmet.preservation.terms
    assert isinstance(first, SecondMoment) and isinstance(second, Ridge)
    assert second.coefficient == 0.3
    assert isinstance(emmet.memorization, Equality)

    alpha = recipe("alphaedit", layers=[1]).objective(moment)
    null, ridge = alpha.preservation.terms
    assert isinstance(null, NullSpace) and isinstance(ridge, Ridge)
    assert null.basis.shape == (4, 1) and ridge.coefficient == 10.0
    assert alpha.memorization.slacks(1) == (1.0,)


def test_presets_are_recognised_by_their_config() -> None:
    xl = GPT2Config(n_layer=48, n_embd=1600, vocab_size=50257)
    assert matching_preset(xl) == "gpt2-xl"
    assert matching_preset(GPT2Config()) is None
    sizes = {"num_hidden_layers": 32, "hidden_size": 4096}
    assert matching_preset(LlamaConfig(vocab_size=32000, **sizes)) == "llama-2-7b"
    assert matching_preset(LlamaConfig(vocab_size=128256, **sizes)) == "llama-3-8b"


def test_recipes_are_frozen_values() -> None:
    found = recipe("memit", layers=[1])
    assert found == recipe("memit", layers=(1,))
    assert hash(found) == hash(recipe("memit", layers=[1]))
    with pytest.raises(AttributeError):
        found.layers = (2,)  # type: ignore[misc]
    built = Recipe(
        "mine",
        (1,),
        TargetSettings("block_output"),
        ContextSettings(),
        "clean",
        "equality",
    )
    assert built.origin == "unvalidated"
