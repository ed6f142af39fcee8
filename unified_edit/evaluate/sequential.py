"""Sequential editing, measured: what of its edits, of its other facts and of its skills
a model keeps, checkpoint by checkpoint.

A run is a folder: `run.json` (settings and fingerprints), `checkpoints.jsonl` (a line a
checkpoint), `steps.jsonl` (a line a step) and `session.safetensors`, from which it is
resumed. `report.py` reads it.
"""

from __future__ import annotations

import json
import os
import platform
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from covariance_cache.statistics import library_version
from unified_edit.edits import Record
from unified_edit.errors import EditError, InfeasibleEdits
from unified_edit.evaluate.counterfact import evaluate_counterfact
from unified_edit.evaluate.generations import (
    Sampling,
    generation_entropy,
    sampled_texts,
)
from unified_edit.evaluate.intervals import bootstrap, mean_of
from unified_edit.evaluate.onset import FEWEST_EDITS
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.perplexity import Canary
from unified_edit.model.scoring import score
from unified_edit.model.targets import TargetStore
from unified_edit.session import EditSession
from unified_edit.session_state import SequenceState, Step

FORMAT = "unified-edit/run/1"
_RECENT = 20
"""Edits that are scored as the current ones, where a batch has fewer."""
_REPORTED = (
    *("s", "es", "ps", "ns"),
    *("rewrite_accuracy", "paraphrase_accuracy", "neighborhood_accuracy"),
)
_STEPS = (1, 2, 5)
_GENERATED = 30
"""Tokens of each text whose entropy is measured, its prompt among them."""

Pairs = Sequence[tuple[str, str]]
Triple = list[float]
"""Mean, low, high of a 95 % interval."""


@dataclass(frozen=True)
class Probes:
    """What is asked at a checkpoint beside the edits themselves; empty where there is
    nothing of the kind."""

    unrelated: Pairs = ()
    """(prompt, answer) of facts that no edit touches."""
    skills: Mapping[str, Pairs] = field(default_factory=dict)
    """Skill → (prompt, answer)."""
    same_subject: Mapping[str, Sequence[tuple[str, str, str]]] = field(
        default_factory=dict
    )
    """Subject → (relation, prompt, answer) of the facts about it; those whose relation
    was edited are not asked."""
    generation: Sequence[str] = ()
    """Prompts of the texts whose entropy is measured."""

    @classmethod
    def read(cls, path: str | Path) -> Probes:
        """From a JSON object with these fields.

        Raises:
            EditError: unreadable, or of another form.
        """
        try:
            data = json.loads(Path(path).read_bytes())
            unknown = set(data) - set(cls.__dataclass_fields__)
            if unknown:
                raise ValueError(f"unknown fields {sorted(unknown)}")
            return cls(
                unrelated=[_texts(each, 2) for each in data.get("unrelated", [])],  # type: ignore[misc]
                skills={
                    name: [_texts(each, 2) for each in pairs]  # type: ignore[misc]
                    for name, pairs in data.get("skills", {}).items()
                },
                same_subject={
                    name: [_texts(each, 3) for each in facts]  # type: ignore[misc]
                    for name, facts in data.get("same_subject", {}).items()
                },
                generation=[*_texts(data.get("generation", []))],
            )
        except OSError as error:
            raise EditError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise EditError(
                f"{path}: not the probes of a run: {error}; expected an object with "
                '"unrelated": [[prompt, answer], …], "skills": {name: [[prompt, '
                'answer], …]}, "same_subject": {subject: [[relation, prompt, '
                "answer], …]}, "
                '"generation": [prompt, …], each as you like'
            ) from error


