"""Fine-tuning against a plain loop on the real weights of a copy, one prompt at a time;
and its update on the model, in files and on a checkpoint."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_kit import disk, quick_fsync  # noqa: F401  (applies by itself)
from model_kit import (
    EDITS,
    Tiny,
    assert_same_bits,
    greedy_word,
    state_of,
    target_ids,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from covariance_cache import model_fingerprint
from unified_edit import applied, apply, export_lora, import_lora, patch, revert
from unified_edit.algebra.update import RankKUpdate, UpdateSet
from unified_edit.baselines.fine_tune import Descent, FineTuneSettings, fine_tune
from unified_edit.edits import Edit
from unified_edit.errors import (
    EditError,
    EditorError,
    NonFiniteError,
    PromptError,
    UnifiedEditError,
    UpdateError,
)
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.frames import Frame

LAYERS = (1, 2)
SETTINGS = FineTuneSettings(steps=4, learning_rate=0.01, loss_threshold=0.0, batch=2)
QUICK = FineTuneSettings(steps=3, learning_rate=0.02)


def plain_nll(model: Any, tokenizer: Any, edit: Edit, frame: Frame | None) -> Tensor:
    """Mean over the target's tokens."""
    text = edit.text if frame is None else frame.before + edit.text + frame.after
    ids = tokenizer(text)["input_ids"]
    answer = target_ids(tokenizer, text, edit.target)
    logits = model(input_ids=torch.tensor([ids + answer[:-1]])).logits[0]
    logs = logits.log_softmax(-1)[len(ids) - 1 :]
    return -logs[range(len(answer)), answer].mean()


class Plain:
    """Adam on the down-projections themselves."""

    def __init__(
        self,
        tiny: Tiny,
        edits: Sequence[Edit],
        settings: FineTuneSettings,
        layers: Sequence[int] = LAYERS,
        frame: Frame | None = None,
    ) -> None:
        self.model = copy.deepcopy(tiny.model).requires_grad_(False)
        adapter = ModelAdapter.of(self.model)
        weights = [adapter.weight(layer).requires_grad_(True) for layer in layers]
        start = [weight.detach().clone() for weight in weights]
        optimizer = torch.optim.Adam(weights, lr=settings.learning_rate)
        self.skipped = self.clamped = self.passes = 0
        for _ in range(settings.steps):
            self.passes += 1
            losses: list[float] = []
            for begin in range(0, len(edits), settings.batch):
                batch = [
                    plain_nll(self.model, tiny.tokenizer, edit, frame)
                    for edit in edits[begin : begin + settings.batch]
                ]
                losses += [float(each.detach()) for each in batch]
                loss = torch.stack(batch).mean()
                if loss < settings.loss_threshold:
                    self.skipped += 1
                    continue
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                most = settings.norm_constraint
                with torch.no_grad():
                    for weight, at in zip(weights, start, strict=True):
                        if most is not None:
                            self.clamped += int(((weight - at).abs() > most).sum())
                            weight.copy_(at + (weight - at).clamp(-most, most))
            if sum(losses) / len(losses) < settings.loss_threshold:
                break
        transposed = adapter.address(0).transposed
        self.changes = [
            (weight.detach() - at).T if transposed else weight.detach() - at
            for weight, at in zip(weights, start, strict=True)
        ]


def assert_equals(found: UpdateSet, plain: Plain, tolerance: float) -> None:
    for (_, update), expected in zip(found, plain.changes, strict=True):
        size = float(expected.norm())
        assert size > 0
        difference = update.dense().to(expected.dtype) - expected
        assert float(difference.norm()) < tolerance * size


def probabilities(model: Any, tokenizer: Any, edits: Sequence[Edit]) -> list[float]:
    with torch.no_grad():
        losses = [plain_nll(model, tokenizer, edit, None) for edit in edits]
    return [math.exp(-float(loss)) for loss in losses]


def parts(update: UpdateSet) -> bytes:
    return b"".join(bytes(part) for part in update.parts())


