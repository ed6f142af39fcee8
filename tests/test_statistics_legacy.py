"""Published `.npz` statistics: read against brute force, refused where they are not
what they must be. The files are written here, as the published code writes them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from statistics_helpers import (
    MODULE,
    TEXTS,
    make_model,
    make_tokenizer,
    random_keys,
)

from covariance_cache import (
    CaptureError,
    StatisticsError,
    StatisticsMismatch,
    StatisticsStore,
    collect,
    model_fingerprint,
    tokenizer_fingerprint,
)
from covariance_cache.corpus import Documents, packed_windows
from covariance_cache.legacy import Published, import_npz, read_npz

FILE = "transformer.h.1.mlp.c_proj_float32_mom2_100000.npz"
D_KEY, COUNT = 64, 200  # of make_model("gpt2")

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file in the published layout, single keys replaced or, by None, left
    out; the keys' sum is what a plain loop over tokens makes."""

    def write(
        name: str = FILE,
        changes: dict[str, Any] | None = None,
        save: Callable[..., None] = np.savez,
        d_key: int = D_KEY,
        text: str = "wikipedia",
    ) -> Path:
        keys = random_keys(COUNT, d_key).numpy()
        content: dict[str, Any] = {
            "mom2.constructor": "util.runningstats.SecondMoment()",
            "mom2.count": COUNT,
            "mom2.mom2": sum(np.outer(key, key) for key in keys),
            "sample_size": 100000,
        } | (changes or {})
        path = tmp_path / "stats" / "gpt2-xl" / f"{text}_stats" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, **{k: v for k, v in content.items() if v is not None})
        return path

    return write


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("gpt2")


def mean_of_keys(d_key: int = D_KEY) -> torch.Tensor:
    keys = random_keys(COUNT, d_key).double()
    return keys.T @ keys / COUNT


