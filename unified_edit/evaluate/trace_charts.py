"""Pictures of causal traces for papers: one fact's heat maps, and averages by token
role. They are a column wide with one kind of state, else both columns.

What is drawn has the style of this file alone, not the user's; and matplotlib is
imported when the first picture is drawn, never its pyplot.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unified_edit.checkpoint import files
from unified_edit.console import check_new
from unified_edit.errors import UnifiedEditError
from unified_edit.evaluate.effects import AverageEffects
from unified_edit.evaluate.intervals import Interval
from unified_edit.model.restoring import KINDS, Kind
from unified_edit.model.tracing import ROLES, Role, Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMN, PAGE = 3.3, 6.9
"""Width in inches of a paper's column, and of both."""
_SMALL, _MEDIUM, _LARGE = 6.5, 7.0, 8.0
"""Sizes of text in points, at those widths."""
_TALLEST = 9.0
"""Inches of a page; with so many tokens that each would have less than its line of
text, some go without a label."""
_ROW = 0.135
"""Height in inches of a labelled token."""
_DPI = 300
_FORMATS: dict[str, dict[str, None]] = {
    ".pdf": {"CreationDate": None},
    ".png": {},
    ".svg": {"Date": None},
}
"""By suffix, what of the metadata is left out: dates."""
_MAP = "Blues"
"""Of colours: from paper white, ever darker, so that it serves the colour-blind and
prints in grey."""
_FONT = "DejaVu Sans"
_NAMES: dict[Kind, str] = {
    "hidden": "hidden state",
    "mlp": "MLP",
    "attention": "attention",
}
_STYLES: dict[Role, tuple[str, str, Any]] = {
    "first subject token": ("#e69f00", "^", (0, (4, 1.2))),
    "middle subject tokens": ("#cc79a7", "D", (0, (1, 1))),
    "last subject token": ("#d55e00", "o", "-"),
    "first token after": ("#009e73", "v", (0, (4, 1, 1, 1))),
    "further tokens": ("#56b4e9", "P", (0, (2, 1))),
    "last token": ("#0072b2", "s", "-"),
}
"""Okabe and Ito's colours, which the colour-blind can tell apart; markers and dashes
for grey."""
_MARKED = 8
"""Markers on a line, about."""
_SETTINGS: Any = {
    # By its own name: text keeps that, but looks up "sans-serif" when it is drawn.
    "font.family": [_FONT],
    "font.size": _MEDIUM,
    "axes.titlesize": _MEDIUM,
    "axes.labelsize": _MEDIUM,
    "axes.linewidth": 0.6,
    "figure.titlesize": _LARGE,
    "legend.fontsize": _SMALL,
    "xtick.labelsize": _SMALL,
    "ytick.labelsize": _SMALL,
    "xtick.major.size": 2.0,
    "ytick.major.size": 2.0,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.pad": 2.0,
    "ytick.major.pad": 2.0,
    "axes.titlepad": 4.0,
    "axes.labelpad": 2.5,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "unified-edit",
}
"""Type 42: publishers refuse matplotlib's own type 3. Letters as paths look the same
everywhere."""


def heat_map(trace: Trace, *, window: int) -> Figure:
    """One fact: the answer's probability with each state restored, tokens × layers, a
    panel for each kind that was traced and one scale of colours for all.

    The subject's tokens have stars. The scale goes from the corrupted run's
    probability, or the lowest with a state restored if that is lower, to the highest;
    its label says which the corrupted and the clean run had, and triangles where.

    Args:
        window: layers in a window of MLPs or attentions, as in `Traces.window`.

    Raises:
        UnifiedEditError: matplotlib is not installed.

    Source: Meng et al. 2022 (ROME), figure 1.
    """
    kinds = [kind for kind in KINDS if kind in trace.restored]
    with _style():
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure

        width = COLUMN if len(kinds) == 1 else PAGE
        count = len(trace.tokens)
        height = min(1.05 + _ROW * max(count, 5), _TALLEST)
        figure = Figure(figsize=(width, height), layout="constrained")
        panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        tables = [trace.restored[kind] for kind in kinds]
        norm = Normalize(
            *_range(
                min(trace.corrupted, *(float(table.min()) for table in tables)),
                max(trace.corrupted, *(float(table.max()) for table in tables)),
            )
        )
        for axes, kind, table in zip(panels, kinds, tables, strict=True):
            image = _image(axes, table.tolist(), norm)
            axes.set_title(_title(kind, window))
        rows = _labelled(count, trace.subject, (height - 1.05) / _ROW)
        panels[0].set_yticks(
            rows,
            [_label(trace.tokens[row], row in trace.subject) for row in rows],
        )
        _bar(figure, image, panels, trace)
        # The answer has at most a third of the line, the prompt what it leaves.
        room = 72 * (width - 0.2)
        answer = _fitting(_seen(trace.fact.target), _LARGE, room / 3)
        rest = room - _length(f"“” → {answer}", _LARGE)
        prompt = _fitting(_seen(trace.fact.text), _LARGE, rest)
        figure.suptitle(_plain(f"“{prompt}” → {answer}"))
        _settle(figure)
    return figure


