"""Files of sequential-editing runs, read and checked; `sequential.py` writes them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from unified_edit.errors import EditError
from unified_edit.evaluate import charts, onset
from unified_edit.evaluate.sequential import FORMAT

T = TypeVar("T")
Row = Mapping[str, Any]
Interval = tuple[float | None, float | None, float | None]
GAP: Interval = (None, None, None)


@dataclass(frozen=True)
class Run:
    """What a run's folder holds, checked."""

    folder: str
    name: str
    """Unlike any other's on the page."""
    settings: Row
    edits: Sequence[int]
    """Made before each checkpoint."""
    checkpoints: Sequence[Mapping[str, Interval]]
    """What was measured there; names of what was inside are joined by dots."""
    steps: Sequence[Row]
    notes: Sequence[str] = ()

    @property
    def recipe(self) -> Row:
        recipe = self.settings.get("recipe")
        return recipe if isinstance(recipe, dict) else {}

    @property
    def batch_size(self) -> int:
        """0 if it is not known."""
        size = self.settings.get("batch_size")
        return size if type(size) is int and size > 0 else 0

    @property
    def title(self) -> str:
        return str(self.recipe.get("name", "unnamed recipe"))

    def intervals(self, name: str) -> list[Interval]:
        """A metric's mean and interval at each checkpoint."""
        return [each.get(name, GAP) for each in self.checkpoints]

    def mean(self, name: str) -> list[float | None]:
        return [mean for mean, _, _ in self.intervals(name)]

    def inside(self, prefix: str) -> list[str]:
        """Names of what was measured under a common one."""
        names = dict.fromkeys(name for each in self.checkpoints for name in each)
        return [name for name in names if name.startswith(f"{prefix}.")]

    def skills(self) -> list[float | None]:
        """The mean over all skills, where each was measured."""
        return onset.averages([self.mean(name) for name in self.inside("skills")])

    def drift(self) -> list[float | None]:
        """The largest of any layer."""
        rows = zip(*map(self.mean, self.inside("drift")), strict=True)
        found = [max((v for v in row if v is not None), default=None) for row in rows]
        return found or [None] * len(self.edits)

    @cached_property
    def retention(self) -> list[float | None]:
        exact, es = (self.mean(f"earlier.{n}") for n in ("rewrite_accuracy", "es"))
        return exact if onset.there(exact) else es

    @cached_property
    def ability(self) -> tuple[list[float | None], str]:
        unrelated, perplexity = self.mean("unrelated"), self.mean("perplexity")
        return onset.ability(self.skills(), unrelated, perplexity)

    @cached_property
    def found(self) -> onset.Onsets:
        return onset.onsets(self.edits, self.retention, self.ability[0])

    @cached_property
    def held(self) -> onset.Held:
        return onset.held(self.edits, self.mean("earlier.s"), charts.LIMIT)


def read_runs(folder: Path) -> list[Run]:
    """The run of a folder, or those of its subfolders.

    Raises:
        EditError: there is none, or one is malformed; names the file and the line.
    """
    if not folder.is_dir():
        raise EditError(f"{folder}: no such folder")
    if _is_run(folder):
        return [read_run(folder)]
    runs = [read_run(each) for each in sorted(folder.iterdir()) if _is_run(each)]
    if not runs:
        raise EditError(f"{folder}: no run.json here, nor one folder below")
    names = Counter(run.name for run in runs)
    return [
        run if names[run.name] == 1 else replace(run, name=f"{run.name} ({run.folder})")
        for run in runs
    ]


