"""Patching, verifying and reverting whole folders."""

import json
import os
from pathlib import Path

import pytest
import torch
from checkpoint_kit import (
    address_of,
    apply_live,
    disk,
    quick_fsync,  # noqa: F401
    random_update,
    save_checkpoint,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from covariance_cache.fingerprint import model_fingerprint
from unified_edit.algebra.addition import added
from unified_edit.algebra.update import RankKUpdate, UpdateSet, WeightAddress
from unified_edit.checkpoint.patch import history, patch, revert, verify
from unified_edit.checkpoint.sharded import Checkpoint
from unified_edit.errors import (
    CheckpointError,
    CheckpointMismatch,
    NonFiniteError,
    UpdateError,
)

MANIFEST = ".unified-edit/manifest.json"
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def _header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(
    tmp_path: Path, family: str, dtype: torch.dtype, sharded: bool, in_place: bool
) -> None:
    base = save_checkpoint(tmp_path / "m", family, dtype, sharded=sharded)
    pristine = disk(base)
    before = Checkpoint.open(base)
    tensors = {name: before.read(name) for name in before.tensors}
    headers = {name: _header(base / name) for name in before.files}
    update = random_update(base, [address_of(family, 0), address_of(family, 2)])

    patched = patch(base, update, None if in_place else tmp_path / "out")
    after = Checkpoint.open(patched.path)
    assert {name: _header(patched.path / name) for name in after.files} == headers
    expected = dict(tensors)
    for address, change in update:
        expected[address.tensor] = added(
            tensors[address.tensor], change, transposed=address.transposed
        )
    for name, tensor in expected.items():
        assert torch.equal(after.read(name), tensor), name
    report = patched.report
    assert report.result_fingerprint == after.fingerprint()
    assert report.result_fingerprint != update.metadata["base_fingerprint"]
    assert {r.name for r in report.tensors} == {a.tensor for a, _ in update}
    assert set(report.files) == {after[r.name].file for r in report.tensors}
    assert patched.verify().ok and patched.verify().problems == ()
    if not in_place:
        assert disk(base) == pristine
        assert patched.verify().compared_with_base == len(tensors)

    restored = patched.revert()
    assert restored.numbers == (1,) and restored.remaining == 0
    assert restored.fingerprint == update.metadata["base_fingerprint"]
    assert disk(patched.path) == pristine


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reloaded_model_is_the_live_edited_one(
    tmp_path: Path, family: str, dtype: torch.dtype, sharded: bool, square: bool
) -> None:
    """Square weights are the ones whose orientation no shape could tell."""
    base = save_checkpoint(
        tmp_path / "m", family, dtype, sharded=sharded, square=square
    )
    update = random_update(base, [address_of(family, 1)])
    out = patch(base, update, tmp_path / "out").path
    live = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        unedited = live(tokens).logits
        apply_live(live, update)
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=dtype).eval()
        assert torch.equal(loaded(tokens).logits, live(tokens).logits)
        assert not torch.equal(loaded(tokens).logits, unedited)
    assert model_fingerprint(loaded) == model_fingerprint(live)
    assert history(out)[-1].result_fingerprint == model_fingerprint(live)


def test_orientation_comes_from_the_address_alone(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "m", "gpt2", square=True)
    name = address_of("gpt2", 0).tensor
    weight = Checkpoint.open(base).read(name)
    for transposed in (False, True):
        address = WeightAddress(name, 0, transposed)
        update = random_update(base, [address])
        out = patch(base, update, tmp_path / f"out{transposed}").path
        dense = update.updates[address].dense()
        change = Checkpoint.open(out).read(name) - weight
        expected = dense.T if transposed else dense
        assert torch.allclose(change, expected, atol=1e-6)
        assert not torch.allclose(change, expected.T, atol=1e-2)


