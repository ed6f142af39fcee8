"""The engine against textbook formulas written out densely, with the model's own
float64 keys: W' k = target, rank one, spreading over layers."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_kit import (
    CONTEXTS,
    EDITS,
    TEXTS,
    Tiny,
    assert_same_bits,
    averaged_key,
    bias_of,
    greedy_word,
    hidden_of_edit,
    state_of,
    target_ids,
    weight_of,
)
from torch import Tensor

from covariance_cache import KeyStatistics
from unified_edit.algebra.update import UpdateSet
from unified_edit.edits import Edit
from unified_edit.engine import EditResult, edit
from unified_edit.errors import (
    EditError,
    IllConditioned,
    InfeasibleEdits,
    NonFiniteError,
    RecipeError,
)
from unified_edit.live import applied
from unified_edit.model.descent import TargetSettings
from unified_edit.model.prompts import Contexts
from unified_edit.model.targets import optimize_targets
from unified_edit.preparation import prepare
from unified_edit.recipes import RECIPES, Recipe, recipe

STEPS = 3
LAYER = 1


def run(tiny: Tiny, wanted: Recipe, edits: list[Edit] = EDITS, **options: Any) -> Any:
    options.setdefault("contexts", CONTEXTS)
    return edit(tiny.model, tiny.tokenizer, edits, wanted, tiny.statistics, **options)


def targets_of(tiny: Tiny, wanted: Recipe, edits: list[Edit]) -> Tensor:
    return optimize_targets(
        tiny.adapter,
        tiny.tokenizer,
        edits,
        CONTEXTS,
        wanted.layers[-1],
        wanted.targets,
    ).values.double()


def moment_of(tiny: Tiny, layer: int) -> Tensor:
    return tiny.statistics[layer].second_moment.double()


def brute_keys(tiny: Tiny, model: Any, edits: list[Edit], layer: int, how: str) -> Any:
    """[d_key, n], in columns as papers have it."""
    arguments = (model, tiny.kind, tiny.tokenizer)
    return torch.stack(
        [averaged_key(*arguments, each, layer, how) for each in edits], dim=1
    )


def change_of(result: EditResult, layer: int) -> Tensor:
    for address, update in result.update:
        if address.layer == layer:
            return update.dense().double()
    raise AssertionError(f"no update of layer {layer}")


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert float((found - expected).norm()) < tolerance * float(expected.norm())


@pytest.mark.parametrize("name", ["rome", "r_rome", "p_rome", "emmet"])
def test_equality_makes_the_key_give_the_target(tiny64: Tiny, name: str) -> None:
    for site in ("mlp_output", "block_output"):
        wanted = recipe(name, layers=[LAYER], steps=STEPS, site=site)
        result = run(tiny64, wanted)
        with applied(tiny64.model, result.update):
            weight = weight_of(tiny64.model, tiny64.kind, LAYER).clone()
        keys = brute_keys(tiny64, tiny64.model, EDITS, LAYER, wanted.key_average)
        targets = targets_of(tiny64, wanted, EDITS).T
        bias = bias_of(tiny64.model, tiny64.kind, LAYER)[:, None]
        if site == "mlp_output":
            assert_close(weight @ keys + bias, targets)
            continue
        before = weight_of(tiny64.model, tiny64.kind, LAYER)
        arguments = (tiny64.model, tiny64.kind, tiny64.tokenizer)
        hidden = torch.stack(
            [hidden_of_edit(*arguments, each, LAYER) for each in EDITS], dim=1
        )
        assert_close((weight - before) @ keys, targets - hidden)


def test_equality_at_the_block_output_is_reached_by_the_model_itself(
    tiny64: Tiny,
) -> None:
    wanted = recipe("emmet", layers=[LAYER], steps=STEPS, key_average="clean")
    result = run(tiny64, wanted)
    targets = targets_of(tiny64, wanted, EDITS)
    with applied(tiny64.model, result.update):
        for each, target in zip(EDITS, targets, strict=True):
            hidden = hidden_of_edit(
                tiny64.model, tiny64.kind, tiny64.tokenizer, each, LAYER
            )
            assert_close(hidden, target)


def test_one_edit_by_rome_is_the_papers_rank_one_update(tiny64: Tiny) -> None:
    """Meng et al. 2022, equation 2: Λ (C⁻¹k)ᵀ with Λ = (v* − W k) / (C⁻¹k)ᵀ k."""
    for each in (EDITS[0], EDITS[2]):
        wanted = recipe("rome", layers=[LAYER], steps=STEPS)
        result = run(tiny64, wanted, [each])
        key = brute_keys(tiny64, tiny64.model, [each], LAYER, "flat")[:, 0]
        target = targets_of(tiny64, wanted, [each])[0]
        weight = weight_of(tiny64.model, tiny64.kind, LAYER)
        bias = bias_of(tiny64.model, tiny64.kind, LAYER)
        direction = torch.linalg.inv(moment_of(tiny64, LAYER)) @ key
        expected = torch.outer(
            (target - bias - weight @ key) / (direction @ key), direction
        )
        assert_close(change_of(result, LAYER), expected)
        ((_, update),) = result.update
        assert update.rank == 1


def test_romes_published_code_has_two_keys(tiny64: Tiny) -> None:
    """(v* − W k_u)(C⁻¹k̄)ᵀ / (k_uᵀ C⁻¹ k̄)."""
    for each in (EDITS[1], EDITS[3]):
        wanted = recipe("rome_original", layers=[LAYER], steps=STEPS)
        result = run(tiny64, wanted, [each])
        average = brute_keys(tiny64, tiny64.model, [each], LAYER, "flat")[:, 0]
        clean = brute_keys(tiny64, tiny64.model, [each], LAYER, "clean")[:, 0]
        target = targets_of(tiny64, wanted, [each])[0]
        weight = weight_of(tiny64.model, tiny64.kind, LAYER)
        bias = bias_of(tiny64.model, tiny64.kind, LAYER)
        direction = torch.linalg.inv(moment_of(tiny64, LAYER)) @ average
        expected = torch.outer(
            (target - bias - weight @ clean) / (clean @ direction), direction
        )
        assert_close(change_of(result, LAYER), expected)
        one_key = run(tiny64, recipe("rome", layers=[LAYER], steps=STEPS), [each])
        difference = change_of(one_key, LAYER) - expected
        assert float(difference.norm()) > 1e-2 * float(expected.norm())


def test_emmet_is_the_papers_equality(tiny64: Tiny) -> None:
    """Gupta et al. 2024, equation 9: R (Kᵀ C⁻¹ K)⁻¹ Kᵀ C⁻¹."""
    wanted = recipe("emmet", layers=[2], steps=STEPS)
    result = run(tiny64, wanted)
    keys = brute_keys(tiny64, tiny64.model, EDITS, 2, "half")
    arguments = (tiny64.model, tiny64.kind, tiny64.tokenizer)
    hidden = torch.stack([hidden_of_edit(*arguments, e, 2) for e in EDITS], dim=1)
    residuals = targets_of(tiny64, wanted, EDITS).T - hidden
    pulled = keys.T @ torch.linalg.inv(moment_of(tiny64, 2))
    expected = residuals @ torch.linalg.inv(pulled @ keys) @ pulled
    assert_close(change_of(result, 2), expected)


def spread(tiny: Tiny, wanted: Recipe, solve: Any) -> dict[int, Tensor]:
    """MEMIT's loop on a copy of the model: keys and h_L anew at each layer."""
    model = copy.deepcopy(tiny.model)
    targets = targets_of(tiny, wanted, EDITS).T
    arguments = (model, tiny.kind, tiny.tokenizer)
    last, changes = wanted.layers[-1], {}
    for index, layer in enumerate(wanted.layers):
        keys = brute_keys(tiny, model, EDITS, layer, wanted.key_average)
        hidden = torch.stack([hidden_of_edit(*arguments, e, last) for e in EDITS], 1)
        residuals = (targets - hidden) / (len(wanted.layers) - index)
        change = solve(moment_of(tiny, layer), keys, residuals)
        changes[layer] = change
        with torch.no_grad():
            weight_of(model, tiny.kind, layer).add_(change)  # a view of the weight
    return changes


