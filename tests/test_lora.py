"""LoRA adapters: exported ones do in PEFT what the update does, come back as they were,
and other people's are imported as PEFT merges them or refused by name."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_kit import (
    address_of,
    apply_live,
    disk,
    quick_fsync,  # noqa: F401  (a fixture that applies by itself)
    random_update,
    save_checkpoint,
    tiny_model,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from unified_edit.algebra.update import RankKUpdate, UpdateSet, WeightAddress
from unified_edit.checkpoint.layout import read_header
from unified_edit.checkpoint.lora import (
    CONFIG,
    SERVER_RANKS,
    WEIGHTS,
    export_lora,
)
from unified_edit.checkpoint.lora_import import import_lora
from unified_edit.checkpoint.patch import patch
from unified_edit.checkpoint.sharded import Checkpoint
from unified_edit.errors import (
    CheckpointError,
    CheckpointMismatch,
    NonFiniteError,
    UnifiedEditError,
    UnsupportedModel,
    UpdateError,
)

# PEFT asks transformers for a property under its former name.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

FAMILIES = ("gpt2", "llama")
PREFIX = "base_model.model."
TOKENS = torch.arange(1, 25).reshape(2, 12)


def factors(d_value: int, rank: int, d_key: int, seed: int = 0) -> RankKUpdate:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(d_value, rank, generator=generator) * 0.1
    return RankKUpdate(left, torch.randn(rank, d_key, generator=generator))


def uneven_update(folder: Path, family: str) -> UpdateSet:
    """Three layers, of the ranks 3, 1 and 5."""
    whole = random_update(folder, [address_of(family, layer) for layer in range(3)])
    changes = {
        address: factors(change.shape[0], rank, change.shape[1], rank)
        for (address, change), rank in zip(whole, (3, 1, 5), strict=True)
    }
    return UpdateSet(changes, whole.metadata)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(tmp_path: Path, family: str) -> Path:
    return save_checkpoint(tmp_path / "base", family)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model.eval()(TOKENS).logits
    return result


def loaded(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    return model


def assert_same(one: UpdateSet, other: UpdateSet) -> None:
    """Equal addresses and metadata; factors equal bit for bit."""
    assert set(one.updates) == set(other.updates)
    assert one.metadata == other.metadata
    for address, change in one:
        for name in ("left", "right"):
            a, b = getattr(change, name), getattr(other.updates[address], name)
            assert a.dtype == b.dtype and a.shape == b.shape
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# Exported adapters, as PEFT sees them.


def test_peft_computes_what_the_patched_model_computes(
    tmp_path: Path, base: Path, family: str
) -> None:
    peft = pytest.importorskip("peft")
    update = uneven_update(base, family)
    report = export_lora(update, tmp_path / "adapter", base=base)
    patched = loaded(patch(base, update, tmp_path / "patched").path)
    adapted = peft.PeftModel.from_pretrained(loaded(base), report.folder)
    expected = logits(patched)
    assert (logits(adapted) - expected).abs().max() < 1e-5
    assert (logits(loaded(base)) - expected).abs().max() > 1e-2

    wrapped = {
        name.removesuffix(".lora_A.default").removeprefix(PREFIX)
        for name, _ in adapted.named_modules()
        if name.endswith("lora_A.default")
    }
    assert wrapped == {a.tensor.removesuffix(".weight") for a, _ in update}
    for module in adapted.modules():
        if hasattr(module, "lora_A"):
            assert module.scaling == {"default": 1.0}

    merged = dict(adapted.merge_and_unload().named_parameters())
    for name, weight in patched.named_parameters():
        assert torch.allclose(merged[name], weight, rtol=0, atol=1e-6), name


def test_config_is_what_peft_reads(tmp_path: Path, base: Path, family: str) -> None:
    peft = pytest.importorskip("peft")
    export_lora(uneven_update(base, family), tmp_path / "a", base=base, base_name="x/y")
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "a"))
    assert isinstance(config, peft.LoraConfig)
    assert (config.r, config.lora_alpha, config.use_rslora) == (5, 5, False)
    assert config.fan_in_fan_out is (family == "gpt2")
    assert config.task_type == "CAUSAL_LM" and config.inference_mode
    assert config.bias == "none" and config.base_model_name_or_path == "x/y"
    assert config.target_modules == {
        address_of(family, layer).tensor.removesuffix(".weight") for layer in range(3)
    }


# Exported adapters, as files.


def test_files_hold_the_exact_factors_padded_with_zeros(
    tmp_path: Path, base: Path, family: str
) -> None:
    update = uneven_update(base, family)
    report = export_lora(update, tmp_path / "adapter", base=base)
    assert sorted(disk(tmp_path / "adapter")) == [CONFIG, WEIGHTS]
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    for address, change in update:
        module = PREFIX + address.tensor.removesuffix(".weight")
        a, b = (tensors.pop(f"{module}.lora_{x}.weight") for x in "AB")
        assert a.shape == (5, change.shape[1]) and b.shape == (change.shape[0], 5)
        assert torch.equal(a[: change.rank], change.right)
        assert torch.equal(b[:, : change.rank], change.left)
        assert not a[change.rank :].any() and not b[:, change.rank :].any()
    assert not tensors
    with safe_open(tmp_path / "adapter" / WEIGHTS, "pt") as file:
        assert file.metadata()["format"] == "pt"
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert list(config) == sorted(config)
    assert config["base_model_name_or_path"] == str(base)

    assert report.rank == 5 and report.server_rank == 8 and report.notes == ()
    names = [a.tensor.removesuffix(".weight") for a, _ in update]
    assert report.modules == dict(zip(names, (3, 1, 5), strict=True))
    assert report.bytes == (tmp_path / "adapter" / WEIGHTS).stat().st_size
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()


@pytest.mark.parametrize("family", ["llama"])
def test_same_inputs_same_bytes(tmp_path: Path, base: Path, family: str) -> None:
    update = uneven_update(base, family)
    turned = UpdateSet(
        dict(reversed(list(update))), dict(reversed(list(update.metadata.items())))
    )
    export_lora(update, tmp_path / "one", base=base)
    (tmp_path / "two").mkdir()  # an empty folder is as good as none
    export_lora(turned, tmp_path / "two", base=base)
    assert disk(tmp_path / "one") == disk(tmp_path / "two")


@pytest.mark.parametrize(
    "dtypes", [("float16",), ("bfloat16", "float64"), ("float32",)]
)
def test_comes_back_as_it_was(
    tmp_path: Path, base: Path, family: str, dtypes: tuple[str, ...]
) -> None:
    update = uneven_update(base, family)
    kinds = [getattr(torch, dtypes[layer % len(dtypes)]) for layer in range(3)]
    update = UpdateSet(
        {a: u.to(kind) for (a, u), kind in zip(update, kinds, strict=True)},
        {**update.metadata, "nested": {"numbers": [1, 0.1, None]}, "seed": 3},
    )
    export_lora(update, tmp_path / "adapter", base=base)
    assert_same(import_lora(tmp_path / "adapter", base=base), update)
    stored = {str(t.dtype) for t in load_file(tmp_path / "adapter" / WEIGHTS).values()}
    assert stored == {f"torch.{name}" for name in dtypes}


def test_tensors_of_several_dtypes_are_aligned(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    names = ("a.0.b.weight", "a.1.b.weight")
    save_file(
        {name: torch.zeros(2, 5) for name in names},
        tmp_path / "base" / "model.safetensors",
    )
    one, two = (WeightAddress(n, i, False) for i, n in enumerate(names))
    update = UpdateSet(
        {
            one: factors(2, 1, 5).to(torch.bfloat16),
            two: factors(2, 1, 5).to(torch.float64),
        }
    )
    out = tmp_path / "adapter"
    export_lora(update, out, base=tmp_path / "base", check_base=False)
    for entry in read_header(out / WEIGHTS).values():
        assert entry.begin % entry.torch_dtype.itemsize == 0, entry
    assert len(load_file(out / WEIGHTS)) == 4


def test_zeros_of_the_update_itself_and_aliases_come_back(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    whole = uneven_update(base, "gpt2")
    (one, first), (two, second), _ = whole
    silent = RankKUpdate(torch.zeros(16, 2), torch.zeros(2, 48))
    none = RankKUpdate(torch.zeros(16, 0), torch.zeros(0, 48))
    aliased = replace(address_of("gpt2", 2), aliases=("h.2.mlp.c_proj.weight",))
    update = UpdateSet({one: first, two: silent, aliased: none}, whole.metadata)
    export_lora(update, tmp_path / "adapter", base=base)
    assert_same(import_lora(tmp_path / "adapter", base=base), update)
    assert second.rank == 1


@pytest.mark.parametrize(
    ("rank", "served"), [(1, 8), (8, 8), (9, 16), (257, 320), (512, 512), (513, None)]
)
def test_rank_that_a_server_needs(
    tmp_path: Path, rank: int, served: int | None
) -> None:
    base = save_checkpoint(tmp_path / "base", "llama")
    update = UpdateSet({address_of("llama", 1): factors(16, rank, 40)})
    report = export_lora(update, tmp_path / "a", base=base, check_base=False)
    assert (report.rank, report.server_rank) == (rank, served)
    assert served is None or served in SERVER_RANKS
    assert bool(report.notes) is (served is None)
    assert served is not None or "more than vLLM allows (512)" in report.notes[0]


def test_names_follow_the_loaded_model_not_the_files(tmp_path: Path) -> None:
    """GPT-2's own checkpoint holds the bare decoder, without `transformer.`."""
    peft = pytest.importorskip("peft")
    base = tmp_path / "base"
    tiny_model("gpt2").transformer.save_pretrained(base)
    assert "h.1.mlp.c_proj.weight" in Checkpoint.open(base).tensors
    alias = ("h.1.mlp.c_proj.weight",)
    address = replace(address_of("gpt2", 1), aliases=alias)
    update = random_update(base, [address])
    export_lora(update, tmp_path / "adapter", base=base)
    adapted = peft.PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path / "adapter")
    model = tiny_model("gpt2")
    apply_live(model, update)
    assert (logits(adapted) - logits(model)).abs().max() < 1e-5

    strip_header(tmp_path / "adapter")
    imported = import_lora(tmp_path / "adapter", base=base)
    assert list(imported.updates) == [address]

    both = [
        f"{PREFIX}{name.removesuffix('.weight')}" for name in (*alias, address.tensor)
    ]
    tensors = {k: v for module in both for k, v in pair(module, 16, 48).items()}
    twice = write_adapter(tmp_path / "twice", tensors, fan_in_fan_out=True)
    with pytest.raises(CheckpointError, match="and transformer.h.1.* both change 'h.1"):
        import_lora(twice, base=base)


