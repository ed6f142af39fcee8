"""The page of one sequential-editing run, or of several beside each other: one HTML
file that needs nothing else. Whatever a run's files say is escaped.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from unified_edit.checkpoint import files
from unified_edit.console import check_new
from unified_edit.evaluate import charts, onset
from unified_edit.evaluate.charts import METRICS, Figures, legend
from unified_edit.evaluate.runs import GAP, Interval, Row, Run, read_runs, refused

_EVENTS = 10
"""Guard's decisions that are told of each run."""
_NONE = '<span class="none">–</span>'

_ABOUT = "{model} ({base_fingerprint}), {machine}, {versions}, unified-edit {version}"
_WORDS = """S is the harmonic mean of ES (edits take), PS (paraphrases follow) and NS
(neighbours stay), over all edits so far, at the last checkpoint; small: intervals."""
_FORGETTING = "What is left of the edits; dotted is the S down to which they are held."
_NEAR = "Facts that were not to change, from the edits' neighbours to any other."
_WHOLE = "General abilities, and how far the weights have moved from where they began."
_SWEEP = "Runs that differ in batch size alone, after as many edits as all made."


def write_report(run: Path, out: Path, *, force: bool = False) -> Path:
    """Writes a page about a run's folder, or about the runs in a folder's subfolders,
    which it compares. Same runs, same bytes. Returns `out`.

    Raises:
        UnifiedEditError: `out` exists and `force` is not given, or cannot be written; a
            run is malformed; matplotlib is not installed.
    """
    check_new(out, force)
    page = _page(read_runs(run)).encode("utf-8", "replace")
    with files.reported(f"{out}: cannot be written"):
        staged = files.stage(out, page)
        with files.undone(lambda: staged.unlink(missing_ok=True)):
            files.replace(staged, out)
    return out


def _page(runs: Sequence[Run]) -> str:
    figures = Figures()
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    items = "".join(f"<li>{escape(each)}</li>" for each in notes)
    body = [
        f"<h1>Sequential editing: {escape(title)}</h1>",
        f'<p class="lead">{_about(runs)}</p>',
        f'<ul class="notes">{items}</ul>' if notes else "",
        _headline(runs),
        *_curves(runs, figures),
        _sweep(runs, figures),
        _guard(runs),
        _time(runs),
        _rules(runs),
        _settings(runs),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Whatever a file says, nothing is loaded and nothing runs.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)} · sequential editing</title>\n"
        f"<style>{charts.CSS}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )


def _about(runs: Sequence[Run]) -> str:
    told = {}
    for name in ("model", "base_fingerprint", "machine", "versions", "version"):
        values = dict.fromkeys(str(run.settings.get(name) or "?") for run in runs)
        told[name] = escape(", ".join(values))
    return _ABOUT.format_map(told)


def _headline(runs: Sequence[Run]) -> str:
    columns = [
        *("run", "batch<br>size", "edits", f"held at<br>S ≥ {charts.LIMIT:g}"),
        *("forgetting<br>from", "collapse<br>at", *METRICS.values()),
        *("skills<br>before → after", "unrelated<br>before → after", "drift"),
        "refused<br>edits",
    ]
    rows = []
    for number, run in enumerate(runs):
        key = charts.swatch(number) if len(runs) > 1 else ""
        drift = [each for each in run.drift() if each is not None]
        rows.append(
            [
                f'<span class="key">{key}<span>{escape(run.name)}'
                f"<small>{escape(run.title)}</small></span></span>",
                _whole(run.batch_size or None),
                _whole(run.edits[-1]),
                f"{'' if run.held.ended else '≥ '}{run.held.edits:,}"
                if onset.there(run.mean("earlier.s"))
                else _NONE,
                _onset(run.found.forgetting, run.retention),
                _onset(run.found.collapse, run.ability[0]),
                *(_final(run.intervals(f"earlier.{name}")) for name in METRICS),
                _change(run.skills()),
                _change(run.mean("unrelated")),
                f"{drift[-1]:,.3g}" if drift else _NONE,
                _whole(refused(run.steps)) if run.settings.get("guard") else _NONE,
            ]
        )
    return f'{charts.table(columns, rows)}<p class="soft">{_WORDS}</p>'


def _curves(runs: Sequence[Run], figures: Figures) -> Iterable[str]:
    names = [run.name for run in runs] if len(runs) > 1 else []
    rings = {run.found.forgetting for run in runs} - {None}
    crosses = {run.found.collapse for run in runs} - {None}
    ring = [f"{charts.RING} forgetting sets in"] if rings else []
    cross = [f"{charts.CROSS} collapse"] if crosses else []
    dashed = [] if len(runs) > charts.FEW else [f"{charts.DASHED} newest edits"]
    for title, text, found, more in (
        ("Forgetting", _FORGETTING, charts.forgetting(runs), [*dashed, *ring, *cross]),
        ("What was not edited", _NEAR, charts.neighbours(runs), cross),
        ("The model as a whole", _WHOLE, charts.abilities(runs), cross),
    ):
        if found:
            yield f"<h2>{title}</h2><p>{text}</p>"
            yield legend(names, more) + figures(found)
    skills = list(dict.fromkeys(name for run in runs for name in run.inside("skills")))
    if skills:
        heads = [escape(name.removeprefix("skills.")) for name in skills]
        rows = [
            [escape(run.name), *(_change(run.mean(name)) for name in skills)]
            for run in runs
        ]
        yield charts.folded("By skill", charts.table(["run", *heads], rows))


