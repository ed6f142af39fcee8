"""What verify and revert say about folders that somebody else has touched."""

import json
from pathlib import Path

import pytest
from checkpoint_kit import (
    address_of,
    disk,
    quick_fsync,  # noqa: F401
    random_update,
    save_checkpoint,
)
from safetensors.torch import load_file

from unified_edit.checkpoint.files import sha256_of
from unified_edit.checkpoint.patch import history, patch, revert, verify
from unified_edit.checkpoint.sharded import Checkpoint
from unified_edit.errors import CheckpointError, CheckpointMismatch


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_verify_finds_every_kind_of_damage(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "m", "llama", sharded=True)
    name = address_of("llama", 1).tensor
    update = random_update(base, [address_of("llama", 1)])

    def problems(number: int, damage: str) -> str:
        out = patch(base, update, tmp_path / f"out{number}").path
        entry = Checkpoint.open(out)[name]
        other = next(
            e for e in Checkpoint.open(out).tensors.values() if e.file != entry.file
        )
        state = out / ".unified-edit"
        if damage == "patched":
            _flip(out / entry.file, entry.begin + 5)
        elif damage == "untouched":
            _flip(out / other.file, other.begin + 5)
        elif damage == "undo":
            _flip(state / "undo-0001.safetensors", -3)
        elif damage == "update":
            _flip(state / "update-0001.safetensors", -3)
        elif damage == "broken update":
            (state / "update-0001.safetensors").write_bytes(b"x")
        elif damage == "sidecar":
            (out / "README.md").write_text("other\n")
        elif damage == "missing":
            (out / "README.md").unlink()
        elif damage == "shard":
            (out / other.file).unlink()
        elif damage == "added":
            (out / "model.safetensors.bak").write_text("x")
        report = verify(out, base)
        assert not report.ok
        return "\n".join(report.problems).replace(other.file, "OTHER")

    assert f"tensor {name!r}: is not what" in problems(0, "patched")
    found = problems(1, "untouched")
    assert "OTHER: its SHA-256" in found and "differs from the base's" in found
    found = problems(2, "undo")
    assert "undo-0001.safetensors: its SHA-256" in found and "is not what" in found
    assert f"tensor {name!r}: is not what" in problems(3, "update")
    assert "cannot be read as an update" in problems(4, "broken update")
    assert "README.md: its SHA-256" in problems(5, "sidecar")
    assert "README.md: is missing" in problems(6, "missing")
    found = problems(7, "shard")
    assert "OTHER: is missing" in found and "shard 'OTHER' is missing" in found
    assert "model.safetensors.bak: was added" in problems(8, "added")


def test_verify_against_a_foreign_base(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "m")
    other = save_checkpoint(tmp_path / "other", square=True)
    out = patch(base, random_update(base, [address_of("gpt2", 1)]), tmp_path / "o").path
    (problem,) = verify(out, other).problems
    assert "no state of this folder's history" in problem
    with pytest.raises(CheckpointError, match="not a checkpoint folder"):
        verify(out, tmp_path / "absent")


def _forge(out: Path, name: str, by: float) -> None:
    """Changes one patched value by `by` of itself and makes every hash agree, as if
    another machine had written the folder."""
    entry = Checkpoint.open(out)[name]
    tensors = load_file(out / entry.file)
    row, column = divmod(int(tensors[name].abs().argmax()), entry.shape[1])
    tensors[name][row, column] *= 1 + by
    data = bytearray((out / entry.file).read_bytes())
    data[entry.begin : entry.end] = tensors[name].numpy().tobytes()
    (out / entry.file).write_bytes(data)
    path = out / ".unified-edit" / "manifest.json"
    manifest = json.loads(path.read_text())
    sha256 = sha256_of(out / entry.file)
    manifest["files"][entry.file] = sha256
    manifest["updates"][0]["after"][entry.file] = sha256
    manifest["updates"][0]["result_fingerprint"] = Checkpoint.open(out).fingerprint()
    path.write_text(json.dumps(manifest))


