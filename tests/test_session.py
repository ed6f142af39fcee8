"""Sequences of edits with explicit state: the same numbers as edits one by one, the
same bits after a save, and nothing left behind where the guard refuses."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_kit import CONTEXTS, EDITS, TEXTS, Tiny
from torch import Tensor

from covariance_cache.fingerprint import model_fingerprint
from unified_edit.algebra.regularize import Regularizer
from unified_edit.algebra.update import UpdateSet
from unified_edit.engine import edit
from unified_edit.errors import RecipeError, SessionError
from unified_edit.guard import OFF, Guard
from unified_edit.live import applied
from unified_edit.model.keys import keys_at_subjects
from unified_edit.model.perplexity import Canary
from unified_edit.preparation import prepare
from unified_edit.recipes import Recipe, recipe
from unified_edit.session import EditSession
from unified_edit.session_state import SequenceState

STEPS = 4
BATCHES = [EDITS[:1], EDITS[1:3], EDITS[3:]]
HELD_OUT = TEXTS[:3]


def wanted(name: str = "memit_seq", **changes: Any) -> Recipe:
    settings: dict[str, Any] = {"layers": [0, 1], "steps": STEPS}
    if name not in ("alphaedit", "rome_original"):
        settings["preservation_weight"] = 5.0
    if name == "alphaedit":
        settings |= {"null_space_threshold": 0.5, "null_space_relative": True}
        settings |= {"ridge": 0.5}
    if name in ("rome", "rome_original"):
        settings["layers"] = [1]
    return recipe(name, **{**settings, **changes})


def begin(tiny: Tiny, chosen: Recipe | None = None, **options: Any) -> EditSession:
    """On a copy of the model."""
    model = copy.deepcopy(tiny.model)
    options = {"contexts": CONTEXTS, "guard": OFF, **options}
    return EditSession.begin(
        model, tiny.tokenizer, chosen or wanted(), tiny.statistics, **options
    )


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def model_of(session: EditSession) -> dict[str, Tensor]:
    """The weights that a session's update makes."""
    model = copy.deepcopy(session.model)
    with applied(model, session.update):
        return weights(model)


def assert_same_bits(one: Any, other: Any) -> None:
    a = one if isinstance(one, dict) else weights(one)
    b = other if isinstance(other, dict) else weights(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).double().norm() / expected.double().norm())


@pytest.mark.parametrize(
    "name", ["memit", "memit_seq", "emmet_seq", "alphaedit", "encore", "rome_original"]
)
def test_a_sequence_is_its_edits_one_after_another(tiny: Tiny, name: str) -> None:
    """Against `edit` on the edited model, with earlier keys in the solve as a term of
    their own, factored anew."""
    chosen = wanted(name)
    session = begin(tiny, chosen)
    model = copy.deepcopy(tiny.model)
    held = prepare(chosen, tiny.statistics)
    for batch in BATCHES:
        step = session.step(batch)
        assert step.decision == "accepted" and step.scale == 1 and not step.reasons
        now = model_fingerprint(model)
        known = {
            layer: replace(each, accepted_for=now)
            for layer, each in tiny.statistics.items()
        }
        result = edit(
            model,
            tiny.tokenizer,
            batch,
            chosen,
            known,
            contexts=CONTEXTS,
            prepared=held,
        )
        assert step.report is not None
        for mine, theirs in zip(
            step.report.outcomes, result.report.outcomes, strict=True
        ):
            assert mine.edit == theirs.edit
            assert mine.after == pytest.approx(theirs.after, rel=1e-3)
            assert mine.before == pytest.approx(theirs.before, rel=1e-3)
        with applied(model, result.update):
            edited = weights(model)
            fresh = {}
            for layer in chosen.layers:
                keys = keys_at_subjects(
                    session._adapter.of(model),
                    tiny.tokenizer,
                    batch,
                    CONTEXTS,
                    layer,
                    chosen.key_average,
                )
                fresh[layer] = keys
        # Keys of the model after the edit: those of the solve, for a layer's key
        # depends on the layers below it alone, which were edited before it.
        held = held.added(fresh)
        model.load_state_dict(edited)
    for key, value in weights(session.model).items():
        assert relative(value, edited[key]) < 1e-5


