"""Hyperparameter files of ROME, MEMIT, EMMET, AlphaEdit (JSON) and EasyEdit (YAML),
read as recipes.

A field either becomes a setting, or has no meaning here and is told in a note, or would
change the mathematics to what cannot be done here and is refused, as unknown ones are.
docs/migrating.md has the table.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from covariance_cache.modules import KEY_MODULES, key_pattern
from unified_edit.errors import RecipeError
from unified_edit.model.adapter import text_config
from unified_edit.model.prompts import ContextSettings
from unified_edit.presets import MEMIT_CONTEXTS, PRESETS
from unified_edit.recipes import Recipe, recipe

SUFFIXES = (".json", ".yaml", ".yml")
METHODS = {
    "rome": "rome",
    "r_rome": "r_rome",
    "c_rome": "r_rome",
    "p_rome": "p_rome",
    "rome_original": "rome_original",
    "memit": "memit",
    "emmet": "emmet",
    "alphaedit": "alphaedit",
}
"""Their names, in small letters and with _ for -, and ours."""

_TARGETS = {
    "v_lr": "learning_rate",
    "v_weight_decay": "weight_decay",
    "clamp_norm_factor": "clamp",
    "kl_factor": "kl_factor",
}
_MAY_BE_ZERO = ("v_weight_decay", "kl_factor")
_DOWN_PROJECTIONS = {name.rpartition(".")[2] for name in KEY_MODULES.values()}
_FLAGS = ("original_implementation", "enable_random_prefix_keys", "enable_prompt_keys")
_NO_MEANING = {
    "statistics come from python -m covariance_cache, collected or imported": (
        "mom2_dataset mom2_n_samples mom2_dtype stats_dir"
    ),
    "the model is loaded by you; device and dtype are arguments": (
        "device model_parallel fp16 bf16"
    ),
    "modules come from the table of architectures; the model's own head is used": (
        "attn_module_tmp ln_f_module lm_head_module"
    ),
    "edits passed together are solved together; nothing is cut off": (
        "batch_size max_length"
    ),
    "it changes no edit": (
        "calculate_objective_value dynamic_multiplier enable_thinking evaluation_type "
        "api_key if_prefix"
    ),
    "the null space is computed from the statistics": "P_loc",
}
_MISSING: Any = object()


@dataclass(frozen=True)
class HparamsFile:
    """What a hyperparameter file says."""

    recipe: Recipe
    model_name: str
    """The model it is for: its `model_name`, or else the file's name."""
    notes: tuple[str, ...]
    """What has no meaning here or is done otherwise, each with its fields' names."""


def read_hparams(
    path: str | Path, *, method: str | None = None, config: Any = None
) -> HparamsFile:
    """Reads a hyperparameter file.

    Args:
        path: a .json, .yaml or .yml file.
        method: a name in `METHODS`; None takes the file's `alg_name`, its folder's
            name, or what its fields tell.
        config: the model's transformers config, to check the file against. Without it
            the model's name is asked, where it is one of `PRESETS`.

    Raises:
        RecipeError: naming the field, its value and what was expected.
    """
    path = Path(path)
    fields = _Fields(path, _content(path))
    chosen, notes = _method(fields, method), []
    model_name = fields.text("model_name", path.stem)
    preset = next((each for each in PRESETS if _bare(each) in _bare(model_name)), None)
    changes: dict[str, Any] = {
        "layers": fields.layers(),
        "steps": fields.whole("v_num_grad_steps"),
        **{
            ours: fields.number(theirs, zero=theirs in _MAY_BE_ZERO)
            for theirs, ours in _TARGETS.items()
        },
    }
    fields.only("fact_token", "subject_last", required=True)
    fields.only("layer_selection", "all")
    if fields.flag("use_chat_template", False):
        raise fields.refusal(
            "use_chat_template", "False; ask for it with in_chat(recipe) or --chat"
        )
    _check_modules(fields, config)
    if chosen in ("memit", "emmet", "alphaedit"):
        depth = PRESETS[preset].layers if preset else None
        if config is not None:
            depth = getattr(text_config(config), "num_hidden_layers", None)
        notes += _last_layer(fields, depth)
        changes["contexts"] = MEMIT_CONTEXTS
        notes += _of_block_methods(fields, chosen, changes)
    else:
        chosen = _rome(fields, chosen, method is not None, changes, notes)
    notes += fields.without_meaning()
    fields.end(chosen)
    try:
        found = recipe(chosen, **changes)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    return HparamsFile(
        replace(found, origin=_origin(found, preset), source=path.name),
        model_name,
        tuple(notes),
    )


