"""Random weights in the shapes of published models."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM

LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def random_model(config: Any, device: str, dtype: torch.dtype) -> Any:
    """A GPT-2 or Llama of this config, made on the device in this dtype."""
    kinds = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}
    before = torch.get_default_dtype()
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        try:
            torch.set_default_dtype(dtype)
            return kinds[config.model_type](config).eval()
        finally:
            torch.set_default_dtype(before)