def test_earlier_keys_are_the_ones_solved_with(tiny: Tiny) -> None:
    """Which published codes take before or after the edit: the same, by layers."""
    session = begin(tiny)
    session.step(EDITS[:3])
    for layer in (0, 1):
        after = keys_at_subjects(
            session._adapter, tiny.tokenizer, EDITS[:3], CONTEXTS, layer, "half"
        )
        (kept,) = session.state.layers[layer].recent
        assert relative(kept, after) < 1e-5


def test_earlier_edits_are_disturbed_less(tiny: Tiny) -> None:
    """What the term is for: Σ ‖Δ k_p‖² of the second step falls."""
    moved = []
    for weight in (0.0, 1.0, 100.0):
        session = begin(tiny, wanted(earlier_weight=weight, layers=[1]))
        session.step(EDITS[:3])
        keys = keys_at_subjects(
            session._adapter, tiny.tokenizer, EDITS[:3], CONTEXTS, 1, "half"
        )
        before = session._adapter.matrix(1).detach().double().clone()
        session.step(EDITS[3:])
        change = session._adapter.matrix(1).detach().double() - before
        moved.append(float((keys @ change.T).norm()))
    assert moved[0] > moved[1] > moved[2]


def test_the_update_is_all_that_changed(tiny: Tiny, tmp_path: Path) -> None:
    session = begin(tiny)
    for batch in BATCHES:
        session.step(batch)
    update = session.update
    assert update.metadata["edits"] == [each.as_dict() for each in EDITS]
    assert update.metadata["base_fingerprint"] == model_fingerprint(tiny.model)
    assert update.metadata["recipe"]["name"] == "memit_seq"
    loaded = UpdateSet.load(update.save(tmp_path / "update.safetensors"))
    model = copy.deepcopy(tiny.model)
    with applied(model, loaded):
        assert_same_bits(model, session.model)
    norms = {address.layer: change.norm() for address, change in update}
    for layer, drift in session.drift.items():
        original = tiny.adapter.matrix(layer).detach().double()
        assert drift == pytest.approx(norms[layer] / float(original.norm()), rel=1e-6)
        moved = session._adapter.matrix(layer).detach().double() - original
        assert drift == pytest.approx(float(moved.norm() / original.norm()), rel=1e-4)
        moment = tiny.statistics[layer].second_moment.double()
        kept = session.state.layers[layer]
        assert kept.damage == pytest.approx(
            float(torch.trace(moved @ moment @ moved.T)), rel=1e-3
        )
    session.revert()
    assert_same_bits(session.model, tiny.model)
    with pytest.raises(SessionError, match="was reverted; fork it"):
        session.step(EDITS[:1])
    assert_same_bits(session.fork(copy.deepcopy(tiny.model)).model, model_of(session))


