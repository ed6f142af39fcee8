"""The architecture table: one frozen record per `model_type`. Data only; a model
whose type is not here is refused, never guessed at.

`tests/test_conformance.py` measures on a small random model of each type what its
record says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from covariance_cache.modules import KEY_MODULES, inside

When = bool | tuple[tuple[str, Any], ...]
"""True or false for all of a type's models, or true for those whose config has one of
these values of these attributes."""


@dataclass(frozen=True)
class Architecture:
    """Where a family keeps what an edit touches, and what happens to it there. `{}`
    stands for the layer."""

    model_type: str
    """`model_type` of the transformers config."""
    down_projection: str
    """The MLP's down-projection: its input is the key, its output the value."""
    storage: Literal["Linear", "Conv1D"] = "Linear"
    """`Linear` stores [d_value, d_key], `Conv1D` its transpose. Never told by shape:
    a square weight would tell nothing. No dense family fuses this matrix with another.
    """
    attention: str = "self_attn.o_proj"
    """The attention's output projection, by its name in the block."""
    normalized: When = False
    """Whether a norm stands between the MLP's output and the block's. Then no change of
    the block's output is a linear target of the down-projection."""
    parallel: When = False
    """Whether MLP and attention read the same input, beside each other. The first
    block's key then depends on its token alone."""
    residual_scale: str | None = None
    """Attribute of a block by which it multiplies what the MLP adds to its output."""
    heads: tuple[str, ...] = ("lm_head",)
    """Where the language-model head is, newest first: some versions of transformers
    name it differently. What a model does after it, scaling or capping, is its own:
    logits are never computed here."""
    alone: bool = True
    """Whether transformers makes a language model of this decoder by itself; or else
    it is only ever found inside another model."""

    @property
    def block(self) -> str:
        """The decoder block. Its output, or the first part of it where that is a tuple,
        is the residual stream."""
        return self.down_projection.partition("{}")[0] + "{}"

    @property
    def decoder(self) -> str:
        """What the names of the decoder's tensors begin with in a full model, and may
        lack in the files of a bare decoder."""
        return self.down_projection.partition(".")[0] + "."

    def inside(self, wrapper: str) -> Architecture:
        """The record of this decoder in a model that wraps it."""
        return replace(self, down_projection=inside(self.down_projection, wrapper))


def _family(model_type: str, **known: Any) -> Architecture:
    return Architecture(model_type, KEY_MODULES[model_type], **known)


ARCHITECTURES: dict[str, Architecture] = {
    record.model_type: record
    for record in (
        _family("apertus"),
        _family("arcee"),
        _family("biogpt", attention="self_attn.out_proj", heads=("output_projection",)),
        _family("bloom", attention="self_attention.dense"),
        _family("codegen", attention="attn.out_proj", parallel=True),
        _family("cohere", parallel=True),
        _family("cohere2", parallel=True),
        _family("ctrl", attention="multi_head_attention.dense"),
        _family("cwm"),
        _family("diffllama"),
        _family("ernie4_5"),
        _family("exaone4", normalized=True),
        _family(
            "falcon",
            attention="self_attention.dense",
            parallel=(("new_decoder_architecture", True), ("parallel_attn", True)),
        ),
        _family("gemma"),
        _family("gemma2", normalized=True),
        _family("gemma3_text", normalized=True),
        _family("glm"),
        _family("glm4", normalized=True),
        _family("glm4v_text", normalized=True, alone=False),
        _family("gpt2", storage="Conv1D", attention="attn.c_proj"),
        _family("gpt_bigcode", attention="attn.c_proj"),
        _family("gpt_neo", attention="attn.attention.out_proj"),
        _family(
            "gpt_neox",
            attention="attention.dense",
            parallel=(("use_parallel_residual", True),),
            heads=("lm_head", "embed_out"),
        ),
        _family("gpt_neox_japanese", attention="attention.dense", heads=("embed_out",)),
        _family("gptj", attention="attn.out_proj", parallel=True),
        _family("granite", residual_scale="residual_multiplier"),
        _family("granite_swa", residual_scale="residual_multiplier"),
        _family("helium"),
        _family("hunyuan_v1_dense"),
        _family(
            "hyperclovax",
            normalized=(("use_post_norm", True),),
            residual_scale="residual_multiplier",
        ),
        _family("internlm3"),
        _family("iquestcoder"),
        _family("jais2"),
        _family("llama"),
        _family("minicpm3", residual_scale="residual_scale"),
        _family("ministral"),
        _family("ministral3"),
        _family("mistral"),
        _family("modernbert-decoder", attention="attn.Wo", heads=("decoder",)),
        _family("mpt", attention="attn.out_proj"),
        _family("nanochat"),
        _family("nemotron"),
        _family("olmo"),
        _family("olmo2", normalized=True),
        _family("olmo3", normalized=True),
        _family(
            "opt",
            attention="self_attn.out_proj",
            normalized=(("do_layer_norm_before", False),),
        ),
        _family("persimmon", attention="self_attn.dense"),
        _family("phi", attention="self_attn.dense", parallel=True),
        _family("phi3"),
        _family("qwen2"),
        _family("qwen2_5_vl_text", alone=False),
        _family("qwen2_vl_text", alone=False),
        _family("qwen3"),
        _family("qwen3_vl_text", alone=False),
        _family("seed_oss"),
        _family("smollm3"),
        _family("stablelm", parallel=(("use_parallel_residual", True),)),
        _family("starcoder2"),
        _family("vaultgemma"),
        _family("xglm", attention="self_attn.out_proj"),
        _family("youtu"),
    )
}


