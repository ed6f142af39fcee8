"""Merging parts against the mean over all their keys, from the tensors up to the
command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from statistics_helpers import TEXTS, make_model, make_tokenizer, random_keys
from torch import Tensor
from typer.testing import CliRunner

from covariance_cache import (
    KeyStatistics,
    Provenance,
    SecondMomentAccumulator,
    StatisticsError,
    StatisticsMismatch,
    StatisticsStore,
    collect,
    merge,
)
from covariance_cache.__main__ import app
from covariance_cache.adequacy import measure
from covariance_cache.corpus import Documents, packed_windows

SOURCE = Provenance(
    model_fingerprint="f" * 64,
    module="h.7.mlp.c_proj",
    tokenizer_fingerprint="e" * 64,
    window=32,
    seed=0,
    model_dtype="float32",
)


def text_name(number: int) -> str:
    return f"{number:064x}"


def part(
    number: int,
    count: int = 50,
    d_key: int = 6,
    dtype: torch.dtype = torch.float32,
    **source: Any,
) -> KeyStatistics:
    """Statistics of a text of its own; `keys_of` has the keys."""
    keys = keys_of(number, count, d_key).to(dtype)
    accumulator = SecondMomentAccumulator(d_key, dtype)
    accumulator.update(keys)
    moment, found = accumulator.freeze()
    source = {"corpus_fingerprint": text_name(number), **source}
    return KeyStatistics(
        7, moment, found, replace(SOURCE, **source), measure(moment, found)
    )


def keys_of(number: int, count: int = 50, d_key: int = 6) -> Tensor:
    return random_keys(count, d_key, seed=number) * (1 + number)


def error_of(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.norm())


class TestMean:
    # 1,100 rows are more than are added at a time.
    @pytest.mark.parametrize("d_key", [1, 6, 1100])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_is_over_all_keys(self, d_key: int, dtype: torch.dtype) -> None:
        counts = (50, 7, 1)
        parts = [part(n, c, d_key, dtype) for n, c in enumerate(counts)]
        merged = merge(parts)
        keys = torch.cat([keys_of(n, c, d_key) for n, c in enumerate(counts)]).double()
        tolerance = 1e-6 if dtype == torch.float32 else 1e-14
        assert merged.count == 58 and merged.layer == 7
        assert merged.second_moment.dtype == dtype
        assert error_of(merged.second_moment, keys.T @ keys / 58) < tolerance
        accumulator = SecondMomentAccumulator(d_key, dtype)
        accumulator.update(keys.to(dtype))
        assert error_of(merged.second_moment, accumulator.freeze()[0]) < tolerance
        assert torch.equal(merged.second_moment, merged.second_moment.T)

    def test_parts_weigh_what_they_count(self) -> None:
        """And their sums are formed in float64: a long part hides no short one."""
        one = replace(part(0), second_moment=torch.eye(6), count=10**9)
        two = replace(part(1), second_moment=3 * torch.eye(6), count=10**7)
        found = merge([one, two]).second_moment.double()
        expected = (10**9 + 3 * 10**7) / (10**9 + 10**7) * torch.eye(6).double()
        assert error_of(found, expected) < 1e-7

    def test_parts_are_left_alone(self) -> None:
        parts = [part(0), part(1)]
        kept = [each.second_moment.clone() for each in parts]
        merged = merge(parts)
        merged.second_moment.zero_()
        for each, before in zip(parts, kept, strict=True):
            assert torch.equal(each.second_moment, before)

    def test_in_any_grouping(self) -> None:
        """Up to rounding; what was read is told the same way."""
        a, b, c, d = (part(n, 20 + 30 * n) for n in range(4))
        flat = merge([a, b, c, d])
        for nested in (
            merge([merge([a, b]), merge([c, d])]),
            merge([merge([merge([a, b]), c]), d]),
            merge([a, merge([b, merge([c, d])])]),
        ):
            assert nested.count == flat.count == 260
            assert error_of(nested.second_moment, flat.second_moment) < 1e-6
            assert nested.provenance == flat.provenance
        assert flat.provenance.parts == tuple(text_name(n) for n in range(4))
        other = merge([d, c, b, a])
        assert error_of(other.second_moment, flat.second_moment) < 1e-6
        assert set(other.provenance.parts) == set(flat.provenance.parts)


class TestProvenance:
    def test_is_what_the_parts_share(self) -> None:
        merged = merge([part(0), part(1)])
        assert merged.provenance == replace(
            SOURCE,
            corpus_fingerprint=merged.provenance.corpus_fingerprint,
            parts=(text_name(0), text_name(1)),
        )
        texts = [merge([part(0), part(n)]).provenance for n in (1, 2)]
        prints = {each.corpus_fingerprint for each in texts}
        assert len(prints) == 2 and not prints & {text_name(n) for n in range(3)}

    def test_a_seed_is_kept_where_it_is_one(self) -> None:
        assert merge([part(0, seed=4), part(1, seed=4)]).provenance.seed == 4
        assert merge([part(0, seed=4), part(1, seed=5)]).provenance.seed is None

    def test_what_only_a_pass_measures_is_dropped(self) -> None:
        first = part(0)
        assert first.adequacy is not None
        merged = merge([first, part(1)])
        assert merged.adequacy is None
        assert merged.measured().tokens_per_dimension == 100 / 6

    def test_imported_parts_are_all_told(self) -> None:
        """Their texts have no fingerprint; each file's origin stands for its text."""
        origins = [f"imported from {name}.npz, SHA-256 {name * 64}" for name in "ab"]
        parts = [
            part(n, corpus_fingerprint=None, origin=origin)
            for n, origin in enumerate(origins)
        ]
        source = merge(parts).provenance
        assert source.parts == tuple(origins)
        # It is from both files, so it is not said to be from the first alone.
        assert source.origin is None or all(each in source.origin for each in origins)
        with pytest.raises(StatisticsMismatch, match="two of the parts"):
            merge([parts[0], parts[0]])

    def test_an_accepted_mismatch_is_not_forgotten(self) -> None:
        """Statistics that have one are merged with it, or not at all."""
        accepted = replace(part(1), accepted_mismatch="was collected on another model")
        told = ""
        try:
            told = merge([part(0), accepted]).accepted_mismatch or ""
        except StatisticsError as error:
            told = str(error)
        assert "was collected on another model" in told


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "other", "values"),
        [
            ("model_fingerprint", part(1, model_fingerprint="a" * 64), ("f", "a")),
            ("module", part(1, module="h.7.mlp.c_fc"), ("c_proj", "c_fc")),
            ("tokenizer_fingerprint", part(1, tokenizer_fingerprint=None), "eN"),
            ("window", part(1, window=64), ("32", "64")),
            ("model_dtype", part(1, model_dtype="bfloat16"), ("float32", "bfloat16")),
            ("layer", replace(part(1), layer=8), ("7", "8")),
            ("d_key", part(1, d_key=5), ("6", "5")),
            ("dtype", part(1, dtype=torch.float64), ("float32", "float64")),
        ],
    )
    def test_parts_of_different_things_name_both_sides(
        self, name: str, other: KeyStatistics, values: Any
    ) -> None:
        ours, theirs = values
        match = rf"part 2 has {name} .*{theirs}.*part 1 has .*{ours}"
        with pytest.raises(StatisticsMismatch, match=match):
            merge([part(0), other])
        with pytest.raises(StatisticsMismatch, match=f"part 3 has {name} "):
            merge([part(0), part(2), other])

    def test_a_text_counts_once(self) -> None:
        a, b, c = (part(n) for n in range(3))
        again = replace(part(5), provenance=a.provenance)  # as of another folder
        twice = [[a, a], [a, b, again], [merge([a, b]), a], [c, merge([b, a]), again]]
        for parts in [*twice, [merge([a, b]), merge([a, c])]]:
            with pytest.raises(StatisticsMismatch, match=f"{text_name(0)[:12]}.*two"):
                merge(parts)
        merge([a, b, c])

    def test_nothing_to_merge(self) -> None:
        for parts in ([], [part(0)]):
            with pytest.raises(StatisticsError, match="nothing to merge"):
                merge(parts)

    def test_what_is_shrunk(self) -> None:
        """A mean over keys has no shrinkage, so one would be dropped in silence."""
        a, b = part(0), part(1)
        for parts in ([a.shrunk("oas"), b], [a, b.shrunk("oas")]):
            with pytest.raises(StatisticsError, match="oas"):
                merge(parts)
        with pytest.raises(StatisticsError, match="shr"):
            merge([a.shrunk("oas"), b.shrunk("oas")])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, three texts, and for each the statistics collected from it."""
    folder = tmp_path_factory.mktemp("parts")
    make_model("llama").save_pretrained(folder / "model")
    make_tokenizer(bos=True).save_pretrained(folder / "model")
    for number in range(3):
        lines = (json.dumps({"text": text}) for text in texts_of(number))
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
        result = run(
            *("collect", folder / "model", "--corpus", folder / f"{number}.jsonl"),
            *("--layers", "0,2", "--tokens", 400 + 100 * number, "--window", 32),
            *("--out", folder / f"stats-{number}", "--probes", 2),
        )
        assert result.exit_code == 0, result.output
    return folder


def texts_of(number: int) -> list[str]:
    return TEXTS[number::3]


def run(*arguments: Any) -> Any:
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def merging(place: Path, out: Path, *numbers: int) -> list[Any]:
    return ["merge", *(place / f"stats-{n}" for n in numbers), "--out", out]


@pytest.mark.parametrize("packed", [False, True])
def test_the_command_merges_folders(place: Path, tmp_path: Path, packed: bool) -> None:
    flags = ["--packed"] if packed else []
    result = run(*merging(place, tmp_path, 0, 1, 2), *flags, "--json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)["layers"]
    assert [each["layer"] for each in shown] == [0, 2]
    model, tokenizer = make_model("llama"), make_tokenizer(bos=True)
    # The windows of each text, run in one go.
    windows = [
        window.ids
        for number in range(3)
        for window in packed_windows(
            tokenizer,
            Documents(texts_of(number), seed=0),
            length=32,
            budget=400 + 100 * number,
        )
    ]
    keys: dict[int, list[Tensor]] = {0: [], 2: []}
    for layer, found in keys.items():
        module = model.model.layers[layer].mlp.down_proj
        handle = module.register_forward_pre_hook(
            lambda _, args, found=found: found.append(args[0][0].detach())
        )
        for ids in windows:
            model(input_ids=torch.tensor([ids]))
        handle.remove()
    loaded = StatisticsStore(tmp_path).load(model, [0, 2], tokenizer)
    for layer, entry in zip((0, 2), shown, strict=True):
        rows = torch.cat(keys[layer]).double()
        assert loaded[layer].count == entry["count"] == len(rows) == 1500
        assert error_of(loaded[layer].second_moment, rows.T @ rows / 1500) < 1e-6
        assert entry["packed"] is packed and entry["adequacy"] is None
        assert len(entry["provenance"]["parts"]) == 3
        assert loaded[layer].provenance.parts == tuple(entry["provenance"]["parts"])


def test_a_merged_file_is_what_was_merged(tmp_path: Path) -> None:
    merged, store = merge([part(0), part(1)]), StatisticsStore(tmp_path)
    store.save(merged)
    found = store.open(7)
    assert found.provenance == merged.provenance
    assert isinstance(found.provenance.parts, tuple)
    assert found.fingerprint() == merged.fingerprint()
    assert torch.equal(found.second_moment, merged.second_moment)
    # And merges on, its parts still known.
    again = merge([found, part(2)])
    assert again.provenance == merge([merged, part(2)]).provenance
    with pytest.raises(StatisticsMismatch, match="two of the parts"):
        merge([found, part(1)])


def test_merged_folders_merge_on_the_command_line(place: Path, tmp_path: Path) -> None:
    assert run(*merging(place, tmp_path / "01", 0, 1)).exit_code == 0
    arguments = ["merge", tmp_path / "01", place / "stats-2", "--out"]
    assert run(*arguments, tmp_path / "nested").exit_code == 0
    assert run(*merging(place, tmp_path / "flat", 0, 1, 2)).exit_code == 0
    nested, flat = (
        StatisticsStore(tmp_path / name).open(2) for name in ("nested", "flat")
    )
    assert nested.provenance == flat.provenance
    assert error_of(nested.second_moment, flat.second_moment) < 1e-6
    result = run("merge", tmp_path / "01", place / "stats-1", "--out", tmp_path / "no")
    assert result.exit_code == 1 and "two of the parts" in result.stderr
    assert not (tmp_path / "no").exists()


def test_one_pass_over_both_texts_gives_what_a_merge_does() -> None:
    """Nothing but the seams of windows differs between one text and its parts."""
    model, tokenizer = make_model("llama"), make_tokenizer(bos=True)
    settings: dict[str, Any] = {"window": 32, "seed": None, "progress": False}
    # Texts that fill their windows to the last position leave no seam.
    texts = [text[:30] for text in TEXTS]  # with BOS and end: 32 tokens
    halves = [
        collect(model, tokenizer, each, [1], tokens=32 * 20, **settings)[1]
        for each in (texts[:20], texts[20:])
    ]
    whole = collect(model, tokenizer, texts, [1], tokens=32 * 40, **settings)[1]
    merged = merge(halves)
    assert merged.count == whole.count == 1280
    assert error_of(merged.second_moment, whole.second_moment) < 1e-6