def read_run(folder: Path) -> Run:
    """One run. A last line that a crash cut off is left out, and noted.

    Raises:
        EditError: a file is missing or malformed; names it and the line.
    """
    path = folder / "run.json"
    settings = _parse(_read(path), f"{path}: ")
    if settings.get("format") != FORMAT:
        raise EditError(f"{path}: its format is not {FORMAT!r}; no run of this version")
    notes: list[str] = []
    seen = [0]

    def checkpoint(row: Row) -> tuple[int, dict[str, Interval]]:
        seen.append(_count(row.get("edits"), "edits", seen[-1]))
        return seen[-1], dict(_measured(row))

    # Where all was refused since the last, the model is the same: one checkpoint.
    found = dict(_lines(folder / "checkpoints.jsonl", checkpoint, notes))
    if not found:
        raise EditError(f"{folder / 'checkpoints.jsonl'}: no complete line in it")
    steps = _lines(folder / "steps.jsonl", _step, notes)
    done, planned = max(found), settings.get("edits")
    if isinstance(planned, int) and done + refused(steps) < planned:
        notes.append(f"unfinished: {done:,} of {planned:,} edits")
    own = folder.resolve().name
    name = str(settings.get("name") or own)
    return Run(own, name, settings, list(found), list(found.values()), steps, notes)


def _is_run(folder: Path) -> bool:
    return any((folder / n).is_file() for n in ("run.json", "checkpoints.jsonl"))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EditError(f"{path}: cannot be read: {error.strerror}") from None


def _parse(raw: bytes, where: str = "") -> dict[str, Any]:
    try:
        # What is no finite number is a gap.
        data = json.loads(raw.decode(), parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise EditError(f"{where}not JSON: {error}") from None
    if not isinstance(data, dict):
        raise EditError(f"{where}an object is expected, not {str(data)[:40]!r}")
    return data


def _lines(path: Path, check: Callable[[Row], T], notes: list[str]) -> list[T]:
    *lines, last = _read(path).split(b"\n")
    found = []
    for number, raw in enumerate([*lines, *filter(None, [last])], start=1):
        try:
            found.append(check(_parse(raw)))
        except EditError as error:
            if number <= len(lines):
                raise EditError(f"{path}:{number}: {error}") from None
            # No newline after it: it was being written.
            notes.append(f"{path.name}: line {number} is incomplete and left out")
    return found


def _measured(row: Row, prefix: str = "") -> Iterable[tuple[str, Interval]]:
    for key, value in row.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and not prefix:
            yield from _measured(value, f"{name}.")
        elif isinstance(value, list) and len(value) == 3:
            mean, low, high = (_number(each, name) for each in value)
            yield name, (mean, low, high)
        else:
            yield name, (_number(value, name), None, None)


def _step(row: Row) -> Row:
    told = {"edits": row.get("edits", []), "reasons": row.get("reasons", [])}
    for name, value in told.items():
        if not isinstance(value, list):
            raise EditError(f"{name} is a list, not {str(value)[:40]!r}")
    if not isinstance(seconds := row.get("seconds") or {}, dict):
        raise EditError(f"seconds is an object, not {str(seconds)[:40]!r}")
    return {
        "step": _count(row.get("step"), "step"),
        "edits": [_edit(each) for each in told["edits"]],
        "decision": str(row.get("decision", "accepted")),
        "reasons": [str(each) for each in told["reasons"]],
        "seconds": {name: _number(value, name) for name, value in seconds.items()},
    }


def _edit(edit: Any) -> str:
    told = edit if isinstance(edit, dict) else {}
    prompt, subject = str(told.get("prompt", "")), str(told.get("subject", ""))
    return f"{prompt.replace('{}', subject, 1)} → {told.get('target', '')}"


def refused(steps: Sequence[Row]) -> int:
    """Edits of refused steps."""
    return sum(len(each["edits"]) for each in steps if each["decision"] == "refused")


def _count(value: Any, name: str, least: int = 0) -> int:
    if type(value) is not int or not least <= value < 1 << 53:
        raise EditError(f"{name} is a count from {least} on, not {str(value)[:40]!r}")
    return value


def _number(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise EditError(f"{name} is a number or three, not {str(value)[:40]!r}")
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None
