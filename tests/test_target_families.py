"""Suffixes alone must say what whole prompts say in any family: windows, alibi, soft
caps, parallel blocks, tuples. The loop knows no family, so neither does this test: a
record of names and a random model are all that each one gets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from model_kit import CONTEXTS, EDITS, make_tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.plain_targets import plain_rows, plain_target
from unified_edit.model import adapter as adapters
from unified_edit.model.adapter import ModelAdapter, Site
from unified_edit.model.architectures import Architecture
from unified_edit.model.descent import TargetSettings
from unified_edit.model.targets import optimize_targets

LAYER, LAYERS, WINDOW = 1, 5, 4
"""Three windows above δ: it reaches whatever the chosen edits' losses read."""
CHOSEN = [EDITS[0], EDITS[2], EDITS[3]]
"""Subject first, last, quoted."""
BOTH: tuple[Site, ...] = ("mlp_output", "block_output")

SHAPE = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
}
GPT_SHAPE = {"n_embd": 24, "n_layer": LAYERS, "n_head": 4, "n_positions": 96}
FULL, SLIDING = "full_attention", "sliding_attention"
MIXED = [FULL, SLIDING, SLIDING, FULL, SLIDING]


@dataclass(frozen=True)
class Family:
    """A model type, and how to make a small one."""

    model_type: str
    block: str = "model.layers.{}"
    down: str = "mlp.down_proj"
    storage: Literal["Linear", "Conv1D"] = "Linear"
    shape: dict[str, Any] = field(default_factory=lambda: SHAPE)
    config: dict[str, Any] = field(default_factory=dict)
    windowless: dict[str, Any] | None = None
    """What takes its attention windows away, if it has any."""
    attention: str | None = None
    sites: tuple[Site, ...] = BOTH
    tolerance: float = 1e-7

    def make(self, **changes: Any) -> Any:
        """A random model in float64, in which subjects and distances matter."""
        settings = {**self.shape, **self.config, **changes}
        config = AutoConfig.for_model(
            self.model_type, vocab_size=360, bos_token_id=0, eos_token_id=1, **settings
        )
        options = {"attn_implementation": self.attention} if self.attention else {}
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = AutoModelForCausalLM.from_config(config, **options)
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:  # norms and biases: not all alike
                    parameter.data.add_(0.1 * torch.randn_like(parameter))
                else:
                    scale = 0.5 if "att" in name else 0.25
                    nn.init.normal_(parameter, std=scale)
        return model.double().eval().requires_grad_(False)


FAMILIES = {
    "llama": Family("llama"),
    "llama-eager": Family("llama", attention="eager"),
    "gpt2": Family("gpt2", "transformer.h.{}", "mlp.c_proj", "Conv1D", GPT_SHAPE),
    "gpt2-eager": Family(
        "gpt2", "transformer.h.{}", "mlp.c_proj", "Conv1D", GPT_SHAPE, attention="eager"
    ),
    "mistral": Family(
        "mistral",
        config={"sliding_window": WINDOW},
        windowless={"sliding_window": None},
    ),
    "qwen2": Family(
        "qwen2",
        config={
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": MIXED,
        },
        windowless={"layer_types": [FULL] * LAYERS},
    ),
    "qwen3": Family("qwen3", config={"head_dim": 8}),
    "gemma2": Family(
        "gemma2",
        config={
            "head_dim": 8,
            "query_pre_attn_scalar": 6,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "sliding_window": WINDOW,
            "layer_types": MIXED,
        },
        windowless={"layer_types": [FULL] * LAYERS},
    ),
    "gemma3": Family(
        "gemma3_text",
        config={
            "head_dim": 8,
            "query_pre_attn_scalar": 6,
            "sliding_window": WINDOW,
            "layer_types": MIXED,
        },
        windowless={"sliding_window": 96},
    ),
    "gptj": Family(
        "gptj",
        "transformer.h.{}",
        "mlp.fc_out",
        shape=GPT_SHAPE,
        config={"rotary_dim": 4},
        tolerance=1e-5,  # its attention scores are in float32
    ),
    "gpt_neox": Family("gpt_neox", "gpt_neox.layers.{}", "mlp.dense_4h_to_h"),
    "gpt_neo": Family(
        "gpt_neo",
        "transformer.h.{}",
        "mlp.c_proj",
        shape={"hidden_size": 24, "num_layers": LAYERS, "num_heads": 4},
        config={
            "max_position_embeddings": 96,
            "window_size": WINDOW,
            "attention_types": [[["global"], 1], [["local"], 4]],
        },
        windowless={"attention_types": [[["global"], LAYERS]]},
        tolerance=1e-5,  # its attention scores are in float32
    ),
    "opt": Family(
        "opt",
        "model.decoder.layers.{}",
        "fc2",
        config={"ffn_dim": 40, "word_embed_proj_dim": 16},
        sites=("block_output",),
    ),
    "phi": Family("phi", down="mlp.fc2", config={"partial_rotary_factor": 0.7}),
    "falcon": Family(
        "falcon",
        "transformer.h.{}",
        "mlp.dense_4h_to_h",
        config={"alibi": False},
    ),
    "falcon-alibi": Family(
        "falcon",
        "transformer.h.{}",
        "mlp.dense_4h_to_h",
        config={"alibi": True, "parallel_attn": False, "bias": True},
    ),
    "bloom": Family(
        "bloom",
        "transformer.h.{}",
        "mlp.dense_4h_to_h",
        shape={"hidden_size": 24, "n_layer": LAYERS, "n_head": 4},
    ),
    "cohere": Family("cohere"),
    "cohere2": Family(
        "cohere2",
        config={"sliding_window": WINDOW, "layer_types": MIXED},
        windowless={"sliding_window": 96},
    ),
    "olmo2": Family("olmo2"),
    "stablelm": Family("stablelm"),
    "starcoder2": Family(
        "starcoder2",
        down="mlp.c_proj",
        config={"sliding_window": WINDOW},
        windowless={"sliding_window": None},
    ),
    "gpt_bigcode": Family(
        "gpt_bigcode", "transformer.h.{}", "mlp.c_proj", shape=GPT_SHAPE
    ),
}