def effect_curves(averages: AverageEffects, *, window: int) -> Figure:
    """Average indirect effects over layers, a panel for each kind that was traced:
    above a line for each token role with the band of its 95 % interval, below the same
    means as colours. Roles that some facts lack say how many have it.

    Args:
        window: layers in a window of MLPs or attentions, as in `Traces.window`.

    Raises:
        UnifiedEditError: matplotlib is not installed.

    Source: Meng et al. 2022 (ROME), figure 2 and appendix B.
    """
    kinds = [kind for kind in KINDS if kind in averages.indirect]
    found = averages.indirect
    counts = {role: each.facts for role, each in found[kinds[0]].items()}
    roles = [role for role in ROLES if role in counts]  # the same for every kind
    with _style():
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure

        narrow = len(kinds) == 1
        width = COLUMN if narrow else PAGE
        figure = Figure(
            figsize=(width, 2.75 + _ROW * len(roles) + 0.15 * narrow),
            layout="constrained",
        )
        upper, lower = figure.subplots(
            2,
            len(kinds),
            sharex=True,
            sharey="row",
            squeeze=False,
            height_ratios=(1.75, _ROW * len(roles)),
        )
        tables = [
            [[at.mean for at in found[kind][role].layers] for role in roles]
            for kind in kinds
        ]
        means = [mean for table in tables for row in table for mean in row]
        norm = Normalize(*_range(min(0.0, *means), max(0.0, *means)))
        for axes, below, kind, table in zip(upper, lower, kinds, tables, strict=True):
            axes.axhline(0, color="#777777", linewidth=0.6, zorder=1)
            for role in roles:
                _line(axes, role, found[kind][role].layers)
            axes.set_title(_title(kind, window))
            axes.grid(color="#e2e2e2", linewidth=0.5)
            axes.set_axisbelow(True)
            axes.spines[["top", "right", "bottom"]].set_visible(False)
            axes.tick_params(axis="x", length=0)
            image = _image(below, table, norm)
        upper[0].set_ylabel("average indirect effect")
        upper[0].yaxis.set_major_formatter(_told())
        lower[0].set_yticks(range(len(roles)), roles)
        bar = figure.colorbar(
            image, ax=list(lower), pad=0.01, fraction=0.03, aspect=12, format=_told()
        )
        bar.set_label("effect")
        bar.outline.set_linewidth(0.6)
        bar.ax.yaxis.set_major_locator(_few(4))
        lines = {line.get_label(): line for line in upper[0].lines}
        figure.legend(
            [lines[role] for role in roles],
            [
                role if counts[role] == averages.facts else f"{role} (n={counts[role]})"
                for role in roles
            ],
            loc="outside lower center",
            ncols=2 if narrow else 3,
            frameon=False,
            handlelength=2.5,
            handletextpad=0.5,
            columnspacing=1.0 if narrow else 2.0,
            borderaxespad=0.2,
        )
        total = averages.total
        facts = f"{averages.facts} fact{'s' * (averages.facts != 1)}"
        lead = f"Causal tracing of {facts}:{chr(10) if narrow else ' '}"
        figure.suptitle(
            f"{lead}average total effect {total.mean:.3g} "
            f"(95 %: {total.low:.3g} to {total.high:.3g})"
        )
        _settle(figure)
    return figure


def check_format(path: Path) -> None:
    """Whether a picture can be written under this name, before there is one.

    Raises:
        UnifiedEditError: the suffix is none of .pdf, .png and .svg; matplotlib is not
            installed.
    """
    if path.suffix.lower() not in _FORMATS:
        raise UnifiedEditError(
            f"{path}: a picture's name ends in one of {', '.join(_FORMATS)}"
        )
    with _style():
        pass


def save(figure: Figure, path: Path) -> None:
    """Writes a picture as its file's suffix says; same picture, same bytes. A file
    that is there is replaced in one step.

    Raises:
        UnifiedEditError: the suffix is none of .pdf, .png and .svg; there is no such
            folder, or it cannot be written; matplotlib is not installed.
    """
    check_format(path)
    check_new(path, force=True)
    written = io.BytesIO()
    with _style():
        suffix = path.suffix.lower()
        options: Any = {"format": suffix[1:], "metadata": _FORMATS[suffix]}
        figure.savefig(written, dpi=_DPI, **options)
    with files.reported(f"{path}: cannot be written"):
        staged = files.stage(path, written.getvalue())
        with files.undone(lambda: staged.unlink(missing_ok=True)):
            files.replace(staged, path)


@contextmanager
def _style() -> Iterator[None]:
    """This file's style in place of the user's, for as long as it is drawn."""
    try:
        import matplotlib
    except ImportError:
        raise UnifiedEditError(
            "pictures of traces need matplotlib: pip install 'unified-edit[plots]'"
        ) from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def _settle(figure: Figure) -> None:
    """Lays it out once and for all: each time moves things a little."""
    shown = figure.dpi
    figure.set_dpi(_DPI)  # letters have other widths at others
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    figure.set_dpi(shown)


