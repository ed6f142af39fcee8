"""Tables and a picture of what `shrinkage.py` measured, from its cells.

A cell is a model, case, budget, shrinkage and text, with figures or a refusal; a point
is all cells of a place but for the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

Cell = Mapping[str, Any]

_COLUMNS = {
    "S": "s",
    "ES": "es",
    "PS": "ps",
    "NS": "ns",
    "same": "same_subject",
    "other": "unrelated",
    "held-out": "held_out_damage",
    "collected": "collected_damage",
    "certified": "certified_damage",
    "norm": "relative_norm",
}
_WITH_RANGE = ("s", "held_out_damage")

# Okabe and Ito's, which the colour-blind can tell apart; markers and dashes for print
# without colour.
_STYLES: dict[str, dict[str, Any]] = {
    "none": {"color": "#000000", "marker": "o", "linestyle": "-"},
    "ridge:0.001": {"color": "#56b4e9", "marker": "^", "linestyle": "--"},
    "ridge:0.01": {"color": "#e69f00", "marker": "s", "linestyle": "--"},
    "oas": {"color": "#d55e00", "marker": "D", "linestyle": "-"},
    "ridge:0.1": {"color": "#009e73", "marker": "v", "linestyle": ":"},
}
_DRAWN = ("emmet", "memit")
_FIGURES = {"s": "S", "held_out_damage": "held-out damage"}
_MODELS = {"gpt2": "GPT-2", "llama": "Llama"}


def values(cells: Iterable[Cell], figure: str) -> list[float]:
    """A figure of those cells that were not refused."""
    return [cell[figure] for cell in cells if "refused" not in cell]


def chosen_cells(cells: Iterable[Cell], **wanted: Any) -> list[Cell]:
    """Those of a place, in any of their names."""
    return [
        cell
        for cell in cells
        if all(cell[name] == value for name, value in wanted.items())
    ]


def distinct(cells: Iterable[Cell], name: str) -> list[Any]:
    """Values of a name, in the order of the cells."""
    return list(dict.fromkeys(cell[name] for cell in cells))


def number(value: float, figure: str) -> str:
    """Three places of a share, two digits of what spans many powers of ten."""
    return f"{value:.2g}" if figure.endswith(("damage", "norm")) else f"{value:.3f}"


def table(cells: Sequence[Cell], model: str, case: str) -> Table:
    """A row for each point of a case: means, and ranges over texts. `same` and `other`
    are facts that are still said, `held-out` to `certified` damages."""
    title = f"{model}, {case}: mean (range over texts)"
    drawn = Table(title=title, title_justify="left")
    for name in ("tokens/dim.", "shrinkage", "texts"):
        drawn.add_column(name, no_wrap=True)
    for name in _COLUMNS:
        drawn.add_column(name, justify="right", no_wrap=True)
    mine = chosen_cells(cells, model=model, case=case)
    for budget in distinct(mine, "tokens_per_dimension"):
        for shrinkage in distinct(mine, "shrinkage"):
            point = chosen_cells(mine, tokens_per_dimension=budget, shrinkage=shrinkage)
            done = len(values(point, "s"))
            row = [f"{budget:g}", shrinkage, str(done) if done else "refused"]
            for name in _COLUMNS.values() if done else ():
                found = values(point, name)
                shown = number(sum(found) / done, name)
                if done > 1 and name in _WITH_RANGE:
                    low, high = (number(each(found), name) for each in (min, max))
                    shown += f" ({low}-{high})"
                row.append(shown)
            drawn.add_row(*row)
        drawn.add_section()
    return drawn


def draw(cells: Sequence[Cell], path: Path) -> None:
    """S and held-out damage against tokens a dimension, as wide as a column of a paper.
    Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator

    cells = [cell for cell in cells if cell["case"].startswith(_DRAWN)]
    models, cases = distinct(cells, "model"), distinct(cells, "case")
    budgets = distinct(cells, "tokens_per_dimension")
    shrinkages = distinct(cells, "shrinkage")
    rows = [(case, figure) for case in cases for figure in _FIGURES]
    drawing = Figure(figsize=(3.5, 0.5 + 1.35 * len(rows)), layout="constrained")
    FigureCanvasAgg(drawing)
    grid = drawing.subplots(
        len(rows), len(models), sharex=True, sharey="row", squeeze=False
    )
    for (case, figure), line in zip(rows, grid, strict=True):
        for model, axes in zip(models, line, strict=True):
            mine = chosen_cells(cells, model=model, case=case)
            for place, shrinkage in enumerate(shrinkages):
                _line(axes, mine, figure, shrinkage, place, len(shrinkages))
            axes.set_xscale("log")
            axes.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
            axes.xaxis.set_minor_locator(NullLocator())
            if figure != "s":
                axes.set_yscale("log")
                axes.yaxis.set_minor_formatter(NullFormatter())
            axes.grid(which="major", alpha=0.3, linewidth=0.5)
            axes.tick_params(labelsize=6.5, length=2)
            axes.tick_params(which="minor", length=1)
            axes.spines[["top", "right"]].set_visible(False)
            name = f"{_MODELS.get(model, model)}, {case.split()[0].upper()}"
            axes.set_title(name, fontsize=7, pad=3)
        line[0].set_ylabel(_FIGURES[figure], fontsize=7)
    drawing.supxlabel("tokens per dimension of a key", fontsize=7)
    named = dict(zip(*grid[0, 0].get_legend_handles_labels()[::-1], strict=True))
    labels = sorted(named, key=lambda label: label.endswith("refused"))
    drawing.legend(
        [named[label] for label in labels],
        labels,
        loc="outside upper center",
        ncols=3,
        fontsize=6.5,
        frameon=False,
        handlelength=2.2,
        columnspacing=1.0,
    )
    drawing.savefig(path, dpi=300)


def _line(
    axes: Any, cells: Sequence[Cell], figure: str, shrinkage: str, place: int, of: int
) -> None:
    """One shrinkage: means, and bars over the range of texts."""
    style = _STYLES.get(shrinkage, {"marker": "x", "linestyle": ":"})
    # A little apart, so that bars and markers do not hide one another.
    aside = 1.05 ** (place - (of - 1) / 2)
    at, means, below, above = [], [], [], []
    for budget in distinct(cells, "tokens_per_dimension"):
        point = chosen_cells(cells, tokens_per_dimension=budget, shrinkage=shrinkage)
        found = values(point, figure)
        if not found:
            axes.plot(
                budget * aside,
                0.04,
                marker="x",
                markersize=4,
                linestyle="none",
                color=style.get("color"),
                label=f"{shrinkage}: refused",
                transform=axes.get_xaxis_transform(),
                clip_on=False,
            )
            continue
        mean = sum(found) / len(found)
        at.append(budget * aside)
        means.append(mean)
        below.append(mean - min(found))
        above.append(max(found) - mean)
    axes.errorbar(
        at,
        means,
        yerr=(below, above),
        label=shrinkage,
        linewidth=1,
        markersize=3,
        elinewidth=0.8,
        capsize=1.5,
        **style,
    )
