"""What a step of a sequence may do to a model, and what is known of it: before it is
written from the solution alone, afterwards from held-out text and earlier edits."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from unified_edit.errors import RecipeError

OnLimit = Literal["refuse", "warn", "shrink"]
SMALLEST = 1 / 16
"""An update that must be shrunk below this is refused."""


@dataclass(frozen=True)
class Readings:
    """What is known of a step. None: not measured, or there is nothing to measure."""

    leverage: float | None
    """Least kᵀ C⁻¹ k over d_key of the edits' keys, 1 for background keys on average;
    where earlier keys are in the solve, they count as background too. None in a null
    space."""
    condition: float
    """Largest condition number of the layers' systems."""
    relative_norm: float
    """Largest ‖ΔW‖/‖W₀‖ of a layer."""
    drift: float
    """Largest ‖W_t − W₀‖/‖W₀‖ of a layer with this step."""
    damage: float | None
    """Predicted: largest mean squared change of preserved keys' values by this step,
    over their mean square."""
    total_damage: float | None
    """The same of all steps together."""
    canary: float | None = None
    """Perplexity on held-out text after this step over that before it."""
    total_canary: float | None = None
    """The same over the unedited model's."""
    retention: float | None = None
    """Of a sample of earlier edits that held before this step, the share that holds
    after it."""


_WORDS = {
    "leverage": "the least leverage of a key, over d_key,",
    "condition": "the condition number",
    "relative_norm": "‖ΔW‖/‖W₀‖",
    "drift": "‖W_t − W₀‖/‖W₀‖",
    "damage": "the predicted damage to preserved keys",
    "total_damage": "the predicted damage of all steps",
    "canary": "perplexity on held-out text, over that before the step,",
    "total_canary": "perplexity on held-out text, over the unedited model's,",
    "retention": "the share of sampled earlier edits that still hold",
}
_AT_LEAST = ("leverage", "retention")
_FIXED = ("leverage", "condition")
"""A smaller update has the same."""


@dataclass(frozen=True)
class Guard:
    """Limits of a step, one for each of `Readings`, and what happens beyond one. None
    stands for no limit. docs/sequences.md says how the defaults were found."""

    on_limit: OnLimit = "refuse"
    """`refuse` leaves the model untouched; `warn` goes on; `shrink` halves the update
    until it is within the limits, and refuses what is not so at 1/16."""
    leverage: float | None = None
    condition: float | None = 1e12
    relative_norm: float | None = None
    drift: float | None = None
    damage: float | None = 0.02
    total_damage: float | None = None
    canary: float | None = 1.1
    total_canary: float | None = 2.0
    retention: float | None = 0.75
    sample: int = 8
    """Earlier edits that are asked."""
    every: int = 1
    """Steps between readings of held-out text and earlier edits, which take most of the
    guard's time; what the solution says is looked at in every step."""

    def __post_init__(self) -> None:
        if self.on_limit not in get_args(OnLimit):
            raise RecipeError(
                f"on_limit is one of {', '.join(get_args(OnLimit))}, not "
                f"{self.on_limit!r}"
            )
        for name in _WORDS:
            limit = getattr(self, name)
            if limit is not None and not (limit > 0 and math.isfinite(limit)):
                raise RecipeError(f"the guard's {name} must be positive, or None")
        if type(self.sample) is not int or self.sample < 0:
            raise RecipeError(f"the guard's sample must be ≥ 0, not {self.sample!r}")
        if type(self.every) is not int or self.every < 1:
            raise RecipeError(f"the guard's every must be ≥ 1, not {self.every!r}")

    def broken(self, readings: Readings) -> dict[str, str]:
        """Limit → what is beyond it, in words."""
        found = {}
        for name, words in _WORDS.items():
            limit, value = getattr(self, name), getattr(readings, name)
            if limit is None or value is None:
                continue
            least = name in _AT_LEAST
            # Written so that NaN is beyond every limit.
            if not (value >= limit if least else value <= limit):
                bound = "least" if least else "most"
                found[name] = f"{words} is {value:.3g}, at {bound} {limit:g}"
        return found

    @property
    def reads_text(self) -> bool:
        """Whether held-out text must be read at each step."""
        return self.canary is not None or self.total_canary is not None

    def helped_by_less(self, broken: dict[str, str]) -> bool:
        """Whether a smaller update could be within the limits."""
        return not set(broken) & set(_FIXED)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


_NO_LIMITS: dict[str, Any] = dict.fromkeys(_WORDS)
OFF = Guard(**_NO_LIMITS, on_limit="warn", sample=0)
"""No limits, nothing measured but what the solution says."""
