"""The command that scores a model on downstream tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unified_edit.console import (
    Device,
    Dtype,
    Json,
    Limit,
    Model,
    one_line_errors,
    show,
)

if TYPE_CHECKING:
    from rich.table import Table

    from unified_edit.evaluate.tasks import Scores


def tasks(
    model: Model,
    chosen: Annotated[
        str,
        typer.Option("--tasks", help="Tasks, groups or tags of lm-eval: a,b,c."),
    ],
    include: Annotated[
        Path | None,
        typer.Option(help="Folder of task descriptions beside lm-eval's own."),
    ] = None,
    update: Annotated[
        Path | None, typer.Option(help="Score the model with this update, too.")
    ] = None,
    limit: Limit = None,
    shots: Annotated[
        int | None,
        typer.Option(help="Solved examples in front; by default the task's.", min=0),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Of sequences.", min=1)] = 8,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Score a model on downstream tasks; with an update, before and after it.

    Runs lm-eval (EleutherAI's lm-evaluation-harness): pip install 'unified-edit[tasks]'
    """
    with one_line_errors():
        from unified_edit.algebra.update import UpdateSet
        from unified_edit.evaluate.tasks import TaskSet
        from unified_edit.live import applied
        from unified_edit.loading import Source

        source = Source.of(model)
        change = None if update is None else UpdateSet.load(update)
        names = [name.strip() for name in chosen.split(",") if name.strip()]
        found = TaskSet.load(names, include)
        loaded, tokenizer = source.load(dtype, device)

        def scores() -> Scores:
            return found.scores(
                loaded, tokenizer, limit=limit, shots=shots, batch_size=batch_size
            )

        after = None
        if change is not None:
            # First, so that an update that does not fit is refused at once.
            with applied(loaded, change):
                after = scores()
        before = scores()
        show(
            {"tasks": names, "before": before, "after": after},
            as_json,
            lambda: [_table(before, after)],
        )


def _table(before: Scores, after: Scores | None) -> Table:
    """A row for each task's metric."""
    from unified_edit.display import table

    cells = [
        (name, metric, value, (after or before)[name][metric])
        for name, figures in before.items()
        for metric, value in figures.items()
    ]
    if after is None:
        rows = ((name, metric, f"{was:.4f}") for name, metric, was, _ in cells)
        return table(("task", "metric", "value"), rows)
    return table(
        ("task", "metric", "before", "after", "change"),
        (
            (name, metric, f"{was:.4f}", f"{now:.4f}", f"{now - was:+.4f}")
            for name, metric, was, now in cells
        ),
    )


def add_to(app: typer.Typer) -> None:
    """Adds the command to a group."""
    app.command()(tasks)
