"""A loaded model as the editor sees it: layers, keys, values, edited weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from covariance_cache.modules import WRAPPERS
from unified_edit.algebra.update import WeightAddress
from unified_edit.errors import NonFiniteError, RecipeError, UnsupportedModel
from unified_edit.model.architectures import (
    ARCHITECTURES,
    REFUSED,
    Architecture,
    When,
)

Site = Literal["mlp_output", "block_output"]

_STORAGE: dict[str, type[nn.Module]] = {"Linear": nn.Linear, "Conv1D": Conv1D}


def resolve_architecture(config: Any) -> Architecture:
    """The record for a transformers config; of a model that wraps a text decoder, the
    decoder's, as it is named in the whole.

    Raises:
        UnsupportedModel: a type that is unknown or refused, or quantized weights.
    """
    check_type(config)
    kind = config.model_type
    if kind not in WRAPPERS:
        return ARCHITECTURES[kind]
    text = text_config(config)
    check_type(text, kind)
    return ARCHITECTURES[text.model_type].inside(kind)


def check_type(config: Any, wrapper: str | None = None) -> None:
    """Refuses what can be told from a config's own fields, also before transformers has
    read it.

    Args:
        wrapper: type of the model that it is a part of.

    Raises:
        UnsupportedModel: as `resolve_architecture`; a wrapper's text decoder is not
            looked at.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        entries = (
            quantization
            if isinstance(quantization, dict)
            else getattr(quantization, "to_dict", dict)()
        )
        scheme = entries.get("quant_method", "unknown")
        scheme = getattr(scheme, "value", scheme)
        raise UnsupportedModel(
            f"this model is quantized ({scheme}); a closed-form edit needs the real "
            "weights. Load and edit the unquantized checkpoint, then quantize again"
        )
    given = getattr(config, "model_type", None)
    model_type, name = str(given), f"model type {given!r}"
    if wrapper:
        name += f" in {wrapper!r}"
    if model_type in REFUSED:
        raise UnsupportedModel(f"{name} {REFUSED[model_type]}")
    record = ARCHITECTURES.get(model_type)
    if record is None and (wrapper or model_type not in WRAPPERS):
        supported = sorted(each for each in ARCHITECTURES if ARCHITECTURES[each].alone)
        raise UnsupportedModel(
            f"{name} is not in the architecture table; supported: "
            f"{', '.join(supported)}; and the text decoders of "
            f"{', '.join(sorted(WRAPPERS))}"
        )
    if record is not None and not wrapper and not record.alone:
        raise UnsupportedModel(
            f"{name} is a part of another model, and transformers has no language "
            "model of it alone; load the whole model"
        )


def text_config(config: Any) -> Any:
    """The config of the text decoder: a plain model's own."""
    return config.get_text_config() if config.model_type in WRAPPERS else config


def _holds(when: When, config: Any) -> bool:
    if isinstance(when, bool):
        return when
    return any(getattr(config, name, None) == value for name, value in when)


