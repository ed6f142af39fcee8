"""`mend train`, `mend edit` and `fine-tune`, from a shell's point of view."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_kit import disk
from cli_kit import Workplace, answer, refusal, run
from model_kit import TEXTS

from unified_edit.algebra.update import UpdateSet
from unified_edit.baselines import mend_training
from unified_edit.baselines.mend import Mend

pytestmark = pytest.mark.filterwarnings(
    # What peft still calls.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture
def training(place: Workplace) -> list[Any]:
    """A quick training's arguments."""
    text = place.path / "text.txt"
    text.write_text("\n\n".join(TEXTS[:5]), encoding="utf-8")
    return [
        *("mend", "train", place.model, place.records),
        *("--validation", place.records, "--text", text, "--layers", "1-2"),
        *("--set", "steps=4", "--set", "edits=2", "--set", "accumulate=1"),
        *("--set", "rank=3", "--set", "validate_every=2", "--set", "step_size=0.01"),
        *("--out", place.path / "editor.safetensors"),
    ]


def test_an_editor_is_trained_and_its_edit_patched_and_taken_back(
    place: Workplace, training: list[Any]
) -> None:
    editor, edited = place.path / "editor.safetensors", place.path / "edited"
    found = answer(*training)
    assert found["editor"] == str(editor) and found["steps"] == 4
    assert found["best"]["step"] in (2, 4) and found["settings"]["edits"] == 2
    assert Mend.load(editor).about["best"] == found["best"]
    assert Mend.load(editor).settings.rank == 3
    assert not (place.path / "editor.safetensors.training").exists()
    assert "exists already" in refusal(place.path, *training)

    base = disk(place.model)
    made = answer(
        *("mend", "edit", place.model, place.edits, "--editor", editor),
        *("--out", place.update, "--limit", 2),
    )
    assert made["recipe"]["name"] == "mend" and made["update"] == str(place.update)
    assert len(made["report"]["outcomes"]) == 2
    update = UpdateSet.load(place.update)
    assert {a.layer for a, _ in update} == {1, 2} and len(update) == 4
    answer("patch", place.model, place.update, "--out", edited)
    assert run("verify", edited).exit_code == 0
    assert run("revert", edited).exit_code == 0
    after = disk(edited)
    assert {name: after[name] for name in base} == base


def test_interrupted_the_same_command_goes_on(
    place: Workplace, training: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = answer(*training)
    content = (place.path / "editor.safetensors").read_bytes()
    take, steps = mend_training._Training.take, []

    def failing(self: Any, job: Any) -> None:
        steps.append(self.step)
        if steps == [0, 1, 2]:
            raise KeyboardInterrupt
        take(self, job)

    monkeypatch.setattr(mend_training._Training, "take", failing)
    (place.path / "editor.safetensors").unlink()
    with pytest.raises(KeyboardInterrupt):
        _raising(*training)
    assert (place.path / "editor.safetensors.training").exists()
    assert answer(*training) == whole
    assert steps == [0, 1, 2, 2, 3]
    assert (place.path / "editor.safetensors").read_bytes() == content


def _raising(*arguments: Any) -> None:
    """Ctrl-C as Python knows it; click makes an Abort of it."""
    from typer.testing import CliRunner

    from unified_edit.cli import app

    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code != 0
    raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["ft", "ft_l", "lora"])
def test_fine_tuning(place: Workplace, method: str) -> None:
    pytest.importorskip("peft")
    made = answer(
        *("fine-tune", place.model, place.edits, "--method", method, "--layers", "1"),
        *("--set", "steps=3", "--set", "learning_rate=0.01", "--out", place.update),
    )
    assert made["recipe"]["name"] == method
    update = UpdateSet.load(place.update)
    assert len(update) == (2 if method == "lora" else 1)
    if method == "ft_l":
        assert made["recipe"]["norm_constraint"] == 5e-4
        ((_, change),) = update
        assert float(change.dense().abs().max()) == pytest.approx(5e-4)
    outcomes = made["report"]["outcomes"]
    assert any(each["after"] > each["before"] for each in outcomes)
    assert any("the loss was" in note for note in made["report"]["notes"])
    assert made["report"]["certificates"] == {}
    shown = run(
        *("fine-tune", place.model, place.edits, "--method", method, "--layers", "1"),
        *("--set", "steps=3", "--out", place.update, "--force"),
    )
    assert f"wrote {place.update}" in shown.stdout and f"{method} (" in shown.stdout


def test_refusals(place: Workplace, training: list[Any]) -> None:
    tune = ["fine-tune", place.model, place.edits, "--out", place.update]
    folder = place.path
    assert "layers [9]" in refusal(folder, *tune, "--layers", "9")
    said = refusal(folder, *tune, "--layers", "1", "--method", "mend")
    assert "expected one of ft, ft_l, lora" in said
    said = refusal(folder, *tune, "--layers", "1", "--set", "norm_constraint=0.1")
    assert "ft has no norm_constraint" in said
    said = refusal(folder, *tune, "--layers", "1", "--set", "rank=3")
    assert "there is no setting 'rank'" in said
    assert "there is no setting 'clamp'" in refusal(
        folder, *training, "--set", "clamp=1"
    )
    broken = place.path / "broken.safetensors"
    broken.write_bytes(b"no editor")
    edit = ["mend", "edit", place.model, place.edits, "--out", place.update]
    assert "not a MEND editor" in refusal(folder, *edit, "--editor", broken)


def test_a_trained_editor_is_refused_for_another_model(
    place: Workplace, training: list[Any]
) -> None:
    answer(*training)
    editor = place.path / "editor.safetensors"
    mend = Mend.load(editor)
    mend.base_fingerprint = "another"
    mend.save(editor)
    said = refusal(
        place.path,
        *("mend", "edit", place.model, place.edits, "--editor", editor),
        *("--out", place.update),
    )
    assert "was trained on the model another" in said


def test_the_editor_that_ships_edits_the_model_that_ships(tmp_path: Path) -> None:
    """New facts, said in paraphrase too, of subjects that it never learned from."""
    from unified_edit.demo import load
    from unified_edit.evaluate.counterfact import evaluate_counterfact
    from unified_edit.evaluate.world import World
    from unified_edit.live import applied

    folder = Path(__file__).resolve().parents[1] / "examples" / "tinyworld"
    world = World.load(folder / "data")
    for family in ("gpt2", "llama"):
        model, tokenizer = load(folder / family)
        mend = Mend.load(folder / "mend" / f"{family}.safetensors")
        size = (folder / "mend" / f"{family}.safetensors").stat().st_size
        assert size <= 10_000_000
        scores = []
        for record in world.records[:12]:
            result = mend.edit(model, tokenizer, [record.edit])
            with applied(model, result.update):
                scores += evaluate_counterfact(model, tokenizer, [record]).records
        assert sum(each.es for each in scores) >= 9
        assert sum(each.rewrite_generation or 0.0 for each in scores) >= 8
        assert sum(each.ps or 0.0 for each in scores) >= 9
    assert json.dumps(mend.about)
