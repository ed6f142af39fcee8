"""What is written on a command line, as a recipe: its preset, layers and settings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer

from covariance_cache.__main__ import parse_layers
from unified_edit.errors import RecipeError
from unified_edit.hparams import SUFFIXES, read_hparams
from unified_edit.model.descent import TargetSettings
from unified_edit.recipes import Recipe, matching_preset, recipe

NO_PRESET = "none"
AUTO = "auto"
_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    tuple[str, ...]: 'a JSON list of texts, such as ["{} is a"]',
}
_OTHERWISE = ("layers", "name", "origin", "source")
"""Fields of a recipe that are no settings: --layers has its own option, the others say
what the recipe is."""


def read_recipe(
    config: Any,
    method: str,
    *,
    preset: str | None = None,
    layers: str | None = None,
    settings: Sequence[str] = (),
) -> Recipe:
    """A recipe for a model, from the options of a command.

    Args:
        config: the model's transformers config.
        method: a name in `RECIPES`, or a hyperparameter file, whose notes go to stderr.
        preset: a name in `PRESETS`, "none", or None for the one that matches the model
            and knows the method, if there is one.
        layers: such as `0-1,4`; `auto` leaves them to be located.
        settings: `key=value` each.

    Raises:
        RecipeError: unknown or ill-typed settings, or as `recipe`.
        StatisticsError: malformed layers.
    """
    changes = parse_settings(settings)
    if layers is not None:
        changes["layers"] = layers if layers == AUTO else tuple(parse_layers(layers))
    if method.endswith(SUFFIXES):
        if preset not in (None, NO_PRESET):
            raise RecipeError(f"{method} has hyperparameters of its own: no --preset")
        found = read_hparams(method, config=config)
        for note in found.notes:
            typer.echo(f"note: {note}", err=True)
        return _changed(found.recipe, changes)
    if preset is None:
        matched = matching_preset(config)
        known = matched is not None and from_preset(method, matched) is not None
        preset = matched if known else NO_PRESET
    return recipe(method, None if preset == NO_PRESET else preset, **changes)


def _changed(read: Recipe, changes: Mapping[str, Any]) -> Recipe:
    own = {k: v for k, v in changes.items() if k in Recipe.__dataclass_fields__}
    if own.get("layers") == AUTO:
        own["layers"] = ()
    inner = {k: v for k, v in changes.items() if k not in own}
    changed = replace(read, targets=replace(read.targets, **inner), **own)
    if changed == read:
        return read
    return replace(changed, origin="unvalidated", source=f"{read.source}, changed")


def from_preset(method: str, preset: str | None) -> Recipe | None:
    """The method with a preset's hyperparameters; None if it has none for it."""
    try:
        return recipe(method, preset)
    except RecipeError:
        return None


def parse_settings(
    pairs: Sequence[str], of: Sequence[type] = (Recipe, TargetSettings)
) -> dict[str, Any]:
    """`key=value` pairs → changes for `recipe`, each of its field's type.

    Args:
        of: the dataclasses whose fields may be set.

    Raises:
        RecipeError: not such a pair, an unknown key, one given twice, or a value of
            another type.
    """
    kinds = _settable(of)
    changes: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = (part.strip() for part in pair.partition("="))
        if not equals:
            raise RecipeError(f"--set {pair!r}: expected key=value, such as clamp=1.5")
        if key not in kinds:
            raise RecipeError(
                f"--set {pair!r}: there is no setting {key!r}; there are "
                f"{', '.join(sorted(kinds))}"
            )
        if key in changes:
            raise RecipeError(f"--set {pair!r}: {key} is set twice")
        changes[key] = _parse(pair, kinds[key], text)
    return changes


def _settable(of: Sequence[type]) -> dict[str, Any]:
    hints = {name: kind for each in of for name, kind in get_type_hints(each).items()}
    kinds = {
        # What may be None is so by default.
        name: get_args(kind)[0] if type(None) in get_args(kind) else kind
        for name, kind in hints.items()
        if name not in _OTHERWISE
    }
    return {
        name: kind
        for name, kind in kinds.items()
        if kind in _KINDS or get_origin(kind) is Literal
    }


def _parse(pair: str, kind: Any, text: str) -> Any:
    if get_origin(kind) is Literal:
        if text in get_args(kind):
            return text
        raise RecipeError(f"--set {pair!r}: expected {' or '.join(get_args(kind))}")
    if kind is str:
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind in (bool, int) and type(value) is kind:
        return value
    if isinstance(value, list) and kind == tuple[str, ...]:
        if value and all(isinstance(each, str) for each in value):
            return tuple(value)
    raise RecipeError(f"--set {pair!r}: expected {_KINDS[kind]}")
