"""MEND: a small trained network turns an edit's gradient into a change of weights.

The gradient of an edit's loss by a linear map's weight is Σ_t δ_t x_tᵀ. MEND's editor
maps each pair (x_t, δ_t) to another, (x̃_t, δ̃_t), and the edited weight is
W − α Σ_t δ̃_t x̃_tᵀ with a learned step size α for each map. Untrained the editor is the
identity on normalised pairs, so that an edit is a step of gradient descent.

The published code adds what it predicts, with α > 0, and so has to learn the sign.

Source: Mitchell et al. 2022 (MEND), sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from covariance_cache.fingerprint import model_fingerprint
from unified_edit.algebra.update import RankKUpdate, WeightAddress
from unified_edit.baselines.outcome import check_layers, editing
from unified_edit.edits import Edit
from unified_edit.engine import EditResult
from unified_edit.errors import EditorError
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.frames import PLAIN, Frame
from unified_edit.model.gradients import Factors, decomposed, labelled
from unified_edit.tensor_file import read_tensors, reading, write_tensors

FORMAT = "unified-edit/mend/1"
_EDITED_BLOCKS = 3
_TOGETHER = 64
"""Edits whose activations are held at once."""


@dataclass(frozen=True)
class MendSettings:
    """What an editor is made of."""

    layers: tuple[int, ...] = ()
    """Whose MLPs' linear maps are edited; empty for the last three, as published."""
    rank: int = 1920
    """Of the editor's own maps, at most their width."""
    step_size: float = 1e-4
    """What each map's learned α begins with."""
    seed: int = 0
    """Of the editor's random directions."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.step_size > 0:
            raise EditorError("rank and step_size must be positive")
        if len(set(self.layers)) != len(self.layers):
            raise EditorError(f"layers {list(self.layers)}: one is named twice")


class _Residual(nn.Module):
    """h + max(0, scale·(UVh + b) + shift), scale and shift one for each edited map."""

    def __init__(
        self, width: int, rank: int, maps: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        rank = min(rank, width)
        self.u = nn.Parameter(torch.zeros(width, rank))
        self.v = nn.Parameter(torch.randn(rank, width, generator=generator))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(maps, width))
        self.shift = nn.Parameter(torch.zeros(maps, width))

    def forward(self, hidden: Tensor, index: int) -> Tensor:
        found = hidden @ self.v.T @ self.u.T + self.bias
        found = self.scale[index] * found + self.shift[index]
        # Not relu: at the beginning all is 0, where relu has no gradient.
        return hidden + found.clamp(min=0)


class _Editor(nn.Module):
    """Normalises pairs (x, δ) and maps them, for all edited maps of one shape."""

    mean: Tensor
    squares: Tensor
    seen: Tensor

    def __init__(
        self, d_in: int, d_out: int, rank: int, maps: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.d_in, width = d_in, d_in + d_out
        self.layers = nn.ModuleList(
            _Residual(width, rank, maps, generator) for _ in range(2)
        )
        for name in ("mean", "squares"):
            self.register_buffer(name, torch.zeros(width, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def observe(self, pairs: Tensor) -> None:
        """Counts pairs [n, d_in + d_out] in the running mean and sum of squared
        deviations (Welford's, of many at once)."""
        rows = pairs.double()
        if not len(rows):
            return
        both = self.seen + len(rows)
        mean = rows.mean(0)
        off = mean - self.mean
        self.squares += (rows - mean).square().sum(0)
        self.squares += off.square() * (self.seen * len(rows) / both)
        self.mean += off * (len(rows) / both)
        self.seen.copy_(both)

    def forward(self, pairs: Tensor, index: int) -> Tensor:
        deviation = (self.squares / (self.seen - 1)).sqrt() + 1e-7
        hidden = ((pairs.double() - self.mean) / deviation).float()
        for layer in self.layers:
            hidden = layer(hidden, index)
        return hidden


class Mend(nn.Module):
    """A model's editor. Holds nothing of the model but its fingerprint."""

    def __init__(
        self,
        settings: MendSettings,
        addresses: Sequence[WeightAddress],
        modules: Sequence[str],
        shapes: Sequence[tuple[int, int]],
        base_fingerprint: str,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """An untrained editor.

        Args:
            settings: with its layers named.
            addresses: of the edited weights.
            modules: names of their linear maps.
            shapes: (d_in, d_out) of each.
            about: how it was trained, plain data.
        """
        super().__init__()
        self.settings, self.base_fingerprint = settings, base_fingerprint
        self.addresses, self.modules_edited = tuple(addresses), tuple(modules)
        self.shapes, self.about = tuple(shapes), dict(about or {})
        kinds = sorted(set(shapes))
        generator = torch.Generator().manual_seed(settings.seed)
        self.editors = nn.ModuleDict(
            {
                _named(kind): _Editor(
                    *kind, settings.rank, self.shapes.count(kind), generator
                )
                for kind in kinds
            }
        )
        self.step_sizes = nn.Parameter(torch.full((len(shapes),), settings.step_size))
        # Which of its editor's maps each is.
        self._index = [
            self.shapes[:place].count(shape) for place, shape in enumerate(self.shapes)
        ]

    @classmethod
    def of(cls, model: nn.Module, settings: MendSettings | None = None) -> Mend:
        """An untrained editor of a model.

        Raises:
            EditorError: layers that the model does not have.
            UnsupportedModel.
        """
        adapter, chosen = ModelAdapter.of(model), settings or MendSettings()
        last = range(max(0, adapter.layer_count - _EDITED_BLOCKS), adapter.layer_count)
        layers = chosen.layers or tuple(last)
        chosen = replace(chosen, layers=layers)
        check_layers(layers, adapter.layer_count)
        named = [(k, name) for k in layers for name in adapter.mlp_modules(k)]
        addresses = [adapter.address(k, name) for k, name in named]
        shapes = []
        for address in addresses:
            rows, columns = model.get_parameter(address.tensor).shape
            shapes.append((rows, columns) if address.transposed else (columns, rows))
        modules = [name for _, name in named]
        return cls(chosen, addresses, modules, shapes, model_fingerprint(model)).to(
            adapter.device
        )

    def changes(
        self, found: Mapping[str, Factors], *, observe: bool = False
    ) -> dict[str, Factors]:
        """What to add to each map's weight, in factors: −α δ̃ x̃ᵀ, with the editor's
        graph. Rows stay apart from each other.

        Args:
            found: the edits' gradients, as `decomposed` gives them for
                `modules_edited`.
            observe: count these gradients in the running statistics first.
        """
        answer = {}
        for place, name in enumerate(self.modules_edited):
            editor = self.editors[_named(self.shapes[place])]
            assert isinstance(editor, _Editor)
            x, delta = found[name].x, found[name].delta
            # Padding, and tokens that the loss does not depend on.
            real = (x != 0).any(-1) & (delta != 0).any(-1)
            device = self.step_sizes.device
            pairs = torch.cat([x[real].float(), delta[real].float()], -1).to(device)
            if observe:
                editor.observe(pairs)
            if int(editor.seen) < 2:
                raise EditorError(
                    "this editor was never trained: it has no statistics of gradients"
                )
            mapped = editor(pairs, self._index[place])
            step = -self.step_sizes[place]
            answer[name] = Factors(
                _scattered(mapped[:, : editor.d_in], real),
                _scattered(step * mapped[:, editor.d_in :], real),
            )
        return answer

    def edit(
        self,
        model: nn.Module,
        tokenizer: Any,
        edits: Sequence[Edit],
        *,
        frame: Frame = PLAIN,
        check_base: bool = True,
    ) -> EditResult:
        """The update that this editor predicts for some edits, their changes summed.
        The model itself is the same afterwards.

        Args:
            check_base: refuse a model other than the one it was trained on; without,
                the same model after other edits will do.

        Raises:
            EditorError: another model, or an editor that was never trained.
            EditError: edits empty, repeated, contradictory, or not tokenizable.
            UnsupportedModel, NonFiniteError, UpdateError.
        """
        with editing(model, tokenizer, edits, frame) as job:
            if check_base and job.fingerprint != self.base_fingerprint:
                raise EditorError(
                    f"the editor was trained on the model {self.base_fingerprint}, "
                    f"this one is {job.fingerprint}; load that one, or train an "
                    "editor for this one (or pass check_base=False)"
                )
            updates: dict[WeightAddress, RankKUpdate] = {}
            for start in range(0, len(edits), _TOGETHER):
                span = slice(start, start + _TOGETHER)
                with job.timed("gradients"):
                    batch = labelled(
                        job.adapter,
                        tokenizer,
                        job.prompts[span],
                        job.targets[span],
                        frame=frame,
                    )
                    found, _ = decomposed(job.adapter, batch, self.modules_edited)
                with job.timed("editor"), torch.no_grad():
                    changes = self.changes(found)
                    for address, name in zip(
                        self.addresses, self.modules_edited, strict=True
                    ):
                        update = _update(changes[name])
                        if address in updates:
                            update = updates[address].then(update)
                        # Many edits have more tokens than a weight has rows.
                        updates[address] = update.compact()
            recipe = {"name": "mend", **asdict(self.settings), "trained": self.about}
            return job.result(updates, recipe, "trained")

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file, whole or not at all.

        Raises:
            EditorError: it cannot be written.
        """
        return write_tensors(path, self.state_dict(), self.header(), EditorError)

    def header(self) -> dict[str, Any]:
        """All but the tensors, as plain data."""
        return {
            "format": FORMAT,
            "settings": asdict(self.settings),
            "addresses": [asdict(address) for address in self.addresses],
            "modules": self.modules_edited,
            "shapes": self.shapes,
            "base_fingerprint": self.base_fingerprint,
            "about": self.about,
        }

    @classmethod
    def load(cls, path: str | Path) -> Mend:
        """Reads a file that `save` wrote.

        Raises:
            EditorError: missing, not an editor, or damaged.
        """
        with reading(path, "not a MEND editor", EditorError):
            tensors, header = read_tensors(path, FORMAT)
            settings = header["settings"]
            found = cls(
                MendSettings(**{**settings, "layers": tuple(settings["layers"])}),
                [
                    WeightAddress(**{**each, "aliases": tuple(each["aliases"])})
                    for each in header["addresses"]
                ],
                header["modules"],
                [(rows, columns) for rows, columns in header["shapes"]],
                header["base_fingerprint"],
                header["about"],
            )
            found.load_state_dict(tensors)
            odd = [name for name, each in tensors.items() if not _finite(each)]
            if odd:
                raise EditorError(f"{odd[0]} holds NaN or infinity")
            return found


def _update(change: Factors) -> RankKUpdate:
    """All rows' changes of one map as an update, without what is zero."""
    x, delta = (each.flatten(0, 1) for each in (change.x, change.delta))
    real = (x != 0).any(-1) & (delta != 0).any(-1)
    return RankKUpdate(delta[real].T.contiguous(), x[real].contiguous())


def _scattered(rows: Tensor, where: Tensor) -> Tensor:
    """[…, d] with rows where `where` says so, zero elsewhere."""
    empty = rows.new_zeros(*where.shape, rows.shape[-1])
    return empty.index_put(tuple(where.to(rows.device).nonzero().T), rows)


def _named(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
