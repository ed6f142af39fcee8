"""What a pass measures and watches while it adds: the adequacy report against plain
loops over all keys, and keys that are not finite, wherever they are in the text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from statistics_helpers import LAYERS, MODULE, TEXTS, make_model, make_tokenizer
from torch import Tensor, nn

from covariance_cache import (
    Adequacy,
    CorpusExhausted,
    KeyStatistics,
    NonFiniteActivations,
    StatisticsError,
    StatisticsStore,
    collect,
)
from covariance_cache.checkpoint import Checkpoint
from covariance_cache.corpus import Documents, Window, packed_windows
from covariance_cache.feeder import Feeder, sample_keys
from covariance_cache.layer import LayerSums
from covariance_cache.modules import key_modules

KINDS = ("gpt2", "llama")
TOKENS, WINDOW, BATCH = 1000, 32, 4
ROWS = WINDOW * BATCH


def gather(model: Any, corpus: Any = TEXTS, **settings: Any) -> dict[int, Any]:
    settings = {"tokens": TOKENS, "window": WINDOW, "batch_size": BATCH} | settings
    tokenizer = settings.pop("tokenizer", make_tokenizer(bos=True))
    layers = settings.pop("layers", range(LAYERS))
    return collect(model, tokenizer, corpus, layers, progress=False, **settings)


def report(statistics: KeyStatistics) -> Adequacy:
    assert statistics.adequacy is not None
    return statistics.adequacy


def batches_of(corpus: Any = TEXTS, **changes: Any) -> list[list[Window]]:
    """The windows of a pass in its batches: equal lengths, up to so many."""
    asked = {"tokens": TOKENS, "window": WINDOW, "seed": 0} | changes
    windows = packed_windows(
        asked.get("tokenizer") or make_tokenizer(bos=True),
        Documents(corpus, seed=asked["seed"]),
        length=asked["window"],
        budget=asked["tokens"],
    )
    size, batches = asked.get("batch_size", BATCH), []
    for window in windows:
        last = batches[-1] if batches else []
        if last and len(last) < size and len(last[0].ids) == len(window.ids):
            last.append(window)
        else:
            batches.append([window])
    return batches


def keys_of(model: Any, kind: str, layer: int, batches: Any) -> list[Tensor]:
    """[windows, positions, d_key] of each batch, in float64, from whole forwards."""
    keys: list[Tensor] = []
    handle = model.get_submodule(MODULE[kind].format(layer)).register_forward_pre_hook(
        lambda _, inputs: keys.append(inputs[0].double())
    )
    with handle, torch.no_grad():
        for batch in batches:
            model(input_ids=torch.tensor([window.ids for window in batch]))
    return keys


def moment(keys: Sequence[Tensor]) -> tuple[Tensor, int]:
    rows = torch.cat([each.flatten(0, 1) for each in keys])
    return rows.T @ rows / len(rows), len(rows)


def oas(matrix: Tensor, count: int) -> Tensor:
    """Chen et al. 2010, eq. 23, as they write it."""
    p = len(matrix)
    trace, square = matrix.trace(), (matrix @ matrix).trace()
    rho = ((1 - 2 / p) * square + trace**2) / (
        (count + 1 - 2 / p) * (square - trace**2 / p)
    )
    rho = rho.clamp(max=1)
    return (1 - rho) * matrix + rho * trace / p * torch.eye(p, dtype=matrix.dtype)


def brute_change(keys: list[Tensor], tokens: int, probes: int) -> tuple[float, str]:
    """Median relative change of u = C⁻¹k / (kᵀC⁻¹k) from half the tokens to all."""
    first = keys[0].flatten(0, 1)
    wanted = min(probes, len(first))
    rows = [first[n * len(first) // wanted] for n in range(wanted)]
    used, half = 0, 0
    while 2 * used < tokens:
        used += keys[half].shape[0] * keys[half].shape[1]
        half += 1
    enough = used >= keys[0].shape[-1]
    solved = []
    for part in (keys[:half], keys):
        matrix, count = moment(part)
        inverse = torch.linalg.inv(matrix if enough else oas(matrix, count))
        solved.append([inverse @ k / (k @ inverse @ k) for k in rows])
    changes = sorted(
        float((u - v).norm() / u.norm()) for v, u in zip(*solved, strict=True)
    )
    return changes[(wanted - 1) // 2], "none" if enough else "oas"


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_share_of_first_positions(kind: str, bos: bool) -> None:
    model, tokenizer = make_model(kind), make_tokenizer(bos=bos)
    batches = batches_of(tokenizer=tokenizer)
    assert [len(each) for each in batches] == [BATCH] * 7 + [3, 1]
    for layer, found in gather(model, tokenizer=tokenizer).items():
        keys = keys_of(model, kind, layer, batches)
        first = sum(float(key.square().sum()) for each in keys for key in each[:, 0])
        every = sum(float(each.square().sum()) for each in keys)
        share = report(found).first_position_share
        assert share == pytest.approx(first / every, rel=1e-6)
    # Without a BOS first positions are like others; with one they are one key.
    assert share is not None and 0.3 / WINDOW < share < 3 / WINDOW


@pytest.mark.parametrize(
    ("tokens", "probes"),
    [
        (TOKENS, 32),
        (TOKENS, 5),
        (TOKENS, 1),
        (TOKENS, 10**6),  # every key of the first batch
        (8 * ROWS, 32),  # half the tokens are whole batches
        (8 * ROWS + 1, 32),  # half of them are one more than whole batches
        (8 * ROWS - 1, 32),
        (2 * ROWS, 32),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_change_from_half_the_tokens(kind: str, tokens: int, probes: int) -> None:
    model = make_model(kind).double()
    batches = batches_of(tokens=tokens)
    for layer, found in gather(model, tokens=tokens, probes=probes).items():
        keys = keys_of(model, kind, layer, batches)
        expected, shrinkage = brute_change(keys, tokens, probes)
        assert 0.01 < expected < 2 and shrinkage == "none"
        assert report(found).change == pytest.approx(expected, rel=1e-7)
        assert report(found).change_shrinkage == shrinkage


@pytest.mark.parametrize("kind", KINDS)
def test_with_few_tokens_both_halves_are_shrunk(kind: str) -> None:
    """Fewer than d_key at half the budget: 32 of 40 or 64."""
    settings = {"tokens": 60, "batch_size": 1}
    model, batches = make_model(kind).double(), batches_of(**settings)
    for layer, found in gather(model, **settings).items():
        keys = keys_of(model, kind, layer, batches)
        expected, shrinkage = brute_change(keys, 60, 32)
        assert expected > 0.01 and shrinkage == "oas"
        assert report(found).change == pytest.approx(expected, rel=1e-7)
        assert report(found).change_shrinkage == "oas"
        # With all of them Llama's 40 dimensions are full, GPT-2's 64 are not.
        assert (report(found).condition is None) == (kind == "gpt2")


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_matrix_alone_tells(kind: str) -> None:
    model = make_model(kind).double()
    for layer, found in gather(model, probes=3).items():
        matrix, count = moment(keys_of(model, kind, layer, batches_of()))
        measured, eigenvalues = report(found), torch.linalg.eigvalsh(matrix)
        assert measured.tokens_per_dimension == count / len(matrix)
        rank = float(eigenvalues.sum() ** 2 / eigenvalues.square().sum())
        assert measured.effective_rank == pytest.approx(rank, rel=1e-10)
        exact = float(torch.linalg.cond(matrix, 1))
        assert measured.condition is not None
        assert exact / 3 < measured.condition < exact * (1 + 1e-6)
        # What is found without having been there, but for what only a pass sees.
        later = KeyStatistics(layer, found.second_moment, count, found.provenance)
        assert later.measured() == Adequacy(
            measured.tokens_per_dimension,
            measured.effective_rank,
            measured.condition,
            measured.shrinkage_intensity,
            *(None, None, None),
        )


def test_probes_change_no_bit_and_none_is_no_report() -> None:
    model = make_model("gpt2")
    plain = gather(model, probes=0)
    for probes in (1, 32, 10**6):
        for layer, found in gather(model, probes=probes).items():
            assert torch.equal(found.second_moment, plain[layer].second_moment)
            assert found.count == plain[layer].count
            assert found.provenance == plain[layer].provenance
            assert found.fingerprint() == plain[layer].fingerprint()
            assert found.adequacy is not None
    assert [each.adequacy for each in plain.values()] == [None] * LAYERS
    with pytest.raises(StatisticsError, match="probes must be at least 0, got -1"):
        gather(model, probes=-1)


def test_one_batch_is_both_halves() -> None:
    found = gather(make_model("llama"), batch_size=100, tokens=5 * WINDOW)
    for each in found.values():
        assert report(each).change == 0
        assert report(each).change_shrinkage == "none"


def test_a_text_that_ends_early() -> None:
    model, tokens = make_model("llama"), {}
    everything = 0
    for name, budget in (("before half", 2 * 4003), ("after half", 4500)):
        with pytest.warns(CorpusExhausted):
            found = gather(model, tokens=budget)[1]
        everything, measured = found.count, report(found)
        tokens[name] = measured
        assert budget > everything
        assert measured.tokens_per_dimension == everything / found.d_key
        assert measured.condition is not None
        assert measured.first_position_share is not None
    assert 2 * everything < 2 * 4003 and 2 * everything > 4500
    assert tokens["before half"].change is None
    assert tokens["before half"].change_shrinkage is None
    # The half is the budget's, and the whole is what there was.
    keys = keys_of(model.double(), "llama", 1, batches_of(tokens=10**9))
    expected, _ = brute_change(keys, 4500, 32)
    assert tokens["after half"].change == pytest.approx(expected, rel=1e-2)


ALIKE = ["x" * (WINDOW - 2)] * 60
"""Documents that are, with BOS and end, one window each: all of them the same."""


def test_a_singular_half_is_no_half() -> None:
    assert len({tuple(w.ids) for each in batches_of(ALIKE) for w in each[:4]}) == 2
    for found in gather(make_model("gpt2").double(), ALIKE).values():
        assert found.count >= 10 * found.d_key
        assert report(found).change is None
        assert report(found).change_shrinkage is None
        assert report(found).condition is None
        assert report(found).effective_rank < WINDOW


class Killed(BaseException):
    """What ends a run between two instructions."""


@contextmanager
def dying(model: Any, after: int) -> Iterator[None]:
    """The model dies in the forward after so many; one more finds the widths."""
    left = after + 1

    def die(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    with model.transformer.h[1].register_forward_pre_hook(die), pytest.raises(Killed):
        yield


@pytest.mark.parametrize(
    ("corpus", "settings"),
    [
        (TEXTS, {}),
        (TEXTS, {"tokens": 8 * ROWS}),
        (TEXTS, {"tokens": 100, "batch_size": 1, "window": 12}),  # with oas
        (ALIKE, {}),  # with no solutions
    ],
)
@pytest.mark.parametrize("every", [1, 3])
def test_a_resumed_pass_reports_the_same(
    tmp_path: Path, corpus: list[str], settings: dict[str, Any], every: int
) -> None:
    model = make_model("gpt2")
    expected = gather(model, corpus, **settings)
    assert {report(each).change_shrinkage for each in expected.values()} == (
        {None} if corpus is ALIKE else {"oas" if "window" in settings else "none"}
    )
    count = len(batches_of(corpus, **settings))
    assert count >= 8
    settings |= {"checkpoint_dir": tmp_path, "checkpoint_every": every}
    for after in range(every, count):
        # Every batch before and after the half, and the half itself.
        with dying(model, after):
            gather(model, corpus, **settings)
        assert (tmp_path / Checkpoint.NAME).exists()
        found = gather(model, corpus, **settings)
        for layer, each in expected.items():
            assert found[layer].adequacy == each.adequacy, (after, layer)
            assert torch.equal(found[layer].second_moment, each.second_moment)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("packed", [False, True])
def test_a_report_survives_its_file(tmp_path: Path, packed: bool) -> None:
    store, model = StatisticsStore(tmp_path), make_model("gpt2")
    found = gather(model)
    found[1] = gather(model, probes=0)[1]
    found[2] = gather(model, ALIKE)[2]
    for each in found.values():
        store.save(each, packed=packed)
    assert [store.open(layer).adequacy for layer in found] == [
        each.adequacy for each in found.values()
    ]
    assert report(found[0]).change is not None and found[1].adequacy is None
    assert report(found[2]).change is None


LETTER = make_tokenizer()("Q")["input_ids"][0]


@contextmanager
def spoilt(
    model: Any, layer: int, value: float = torch.nan, times: int = 10**9
) -> Iterator[None]:
    """One number of a layer's key is this one, wherever a letter is in the text."""
    ids: list[Tensor] = []

    def spoil(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        nonlocal times
        here = ids[-1] == LETTER
        if not bool(here.any()) or not times:
            return output
        times -= 1
        bad = output.index_fill(2, torch.tensor([5]), value)
        return bad.where(here[..., None], output)

    watch = model.transformer.wte.register_forward_pre_hook(
        lambda _, inputs: ids.append(inputs[0])
    )
    with watch, model.transformer.h[layer].mlp.act.register_forward_hook(spoil):
        yield


def with_letter(batch: int, **settings: Any) -> tuple[list[str], Window]:
    """The texts with a letter in this batch of them, and the window that it is in. Read
    in their own order, a token for each character and one for a text's end."""
    texts = [*TEXTS]
    windows = batches_of(texts, seed=None, **settings)[batch]
    ends = [each.end for each in windows if each.end.token > 3]
    end = ends[batch % len(ends)]  # not the same row in every batch
    document, at = end.opened - 1, end.token - 4
    texts[document] = f"{texts[document][:at]}Q{texts[document][at + 1 :]}"
    batches = batches_of(texts, seed=None, **settings)
    found = [
        (number, each)
        for number, windows in enumerate(batches)
        for each in windows
        if LETTER in each.ids
    ]
    assert [number for number, _ in found] == [batch]
    return texts, found[0][1]


def message_of(layer: int, window: Window) -> str:
    """What shall be said of a key at the letter."""
    return (
        f"layer {layer} (transformer.h.{layer}.mlp.c_proj): the first key that is not "
        f"finite is at token {window.ids.index(LETTER)} of the window of "
        f"{len(window.ids)} that ends {window.end.token} tokens into document "
        f"{window.end.opened - 1} of the text; check the model's weights, or load it "
        "in a wider dtype"
    )


BATCHES = 9
"""Of a pass: seven full ones, one of three windows, one of the short last window."""


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_bad_key_is_found_in_every_batch(layer: int) -> None:
    """The first, each in the middle, the last; though a batch's keys are looked at
    after the next batch was run."""
    model = make_model("gpt2")
    assert len(batches_of(seed=None)) == BATCHES
    for batch in range(BATCHES):
        texts, window = with_letter(batch)
        with spoilt(model, layer), pytest.raises(NonFiniteActivations) as caught:
            gather(model, texts, seed=None)
        assert str(caught.value) == message_of(layer, window), batch
        # Without what spoils it the text is as good as any.
        assert gather(model, texts, seed=None, layers=[layer])[layer].count == TOKENS


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_whatever_is_not_finite(value: float) -> None:
    model = make_model("gpt2")
    texts, window = with_letter(2)
    with spoilt(model, 1, value), pytest.raises(NonFiniteActivations) as caught:
        gather(model, texts, seed=None, layers=[1])
    assert str(caught.value) == message_of(1, window)
    # A large number is a number.
    with spoilt(model, 1, 1e18):
        found = gather(model, texts, seed=None, layers=[1])[1]
    assert float(found.second_moment[5, 5]) == pytest.approx(1e36 / TOKENS, rel=1e-5)


@pytest.mark.parametrize(
    "settings", [{"tokens": 20}, {"tokens": 100}, {"batch_size": 1, "tokens": 30}]
)
def test_a_text_of_one_batch(settings: dict[str, int]) -> None:
    model = make_model("gpt2")
    texts, window = with_letter(0, **settings)
    with spoilt(model, 0), pytest.raises(NonFiniteActivations) as caught:
        gather(model, texts, seed=None, **settings)
    assert str(caught.value) == message_of(0, window)


def test_the_first_of_two_bad_batches_is_named() -> None:
    model = make_model("gpt2")
    (texts, window), (later, _) = with_letter(3), with_letter(4)
    both = [a if "Q" in a else b for a, b in zip(texts, later, strict=True)]
    assert sum("Q" in text for text in both) == 2
    with spoilt(model, 1), pytest.raises(NonFiniteActivations) as caught:
        gather(model, both, seed=None)
    assert str(caught.value) == message_of(1, window)


def test_a_bad_key_that_does_not_come_back_is_told() -> None:
    """As on a device whose results differ from run to run: the place is unknown, the
    sums are spoilt all the same."""
    model = make_model("gpt2")
    for batch in (0, 4, BATCHES - 1):
        texts, _ = with_letter(batch)
        last = batches_of(texts, seed=None)[batch][-1].end.opened - 1
        with spoilt(model, 1, times=1), pytest.raises(NonFiniteActivations) as caught:
            gather(model, texts, seed=None)
        assert f"document {last} of the text was not finite" in str(caught.value)
        assert "not reproducible" in str(caught.value)


def test_no_checkpoint_holds_a_bad_batch(tmp_path: Path) -> None:
    """What is kept is what was good, and can be gone on from."""
    model = make_model("gpt2")
    for batch in range(BATCHES):
        texts, window = with_letter(batch)
        batches = batches_of(texts, seed=None)
        expected = gather(model, texts, seed=None)
        for every in (1, 3):
            settings = {"checkpoint_dir": tmp_path, "checkpoint_every": every}
            with spoilt(model, 1), pytest.raises(NonFiniteActivations) as caught:
                gather(model, texts, seed=None, **settings)
            assert str(caught.value) == message_of(1, window)
            kept = batch // every * every
            names = [each.name for each in tmp_path.iterdir()]
            assert names == [Checkpoint.NAME] * (kept > 0)
            if kept:
                with safe_open(str(tmp_path / Checkpoint.NAME), "pt") as file:
                    header = json.loads(file.metadata()["covariance_cache"])
                    tensors = {name: file.get_tensor(name) for name in file.keys()}
                assert header["cursor"]["used"] == batches[kept - 1][-1].end.used
                assert all(
                    bool(torch.isfinite(each).all()) for each in tensors.values()
                )
            found = gather(model, texts, seed=None, **settings)
            for layer, each in expected.items():
                assert torch.equal(found[layer].second_moment, each.second_moment)
                assert found[layer].adequacy == each.adequacy
            assert not list(tmp_path.iterdir())


def fed(model: Any, texts: list[str]) -> tuple[Feeder, list[list[Window]]]:
    names = key_modules(model, [0, 1])
    with torch.no_grad():
        sums = {n: LayerSums(key, 0) for n, key in sample_keys(model, names).items()}
    feeder = Feeder(model, names, sums, Documents(texts, seed=None))
    return feeder, batches_of(texts, seed=None)


@torch.no_grad()
def test_a_batch_is_looked_at_by_the_next_one_or_at_the_end() -> None:
    model = make_model("gpt2")
    texts, window = with_letter(1)
    with spoilt(model, 1):
        for end in ("next", "end"):
            feeder, batches = fed(model, texts)
            feeder.feed(batches[0])
            feeder.feed(batches[1])
            with pytest.raises(NonFiniteActivations) as caught:
                feeder.feed(batches[2]) if end == "next" else feeder.settle()
            assert str(caught.value) == message_of(1, window)
        feeder, batches = fed(model, texts)
        for batch in (batches[0], batches[2]):
            feeder.feed(batch)
        feeder.settle()
        feeder.settle()


@pytest.mark.parametrize("probes", [0, 32])
def test_squares_that_overflow_are_their_layers_error(probes: int) -> None:
    """The keys are finite, their products in float32 are not."""
    model = make_model("gpt2")
    texts, _ = with_letter(0)
    with spoilt(model, 1, 1e25), pytest.raises(NonFiniteActivations) as caught:
        gather(model, texts, seed=None, layers=[0, 1], probes=probes)
    assert "layer 1 (transformer.h.1.mlp.c_proj): " in str(caught.value)
    assert "overflow torch.float32" in str(caught.value)
