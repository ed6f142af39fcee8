"""Rows: prompts cut at the subject's last token, and how they are put together; the
targets are those of the plain loop, however they are."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from model_kit import (
    CONTEXTS,
    DATA,
    EDITS,
    Tiny,
    make_tokenizer,
    rows_of,
    subject_index,
    target_ids,
)
from test_targets import SETTINGS, assert_equal_plain, optimized, plain_targets

from unified_edit.edits import Edit, read_edits
from unified_edit.model import partial
from unified_edit.model.prompts import Contexts
from unified_edit.model.rows import Row, by_width, chunks_of, heads_of, make_rows

BARE = Edit("{} lives in", "A", "Oslo")
"""Its subject is the first token where the tokenizer puts none before it."""
STAY = ("{} is a", "Some say that {} was")


def sized(sizes: Sequence[int]) -> list[list[Row]]:
    """Edits of so many suffix tokens, each in one row and the rest in another."""
    return [
        [
            Row(edit, (), tuple(range(1)), (5,), 0, 0.5),
            *([Row(edit, (), tuple(range(size - 1)), (5,), 0, 0.5)] * (size > 1)),
        ]
        for edit, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("seed", range(40))
def test_chunks_hold_each_edit_once_within_the_budget(seed: int) -> None:
    choose = random.Random(seed)
    largest = choose.choice([1, 5, 60])
    sizes = [choose.randint(1, largest) for _ in range(choose.randint(1, 150))]
    total = sum(sizes)
    for budget in (1, largest, 7 * largest, total - 1, total, total + 1):
        chunks = chunks_of(sized(sizes), max(budget, 1))
        assert [index for chunk in chunks for index in chunk] == [*range(len(sizes))]
        held = [sum(sizes[index] for index in chunk) for chunk in chunks]
        for chunk, size in zip(chunks, held, strict=True):
            assert len(chunk) == 1 or size <= budget
        if budget >= total:
            assert len(chunks) == 1
        # About equal: none but the last, which takes what is left, is smaller than
        # the mean of as few parts as there can be, by more than an edit; none larger
        # by more than half an edit.
        fewest = -(-total // max(budget, 1))
        assert len(chunks) >= fewest or largest > budget
        mean = -(-total // fewest)
        assert all(size > mean - largest for size in held[:-1])
        assert all(
            len(chunk) == 1 or 2 * size <= 2 * mean + largest
            for chunk, size in zip(chunks, held, strict=True)
        )


@pytest.mark.parametrize(
    ("sizes", "budget", "expected"),
    [
        ([], 10, []),
        ([3], 1, [1]),
        ([3, 3, 3], 1, [1, 1, 1]),
        ([10] * 100, 255, [25] * 4),  # not 25, 25, 25, 25 by luck: 30 would fit 300
        ([10] * 100, 999, [50, 50]),  # not 99 and 1
        ([10] * 7, 40, [4, 3]),
        ([1, 1, 50, 1, 1], 10, [2, 1, 2]),
        ([4, 1, 1, 1, 1], 4, [1, 4]),
    ],
)
def test_chunks_are_few_and_of_one_size(
    sizes: list[int], budget: int, expected: list[int]
) -> None:
    assert [len(chunk) for chunk in chunks_of(sized(sizes), budget)] == expected


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """All ways to put items into groups."""
    if not items:
        yield []
        return
    first, *rest = items
    for groups in partitions(rest):
        yield [[first], *groups]
        for index, group in enumerate(groups):
            yield [*groups[:index], [first, *group], *groups[index + 1 :]]


def price(groups: list[list[int]], widths: Sequence[int], cost: int) -> int:
    return sum(
        len(group) * max(widths[i] for i in group) + cost for group in groups if group
    )


@pytest.mark.parametrize("cost", [0, 1, 3, 10, 1000])
def test_groups_of_like_width_are_the_cheapest(cost: int) -> None:
    choose = random.Random(cost)
    several = 0
    for count in [1, 2, 3, 4, 5, 6, 6, 6, 6]:
        widths = [choose.choice([1, 2, 3, 5, 9, 20]) for _ in range(count)]
        groups = by_width(widths, cost)
        least = min(price(p, widths, cost) for p in partitions([*range(count)]))
        assert price(groups, widths, cost) == least, widths
        several += 1 < len(groups) < count
        assert sorted(i for group in groups for i in group) == [*range(count)]
        assert all(group == sorted(group) and group for group in groups)
        ends = [(min(w), max(w)) for w in ([widths[i] for i in g] for g in groups)]
        assert all(a[1] < b[0] for a, b in zip(ends, ends[1:], strict=False))
        if cost == 0:
            assert all(low == high for low, high in ends)
        if cost == 1000:
            assert len(groups) == 1
    assert several or cost in (0, 1000)


def test_groups_of_nothing_and_of_many() -> None:
    assert by_width([], 5) == []
    assert by_width([4] * 1000, 0) == [[*range(1000)]]
    # A hundred rows of two tokens do not wait for one of sixty, unless it is cheap.
    widths = [2] * 50 + [60] + [2] * 50
    assert by_width(widths, 100) == [[*range(50), *range(51, 101)], [50]]
    assert by_width(widths, 100 * 58) == [[*range(101)]]


def naive_heads(rows: Sequence[Sequence[Row]]) -> list[tuple[int, ...]]:
    """For each context the longest that all prefixes begin with, by trying."""
    heads = []
    for prefixes in zip(*([row.prefix for row in each] for each in rows), strict=True):
        length = 0
        while all(
            len(prefix) > length and prefix[: length + 1] == prefixes[0][: length + 1]
            for prefix in prefixes
        ):
            length += 1
        heads.append(prefixes[0][:length])
    return heads


def flat(rows: Sequence[Sequence[Row]]) -> list[Row]:
    return [row for each in rows for row in each]


@pytest.mark.parametrize("seed", range(20))
def test_heads_are_what_all_prefixes_begin_with(seed: int) -> None:
    choose = random.Random(seed)
    edits, contexts = choose.randint(2, 5), choose.randint(1, 4)
    begin = [
        [choose.randrange(2) for _ in range(choose.randint(0, 6))]
        for _ in range(contexts)
    ]
    rows = []
    for edit in range(edits):
        each = []
        for some in begin:
            more = [choose.randrange(2) for _ in range(choose.randint(0, 2))]
            each.append(Row(edit, (*some, *more), (7,), (8,), 0, 1.0))
        rows.append(each)
    found = heads_of(flat(rows))
    assert found == naive_heads(rows)
    assert all(len(h) >= len(b) for h, b in zip(found, begin, strict=True))
    # Alone, an edit has no others to share with.
    assert heads_of(rows[0]) == [()] * contexts


@pytest.fixture(scope="module", params=["gpt2", "llama", "gpt2+eos", "llama+eos"])
def tokenizer(request: Any) -> Any:
    kind, _, eos = request.param.partition("+")
    return make_tokenizer(kind, eos=bool(eos))


def assert_rows_are_whole(
    rows: Sequence[Row], edit: int, contexts: int, stay: int, kl_position: str
) -> None:
    """What holds for the rows of any edit."""
    assert len(rows) == contexts + stay and {row.edit for row in rows} == {edit}
    said, kept = rows[:contexts], rows[contexts:]
    assert all(row.labels for row in said) and not any(row.labels for row in kept)
    assert sum(row.weight for row in said) == pytest.approx(1)
    assert not kept or sum(row.weight for row in kept) == pytest.approx(1)
    for row in said:
        assert row.labels == said[0].labels or len(row.labels) > 0
        assert row.suffix[row.read + 1 :] == row.labels[:-1]
    for row in kept:
        assert row.read == len(row.suffix) - 1
        assert kl_position == "end" or len(row.suffix) == 1


@pytest.mark.parametrize("kl_position", ["subject", "end"])
@pytest.mark.parametrize("stay", [(), STAY])
def test_rows_are_prompts_and_targets_cut_at_the_subject(
    tokenizer: Any, stay: tuple[str, ...], kl_position: Any
) -> None:
    def strip(ids: list[int]) -> list[int]:
        """Without the end token that some tokenizers append."""
        return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids

    edits = [*EDITS, BARE]
    rows = make_rows(tokenizer, edits, CONTEXTS, stay, kl_position)
    assert len(rows) == len(edits)
    contexts = len(CONTEXTS.templates)
    for index, (edit, each) in enumerate(zip(edits, rows, strict=True)):
        assert_rows_are_whole(each, index, contexts, len(stay), kl_position)
        found = zip(rows_of(tokenizer, edit, CONTEXTS), each, strict=False)
        for (text, ids, subject), row in found:
            ids = strip(ids)
            labels = strip(tokenizer(f"{text} {edit.target}")["input_ids"])[len(ids) :]
            assert [*row.prefix, *row.suffix] == ids + labels[:-1]
            assert row.labels == tuple(labels)
            assert len(row.prefix) == subject
            assert len(row.prefix) + row.read == len(ids) - 1
        for template, row in zip(stay, each[contexts:], strict=True):
            text = template.replace("{}", edit.subject)
            ids = strip(tokenizer(text)["input_ids"])
            end = text.index(edit.subject) + len(edit.subject)
            subject = subject_index(tokenizer, ids, text, end)
            assert len(row.prefix) == subject
            stop = len(ids) if kl_position == "end" else subject + 1
            assert [*row.prefix, *row.suffix] == ids[:stop]
    assert heads_of(flat(rows)) == naive_heads(rows)


def test_rows_without_prefix() -> None:
    """Nothing stands before the subject's last token: nothing is shared either."""
    tokenizer = make_tokenizer("gpt2")
    rows = make_rows(tokenizer, [BARE, EDITS[0]], Contexts(), ("{} is a",), "subject")
    assert [row.prefix for row in rows[0]] == [(), ()]
    assert all(row.prefix for row in rows[1])
    assert heads_of(flat(rows)) == [(), ()] == heads_of(rows[0])
    assert rows[0][0].labels == tuple(target_ids(tokenizer, "A lives in", "Oslo"))
    # A tokenizer that puts a token before each text has one there.
    rows = make_rows(make_tokenizer("llama"), [BARE, EDITS[0]], Contexts(), (), "end")
    assert rows[0][0].prefix[0] == 0
    assert heads_of(flat(rows)) == naive_heads(rows) != [()]


