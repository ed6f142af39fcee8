"""LoRA fine-tuning against a plain loop over peft's own wrapped copy of the model; and
that neither the model nor the global seed is any different afterwards."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
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
from unified_edit import applied, apply, export_lora, import_lora, patch
from unified_edit.algebra.update import UpdateSet
from unified_edit.baselines.lora_tuning import LoraSettings, lora_tune
from unified_edit.edits import Edit
from unified_edit.errors import EditError, EditorError, UnifiedEditError
from unified_edit.model.adapter import ModelAdapter

# PEFT asks transformers for a property under its former name.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

LAYERS = (0, 2)
QUICK = LoraSettings(steps=4, learning_rate=0.02, rank=3, alpha=5.0, seed=7)
MAPS = {"gpt2": ("c_fc", "c_proj"), "llama": ("gate_proj", "up_proj", "down_proj")}


def modules_of(kind: str, layers: Sequence[int] = LAYERS) -> list[str]:
    block = "transformer.h" if kind == "gpt2" else "model.layers"
    return [f"{block}.{k}.mlp.{name}" for k in layers for name in MAPS[kind]]


def plain_nll(model: Any, tokenizer: Any, edit: Edit) -> Tensor:
    """Mean over the target's tokens."""
    ids = tokenizer(edit.text)["input_ids"]
    answer = target_ids(tokenizer, edit.text, edit.target)
    logits = model(input_ids=torch.tensor([ids + answer[:-1]])).logits[0]
    logs = logits.log_softmax(-1)[len(ids) - 1 :]
    return -logs[range(len(answer)), answer].mean()


