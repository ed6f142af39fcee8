"""What the adapter resolves, and what it refuses."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from model_kit import (
    LAYERS,
    Tiny,
    block_of,
    make_model,
    mlp_of,
    weight_of,
)
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, GPT2Config, GPT2Model, LlamaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from covariance_cache import KEY_MODULES
from covariance_cache.modules import WRAPPERS
from unified_edit.errors import NonFiniteError, RecipeError, UnsupportedModel
from unified_edit.model.adapter import ModelAdapter, resolve_architecture
from unified_edit.model.architectures import ARCHITECTURES, REFUSED


def test_the_table_agrees_with_where_statistics_are_collected() -> None:
    assert list(KEY_MODULES) == list(ARCHITECTURES) == sorted(ARCHITECTURES)
    for name, record in ARCHITECTURES.items():
        assert record.model_type == name
        assert record.down_projection == KEY_MODULES[name]


def test_resolved_modules_weights_and_addresses(tiny: Tiny) -> None:
    adapter = tiny.adapter
    assert adapter.layer_count == LAYERS
    assert adapter.device == torch.device("cpu")
    for layer in range(LAYERS):
        assert adapter.block(layer) is block_of(tiny.model, tiny.kind, layer)
        mlp = mlp_of(tiny.model, tiny.kind, layer)
        down = mlp.c_proj if tiny.kind == "gpt2" else mlp.down_proj
        assert adapter.down_projection(layer) is down
        assert torch.equal(
            adapter.matrix(layer), weight_of(tiny.model, tiny.kind, layer)
        )
        assert not adapter.matrix(layer).requires_grad
        address = adapter.address(layer)
        assert tiny.model.get_parameter(address.tensor) is adapter.weight(layer)
        assert address.layer == layer
        assert address.transposed == (tiny.kind == "gpt2")
        # Checkpoints of the bare decoder name it without the prefix.
        (alias,) = address.aliases
        assert tiny.model.base_model.get_parameter(alias) is adapter.weight(layer)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_orientation_is_by_type_not_by_shape(kind: str) -> None:
    """A square weight tells nothing by its shape."""
    sizes = {"n_inner": 16} if kind == "gpt2" else {"intermediate_size": 24}
    model = make_model(kind, **sizes)
    adapter = ModelAdapter.of(model)
    matrix = adapter.matrix(1)
    assert matrix.shape[0] == matrix.shape[1]
    down = adapter.down_projection(1)
    keys = torch.randn(5, matrix.shape[1])
    bias = 0 if down.bias is None else down.bias
    with torch.no_grad():
        assert torch.allclose(down(keys), keys @ matrix.T + bias, atol=1e-5)


@pytest.mark.parametrize("layers", [[3], [-1], [0, 7], []])
def test_layers_that_do_not_exist_are_refused(tiny: Tiny, layers: list[int]) -> None:
    with pytest.raises(RecipeError, match="the model has layers 0 to 2"):
        tiny.adapter.check_layers(layers)


def test_layers_that_exist_pass(tiny: Tiny) -> None:
    tiny.adapter.check_layers([0, 2])


def test_an_unknown_architecture_is_refused_by_name() -> None:
    class NewConfig(LlamaConfig):
        model_type = "newest"

    with pytest.raises(UnsupportedModel, match="'newest'.*supported: apertus, arcee"):
        resolve_architecture(NewConfig())
    with pytest.raises(UnsupportedModel, match="None"):
        ModelAdapter.of(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mixtral", "mixture of experts"),
        ("jamba", "state-space"),
        ("t5", "encoder-decoder"),
        ("bert", "is an encoder"),
        ("gemma3n_text", "shares attention keys"),
        ("bitnet", "three values"),
        ("paligemma", "each token seeing those after it"),
        ("glm4v_text", "is a part of another model"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(
    model_type: str, reason: str
) -> None:
    with pytest.raises(UnsupportedModel, match=f"'{model_type}'.*{reason}"):
        resolve_architecture(AutoConfig.for_model(model_type))


def test_every_language_model_of_transformers_is_in_the_table_or_refused() -> None:
    """A new version of transformers may bring others: each wants a record (see
    docs/how-to-add-an-architecture.md) or a reason."""
    not_tried = {"cohere_compass_text"}
    known = {*ARCHITECTURES, *WRAPPERS, *REFUSED}
    assert not REFUSED.keys() & {*ARCHITECTURES, *WRAPPERS}
    found = {
        name
        for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        # Not another name of a type, such as gpt-sw3 of gpt2.
        if CONFIG_MAPPING[name].model_type == name
    }
    assert found - not_tried <= known, sorted(found - known)


@pytest.mark.parametrize("as_object", [False, True])
def test_a_quantized_model_is_refused_by_its_scheme(as_object: bool) -> None:
    from transformers import BitsAndBytesConfig

    config: Any = GPT2Config()
    config.quantization_config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if as_object
        else {"quant_method": "bitsandbytes"}
    )
    with pytest.raises(UnsupportedModel, match=r"quantized \(.*bitsandbytes.*\)"):
        resolve_architecture(config)


def test_a_model_without_head_is_refused() -> None:
    model = GPT2Model(
        GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    )
    with pytest.raises(UnsupportedModel, match="GPT2Model has no language-model head"):
        ModelAdapter.of(model)


def test_a_wrapped_down_projection_is_refused(tiny: Tiny) -> None:
    model = copy.deepcopy(tiny.model)
    mlp = mlp_of(model, tiny.kind, 1)
    name = "c_proj" if tiny.kind == "gpt2" else "down_proj"
    setattr(mlp, name, nn.Sequential(getattr(mlp, name)))
    with pytest.raises(UnsupportedModel, match=rf"1\.mlp\.{name} is a Sequential"):
        ModelAdapter.of(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(tiny: Tiny, value: float) -> None:
    model = copy.deepcopy(tiny.model)
    adapter = ModelAdapter.of(model)
    adapter.check_finite()
    assert "every weight is finite" in adapter.why_not_finite()
    with torch.no_grad():
        adapter.weight(1)[0, 0] = value
    tensor = adapter.address(1).tensor
    with pytest.raises(NonFiniteError, match=re.escape(tensor) + " holds NaN"):
        adapter.check_finite()
    first, parameter = next(model.named_parameters())
    with torch.no_grad():
        parameter[3, 5] = value
    with pytest.raises(NonFiniteError, match=re.escape(first) + " and 1 more hold"):
        adapter.check_finite()