def test_many_factors_become_the_change_itself(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Factors never take more than twice what ΔW takes, and the model is the same."""
    session, steps = begin(tiny, wanted(layers=[1])), 0
    d_value = tiny.adapter.matrix(1).shape[0]
    plain = session.state.layers[1]
    while steps * len(EDITS) <= 2 * d_value + len(EDITS):
        session.step(EDITS)
        steps += 1
        change = session.state.layers[1].change
        assert change is not None and change.rank <= 2 * d_value
    assert plain.change is None and change.rank < steps * len(EDITS)
    moved = session._adapter.matrix(1).detach() - tiny.adapter.matrix(1).detach()
    assert relative(change.dense(), moved) < 1e-5


@pytest.mark.parametrize("name", ["memit_seq", "emmet_seq", "alphaedit"])
def test_saved_and_resumed_is_uninterrupted(
    tiny: Tiny, tmp_path: Path, name: str
) -> None:
    canary = Canary.of(tiny.tokenizer, HELD_OUT)
    options = {"canary": canary, "guard": Guard(on_limit="warn", sample=2)}
    whole = begin(tiny, wanted(name), **options)
    first = whole.step(BATCHES[0])
    path = whole.save(tmp_path / "session.safetensors")
    resumed = EditSession.resume(
        path,
        copy.deepcopy(tiny.model),
        tiny.tokenizer,
        tiny.statistics,
        canary=canary,
    )
    assert_same_bits(whole.model, resumed.model)
    assert first.made
    for batch in BATCHES[1:]:
        one, other = whole.step(batch), resumed.step(batch)
        assert one.readings == other.readings
        assert replace(one, seconds={}, report=None) == replace(
            other, seconds={}, report=None
        )
        assert_same_bits(whole.model, resumed.model)
    again = resumed.save(tmp_path / "other.safetensors")
    assert again.read_bytes() == whole.save(path).read_bytes()
    assert SequenceState.load(path).edits == tuple(EDITS)


def test_forks_share_nothing(tiny: Tiny) -> None:
    session = begin(tiny)
    session.step(BATCHES[0])
    before, state = weights(session.model), session.state
    other = session.fork(copy.deepcopy(tiny.model))
    assert_same_bits(session.model, other.model)
    other.step(BATCHES[1])
    assert_same_bits(session.model, before)
    assert session.state is state and state.edits == tuple(BATCHES[0])
    assert other.state.edits == (*BATCHES[0], *BATCHES[1])
    # Both go on alike: nothing of the fork's step was left in the session.
    session.step(BATCHES[1])
    assert_same_bits(session.model, other.model)
    with pytest.raises(SessionError, match="a copy of the model of its own"):
        session.fork(session.model)


def test_two_sessions_on_two_models_are_as_each_alone(tiny: Tiny) -> None:
    alone = begin(tiny)
    alone.step(BATCHES[0])
    one, other = begin(tiny), begin(tiny)
    other.step(BATCHES[2])
    one.step(BATCHES[0])
    assert_same_bits(one.model, alone.model)


def test_a_sessions_model_and_statistics_are_its_own(
    tiny: Tiny, tmp_path: Path
) -> None:
    session = begin(tiny)
    session.step(BATCHES[0])
    path = session.save(tmp_path / "session.safetensors")

    def resume(model: Any, statistics: Any = None, **options: Any) -> EditSession:
        statistics = statistics or tiny.statistics
        return EditSession.resume(path, model, tiny.tokenizer, statistics, **options)

    with pytest.raises(SessionError, match="load the unedited model"):
        resume(session.model)
    other = {k: v.shrunk("ridge:0.1") for k, v in tiny.statistics.items()}
    with pytest.raises(SessionError, match="was begun with the statistics"):
        resume(copy.deepcopy(tiny.model), other)
    with pytest.raises(SessionError, match="without held-out text"):
        canary = Canary.of(tiny.tokenizer, HELD_OUT)
        resume(copy.deepcopy(tiny.model), canary=canary)
    with pytest.raises(SessionError, match="no such file"):
        SequenceState.load(tmp_path / "other")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d[: len(d) // 2], "not a session"),
        (lambda d: d.replace(b"session/1", b"session/9"), "format"),
        (lambda d: d.replace(b"on_limit", b"on_limut"), "not a session"),
        (lambda d: d.replace(b'\\"steps\\": 1', b'\\"stops\\": 1'), "not a session"),
        (lambda d: d.replace(b"0/left", b"7/left"), "lacks one of its factors"),
        (lambda d: b"", "not a session"),
    ],
)
def test_damaged_files_are_refused(
    tiny: Tiny, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    session = begin(tiny)
    session.step(BATCHES[0])
    path = session.save(tmp_path / "session.safetensors")
    data = path.read_bytes()
    assert damage(data) != data
    path.write_bytes(damage(data))
    with pytest.raises(SessionError, match=message):
        SequenceState.load(path)


def test_a_session_that_cannot_be_written_says_so(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="cannot be written"):
        begin(tiny).save(tmp_path / "missing" / "session.safetensors")


# --- the guard ------------------------------------------------------------------------


LIMITS = {
    "leverage": 1e9,
    "condition": 1e-9,
    "relative_norm": 1e-9,
    "drift": 1e-9,
    "damage": 1e-12,
    "total_damage": 1e-12,
    "canary": 1e-9,
    "total_canary": 1e-9,
}
"""Each beyond what any edit keeps to."""


@pytest.mark.parametrize("limit", sorted(LIMITS))
def test_a_refused_step_leaves_the_model_untouched(tiny: Tiny, limit: str) -> None:
    canary = Canary.of(tiny.tokenizer, HELD_OUT)
    guard = replace(OFF, on_limit="refuse", **{limit: LIMITS[limit]})
    session = begin(tiny, canary=canary, guard=guard)
    step = session.step(EDITS[:2])
    assert_same_bits(session.model, tiny.model)
    assert step.decision == "refused" and not step.made and step.scale == 0
    assert step.report is None and step.readings is not None
    (reason,) = step.reasons
    bound = "least" if limit == "leverage" else "most"
    assert f"at {bound} {LIMITS[limit]:g}" in reason
    state = session.state
    assert state.edits == () and (state.steps, state.refused) == (1, 1)
    assert state.layers[0].change is None and state.layers[0].recent == ()
    assert session.drift == {0: 0.0, 1: 0.0}


def test_readings_are_what_they_say(tiny: Tiny) -> None:
    canary = Canary.of(tiny.tokenizer, HELD_OUT)
    guard = replace(OFF, canary=1e9, sample=8)
    session = begin(tiny, wanted(layers=[1]), canary=canary, guard=guard)
    original = tiny.adapter.matrix(1).detach().double()
    moment = tiny.statistics[1].second_moment.double()
    scale = torch.trace(original @ moment @ original.T)
    perplexities = [canary.perplexity(tiny.adapter)]
    before = original
    for batch in BATCHES:
        step = session.step(batch)
        perplexities.append(canary.perplexity(session._adapter))
        now = session._adapter.matrix(1).detach().double()
        found = step.readings
        assert found is not None
        one, total = now - before, now - original
        size = original.norm()
        assert found.relative_norm == pytest.approx(float(one.norm() / size), rel=1e-4)
        assert found.drift == pytest.approx(float(total.norm() / size), rel=1e-4)
        for value, change in ((found.damage, one), (found.total_damage, total)):
            expected = float(torch.trace(change @ moment @ change.T) / scale)
            assert value == pytest.approx(expected, rel=1e-3)
        assert found.canary == pytest.approx(perplexities[-1] / perplexities[-2])
        assert found.total_canary == pytest.approx(perplexities[-1] / perplexities[0])
        before = now
    # λ kᵀ (λC + C_p)⁻¹ k / d_key of the last step, by the dense matrix.
    kept = session.state.layers[1].recent
    earlier = torch.cat(kept[:-1])
    dense = torch.linalg.inv(5.0 * moment + earlier.T @ earlier)
    leverage = (kept[-1] @ dense * kept[-1]).sum(1).min() * 5.0 / len(moment)
    assert found.leverage == pytest.approx(float(leverage), rel=1e-6)


def test_text_may_be_read_now_and_then(tiny: Tiny) -> None:
    canary = Canary.of(tiny.tokenizer, HELD_OUT)
    guard = Guard(on_limit="warn", damage=None, every=2)
    session = begin(tiny, canary=canary, guard=guard)
    found = [session.step([each]).readings for each in EDITS[:4]]
    assert [r is not None and r.canary is not None for r in found] == [True, False] * 2
    assert all(r is not None and r.damage is not None for r in found)
    # The third step's is relative to the first's, the last that was read.
    third, state = found[2], session.state
    assert third is not None and state.perplexity is not None
    assert third.total_canary == pytest.approx(
        state.perplexity[1] / state.perplexity[0]
    )


def test_warnings_let_an_edit_through(tiny: Tiny) -> None:
    plain = begin(tiny)
    plain.step(EDITS[:2])
    warned = begin(tiny, guard=replace(OFF, drift=1e-9))
    step = warned.step(EDITS[:2])
    assert step.decision == "warned" and step.made and "‖W_t − W₀‖" in step.reasons[0]
    assert_same_bits(plain.model, warned.model)


def test_shrinking_keeps_to_the_limit(tiny: Tiny) -> None:
    plain = begin(tiny)
    whole = plain.step(EDITS[:2]).readings
    assert whole is not None
    limit = 0.3 * whole.relative_norm
    shrunk = begin(tiny, guard=replace(OFF, on_limit="shrink", relative_norm=limit))
    step = shrunk.step(EDITS[:2])
    assert step.decision == "shrunk" and step.scale == 0.25
    assert step.readings is not None and step.report is not None
    assert step.readings.relative_norm == pytest.approx(whole.relative_norm / 4)
    assert step.readings.drift == pytest.approx(whole.drift / 4)
    assert "‖ΔW‖/‖W₀‖" in step.reasons[0]
    for layer in (0, 1):
        one = plain.state.layers[layer].change
        quarter = shrunk.state.layers[layer].change
        assert one is not None and quarter is not None
        assert relative(4 * quarter.dense(), one.dense()) < 1e-6


@pytest.mark.parametrize("limit", ["condition", "relative_norm"])
def test_what_shrinking_cannot_help_is_refused(tiny: Tiny, limit: str) -> None:
    guard = replace(OFF, on_limit="shrink", **{limit: LIMITS[limit]})
    session = begin(tiny, guard=guard)
    assert session.step(EDITS[:2]).decision == "refused"
    assert_same_bits(session.model, tiny.model)


def test_outputs_that_are_not_finite_are_a_refused_step(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = begin(tiny)
    session.step(EDITS[:1])
    before = weights(session.model)

    def infinite(*_: Any) -> Any:
        from unified_edit.errors import NonFiniteError

        raise NonFiniteError("the model's logits are not finite")

    monkeypatch.setattr(session, "_perplexity", infinite)
    step = session.step(EDITS[1:2])
    assert step.decision == "refused" and "not finite" in step.reasons[0]
    assert_same_bits(session.model, before)


def test_an_interrupted_step_leaves_the_model_as_it_was(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = begin(tiny)
    session.step(EDITS[:1])
    before, state = weights(session.model), session.state

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "_perplexity", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.step(EDITS[1:2])
    assert_same_bits(session.model, before)
    assert session.state is state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_limit": "stop"}, "on_limit is one of refuse, warn, shrink"),
        ({"damage": 0.0}, "damage must be positive, or None"),
        ({"drift": math.nan}, "drift must be positive"),
        ({"sample": -1}, "sample must be ≥ 0"),
        ({"every": 0}, "every must be ≥ 1"),
    ],
)
def test_bad_limits_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Guard(**changes)


def test_a_reading_that_is_no_number_is_beyond_every_limit(tiny: Tiny) -> None:
    session = begin(tiny, guard=Guard())
    readings = session.step(EDITS[:1]).readings
    assert readings is not None
    for name in ("damage", "canary", "retention"):
        found = Guard().broken(replace(readings, **{name: math.nan}))
        assert name in found
    json.dumps(dataclasses.asdict(readings), allow_nan=False)


# --- regularizers in a sequence -------------------------------------------------------


def test_the_norm_cap_holds_for_the_whole_change(tiny: Tiny) -> None:
    plain = begin(tiny, wanted(layers=[1]))
    plain.step(EDITS[:2])
    cap = 0.6 * plain.drift[1]
    session = begin(tiny, wanted(layers=[1], regularizer=f"norm:{cap!r}"))
    for batch in BATCHES:
        session.step(batch)
        assert session.drift[1] <= cap * (1 + 1e-6)
    moved = session._adapter.matrix(1).detach() - tiny.adapter.matrix(1).detach()
    norm = float(moved.norm() / tiny.adapter.matrix(1).norm())
    assert norm == pytest.approx(cap, rel=1e-4)


def test_rect_acts_on_each_step_relative_to_the_weight_as_it_is(tiny: Tiny) -> None:
    chosen = wanted(layers=[1], regularizer="rect:0.3")
    session = begin(tiny, chosen)
    for batch in BATCHES:
        before = session._adapter.matrix(1).detach().clone()
        session.step(batch)
        moved = session._adapter.matrix(1).detach() - before
        changed = moved != 0
        assert float(changed.double().mean()) == pytest.approx(0.3, abs=0.02)
        ratio = (moved / before).abs()
        # What was kept is what was largest beside the weight, up to rounding.
        assert float(ratio[changed].min()) > 0


def test_layers_above_see_the_update_without_rect(tiny: Tiny) -> None:
    """As published: residuals are spread with unmasked updates."""
    plain = begin(tiny)
    masked = begin(tiny, wanted(regularizer="rect:0.3"))
    for session in (plain, masked):
        session.step(EDITS[:2])
    above = [session.state.layers[1].recent[0] for session in (plain, masked)]
    assert torch.equal(above[0], above[1])


def test_prune_acts_once_at_the_end(tiny: Tiny) -> None:
    """Relative to the unedited weights, on the whole change; the sequence goes on
    without it."""
    text = "prune:1.2"
    plain = begin(tiny, wanted(layers=[1]))
    session = begin(tiny, wanted(layers=[1], regularizer=text))
    for each in (plain, session):
        for batch in BATCHES:
            each.step(batch)
    assert_same_bits(plain.model, session.model)
    rule = Regularizer.parse(text)
    change = session.state.layers[1].change
    assert rule is not None and change is not None
    weight = 1e-2 * tiny.adapter.matrix(1).detach()
    assert relative(rule(change, weight).dense(), change.dense()) > 0.01
    pruned = rule(change, tiny.adapter.matrix(1).detach())
    ((_, found),) = session.update
    assert torch.equal(found.dense(), pruned.dense())
    with session.finished():
        moved = session._adapter.matrix(1).detach() - tiny.adapter.matrix(1).detach()
        assert relative(moved, pruned.dense()) < 1e-5
    assert_same_bits(plain.model, session.model)
    with plain.finished():
        assert_same_bits(plain.model, session.model)


def test_one_edit_call_regularizes_and_measures_what_it_returns(tiny: Tiny) -> None:
    plain = edit(
        *(tiny.model, tiny.tokenizer, EDITS, wanted(layers=[1]), tiny.statistics),
        contexts=CONTEXTS,
    )
    capped = edit(
        tiny.model,
        tiny.tokenizer,
        EDITS,
        wanted(layers=[1], regularizer="norm:0.001"),
        tiny.statistics,
        contexts=CONTEXTS,
    )
    certificate = capped.report.certificates[1]
    assert certificate.relative_norm == pytest.approx(0.001, rel=1e-4)
    shrunk = 0.001 / (plain.report.certificates[1].relative_norm or 0.0)
    assert certificate.preservation_damage == pytest.approx(
        shrunk**2 * (plain.report.certificates[1].preservation_damage or 0.0), rel=1e-3
    )
    assert certificate.relative_residual_error > 0.5
    ((_, update),) = capped.update
    original = tiny.adapter.matrix(1).detach()
    assert update.norm() == pytest.approx(0.001 * float(original.norm()), rel=1e-5)
    with pytest.raises(RecipeError, match="expected none, rect:SHARE"):
        wanted(regularizer="rect:2")
