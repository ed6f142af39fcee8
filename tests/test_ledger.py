"""The ledger: one set of edits has one result, byte for byte, however it came about;
its file and what lies beside it survive failures, strangers and other writers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_kit import disk, quick_fsync  # noqa: F401
from cli_kit import Workplace, answer, make_workplace, refusal, run, write_edits
from model_kit import EDITS, TEXTS, Tiny, assert_same_bits, make_model, state_of
from test_checkpoint_crash import Crash, faults

from covariance_cache import KeyStatistics, collect
from covariance_cache.shrinkage import Shrinkage
from unified_edit import engine
from unified_edit import ledger as ledger_module
from unified_edit.algebra.update import UpdateSet
from unified_edit.checkpoint.files import locked
from unified_edit.checkpoint.patch import history, patch, verify
from unified_edit.demo import load
from unified_edit.edits import Edit
from unified_edit.engine import edit
from unified_edit.errors import CheckpointError, EditError, LedgerError, RecipeError
from unified_edit.evaluate.world import World
from unified_edit.ledger import Ledger
from unified_edit.ledger_entries import Entry
from unified_edit.ledger_rebuild import rebuild
from unified_edit.model import targets as targets_module
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.prompts import Contexts, ContextSettings, generate_contexts
from unified_edit.model.scoring import generate
from unified_edit.presets import PRESETS
from unified_edit.recipes import RECIPES, Recipe, recipe

TINYWORLD = Path(__file__).parents[1] / "examples" / "tinyworld"
CONTEXTS = ContextSettings((("The", 4), ("In", 6)))
SINGLE = recipe("rome", layers=[1], steps=4, clamp=3.0, contexts=CONTEXTS)
# Not the last block, where a change at the subject reaches no later token.
MULTI = recipe(
    "memit",
    layers=[0, 1],
    steps=4,
    clamp=3.0,
    preservation_weight=1.0,
    contexts=CONTEXTS,
)
both_recipes = pytest.mark.parametrize("wanted", [SINGLE, MULTI], ids=["one", "two"])


def begin(tiny: Tiny, path: Path, wanted: Recipe = MULTI, **options: Any) -> Ledger:
    return Ledger.create(
        path,
        tiny.model,
        tiny.tokenizer,
        wanted,
        tiny.statistics,
        base="base",
        statistics_folder="statistics",
        **options,
    )


def add(tiny: Tiny, ledger: Ledger, edits: list[Edit]) -> Ledger:
    return ledger.add(tiny.model, tiny.tokenizer, edits)


def solve(tiny: Tiny, ledger: Ledger) -> UpdateSet:
    return ledger.solve(tiny.model, tiny.tokenizer, tiny.statistics).update


def data_of(update: UpdateSet) -> bytes:
    """What `save` writes."""
    return b"".join(update.parts())


def values_of(ledger: Ledger) -> dict[Edit, bytes]:
    return {entry.edit: ledger.packed_values(entry) for entry in ledger.entries}


def files_of(folder: Path) -> dict[str, str]:
    """What `disk` finds but for the manifest: in place, a patch does not read the
    shards that it leaves, so that manifest has fewer hashes."""
    found = disk(folder)
    del found[".unified-edit/manifest.json"]
    return found


def as_json(data: Any) -> Any:
    return json.loads(json.dumps(data, allow_nan=False))


def forbid(*_: Any, **__: Any) -> Any:
    raise AssertionError("an edit was optimised")


@pytest.fixture
def base(tiny: Tiny, tmp_path: Path) -> Path:
    tiny.model.save_pretrained(tmp_path / "base", max_shard_size=20_000)
    return tmp_path / "base"


# One set, one result


@both_recipes
def test_without_one_edit_it_is_what_the_others_alone_give(
    tiny: Tiny, base: Path, tmp_path: Path, wanted: Recipe
) -> None:
    full = add(tiny, begin(tiny, tmp_path / "all.json", wanted), EDITS[3:])
    full = add(tiny, full, EDITS[:3])
    whole = solve(tiny, full)
    out = tmp_path / "edited"
    rebuild(full, whole, base, out)
    whole_files = files_of(out)
    for number, struck in enumerate((full.entries[0], full.entries[3])):
        others = values_of(full)
        kept = others.pop(struck.edit)
        rest = full.remove([struck.id[:6]])
        mine = solve(tiny, rest)
        saved = mine.save(tmp_path / "update.safetensors").read_bytes()
        rebuild(rest, mine, base, out)  # over the whole set's
        for order in (list(others), list(others)[::-1])[number:]:
            alone = begin(tiny, tmp_path / f"{number}{order[0].subject}", wanted)
            alone = alone.join({order[0]: others[order[0]]})
            alone = alone.join({each: others[each] for each in order[1:]})
            assert alone.digest == rest.digest != full.digest
            its = solve(tiny, alone)
            assert its.save(tmp_path / "its.safetensors").read_bytes() == saved
            fresh = tmp_path / f"fresh-{alone.path.name}"
            rebuild(alone, its, base, fresh)
            assert files_of(fresh) == files_of(out) != whole_files
        assert rest.join({struck.edit: kept}) == full == Ledger.read(full.path)
        assert data_of(solve(tiny, full)) == data_of(whole) != saved
        rebuild(full, whole, base, out)
        assert files_of(out) == whole_files


@both_recipes
def test_it_is_what_edit_computes(tiny: Tiny, tmp_path: Path, wanted: Recipe) -> None:
    """The same bits where targets and keys came from one batch in the same order; else
    the same up to what batching does to float32."""
    ordered = sorted(EDITS, key=lambda each: Entry(each, "").id)
    empty = begin(tiny, tmp_path / "batch", wanted, seed=5)
    assert empty.contexts == generate_contexts(
        tiny.adapter, tiny.tokenizer, wanted.contexts, 5
    )
    # What the ledger holds counts, not what the seed would give elsewhere.
    contexts = Contexts((*empty.contexts.templates[:2], "The letters say. {}"))
    empty = replace(empty, contexts=contexts)
    batch = add(tiny, empty, ordered)
    assert batch.edits == ordered != EDITS
    plain = edit(
        tiny.model,
        tiny.tokenizer,
        ordered,
        wanted,
        tiny.statistics,
        contexts=contexts,
        seed=5,
    ).update
    found = solve(tiny, batch)
    metadata = dict(found.metadata)
    assert metadata.pop("ledger") == batch.digest
    assert metadata == plain.metadata
    assert data_of(UpdateSet(found.updates, metadata)) == data_of(plain)

    parts = replace(empty, path=tmp_path / "parts")
    for part in (EDITS[4:], EDITS[1:3], [EDITS[3], EDITS[0]]):
        parts = add(tiny, parts, part)
    assert parts.edits == ordered
    for (address, one), (other, two) in zip(solve(tiny, parts), plain, strict=True):
        assert address == other
        difference = float((one.dense() - two.dense()).norm())
        assert difference < 3e-5 * two.norm()


def test_only_new_edits_are_optimised(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = targets_module.descend, []

    def counting(chunk: Any, edits: Any, which: Any, *rest: Any) -> Any:
        seen.append([edits[index] for index in which])
        return real(chunk, edits, which, *rest)

    monkeypatch.setattr(targets_module, "descend", counting)
    ledger = add(tiny, begin(tiny, tmp_path / "l"), EDITS[:3])
    before = values_of(ledger)
    ledger = add(tiny, ledger, EDITS[3:])
    assert seen == [EDITS[:3], EDITS[3:]]
    after = values_of(ledger)
    assert {each: after[each] for each in before} == before
    # Neither removing nor solving optimises anything, nor asks for first keys.
    monkeypatch.setattr(targets_module, "descend", forbid)
    monkeypatch.setattr(engine, "optimize_targets", forbid)
    monkeypatch.setattr(ledger_module, "optimize_targets", forbid)
    layers, keys = [], engine.keys_at_subjects

    def noting(*arguments: Any) -> Any:
        layers.append(arguments[4])
        return keys(*arguments)

    monkeypatch.setattr(engine, "keys_at_subjects", noting)
    solve(tiny, ledger.remove([ledger.entries[1].id]))
    assert layers == [1]


def test_a_solve_that_fails_leaves_the_model(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = add(tiny, begin(tiny, tmp_path / "l"), EDITS)
    before, weights = disk(tmp_path), state_of(tiny.model)
    real = engine.solve

    def failing(*arguments: Any, **options: Any) -> Any:
        now = tiny.adapter.weight(0)
        if not torch.equal(now, weights[tiny.adapter.address(0).tensor]):
            raise RuntimeError("after the first layer")
        return real(*arguments, **options)

    monkeypatch.setattr(engine, "solve", failing)
    with pytest.raises(RuntimeError, match="after the first layer"):
        solve(tiny, ledger)
    assert_same_bits(tiny.model, weights)
    assert disk(tmp_path) == before


def test_digest_says_what_a_solution_depends_on(gpt2: Tiny, tmp_path: Path) -> None:
    one = add(gpt2, begin(gpt2, tmp_path / "one"), EDITS[:2])
    moved = replace(one, path=tmp_path / "x", base="elsewhere", statistics="there")
    assert moved.digest == one.digest
    for changed in (
        replace(one, entries=one.entries[:1]),
        replace(one, recipe=replace(one.recipe, preservation_weight=2.0)),
        replace(one, seed=1),
        replace(one, shrinkage="oas"),
        replace(one, base_fingerprint="0"),
        replace(one, entries=(one.entries[0], Entry(one.entries[1].edit, "0"))),
    ):
        assert changed.digest != one.digest


# The file


def test_the_file_is_readable(gpt2: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    made = add(gpt2, begin(gpt2, path, seed=3), EDITS)
    text = path.read_text(encoding="utf-8")
    data = json.loads(text)
    for line in (
        '   "prompt": "In spring, everyone likes {}",',
        '   "subject": "Carla Nunes",',
        '   "target": "green apples",',
    ):
        assert line in text.splitlines()
    assert data["format"] == "unified-edit/ledger/1"
    assert (data["base"], data["statistics"]["folder"]) == ("base", "statistics")
    assert (data["dtype"], data["seed"]) == ("float32", 3)
    assert data["recipe"]["name"] == "memit" and data["recipe"]["layers"] == [0, 1]
    assert data["contexts"][0] == "{}" and len(data["contexts"]) == 3
    ids = [each["id"] for each in data["edits"]]
    assert ids == sorted(ids) and len(ids) == len(EDITS)
    assert {path.name for path in tmp_path.iterdir()} == {path.name, made.values.name}
    assert sorted(each.stem for each in made.values.iterdir()) == ids
    assert Ledger.read(path) == made
    assert as_json(made.as_dict()) == data


@pytest.fixture(scope="module")
def filled(
    _tinies: dict[str, Tiny], tmp_path_factory: pytest.TempPathFactory
) -> Ledger:
    tiny, folder = _tinies["gpt2"], tmp_path_factory.mktemp("filled")
    return add(tiny, begin(tiny, folder / "facts.json"), EDITS)


@pytest.fixture
def kept(filled: Ledger, tmp_path: Path) -> Ledger:
    """Five edits' ledger, each test's own."""
    shutil.copytree(filled.path.parent, tmp_path, dirs_exist_ok=True)
    return Ledger.read(tmp_path / filled.path.name)


def changed(ledger: Ledger, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(ledger.path.read_bytes())
    change(data)
    ledger.path.write_text(json.dumps(data))


REFUSED: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda d: d.update(format="unified-edit/ledger/9"), "its format is"),
    (lambda d: d.clear(), "not a ledger: 'format'"),
    (lambda d: d.pop("contexts"), "'contexts'"),
    (lambda d: d["statistics"].pop("shrinkage"), "'shrinkage'"),
    (lambda d: d["statistics"].update(fingerprints={"one": ""}), "invalid literal"),
    (lambda d: d["edits"][0].update(target="Rome"), "was changed by hand; remove it"),
    (lambda d: d["edits"][0].update(id="0" * 12), "was changed by hand"),
    (lambda d: d["edits"][0].update(prompt="Nobody"), "the subject is not in the"),
    (lambda d: d["edits"].append(d["edits"][0]), "edit 1 repeats edit 0"),
    (lambda d: d["edits"][0].pop("values_sha256"), "'values_sha256'"),
    (lambda d: d.update(edits=3), "not a ledger"),
    (lambda d: d["edits"].append("x"), "not a ledger"),
    (lambda d: d.update(contexts=["In Porto. {}"]), "begin with the bare prompt"),
    (lambda d: d["recipe"].update(lambda_=1), "not the data of a recipe"),
    (lambda d: d["recipe"].update(layers=[]), "at least one"),
    (lambda d: d["recipe"].pop("targets"), "not the data of a recipe: 'targets'"),
    (lambda d: d["recipe"]["targets"].update(clamp=-1), "must be positive"),
    (lambda d: d["recipe"]["contexts"].update(samples=[["The"]]), "recipe"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_a_file_changed_by_hand(
    kept: Ledger, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    good = kept.path.read_bytes()
    changed(kept, change)
    with pytest.raises(LedgerError, match="facts.json: not a ledger") as caught:
        Ledger.read(kept.path)
    assert message in str(caught.value)
    bad = disk(kept.path.parent)
    with pytest.raises(LedgerError):  # nor is it written over
        kept.remove([kept.entries[0].id])
    assert disk(kept.path.parent) == bad
    kept.path.write_bytes(good)
    assert Ledger.read(kept.path) == kept


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["recipe"].update(memorization="exactly"),
        lambda d: d["recipe"].update(preservation="none"),
        lambda d: d["recipe"].update(key_average="mean"),
        lambda d: d["recipe"].update(layers=["0", "1"]),
        lambda d: d["recipe"]["targets"].update(steps=2.5),
        lambda d: d["recipe"]["contexts"].update(samples=[["The", float("inf")]]),
        lambda d: d["statistics"].update(fingerprints={}),
        lambda d: d.update(base=5),
    ],
)
def test_values_that_no_ledger_writes(
    kept: Ledger, change: Callable[[dict[str, Any]], object]
) -> None:
    changed(kept, change)
    with pytest.raises(LedgerError):
        Ledger.read(kept.path)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b"{", b'{"format": 1}', b"\xff{}", b"[" * 200_000]
)
def test_no_ledger_at_all(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "facts.json"
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="facts.json: not a ledger"):
        Ledger.read(path)
    for other in (tmp_path, tmp_path / "none"):
        with pytest.raises(LedgerError, match="cannot be read"):
            Ledger.read(other)


def test_damaged_values_are_noticed(gpt2: Tiny, kept: Ledger) -> None:
    path = kept.values / f"{kept.entries[2].id}.safetensors"
    good, other = path.read_bytes(), kept.packed_values(kept.entries[0])
    for bad in (good[:-1] + bytes([good[-1] ^ 1]), good[:-8], b"", other):
        path.write_bytes(bad)
        with pytest.raises(LedgerError, match=f"{path.name}: was changed since"):
            solve(gpt2, kept)
    path.unlink()
    with pytest.raises(LedgerError, match=f"{path.name}: cannot be read.*No such"):
        solve(gpt2, kept)
    # What the message says is the way out.
    healed = add(gpt2, kept.remove([path.stem]), [kept.entries[2].edit])
    assert healed.edits == kept.edits
    solve(gpt2, healed)


# What does not fit


def test_another_model(tiny: Tiny, tmp_path: Path) -> None:
    ledger = add(tiny, begin(tiny, tmp_path / "l"), EDITS[:2])
    before = disk(tmp_path)
    other = make_model(tiny.kind, len(tiny.tokenizer), seed=4)
    halved = make_model(tiny.kind, len(tiny.tokenizer)).to(torch.bfloat16)
    for model in (other, halved):
        stranger = replace(tiny, model=model)
        for call in (
            lambda s=stranger: solve(s, ledger),
            lambda s=stranger: add(s, ledger, EDITS[2:]),
        ):
            with pytest.raises(LedgerError, match="is of the model.*in.float32"):
                call()
    assert disk(tmp_path) == before


def test_statistics_that_cannot_be_used_are_refused_at_once(
    gpt2: Tiny, llama: Tiny, tmp_path: Path
) -> None:
    few = {k: replace(v, count=3) for k, v in gpt2.statistics.items()}
    for statistics in ({}, few, llama.statistics):
        with pytest.raises(RecipeError):
            begin(replace(gpt2, statistics=statistics), tmp_path / "l")


def test_another_dtype_of_the_same_values(
    _tinies64: Any, gpt2: Tiny, kept: Any
) -> None:
    with pytest.raises(LedgerError, match="float32"):
        solve(_tinies64["gpt2"], kept)


def test_other_statistics(gpt2: Tiny, kept: Ledger) -> None:
    layer = gpt2.statistics[1]
    for other in (
        replace(layer, second_moment=layer.second_moment * 1.001),
        replace(layer, shrinkage=Shrinkage("oas")),
        None,
    ):
        statistics: dict[int, KeyStatistics] = dict(gpt2.statistics)
        del statistics[1]
        if other is not None:
            statistics[1] = other
        with pytest.raises(LedgerError, match="layer 1 was edited with statistics"):
            kept.solve(gpt2.model, gpt2.tokenizer, statistics)


def test_create_refuses(gpt2: Tiny, kept: Ledger, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="exists already"):
        begin(gpt2, kept.path)
    with pytest.raises(RecipeError, match="the model has layers 0 to 2"):
        begin(gpt2, tmp_path / "l", replace(MULTI, layers=(2, 3)))
    mixed = dict(gpt2.statistics)
    mixed[0] = replace(mixed[0], shrinkage=Shrinkage("oas"))
    with pytest.raises(LedgerError, match="share one shrinkage"):
        begin(replace(gpt2, statistics=mixed), tmp_path / "l")
    assert begin(gpt2, tmp_path / "l").entries == ()
    assert not (tmp_path / "l").exists()  # written with the first edits
    with pytest.raises(LedgerError, match="holds no edits"):
        solve(gpt2, begin(gpt2, tmp_path / "l"))


def test_repeated_and_contradictory_edits(
    gpt2: Tiny, kept: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "optimize_targets", forbid)
    before = disk(kept.path.parent)
    there, fresh = EDITS[1], Edit("{} eats", "Bo Diaz", "Oslo")
    spelled = Edit("The town of Bo Diaz is called", "Bo Diaz", "Cairo")
    for edits, message in (
        ([there], "repeats"),
        ([spelled], "repeats"),
        ([fresh, replace(there, target="Lyon")], "contradict each other"),
        ([fresh, fresh], "repeats"),
        ([fresh, replace(fresh, target="Lyon")], "contradict each other"),
    ):
        with pytest.raises(EditError, match=message):
            add(gpt2, kept, edits)
    value = kept.packed_values(kept.entries[0])
    for edits, message in (
        ([], "there are no edits"),
        ([spelled], "repeats"),
        ([fresh, replace(fresh, target="Lyon")], "contradict each other"),
    ):
        into = kept if edits else replace(kept, entries=())
        with pytest.raises(EditError, match=message):
            into.join(dict.fromkeys(edits, value))
    assert disk(kept.path.parent) == before


def test_ids(gpt2: Tiny, tmp_path: Path) -> None:
    prompts = ("{} eats", "{} sings", "{} sees", "The hat of {} is")
    many = [Edit(p, e.subject, "chess") for p in prompts for e in EDITS]
    one_step = replace(MULTI, targets=replace(MULTI.targets, steps=1))
    ledger = add(gpt2, begin(gpt2, tmp_path / "l", one_step), many)
    ids = [entry.id for entry in ledger.entries]
    firsts = [each[0] for each in ids]
    shared = next(each for each in firsts if firsts.count(each) > 1)
    before = disk(tmp_path)
    for wanted, message in (
        (shared, "names several edits"),
        ("", "names no edit"),
        ("zz", "names no edit"),
        (f"{ids[0]}0", "names no edit"),
    ):
        with pytest.raises(LedgerError, match=message):
            ledger.remove([ids[-1], wanted])
    assert disk(tmp_path) == before
    left = ledger.remove([ids[0], ids[-1][:11], ids[0][:10]])
    assert [entry.id for entry in left.entries] == ids[1:-1]


# Writing


def test_a_change_by_somebody_else_is_not_undone(kept: Ledger) -> None:
    stale, value = Ledger.read(kept.path), kept.packed_values(kept.entries[0])
    fresh = kept.remove([kept.entries[0].id])
    before = disk(kept.path.parent)
    for change in (
        lambda: stale.remove([stale.entries[1].id]),
        lambda: stale.join({Edit("{} eats", "Bo Diaz", "Oslo"): value}),
        lambda: replace(stale, entries=()).join({stale.entries[0].edit: value}),
    ):
        with pytest.raises(LedgerError, match="was changed meanwhile; read it again"):
            change()
    with locked(kept.path.with_name(f".{kept.path.name}.lock")):
        with pytest.raises(LedgerError, match="another process"):
            fresh.remove([fresh.entries[0].id])
        assert Ledger.read(kept.path) == fresh  # readers need not wait
    assert disk(kept.path.parent) == before


@dataclass(frozen=True)
class Step:
    """A change of a ledger, and the edits before and after it."""

    make: Callable[[Ledger], Ledger]
    before: list[Edit]
    after: list[Edit]


@pytest.mark.parametrize("crash", [False, True], ids=["error", "crash"])
@pytest.mark.parametrize("kind", ["first", "more", "fewer"])
def test_a_failure_at_any_file_operation(
    kept: Ledger, tmp_path: Path, crash: bool, kind: str
) -> None:
    values, edits = values_of(kept), kept.edits
    empty = replace(kept, entries=())
    step = {
        "first": Step(lambda it: it.join(_some(values, edits[:2])), [], edits[:2]),
        "more": Step(
            lambda it: it.join(_some(values, edits[2:4])), edits[:2], edits[:4]
        ),
        "fewer": Step(
            lambda it: it.remove([e.id for e in it.entries[1:3]]), edits[:3], edits[:1]
        ),
    }[kind]
    start = tmp_path / "start"
    start.mkdir()
    if step.before:
        replace(empty, path=start / "l").join(_some(values, step.before))
    reached = outcomes = 0
    ended = False
    while not ended:
        folder = tmp_path / f"{reached}"
        shutil.copytree(start, folder)
        path = folder / "l"
        ledger = Ledger.read(path) if step.before else replace(empty, path=path)
        with faults(reached, crash=crash) as injected:
            try:
                step.make(ledger)
                through = True
            except (LedgerError, Crash) as error:
                assert isinstance(error, Crash) == crash
                through = False
        ended = not injected.struck
        # As before or as after, and every value that is named is the right one.
        now = Ledger.read(path) if path.exists() else replace(empty, path=path)
        assert now.edits in (step.before, step.after)
        assert now.edits == step.after or not through
        assert values_of(now) == _some(values, now.edits)
        outcomes |= 1 << (now.edits == step.after)
        # The next writer goes on from there, and tidies up.
        done = step.make(now) if now.edits == step.before else now
        done = done.join({edits[4]: values[edits[4]]})
        wanted = [*step.after, edits[4]]
        assert Ledger.read(path).edits == done.edits == wanted
        assert {each.name for each in folder.iterdir()} == {"l", "l.values"}
        names = {f"{entry.id}.safetensors" for entry in done.entries}
        assert {each.name for each in done.values.iterdir()} == names
        assert values_of(done) == _some(values, wanted)
        shutil.rmtree(folder)
        reached += 1
    assert reached > 8 and outcomes == 3


def _some(values: dict[Edit, bytes], edits: list[Edit]) -> dict[Edit, bytes]:
    return {each: values[each] for each in edits}


def test_values_are_on_disk_before_they_are_named(
    kept: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And stay there until nothing that could survive a power cut names them."""
    struck, value = kept.entries[0], kept.packed_values(kept.entries[0])
    synced: set[int] = set()
    written: list[str] = []
    real_replace, real_unlink = os.replace, os.unlink

    def fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)

    def moved(source: Path, target: Path) -> None:
        assert os.stat(source).st_ino in synced
        if Path(target) == kept.path:
            named = json.loads(Path(source).read_text())["edits"]
            assert kept.values.stat().st_ino in synced or len(named) == 4
        synced.discard(Path(target).parent.stat().st_ino)
        written.append(Path(target).name)
        real_replace(source, target)

    def unlink(path: Any, **options: Any) -> None:
        if Path(path).parent == kept.values and Path(path).exists():
            assert kept.path.parent.stat().st_ino in synced
            assert struck.id not in kept.path.read_text()
            written.append(f"-{Path(path).name}")
        real_unlink(path, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", moved)
    monkeypatch.setattr(os, "unlink", unlink)
    name = f"{struck.id}.safetensors"
    rest = kept.remove([struck.id])
    assert written == [kept.path.name, f"-{name}"]
    written.clear()
    synced.clear()
    assert rest.join({struck.edit: value}) == kept
    assert written == [name, kept.path.name]


@pytest.mark.parametrize("what", ["missing", "odd"])
def test_clean_up_does_not_fail_what_is_done(kept: Ledger, what: str) -> None:
    if what == "missing":
        shutil.rmtree(kept.values)
    else:
        (kept.values / "folder").mkdir()
    kept.remove([kept.entries[0].id])


def test_a_ledger_that_vanished_meanwhile(kept: Ledger) -> None:
    kept.path.unlink()
    with pytest.raises(LedgerError, match="meanwhile"):
        kept.remove([kept.entries[0].id])


def test_values_of_something_else_are_not_joined(kept: Ledger) -> None:
    with pytest.raises(LedgerError):
        kept.join({Edit("{} eats", "Bo Diaz", "Oslo"): b"anything"})


# The checkpoint


def test_rebuild_goes_through_patch(tiny: Tiny, base: Path, tmp_path: Path) -> None:
    pristine = disk(base)
    ledger = add(tiny, begin(tiny, tmp_path / "l"), EDITS)
    update = solve(tiny, ledger)
    out = tmp_path / "out"
    patched = rebuild(ledger, update, base, out)
    assert patched is not None and patched.report.rounding == "nearest"
    assert verify(out, base).ok
    reference = patch(base, update, tmp_path / "reference").path
    assert disk(out) == disk(reference)
    (record,) = history(out)
    assert record.metadata["ledger"] == ledger.digest
    linked = tmp_path / "linked"
    rebuild(ledger, update, base, linked, unchanged="hardlink")
    same = [path.name for path in base.iterdir() if path.samefile(linked / path.name)]
    shards = {path.name for path in base.glob("*.safetensors")}
    assert same and {*same} < shards
    # Again into the same folder: what was there is taken back first.
    fewer = ledger.remove([ledger.entries[0].id])
    for folder in (out, linked):
        rebuild(fewer, solve(tiny, fewer), base, folder)
        assert len(history(folder)) == 1 and verify(folder, base).ok
        assert history(folder)[0].metadata["ledger"] == fewer.digest
    # Emptied, the base's bytes come back.
    none = fewer.remove([entry.id for entry in fewer.entries])
    assert none.entries == () and list(none.values.iterdir()) == []
    with pytest.raises(LedgerError, match="holds no edits; its checkpoint is the base"):
        rebuild(none, None, base, tmp_path / "new")
    assert rebuild(none, None, base, out) is None
    assert disk(out) == pristine == disk(base)


def test_rebuild_leaves_what_no_ledger_made(
    tiny: Tiny, base: Path, tmp_path: Path
) -> None:
    ledger = add(tiny, begin(tiny, tmp_path / "l"), EDITS[:2])
    update = solve(tiny, ledger)
    plain = UpdateSet(
        update.updates, {k: v for k, v in update.metadata.items() if k != "ledger"}
    )
    by_hand = patch(base, plain, tmp_path / "by-hand").path
    on_top = tmp_path / "on-top"
    rebuild(ledger, update, base, on_top)
    more = edit(
        load_plain(on_top, tiny), tiny.tokenizer, EDITS[4:], SINGLE, loose(tiny, on_top)
    ).update
    patch(on_top, more)
    stranger = tmp_path / "stranger"
    rebuild(ledger, update, base, stranger)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text("somebody's\n")
    before = disk(tmp_path)
    for target, of in (
        (base, ledger),
        (by_hand, ledger),
        (on_top, ledger),
        (stranger, replace(ledger, base_fingerprint="0")),
        (tmp_path / "other", ledger),
    ):
        for its in (update, None):
            with pytest.raises(LedgerError, match="no checkpoint that a ledger of"):
                rebuild(of, its, base, target)
    for target, message in (
        (tmp_path / "l", "exists already"),
        (base / "inside", "lies inside the base"),
    ):
        with pytest.raises(CheckpointError, match=message):
            rebuild(ledger, update, base, target)
    assert disk(tmp_path) == before


def load_plain(folder: Path, tiny: Tiny) -> Any:
    return type(tiny.model).from_pretrained(folder).eval()


def loose(tiny: Tiny, folder: Path) -> dict[int, KeyStatistics]:
    """Statistics of the model in a folder."""
    model = load_plain(folder, tiny)
    return collect(
        model, tiny.tokenizer, TEXTS, [1], tokens=2000, window=32, progress=False
    )


def test_rebuild_again_after_one_that_failed(
    gpt2: Tiny, kept: Ledger, tmp_path: Path
) -> None:
    gpt2.model.save_pretrained(tmp_path / "base")
    update, out = solve(gpt2, kept), tmp_path / "out"
    rebuild(kept, update, tmp_path / "base", out)
    with pytest.raises(Exception, match="half precision"):  # float32 has no use for it
        rebuild(kept, update, tmp_path / "base", out, rounding="keys")
    rebuild(kept, update, tmp_path / "base", out)


def test_rebuild_twice_from_a_base_with_updates_of_its_own(
    tiny: Tiny, base: Path, tmp_path: Path
) -> None:
    first = edit(tiny.model, tiny.tokenizer, EDITS[:1], SINGLE, tiny.statistics).update
    edited = patch(base, first, tmp_path / "edited").path
    model, statistics = load_plain(edited, tiny), loose(tiny, edited)
    ours = replace(tiny, model=model, statistics=statistics)
    ledger = add(ours, begin(ours, tmp_path / "l", SINGLE), EDITS[1:3])
    out = tmp_path / "out"
    for _ in range(2):
        rebuild(ledger, solve(ours, ledger), edited, out)
    assert len(history(out)) == 2


def test_half_precision_and_rounding_towards_keys(gpt2: Tiny, tmp_path: Path) -> None:
    model = make_model("gpt2", len(gpt2.tokenizer)).to(torch.bfloat16)
    base = tmp_path / "base"
    model.save_pretrained(base)
    statistics = collect(
        model, gpt2.tokenizer, TEXTS, [0, 1], tokens=2000, window=32, progress=False
    )
    half = replace(gpt2, model=model, statistics=statistics)
    ledger = begin(half, tmp_path / "l", dtype="bfloat16")
    ledger = Ledger.read(add(half, ledger, EDITS).path)
    assert ledger.dtype == "bfloat16"
    update = solve(half, ledger)
    plain = rebuild(ledger, update, base, tmp_path / "nearest")
    towards = rebuild(ledger, update, base, tmp_path / "keys", rounding="keys")
    assert plain is not None and towards is not None
    assert (plain.report.rounding, towards.report.rounding) == ("nearest", "keys")
    assert plain.report.result_fingerprint != towards.report.result_fingerprint
    # In place the option is passed on as well.
    rebuild(ledger, update, base, tmp_path / "nearest", rounding="keys")
    assert files_of(tmp_path / "nearest") == files_of(tmp_path / "keys")


# Recipes as data


def every_recipe() -> Iterator[Recipe]:
    for name in RECIPES:
        yield recipe(name, layers=[1])
        for preset, data in PRESETS.items():
            if ("rome" if "rome" in name else name) in data.settings:
                yield recipe(name, preset)
    yield recipe(
        "emmet",
        layers=[0, 3],
        most_probable_stop=2,
        kl_prompts=("{} is", "I see {}"),
        kl_position="end",
        ridge=0.1,
        learning_rate=1 / 3,
    )


def test_recipes_come_back_from_json() -> None:
    count = 0
    for each in every_recipe():
        data = as_json(each.as_dict())
        assert Recipe.from_dict(data) == each
        assert Recipe.from_dict(each.as_dict()) == each
        assert hash(Recipe.from_dict(data)) == hash(each)
        count += 1
    assert count > len(RECIPES) * 3


NOT_RECIPES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda d: d.clear(), "'contexts'"),
    (lambda d: d.pop("name"), "name"),
    (lambda d: d.update(rank=3), "rank"),
    (lambda d: d.update(layers=[2, 1]), "ascending"),
    (lambda d: d.update(layers=3), "not the data of a recipe"),
    (lambda d: d.update(preservation_weight="1"), "not the data of a recipe"),
    (lambda d: d.update(preservation_weight=float("nan")), "must be positive"),
    (lambda d: d.update(targets=None), "not the data of a recipe"),
    (lambda d: d["targets"].update(site="attention"), "site must be one of"),
    (lambda d: d["targets"].update(kl_prompts=["none"]), "one slot"),
    (lambda d: d["targets"].update(steps=None), "not the data of a recipe"),
    (lambda d: d["targets"].update(stepz=1), "stepz"),
    (lambda d: d["contexts"].update(top_k=0), "top_k"),
    (lambda d: d["contexts"].pop("samples"), "'samples'"),
    (lambda d: d["contexts"].update(samples=["The"]), "not the data of a recipe"),
]


