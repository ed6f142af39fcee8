"""Charts of a report page as SVG to be put inside HTML, and the page's colours.

A chart holds numbers and this file's own words alone; what files say (names of runs,
of skills) stands in the page's legends, where it wraps and is escaped. Colours are CSS
variables, so that one chart serves light, dark and paper.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from unified_edit.errors import UnifiedEditError

if TYPE_CHECKING:
    from unified_edit.evaluate.runs import Run

_LIGHT = (
    *("#0072b2", "#d55e00", "#00875f", "#b3568d"),
    *("#2f93cc", "#b87b00", "#5f5f5f", "#1e1e1e"),
)
_DARK = (
    *("#4aa8e0", "#ff8a4c", "#2fc79a", "#e59ac6"),
    *("#8fd0f5", "#f0b93a", "#9a9a9a", "#ededed"),
)
"""Okabe and Ito's, which the colour-blind can tell apart, made darker or lighter until
thin lines stand out from the paper."""
_INK, _GRID = "#010203", "#0a0b0c"
"""Stand for the page's own colours until they are replaced by them."""
_SHAPES: tuple[tuple[tuple[float, float], ...], ...] = (
    ((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)),
    ((-0.95, -0.75), (0.95, -0.75), (0, 0.95)),
    ((0, -1), (1, 0), (0, 1), (-1, 0)),
    ((-0.95, 0.75), (0.95, 0.75), (0, -0.95)),
    ((-0.75, -0.95), (-0.75, 0.95), (0.95, 0)),
    ((0.75, -0.95), (0.75, 0.95), (-0.95, 0)),
    ((-0.45, -1), (0.45, -1), (0.45, 1), (-0.45, 1)),
    ((-1, -0.45), (1, -0.45), (1, 0.45), (-1, 0.45)),
)
"""Markers, so that series can be told apart without colour. Series beyond the colours
have broken lines."""
_BROKEN = (7.0, 1.5, 1.5, 1.5)
_MARKED = 7
"""Markers on a line, about."""
FEW = 3
"""Runs up to which the newest edits share a chart with all edits so far."""
METRICS = {"s": "S", "es": "ES", "ps": "PS", "ns": "NS"}
LIMIT = 0.8
"""S at which edits count as held."""

CSS = f"""
:root {{ color-scheme: light dark; --ink: #1d2127; --soft: #59616b; --paper: #fff;
 --tint: #f4f6f8; --rule: #dde1e6; --warn: #8a4b00; --warned: #fff6e5;
{"".join(f" --s{n}: {c};" for n, c in enumerate(_LIGHT))} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e8eb;
 --soft: #a2a9b2; --paper: #15181c; --tint: #1e2227; --rule: #363c44; --warn: #ffc46b;
 --warned: #2c2415;{"".join(f" --s{n}: {c};" for n, c in enumerate(_DARK))} }} }}
figure {{ margin: 0; min-width: 0; }}
figcaption {{ font-weight: 600; margin: 0 0 .2rem; }}
figure svg {{ display: block; width: 100%; height: auto; overflow: visible; }}
svg * {{ stroke-linejoin: round; }}
svg text {{ fill: var(--soft); font-variant-numeric: tabular-nums; }}
.key svg {{ vertical-align: -.15em; flex: none; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 84rem;
 padding: 1.5rem clamp(.8rem, 2vw, 2rem) 3rem; background: var(--paper);
 color: var(--ink);
 font: 15px/1.45 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem;
 overflow-wrap: anywhere; }}
h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .3rem; }}
p {{ margin: .2rem 0 .7rem; max-width: 52rem; }}
p.lead, .soft, .none, small {{ color: var(--soft); }}
.wide {{ overflow-x: auto; margin: .6rem 0; }}
table {{ border-collapse: collapse; font-size: .82rem; }}
th, td {{ padding: .35rem .45rem; text-align: right; vertical-align: top;
 border-bottom: 1px solid var(--rule); white-space: nowrap;
 font-variant-numeric: tabular-nums; }}
thead th {{ vertical-align: bottom; border-bottom: 2px solid var(--rule);
 font-weight: 600; line-height: 1.25; }}
th:first-child {{ text-align: left; position: sticky; left: 0; padding-left: 0;
 background: var(--paper); }}
tbody th {{ font-weight: 600; white-space: normal; min-width: 13rem; max-width: 17rem;
 overflow-wrap: anywhere; }}
td small, th small {{ display: block; font-weight: 400; font-size: .92em; }}
.text td {{ text-align: left; white-space: normal; min-width: 7rem; max-width: 30rem;
 overflow-wrap: anywhere; }}
.text thead th {{ text-align: left; }}
.charts {{ display: grid; gap: 1.4rem 2rem; margin: .8rem 0;
 grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); }}
.pairs {{ grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr));
 max-width: 66rem; }}
ul.legend {{ list-style: none; padding: 0; margin: .5rem 0; display: flex;
 flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .86rem; }}
.key {{ display: inline-flex; gap: .45rem; align-items: baseline; }}
.key span {{ overflow-wrap: anywhere; min-width: 0; }}
.bar {{ display: flex; width: 13rem; height: .95rem; margin-top: .15rem; }}
.dot {{ display: inline-block; width: .7rem; height: .7rem; margin-right: .35rem; }}
.notes {{ background: var(--warned); color: var(--warn); padding: .6rem 1rem;
 margin: 1rem 0; border-radius: 4px; list-style-position: inside; }}
details {{ border-top: 1px solid var(--rule); padding: .5rem 0; }}
summary {{ cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }}
pre {{ background: var(--tint); padding: .8rem; overflow-x: auto; font-size: .8rem;
 border-radius: 4px; }}
@media (max-width: 40rem) {{ tbody th {{ min-width: 8rem; max-width: 9.5rem; }} }}
@media print {{ body {{ max-width: none; padding: 0; font-size: 10pt; }}
 .wide {{ overflow: visible; }} table {{ font-size: 7.5pt; }}
 th, td {{ padding: .2rem .35rem; }}
 figure, tr {{ break-inside: avoid; }} h2 {{ break-after: avoid; }}
 .bar i, .dot {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }} }}
"""


