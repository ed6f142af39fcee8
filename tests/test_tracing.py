"""Causal tracing: every family equals the definition's loop, facts are counted, nothing
runs twice, and roles are told by the genuine tokenizers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, FEW, VARIANTS, Family
from model_kit import DATA, EDITS, make_tokenizer
from test_target_families import keep_softmax_wide
from test_wrapped import WRAPPED
from tokenizer_kit import Pieces
from torch import Tensor

from benchmarks.plain_tracing import plain_trace
from unified_edit.edits import Edit
from unified_edit.errors import EditError, NonFiniteError, PromptError, RecipeError
from unified_edit.facts import read_facts
from unified_edit.model import tracing
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.frames import Frame
from unified_edit.model.restoring import noise_of, window_at
from unified_edit.model.scoring import generate
from unified_edit.model.tracing import (
    KINDS,
    ROLES,
    Trace,
    TraceSettings,
    roles_of,
    trace,
)

ALONE = {**FAMILIES, **VARIANTS}
ALL = {**ALONE, **WRAPPED}
SETTINGS = TraceSettings(samples=2, window=2)


def spans_of(tokenizer: Any, fact: Edit) -> tuple[list[int], range, list[int]]:
    """Ids of a prompt, where its subject is, and ids of its answer, each by its own
    way: which prefixes of the text end before and after the subject."""
    whole = tokenizer(fact.text, return_offsets_mapping=True)
    begin = fact.text.index(fact.subject)
    end = begin + len(fact.subject)
    inside = [
        index
        for index, (start, stop) in enumerate(whole["offset_mapping"])
        if start < end and stop > begin
    ]
    both = tokenizer(f"{fact.text} {fact.target}")["input_ids"]
    ids = whole["input_ids"]
    return ids, range(inside[0], inside[-1] + 1), both[len(ids) :]


def plain(
    adapter: ModelAdapter,
    tokenizer: Any,
    fact: Edit,
    settings: TraceSettings,
    deviation: float,
    tokens: list[int] | None = None,
) -> tuple[float, float, dict[Any, Tensor]]:
    """The definition's loop over one fact, with the noise that `trace` draws."""
    model: Any = adapter.model
    ids, subject, answer = spans_of(tokenizer, fact)
    whole = [*ids, *answer[:-1]]
    (row,) = tracing.rows_of(tokenizer, [fact], tracing.PLAIN)
    size = model.get_input_embeddings()(torch.tensor([0])).shape[-1]
    noise = noise_of(
        row, settings.samples, settings.noise * deviation, settings.seed, size
    )
    inside = [index in subject for index in range(len(whole))]
    assert ((noise[1:].abs().amin((0, 2)) > 0) == torch.tensor(inside)).all()
    record = adapter.architecture
    layers = range(adapter.layer_count)
    names = {
        "hidden": record.block,
        "mlp": record.down_projection,
        "attention": f"{record.block}.{record.attention}",
    }
    modules: Any = {
        kind: [model.get_submodule(name.format(layer)) for layer in layers]
        for kind, name in names.items()
        if kind in settings.kinds
    }
    window = settings.window_of(len(layers))
    return plain_trace(model, whole, len(ids), answer, noise, modules, window, tokens)


def assert_equal(
    found: Trace, expected: tuple[float, float, dict[Any, Tensor]], tolerance: float
) -> None:
    """Relative to how much restoring moves the answer's probability."""
    clean, corrupted, restored = expected
    reference = torch.cat(list(restored.values()))
    size = float((reference - corrupted)[~reference.isnan()].abs().max())
    assert size > 0.01 * clean
    assert abs(found.clean - clean) < tolerance * size
    assert abs(found.corrupted - corrupted) < tolerance * size
    for kind, table in restored.items():
        asked = ~table.isnan()
        difference = (found.restored[kind] - table)[asked]
        assert float(difference.abs().max()) < tolerance * size, kind


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer("llama")


