"""MEND's editor: what it computes against the formula, one row at a time; its file;
its update on a model."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_kit import disk
from model_kit import EDITS, LAYERS, Tiny, assert_same_bits, make_model, state_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from unified_edit import export_lora, import_lora, patch
from unified_edit.algebra.update import UpdateSet
from unified_edit.baselines import mend as mend_module
from unified_edit.baselines.mend import Mend, MendSettings
from unified_edit.edits import Edit
from unified_edit.errors import EditError, EditorError
from unified_edit.live import applied
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.gradients import Factors, decomposed, labelled, with_changes
from unified_edit.model.scoring import score

SETTINGS = MendSettings(layers=(1, 2), rank=5)


def gradients(tiny: Tiny, mend: Mend, edits: list[Edit]) -> dict[str, Factors]:
    batch = labelled(
        tiny.adapter, tiny.tokenizer, [e.text for e in edits], [e.target for e in edits]
    )
    return decomposed(tiny.adapter, batch, mend.modules_edited)[0]


def editor_of(tiny: Tiny, settings: MendSettings = SETTINGS, seed: int = 5) -> Mend:
    """One that has seen gradients, its weights moved from where they begin."""
    mend = Mend.of(tiny.model, settings)
    with torch.no_grad():
        mend.changes(gradients(tiny, mend, EDITS), observe=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, each in mend.named_parameters():
            scale = 1e-3 if name == "step_sizes" else 0.05
            each += scale * torch.randn(each.shape, generator=generator)
    return mend


def rows_of(found: Factors, row: int) -> tuple[Tensor, Tensor]:
    """x and δ of one row's tokens, but for those where either is zero."""
    real = [
        t
        for t in range(found.x.shape[1])
        if found.x[row, t].abs().sum() > 0 and found.delta[row, t].abs().sum() > 0
    ]
    return found.x[row, real], found.delta[row, real]


def test_an_untrained_editor_is_descent_on_normalised_gradients(
    tiny: Tiny,
) -> None:
    mend = Mend.of(tiny.model, SETTINGS)
    found = gradients(tiny, mend, EDITS)
    with torch.no_grad():
        changes = mend.changes(found, observe=True)
    # Statistics are shared by the maps of one shape, and grow from map to map.
    for shape in set(mend.shapes):
        names = [
            n
            for n, s in zip(mend.modules_edited, mend.shapes, strict=True)
            if s == shape
        ]
        seen: list[Tensor] = []
        for name in names:
            for row in range(len(EDITS)):
                x, delta = rows_of(found[name], row)
                seen += list(torch.cat([x, delta], 1).double())
            mean = torch.stack(seen).mean(0)
            deviation = torch.stack(seen).std(0) + 1e-7
            for row in range(len(EDITS)):
                x, delta = rows_of(found[name], row)
                pairs = (torch.cat([x, delta], 1).double() - mean) / deviation
                expected = -1e-4 * pairs[:, shape[0] :].T @ pairs[:, : shape[0]]
                change = changes[name].delta[row].T @ changes[name].x[row]
                torch.testing.assert_close(
                    change.double(), expected, rtol=1e-4, atol=1e-7
                )


def test_the_running_statistics_do_not_hang_on_the_batches(
    llama: Tiny,
) -> None:
    tiny = llama
    at_once, in_turn = Mend.of(tiny.model, SETTINGS), Mend.of(tiny.model, SETTINGS)
    with torch.no_grad():
        at_once.changes(gradients(tiny, at_once, EDITS), observe=True)
        for one in EDITS:
            in_turn.changes(gradients(tiny, in_turn, [one]), observe=True)
    for name, each in at_once.named_buffers():
        torch.testing.assert_close(
            dict(in_turn.named_buffers())[name].double(),
            each.double(),
            rtol=1e-4,
            atol=1e-6,
        )


