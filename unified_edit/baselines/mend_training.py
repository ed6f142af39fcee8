"""Training of a MEND editor.

Each edit is made by the editor on weights of its own, and two losses are read from what
comes out: how unlikely the target is after the prompt or a rephrasing (L_e), and how
far what the model says of unrelated text is from what it said before (L_loc). The base
is frozen, and so are the gradients that the editor reads: it is trained, never what
made them.

Source: Mitchell et al. 2022 (MEND), section 3.3, and its appendix for the settings.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from covariance_cache.capture import evaluating
from covariance_cache.statistics import library_version
from unified_edit.baselines.mend import Mend, MendSettings
from unified_edit.edits import Record
from unified_edit.errors import EditorError, NonFiniteError
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.gradients import (
    decomposed,
    labelled,
    logits_of,
    nll,
    with_changes,
)
from unified_edit.model.hooks import frozen, wide
from unified_edit.model.prompts import PaddedRows, check_rows, pad, tokenize
from unified_edit.tensor_file import read_tensors, reading, write_tensors

_STATE = "unified-edit/mend-training/1"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class TrainingSettings:
    """How an editor is trained. The defaults are the published ones."""

    steps: int = 100_000
    """Of the optimizer, at most."""
    edits: int = 1
    """In one pass; each is made alone, on weights of its own."""
    accumulate: int = 10
    """Passes whose gradients make one step."""
    learning_rate: float = 1e-6
    """Adam's, of the editor."""
    step_size_rate: float = 1e-4
    """Adam's, of the step sizes α."""
    clip: float = 100.0
    """Largest norm of a step's gradient."""
    edit_weight: float = 0.1
    """c_edit, of L_e."""
    locality_weight: float = 1.0
    """c_loc, of L_loc."""
    neighbors: float = 0.0
    """Share of the pieces of unrelated text that are, instead, about neighbours: a
    record's neighbourhood prompt and the true object. 0 as published."""
    tokens: int = 64
    """Of a piece of unrelated text, at most."""
    validate_every: int = 100
    """Steps between looks at the validation records; training is saved there, too."""
    patience: int = 2_000
    """Steps without a better validation loss, after which training ends."""
    seed: int = 0
    """Of the order of edits and texts."""

    def __post_init__(self) -> None:
        counts = ("steps", "edits", "accumulate", "tokens", "validate_every")
        small = [n for n in (*counts, "patience") if getattr(self, n) < 1]
        if small:
            raise EditorError(f"{small[0]} must be at least 1")
        rates = ("learning_rate", "step_size_rate", "clip")
        if not all(getattr(self, name) > 0 for name in rates):
            raise EditorError(f"{', '.join(rates)} must be positive")
        if not (self.edit_weight >= 0 and self.locality_weight >= 0):
            raise EditorError("edit_weight and locality_weight must not be negative")
        if not 0 <= self.neighbors <= 1:
            raise EditorError("neighbors is a share, from 0 to 1")


@dataclass(frozen=True)
class Losses:
    """What an editor is judged by: means over edits."""

    edit: float
    """L_e, in nats a token."""
    locality: float
    """L_loc, in nats a token."""
    said: float
    """Share of the rephrasings whose target is less than one nat a token away."""

    def total(self, settings: TrainingSettings) -> float:
        """What training minimises."""
        weighted = settings.edit_weight * self.edit
        return weighted + settings.locality_weight * self.locality