@dataclass(frozen=True)
class Line:
    """One series of a chart."""

    number: int
    """Its colour and marker."""
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    dashed: bool = False
    ring: float | None = None
    """x at which a ring is drawn around the line."""
    cross: float | None = None
    """x at which the line is crossed out."""

    @property
    def empty(self) -> bool:
        return all(each is None for each in self.y)


@dataclass(frozen=True)
class Chart:
    """What is drawn into one pair of axes."""

    title: str
    """Plain text, said to those who cannot see the chart."""
    lines: Sequence[Line]
    log: bool = False
    ticks: Sequence[float] = ()
    """Of the x axis, which is logarithmic if they are given."""
    limit: float | None = None
    """y of a dotted horizontal line."""
    xlabel: str = "edits"
    share: bool = True
    """Whether the values are between 0 and 1 by what they are."""


def forgetting(runs: Sequence[Run]) -> list[Chart]:
    """S and rewrite accuracy of all edits so far, and of the newest."""
    found = []
    names = {"s": "S", "rewrite_accuracy": "Rewrite accuracy"}
    for name, title in names.items():
        lines = _lines(runs, f"earlier.{name}", onsets=True)
        if len(runs) <= FEW:
            lines += _lines(runs, f"current.{name}", bands=False, dashed=True)
        limit = LIMIT if name == "s" else None
        found.append(Chart(f"{title}, all edits so far", lines, limit=limit))
    if len(runs) > FEW:
        for name, title in names.items():
            lines = _lines(runs, f"current.{name}", bands=False)
            found.append(Chart(f"{title}, newest edits", lines))
    return _drawn(found)


def neighbours(runs: Sequence[Run]) -> list[Chart]:
    """Facts that were not edited, from near to far."""
    near, far = _lines(runs, "same_subject"), _lines(runs, "unrelated", collapse=True)
    return _drawn(
        [
            Chart("Neighbourhood score, NS", _lines(runs, "earlier.ns")),
            Chart("Other facts of edited subjects", near),
            Chart("Unrelated facts", far),
        ]
    )


def abilities(runs: Sequence[Run]) -> list[Chart]:
    """The model as a whole, and how far its weights have moved."""

    drift = [Line(at, run.edits, run.drift()) for at, run in enumerate(runs)]
    skills = [
        Line(at, run.edits, run.skills(), cross=run.found.collapse)
        for at, run in enumerate(runs)
    ]
    return _drawn(
        [
            Chart("Skills, mean", skills),
            Chart("Perplexity (log scale)", _lines(runs, "perplexity"), log=True),
            Chart("Entropy of generated text", _lines(runs, "entropy"), share=False),
            Chart("Drift ‖W−W₀‖/‖W₀‖, largest layer", drift, share=False),
        ]
    )


def sweep(groups: Sequence[Sequence[tuple[Run, int]]]) -> list[Chart]:
    """S and its parts against the batch size, one line a group of runs, each of them
    at a checkpoint."""
    found = []
    ticks = sorted({run.batch_size for each in groups for run, _ in each})
    for name, title in METRICS.items():
        lines = []
        for number, group in enumerate(groups):
            sizes = [run.batch_size for run, _ in group]
            values = [run.intervals(f"earlier.{name}")[at] for run, at in group]
            mean, low, high = zip(*values, strict=True)
            lines.append(Line(number, sizes, mean, low, high))
        found.append(Chart(title, lines, ticks=ticks, xlabel="batch size (log scale)"))
    return _drawn(found)


