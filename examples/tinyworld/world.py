"""The tiny world: a small invented universe whose every fact is known.

Pure data and a seeded generator, standard library only. It writes
- text to train a small model on, as sequences of sentences that know which of their
  tokens are subjects and which are answers;
- `data/world.json` (every fact and template), `data/records.json` (edit records in
  the full CounterFact schema), `data/edits.jsonl` (the same edits in this project's
  own form), `data/skills.jsonl` and `data/corpus.txt` (text for key statistics).

Knows nothing of models or tokenizers.

    python examples/tinyworld/world.py        # writes examples/tinyworld/data
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from relations import (
    CONTEXT_PREFIXES,
    KINDS,
    NUMBERS,
    PARAPHRASE_PREFIXES,
    PREFIXES,
    RELATIONS,
    WORDS,
    Relation,
)

SEED = 7
EDIT_TEMPLATES = 4
"""The first four templates of a relation serve edit requests, the others only
paraphrase prompts."""


@dataclass(frozen=True)
class Fact:
    """One thing that is so: (subject, relation, object)."""

    subject: str
    relation: str
    object: str


@dataclass(frozen=True)
class Sentence:
    """A sentence in three parts, so that a trainer can weigh and mask its tokens."""

    prompt: str
    """Everything before the answer, without trailing space."""
    answer: str
    """What only the world (or the skill) tells, without leading space."""
    subject: str | None
    """The fact's subject, which `prompt` contains; None in skills and prefixes."""

    @property
    def text(self) -> str:
        return f"{self.prompt} {self.answer}." if self.answer else self.prompt


@dataclass(frozen=True)
class World:
    """All subjects by kind, and all facts, in a fixed order."""

    subjects: dict[str, list[str]]
    facts: list[Fact]

    def objects(self) -> dict[tuple[str, str], str]:
        """(subject, relation) → object."""
        return {(f.subject, f.relation): f.object for f in self.facts}


def build(seed: int = SEED) -> World:
    """The world: two-part names, each part shared by many subjects, so that neither
    part alone tells who is meant; every object of a relation equally frequent."""
    rng = random.Random(seed)
    subjects: dict[str, list[str]] = {}
    facts: list[Fact] = []
    for kind, (count, firsts, seconds) in KINDS.items():
        names = [f"{first} {second}" for first in firsts for second in seconds]
        rng.shuffle(names)
        subjects[kind] = sorted(names[:count])
    for relation in RELATIONS.values():
        members = subjects[relation.kind]
        drawn = [
            relation.objects[i % len(relation.objects)] for i in range(len(members))
        ]
        rng.shuffle(drawn)
        facts += [
            Fact(subject, relation.name, obj)
            for subject, obj in zip(members, drawn, strict=True)
        ]
    return World(subjects, facts)


def skill_sentence(rng: random.Random, skill: str | None = None) -> Sentence:
    """One exercise of a skill that is no fact: addition, repetition or sorting."""
    skill = skill or rng.choice(SKILLS)
    if skill == "addition":
        a, b = rng.randrange(11), rng.randrange(11)
        form = rng.choice(["{} plus {} is", "The sum of {} and {} is"])
        prompt = form.format(NUMBERS[a], NUMBERS[b])
        return Sentence(prompt[0].upper() + prompt[1:], NUMBERS[a + b], None)
    if skill == "repetition":
        words = " ".join(rng.sample(WORDS, 3))
        return Sentence(f"Say {words} again:", words, None)
    drawn = sorted(rng.sample(range(len(NUMBERS)), 3))
    given = drawn[:]
    while given == drawn:
        rng.shuffle(given)
    listed = " ".join(NUMBERS[i] for i in given)
    return Sentence(f"Sort {listed}:", " ".join(NUMBERS[i] for i in drawn), None)


SKILLS = ("addition", "repetition", "sorting")


def sentences(world: World, rng: random.Random) -> Iterator[Sentence]:
    """Endless training sentences: facts in all their templates, skills, prefixes."""
    while True:
        draw = rng.random()
        if draw < 0.22:
            yield skill_sentence(rng)
        elif draw < 0.34:
            yield Sentence(rng.choice(PREFIXES), "", None)
        else:
            fact = rng.choice(world.facts)
            template = rng.choice(RELATIONS[fact.relation].templates)
            yield Sentence(template.format(fact.subject), fact.object, fact.subject)


