"""A world whose every fact is known, read from its folder of plain data: what a model
recalls of it, which skills it has, and what edits left of both."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from unified_edit.edits import Edit, Record, fill, read_records
from unified_edit.errors import EditError
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.scoring import score


@dataclass(frozen=True)
class World:
    """Facts, templates, records and skills of an embedded world."""

    facts: tuple[tuple[str, str, str], ...]
    """(subject, relation, object)"""
    templates: dict[str, tuple[str, ...]]
    """relation → prompts with `{}` for the subject"""
    kinds: dict[str, str]
    """relation → kind of its subjects"""
    objects: dict[str, tuple[str, ...]]
    """relation → what its facts' objects are drawn from"""
    edit_templates: int
    """As many templates of a relation, the first, serve edits, the rest paraphrases."""
    paraphrase_prefixes: tuple[str, ...]
    """Sentences that stand before paraphrases."""
    skills: dict[str, tuple[tuple[str, str], ...]]
    """skill → (prompt, answer)"""
    records: tuple[Record, ...]
    corpus: Path
    """Text for key statistics."""

    @classmethod
    def load(cls, folder: str | Path) -> World:
        """Reads `world.json`, `records.json`, `skills.jsonl`, `corpus.txt`.

        Raises:
            EditError: a file is missing or malformed.
        """
        folder = Path(folder)
        try:
            data = json.loads((folder / "world.json").read_text(encoding="utf-8"))
            lines = (folder / "skills.jsonl").read_text(encoding="utf-8").splitlines()
            skills: dict[str, list[tuple[str, str]]] = {}
            for entry in map(json.loads, lines):
                pair = (entry["prompt"], entry["target"])
                skills.setdefault(entry["skill"], []).append(pair)
            return cls(
                facts=tuple((s, r, o) for s, r, o in data["facts"]),
                templates={
                    name: tuple(relation["templates"])
                    for name, relation in data["relations"].items()
                },
                kinds={n: str(each["kind"]) for n, each in data["relations"].items()},
                objects={
                    n: tuple(each["objects"]) for n, each in data["relations"].items()
                },
                edit_templates=int(data["edit_templates"]),
                paraphrase_prefixes=tuple(data["paraphrase_prefixes"]),
                skills={name: tuple(pairs) for name, pairs in skills.items()},
                records=tuple(read_records(folder / "records.json")),
                corpus=folder / "corpus.txt",
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, EditError):
                raise
            raise EditError(
                f"{folder}: not a world's data folder ({error}); `make world` or "
                "examples/tinyworld/world.py writes one"
            ) from error

    def recall(self, model: nn.Module, tokenizer: Any) -> float:
        """Share of facts × templates that the model completes greedily."""
        pairs = [
            (fill(template, subject)[0], answer)
            for subject, relation, answer in self.facts
            for template in self.templates[relation]
        ]
        return _said(model, tokenizer, pairs)

    def skill_scores(self, model: nn.Module, tokenizer: Any) -> dict[str, float]:
        """For each skill, the share of exercises completed greedily."""
        return {
            name: _said(model, tokenizer, pairs) for name, pairs in self.skills.items()
        }

    def same_subject(self, records: Sequence[Record]) -> list[tuple[str, str]]:
        """(prompt, answer) of the other facts about the records' subjects."""
        edited = {(record.edit.subject, record.relation) for record in records}
        subjects = {subject for subject, _ in edited}
        return self.prompts(
            fact
            for fact in self.facts
            if fact[0] in subjects and fact[:2] not in edited
        )

    def unrelated(self, records: Sequence[Record]) -> list[tuple[str, str]]:
        """(prompt, answer) of all facts about other subjects."""
        subjects = {record.edit.subject for record in records}
        return self.prompts(fact for fact in self.facts if fact[0] not in subjects)

    def retention(
        self, model: nn.Module, tokenizer: Any, prompts: Sequence[tuple[str, str]]
    ) -> float:
        """Share of (prompt, answer) that the model completes greedily."""
        return _said(model, tokenizer, prompts)

    def prompts(self, facts: Iterable[tuple[str, str, str]]) -> list[tuple[str, str]]:
        """(prompt, answer) of facts; templates take turns, so that each is as frequent
        as the others."""
        return [
            (fill(self.templates[r][i % len(self.templates[r])], s)[0], o)
            for i, (s, r, o) in enumerate(facts)
        ]

    def edits(self, count: int) -> list[Edit]:
        """The first `count` records' edits."""
        return [record.edit for record in self.records[:count]]


def _said(model: nn.Module, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> float:
    found = score(
        ModelAdapter.of(model), tokenizer, [p for p, _ in pairs], [a for _, a in pairs]
    )
    return sum(each.argmax for each in found) / len(found)