def strip_header(folder: Path) -> None:
    """What is left after somebody else's tool has saved an adapter again."""
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"format": "pt"})


# What is not exported.


def refuse_export(
    update: UpdateSet, base: Path, error: type[UnifiedEditError], match: str, **how: Any
) -> None:
    before = disk(base.parent)
    with pytest.raises(error, match=match):
        export_lora(update, base.parent / "adapter", base=base, **how)
    assert disk(base.parent) == before


def test_export_refuses_an_update_that_changes_nothing(
    tmp_path: Path, base: Path, family: str
) -> None:
    none = RankKUpdate(torch.zeros(16, 0), torch.zeros(0, 48))
    for updates in ({}, {address_of(family, 0): none}):
        refuse_export(UpdateSet(updates), base, UpdateError, "changes nothing")


def test_export_refuses_another_model(base: Path, family: str) -> None:
    update = random_update(base, [address_of(family, 0)])
    named = {**update.metadata, "base_fingerprint": "0" * 16}
    for metadata, match in ((named, "made for 0000"), ({}, "made for None")):
        other = UpdateSet(update.updates, metadata)
        refuse_export(other, base, CheckpointMismatch, match)
        out = base.parent / f"of-{len(metadata)}"
        assert export_lora(other, out, base=base, check_base=False).rank == 3