@dataclass(frozen=True)
class ModelAdapter:
    """Resolves modules and weights of one loaded causal language model."""

    model: nn.Module
    architecture: Architecture

    @classmethod
    def of(cls, model: nn.Module) -> ModelAdapter:
        """Wraps a model after checking that its type and storage are supported.

        Raises:
            UnsupportedModel: unknown type, quantized, no language-model head, or an
                edited weight that is not stored as the table says.
        """
        architecture = resolve_architecture(getattr(model, "config", None))
        adapter = cls(model, architecture)
        if model.get_output_embeddings() is None:  # type: ignore[operator]
            raise UnsupportedModel(
                f"{type(model).__name__} has no language-model head; load it with "
                "AutoModelForCausalLM (AutoModelForImageTextToText if it wraps a text "
                "decoder)"
            )
        expected = _STORAGE[architecture.storage]
        for layer in range(adapter.layer_count):
            module = adapter.down_projection(layer)
            if not isinstance(module, expected):
                raise UnsupportedModel(
                    f"{architecture.down_projection.format(layer)} is a "
                    f"{type(module).__name__}, expected {architecture.storage}; "
                    "adapters and quantized layers must be merged or removed first"
                )
        return adapter

    @property
    def config(self) -> Any:
        """The transformers config of the text decoder."""
        return text_config(self.model.config)

    @property
    def layer_count(self) -> int:
        """Number of decoder blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def normalized(self) -> bool:
        """Whether a norm stands between the MLP's output and the block's."""
        return _holds(self.architecture.normalized, self.config)

    @property
    def parallel(self) -> bool:
        """Whether MLP and attention read the same input."""
        return _holds(self.architecture.parallel, self.config)

    @property
    def device(self) -> torch.device:
        """Where token ids go: the input embedding's device."""
        embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        return torch.device(embedding.weight.device)

    def check_layers(self, layers: Sequence[int]) -> None:
        """Refuses layers that the model does not have, and several where a target is
        one layer's.

        Raises:
            RecipeError: naming them.
        """
        if not layers:
            raise RecipeError(
                "layers are yet to be located: take those that `recommend` finds, or "
                f"name some; the model has layers 0 to {self.layer_count - 1}"
            )
        missing = [layer for layer in layers if not 0 <= layer < self.layer_count]
        if missing:
            raise RecipeError(
                f"layers {list(layers)}: the model has layers 0 to "
                f"{self.layer_count - 1}, not {missing}"
            )
        if self.normalized and len(layers) > 1:
            raise RecipeError(
                f"layers {list(layers)}: {self.architecture.model_type} normalises "
                "what its MLPs return, so a target is one down-projection's and cannot "
                "be spread over several; name one layer"
            )

    def block(self, layer: int) -> nn.Module:
        """The decoder block."""
        return self.model.get_submodule(self.architecture.block.format(layer))

    def down_projection(self, layer: int) -> nn.Module:
        """The module that holds the edited weight."""
        return self.model.get_submodule(self.key_module(layer))

    def attention(self, layer: int) -> nn.Module:
        """The attention's output projection."""
        return self.block(layer).get_submodule(self.architecture.attention)

    def target_site(self, asked: Site) -> Site:
        """Where targets are optimised in this family: as asked, unless a norm follows
        the MLP, for then only its own output is linear in the edited weight."""
        return "mlp_output" if self.normalized else asked

    def site(self, kind: Site, layer: int) -> nn.Module:
        """The module whose output a target value is."""
        return (self.down_projection if kind == "mlp_output" else self.block)(layer)

    def residual_scale(self, layer: int) -> float:
        """By how much the block multiplies what its MLP adds to its output."""
        name = self.architecture.residual_scale
        return 1.0 if name is None else float(getattr(self.block(layer), name))

    def mlp(self, layer: int) -> nn.Module | None:
        """The MLP that holds the down-projection; None if that is the block's own."""
        name = self.key_module(layer).rpartition(".")[0]
        own = name == self.architecture.block.format(layer)
        return None if own else self.model.get_submodule(name)

    @property
    def head(self) -> nn.Module:
        """The language-model head."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        assert isinstance(head, nn.Module)
        return head

    def key_module(self, layer: int) -> str:
        """Name of the module whose input is the key."""
        return self.architecture.down_projection.format(layer)

    def weight(self, layer: int) -> Tensor:
        """The edited weight as stored (see `address(layer).transposed`)."""
        weight = self.down_projection(layer).weight
        assert isinstance(weight, Tensor)
        return weight

    def matrix(self, layer: int) -> Tensor:
        """The edited weight as [d_value, d_key], a view without gradient."""
        weight = self.weight(layer).detach()
        return weight.T if self.address(layer).transposed else weight

    def tensor_names(self, module: str | None = None) -> tuple[str, ...]:
        """Names of the edited weights, `{}` for the layer: in the model, then others
        that files have. A bare decoder's lack its prefix; those of a wrapped decoder
        were rearranged in newer transformers, which still read the older ones.

        Args:
            module: of another module's weight, by its name in the model.
        """
        name = f"{module or self.architecture.down_projection}.weight"
        place = WRAPPERS.get(self.model.config.model_type)  # type: ignore[union-attr,arg-type]
        if place is None:
            return name, name.removeprefix(self.architecture.decoder)
        inner, part = name.removeprefix(f"{place}."), place.partition(".")[2]
        return name, f"{part}.model.{inner}", f"{part}.{inner}", f"model.{inner}"

    def mlp_modules(self, layer: int) -> tuple[str, ...]:
        """Names of all linear maps of a layer's MLP, the down-projection among them,
        in the model's order: those that stand beside it in one module."""
        place = self.key_module(layer).rpartition(".")[0]
        kind = _STORAGE[self.architecture.storage]
        children = self.model.get_submodule(place).named_children()
        return tuple(f"{place}.{n}" for n, each in children if isinstance(each, kind))

    def address(self, layer: int, module: str | None = None) -> WeightAddress:
        """Where the edited weight lives in the model and in checkpoint files.

        Args:
            module: another linear map of the layer's MLP.
        """
        tensor, *aliases = (name.format(layer) for name in self.tensor_names(module))
        return WeightAddress(
            tensor=tensor,
            layer=layer,
            transposed=self.architecture.storage == "Conv1D",
            aliases=tuple(aliases),
        )

    def check_finite(self) -> None:
        """Refuses NaN and infinity in any weight. Outputs would not always tell: some
        attention kernels swallow a NaN.

        Raises:
            NonFiniteError: naming the tensor.
            UnsupportedModel: a weight is not in memory.
        """
        away = [name for name, p in self.model.named_parameters() if p.is_meta]
        if away:
            raise UnsupportedModel(
                f"{away[0]} is not in memory (offloaded to disk); load the model with "
                "all weights on devices"
            )
        if self._not_finite():
            raise NonFiniteError(self.why_not_finite())

    def why_not_finite(self) -> str:
        """For messages: what makes the model's outputs NaN or infinite."""
        names = self._not_finite()
        if not names:
            return "every weight is finite, so activations overflow; use a wider dtype"
        which = (
            f"{names[0]} holds"
            if len(names) == 1
            else (f"{names[0]} and {len(names) - 1} more hold")
        )
        return (
            f"{which} NaN or infinity; the checkpoint is damaged or was loaded in too "
            "small a dtype"
        )

    def _not_finite(self) -> list[str]:
        return [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.numel()
            # Both are NaN if any value is; no copy of the weight is made.
            and not all(torch.isfinite(x) for x in parameter.detach().aminmax())
        ]
