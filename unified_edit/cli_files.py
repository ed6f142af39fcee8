"""The commands that work on checkpoint folders and files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unified_edit.console import Force, Json, Model, check_new, fail, one_line_errors
from unified_edit.console import show as answer
from unified_edit.errors import UnifiedEditError

Patched = Annotated[Path, typer.Argument(help="A patched folder.")]


def patch(
    model: Model,
    update: Annotated[Path, typer.Argument(help="File that `edit` wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="New folder for the patched model.")
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Change the model's own files instead.")
    ] = False,
    unchanged: Annotated[
        str,
        typer.Option(
            help="Weight files that the update does not touch, in a new folder: copy, "
            "hardlink or reflink."
        ),
    ] = "copy",
    rounding: Annotated[
        str,
        typer.Option(
            help="Of half-precision weights: nearest, or keys, which keeps what they "
            "do to the edits."
        ),
    ] = "nearest",
    as_json: Json = False,
) -> None:
    """Write an update into a copy of a checkpoint folder, or into the folder itself."""
    with one_line_errors():
        if (out is None) != in_place:
            raise UnifiedEditError(
                "where to? Name a new folder with --out, or say --in-place, not both"
            )
        from unified_edit.algebra.update import UpdateSet
        from unified_edit.checkpoint.patch import patch as write
        from unified_edit.display import patch_table
        from unified_edit.loading import folder_of

        report = write(
            folder_of(model),
            UpdateSet.load(update),
            out,
            unchanged=unchanged,  # type: ignore[arg-type]  # it checks
            rounding=rounding,  # type: ignore[arg-type]
        ).report
        answer(
            report.as_dict(),
            as_json,
            lambda: [
                patch_table(report),
                f"{report.folder}: patched, update {report.number}",
                *(f"note: {note}" for note in report.notes),
            ],
        )


def verify(
    folder: Patched,
    base: Annotated[
        Path | None, typer.Option(help="The folder it was made from.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that a patched folder is its original bytes plus its updates, no more.

    Exit code 1 if it is not.
    """
    with one_line_errors():
        from unified_edit.checkpoint.patch import verify as check

        report = check(folder, base)
        compared = ""
        if report.compared_with_base is not None:
            compared = f", {report.compared_with_base} tensors compared with the base's"
        elif report.unread:
            compared = (
                f"; {len(report.unread)} linked or untouched weight files have no "
                "SHA-256: give --base to compare them"
            )
        answer(
            report.as_dict(),
            as_json,
            lambda: [
                f"{report.folder}: {'intact' if report.ok else 'NOT intact'}; updates: "
                f"{report.updates}, files checked: {report.files}, tensors recomputed: "
                f"{len(report.tensors)}{compared}",
                *(f"note: {note}" for note in report.notes),
            ],
        )
        fail(report.problems)


def revert(
    folder: Patched,
    all_updates: Annotated[
        bool, typer.Option("--all", help="Take back every update of its history.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Take a folder's last update back, so that every file is what it was before."""
    with one_line_errors():
        from unified_edit.checkpoint.patch import revert as take_back

        report = take_back(folder, all_updates=all_updates)
        answer(
            report.as_dict(),
            as_json,
            lambda: [
                f"{report.folder}: {_updates(report.numbers)} taken back; files "
                f"restored: {len(report.files)}, updates left: {report.remaining}",
                *(f"note: {note}" for note in report.notes),
            ],
        )


def recover(
    folder: Annotated[Path, typer.Argument(help="A folder, or where it was to be.")],
    undo: Annotated[
        bool, typer.Option("--undo", help="Undo a patch that could be finished.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Finish, or undo, what a crash interrupted; then the folder can be used again."""
    with one_line_errors():
        from unified_edit.checkpoint.patch import recover as mend

        report = mend(folder, undo=undo)
        told = {
            "finished": "the interrupted patch is finished",
            "undone": "the interrupted patch is undone",
            "reverted": "the interrupted revert is finished",
            "removed": "what had been staged is removed, nothing else had changed",
            "nothing": "nothing was interrupted",
        }[report.action]
        answer(
            report.as_dict(),
            as_json,
            lambda: [f"{report.folder}: {told}; updates: {report.updates}"],
        )


def show(folder: Patched, as_json: Json = False) -> None:
    """Print the history of a patched folder: each update, oldest first."""
    with one_line_errors():
        from unified_edit.checkpoint.patch import history
        from unified_edit.display import history_parts

        updates = history(folder)
        answer(
            {"folder": str(folder), "updates": [each.as_dict() for each in updates]},
            as_json,
            lambda: history_parts(folder, updates),
        )


def _updates(numbers: tuple[int, ...]) -> str:
    name = "update" if len(numbers) == 1 else "updates"
    return f"{name} {', '.join(map(str, numbers))}"


lora = typer.Typer(help="Updates as LoRA adapters, and back.", no_args_is_help=True)


@lora.command("export")
def lora_export(
    update: Annotated[Path, typer.Argument(help="File that `edit` wrote.")],
    base: Annotated[str, typer.Option(help="The model that the update is for.")],
    out: Annotated[Path, typer.Option(help="New folder for the adapter.")],
    any_base: Annotated[
        bool,
        typer.Option(
            "--any-base",
            help="Do not compare the base with the model that was edited; for a "
            "quantized base.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Write an update as a PEFT adapter: the exact factors, nothing is fitted."""
    with one_line_errors():
        from unified_edit.algebra.update import UpdateSet
        from unified_edit.checkpoint.lora import export_lora
        from unified_edit.loading import folder_of

        report = export_lora(
            UpdateSet.load(update),
            out,
            base=folder_of(base),
            base_name=base,
            check_base=not any_base,
        )
        answer(
            report.as_dict(),
            as_json,
            lambda: [
                f"{report.folder}: an adapter of rank {report.rank} for "
                f"{len(report.modules)} modules; a server must allow a rank of "
                f"{report.server_rank or report.rank}",
                *(f"note: {note}" for note in report.notes),
            ],
        )


@lora.command("import")
def lora_import(
    adapter: Annotated[Path, typer.Argument(help="Folder of a PEFT LoRA adapter.")],
    base: Annotated[str, typer.Option(help="The model that it adapts.")],
    out: Annotated[Path, typer.Option(help="File for the update.")],
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Read a LoRA adapter as an update, to patch it into a checkpoint."""
    with one_line_errors():
        check_new(out, force)
        from unified_edit.checkpoint.lora_import import import_lora
        from unified_edit.loading import folder_of

        update = import_lora(adapter, base=folder_of(base))
        update.save(out)
        changes = {
            address.tensor: {"rank": change.rank, "norm": change.norm()}
            for address, change in update
        }
        answer(
            {"update": str(out), "tensors": changes},
            as_json,
            lambda: [
                *(
                    f"{name}: rank {each['rank']}, ‖ΔW‖ {each['norm']:.3g}"
                    for name, each in changes.items()
                ),
                f"wrote {out}",
            ],
        )


def add_to(app: typer.Typer) -> None:
    """Adds these commands to the command line."""
    for command in (patch, verify, revert, recover, show):
        app.command()(command)
    app.add_typer(lora, name="lora")
