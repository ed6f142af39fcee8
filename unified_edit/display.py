"""Reports as tables and lines for a terminal. Decides nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from unified_edit.checkpoint.manifest import UpdateRecord
    from unified_edit.checkpoint.patch import PatchReport
    from unified_edit.doctor import DoctorReport, EditedWeights
    from unified_edit.evaluate.effects import AverageEffects
    from unified_edit.evaluate.intervals import Interval
    from unified_edit.evaluate.layer_probe import Candidate

_FEW = 10
"""Edits of an update that its history prints."""
_YES = {True: "yes", False: "no"}


def plain(data: Any) -> Any:
    """The same data as strict JSON: numbers that are not finite become null, for JSON
    has none."""
    if isinstance(data, dict):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [plain(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None
) -> Table:
    """A table of plain texts: brackets in them are no markup."""
    made = Table(title=title and Text(title), title_justify="left")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def facts(pairs: Iterable[tuple[str, str]]) -> Table:
    """Names and values in two columns."""
    made = Table(show_header=False, box=None)
    for name, value in pairs:
        made.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
    return made


def metric_table(
    before: Mapping[str, Interval], after: Mapping[str, Interval] | None
) -> Table:
    """Means and their intervals, before and, if there is one, after an update."""
    if after is None:
        rows = ((name, _interval(each)) for name, each in before.items())
        return table(("metric", "value"), rows)
    return table(
        ("metric", "before", "after", "change"),
        (
            (
                name,
                _interval(before.get(name)),
                _interval(now),
                f"{now.mean - before[name].mean:+.3f}" if name in before else "",
            )
            for name, now in after.items()
        ),
    )


def _interval(each: Interval | None) -> str:
    return f"{each.mean:.3f} [{each.low:.2f}, {each.high:.2f}]" if each else ""


def effects_table(averages: AverageEffects) -> Table:
    """Where each kind's average indirect effect is highest, by token role."""
    return table(
        ("restored", "token", "facts", "layer", "effect there"),
        (
            (
                kind,
                role,
                str(each.facts),
                str(each.peak),
                _interval(each.layers[each.peak]),
            )
            for kind, roles in averages.indirect.items()
            for role, each in roles.items()
        ),
    )


def candidates_table(candidates: Sequence[Candidate]) -> Table:
    """Layers that were tried, and how edits at them score."""
    names = ("es", "ps", "ns")
    return table(
        ("layers", "S", *(name.upper() for name in names), "damage", "‖ΔW‖/‖W‖"),
        (
            (
                ",".join(map(str, each.layers)),
                _interval(each.s),
                *(f"{each.intervals[name].mean:.3f}" for name in names),
                f"{each.damage:.2g}",
                f"{each.relative_norm:.3f}",
            )
            for each in candidates
        ),
    )


def sequence_table(checkpoints: Sequence[Mapping[str, Any]]) -> Table:
    """A sequence's checkpoints: what its edits, other facts and skills are like."""

    def mean(values: Any) -> str:
        return f"{values[0]:.3f}" if values else ""

    rows = []
    for line in checkpoints:
        earlier, skills = line["earlier"] or {}, line["skills"].values()
        perplexity = line["perplexity"]
        rows.append(
            (
                f"{line['edits']:,}",
                *(mean(earlier.get(name)) for name in ("s", "ps", "ns")),
                mean(line["same_subject"]),
                mean(line["unrelated"]),
                f"{sum(skills) / len(skills):.3f}" if skills else "",
                "" if perplexity is None else f"{perplexity:.4g}",
                f"{max(line['drift'].values()):.3g}",
            )
        )
    return table(
        # Short: a terminal has 80 columns.
        ("edits", "S", "PS", "NS", "same", "other", "skill", "ppl", "drift"),
        rows,
    )


def patch_table(report: PatchReport) -> Table:
    """What a patch did to each tensor."""
    return table(
        ("tensor", "dtype", "rank", "‖ΔW‖/‖W‖", "rounded off", "at keys", "changed"),
        (
            (
                each.name,
                each.dtype,
                str(each.rank),
                "" if each.relative_change is None else f"{each.relative_change:.3g}",
                f"{each.rounding_loss:.2g}",
                _key_errors(each.as_dict()),
                f"{each.changed_elements:,}",
            )
            for each in report.tensors
        ),
    )


def history_parts(folder: Path, updates: Sequence[UpdateRecord]) -> list[Any]:
    """A folder's history: lines and a table for each update."""
    if not updates:
        return [f"{folder}: never patched"]
    parts: list[Any] = [f"{folder}: updates: {len(updates)}"]
    for record in updates:
        told = record.metadata
        edits = told.get("edits") or []
        recipe = told.get("recipe") or {}
        parts.append(
            table(
                ("tensor", "dtype", "rank", "rounded off", "at keys"),
                (
                    (
                        each["name"],
                        each["dtype"],
                        str(each["rank"]),
                        f"{each['rounding_loss']:.2g}",
                        _key_errors(each),
                    )
                    for each in record.tensors
                ),
                f"update {record.number}: {recipe.get('name', 'unnamed recipe')}, "
                f"{len(edits)} edits, rounded to {record.rounding}",
            )
        )
        parts.append(
            facts(
                (
                    ("from", record.base_fingerprint),
                    ("to", record.result_fingerprint),
                    *(
                        (f"statistics {layer}", str(print_))
                        for layer, print_ in (told.get("statistics") or {}).items()
                    ),
                    ("files", ", ".join(record.after)),
                )
            )
        )
        parts += [f"  {_edit_line(edit)}" for edit in edits[:_FEW]]
        if len(edits) > _FEW:
            parts.append(f"  and {len(edits) - _FEW} more; --json has all")
    return parts