def _title(kind: Kind, window: int) -> str:
    if kind == "hidden":
        return _NAMES[kind]
    return f"{_NAMES[kind]}, window of {window} layer{'s' * (window != 1)}"


def _range(low: float, high: float) -> tuple[float, float]:
    """With some length, for nothing may have an effect at all."""
    return low, high if high > low else low + max(abs(low), 1e-6)


def _image(axes: Any, table: Sequence[Sequence[float]], norm: Any) -> Any:
    """Rows × layers as colours."""
    # Nearest: else programs that show the file smooth what is a few pixels large.
    image = axes.imshow(
        table, cmap=_MAP, norm=norm, aspect="auto", interpolation="nearest"
    )
    axes.set_xlabel("layer")
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(_few(8, whole=True))
    return image


def _line(axes: Any, role: Role, intervals: Sequence[Interval]) -> None:
    color, marker, dashes = _STYLES[role]
    layers = range(len(intervals))
    low, high = ([getattr(at, name) for at in intervals] for name in ("low", "high"))
    if len(layers) == 1:  # a band needs a width
        axes.fill_between([-0.25, 0.25], low * 2, high * 2, color=color, alpha=0.15)
    else:
        axes.fill_between(layers, low, high, color=color, alpha=0.15, linewidth=0)
    every = max(1, len(layers) // _MARKED)
    axes.plot(
        layers,
        [at.mean for at in intervals],
        label=role,
        color=color,
        linestyle=dashes,
        linewidth=1.2,
        marker=marker,
        markersize=3.2,
        markeredgewidth=0,
        # Shifted from role to role, so that markers do not hide each other.
        markevery=(list(ROLES).index(role) * every // len(ROLES), every),
    )


def _bar(figure: Figure, image: Any, panels: Any, trace: Trace) -> None:
    """The scale of colours beneath the panels, with the two runs on it."""
    bar = figure.colorbar(
        image,
        ax=list(panels),
        location="bottom",
        aspect=45 if len(panels) > 1 else 22,
        shrink=0.8,
        pad=0.02,
        format=_told(),
    )
    bar.outline.set_linewidth(0.6)
    bar.ax.xaxis.set_major_locator(_few(6))
    low, high = image.norm.vmin, image.norm.vmax
    # A state that carries everything brings back the clean run up to rounding.
    within = trace.clean <= high + 0.02 * (high - low)
    bar.set_label(
        f"p(answer);  ▼ corrupted {trace.corrupted:.3g},  "
        f"{'△ ' * within}clean {trace.clean:.3g}{'' if within else ' (beyond)'}"
    )
    mark: dict[str, Any] = {
        "transform": bar.ax.get_xaxis_transform(),
        "markersize": 4,
        "markeredgecolor": "black",
        "markeredgewidth": 0.6,
        "clip_on": False,
    }
    bar.ax.plot([trace.corrupted], [1.35], marker="v", color="black", **mark)
    if within:
        bar.ax.plot([min(trace.clean, high)], [1.35], marker="^", color="white", **mark)


def _few(count: int, whole: bool = False) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count, steps=[1, 2, 5, 10], integer=whole)


def _told() -> Any:
    """Plain numbers: no factor for all ticks of an axis, which stands alone."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value:.3g}")


def _labelled(count: int, subject: range, room: float) -> list[int]:
    """Which of so many tokens have a label where there is room for some: the
    subject's, from its end, and the last rather than others."""
    apart = max(1, math.ceil(count / room))
    chosen: list[int] = []
    for row in (*reversed(subject), count - 1, *range(count)):
        if all(abs(row - each) >= apart for each in chosen):
            chosen.append(row)
    return sorted(chosen)


def _label(token: str, starred: bool) -> str:
    """A token with its spaces visible, and a star if it is the subject's."""
    seen = _fitting(_seen(token).replace(" ", "␣") or '""', _SMALL, 70)
    return _plain(seen + "*" * starred)


def _seen(text: str) -> str:
    """What has no picture, or none in the font, as escapes such as `\\n`."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties(family=_FONT)))
    return "".join(
        letter
        if letter.isprintable() and font.get_char_index(ord(letter))
        else letter.encode("unicode_escape").decode()
        for letter in text
    )


def _plain(text: str) -> str:
    """For matplotlib to take as it is, not as formulas between dollars."""
    return text.replace("$", r"\$")


def _length(text: str, size: float) -> float:
    """Points that a line of text takes."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family=_FONT, size=size)
    return float(text_to_path.get_text_width_height_descent(text, font, False)[0])


def _fitting(text: str, size: float, room: float) -> str:
    """The text; without its middle if it is longer than so many points."""
    kept = min(len(text), int(room))  # few letters are as narrow as a point
    short = text
    while kept > 1 and (len(text) > room or _length(short, size) > room):
        kept -= 1
        short = f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"
        if _length(short, size) <= room:
            break
    return short