def test_the_editor_is_two_residual_layers_with_a_scale_and_a_shift_for_each_map(
    gpt2: Tiny,
) -> None:
    tiny = gpt2
    mend = editor_of(tiny)
    found = gradients(tiny, mend, EDITS[:2])
    with torch.no_grad():
        changes = mend.changes(found)
    state = {name: each.double() for name, each in mend.state_dict().items()}
    places: dict[tuple[int, int], int] = {}
    for index, (name, shape) in enumerate(
        zip(mend.modules_edited, mend.shapes, strict=True)
    ):
        own = places.get(shape, 0)
        places[shape] = own + 1
        own_name = f"editors.{shape[0]}x{shape[1]}"
        deviation = (
            state[f"{own_name}.squares"] / (state[f"{own_name}.seen"] - 1)
        ).sqrt() + 1e-7
        for row in range(2):
            x, delta = rows_of(found[name], row)
            hidden = (torch.cat([x, delta], 1).double() - state[f"{own_name}.mean"]) / (
                deviation
            )
            for layer in range(2):
                part = {
                    key: state[f"{own_name}.layers.{layer}.{key}"]
                    for key in ("u", "v", "bias", "scale", "shift")
                }
                inner = hidden @ part["v"].T @ part["u"].T + part["bias"]
                inner = inner * part["scale"][own] + part["shift"][own]
                hidden = hidden + torch.where(inner > 0, inner, 0.0)
            alpha = state["step_sizes"][index]
            expected = -alpha * hidden[:, shape[0] :].T @ hidden[:, : shape[0]]
            change = changes[name].delta[row].T @ changes[name].x[row]
            torch.testing.assert_close(change.double(), expected, rtol=1e-3, atol=1e-6)


def test_the_editor_can_learn_from_its_very_first_step(gpt2: Tiny) -> None:
    """With relu in place of clamp, no gradient would reach U, bias or shift."""
    tiny = gpt2
    mend = Mend.of(tiny.model, SETTINGS)
    changes = mend.changes(gradients(tiny, mend, EDITS[:2]), observe=True)
    sum(
        c.delta.square().sum() + c.x.square().sum() for c in changes.values()
    ).backward()  # type: ignore[union-attr]
    for name, each in mend.named_parameters():
        if name.endswith((".v", "scale")):  # behind a U that is still zero
            continue
        assert each.grad is not None and bool((each.grad != 0).any()), name


def test_the_update_is_the_sum_over_edits_and_is_subtracted(
    tiny: Tiny,
) -> None:
    mend = editor_of(tiny)
    before = {n: p.detach().clone() for n, p in tiny.model.named_parameters()}
    together = mend.edit(tiny.model, tiny.tokenizer, EDITS[:3])
    alone = [mend.edit(tiny.model, tiny.tokenizer, [one]) for one in EDITS[:3]]
    for address, update in together.update:
        expected = sum(dict(each.update)[address].dense() for each in alone)
        torch.testing.assert_close(update.dense(), expected, rtol=1e-4, atol=1e-6)
        assert update.rank <= min(update.shape)
    for name, parameter in tiny.model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert [a.tensor for a, _ in together.update] == [a.tensor for a in mend.addresses]
    assert len(together.update) == 2 * (2 if tiny.kind == "gpt2" else 3)