def test_export_refuses_what_does_not_fit(base: Path, family: str) -> None:
    address = address_of(family, 1)
    (fits,) = random_update(base, [address]).updates.values()
    wrong = {address: factors(16, 2, 7)}
    refuse_export(
        UpdateSet(wrong), base, UpdateError, f"{address.tensor}.*another model's"
    )
    turned = {replace(address, transposed=not address.transposed): fits}
    refuse_export(UpdateSet(turned), base, UpdateError, f"must be {address.transposed}")
    missing = {address_of(family, 9): fits}
    refuse_export(UpdateSet(missing), base, CheckpointError, "stores no tensor .*9.mlp")
    bias = {replace(address, tensor="lm_head.bias"): fits}
    refuse_export(
        UpdateSet(bias), base, UpdateError, "'lm_head.bias' is not a module's"
    )
    twice = {
        address: fits,
        replace(address, tensor="x.weight", aliases=(address.tensor,)): fits,
    }
    refuse_export(UpdateSet(twice), base, UpdateError, "twice")


def test_export_refuses_a_mix_of_orientations(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", square=True)
    one, other = address_of("gpt2", 0), replace(address_of("gpt2", 1), transposed=False)
    update = UpdateSet({one: factors(16, 2, 16), other: factors(16, 2, 16)})
    refuse_export(update, base, UpdateError, "h.0.*and 'transformer.h.1.*orientations")


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_export_refuses_non_finite_factors(
    base: Path, family: str, side: str, value: float
) -> None:
    update = random_update(base, [address_of(family, 2)])
    (change,) = update.updates.values()
    getattr(change, side)[0, 0] = value
    refuse_export(update, base, NonFiniteError, "layers.2.*NaN or infinity")


@pytest.mark.parametrize("family", ["llama"])
def test_export_refuses_metadata_that_is_no_json(base: Path, family: str) -> None:
    update = random_update(base, [address_of(family, 2)])
    for value in (object(), float("nan")):
        odd = UpdateSet(update.updates, {**update.metadata, "odd": value})
        refuse_export(odd, base, UpdateError, "no JSON data")


@pytest.mark.parametrize("family", ["llama"])
def test_export_refuses_a_target_in_use(
    tmp_path: Path, base: Path, family: str
) -> None:
    update = random_update(base, [address_of(family, 2)])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    before = disk(tmp_path)
    for out, match in (
        (tmp_path / "full", "exists already"),
        (tmp_path / "file", "exists already"),
        (tmp_path / "link", "exists already"),
        (base, "exists already"),
        (base / "adapter", "inside the base"),
        (tmp_path / "no" / "adapter", "not a folder"),
    ):
        with pytest.raises(CheckpointError, match=match):
            export_lora(update, out, base=base)
        assert disk(tmp_path) == before


@pytest.mark.parametrize("family", ["llama"])
def test_failures_leave_nothing_behind(
    tmp_path: Path, base: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, at every single write, sync and rename."""
    update = uneven_update(base, family)
    before = disk(tmp_path)
    calls: list[str] = []
    fail_at = -1

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == fail_at:
                raise OSError(28, "No space left on device")
            return function(*args, **kwargs)

        return call

    for name in ("write", "fsync", "rename", "mkdir"):
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    export_lora(update, tmp_path / "adapter", base=base)
    whole = disk(tmp_path)
    total = len(calls)
    # Both files and their folder are durable before the rename, then the name itself.
    ordered = [name for name in calls if name in ("fsync", "rename")]
    assert ordered == ["fsync", "fsync", "fsync", "rename", "fsync"]
    for path in (tmp_path / "adapter").iterdir():
        path.unlink()
    (tmp_path / "adapter").rmdir()
    for fail_at in range(1, total + 1):
        calls.clear()
        with pytest.raises(CheckpointError, match="No space left"):
            export_lora(update, tmp_path / "adapter", base=base)
        # The last step only makes a complete folder durable.
        assert disk(tmp_path) == (whole if fail_at == total else before)


@pytest.mark.parametrize("family", ["llama"])
def test_what_a_killed_export_left_is_replaced(
    tmp_path: Path, base: Path, family: str
) -> None:
    update = uneven_update(base, family)
    left = tmp_path / ".adapter.unified-edit-staging"
    left.mkdir()
    (left / WEIGHTS).write_bytes(b"half")
    export_lora(update, tmp_path / "adapter", base=base)
    assert not left.exists()
    assert_same(import_lora(tmp_path / "adapter", base=base), update)


# Quantized bases: packed weights have other names, shapes and dtypes.


def quantize(folder: Path, method: str, tensors: dict[str, Tensor]) -> None:
    stored = load_file(folder / "model.safetensors")
    module = address_of("llama", 1).tensor
    del stored[module]
    save_file({**stored, **tensors}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("method", "suffix", "packed"),
    [
        ("gptq", "qweight", torch.zeros(5, 16, dtype=torch.int32)),
        ("bitsandbytes", "weight", torch.zeros(320, 1, dtype=torch.uint8)),
        ("bitsandbytes", "weight", torch.zeros(80, 1, dtype=torch.bfloat16)),
    ],
)
def test_quantized_base_is_allowed_when_told(
    tmp_path: Path, method: str, suffix: str, packed: Tensor
) -> None:
    original = save_checkpoint(tmp_path / "original", "llama")
    update = random_update(original, [address_of("llama", 1)])
    base = save_checkpoint(tmp_path / "base", "llama")
    module = address_of("llama", 1).tensor.removesuffix("weight")
    quantize(base, method, {module + suffix: packed})
    refuse_export(update, base, CheckpointMismatch, f"{method}.*check_base=False")
    report = export_lora(update, tmp_path / "a", base=base, check_base=False)
    assert method in report.notes[0] and "not checked" in report.notes[0]
    # It is the original's update still, and can be imported for that model only.
    assert_same(import_lora(tmp_path / "a", base=original), update)
    with pytest.raises(UnsupportedModel, match=f"quantized with {method}"):
        import_lora(tmp_path / "a", base=base)
    elsewhere = UpdateSet({address_of("llama", 7): factors(16, 2, 40)})
    with pytest.raises(CheckpointError, match="stores no tensor .*layers.7"):
        export_lora(elsewhere, tmp_path / "b", base=base, check_base=False)


# Adapters that PEFT made.


def peft_adapter(base: Path, out: Path, **settings: Any) -> Tensor:
    """Saves an adapter with random factors; returns the logits of PEFT's merge of it.

    Of the adapter as it is loaded: PEFT sorts a config's keys when it saves it, and
    among patterns that overlap the first one counts.
    """
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    model = peft.get_peft_model(
        loaded(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(out)
    again = peft.PeftModel.from_pretrained(loaded(base), out)
    return logits(again.merge_and_unload())


# Keys that match a whole end of a name, the first of them first; and others that match
# its beginning (`h.0.mlp`) or half a component (`fc`), which count for nothing.
PATTERNS = {
    "gpt2": {
        "target_modules": ["c_attn", "mlp.c_proj", "c_fc"],
        "rank_pattern": {"c_attn": 2, r"h\.[01]\.mlp\.c_fc": 6, "fc": 3},
        "alpha_pattern": {
            "fc": 20,
            "h.0.mlp": 30,
            "transformer.h.0.mlp.c_proj": 3,
            r"h.\d.mlp.c_proj": 9,
        },
        "fan_in_fan_out": True,
    },
    "llama": {
        "target_modules": ["q_proj", "down_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.[01]\.mlp\.up_proj": 6, "proj": 3},
        "alpha_pattern": {
            "proj": 20,
            "layers.0.mlp": 30,
            "model.layers.0.mlp.down_proj": 3,
            r"layers.\d.mlp.down_proj": 9,
        },
    },
}


@pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"
)
@pytest.mark.parametrize("rslora", [False, True])
def test_import_gives_what_peft_merges(
    tmp_path: Path, base: Path, family: str, rslora: bool
) -> None:
    settings = {"r": 4, "lora_alpha": 7, "use_rslora": rslora, **PATTERNS[family]}
    expected = peft_adapter(base, tmp_path / "adapter", **settings)
    update = import_lora(tmp_path / "adapter", base=base)
    assert len(update) == 9
    ranks = [change.rank for _, change in update]
    assert sorted(set(ranks)) == [2, 4, 6]
    patched = patch(base, update, tmp_path / "patched")
    assert patched.verify().ok
    assert (logits(loaded(patched.path)) - expected).abs().max() < 1e-5
    assert (logits(loaded(base)) - expected).abs().max() > 1e-2
    assert {a.layer for a, _ in update} == {0, 1, 2}
    assert all(a.transposed is (family == "gpt2") for a, _ in update)
    assert update.metadata["base_fingerprint"] == Checkpoint.open(base).fingerprint()
    # As a file of ours it is the same update.
    update.save(tmp_path / "u.safetensors")
    assert_same(UpdateSet.load(tmp_path / "u.safetensors"), update)


@pytest.mark.parametrize("family", ["llama"])
def test_scaling_goes_into_left_and_one_changes_nothing(
    tmp_path: Path, base: Path, family: str
) -> None:
    for alpha in (4, 6):
        out = tmp_path / str(alpha)
        peft_adapter(base, out, r=4, lora_alpha=alpha, target_modules=["o_proj"])
        tensors = load_file(out / WEIGHTS)
        for address, change in import_lora(out, base=base):
            module = PREFIX + address.tensor.removesuffix(".weight")
            assert torch.equal(change.right, tensors[f"{module}.lora_A.weight"])
            b = tensors[f"{module}.lora_B.weight"]
            assert torch.equal(change.left, b * (alpha / 4))


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_import_widens_narrow_factors_exactly(
    tmp_path: Path, base: Path, family: str, dtype: torch.dtype
) -> None:
    module = f"{PREFIX}model.layers.1.self_attn.o_proj"
    a = torch.randn(2, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    b = torch.randn(16, 2, generator=torch.Generator().manual_seed(2)).to(dtype)
    write_adapter(
        tmp_path / "a", {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    )
    ((address, change),) = import_lora(tmp_path / "a", base=base)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert change.left.dtype == change.right.dtype == expected
    assert torch.equal(change.left, b.to(expected) * 2)
    assert torch.equal(change.right, a.to(expected))
    assert (address.layer, address.aliases) == (
        1,
        ("layers.1.self_attn.o_proj.weight",),
    )


def test_our_adapter_saved_again_by_peft_is_the_same_change(
    tmp_path: Path, base: Path, family: str
) -> None:
    peft = pytest.importorskip("peft")
    update = uneven_update(base, family)
    export_lora(update, tmp_path / "ours", base=base)
    model = peft.PeftModel.from_pretrained(loaded(base), tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    theirs = import_lora(tmp_path / "theirs", base=base)
    assert {a.tensor for a, _ in theirs} == {a.tensor for a, _ in update}
    ours = {address.tensor: change for address, change in update}
    for address, change in theirs:
        assert change.rank == 5
        assert torch.equal(change.dense(), ours[address.tensor].dense())


def test_peft_corrects_a_wrong_orientation_with_a_warning(tmp_path: Path) -> None:
    """Why an adapter whose flag contradicts the base is not always wrong in PEFT."""
    pytest.importorskip("peft")
    base = save_checkpoint(tmp_path / "base")
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to False"):
        peft_adapter(base, tmp_path / "a", r=2, target_modules=["mlp.c_proj"])
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["fan_in_fan_out"] is True
    edit_config(tmp_path / "a", fan_in_fan_out=False)
    with pytest.raises(UpdateError, match=r"\[48, 16\].*=False.*\[16, 48\].*be True"):
        import_lora(tmp_path / "a", base=base)


# What is not imported.


def edit_config(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **settings}))


def write_adapter(folder: Path, tensors: dict[str, Tensor], **settings: Any) -> Path:
    """An adapter in plain files: rank 2, scaling 2, any tensors."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}
    (folder / CONFIG).write_text(json.dumps({**config, **settings}))
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


DOWN = f"{PREFIX}model.layers.1.mlp.down_proj"


def pair(module: str = DOWN, d_value: int = 16, d_key: int = 40) -> dict[str, Tensor]:
    return {
        f"{module}.lora_A.weight": torch.ones(2, d_key),
        f"{module}.lora_B.weight": torch.ones(d_value, 2),
    }


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "base", "llama")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", pair())


def test_the_plain_adapter_is_accepted(llama: Path, adapter: Path) -> None:
    ((address, change),) = import_lora(adapter, base=llama)
    assert address.tensor == DOWN.removeprefix(PREFIX) + ".weight"
    assert torch.equal(change.dense(), torch.full((16, 40), 4.0))


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"use_qalora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3]},
        {"layer_replication": [[0, 2]]},
        {"target_parameters": ["experts.down_proj"]},
        {"alora_invocation_tokens": [1, 2]},
        {"use_bdlora": {"nblocks": 2}},
        {"kasa_config": {"beta": 1}},
        {"of_a_later_peft": 1},
    ],
)
def test_import_refuses_settings_by_name(
    llama: Path, adapter: Path, settings: dict[str, Any]
) -> None:
    edit_config(adapter, **settings)
    with pytest.raises(CheckpointError, match=f"{CONFIG}: {next(iter(settings))}="):
        import_lora(adapter, base=llama)
    edit_config(adapter, **{name: None for name in settings})
    assert len(import_lora(adapter, base=llama)) == 1


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "new"]
)
def test_import_refuses_inits_that_change_the_base(
    llama: Path, adapter: Path, init: str
) -> None:
    edit_config(adapter, init_lora_weights=init)
    with pytest.raises(CheckpointError, match=f"init_lora_weights='{init}' changes"):
        import_lora(adapter, base=llama)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_import_accepts_inits_that_leave_the_base_alone(
    llama: Path, adapter: Path, init: object
) -> None:
    edit_config(adapter, init_lora_weights=init)
    assert len(import_lora(adapter, base=llama)) == 1