def merged(
    tiny: Tiny,
    settings: LoraSettings,
    edits: Sequence[Edit] = EDITS,
    layers: Sequence[int] = LAYERS,
) -> dict[str, Tensor]:
    """What peft's merged weights differ by, as stored: one prompt at a time."""
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        target_modules=modules_of(tiny.kind, layers),
        fan_in_fan_out=tiny.kind == "gpt2",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model: Any = peft.get_peft_model(copy.deepcopy(tiny.model), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(modules_of(tiny.kind, layers))
    optimizer = torch.optim.Adam(trained, lr=settings.learning_rate)
    for _ in range(settings.steps):
        for begin in range(0, len(edits), settings.batch):
            batch = edits[begin : begin + settings.batch]
            losses = [plain_nll(model, tiny.tokenizer, edit) for edit in batch]
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            optimizer.step()
    after = model.merge_and_unload().state_dict()
    before = tiny.model.state_dict()
    return {
        name: after[name] - tensor
        for name, tensor in before.items()
        if not torch.equal(after[name], tensor)
    }


def tuned(tiny: Tiny, settings: LoraSettings = QUICK, **options: Any) -> Any:
    arguments = {"edits": EDITS, "layers": LAYERS, "settings": settings, **options}
    return lora_tune(tiny.model, tiny.tokenizer, **arguments)


def parts(update: UpdateSet) -> bytes:
    return b"".join(bytes(part) for part in update.parts())


class Held:
    """A model as it is: objects, bytes, flags, attributes, config."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.state = state_of(model)
        self.before = self.look()

    def look(self) -> dict[str, Any]:
        model = self.model
        return {
            "class": type(model),
            "modules": [(n, id(m)) for n, m in model.named_modules()],
            "tensors": [
                (n, id(p), p.data_ptr(), p.requires_grad, p.grad)
                for n, p in model.named_parameters()
            ],
            "training": [m.training for m in model.modules()],
            "hooks": [
                (len(m._forward_hooks), len(m._forward_pre_hooks))
                for m in model.modules()
            ],
            "attributes": [sorted(vars(m)) for m in model.modules()],
            "forwards": [m.forward.__func__ for m in model.modules()],
            "config": model.config.to_dict(),
            "generation": model.generation_config.to_dict(),
        }

    def check(self) -> None:
        now = self.look()
        for name, value in self.before.items():
            assert now[name] == value, name
        assert_same_bits(self.model, self.state)


def in_training(tiny: Tiny) -> Tiny:
    """A copy in training mode, with a block that is not, and weights that are fixed."""
    model = copy.deepcopy(tiny.model).train()
    ModelAdapter.of(model).block(0).eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
    return replace(tiny, model=model)


@pytest.mark.parametrize("batch", [64, 2])
def test_the_factors_are_what_peft_merges(tiny64: Tiny, batch: int) -> None:
    settings = replace(QUICK, batch=batch)
    update = tuned(tiny64, settings).update
    expected = merged(tiny64, settings)
    names = modules_of(tiny64.kind)
    assert [address.tensor for address, _ in update] == [f"{n}.weight" for n in names]
    assert expected.keys() == {f"{name}.weight" for name in names}
    for address, found in update:
        change = expected[address.tensor]
        assert address.transposed == (tiny64.kind == "gpt2")
        change = change.T if address.transposed else change
        assert found.rank == settings.rank and found.shape == change.shape
        assert found.left.dtype == torch.float32
        size = float(change.norm())
        assert size > 0.05
        assert float((found.dense() - change).norm()) < 1e-5 * size
        assert int(torch.linalg.matrix_rank(found.dense())) == settings.rank


def test_the_report_is_of_the_model_with_the_update(tiny: Tiny) -> None:
    settings = LoraSettings(steps=40, learning_rate=0.03, loss_threshold=0.8, alpha=8)
    edits = [EDITS[1], EDITS[4]]
    result = tuned(tiny, settings, edits=edits)
    model = copy.deepcopy(tiny.model)

    def probabilities() -> list[float]:
        with torch.no_grad():
            losses = [plain_nll(model, tiny.tokenizer, edit) for edit in edits]
        return [math.exp(-float(loss)) for loss in losses]

    before = probabilities()
    apply(model, result.update)
    outcomes = result.report.outcomes
    assert [o.before for o in outcomes] == pytest.approx(before, rel=1e-4)
    assert [o.after for o in outcomes] == pytest.approx(probabilities(), rel=1e-4)
    assert [o.edit for o in outcomes] == edits
    assert all(o.says_target and not o.said_target for o in outcomes), result.report
    assert result.report.notes == ()
    metadata = result.update.metadata
    assert metadata["base_fingerprint"] == model_fingerprint(tiny.model)
    assert metadata["recipe"] == {
        "name": "lora",
        "layers": list(LAYERS),
        "steps": 40,
        "learning_rate": 0.03,
        "loss_threshold": 0.8,
        "batch": 64,
        "rank": 8,
        "alpha": 8,
        "seed": 0,
    }


def test_the_model_is_as_it_was(tiny: Tiny) -> None:
    again = in_training(tiny)
    held = Held(again.model)
    found = tuned(again)
    held.check()
    # Dropout was off, and no fixed weight matters.
    assert parts(found.update) == parts(tuned(tiny).update)
    # Nothing is left that a second time would find.
    assert parts(tuned(again).update) == parts(found.update)
    held.check()


def test_so_it_is_after_an_error_in_the_descent(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = in_training(tiny)
    held = Held(again.model)
    with pytest.raises(UnifiedEditError, match="finite"):
        tuned(again, replace(QUICK, learning_rate=1e30))
    held.check()
    with pytest.raises(EditError, match="96 positions"):
        tuned(again, edits=[EDITS[0], Edit("{} is", "Ada", "x " * 99 + "x")])
    held.check()
    step, steps = torch.optim.Adam.step, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        steps.append(1)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    with monkeypatch.context() as patching:
        patching.setattr(torch.optim.Adam, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tuned(again)
    assert len(steps) == 2
    held.check()
    assert parts(tuned(again).update) == parts(tuned(tiny).update)


def test_so_it_is_after_an_error_while_peft_wraps_it(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a device has no room for the second map's factors."""
    again = in_training(tiny)
    held = Held(again.model)
    linear, made = peft.tuners.lora.LoraLayer.update_layer, []

    def failing(*arguments: Any, **options: Any) -> Any:
        made.append(1)
        if len(made) == 2:
            raise MemoryError
        return linear(*arguments, **options)

    for kind in (peft.tuners.lora.LoraLayer, peft.tuners.lora.Linear):
        if "update_layer" in vars(kind):
            monkeypatch.setattr(kind, "update_layer", failing)
    state = torch.get_rng_state()
    with pytest.raises(MemoryError):
        tuned(again)
    assert len(made) == 2
    assert torch.equal(torch.get_rng_state(), state)
    held.check()


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"
)
def test_a_model_that_checkpoints_its_gradients(llama: Tiny) -> None:
    """Peft puts a hook on the embeddings of such a model."""
    model = copy.deepcopy(llama.model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    held = Held(model)
    found = tuned(replace(llama, model=model))
    held.check()
    assert parts(found.update) == parts(tuned(llama).update)


def test_a_config_is_left_as_it_was(llama: Tiny) -> None:
    """Peft sets a setting that some families' configs have."""
    model = copy.deepcopy(llama.model)
    model.config.pretraining_tp = 2
    held = Held(model)
    tuned(replace(llama, model=model))
    held.check()


def test_the_seed_decides_and_no_other(tiny: Tiny) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = parts(tuned(tiny).update)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    with torch.no_grad():
        assert parts(tuned(tiny).update) == first
    other = tuned(tiny, replace(QUICK, seed=8)).update
    for (_, a), (_, b) in zip(tuned(tiny).update, other, strict=True):
        assert float((a.right - b.right).norm()) > 0.1 * float(a.right.norm())


@pytest.mark.parametrize("rank", [1, 30])
def test_the_rank_is_the_settings_or_the_shorter_side(llama: Tiny, rank: int) -> None:
    update = tuned(llama, replace(QUICK, rank=rank), layers=[1]).update
    assert [found.rank for _, found in update] == [min(rank, 24)] * 3
    expected = merged(llama, replace(QUICK, rank=rank), layers=[1])
    for address, found in update:
        change = expected[address.tensor]
        difference = float((found.dense() - change).norm())
        assert difference < 1e-3 * float(change.norm())


def test_an_edit_that_the_model_knows_changes_nothing(tiny: Tiny) -> None:
    prompt, word = greedy_word(tiny)
    result = tuned(
        tiny, replace(QUICK, loss_threshold=9.0), edits=[Edit("{}", prompt, word)]
    )
    assert len(result.update) == 0
    (outcome,) = result.report.outcomes
    assert outcome.says_target and outcome.after == outcome.before
    (note,) = result.report.notes
    assert note.endswith("the model said so before the edit")


def test_half_precision_models_keep_wide_factors(tiny: Tiny) -> None:
    half = replace(tiny, model=copy.deepcopy(tiny.model).bfloat16())
    held = Held(half.model)
    settings = replace(QUICK, steps=20)
    result = tuned(half, settings)
    held.check()
    for address, found in result.update:
        assert found.left.dtype == found.right.dtype == torch.float32, address
        assert not torch.equal(found.left, found.left.bfloat16().float())
    assert all(o.after > 2 * o.before for o in result.report.outcomes)


def test_without_peft(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(EditorError, match=r"peft.*unified-edit\[lora\]"):
        tuned(tiny)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0},
        {"alpha": 0.0},
        {"alpha": math.nan},
        {"steps": 0},
        {"learning_rate": -1.0},
        {"batch": 0},
        {"loss_threshold": math.nan},
    ],
)
def test_settings_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(EditorError, match=name):
        LoraSettings(**wrong)