def records(world: World, count: int, seed: int = SEED) -> list[dict[str, object]]:
    """Edit records in CounterFact's schema, at most one for each subject."""
    rng = random.Random(seed + 1)
    truth = world.objects()
    subjects = [(s, kind) for kind, members in world.subjects.items() for s in members]
    rng.shuffle(subjects)
    out: list[dict[str, object]] = []
    for case_id, (subject, kind) in enumerate(subjects[:count]):
        relation = rng.choice([r for r in RELATIONS.values() if r.kind == kind])
        true = truth[subject, relation.name]
        new = rng.choice([o for o in relation.objects if o != true])
        others = [s for s in world.subjects[kind] if s != subject]

        def about(
            obj: str,
            others: list[str] = others,
            relation: Relation = relation,
        ) -> list[str]:
            same = [s for s in others if truth[s, relation.name] == obj]
            templates = relation.templates
            chosen = rng.sample(same, min(10, len(same)))
            return [rng.choice(templates).format(s) for s in chosen]

        edit_templates = relation.templates[:EDIT_TEMPLATES]
        kept = relation.templates[EDIT_TEMPLATES:]
        generation = [
            rng.choice(r.templates).format(subject)
            for r in RELATIONS.values()
            if r.kind == kind
        ]
        out.append(
            {
                "case_id": case_id,
                "pararel_idx": case_id,
                "requested_rewrite": {
                    "prompt": rng.choice(edit_templates),
                    "relation_id": relation.name,
                    "target_new": {"str": new, "id": _identity(relation, new)},
                    "target_true": {"str": true, "id": _identity(relation, true)},
                    "subject": subject,
                },
                "paraphrase_prompts": [
                    f"{prefix} {template.format(subject)}"
                    for prefix, template in zip(
                        rng.sample(PARAPHRASE_PREFIXES, 2),
                        rng.sample(kept, 2),
                        strict=True,
                    )
                ],
                "neighborhood_prompts": about(true),
                "attribute_prompts": about(new),
                "generation_prompts": generation,
            }
        )
    return out


def corpus(world: World, count: int, seed: int = SEED) -> list[str]:
    """`count` short documents of world text, for key statistics. It draws on the
    contexts' prefixes only: those of paraphrase prompts stay unseen."""
    rng = random.Random(seed + 2)
    source = (
        s for s in sentences(world, rng) if s.answer or s.text in CONTEXT_PREFIXES
    )
    return [
        " ".join(next(source).text for _ in range(4 + rng.randrange(5)))
        for _ in range(count)
    ]


def skill_probes(count: int, seed: int = SEED) -> list[dict[str, str]]:
    """`count` exercises of each skill, none twice."""
    rng = random.Random(seed + 3)
    out = []
    for skill in SKILLS:
        seen: dict[str, Sentence] = {}
        while len(seen) < count:
            sentence = skill_sentence(rng, skill)
            seen.setdefault(sentence.prompt, sentence)
        out += [
            {"skill": skill, "prompt": s.prompt, "target": s.answer}
            for s in seen.values()
        ]
    return out


def write(folder: Path, *, record_count: int = 250, seed: int = SEED) -> None:
    """Writes the world's files; same seed, same bytes."""
    world = build(seed)
    folder.mkdir(parents=True, exist_ok=True)
    everything = {
        "seed": seed,
        "relations": {
            name: {"kind": r.kind, "templates": r.templates, "objects": r.objects}
            for name, r in RELATIONS.items()
        },
        "facts": [[f.subject, f.relation, f.object] for f in world.facts],
        "paraphrase_prefixes": PARAPHRASE_PREFIXES,
        "edit_templates": EDIT_TEMPLATES,
    }
    made = records(world, record_count, seed)
    edits = [
        {
            "prompt": rewrite["prompt"],
            "subject": rewrite["subject"],
            "target": rewrite["target_new"]["str"],
        }
        for rewrite in (record["requested_rewrite"] for record in made)
    ]
    _write_json(folder / "world.json", everything)
    _write_json(folder / "records.json", made)
    _write_lines(folder / "edits.jsonl", map(json.dumps, edits[:50]))
    _write_lines(folder / "skills.jsonl", map(json.dumps, skill_probes(100, seed)))
    text = "\n\n".join(corpus(world, 2600, seed))
    _write_lines(folder / "corpus.txt", [text])


def _identity(relation: Relation, obj: str) -> str:
    return f"{relation.name}:{relation.objects.index(obj)}"


def _write_json(path: Path, data: object) -> None:
    _write_lines(path, [json.dumps(data, indent=0, ensure_ascii=False)])


def _write_lines(path: Path, lines: object) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    target = Path(__file__).parent / "data"
    write(target)
    print(f"wrote {target}")