@pytest.mark.parametrize(("change", "message"), NOT_RECIPES)
def test_other_data_makes_no_recipe(
    change: Callable[[dict[str, Any]], object], message: str
) -> None:
    data = as_json(MULTI.as_dict())
    change(data)
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(data)


# The commands


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.fixture
def place(original: Workplace, tmp_path: Path) -> Workplace:
    shutil.copytree(original.path, tmp_path / "work")
    place = Workplace(tmp_path / "work")
    write_edits(place.edits, [each.as_dict() for each in EDITS[:2]])
    return place


def beginning(place: Workplace) -> list[Any]:
    options = ["--model", place.model, "--recipe", "memit", "--layers", "0-1"]
    options += ["--statistics", place.statistics, "--set", "steps=4"]
    return [*options, "--set", "preservation_weight=1", "--seed", 7]


def test_the_commands(place: Workplace) -> None:
    path, out, file = (place.path / name for name in ("facts", "out", "u.safetensors"))
    pristine = disk(place.model)
    made = answer("ledger", "add", path, place.edits, *beginning(place))
    assert made["edits"] == 2 and len(made["added"]) == 2
    assert {each["subject"] for each in made["added"]} == {"Ada Lovelace", "Bo Diaz"}
    found = Ledger.read(path)
    assert (found.base, found.seed, found.shrinkage) == (str(place.model), 7, "none")
    assert found.recipe.targets.steps == 4 and found.recipe.layers == (0, 1)
    write_edits(place.edits, [each.as_dict() for each in EDITS[2:4]])
    result = run("ledger", "add", path, place.edits)
    assert result.exit_code == 0
    assert result.stdout == f"{path}: 2 edits added, 4 in all\n"

    listed = answer("ledger", "list", path)
    assert listed == as_json(Ledger.read(path).as_dict())
    struck = next(e for e in listed["edits"] if e["subject"] == "Bo Diaz")["id"]
    lines = run("ledger", "list", path).stdout.splitlines()
    assert f"{struck}  The town of Bo Diaz is called → Cairo" in lines
    assert lines[-1] == f"{path}: 4 edits of {place.model} by memit" and len(lines) == 5

    built = answer("ledger", "rebuild", path, "--out", out, "--update", file)
    assert built["edits"] == 4 and built["folder"] == str(out)
    assert built["patch"]["number"] == 1 and len(built["report"]["outcomes"]) == 4
    saved = file.read_bytes()
    assert answer("verify", out, "--base", place.model)["ok"]
    assert answer("show", out)["updates"][0]["metadata"]["ledger"] == (
        Ledger.read(path).digest
    )
    assert disk(place.model) == pristine

    gone = answer("ledger", "remove", path, struck[:8])
    assert gone["edits"] == 3 and [e["id"] for e in gone["removed"]] == [struck]
    before = disk(out)
    result = run("ledger", "rebuild", path, "--out", out, "--update", file, "--force")
    assert result.exit_code == 0 and f"wrote {file}" in result.stdout
    assert f"{out}: the base with 3 edits\n" in result.stdout
    assert disk(out) != before and file.read_bytes() != saved
    # A new folder, elsewhere, with the base and the statistics elsewhere too.
    moved, numbers = place.path / "moved", place.path / "numbers"
    place.model.rename(moved)
    place.statistics.rename(numbers)
    new = place.path / "new"
    elsewhere = ["ledger", "rebuild", path, "--out", new]
    assert "neither a folder" in refusal(place.path, *elsewhere)
    elsewhere += ["--base", moved, "--unchanged", "hardlink"]
    assert "no such folder of statistics" in refusal(place.path, *elsewhere)
    built = answer(*elsewhere, "--statistics", numbers)
    assert "second name" in built["patch"]["notes"][0]
    assert files_of(new) == files_of(out)
    write_edits(place.edits, [EDITS[4].as_dict()])
    assert answer("ledger", "add", path, place.edits, "--base", moved)["edits"] == 4

    ids = [each["id"] for each in answer("ledger", "list", path)["edits"]]
    result = run("ledger", "remove", path, *ids)
    assert result.exit_code == 0 and f"{path}: 0 edits left" in result.stdout
    assert result.stdout.count("removed ") == 4
    emptied = answer("ledger", "rebuild", path, "--out", out, "--base", moved)
    assert emptied["patch"] is None and "report" not in emptied
    assert disk(out) == pristine


