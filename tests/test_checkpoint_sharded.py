"""Reading checkpoints: what is accepted, and what is refused with which words."""

import json
import struct
from pathlib import Path

import pytest
import torch
from checkpoint_kit import address_of, random_update, save_checkpoint, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from covariance_cache.fingerprint import model_fingerprint, sample_of
from unified_edit.algebra.update import WeightAddress
from unified_edit.checkpoint.layout import new_header, read_header
from unified_edit.checkpoint.patch import patch
from unified_edit.checkpoint.sharded import Checkpoint
from unified_edit.errors import CheckpointError, UnsupportedModel


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fingerprint_is_the_loaded_models(
    tmp_path: Path, family: str, dtype: torch.dtype, sharded: bool
) -> None:
    folder = save_checkpoint(tmp_path / "m", family, dtype, sharded=sharded)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert Checkpoint.open(folder).fingerprint() == model_fingerprint(loaded)
    with torch.no_grad():
        next(iter(loaded.parameters()))[0, 0] += 1
    assert Checkpoint.open(folder).fingerprint() != model_fingerprint(loaded)


def test_fingerprint_samples_large_matrices_as_the_model_does(tmp_path: Path) -> None:
    weight = torch.randn(97, 131, generator=torch.Generator().manual_seed(0))
    save_file({"a": weight, "b": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    module = torch.nn.Linear(131, 97, bias=False)
    module.load_state_dict({"weight": weight})
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.fingerprint() == model_fingerprint(module)
    module.weight.data += 1
    replaced = {"a": sample_of(module.weight.data)}
    assert checkpoint.fingerprint(replaced) == model_fingerprint(module)


@pytest.mark.parametrize("sharded", [False, True])
def test_reads_every_tensor_as_safetensors_does(tmp_path: Path, sharded: bool) -> None:
    folder = save_checkpoint(tmp_path / "m", "llama", torch.bfloat16, sharded=sharded)
    checkpoint = Checkpoint.open(folder)
    expected: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        expected.update(load_file(path))
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        entry = checkpoint[name]
        assert (entry.shape, entry.dtype) == (tuple(tensor.shape), "BF16")
        assert torch.equal(checkpoint.read(name), tensor)


def test_sha256_covers_the_files_of_the_checkpoint_only(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "m")
    (folder / ".unified-edit").mkdir()
    (folder / ".unified-edit" / "manifest.json").write_text("{}")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("x")
    names = {"README.md", "config.json", "generation_config.json", "extra/merges.txt"}
    assert set(Checkpoint.open(folder).sha256()) == names | {"model.safetensors"}


def test_unknown_tensor_is_named_with_the_nearest(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_checkpoint(tmp_path / "m"))
    with pytest.raises(CheckpointError, match=r"h\.9\.mlp.*nearest name is 'transfo"):
        checkpoint.resolve(address_of("gpt2", 9))


def test_resolves_by_name_then_alias_and_never_by_part(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_checkpoint(tmp_path / "m"))
    name = address_of("gpt2", 1).tensor
    short = name.removeprefix("transformer.")
    assert checkpoint.resolve(WeightAddress(short, 1, True, (name,))).name == name
    with pytest.raises(CheckpointError, match="stores no tensor"):
        checkpoint.resolve(WeightAddress(short, 1, True))
    other = address_of("gpt2", 2).tensor
    with pytest.raises(CheckpointError, match="several names"):
        checkpoint.resolve(WeightAddress(name, 1, True, (other,)))


@pytest.mark.parametrize(
    ("declared", "scheme"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"bits": 4}, "an unnamed scheme"),
    ],
)
def test_quantized_by_config_is_refused_by_name(
    tmp_path: Path, declared: dict[str, object], scheme: str
) -> None:
    folder = save_checkpoint(tmp_path / "m")
    update = random_update(folder, [address_of("gpt2", 0)])
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = declared
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=f"quantized with {scheme}; .*16 or 32"):
        patch(folder, update, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
    ],
)
def test_quantized_tensor_is_refused_by_dtype(
    tmp_path: Path, dtype: torch.dtype, name: str
) -> None:
    weight = torch.ones(4, 4).to(dtype)
    save_file({"w": weight}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    assert len(checkpoint.fingerprint()) == 64
    with pytest.raises(UnsupportedModel, match=f"'w' is stored as {name}"):
        checkpoint.editable(WeightAddress("w", 0, False))


def test_stacked_experts_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, 4, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match=r"\[2, 4, 4\]"):
        Checkpoint.open(tmp_path).editable(WeightAddress("w", 0, False))


