"""What every benchmark shares: a clock, the rate of a plain matrix product to compare
with, the names of machine and versions, and the ways to print."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from rich.table import Table

T = TypeVar("T")


def machine(device: str = "cpu") -> str:
    """The GPU's name, or the processor's and how many threads torch uses of it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()


def versions() -> str:
    """Of Python and of what the figures depend on."""
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def print_json(answer: Mapping[str, Any]) -> None:
    """One object, on stdout."""
    json.dump(answer, sys.stdout, indent=1, ensure_ascii=False)
    sys.stdout.write("\n")


def figures_table(title: str, figures: Mapping[str, float]) -> Table:
    """Names and values, one a row."""
    table = Table(title=title, show_header=False)
    for key, value in figures.items():
        table.add_row(key.replace("_", " "), f"{value:.4g}")
    return table


def timed(work: Callable[[], T], device: str) -> tuple[float, T]:
    """Seconds, until the device is done, and what `work` returned."""
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    found = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun, found


def product_rate(device: str) -> float:
    """FLOPs per second of a plain matrix product of 2048 × 2048, on CUDA 8192 in
    bfloat16."""
    size = 8192 if device == "cuda" else 2048
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a = torch.ones(size, size, dtype=dtype, device=device)
    rates = []
    for _ in range(7):
        seconds, _ = timed(lambda: a @ a, device)
        rates.append(2 * size**3 / seconds)
    return statistics.median(rates)
