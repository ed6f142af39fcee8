"""Models by folder or by their name in the local cache: complete, from safetensors,
without running anybody's code, or not at all.

transformers is imported inside the functions: a command that only patches files in a
local folder does without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from covariance_cache.__main__ import Dtype, auto_class
from unified_edit.checkpoint.files import reported
from unified_edit.checkpoint.manifest import refuse_unfinished
from unified_edit.checkpoint.sharded import CONFIG, Checkpoint
from unified_edit.errors import CheckpointError, UnifiedEditError

_OPTIONS: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def folder_of(name: str) -> Path:
    """The folder of a model: `name` itself, or where the local cache keeps that name.

    Raises:
        CheckpointError: neither.
    """
    with reported(f"{name}: cannot be read"):
        if Path(name).is_dir():
            return Path(name)
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(name, CONFIG, local_files_only=True)
    except (OSError, ValueError):
        found = None
    if found is None:
        raise CheckpointError(
            f"{name}: neither a folder nor the name of a model in the local cache; "
            f"check the path, or download it first with: hf download {name}"
        )
    return Path(found).parent


def read_config(folder: Path, checkpoint: Checkpoint) -> Any:
    """The transformers config of a supported model.

    Raises:
        UnsupportedModel: unknown type, or quantized.
        CheckpointError: transformers cannot read the config.
    """
    from transformers import AutoConfig

    from unified_edit.model.adapter import check_type, resolve_architecture

    # Asked first: transformers' own refusal of an unknown type does not help here.
    check_type(SimpleNamespace(**{"model_type": None, **checkpoint.config}))
    with reading(folder, "the config"):
        config = AutoConfig.from_pretrained(folder, **_OPTIONS)
    resolve_architecture(config)
    return config


def read_tokenizer(folder: Path) -> Any:
    """The model's tokenizer.

    Raises:
        CheckpointError: none in the folder, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    with reading(folder, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **_OPTIONS)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # What transformers makes up for GPT-2 without files: it reads any text as "".
        raise CheckpointError(
            f"{folder}: holds no tokenizer; put the model's tokenizer files there"
        )
    return tokenizer


def load_model(folder: Path, config: Any, dtype: str, device: str) -> Any:
    """A causal language model in evaluation mode, every weight from the files.

    Args:
        dtype: a name that transformers knows; "auto" is the files' own.

    Raises:
        CheckpointError: weights are missing, damaged, or not those of the config.
        UnifiedEditError: no such dtype or device.
    """
    if dtype not in list(Dtype):
        known = ", ".join(each.value for each in Dtype)
        raise UnifiedEditError(f"dtype {dtype!r}: expected one of {known}")
    with reading(folder, "the model"):
        loaded: Any = auto_class(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **_OPTIONS,
        )
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        # Otherwise they would stay as initialised: random.
        raise CheckpointError(
            f"{folder}: holds no weights for {', '.join(missing[:3])}"
            f"{' and others' if len(missing) > 3 else ''}; is it the checkpoint of a "
            "causal language model, completely downloaded?"
        )
    try:
        return model.to(torch.device(device)).eval()
    except (RuntimeError, AssertionError) as error:
        raise UnifiedEditError(
            f"the model cannot be put on the device {device!r}: {error}"
        ) from error


@dataclass(frozen=True)
class Source:
    """A model that was found and is supported, its weights not yet loaded."""

    folder: Path
    config: Any
    """Its transformers config."""

    @classmethod
    def of(cls, name: str) -> Source:
        """By folder or cached name.

        Raises:
            CheckpointError, UnsupportedModel: as the functions above, malformed files,
                or a change of the folder was interrupted.
        """
        folder = folder_of(name)
        refuse_unfinished(folder)
        return cls(folder, read_config(folder, Checkpoint.open(folder)))

    def load(self, dtype: str, device: str) -> tuple[Any, Any]:
        """Model and tokenizer, as `load_model` and `read_tokenizer`."""
        tokenizer = read_tokenizer(self.folder)
        return load_model(self.folder, self.config, dtype, device), tokenizer


@contextmanager
def reading(folder: Path, what: str) -> Iterator[None]:
    """What transformers raises for a broken folder, as one error of ours. It may be
    anything, also of the packages below it: only their calls belong in here."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{folder}: cannot load {what}: {error}") from error