def test_pickle_weights_are_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*save_pretrained"):
        Checkpoint.open(tmp_path)


def test_what_is_no_checkpoint_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a checkpoint folder"):
        Checkpoint.open(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds neither"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Checkpoint.open(tmp_path)


def test_single_file_beside_an_index_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "m", sharded=True)
    save_file({"w": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds both"):
        Checkpoint.open(folder)


def _first_shard(folder: Path) -> str:
    return Checkpoint.open(folder).files[0]


def test_missing_shard_is_named(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "m", sharded=True)
    shard = _first_shard(folder)
    (folder / shard).unlink()
    with pytest.raises(CheckpointError, match=f"shard '{shard}' is missing; download"):
        Checkpoint.open(folder)


def _change_index(folder: Path, change: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    weights: dict[str, object] = index["weight_map"]
    first = next(iter(weights))
    shards = sorted({str(shard) for shard in weights.values()})
    if change == "unlisted":
        del weights[first]
    elif change == "unstored":
        weights["ghost.weight"] = shards[0]
    elif change == "elsewhere":
        weights[first] = next(s for s in shards if s != weights[first])
    elif change == "outside":
        weights[first] = f"../{folder.name}/{weights[first]}"
    elif change == "number":
        weights[first] = 3
    elif change == "empty":
        weights.clear()
    elif change == "list":
        index = []
    elif change == "none":
        del index["weight_map"]
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("unlisted", "but the index does not list it"),
        ("unstored", "holds no tensor 'ghost.weight'"),
        ("elsewhere", "holds no tensor"),
        ("outside", "not the name of a file in this folder"),
        ("number", "not the name of a file in this folder"),
        ("empty", "has no weight_map"),
        ("list", "not a JSON object"),
        ("none", "has no weight_map"),
    ],
)
def test_index_and_shards_must_agree(tmp_path: Path, change: str, words: str) -> None:
    folder = save_checkpoint(tmp_path / "m", sharded=True)
    _change_index(folder, change)
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(folder)


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "m", sharded=True)
    first, second = Checkpoint.open(folder).files[:2]
    tensors = load_file(folder / second)
    name, tensor = next(iter(load_file(folder / first).items()))
    save_file({**tensors, name: tensor}, folder / second)
    with pytest.raises(CheckpointError, match=f"{second}: holds tensor '{name}', but"):
        Checkpoint.open(folder)


def _file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def _one(**changes: object) -> dict[str, object]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


