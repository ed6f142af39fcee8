"""The state of a sequence of edits, explicit, never changed in place, and its file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unified_edit.algebra.update import RankKUpdate
from unified_edit.edits import Edit
from unified_edit.errors import SessionError
from unified_edit.guard import Guard, Readings
from unified_edit.model.prompts import Contexts
from unified_edit.recipes import Recipe
from unified_edit.report import EditReport
from unified_edit.tensor_file import read_tensors, reading, write_tensors

FORMAT = "unified-edit/session/1"
Decision = Literal["accepted", "warned", "shrunk", "refused"]


@dataclass(frozen=True, eq=False)
class LayerState:
    """What a sequence has done to one layer."""

    change: RankKUpdate | None
    """W_t − W₀ in float32; None before the first edit."""
    square: float = 0.0
    """‖W_t − W₀‖²"""
    damage: float | None = 0.0
    """tr(ΔCΔᵀ) of it; None without a C."""
    folded: Tensor | None = None
    """[d_key, d_key] sum of k kᵀ over the earlier keys that are not held one by one."""
    recent: tuple[Tensor, ...] = ()
    """[n, d_key] of each step since, in float64."""

    @property
    def length(self) -> float:
        """‖W_t − W₀‖"""
        return math.sqrt(max(self.square, 0.0))


@dataclass(frozen=True, eq=False)
class SequenceState:
    """All that a sequence's next step depends on, but for the model, the tokenizer, the
    statistics and the held-out text."""

    base_fingerprint: str
    """Of the unedited model."""
    recipe: Recipe
    statistics: Mapping[int, str]
    """Fingerprints, by layer."""
    contexts: Contexts
    seed: int
    guard: Guard
    layers: Mapping[int, LayerState]
    edits: tuple[Edit, ...] = ()
    """That were accepted, in their order; a later one of the same prompt stands for an
    earlier one."""
    steps: int = 0
    """That were tried."""
    refused: int = 0
    perplexity: tuple[float, float] | None = None
    """Of the unedited model on held-out text, and after the last step."""

    @property
    def reads(self) -> bool:
        """Whether the guard reads text and asks earlier edits in the next step."""
        return self.steps % self.guard.every == 0

    @property
    def standing(self) -> list[Edit]:
        """The edits that no later one replaced, in their order."""
        last = {edit.text: edit for edit in self.edits}
        return [edit for edit in self.edits if last[edit.text] is edit]

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file, whole or not at all; same state, same bytes.

        Raises:
            SessionError: it cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        sizes: dict[str, list[int]] = {}
        sums: dict[str, tuple[float, float | None]] = {}
        for layer, state in self.layers.items():
            if state.change is not None:
                tensors[f"{layer}/left"] = state.change.left
                tensors[f"{layer}/right"] = state.change.right
            if state.folded is not None:
                tensors[f"{layer}/folded"] = state.folded
            if state.recent:
                tensors[f"{layer}/recent"] = torch.cat(state.recent)
            sizes[str(layer)] = [len(keys) for keys in state.recent]
            sums[str(layer)] = (state.square, state.damage)
        header = {
            "format": FORMAT,
            "base_fingerprint": self.base_fingerprint,
            "recipe": self.recipe.as_dict(),
            "statistics": {str(k): v for k, v in self.statistics.items()},
            **self.contexts.as_dict(),
            "seed": self.seed,
            "guard": self.guard.as_dict(),
            "recent": sizes,
            "sums": sums,
            "edits": [edit.as_dict() for edit in self.edits],
            "steps": self.steps,
            "refused": self.refused,
            "perplexity": self.perplexity,
        }
        return write_tensors(path, tensors, header, SessionError)

    @classmethod
    def load(cls, path: str | Path) -> SequenceState:
        """Reads a file that `save` wrote.

        Raises:
            SessionError: missing, not a session, or damaged.
        """
        with reading(path, "not a session", SessionError):
            tensors, data = read_tensors(path, FORMAT)
            layers = {
                int(name): _layer_state(name, tensors, data) for name in data["recent"]
            }
            if tensors:
                raise SessionError(f"holds tensors of no layer: {sorted(tensors)}")
            recipe = Recipe.from_dict(data["recipe"])
            if {*recipe.layers} != layers.keys():
                raise SessionError("its layers are not those of its recipe")
            perplexity = data["perplexity"]
            return cls(
                data["base_fingerprint"],
                recipe,
                {int(k): v for k, v in data["statistics"].items()},
                Contexts.from_dict(data),
                data["seed"],
                Guard(**data["guard"]),
                layers,
                tuple(Edit(**each) for each in data["edits"]),
                data["steps"],
                data["refused"],
                None if perplexity is None else (perplexity[0], perplexity[1]),
            )


@dataclass(frozen=True)
class Step:
    """One step of a sequence: what was asked, what became of it."""

    edits: tuple[Edit, ...]
    decision: Decision
    reasons: tuple[str, ...]
    """What was beyond the guard's limits; empty for an accepted step."""
    scale: float
    """Share of the update that was made; 0 if it was refused."""
    readings: Readings | None
    """Of the update as it was made, or as it was when it was refused; None if there was
    none, because no system could be solved."""
    report: EditReport | None
    """As `edit` gives it, of the model after the step; None if there was no update."""
    seconds: Mapping[str, float]
    """Wall time of targets, solve (keys and residuals too), guard (held-out text and
    earlier edits), and the rest."""

    @property
    def made(self) -> bool:
        """Whether the model was changed."""
        return self.decision != "refused"


def _layer_state(
    name: str, tensors: dict[str, Tensor], data: Mapping[str, Any]
) -> LayerState:
    """Takes a layer's tensors out of `tensors`."""
    square, damage = data["sums"][name]
    left, right = tensors.pop(f"{name}/left", None), tensors.pop(f"{name}/right", None)
    if (left is None) != (right is None):
        raise SessionError(f"layer {name} lacks one of its factors")
    recent = tensors.pop(f"{name}/recent", None)
    sizes = data["recent"][name]
    if sum(sizes) != (0 if recent is None else len(recent)):
        raise SessionError(f"layer {name}: its keys are not as many as its header says")
    return LayerState(
        None if left is None or right is None else RankKUpdate(left, right),
        square,
        damage,
        tensors.pop(f"{name}/folded", None),
        () if recent is None else torch.split(recent, sizes),
    )
