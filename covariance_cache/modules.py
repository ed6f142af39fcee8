"""Where each model family keeps the module whose input is the MLP's key."""

from __future__ import annotations

KEY_MODULES: dict[str, str] = {
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "llama": "model.layers.{}.mlp.down_proj",
}
"""`model_type` of a transformers config → name of the MLP's down-projection, with `{}`
for the layer. Data only; the editing engine builds its architecture table on it."""
