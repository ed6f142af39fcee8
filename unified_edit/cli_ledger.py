"""The commands of the ledger: the set of edits behind a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unified_edit.console import (
    Device,
    Force,
    Json,
    check_new,
    one_line_errors,
    show,
)
from unified_edit.errors import LedgerError

if TYPE_CHECKING:
    from covariance_cache import KeyStatistics
    from unified_edit.ledger import Ledger

ledger = typer.Typer(
    help="The set of edits behind a checkpoint: add, remove, rebuild.",
    no_args_is_help=True,
)

Path_ = Annotated[Path, typer.Argument(metavar="LEDGER", help="The ledger's file.")]
Base = Annotated[
    str | None, typer.Option(help="The base's folder, if it is elsewhere by now.")
]
StatisticsAt = Annotated[
    Path | None, typer.Option(help="The statistics' folder, if it is elsewhere by now.")
]


@ledger.command()
def add(
    path: Path_,
    edits: Annotated[Path, typer.Argument(help=".jsonl of edits, or CounterFact.")],
    model: Annotated[
        str | None, typer.Option(help="To begin a ledger: folder or cached name.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="To begin: such as memit.")] = None,
    statistics: Annotated[
        Path | None, typer.Option(help="To begin: folder of key statistics.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="To begin: by default the model's own; `none` for none."),
    ] = None,
    layers: Annotated[str | None, typer.Option(help="To begin: such as 13-17.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="To begin: key=value; may be repeated."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="To begin: as of `edit`.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(help="To begin: of the contexts; 0.", min=0)
    ] = None,
    shrinkage: Annotated[
        str | None, typer.Option(help="To begin: none (default), oas or ridge:0.01.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="To begin: to load the model in; float32.")
    ] = None,
    base: Base = None,
    token_budget: Annotated[
        int | None, typer.Option(help="As of `edit`.", min=1)
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Find the targets of new edits and write them down; begins a ledger if need be.

    The checkpoint does not change until `ledger rebuild`.
    """
    with one_line_errors():
        from covariance_cache import StatisticsStore
        from unified_edit.edits import check_edits, read_edits
        from unified_edit.ledger import Ledger
        from unified_edit.loading import Source
        from unified_edit.options import read_recipe
        from unified_edit.recipes import in_chat

        chosen = read_edits(edits)
        found: Ledger | None = None
        if path.exists():
            given = (
                *(model, recipe, statistics, preset, layers, settings),
                *(seed, shrinkage, dtype, chat or None),
            )
            if any(each is not None for each in given):
                raise LedgerError(
                    f"{path}: exists, with a model, recipe and statistics of its own; "
                    "leave those options out, or name another ledger"
                )
            found = Ledger.read(path)
            check_edits([*found.edits, *chosen])
            source = Source.of(base or found.base)
            loaded, tokenizer = source.load(found.dtype, device)
        else:
            if model is None or recipe is None or statistics is None:
                raise LedgerError(
                    f"{path}: no such ledger; to begin one give --model, --recipe and "
                    "--statistics"
                )
            if base is not None:
                raise LedgerError(
                    f"{path}: no such ledger; --model names the base of a new one, "
                    "--base is for one whose base has moved"
                )
            check_edits(chosen)
            source = Source.of(model)
            read = read_recipe(
                source.config,
                recipe,
                preset=preset,
                layers=layers,
                settings=settings or (),
            )
            read = in_chat(read) if chat else read
            dtype = dtype or "float32"
            loaded, tokenizer = source.load(dtype, device)
            found = Ledger.create(
                path,
                loaded,
                tokenizer,
                read,
                StatisticsStore(statistics).load(
                    loaded, read.layers, tokenizer, shrinkage=shrinkage or "none"
                ),
                base=str(Path(model).resolve()) if Path(model).is_dir() else model,
                statistics_folder=str(statistics.resolve()),
                dtype=dtype,
                seed=seed or 0,
            )
        before = {entry.id for entry in found.entries}
        grown = found.add(
            loaded, tokenizer, chosen, token_budget=token_budget, progress=True
        )
        fresh = [entry for entry in grown.entries if entry.id not in before]
        show(
            {
                "ledger": str(path),
                "added": [e.as_dict() for e in fresh],
                "edits": len(grown.entries),
            },
            as_json,
            lambda: [f"{path}: {len(fresh)} edits added, {len(grown.entries)} in all"],
        )


