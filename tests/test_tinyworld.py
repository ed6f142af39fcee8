"""The embedded world and its two trained models: what the demo and the benchmarks
stand on."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from covariance_cache import KeyStatistics
from unified_edit import demo
from unified_edit.demo import FAMILIES, load, world_statistics
from unified_edit.edits import Record, read_edits, read_records
from unified_edit.evaluate.trial import Trials
from unified_edit.evaluate.world import World
from unified_edit.recipes import matching_preset, recipe

TINYWORLD = Path(__file__).parents[1] / "examples" / "tinyworld"


@pytest.fixture(scope="module")
def generator() -> Any:
    sys.path.insert(0, str(TINYWORLD))
    try:
        import world as generator
    finally:
        sys.path.remove(str(TINYWORLD))
    return generator


@pytest.fixture(scope="module")
def world() -> World:
    return World.load(TINYWORLD / "data")


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, world: World) -> tuple[Any, ...]:
    """The demo's way, with half of its text: harder for what must stay."""
    model, tokenizer = load(TINYWORLD / request.param)
    preset = matching_preset(model.config)
    assert preset is not None, "the embedded models have recipes of their own"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "STATISTICS_TOKENS", demo.STATISTICS_TOKENS // 2)
        statistics = world_statistics(model, tokenizer, world, preset, progress=False)
    return model, tokenizer, preset, statistics


@pytest.fixture(scope="module")
def trials(trained: tuple[Any, ...], world: World) -> Trials:
    """Of all recipes: what was said before is asked once, of every ninth fact, and of
    few exercises, for no test here reads what edits left of skills."""
    model, tokenizer, _, statistics = trained
    skills = {name: pairs[:2] for name, pairs in world.skills.items()}
    some = replace(world, facts=world.facts[::9], skills=skills)
    return Trials(model, tokenizer, some, statistics)


def test_the_committed_data_is_what_the_generator_writes(
    generator: Any, tmp_path: Path
) -> None:
    generator.write(tmp_path)
    written = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    committed = {p.name: p.read_bytes() for p in (TINYWORLD / "data").iterdir()}
    assert written == committed


def test_another_seed_makes_another_world(generator: Any) -> None:
    assert generator.build(1).facts == generator.build(1).facts
    assert generator.build(1).facts != generator.build(2).facts


def test_records_judge_what_they_say(generator: Any, world: World) -> None:
    truth = {(s, r): o for s, r, o in world.facts}
    for record in world.records:
        edit = record.edit
        assert truth[edit.subject, record.relation] == record.target_true
        assert edit.target != record.target_true
        templates = world.templates[record.relation]
        assert edit.prompt in templates[: generator.EDIT_TEMPLATES]
        assert len(record.paraphrase_prompts) == 2
        for prompt in record.paraphrase_prompts:
            assert edit.subject in prompt
            assert any(prompt.startswith(p) for p in generator.PARAPHRASE_PREFIXES)
        for prompts, answer in (
            (record.neighborhood_prompts, record.target_true),
            (record.attribute_prompts, edit.target),
        ):
            assert len(prompts) >= 5
            for prompt in prompts:
                subject = _subject_of(prompt, templates)
                assert subject != edit.subject
                assert truth[subject, record.relation] == answer


def _subject_of(prompt: str, templates: tuple[str, ...]) -> str:
    for template in templates:
        before, _, after = template.partition("{}")
        if prompt.startswith(before) and prompt.endswith(after):
            return prompt[len(before) : len(prompt) - len(after)]
    raise AssertionError(prompt)


def test_edits_file_holds_the_records_edits(world: World) -> None:
    edits = read_edits(TINYWORLD / "data" / "edits.jsonl")
    records: list[Record] = read_records(TINYWORLD / "data" / "records.json")
    assert edits == [record.edit for record in records[: len(edits)]]
    assert edits == world.edits(len(edits))


def test_paraphrase_prefixes_stay_out_of_the_corpus(generator: Any) -> None:
    text = (TINYWORLD / "data" / "corpus.txt").read_text()
    assert generator.CONTEXT_PREFIXES[0] in text
    assert not any(prefix in text for prefix in generator.PARAPHRASE_PREFIXES)


def test_models_know_the_world(trained: tuple[Any, ...], world: World) -> None:
    model, tokenizer, _, _ = trained
    assert world.retention(model, tokenizer, world.unrelated(())[::3]) >= 0.97
    assert min(world.skill_scores(model, tokenizer).values()) >= 0.95


def test_facts_are_recalled_by_early_mlps_at_the_subject(
    trained: tuple[Any, ...], world: World
) -> None:
    sys.path.insert(0, str(TINYWORLD))
    try:
        import report
    finally:
        sys.path.remove(str(TINYWORLD))
    model, tokenizer, _, _ = trained
    some = replace(world, facts=world.facts[::20], skills={})
    figures = report.measure(model, tokenizer, some, recall=False)
    assert figures["probability"] > 0.8
    assert figures["mlps_0_to_1_ablated"] < 0.3


@pytest.mark.parametrize("method", ["rome", "emmet", "memit", "alphaedit"])
def test_edits_take_and_neighbours_stay(
    trained: tuple[Any, ...], trials: Trials, method: str
) -> None:
    trial, _ = trials.batch(trials.world.records[:10], recipe(method, trained[2]))
    assert trial.scores.mean("es") == 1.0
    assert trial.scores.mean("ps") >= 0.85
    assert trial.scores.mean("ns") >= 0.95
    assert trial.scores.mean("rewrite_generation") >= 0.9
    assert trial.unrelated >= trial.unrelated_before - 0.05


def test_statistics_come_from_one_pass(trained: tuple[Any, ...]) -> None:
    statistics: dict[int, KeyStatistics] = trained[3]
    assert (
        len({each.provenance.corpus_fingerprint for each in statistics.values()}) == 1
    )
    assert all(each.count > each.d_key for each in statistics.values())
