"""Fingerprints: short, stable names for the contents of models and tokenizers.

A model's fingerprint is a SHA-256 over the shapes and evenly spaced values of all its
floating-point matrices, read as float32 and taken as a set. So it is the same for a
live model and for its checkpoint's files (names and prefixes, tied copies and buffers
do not matter), the same whether stored as float16 or loaded as float32, costs
milliseconds, and changes with any update of a weight. It is a sample: a change of a few
single values can escape it. It guards against mistakes, not against forgery.
`exact_fingerprint` reads everything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from covariance_cache.errors import StatisticsError

SAMPLES_PER_MATRIX = 4096

Sample = tuple[tuple[int, ...], bytes]
"""A matrix's shape, and its little-endian float32 values at `sample_positions`."""


def sample_positions(numel: int) -> list[int]:
    """Row-major positions of the values that stand for a matrix of `numel` values."""
    count = min(numel, SAMPLES_PER_MATRIX)
    return [index * numel // count for index in range(count)]


def sample_of(tensor: Tensor) -> Sample:
    """What stands for a matrix in a fingerprint."""
    positions = torch.tensor(sample_positions(tensor.numel()), device=tensor.device)
    return as_sample(tensor.shape, tensor.detach().reshape(-1)[positions])


def as_sample(shape: Sequence[int], values: Tensor) -> Sample:
    """The same from the values at `sample_positions`, read by other means."""
    array = values.to(torch.float32).cpu().numpy()
    return tuple(shape), array.astype("<f4").tobytes()


def fingerprint_samples(samples: Iterable[Sample]) -> str:
    """Fingerprint from the samples of every floating-point tensor of two dimensions."""
    digests = {
        hashlib.sha256(repr(tuple(shape)).encode() + values).hexdigest()
        for shape, values in samples
    }
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """Fingerprint of a loaded model. Equals that of the checkpoint it came from,
    unless loading rounded the weights."""
    return fingerprint_samples(
        sample_of(_kept(model, name) if tensor.is_meta else tensor)
        for name, tensor in model.state_dict().items()
        if tensor.ndim == 2 and tensor.is_floating_point() and tensor.numel()
    )


def _kept(model: nn.Module, name: str) -> Tensor:
    """A weight that accelerate's hooks keep elsewhere until its module, or one around
    it, runs."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, -1, -1):
        hook: Any = getattr(
            model.get_submodule(".".join(parts[:cut])), "_hf_hook", None
        )
        for each in getattr(hook, "hooks", (hook,)):
            weights = getattr(each, "weights_map", None)
            if weights is None:
                continue
            try:
                weight: Tensor = weights[".".join(parts[cut:])]
            except KeyError:
                continue
            if not weight.is_meta:
                return weight
    raise StatisticsError(
        f"weight {name} is on no device, and no hook of accelerate keeps it; load the "
        "model with its weights"
    )


def exact_fingerprint(model: nn.Module) -> str:
    """SHA-256 over a model's config and every byte of its weights and buffers, with
    their names: two models that share it compute the same. Reads all of them, a few
    seconds for billions; `model_fingerprint` samples."""
    config: Any = getattr(model, "config", None)
    settings = {} if config is None else config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        settings.pop(name, None)
    attention = getattr(config, "_attn_implementation", None)
    # Some buffers are in no state dict: rotary frequencies, rounded with the rest.
    tensors = {**dict(model.named_buffers()), **model.state_dict()}
    # hashlib lets go of the interpreter's lock.
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_bytes_digest, tensors.values())
        entries = [
            [name, str(tensor.dtype), list(tensor.shape), digest]
            for (name, tensor), digest in zip(tensors.items(), digests, strict=True)
        ]
    text = json.dumps([settings, attention, entries], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _bytes_digest(tensor: Tensor) -> str:
    array = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(array.data).hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's rules and vocabulary. Padding and truncation settings,
    which calls change as they go, are left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules.pop("padding", None)
        rules.pop("truncation", None)
    else:
        rules = {
            "class": type(tokenizer).__name__,
            "vocabulary": tokenizer.get_vocab(),
            "special": tokenizer.special_tokens_map,
        }
    text = json.dumps(rules, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
