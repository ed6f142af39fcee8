"""The command line: `python -m covariance_cache collect | show | merge | import`."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from covariance_cache import display
from covariance_cache.collect import collect as collect_statistics
from covariance_cache.errors import CorpusExhausted, StatisticsError
from covariance_cache.hub import hub_documents
from covariance_cache.legacy import import_npz
from covariance_cache.merge import merge as merge_statistics
from covariance_cache.modules import WRAPPERS, expand_pattern
from covariance_cache.ranks import joined
from covariance_cache.spectrum import plot_spectrum
from covariance_cache.statistics import KeyStatistics
from covariance_cache.store import StatisticsStore

app = typer.Typer(
    help="Second moments of a language model's MLP keys.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Dtype(str, Enum):
    """Dtypes a model can be loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[str, typer.Argument(help="Folder of a model, or a cached name.")]
Out = Annotated[Path, typer.Option(help="Folder for one file per layer.")]
Packed = Annotated[
    bool, typer.Option("--packed", help="Write one triangle only: half the bytes.")
]
Load = Annotated[Dtype, typer.Option(help="To load the model in.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def parse_layers(text: str) -> list[int]:
    """`13-17` or `0-1,4` → layers, ascending."""
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise StatisticsError(
                f"layers {text!r}: expected indices and ranges such as 13-17 or 0-1,4"
            )
        layers.update(range(first, last + 1))
    return sorted(layers)


def parse_tokens(text: str) -> int:
    """`64000`, `64k` or `1.5M` → a number of tokens."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kM]?)", text.strip())
    tokens = 0.0
    if match:
        tokens = float(match[1]) * {"": 1, "k": 1_000, "M": 1_000_000}[match[2]]
    if tokens < 1 or tokens != int(tokens):
        raise StatisticsError(
            f"tokens {text!r}: expected a whole number such as 64000, 64k or 1M"
        )
    return int(tokens)


@app.command()
def collect(
    model: Model,
    corpus: Annotated[
        str,
        typer.Option(
            help="A .txt or .jsonl file of documents, or a data set of the hub: "
            "hub:NAME[:CONFIG][@REVISION]."
        ),
    ],
    layers: Annotated[str, typer.Option(help="Such as 13-17 or 0-1,4.")],
    out: Out,
    tokens: Annotated[
        str | None, typer.Option(help="Such as 64k or 1M; by default 10 × d_key.")
    ] = None,
    field: Annotated[str, typer.Option(help="That holds a document's text.")] = "text",
    split: Annotated[str, typer.Option(help="Of a data set of the hub.")] = "train",
    window: Annotated[int, typer.Option(help="Tokens in a window of text.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Windows in a forward pass.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the order of documents.")] = 0,
    module: Annotated[
        str | None,
        typer.Option(help="The down-projection's name, {} for the layer."),
    ] = None,
    checkpoint_every: Annotated[
        int, typer.Option(help="Batches between checkpoints.")
    ] = 100,
    probes: Annotated[
        int, typer.Option(help="Keys of the adequacy report; 0 for none.")
    ] = 32,
    packed: Packed = False,
    dtype: Load = Dtype.auto,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Collect the statistics of some layers from one pass over a text.

    An interrupted collection goes on where it stopped when started again. Under
    `torchrun` the processes share the text.
    """
    with _one_line_errors(), joined() as ranks:
        budget = None if tokens is None else parse_tokens(tokens)
        indices = parse_layers(layers)
        texts: Any = corpus
        if corpus.startswith("hub:"):
            texts = hub_documents(corpus, split=split, field=field)
        elif not Path(corpus).is_file():
            raise StatisticsError(f"{corpus}: no such file")
        store = StatisticsStore(out)
        loaded, tokenizer = _load(model, dtype.value, ranks.device(device))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CorpusExhausted)
            collected = collect_statistics(
                loaded,
                tokenizer,
                texts,
                indices if module is None else expand_pattern(loaded, indices, module),
                tokens=budget,
                window=window,
                batch_size=batch_size,
                seed=seed,
                field=field,
                checkpoint_dir=out,
                checkpoint_every=checkpoint_every,
                probes=probes,
                save=partial(store.save, packed=packed),
                ranks=ranks,
            )
        if not ranks.first:
            return
        for warning in caught:
            typer.echo(f"note: {warning.message}", err=True)
        _report(store, list(collected), as_json)


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="Folder of statistics.")],
    spectrum: Annotated[
        Path | None,
        typer.Option(help="File for a picture of the eigenvalues, such as out.png."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what statistics a folder holds, what they are worth, and where they came
    from."""
    with _one_line_errors():
        store = StatisticsStore(folder)
        layers = store.layers()
        if not layers:
            raise StatisticsError(f"{folder} holds no statistics")
        if spectrum is not None:
            plot_spectrum({layer: store.open(layer) for layer in layers}, spectrum)
        _report(store, layers, as_json)


@app.command()
def merge(
    folders: Annotated[list[Path], typer.Argument(help="Folders of statistics.")],
    out: Out,
    packed: Packed = False,
    as_json: Json = False,
) -> None:
    """Merge statistics of one model that were collected from different texts."""
    with _one_line_errors():
        stores = [StatisticsStore(folder) for folder in folders]
        layers = stores[0].layers()
        for store in stores:
            if store.layers() != layers or not layers:
                raise StatisticsError(
                    f"{store.path} has the layers {store.layers()}, {stores[0].path} "
                    f"has {layers}; merge folders of the same layers"
                )
        merged = (
            merge_statistics([store.open(layer) for store in stores])
            for layer in layers
        )
        _save(out, merged, packed, as_json)


@app.command("import")
def import_(
    files: Annotated[
        list[Path],
        typer.Argument(help=".npz files as ROME, MEMIT and EasyEdit publish them."),
    ],
    model: Annotated[str, typer.Option(help="The model that they were made with.")],
    out: Out,
    layer: Annotated[
        int | None, typer.Option(help="If a file's name does not tell it.")
    ] = None,
    module: Annotated[
        str | None, typer.Option(help="If a file's name does not tell it.")
    ] = None,
    packed: Packed = False,
    dtype: Load = Dtype.auto,
    as_json: Json = False,
) -> None:
    """Import published statistics, whose files do not say which model they are of."""
    with _one_line_errors():
        if len(files) > 1 and (layer is not None or module is not None):
            raise StatisticsError("--layer and --module name one file's; pass one file")
        loaded, _ = _load(model, dtype.value, "cpu")
        imported = (
            import_npz(file, loaded, layer=layer, module=module) for file in files
        )
        _save(out, imported, packed, as_json)


def _load(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    if (Path(name) / ".unified-edit" / "journal.json").exists():
        raise StatisticsError(
            f"{name}: a change of this folder was interrupted, its weights may be half "
            f"replaced; run unified-edit recover {name} first"
        )
    # Heavy, and needed by `collect` alone.
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
    config = AutoConfig.from_pretrained(name, local_files_only=True)
    model: Any = auto_class(config).from_pretrained(
        name, config=config, dtype=dtype, local_files_only=True
    )
    return model.to(device), tokenizer


def auto_class(config: Any) -> Any:
    """transformers' class that loads models of this config with their head."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    wrapped = config.model_type in WRAPPERS
    return AutoModelForImageTextToText if wrapped else AutoModelForCausalLM


def _save(
    out: Path, statistics: Iterable[KeyStatistics], packed: bool, as_json: bool
) -> None:
    """Writes layers one by one, and shows them."""
    store = StatisticsStore(out)
    layers = []
    for each in statistics:
        store.save(each, packed=packed)
        layers.append(each.layer)
    _report(store, sorted(layers), as_json)


def _report(store: StatisticsStore, layers: list[int], as_json: bool) -> None:
    headers = [
        {**store.header(layer), "file": str(store.file(layer))} for layer in layers
    ]
    if as_json:
        typer.echo(json.dumps({"layers": headers}, ensure_ascii=False))
    else:
        display.show(str(store.path), headers)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turns what a user can cause into one line on stderr and exit code 1."""
    try:
        yield
    # transformers asks for packages that a tokenizer's files would need.
    except (StatisticsError, OSError, ValueError, ImportError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None


def main() -> None:
    """Entry point."""
    app(prog_name="python -m covariance_cache")


if __name__ == "__main__":
    main()