def test_refusals_of_the_commands(place: Workplace) -> None:
    path, out = place.path / "facts", place.path / "out"
    start = beginning(place)
    wrong = write_edits(place.path / "wrong.jsonl", [EDITS[0].as_dict()] * 2)
    for arguments, message in (
        (["add", path, place.edits], "no such ledger; to begin one give --model"),
        (["add", path, wrong, *start], "edit 1 repeats edit 0"),
        (["add", path, place.edits, *start, "--dtype", "float8"], "expected one of"),
        (["add", path, place.edits, *start, "--layers", "7"], "of layer 7"),
        (["add", path, "none.jsonl", *start], "none.jsonl: cannot be read"),
        (["list", path], "cannot be read"),
        (["remove", path, "abc"], "`ledger add` makes one"),
        (["rebuild", path, "--out", out], "cannot be read"),
        (["list", place.edits], "not a ledger"),
    ):
        assert message in refusal(place.path, "ledger", *arguments)
    answer("ledger", "add", path, place.edits, *start)
    other = write_edits(place.path / "other.jsonl", [EDITS[2].as_dict()])
    id_ = Ledger.read(path).entries[0].id
    new = ["rebuild", path, "--out", out]
    for arguments, message in (
        (["add", path, other, *start], "exists, with a model, recipe and statistics"),
        (["add", path, place.edits], "repeats"),
        (["add", path, other, "--base", place.statistics], "config.json"),
        (["remove", path, "zz"], "'zz' names no edit; `ledger list` shows ids"),
        (["remove", path, id_, ""], "'' names no edit"),
        (["rebuild", path], "where to?"),
        (["rebuild", path, "--update", place.edits], "exists already"),
        (["rebuild", path, "--out", place.model], "no checkpoint that a ledger of"),
        (["rebuild", path, "--out", path], "exists already"),
        ([*new, "--unchanged", "move"], "none of copy, hardlink, reflink"),
        ([*new, "--rounding", "up"], "'up' is none of"),
        ([*new, "--rounding", "keys"], "half precision"),
        ([*new, "--device", "abacus"], "device 'abacus'"),
        ([*new, "--statistics", "none"], "no such folder of statistics"),
    ):
        assert message in refusal(place.path, "ledger", *arguments)
    make_model("gpt2", 360, seed=8).save_pretrained(place.model, max_shard_size=20_000)
    assert "is of the model" in refusal(place.path, "ledger", "add", path, other)
    run("ledger", "remove", path, *(e.id for e in Ledger.read(path).entries))
    for option in ("--out", "--update"):
        message = refusal(place.path, "ledger", "rebuild", path, option, out)
        assert "holds no edits" in message