def test_what_cannot_be_tuned_is_named(tiny: Tiny) -> None:
    held = Held(copy.deepcopy(tiny.model))
    again = replace(tiny, model=held.model)
    for layers in ([], [3], [-1], [1, 1]):
        with pytest.raises(EditorError) as caught:
            tuned(again, layers=layers)
        assert f"layers {layers}: name some of 0 to 2" in str(caught.value)
    with pytest.raises(EditError, match="no edits"):
        tuned(again, edits=[])
    with pytest.raises(EditError, match="edit 5 repeats edit 0"):
        tuned(again, edits=[*EDITS, EDITS[0]])
    held.check()


# The update in files.


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 22)[None]).logits  # type: ignore[no-any-return]


def test_on_a_checkpoint_and_as_an_adapter(tiny: Tiny, tmp_path: Path) -> None:
    """All of an MLP's maps: patched and taken back, and exported for peft."""
    base = tmp_path / "base"
    tiny.model.save_pretrained(base)
    pristine = disk(base)
    update = UpdateSet.load(tuned(tiny).update.save(tmp_path / "update.safetensors"))
    with applied(tiny.model, update):
        expected = logits(tiny.model)
    assert float((logits(tiny.model) - expected).abs().max()) > 0.1

    patched = patch(base, update)
    assert patched.verify().ok
    read: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert torch.equal(logits(read.eval()), expected)
    patched.revert()
    assert disk(base) == pristine

    report = export_lora(update, tmp_path / "adapter", base=base)
    assert report.modules == {n: QUICK.rank for n in modules_of(tiny.kind)}
    back = import_lora(tmp_path / "adapter", base=base)
    assert parts(back) == parts(update)
    fresh = copy.deepcopy(tiny.model)
    adapted = peft.PeftModel.from_pretrained(fresh, report.folder)
    assert torch.allclose(logits(adapted.eval()), expected, atol=1e-4)
