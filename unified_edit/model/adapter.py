"""A loaded model as the editor sees it: layers, keys, values, edited weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from unified_edit.algebra.update import WeightAddress
from unified_edit.errors import NonFiniteError, RecipeError, UnsupportedModel
from unified_edit.model.architectures import ARCHITECTURES, Architecture

Site = Literal["mlp_output", "block_output"]

_STORAGE: dict[str, type[nn.Module]] = {"Linear": nn.Linear, "Conv1D": Conv1D}


def resolve_architecture(config: Any) -> Architecture:
    """The record for a transformers config.

    Raises:
        UnsupportedModel: unknown type, or quantized weights.
    """
    model_type = getattr(config, "model_type", None)
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
    architecture = ARCHITECTURES.get(str(model_type))
    if architecture is None:
        raise UnsupportedModel(
            f"model type {model_type!r} is not in the architecture table; supported: "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    return architecture


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
                "AutoModelForCausalLM"
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
    def layer_count(self) -> int:
        """Number of decoder blocks."""
        config: Any = self.model.config
        return int(config.num_hidden_layers)

    @property
    def device(self) -> torch.device:
        """Where token ids go: the input embedding's device."""
        embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        return torch.device(embedding.weight.device)

    def check_layers(self, layers: Sequence[int]) -> None:
        """Refuses layers that the model does not have.

        Raises:
            RecipeError: naming them.
        """
        missing = [layer for layer in layers if not 0 <= layer < self.layer_count]
        if missing or not layers:
            raise RecipeError(
                f"layers {list(layers)}: the model has layers 0 to "
                f"{self.layer_count - 1}; {missing or 'none named'}"
            )

    def block(self, layer: int) -> nn.Module:
        """The decoder block."""
        return self.model.get_submodule(self.architecture.block.format(layer))

    def down_projection(self, layer: int) -> nn.Module:
        """The module that holds the edited weight."""
        return self.model.get_submodule(self.key_module(layer))

    def site(self, kind: Site, layer: int) -> nn.Module:
        """The module whose output a target value is."""
        return (self.down_projection if kind == "mlp_output" else self.block)(layer)

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

    def address(self, layer: int) -> WeightAddress:
        """Where the edited weight lives in the model and in checkpoint files."""
        tensor = f"{self.key_module(layer)}.weight"
        return WeightAddress(
            tensor=tensor,
            layer=layer,
            transposed=self.architecture.storage == "Conv1D",
            aliases=(tensor.removeprefix(self.architecture.base_prefix),),
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
