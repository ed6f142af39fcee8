"""The main job from end to end on the embedded models, in a few minutes."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from covariance_cache import StatisticsStore, collect
from unified_edit.algebra.update import UpdateSet
from unified_edit.checkpoint.patch import patch
from unified_edit.edits import Record
from unified_edit.errors import CheckpointError, EditError
from unified_edit.evaluate.trial import Trial, Trials
from unified_edit.evaluate.world import World
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.scoring import generate
from unified_edit.presets import PRESETS
from unified_edit.recipes import RECIPES, matching_preset, recipe

METHODS = tuple(n for n in RECIPES if n not in ("r_rome", "memit_seq", "emmet_seq"))
"""r-ROME is ROME's recipe under another name, and without a sequence memit_seq is MEMIT
and emmet_seq EMMET."""
WRITTEN = "emmet"
"""The recipe whose update the demo writes into a checkpoint."""
FAMILIES = ("gpt2", "llama")
BATCH = 50
STATISTICS_TOKENS = 64_000
WINDOW = 64

_COLUMNS = {
    "S": "s",
    "ES": "es",
    "PS": "ps",
    "NS": "ns",
    "same": "same_subject",
    "other": "unrelated",
    "skill": "skills",
    "s/edit": "seconds_per_edit",
    "norm": "relative_norm",
}


def run_demo(world_folder: Path, out: Path, console: Console) -> dict[str, Any]:
    """Edits both embedded models with every recipe, writes one update into a copy of
    each checkpoint, reads it back and reverts it. Writes `demo_report.json`.

    Args:
        world_folder: with `data/` and the models' folders.
        out: folder for the outputs; what an earlier demo left there is replaced.

    Raises:
        EditError: the folder holds no world.
    """
    begun = time.perf_counter()
    world = World.load(world_folder / "data")
    records = world.records[:BATCH]
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"batch": len(records)}
    for family in FAMILIES:
        base = world_folder / family
        if not (base / "config.json").exists():
            raise EditError(f"{base}: no model there; `make world` trains one")
        console.rule(f"{family}: {base}")
        report[family] = _one_model(base, world, records, out, console)
    report["seconds"] = time.perf_counter() - begun
    path = out / "demo_report.json"
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")
    console.print(f"[bold]{report['seconds']:.0f} s in all; figures in {path}")
    return report


def load(folder: Path) -> tuple[nn.Module, Any]:
    """A model in evaluation mode, and its tokenizer."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder)
    model.eval()
    return model, AutoTokenizer.from_pretrained(folder)


def world_statistics(
    model: nn.Module, tokenizer: Any, world: World, preset: str, progress: bool = True
) -> dict[int, Any]:
    """Key statistics of all layers that the preset's recipes edit, in one pass."""
    settings = PRESETS[preset].settings.values()
    layers = sorted({layer for each in settings for layer in each["layers"]})
    return collect(
        model,
        tokenizer,
        world.corpus,
        layers,
        tokens=STATISTICS_TOKENS,
        window=WINDOW,
        progress=progress,
    )


def _one_model(
    base: Path, world: World, records: Sequence[Record], out: Path, console: Console
) -> dict[str, Any]:
    originals = _hashes(base)
    model, tokenizer = load(base)
    preset = matching_preset(model.config)
    if preset is None:
        raise EditError(f"{base}: no preset in unified_edit.recipes is made for it")
    store = StatisticsStore(out / f"{base.name}-statistics")
    collected = world_statistics(model, tokenizer, world, preset)
    for each in collected.values():
        store.save(each)
    statistics = store.load(model, collected, tokenizer)

    shown = records[:5]
    before = _completions(model, tokenizer, shown)
    trials = Trials(model, tokenizer, world, statistics, progress=True)
    # Narrow enough for a terminal of 80 columns.
    table = Table(
        title=f"{len(records)} edits at once",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("recipe", no_wrap=True)
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    rows: dict[str, Any] = {}
    written: UpdateSet | None = None
    for method in METHODS:
        trial, result = trials.batch(records, recipe(method, preset))
        rows[method] = trial.row()
        table.add_row(method, *_cells(trial))
        if method == WRITTEN:
            written = result.update
    assert written is not None
    console.print(table)
    first = rows[WRITTEN]
    console.print(
        "same: other facts about the edited subjects; other: facts about other "
        f"subjects ({first['unrelated_before']:.3f} before); 1 is best, but for the "
        "last two columns; norm: largest ‖ΔW‖/‖W‖ of a layer"
    )

    update_file = written.save(out / f"{base.name}-update.safetensors")
    edited = out / f"{base.name}-edited"
    if edited.exists():
        shutil.rmtree(edited)
    patched = patch(base, UpdateSet.load(update_file), out=edited)
    checked = patched.verify()
    if not checked.ok:
        raise CheckpointError(f"{edited}: {'; '.join(map(str, checked.problems))}")
    again, _ = load(edited)
    after = _completions(again, tokenizer, shown)
    _show(console, shown, before, after)
    said = sum(
        text.strip().startswith(record.edit.target)
        for record, text in zip(
            records, _completions(again, tokenizer, records), strict=True
        )
    )
    console.print(
        f"{edited}, loaded with AutoModelForCausalLM, says {said} of "
        f"{len(records)} new facts"
    )
    del again
    patched.revert()
    restored = _hashes(edited) == originals
    console.print(
        f"reverted: every file's SHA-256 is the original's: {restored}",
        style="green" if restored else "red",
    )
    return {
        "recipes": rows,
        "completions": [
            {"prompt": r.edit.text, "target": r.edit.target, "before": b, "after": a}
            for r, b, a in zip(shown, before, after, strict=True)
        ],
        "says_after_reload": said,
        "reverted_bit_for_bit": restored,
        "base_unchanged": _hashes(base) == originals,
    }


def _completions(
    model: nn.Module, tokenizer: Any, records: Sequence[Record]
) -> list[str]:
    adapter = ModelAdapter.of(model)
    return generate(adapter, tokenizer, [r.edit.text for r in records], 3)


def _cells(trial: Trial) -> list[str]:
    row = trial.row()
    return [f"{row[name]:.3f}"[:5] for name in _COLUMNS.values()]


def _show(
    console: Console,
    records: Sequence[Record],
    before: Sequence[str],
    after: Sequence[str],
) -> None:
    table = Table(title=f"what the model says ({WRITTEN})", title_justify="left")
    for name in ("prompt", "before", "wanted", "after"):
        table.add_column(name)
    for record, was, now in zip(records, before, after, strict=True):
        table.add_row(record.edit.text, was.strip(), record.edit.target, now.strip())
    console.print(table)


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