@ledger.command()
def remove(
    path: Path_,
    ids: Annotated[
        list[str], typer.Argument(help="Of the edits, as `ledger list` shows them.")
    ],
    as_json: Json = False,
) -> None:
    """Strike edits out; the checkpoint does not change until `ledger rebuild`."""
    with one_line_errors():
        from unified_edit.ledger import Ledger

        found = Ledger.read(path)
        kept = found.remove(ids)
        gone = [entry for entry in found.entries if entry not in kept.entries]
        show(
            {
                "ledger": str(path),
                "removed": [entry.as_dict() for entry in gone],
                "edits": len(kept.entries),
            },
            as_json,
            lambda: [
                *(f"removed {e.id}: {e.edit.text} → {e.edit.target}" for e in gone),
                f"{path}: {len(kept.entries)} edits left",
            ],
        )


@ledger.command("list")
def list_(path: Path_, as_json: Json = False) -> None:
    """Print the edits of a ledger, with their ids."""
    with one_line_errors():
        from unified_edit.ledger import Ledger

        found = Ledger.read(path)
        show(
            found.as_dict(),
            as_json,
            lambda: [
                *(f"{e.id}  {e.edit.text} → {e.edit.target}" for e in found.entries),
                f"{path}: {len(found.entries)} edits of {found.base} by "
                f"{found.recipe.name}",
            ],
        )


@ledger.command("rebuild")
def rebuild_(
    path: Path_,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the checkpoint: new, or of an earlier rebuild."),
    ] = None,
    update: Annotated[
        Path | None, typer.Option(help="File for the update, if it is wanted too.")
    ] = None,
    unchanged: Annotated[
        str, typer.Option(help="As of `patch`: copy, hardlink or reflink.")
    ] = "copy",
    rounding: Annotated[
        str, typer.Option(help="As of `patch`: nearest or keys.")
    ] = "nearest",
    base: Base = None,
    statistics: StatisticsAt = None,
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Solve for the ledger's edits and make their checkpoint from the base."""
    with one_line_errors():
        from unified_edit.ledger import Ledger
        from unified_edit.ledger_rebuild import rebuild
        from unified_edit.loading import Source, folder_of

        if out is None and update is None:
            raise LedgerError("where to? Name a folder with --out, or a file: --update")
        if update is not None:
            check_new(update, force)
        found = Ledger.read(path)
        result = None
        if found.entries:
            source = Source.of(base or found.base)
            loaded, tokenizer = source.load(found.dtype, device)
            result = found.solve(
                loaded,
                tokenizer,
                _statistics(found, statistics, loaded, tokenizer),
                progress=True,
            )
        answer: dict[str, Any] = {"ledger": str(path), "edits": len(found.entries)}
        lines = [] if result is None else [str(result.report)]
        if result is not None:
            answer["report"] = result.report.as_dict()
        if update is not None:
            if result is None:
                raise LedgerError(f"{path}: holds no edits, so there is no update")
            answer["update"] = str(result.update.save(update))
            lines.append(f"wrote {update}")
        if out is not None:
            patched = rebuild(
                found,
                None if result is None else result.update,
                folder_of(base or found.base),
                out,
                unchanged=unchanged,  # type: ignore[arg-type]  # it checks
                rounding=rounding,  # type: ignore[arg-type]
            )
            answer["folder"] = str(out)
            answer["patch"] = None if patched is None else patched.report.as_dict()
            lines.append(f"{out}: the base with {len(found.entries)} edits")
        show(answer, as_json, lambda: lines)


def _statistics(
    found: Ledger, folder: Path | None, model: Any, tokenizer: Any
) -> Mapping[int, KeyStatistics]:
    from covariance_cache import StatisticsStore

    return StatisticsStore(folder or Path(found.statistics)).load(
        model, found.recipe.layers, tokenizer, shrinkage=found.shrinkage
    )
