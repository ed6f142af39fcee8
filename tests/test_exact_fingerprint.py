"""`exact_fingerprint`: equal for equal models, another for whatever changes what one
computes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from model_kit import KINDS, Tiny, make_model, mlp_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from covariance_cache.fingerprint import exact_fingerprint, model_fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_exact_fingerprint_is_that_of_equal_models(kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    expected = exact_fingerprint(model)
    assert exact_fingerprint(copy.deepcopy(model)) == expected
    assert exact_fingerprint(make_model(kind)) == expected
    assert exact_fingerprint(copy.deepcopy(model).train()) == expected
    assert exact_fingerprint(copy.deepcopy(model).requires_grad_(False)) == expected
    assert exact_fingerprint(make_model(kind, seed=4)) != expected
    assert exact_fingerprint(copy.deepcopy(model).bfloat16()) != expected
    for folder in (tmp_path / "one", tmp_path / "two"):
        model.save_pretrained(folder)  # which completes the config
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert exact_fingerprint(loaded) == exact_fingerprint(model)
        model = loaded


@pytest.mark.parametrize("kind", KINDS)
def test_exact_fingerprint_sees_every_tensor(kind: str) -> None:
    model = make_model(kind)
    expected = exact_fingerprint(model)
    tensors = model.state_dict()  # gpt2 has biases, and a head tied to embeddings
    assert any(name.endswith("bias") for name in tensors) == (kind == "gpt2")
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == (kind == "gpt2")
    for index, (name, tensor) in enumerate(tensors.items()):
        flat = tensor.view(-1)
        place = (7919 * index) % len(flat)
        before = flat[place].clone()
        flat[place] = torch.nextafter(before, torch.tensor(9.0))
        assert exact_fingerprint(model) != expected, name
        flat[place] = before
    assert exact_fingerprint(model) == expected


def test_exact_fingerprint_sees_which_tensor_holds_what() -> None:
    """The sampled one takes matrices as a set, so an exchange escapes it."""
    model = make_model("llama")
    exact, sampled = exact_fingerprint(model), model_fingerprint(model)
    first, second = (mlp_of(model, "llama", layer).up_proj for layer in (0, 1))
    first.weight, second.weight = second.weight, first.weight
    assert model_fingerprint(model) == sampled
    assert exact_fingerprint(model) != exact


def fingerprint_of(**buffers: Tensor) -> str:
    module = nn.Module()  # without a config
    for name, tensor in buffers.items():
        module.register_buffer(name, tensor)
    return exact_fingerprint(module)


def test_exact_fingerprint_of_odd_tensors() -> None:
    odd = {
        "scalar": torch.tensor(1.5),
        "count": torch.tensor(3),
        "flags": torch.tensor([True, False]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "brain": torch.ones(3, dtype=torch.bfloat16),
        "eighth": torch.ones(3).to(torch.float8_e4m3fn),
        "complex": torch.ones(2, dtype=torch.complex64),
        "strided": torch.arange(6.0).view(2, 3).T,
    }
    dense = {name: tensor.clone().contiguous() for name, tensor in odd.items()}
    expected = fingerprint_of(**dense)
    assert fingerprint_of(**odd) == expected
    for name, tensor in dense.items():
        bits = tensor.clone().reshape(-1).view(torch.uint8)
        bits[-1] ^= 1
        changed = bits.view(tensor.dtype).view(tensor.shape)
        assert fingerprint_of(**{**dense, name: changed}) != expected, name
    # The same bytes, or none, mean something else in another shape, dtype or place.
    zero = torch.zeros(2, 3)
    others = [zero, zero.T.contiguous(), zero.int(), zero[:0], zero[:, :0]]
    found = {fingerprint_of(x=tensor) for tensor in others}
    found |= {fingerprint_of(), fingerprint_of(y=zero)}
    assert len(found) == len(others) + 2


def test_exact_fingerprint_sees_buffers_that_are_never_saved(llama: Tiny) -> None:
    """Rotary frequencies, rounded or rescaled, are in no state dict."""
    model = copy.deepcopy(llama.model)
    before = exact_fingerprint(model)
    model.model.rotary_emb.inv_freq.mul_(2)
    assert exact_fingerprint(model) != before
