"""How every command answers, fails and guards its output files. Light to import."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from unified_edit.errors import UnifiedEditError

View = Callable[[], Iterable[Any]]

Model = Annotated[str, typer.Argument(help="Folder of a model, or a cached name.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Device = Annotated[str, typer.Option(help="Such as cpu or cuda.")]
Dtype = Annotated[
    str, typer.Option(help="To load the model in: float32, bfloat16, float16 or auto.")
]
Limit = Annotated[int | None, typer.Option(help="Use the first N only.", min=1)]
Preset = Annotated[
    str | None,
    typer.Option(help="By default the model's own, if any; `none` for none."),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Put prompts in the tokenizer's chat template.")
]
Layers = Annotated[str | None, typer.Option(help="Such as 13-17 or 0-1,4.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting as key=value; may be repeated."),
]
ShrinkageOption = Annotated[
    str, typer.Option(help="Of the statistics: none, oas or ridge:0.01.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]


def show(answer: Mapping[str, Any], as_json: bool, view: View) -> None:
    """The answer on stdout: as one JSON object, or as `view()`'s texts and tables."""
    from rich.console import Console

    from unified_edit.display import plain

    if as_json:
        typer.echo(json.dumps(plain(dict(answer)), ensure_ascii=False, allow_nan=False))
        return
    console = Console()
    for part in view():
        if isinstance(part, str):
            typer.echo(part)
        else:
            console.print(part)


def fail(problems: Iterable[str]) -> None:
    """Problems on stderr, one line each, and exit code 1; nothing without any."""
    found = [" ".join(problem.split()) for problem in problems]
    for problem in found:
        typer.echo(f"error: {problem}", err=True)
    if found:
        raise typer.Exit(1)


def check_new(path: Path, force: bool) -> None:
    """Refuses, before the work begins, a file that could not be written after it."""
    if path.is_dir():
        raise UnifiedEditError(f"{path}: is a folder; name a file")
    if path.exists() and not force:
        raise UnifiedEditError(
            f"{path}: exists already; name another file, or replace it with --force"
        )
    if not path.parent.is_dir():
        raise UnifiedEditError(f"{path.parent}: no such folder; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UnifiedEditError(f"{path.parent}: is read-only; choose another place")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as .jsonl, all of them or no file.

    Raises:
        UnifiedEditError: it cannot be written.
    """
    lines = (f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    write_text(path, "".join(lines))


def write_text(path: Path, text: str) -> None:
    """Writes a text whole, or no file.

    Raises:
        UnifiedEditError: it cannot be written.
    """
    staged = path.with_name(f".{path.name}.tmp")
    try:
        staged.write_text(text, encoding="utf-8")
        os.replace(staged, path)
    except OSError as error:
        with suppress(OSError):
            staged.unlink()
        raise UnifiedEditError(f"{path}: cannot be written: {error.strerror}") from None


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns the errors that both packages raise on purpose into one line on stderr and
    exit code 1; any other is a defect and keeps its traceback."""
    try:
        yield
    except Exception as error:
        # Not imported above, for it brings torch with it.
        from covariance_cache.errors import StatisticsError

        if not isinstance(error, (UnifiedEditError, StatisticsError)):
            raise
        fail([str(error)])