class _Fields:
    """A file's fields; those taken are gone, so that the rest can be named."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self.values, self.left = path, values, dict(values)

    def refusal(self, name: str, expected: str) -> RecipeError:
        value = self.values[name]
        return RecipeError(f"{self.path}: {name} is {value!r}; expected {expected}")

    def take(self, name: str, default: Any = _MISSING) -> Any:
        if name not in self.values and default is _MISSING:
            raise RecipeError(f"{self.path}: lacks the field {name}")
        self.left.pop(name, None)
        return self.values.get(name, default)

    def text(self, name: str, default: Any = _MISSING) -> str:
        value = self.take(name, default)
        if not isinstance(value, str):
            raise self.refusal(name, "a text")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self.refusal(name, "true or false")
        return value

    def whole(self, name: str) -> int:
        value = self.take(name)
        if type(value) is not int or value < 1:
            raise self.refusal(name, "a whole number, at least 1")
        return value

    def number(
        self, name: str, default: Any = _MISSING, *, zero: bool = False
    ) -> float:
        """A positive number, or 0 if it may be."""
        value = self.take(name, default)
        try:
            # YAML takes 5e-1, which has no point, for a text.
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not (0 < number < math.inf or (zero and number == 0)):
            raise self.refusal(name, "a number, 0 or more" if zero else "more than 0")
        return number

    def layers(self) -> tuple[int, ...]:
        value = self.take("layers")
        if not isinstance(value, list) or not all(type(each) is int for each in value):
            raise self.refusal("layers", "a list of numbers")
        return tuple(value)

    def only(self, name: str, wanted: Any, *, required: bool = False) -> None:
        """Refuses any other value than the one that can be done here."""
        value = self.take(name, _MISSING if required else wanted)
        same_kind = isinstance(value, bool) == isinstance(wanted, bool)
        if not (same_kind and value == wanted):
            raise self.refusal(name, f"{wanted!r}, the only one that can be done here")

    def without_meaning(self) -> list[str]:
        notes = []
        for why, names in _NO_MEANING.items():
            found = [name for name in names.split() if name in self.left]
            notes += [f"{', '.join(found)}: {why}"] if found else []
            for name in found:
                del self.left[name]
        return notes

    def end(self, method: str) -> None:
        if self.left:
            raise RecipeError(
                f"{self.path}: {', '.join(sorted(self.left))}: not known as a field of "
                f"{method}'s; take it out if it changes no edit"
            )


def _content(path: Path) -> dict[str, Any]:
    if path.suffix not in SUFFIXES:
        raise RecipeError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8: {error}") from error
    if path.suffix == ".json":
        try:
            values = json.loads(text)
        except ValueError as error:
            raise RecipeError(f"{path}: is not valid JSON: {error}") from error
    else:
        import yaml

        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RecipeError(f"{path}: expected one object of named hyperparameters")
    return values


def _bare(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _method(fields: _Fields, method: str | None) -> str:
    """Ours, by what was asked for, the file, its folder, or what it has."""
    values = fields.values
    said = fields.take("alg_name", None) if method is None else method
    fields.left.pop("alg_name", None)
    if said is None:
        folder = fields.path.resolve().parent.name
        said = folder if _plain(folder) in METHODS else None
    if said is None and "nullspace_threshold" in values:
        said = "alphaedit"
    elif said is None and "context_template_length_params" in values:
        said = "rome"
    elif said is None and "mom2_update_weight" in values:
        # Files of EMMET and MEMIT that have λ_D have the same fields.
        said = None if "emmet_lambda" in values else "memit"
    if said is None:
        raise RecipeError(
            f"{fields.path}: nothing says for which method it is; name it (method=…), "
            "or put the file into a folder such as MEMIT or EMMET"
        )
    if not isinstance(said, str) or _plain(said) not in METHODS:
        raise RecipeError(
            f"{fields.path}: the method is {said!r}; known: {', '.join(METHODS)}"
        )
    return METHODS[_plain(said)]


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _check_modules(fields: _Fields, config: Any) -> None:
    name = "rewrite_module_tmp"
    inner = fields.text(name)
    if inner.count("{}") != 1 or inner.rpartition(".")[2] not in _DOWN_PROJECTIONS:
        raise fields.refusal(
            name,
            "the MLP's down-projection with {} for the layer, such as "
            f"{KEY_MODULES['llama']}",
        )
    ours = key_pattern(config) or inner
    if inner.partition("{}")[2] != ours.partition("{}")[2]:
        raise fields.refusal(name, f"{ours}, as {config.model_type} has it")
    for outer, expected in (
        ("mlp_module_tmp", inner.rpartition(".")[0]),
        ("layer_module_tmp", "".join(inner.partition("{}")[:2])),
    ):
        if fields.text(outer) != expected:
            raise fields.refusal(outer, f"{expected}, which holds {inner}")


def _last_layer(fields: _Fields, depth: int | None) -> list[str]:
    layer = fields.whole("v_loss_layer")
    if depth is None:
        return [
            f"v_loss_layer: {layer} is taken for the model's last layer, for the loss "
            "is read from the model's own output"
        ]
    if layer != depth - 1:
        raise fields.refusal(
            "v_loss_layer",
            f"{depth - 1}, the last layer: the loss reads the model's own output",
        )
    return []


def _rome(
    fields: _Fields,
    method: str,
    asked: bool,
    changes: dict[str, Any],
    notes: list[str],
) -> str:
    """Contexts, and which of ROME's kin it is."""
    easy_edit = "alg_name" in fields.values
    name = "context_template_length_params"
    pairs = fields.take(name)
    good = isinstance(pairs, list) and all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(each) is int and each >= 1 for each in pair)
        for pair in pairs
    )
    if not good:
        raise fields.refusal(name, "a list of [length, number], such as [[5, 10]]")
    words = [word for word, _ in MEMIT_CONTEXTS.samples]
    changes["contexts"] = ContextSettings(
        tuple(
            (word, length)
            for length, count in pairs
            for word in (words if easy_edit else [""])
            for _ in range(count // len(words) if easy_edit else count)
        )
    )
    if easy_edit:
        notes.append(f"{name}: EasyEdit begins contexts with {', '.join(words)}")
    if not fields.flag("mom2_adjustment", True):
        raise fields.refusal(
            "mom2_adjustment",
            "True: false puts the identity in C's place, which no recipe does",
        )
    fields.take("v_loss_layer", None)  # their code looks at it and goes on
    notes.append("v_loss_layer: ROME's loss reads the model's own output, as here")
    fields.only("bias_update", False)
    fields.only("dynamic", False)
    if fields.flag("if_c_rome", False) and method == "rome":
        method = "r_rome"
    if any(flag in fields.values for flag in _FLAGS):
        fields.flag("enable_prompt_keys", False)  # in their code it decides nothing
        original = fields.flag("original_implementation", not easy_edit)
        if fields.flag("enable_random_prefix_keys", True):
            told = method if method in ("rome", "r_rome") else "rome"
        else:
            told = "rome_original" if original else "p_rome"
        if asked and told != method:
            raise RecipeError(
                f"{fields.path}: {', '.join(_FLAGS)} say {told}, not {method}"
            )
        method = told
    elif method == "rome" and not easy_edit:
        notes.append(
            "one averaged key is used throughout, as ROME's paper has it; its code has "
            "a second one in the denominator: method='rome_original'"
        )
    return method


def _of_block_methods(
    fields: _Fields, method: str, changes: dict[str, Any]
) -> list[str]:
    """What MEMIT, EMMET and AlphaEdit have beyond targets."""
    notes = []
    if not fields.flag("mom2_adjustment", True):
        notes.append("mom2_adjustment: not looked at by their code, C is always used")
    fields.only("norm_control", 0)
    fields.only("dynamic", False)
    cutoff = fields.take("prob_cutoff", 0)
    if isinstance(cutoff, bool) or cutoff not in (0, *range(-1000, 0)):
        raise fields.refusal("prob_cutoff", "0, or minus a number of evaluations")
    if cutoff:
        changes["most_probable_stop"] = -int(cutoff)
        notes.append("prob_cutoff: here the bare prompt must say the target as well")
    weight = fields.number("mom2_update_weight")
    if method == "emmet":
        slack = fields.number(
            "emmet_lambda",
            # EasyEdit's default; the JSON files have no defaults.
            0.1 if "alg_name" in fields.values else _MISSING,
            zero=True,
        )
        # Theirs is (wC + μI)⁻¹ beside λ_D, ours is in units of an edit's squared miss.
        scale = slack or 1 / weight
        norm = fields.number("update_norm_lambda", 0, zero=True)
        changes["ridge"] = norm * scale
        if slack:
            changes["memorization"] = "least_squares"
            changes["preservation_weight"] = weight * slack
            notes.append(
                f"emmet_lambda: {slack:g} makes EMMET least squares with λ = "
                f"mom2_update_weight · emmet_lambda = {weight * slack:g}, here for one "
                "edit too; for its equality set memorization='equality'"
            )
        else:
            notes.append("mom2_update_weight: equality does not depend on it")
        return notes
    if fields.number("update_norm_lambda", 0, zero=True):
        raise fields.refusal(
            "update_norm_lambda",
            "0: their codes disagree whether MEMIT has it; where it has, it is "
            "ridge = update_norm_lambda",
        )
    if fields.take("emmet_lambda", None) is not None:
        notes.append("emmet_lambda: EMMET's alone")
    if method == "memit":
        changes["preservation_weight"] = weight
        return notes
    changes["null_space_threshold"] = fields.number("nullspace_threshold")
    changes["ridge"] = fields.number("L2")
    notes.append("mom2_update_weight: AlphaEdit does not look at it")
    notes.append(
        "keys of earlier batches are not carried over from call to call; an "
        "EditSession does that, or pass all edits at once"
    )
    return notes


def _origin(found: Recipe, preset: str | None) -> Any:
    """Published only if it is, field by field, what is published for the model."""
    try:
        known = recipe(found.name, preset)
    except RecipeError:
        return "unvalidated"
    return known.origin if _settled(known) == _settled(found) else "unvalidated"


def _settled(read: Recipe) -> Recipe:
    targets = read.targets.at(read.targets.site)
    return replace(read, targets=targets, origin="unvalidated", source="")