_EXPERTS = (
    "is a mixture of experts: which down-projection a fact passes depends on a router, "
    "so it has no single edited weight"
)
_HYBRID = (
    "mixes tokens by state-space, linear-attention or convolution layers, which hand "
    "on a state that targets cannot be optimised through from the subject on"
)
_ENCODER_DECODER = (
    "is an encoder-decoder: a fact may be recalled in the encoder, and the methods "
    "here are for decoders that read a prompt and continue it"
)
_ENCODER = (
    "is an encoder, which does not continue a prompt: it sees what stands after the "
    "subject as well"
)
_OTHERWISE = (
    "is built otherwise than the decoders here: blocks that run several times or over "
    "bytes, no MLP in them, or no cache of attention keys and values"
)
_PREFIX = (
    "reads its prompt as a whole, each token seeing those after it as well: what "
    "follows the subject changes its key, and targets cannot be optimised from the "
    "subject on"
)
_PART = (
    "reads or writes sound or pictures through weights that this project does not "
    "take its text decoder from"
)
_SHARED = (
    "shares attention keys and values, or inputs, between layers, so that its blocks "
    "cannot be run from the edited one on"
)
_TERNARY = (
    "computes with weights rounded to three values: a change of the weights that are "
    "stored is lost in them"
)

_REASONS: dict[str, tuple[str, ...]] = {
    _EXPERTS: (
        *("afmoe", "aria", "aria_text", "axk1", "axk2", "beam", "cohere2_moe"),
        *("dbrx", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4"),
        *(
            "doge",
            "dots1",
            "dots3_note",
            "dots3_note_text",
            "ernie4_5_moe",
            "ernie4_5_vl_moe",
            "exaone_moe",
            "flex_olmo",
            "flint",
        ),
        *("glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "gpt_oss"),
        *("granitemoe", "granitemoe_swa", "granitemoeshared", "hunyuan_v1_moe"),
        *("hy_v3", "hy_v4"),
        *("inkling2_text", "inkling_text", "jetmoe", "kolibri1", "laguna", "llama4"),
        *("llama4_text", "longcat_flash", "mellum", "mimo_v2_flash", "minimax_m2"),
        *("minimax_m3_vl_text", "mistral4", "mixtral", "olmoe", "phimoe"),
        *("qwen2_moe", "qwen3_moe", "qwen3_vl_moe", "solar_open", "zaya"),
    ),
    _HYBRID: (
        *("bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid"),
        *("jamba", "kimi_linear", "lfm2", "lfm2_moe", "lfm3", "mamba", "mamba2"),
        *("minimax", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe"),
        *(
            "qwen3_5_moe_text",
            "qwen3_5_text",
            "qwen3_next",
            "recurrent_gemma",
            "qwen4_exp",
            "qwen4_exp_text",
        ),
        *("rwkv", "xlstm", "zamba", "zamba2"),
    ),
    _ENCODER_DECODER: (
        *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small"),
        *("encoder-decoder", "fsmt", "led", "longt5", "m2m_100", "marian", "mbart"),
        *("mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x", "plbart", "prophetnet"),
        *("switch_transformers", "t5", "t5gemma", "t5gemma2", "umt5", "whisper"),
    ),
    _ENCODER: (
        *("albert", "bert", "big_bird", "camembert", "deberta", "deberta-v2"),
        *("distilbert", "electra", "ernie", "megatron-bert", "modernbert", "mpnet"),
        *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer"),
        *("xlm-roberta", "xlm-roberta-xl", "xmod", "bert-generation"),
        *("data2vec-text", "xlm", "xlnet"),
    ),
    _OTHERWISE: (
        *("blt", "cpmant", "hrm_text", "openai-gpt"),
        "reformer",
    ),
    _PREFIX: ("paligemma",),
    _PART: (
        *("emu3", "fuyu", "git", "mllama", "moshi", "moss_transcribe_diarize"),
        *("musicgen", "musicgen_melody", "phi4_multimodal", "trocr"),
    ),
    _SHARED: (
        *("gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified"),
        *("gemma4_unified_text", "gemma4_assistant", "gemma4_unified_assistant"),
    ),
    _TERNARY: ("bitnet",),
}
REFUSED: dict[str, str] = {
    model_type: reason for reason, types in _REASONS.items() for model_type in types
}
"""Types that are known not to fit, and why."""