def train_mend(
    model: nn.Module,
    tokenizer: Any,
    records: Sequence[Record],
    validation: Sequence[Record],
    texts: Sequence[str],
    settings: TrainingSettings | None = None,
    editor: MendSettings | None = None,
    *,
    state: str | Path | None = None,
    progress: bool = False,
) -> Mend:
    """Trains an editor; the one of the least validation loss is returned.

    Args:
        records: edits with paraphrases; keep them apart from those to be edited later.
        validation: others, on which training is stopped.
        texts: unrelated ones.
        editor: what it is made of.
        state: file that keeps the training, so that it goes on where it was; None for
            none. The same steps follow, bit for bit. `steps` and `patience` may be
            others than before.

    Raises:
        EditorError: no records, one without paraphrases, no texts, the state of another
            training, or a loss that is not finite.
        EditError, UnsupportedModel, NonFiniteError.
    """
    settings = settings or TrainingSettings()
    for name, given in (("training", records), ("validation", validation)):
        if not given:
            raise EditorError(f"there are no {name} records; give some")
        for index, record in enumerate(given):
            which = f"{name} record {index} ({record.edit.text!r})"
            if not record.paraphrase_prompts:
                raise EditorError(
                    f"{which} has no paraphrases, which the editor learns from"
                )
            if settings.neighbors and not record.neighborhood_prompts:
                raise EditorError(
                    f"{which} has no neighbourhood prompts; leave it out, or set "
                    "neighbors to 0"
                )
    adapter = ModelAdapter.of(model)
    adapter.check_finite()
    pieces = _pieces(adapter, tokenizer, texts, settings.tokens)
    if not pieces:
        raise EditorError("there is no unrelated text; give some")
    job = _Job(adapter, tokenizer, records, validation, pieces, settings)
    training = _Training(Mend.of(model, editor), settings, job.digest())
    if state is not None and Path(state).exists():
        training.load(state)
    with (
        frozen(model),
        evaluating(model),
        tqdm(
            total=settings.steps,
            initial=training.step,
            desc="training",
            disable=not progress,
        ) as bar,
    ):
        while not training.ended:
            training.take(job)
            bar.update()
            if training.step % settings.validate_every == 0:
                found = training.judge(job)
                bar.set_postfix(edit=f"{found.edit:.3f}", local=f"{found.locality:.4f}")
                if state is not None:
                    training.save(state)
        if not training.history or training.history[-1][0] != training.step:
            training.judge(job)
    return training.best()