def tuned(tiny: Tiny, settings: FineTuneSettings = QUICK, **options: Any) -> Any:
    arguments = {"edits": EDITS, "layers": LAYERS, "settings": settings, **options}
    return fine_tune(tiny.model, tiny.tokenizer, **arguments)


@pytest.mark.parametrize("most", [None, 0.015])
def test_it_is_adam_on_the_real_weights(tiny64: Tiny, most: float | None) -> None:
    """Batches of two, two and one; each entry clamped after each step of them, not at
    the end: Adam takes it from there."""
    settings = replace(SETTINGS, norm_constraint=most)
    result = tuned(tiny64, settings)
    plain = Plain(tiny64, EDITS, settings)
    # The change is in float32, which Adam's division makes much of near zero.
    assert_equals(result.update, plain, 1e-5)
    assert [address for address, _ in result.update] == [
        tiny64.adapter.address(layer) for layer in LAYERS
    ]
    largest = max(float(u.dense().abs().max()) for _, u in result.update)
    if most is None:
        assert largest > 0.03
    else:
        assert largest == torch.tensor(most).item()
        assert plain.clamped > 100
        whole = Plain(tiny64, EDITS, SETTINGS)
        late = [change.clamp(-most, most) for change in whole.changes]
        for (_, update), other in zip(result.update, late, strict=True):
            difference = update.dense().double() - other
            assert float(difference.norm()) > 0.01 * float(other.norm())


def test_in_float32(tiny: Tiny) -> None:
    settings = replace(SETTINGS, norm_constraint=0.02, batch=64)
    result = tuned(tiny, settings, layers=[0])
    assert_equals(result.update, Plain(tiny, EDITS, settings, [0]), 2e-3)


def test_the_order_of_layers_and_a_frame(tiny64: Tiny) -> None:
    frame = Frame("They ask. ", ".\nThey say:")
    result = tuned(tiny64, SETTINGS, layers=(2, 0), frame=frame)
    plain = Plain(tiny64, EDITS, SETTINGS, (2, 0), frame)
    assert_equals(result.update, plain, 1e-5)
    assert result.update.metadata["frame"]["before"] == "They ask. "
    assert result.update.metadata["recipe"]["layers"] == [2, 0]


def test_batches_below_the_threshold_are_left_and_all_below_it_are_done(
    tiny64: Tiny,
) -> None:
    edits = [EDITS[1], EDITS[4], EDITS[3]]
    settings = FineTuneSettings(
        steps=40, learning_rate=0.03, loss_threshold=1.5, batch=2
    )
    plain = Plain(tiny64, edits, settings)
    assert plain.skipped and 3 < plain.passes < settings.steps
    result = tuned(tiny64, settings, edits=edits)
    assert_equals(result.update, plain, 1e-5)
    assert not any("loss was" in note for note in result.report.notes)
    # One pass fewer, and it says so.
    short = replace(settings, steps=plain.passes - 1)
    report = tuned(tiny64, short, edits=edits).report
    notes = [note for note in report.notes if "loss was" in note]
    assert len(notes) == 1 and f"{short.steps} steps, not yet below 1.5" in notes[0]


def test_the_report_is_of_the_model_with_the_update(tiny: Tiny) -> None:
    edits = [EDITS[1], EDITS[4]]
    settings = FineTuneSettings(steps=40, learning_rate=0.03, loss_threshold=0.8)
    result = tuned(tiny, settings, edits=edits)
    model = copy.deepcopy(tiny.model)
    before = probabilities(model, tiny.tokenizer, edits)
    apply(model, result.update)
    after = probabilities(model, tiny.tokenizer, edits)
    outcomes = result.report.outcomes
    assert [o.edit for o in outcomes] == edits
    assert [o.before for o in outcomes] == pytest.approx(before, rel=1e-4)
    assert [o.after for o in outcomes] == pytest.approx(after, rel=1e-4)
    assert all(o.optimised is None and o.says_target for o in outcomes), result.report
    assert min(after) > 0.25 > 0.01 > max(before)
    assert result.report.success == 1 and result.report.notes == ()
    assert result.report.certificates == {}
    assert set(result.report.seconds) == {"descent"}
    assert str(result.report).startswith("ft (unvalidated): 2 edits in ")
    assert json.loads(json.dumps(result.report.as_dict()))["success"] == 1