def test_every_setting_of_peft_at_its_default_is_accepted(
    llama: Path, adapter: Path
) -> None:
    peft = pytest.importorskip("peft")
    known = peft.LoraConfig(r=2, lora_alpha=4, peft_type="LORA").to_dict()
    edit_config(adapter, **{**known, "peft_type": "LORA"})
    assert len(import_lora(adapter, base=llama)) == 1


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"r": 3}, "rank 3, but its tensors have rank 2"),
        ({"r": None}, "rank None"),
        ({"rank_pattern": {"down_proj": 4}}, "rank 4, but"),
        ({"rank_pattern": {"(": 4}}, "wrong for 'model.layers.1.mlp.down_proj'"),
        ({"rank_pattern": [1]}, "wrong for"),
        ({"lora_alpha": "4"}, "wrong for"),
        ({"lora_alpha": None}, "wrong for"),
        ({"lora_alpha": float("inf")}, "scaling inf"),
        ({"lora_alpha": 10**400}, "wrong for"),
        ({"peft_type": "IA3"}, "peft_type is not 'LORA'"),
    ],
)
def test_import_refuses_scalings_that_cannot_be(
    llama: Path, adapter: Path, settings: dict[str, Any], match: str
) -> None:
    edit_config(adapter, **settings)
    with pytest.raises(CheckpointError, match=f"{CONFIG}.*{match}"):
        import_lora(adapter, base=llama)