@dataclass(frozen=True, eq=False)
class _Job:
    """What an editor is trained on."""

    adapter: ModelAdapter
    tokenizer: Any
    records: Sequence[Record]
    validation: Sequence[Record]
    pieces: Sequence[tuple[int, ...]]
    """Unrelated text, in ids."""
    settings: TrainingSettings

    def digest(self) -> str:
        """Of all that a step depends on, but for the model: not of when to end."""
        settings = asdict(self.settings)
        del settings["steps"], settings["patience"]
        content = [
            *(asdict(record) for record in (*self.records, *self.validation)),
            len(self.records),
            self.pieces,
            settings,
        ]
        text = json.dumps(content, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def passes(self, step: int) -> Iterator[tuple[list[Record], list[str], list[Any]]]:
        """Edits, a way to ask each, and as many pieces of text, for each pass of a
        step; a function of the seed and the step."""
        rng = random.Random(f"mend {self.settings.seed} {step}")
        for _ in range(self.settings.accumulate):
            count = min(self.settings.edits, len(self.records))
            chosen = rng.sample(self.records, count)
            said = [rng.choice(_ways_to_ask(record)) for record in chosen]
            pieces = rng.choices(self.pieces, k=count)
            for place, record in enumerate(chosen):
                if self.settings.neighbors and rng.random() < self.settings.neighbors:
                    pieces[place] = self.neighbor(record, rng.random())
            yield chosen, said, pieces

    def judged(self) -> Iterator[tuple[list[Record], list[str], list[Any]]]:
        """The validation records, with their own prompt or the first rephrasing,
        always the same."""
        size, pieces = 16, self.pieces
        stride = max(1, len(pieces) // len(self.validation))
        for start in range(0, len(self.validation), size):
            chosen = list(self.validation[start : start + size])
            said, kept, share = [], [], self.settings.neighbors
            for place, record in enumerate(chosen, start):
                said.append(_ways_to_ask(record)[place % 2])
                if int((place + 1) * share) > int(place * share):
                    kept.append(self.neighbor(record, 0.0))
                else:
                    kept.append(pieces[place * stride % len(pieces)])
            yield chosen, said, kept

    def neighbor(self, record: Record, where: float) -> tuple[int, ...]:
        """What is true of one of a record's neighbours, in ids."""
        prompts = record.neighborhood_prompts
        text = f"{prompts[int(where * len(prompts))]} {record.target_true}"
        return _pieces(self.adapter, self.tokenizer, [text], self.settings.tokens)[0]

    def losses(
        self,
        mend: Mend,
        records: Sequence[Record],
        rephrased: Sequence[str],
        pieces: Sequence[tuple[int, ...]],
        *,
        observe: bool,
    ) -> tuple[Tensor, Tensor]:
        """([n], [n]): L_e and L_loc of each edit, with the editor's graph."""
        adapter, tokenizer = self.adapter, self.tokenizer
        targets = [record.edit.target for record in records]
        asked = [record.edit.text for record in records]
        batch = labelled(adapter, tokenizer, asked, targets)
        found, _ = decomposed(adapter, batch, mend.modules_edited)
        changes = mend.changes(found, observe=observe)
        again = labelled(adapter, tokenizer, rephrased, targets)
        rows = pad(pieces, adapter.device)
        with torch.no_grad():
            before = logits_of(adapter, rows)
        with with_changes(adapter.model, changes):
            wrong = nll(adapter, again)
            after = logits_of(adapter, rows)
        return wrong, _divergence(before, after, rows)


def _divergence(before: Tensor, after: Tensor, rows: PaddedRows) -> Tensor:
    """[rows] mean over tokens of KL(before ‖ after)."""
    old, new = (wide(each).log_softmax(-1) for each in (before, after))
    each = (old.exp() * (old - new)).sum(-1)
    mask = rows.mask.to(each.device)
    return (each * mask).sum(1) / mask.sum(1)


@dataclass(eq=False)
class _Training:
    """An editor on its way."""

    mend: Mend
    settings: TrainingSettings
    digest: str
    step: int = 0
    history: list[tuple[int, float, float, float]] = field(default_factory=list)
    """(step, L_e, L_loc, share said) of the validation records."""

    def __post_init__(self) -> None:
        mend, chosen = self.mend, self.settings
        own = [p for n, p in mend.named_parameters() if n != "step_sizes"]
        self.optimizer = torch.optim.Adam(
            [
                {"params": own, "lr": chosen.learning_rate},
                {"params": [mend.step_sizes], "lr": chosen.step_size_rate},
            ]
        )
        self.kept = _copied(mend)

    @property
    def ended(self) -> bool:
        """All steps are taken, or none has been better for long."""
        waited = self.step - self.best_step if self.history else 0
        return self.step >= self.settings.steps or waited >= self.settings.patience

    @property
    def best_step(self) -> int:
        """Of the least validation loss."""
        return min(self.history, key=self._total)[0]

    def _total(self, entry: tuple[int, float, float, float]) -> float:
        return Losses(*entry[1:]).total(self.settings)

    def take(self, job: _Job) -> None:
        """One step of the optimizer."""
        chosen = self.settings
        self.optimizer.zero_grad()
        for records, rephrased, pieces in job.passes(self.step):
            try:
                wrong, moved = job.losses(
                    self.mend, records, rephrased, pieces, observe=True
                )
            except NonFiniteError as error:
                raise EditorError(
                    f"step {self.step}: an edited model's logits are not finite; lower "
                    "the learning rates"
                ) from error
            edit = chosen.edit_weight * wrong.mean()
            loss = (edit + chosen.locality_weight * moved.mean()) / chosen.accumulate
            torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.mend.parameters(), chosen.clip)
        self.optimizer.step()
        self.step += 1

    @torch.no_grad()
    def judge(self, job: _Job) -> Losses:
        """Looks at the validation records, and keeps the editor if it is the best."""
        wrong, moved = [], []
        for records, rephrased, pieces in job.judged():
            here = job.losses(self.mend, records, rephrased, pieces, observe=False)
            wrong.append(here[0])
            moved.append(here[1])
        edit, local = torch.cat(wrong).double(), torch.cat(moved).double()
        found = Losses(
            float(edit.mean()), float(local.mean()), float((edit < 1).double().mean())
        )
        self.history.append((self.step, found.edit, found.locality, found.said))
        if self.best_step == self.step:
            self.kept = _copied(self.mend)
        return found

    def best(self) -> Mend:
        """The editor of the least validation loss, with what was found on the way."""
        at = min(self.history, key=self._total)
        self.mend.load_state_dict(self.kept)
        self.mend.about = {
            "settings": asdict(self.settings),
            "data": self.digest,
            "steps": self.step,
            "best": dict(zip(("step", "edit", "locality", "said"), at, strict=True)),
            "version": library_version(),
        }
        return self.mend

    def save(self, path: str | Path) -> None:
        """Keeps the training as a file, whole or not at all."""
        tensors = {f"now/{name}": each for name, each in _copied(self.mend).items()}
        tensors |= {f"best/{name}": each for name, each in self.kept.items()}
        for name, parameter in self.mend.named_parameters():
            held = self.optimizer.state.get(parameter, {})
            tensors |= {f"{key}/{name}": held[key] for key in _MOMENTS if key in held}
        header = {**self._expected(), "step": self.step, "history": self.history}
        write_tensors(path, tensors, header, EditorError)

    def load(self, path: str | Path) -> None:
        """Goes on where `save` was called.

        Raises:
            EditorError: no such state, or another training's.
        """
        with reading(path, "cannot be gone on with", EditorError):
            tensors, header = read_tensors(path, _STATE)
            # As JSON has it: tuples are lists there.
            expected = json.loads(json.dumps(self._expected()))
            odd = [key for key, value in expected.items() if header.get(key) != value]
            if odd:
                raise EditorError(
                    f"it is another training's, with other {', '.join(odd)}; remove "
                    "it to begin anew"
                )
            parts: dict[str, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                part, _, own = name.partition("/")
                parts.setdefault(part, {})[own] = tensor
            self.mend.load_state_dict(parts["now"])
            self.kept = parts["best"]
            for name, parameter in self.mend.named_parameters():
                held = {key: parts[key][name] for key in _MOMENTS}
                self.optimizer.state[parameter] = {
                    # Adam counts on the CPU, wherever the rest is.
                    key: each if key == "step" else each.to(parameter.device)
                    for key, each in held.items()
                }
            self.step = header["step"]
            self.history = [tuple(each) for each in header["history"]]

    def _expected(self) -> Mapping[str, Any]:
        """What the state of this training says."""
        editor = {k: v for k, v in self.mend.header().items() if k != "about"}
        return {**editor, "format": _STATE, "data": self.digest}


def _copied(mend: Mend) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in mend.state_dict().items()}


def _pieces(
    adapter: ModelAdapter, tokenizer: Any, texts: Sequence[str], tokens: int
) -> list[tuple[int, ...]]:
    """The beginnings of texts, in ids: those with something to predict."""
    limit = getattr(adapter.config, "max_position_embeddings", None)
    most = tokens if limit is None else min(tokens, limit)
    found = [ids[:most] for ids, _ in tokenize(tokenizer, texts)]
    found = [ids for ids in found if len(ids) > 1]
    check_rows(adapter, found)
    return found


def _ways_to_ask(record: Record) -> tuple[str, ...]:
    """What shall say the target: the edit's own prompt and its rephrasings. Of
    rephrasings alone an editor may learn what tells them from other prompts."""
    return (record.edit.text, *record.paraphrase_prompts)