def _lines(
    runs: Sequence[Run],
    name: str,
    bands: bool = True,
    dashed: bool = False,
    onsets: bool = False,
    collapse: bool = False,
) -> list[Line]:
    lines = []
    for number, run in enumerate(runs):
        mean, low, high = zip(*run.intervals(name), strict=True)
        lines.append(
            Line(
                number,
                run.edits,
                mean,
                low if bands else None,
                high if bands else None,
                dashed,
                run.found.forgetting if onsets else None,
                run.found.collapse if onsets or collapse else None,
            )
        )
    return lines


def _drawn(found: Sequence[Chart]) -> list[Chart]:
    """Those in which there is anything to see."""
    return [each for each in found if not all(line.empty for line in each.lines)]


def svg(chart: Chart, number: int) -> str:
    """The chart as an `<svg>` element; same chart, same text.

    Args:
        number: the chart's own on its page, for names inside it.

    Raises:
        UnifiedEditError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise UnifiedEditError(
            "a report's charts need matplotlib: pip install 'unified-edit[plots]'"
        ) from None
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "unified-edit",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9.5,
    }
    written = io.StringIO()
    with rc_context(settings):
        figure = Figure(figsize=(4.4, 2.75))
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        _draw(axes, chart)
        # By counting, which takes a tenth of the time of measuring drawn text.
        low, high = axes.get_ylim()
        ticks = [y for y in axes.get_yticks() if low <= y <= high]
        labels = axes.yaxis.get_major_formatter().format_ticks(ticks)
        left = 0.03 + 0.0195 * max(map(len, labels), default=1)
        figure.subplots_adjust(left=left, right=0.985, bottom=0.165, top=0.985)
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return _inline(written.getvalue(), chart.title, f"c{number}")


def _shape(number: int) -> tuple[tuple[float, float], ...]:
    return _SHAPES[(number + 3 * (number // len(_LIGHT))) % len(_SHAPES)]


def background(number: int) -> str:
    """A series' colour as a style."""
    return f"background: var(--s{number % len(_LIGHT)})"


def swatch(number: int) -> str:
    """A piece of a series' line with its marker."""
    points = " ".join(f"{12 + 4 * x:.3g},{6 - 4 * y:.3g}" for x, y in _shape(number))
    color, dash = f"var(--s{number % len(_LIGHT)})", ""
    if number >= len(_LIGHT):
        dash = f' stroke-dasharray="{" ".join(map(str, _BROKEN))}"'
    return (
        '<svg width="24" height="12" viewBox="0 0 24 12" aria-hidden="true">'
        f'<path d="M0 6H24" style="stroke: {color}" stroke-width="2"{dash}/>'
        f'<polygon points="{points}" style="fill: {color}"/></svg>'
    )


