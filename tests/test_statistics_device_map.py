"""Statistics of a model that is not in one place: weights that accelerate keeps in
memory or in files until a module runs, blocks on several devices, and GPUs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from statistics_helpers import LAYERS, MODULE, TEXTS, make_model, make_tokenizer
from torch import Tensor, nn

from covariance_cache import (
    KeyStatistics,
    NonFiniteActivations,
    StatisticsError,
    StatisticsMismatch,
    StatisticsStore,
    collect,
    model_fingerprint,
)
from covariance_cache.checkpoint import Checkpoint
from covariance_cache.corpus import Documents, packed_windows
from covariance_cache.feeder import input_device, sample_keys
from covariance_cache.layer import LayerSums
from covariance_cache.modules import key_modules

accelerate = pytest.importorskip("accelerate")

KINDS = ("gpt2", "llama")
TOKENS, WINDOW, BATCH = 900, 32, 4
BLOCK_CLASS = {"gpt2": "GPT2Block", "llama": "LlamaDecoderLayer"}
BLOCKS = {"gpt2": "transformer.h.{}", "llama": "model.layers.{}"}
PARTS = {
    "gpt2": ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"),
    "llama": ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"),
}


def gather(model: Any, **settings: Any) -> dict[int, KeyStatistics]:
    settings = {"tokens": TOKENS, "window": WINDOW, "batch_size": BATCH} | settings
    corpus, layers = settings.pop("corpus", TEXTS), settings.pop("layers", range(3))
    return collect(
        model, make_tokenizer(bos=True), corpus, layers, progress=False, **settings
    )


def dispatched(
    model: Any, kind: str, devices: list[str], ends: str = "cpu", **options: Any
) -> Any:
    """The model with each block on its device, what is before and after them on
    another."""
    assert len(devices) == LAYERS
    blocks = {BLOCKS[kind].format(i): device for i, device in enumerate(devices)}
    return accelerate.dispatch_model(
        model,
        {**dict.fromkeys(PARTS[kind], ends), **blocks},
        main_device=ends,
        force_hooks=True,
        **options,
    )


def _in_memory(model: Any, kind: str, folder: Path) -> Any:
    return accelerate.cpu_offload(model, execution_device="cpu")


def _in_memory_by_block(model: Any, kind: str, folder: Path) -> Any:
    return accelerate.cpu_offload(
        model, execution_device="cpu", preload_module_classes=[BLOCK_CLASS[kind]]
    )


def _in_files(model: Any, kind: str, folder: Path) -> Any:
    return accelerate.disk_offload(model, folder, execution_device="cpu")


def _some_in_files(model: Any, kind: str, folder: Path) -> Any:
    return dispatched(model, kind, ["disk", "cpu", "disk"], offload_dir=folder)


Offload = Callable[[Any, str, Path], Any]
OFFLOADS = {
    "in memory": _in_memory,
    "in memory, by block": _in_memory_by_block,
    "in files": _in_files,
    "some in files": _some_in_files,
}


@pytest.fixture(params=OFFLOADS)
def offload(request: pytest.FixtureRequest) -> Offload:
    return OFFLOADS[request.param]


def absent(model: nn.Module) -> set[str]:
    """Weights that are on no device."""
    return {name for name, each in model.named_parameters() if each.is_meta}


def assert_same(
    found: Mapping[int, KeyStatistics], expected: Mapping[int, KeyStatistics]
) -> None:
    assert found.keys() == expected.keys()
    for layer, each in expected.items():
        mine = found[layer]
        assert torch.equal(mine.second_moment, each.second_moment), layer
        assert (mine.count, mine.provenance) == (each.count, each.provenance)
        assert mine.adequacy == each.adequacy


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_on_one_device_change_nothing_and_stay(kind: str) -> None:
    expected = gather(make_model(kind))
    model = dispatched(make_model(kind), kind, ["cpu"] * LAYERS)
    before = {n: m.__dict__.get("forward") for n, m in model.named_modules()}
    assert before[BLOCKS[kind].format(1)] is not None
    assert_same(gather(model), expected)
    for name, module in model.named_modules():
        assert module.__dict__.get("forward") is before[name], name
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_weights_give_the_same_bits(
    kind: str, offload: Offload, tmp_path: Path
) -> None:
    """The same provenance as well: it is the same model, wherever its weights are."""
    plain = make_model(kind)
    expected = gather(plain)
    model = offload(make_model(kind), kind, tmp_path)
    away = absent(model)
    assert any(name.startswith(BLOCKS[kind].format(0)) for name in away)
    assert_same(gather(model), expected)
    # The first pass ended in the midst of a forward; another one still works, and so
    # does a whole forward, after which every weight is away again.
    assert_same(gather(model, layers=[1]), {1: expected[1]})
    ids = torch.arange(2, 22)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    assert absent(model) == away


def test_the_fingerprint_of_offloaded_weights_is_that_of_their_values(
    offload: Offload, tmp_path: Path
) -> None:
    expected = model_fingerprint(make_model("gpt2"))
    model = offload(make_model("gpt2"), "gpt2", tmp_path / "one")
    assert model_fingerprint(model) == expected
    other = make_model("gpt2")
    with torch.no_grad():
        other.transformer.h[2].mlp.c_fc.weight.add_(0.01)
    changed = model_fingerprint(other)
    assert changed != expected
    other = offload(other, "gpt2", tmp_path / "other")
    assert any(name.startswith("transformer.h.2.mlp.c_fc") for name in absent(other))
    assert model_fingerprint(other) == changed


def test_weights_that_nobody_keeps_are_named() -> None:
    """A model that was only described: nothing to fingerprint, nothing to collect."""
    with torch.device("meta"):
        model = make_model("llama")
    with pytest.raises(StatisticsError, match=r"model\.embed_tokens\.weight"):
        model_fingerprint(model)


def test_statistics_are_accepted_wherever_the_weights_are(tmp_path: Path) -> None:
    store = StatisticsStore(tmp_path / "statistics")
    for each in gather(make_model("llama")).values():
        store.save(each)
    tokenizer = make_tokenizer(bos=True)
    model = _in_memory(make_model("llama"), "llama", tmp_path)
    loaded = store.load(model, range(LAYERS), tokenizer)
    assert list(loaded) == [0, 1, 2] and loaded[2].accepted_mismatch is None
    stranger = _in_memory(make_model("llama", seed=1), "llama", tmp_path)
    with pytest.raises(StatisticsMismatch, match="was collected on model"):
        store.load(stranger, range(LAYERS), tokenizer)


class Killed(BaseException):
    """What ends a run between two instructions."""


def test_a_pass_may_go_on_with_the_weights_elsewhere(tmp_path: Path) -> None:
    """A checkpoint belongs to a model, not to where its weights were."""
    model, passes = make_model("gpt2"), []

    def die(*_: Any) -> None:
        passes.append(1)
        if len(passes) == 6:
            raise Killed

    settings = {"checkpoint_dir": tmp_path / "kept", "checkpoint_every": 2}
    expected = gather(make_model("gpt2"))
    with model.transformer.h[1].register_forward_pre_hook(die), pytest.raises(Killed):
        gather(model, **settings)
    assert list((tmp_path / "kept").iterdir())
    offloaded = _in_files(make_model("gpt2"), "gpt2", tmp_path / "weights")
    assert_same(gather(offloaded, **settings), expected)
    assert not list((tmp_path / "kept").iterdir())


def test_token_ids_go_where_the_first_weight_is(tmp_path: Path) -> None:
    model = make_model("gpt2")
    assert input_device(model) == torch.device("cpu")
    assert input_device(_in_memory(model, "gpt2", tmp_path)) == torch.device("cpu")
    # The first weights are away; the next one that is somewhere decides.
    model = make_model("gpt2")
    model.transformer.wte.to("meta")
    assert model.transformer.wte.weight.is_meta
    assert input_device(model) == torch.device("cpu")
    assert input_device(nn.ReLU()) == torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sums_are_where_their_keys_are(dtype: torch.dtype) -> None:
    sample = torch.empty(1, 1, 24, dtype=dtype, device="meta")
    sums = LayerSums(sample, 4)
    assert sums.key_dtype == dtype
    sums.add(torch.empty(2, 5, 24, dtype=dtype, device="meta"))
    assert sums.moment.count == 10
    assert {name: each.device.type for name, each in sums.state().items()} == {
        "total": "meta",
        "squares": "meta",
        "probes": "meta",
        "count": "cpu",
    }
    with pytest.raises(StatisticsError, match="keys are on cpu, .* is on meta"):
        sums.add(torch.zeros(2, 5, 24, dtype=dtype))
    assert sums.moment.count == 10


def brute_force(model: Any, kind: str, layer: int) -> tuple[Tensor, int]:
    """Full forwards over the same batches, on the model's device; every key moved to
    the CPU and summed there in float64."""
    keys: list[Tensor] = []
    windows = list(
        packed_windows(
            make_tokenizer(bos=True),
            Documents(TEXTS, seed=0),
            length=WINDOW,
            budget=TOKENS,
        )
    )
    full = [each.ids for each in windows if len(each.ids) == WINDOW]
    batches = [full[i : i + BATCH] for i in range(0, len(full), BATCH)]
    batches += [[each.ids] for each in windows if len(each.ids) != WINDOW]
    handle = model.get_submodule(MODULE[kind].format(layer)).register_forward_pre_hook(
        lambda _, inputs: keys.append(inputs[0].flatten(0, -2).double().cpu())
    )
    with handle, torch.no_grad():
        for batch in batches:
            ids = torch.tensor(batch, device=input_device(model))
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    rows = torch.cat(keys)
    return rows.T @ rows / len(rows), len(rows)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_keys_are_those_of_a_brute_force(kind: str, tmp_path: Path) -> None:
    model = _in_memory(make_model(kind), kind, tmp_path)
    for layer, each in gather(model).items():
        expected, count = brute_force(model, kind, layer)
        assert each.count == count == TOKENS
        assert relative_error(each.second_moment, expected) < 1e-6


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")


def assert_close_adequacy(found: KeyStatistics, expected: KeyStatistics) -> None:
    one, two = found.adequacy, expected.adequacy
    assert one is not None and two is not None
    assert one.tokens_per_dimension == two.tokens_per_dimension
    assert one.change_shrinkage == two.change_shrinkage
    for name in ("effective_rank", "shrinkage_intensity", "first_position_share"):
        assert getattr(one, name) == pytest.approx(getattr(two, name), rel=1e-3), name
    assert one.change == pytest.approx(two.change, rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("devices", "ends"),
    [
        pytest.param(["cpu", "cuda:0", "cuda:0"], "cpu", marks=needs_cuda, id="up"),
        pytest.param(["cuda:0", "cuda:0", "cpu"], "cpu", marks=needs_cuda, id="down"),
        pytest.param(
            ["cuda:0", "cuda:1", "cuda:0"], "cuda:0", marks=needs_two, id="two"
        ),
        pytest.param(
            ["cuda:1", "cuda:1", "cuda:0"], "cuda:0", marks=needs_two, id="other"
        ),
    ],
)
def test_each_layer_is_summed_on_its_own_device(
    kind: str, devices: list[str], ends: str
) -> None:
    expected = gather(make_model(kind))
    model = dispatched(make_model(kind), kind, devices, ends)
    with torch.no_grad():
        samples = sample_keys(model, key_modules(model, range(LAYERS)))
    found = gather(model)
    for layer, device in enumerate(devices):
        assert samples[layer].device == torch.device(device)
        mine, other = found[layer], expected[layer]
        assert mine.second_moment.device == torch.device(device)
        assert (mine.count, mine.provenance) == (other.count, other.provenance)
        # Devices round a model differently; the sums themselves are compared below.
        assert relative_error(mine.second_moment, other.second_moment.double()) < 1e-4
        assert_close_adequacy(mine, other)


@pytest.fixture
def tensor_cores() -> Iterator[None]:
    """Allows TF32 and half-precision sums, which models may use and sums must not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_adds_what_a_cpu_adds_in_float64(kind: str, dtype: torch.dtype) -> None:
    """The keys are the GPU's own either way, so only their sum can differ."""
    model = make_model(kind).to("cuda", dtype)
    for layer, each in gather(model).items():
        expected, count = brute_force(model, kind, layer)
        assert each.count == count == TOKENS
        assert each.second_moment.device.type == "cuda"
        assert each.second_moment.dtype == torch.float32
        assert each.provenance.model_dtype == str(dtype).removeprefix("torch.")
        assert relative_error(each.second_moment, expected) < 3e-6
        assert torch.equal(each.second_moment, each.second_moment.T)