@pytest.mark.parametrize("name", ALL)
def test_a_family_equals_the_definition(
    name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, an answer of several tokens, windows of two layers. Short after the
    subject: few layers with windows reach no further."""
    family: Family = ALL[name]
    adapter = ModelAdapter.of(family.make(layers=FEW))
    keep_softmax_wide(monkeypatch)
    fact = Edit("The town of {} is", "Bo Diaz", "New York")
    found = trace(adapter.model, tokenizer, [fact], SETTINGS, known_only=False)
    (mine,) = found.traces
    last, count = mine.subject[-1], len(mine.tokens)
    tokens = [mine.subject[0], last, count - 1]
    expected = plain(adapter, tokenizer, fact, SETTINGS, found.deviation, tokens)
    assert_equal(mine, expected, max(family.tolerance, 1e-6) * 10)
    for kind in KINDS:
        assert float(mine.indirect_effect(kind)[last].abs().max()) > 0


@pytest.mark.parametrize("name", ALONE)
def test_positions_meet_in_the_attention_only(name: str, tokenizer: Any) -> None:
    """Without what the record calls the attention's output, a block returns the same
    at a position, whatever stands before it."""
    adapter = ModelAdapter.of(ALL[name].make(layers=1))
    ids = torch.tensor([[5, 9, 14, 20, 26], [30, 31, 32, 20, 26]])
    seen: list[Tensor] = []

    def look(_: Any, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    def nothing(_: Any, __: Any, output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    with torch.no_grad(), adapter.block(0).register_forward_hook(look):
        adapter.model(input_ids=ids)
        with adapter.attention(0).register_forward_hook(nothing):
            adapter.model(input_ids=ids)
    with_it, without = seen
    assert float((with_it[0, 3:] - with_it[1, 3:]).abs().max()) > 1e-3
    assert float((without[0, 3:] - without[1, 3:]).abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("window", "kinds"),
    [
        (None, ("hidden", "mlp")),
        (3, ("attention", "hidden")),
        (9, ("mlp", "attention")),
    ],
)
def test_windows_and_kinds(tiny: Any, window: int | None, kinds: Any) -> None:
    """Each kind asked for, windows beyond the model's ends. Every token of the first
    fact, and the subject's last of the others."""
    settings = TraceSettings(samples=3, window=window, kinds=kinds, seed=4)
    facts = [EDITS[0], EDITS[2], EDITS[3]]
    found = trace(tiny.model, tiny.tokenizer, facts, settings, known_only=False)
    assert [each.fact for each in found.traces] == facts
    for number, each in enumerate(found.traces):
        assert set(each.restored) == set(kinds)
        tokens = [each.subject[-1]] if number else None
        expected = plain(
            *(tiny.adapter, tiny.tokenizer, each.fact, settings, found.deviation),
            tokens,
        )
        assert_equal(each, expected, 1e-3)


def test_what_is_not_corrupted_is_not_restored(tiny: Any) -> None:
    """By causality: before the subject nothing was lost. Restoring all that the answer
    is read from brings all of it back."""
    (fact,) = (each for each in EDITS if each.prompt.startswith("The town"))
    one = Edit(fact.prompt, fact.subject, "Cairo")
    (found,) = trace(
        tiny.model, tiny.tokenizer, [one], SETTINGS, known_only=False
    ).traces
    for kind in KINDS:
        before = found.indirect_effect(kind)[: found.subject.start]
        assert torch.equal(before, torch.zeros_like(before))
    _, _, answer = spans_of(tiny.tokenizer, one)
    if len(answer) == 1:
        whole = float(found.restored["hidden"][-1, -1])
        assert whole == pytest.approx(found.clean, rel=1e-5)
    assert found.total_effect == found.clean - found.corrupted


def test_facts_that_the_model_does_not_know_are_counted(tiny: Any) -> None:
    said = generate(tiny.adapter, tiny.tokenizer, [each.text for each in EDITS], 1)
    facts = []
    for edit, text in zip(EDITS, said, strict=True):
        word = text.strip()
        if word:
            facts += [Edit(edit.prompt, edit.subject, word), edit]
    settings = TraceSettings(samples=1, kinds=("hidden",))
    found = trace(tiny.model, tiny.tokenizer, facts, settings)
    everything = trace(tiny.model, tiny.tokenizer, facts, settings, known_only=False)
    assert found.unknown == everything.unknown
    assert 0 < len(found.traces) < len(facts) == len(everything.traces)
    known = [i for i in range(len(facts)) if i not in found.unknown]
    assert [each.fact for each in found.traces] == [facts[i] for i in known]
    for index, each in zip(known, found.traces, strict=True):
        other = everything.traces[index]
        assert each.clean == other.clean
        assert torch.equal(each.restored["hidden"], other.restored["hidden"])


def test_the_noise_is_a_facts_own(tiny: Any) -> None:
    """The same alone and among others, whose size alone they share; another seed or
    prompt draws another."""
    rows = tracing.rows_of(tiny.tokenizer, EDITS, tracing.PLAIN)
    noise = [noise_of(row, 2, 1.5, 5, 8) for row in rows]
    assert torch.equal(noise[2], noise_of(rows[2], 2, 1.5, 5, 8))
    assert not torch.equal(noise[2], noise_of(rows[2], 2, 1.5, 6, 8))
    drawn = torch.cat([each[1:][each[1:] != 0] for each in noise])
    assert float(drawn.std()) == pytest.approx(1.5, rel=0.1)
    assert float(drawn.mean()) == pytest.approx(0, abs=0.15)
    assert len(drawn.unique()) == len(drawn)


def test_deviation_is_of_the_subjects_embeddings(tiny: Any) -> None:
    found = trace(tiny.model, tiny.tokenizer, EDITS, SETTINGS)
    table = tiny.model.get_input_embeddings().weight
    rows = []
    for each in EDITS:
        ids, subject, _ = spans_of(tiny.tokenizer, each)
        rows += [table[ids[index]].detach() for index in subject]
    expected = float(torch.stack(rows).double().std(correction=0))
    assert found.deviation == pytest.approx(expected, rel=1e-6)


def test_nothing_runs_twice(gpt2: Any) -> None:
    """Positions that each block runs over: all once; each restored layer's own block
    from the subject on, for both of its parts; and what is above it, from each group's
    first token on. Blocks below a restored state never run again."""
    adapter, samples = gpt2.adapter, 3
    settings = TraceSettings(samples=samples, window=1)
    (fact,) = (each for each in EDITS if each.prompt.startswith("The town"))
    ids, subject, answer = spans_of(gpt2.tokenizer, fact)
    whole = len(ids) + len(answer) - 1
    ran: Counter[int] = Counter()

    def count(layer: int) -> Callable[..., None]:
        def hook(_: Any, inputs: Any) -> None:
            ran[layer] += inputs[0].shape[0] * inputs[0].shape[1]

        return hook

    layers = adapter.layer_count
    score = [len(ids) + len(answer) - 1]
    handles = [
        # Not the block: one that returns at once has its hooks called, too.
        adapter.block(layer).ln_1.register_forward_pre_hook(count(layer))
        for layer in range(layers)
    ]
    try:
        trace(adapter.model, gpt2.tokenizer, [fact], settings, known_only=False)
    finally:
        for handle in handles:
            handle.remove()
    tail = whole - subject.start
    most = samples * sum(whole - t for t in range(subject.start, len(ids)))
    padded = samples * (len(ids) - subject.start) * tail
    for layer in range(layers):
        once = score[0] + (1 + samples) * whole + 2 * samples * tail
        above = 3 * layer  # states below it: three kinds, one window each
        assert once + above * most <= ran[layer] <= once + above * padded


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise": 0.0}, "positive"),
        ({"noise": float("inf")}, "positive"),
        ({"noise": float("nan")}, "positive"),
        ({"samples": 0}, "at least 1"),
        ({"window": 0}, "at least one layer"),
        ({"kinds": ()}, "none"),
        ({"kinds": ("hidden", "head")}, "head"),
    ],
)
def test_bad_settings_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        TraceSettings(**settings)


