"""Statistics of another model, accepted or not, and shrinkage, from the store to the
update's metadata and the command line."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_kit import Workplace, make_workplace, refusal, run
from model_kit import (
    CONTEXTS,
    EDITS,
    TEXTS,
    Tiny,
    averaged_key,
    hidden_of_edit,
    make_model,
    make_tokenizer,
)
from torch import Tensor

from covariance_cache import (
    KeyStatistics,
    StatisticsError,
    StatisticsMismatch,
    StatisticsStore,
    collect,
    model_fingerprint,
    tokenizer_fingerprint,
)
from unified_edit.algebra.update import UpdateSet
from unified_edit.engine import EditResult, edit
from unified_edit.errors import RecipeError
from unified_edit.model.targets import optimize_targets
from unified_edit.preparation import prepare
from unified_edit.recipes import Recipe, recipe

LAYER, STEPS = 1, 3
Statistics = Mapping[int, KeyStatistics]


def wanted(name: str = "memit", **changes: Any) -> Recipe:
    return recipe(name, **{"layers": [LAYER], "steps": STEPS, **changes})


def compute(
    tiny: Tiny, statistics: Statistics, chosen: Recipe | None = None, **options: Any
) -> EditResult:
    model = options.pop("model", tiny.model)
    options.setdefault("contexts", CONTEXTS)
    chosen = chosen or wanted()
    return edit(model, tiny.tokenizer, EDITS[:3], chosen, statistics, **options)


def change_of(result: EditResult) -> Tensor:
    ((_, update),) = result.update
    return update.dense().double()


@pytest.fixture
def store(gpt2: Tiny, tmp_path: Path) -> StatisticsStore:
    """Of GPT-2's layers 0 and 1."""
    store = StatisticsStore(tmp_path / "statistics")
    for layer in (0, 1):
        store.save(gpt2.statistics[layer])
    return store


@pytest.fixture
def other(gpt2: Tiny) -> Any:
    """Another model of the same shapes."""
    return make_model("gpt2", len(gpt2.tokenizer), seed=9)


class TestAnotherModel:
    def test_is_refused_by_the_store(self, store: Any, gpt2: Tiny, other: Any) -> None:
        ours, theirs = (model_fingerprint(each)[:12] for each in (gpt2.model, other))
        both = rf"layer-001.*collected on model {ours}, this model is {theirs};.*accept"
        for accepted in ({}, {"accept_mismatch": False}):
            with pytest.raises(StatisticsMismatch, match=both):
                store.load(other, [1], gpt2.tokenizer, **accepted)

    def test_is_refused_by_the_engine(self, store: Any, gpt2: Tiny, other: Any) -> None:
        """Also where the store was not asked, or asked for another model."""
        for statistics in (
            gpt2.statistics,
            {1: store.open(1)},
            store.load(gpt2.model, [1]),
            store.load(gpt2.model, [1], accept_mismatch=True),
        ):
            with pytest.raises(RecipeError, match="were collected on the model"):
                compute(gpt2, statistics, model=other)

    def test_is_used_and_named_where_it_was_accepted(
        self, store: Any, gpt2: Tiny, other: Any, tmp_path: Path
    ) -> None:
        ours, theirs = (model_fingerprint(each)[:12] for each in (gpt2.model, other))
        loaded = store.load(other, [1, 0], gpt2.tokenizer, accept_mismatch=True)
        found = loaded[1]
        said = f"was collected on model {ours}, this model is {theirs}"
        assert found.accepted_mismatch == said
        # What it is a mean of is no matter of where it is used.
        assert torch.equal(found.second_moment, gpt2.statistics[1].second_moment)
        assert found.fingerprint() == gpt2.statistics[1].fingerprint()

        chosen = wanted(layers=[0, 1])
        result = compute(gpt2, loaded, chosen, model=other)
        path = result.update.save(tmp_path / "update.safetensors")
        for metadata in (result.update.metadata, UpdateSet.load(path).metadata):
            assert metadata["accepted_mismatches"] == {"0": said, "1": said}
            assert metadata["base_fingerprint"] == model_fingerprint(other)
        notes = [note for note in result.report.notes if "accepted" in note]
        assert len(notes) == 2
        for layer, note in zip((0, 1), notes, strict=True):
            assert note.startswith(f"layer {layer}: accepted") and said in note
            assert note in str(result.report)
            assert note in result.report.as_dict()["notes"]

    def test_what_is_used_is_that_models_mean(
        self, store: Any, gpt2: Tiny, other: Any
    ) -> None:
        """The update is that of statistics which say to be of this model."""
        loaded = store.load(other, [1], accept_mismatch=True)
        forged = replace(
            gpt2.statistics[1],
            provenance=replace(
                gpt2.statistics[1].provenance,
                model_fingerprint=model_fingerprint(other),
            ),
        )
        one = compute(gpt2, loaded, model=other)
        two = compute(gpt2, {1: forged}, model=other)
        assert torch.equal(change_of(one), change_of(two))
        # As accepted, so prepared.
        ready = prepare(wanted(), loaded)
        three = compute(gpt2, loaded, model=other, prepared=ready)
        assert torch.equal(change_of(one), change_of(three))
        assert three.update.metadata["accepted_mismatches"].keys() == {"1"}

    def test_accepted_for_one_model_is_not_accepted_for_all(
        self, store: Any, gpt2: Tiny, other: Any
    ) -> None:
        loaded = store.load(other, [1], accept_mismatch=True)
        third = make_model("gpt2", len(gpt2.tokenizer), seed=10)
        with pytest.raises(RecipeError, match="were collected on the model"):
            compute(gpt2, loaded, model=third)