ODD = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({f"{PREFIX}model.embed_tokens.lora_embedding_A": ODD}, "lora_embedding_A' is"),
        ({f"{DOWN}.lora_magnitude_vector": ODD}, "lora_magnitude_vector' is not"),
        ({f"{DOWN}.lora_B.bias": ODD}, "lora_B.bias' is not"),
        ({f"{PREFIX}lm_head.weight": ODD}, "lm_head.weight' is not"),
        ({f"{DOWN}.lora_A.default.weight": ODD}, "lora_A.default.weight' is not"),
        (
            {"model.layers.1.mlp.down_proj.lora_A.weight": ODD},
            "is not base_model.model",
        ),
        ({f"{DOWN}.lora_A.weight": torch.ones(2, 40, 1, 1)}, "must be a matrix"),
        ({f"{DOWN}.lora_A.weight": torch.ones(2, 40).char()}, "I8.*must be a matrix"),
        ({f"{DOWN}.lora_A.weight": torch.ones(3, 40)}, "down_proj' differ in rank"),
        (
            pair(f"{PREFIX}lm_head", 61, 16),
            "'lm_head' does not hold exactly one number",
        ),
        (pair(f"{PREFIX}model.layers.1.experts.0.up"), "experts.0.up' does not hold"),
        (pair(f"{PREFIX}model.layers.8.mlp.down_proj"), "stores no tensor.*layers.8"),
        (pair(f"{PREFIX}layers.1.mlp.down_proj"), "stores no tensor 'layers.1"),
    ],
)
def test_import_refuses_tensors_by_name(
    tmp_path: Path, llama: Path, tensors: dict[str, Tensor], match: str
) -> None:
    folder = write_adapter(tmp_path / "adapter", {**pair(), **tensors})
    with pytest.raises(CheckpointError, match=match):
        import_lora(folder, base=llama)