def legend(names: Sequence[str], more: Sequence[str] = ()) -> str:
    """The series' names, in their order, and further items in HTML."""
    keys = [f"{swatch(at)}<span>{escape(name)}</span>" for at, name in enumerate(names)]
    items = "".join(f'<li class="key">{each}</li>' for each in (*keys, *more))
    return f'<ul class="legend">{items}</ul>' if items else ""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of HTML; the first of each row names it."""
    head = "".join(f'<th scope="col">{each}</th>' for each in columns)
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td>{each}</td>" for each in others)
        lines.append(f'<tr><th scope="row">{first}</th>{cells}</tr>\n')
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def folded(title: str, inside: str) -> str:
    """What is to be seen when asked for."""
    return f"<details><summary>{title}</summary>{inside}</details>"


class Figures:
    """Charts in a row, numbered through the page."""

    def __init__(self) -> None:
        self._number = 0

    def __call__(self, found: Sequence[Chart]) -> str:
        drawn = []
        for chart in found:
            self._number += 1
            drawn.append(
                f"<figure><figcaption>{escape(chart.title)}</figcaption>\n"
                f"{svg(chart, self._number)}</figure>"
            )
        kind = "charts" if len(drawn) % 2 else "charts pairs"
        return f'<div class="{kind}">\n' + "\n".join(drawn) + "\n</div>"


def _icon(width: int, drawing: str) -> str:
    return (
        f'<svg width="{width}" height="12" viewBox="0 0 {width} 12" aria-hidden="true" '
        f'style="fill: none; stroke: var(--ink)" stroke-width="1.7">{drawing}</svg>'
    )


RING = _icon(12, '<circle cx="6" cy="6" r="4.5"/>')
CROSS = _icon(12, '<path d="M2 2 10 10M10 2 2 10"/>')
DASHED = _icon(24, '<path d="M0 6H24" stroke-dasharray="4 2.5"/>')


def _draw(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    lines = [each for each in chart.lines if not each.empty]
    for line in lines:
        _draw_line(axes, line, len(lines), chart.log)
    if chart.log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high / low < 10:  # room for one of 1, 2, 5 and their tenfolds at least
            axes.set_ylim(low / 1.6, high * 1.6)
        steps = (1, 2, 5) if high / low < 1000 else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=steps))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _told(y)))
    else:
        values = [y for line in lines for y in line.y if y is not None]
        share = chart.share and max(values, default=1) <= 1
        # Shares from 0 to 1, whatever they are, so that charts compare.
        axes.set_ylim(min([0.0, *values]), 1.03 if share else None)
        axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-4, 6))
    if chart.ticks:
        axes.set_xscale("log")
        axes.set_xticks(list(chart.ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(min(chart.ticks) / 1.25, max(chart.ticks) * 1.25)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10], integer=True))
        last = max([1.0, *(float(x) for line in lines for x in line.x)])
        axes.set_xlim(-0.02 * last, 1.02 * last)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _told(x)))
    if chart.limit is not None:
        axes.axhline(chart.limit, color=_INK, linewidth=0.9, linestyle=(0, (1, 2)))
    axes.set_xlabel(chart.xlabel, color=_INK, labelpad=2)
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=_INK, pad=4, which="both")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=_INK, linewidth=0.8)


def _told(value: float) -> str:
    return f"{value:,.6g}" if abs(value) < 1e5 else f"{value:.3g}".replace("+0", "")


def _draw_line(axes: Any, line: Line, count: int, log: bool) -> None:
    color = _LIGHT[line.number % len(_LIGHT)]
    y = _numbers(line.y, log)
    if line.low is not None and line.high is not None:
        axes.fill_between(
            line.x,
            _numbers(line.low, log),
            _numbers(line.high, log),
            color=color,
            alpha=0.17 if count <= 3 else 0.09,
            linewidth=0,
        )
    style: Any = (0, (3, 1.8)) if line.dashed else "-"
    if line.number >= len(_LIGHT) and not line.dashed:
        style = (0, _BROKEN)
    there = [math.isfinite(each) for each in y]
    every = max(1, len(y) // _MARKED)
    axes.plot(
        line.x,
        y,
        color=color,
        linewidth=1.2 if line.dashed else 1.7,
        linestyle=style,
        marker=_shape(line.number),
        markersize=4.5 if line.dashed else 5.5,
        markeredgewidth=0,
        # Shifted from series to series, so that they do not hide each other; and what
        # stands alone between gaps has no line to be seen by.
        markevery=[
            index
            for index in range(len(y))
            if there[index]
            and (
                index % every == line.number % 8 * every // 8
                or not any(there[max(0, index - 1) : index] + there[index + 1 :][:1])
            )
        ],
    )
    for at, marker in ((line.ring, "o"), (line.cross, "x")):
        for x, value in zip(line.x, y, strict=True):
            if at is not None and x == at and math.isfinite(value):
                mark = {"markersize": 10, "markeredgewidth": 1.9, "zorder": 5}
                axes.plot(x, value, marker, color=color, mfc="none", **mark)


def _numbers(values: Sequence[float | None], log: bool) -> list[float]:
    return [
        math.nan if each is None or (log and each <= 0) else float(each)
        for each in values
    ]


def _inline(text: str, title: str, prefix: str) -> str:
    """matplotlib's file as an element of a page: without prolog and metadata, with
    names of its own, short numbers and the page's colours."""
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0]
    inner = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    inner = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", inner, flags=re.S)
    inner = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", inner, flags=re.S)
    inner = inner.replace("xlink:href=", "href=")
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', inner))
    inner = re.sub(
        r' id="([^"]*)"',
        lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else "",
        inner,
    )
    inner = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", inner)
    inner = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", inner)
    inner = re.sub(r"(\.\d\d)\d+", r"\1", inner)
    inner = inner.replace(_INK, "var(--soft)").replace(_GRID, "var(--rule)")
    for number, color in enumerate(_LIGHT):
        inner = inner.replace(color, f"var(--s{number})")
    inner = re.sub(r"\s*\n\s*", "\n", inner).strip()
    return (
        f'<svg viewBox="0 0 {float(width):g} {float(height):g}" role="img" '
        f'aria-label="{title}">\n{inner}\n</svg>'
    )