def test_an_edit_that_the_model_knows_changes_nothing(tiny: Tiny) -> None:
    prompt, word = greedy_word(tiny)
    known = Edit("{}", prompt, word)
    (probability,) = probabilities(tiny.model, tiny.tokenizer, [known])
    loss = -math.log(probability)
    settings = replace(QUICK, loss_threshold=loss * 1.01, norm_constraint=0.1)
    result = tuned(tiny, settings, edits=[known])
    assert len(result.update) == 0 and result.update.updates == {}
    (outcome,) = result.report.outcomes
    assert outcome.says_target and outcome.said_target
    assert outcome.after == outcome.before == pytest.approx(probability, rel=1e-4)
    # That, and no word of a loss or of a target that is not said.
    (note,) = result.report.notes
    assert note.endswith("the model said so before the edit")
    with pytest.raises(UpdateError, match="nothing to apply"):
        apply(tiny.model, result.update)
    # Just above the threshold it is trained on.
    settings = replace(settings, loss_threshold=loss * 0.99)
    assert len(tuned(tiny, settings, edits=[known]).update) == len(LAYERS)


@pytest.mark.parametrize("change", ["none", "learning_rate", "prompt"])
def test_the_model_is_as_it_was_also_on_error(tiny: Tiny, change: str) -> None:
    model = copy.deepcopy(tiny.model).train()
    block = ModelAdapter.of(model).block(0).eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
    kept = model.get_parameter(tiny.adapter.address(1).tensor)
    kept.grad = torch.ones_like(kept)
    state, modules = state_of(model), dict(model.named_modules())
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    again = replace(tiny, model=model)
    if change == "none":
        found = tuned(again)
        # Dropout was off.
        assert parts(found.update) == parts(tuned(tiny).update)
    elif change == "learning_rate":
        with pytest.raises(UnifiedEditError, match="finite"):
            tuned(again, replace(QUICK, learning_rate=1e37))
    else:
        long = Edit("{} is", "Ada", "x " * 99 + "x")
        with pytest.raises(PromptError, match="96 positions"):
            tuned(again, edits=[EDITS[0], long])
    assert_same_bits(model, state)
    assert dict(model.named_modules()) == modules
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert parameter.requires_grad == wanted[name]
        assert (parameter.grad is None) == (parameter is not kept)
    assert torch.equal(kept.grad, torch.ones_like(kept))
    for module in model.modules():
        inside = any(module is each for each in block.modules())
        assert module.training == (not inside)
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_the_same_bytes_whatever_the_global_seed(tiny: Tiny) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = parts(tuned(tiny).update)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    with torch.no_grad():  # nor whether gradients are on
        assert parts(tuned(tiny).update) == first


def test_what_made_it_is_in_the_update(tiny: Tiny, tmp_path: Path) -> None:
    result = tuned(tiny, replace(QUICK, norm_constraint=0.03))
    metadata = result.update.metadata
    assert metadata["base_fingerprint"] == model_fingerprint(tiny.model)
    assert metadata["recipe"] == {
        "name": "ft_l",
        "layers": list(LAYERS),
        "steps": 3,
        "learning_rate": 0.02,
        "loss_threshold": 0.01,
        "batch": 64,
        "norm_constraint": 0.03,
    }
    assert metadata["edits"] == [edit.as_dict() for edit in EDITS]
    loaded = UpdateSet.load(result.update.save(tmp_path / "u.safetensors"))
    assert loaded.metadata == metadata
    assert parts(loaded) == parts(result.update)


