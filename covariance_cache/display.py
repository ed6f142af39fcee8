"""What a folder of statistics holds, for people, in 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table

_FACTS = {
    "model_fingerprint": "model",
    "module": "module",
    "tokenizer_fingerprint": "tokenizer",
    "corpus_fingerprint": "text",
    "parts": "texts merged",
    "window": "window",
    "seed": "seed",
    "model_dtype": "dtype of the keys",
    "origin": "origin",
    "library_version": "version",
}
_HASHES = ("model_fingerprint", "tokenizer_fingerprint", "corpus_fingerprint")


def show(title: str, headers: Sequence[Mapping[str, Any]]) -> None:
    """Prints the layers of a store and what they share."""
    Console().print(Group(_measures(title, headers), _sources(headers)))


def _measures(title: str, headers: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        title=title,
        box=SIMPLE_HEAD,
        title_justify="left",
        padding=0,
    )
    for column in ("layer", "d_key", "keys", "per dim."):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("eff. rank", "condition", "oas", "1st pos.", "change"):
        table.add_column(column, justify="right", no_wrap=True)
    for header in headers:
        found = header.get("adequacy") or {}
        change = _number(found.get("change"), "{:.0%}")
        if found.get("change_shrinkage") not in (None, "none"):
            change += f" {found['change_shrinkage']}"
        table.add_row(
            str(header["layer"]),
            str(header["d_key"]),
            f"{header['count']:,}",
            f"{header['count'] / header['d_key']:.1f}",
            _number(found.get("effective_rank"), "{:.1f}"),
            _number(found.get("condition"), "{:.0e}") if found else "?",
            _number(found.get("shrinkage_intensity"), "{:.0e}"),
            _number(found.get("first_position_share"), "{:.1%}"),
            change,
        )
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _sources(headers: Sequence[Mapping[str, Any]]) -> Table:
    """What all layers share once, the rest by layer."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, title in _FACTS.items():
        values = {header["layer"]: _fact(name, header) for header in headers}
        if not any(values.values()):
            continue
        if len(set(values.values())) == 1:
            table.add_row(title, next(iter(values.values())))
            continue
        for layer, value in values.items():
            table.add_row(f"{title} of {layer}", value or "unknown")
    return table


def _fact(name: str, header: Mapping[str, Any]) -> str:
    value = header["provenance"].get(name)
    if value is None or value == [] or value == ():
        return ""
    if name == "parts":
        return ", ".join(str(part)[:12] for part in value)
    if name == "module":
        return str(value).replace(f".{header['layer']}.", ".{layer}.")
    return str(value)[:12] if name in _HASHES else str(value)