def test_bad_facts_are_refused(gpt2: Any) -> None:
    with pytest.raises(EditError, match="no facts"):
        trace(gpt2.model, gpt2.tokenizer, [])
    long = Edit("{}" + " and so on" * 60, "Ada Lovelace", "Lyon")
    with pytest.raises(PromptError, match="positions"):
        trace(gpt2.model, gpt2.tokenizer, [long])


def test_a_damaged_model_is_refused(gpt2: Any) -> None:
    import copy

    model = copy.deepcopy(gpt2.model)
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="attn.c_proj"):
        trace(model, gpt2.tokenizer, EDITS[:1], SETTINGS)


def test_in_a_frame(gpt2: Any) -> None:
    """What stands around a prompt is before the subject, or further tokens."""
    frame = Frame("Q. ", " What", " ")
    (found,) = trace(
        gpt2.model, gpt2.tokenizer, EDITS[:1], SETTINGS, frame=frame, known_only=False
    ).traces
    text = "".join(found.tokens)
    assert text == frame.around(EDITS[0].text)
    subject = "".join(found.tokens[i] for i in found.subject)
    assert subject.strip() == EDITS[0].subject


def test_windows() -> None:
    assert [window_at(0, 1, 5), window_at(4, 1, 5)] == [range(1), range(4, 5)]
    assert window_at(20, 10, 48) == range(15, 25)
    assert window_at(0, 10, 48) == range(5) and window_at(47, 10, 48) == range(42, 48)
    assert window_at(3, 3, 5) == range(2, 5)
    assert TraceSettings().window_of(48) == 10
    assert TraceSettings().window_of(3) == 1
    assert TraceSettings(window=4).window_of(48) == 4


