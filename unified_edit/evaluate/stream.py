"""A long sequence of edits of a world, with what none of them touches held apart."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from unified_edit.edits import SLOT, Edit, Record, fill
from unified_edit.errors import EditError
from unified_edit.evaluate.sequential import Probes
from unified_edit.evaluate.world import World

_HELD_OUT = 5
"""One subject in so many is never edited."""
_NEIGHBORS = 5


@dataclass(frozen=True)
class Stream:
    """Records in the order in which they are edited in, and what to ask beside them."""

    records: tuple[Record, ...]
    probes: Probes
    texts: tuple[str, ...]
    """About held-out subjects, and skills: for perplexity at checkpoints."""

    @property
    def canary(self) -> tuple[str, ...]:
        """Some of the texts, few enough to be measured at every step."""
        return self.texts[:: max(1, len(self.texts) // 16)]


def world_stream(
    world: World, count: int, *, seed: int = 0, one_word_every: int = 0
) -> Stream:
    """`count` edits. One subject in five of each kind is never edited: neighbours,
    unrelated facts and the canary are about those. The others take turns: each once
    with one of its relations, then each with another, and when all facts have been
    edited they are edited anew, each time to another object than the last.

    Args:
        one_word_every: each so manieth edit is about a name of one word that begins its
            prompt (the last part of a subject's name, nobody's in the world), the kind
            that ROME's published code breaks on; 0 for none.

    Raises:
        EditError: no edits.
    """
    if count < 1:
        raise EditError(f"a stream of {count} edits; at least one")
    rng = random.Random(f"stream {seed}")
    truth = {(subject, relation): obj for subject, relation, obj in world.facts}
    relations = _relations(world)
    members: dict[str, list[str]] = {kind: [] for kind in relations}
    for subject, relation, _ in world.facts:
        if relation == relations[world.kinds[relation]][0]:
            members[world.kinds[relation]].append(subject)
    held: dict[str, list[str]] = {}
    edited: dict[str, str] = {}
    for kind, subjects in members.items():
        mixed = rng.sample(subjects, len(subjects))
        cut = len(mixed) // _HELD_OUT
        held[kind] = sorted(mixed[:cut])
        edited |= dict.fromkeys(mixed[cut:], kind)
    maker = _Maker(world, rng, truth, held)
    facts = _turns(rng, edited, relations)
    words = _words(rng, edited, relations)
    records = []
    for index in range(count):
        odd = one_word_every and index % one_word_every == one_word_every - 1
        subject, relation = next(words if odd else facts)
        records.append(maker.record(subject, relation, index, first=bool(odd)))
    apart = {subject for subjects in held.values() for subject in subjects}
    unrelated = world.prompts(fact for fact in world.facts if fact[0] in apart)
    same: dict[str, list[tuple[str, str, str]]] = {}
    about = [fact for fact in world.facts if fact[0] in edited]
    for fact, (prompt, answer) in zip(about, world.prompts(about), strict=True):
        same.setdefault(fact[0], []).append((fact[1], prompt, answer))
    exercises = [pair for pairs in world.skills.values() for pair in pairs[:8]]
    spread = unrelated[:: max(1, len(unrelated) // 40)]
    return Stream(
        tuple(records),
        Probes(
            unrelated=tuple(unrelated),
            skills=world.skills,
            same_subject={name: tuple(facts) for name, facts in same.items()},
            generation=tuple(prompt for prompt, _ in unrelated[::40]),
        ),
        tuple(f"{prompt} {answer}." for prompt, answer in [*spread, *exercises]),
    )


def world_records(
    world: World, subjects: Sequence[str], count: int, *, seed: int = 0
) -> tuple[Record, ...]:
    """`count` records about some subjects, their relations in turns and each time to
    another object; their neighbours are among these subjects as well. To train an
    editor on, apart from those it is judged on.

    Raises:
        EditError: no subjects, or one that the world does not know.
    """
    rng = random.Random(f"records {seed}")
    truth = {(subject, relation): obj for subject, relation, obj in world.facts}
    kinds = {subject: world.kinds[relation] for subject, relation, _ in world.facts}
    strange = sorted(set(subjects) - kinds.keys())
    if strange or not subjects:
        raise EditError(f"subjects of the world are wanted, not {strange or 'none'}")
    chosen = {subject: kinds[subject] for subject in subjects}
    held: dict[str, list[str]] = {kind: [] for kind in set(kinds.values())}
    for subject, kind in chosen.items():
        held[kind].append(subject)
    maker = _Maker(world, rng, truth, held)
    facts = _turns(rng, chosen, _relations(world))
    return tuple(
        maker.record(*next(facts), index, first=False) for index in range(count)
    )


def _relations(world: World) -> dict[str, list[str]]:
    """kind → its relations"""
    found: dict[str, list[str]] = {}
    for relation, kind in world.kinds.items():
        found.setdefault(kind, []).append(relation)
    return found


def _turns(
    rng: random.Random, edited: dict[str, str], relations: dict[str, list[str]]
) -> Iterator[tuple[str, str]]:
    """(subject, relation), in rounds without end."""
    while True:
        orders = {
            subject: rng.sample(relations[kind], len(relations[kind]))
            for subject, kind in edited.items()
        }
        for place in range(max(map(len, relations.values()))):
            subjects = [s for s, order in orders.items() if place < len(order)]
            rng.shuffle(subjects)
            yield from ((subject, orders[subject][place]) for subject in subjects)


def _words(
    rng: random.Random, edited: dict[str, str], relations: dict[str, list[str]]
) -> Iterator[tuple[str, str]]:
    """(last word of a name, relation of its kind), without end."""
    kinds = sorted({(name.split()[-1], kind) for name, kind in edited.items()})
    while True:
        rng.shuffle(kinds)
        yield from ((word, rng.choice(relations[kind])) for word, kind in kinds)


@dataclass
class _Maker:
    """Makes records, and knows what each fact was last edited to."""

    world: World
    rng: random.Random
    now: dict[tuple[str, str], str]
    held: dict[str, list[str]]

    def __post_init__(self) -> None:
        self.truth = dict(self.now)

    def record(self, subject: str, relation: str, case: int, *, first: bool) -> Record:
        """One record; `first` puts the subject at its prompt's begin."""
        world, rng = self.world, self.rng
        objects: Sequence[str] = world.objects[relation]
        templates = world.templates[relation]
        known = self.truth.get((subject, relation))
        old = self.now.get((subject, relation), known)
        true = known or rng.choice(objects)
        new = rng.choice([each for each in objects if each not in (old, true)])
        self.now[subject, relation] = new
        asked = [
            t
            for t in templates[: world.edit_templates]
            if not first or t.startswith(SLOT)
        ]
        others = [
            name
            for name in self.held[world.kinds[relation]]
            if self.truth[name, relation] == true
        ]
        prefixes = rng.sample(world.paraphrase_prefixes, 2)
        kept = rng.sample(templates[world.edit_templates :], 2)
        return Record(
            edit=Edit(rng.choice(asked), subject, new),
            target_true=true,
            paraphrase_prompts=tuple(
                f"{prefix} {fill(template, subject)[0]}"
                for prefix, template in zip(prefixes, kept, strict=True)
            ),
            neighborhood_prompts=tuple(
                fill(rng.choice(templates), name)[0]
                for name in rng.sample(others, min(_NEIGHBORS, len(others)))
            ),
            relation=relation,
            case_id=case,
        )
