"""Packed files, files of before there were any, and statistics that are read when they
are asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from statistics_helpers import LAYERS, TEXTS, make_model, make_tokenizer, random_keys
from torch import Tensor

from covariance_cache import (
    Adequacy,
    KeyStatistics,
    Provenance,
    SecondMomentAccumulator,
    StatisticsError,
    StatisticsMismatch,
    StatisticsStore,
    collect,
)
from covariance_cache.store import FORMAT, LoadedStatistics, pack, unpack

SOURCE = Provenance(model_fingerprint="f" * 64, module="h.7.mlp.c_proj", seed=3)


def made(
    d_key: int = 6, dtype: torch.dtype = torch.float32, layer: int = 7
) -> KeyStatistics:
    accumulator = SecondMomentAccumulator(d_key, dtype)
    accumulator.update(random_keys(50, d_key).to(dtype))
    return KeyStatistics(layer, *accumulator.freeze(), SOURCE)


def header_of(path: Path) -> dict[str, Any]:
    with safe_open(str(path), "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["covariance_cache"])
    return found


def rewrite(
    path: Path, tensors: dict[str, Tensor] | None = None, **changes: Any
) -> None:
    """A file with another header or other tensors; None leaves a field out."""
    header = {**header_of(path), **changes}
    text = json.dumps({k: v for k, v in header.items() if v is not None})
    tensors = load_file(path) if tensors is None else tensors
    save_file(tensors, path, metadata={"covariance_cache": text})


def bits(matrix: Tensor) -> Tensor:
    return matrix.contiguous().view(torch.uint8)


class TestRoundTrip:
    @pytest.mark.parametrize("d_key", [1, 2, 3, 64, 1030])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_is_bit_for_bit(
        self, tmp_path: Path, d_key: int, dtype: torch.dtype
    ) -> None:
        store, statistics = StatisticsStore(tmp_path), made(d_key, dtype)
        path = store.save(statistics, packed=True)
        found = store.open(7)
        assert found.second_moment.dtype == dtype
        assert torch.equal(bits(found.second_moment), bits(statistics.second_moment))
        assert found.fingerprint() == statistics.fingerprint()
        assert (found.count, found.provenance) == (50, SOURCE)
        assert found.second_moment.is_contiguous()
        # Written once more it is the same file.
        before = path.read_bytes()
        assert store.save(found, packed=True).read_bytes() == before

    def test_the_triangle_is_the_upper_one_row_after_row(self) -> None:
        matrix = torch.tensor([[1.0, 2, 3], [2, 4, 5], [3, 5, 6]])
        assert pack(matrix).tolist() == [1, 2, 3, 4, 5, 6]
        assert torch.equal(unpack(pack(matrix), 3), matrix)
        index = torch.triu_indices(40, 40)
        matrix = made(40).second_moment
        assert torch.equal(pack(matrix), matrix[index[0], index[1]])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_takes_half_the_bytes(self, tmp_path: Path, dtype: torch.dtype) -> None:
        store, statistics, width = StatisticsStore(tmp_path), made(200, dtype), 4
        width = dtype.itemsize
        sizes = {}
        for packed in (False, True):
            path = store.save(statistics, packed=packed)
            with path.open("rb") as file:
                front = 8 + int.from_bytes(file.read(8), "little")
            sizes[packed] = path.stat().st_size - front
            assert front < 2000
        assert sizes == {False: 200 * 200 * width, True: 100 * 201 * width}

    def test_the_header_says_which(self, tmp_path: Path) -> None:
        store = StatisticsStore(tmp_path)
        for packed, name in ((True, "upper_triangle"), (False, "second_moment")):
            path = store.save(made(), packed=packed)  # in place of the other
            assert store.header(7)["packed"] is packed
            assert store.header(7)["d_key"] == 6
            assert list(load_file(path)) == [name]
            assert store.layers() == [7] and os.listdir(tmp_path) == [path.name]

    def test_same_content_same_bytes(self, tmp_path: Path) -> None:
        contents = set()
        for name in "ab":
            store = StatisticsStore(tmp_path / name)
            contents.add(store.save(made(64), packed=True).read_bytes())
        assert len(contents) == 1

    def test_a_shrinkage_is_not_written(self, tmp_path: Path) -> None:
        store, statistics = StatisticsStore(tmp_path), made()
        for packed in (False, True):
            before = store.save(statistics, packed=packed).read_bytes()
            shrunk = statistics.shrunk("oas")
            assert store.save(shrunk, packed=packed).read_bytes() == before
            found = store.open(7)
            assert torch.equal(found.second_moment, statistics.second_moment)
            assert found.shrinkage == statistics.shrinkage

    def test_adequacy_comes_along(self, tmp_path: Path) -> None:
        store = StatisticsStore(tmp_path)
        told = Adequacy(8.25, 1 / 3, None, 1e-9, 0.5, 0.1 + 0.2, "oas")
        for packed in (False, True):
            store.save(replace(made(), adequacy=told), packed=packed)
            assert store.open(7).adequacy == told
            store.save(made(), packed=packed)
            assert store.open(7).adequacy is None


class TestDamage:
    @pytest.fixture
    def stored(self, tmp_path: Path) -> tuple[StatisticsStore, Path]:
        store = StatisticsStore(tmp_path)
        return store, store.save(made(), packed=True)

    @pytest.mark.parametrize("shape", [(20,), (22,), (0,), (6, 6), (3, 7), ()])
    def test_a_triangle_of_another_size(self, stored: Any, shape: tuple[int]) -> None:
        store, path = stored
        rewrite(path, {"upper_triangle": torch.ones(shape)})
        with pytest.raises(StatisticsError, match=r"layer-007.*d_key 6 needs 21"):
            store.open(7)

    @pytest.mark.parametrize("d_key", [5, 7, 0, -7, 10**6])
    def test_another_width_in_the_header(self, stored: Any, d_key: int) -> None:
        store, path = stored
        rewrite(path, d_key=d_key)
        with pytest.raises(StatisticsError, match=r"layer-007.*holds \[21\] numbers"):
            store.open(7)

    @pytest.mark.parametrize("d_key", [None, "6", 6.5, [6]])
    def test_no_width_in_the_header(self, stored: Any, d_key: Any) -> None:
        store, path = stored
        rewrite(path, d_key=d_key)
        with pytest.raises(StatisticsError, match="layer-007"):
            store.open(7)

    def test_one_thing_said_and_another_held(self, stored: Any) -> None:
        store, path = stored
        rewrite(path, packed=False)
        with pytest.raises(StatisticsError, match=r"layer-007.*second_moment"):
            store.open(7)
        store.save(made())
        rewrite(path, packed=True)
        with pytest.raises(StatisticsError, match=r"layer-007.*upper_triangle"):
            store.open(7)

    def test_what_is_no_second_moment_is_refused_as_ever(self, stored: Any) -> None:
        store, path = stored
        (triangle,) = load_file(path).values()
        for value, message in ((torch.nan, "NaN"), (-1.0, "negative diagonal")):
            bad = triangle.clone()
            bad[0] = value
            rewrite(path, {"upper_triangle": bad})
            with pytest.raises(StatisticsError, match=f"layer-007.*{message}"):
                store.open(7)
        rewrite(path, {"upper_triangle": triangle.half()})
        with pytest.raises(StatisticsError, match=r"layer-007.*float16"):
            store.open(7)


NEW_FIELDS = ("packed", "adequacy", "dtype")


def make_old(path: Path) -> None:
    """As files were before they could be packed, merged or imported."""
    source = {
        name: value
        for name, value in header_of(path)["provenance"].items()
        if name not in ("parts", "origin")
    }
    rewrite(path, provenance=source, **dict.fromkeys(NEW_FIELDS))


def test_files_of_before_are_still_read(tmp_path: Path) -> None:
    model, tokenizer = make_model("gpt2"), make_tokenizer()
    settings = {"tokens": 300, "window": 32, "probes": 0, "progress": False}
    store = StatisticsStore(tmp_path)
    expected = collect(model, tokenizer, TEXTS, [1], **settings)[1]
    path = store.save(expected)
    make_old(path)
    assert not {*NEW_FIELDS} & header_of(path).keys()
    found = store.open(1)
    assert torch.equal(found.second_moment, expected.second_moment)
    assert found.fingerprint() == expected.fingerprint()
    assert found.adequacy is None and found.provenance.parts == ()
    loaded = store.load(model, [1], tokenizer)
    assert loaded[1].fingerprint() == expected.fingerprint()
    with pytest.raises(StatisticsMismatch, match="was collected on model"):
        store.load(make_model("gpt2", seed=1), [1], tokenizer)


Refill = Callable[..., None]


class TestLoadedWhenAskedFor:
    @pytest.fixture
    def model(self) -> Any:
        return make_model("gpt2")

    @pytest.fixture
    def store(self, tmp_path: Path, model: Any) -> StatisticsStore:
        """Of layers 0 and 2, the second packed."""
        store = StatisticsStore(tmp_path)
        settings = {"tokens": 300, "window": 32, "progress": False}
        found = collect(model, make_tokenizer(), TEXTS, (0, 2), **settings)
        for layer, statistics in found.items():
            store.save(statistics, packed=layer == 2)
        return store

    @pytest.fixture
    def refill(self, store: StatisticsStore) -> Refill:
        """Puts a recognisable matrix into a layer's file, the header as it was."""

        def refill(layer: int, value: float) -> None:
            matrix = value * torch.eye(64)
            name, tensor = (
                ("upper_triangle", pack(matrix))
                if store.header(layer)["packed"]
                else ("second_moment", matrix)
            )
            rewrite(store.file(layer), {name: tensor})

        return refill

    @pytest.mark.parametrize("layer", [0, 2])
    def test_at_first_access_and_never_again(
        self, store: StatisticsStore, model: Any, refill: Refill, layer: int
    ) -> None:
        loaded = store.load(model, [2, 0], make_tokenizer(), shrinkage="ridge:0.5")
        assert isinstance(loaded, LoadedStatistics)
        assert list(loaded) == [2, 0] and len(loaded) == 2
        refill(layer, 5.0)  # what is found below was read after this
        first = loaded[layer]
        assert torch.equal(first.second_moment, 5 * torch.eye(64))
        assert str(first.shrinkage) == "ridge:0.5" and first.layer == layer
        assert first.accepted_mismatch is None
        refill(layer, 9.0)
        assert loaded[layer] is first
        store.file(layer).unlink()
        assert loaded[layer] is first and loaded.get(layer) is first
        assert dict(loaded.items())[layer] is first
        # Another loading is another reading.
        with pytest.raises(StatisticsError, match=f"no statistics of layer {layer}"):
            store.load(model, [layer])

    def test_a_bad_matrix_is_found_when_it_is_read(
        self, store: StatisticsStore, model: Any, refill: Refill
    ) -> None:
        refill(0, float("nan"))
        loaded = store.load(model, [0, 2])
        assert loaded[2].layer == 2
        with pytest.raises(StatisticsError, match=r"layer-000.*NaN"):
            loaded[0]
        refill(0, 2.0)  # mended
        assert torch.equal(loaded[0].second_moment, 2 * torch.eye(64))

    def test_what_is_in_it_is_told_without_reading(
        self, store: StatisticsStore, model: Any, refill: Refill
    ) -> None:
        loaded = store.load(model, [0])
        refill(0, float("nan"))  # would raise
        assert 0 in loaded
        assert list(loaded.keys()) == [0]

    @pytest.mark.parametrize("layer", [1, 2, LAYERS])
    def test_a_layer_that_was_not_asked_for_is_not_in_it(
        self, store: StatisticsStore, model: Any, layer: int
    ) -> None:
        """Whether the folder has a file of it (2) or not: nothing checked that file."""
        loaded = store.load(model, [0])
        assert layer not in loaded
        assert loaded.get(layer) is None
        with pytest.raises(KeyError):
            loaded[layer]

    def test_headers_are_checked_at_once(
        self, store: StatisticsStore, model: Any
    ) -> None:
        with pytest.raises(StatisticsError, match="no statistics of layer 1"):
            store.load(model, [0, 1])
        with pytest.raises(StatisticsMismatch, match=r"layer-000.*collected on model"):
            store.load(make_model("gpt2", seed=1), [0])
        with pytest.raises(StatisticsMismatch, match=r"layer-002.*with tokenizer"):
            store.load(model, [2], make_tokenizer(bos=True))
        rewrite(store.file(2), d_key=63)
        with pytest.raises(StatisticsMismatch, match="63 dimensions.* takes 64"):
            store.load(model, [0, 2])
        with pytest.raises(StatisticsError, match="expected none, oas or ridge"):
            store.load(model, [0], shrinkage="lasso")
        rewrite(store.file(0), format=f"{FORMAT}0")
        with pytest.raises(StatisticsError, match=r"layer-000.*expected a file of"):
            store.load(model, [0])

    @pytest.mark.parametrize(
        "changes",
        [{"provenance": {"novel": 1}}, {"provenance": None}, {"d_key": None}],
        ids=["unknown field", "no provenance", "no width"],
    )
    def test_a_header_that_cannot_be_used_is_an_error_of_its_file(
        self, store: StatisticsStore, model: Any, changes: dict[str, Any]
    ) -> None:
        """Such as a later version's."""
        source = header_of(store.file(0))["provenance"]
        if changes.get("provenance"):
            changes = {"provenance": source | changes["provenance"]}
        rewrite(store.file(0), **changes)
        with pytest.raises(StatisticsError, match="layer-000"):
            store.load(model, [0])
