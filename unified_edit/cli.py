"""The command line: parses, calls one function, prints.

stdout holds the answer alone, with `--json` one JSON object; bars, notes and errors go
to stderr. Heavy packages are imported inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unified_edit import (
    cli_baselines,
    cli_evaluate,
    cli_files,
    cli_ledger,
    cli_locate,
    cli_report,
    cli_sequential,
    cli_tasks,
)
from unified_edit.console import (
    Chat,
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
    fail,
    one_line_errors,
    show,
)
from unified_edit.errors import UnifiedEditError

app = typer.Typer(
    help="Edit facts in a language model, in closed form, and take it back at will.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def doctor(
    model: Model,
    statistics: Annotated[
        Path | None, typer.Option(help="Folder of key statistics to check too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell what is known of a model without loading its weights.

    Exit code 1 if something stands in the way of editing it.
    """
    with one_line_errors():
        from unified_edit.display import doctor_tables
        from unified_edit.doctor import examine

        report = examine(model, statistics)
        show(report.as_dict(), as_json, lambda: doctor_tables(report))
        fail(report.problems)


@app.command()
def edit(
    model: Model,
    edits: Annotated[Path, typer.Argument(help=".jsonl of edits, or CounterFact.")],
    recipe: Annotated[
        str,
        typer.Option(
            help="Such as memit (`doctor` lists them), or a hyperparameter file of "
            "ROME, MEMIT, EMMET, AlphaEdit or EasyEdit: .json, .yaml."
        ),
    ],
    statistics: Annotated[Path, typer.Option(help="Folder of key statistics.")],
    out: Annotated[Path, typer.Option(help="File for the update.")],
    preset: Preset = None,
    layers: Layers = None,
    settings: Settings = None,
    locate_on: Annotated[
        Path | None,
        typer.Option(
            help="With --layers auto: CounterFact records, apart from the edits, on "
            "which all layers with statistics are tried first."
        ),
    ] = None,
    chat: Chat = False,
    seed: Annotated[int, typer.Option(help="Of the contexts.", min=0)] = 0,
    shrinkage: ShrinkageOption = "none",
    accept_mismatch: Annotated[
        bool,
        typer.Option(
            "--accept-mismatch",
            help="Use statistics of another model or tokenizer; the update says so.",
        ),
    ] = False,
    target_cache: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps optimised targets for the next time."),
    ] = None,
    token_budget: Annotated[
        int | None,
        typer.Option(
            help="Tokens whose activations are held while optimising targets; by "
            "default what half of the free memory holds.",
            min=1,
        ),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    limit: Limit = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compute the update that makes a model say the edits' targets, as one file.

    The model's folder stays as it is: `patch` writes an update into a checkpoint.
    Under `torchrun` the processes share the targets, which take most of the time.
    """
    from covariance_cache.ranks import joined

    with one_line_errors(), joined() as ranks:
        check_new(out, force)
        from covariance_cache import StatisticsStore
        from unified_edit.edits import check_edits, read_edits
        from unified_edit.engine import edit as compute
        from unified_edit.loading import Source
        from unified_edit.model.adapter import ModelAdapter
        from unified_edit.model.frames import chat_frame
        from unified_edit.options import read_recipe
        from unified_edit.recipes import in_chat
        from unified_edit.target_cache import TargetCache

        chosen_edits = read_edits(edits)[:limit]
        check_edits(chosen_edits)
        trial = cli_locate.records_for(layers, locate_on)
        source = Source.of(model)
        chosen = read_recipe(
            source.config, recipe, preset=preset, layers=layers, settings=settings or ()
        )
        chosen = in_chat(chosen) if chat else chosen
        store = StatisticsStore(statistics)
        store.layers()  # refuses a missing folder before the model is loaded
        loaded, tokenizer = source.load(dtype, ranks.device(device))
        if chat:
            chat_frame(tokenizer)  # refuses before anything is computed
        # Before the statistics: theirs would be the error of a wrong layer or a NaN.
        adapter = ModelAdapter.of(loaded)
        adapter.check_finite()
        reason = None
        if trial:
            choice = cli_locate.choose_layers(
                loaded,
                tokenizer,
                trial,
                chosen,
                store,
                store.layers(),
                width=cli_locate.width_of(source.config, recipe, preset),
                seed=seed,
                shrinkage=shrinkage,
                accept_mismatch=accept_mismatch,
            )
            chosen, reason = choice.recipe, choice.reason
        adapter.check_layers(chosen.layers)
        result = compute(
            loaded,
            tokenizer,
            chosen_edits,
            chosen,
            store.load(
                loaded,
                chosen.layers,
                tokenizer,
                shrinkage=shrinkage,
                accept_mismatch=accept_mismatch,
            ),
            seed=seed,
            token_budget=token_budget,
            target_cache=None if target_cache is None else TargetCache(target_cache),
            ranks=ranks,
            progress=ranks.first,
        )
        if not ranks.first:
            return
        result.update.save(out)
        answer = {
            "update": str(out),
            "recipe": chosen.as_dict(),
            "report": result.report.as_dict(),
        }
        said = [str(result.report), f"wrote {out}"]
        if reason is not None:
            answer["layers"] = reason
            named = ",".join(map(str, chosen.layers))
            said.insert(0, f"layers {named}: {reason}")
        show(answer, as_json, lambda: said)


cli_files.add_to(app)
app.add_typer(cli_ledger.ledger, name="ledger")
app.add_typer(cli_evaluate.evaluate, name="evaluate")
cli_sequential.add_to(cli_evaluate.evaluate)
cli_tasks.add_to(cli_evaluate.evaluate)
cli_report.add_to(app)
cli_locate.add_to(app)
cli_baselines.add_to(app)


@app.command()
def demo(
    world: Annotated[Path, typer.Option(help="Folder of the embedded world.")] = Path(
        "examples/tinyworld"
    ),
    out: Annotated[Path, typer.Option(help="Folder for what the demo writes.")] = Path(
        "demo_output"
    ),
    as_json: Json = False,
) -> None:
    """Show everything on the small models that ship with the project."""
    with one_line_errors():
        if not world.is_dir():
            raise UnifiedEditError(
                f"{world}: no such folder; run from the project's own folder, or name "
                "the embedded world with --world"
            )
        from rich.console import Console

        from unified_edit.demo import run_demo

        report = run_demo(world, out, Console(stderr=as_json))
        if as_json:
            show(report, as_json, list)


def main() -> None:
    """Entry point."""
    app(prog_name="unified-edit")


if __name__ == "__main__":
    main()
