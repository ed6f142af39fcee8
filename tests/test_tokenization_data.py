"""CounterFact's prompts through the genuine tokenizers: subject, target and rows by
the bytes that tokens stand for, refusals counted. All of them with GPT-2's, every ninth
with the others, which is quicker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from model_kit import DATA
from tokenizer_kit import Pieces

from unified_edit.edits import Edit, read_edits
from unified_edit.errors import PromptError
from unified_edit.model.frames import chat_frame
from unified_edit.model.prompts import (
    Contexts,
    continuations,
    in_contexts,
    subject_prompts,
)
from unified_edit.model.rows import Row, make_rows

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no data sets in {DATA}"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
NAMES = ("gpt2", "gpt-neox-oasst-pythia", "qwen2", "phi3-mini", "mistral-7b-v0.3")
CHATS = ("phi3-mini", "mistral-7b-v0.3", "qwen2")
BESIDE = (
    "The letters say. {}",
    "The following is an excerpt from a new work, “naïve” 李 🦊, which was written. {}",
)
"""Prefixes, such as a model samples, and a hard one."""


def load(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DATA / "tokenizers" / name)


@pytest.fixture(scope="module")
def edits() -> list[Edit]:
    found = read_edits(DATA / "counterfact" / "flat.jsonl")
    assert len(found) == 21_719  # `Edit` refuses none of them
    return found


def check_rows(
    tokenizer: Any,
    pieces: Pieces,
    edits: Sequence[Edit],
    rows: Sequence[Row],
    filled: Sequence[tuple[str, int]],
) -> Counter[str]:
    """Each row against its text; counts what is worth telling."""
    counts: Counter[str] = Counter()
    whole = tokenizer([text for text, _ in filled], return_attention_mask=False)
    for edit, row, (text, end), ids in zip(
        edits, rows, filled, whole["input_ids"], strict=True
    ):
        cut = len(row.prefix)
        assert list(row.prefix + row.suffix[: row.read + 1]) == ids, text
        assert cut == pieces.index(ids, text, end), text
        assert row.suffix[row.read + 1 :] == row.labels[:-1]
        assert pieces.joined(row.labels) == f" {edit.target}".encode(), text
        held = pieces.joined(ids[: cut + 1]).decode(errors="replace")
        counts["over the subject's end"] += not held.endswith(text[:end][-1])
        counts["targets of several tokens"] += len(row.labels) > 1
    return counts


@pytest.mark.parametrize("name", NAMES)
def test_prompts(name: str, edits: list[Edit], tell: Callable[[str], None]) -> None:
    """With and without a prefix; a refusal would be an error here, and there is none
    to be made: all prompts end with a word, all subjects are in them once."""
    tokenizer = load(name)
    pieces = Pieces(tokenizer)
    counts: Counter[str] = Counter()
    checked = 0
    for number, contexts in enumerate(
        (
            Contexts(),
            *(Contexts(("{}", beside)) for beside in BESIDE),
        )
    ):
        # With each prefix fewer of them.
        bare = edits if name == "gpt2" else edits[::9]
        some = bare if number == 0 else edits[number - 1 :: 2][::9]
        checked = checked or len(some)
        made = make_rows(tokenizer, some, contexts, (), "subject")
        filled = [
            text for e in some for text in in_contexts(contexts, e.template, e.subject)
        ]
        owners = [e for e in some for _ in contexts.templates]
        rows = [row for each in made for row in each]
        found = check_rows(tokenizer, pieces, owners, rows, filled)
        if number == 0:
            counts = found
    told = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    tell(f"{name}: {checked} prompts, 0 refused; {told}")


@pytest.mark.parametrize("name", CHATS)
def test_chat_is_what_the_template_says(name: str, edits: list[Edit]) -> None:
    """Ids of prompt and answer are those of `apply_chat_template` with both turns."""
    tokenizer = load(name)
    frame = chat_frame(tokenizer)
    pieces = Pieces(tokenizer)
    contexts = Contexts(("{}", *BESIDE), frame)
    some = edits[::97]
    filled = [
        text for e in some for text in in_contexts(contexts, e.template, e.subject)
    ]
    plain = [
        text
        for e in some
        for text in in_contexts(Contexts(contexts.templates), e.template, e.subject)
    ]
    targets = [e.target for e in some for _ in contexts.templates]
    prompts = subject_prompts(tokenizer, filled, frame)
    pairs = continuations(tokenizer, [t for t, _ in filled], targets, frame)
    # Around the message: whole tokens, of which the first and last are special.
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    head = len(
        tokenizer(frame.before.rstrip(" "), add_special_tokens=False)["input_ids"]
    )
    space = frame.after[: len(frame.after) - len(frame.after.lstrip())]
    for (text, end), target, prompt, (ids, answer) in zip(
        plain, targets, prompts, pairs, strict=True
    ):
        user = {"role": "user", "content": text}
        asked = tokenizer.apply_chat_template([user], add_generation_prompt=True)
        assert list(prompt.ids) == list(ids) == asked["input_ids"]
        assert ids.count(1) == (name == "mistral-7b-v0.3")  # BOS, which phi has not
        both = tokenizer.apply_chat_template(
            [user, {"role": "assistant", "content": target}]
        )["input_ids"]
        assert [*ids, *answer] == both[: len(ids) + len(answer)]
        assert both[len(ids) + len(answer)] in special
        assert tokenizer.decode(answer).strip() == target
        stop = head
        while ids[stop] not in special:
            stop += 1
        found = pieces.index(ids[head:stop], text + space, end)
        assert prompt.subject_end == head + found, text


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox-oasst-pythia"])
def test_tokenizers_without_a_template(name: str) -> None:
    path = str(DATA / "tokenizers" / name)
    with pytest.raises(PromptError, match=f"{path} has no chat template"):
        chat_frame(load(name))
