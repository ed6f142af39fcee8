"""Hyperparameters of every method for the models they were chosen for. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from unified_edit.model.prompts import ContextSettings

Origin = Literal["published", "tuned here", "unvalidated"]

ROME_CONTEXTS = ContextSettings((("", 5),) * 10 + (("", 10),) * 10)
MEMIT_CONTEXTS = ContextSettings(
    tuple((word, 10) for word in ("The", "Therefore", "Because", "I", "You"))
)


@dataclass(frozen=True)
class Preset:
    """A model that hyperparameters were chosen for."""

    model_type: str
    layers: int
    d_value: int
    vocabulary: int
    settings: dict[str, dict[str, Any]]
    """Changes to a method's base, for each method; "rome" serves all of ROME's."""
    origin: Origin
    source: str


def _table(
    rome: dict[str, Any],
    memit: dict[str, Any],
    emmet: dict[str, Any] | None,
    alphaedit: dict[str, Any] | None = None,
    encore: dict[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    # AlphaEdit takes MEMIT's settings, but for λ: its null space stands in for it.
    inherited = {k: v for k, v in memit.items() if k != "preservation_weight"}
    table = {
        "rome": rome,
        "memit": memit,
        "alphaedit": {**inherited, **(alphaedit or {})},
    }
    if emmet is not None:
        table["emmet"] = emmet
    if encore is not None:
        table["encore"] = {**memit, **encore}
    return table


_PUBLISHED = (
    "the methods' published code (kmeng01/rome, kmeng01/memit, "
    "jianghoucheng/AlphaEdit, scalable-model-editing/unified-model-editing); EMMET's "
    "as equality, without λ_D"
)

# Facts of the embedded models have a margin bounded by label smoothing: a target is
# reached at a probability of some 0.8, and going on only harms what else is known.
_TINY: dict[str, Any] = {
    "contexts": MEMIT_CONTEXTS,
    "steps": 30,
    "clamp": 3.0,
    "loss_threshold": 0.25,
}
_TINY_NULL_SPACE: dict[str, Any] = {
    "null_space_threshold": 0.02,
    "null_space_relative": True,
    "ridge": 0.1,
}
_TINY_ENCORE: dict[str, Any] = {"ridge": 0.1, "most_probable_stop": 3}

PRESETS: dict[str, Preset] = {
    "gpt2-xl": Preset(
        "gpt2",
        48,
        1600,
        50257,
        _table(
            rome={"layers": (17,)},
            memit={
                "layers": tuple(range(13, 18)),
                "steps": 20,
                "preservation_weight": 20_000.0,
            },
            emmet={"layers": (17,), "steps": 20},
            encore={"ridge": 10.0, "most_probable_stop": 4},
        ),
        "published",
        _PUBLISHED,
    ),
    "gpt-j": Preset(
        "gptj",
        28,
        4096,
        50400,
        _table(
            rome={"layers": (5,)},
            memit={"layers": tuple(range(3, 9)), "steps": 25},
            emmet={"layers": (5,), "steps": 25},
        ),
        "published",
        _PUBLISHED,
    ),
    "llama-2-7b": Preset(
        "llama",
        32,
        4096,
        32000,
        _table(
            rome={"layers": (5,), "steps": 25, "weight_decay": 1e-3},
            memit={
                "layers": tuple(range(4, 9)),
                "clamp": 4.0,
                "weight_decay": 1e-3,
            },
            emmet={"layers": (5,), "clamp": 4.0, "weight_decay": 1e-3},
            # Its code has other settings for Llama than MEMIT's own.
            encore={
                "clamp": 0.75,
                "weight_decay": 0.5,
                "ridge": 10.0,
                "most_probable_stop": 3,
            },
        ),
        "published",
        _PUBLISHED,
    ),
    "llama-3-8b": Preset(
        "llama",
        32,
        4096,
        128256,
        _table(
            rome={"layers": (5,), "steps": 25, "weight_decay": 1e-3},
            memit={"layers": tuple(range(4, 9)), "learning_rate": 0.1},
            emmet=None,
            encore={
                "learning_rate": 0.5,
                "ridge": 20.0,
                "most_probable_stop": 2,
            },
        ),
        "published",
        _PUBLISHED,
    ),
    "tinyworld-gpt2": Preset(
        "gpt2",
        5,
        128,
        1536,
        _table(
            rome={"layers": (0,), "learning_rate": 0.4, **_TINY},
            memit={
                "layers": (0, 1),
                "learning_rate": 0.4,
                "preservation_weight": 20.0,
                **_TINY,
            },
            emmet={"layers": (0,), "learning_rate": 0.4, **_TINY},
            alphaedit=_TINY_NULL_SPACE,
            encore=_TINY_ENCORE,
        ),
        "tuned here",
        "benchmarks/quality.py",
    ),
    "tinyworld-llama": Preset(
        "llama",
        5,
        128,
        1536,
        _table(
            rome={"layers": (0,), "learning_rate": 0.1, **_TINY},
            memit={
                "layers": (0, 1),
                "learning_rate": 0.25,
                "preservation_weight": 20.0,
                **_TINY,
            },
            emmet={"layers": (0,), "learning_rate": 0.1, **_TINY},
            alphaedit=_TINY_NULL_SPACE,
            encore=_TINY_ENCORE,
        ),
        "tuned here",
        "benchmarks/quality.py",
    ),
}
