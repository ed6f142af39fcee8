"""Sequential editing on an embedded model: stream, run, files and guard."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from covariance_cache import collect
from unified_edit.demo import load
from unified_edit.edits import Edit
from unified_edit.errors import EditError
from unified_edit.evaluate import sequential
from unified_edit.evaluate.counterfact import evaluate_counterfact
from unified_edit.evaluate.sequential import Plan, Probes, run_sequence
from unified_edit.evaluate.stream import world_stream
from unified_edit.evaluate.world import World
from unified_edit.guard import OFF, Guard
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.keys import keys_at_subjects
from unified_edit.model.perplexity import Canary
from unified_edit.model.prompts import Contexts
from unified_edit.preparation import prepare
from unified_edit.presets import ROME_CONTEXTS
from unified_edit.recipes import Recipe, recipe
from unified_edit.session import EditSession
from unified_edit.target_cache import TargetCache

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "tinyworld"
PRESET = "tinyworld-gpt2"


class Embedded:
    """The embedded GPT-2 model, its statistics and a stream."""

    def __init__(self, folder: Path) -> None:
        self.targets = TargetCache(folder)
        self.world = World.load(FOLDER / "data")
        self.model, self.tokenizer = load(FOLDER / "gpt2")
        self.statistics = collect(
            *(self.model, self.tokenizer, self.world.corpus, [0, 1]),
            tokens=8000,
            window=64,
            progress=False,
        )
        self.stream = world_stream(self.world, 10, one_word_every=5)
        self.canary = Canary.of(self.tokenizer, self.stream.canary)

    def begin(self, chosen: Recipe | None = None, **options: Any) -> EditSession:
        return EditSession.begin(
            copy.deepcopy(self.model),
            self.tokenizer,
            chosen or recipe("emmet_seq", PRESET),
            self.statistics,
            **{"canary": self.canary, **options},
        )

    def resume(self, folder: Path) -> EditSession:
        return EditSession.resume(
            folder / "session.safetensors",
            copy.deepcopy(self.model),
            self.tokenizer,
            self.statistics,
            canary=self.canary,
        )

    @property
    def probes(self) -> Probes:
        """Few of each."""
        whole = self.stream.probes
        return Probes(
            unrelated=whole.unrelated[:20],
            skills={name: pairs[:5] for name, pairs in whole.skills.items()},
            same_subject=whole.same_subject,
            generation=whole.generation[:1],
        )


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    return Embedded(tmp_path_factory.mktemp("targets"))


# --- the stream -----------------------------------------------------------------------


def test_what_is_held_out_is_never_edited() -> None:
    world = World.load(FOLDER / "data")
    stream = world_stream(world, 1700, seed=3, one_word_every=10)
    edited = {record.edit.subject for record in stream.records}
    names = {subject for subject, _, _ in world.facts}
    held = names - edited
    assert len(held) == 48 + 19 + 19
    truth = {(s, r): o for s, r, o in world.facts}
    for record in stream.records:
        assert len(record.paraphrase_prompts) == 2
        for prompt in record.neighborhood_prompts:
            (about,) = [name for name in held if name in prompt]
            assert truth[about, record.relation] == record.target_true
    asked = [prompt for prompt, _ in stream.probes.unrelated]
    assert len(asked) == 48 * 6 + 38 * 3
    assert all(any(name in prompt for name in held) for prompt in asked)
    for text in stream.texts:
        assert not any(name in text for name in edited & names)
    assert 16 <= len(stream.canary) < 40 and set(stream.canary) <= set(stream.texts)


def test_each_fact_is_edited_once_before_any_is_again() -> None:
    world = World.load(FOLDER / "data")
    stream = world_stream(world, 2500)
    facts = [(r.edit.subject, r.relation) for r in stream.records]
    editable = 1614
    assert len(set(facts[:editable])) == editable
    assert facts[editable] in facts[:editable]
    first = [subject for subject, _ in facts[:346]]
    assert len(set(first)) == 346
    # Anew means to another object than the last, and than the true one.
    last: dict[tuple[str, str], str] = {}
    truth = {(s, r): o for s, r, o in world.facts}
    for record, fact in zip(stream.records, facts, strict=True):
        assert record.edit.target not in (last.get(fact), truth[fact])
        assert record.target_true == truth[fact]
        last[fact] = record.edit.target


def test_streams_are_the_same_for_the_same_seed() -> None:
    world = World.load(FOLDER / "data")
    one, other = (world_stream(world, 40, seed=2) for _ in range(2))
    assert one == other
    assert world_stream(world, 60, seed=2).records[:40] == one.records
    assert world_stream(world, 40, seed=3).records != one.records
    with pytest.raises(EditError, match="at least one"):
        world_stream(world, 0)


def test_names_of_one_word_begin_their_prompts() -> None:
    world = World.load(FOLDER / "data")
    subjects = {subject for subject, _, _ in world.facts}
    records = world_stream(world, 100, one_word_every=20).records
    odd = [r for r in records if r.edit.subject not in subjects]
    assert [record.case_id for record in odd] == [19, 39, 59, 79, 99]
    for record in odd:
        assert record.edit.text.startswith(record.edit.subject)
        assert " " not in record.edit.subject
        assert any(name.endswith(f" {record.edit.subject}") for name in subjects)


# --- a run ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(embedded: Embedded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps of two edits, uninterrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(embedded, out, embedded.begin(guard=Guard(on_limit="warn")))
    return out


PLAN = Plan(batch_size=2)


def run(
    embedded: Embedded, out: Path, session: EditSession, plan: Plan = PLAN
) -> list[dict[str, Any]]:
    return run_sequence(
        session,
        embedded.stream.records,
        plan,
        out,
        probes=embedded.probes,
        canary=embedded.canary,
        about={"name": "test", "model": "gpt2"},
        target_cache=embedded.targets,
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


def test_checkpoints_say_what_was_measured(embedded: Embedded, whole: Path) -> None:
    found = lines(whole / "checkpoints.jsonl")
    assert [line["step"] for line in found] == [0, 1, 2, 5]
    assert [line["edits"] for line in found] == [0, 2, 4, 10]
    first, last = found[0], found[-1]
    assert first["current"] is first["earlier"] is first["same_subject"] is None
    assert first["unrelated"][0] == 1.0 and first["drift"] == {"0": 0.0}
    assert first["perplexity"] == pytest.approx(
        embedded.canary.perplexity(embedded.begin()._adapter)
    )
    session = embedded.resume(whole)
    scores = evaluate_counterfact(
        session.model, embedded.tokenizer, embedded.stream.records, generations=False
    )
    intervals = scores.intervals()
    assert last["earlier"].keys() == {
        *("s", "es", "ps", "ns", "rewrite_accuracy", "paraphrase_accuracy"),
        "neighborhood_accuracy",
    }
    for name, (mean, low, high) in last["earlier"].items():
        each = intervals[name]
        assert (mean, low, high) == pytest.approx((each.mean, each.low, each.high))
    assert last["earlier"]["es"][0] > 0.9
    assert last["skills"] == {
        name: embedded.world.retention(session.model, embedded.tokenizer, pairs)
        for name, pairs in embedded.probes.skills.items()
    }
    edited = {(r.edit.subject, r.relation) for r in embedded.stream.records}
    same = [
        (prompt, answer)
        for subject in dict(edited)
        for relation, prompt, answer in embedded.probes.same_subject.get(subject, ())
        if (subject, relation) not in edited
    ]
    assert last["same_subject"][0] == pytest.approx(
        embedded.world.retention(session.model, embedded.tokenizer, same)
    )
    assert last["drift"] == {str(k): v for k, v in session.drift.items()}
    assert last["entropy"] > 1
    counts = last["guard"]
    assert counts["accepted"] + counts["warned"] == 5
    settings = json.loads((whole / "run.json").read_text())
    assert settings["format"] == sequential.FORMAT and settings["batch_size"] == 2
    assert settings["recipe"]["name"] == "emmet_seq" and settings["name"] == "test"


def test_steps_are_told_one_by_one(embedded: Embedded, whole: Path) -> None:
    found = lines(whole / "steps.jsonl")
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5]
    said = [edit for line in found for edit in line["edits"]]
    assert said == [record.edit.as_dict() for record in embedded.stream.records]
    for line in found:
        assert line["decision"] in ("accepted", "warned") and line["scale"] == 1
        assert line["damage"] > 0 and line["canary"] > 0
        assert {"targets", "solve", "guard", "apply"} <= line["seconds"].keys()
        assert len(line["says_target"]) == 2


@pytest.mark.parametrize("cut", ["between", "after"])
def test_an_interrupted_run_ends_as_it_would_have(
    embedded: Embedded,
    whole: Path,
    tmp_path: Path,
    cut: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped in a step after a checkpoint, also with lines cut off in the middle;
    between the saved state and the checkpoint's line."""
    out = tmp_path / "run"
    session = embedded.begin(guard=Guard(on_limit="warn"))
    step, append = session.step, sequential._append
    stop_at = 3 if cut != "after" else 99

    def stopping(*arguments: Any, **options: Any) -> Any:
        if session.state.steps == stop_at:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    def losing(path: Path, line: dict[str, Any]) -> None:
        if cut == "after" and "earlier" in line and line["step"] == 2:
            raise KeyboardInterrupt
        append(path, line)

    monkeypatch.setattr(session, "step", stopping)
    monkeypatch.setattr(sequential, "_append", losing)
    with pytest.raises(KeyboardInterrupt):
        run(embedded, out, session)
    monkeypatch.undo()
    left = [out]
    if cut == "between":
        left.append(tmp_path / "torn")
        shutil.copytree(out, left[1])
        for name in ("steps.jsonl", "checkpoints.jsonl"):
            with (left[1] / name).open("a") as file:
                file.write('{"step": 2, "edi')
    for out in left:
        run(embedded, out, embedded.resume(out))
        for name in ("steps.jsonl", "checkpoints.jsonl"):
            assert timeless(lines(out / name)) == timeless(lines(whole / name)), name
        states = [each / "session.safetensors" for each in (whole, out)]
        assert states[0].read_bytes() == states[1].read_bytes()
        # Nothing is left to do.
        assert len(run(embedded, out, embedded.resume(out))) == 4