def test_rounding_of_another_machine_is_a_note_and_more_is_not(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "m", "gpt2")
    name = address_of("gpt2", 1).tensor
    update = random_update(base, [address_of("gpt2", 1)])
    near = patch(base, update, tmp_path / "near").path
    _forge(near, name, 1.3e-7)
    report = verify(near)
    assert report.ok and "order of summation" in report.notes[0], report
    far = patch(base, update, tmp_path / "far").path
    _forge(far, name, 1e-4)
    assert "is not what" in verify(far).problems[0]


def test_revert_refuses_foreign_changes_and_keeps_harmless_ones(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "m")
    update = random_update(base, [address_of("gpt2", 1)])
    out = patch(base, update, tmp_path / "out").path
    weights = out / "model.safetensors"
    _flip(weights, -1)
    damaged = disk(out)
    with pytest.raises(CheckpointMismatch, match="was changed after the patch"):
        revert(out)
    assert disk(out) == damaged
    with pytest.raises(CheckpointMismatch, match="changed since the last patch"):
        patch(out, random_update(out, [address_of("gpt2", 0)]))
    with pytest.raises(CheckpointMismatch, match="changed since the last patch"):
        patch(out, random_update(out, [address_of("gpt2", 0)]), tmp_path / "new")
    assert disk(out) == damaged and not (tmp_path / "new").exists()
    _flip(weights, -1)
    (out / "README.md").write_text("better\n")
    (out / "extra" / "merges.txt").unlink()
    report = revert(out)
    assert [note.split()[0] for note in report.notes] == [
        "README.md",
        "extra/merges.txt",
    ]
    assert weights.read_bytes() == (base / "model.safetensors").read_bytes()
    assert (out / "README.md").read_text() == "better\n"


def test_damaged_undo_data_change_nothing(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "m")
    out = patch(base, random_update(base, [address_of("gpt2", 1)]), tmp_path / "o").path
    undo = out / ".unified-edit" / "undo-0001.safetensors"
    _flip(undo, -1)
    damaged = disk(out)
    with pytest.raises(CheckpointMismatch, match="undo-0001.* does not restore"):
        revert(out)
    assert disk(out) == damaged
    undo.unlink()
    with pytest.raises(CheckpointError, match="undo-0001"):
        revert(out)


def _corrupt(manifest: dict[str, object], how: str) -> object:
    record = manifest["updates"][0]  # type: ignore[index]
    if how == "format":
        manifest["format"] = "unified-edit/checkpoint/99"
    elif how == "escape":
        record["before"] = {"../x": "0" * 64}
        record["after"] = {"../x": "0" * 64}
    elif how == "undo name":
        record["undo"] = "../undo-0001.safetensors"
    elif how == "hash":
        record["before"] = {name: "0" for name in record["before"]}
    elif how == "number":
        record["number"] = 7
    elif how == "extra":
        record["more"] = 1
    elif how == "updates":
        manifest["updates"] = []
    elif how == "list":
        return [manifest]
    return manifest


@pytest.mark.parametrize(
    "how",
    ["format", "escape", "undo name", "hash", "number", "extra", "updates", "list"],
)
def test_a_manifest_that_is_not_ours_is_refused(tmp_path: Path, how: str) -> None:
    base = save_checkpoint(tmp_path / "m")
    update = random_update(base, [address_of("gpt2", 1)])
    out = patch(base, update, tmp_path / "out").path
    path = out / ".unified-edit" / "manifest.json"
    path.write_text(json.dumps(_corrupt(json.loads(path.read_text()), how)))
    before = disk(tmp_path)
    for command in (history, verify, revert, lambda f: patch(f, update)):
        with pytest.raises(CheckpointError, match=r"manifest\.json: not what this ver"):
            command(out)
    assert disk(tmp_path) == before
