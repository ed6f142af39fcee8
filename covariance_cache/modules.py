"""Where each model family keeps the module whose input is the MLP's key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from covariance_cache.capture import find_modules
from covariance_cache.errors import StatisticsError

KEY_MODULES: dict[str, str] = {
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "llama": "model.layers.{}.mlp.down_proj",
}
"""`model_type` of a transformers config → name of the MLP's down-projection, with `{}`
for the layer. Data only; the editing engine builds its architecture table on it."""


def key_modules(
    model: nn.Module, layers: Iterable[int] | Mapping[int, str]
) -> dict[int, str]:
    """Layers, ascending, and the names of the modules whose inputs are their keys.

    Args:
        layers: indices of decoder blocks, looked up in `KEY_MODULES`; or the answer
            itself, for a model that is not in that table.

    Raises:
        StatisticsError: unknown model type, or a layer that does not exist.
        CaptureError: a module that does not exist.
    """
    if isinstance(layers, Mapping):
        find_modules(model, layers.values())
        if len(set(layers.values())) < len(layers):
            raise StatisticsError(f"two layers name one module: {dict(layers)}")
        return dict(sorted(layers.items()))
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in KEY_MODULES:
        raise StatisticsError(
            f"model type {kind!r} is not known (known: {', '.join(KEY_MODULES)}); pass "
            "the modules explicitly, as a mapping from layer to the name of the MLP's "
            "down-projection"
        )
    return expand_pattern(model, layers, KEY_MODULES[kind])


def expand_pattern(
    model: nn.Module, layers: Iterable[int], pattern: str
) -> dict[int, str]:
    """Layers, ascending, and the names that `pattern` gives them, `{}` for the layer.

    Raises:
        StatisticsError: no layer asked for, or one that does not exist.
    """
    if "{}" not in pattern:
        raise StatisticsError(f"{pattern!r} needs a {{}} where the layer's number goes")
    names = {name for name, _ in model.named_modules()}
    depth = 0
    while pattern.format(depth) in names:
        depth += 1
    wanted = sorted(set(layers))
    if not wanted:
        raise StatisticsError("no layer was asked for")
    for layer in wanted:
        if layer not in range(depth):
            has = f"layers 0 to {depth - 1}" if depth else "no such module in any layer"
            raise StatisticsError(
                f"layer {layer} does not exist: {type(model).__name__} has {has} "
                f"({pattern})"
            )
    return {layer: pattern.format(layer) for layer in wanted}


def key_width(module: nn.Module) -> int | None:
    """Width of a linear module's input by its type; None for a type not known here."""
    width = getattr(module, "in_features", None)
    if width is None and type(module).__name__ == "Conv1D":
        width = getattr(module.weight, "shape", (None,))[0]
    return width if isinstance(width, int) else None
