"""What a patch of a large checkpoint costs, beside what it cannot do without.

    python benchmarks/patch.py [--json] [--rounds 3] [--gigabytes 4] [--folder DIR]

A sharded bfloat16 checkpoint in Llama-3-8B's shape (fewer layers) is written once.
Then, by turns, each in a process of its own:

- patch: `patch(base, update, out, unchanged="hardlink")` of five 4096 × 14336 tensors
  at rank 1,000, with and without the edits' keys in the update;
- floor: copying the shards that the patch rewrites, each fsynced, and one bare float32
  matrix product of each tensor's factors;
- transformers: from_pretrained, `weight += left @ right`, save_pretrained.

`copy_ratio` is patch over floor, of medians; `peak_tensors` is the patch's peak of
anonymous memory beyond that of the process before it, in bytes of one patched tensor;
`against_save_pretrained` is transformers over patch. All files are in the page cache.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Run as a script: this folder, which comes first, would hide the standard
    # library's `statistics` behind the script of that name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from benchmarks.models import LLAMA_3_8B
from benchmarks.report import figures_table, machine, print_json, versions
from unified_edit.algebra.update import RankKUpdate, UpdateSet, WeightAddress
from unified_edit.checkpoint.patch import patch
from unified_edit.checkpoint.sharded import Checkpoint

D_VALUE, D_KEY = LLAMA_3_8B["hidden_size"], LLAMA_3_8B["intermediate_size"]
TENSOR_BYTES = 2 * D_VALUE * D_KEY
EDITED = 5
VOCABULARY = 2_000
SHARD_BYTES = 1 << 30
KINDS = ("patch", "patch_keys", "floor", "transformers")


def write_checkpoint(folder: Path, gigabytes: float) -> None:
    """Whole layers, in shards of about a gigabyte, until there are enough bytes."""
    shapes = {
        "mlp.down_proj": (D_VALUE, D_KEY),
        "mlp.gate_proj": (D_KEY, D_VALUE),
        "mlp.up_proj": (D_KEY, D_VALUE),
        "self_attn.q_proj": (D_VALUE, D_VALUE),
        "self_attn.o_proj": (D_VALUE, D_VALUE),
        "self_attn.k_proj": (1024, D_VALUE),
        "self_attn.v_proj": (1024, D_VALUE),
        "input_layernorm": (D_VALUE,),
        "post_attention_layernorm": (D_VALUE,),
    }
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
    layers = max(EDITED, round(gigabytes * 1e9 / sum(sizes.values())))
    tensors = {"model.norm.weight": (D_VALUE,)}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = (VOCABULARY, D_VALUE)
    for layer in range(layers):
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = shape
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(D_VALUE * D_KEY, generator=generator).mul_(0.02).bfloat16()
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, shape in tensors.items():
        tensor = noise[: torch.Size(shape).numel()].view(shape).clone()
        if size + tensor.nbytes > SHARD_BYTES:
            _save(folder, shards)
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    _save(folder, shards)
    weight_map = {name: _shard(i) for i, s in enumerate(shards) for name in s}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        **LLAMA_3_8B,
        "vocab_size": VOCABULARY,
        "num_hidden_layers": layers,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))


def _shard(index: int) -> str:
    return f"model-{index + 1:05d}.safetensors"


def _save(folder: Path, shards: list[dict[str, torch.Tensor]]) -> None:
    save_file(shards[-1], folder / _shard(len(shards) - 1), metadata={"format": "pt"})
    shards[-1] = dict.fromkeys(shards[-1], torch.empty(0))


def write_update(base: Path, path: Path, rank: int, *, keys: bool) -> None:
    """Random factors for the down-projections of five layers in the middle."""
    checkpoint = Checkpoint.open(base)
    first = (checkpoint.config["num_hidden_layers"] - EDITED) // 2
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    updates = {}
    for layer in range(first, first + EDITED):
        address = WeightAddress(
            f"model.layers.{layer}.mlp.down_proj.weight", layer, False
        )
        updates[address] = RankKUpdate(
            random(D_VALUE, rank) * 1e-4,
            random(rank, D_KEY),
            random(rank, D_KEY) if keys else None,
        )
    UpdateSet(updates, {"base_fingerprint": checkpoint.fingerprint()}).save(path)


def anonymous_memory() -> int:
    """Bytes of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status tells no RssAnon")