class TestAnotherTokenizer:
    @pytest.fixture
    def words(self) -> Any:
        return make_tokenizer("gpt2", texts=["quite other words"])

    def test_is_refused_or_named(self, store: Any, gpt2: Tiny, words: Any) -> None:
        ours, theirs = (
            tokenizer_fingerprint(each)[:12] for each in (gpt2.tokenizer, words)
        )
        said = f"was collected with tokenizer {ours}, this tokenizer is {theirs}"
        with pytest.raises(StatisticsMismatch, match=said):
            store.load(gpt2.model, [1], words)
        loaded = store.load(gpt2.model, [1], words, accept_mismatch=True)
        assert loaded[1].accepted_mismatch == said
        result = compute(gpt2, loaded)
        assert result.update.metadata["accepted_mismatches"] == {"1": said}
        assert sum(said in note for note in result.report.notes) == 1

    def test_accepted_is_no_other_model(
        self, store: Any, gpt2: Tiny, words: Any, other: Any
    ) -> None:
        loaded = store.load(gpt2.model, [1], words, accept_mismatch=True)
        with pytest.raises(RecipeError, match="were collected on the model"):
            compute(gpt2, loaded, model=other)

    def test_of_both_both_are_named(
        self, store: Any, gpt2: Tiny, words: Any, other: Any
    ) -> None:
        found = store.load(other, [1], words, accept_mismatch=True)[1]
        for each in (gpt2.model, other):
            assert model_fingerprint(each)[:12] in found.accepted_mismatch
        for each in (gpt2.tokenizer, words):
            assert tokenizer_fingerprint(each)[:12] in found.accepted_mismatch


class TestAnotherWidth:
    def test_is_refused_even_so(self, store: Any, gpt2: Tiny) -> None:
        narrow = make_model("gpt2", len(gpt2.tokenizer), n_inner=32)
        for accept in (False, True):
            with pytest.raises(StatisticsMismatch, match=r"64 dimensions.* takes 32"):
                store.load(narrow, [1], accept_mismatch=accept)
        loaded = store.load(gpt2.model, [1], accept_mismatch=True)
        accepted = {1: replace(loaded[1], accepted_mismatch="by hand")}
        with pytest.raises(RecipeError, match="32 dimensions, the statistics 64"):
            compute(gpt2, accepted, model=narrow)

    def test_of_another_architecture(self, store: Any, llama: Tiny) -> None:
        """Its modules have other names, so the engine is the first to compare."""
        loaded = store.load(llama.model, [1], accept_mismatch=True)
        with pytest.raises(RecipeError, match="40 dimensions, the statistics 64"):
            compute(llama, loaded)


def test_what_matches_records_nothing(tiny: Tiny, tmp_path: Path) -> None:
    store = StatisticsStore(tmp_path)
    store.save(tiny.statistics[1])
    for accept in (False, True):
        loaded = store.load(tiny.model, [1], tiny.tokenizer, accept_mismatch=accept)
        assert loaded[1].accepted_mismatch is None
        result = compute(tiny, loaded)
        assert result.update.metadata["accepted_mismatches"] == {}
        assert not any("accepted" in note for note in result.report.notes)
        assert torch.equal(change_of(result), change_of(compute(tiny, tiny.statistics)))