def test_a_ledger_that_cannot_be_written_is_refused_at_once(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "optimize_targets", forbid)
    path = place.path / "nowhere" / "facts"
    assert "nowhere" in refusal(
        place.path, "ledger", "add", path, place.edits, *beginning(place)
    )


def test_options_that_begin_a_ledger_are_not_ignored(place: Workplace) -> None:
    path = place.path / "facts"
    answer("ledger", "add", path, place.edits, *beginning(place))
    other = write_edits(place.path / "other.jsonl", [EDITS[2].as_dict()])
    for option in (("--seed", 3), ("--dtype", "bfloat16"), ("--shrinkage", "oas")):
        message = refusal(place.path, "ledger", "add", path, other, *option)
        assert "leave those options out" in message


# Facts that a model knows


def test_the_embedded_world(tmp_path: Path) -> None:
    """New facts are said by the rebuilt checkpoint; a fact struck out is the old one
    again, and the others stay new."""
    world = World.load(TINYWORLD / "data")
    base = TINYWORLD / "gpt2"
    model, tokenizer = load(base)
    statistics = collect(
        model, tokenizer, world.corpus, [0], tokens=3000, window=64, progress=False
    )
    records = world.records[:8]
    ledger = Ledger.create(
        tmp_path / "facts.json",
        model,
        tokenizer,
        recipe("emmet", "tinyworld-gpt2"),
        statistics,
        base=str(base),
        statistics_folder="none",
    ).add(model, tokenizer, [record.edit for record in records])
    out = tmp_path / "edited"

    def said() -> list[str]:
        found = ledger.solve(model, tokenizer, statistics)
        rebuild(ledger, found.update, base, out)
        texts = [record.edit.text for record in records]
        again, _ = load(out)
        said = generate(ModelAdapter.of(again), tokenizer, texts, 4)
        return [text.strip() for text in said]

    new = [record.edit.target for record in records]
    assert all(map(str.startswith, said(), new))
    struck = 3
    (entry,) = [e for e in ledger.entries if e.edit == records[struck].edit]
    ledger = ledger.remove([entry.id])
    wanted = [*new[:struck], records[struck].target_true, *new[struck + 1 :]]
    assert wanted[struck] != new[struck]
    assert all(map(str.startswith, said(), wanted))
