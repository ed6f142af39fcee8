"""The batched, suffix-only optimisation of targets against a plain loop: one edit at
a time, whole prompts, padded on the right, as the published code does it."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_kit import (
    CONTEXTS,
    EDITS,
    Tiny,
    block_of,
    make_model,
    make_tokenizer,
    mlp_of,
    rows_of,
    subject_index,
    target_ids,
)

from benchmarks.plain_targets import PlainRow, PlainTarget, plain_rows, plain_target
from unified_edit.edits import Edit
from unified_edit.errors import (
    NonFiniteError,
    PromptError,
    RecipeError,
    UnsupportedModel,
)
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.descent import Targets, TargetSettings
from unified_edit.model.prompts import Contexts
from unified_edit.model.targets import optimize_targets

LAYER = 1
SETTINGS = {
    "mlp_output": TargetSettings("mlp_output", steps=6, clamp=4.0, learning_rate=0.3),
    "block_output": TargetSettings("block_output", steps=6, learning_rate=0.3),
}


def plain_targets(
    tiny: Tiny,
    edit: Edit,
    settings: TargetSettings,
    contexts: Contexts = CONTEXTS,
    layer: int = LAYER,
) -> PlainTarget:
    """The plain loop for one edit, on rows that are found by counting bytes."""
    model, tokenizer = tiny.model, tiny.tokenizer
    rows = []
    for text, ids, subject in rows_of(tokenizer, edit, contexts):
        labels = target_ids(tokenizer, text, edit.target)
        rows.append(PlainRow(ids + labels[:-1], subject, len(ids) - 1, labels))
    for template in settings.kl_prompts if settings.kl_factor else ():
        text = template.replace("{}", edit.subject)
        ids = tokenizer(text)["input_ids"]
        end = text.index(edit.subject) + len(edit.subject)
        subject = subject_index(tokenizer, ids, text, end)
        read = subject if settings.kl_position == "subject" else len(ids) - 1
        rows.append(PlainRow(ids, subject, read, []))
    assert rows == plain_rows(tokenizer, edit, contexts, settings)
    at_mlp = settings.site == "mlp_output"
    module = (mlp_of if at_mlp else block_of)(model, tiny.kind, layer)
    wanted = [p for p in model.parameters() if p.requires_grad]
    try:
        model.requires_grad_(False)
        return plain_target(model, module, rows, settings)
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def optimized(
    tiny: Tiny,
    settings: TargetSettings,
    edits: list[Edit] = EDITS,
    contexts: Contexts = CONTEXTS,
    **options: Any,
) -> Targets:
    return optimize_targets(
        tiny.adapter, tiny.tokenizer, edits, contexts, LAYER, settings, **options
    )


def assert_equal_plain(
    found: Targets, index: int, plain: PlainTarget, tolerance: float
) -> None:
    delta = found.values[index] - found.initial[index]
    expected = plain.value - plain.initial
    size = float(expected.norm())
    assert (size > 0) == (len(plain.losses) > 1)
    assert float((delta - expected).norm()) <= tolerance * size
    assert torch.allclose(found.initial[index], plain.initial, rtol=tolerance)
    for name, value in (
        ("initial_probability", plain.probabilities[0]),
        ("probability", plain.probabilities[-1]),
    ):
        same = math.isclose(getattr(found, name)[index], value, rel_tol=tolerance)
        assert same, name
    assert int(found.steps[index]) == len(plain.losses)


@pytest.mark.parametrize("kl_position", ["subject", "end"])
@pytest.mark.parametrize("site", ["mlp_output", "block_output"])
def test_a_batch_equals_the_plain_loop(
    tiny64: Tiny, site: str, kl_position: Any
) -> None:
    settings = replace(
        SETTINGS[site],
        kl_position=kl_position,
        kl_prompts=("{} is a", "Some say that {} was"),
        kl_factor=0.5,
    )
    found = optimized(tiny64, settings)
    assert found.values.dtype == torch.float64
    for index, edit in enumerate(EDITS):
        plain = plain_targets(tiny64, edit, settings)
        assert_equal_plain(found, index, plain, 1e-8)


@pytest.mark.parametrize("site", ["mlp_output", "block_output"])
def test_a_batch_equals_the_plain_loop_in_float32(tiny: Tiny, site: str) -> None:
    settings = replace(SETTINGS[site], steps=4)
    found = optimized(tiny, settings)
    assert found.values.dtype == torch.float32
    for index, edit in enumerate(EDITS):
        plain = plain_targets(tiny, edit, settings)
        assert_equal_plain(found, index, plain, 1e-4)


@pytest.mark.parametrize("contexts", [Contexts(), CONTEXTS], ids=["bare", "three"])
def test_without_kl_and_from_the_first_token_on(
    tiny64: Tiny, contexts: Contexts
) -> None:
    """With the subject as the first token there is no prefix at all."""
    settings = replace(SETTINGS["block_output"], kl_factor=0.0, weight_decay=0.0)
    edits = [Edit("{} lives in", "A", "Oslo"), EDITS[2]]
    for some in (edits[:1], edits):
        found = optimized(tiny64, settings, some, contexts)
        for index, edit in enumerate(some):
            plain = plain_targets(tiny64, edit, settings, contexts)
            assert_equal_plain(found, index, plain, 1e-8)


def test_other_layers(tiny64: Tiny) -> None:
    # From the last layer δ reaches a target only where the subject ends the prompt.
    for layer, edits in ((0, EDITS[:2]), (2, EDITS[2:3])):
        found = optimize_targets(
            tiny64.adapter,
            tiny64.tokenizer,
            edits,
            CONTEXTS,
            layer,
            SETTINGS["block_output"],
        )
        for index, edit in enumerate(edits):
            plain = plain_targets(tiny64, edit, SETTINGS["block_output"], layer=layer)
            assert_equal_plain(found, index, plain, 1e-8)


@pytest.mark.parametrize("budget", [1, 150])
def test_edits_alone_and_together_agree(tiny64: Tiny, budget: int) -> None:
    settings = SETTINGS["block_output"]
    together = optimized(tiny64, settings, token_budget=budget)
    for index, edit in enumerate(EDITS):
        alone = optimized(tiny64, settings, [edit])
        for name in Targets.__dataclass_fields__:
            a, b = getattr(alone, name)[0], getattr(together, name)[index]
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), name


def test_edits_that_are_done_keep_their_value(tiny64: Tiny) -> None:
    settings = replace(
        SETTINGS["mlp_output"],
        steps=8,
        clamp=50.0,
        weight_decay=0.0,
        kl_factor=0.01,
        loss_threshold=1e-9,
    )
    losses = [plain_targets(tiny64, edit, settings).losses for edit in EDITS]
    # One edit comes below it on its way; some are there already or never.
    middle = sorted(losses, key=min)[2]
    settings = replace(settings, loss_threshold=min(middle[:5]) + 1e-6)
    found = optimized(tiny64, settings)
    assert len(set(found.steps.tolist())) > 1
    assert any(1 < step <= 5 for step in found.steps.tolist())
    for index, edit in enumerate(EDITS):
        plain = plain_targets(tiny64, edit, settings)
        assert_equal_plain(found, index, plain, 1e-8)


def test_at_most_steps_less_one_updates(tiny64: Tiny) -> None:
    settings = replace(SETTINGS["block_output"], steps=1)
    found = optimized(tiny64, settings)
    assert torch.equal(found.values, found.initial)
    assert torch.equal(found.probability, found.initial_probability)
    assert found.steps.tolist() == [1] * len(EDITS)
    # Adam's first update is the learning rate in each coordinate, either way.
    settings = replace(settings, steps=2, clamp=1e6, learning_rate=0.01)
    found = optimized(tiny64, settings)
    moved = (found.values - found.initial).abs()
    assert float(moved.max()) < 0.01 + 1e-9 and float(moved.median()) > 0.0099


@pytest.mark.parametrize("site", ["mlp_output", "block_output"])
def test_the_clamp_holds_and_binds(tiny64: Tiny, site: str) -> None:
    settings = replace(SETTINGS[site], clamp=0.05)
    found = optimized(tiny64, settings)
    ratio = (found.values - found.initial).norm(dim=1) / found.initial.norm(dim=1)
    assert bool((ratio < 0.05 + 1e-12).all())
    binding = (ratio > 0.05 - 1e-12).nonzero()[:, 0].tolist()
    assert binding
    plain = plain_targets(tiny64, EDITS[binding[0]], settings)
    assert_equal_plain(found, binding[0], plain, 1e-8)


@pytest.mark.parametrize("site", ["mlp_output", "block_output"])
def test_targets_become_more_probable(tiny: Tiny, site: str) -> None:
    settings = replace(SETTINGS[site], steps=25, weight_decay=0.0, clamp=20.0)
    found = optimized(tiny, settings)
    assert bool((found.probability > 1.02 * found.initial_probability).all())
    assert float((found.probability / found.initial_probability).max()) > 2
    plain = plain_targets(tiny, EDITS[0], settings)
    assert plain.losses[-1] < plain.losses[0]


def test_deterministic_and_independent_of_global_seed(tiny: Tiny) -> None:
    torch.manual_seed(1)
    first = optimized(tiny, SETTINGS["block_output"])
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = optimized(tiny, SETTINGS["block_output"])
    assert torch.equal(first.values, again.values)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_eager_and_sdpa_attention_agree(kind: str) -> None:
    # Without BOS and with a subject of one token: a row without prefix among others.
    edits = [*EDITS, Edit("{} lives in", "A", "Oslo")]
    tokenizer = make_tokenizer("gpt2")
    found = []
    for attention in ("eager", "sdpa"):
        model = make_model(kind, attn_implementation=attention).double()
        found.append(
            optimize_targets(
                ModelAdapter.of(model),
                tokenizer,
                edits,
                CONTEXTS,
                LAYER,
                SETTINGS["block_output"],
            )
        )
    # Llama's eager attention takes its softmax in float32.
    difference = (found[0].values - found[1].values).norm()
    assert float(difference) < 1e-4 * float(found[0].values.norm())


def test_modes_and_gradients_are_restored_also_on_error(tiny: Tiny) -> None:
    model = copy.deepcopy(tiny.model).train()
    block_of(model, tiny.kind, 0).eval()
    frozen = next(name for name, _ in model.named_parameters())
    model.get_parameter(frozen).requires_grad_(False)
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    broken = copy.deepcopy(model)
    with torch.no_grad():
        ModelAdapter.of(broken).weight(2)[0, 0] = math.nan
    arguments = (tiny.tokenizer, EDITS, CONTEXTS, LAYER, SETTINGS["block_output"])
    found = optimize_targets(ModelAdapter.of(model), *arguments)
    with pytest.raises(NonFiniteError):
        optimize_targets(ModelAdapter.of(broken), *arguments)
    for each in (model, broken):
        assert [module.training for module in each.modules()] == modes
        assert [p.requires_grad for p in each.parameters()] == wanted
        assert all(p.grad is None for p in each.parameters())
        assert not any(module._forward_hooks for module in each.modules())
    # Dropout was off: the same as in evaluation mode.
    assert torch.equal(found.values, optimized(tiny, SETTINGS["block_output"]).values)


def test_nan_weights_are_named_with_the_edit(tiny: Tiny) -> None:
    model = copy.deepcopy(tiny.model)
    adapter = ModelAdapter.of(model)
    with torch.no_grad():
        adapter.weight(2)[1, 1] = math.nan
    with pytest.raises(NonFiniteError, match=r"edit 0 .*Lovelace.*") as caught:
        optimize_targets(
            adapter, tiny.tokenizer, EDITS, CONTEXTS, LAYER, SETTINGS["mlp_output"]
        )
    assert adapter.address(2).tensor in str(caught.value)


def test_too_long_prompts_are_refused(tiny: Tiny) -> None:
    long = Edit("{} is", "Ada", "x " * 99 + "x")
    with pytest.raises(PromptError, match="96 positions"):
        optimized(tiny, SETTINGS["block_output"], [EDITS[0], long])


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"learning_rate": 0.0},
        {"clamp": 0.0},
        {"weight_decay": -1.0},
        {"kl_factor": -0.1},
        {"kl_prompts": ("no slot",)},
        {"kl_prompts": ("{} and {}",)},
        {"site": "attention"},
        {"kl_position": "middle"},
        {"clamp": math.nan},
        {"most_probable_stop": 0},
        {"most_probable_stop": -1},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        replace(SETTINGS["block_output"], **wrong)


MOST_PROBABLE = {
    kind: TargetSettings(
        "block_output",
        steps=14,
        learning_rate=learning_rate,
        clamp=20.0,
        weight_decay=0.0,
        kl_factor=kl_factor,
        loss_threshold=1e-9,
    )
    for kind, learning_rate, kl_factor in (("gpt2", 8.0, 4.0), ("llama", 12.0, 8.0))
}
"""So fast that targets become the most probable, then not, then again."""
SOON = [
    Edit("everyone likes {}", "Bo Diaz", "lives"),
    Edit("everyone likes {}", "Bo Diaz", "lives the"),
    Edit("{}", "Eero Lind", "lives"),
    Edit("{}", "Ada Lovelace", "friends"),
]


def plain_hits(
    tiny: Tiny, edit: Edit, settings: TargetSettings
) -> tuple[PlainTarget, list[int], list[int]]:
    """The plain loop to its end, and its evaluations, from 1 on, in which the whole
    target, and its first token, were the most probable in every context."""
    rows = plain_rows(tiny.tokenizer, edit, CONTEXTS, settings)
    whole: list[bool] = []
    first: list[bool] = []

    def hook(_: Any, __: Any, output: Any) -> None:
        right = [
            output.logits[index, row.read + place].argmax() == label
            for index, row in enumerate(rows)
            for place, label in enumerate(row.labels)
        ]
        whole.append(all(right))
        first.append(all(right[:: len(rows[0].labels)]))

    handle = tiny.model.register_forward_hook(hook)
    try:
        plain = plain_targets(tiny, edit, settings)
    finally:
        handle.remove()
    return plain, *([i for i, hit in enumerate(h, 1) if hit] for h in (whole, first))


def test_most_probable_stop_counts_evaluations_from_first_to_last(
    tiny64: Tiny,
) -> None:
    """Evaluations in which the target is the most probable count though it was not
    in between; whichever rule says so first ends the loop."""
    settings = MOST_PROBABLE[tiny64.kind]
    ways = [plain_hits(tiny64, edit, settings) for edit in SOON]
    losses, hits = [plain.losses for plain, _, _ in ways], [hit for _, hit, _ in ways]
    assert max(map(len, hits)) >= 3
    assert ways[1][2] and not ways[1][1]  # the first token alone does not count
    assert any(hit and hit[0] + len(hit[:3]) - 1 < hit[:3][-1] for hit in hits)
    # A loss that the first edit goes below before the target was there thrice.
    threshold = min(losses[0][: hits[0][1]]) + 1e-6
    reasons, known = set(), {}
    for most in (1, 2, 3):
        for stop in (1e-9, threshold):
            found = optimized(
                tiny64,
                replace(settings, most_probable_stop=most, loss_threshold=stop),
                SOON,
            )
            for index, edit in enumerate(SOON):
                at = {"steps": settings.steps}
                if len(hits[index]) >= most:
                    at["hits"] = hits[index][most - 1]
                below = [i for i, x in enumerate(losses[index], 1) if x < stop]
                if below:
                    at["loss"] = below[0]
                last = min(at.values())
                reasons |= {why for why, step in at.items() if step == last}
                if (edit, last) not in known:
                    stopped = replace(settings, steps=last)
                    known[edit, last] = plain_targets(tiny64, edit, stopped)
                assert_equal_plain(found, index, known[edit, last], 1e-8)
    assert reasons == {"steps", "hits", "loss"}


def _beside(model: Any, kind: str, token: int) -> None:
    """In rows that have the token, what block 0's attention says is added to block 2's
    output, past all that is between."""
    having: list[Any] = []
    aside: list[Any] = []

    def add(_: Any, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden + (3 * aside.pop() * having[-1] if aside else 0)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def see(_: Any, __: Any, given: dict[str, Any]) -> None:
        having.append((given["input_ids"] == token).any(1)[:, None, None])

    block = block_of(model, kind, 0)
    attention = block.attn if kind == "gpt2" else block.self_attn
    model.register_forward_pre_hook(see, with_kwargs=True)
    attention.register_forward_hook(lambda _, __, output: aside.append(output[0]))
    block_of(model, kind, 2).register_forward_hook(add)


def test_a_model_that_hands_on_more_than_hidden_states_is_refused(tiny: Tiny) -> None:
    model, edit = copy.deepcopy(tiny.model), EDITS[2]
    (token,) = target_ids(tiny.tokenizer, "Carla", "Nunes")
    _beside(model, tiny.kind, token)
    adapter, settings = ModelAdapter.of(model), SETTINGS["mlp_output"]
    arguments = (adapter, tiny.tokenizer, EDITS, CONTEXTS)
    with pytest.raises(UnsupportedModel, match="hand on more than") as caught:
        optimize_targets(*arguments, LAYER, settings)
    assert str(caught.value).startswith(f"edit 2 ({edit}): ")
    # From block 0 on everything runs: nothing is handed past what is left out.
    found = optimize_targets(*arguments, 0, settings)
    changed = Tiny(tiny.kind, model, tiny.tokenizer, {})
    for index in (1, 2):
        plain = plain_targets(changed, EDITS[index], settings, layer=0)
        assert_equal_plain(found, index, plain, 1e-4)


@pytest.mark.parametrize("budget", [None, 1])
def test_progress_tells_edits_and_their_probability(
    gpt2: Tiny, budget: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(MOST_PROBABLE["gpt2"], most_probable_stop=1)
    found = optimized(gpt2, settings, SOON, token_budget=budget, progress=True)
    assert len(set(found.steps.tolist())) > 1
    shown = capsys.readouterr().err.split("\r")[-1]
    assert shown.startswith("targets: 100%") and " 4/4 " in shown
    assert f"probability={float(found.probability.mean()):.3f}" in shown
    assert float(found.probability.mean()) > 0.01
    assert re.search(r"[\d.]+ ?(edit/s|s/edit)", shown)
    optimized(gpt2, settings, SOON)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("site", ["mlp_output", "block_output"])
def test_half_precision_models_get_float32_targets_near_theirs(
    tiny: Tiny, site: str
) -> None:
    half = Tiny(
        tiny.kind, copy.deepcopy(tiny.model).bfloat16(), tiny.tokenizer, tiny.statistics
    )
    settings = replace(SETTINGS[site], steps=12, clamp=20.0, weight_decay=0.0)
    edits = [*SOON, EDITS[2]]
    wide, found = optimized(tiny, settings, edits), optimized(half, settings, edits)
    for name in ("values", "initial"):
        assert getattr(found, name).dtype == torch.float32
    assert bool((found.probability > 1.3 * found.initial_probability).all())
    assert torch.allclose(found.probability, wide.probability, rtol=0.3)
    deltas = [each.values - each.initial for each in (found, wide)]
    assert float(torch.cosine_similarity(*deltas).min()) > 0.9
    # δ is kept wider than the model: bfloat16 would round it.
    assert not torch.equal(deltas[0], deltas[0].bfloat16().float())
