"""Averages over traces, the layer probe, and both on the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_kit import RECORDS, Workplace, answer, refusal, run
from model_kit import EDITS, assert_same_bits, state_of

from unified_edit import applied, emmet, evaluate_counterfact, memit, recipe
from unified_edit import edit as compute
from unified_edit.edits import Record, read_records
from unified_edit.engine import EditResult
from unified_edit.errors import EditError, RecipeError
from unified_edit.evaluate.effects import average_effects
from unified_edit.evaluate.intervals import Interval
from unified_edit.evaluate.layer_probe import (
    Candidate,
    LayerChoice,
    choice_among,
    recommend,
    windows_of,
)
from unified_edit.model.prompts import generate_contexts
from unified_edit.model.tracing import KINDS, ROLES, Trace, Traces, TraceSettings
from unified_edit.recipes import Recipe

TARGETS: dict[str, Any] = {"steps": 4, "learning_rate": 0.3, "clamp": 4.0}


def traced(subject: range, tokens: int, clean: float, seed: int, **kinds: Any) -> Trace:
    generator = torch.Generator().manual_seed(seed)
    size = (tokens, 4)
    return Trace(
        fact=EDITS[0],
        tokens=tuple("abcdefgh"[:tokens]),
        subject=subject,
        clean=clean,
        corrupted=0.1 * seed,
        restored={
            kind: torch.rand(size, generator=generator, dtype=torch.float64)
            for kind in KINDS
        },
    )


def traces_of(*traces: Trace) -> Traces:
    return Traces(traces, (3,), TraceSettings(), 1, 0.5)


def test_averages_are_means_over_facts_of_means_over_tokens() -> None:
    first = traced(range(1, 5), 8, 0.9, 1)  # first, two middle, last; after, two, end
    second = traced(range(0, 1), 2, 0.7, 2)  # last; end
    found = average_effects(traces_of(first, second))
    assert found.facts == 2
    assert found.clean.mean == pytest.approx(0.8)
    assert found.total.mean == pytest.approx((0.8 + 0.5) / 2)
    for kind in KINDS:
        table = first.restored[kind] - 0.1
        other = second.restored[kind] - 0.2
        expected = {
            "first subject token": (1, table[1]),
            "middle subject tokens": (1, table[2:4].mean(0)),
            "last subject token": (2, (table[4] + other[0]) / 2),
            "first token after": (1, table[5]),
            "further tokens": (1, table[6]),
            "last token": (2, (table[7] + other[1]) / 2),
        }
        assert list(found.indirect[kind]) == list(ROLES)
        for role, (count, means) in expected.items():
            each = found.indirect[kind][role]  # type: ignore[index]
            assert each.facts == count
            assert [at.mean for at in each.layers] == pytest.approx(means.tolist())
            assert each.peak == int(means.argmax())
            for at in each.layers:
                assert at.low <= at.mean <= at.high
                assert (at.low == at.high) == (count == 1)


def test_roles_that_no_fact_has_are_absent() -> None:
    found = average_effects(traces_of(traced(range(0, 1), 2, 0.7, 1)))
    assert set(found.indirect["mlp"]) == {"last subject token", "last token"}
    assert json.loads(json.dumps(found.as_dict())) == found.as_dict()


def test_without_known_facts_there_is_no_average() -> None:
    with pytest.raises(EditError, match="knows none of the 1 given"):
        average_effects(traces_of())


def plain_scores(tiny: Any, chosen: Recipe, contexts: Any) -> list[Any]:
    """One full `edit` for each record."""
    found = []
    for record in RECORDS:
        result: EditResult = compute(
            tiny.model, tiny.tokenizer, [record.edit], chosen, tiny.statistics,
            contexts=contexts,
        )  # fmt: skip
        with applied(tiny.model, result.update):
            scores = evaluate_counterfact(
                tiny.model, tiny.tokenizer, [record], generations=False
            )
        damage = [c.preservation_damage for c in result.report.certificates.values()]
        found.append((scores.records[0], max(damage)))
    return found


@pytest.mark.parametrize("width", [1, 2])
def test_a_candidate_is_scored_as_single_edits_are(tiny: Any, width: int) -> None:
    method = emmet if width == 1 else memit
    chosen = method(layers="auto", preservation_weight=1.0, **TARGETS)
    state = state_of(tiny.model)
    windows = windows_of(tiny.adapter.layer_count, width)
    choice = recommend(
        tiny.model,
        tiny.tokenizer,
        RECORDS,
        chosen,
        tiny.statistics,
        candidates=windows,
        seed=3,
    )
    assert_same_bits(tiny.model, state)
    assert [each.layers for each in choice.candidates] == windows
    contexts = generate_contexts(tiny.adapter, tiny.tokenizer, chosen.contexts, 3)
    for each in choice.candidates:
        expected = plain_scores(tiny, replace(chosen, layers=each.layers), contexts)
        for mine, (plain, _) in zip(each.scores.records, expected, strict=True):
            assert mine.es == plain.es and mine.ns == plain.ns
            assert mine.em == pytest.approx(plain.em, abs=1e-4)
            assert mine.nm == pytest.approx(plain.nm, abs=1e-4)
        damage = sum(damage for _, damage in expected) / len(expected)
        assert each.damage == pytest.approx(damage, rel=1e-2)
    assert choice.recipe == replace(
        chosen,
        layers=choice.layers,
        source="layers located on 2 records",
    )
    # The chosen recipe is one that edits.
    result = compute(
        tiny.model, tiny.tokenizer, [RECORDS[0].edit], choice.recipe, tiny.statistics
    )
    layers = tuple(sorted(address.layer for address in result.update.updates))
    assert layers == choice.layers


def test_layers_without_statistics_are_not_tried(gpt2: Any) -> None:
    some = {layer: gpt2.statistics[layer] for layer in (0, 1)}
    chosen = emmet(layers="auto", **TARGETS)
    choice = recommend(gpt2.model, gpt2.tokenizer, RECORDS, chosen, some)
    assert [each.layers for each in choice.candidates] == [(0,), (1,)]
    wide = memit(layers=(0, 1, 2), **TARGETS)
    with pytest.raises(RecipeError, match=r"layers \[0, 1\], and no window"):
        recommend(gpt2.model, gpt2.tokenizer, RECORDS, wide, some)
    with pytest.raises(RecipeError, match=r"layers \[2\] have no key statistics"):
        recommend(
            gpt2.model, gpt2.tokenizer, RECORDS, chosen, some, candidates=[[1], [2]]
        )
    with pytest.raises(RecipeError, match="layers 0 to 2, not"):
        recommend(gpt2.model, gpt2.tokenizer, RECORDS, chosen, some, candidates=[[7]])


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no records"),
        ([Record(EDITS[0], "Lyon")], "record 0 .* has no paraphrases"),
        ([RECORDS[0], replace(RECORDS[1], neighborhood_prompts=())], "record 1"),
    ],
)
def test_records_that_judge_nothing_are_refused(
    gpt2: Any, records: Sequence[Record], message: str
) -> None:
    chosen = emmet(layers="auto", **TARGETS)
    with pytest.raises(EditError, match=message):
        recommend(gpt2.model, gpt2.tokenizer, records, chosen, gpt2.statistics)


def candidate(layer: int, mean: float, low: float, high: float, damage: float) -> Any:
    intervals = {"s": Interval(mean, low, high)}
    return Candidate((layer,), None, intervals, damage, 0.0)  # type: ignore[arg-type]


def test_what_is_chosen() -> None:
    """The highest S; of those that the records cannot tell from it, the gentlest."""
    base = emmet(layers="auto")

    def choose(*tried: Any) -> LayerChoice:
        return choice_among(base, tried, 20)

    apart = choose(candidate(0, 0.9, 0.85, 0.95, 1e-3), candidate(1, 0.8, 0.7, 0.9, 0))
    assert apart.layers == apart.best.layers == (0,)
    assert apart.reason == (
        "S is highest at layer 0: 0.900 (0.850 to 0.950, 20 records)"
    )
    alike = choose(
        candidate(0, 0.88, 0.8, 0.95, 1e-5),
        candidate(1, 0.9, 0.85, 0.95, 1e-3),
        candidate(2, 0.84, 0.8, 0.95, 1e-9),
    )
    assert alike.layers == (0,) and alike.best.layers == (1,)
    assert "2 candidates are within that" in alike.reason
    assert "layer 0, S 0.880, changes the least" in alike.reason
    assert alike.recipe.layers == (0,) and alike.recipe.origin == "unvalidated"


def test_windows() -> None:
    assert windows_of(4, 2) == [(0, 1), (1, 2), (2, 3)]
    assert windows_of(2, 3) == []


def test_a_recipe_that_waits_for_its_layers(gpt2: Any) -> None:
    chosen = recipe("memit", "gpt-j", layers="auto")
    assert chosen.layers == () and chosen.origin == "unvalidated"
    with pytest.raises(RecipeError, match="yet to be located"):
        compute(gpt2.model, gpt2.tokenizer, EDITS[:1], chosen, gpt2.statistics)
    with pytest.raises(RecipeError, match='at least one layer, or layers="auto"'):
        memit(layers=[])
    with pytest.raises(RecipeError, match="at least one"):
        Recipe.from_dict(chosen.as_dict())


TINYWORLD = Path(__file__).parents[1] / "examples" / "tinyworld"


@pytest.fixture
def facts(place: Workplace) -> Path:
    """Two that the embedded model knows, and between them one that it does not."""
    records = read_records(TINYWORLD / "data" / "records.json")[:3]
    answers = [records[0].target_true, records[1].edit.target, records[2].target_true]
    rows = [
        {"prompt": r.edit.prompt, "subject": r.edit.subject, "answer": answer}
        for r, answer in zip(records, answers, strict=True)
    ]
    path = place.path / "facts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_locate(place: Workplace, facts: Path) -> None:
    pytest.importorskip("matplotlib")
    out, plots = place.path / "traces.json", place.path / "plots"
    model = TINYWORLD / "gpt2"
    options = ["locate", model, facts, "--samples", "2", "--seed", "1"]
    found = answer(*options, "--out", out, "--plots", plots, "--pictured", "1")
    assert (found["facts"], found["known"], found["unknown"]) == (3, 2, [1])
    written = [plots / "average_effects.png", plots / "fact_0.png"]
    assert found["written"] == [str(out), *map(str, written)]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")
    whole = json.loads(out.read_bytes())
    assert whole["model"] == str(model)
    assert whole["averages"] == found["averages"]
    assert whole["settings"]["samples"] == 2 and whole["settings"]["window"] == 1
    for each in whole["facts"]:
        begin, end = each["subject_tokens"]
        assert "".join(each["tokens"][begin:end]).strip() == each["subject"]
        table = each["restored"]["mlp"]
        assert len(table) == len(each["tokens"]) and len(table[0]) == 5
    # The same again, to the byte; as a table, with one kind.
    before = out.read_bytes()
    answer(*options, "--out", out, "--force")
    assert out.read_bytes() == before
    shown = run(*options, "--kinds", "mlp", "--limit", "1")
    assert "1 of 1 facts are known" in shown.stdout
    assert "last subject token" in shown.stdout and "hidden" not in shown.stdout


def test_locate_refuses_before_it_works(place: Workplace, facts: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ["locate", place.model, facts]
    (place.path / "traces.json").write_text("mine")
    (place.path / "plots").mkdir()
    (place.path / "plots" / "fact_1.png").write_text("mine")
    for more, message in (
        (["--out", place.path / "traces.json"], "exists already"),
        (["--plots", place.path / "plots"], "fact_1.png: exists already"),
        (["--plots", place.path / "no" / "plots"], "no such folder"),
        (["--plots", place.path / "new", "--image", "bmp"], "bmp"),
        (["--kinds", "mlp,head"], "head"),
        (["--noise", "0"], "positive"),
    ):
        assert message in refusal(place.path, *options, *more)
    assert "no answer" in refusal(place.path, "locate", place.model, place.edits)
    unknown = place.path / "unknown.json"
    entry = {"prompt": EDITS[0].prompt, "subject": EDITS[0].subject}
    unknown.write_text(json.dumps([{**entry, "answer": EDITS[0].target}]))
    said = refusal(place.path, "locate", place.model, unknown)
    assert "knows none of the 1 given" in said


def test_recommend_and_edit_with_what_it_finds(place: Workplace) -> None:
    settings = [x for k, v in TARGETS.items() for x in ("--set", f"{k}={v}")]
    common = ["--recipe", "emmet", "--statistics", place.statistics, *settings]
    out = place.path / "choice.json"
    found = answer("recommend", place.model, place.records, *common, "--out", out)
    assert json.loads(out.read_bytes()) == found
    collected = [each["layers"] for each in found["candidates"]]
    assert found["layers"] in collected and found["recipe"]["layers"] == found["layers"]
    shown = run("recommend", place.model, place.records, *common)
    assert found["reason"] in " ".join(shown.stdout.split())
    layers = ["--layers", "auto", "--locate-on", place.records]
    edited = answer(
        "edit", place.model, place.edits, *common, *layers, "--out", place.update
    )
    assert edited["layers"] == found["reason"]
    assert edited["recipe"]["layers"] == found["layers"]
    for more in (["--layers", "auto"], ["--locate-on", place.records]):
        said = refusal(
            place.path,
            *("edit", place.model, place.edits, *common, *more),
            *("--out", place.path / "other.safetensors"),
        )
        assert "--layers auto needs --locate-on" in said
