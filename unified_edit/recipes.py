"""Recipes: every method as data. A recipe says which layers are edited, how targets
and keys are made, and which objective is solved; `engine.edit` is the same for all.

`RECIPES` holds what makes a method itself, `presets.PRESETS` its hyperparameters for
a model.
docs/how-to-add-a-recipe.md shows how to add one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from unified_edit.algebra.objective import (
    Equality,
    LeastSquares,
    Memorization,
    NullSpace,
    Objective,
    Preservation,
    Ridge,
    SecondMoment,
)
from unified_edit.algebra.regularize import Regularizer
from unified_edit.errors import RecipeError
from unified_edit.model.adapter import text_config
from unified_edit.model.descent import TargetSettings
from unified_edit.model.keys import KeyAverage
from unified_edit.model.prompts import ContextSettings
from unified_edit.presets import MEMIT_CONTEXTS, PRESETS, ROME_CONTEXTS, Origin

_CHOICES: dict[str, tuple[str, ...]] = {
    "key_average": get_args(KeyAverage),
    "memorization": ("equality", "least_squares"),
    "preservation": ("second_moment", "null_space"),
    "origin": get_args(Origin),
}


@dataclass(frozen=True)
class Recipe:
    """One method with its hyperparameters."""

    name: str
    layers: tuple[int, ...]
    """Edited layers, ascending. Several only for the block's output: the residual is
    spread over them, as MEMIT does. None of `layers="auto"`: `recommend` fills them
    in, and nothing else takes such a recipe."""
    targets: TargetSettings
    contexts: ContextSettings
    key_average: KeyAverage
    """How a key is averaged over contexts, wherever the formula has it."""
    memorization: Literal["equality", "least_squares"]
    preservation: Literal["second_moment", "null_space"] = "second_moment"
    preservation_weight: float = 1.0
    """λ: how many background keys C stands for, against one edit. Equality minds it
    only beside a ridge or earlier keys, a null space not at all."""
    earlier_weight: float = 0.0
    """What an earlier edit of a sequence counts for, against one of the present: 1 in
    what is published, 0 for methods that do not look back."""
    ridge: float = 0.0
    """μ: cost of ‖Δ‖_F², against one edit's squared miss; AlphaEdit's L2."""
    null_space_threshold: float = 0.02
    """Eigenvalues of C below it span the null space."""
    null_space_relative: bool = False
    """Whether the threshold is times the mean eigenvalue, or absolute."""
    published_denominator: bool = False
    """ROME's published code: the averaged key under C⁻¹, the bare prompt's in the
    denominator and the current value. Only to study the edits it breaks."""
    regularizer: str = "none"
    """What acts on the finished update: `rect:0.4`, `prune:1.2`, `norm:0.5`, as
    `algebra.regularize` reads it."""
    origin: Origin = "unvalidated"
    """Whether these hyperparameters are published, tuned in this project, or neither
    for this model."""
    source: str = ""
    """Where the hyperparameters come from."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not all(type(layer) is int for layer in self.layers):
            raise RecipeError(f"{self.name}: layers are numbers, not {self.layers}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise RecipeError(
                    f"{self.name}: {name} is one of {', '.join(choices)}, not "
                    f"{getattr(self, name)!r}"
                )
        if list(self.layers) != sorted(set(self.layers)):
            raise RecipeError(
                f"{self.name}: layers must be ascending, without repeats; got "
                f"{list(self.layers)}"
            )
        if len(self.layers) > 1 and self.targets.site != "block_output":
            raise RecipeError(
                f"{self.name}: a target at the MLP's output is one layer's; got layers "
                f"{list(self.layers)}. Name one layer, or use site='block_output'"
            )
        if self.published_denominator and self.memorization != "equality":
            raise RecipeError(f"{self.name}: published_denominator needs equality")
        if not self.preservation_weight > 0:
            raise RecipeError(f"{self.name}: preservation_weight must be positive")
        if not 0 <= self.earlier_weight < math.inf:
            raise RecipeError(f"{self.name}: earlier_weight must be ≥ 0, and finite")
        Regularizer.parse(self.regularizer)
        if self.ridge < 0 or (self.preservation == "null_space" and self.ridge == 0):
            raise RecipeError(
                f"{self.name}: ridge must be ≥ 0, and positive with a null space"
            )

    def preserve(self, second_moment: Tensor) -> Preservation:
        """What is preserved at one layer but for earlier edits: λC + μI, or the null
        space of C and μI.

        Args:
            second_moment: C [d_key, d_key], the mean of k kᵀ.
        """
        preservation: Preservation
        if self.preservation == "null_space":
            preservation = NullSpace.of(
                second_moment,
                threshold=self.null_space_threshold,
                relative=self.null_space_relative,
            )
        else:
            preservation = SecondMoment(second_moment, weight=self.preservation_weight)
        return preservation + Ridge(self.ridge) if self.ridge else preservation

    def objective(self, second_moment: Tensor) -> Objective:
        """The objective for one layer's C, without earlier edits."""
        return Objective(self.preserve(second_moment), self.memorize())

    def memorize(self) -> Memorization:
        """How exactly edits must hold: ρ = 0, or 1 in units of an edit's miss."""
        if self.memorization == "equality":
            return Equality()
        return LeastSquares(preservation_weight=1.0)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data. Of contexts, chat is said only where it is so."""
        data = asdict(self)
        if not self.contexts.chat:
            del data["contexts"]["chat"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The recipe that `as_dict` gave, also after a way through JSON.

        Raises:
            RecipeError: other fields, or values that make no recipe.
        """
        try:
            contexts = dict(data["contexts"])
            samples = tuple((str(seed), int(n)) for seed, n in contexts["samples"])
            targets = dict(data["targets"])
            if not data["layers"]:
                raise ValueError("layers: at least one")
            return cls(
                **{
                    **data,
                    "contexts": ContextSettings(**{**contexts, "samples": samples}),
                    "targets": TargetSettings(
                        **{**targets, "kl_prompts": tuple(targets["kl_prompts"])}
                    ),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise RecipeError(f"not the data of a recipe: {error}") from error

    @classmethod
    def from_hparams(
        cls, path: str | Path, *, method: str | None = None, config: Any = None
    ) -> Recipe:
        """The recipe of a hyperparameter file of ROME, MEMIT, EMMET, AlphaEdit or
        EasyEdit, as `hparams.read_hparams`; one warning tells what has no meaning here.

        Raises:
            RecipeError: naming the field that cannot be done here.
        """
        from unified_edit.hparams import read_hparams

        found = read_hparams(path, method=method, config=config)
        if found.notes:
            told = "\n- ".join((f"{path}:", *found.notes))
            warnings.warn(told, stacklevel=2)
        return found.recipe


_MLP = TargetSettings("mlp_output", steps=20)
_BLOCK = TargetSettings("block_output")

RECIPES: dict[str, dict[str, Any]] = {
    "rome": {
        "targets": _MLP,
        "contexts": ROME_CONTEXTS,
        "key_average": "flat",
        "memorization": "equality",
    },
    "p_rome": {
        "targets": _MLP,
        "contexts": ROME_CONTEXTS,
        "key_average": "clean",
        "memorization": "equality",
    },
    "rome_original": {
        "targets": _MLP,
        "contexts": ROME_CONTEXTS,
        "key_average": "flat",
        "memorization": "equality",
        "published_denominator": True,
    },
    "memit": {
        "targets": _BLOCK,
        "contexts": MEMIT_CONTEXTS,
        "key_average": "half",
        "memorization": "least_squares",
        "preservation_weight": 15_000.0,
    },
    "emmet": {
        "targets": _BLOCK,
        "contexts": MEMIT_CONTEXTS,
        "key_average": "half",
        "memorization": "equality",
    },
    "alphaedit": {
        "targets": _BLOCK,
        "contexts": MEMIT_CONTEXTS,
        "key_average": "half",
        "memorization": "least_squares",
        "preservation": "null_space",
        "earlier_weight": 1.0,
        "ridge": 10.0,
    },
}
"""What makes each method itself. `r_rome` is ROME as its paper has it: one key."""
RECIPES["r_rome"] = RECIPES["rome"]
RECIPES["memit_seq"] = {**RECIPES["memit"], "earlier_weight": 1.0}
RECIPES["emmet_seq"] = {
    **RECIPES["emmet"],
    "earlier_weight": 1.0,
    "preservation_weight": 15_000.0,
}
RECIPES["encore"] = {
    **RECIPES["memit_seq"],
    "targets": replace(_BLOCK, most_probable_stop=3),
    "ridge": 10.0,
}


def recipe(method: str, preset: str | None = None, **changes: Any) -> Recipe:
    """A method's recipe.

    Args:
        method: a name in `RECIPES`.
        preset: a name in `PRESETS`; its hyperparameters are used.
        changes: fields of `Recipe` or of `TargetSettings` that differ, e.g.
            `layers=range(3, 9)`, `clamp=1.0`. They make the recipe "unvalidated".
            `layers="auto"` leaves them to `recommend`.

    Raises:
        RecipeError: unknown names, or layers missing.
    """
    if method not in RECIPES:
        raise RecipeError(f"unknown recipe {method!r}; known: {', '.join(RECIPES)}")
    settings: dict[str, Any] = dict(RECIPES[method])
    origin: Origin = "unvalidated"
    source = ""
    if "layers" in changes:
        layers = changes["layers"]
        changes["layers"] = () if layers == "auto" else tuple(layers)
        if layers != "auto" and not changes["layers"]:
            raise RecipeError(f'{method}: name at least one layer, or layers="auto"')
    if preset is not None:
        chosen = PRESETS.get(preset)
        if chosen is None:
            raise RecipeError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
        key = preset_key(method)
        if key not in chosen.settings:
            raise RecipeError(
                f"there are no hyperparameters of {method} for {preset}; name the "
                f"layers and settings yourself"
            )
        changes = {**chosen.settings[key], **changes}
        if set(changes) <= set(chosen.settings[key]):
            same = all(changes[k] == v for k, v in chosen.settings[key].items())
            origin = chosen.origin if same else "unvalidated"
        source = chosen.source if origin != "unvalidated" else f"{preset}, changed"
    if "layers" not in changes:
        raise RecipeError(
            f"{method}: which layers? Name layers=…, or one of the presets: "
            f"{', '.join(PRESETS)}"
        )
    own = {field.name for field in fields(Recipe)} - {"name", "origin", "source"}
    inner = {field.name for field in fields(TargetSettings)}
    unknown = sorted(set(changes) - own - inner)
    if unknown:
        raise RecipeError(f"{method}: unknown settings {', '.join(unknown)}")
    settings.update({k: v for k, v in changes.items() if k in own})
    inside = {k: v for k, v in changes.items() if k in inner}
    settings["targets"] = replace(settings["targets"], **inside)
    return Recipe(name=method, origin=origin, source=source, **settings)


def preset_key(method: str) -> str:
    """Under which name presets have a method's hyperparameters."""
    return "rome" if "rome" in method else method.removesuffix("_seq")


def in_chat(chosen: Recipe) -> Recipe:
    """The recipe with its prompts in the tokenizer's chat template. Hyperparameters
    were found for bare prompts, so they count as unvalidated."""
    source = chosen.source and f"{chosen.source.removesuffix(', in chat')}, in chat"
    contexts = replace(chosen.contexts, chat=True)
    return replace(chosen, contexts=contexts, origin="unvalidated", source=source)


def matching_preset(config: Any) -> str | None:
    """The preset made for a model of this transformers config, or None."""
    config = text_config(config)
    for name, preset in PRESETS.items():
        if (
            preset.model_type == config.model_type
            and preset.layers == config.num_hidden_layers
            and preset.d_value == config.hidden_size
            and preset.vocabulary == config.vocab_size
        ):
            return name
    return None


def rome(preset: str | None = None, **changes: Any) -> Recipe:
    """ROME as its paper has it: one averaged key everywhere (Meng et al. 2022, eq. 2).
    Several edits are solved jointly; call `edit` once for each to apply them in turn.
    """
    return recipe("rome", preset, **changes)


def r_rome(preset: str | None = None, **changes: Any) -> Recipe:
    """r-ROME (Gupta et al. 2024), which restored ROME's equation: the same recipe."""
    return recipe("r_rome", preset, **changes)


def p_rome(preset: str | None = None, **changes: Any) -> Recipe:
    """p-ROME (Gupta et al. 2024): the bare prompt's key everywhere."""
    return recipe("p_rome", preset, **changes)


def rome_original(preset: str | None = None, **changes: Any) -> Recipe:
    """ROME as its code has it, with two keys; its denominator can vanish."""
    return recipe("rome_original", preset, **changes)


def memit(preset: str | None = None, **changes: Any) -> Recipe:
    """MEMIT (Meng et al. 2023, eq. 14): least squares, spread over layers."""
    return recipe("memit", preset, **changes)


def emmet(preset: str | None = None, **changes: Any) -> Recipe:
    """EMMET (Gupta et al. 2024, eq. 9): equality for a whole batch."""
    return recipe("emmet", preset, **changes)


def alphaedit(preset: str | None = None, **changes: Any) -> Recipe:
    """AlphaEdit (Fang et al. 2025, eq. 14): least squares in C's null space."""
    return recipe("alphaedit", preset, **changes)


def memit_seq(preset: str | None = None, **changes: Any) -> Recipe:
    """MEMIT whose solve knows the keys of a sequence's earlier edits; alone it is
    MEMIT. AlphaEdit's and ENCORE's papers compare with it."""
    return recipe("memit_seq", preset, **changes)


def emmet_seq(preset: str | None = None, **changes: Any) -> Recipe:
    """EMMET whose solve knows the keys of a sequence's earlier edits; alone it is
    EMMET."""
    return recipe("emmet_seq", preset, **changes)


def encore(preset: str | None = None, **changes: Any) -> Recipe:
    """ENCORE (Gupta et al. 2025): MEMIT with earlier keys, a ridge on each update, and
    targets that stop once they are the most probable tokens."""
    return recipe("encore", preset, **changes)
