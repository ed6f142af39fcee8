"""The command line: `python -m covariance_cache collect | show`."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from covariance_cache.collect import collect as collect_statistics
from covariance_cache.errors import CorpusExhausted, StatisticsError
from covariance_cache.modules import expand_pattern
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
    model: Annotated[str, typer.Argument(help="Folder of a model, or a cached name.")],
    corpus: Annotated[Path, typer.Option(help="A .txt or .jsonl file of documents.")],
    layers: Annotated[str, typer.Option(help="Such as 13-17 or 0-1,4.")],
    out: Annotated[Path, typer.Option(help="Folder for one file per layer.")],
    tokens: Annotated[
        str | None, typer.Option(help="Such as 64k or 1M; by default 10 × d_key.")
    ] = None,
    field: Annotated[str, typer.Option(help="A .jsonl file's field of text.")] = "text",
    window: Annotated[int, typer.Option(help="Tokens in a window of text.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Windows in a forward pass.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the order of documents.")] = 0,
    module: Annotated[
        str | None,
        typer.Option(help="The down-projection's name, {} for the layer."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="To load the model in.")] = Dtype.auto,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Collect the statistics of some layers from one pass over a text.

    An interrupted collection goes on where it stopped when started again.
    """
    with _one_line_errors():
        budget = None if tokens is None else parse_tokens(tokens)
        indices = parse_layers(layers)
        if not corpus.is_file():
            raise StatisticsError(f"{corpus}: no such file")
        loaded, tokenizer = _load(model, dtype.value, device)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CorpusExhausted)
            collected = collect_statistics(
                loaded,
                tokenizer,
                corpus,
                indices if module is None else expand_pattern(loaded, indices, module),
                tokens=budget,
                window=window,
                batch_size=batch_size,
                seed=seed,
                field=field,
                checkpoint_dir=out,
            )
        for warning in caught:
            typer.echo(f"note: {warning.message}", err=True)
        store = StatisticsStore(out)
        for statistics in collected.values():
            store.save(statistics)
        _report(store, list(collected), as_json)


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="Folder of statistics.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what statistics a folder holds, and where they came from."""
    with _one_line_errors():
        store = StatisticsStore(folder)
        layers = store.layers()
        if not layers:
            raise StatisticsError(f"{folder} holds no statistics")
        _report(store, layers, as_json)


def _load(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    # Heavy, and needed by `collect` alone.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, local_files_only=True
    )
    return model.to(device), tokenizer


def _report(store: StatisticsStore, layers: list[int], as_json: bool) -> None:
    entries = [
        {**store.header(layer), "file": str(store.file(layer))} for layer in layers
    ]
    if as_json:
        typer.echo(json.dumps({"layers": entries}, ensure_ascii=False))
        return
    table = Table(title=str(store.path))
    for column in ("layer", "module", "d_key", "keys", "keys/d_key"):
        table.add_column(column, overflow="fold")
    for column in ("window", "seed", "dtype", "model", "text"):
        table.add_column(column, overflow="fold")
    for entry in entries:
        source = entry["provenance"]
        table.add_row(
            str(entry["layer"]),
            source["module"],
            str(entry["d_key"]),
            f"{entry['count']:,}",
            f"{entry['count'] / entry['d_key']:.1f}",
            str(source["window"]),
            str(source["seed"]),
            str(source["model_dtype"]),
            str(source["model_fingerprint"])[:12],
            str(source["corpus_fingerprint"])[:12],
        )
    Console().print(table)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turns what a user can cause into one line on stderr and exit code 1."""
    try:
        yield
    except (StatisticsError, OSError, ValueError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None


def main() -> None:
    """Entry point."""
    app(prog_name="python -m covariance_cache")


if __name__ == "__main__":
    main()