def _sweep(runs: Sequence[Run], figures: Figures) -> str:
    """Where runs differ in nothing that is known of them but their batch size."""
    same: dict[str, list[Run]] = {}
    for run in runs:
        names = ("base_fingerprint", "recipe", "guard", "records", "seed")
        key = json.dumps([run.settings.get(name) for name in names], sort_keys=True)
        if run.batch_size:
            same.setdefault(key, []).append(run)
    groups, labels = [], []
    for each in same.values():
        if len({run.batch_size for run in each}) > 1:
            each.sort(key=lambda run: run.batch_size)
            # After as many edits as every one of them made, or just before.
            least = min(run.edits[-1] for run in each)
            groups.append([(run, bisect_right(run.edits, least) - 1) for run in each])
            labels.append(f"{each[0].title}, {least:,} edits")
    found = charts.sweep(groups)
    if not found:
        return ""
    return f"<h2>Batch size</h2><p>{_SWEEP}</p>{legend(labels)}{figures(found)}"


def _guard(runs: Sequence[Run]) -> str:
    if not any(run.steps for run in runs):
        return ""
    kinds = ["accepted", "warned", "shrunk", "refused"]
    kinds += sorted({s["decision"] for run in runs for s in run.steps} - set(kinds))
    rows, events = [], []
    for run in runs:
        counts = Counter(step["decision"] for step in run.steps)
        rows.append([escape(run.name), *(_whole(counts[kind]) for kind in kinds)])
        told = [step for step in run.steps if step["decision"] != "accepted"]
        for step in told[:_EVENTS]:
            edits = "; ".join(step["edits"][:2]) + "; …" * (len(step["edits"]) > 2)
            cells = (str(step["step"]), step["decision"], "; ".join(step["reasons"]))
            events.append([escape(each) for each in (run.name, *cells, edits)])
        if len(told) > _EVENTS:
            left = f"and {len(told) - _EVENTS:,} more steps"
            events.append([escape(run.name), "", left, "", ""])
    table = charts.table(["run", *map(escape, kinds)], rows)
    if events:
        columns = ["run", "step", "decision", "because", "edits"]
        table += charts.folded("Where it acted", charts.table(columns, events, "text"))
    return f"<h2>The guard</h2><p>Steps, by what was decided.</p>{table}"


def _time(runs: Sequence[Run]) -> str:
    """Seconds an edit, by kind of work."""
    spent = []
    for run in runs:
        total: Counter[str] = Counter()
        for step in run.steps:
            total.update({n: v for n, v in step["seconds"].items() if v})
        edits = sum(len(step["edits"]) for step in run.steps) or 1
        spent.append({name: value / edits for name, value in total.items()})
    kinds = list(dict.fromkeys(name for each in spent for name in each))
    if not kinds:
        return ""
    longest = max(sum(each.values()) for each in spent)
    colors = {name: charts.background(at) for at, name in enumerate(kinds)}
    heads = [f'<i class="dot" style="{colors[n]}"></i>{escape(n)}' for n in kinds]
    rows = []
    for run, each in zip(runs, spent, strict=True):
        bar = "".join(
            f'<i style="width: {100 * value / longest:.2f}%; {colors[name]}"></i>'
            for name, value in each.items()
        )
        cells = [_NONE if (v := each.get(n)) is None else f"{v:,.3f}" for n in kinds]
        bar = f'<div class="bar">{bar}</div>'
        rows.append([escape(run.name), bar, f"{sum(each.values()):,.3f}", *cells])
    table = charts.table(["run", "", "all", *heads], rows)
    return f"<h2>Where the time goes</h2><p>Seconds an edit.</p>{table}"


def _rules(runs: Sequence[Run]) -> str:
    ability = " or ".join(dict.fromkeys(run.ability[1] for run in runs))
    text = escape(onset.RULES.format(limit=charts.LIMIT, ability=ability))
    paragraphs = text.replace("\n\n", "</p>\n<p>")
    return f"<h2>How onsets are found</h2>\n<p>{paragraphs}</p>"


def _settings(runs: Sequence[Run]) -> str:
    flat = [dict(_flatten(run.settings)) for run in runs]
    names = dict.fromkeys(name for each in flat for name in each if name != "name")
    differing = [n for n in names if len({each.get(n, "") for each in flat}) > 1]
    parts = ["<h2>Settings and fingerprints</h2>"]
    if differing:
        rows = [
            [escape(run.name), *(escape(each.get(name, "")) for name in differing)]
            for run, each in zip(runs, flat, strict=True)
        ]
        table = charts.table(["run", *map(escape, differing)], rows, "text")
        parts.append(charts.folded("In what the runs differ", table))
    for run in runs:
        text = json.dumps(run.settings, indent=1, ensure_ascii=False)
        title = f"run.json of {escape(run.name)}"
        parts.append(charts.folded(title, f"<pre>{escape(text)}</pre>"))
    return "\n".join(parts)


def _flatten(data: Row, prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in data.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, str) else json.dumps(value)


def _final(values: Sequence[Interval]) -> str:
    measured = [each for each in values if each[0] is not None]
    mean, low, high = measured[-1] if measured else GAP
    told = _NONE if mean is None else f"{mean:.2f}"
    if low is not None and high is not None:
        told += f"<small>{low:.2f}–{high:.2f}</small>"
    return told


def _change(values: Sequence[float | None]) -> str:
    there = [each for each in values if each is not None]
    return f"{there[0]:.2f} → {there[-1]:.2f}" if there else _NONE


def _onset(found: int | None, series: Sequence[float | None]) -> str:
    if found is not None:
        return f"{found:,}"
    few = len(series) - series.count(None) < onset.FEWEST
    return f'<span class="none">{"too few<br>points" if few else "none"}</span>'


def _whole(value: Any) -> str:
    return f"{value:,}" if type(value) is int else _NONE
