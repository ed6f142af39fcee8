"""The commands that tell which layers hold a fact: by tracing, and by trying."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
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
    Preset,
    Settings,
    ShrinkageOption,
    check_new,
    one_line_errors,
    show,
    write_text,
)
from unified_edit.errors import RecipeError

if TYPE_CHECKING:
    from covariance_cache import StatisticsStore
    from unified_edit.edits import Record
    from unified_edit.evaluate.effects import AverageEffects
    from unified_edit.evaluate.layer_probe import LayerChoice
    from unified_edit.model.tracing import Traces
    from unified_edit.recipes import Recipe


def locate(
    model: Model,
    facts: Annotated[
        Path,
        typer.Argument(
            help=".json or .jsonl of prompt, subject and answer; CounterFact records; "
            "or ROME's known facts."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="File for every fact's effects, as JSON.")
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option(help="Folder for the pictures: averages, and single facts."),
    ] = None,
    pictured: Annotated[
        int, typer.Option(help="Single facts to draw, the first ones.", min=0)
    ] = 3,
    image: Annotated[str, typer.Option(help="Of pictures: png, svg or pdf.")] = "png",
    noise: Annotated[
        float,
        typer.Option(help="In standard deviations of the subjects' embeddings."),
    ] = 3.0,
    samples: Annotated[int, typer.Option(help="Of the noise.", min=1)] = 10,
    window: Annotated[
        int | None,
        typer.Option(
            help="Layers of a window of MLPs or attentions; by default a fifth of the "
            "model's.",
            min=1,
        ),
    ] = None,
    kinds: Annotated[
        str, typer.Option(help="What is restored, of hidden,mlp,attention.")
    ] = "hidden,mlp,attention",
    seed: Annotated[int, typer.Option(help="Of the noise.", min=0)] = 0,
    chat: Chat = False,
    limit: Limit = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Trace facts that a model knows: which tokens and layers carry them.

    ROME's causal tracing: with the subject's embeddings corrupted by noise, one state
    is restored at a time, and how much of the answer's probability that brings back is
    its indirect effect. Facts that the model does not know are counted, not traced.
    """
    with one_line_errors():
        from unified_edit.evaluate.effects import as_dict, average_effects
        from unified_edit.facts import read_facts
        from unified_edit.loading import Source
        from unified_edit.model.frames import PLAIN, chat_frame
        from unified_edit.model.tracing import TraceSettings, trace

        if out is not None:
            check_new(out, force)
        settings = TraceSettings(
            noise=noise,
            samples=samples,
            window=window,
            kinds=tuple(kind.strip() for kind in kinds.split(",")),  # type: ignore[misc]
            seed=seed,
        )
        asked = read_facts(facts)[:limit]
        pictures = (
            None if plots is None else _Pictures.into(plots, image, pictured, force)
        )
        loaded, tokenizer = Source.of(model).load(dtype, device)
        frame = chat_frame(tokenizer) if chat else PLAIN
        found = trace(loaded, tokenizer, asked, settings, frame=frame, progress=True)
        averages = average_effects(found, seed)
        whole = {"model": model, **as_dict(found), "averages": averages.as_dict()}
        written = []
        if out is not None:
            write_text(out, json.dumps(whole, ensure_ascii=False))
            written.append(out)
        if pictures:
            written += pictures.draw(found, averages, pictured)
        answer = {
            "facts": len(asked),
            "known": len(found.traces),
            "unknown": list(found.unknown),
            "settings": whole["settings"],
            "averages": whole["averages"],
            "written": [str(path) for path in written],
        }
        show(answer, as_json, lambda: _trace_view(found, averages, len(asked), written))


