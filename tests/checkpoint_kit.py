"""Tiny checkpoints and updates for the checkpoint tests."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from unified_edit.algebra.addition import added
from unified_edit.algebra.update import RankKUpdate, UpdateSet, WeightAddress
from unified_edit.checkpoint import journal
from unified_edit.checkpoint.files import LOCK, STATE
from unified_edit.checkpoint.manifest import JOURNAL
from unified_edit.checkpoint.sharded import Checkpoint

SHARD_BYTES = 15_000


@pytest.fixture(autouse=True)
def quick_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """For modules that import it: no test cuts the power, and waiting for the disk
    would take most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def tiny_model(family: str, *, square: bool = False) -> PreTrainedModel:
    """A random model, the same every time. `square` makes the edited weight square."""
    torch.manual_seed(7)
    if family == "gpt2":  # tied head, Conv1D
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=61,
                n_positions=32,
                n_embd=16,
                n_layer=3,
                n_head=2,
                n_inner=16 if square else 48,
            )
        ).eval()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=16,
            intermediate_size=16 if square else 40,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            tie_word_embeddings=False,
        )
    ).eval()


def save_checkpoint(
    folder: Path,
    family: str = "gpt2",
    dtype: torch.dtype = torch.float32,
    *,
    sharded: bool = False,
    square: bool = False,
) -> Path:
    """Writes a tiny checkpoint with sidecar files, by transformers itself."""
    model = tiny_model(family, square=square).to(dtype)
    size = SHARD_BYTES * dtype.itemsize // 4 if sharded else 10**9
    model.save_pretrained(folder, max_shard_size=size)
    (folder / "README.md").write_text("a card\n")
    (folder / "extra").mkdir()
    (folder / "extra" / "merges.txt").write_bytes(b"\x00\xff raw")
    assert (len(Checkpoint.open(folder).files) > 1) == sharded
    return folder


def write_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> None:
    """A checkpoint of these shards, with index and an empty config."""
    weight_map = {}
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, shard))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")


def address_of(family: str, layer: int) -> WeightAddress:
    if family == "gpt2":
        return WeightAddress(f"transformer.h.{layer}.mlp.c_proj.weight", layer, True)
    return WeightAddress(f"model.layers.{layer}.mlp.down_proj.weight", layer, False)


def random_update(
    folder: Path,
    addresses: list[WeightAddress],
    *,
    seed: int = 0,
    scale: float = 0.05,
    dtype: torch.dtype = torch.float32,
) -> UpdateSet:
    """Rank-3 factors that fit the folder's weights, made for its present state."""
    generator = torch.Generator().manual_seed(seed)
    checkpoint = Checkpoint.open(folder)
    updates = {}
    for address in addresses:
        shape = checkpoint.resolve(address).shape
        d_value, d_key = shape[::-1] if address.transposed else shape
        left = torch.randn(d_value, 3, generator=generator, dtype=dtype) * scale
        right = torch.randn(3, d_key, generator=generator, dtype=dtype)
        updates[address] = RankKUpdate(left, right)
    metadata = {
        "base_fingerprint": checkpoint.fingerprint(),
        "recipe": {"name": "memit"},
        "edits": [{"prompt": "{} is in", "subject": "Île", "target": "Rome"}],
    }
    return UpdateSet(updates, metadata)


def apply_live(model: PreTrainedModel, update: UpdateSet) -> None:
    """The same change on a loaded model."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for address, change in update:
            weight = parameters[address.tensor]
            weight.copy_(added(weight, change, transposed=address.transposed))


def disk(folder: Path) -> dict[str, str]:
    """Every path below `folder`, with the SHA-256 or the kind of what is there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            content = f"link to {path.readlink()}"
        elif path.is_dir():
            content = "folder"
        else:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[path.relative_to(folder).as_posix()] = content
    return found


class Died(BaseException):
    """Stands for the death of the process."""


def half_changed(folder: Path, command: Callable[[], object]) -> None:
    """Lets `command` die in place: one file of `folder` is replaced, the next is not,
    and the lock file is still there."""
    replace, moved = journal.replace, []

    def once(staged: Path, target: Path) -> None:
        if moved:
            raise Died
        moved.append(target)
        replace(staged, target)

    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(journal, "replace", once)
        with pytest.raises(Died):
            command()
    assert moved and (folder / STATE / JOURNAL).is_file()
    (folder / LOCK).touch()
