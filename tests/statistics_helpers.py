"""Tiny models, a byte-level tokenizer and a text, shared by the statistics tests."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

LAYERS = 3
TEXTS = [
    f"Document {n} says that {n} and {n + 1} make {2 * n + 1}, "
    + "and so on " * (n % 7)
    for n in range(40)
]
MODULE = {
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "llama": "model.layers.{}.mlp.down_proj",
}


def make_model(kind: str, seed: int = 0) -> Any:
    """A random model of 3 layers; d_key is 64 (gpt2) or 40 (llama)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "gpt2":
            model: nn.Module = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=300, n_embd=16, n_layer=LAYERS, n_head=2, n_positions=64
                )
            )
        else:
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=300,
                    hidden_size=16,
                    intermediate_size=40,
                    num_hidden_layers=LAYERS,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    max_position_embeddings=1_000_000,
                )
            )
    return model.eval()


def make_tokenizer(*, bos: bool = False, eos: bool = False) -> Any:
    """One token per byte. `bos` and `eos`: the tokenizer adds them by itself. Both
    exist as attributes either way, as they do in most tokenizers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1}
    vocabulary |= {letter: i + 2 for i, letter in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos or eos:
        template = " ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos)
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    )


def random_keys(tokens: int, d_key: int, seed: int = 0) -> torch.Tensor:
    """[tokens, d_key] keys with a mean far from zero, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, d_key, generator=generator) + 0.5