def refusal(path: Path, *parts: str, read: Callable[..., Any] = read_npz) -> str:
    """The message, which names the file and holds these parts."""
    with pytest.raises(StatisticsError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    for part in parts:
        assert part in message
    return message


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_sum_is_divided_by_the_count_once(write: Write, save: Any) -> None:
    path = write(save=save)
    found = read_npz(str(path))
    assert found.second_moment.dtype == torch.float32
    torch.testing.assert_close(
        found.second_moment.double(), mean_of_keys(), rtol=1e-5, atol=1e-6
    )
    assert (found.count, found.module, found.layer, found.corpus) == (
        COUNT,
        "transformer.h.1.mlp.c_proj",
        1,
        "wikipedia",
    )
    assert found.digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_in_float64_stays_so(write: Write) -> None:
    keys = random_keys(COUNT, 5).double().numpy()
    found = read_npz(write(changes={"mom2.mom2": keys.T @ keys}))
    assert found.second_moment.dtype == torch.float64
    torch.testing.assert_close(found.second_moment, mean_of_keys(5))


def test_the_matrix_is_left_as_published(write: Write, model: Any) -> None:
    """Rounding that makes a published sum slightly asymmetric is kept."""
    matrix = np.eye(D_KEY, dtype=np.float32)
    matrix[0, 1] = 1e-6
    path = write(changes={"mom2.mom2": matrix, "mom2.count": 1})
    second_moment = import_npz(path, model).second_moment
    assert second_moment.dtype == torch.float32
    assert torch.equal(second_moment, torch.from_numpy(matrix))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_equals_what_collect_makes_of_the_same_text(
    kind: str, write: Write, tmp_path: Path
) -> None:
    model, tokenizer, layer = make_model(kind), make_tokenizer(bos=True), 2
    name = MODULE[kind].format(layer)
    total, count = torch.zeros(()), 0

    def add(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal total, count
        keys = args[0].flatten(0, 1)
        total, count = total + keys.T @ keys, count + len(keys)

    handle = model.get_submodule(name).register_forward_pre_hook(add)
    documents = Documents(TEXTS, seed=0)
    with torch.no_grad():
        for each in packed_windows(tokenizer, documents, length=32, budget=1000):
            model(torch.tensor([each.ids]))
    handle.remove()
    path = write(
        f"{name}_float32_mom2_100000.npz",
        {"mom2.mom2": total.numpy(), "mom2.count": count},
    )

    imported = import_npz(path, model, tokenizer=tokenizer)
    collected = collect(
        model, tokenizer, TEXTS, [layer], tokens=1000, window=32, progress=False
    )[layer]
    assert (imported.layer, imported.count) == (layer, collected.count) == (2, 1000)
    difference = (imported.second_moment - collected.second_moment).abs().max()
    assert difference <= 1e-5 * collected.second_moment.abs().max()

    store = StatisticsStore(tmp_path / "store")
    store.save(imported)
    loaded = store.load(model, [layer], tokenizer)[layer]
    assert loaded.fingerprint() == imported.fingerprint()
    with pytest.raises(StatisticsMismatch, match="was collected on model"):
        store.load(make_model(kind, seed=1), [layer])


def test_provenance_says_what_is_known_and_whose_word_it_is(
    write: Write, model: Any
) -> None:
    path, tokenizer = write(), make_tokenizer()
    source = import_npz(path, model).provenance
    assert source.model_fingerprint == model_fingerprint(model)
    assert source.module == "transformer.h.1.mlp.c_proj"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert source.origin is not None
    assert source.origin.startswith(f"imported from {FILE}, SHA-256 {digest}")
    assert "claim" in source.origin
    unknown = ("tokenizer_fingerprint", "corpus_fingerprint", "window", "seed")
    assert {getattr(source, each) for each in (*unknown, "model_dtype")} == {None}
    named = import_npz(path, model, tokenizer=tokenizer).provenance
    assert named.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)


@pytest.mark.parametrize(
    ("name", "module", "layer"),
    [
        (
            "model.layers.31.mlp.down_proj_float32_mom2_100000.npz",
            "model.layers.31.mlp.down_proj",
            31,
        ),
        # The published code lacks the f of an f-string, so its files say this.
        (
            "transformer.h.5.mlp.fc_out_float64_mom2_t{batch_tokens}_9.npz",
            "transformer.h.5.mlp.fc_out",
            5,
        ),
        ("a.0.c_float16_mean-mom2-norm_mean_t512.npz", "a.0.c", 0),
        ("a.2.b.7.c_float32_mom2.npz", "a.2.b.7.c", 2),
        ("down_proj_float32_mom2_1.npz", "down_proj", None),
        ("layer-17.npz", None, None),
        ("a.1.c_float32_mean_1.npz", None, None),
    ],
)
def test_the_name_of_the_file_says_module_and_layer(
    name: str, module: str | None, layer: int | None, write: Write
) -> None:
    found = read_npz(write(name))
    assert (found.module, found.layer) == (module, layer)


def test_the_corpus_is_the_name_of_the_folder(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(text="wikitext")
    monkeypatch.chdir(path.parent)
    assert read_npz(path.name).corpus == "wikitext"
    os.rename(path, path.parents[1] / path.name)
    assert read_npz(path.parents[1] / path.name).corpus is None


def test_other_content_of_the_archive_does_not_matter(write: Write) -> None:
    """Pickled objects among it included: they are not opened."""
    odd = np.array([print, None], dtype=object)
    changes = {"mom2.constructor": odd, "sample_size": None, "mean.mean": np.ones(3)}
    assert read_npz(write(changes=changes)).count == COUNT


class Bomb:
    """Unpickling it leaves a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("key", ["mom2.mom2", "mom2.count"])
def test_pickled_objects_are_refused_unopened(
    key: str, write: Write, tmp_path: Path
) -> None:
    trace = tmp_path / "unpickled"
    path = write(changes={key: np.array(Bomb(trace), dtype=object)})
    refusal(path, "Object arrays cannot be loaded", "plain numbers")
    assert not trace.exists()
    with np.load(path, allow_pickle=True) as archive:
        archive[key]
    assert trace.exists()  # the file is the danger that it is meant to be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mom2.mom2": None}, "only ['mom2.constructor', 'mom2.count', 'sample_size']"),
        ({"mom2.count": None}, "only ['mom2.constructor', 'mom2.mom2', 'sample_size']"),
        ({"mom2.count": 0}, "array(0), not a number of tokens above 0"),
        ({"mom2.count": -3}, "array(-3), not a number"),
        ({"mom2.count": 2.5}, "array(2.5), not a number"),
        ({"mom2.count": float("nan")}, "array(nan), not a number"),
        ({"mom2.count": True}, "array(True), not a number"),
        ({"mom2.count": [3, 4]}, "array([3, 4]), not a number"),
        ({"mom2.mom2": np.ones((2, 3), np.float32)}, "[2, 3] of float32, not [d_key"),
        ({"mom2.mom2": np.ones(4, np.float32)}, "[4] of float32, not [d_key"),
        ({"mom2.mom2": np.ones((0, 0), np.float32)}, "[0, 0] of float32"),
        ({"mom2.mom2": np.ones((2, 2), np.float16)}, "[2, 2] of float16"),
        ({"mom2.mom2": np.ones((2, 2), ">f4")}, "[2, 2] of >f4"),
        ({"mom2.mom2": np.ones((2, 2), int)}, "[2, 2] of int64"),
    ],
)
def test_what_is_no_sum_and_count_is_refused(
    changes: dict[str, Any], message: str, write: Write
) -> None:
    refusal(write(changes=changes), message, "mom2.mom2", "get the file again")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((3, 3), np.nan, "NaN or infinity"),
        ((3, 3), np.inf, "NaN or infinity"),
        ((3, 4), 50.0, "not symmetric"),
        ((3, 3), -1.0, "negative diagonal"),
    ],
)
def test_what_is_no_second_moment_is_refused(
    place: tuple[int, int], value: float, message: str, write: Write, model: Any
) -> None:
    matrix = np.eye(D_KEY, dtype=np.float32)
    matrix[place] = value
    path = write(changes={"mom2.mom2": matrix})
    refusal(path, message, "again", read=lambda each: import_npz(each, model))


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    refusal(tmp_path / "nowhere.npz", "FileNotFoundError")
    refusal(tmp_path, "expected an .npz archive")
    for name, content in (("empty.npz", b""), ("page.npz", b"<html>404</html>")):
        (tmp_path / name).write_bytes(content)
        refusal(tmp_path / name, "no zip archive", "get the file again")
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, np.eye(3))
    refusal(tmp_path / "array.npz", "no zip archive")
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("mom2.mom2", "text")
        archive.writestr("mom2.count", "3")
    refusal(tmp_path / "text.npz", "mom2.count is array(b'3'")


def test_projections_are_refused_by_their_suffix(tmp_path: Path) -> None:
    path = tmp_path / "null_space_project.pt"
    torch.save(torch.eye(3), path)
    refusal(path, "projection", "recomputed from C")
    path = path.rename(path.with_suffix(".npz"))
    refusal(path, "it has only", "mom2.mom2")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_no_damage_is_taken_for_data(write: Write, save: Any) -> None:
    """A cut, or a changed byte, anywhere, is refused or of no effect."""
    path = write(save=save, d_key=3)
    whole, content = read_npz(path), path.read_bytes()
    for length in range(0, len(content), 11):
        path.write_bytes(content[:length])
        refusal(path, "end is missing")
    harmless = 0
    for place in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[place] ^= 0x41
        path.write_bytes(damaged)
        try:
            found = read_npz(path)
        except StatisticsError:
            continue
        harmless += 1
        assert torch.equal(found.second_moment, whole.second_moment)
        assert found.count == whole.count
    assert harmless < len(content) // 3


def test_a_module_that_the_model_lacks_is_refused(write: Write, model: Any) -> None:
    path = write("transformer.h.9.mlp.c_proj_float32_mom2_9.npz")
    with pytest.raises(CaptureError, match=r"h\.9\..*no module.*near it.*pass module="):
        import_npz(path, model)
    with pytest.raises(CaptureError, match=r"no module 'transformer\.h\.1\.c_proj'"):
        import_npz(write(), model, module="transformer.h.1.c_proj")


def test_a_module_given_wins_over_the_name(write: Write, model: Any) -> None:
    name = "transformer.h.1.mlp.c_proj"
    for file in ("model.layers.1.mlp.down_proj_float32_mom2_9.npz", "layer.npz"):
        statistics = import_npz(write(file), model, module=name)
        assert (statistics.layer, statistics.provenance.module) == (1, name)


def test_what_no_name_says_must_be_given(write: Write, model: Any) -> None:
    with pytest.raises(StatisticsError, match="layer.npz: .*pass module="):
        import_npz(write("layer.npz"), model)
    alone = torch.nn.ModuleDict({"down_proj": torch.nn.Linear(D_KEY, 2)})
    path = write("down_proj_float32_mom2_9.npz")
    with pytest.raises(StatisticsError, match="names no layer; pass layer="):
        import_npz(path, alone)
    assert import_npz(path, alone, layer=4).layer == 4


def test_names_that_contradict_each_other_are_refused(write: Write, model: Any) -> None:
    path, second = write(), "transformer.h.2.mlp.c_proj"
    with pytest.raises(StatisticsMismatch, match="the file says 1.*layer= says 0"):
        import_npz(path, model, layer=0)
    with pytest.raises(StatisticsMismatch, match=r"file says 1, .*h\.2\.\S+ says 2"):
        import_npz(path, model, module=second)
    with pytest.raises(StatisticsMismatch, match=r"h\.2\.\S+ says 2, layer= says 1"):
        import_npz(path, model, module=second, layer=1)
    assert import_npz(path, model, layer=1).layer == 1


def test_keys_of_another_width_are_refused(write: Write, model: Any) -> None:
    with pytest.raises(StatisticsMismatch) as caught:
        import_npz(write(d_key=48), model)
    assert "keys of width 48, transformer.h.1.mlp.c_proj" in str(caught.value)
    assert "GPT2LMHeadModel takes 64" in str(caught.value)


def test_published_is_frozen(write: Write) -> None:
    found = read_npz(write())
    assert isinstance(found, Published)
    with pytest.raises(AttributeError):
        found.count = 3  # type: ignore[misc]


MEASURE = """
import re, sys
from pathlib import Path
from covariance_cache.legacy import read_npz

def memory(what):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(what + r":\\s+(\\d+)", status)[1])

read_npz(sys.argv[2])
before = memory("VmRSS")
found = read_npz(sys.argv[1])
print((memory("VmHWM") - before) / found.second_moment.nbytes)
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(),
    reason="reads peak memory where Linux has it",
)
def test_one_matrix_of_this_size_is_enough_memory(write: Write) -> None:
    small = write("small.npz")
    matrix = np.zeros((5000, 5000), np.float32)
    np.fill_diagonal(matrix, 1)
    path = write(changes={"mom2.mom2": matrix}, d_key=1)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), str(small)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[1],
    )
    assert 0.9 < float(run.stdout) < 1.4
