"""Processes that share one job, as `torchrun` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is. `Ranks()` is a process alone, for which
    nothing is communicated."""

    rank: int = 0
    world: int = 1
    local: int = 0
    """Rank among the processes of this machine: the GPU to use."""

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """A device's name, `cuda` being this process's own GPU."""
        return f"cuda:{self.local}" if name == "cuda" and self.world > 1 else name

    def gather(self, mine: Any) -> list[Any]:
        """Every process's object, in order of ranks, in every process. All must call
        it, with what pickle takes; tensors on the CPU."""
        if self.world == 1:
            return [mine]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, mine)
        return found

    def reduce(self, tensor: Tensor) -> None:
        """Sums a tensor over the processes, in place, for the first; what the others'
        holds afterwards is undefined. On the device that the process works on."""
        if self.world > 1:
            dist.reduce(tensor, dst=0)

    def broadcast(self, tensor: Tensor) -> None:
        """Copies the first process's tensor into the others'."""
        if self.world > 1:
            dist.broadcast(tensor, src=0)


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Joins the processes that `torchrun` started (gloo for the CPU, NCCL for GPUs);
    without it, a process alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
    dist.init_process_group()
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), local)
    finally:
        dist.destroy_process_group()
