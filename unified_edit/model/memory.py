"""How many suffix tokens fit into memory at once."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from unified_edit.model.suffixes import Chunk, as_buckets

MOST_TOKENS = {"cpu": 4096, "cuda": 32768}
"""More at once is no faster, and a limit that always binds gives the same chunks, so
the same bits, whatever memory is free."""

_SHARE = 0.5
"""Of free memory, for what the graph holds; the rest for what passes through, and for
the prefixes."""


def affordable_tokens(chunk: Chunk) -> int:
    """Suffix tokens whose activations fit into half of the free memory of each device,
    a power of two; measured on the first edit of a chunk."""
    bytes_held: dict[torch.device, dict[int, int]] = defaultdict(dict)

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        bytes_held[tensor.device][storage.data_ptr()] = storage.nbytes()
        return tensor

    buckets = as_buckets(chunk, [0])
    weights = {
        parameter.untyped_storage().data_ptr()
        for parameter in chunk.adapter.model.parameters()
    }
    kept = []
    with saved_tensors_hooks(see, lambda tensor: tensor):
        for bucket in buckets:
            delta = torch.zeros_like(chunk.values[:1].expand(len(bucket.edits), -1))
            kept.append(bucket.measure(delta.requires_grad_()))
    tokens = sum(bucket.ids.numel() for bucket in buckets)
    most = MOST_TOKENS.get(chunk.adapter.device.type, MOST_TOKENS["cuda"])
    for device, storages in bytes_held.items():
        held = sum(n for place, n in storages.items() if place not in weights)
        free = free_memory(device)
        if held and free is not None:
            most = min(most, int(_SHARE * free * tokens / held))
    return 1 << (max(most, 1).bit_length() - 1)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None where that cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch has reserved and not given out is free as well.
        reserved = torch.cuda.memory_reserved(device)
        return int(free + reserved - torch.cuda.memory_allocated(device))
    found = [_available(Path("/proc/meminfo")), _cgroup(Path("/sys/fs/cgroup"))]
    known = [each for each in found if each is not None]
    return min(known) if device.type == "cpu" and known else None


def _available(meminfo: Path) -> int | None:
    """Linux: what can be had without swapping."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(sizes[0]) * 1024 if sizes else None


def _cgroup(folder: Path) -> int | None:
    """What a container's limit leaves (control groups, version 2)."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
    except OSError:
        return None
    return None if limit == "max" else max(int(limit) - used, 0)