@contextmanager
def watched(found: dict[str, float]) -> Iterator[None]:
    """Seconds, and the peak of anonymous memory beyond what there was before."""
    before = peak = anonymous_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    yield
    found["seconds"] = time.perf_counter() - begun
    peak = max(peak, anonymous_memory())
    done.set()
    watcher.join()
    found["peak_bytes"] = peak - before


def run_patch(base: Path, update: Path, out: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    change = UpdateSet.load(update)
    with watched(found):
        patch(base, change, out, unchanged="hardlink")
    return found


def run_floor(base: Path, update: Path, out: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    change = UpdateSet.load(update)
    factors = [
        (each.left.clone(), each.right.clone()) for _, each in change
    ]  # in memory, not in the file's pages
    checkpoint = Checkpoint.open(base)
    shards = {checkpoint.resolve(address).file for address, _ in change}
    out.mkdir()
    begun = time.perf_counter()
    for shard in shards:
        shutil.copyfile(base / shard, out / shard)
        descriptor = os.open(out / shard, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    found["copy_seconds"] = time.perf_counter() - begun
    for left, right in factors:
        left @ right
    found["seconds"] = time.perf_counter() - begun
    found["rewritten_bytes"] = sum((base / shard).stat().st_size for shard in shards)
    return found


def run_transformers(base: Path, update: Path, out: Path) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    found: dict[str, float] = {}
    change = UpdateSet.load(update)
    with watched(found), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        for address, each in change:
            weight = model.get_parameter(address.tensor)
            weight += (each.left @ each.right).to(weight.dtype)
        model.save_pretrained(out, max_shard_size=SHARD_BYTES)
    return found


RUNS: dict[str, Callable[[Path, Path, Path], dict[str, float]]] = {
    "patch": run_patch,
    "patch_keys": run_patch,
    "floor": run_floor,
    "transformers": run_transformers,
}


def in_a_process(kind: str, base: Path, update: Path, out: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--run", kind, str(base), str(update)]
    told = subprocess.run(
        [*command, str(out)], check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(told.stdout.splitlines()[-1])
    shutil.rmtree(out)
    return found


def measure(folder: Path, gigabytes: float, rank: int, rounds: int) -> dict[str, Any]:
    """Everything by turns, and what the medians say."""
    base, plain, keyed = folder / "base", folder / "plain", folder / "keyed"
    base.mkdir()
    write_checkpoint(base, gigabytes)
    write_update(base, plain, rank, keys=False)
    write_update(base, keyed, rank, keys=True)
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind, found in results.items():
            update = keyed if kind == "patch_keys" else plain
            found.append(in_a_process(kind, base, update, folder / "out"))

    def median(kind: str, name: str = "seconds") -> float:
        return statistics.median(each[name] for each in results[kind])

    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    return {
        "copy_ratio": median("patch") / median("floor"),
        "copy_ratio_keys": median("patch_keys") / median("floor"),
        "peak_tensors": median("patch", "peak_bytes") / TENSOR_BYTES,
        "peak_tensors_keys": median("patch_keys", "peak_bytes") / TENSOR_BYTES,
        "against_save_pretrained": median("transformers") / median("patch"),
        "save_pretrained_peak_tensors": (
            median("transformers", "peak_bytes") / TENSOR_BYTES
        ),
        "patch_seconds": median("patch"),
        "patch_keys_seconds": median("patch_keys"),
        "floor_seconds": median("floor"),
        "floor_copy_seconds": median("floor", "copy_seconds"),
        "transformers_seconds": median("transformers"),
        "spread": max(
            max(each["seconds"] for each in found)
            / min(each["seconds"] for each in found)
            for found in results.values()
        ),
        "checkpoint_gigabytes": size / 1e9,
        "rewritten_gigabytes": median("floor", "rewritten_bytes") / 1e9,
        "rank": rank,
        "rounds": rounds,
    }


def main() -> None:
    """Parses, measures, prints."""
    if sys.argv[1:2] == ["--run"]:
        kind, *paths = sys.argv[2:]
        print(json.dumps(RUNS[kind](*map(Path, paths))))
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rank", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="for the files, on the disk to try")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        figures = measure(
            Path(folder), arguments.gigabytes, arguments.rank, arguments.rounds
        )
    if arguments.json:
        print_json({**figures, "machine": machine(), "versions": versions()})
    else:
        Console().print(figures_table("patching a checkpoint", figures))


if __name__ == "__main__":
    main()