@pytest.mark.parametrize(
    ("layers", "told"),
    [([], "[]"), ([3], "[3]"), ([-1], "[-1]"), ([1, 1], "[1, 1]"), ([0, 9], "[0, 9]")],
)
def test_layers_that_there_are_not(tiny: Tiny, layers: list[int], told: str) -> None:
    with pytest.raises(EditorError) as caught:
        tuned(tiny, layers=layers)
    assert f"layers {told}: name some of 0 to 2" in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"loss_threshold": -0.1},
        {"loss_threshold": math.nan},
        {"norm_constraint": 0.0},
        {"norm_constraint": -1.0},
        {"norm_constraint": math.nan},
    ],
)
def test_settings_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(EditorError, match=name):
        FineTuneSettings(**wrong)
    if name != "norm_constraint":
        with pytest.raises(EditorError, match=name):
            Descent(**wrong)


def test_edits_that_cannot_be_made_are_named(tiny: Tiny) -> None:
    with pytest.raises(EditError, match="no edits"):
        tuned(tiny, edits=[])
    with pytest.raises(EditError, match="edit 5 repeats edit 1"):
        tuned(tiny, edits=[*EDITS, EDITS[1]])
    other = replace(EDITS[1], target="Oslo")
    with pytest.raises(EditError, match="edits 1 and 5 contradict"):
        tuned(tiny, edits=[*EDITS, other])
    model = copy.deepcopy(tiny.model)
    address = tiny.adapter.address(0)
    with torch.no_grad():
        model.get_parameter(address.tensor)[0, 0] = math.inf
    with pytest.raises(NonFiniteError, match=address.tensor):
        tuned(replace(tiny, model=model))


# The update in files.


@pytest.fixture
def base(tiny: Tiny, tmp_path: Path) -> Path:
    tiny.model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 22)[None]).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("in_place", [False, True])
def test_patched_verified_and_taken_back(
    tiny: Tiny, base: Path, tmp_path: Path, in_place: bool
) -> None:
    pristine = disk(base)
    file = tuned(tiny).update.save(tmp_path / "update.safetensors")
    update = UpdateSet.load(file)
    patched = patch(base, update, None if in_place else tmp_path / "out")
    assert patched.verify().ok
    read = AutoModelForCausalLM.from_pretrained(patched.path, dtype=torch.float32)
    with applied(tiny.model, update):
        assert torch.equal(logits(read.eval()), logits(tiny.model))
    assert not torch.equal(logits(read), logits(tiny.model))
    patched.revert()
    assert disk(patched.path) == pristine
    with pytest.raises(UnifiedEditError):
        revert(patched.path)


def test_as_a_peft_adapter_and_back(tiny: Tiny, base: Path, tmp_path: Path) -> None:
    update = tuned(tiny).update
    report = export_lora(update, tmp_path / "adapter", base=base)
    short = min(tiny.adapter.matrix(1).shape)
    assert report.rank == short and set(report.modules.values()) == {short}
    back = import_lora(tmp_path / "adapter", base=base)
    assert parts(back) == parts(update)


# Dense changes as factors.


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (1, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_matrix_is_factors_of_itself(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    update = RankKUpdate.of_matrix(matrix)
    assert update.rank == min(shape) and update.shape == shape
    assert torch.equal(update.dense(), matrix)
    assert update.compact() is update
    assert update.norm() == pytest.approx(float(matrix.double().norm()))


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
@pytest.mark.parametrize("rank", [1, 3, 4, 9])
def test_no_more_factors_than_the_shorter_side(
    shape: tuple[int, int], rank: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right, keys, background = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((shape[0], rank), (rank, shape[1]), (2, shape[1]), (1, shape[1]))
    )
    update = RankKUpdate(left, right, keys, background)
    found = update.compact()
    assert found.rank == min(rank, 3)
    assert torch.allclose(found.dense(), left @ right, rtol=1e-12)
    assert found.keys is keys and found.background is background
    assert (found is update) == (rank <= 3)
