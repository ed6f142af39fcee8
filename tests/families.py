"""A small random model of every type in the architecture table that can stand alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_kit import EDITS, TEXTS, make_tokenizer
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig

from covariance_cache import KeyStatistics, collect
from covariance_cache.__main__ import auto_class
from unified_edit import emmet
from unified_edit.edits import Edit
from unified_edit.engine import EditResult, edit
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.architectures import ARCHITECTURES
from unified_edit.model.prompts import Contexts

LAYERS, WINDOW = 5, 4
"""With δ at layer 1, three windows above reach whatever losses read."""
FEW = 3
"""Layers where nothing need come that far: below, at and above the edited one."""
TOKENS = 500
"""Of statistics: more than any key here has dimensions."""
SHAPE = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
}
GPT_SHAPE = {
    "n_embd": 24,
    "n_inner": 40,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 96,
}
FULL, SLIDING = "full_attention", "sliding_attention"
MIXED = [FULL, SLIDING, SLIDING, FULL, SLIDING]
WINDOWS: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": MIXED}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}


@dataclass(frozen=True)
class Family:
    """A model type, and how to make a small one."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    shape: dict[str, Any] = field(default_factory=lambda: SHAPE)
    odd: dict[str, Any] | None = field(
        default_factory=lambda: {"intermediate_size": 41}
    )
    """What makes d_key odd; None where it is a multiple of the heads."""
    windowless: dict[str, Any] | None = None
    """What takes its attention windows away, if it has any."""
    attention: str | None = None
    tolerance: float = 1e-7
    """For float64: some compute attention scores in float32."""
    dtype: torch.dtype = torch.float64
    """Float32 where attention masks overflow otherwise."""

    def make(
        self,
        dtype: torch.dtype | None = None,
        layers: int | None = None,
        **changes: Any,
    ) -> Any:
        """A random model in which subjects and distances matter, of other `layers` than
        its settings say if asked for. Skips the test where the installed transformers
        lacks the type."""
        if self.model_type not in CONFIG_MAPPING:
            pytest.skip(f"transformers {transformers.__version__} has none")
        settings = {**self.shape, **self.config, **changes}
        if layers is not None:
            settings = _of_depth(settings, layers)
        config = self.configure(
            vocab_size=360, bos_token_id=0, eos_token_id=1, **settings
        )
        return fill(config, dtype or self.dtype, self.attention)

    def configure(self, **settings: Any) -> Any:
        """The model's config."""
        return AutoConfig.for_model(self.model_type, **settings)


def _of_depth(settings: dict[str, Any], layers: int) -> dict[str, Any]:
    """Settings of so many layers, of the kinds that the first ones have."""
    found = dict(settings)
    for name in ("num_hidden_layers", "num_layers", "n_layers", "n_layer"):
        if name in found:
            found[name] = layers
    if "layer_types" in found:
        found["layer_types"] = found["layer_types"][:layers]
    if "attention_types" in found:
        kinds = [k for (k,), count in found["attention_types"] for _ in range(count)]
        found["attention_types"] = [[[kind], 1] for kind in kinds[:layers]]
    return found


def skip_if_unreadable(family: Family) -> None:
    """Skips where the installed transformers cannot read what it has written."""
    if transformers.__version__ == "5.0.0" and family.model_type == "apertus":
        pytest.skip("transformers 5.0.0 cannot load it: its activation reads a weight")


def fill(config: Any, dtype: torch.dtype, attention: str | None = None) -> Any:
    """A model of this config with random weights, in evaluation mode."""
    options = {"attn_implementation": attention} if attention else {}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = auto_class(config).from_config(config, **options)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases: not all alike
                parameter.data.add_(0.1 * torch.randn_like(parameter))
            else:
                scale = 0.5 if "att" in name else 0.25
                nn.init.normal_(parameter, std=scale)
    return model.to(dtype).eval().requires_grad_(False)