@dataclass(frozen=True)
class Plan:
    """How a sequence is run and measured."""

    batch_size: int = 1
    every: int | None = None
    """Edits between checkpoints, once there are as many; until then, and always with
    None, they come after 1, 2, 5, 10, 20, 50, … steps."""
    at_most: int | None = None
    """Earlier edits that are scored at a checkpoint, a seeded sample of them if there
    are more; None scores all."""
    stop_below: float | None = None
    """The run ends at a checkpoint where S over all edits, ten at least, is below."""
    seed: int = 0
    """Of samples and intervals."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "every", "at_most"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise EditError(f"{name} must be a whole number above 0, not {value!r}")

    def is_checkpoint(self, step: int, steps: int) -> bool:
        """Whether there is one after this step, counted from 1."""
        if step == steps:
            return True
        if self.every is not None and step * self.batch_size >= self.every:
            return step * self.batch_size % self.every < self.batch_size
        digits = str(step)
        return int(digits[0]) in _STEPS and not digits[1:].strip("0")


def run_sequence(
    session: EditSession,
    records: Sequence[Record],
    plan: Plan,
    out: str | Path,
    *,
    probes: Probes | None = None,
    canary: Canary | None = None,
    about: Mapping[str, Any] | None = None,
    target_cache: TargetStore | None = None,
    seconds: float | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Edits records in, batch by batch, and measures; what is in `out` already is gone
    on with, so that an interrupted run ends as it would have.

    Args:
        session: a fresh one; or, to go on with a run, `EditSession.resume` of its
            `session.safetensors`.
        out: the run's folder, made if it is not there.
        canary: held-out text for perplexity; the session's own, or another.
        about: names and fingerprints for `run.json`.
        seconds: to begin no further step after so many; the run can be gone on with.

    Returns:
        The checkpoints, as `checkpoints.jsonl` has them.

    Raises:
        EditError: no records, or a folder that holds another run.
    """
    if not records:
        raise EditError("there are no records to edit in")
    run = _Run(session, records, plan, Path(out), probes or Probes(), canary)
    run.open(dict(about or {}))
    begun = time.perf_counter()
    steps = -(-len(records) // plan.batch_size)
    with tqdm(
        total=steps, initial=session.state.steps, desc="steps", disable=not progress
    ) as bar:
        if run.due(session.state.steps, steps):
            run.checkpoint()
        while session.state.steps < steps and not run.collapsed():
            run.step(target_cache)
            bar.update()
            late = seconds is not None and time.perf_counter() - begun > seconds
            if late or plan.is_checkpoint(session.state.steps, steps):
                run.checkpoint()
                s = _s(run.checkpoints[-1])
                bar.set_postfix(S="-" if s is None else f"{s:.3f}", refresh=False)
            if late:
                break
    return run.checkpoints


def _s(checkpoint: Mapping[str, Any]) -> float | None:
    """S over all edits so far; None without edits, or where none of them has
    paraphrases, or neighbours, to be asked."""
    scores = checkpoint["earlier"] or {}
    mean: float | None = scores.get("s", (None,))[0]
    return mean


@dataclass
class _Run:
    session: EditSession
    records: Sequence[Record]
    plan: Plan
    out: Path
    probes: Probes
    canary: Canary | None
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def open(self, about: dict[str, Any]) -> None:
        """Takes up what an earlier process left, or begins."""
        state, recipe = self.session.state, self.session.state.recipe
        settings = {
            "format": FORMAT,
            **{"name": recipe.name, "model": None, "records": None},
            "version": library_version(),
            "versions": (
                f"Python {platform.python_version()}, torch {torch.__version__}, "
                f"transformers {transformers.__version__}"
            ),
            **about,
            "base_fingerprint": state.base_fingerprint,
            "recipe": recipe.as_dict(),
            "statistics": {str(k): v for k, v in state.statistics.items()},
            **asdict(self.plan),
            "edits": len(self.records),
            "guard": state.guard.as_dict(),
        }
        path = self.out / "run.json"
        settings = json.loads(json.dumps(settings))
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if path.exists():
                known = json.loads(path.read_bytes())
                odd = sorted(
                    k
                    for k in {*known, *settings} - {"machine", "version", "versions"}
                    if known.get(k) != settings.get(k)
                )
                if odd:
                    raise EditError(
                        f"{self.out}: holds a run that differs in {', '.join(odd)}; "
                        "name another folder"
                    )
            elif any(self.out.iterdir()):
                raise EditError(f"{self.out}: holds something else; name a new folder")
            else:
                _write(path, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
            # What came after the last saved state is done again.
            kept = state.steps
            self._check_state(kept)
            self.checkpoints = _keep(self.out / "checkpoints.jsonl", kept)
            self.steps = _keep(self.out / "steps.jsonl", kept)
        except OSError as error:
            raise EditError(f"{self.out}: cannot be used: {error}") from error
        if len(self.steps) != kept:
            raise EditError(
                f"{self.out}: its session has made {kept} steps, steps.jsonl has "
                f"{len(self.steps)}; begin the run anew in another folder"
            )
        if self.checkpoints:
            self.seconds = self.checkpoints[-1]["seconds"]

    def _check_state(self, steps: int) -> None:
        """Refuses a session that is not the one that the folder was left with."""
        saved, lines = self.out / "session.safetensors", self.out / "steps.jsonl"
        known = SequenceState.load(saved).steps if saved.exists() else 0
        if known != steps or (not saved.exists() and lines.exists()):
            raise EditError(
                f"{self.out}: holds a run, whose state is "
                f"{f'of {known} steps' if saved.exists() else 'missing'}, the session "
                f"has made {steps}; resume the saved one, or name another folder"
            )

    def due(self, step: int, steps: int) -> bool:
        """Whether a checkpoint is missing where the run was left."""
        measured = bool(self.checkpoints) and self.checkpoints[-1]["step"] == step
        return not measured and (step == 0 or self.plan.is_checkpoint(step, steps))

    def collapsed(self) -> bool:
        """Whether S is so low that the run ends."""
        limit, last = self.plan.stop_below, self.checkpoints[-1]
        if limit is None or last["edits"] < FEWEST_EDITS:
            return False
        s = _s(last)
        return s is not None and s < limit

    def step(self, target_cache: TargetStore | None) -> None:
        """Edits the next batch in, and writes its line."""
        begun = time.perf_counter()
        size, done = self.plan.batch_size, self.session.state.steps
        batch = self.records[done * size : (done + 1) * size]
        try:
            step = self.session.step(
                [record.edit for record in batch], target_cache=target_cache
            )
        except InfeasibleEdits as error:
            step = self.session.skip([record.edit for record in batch], str(error))
        self.seconds += time.perf_counter() - begun
        self.steps.append(_step_line(done + 1, step))
        _append(self.out / "steps.jsonl", self.steps[-1])

    def checkpoint(self) -> None:
        """Measures the model as it is, saves the state and writes a line."""
        self.session.save(self.out / "session.safetensors")
        made = self._made()
        standing = _standing(made)
        size = max(self.plan.batch_size, _RECENT)
        with self.session.finished():
            line = {
                "edits": len(made),
                "step": self.session.state.steps,
                "seconds": self.seconds,
                "current": self._scores(_standing(made[-size:])),
                "earlier": self._scores(self._some(standing)),
                **self._others(standing),
                "drift": {str(k): v for k, v in self.session.drift.items()},
                "guard": {
                    kind: sum(step["decision"] == kind for step in self.steps)
                    for kind in ("accepted", "warned", "shrunk", "refused")
                },
            }
        self.checkpoints.append(line)
        _append(self.out / "checkpoints.jsonl", line)

    def _made(self) -> list[Record]:
        """The records that were edited in, in their order."""
        size = self.plan.batch_size
        return [
            record
            for index, step in enumerate(self.steps)
            if step["decision"] != "refused"
            for record in self.records[index * size : (index + 1) * size]
        ]

    def _some(self, records: Sequence[Record]) -> Sequence[Record]:
        most = self.plan.at_most
        if most is None or len(records) <= most:
            return records
        chosen = random.Random(f"{self.plan.seed} {len(records)}")
        return chosen.sample(records, most)

    def _scores(self, records: Sequence[Record]) -> dict[str, Triple] | None:
        if not records:
            return None
        found = evaluate_counterfact(
            self.session.model,
            self.session.tokenizer,
            records,
            generations=False,
            frame=self.session.state.contexts.frame,
        ).intervals(self.plan.seed)
        return {
            name: [found[name].mean, *found[name].as_list()]
            for name in _REPORTED
            if name in found
        }

    def _others(self, standing: Sequence[Record]) -> dict[str, Any]:
        """What is not about the edits themselves."""
        probes, adapter = self.probes, ModelAdapter.of(self.session.model)
        edited: dict[str, set[str]] = {}
        for record in standing:
            edited.setdefault(record.edit.subject, set()).add(record.relation)
        same = [
            (prompt, answer)
            for subject, relations in edited.items()
            for relation, prompt, answer in probes.same_subject.get(subject, ())
            if relation not in relations
        ]
        skills = {name: self._said(pairs) for name, pairs in probes.skills.items()}
        entropy = None
        if probes.generation:
            texts = sampled_texts(
                adapter,
                self.session.tokenizer,
                probes.generation,
                Sampling(tokens=_GENERATED, seed=self.plan.seed),
            )
            entropy = mean_of([generation_entropy(text) for text in texts])
        return {
            "same_subject": self._share(same),
            "unrelated": self._share(probes.unrelated),
            "skills": {name: mean_of(said) for name, said in skills.items()},
            "perplexity": self.canary and self.canary.perplexity(adapter),
            "entropy": entropy,
        }

    def _said(self, pairs: Pairs) -> list[float]:
        found = score(
            ModelAdapter.of(self.session.model),
            self.session.tokenizer,
            [prompt for prompt, _ in pairs],
            [answer for _, answer in pairs],
        )
        return [float(each.argmax) for each in found]

    def _share(self, pairs: Pairs) -> Triple | None:
        if not pairs:
            return None
        found = bootstrap({"share": self._said(pairs)}, seed=self.plan.seed)["share"]
        return [found.mean, *found.as_list()]


def _standing(records: Iterable[Record]) -> list[Record]:
    """The records whose fact no later one changed again."""
    last = {(r.edit.subject, r.relation or r.edit.text): r for r in records}
    return list(last.values())


def _step_line(number: int, step: Step) -> dict[str, Any]:
    readings = None if step.readings is None else asdict(step.readings)
    said = None
    if step.report is not None:
        said = [outcome.says_target for outcome in step.report.outcomes]
    return {
        "step": number,
        "edits": [edit.as_dict() for edit in step.edits],
        "decision": step.decision,
        "reasons": list(step.reasons),
        "scale": step.scale,
        "says_target": said,
        **(readings or {}),
        "seconds": dict(step.seconds),
    }


def _texts(values: Any, count: int | None = None) -> tuple[str, ...]:
    found = tuple(values)
    if isinstance(values, str) or not all(isinstance(each, str) for each in found):
        raise ValueError(f"{values!r} is no list of texts")
    if count is not None and len(found) != count:
        raise ValueError(f"{values!r} has not {count} texts")
    return found


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _write(path: Path, text: str) -> None:
    staged = path.with_name(f".{path.name}.tmp")
    staged.write_text(text, encoding="utf-8")
    os.replace(staged, path)


def _keep(path: Path, steps: int) -> list[dict[str, Any]]:
    """The lines of a file up to a step; the others, and one that was cut off, go."""
    if not path.exists():
        return []
    found = [line for line in _whole_lines(path.read_bytes()) if line["step"] <= steps]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found)
    _write(path, text)
    return found


def _whole_lines(data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.split(b"\n")[:-1]:
        try:
            yield json.loads(line)
        except ValueError:
            return