def dense_shrunk(matrix: Tensor, count: int, shrinkage: str) -> Tensor:
    """C' by the published formulas, in float64."""
    wide = matrix.double()
    size, mean = len(wide), wide.trace() / len(wide)
    if shrinkage == "none":
        return wide
    if shrinkage.startswith("ridge:"):
        share = float(shrinkage.removeprefix("ridge:"))
        return wide + share * mean * torch.eye(size, dtype=torch.float64)
    square = (wide @ wide).trace()
    rho = ((1 - 2 / size) * square + (size * mean) ** 2) / (
        (count + 1 - 2 / size) * (square - size * mean**2)
    )
    rho = min(1.0, float(rho))
    return (1 - rho) * wide + rho * mean * torch.eye(size, dtype=torch.float64)


class TestShrinkage:
    @pytest.mark.parametrize("shrinkage", ["none", "oas", "ridge:0.3"])
    @pytest.mark.parametrize("name", ["memit", "emmet"])
    def test_the_update_is_the_methods_with_the_shrunk_c(
        self, tiny64: Tiny, name: str, shrinkage: str
    ) -> None:
        """Meng et al. 2023, equation 14, and Gupta et al. 2024, equation 9, with C' in
        C's place."""
        chosen = wanted(
            name, **({"preservation_weight": 3.0} if name == "memit" else {})
        )
        found = tiny64.statistics[LAYER]
        moment = dense_shrunk(found.second_moment, found.count, shrinkage)
        arguments = (tiny64.model, tiny64.kind, tiny64.tokenizer)
        edits = EDITS[:3]
        keys = torch.stack(
            [averaged_key(*arguments, e, LAYER, chosen.key_average) for e in edits], 1
        )
        hidden = torch.stack([hidden_of_edit(*arguments, e, LAYER) for e in edits], 1)
        targets = optimize_targets(
            tiny64.adapter, tiny64.tokenizer, edits, CONTEXTS, LAYER, chosen.targets
        )
        residuals = targets.values.double().T - hidden
        if name == "memit":
            system = 3.0 * moment + keys @ keys.T
            expected = residuals @ keys.T @ torch.linalg.inv(system)
        else:
            pulled = keys.T @ torch.linalg.inv(moment)
            expected = residuals @ torch.linalg.inv(pulled @ keys) @ pulled
        result = compute(tiny64, {LAYER: found.shrunk(shrinkage)}, chosen)
        difference = change_of(result) - expected
        assert float(difference.norm()) < 1e-5 * float(expected.norm())

    def test_the_metadata_says_which(self, gpt2: Tiny, store: Any) -> None:
        texts = ("none", "oas", "ridge:0.3")
        changes, prints = [], set()
        chosen = wanted(layers=[0, 1])
        for text in texts:
            loaded = store.load(gpt2.model, [0, 1], shrinkage=text)
            metadata = compute(gpt2, loaded, chosen).update.metadata
            json.dumps(metadata)
            assert metadata["shrinkage"] == {"0": text, "1": text}
            assert metadata["statistics"] == {
                str(n): gpt2.statistics[n].shrunk(text).fingerprint() for n in (0, 1)
            }
            prints |= set(metadata["statistics"].values())
            changes.append(change_of(compute(gpt2, loaded)))
        assert len(prints) == 6
        assert not torch.equal(changes[0], changes[1])
        assert not torch.equal(changes[1], changes[2])

    def test_what_was_prepared_is_of_one_shrinkage(self, gpt2: Tiny) -> None:
        shrunk = {1: gpt2.statistics[1].shrunk("oas")}
        ready = prepare(wanted(), shrunk)
        compute(gpt2, shrunk, prepared=ready)
        for text in ("none", "ridge:0.3"):
            with pytest.raises(RecipeError, match="prepared"):
                compute(gpt2, {1: shrunk[1].shrunk(text)}, prepared=ready)

    def test_fewer_keys_than_dimensions_need_one(self, tiny: Tiny) -> None:
        few = collect(
            tiny.model, tiny.tokenizer, TEXTS, [1], tokens=30, window=30, progress=False
        )
        assert few[1].count == 30 < few[1].d_key
        for name in ("memit", "emmet", "rome"):
            chosen = wanted(name)
            edits = EDITS[:1] if name == "rome" else EDITS[:3]
            arguments = (tiny.model, tiny.tokenizer, edits, chosen)
            with pytest.raises(RecipeError, match="count 30 keys.*shrinkage"):
                edit(*arguments, few, contexts=CONTEXTS)
            for text in ("oas", "ridge:0.01"):
                shrunk = {1: few[1].shrunk(text)}
                result = edit(*arguments, shrunk, contexts=CONTEXTS)
                certificate = result.report.certificates[1]
                assert certificate.jitter == 0
                if name != "memit":  # which may miss what it aims at
                    assert certificate.relative_residual_error < 1e-6
                assert result.update.metadata["shrinkage"] == {"1": text}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.fixture