_OWN: dict[str, dict[str, Any]] = {
    "bloom": {
        "shape": {"hidden_size": 24, "n_layer": LAYERS, "n_head": 4},
        "odd": None,
    },
    "codegen": {
        "shape": GPT_SHAPE,
        "config": {"rotary_dim": 4, "n_ctx": 96},
        "odd": {"n_inner": 41},
        "tolerance": 1e-5,
    },
    "cohere": {"config": {"logit_scale": 0.5}},
    "cohere2": {
        "config": {"logit_scale": 0.5, **WINDOWS},
        "windowless": {"sliding_window": 96},
    },
    "ctrl": {
        "shape": {"n_embd": 24, "n_layer": LAYERS, "n_head": 4, "n_positions": 96},
        "config": {"dff": 40},
        "odd": {"dff": 41},
    },
    "cwm": {
        "config": {"head_dim": 8, **WINDOWS},
        "windowless": {"layer_types": [FULL] * LAYERS},
    },
    "exaone4": {
        "config": WINDOWS,
        "windowless": {"sliding_window": 96},
    },
    "falcon": {
        "config": {"alibi": False, "ffn_hidden_size": 40},
        "odd": {"ffn_hidden_size": 41},
    },
    "gemma": {"config": {"head_dim": 8}},
    "gemma2": {
        "config": {
            "head_dim": 8,
            "query_pre_attn_scalar": 6,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            **WINDOWS,
        },
        "windowless": {"layer_types": [FULL] * LAYERS},
    },
    "gemma3_text": {
        "config": {"head_dim": 8, "query_pre_attn_scalar": 6, **WINDOWS},
        "windowless": {"sliding_window": 96},
    },
    "glm": {"config": {"head_dim": 8}},
    "glm4": {"config": {"head_dim": 8}},
    "gpt2": {"shape": GPT_SHAPE, "odd": {"n_inner": 41}},
    "gpt_bigcode": {"shape": GPT_SHAPE, "odd": {"n_inner": 41}},
    "gpt_neo": {
        "shape": {
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_layers": LAYERS,
            "num_heads": 4,
        },
        "config": {
            "max_position_embeddings": 96,
            "window_size": WINDOW,
            "attention_types": [[["global"], 1], [["local"], 4]],
        },
        "windowless": {"attention_types": [[["global"], LAYERS]]},
        "tolerance": 1e-5,
    },
    "gpt_neox_japanese": {
        "config": {"intermediate_multiple_size": 2},
        "odd": None,
    },
    "gptj": {
        "shape": GPT_SHAPE,
        "config": {"rotary_dim": 4},
        "odd": {"n_inner": 41},
        "tolerance": 1e-5,
    },
    "granite": {
        "config": {
            "residual_multiplier": 0.22,
            "logits_scaling": 3.0,
            "embedding_multiplier": 2.0,
            "attention_multiplier": 0.3,
        }
    },
    "granite_swa": {
        "config": {"residual_multiplier": 0.3, "logits_scaling": 3.0, **WINDOWS},
        "windowless": {"layer_types": [FULL] * LAYERS},
    },
    "helium": {"config": {"head_dim": 6}},
    "hunyuan_v1_dense": {"config": {"head_dim": 6}},
    "hyperclovax": {"config": {"residual_multiplier": 0.4}},
    "minicpm3": {"config": LATENT},
    "ministral": {
        "config": {"head_dim": 6, **WINDOWS},
        "windowless": {"layer_types": [FULL] * LAYERS},
    },
    "mistral": {
        "config": {"sliding_window": WINDOW},
        "windowless": {"sliding_window": None},
    },
    "modernbert-decoder": {
        "config": {"local_attention": 2 * WINDOW, "cls_token_id": 2, "sep_token_id": 3},
    },
    "mpt": {
        "shape": {
            "d_model": 24,
            "n_layers": LAYERS,
            "n_heads": 4,
            "expansion_ratio": 2,
            "max_seq_len": 96,
        },
        "odd": None,
        "dtype": torch.float32,
        "tolerance": 1e-4,
    },
    "olmo3": {
        "config": WINDOWS,
        "windowless": {"layer_types": [FULL] * LAYERS},
    },
    "opt": {
        "config": {"ffn_dim": 40, "word_embed_proj_dim": 16},
        "odd": {"ffn_dim": 41},
    },
    "persimmon": {"config": {"partial_rotary_factor": 0.7}},
    "phi": {"config": {"partial_rotary_factor": 0.7}},
    "qwen2": {
        "config": {"use_sliding_window": True, **WINDOWS},
        "windowless": {"layer_types": [FULL] * LAYERS},
    },
    "qwen3": {"config": {"head_dim": 8}},
    "starcoder2": {
        "config": {"sliding_window": WINDOW},
        "windowless": {"sliding_window": None},
    },
    "vaultgemma": {
        "config": {
            "head_dim": 8,
            "query_pre_attn_scalar": 6,
            "final_logit_softcapping": 3.0,
            **WINDOWS,
        },
        "windowless": {"layer_types": [FULL] * LAYERS},
    },
    "xglm": {
        "shape": {
            "d_model": 24,
            "ffn_dim": 40,
            "num_layers": LAYERS,
            "attention_heads": 4,
            "max_position_embeddings": 96,
        },
        "odd": {"ffn_dim": 41},
        "dtype": torch.float32,
        "tolerance": 1e-4,
    },
    # Loading one sets the padding token's embedding to zero, whatever the files hold.
    "youtu": {"config": {**LATENT, "pad_token_id": None}},
}