def _edit_line(edit: Mapping[str, Any]) -> str:
    prompt, subject = str(edit.get("prompt", "")), str(edit.get("subject", ""))
    return f"{prompt.replace('{}', subject, 1)} → {edit.get('target', '')}"


def _key_errors(report: Mapping[str, Any]) -> str:
    """Median and worst share of an edit that rounding lost at its own key."""
    if report["worst_key_error"] is None:
        return ""
    return f"{report['median_key_error']:.1g}, worst {report['worst_key_error']:.1g}"


def doctor_tables(report: DoctorReport) -> list[Table]:
    """What the doctor found."""
    tables = [facts(_doctor_facts(report))]
    if report.recipes:
        recipes = (
            (
                each.name,
                each.origin,
                f"{ranges(each.suggested_layers)} ?"
                if each.suggested_layers
                else ranges(each.layers or ()),
                decimal(each.collect_bytes),
                decimal(each.edit_bytes),
            )
            for each in report.recipes
        )
        titles = ("recipe", "settings", "layers", "to collect", "to edit")
        tables.append(table(titles, recipes, "recipes, and memory beside activations"))
        if any(each.suggested_layers for each in report.recipes):
            guess = (
                "name --layers; these are at the depth of another model's published "
                "ones, no layer was probed here"
            )
            tables.append(facts([("?", guess)]))
    if report.statistics is None and report.supported:
        tables.append(facts([("statistics", "none named: --statistics FOLDER")]))
    if report.statistics:
        layers = (
            (
                str(each.layer),
                "" if each.count is None else f"{each.count:,}",
                ""
                if each.keys_per_dimension is None
                else f"{each.keys_per_dimension:.1f}",
                _YES[each.problem is None],
            )
            for each in report.statistics
        )
        names = ("layer", "keys", "keys/d_key", "of this model")
        tables.append(table(names, layers, "statistics"))
    return tables


def _doctor_facts(report: DoctorReport) -> list[tuple[str, str]]:
    lines = [
        ("folder", report.folder),
        ("model type", str(report.model_type)),
        ("supported", "no" if report.refusal else "yes"),
        ("fingerprint", report.fingerprint),
        (
            "weight files",
            f"{len(report.files)} with {report.tensors} tensors, "
            f"{decimal(report.bytes)}; updates patched in: {report.updates}",
        ),
    ]
    weights, tokenizer = report.weights, report.tokenizer
    if weights is not None:
        axes = "d_key, d_value" if weights.storage == "Conv1D" else "d_value, d_key"
        wrapped = f", of the {weights.wrapped} it wraps" if weights.wrapped else ""
        lines += [
            ("layers", f"0 to {weights.layers - 1}{wrapped}"),
            ("edited tensor", f"{weights.tensor}, {'/'.join(weights.dtypes)}"),
            ("", f"{list(weights.shape)} = [{axes}] ({weights.storage})"),
            *(
                ("" if index else "in", f"{file}: layers {ranges(layers)}")
                for index, (file, layers) in enumerate(weights.shards.items())
            ),
            ("block", "; ".join(_block_facts(weights))),
            ("head", f"{weights.head}, tied: {_YES[weights.tied_head]}"),
            (
                "for each layer",
                f"statistics {decimal(weights.statistics_bytes)}; memory to solve "
                f"{decimal(weights.solve_bytes)}; update "
                f"{decimal(weights.update_bytes)} for each edit; undo "
                f"{decimal(weights.undo_bytes)}",
            ),
            ("weights", f"{decimal(weights.model_bytes)} in float32"),
            ("preset", report.preset or "none for this model"),
        ]
    if tokenizer is not None:
        habits = {
            f"adds BOS ({tokenizer.bos_token or 'none'})": tokenizer.adds_bos,
            "adds EOS": tokenizer.adds_eos,
            "prepends a space": tokenizer.prepends_space,
            "has a pad token": tokenizer.has_pad_token,
            "has a chat template": tokenizer.chat_template,
        }
        lines += [
            (
                "tokenizer",
                f"{tokenizer.kind} ({'fast' if tokenizer.fast else 'slow'}), "
                f"{tokenizer.vocabulary:,} tokens, pads on the "
                f"{tokenizer.padding_side}",
            ),
            ("", "; ".join(f"{name}: {_YES[is_]}" for name, is_ in habits.items())),
        ]
    return lines


def _block_facts(weights: EditedWeights) -> list[str]:
    """What becomes of the MLP's output."""
    told = [
        "attention and MLP in parallel"
        if weights.parallel
        else "attention, then the MLP",
        "a norm after the MLP: targets at its own output, one layer for an edit"
        if weights.normalized
        else "the MLP's output is added",
    ]
    if weights.residual_scale != 1:
        told.append(f"times {weights.residual_scale:g}")
    return told


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as on a command line, such as `0-1,4`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(
        str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts
    )
