import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from statistics_helpers import TEXTS, make_model, make_tokenizer, random_keys

from covariance_cache import (
    KeyStatistics,
    Provenance,
    StatisticsError,
    StatisticsMismatch,
    StatisticsStore,
    collect,
)


def made(d_key=6, layer=7, **changes):
    keys = random_keys(50, d_key)
    source = Provenance(model_fingerprint="f" * 64, module="h.7.mlp.c_proj", seed=3)
    return KeyStatistics(
        **{
            "layer": layer,
            "second_moment": (keys.T @ keys / 50).contiguous(),
            "count": 50,
            "provenance": source,
        }
        | changes
    )


def gather(model, tokenizer, layers=(0, 2)):
    settings = {"tokens": 300, "window": 32, "progress": False}
    return collect(model, tokenizer, TEXTS, layers, **settings)


def test_what_was_saved_is_read_back(tmp_path):
    store, statistics = StatisticsStore(tmp_path / "new" / "folder"), made()
    path = store.save(statistics)
    assert path.name == "layer-007.safetensors"
    found = StatisticsStore(str(store.path)).open(7)
    assert torch.equal(found.second_moment, statistics.second_moment)
    assert (found.layer, found.count, found.d_key) == (7, 50, 6)
    assert found.provenance == statistics.provenance
    assert found.fingerprint() == statistics.fingerprint()
    assert store.layers() == [7]
    assert store.header(7)["count"] == 50
    assert os.listdir(store.path) == [path.name]


def test_layers_of_any_number_are_listed_in_order(tmp_path):
    store = StatisticsStore(tmp_path)
    for layer in (1000, 2, 11):
        store.save(made(layer=layer))
    (tmp_path / "collection.safetensors").write_bytes(b"")
    assert store.layers() == [2, 11, 1000]
    assert store.open(1000).layer == 1000


def test_the_same_content_gives_the_same_bytes(tmp_path):
    model, tokenizer = make_model("llama"), make_tokenizer(bos=True)
    contents = []
    for name in ("a", "b"):
        store = StatisticsStore(tmp_path / name)
        for statistics in gather(model, tokenizer).values():
            store.save(statistics)
        contents.append([store.file(layer).read_bytes() for layer in (0, 2)])
    assert contents[0] == contents[1]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    store = StatisticsStore(tmp_path)
    before = store.save(made()).read_bytes()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        store.save(made(count=51))
    assert store.file(7).read_bytes() == before
    assert os.listdir(tmp_path) == ["layer-007.safetensors"]


@pytest.fixture
def stored(tmp_path):
    model, tokenizer = make_model("gpt2"), make_tokenizer()
    store = StatisticsStore(tmp_path)
    for statistics in gather(model, tokenizer).values():
        store.save(statistics)
    return store, model, tokenizer


def test_loads_for_the_model_it_was_collected_on(stored):
    store, model, tokenizer = stored
    loaded = store.load(model, [2, 0], tokenizer)
    assert list(loaded) == [2, 0]
    expected = gather(model, tokenizer)
    assert all(
        torch.equal(loaded[layer].second_moment, expected[layer].second_moment)
        for layer in loaded
    )


def test_refuses_another_model_and_names_both(stored):
    store, model, _ = stored
    ours = store.header(0)["provenance"]["model_fingerprint"][:12]
    with pytest.raises(
        StatisticsMismatch, match=rf"model {ours}, this model is [0-9a-f]{{12}};"
    ):
        store.load(make_model("gpt2", seed=1), [0])
    with pytest.raises(StatisticsMismatch, match=f"layer-000.*{ours}"):
        store.load(make_model("llama"), [0])
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight.mul_(2)
    with pytest.raises(StatisticsMismatch, match=f"{ours}.*this model is"):
        store.load(model, [0])


def test_refuses_another_tokenizer_and_names_both(stored):
    store, model, _ = stored
    with pytest.raises(StatisticsMismatch, match=r"with tokenizer \w{12}, this \w+ is"):
        store.load(model, [0], make_tokenizer(bos=True))


def test_refuses_another_width_even_of_the_same_model(stored):
    store, model, _ = stored
    narrow = dataclasses.replace(store.open(0), second_moment=torch.eye(8))
    store.save(narrow)
    with pytest.raises(StatisticsMismatch, match="keys of 8 dimensions.* takes 64"):
        store.load(model, [0])


def test_missing_layers_and_folders_are_named(stored, tmp_path):
    store, model, _ = stored
    with pytest.raises(StatisticsError, match=r"no statistics of layer 1 .*\[0, 2\]"):
        store.load(model, [0, 1])
    with pytest.raises(StatisticsError, match="nowhere: no such folder"):
        StatisticsStore(tmp_path / "nowhere").open(0)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    store = StatisticsStore(tmp_path)
    path = store.save(made())
    path.rename(store.file(8))
    with pytest.raises(StatisticsError, match="layer-008.*holds layer 7"):
        store.open(8)
    store.save(made())
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StatisticsError, match="layer-007.*cannot be read"):
        store.open(7)
    save_file({"second_moment": torch.eye(2)}, path)
    with pytest.raises(StatisticsError, match="expected a file of format"):
        store.open(7)
    store.save(made())
    with safe_open(str(path), "pt") as file:
        header = file.metadata()
    lopsided = torch.eye(6)
    lopsided[0, 1] = 1
    save_file({"second_moment": lopsided}, path, metadata=header)
    with pytest.raises(StatisticsError, match="layer-007.*not symmetric"):
        store.open(7)
    header["covariance_cache"] = json.dumps(
        {key: value for key, value in json.loads(header["covariance_cache"]).items()}
        | {"provenance": {"novel": 1}}
    )
    save_file({"second_moment": torch.eye(6)}, path, metadata=header)
    with pytest.raises(StatisticsError, match="layer-007.*novel"):
        store.open(7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"second_moment": torch.ones(2, 3)}, r"must be \[d_key, d_key\]"),
        ({"second_moment": torch.ones(2)}, r"must be \[d_key, d_key\]"),
        ({"second_moment": torch.eye(2).half()}, "float16"),
        ({"second_moment": torch.tensor([[1.0, 0.0], [0.5, 1.0]])}, "not symmetric"),
        ({"second_moment": torch.full((2, 2), torch.nan)}, "NaN"),
        ({"second_moment": -torch.eye(2)}, "negative diagonal"),
        ({"count": 0}, "at least one key"),
    ],
)
def test_what_is_no_mean_second_moment_is_refused(changes, message):
    with pytest.raises(StatisticsError, match=f"layer 7.*{message}"):
        made(**changes)


def test_the_fingerprint_covers_all_it_holds():
    base = made()
    source = dataclasses.replace(base.provenance, seed=4)
    matrix = base.second_moment.clone()
    matrix[0, 0] += 1e-6
    variants = [
        base,
        made(count=51),
        made(layer=8),
        made(provenance=source),
        made(second_moment=matrix),
    ]
    assert len({each.fingerprint() for each in variants}) == len(variants)
    assert made().fingerprint() == base.fingerprint()


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        made().count = 3


def test_importing_the_package_is_light():
    code = (
        "import sys, covariance_cache; "
        "print([m for m in ('transformers', 'typer', 'rich') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
