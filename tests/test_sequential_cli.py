"""`evaluate sequential` and `report`, from a shell's point of view."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from cli_kit import Workplace, answer, refusal, run
from model_kit import TEXTS

from unified_edit.algebra.update import UpdateSet
from unified_edit.session_state import SequenceState


@pytest.fixture
def options(place: Workplace) -> list[Any]:
    """A quick run's arguments, but for `--out`."""
    (place.path / "held_out.txt").write_text("\n".join(TEXTS[:2]) + "\n\n")
    probes = {"unrelated": [["Bo Diaz lives in", "Cairo"]], "generation": ["Ada"]}
    (place.path / "probes.json").write_text(json.dumps(probes))
    return [
        *("evaluate", "sequential", place.model, place.records),
        *("--recipe", "memit_seq", "--layers", "1", "--set", "steps=3"),
        *("--set", "preservation_weight=1", "--statistics", place.statistics),
        *("--canary", place.path / "held_out.txt"),
        *("--probes", place.path / "probes.json", "--on-limit", "warn"),
    ]


def test_a_run_and_its_page(place: Workplace, options: list[Any]) -> None:
    pytest.importorskip("matplotlib")
    out, page = place.path / "run", place.path / "report.html"
    found = answer(*options, "--out", out, "--name", "first try")
    assert found["run"] == str(out)
    assert [line["edits"] for line in found["checkpoints"]] == [0, 1, 2]
    last = found["checkpoints"][-1]
    assert last["earlier"]["s"][0] >= 0 and last["perplexity"] > 1
    assert last["unrelated"] is not None and last["entropy"] is not None
    settings = json.loads((out / "run.json").read_text())
    assert settings["name"] == "first try" and settings["guard"]["on_limit"] == "warn"
    assert settings["records"]["count"] == 2
    assert SequenceState.load(out / "session.safetensors").steps == 2
    # Again, with nothing left to do; and as a table.
    assert answer(*options, "--out", out, "--name", "first try") == found
    shown = run(*options, "--out", out, "--name", "first try")
    assert "edits" in shown.stdout and f"wrote {out}" in shown.stdout
    assert answer("report", out, "--out", page) == {"report": str(page)}
    text = page.read_text()
    assert "first try" in text and "<svg" in text and "memit_seq" in text
    assert "exists already" in refusal(place.path, "report", out, "--out", page)


def test_limits_from_the_command_line(place: Workplace, options: list[Any]) -> None:
    out = place.path / "run"
    changed = ["--on-limit", "refuse", "--guard", "damage=1e-12"]
    found = answer(*options, *changed, "--guard", "canary=none", "--out", out)
    assert found["checkpoints"][-1]["guard"]["refused"] == 2
    assert found["checkpoints"][-1]["edits"] == 0
    guard = json.loads((out / "run.json").read_text())["guard"]
    assert guard["damage"] == 1e-12 and guard["canary"] is None
    free = place.path / "free"
    found = answer(*options, "--no-guard", "--out", free)
    assert found["checkpoints"][-1]["guard"]["accepted"] == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--on-limit", "stop"], "on_limit is one of refuse, warn, shrink"),
        (["--guard", "harm=1"], "there is no limit 'harm'; there are canary, "),
        (["--guard", "damage=much"], "expected a number, or none"),
        (["--guard", "damage=0"], "damage must be positive"),
        (["--no-guard", "--guard", "damage=1"], "--no-guard has no limits"),
        (["--set", "regularizer=rect:2"], "expected none, rect:SHARE"),
        (["--canary", "missing.txt"], "missing.txt: cannot be read"),
        (["--probes", "missing.json"], "missing.json: cannot be read"),
    ],
)
def test_what_makes_no_run_is_refused(
    place: Workplace, options: list[Any], more: list[Any], message: str
) -> None:
    out = place.path / "run"
    assert message in refusal(place.path, *options, "--out", out, *more)


def test_a_folder_of_another_run_is_refused(
    place: Workplace, options: list[Any]
) -> None:
    out = place.path / "run"
    answer(*options, "--out", out)
    other = [*options, "--recipe", "memit", "--out", out]
    assert "holds a run of memit_seq" in refusal(place.path, *other)
    # A lost state is no reason to begin anew over what is there.
    (out / "session.safetensors").unlink()
    assert "whose state is missing" in refusal(place.path, *options, "--out", out)
    shutil.rmtree(out)
    (out := place.path / "empty").mkdir()
    assert answer(*options, "--out", out)["run"] == str(out)


def test_a_sequences_update_patches_files(place: Workplace, options: list[Any]) -> None:
    out, update = place.path / "run", place.path / "sequence.safetensors"
    answer(*options, "--out", out, "--update", update)
    ((_, change),) = UpdateSet.load(update)
    assert change.rank == 2
    patched = place.path / "patched"
    assert run("patch", place.model, update, "--out", patched).exit_code == 0
    assert run("verify", patched).exit_code == 0
    said = refusal(place.path, *options, "--out", out, "--update", update)
    assert "exists already" in said
