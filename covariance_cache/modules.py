"""Where each model family keeps the module whose input is the MLP's key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from covariance_cache.capture import find_modules
from covariance_cache.errors import StatisticsError

KEY_MODULES: dict[str, str] = {
    "apertus": "model.layers.{}.mlp.down_proj",
    "arcee": "model.layers.{}.mlp.down_proj",
    "biogpt": "biogpt.layers.{}.fc2",
    "bloom": "transformer.h.{}.mlp.dense_4h_to_h",
    "codegen": "transformer.h.{}.mlp.fc_out",
    "cohere": "model.layers.{}.mlp.down_proj",
    "cohere2": "model.layers.{}.mlp.down_proj",
    "ctrl": "transformer.h.{}.ffn.2",
    "cwm": "model.layers.{}.mlp.down_proj",
    "diffllama": "model.layers.{}.mlp.down_proj",
    "ernie4_5": "model.layers.{}.mlp.down_proj",
    "exaone4": "model.layers.{}.mlp.down_proj",
    "falcon": "transformer.h.{}.mlp.dense_4h_to_h",
    "gemma": "model.layers.{}.mlp.down_proj",
    "gemma2": "model.layers.{}.mlp.down_proj",
    "gemma3_text": "model.layers.{}.mlp.down_proj",
    "glm": "model.layers.{}.mlp.down_proj",
    "glm4": "model.layers.{}.mlp.down_proj",
    "glm4v_text": "model.layers.{}.mlp.down_proj",
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gpt_bigcode": "transformer.h.{}.mlp.c_proj",
    "gpt_neo": "transformer.h.{}.mlp.c_proj",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "gpt_neox_japanese": "gpt_neox_japanese.layers.{}.mlp.dense_4h_to_h",
    "gptj": "transformer.h.{}.mlp.fc_out",
    "granite": "model.layers.{}.mlp.down_proj",
    "granite_swa": "model.layers.{}.mlp.down_proj",
    "helium": "model.layers.{}.mlp.down_proj",
    "hunyuan_v1_dense": "model.layers.{}.mlp.down_proj",
    "hyperclovax": "model.layers.{}.mlp.down_proj",
    "internlm3": "model.layers.{}.mlp.down_proj",
    "iquestcoder": "model.layers.{}.mlp.down_proj",
    "jais2": "model.layers.{}.mlp.down_proj",
    "llama": "model.layers.{}.mlp.down_proj",
    "minicpm3": "model.layers.{}.mlp.down_proj",
    "ministral": "model.layers.{}.mlp.down_proj",
    "ministral3": "model.layers.{}.mlp.down_proj",
    "mistral": "model.layers.{}.mlp.down_proj",
    "modernbert-decoder": "model.layers.{}.mlp.Wo",
    "mpt": "transformer.blocks.{}.ffn.down_proj",
    "nanochat": "model.layers.{}.mlp.fc2",
    "nemotron": "model.layers.{}.mlp.down_proj",
    "olmo": "model.layers.{}.mlp.down_proj",
    "olmo2": "model.layers.{}.mlp.down_proj",
    "olmo3": "model.layers.{}.mlp.down_proj",
    "opt": "model.decoder.layers.{}.fc2",
    "persimmon": "model.layers.{}.mlp.dense_4h_to_h",
    "phi": "model.layers.{}.mlp.fc2",
    "phi3": "model.layers.{}.mlp.down_proj",
    "qwen2": "model.layers.{}.mlp.down_proj",
    "qwen2_5_vl_text": "model.layers.{}.mlp.down_proj",
    "qwen2_vl_text": "model.layers.{}.mlp.down_proj",
    "qwen3": "model.layers.{}.mlp.down_proj",
    "qwen3_vl_text": "model.layers.{}.mlp.down_proj",
    "seed_oss": "model.layers.{}.mlp.down_proj",
    "smollm3": "model.layers.{}.mlp.down_proj",
    "stablelm": "model.layers.{}.mlp.down_proj",
    "starcoder2": "model.layers.{}.mlp.c_proj",
    "vaultgemma": "model.layers.{}.mlp.down_proj",
    "xglm": "model.layers.{}.fc2",
    "youtu": "model.layers.{}.mlp.down_proj",
}
"""`model_type` of a transformers config → name of the MLP's down-projection, with `{}`
for the layer. Data only; the editing engine builds its architecture table on it."""

WRAPPERS: dict[str, str] = {
    "aya_vision": "model.language_model",
    "cohere2_vision": "model.language_model",
    "deepseek_vl": "model.language_model",
    "deepseek_vl_hybrid": "model.language_model",
    "gemma3": "model.language_model",
    "glm46v": "model.language_model",
    "glm4v": "model.language_model",
    "got_ocr2": "model.language_model",
    "idefics2": "model.text_model",
    "idefics3": "model.text_model",
    "internvl": "model.language_model",
    "janus": "model.language_model",
    "lighton_ocr": "model.language_model",
    "llava": "model.language_model",
    "llava_next": "model.language_model",
    "llava_next_video": "model.language_model",
    "llava_onevision": "model.language_model",
    "mistral3": "model.language_model",
    "ovis2": "model.language_model",
    "qwen2_5_vl": "model.language_model",
    "qwen2_vl": "model.language_model",
    "qwen3_vl": "model.language_model",
    "smolvlm": "model.text_model",
    "video_llava": "model.language_model",
    "vipllava": "model.language_model",
}
"""`model_type` of models that wrap a text decoder → where they keep it: there stands
what the first part of the decoder's own names says (`model` in Llama's)."""


def inside(pattern: str, wrapper: str | None) -> str:
    """A name in a text decoder, as it is in the model that wraps it."""
    if wrapper is None:
        return pattern
    return f"{WRAPPERS[wrapper]}.{pattern.partition('.')[2]}"


def key_pattern(config: Any) -> str | None:
    """The name of the down-projection in a model of this config, `{}` for the layer;
    None if its type is not known."""
    kind = getattr(config, "model_type", None)
    wrapper = kind if kind in WRAPPERS else None
    if wrapper is not None:
        kind = config.get_text_config().model_type
    found = KEY_MODULES.get(str(kind))
    return None if found is None else inside(found, wrapper)


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
    config = getattr(model, "config", None)
    pattern = key_pattern(config)
    if pattern is None:
        raise StatisticsError(
            f"model type {getattr(config, 'model_type', None)!r} is not known (known: "
            f"{', '.join((*KEY_MODULES, *WRAPPERS))}); pass the modules explicitly, as "
            "a mapping from layer to the name of the MLP's down-projection"
        )
    return expand_pattern(model, layers, pattern)


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