SETTINGS = TargetSettings(
    "block_output",
    steps=4,
    learning_rate=0.3,
    clamp=4.0,
    kl_factor=0.5,
    kl_prompts=("{} is a", "Some say that {} was"),
    kl_position="end",
)


def keep_softmax_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention takes its softmax in float32, also where scores are float64: its
    rounding would hide small mistakes, and the mask's lowest float64 overflows."""
    softmax = nn.functional.softmax

    def wide(input: Tensor, dim: int, *_: Any, dtype: Any = None) -> Tensor:
        return softmax(
            input, dim, dtype=None if input.dtype == torch.float64 else dtype
        )

    monkeypatch.setattr(nn.functional, "softmax", wide)


# As old transformers' gpt_bigcode does, with a new torch.
@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_equals_the_plain_loop(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES[name]
    record = Architecture(
        family.model_type, family.block, f"{family.block}.{family.down}",
        family.storage, "",
    )  # fmt: skip
    monkeypatch.setitem(adapters.ARCHITECTURES, family.model_type, record)
    model, tokenizer = family.make(), make_tokenizer("llama")
    adapter = ModelAdapter.of(model)
    keep_softmax_wide(monkeypatch)
    if family.windowless is not None:
        _assert_windows_matter(family, model, tokenizer)
    for site in family.sites:
        settings = TargetSettings(**{**vars(SETTINGS), "site": site})
        found = optimize_targets(adapter, tokenizer, CHOSEN, CONTEXTS, LAYER, settings)
        for index, edit in enumerate(CHOSEN):
            rows = plain_rows(tokenizer, edit, CONTEXTS, settings)
            plain = plain_target(model, adapter.site(site, LAYER), rows, settings)
            expected = plain.value - plain.initial
            delta = found.values[index] - found.initial[index]
            size = float(expected.norm())
            assert size > 0.5
            error = float((delta - expected).norm()) / size
            assert error < family.tolerance, (site, index)
            for mine, other in (
                (found.initial_probability[index], plain.probabilities[0]),
                (found.probability[index], plain.probabilities[-1]),
            ):
                assert float(mine) == pytest.approx(other, rel=family.tolerance)


def _assert_windows_matter(family: Family, model: Any, tokenizer: Any) -> None:
    """Or else a window that is counted wrongly would not show."""
    assert family.windowless is not None
    other = family.make(**family.windowless)
    other.load_state_dict(model.state_dict())
    ids = torch.tensor([tokenizer(CHOSEN[0].text)["input_ids"]])
    with torch.no_grad():
        difference = model(input_ids=ids).logits - other(input_ids=ids).logits
    assert float(difference[:, WINDOW:].abs().max()) > 0.01
    assert float(difference[:, : WINDOW - 1].abs().max()) < 1e-6
