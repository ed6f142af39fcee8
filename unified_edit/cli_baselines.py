"""The commands of the editors that are not closed-form: MEND, fine-tuning, LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unified_edit.console import (
    Chat,
    Device,
    Dtype,
    Force,
    Json,
    Limit,
    Model,
    Settings,
    check_new,
    one_line_errors,
    show,
)
from unified_edit.errors import EditorError

if TYPE_CHECKING:
    from unified_edit.engine import EditResult

mend = typer.Typer(
    help="MEND: train an editor for a model, and edit with it.", no_args_is_help=True
)

Edits = Annotated[Path, typer.Argument(help=".jsonl of edits, or CounterFact.")]
Out = Annotated[Path, typer.Option(help="File for the update.")]


@mend.command()
def train(
    model: Model,
    records: Annotated[
        Path,
        typer.Argument(help="CounterFact records to learn from; none to be edited."),
    ],
    validation: Annotated[
        Path, typer.Option(help="Other records, on which training is stopped.")
    ],
    text: Annotated[
        Path, typer.Option(help="Unrelated text, .txt or .jsonl: what shall stay.")
    ],
    out: Annotated[Path, typer.Option(help="File for the trained editor.")],
    state: Annotated[
        Path | None,
        typer.Option(
            help="File that keeps the training; if it exists, training goes on there. "
            "By default OUT with .training at its end, removed when training is done."
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Such as 45-47; by default the last three.")
    ] = None,
    settings: Settings = None,
    limit: Limit = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train an editor; interrupted, the same command goes on where it was."""
    with one_line_errors():
        from dataclasses import fields

        from covariance_cache.__main__ import parse_layers
        from covariance_cache.corpus import TextFile
        from unified_edit.baselines.mend import MendSettings
        from unified_edit.baselines.mend_training import TrainingSettings, train_mend
        from unified_edit.edits import read_records
        from unified_edit.loading import Source
        from unified_edit.options import parse_settings

        check_new(out, force)
        kept = state or out.with_name(f"{out.name}.training")
        changes = parse_settings(settings or (), (TrainingSettings, MendSettings))
        own = {each.name for each in fields(MendSettings)} - {"seed"}
        inner = {name: changes.pop(name) for name in own & changes.keys()}
        if layers is not None:
            inner["layers"] = tuple(parse_layers(layers))
        training = TrainingSettings(**changes)
        chosen = read_records(records)[:limit]
        judged, pieces = read_records(validation), list(TextFile(text))
        loaded, tokenizer = Source.of(model).load(dtype, device)
        editor = train_mend(
            loaded,
            tokenizer,
            chosen,
            judged,
            pieces,
            training,
            MendSettings(**inner, seed=training.seed),
            state=kept,
            progress=True,
        )
        editor.save(out)
        if state is None:
            kept.unlink(missing_ok=True)
        best = editor.about["best"]
        show(
            {"editor": str(out), **editor.about},
            as_json,
            lambda: [
                f"step {best['step']} of {editor.about['steps']} is the best: "
                f"{best['edit']:.3g} nats a token from the rephrased targets "
                f"({best['said']:.0%} said), {best['locality']:.2g} nats a token "
                "between what it says of other text and what it said",
                f"wrote {out}",
            ],
        )


@mend.command()
def edit(
    model: Model,
    edits: Edits,
    editor: Annotated[Path, typer.Option(help="File of the trained editor.")],
    out: Out,
    chat: Chat = False,
    limit: Limit = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compute the update that a trained editor predicts, as one file."""
    with one_line_errors():
        from unified_edit.baselines.mend import Mend

        check_new(out, force)
        loaded_editor = Mend.load(editor)
        job = _Inputs.read(model, edits, limit, chat, dtype, device)
        result = loaded_editor.to(device).edit(
            job.model, job.tokenizer, job.edits, frame=job.frame
        )
        _write(result, out, as_json)


def fine_tune(
    model: Model,
    edits: Edits,
    out: Out,
    layers: Annotated[
        str, typer.Option(help="Whose MLPs are trained: one, for ft and ft_l.")
    ],
    method: Annotated[str, typer.Option(help="ft, ft_l or lora.")] = "ft",
    settings: Settings = None,
    chat: Chat = False,
    limit: Limit = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compute an update by gradient descent, for comparison.

    `ft` trains down-projections, `ft_l` bounds every entry's change (--set
    norm_constraint=0.0005), `lora` trains low-rank changes of whole MLPs by way of
    peft, an optional extra.
    """
    with one_line_errors():
        from covariance_cache.__main__ import parse_layers
        from unified_edit.baselines import fine_tune as dense
        from unified_edit.baselines import lora_tuning
        from unified_edit.options import parse_settings

        check_new(out, force)
        kinds = {
            "ft": dense.FineTuneSettings,
            "ft_l": dense.FineTuneSettings,
            "lora": lora_tuning.LoraSettings,
        }
        if method not in kinds:
            raise EditorError(f"method {method!r}: expected one of {', '.join(kinds)}")
        changes = parse_settings(settings or (), (kinds[method],))
        bounded = "norm_constraint" in changes
        if method == "ft_l" and not bounded:
            changes["norm_constraint"] = dense.PUBLISHED_CONSTRAINT
        if method == "ft" and bounded:
            raise EditorError("ft has no norm_constraint; with one it is ft_l")
        chosen, where = kinds[method](**changes), tuple(parse_layers(layers))
        job = _Inputs.read(model, edits, limit, chat, dtype, device)
        compute: Any = lora_tuning.lora_tune if method == "lora" else dense.fine_tune
        result = compute(
            job.model,
            job.tokenizer,
            job.edits,
            where,
            chosen,
            frame=job.frame,
            progress=True,
        )
        _write(result, out, as_json)


class _Inputs:
    """What every editor reads."""

    def __init__(self, model: Any, tokenizer: Any, edits: Any, frame: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.edits, self.frame = edits, frame

    @classmethod
    def read(
        cls,
        model: str,
        edits: Path,
        limit: int | None,
        chat: bool,
        dtype: str,
        device: str,
    ) -> _Inputs:
        """Edits before the model's weights, which take long."""
        from unified_edit.edits import check_edits, read_edits
        from unified_edit.loading import Source
        from unified_edit.model.frames import PLAIN, chat_frame

        chosen = read_edits(edits)[:limit]
        check_edits(chosen)
        loaded, tokenizer = Source.of(model).load(dtype, device)
        frame = chat_frame(tokenizer) if chat else PLAIN
        return cls(loaded, tokenizer, chosen, frame)


def _write(result: EditResult, out: Path, as_json: bool) -> None:
    result.update.save(out)
    answer = {
        "update": str(out),
        "recipe": result.update.metadata["recipe"],
        "report": result.report.as_dict(),
    }
    show(answer, as_json, lambda: [str(result.report), f"wrote {out}"])


def add_to(app: typer.Typer) -> None:
    """Adds these commands to the command line."""
    app.add_typer(mend, name="mend")
    app.command(name="fine-tune")(fine_tune)
