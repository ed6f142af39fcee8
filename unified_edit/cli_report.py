"""The command that makes a page of sequential-editing runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unified_edit.console import Force, Json, one_line_errors
from unified_edit.console import show as answer


def report(
    run: Annotated[
        Path, typer.Argument(help="A run's folder, or one whose subfolders are runs.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the page.")] = Path(
        "report.html"
    ),
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make one HTML page of a sequential-editing run, or compare several on one."""
    with one_line_errors():
        from unified_edit.evaluate.report import write_report

        written = write_report(run, out, force=force)
        answer({"report": str(written)}, as_json, lambda: [f"wrote {written}"])


def add_to(app: typer.Typer) -> None:
    """Adds this command to the command line."""
    app.command()(report)