def recommend(
    model: Model,
    records: Annotated[
        Path, typer.Argument(help="CounterFact records; none to be edited later.")
    ],
    recipe: Annotated[str, typer.Option(help="Whose layers are wanted.")],
    statistics: Annotated[
        Path, typer.Option(help="Folder of key statistics of the layers to try.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="File for the choice and its evidence, as JSON.")
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(help="Adjacent layers; by default the preset's number.", min=1),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Try these only, such as 3-9; by default all collected."),
    ] = None,
    preset: Preset = None,
    settings: Settings = None,
    chat: Chat = False,
    seed: Annotated[int, typer.Option(help="Of contexts and intervals.", min=0)] = 0,
    shrinkage: ShrinkageOption = "none",
    limit: Limit = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Find the layers at which a recipe edits best, by trying them on records.

    At each layer, or window of layers, every record is edited alone and scored.
    """
    with one_line_errors():
        if out is not None:
            check_new(out, force)
        from covariance_cache import StatisticsStore
        from covariance_cache.__main__ import parse_layers
        from unified_edit.edits import read_records
        from unified_edit.loading import Source
        from unified_edit.options import AUTO, read_recipe
        from unified_edit.recipes import in_chat

        chosen_records = read_records(records)[:limit]
        source = Source.of(model)
        chosen = read_recipe(
            source.config, recipe, preset=preset, layers=AUTO, settings=settings or ()
        )
        chosen = in_chat(chosen) if chat else chosen
        store = StatisticsStore(statistics)
        wanted = store.layers() if layers is None else parse_layers(layers)
        if width is None:
            width = width_of(source.config, recipe, preset)
        loaded, tokenizer = source.load(dtype, device)
        choice = choose_layers(
            loaded,
            tokenizer,
            chosen_records,
            chosen,
            store,
            wanted,
            width=width,
            seed=seed,
            shrinkage=shrinkage,
        )
        found = choice.as_dict()
        if out is not None:
            write_text(out, json.dumps(found, ensure_ascii=False))
        show(found, as_json, lambda: _choice_view(choice, out))


def records_for(layers: str | None, path: Path | None) -> list[Record]:
    """Records on which `--layers auto` tries layers; none without it.

    Raises:
        RecipeError: one of the two options without the other.
        EditError: the file cannot be read as records.
    """
    from unified_edit.edits import read_records
    from unified_edit.options import AUTO

    if (layers == AUTO) != bool(path):
        raise RecipeError(
            "--layers auto needs --locate-on with CounterFact records apart from the "
            "edits, and --locate-on needs --layers auto"
        )
    return read_records(path) if path else []


def width_of(config: Any, method: str, preset: str | None) -> int:
    """How many layers a preset edits with a method; one without a preset."""
    from unified_edit.options import from_preset
    from unified_edit.recipes import matching_preset

    name = matching_preset(config) if preset is None else preset
    known = from_preset(method, name) if name else None
    return len(known.layers) if known else 1


def choose_layers(
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    recipe: Recipe,
    store: StatisticsStore,
    layers: Sequence[int],
    *,
    width: int,
    seed: int,
    shrinkage: str,
    accept_mismatch: bool = False,
) -> LayerChoice:
    """`recommend` with a folder's statistics of some layers."""
    from unified_edit.evaluate.layer_probe import recommend

    statistics = store.load(
        model,
        layers,
        tokenizer,
        shrinkage=shrinkage,
        accept_mismatch=accept_mismatch,
    )
    return recommend(
        model,
        tokenizer,
        records,
        recipe,
        statistics,
        width=width,
        seed=seed,
        progress=True,
    )


@dataclass(frozen=True)
class _Pictures:
    """Where pictures go."""

    folder: Path
    image: str
    force: bool

    @classmethod
    def into(cls, folder: Path, image: str, pictured: int, force: bool) -> _Pictures:
        """Refuses, before the work begins, what could not be drawn after it."""
        from unified_edit.evaluate.trace_charts import check_format

        found = cls(folder, image, force)
        check_format(found.averages)
        if not folder.exists():
            check_new(folder, force)
        else:
            for path in (found.averages, *map(found.fact, range(pictured))):
                check_new(path, force)
        return found

    @property
    def averages(self) -> Path:
        return self.folder / f"average_effects.{self.image}"

    def fact(self, index: int) -> Path:
        return self.folder / f"fact_{index}.{self.image}"

    def draw(
        self, traces: Traces, averages: AverageEffects, pictured: int
    ) -> list[Path]:
        """Draws the averages and the first facts."""
        from unified_edit.evaluate.trace_charts import effect_curves, heat_map, save

        self.folder.mkdir(exist_ok=True)
        window = traces.window
        save(effect_curves(averages, window=window), self.averages)
        written = [self.averages]
        for index, each in enumerate(traces.traces[:pictured]):
            save(heat_map(each, window=window), self.fact(index))
            written.append(self.fact(index))
        return written


def _trace_view(
    traces: Traces, averages: AverageEffects, facts: int, written: Sequence[Path]
) -> list[Any]:
    from unified_edit.display import effects_table

    total, known = averages.total, len(traces.traces)
    return [
        effects_table(averages),
        f"{known} of {facts} facts are known and were traced; the noise takes "
        f"{total.mean:.3f} ({total.low:.3f} to {total.high:.3f}) of "
        f"{averages.clean.mean:.3f}; windows of {traces.window}",
        *(f"wrote {path}" for path in written),
    ]


def _choice_view(choice: LayerChoice, out: Path | None) -> list[Any]:
    from unified_edit.display import candidates_table

    return [
        candidates_table(choice.candidates),
        f"layers {','.join(map(str, choice.layers))}: {choice.reason}",
        *([f"wrote {out}"] if out else []),
    ]


def add_to(app: typer.Typer) -> None:
    """Adds these commands to the command line."""
    app.command()(locate)
    app.command()(recommend)