def test_another_run_is_not_written_over(
    embedded: Embedded, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    with pytest.raises(EditError, match="differs in batch_size"):
        run(embedded, out, embedded.resume(out), Plan(batch_size=3))
    other = embedded.begin(recipe("memit", PRESET), guard=Guard(on_limit="warn"))
    with pytest.raises(EditError, match="differs in recipe"):
        run(embedded, out, other)
    assert lines(out / "steps.jsonl") == lines(whole / "steps.jsonl")
    with pytest.raises(EditError, match="of 5 steps, the session has made 0"):
        run(embedded, out, embedded.begin(guard=Guard(on_limit="warn")))
    (out / "steps.jsonl").unlink()
    with pytest.raises(EditError, match="has made 5 steps, steps.jsonl has 0"):
        run(embedded, out, embedded.resume(out))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(EditError, match="holds something else"):
        run(embedded, tmp_path / "notes", embedded.begin())
    with pytest.raises(EditError, match="no records"):
        run_sequence(embedded.begin(), [], PLAN, tmp_path / "empty")


def test_a_sequence_ends_below_a_score(
    embedded: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequential, "FEWEST_EDITS", 4)
    plan = Plan(batch_size=2, stop_below=1.01, every=2)
    found = run(embedded, tmp_path / "run", embedded.begin(guard=OFF), plan)
    assert [line["edits"] for line in found] == [0, 2, 4]


def test_records_may_have_no_neighbours(embedded: Embedded, tmp_path: Path) -> None:
    """S is not known then, and nothing is stopped by it."""
    records = [
        replace(record, neighborhood_prompts=())
        for record in embedded.stream.records[:10]
    ]
    session = embedded.begin(recipe("rome", PRESET, steps=1), guard=OFF)
    found = run_sequence(
        session, records, Plan(batch_size=5, stop_below=1.0), tmp_path / "run"
    )
    assert [line["edits"] for line in found] == [0, 5, 10]
    for line in found[1:]:
        assert "es" in line["earlier"] and "s" not in line["earlier"], line


def test_checkpoints_may_sample_earlier_edits(
    embedded: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    score = sequential.evaluate_counterfact

    def counting(model: Any, tokenizer: Any, records: Any, **options: Any) -> Any:
        asked.append(len(records))
        return score(model, tokenizer, records, **options)

    monkeypatch.setattr(sequential, "evaluate_counterfact", counting)
    run(embedded, tmp_path / "run", embedded.begin(guard=OFF), Plan(5, at_most=4))
    assert asked == [5, 4, 10, 4]  # current and earlier, after 5 and 10 edits


@pytest.mark.parametrize("every", [None, 1, 3, 10, 50])
def test_checkpoints_come_where_they_are_asked(every: int | None) -> None:
    plan = Plan(batch_size=2, every=every)
    found = [step for step in range(1, 151) if plan.is_checkpoint(step, 150)]
    if every is None:
        assert found == [1, 2, 5, 10, 20, 50, 100, 150]
    else:
        # After the step that reaches another multiple; and sooner at first.
        expected = {-(-edits // 2) for edits in range(every, 301, every)}
        sooner = {step for step in (1, 2, 5, 10, 20) if 2 * step < every}
        assert found == sorted(expected | sooner | {150})


def test_probes_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "probes.json"
    data = {
        "unrelated": [["A is", "b"]],
        "skills": {"adding": [["1 + 1 =", "2"]]},
        "same_subject": {"A": [["is", "A is", "b"]]},
        "generation": ["A"],
    }
    path.write_text(json.dumps(data))
    found = Probes.read(path)
    assert [list(each) for each in found.unrelated] == data["unrelated"]
    assert found.same_subject["A"][0] == ("is", "A is", "b")
    for broken in (
        '{"unrelated": [["A"]]}',
        '{"facts": []}',
        "[]",
        "{",
        '{"skills": 3}',
    ):
        path.write_text(broken)
        with pytest.raises(EditError, match=r"probes\.json: not the probes of a run"):
            Probes.read(path)
    with pytest.raises(EditError, match="cannot be read"):
        Probes.read(tmp_path / "missing.json")


# --- the guard, on edits that wreck a model -------------------------------------------


def disabling(embedded: Embedded, chosen: Recipe, contexts: Contexts) -> Edit:
    """Of names of one word that begin their prompt, the one with the least
    denominator."""
    records = world_stream(embedded.world, 60, one_word_every=1).records
    edits = [record.edit for record in records]
    (layer,) = chosen.layers
    factorization = prepare(chosen, embedded.statistics).layers[layer].factorization
    averaged, bare = (
        factorization.whiten(
            keys_at_subjects(
                *(ModelAdapter.of(embedded.model), embedded.tokenizer, edits),
                *(contexts, layer, average),
            )
        )
        for average in ("flat", "clean")
    )
    cosines = (averaged * bare).sum(1) / averaged.norm(dim=1) / bare.norm(dim=1)
    assert float(cosines.abs().min()) < 0.01
    return edits[int(cosines.abs().argmin())]


def test_a_disabling_edit_is_found_before_it_is_written(embedded: Embedded) -> None:
    """ROME's published code and contexts: with the two keys all but orthogonal, one
    edit wrecks the model. One key does not."""
    published = recipe("rome_original", PRESET, contexts=ROME_CONTEXTS, steps=12)
    before = {k: v.clone() for k, v in embedded.model.state_dict().items()}
    foreseen = replace(OFF, on_limit="refuse", damage=Guard().damage)
    guarded = embedded.begin(published, canary=None, guard=foreseen)
    edit = disabling(embedded, published, guarded.state.contexts)
    refused = guarded.step([edit])
    assert refused.decision == "refused"
    assert refused.readings is not None and (refused.readings.damage or 0) > 1
    assert "predicted damage" in refused.reasons[0]
    for name, value in guarded.model.state_dict().items():
        assert torch.equal(value, before[name])
    wrecked = embedded.begin(
        published, contexts=guarded.state.contexts, guard=Guard(on_limit="warn")
    )
    step = wrecked.step([edit])
    assert step.readings is not None and (step.readings.canary or 0) > 5
    asked = embedded.probes.unrelated
    said = embedded.world.retention(wrecked.model, embedded.tokenizer, asked)
    assert said < 0.5
    one_key = embedded.begin(
        replace(published, name="rome", published_denominator=False),
        contexts=guarded.state.contexts,
        guard=Guard(),
    )
    step = one_key.step([edit])
    assert step.decision == "accepted"
    assert embedded.world.retention(one_key.model, embedded.tokenizer, asked) > 0.9


def test_edits_that_stop_holding_are_noticed(embedded: Embedded) -> None:
    """Retention counts sampled edits that held before the step; a later edit of the
    same prompt stands for the earlier one, which is not asked any more."""
    edits = [record.edit for record in embedded.stream.records[:4]]
    session = embedded.begin(canary=None, guard=replace(OFF, sample=8))
    first = session.step(edits)
    assert first.readings is not None and first.readings.retention is None
    assert first.report is not None and first.report.success == 1.0
    other = replace(edits[0], target=edits[1].target)
    second = session.step([other])
    assert second.readings is not None and second.readings.retention == 1.0
    standing = session.state.standing
    assert edits[0] not in standing and other in standing and len(standing) == 4
    # What undoes edits is noticed.
    with torch.no_grad():
        session._originals[0].mul_(-1.0)
    third = session.step([embedded.stream.records[6].edit])
    assert third.readings is not None and (third.readings.retention or 0) < 0.5


@pytest.mark.data
def test_how_many_subjects_are_one_token_at_the_prompts_begin() -> None:
    """The figure in docs/results.md."""
    from model_kit import DATA
    from transformers import AutoTokenizer

    path = DATA / "counterfact" / "flat.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tokenizers" / "gpt2")
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    first = [case for case in cases if case["prompt"].startswith(case["subject"])]
    ids = tokenizer([case["subject"] for case in first], add_special_tokens=False)
    alone = sum(len(row) == 1 for row in ids["input_ids"])
    assert (len(cases), len(first), alone) == (21_719, 17_414, 78)
