"""Eigenvalues of second moments, and a picture of them. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from covariance_cache.errors import StatisticsError
from covariance_cache.shrinkage import Shrinkage
from covariance_cache.statistics import KeyStatistics

_FLOOR = 1e-12
"""Shown in place of what rounding made of zero."""
_COLORS: tuple[Any, ...] = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#d55e00",
)
"""Okabe and Ito's, which the colour-blind can tell apart."""


_NAMED = 8
"""Layers in the legend; of more, every second or third."""


def _label(layer: int, statistics: KeyStatistics) -> str:
    per_dimension = statistics.count / statistics.d_key
    return f"layer {layer} ({per_dimension:.3g} tokens per dimension)"


def spectrum(statistics: KeyStatistics) -> Tensor:
    """Eigenvalues of the second moment, descending, [d_key] float64 on the CPU. Takes
    O(d_key³): seconds for 3,000 dimensions, minutes for 14,000."""
    matrix = statistics.second_moment.double()
    values: Tensor = torch.linalg.eigvalsh(matrix)
    return values.flip(0).cpu()


def plot_spectrum(statistics: Mapping[int, KeyStatistics], path: str | Path) -> None:
    """Draws each layer's eigenvalues, and where shrinkage by `oas` would lift the
    smallest of them, as a picture of the kind that the file's suffix names.

    Raises:
        StatisticsError: matplotlib is not installed, or cannot write such a file.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise StatisticsError(
            "a picture needs matplotlib: pip install 'unified-edit[plots]'"
        ) from None
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    smallest = float("inf")
    colors = _COLORS
    if len(statistics) > len(_COLORS):
        shades = [number / (len(statistics) - 1) for number in range(len(statistics))]
        colors = tuple(colormaps["viridis"](shades))
    every = 1 + (len(statistics) - 1) // _NAMED
    for number, (layer, each) in enumerate(sorted(statistics.items())):
        values = spectrum(each)
        mean = float(values.mean())
        if not mean > 0:
            raise StatisticsError(f"layer {layer}: all eigenvalues are zero")
        # Relative to the mean, so that layers of different scale can be compared.
        relative = values / mean
        shown = relative.clamp_min(_FLOOR)
        smallest = min(smallest, float(shown.min()))
        color = colors[number]
        axes.plot(
            range(1, len(shown) + 1),
            shown,
            color=color,
            linewidth=1.5,
            label=None if number % every else _label(layer, each),
        )
        floor = Shrinkage("oas").weights(each.second_moment, each.count)[1] / mean
        axes.axhline(max(floor, _FLOOR), color=color, linewidth=0.8, linestyle=":")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="rank of the eigenvalue",
        ylabel="eigenvalue / mean eigenvalue",
        title="Second moment of the keys (dotted: added by oas)",
    )
    axes.set_ylim(bottom=smallest / 2)
    axes.grid(which="major", alpha=0.3)
    axes.legend(fontsize="small", frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except (ValueError, OSError) as error:
        raise StatisticsError(f"{path}: cannot be written: {error}") from error
