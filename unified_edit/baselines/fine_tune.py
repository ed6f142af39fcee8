"""Fine-tuning as an editor: gradient descent on one layer's down-projection.

FT descends on an edit's loss until it is small; FT-L also keeps every entry of the
change within ±ε. The change is optimised apart from the weight it is added to, in
float32: nothing is rounded on the way, and the model's weights are never written.

Source: Meng et al. 2022 (ROME), section 3 and appendix (FT, FT+L); Zhu et al. 2020. The
published code reads all of a target's tokens from the prompt's last position; here each
is read after those before it, as the paper's −log P[o* | p] says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from unified_edit.algebra.update import RankKUpdate
from unified_edit.baselines.outcome import Editing, check_layers, editing
from unified_edit.edits import Edit
from unified_edit.engine import EditResult
from unified_edit.errors import EditorError, NonFiniteError
from unified_edit.model.frames import PLAIN, Frame
from unified_edit.model.gradients import Labelled, labelled, nll, with_matrices

PUBLISHED_CONSTRAINT = 5e-4
"""ε of FT-L on GPT2-XL in ROME's comparison."""


@dataclass(frozen=True)
class Descent:
    """How fine-tuning descends. The defaults are those of ROME's comparison."""

    steps: int = 25
    """Passes over the edits, at most."""
    learning_rate: float = 5e-4
    """Adam's."""
    loss_threshold: float = 1e-2
    """In nats a token: a batch below it is left alone, and all below it are done."""
    batch: int = 64
    """Edits in one step of the optimizer."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not self.learning_rate > 0:
            raise EditorError("steps, batch and learning_rate must be positive")
        if not self.loss_threshold >= 0:
            raise EditorError("loss_threshold must not be negative")


@dataclass(frozen=True)
class FineTuneSettings(Descent):
    """FT, or FT-L where the change is bounded."""

    norm_constraint: float | None = None
    """ε, the largest change of an entry; None for FT."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm_constraint is not None and not self.norm_constraint > 0:
            raise EditorError("norm_constraint must be positive, or None")


def fine_tune(
    model: nn.Module,
    tokenizer: Any,
    edits: Sequence[Edit],
    layers: Sequence[int],
    settings: FineTuneSettings | None = None,
    *,
    frame: Frame = PLAIN,
    progress: bool = False,
) -> EditResult:
    """The update that fine-tuning finds for some edits: dense, in the same artifact.
    The model itself is the same afterwards.

    Args:
        layers: whose down-projections are trained; ROME's comparison has one.

    Raises:
        EditorError: layers that the model does not have, or a loss that is not finite.
        EditError: edits empty, repeated, contradictory, or not tokenizable.
        UpdateError: a layer's change is lost in rounding to its weight's dtype.
        UnsupportedModel, NonFiniteError.
    """
    chosen = settings or FineTuneSettings()
    with editing(model, tokenizer, edits, frame) as job:
        adapter = job.adapter
        check_layers(layers, adapter.layer_count)
        modules = {layer: adapter.key_module(layer) for layer in layers}
        changes = {
            name: torch.zeros(
                adapter.matrix(layer).shape,
                device=adapter.weight(layer).device,
                requires_grad=True,
            )
            for layer, name in modules.items()
        }

        @torch.no_grad()
        def bound() -> None:
            if (most := chosen.norm_constraint) is not None:
                for change in changes.values():
                    change.clamp_(-most, most)

        with job.timed("descent"):
            notes = descend(
                job,
                list(changes.values()),
                chosen,
                lambda: with_matrices(model, changes),
                after_step=bound,
                progress=progress,
            )
        updates = {
            adapter.address(layer): RankKUpdate.of_matrix(changes[name].detach())
            for layer, name in modules.items()
        }
        name = "ft" if chosen.norm_constraint is None else "ft_l"
        recipe = {"name": name, "layers": list(layers), **asdict(chosen)}
        return job.result(updates, recipe, "unvalidated", notes)


def descend(
    job: Editing,
    parameters: Sequence[Tensor],
    settings: Descent,
    changed: Callable[[], AbstractContextManager[None]],
    *,
    after_step: Callable[[], None] = lambda: None,
    progress: bool = False,
) -> list[str]:
    """Adam on the edits' mean loss, batch by batch, until it is small; what to note.

    Args:
        changed: the model computes with the parameters inside.
        after_step: called after each step of the optimizer.

    Raises:
        EditorError: logits that are not finite.
    """
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    batches = list(_batches(job, settings.batch))
    with torch.enable_grad():
        for step in tqdm(range(settings.steps), "steps", disable=not progress):
            total = 0.0
            for batch in batches:
                try:
                    with changed():
                        loss = nll(job.adapter, batch).mean()
                except NonFiniteError as error:
                    raise EditorError(
                        f"step {step}: the logits are not finite any more; lower "
                        "learning_rate"
                    ) from error
                now = loss.item()
                total += now * len(batch)
                if now >= settings.loss_threshold:
                    optimizer.zero_grad()
                    torch.autograd.backward(loss)
                    optimizer.step()
                    after_step()
            if total / len(job.edits) < settings.loss_threshold:
                return []
    return [
        f"the loss was {total / len(job.edits):.2g} before the last of "
        f"{settings.steps} steps, not yet below {settings.loss_threshold:g}"
    ]


def _batches(job: Editing, size: int) -> Iterator[Labelled]:
    for start in range(0, len(job.edits), size):
        span = slice(start, start + size)
        yield labelled(
            job.adapter,
            job.tokenizer,
            job.prompts[span],
            job.targets[span],
            frame=job.frame,
        )