def test_many_edits_are_taken_in_parts(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    mend = editor_of(llama)
    whole = mend.edit(llama.model, llama.tokenizer, EDITS)
    monkeypatch.setattr(mend_module, "_TOGETHER", 2)
    parts = dict(mend.edit(llama.model, llama.tokenizer, EDITS).update)
    for address, update in whole.update:
        torch.testing.assert_close(
            parts[address].dense(), update.dense(), rtol=1e-4, atol=1e-6
        )
        assert parts[address].rank <= min(update.shape)


def test_changes_of_rows_are_what_the_update_does(llama: Tiny) -> None:
    tiny = llama
    mend = editor_of(tiny)
    one = EDITS[1]
    with torch.no_grad():
        changes = mend.changes(gradients(tiny, mend, [one]))
    with with_changes(tiny.model, changes):
        (hooked,) = score(tiny.adapter, tiny.tokenizer, [one.text], [one.target])
    result = mend.edit(tiny.model, tiny.tokenizer, [one])
    with applied(tiny.model, result.update):
        (written,) = score(tiny.adapter, tiny.tokenizer, [one.text], [one.target])
    assert hooked.nll == pytest.approx(written.nll, abs=1e-4)
    (outcome,) = result.report.outcomes
    assert outcome.after == pytest.approx(torch.tensor(-written.nll).exp().item())
    assert outcome.after != pytest.approx(outcome.before, rel=1e-3)


def test_an_editor_comes_back_from_its_file(gpt2: Tiny, tmp_path: Path) -> None:
    tiny = gpt2
    mend = editor_of(tiny)
    mend.about = {"best": {"step": 3}}
    path = mend.save(tmp_path / "editor.safetensors")
    again = Mend.load(path)
    assert again.header() == {
        **mend.header(),
        "modules": tuple(mend.modules_edited),
    }
    assert path.read_bytes() == again.save(tmp_path / "again").read_bytes()
    first = mend.edit(tiny.model, tiny.tokenizer, EDITS[:2]).update
    second = again.edit(tiny.model, tiny.tokenizer, EDITS[:2]).update
    assert first.save(tmp_path / "1").read_bytes() == (
        second.save(tmp_path / "2").read_bytes()
    )
    assert first.metadata["recipe"]["trained"] == {"best": {"step": 3}}


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "foreign":
        path.write_bytes(
            content.replace(b"unified-edit/mend/1", b"unified-edit/mend/9")
        )
    elif how == "settings":
        path.write_bytes(content.replace(b'\\"rank\\":', b'\\"ramk\\":'))
    elif how == "missing":
        path.unlink()


@pytest.mark.parametrize("how", ["cut", "foreign", "settings", "missing"])
def test_a_damaged_file_is_refused(gpt2: Tiny, tmp_path: Path, how: str) -> None:
    path = editor_of(gpt2).save(tmp_path / "editor.safetensors")
    before = path.read_bytes()
    damage(path, how)
    assert not path.exists() or path.read_bytes() != before
    with pytest.raises(EditorError, match=r"editor\.safetensors: not a MEND editor"):
        Mend.load(path)


def test_an_editor_with_nan_is_refused(gpt2: Tiny, tmp_path: Path) -> None:
    mend = editor_of(gpt2)
    with torch.no_grad():
        mend.step_sizes[1] = float("nan")
    with pytest.raises(EditorError, match="step_sizes holds NaN"):
        Mend.load(mend.save(tmp_path / "editor.safetensors"))


def test_another_model_is_refused_unless_it_may_be_another(
    gpt2: Tiny,
) -> None:
    tiny = gpt2
    mend = editor_of(tiny)
    other = make_model("gpt2", seed=4)
    with pytest.raises(EditorError, match="was trained on the model"):
        mend.edit(other, tiny.tokenizer, EDITS[:1])
    result = mend.edit(other, tiny.tokenizer, EDITS[:1], check_base=False)
    with applied(other, result.update):
        pass  # made for the model that it was computed on


def test_an_editor_that_saw_nothing_is_refused(gpt2: Tiny) -> None:
    tiny = gpt2
    with pytest.raises(EditorError, match="never trained"):
        Mend.of(tiny.model, SETTINGS).edit(tiny.model, tiny.tokenizer, EDITS[:1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": (1, LAYERS)}, rf"layers \[1, {LAYERS}\]"),
        ({"layers": (1, 1)}, "named twice"),
        ({"rank": 0}, "must be positive"),
        ({"step_size": float("nan")}, "must be positive"),
    ],
)
def test_bad_settings_are_refused(
    gpt2: Tiny, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(EditorError, match=said):
        Mend.of(gpt2.model, replace(SETTINGS, **change))


def test_bad_edits_are_refused(gpt2: Tiny) -> None:
    tiny = gpt2
    mend = editor_of(tiny)
    with pytest.raises(EditError, match="repeats edit 0"):
        mend.edit(tiny.model, tiny.tokenizer, [EDITS[0], EDITS[0]])


def test_the_last_three_blocks_are_edited_unless_named(gpt2: Tiny) -> None:
    model = make_model("gpt2", n_layer=5)
    assert Mend.of(model).settings.layers == (2, 3, 4)
    assert Mend.of(gpt2.model).settings.layers == (0, 1, 2)
    adapter = ModelAdapter.of(model)
    assert adapter.mlp_modules(4) == ("transformer.h.4.mlp.c_fc", adapter.key_module(4))


def test_nothing_is_left_on_the_model(gpt2: Tiny) -> None:
    model = copy.deepcopy(gpt2.model).train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    mend = editor_of(gpt2)
    mend.edit(model, gpt2.tokenizer, EDITS[:1])
    assert model.training and all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_its_update_goes_where_every_update_goes(tiny: Tiny, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny.model.save_pretrained(base)
    pristine = disk(base)
    made = editor_of(tiny).edit(tiny.model, tiny.tokenizer, EDITS[:2]).update
    update = UpdateSet.load(made.save(tmp_path / "update.safetensors"))
    patched = patch(base, update)
    assert patched.verify().ok
    read: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with applied(tiny.model, update):
        assert_same_bits(read, state_of(tiny.model))
    patched.revert()
    assert disk(base) == pristine
    export_lora(update, tmp_path / "adapter", base=base)
    back = import_lora(tmp_path / "adapter", base=base)
    assert [bytes(p) for p in back.parts()] == [bytes(p) for p in update.parts()]