def test_tied_embedding_is_patched_through_its_alias(tmp_path: Path) -> None:
    """The head's name is not stored; the one stored tensor changes both."""
    base = save_checkpoint(tmp_path / "m", "gpt2")
    address = WeightAddress("lm_head.weight", 0, False, ("transformer.wte.weight",))
    update = random_update(base, [address])
    patched = patch(base, update, tmp_path / "out")
    names = set(load_file(patched.path / "model.safetensors"))
    assert names == set(load_file(base / "model.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(patched.path)
    before = Checkpoint.open(base).read("transformer.wte.weight")
    expected = added(before, update.updates[address], transposed=False)
    assert torch.equal(loaded.lm_head.weight, expected)
    assert torch.equal(loaded.transformer.wte.weight, expected)
    assert patched.verify().tensors == ("transformer.wte.weight",)


def test_only_shards_with_a_patched_tensor_change(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "m", "llama", sharded=True)
    before = Checkpoint.open(base).sha256()
    patched = patch(base, random_update(base, [address_of("llama", 1)]), tmp_path / "o")
    after = Checkpoint.open(patched.path).sha256()
    differing = {name for name in before if before[name] != after[name]}
    assert differing == {Checkpoint.open(base)[address_of("llama", 1).tensor].file}
    assert before.keys() == after.keys()


@pytest.mark.parametrize("in_place", [False, True])
def test_updates_stack_and_come_off_one_by_one(tmp_path: Path, in_place: bool) -> None:
    base = save_checkpoint(tmp_path / "m", "gpt2", sharded=True)
    states, folders = [disk(base)], [base]
    for step in range(3):
        folder = folders[-1]
        # Layer 1 is in every update, so that the undo data of one tensor stack too.
        addresses = [address_of("gpt2", 1), address_of("gpt2", step % 2 * 2)]
        update = random_update(folder, addresses, seed=step)
        out = None if in_place else tmp_path / f"out{step}"
        patched = patch(folder, update, out)
        assert patched.report.number == step + 1
        folders.append(patched.path)
        states.append(disk(patched.path))
    last = folders[-1]
    records = history(last)
    assert [record.number for record in records] == [1, 2, 3]
    for one, two in zip(records, records[1:], strict=False):
        assert one.result_fingerprint == two.base_fingerprint
    assert records[0].metadata["recipe"] == {"name": "memit"}
    assert verify(last).ok
    if not in_place:  # any earlier state of the history serves as the base
        for folder in folders:
            assert verify(last, folder).ok
    for remaining in (2, 1, 0):
        assert revert(last).remaining == remaining
        now = disk(last)
        if remaining:
            assert verify(last).ok
            if in_place:  # the hash of a file that the update read stays known
                now.pop(MANIFEST), states[remaining].pop(MANIFEST)
        assert now == states[remaining]
    assert not (last / ".unified-edit").exists()


def test_same_inputs_same_bytes(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "m", sharded=True)
    update = random_update(base, [address_of("gpt2", 0)])
    one = patch(base, update, tmp_path / "one").path
    two = patch(base, update, tmp_path / "two").path
    assert disk(one) == disk(two)
    patch(base, update)
    # In place, shards that no update changes are not read: their hash is not known.
    first, second = disk(base), disk(one)
    assert first.pop(MANIFEST) != second.pop(MANIFEST)
    assert first == second


def test_report_measures_what_happened(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "m", "llama", torch.bfloat16)
    address = address_of("llama", 1)
    update = random_update(base, [address], scale=1e-4)
    before = Checkpoint.open(base).read(address.tensor).double()
    patched = patch(base, update, tmp_path / "out")
    (report,) = patched.report.tensors
    after = Checkpoint.open(patched.path).read(address.tensor).double()
    dense = update.updates[address].to(torch.float64).dense()
    norm = torch.linalg.matrix_norm
    assert report.update_norm == pytest.approx(float(norm(dense)))
    assert report.relative_change == pytest.approx(float(norm(dense) / norm(before)))
    lost = float(norm(after - before - dense) / norm(dense))
    assert report.rounding_loss == pytest.approx(lost, rel=1e-3)
    assert report.rounding_loss > 0.01
    assert report.changed_elements == int((after != before).sum())
    assert 0 < report.changed_elements < before.numel()
    data = json.loads(json.dumps(patched.report.as_dict()))
    assert data["tensors"][0]["shape"] == list(before.shape)
    assert json.loads(json.dumps(patched.verify().as_dict()))["ok"] is True
    assert json.loads(json.dumps(patched.revert().as_dict()))["remaining"] == 0


def test_rounding_loss_is_small_in_float32_and_transposed(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "m", "gpt2")
    patched = patch(base, random_update(base, [address_of("gpt2", 1)]), tmp_path / "o")
    assert patched.report.tensors[0].rounding_loss < 1e-5


def test_update_lost_in_rounding_is_an_error(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "m", "llama", torch.bfloat16)
    name = address_of("llama", 1).tensor
    tensors = load_file(base / "model.safetensors")
    tensors[name] = torch.ones_like(tensors[name])
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    pristine = disk(tmp_path)
    update = random_update(base, [address_of("llama", 1)], scale=1e-6)
    for out in (None, tmp_path / "out"):
        with pytest.raises(CheckpointError, match=f"changes nothing in .*{name}.*BF16"):
            patch(base, update, out)
        assert disk(tmp_path) == pristine


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("where", ["weight", "update", "overflow"])
def test_non_finite_is_an_error(tmp_path: Path, where: str, in_place: bool) -> None:
    base = save_checkpoint(tmp_path / "m", "gpt2", torch.float16)
    address = address_of("gpt2", 1)
    if where == "weight":
        tensors = load_file(base / "model.safetensors")
        tensors[address.tensor][3, 2] = float("nan")
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    update = random_update(base, [address], scale=1e9 if where == "overflow" else 1)
    if where == "update":
        update.updates[address].left[0, 0] = float("inf")
    pristine = disk(tmp_path)
    with pytest.raises(NonFiniteError, match=address.tensor):
        patch(base, update, None if in_place else tmp_path / "out")
    assert disk(tmp_path) == pristine


def test_update_of_another_base_is_refused_naming_both(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "m")
    update = random_update(base, [address_of("gpt2", 1)])
    first = patch(base, update, tmp_path / "first")
    pristine = disk(tmp_path)
    with pytest.raises(CheckpointMismatch) as caught:
        patch(first.path, update, tmp_path / "second")
    assert update.metadata["base_fingerprint"] in str(caught.value)
    assert first.report.result_fingerprint in str(caught.value)
    nameless = UpdateSet(update.updates, {"recipe": {}})
    with pytest.raises(CheckpointMismatch, match="no base_fingerprint"):
        patch(base, nameless)
    assert disk(tmp_path) == pristine
    second = patch(first.path, update, tmp_path / "second", check_base=False)
    assert second.verify().ok


@pytest.mark.parametrize("content", ["file", "folder", "link", "base", "inside"])
def test_existing_target_is_left_alone(tmp_path: Path, content: str) -> None:
    base = save_checkpoint(tmp_path / "m")
    out = tmp_path / "out"
    if content == "file":
        out.write_text("x")
    elif content == "folder":
        out.mkdir()
        (out / "x").write_text("x")
    elif content == "link":
        (tmp_path / "elsewhere").mkdir()
        out.symlink_to(tmp_path / "elsewhere")
    else:
        out = base if content == "base" else base / "inside"
    pristine = disk(tmp_path)
    with pytest.raises(CheckpointError, match="exists already|inside the base"):
        patch(base, random_update(base, [address_of("gpt2", 1)]), out)
    assert disk(tmp_path) == pristine


def test_empty_target_folder_is_filled(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "m")
    (tmp_path / "out").mkdir()
    update = random_update(base, [address_of("gpt2", 1)])
    assert patch(base, update, tmp_path / "out").verify().ok


def test_target_under_a_file_or_nowhere(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "m")
    (tmp_path / "file").write_text("x")
    update = random_update(base, [address_of("gpt2", 1)])
    pristine = disk(tmp_path)
    for parent in ("file", "absent"):
        with pytest.raises(CheckpointError, match=f"{parent}: not a folder"):
            patch(base, update, tmp_path / parent / "out")
    assert disk(tmp_path) == pristine


def test_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_checkpoint(tmp_path / "m")
    update = random_update(base, [address_of("gpt2", 1)])
    out = patch(base, update, tmp_path / "out").path
    pristine = disk(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(CheckpointError, match="read-only.*into a new folder"):
        patch(base, update)
    with pytest.raises(CheckpointError, match="read-only; choose another place"):
        patch(base, update, tmp_path / "new")
    with pytest.raises(CheckpointError, match="read-only"):
        revert(out)
    assert verify(out).ok
    assert disk(tmp_path) == pristine


def _as_hub_snapshot(folder: Path, blobs: Path) -> None:
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.rglob("*"))):
        if path.is_file():
            path.rename(blobs / str(number))
            path.symlink_to(blobs / str(number))


@pytest.mark.parametrize("sharded", [False, True])
def test_download_cache_is_never_written_through(tmp_path: Path, sharded: bool) -> None:
    base = save_checkpoint(tmp_path / "m", sharded=sharded)
    _as_hub_snapshot(base, tmp_path / "blobs")
    pristine = disk(tmp_path)
    update = random_update(base, [address_of("gpt2", 1)])
    with pytest.raises(CheckpointError, match="symlink.*new folder"):
        patch(base, update)
    assert disk(tmp_path) == pristine
    patched = patch(base, update, tmp_path / "out")
    assert not any(path.is_symlink() for path in patched.path.rglob("*"))
    assert patched.verify().ok
    patched.revert()
    assert Checkpoint.open(patched.path).sha256() == Checkpoint.open(base).sha256()
    written = disk(tmp_path)
    assert {name: written[name] for name in pristine} == pristine


def test_symlinked_state_folder_is_not_written_through(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "m")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("x")
    (base / ".unified-edit").symlink_to(tmp_path / "elsewhere")
    pristine = disk(tmp_path)
    with pytest.raises(CheckpointError, match="is a symlink"):
        patch(base, random_update(base, [address_of("gpt2", 1)]))
    with pytest.raises(CheckpointError, match="is a symlink"):
        revert(base)
    assert disk(tmp_path) == pristine


@pytest.mark.parametrize("kind", ["broken", "folder"])
def test_strange_sidecars_are_refused(tmp_path: Path, kind: str) -> None:
    base = save_checkpoint(tmp_path / "m")
    target = tmp_path / ("nowhere" if kind == "broken" else "m/extra")
    (base / "odd").symlink_to(target)
    pristine = disk(tmp_path)
    with pytest.raises(CheckpointError, match="odd: .*symlink"):
        patch(base, random_update(base, [address_of("gpt2", 1)]), tmp_path / "out")
    assert disk(tmp_path) == pristine


def test_other_copies_of_the_weights_are_mentioned(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "m")
    for name in ("pytorch_model.bin", "q4.gguf", "training_args.bin"):
        (base / name).write_bytes(b"x")
    patched = patch(base, random_update(base, [address_of("gpt2", 1)]), tmp_path / "o")
    assert [note.split()[0] for note in patched.report.notes] == [
        "pytorch_model.bin",
        "q4.gguf",
    ]


def test_unfit_updates_are_refused(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "m")
    good = random_update(base, [address_of("gpt2", 1)])
    ((address, change),) = good
    cases: list[tuple[dict[WeightAddress, RankKUpdate], str]] = [
        ({}, "changes no tensor"),
        ({WeightAddress(address.tensor, 1, False): change}, r"\[48, 16\].*\[16, 48\]"),
        (
            {address: change, WeightAddress("x", 1, True, (address.tensor,)): change},
            "twice",
        ),
    ]
    pristine = disk(tmp_path)
    for updates, words in cases:
        with pytest.raises(UpdateError, match=words):
            patch(base, UpdateSet(updates, good.metadata), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"stores no tensor 'y\.weight'"):
        unknown = {WeightAddress("y.weight", 1, True): change}
        patch(base, UpdateSet(unknown, good.metadata))
    for value in (float("nan"), object()):
        with pytest.raises(UpdateError, match="no JSON data"):
            patch(base, UpdateSet(good.updates, {**good.metadata, "seed": value}))
    assert disk(tmp_path) == pristine


def test_commands_on_an_unpatched_folder(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "m")
    pristine = disk(base)
    assert history(base) == ()
    with pytest.raises(CheckpointError, match="not patched"):
        verify(base)
    with pytest.raises(CheckpointError, match="no update to revert"):
        revert(base)
    for command in (history, verify, revert):
        with pytest.raises(CheckpointError, match="not a checkpoint folder"):
            command(tmp_path / "absent")
    assert disk(base) == pristine


def test_file_modes_survive(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "m")
    (base / "model.safetensors").chmod(0o640)
    patched = patch(base, random_update(base, [address_of("gpt2", 1)]))
    assert (base / "model.safetensors").stat().st_mode & 0o777 == 0o640
    patched.revert()
    assert (base / "model.safetensors").stat().st_mode & 0o777 == 0o640