@pytest.mark.gpu
@needs_cuda
def test_float64_keys_stay_float64_on_a_gpu() -> None:
    model = make_model("llama").to("cuda", torch.float64)
    for layer, each in gather(model).items():
        expected, _ = brute_force(model, "llama", layer)
        assert each.second_moment.dtype == torch.float64
        assert relative_error(each.second_moment, expected) < 1e-13


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_pass_on_a_gpu_is_continued(tmp_path: Path, every: int) -> None:
    model, passes = make_model("gpt2").cuda(), []

    def die(*_: Any) -> None:
        passes.append(1)
        if len(passes) == 6:
            raise Killed

    settings = {"checkpoint_dir": tmp_path, "checkpoint_every": every}
    expected = gather(model)
    with model.transformer.h[1].register_forward_pre_hook(die), pytest.raises(Killed):
        gather(model, **settings)
    found = gather(model, **settings)
    for layer, each in expected.items():
        mine = found[layer]
        assert (mine.count, mine.provenance) == (each.count, each.provenance)
        error = relative_error(mine.second_moment, each.second_moment.cpu().double())
        assert error < 1e-6
        assert_close_adequacy(mine, each)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("document", [0, 15, 39])
def test_a_gpu_finds_a_bad_key_though_it_looks_late(
    tmp_path: Path, document: int
) -> None:
    """In the first batch, in a middle one, in the last; one letter's key is bad."""
    tokenizer = make_tokenizer(bos=True)
    letter = tokenizer("Q", add_special_tokens=False)["input_ids"][0]
    texts = [*TEXTS]
    assert len(texts) == 40 and not any("Q" in text for text in texts)
    texts[document] += "Q"
    everything = Documents(texts, seed=None)
    windows = list(packed_windows(tokenizer, everything, length=WINDOW, budget=10**9))
    tokens = windows[-1].end.used
    (place,) = (n for n, each in enumerate(windows) if letter in each.ids)
    assert (document == 0) == (place < BATCH)
    assert (document == 39) == (place == len(windows) - 1)
    model, ids = make_model("gpt2").cuda(), []
    model.transformer.wte.register_forward_pre_hook(
        lambda _, inputs: ids.append(inputs[0])
    )
    model.transformer.h[1].mlp.act.register_forward_hook(
        lambda *args: args[-1].masked_fill(ids[-1][..., None] == letter, torch.nan)
    )
    with pytest.raises(NonFiniteActivations) as caught:
        gather(
            model,
            corpus=texts,
            seed=None,
            tokens=tokens,
            checkpoint_dir=tmp_path,
            checkpoint_every=3,
        )
    assert "layer 1 (transformer.h.1.mlp.c_proj)" in str(caught.value)
    position, length = windows[place].ids.index(letter), len(windows[place].ids)
    assert f"token {position} of the window of {length} " in str(caught.value)
    # The batches before it may be in a checkpoint, the bad one may not.
    kept = place // BATCH // 3 * 3 * BATCH
    assert len(list(tmp_path.iterdir())) == (kept > 0)
    if kept:
        path = tmp_path / Checkpoint.NAME
        with safe_open(str(path), "pt") as file:
            header = json.loads(file.metadata()["covariance_cache"])
        assert header["cursor"]["used"] == windows[kept - 1].end.used