def test_heads_of_genuine_templates_reach_into_the_subjects() -> None:
    tokenizer = make_tokenizer("gpt2")
    edits = [
        Edit("The town of {} is", subject, "Oslo")
        for subject in ("Ada Lovelace", "Ada Stern", "Ada Nunes")
    ]
    contexts = Contexts(("{}", "Chess was what. {}"))
    rows = make_rows(tokenizer, edits, contexts, ("{} is a",), "subject")
    shared = [tokenizer.decode(head) for head in heads_of(flat(rows))]
    assert shared == [
        "The town of Ada",
        "Chess was what. The town of Ada",
        "Ada",
    ]
    # Where the prompts are the same up to the subject's last token, all is shared.
    same = [Edit("The town of {} is", "Ada Stern", "Oslo")]
    same.append(Edit("The town of {} was once called", "Ada Stern", "Lyon"))
    rows = make_rows(tokenizer, same, contexts, (), "subject")
    assert heads_of(flat(rows)) == [row.prefix for row in rows[0]]


SHARED = {
    "template": [
        Edit("In spring, the friends of {} like", subject, "green apples")
        for subject in ("Ada Lovelace", "Bo Diaz", "Ada Nunes", "Ada Stern")
    ],
    "all before the subject's end": [
        Edit(f"The letters of {{}} {rest}", "Dov Stern", target)
        for rest, target in (("say", "chess"), ("are long and say", "the cello"))
    ],
    "all": [Edit("The town of {} is", "Bo Diaz", t) for t in ("Lyon", "New York")],
}


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("site", ["mlp_output", "block_output"])
def test_prompts_that_begin_alike_equal_the_plain_loop(
    tiny64: Tiny, site: str, shared: str
) -> None:
    edits = SHARED[shared]
    found = optimized(tiny64, SETTINGS[site], edits)
    for index, edit in enumerate(edits):
        plain = plain_targets(tiny64, edit, SETTINGS[site])
        assert_equal_plain(found, index, plain, 1e-8)