def test_roles() -> None:
    first, middle, last, after, further, end = ROLES
    assert roles_of(range(2, 6), 10) == (
        *(None, None, first, middle, middle, last, after, further, further, end),
    )
    assert roles_of(range(1), 3) == (last, after, end)
    assert roles_of(range(2), 3) == (first, last, end)
    assert roles_of(range(1, 3), 3) == (None, first, last)


def write(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def test_forms_of_facts(tmp_path: Path) -> None:
    wanted = Edit("{} lives in", "Ada Lovelace", "Lyon")
    own = {"prompt": "{} lives in", "subject": "Ada Lovelace"}
    record = {**own, "target_new": {"str": "Oslo"}, "target_true": {"str": "Lyon"}}
    entries = [
        {**own, "answer": "Lyon"},
        {**own, "attribute": " Lyon", "template": "{} lives"},
        {**own, "target_new": "Oslo", "ground_truth": "Lyon"},
        {"requested_rewrite": record},
    ]
    assert read_facts(write(tmp_path / "facts.json", entries)) == [wanted] * 4
    lines = tmp_path / "facts.jsonl"
    lines.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    assert read_facts(lines) == [wanted] * 4


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"prompt": "{} is", "subject": "A", "target": "B"}, "no answer"),
        ({"prompt": "{} is", "answer": "B"}, "entry 0: lacks .* 'subject'"),
        ({"prompt": "{} is", "subject": "A", "answer": 3}, "are texts"),
        ({"prompt": "B is", "subject": "A", "answer": "C"}, "not in the prompt"),
    ],
)
def test_bad_files_of_facts(tmp_path: Path, entry: Any, message: str) -> None:
    path = write(tmp_path / "facts.json", [entry])
    with pytest.raises(EditError, match=message) as caught:
        read_facts(path)
    assert str(path) in str(caught.value)


def test_an_empty_file_of_facts(tmp_path: Path) -> None:
    with pytest.raises(EditError, match="no facts"):
        read_facts(write(tmp_path / "facts.json", []))


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data sets in {DATA}")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "phi3-mini", "mistral-7b-v0.3"])
def test_known_facts_with_genuine_tokenizers(
    name: str, tell: Callable[[str], None]
) -> None:
    """Of all 1,209 facts of ROME's study: the subject's tokens cover its bytes and no
    token fewer would; every token from the subject on has one role."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DATA / "tokenizers" / name)
    facts = read_facts(DATA / "known_1000.json")
    raw = json.loads((DATA / "known_1000.json").read_bytes())
    assert len(facts) == len(raw) == 1209
    pieces = Pieces(tokenizer)
    counts: Counter[str] = Counter()
    rows = tracing.rows_of(tokenizer, facts, tracing.PLAIN)
    for entry, fact, row in zip(raw, facts, rows, strict=True):
        assert fact.text == entry["prompt"] and fact.target == entry["attribute"]
        ids, subject = row.ids[: row.prompt], row.subject
        assert list(ids) == tokenizer(fact.text)["input_ids"]
        end = fact.text.index(fact.subject) + len(fact.subject)
        assert subject[-1] == pieces.index(list(ids), fact.text, end)
        held = pieces.joined(ids[subject.start : subject.stop]).decode().strip()
        assert held.startswith(fact.subject), (held, fact)
        rest = pieces.joined(ids[subject.start + 1 : subject.stop]).decode()
        assert not rest.strip().startswith(fact.subject)
        assert pieces.joined(row.answer).decode() == f" {fact.target}"
        roles = roles_of(subject, row.prompt)
        assert roles[: subject.start] == (None,) * subject.start
        assert None not in roles[subject.start :]
        assert roles.count("last subject token") == 1
        assert roles.count("first subject token") == (len(subject) > 1)
        assert (roles[-1] == "last token") == (subject.stop < row.prompt)
        counts.update(role for role in roles if role)
    told = ", ".join(f"{counts[role]} {role}" for role in ROLES)
    tell(f"{name}: {len(facts)} known facts: {told}")