def place(original: Workplace, tmp_path: Path) -> Workplace:
    shutil.copytree(original.path, tmp_path / "work")
    return Workplace(tmp_path / "work")


class TestCommandLine:
    def metadata(self, place: Workplace, *flags: Any) -> Any:
        result = run(*place.editing(limit=2), *flags, "--force")
        assert result.exit_code == 0, result.output
        return UpdateSet.load(place.update).metadata, result

    def test_accept_mismatch(self, place: Workplace) -> None:
        ours = StatisticsStore(place.statistics).header(0)["provenance"]
        other = make_model("gpt2", len(make_tokenizer("gpt2")), seed=9)
        shutil.rmtree(place.model)
        other.save_pretrained(place.model)
        make_tokenizer("gpt2").save_pretrained(place.model)
        message = refusal(place.path, *place.editing())
        assert "was collected on model" in message and "accept" in message
        metadata, result = self.metadata(place, "--accept-mismatch")
        said = (
            f"was collected on model {ours['model_fingerprint'][:12]}, this model is "
            f"{model_fingerprint(other)[:12]}"
        )
        assert metadata["accepted_mismatches"] == {"0": said, "1": said}
        shown = " ".join(result.stdout.split())
        for layer in (0, 1):
            assert (
                f"note: layer {layer}: accepted statistics whose file {said}" in shown
            )
        report = json.loads(
            run(
                *place.editing(limit=2), "--accept-mismatch", "--force", "--json"
            ).stdout
        )["report"]
        assert sum(said in note for note in report["notes"]) == 2

    def test_accept_mismatch_accepts_no_other_width(self, place: Workplace) -> None:
        narrow = make_model("gpt2", len(make_tokenizer("gpt2")), n_inner=32)
        shutil.rmtree(place.model)
        narrow.save_pretrained(place.model)
        make_tokenizer("gpt2").save_pretrained(place.model)
        message = refusal(place.path, *place.editing(), "--accept-mismatch")
        assert "64 dimensions" in message and "takes 32" in message

    def test_accept_mismatch_of_what_matches_is_recorded_nowhere(
        self, place: Workplace
    ) -> None:
        metadata, result = self.metadata(place, "--accept-mismatch")
        plain, _ = self.metadata(place)
        assert metadata == plain and metadata["accepted_mismatches"] == {}
        assert "accepted" not in result.stdout

    def test_shrinkage(self, place: Workplace) -> None:
        model = make_model("gpt2", len(make_tokenizer("gpt2")))
        store = StatisticsStore(place.statistics)
        prints = {}
        for text in ("none", "oas", "ridge:0.01"):
            metadata, _ = self.metadata(place, "--shrinkage", text)
            assert metadata["shrinkage"] == {"0": text, "1": text}
            loaded = store.load(model, [0, 1], shrinkage=text)
            expected = {str(n): loaded[n].fingerprint() for n in (0, 1)}
            assert metadata["statistics"] == expected
            prints[text] = place.update.read_bytes()
        assert len(set(prints.values())) == 3
        assert self.metadata(place)[0]["shrinkage"] == {"0": "none", "1": "none"}
        assert place.update.read_bytes() == prints["none"]

    @pytest.mark.parametrize("text", ["lasso", "ridge", "ridge:0", "ridge:much", ""])
    def test_a_bad_shrinkage(self, place: Workplace, text: str) -> None:
        message = refusal(place.path, *place.editing(), "--shrinkage", text)
        assert f"shrinkage {text!r}: expected none, oas or ridge:NUMBER" in message

    def test_too_few_keys(self, place: Workplace) -> None:
        tokenizer = make_tokenizer("gpt2")
        model = make_model("gpt2", len(tokenizer))
        few = collect(
            model, tokenizer, TEXTS, [0, 1], tokens=30, window=30, progress=False
        )
        for statistics in few.values():
            StatisticsStore(place.statistics).save(statistics)
        message = refusal(place.path, *place.editing())
        assert "count 30 keys of 64 dimensions" in message and "shrinkage" in message
        metadata, _ = self.metadata(place, "--shrinkage", "oas")
        assert metadata["shrinkage"] == {"0": "oas", "1": "oas"}


def test_a_model_is_as_it_was(gpt2: Tiny, store: Any, other: Any) -> None:
    """The accepted way restores weights like any."""
    before = copy.deepcopy(other.state_dict())
    loaded = store.load(other, [1], accept_mismatch=True, shrinkage="oas")
    compute(gpt2, loaded, model=other)
    assert all(torch.equal(other.state_dict()[name], before[name]) for name in before)
    with pytest.raises(StatisticsError, match="expected none, oas"):
        store.load(other, [1], accept_mismatch=True, shrinkage="yes")