_W = '"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
_TWO = {"dtype": "F32", "shape": [1]}
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "needs more"),
    "seven bytes": (b"\0" * 7, "needs more"),
    "huge length": (_file(_one(), b"\0" * 8, 2**63), "claims a header"),
    "length over file": (_file(_one(), b"\0" * 8, 200), "claims a header"),
    "no JSON": (_file(b"{nonsense"), "not a JSON object"),
    "not UTF-8": (_file(b'{"\xff":1}'), "not a JSON object"),
    "list": (_file([1]), "does not begin with"),
    "leading space": (_file(b" {}"), "does not begin with"),
    "trailing text": (_file(b"{}x"), "not a JSON object"),
    "deep": (_file(b'{"a":' + b"[" * 200_000), "not a JSON object"),
    "name twice": (_file(f"{{{_W},{_W}}}".encode(), b"\0" * 8), "'w' is given twice"),
    "key twice": (
        _file(b'{"w":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
        "'dtype' is given twice",
    ),
    "metadata list": (_file({"__metadata__": [1]}), "__metadata__"),
    "metadata number": (_file({"__metadata__": {"a": 1}}), "__metadata__"),
    "info list": (_file({"w": []}), "needs exactly"),
    "no dtype": (_file({"w": {"shape": [], "data_offsets": [0, 0]}}), "needs exactly"),
    "extra key": (_file(_one(more=1), b"\0" * 8), "needs exactly"),
    "unknown dtype": (_file(_one(dtype="F31"), b"\0" * 8), "unknown dtype 'F31'"),
    "dtype list": (_file(_one(dtype=[]), b"\0" * 8), "unknown dtype"),
    "shape text": (_file(_one(shape="2"), b"\0" * 8), "no sizes"),
    "shape negative": (_file(_one(shape=[-2]), b"\0" * 8), "no sizes"),
    "shape float": (_file(_one(shape=[2.0]), b"\0" * 8), "no sizes"),
    "shape bool": (_file(_one(shape=[True, 2]), b"\0" * 8), "no sizes"),
    "shape huge": (_file(_one(shape=[2**80]), b"\0" * 8), "no sizes"),
    "shape overflow": (_file(_one(shape=[2**62] * 9), b"\0" * 8), "does not fill"),
    "shape too small": (_file(_one(shape=[1]), b"\0" * 8), "does not fill"),
    "one offset": (_file(_one(data_offsets=[0]), b"\0" * 8), "no sizes"),
    "offset negative": (_file(_one(data_offsets=[-8, 0]), b"\0" * 8), "no sizes"),
    "offset reversed": (_file(_one(data_offsets=[8, 0]), b"\0" * 8), "lies at bytes"),
    "offset beyond": (_file(_one(data_offsets=[8, 16]), b"\0" * 8), "lies at bytes"),
    "truncated": (_file(_one(), b"\0" * 7), "lies at bytes"),
    "gap at start": (_file(_one(data_offsets=[4, 12]), b"\0" * 12), "follows a gap"),
    "trailing bytes": (_file(_one(), b"\0" * 9), "its tensors end at byte"),
    "overlap": (
        _file(
            {
                "a": {**_TWO, "data_offsets": [0, 4]},
                "b": {**_TWO, "data_offsets": [2, 6]},
            },
            b"\0" * 6,
        ),
        "'b' overlaps",
    ),
    "same range": (
        _file(
            {
                "a": {**_TWO, "data_offsets": [0, 4]},
                "b": {**_TWO, "data_offsets": [0, 4]},
            },
            b"\0" * 4,
        ),
        "'b' overlaps",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_refused(tmp_path: Path, case: str) -> None:
    content, words = MALFORMED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=words) as caught:
        Checkpoint.open(tmp_path)
    assert str(path) in str(caught.value)


def test_well_formed_oddities_are_read(tmp_path: Path) -> None:
    """Empty tensors, scalars, unaligned data and an odd order of names are legal."""
    header = {
        "z": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "empty": {"dtype": "F32", "shape": [0, 4], "data_offsets": [3, 3]},
        "scalar": {"dtype": "F64", "shape": [], "data_offsets": [3, 11]},
        "m": {"dtype": "F16", "shape": [1, 2], "data_offsets": [11, 15]},
    }
    data = bytes([1, 2, 3]) + struct.pack("<d2e", 0.5, 1.0, -2.0)
    (tmp_path / "model.safetensors").write_bytes(_file(header, data))
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.read("z").tolist() == [1, 2, 3]
    assert checkpoint.read("empty").shape == (0, 4)
    assert checkpoint.read("scalar").item() == 0.5
    assert checkpoint.read("m").tolist() == [[1.0, -2.0]]
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.load_state_dict({"weight": torch.tensor([[1.0, -2.0]])})
    assert checkpoint.fingerprint() == model_fingerprint(layer)


def test_own_header_is_read_by_safetensors(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    tensors = {"ü/left": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3).half()}
    save_file(tensors, source)
    entries = list(read_header(source).values())
    data = b"".join(source.read_bytes()[entry.begin : entry.end] for entry in entries)
    copy = tmp_path / "b.safetensors"
    copy.write_bytes(new_header(entries, {"format": "pt"}) + data)
    assert all(torch.equal(load_file(copy)[name], tensors[name]) for name in tensors)


def test_tied_head_is_stored_once_and_counts_once(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "m")
    checkpoint = Checkpoint.open(folder)
    assert "lm_head.weight" not in checkpoint.tensors
    model = tiny_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert checkpoint.fingerprint() == model_fingerprint(model)