def test_memit_over_two_layers_is_the_published_loop(tiny64: Tiny) -> None:
    """Meng et al. 2023, equation 14: R Kᵀ (λC + K Kᵀ)⁻¹."""
    weight = 3.0

    def memit(moment: Tensor, keys: Tensor, residuals: Tensor) -> Tensor:
        return residuals @ keys.T @ torch.linalg.inv(weight * moment + keys @ keys.T)

    wanted = recipe("memit", layers=[0, 2], steps=STEPS, preservation_weight=weight)
    result = run(tiny64, wanted)
    expected = spread(tiny64, wanted, memit)
    assert [address.layer for address, _ in result.update] == [0, 2]
    for layer in (0, 2):
        assert_close(change_of(result, layer), expected[layer])


def test_alphaedit_over_two_layers_is_the_published_loop(tiny64: Tiny) -> None:
    """Fang et al. 2025, equation 14: Δᵀ = (P K Kᵀ + L2·I)⁻¹ P K Rᵀ."""
    ridge, threshold = 2.0, 0.5

    def alphaedit(moment: Tensor, keys: Tensor, residuals: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(moment)
        null = vectors[:, values < threshold * values.mean()]
        assert 0 < null.shape[1] < len(values)
        projection = null @ null.T
        system = projection @ keys @ keys.T + ridge * torch.eye(len(values)).double()
        return torch.linalg.solve(system, projection @ keys @ residuals.T).T

    wanted = recipe(
        "alphaedit",
        layers=[1, 2],
        steps=STEPS,
        ridge=ridge,
        null_space_threshold=threshold,
        null_space_relative=True,
    )
    result = run(tiny64, wanted)
    expected = spread(tiny64, wanted, alphaedit)
    for layer in (1, 2):
        assert_close(change_of(result, layer), expected[layer])


def settings_for(name: str) -> dict[str, Any]:
    if name != "alphaedit":
        return {}
    return {"null_space_threshold": 0.5, "null_space_relative": True}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_runs_with_its_own_contexts(tiny: Tiny, name: str) -> None:
    """The models are checked to be the same bytes by the fixture."""
    wanted = recipe(name, layers=[LAYER], steps=STEPS, **settings_for(name))
    result = run(tiny, wanted, EDITS[:2], contexts=None)
    plain = json.loads(json.dumps(result.report.as_dict(), allow_nan=False))
    assert plain["recipe"] == name and plain["origin"] == "unvalidated"
    assert len(plain["outcomes"]) == 2 and set(plain["certificates"]) == {"1"}
    assert plain["outcomes"][0]["edit"]["subject"] == EDITS[0].subject
    assert {"contexts", "targets", "solve"} <= set(plain["seconds"])
    assert "not validated" in plain["notes"][-1]
    assert name in str(result.report) and "layer 1" in str(result.report)
    samples = len(wanted.contexts.samples)
    assert len(result.update.metadata["contexts"]) == 1 + samples
    assert result.update.metadata["recipe"]["name"] == name


def test_the_report_says_what_the_edited_model_says(tiny: Tiny) -> None:
    wanted = recipe("emmet", layers=[LAYER], steps=12, clamp=3.0)
    result = run(tiny, wanted, EDITS[:3])

    def probability(each: Edit) -> float:
        ids = tiny.tokenizer(each.text)["input_ids"]
        answer = target_ids(tiny.tokenizer, each.text, each.target)
        with torch.no_grad():
            logs = tiny.model(input_ids=torch.tensor([ids + answer])).logits[0]
        logs = logs.log_softmax(-1)
        nll = [logs[len(ids) - 1 + i, token] for i, token in enumerate(answer)]
        return math.exp(float(sum(nll)) / len(answer))

    outcomes = result.report.outcomes
    for each, outcome in zip(EDITS, outcomes, strict=False):
        assert math.isclose(outcome.before, probability(each), rel_tol=1e-3)
    with applied(tiny.model, result.update):
        for each, outcome in zip(EDITS, outcomes, strict=False):
            assert math.isclose(outcome.after, probability(each), rel_tol=1e-3)
    said = sum(outcome.says_target for outcome in outcomes) / len(outcomes)
    assert result.report.success == said


def test_notes_name_edits_that_the_model_said_already(tiny: Tiny) -> None:
    prompt, word = greedy_word(tiny)
    known = Edit("{}" + prompt.removeprefix(prompt.split()[0]), prompt.split()[0], word)
    wanted = recipe("emmet", layers=[LAYER], steps=STEPS)
    result = run(tiny, wanted, [EDITS[2], known])
    notes = [note for note in result.report.notes if "said so before" in note]
    assert len(notes) == 1 and notes[0].startswith("edit 1 (")
    assert result.report.outcomes[1].said_target
    assert not result.report.outcomes[0].said_target


def test_notes_name_targets_that_were_not_reached(tiny: Tiny) -> None:
    wanted = recipe("memit", layers=[LAYER], steps=2, clamp=1e-3)
    result = run(tiny, wanted, EDITS[:2])
    notes = [note for note in result.report.notes if "does not say it" in note]
    assert len(notes) == 2 and "target value was not found" in notes[0]
    assert result.report.success == 0


def test_two_edits_of_one_key_are_infeasible_and_named(tiny: Tiny) -> None:
    """What follows the subject does not change its key, so they share one."""
    edits = [EDITS[0], EDITS[1], Edit("{} likes", "Ada Lovelace", "chess")]
    wanted = recipe("emmet", layers=[LAYER], steps=STEPS)
    # Either may be named as the one that conflicts with the other.
    both = "(?=.*edit 0 .*Ada Lovelace lives)(?=.*edit 2 .*Ada Lovelace likes)"
    with pytest.raises(InfeasibleEdits, match=both):
        run(tiny, wanted, edits)
    run(tiny, recipe("memit", layers=[LAYER], steps=STEPS), edits)  # least squares can
    with pytest.raises((InfeasibleEdits, IllConditioned)):
        run(tiny, recipe("rome_original", layers=[LAYER], steps=STEPS), edits)


def test_same_inputs_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    wanted = recipe("memit", layers=[0, 1], steps=STEPS)
    files = []
    for number in range(2):
        torch.manual_seed(number)
        result = run(tiny, wanted, contexts=None, seed=4)
        files.append(result.update.save(tmp_path / f"{number}").read_bytes())
    assert files[0] == files[1]
    loaded = UpdateSet.load(tmp_path / "0")
    metadata = loaded.metadata
    assert metadata["seed"] == 4 and len(metadata["edits"]) == len(EDITS)
    assert metadata["contexts"][0] == "{}" and len(metadata["contexts"]) == 6
    assert metadata["statistics"] == {
        str(layer): tiny.statistics[layer].fingerprint() for layer in (0, 1)
    }
    other = run(tiny, wanted, contexts=None, seed=5)
    assert other.update.metadata["contexts"] != metadata["contexts"]


def test_stored_contexts_repeat_the_update(tiny: Tiny) -> None:
    wanted = recipe("emmet", layers=[LAYER], steps=STEPS)
    first = run(tiny, wanted, contexts=None, seed=2)
    again = run(
        tiny, wanted, contexts=Contexts(tuple(first.update.metadata["contexts"]))
    )
    assert torch.equal(change_of(first, LAYER), change_of(again, LAYER))


def test_prepared_and_ready_targets_change_nothing(tiny: Tiny) -> None:
    wanted = recipe("memit", layers=[0, 1], steps=STEPS)
    expected = run(tiny, wanted)
    prepared = prepare(wanted, tiny.statistics)
    targets = optimize_targets(
        tiny.adapter, tiny.tokenizer, EDITS, CONTEXTS, 1, wanted.targets
    )
    found = run(tiny, wanted, prepared=prepared, targets=targets)
    for layer in (0, 1):
        assert torch.equal(change_of(found, layer), change_of(expected, layer))
    with pytest.raises(RecipeError, match="prepared"):
        run(tiny, replace(wanted, layers=(1,)), prepared=prepared)
    with pytest.raises(RecipeError, match="no key statistics"):
        some = {0: tiny.statistics[0]}
        edit(tiny.model, tiny.tokenizer, EDITS, wanted, some, prepared=prepared)
    with pytest.raises(RecipeError, match="2 edits and 5 target values"):
        run(tiny, wanted, EDITS[:2], targets=targets)


def test_weights_and_modes_are_restored_when_it_raises(tiny: Tiny) -> None:
    """The second layer's system fails after the first layer's weight was changed."""
    model = copy.deepcopy(tiny.model).train()
    before = state_of(model)
    wanted = recipe("memit", layers=[0, 1], steps=STEPS)
    prepared = prepare(wanted, tiny.statistics)
    held = prepared.layers[1]
    broken = replace(held.factorization, factor=held.factorization.factor * math.nan)
    prepared.layers[1] = replace(held, factorization=broken)
    with pytest.raises(Exception):  # noqa: B017
        edit(
            model,
            tiny.tokenizer,
            EDITS,
            wanted,
            tiny.statistics,
            contexts=CONTEXTS,
            prepared=prepared,
        )
    assert_same_bits(model, before)
    assert all(module.training for module in model.modules())


def test_dropout_does_not_enter(gpt2: Tiny) -> None:
    model = copy.deepcopy(gpt2.model).train()
    wanted = recipe("emmet", layers=[LAYER], steps=STEPS)
    found = edit(
        model, gpt2.tokenizer, EDITS, wanted, gpt2.statistics, contexts=CONTEXTS
    )
    assert model.training
    assert torch.equal(change_of(found, LAYER), change_of(run(gpt2, wanted), LAYER))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(tiny: Tiny, dtype: torch.dtype) -> None:
    from covariance_cache import collect

    model = copy.deepcopy(tiny.model).to(dtype)
    before = state_of(model)
    statistics = collect(
        model, tiny.tokenizer, TEXTS, [1], tokens=640, window=32, progress=False
    )
    wanted = recipe("emmet", layers=[1], steps=STEPS)
    result = edit(model, tiny.tokenizer, EDITS, wanted, statistics, contexts=CONTEXTS)
    assert_same_bits(model, before)
    certificate = result.report.certificates[1]
    assert certificate.relative_residual_error < 1e-6
    with applied(model, result.update) as handle:
        assert next(iter(handle.changes.values())) > 0
    assert_same_bits(model, before)


class TestRefusals:
    def wanted(self, **changes: Any) -> Recipe:
        return recipe("emmet", **{"layers": [LAYER], "steps": STEPS, **changes})

    def refused(self, tiny: Tiny, statistics: Any, message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            edit(tiny.model, tiny.tokenizer, EDITS, self.wanted(), statistics)

    def test_statistics_of_a_layer_missing(self, tiny: Tiny) -> None:
        some = {0: tiny.statistics[0]}
        self.refused(tiny, some, r"no key statistics of \[1\]")

    def test_statistics_of_another_layer(self, tiny: Tiny) -> None:
        self.refused(tiny, {1: tiny.statistics[0]}, "are layer 0's")

    def test_statistics_of_another_model(self, tiny: Tiny) -> None:
        found = tiny.statistics[1]
        other = replace(
            found, provenance=replace(found.provenance, model_fingerprint="abc")
        )
        self.refused(tiny, {1: other}, "collected on the model abc")

    def test_statistics_of_another_width(self, tiny: Tiny) -> None:
        found = tiny.statistics[1]
        small = KeyStatistics(1, torch.eye(8), 100, found.provenance)
        self.refused(tiny, {1: small}, "dimensions, the statistics 8")

    def test_statistics_of_too_few_keys(self, tiny: Tiny) -> None:
        few = replace(tiny.statistics[1], count=30)
        self.refused(tiny, {1: few}, "count 30 keys")

    def test_layers_that_do_not_exist(self, tiny: Tiny) -> None:
        with pytest.raises(RecipeError, match="layers 0 to 2"):
            run(tiny, self.wanted(layers=[7]))

    def test_no_edits(self, tiny: Tiny) -> None:
        with pytest.raises(EditError, match="no edits"):
            run(tiny, self.wanted(), [])

    def test_nan_anywhere(self, tiny: Tiny) -> None:
        model = copy.deepcopy(tiny.model)
        name = next(n for n, _ in model.named_parameters() if ".0." in n)
        with torch.no_grad():
            model.get_parameter(name).view(-1)[0] = math.nan
        with pytest.raises(NonFiniteError, match=name):
            edit(model, tiny.tokenizer, EDITS, self.wanted(), tiny.statistics)


def test_the_recipe_of_the_header_is_enough_to_make_it_again(tiny: Tiny) -> None:
    wanted = recipe("memit", layers=[1], steps=STEPS, clamp=1.25)
    stored = json.loads(json.dumps(run(tiny, wanted).update.metadata["recipe"]))
    assert stored["layers"] == [1]
    assert stored["targets"]["clamp"] == 1.25
    fields = {**stored["targets"], "kl_prompts": tuple(stored["targets"]["kl_prompts"])}
    assert TargetSettings(**fields) == wanted.targets