@pytest.mark.parametrize("missing", ["lora_A", "lora_B"])
def test_import_refuses_half_a_pair(tmp_path: Path, llama: Path, missing: str) -> None:
    kept = {name: t for name, t in pair().items() if missing not in name}
    folder = write_adapter(tmp_path / "adapter", kept)
    with pytest.raises(
        CheckpointError, match=f"no tensor .*down_proj.{missing}.weight"
    ):
        import_lora(folder, base=llama)


def test_import_refuses_an_empty_adapter(tmp_path: Path, llama: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", {})
    with pytest.raises(CheckpointError, match="holds no tensor"):
        import_lora(folder, base=llama)


def test_import_refuses_wrong_shapes(tmp_path: Path, llama: Path) -> None:
    wide = write_adapter(tmp_path / "wide", pair(d_key=41))
    with pytest.raises(UpdateError, match=r"\[16, 40\].*\[16, 41\].*another model's"):
        import_lora(wide, base=llama)
    turned = write_adapter(tmp_path / "turned", pair(), fan_in_fan_out=True)
    with pytest.raises(UpdateError, match=r"=True.*\[40, 16\]; it must be False"):
        import_lora(turned, base=llama)


def test_import_believes_the_flag_where_a_weight_is_square(tmp_path: Path) -> None:
    for family, flag in (("gpt2", True), ("llama", False)):
        base = save_checkpoint(tmp_path / family, family, square=True)
        module = address_of(family, 1).tensor.removesuffix(".weight")
        folder = tmp_path / f"{family}-adapter"
        settings = {"target_modules": [module], "fan_in_fan_out": flag}
        expected = peft_adapter(base, folder, r=2, **settings)
        update = import_lora(folder, base=base)
        patched = loaded(patch(base, update, tmp_path / f"{family}-out").path)
        assert (logits(patched) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("which", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_import_refuses_non_finite_values(
    tmp_path: Path, llama: Path, which: str, value: float
) -> None:
    tensors = pair()
    tensors[f"{DOWN}.{which}.weight"][1, 1] = value
    folder = write_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(NonFiniteError, match="down_proj.*NaN or infinity"):
        import_lora(folder, base=llama)


def test_import_refuses_a_scaling_that_overflows(llama: Path, adapter: Path) -> None:
    edit_config(adapter, lora_alpha=1e300)
    with pytest.raises(NonFiniteError, match="down_proj"):
        import_lora(adapter, base=llama)


def test_import_refuses_pickles_and_missing_files(
    tmp_path: Path, llama: Path, adapter: Path
) -> None:
    with pytest.raises(CheckpointError, match=f"holds no {CONFIG}"):
        import_lora(llama, base=llama)
    weights = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"holds no {WEIGHTS}"):
        import_lora(adapter, base=llama)
    (adapter / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match="bin: a pickle file.*save_pretrained"):
        import_lora(adapter, base=llama)
    (adapter / WEIGHTS).write_bytes(weights)
    assert len(import_lora(adapter, base=llama)) == 1  # PEFT prefers safetensors, too
    (adapter / WEIGHTS).write_bytes(weights[:-1])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: not a valid safetensors"):
        import_lora(adapter, base=llama)
    for text in ("{", "[]", "[" * 100_000):
        (adapter / CONFIG).write_text(text)
        with pytest.raises(CheckpointError, match=CONFIG):
            import_lora(adapter, base=llama)


def test_import_refuses_a_quantized_base(llama: Path, adapter: Path) -> None:
    quantize(llama, "awq", {address_of("llama", 1).tensor: torch.zeros(16, 40)})
    with pytest.raises(UnsupportedModel, match="quantized with awq"):
        import_lora(adapter, base=llama)


def test_import_refuses_an_exported_adapter_of_another_model(
    tmp_path: Path, base: Path, family: str
) -> None:
    update = uneven_update(base, family)
    export_lora(update, tmp_path / "adapter", base=base)
    other = patch(base, update, tmp_path / "other").path
    with pytest.raises(CheckpointMismatch, match="was made for"):
        import_lora(tmp_path / "adapter", base=other)


def test_import_refuses_an_exported_adapter_that_was_changed(
    tmp_path: Path, llama: Path
) -> None:
    out = tmp_path / "adapter"
    export_lora(uneven_update(llama, "llama"), out, base=llama)
    config = (out / CONFIG).read_text()
    for settings in ({"lora_alpha": 10}, {"fan_in_fan_out": True}):
        edit_config(out, **settings)
        with pytest.raises(CheckpointError, match="was changed since unified-edit"):
            import_lora(out, base=llama)
        (out / CONFIG).write_text(config)
    with safe_open(out / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(out / WEIGHTS)
    padding = {name: tensor.clone() for name, tensor in tensors.items()}
    padding[f"{DOWN}.lora_A.weight"][4, 0] = 1.0
    fewer = {name: t for name, t in tensors.items() if not name.startswith(DOWN)}
    header = json.loads(metadata["unified_edit"])
    for changed, text, match in (
        (padding, metadata["unified_edit"], "was changed since unified-edit"),
        (fewer, metadata["unified_edit"], "disagree about .*layers.1.mlp.down_proj"),
        (tensors, "{", "header cannot be used"),
        (tensors, "[]", "header cannot be used"),
        (tensors, json.dumps({**header, "format": "x/2"}), "format is 'x/2'"),
        (tensors, json.dumps({**header, "ranks": [1]}), "header cannot be used"),
        (tensors, json.dumps({**header, "addresses": [3]}), "header cannot be used"),
    ):
        save_file(changed, out / WEIGHTS, {**metadata, "unified_edit": text})
        with pytest.raises(CheckpointError, match=match):
            import_lora(out, base=llama)