FAMILIES: dict[str, Family] = {
    name: Family(name, **_OWN.get(name, {}))
    for name, record in ARCHITECTURES.items()
    if record.alone
}
"""The others are tried in the models that wrap them: `tests/test_wrapped.py`."""
VARIANTS: dict[str, Family] = {
    "llama-eager": Family("llama", attention="eager"),
    "gpt2-eager": Family("gpt2", shape=GPT_SHAPE, attention="eager"),
    "falcon-alibi": Family(
        "falcon",
        config={
            "alibi": True,
            "parallel_attn": False,
            "bias": True,
            "ffn_hidden_size": 40,
        },
    ),
    "gpt_neox-serial": Family("gpt_neox", config={"use_parallel_residual": False}),
    "hyperclovax-plain": Family(
        "hyperclovax", config={"residual_multiplier": 0.4, "use_post_norm": False}
    ),
    "opt-post-norm": Family(
        "opt",
        config={
            "ffn_dim": 40,
            "word_embed_proj_dim": 24,
            "do_layer_norm_before": False,
        },
    ),
    "stablelm-parallel": Family("stablelm", config={"use_parallel_residual": True}),
}
"""Other sides of types whose records depend on the config, other attention kernels."""


CONTEXTS = Contexts(("{}", "The letters say. {}"))
LAYER = 1
"""The edited one."""


@dataclass(frozen=True, eq=False)
class Built:
    """A family's small model in float32, with its tokenizer and statistics."""

    family: Family
    model: Any
    tokenizer: Any
    statistics: dict[int, KeyStatistics]
    folder: Path
    """Where model and tokenizer are, if they were saved."""

    @cached_property
    def wide(self) -> Any:
        """The same model in the family's own type, mostly float64, for theorems."""
        return copy.deepcopy(self.model).to(self.family.dtype)

    @property
    def adapter(self) -> ModelAdapter:
        return ModelAdapter.of(self.model)

    def edit(
        self,
        edits: Sequence[Edit] = EDITS[:3],
        contexts: Contexts = CONTEXTS,
        **changes: Any,
    ) -> EditResult:
        """By EMMET, which asks for the block's output and is given the MLP's where a
        norm follows."""
        settings: dict[str, Any] = {"steps": 12, "learning_rate": 0.3, "clamp": 4.0}
        return edit(
            self.model,
            self.tokenizer,
            edits,
            emmet(layers=[LAYER], **{**settings, **changes}),
            self.statistics,
            contexts=contexts,
        )


def build(family: Family, folder: Path, save: bool = True, **changes: Any) -> Built:
    """Makes one and saves it; `changes` are of its config and depth, `dtype` of its
    weights."""
    model = family.make(**{"dtype": torch.float32, **changes})
    tokenizer = make_tokenizer("llama")
    if save:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return Built(family, model, tokenizer, statistics_of(model, tokenizer), folder)


def statistics_of(model: Any, tokenizer: Any) -> dict[int, KeyStatistics]:
    """Of the edited layer."""
    settings: dict[str, Any] = {"tokens": TOKENS, "window": 48, "seed": 0}
    return collect(model, tokenizer, TEXTS, [LAYER], progress=False, **settings)


@torch.no_grad()
def seen_by(model: Any, module: nn.Module, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What a module gets and returns, [positions, d], in one plain pass."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(_: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        pair = (args[0], hidden)
        seen.append(
            tuple(each.clone().reshape(-1, each.shape[-1]) for each in pair)  # type: ignore[arg-type]
        )

    with module.register_forward_hook(hook):
        model(input_ids=torch.tensor([list(ids)]))
    (found,) = seen
    return found


@torch.no_grad()
def logits_of(model: Any, texts: Sequence[str], tokenizer: Any) -> Tensor:
    """[texts × positions, vocabulary]."""
    rows = [
        model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0]
        for text in texts
    ]
    return torch.cat(rows)
