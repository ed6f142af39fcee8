"""The command that runs a sequence of edits and measures it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unified_edit.console import (
    Device,
    Dtype,
    Force,
    Json,
    Layers,
    Limit,
    Model,
    Preset,
    Settings,
    ShrinkageOption,
    check_new,
    one_line_errors,
    show,
)

if TYPE_CHECKING:
    from unified_edit.guard import Guard


def sequential(
    model: Model,
    records: Annotated[Path, typer.Argument(help="Records as in CounterFact.")],
    recipe: Annotated[
        str, typer.Option(help="Such as memit_seq, or a hyperparameter file.")
    ],
    statistics: Annotated[Path, typer.Option(help="Folder of key statistics.")],
    out: Annotated[
        Path,
        typer.Option(help="Folder for the run; an interrupted run there is gone on."),
    ],
    batch_size: Annotated[int, typer.Option(help="Edits of a step.", min=1)] = 1,
    every: Annotated[
        int | None,
        typer.Option(
            help="Edits between checkpoints; until then, and by default, they come "
            "after 1, 2, 5, 10, 20, 50, … steps.",
            min=1,
        ),
    ] = None,
    at_most: Annotated[
        int | None,
        typer.Option(
            help="Score a sample of so many earlier edits, not all of them.", min=1
        ),
    ] = None,
    stop_below: Annotated[
        float | None,
        typer.Option(help="End at the checkpoint where S over all edits is below."),
    ] = None,
    on_limit: Annotated[
        str, typer.Option(help="Beyond a limit: refuse, warn or shrink.")
    ] = "refuse",
    limits: Annotated[
        list[str] | None,
        typer.Option(
            "--guard",
            help="A limit as key=value, such as damage=0.05 or canary=none; may be "
            "repeated.",
        ),
    ] = None,
    no_guard: Annotated[
        bool, typer.Option("--no-guard", help="No limits, and nothing read for them.")
    ] = False,
    canary: Annotated[
        Path | None,
        typer.Option(help="Held-out text, a text a line: the guard's, and perplexity."),
    ] = None,
    probes: Annotated[
        Path | None,
        typer.Option(
            help="JSON of facts and skills to ask at checkpoints (docs/sequences.md)."
        ),
    ] = None,
    update: Annotated[
        Path | None, typer.Option(help="File for the sequence's update, to `patch`.")
    ] = None,
    force: Force = False,
    name: Annotated[str | None, typer.Option(help="Of the run, in reports.")] = None,
    preset: Preset = None,
    layers: Layers = None,
    settings: Settings = None,
    seed: Annotated[int, typer.Option(help="Of contexts and samples.", min=0)] = 0,
    shrinkage: ShrinkageOption = "none",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """Edit records in one after another, and measure what the model keeps.

    Writes checkpoints.jsonl and steps.jsonl; `unified-edit report` makes a page of
    them. The model's folder stays as it is.
    """
    with one_line_errors():
        if update is not None:
            check_new(update, force)
        from covariance_cache import StatisticsStore
        from unified_edit.display import sequence_table
        from unified_edit.edits import read_records
        from unified_edit.errors import EditError
        from unified_edit.evaluate.sequential import Plan, Probes, run_sequence
        from unified_edit.loading import Source
        from unified_edit.model.perplexity import Canary
        from unified_edit.options import read_recipe
        from unified_edit.session import EditSession

        chosen = read_records(records)[:limit]
        plan = Plan(batch_size, every, at_most, stop_below, seed)
        guard = read_guard(on_limit, limits or [], off=no_guard)
        asked = None if probes is None else Probes.read(probes)
        source = Source.of(model)
        wanted = read_recipe(
            source.config, recipe, preset=preset, layers=layers, settings=settings or ()
        )
        store = StatisticsStore(statistics)
        store.layers()  # refuses a missing folder before the model is loaded
        loaded, tokenizer = source.load(dtype, device)
        used = store.load(loaded, wanted.layers, tokenizer, shrinkage=shrinkage)
        text = None
        if canary is not None:
            try:
                lines = canary.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeError) as error:
                raise EditError(f"{canary}: cannot be read: {error}") from error
            text = Canary.of(tokenizer, [line for line in lines if line.strip()])
        saved = out / "session.safetensors"
        session = (
            EditSession.resume(saved, loaded, tokenizer, used, canary=text)
            if saved.exists()
            else EditSession.begin(
                loaded, tokenizer, wanted, used, guard=guard, canary=text, seed=seed
            )
        )
        state = session.state
        if (state.recipe.name, state.guard) != (wanted.name, guard):
            raise EditError(
                f"{out}: holds a run of {state.recipe.name} with another recipe or "
                "guard; name another folder"
            )
        found = run_sequence(
            session,
            chosen,
            plan,
            out,
            probes=asked,
            canary=text,
            about={
                "name": name or wanted.name,
                "model": model,
                "records": {
                    "file": records.name,
                    "sha256": hashlib.sha256(records.read_bytes()).hexdigest(),
                    "count": len(chosen),
                },
                "seed": seed,
            },
            progress=True,
        )
        if update is not None:
            session.update.save(update)
        show(
            {"run": str(out), "checkpoints": found},
            as_json,
            lambda: [
                sequence_table(found),
                "same: other facts about edited subjects; other: unrelated facts; "
                f"steps refused by the guard: {found[-1]['guard']['refused']}",
                f"wrote {out}",
            ],
        )


def read_guard(on_limit: str, limits: list[str], *, off: bool = False) -> Guard:
    """The guard of a command's options.

    Raises:
        RecipeError: no such limit, or no number.
    """
    from unified_edit.errors import RecipeError
    from unified_edit.guard import OFF, Guard

    if off:
        if limits:
            raise RecipeError("--no-guard has no limits; leave --guard out")
        return OFF
    changes: dict[str, Any] = {}
    for pair in limits:
        key, _, text = (part.strip() for part in pair.partition("="))
        known = sorted(set(Guard.__dataclass_fields__) - {"on_limit"})
        if key not in known:
            raise RecipeError(
                f"--guard {pair!r}: there is no limit {key!r}; there are "
                f"{', '.join(known)}"
            )
        try:
            changes[key] = None if text == "none" else json.loads(text)
        except ValueError:
            changes[key] = text
        if changes[key] is not None and type(changes[key]) not in (int, float):
            raise RecipeError(f"--guard {pair!r}: expected a number, or none")
    return Guard(on_limit=on_limit, **changes)  # type: ignore[arg-type]  # it checks


def add_to(evaluate: typer.Typer) -> None:
    """Adds this command to `unified-edit evaluate`."""
    evaluate.command()(sequential)