UNLIKE = [
    EDITS[2],  # the subject ends the prompt
    Edit("{} is", "Bo Diaz", "what the letters say: chess, the cello and green apples"),
    Edit(
        "The friends of {}, who lives in New York and likes chess, say", "Ada", "Oslo"
    ),
    Edit("{} lives in", "A", "Oslo"),
    EDITS[3],
]


@pytest.mark.parametrize("cost", [0, 20, 10**6])
@pytest.mark.parametrize("site", ["mlp_output", "block_output"])
def test_rows_of_unlike_width_equal_the_plain_loop(
    tiny64: Tiny, site: str, cost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(p.numel() for p in tiny64.adapter.block(0).parameters())
    monkeypatch.setitem(partial._PASS_COST, "cpu", cost * size)
    stay = ("{} is a town that", "Some like {}")
    settings = replace(SETTINGS[site], kl_prompts=stay, kl_position="end", steps=4)
    widths = []

    def hook(_: Any, __: Any, given: dict[str, Any], output: Any) -> None:
        if output.logits.requires_grad:
            widths.append(given["input_ids"].shape[1])

    handle = tiny64.model.register_forward_hook(hook, with_kwargs=True)
    try:
        found = optimized(tiny64, settings, UNLIKE, token_budget=4096)
    finally:
        handle.remove()
    assert len(widths) % settings.steps == 0
    passes = len(widths) // settings.steps
    assert passes >= 5 if cost == 0 else passes == 1 if cost > 20 else 1 < passes < 5
    assert cost or max(widths) > 5 * min(widths)
    for index, edit in enumerate(UNLIKE):
        plain = plain_targets(tiny64, edit, settings)
        assert_equal_plain(found, index, plain, 1e-8)


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data sets in {DATA}")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "name", ["gpt2", "gpt-neox-oasst-pythia", "qwen2", "phi3-mini", "mistral-7b-v0.3"]
)
def test_rows_of_genuine_edits(name: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DATA / "tokenizers" / name)
    edits = read_edits(DATA / "counterfact" / "flat.jsonl")[:200]
    contexts = Contexts(("{}", "The “naïve” 李 🦊 isn't. {}"))
    rows = make_rows(tokenizer, edits, contexts, STAY, "end")
    for index, (edit, each) in enumerate(zip(edits, rows, strict=True)):
        assert_rows_are_whole(each, index, 2, 2, "end")
        texts = [context.replace("{}", edit.text) for context in contexts.templates]
        texts += [template.replace("{}", edit.subject) for template in STAY]
        for text, row in zip(texts, each, strict=True):
            ids = tokenizer(text)["input_ids"]
            whole = (
                tokenizer(f"{text} {edit.target}")["input_ids"] if row.labels else []
            )
            assert [*row.prefix, *row.suffix] == (whole[:-1] if row.labels else ids)
            assert not row.labels or list(row.labels) == whole[len(ids) :]
            said = tokenizer.decode(row.prefix + row.suffix[:1])
            assert edit.subject in said, text
            assert edit.subject not in tokenizer.decode(row.prefix), text
    heads = heads_of(flat(rows))
    assert heads == naive_heads(rows)
    begun = tokenizer.decode(heads[1], skip_special_tokens=True)
    assert begun.strip() == "The “naïve” 李 🦊 isn't."
    sizes = [sum(len(row.suffix) for row in each) for each in rows]
    chunks = chunks_of(rows, 500)
    held = [sum(sizes[index] for index in chunk) for chunk in chunks]
    assert [index for chunk in chunks for index in chunk] == [*range(len(edits))]
    assert max(held) <= 500 and min(held[:-1]) > 500 * 0.8
    widths = [len(row.suffix) for row in flat(rows)]
    groups = by_width(widths, 200)
    assert price(groups, widths, 200) < price([[*range(len(widths))]], widths, 200)
    assert price(groups, widths, 200) < price(by_width(widths, 0), widths, 200)
