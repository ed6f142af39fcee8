"""Text to ids: subject positions, continuations, padding, contexts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from model_kit import DATA, TEXTS, Tiny, make_tokenizer, subject_index
from transformers import PreTrainedTokenizer

from unified_edit.edits import SLOT, read_edits
from unified_edit.errors import PromptError
from unified_edit.model.prompts import (
    TOKENS_PER_FORWARD,
    Contexts,
    ContextSettings,
    buckets,
    check_rows,
    continuations,
    generate_contexts,
    in_contexts,
    pad,
    subject_prompts,
    tokenize,
)

SUBJECTS = [
    "Ada Lovelace",
    "X",
    "Zoë Saldaña",
    "李小龙",
    "naïve 👩‍🚀",
    "🦊",
    "O'Brien",
    '"The Who"',
    "don't",
    "100%",
    "New\tYork",
    "C++ (lang)",
    "é",  # e with a combining accent
    "Straße №7",
]
TEMPLATES = ["{} lives in", "the town of {} is", "everyone likes {}", '"{}"', "({}'s)"]


@pytest.fixture(scope="module", params=["gpt2", "llama", "gpt2+eos", "llama+eos"])
def tokenizer(request: Any) -> Any:
    kind, _, eos = request.param.partition("+")
    return make_tokenizer(kind, eos=bool(eos))


@pytest.mark.parametrize("template", TEMPLATES)
def test_subjects_last_token_by_counting_bytes(tokenizer: Any, template: str) -> None:
    contexts = Contexts(("{}", "Chess, they say. {}", "Zoë's “naïve” 李. {}!"))
    for subject in SUBJECTS:
        filled = in_contexts(contexts, template, subject)
        prompts = subject_prompts(tokenizer, filled)
        for (text, end), prompt, context in zip(
            filled, prompts, contexts.templates, strict=True
        ):
            assert text == context.replace("{}", template.replace("{}", subject))
            assert text[:end].endswith(subject)
            expected = subject_index(tokenizer, list(prompt.ids), text, end)
            assert prompt.subject_end == expected, text


def test_the_slots_subject_counts_not_an_earlier_mention(tokenizer: Any) -> None:
    ((text, end),) = in_contexts(Contexts(), "Ada said that {} likes", "Ada")
    assert end == len("Ada said that Ada")
    (prompt,) = subject_prompts(tokenizer, [(text, end)])
    expected = subject_index(tokenizer, list(prompt.ids), text, end)
    assert prompt.subject_end == expected
    first = subject_index(tokenizer, list(prompt.ids), text, 3)
    assert prompt.subject_end > first


def test_many_tokens_for_one_character(tokenizer: Any) -> None:
    """An emoji is four byte tokens; the last of them is the subject's last."""
    (prompt,) = subject_prompts(tokenizer, [("🦊", 1)])
    assert prompt.subject_end == len(prompt.ids) - 1
    assert len(prompt.ids) >= 4


def test_a_character_that_the_tokenizer_drops_is_refused() -> None:
    tokenizer = make_tokenizer("gpt2")
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("!", "")
    with pytest.raises(PromptError, match="last character '!'"):
        subject_prompts(tokenizer, [("Ada!", 4)])


@pytest.mark.parametrize(
    "target", ["Oslo", "the cello", "São Paulo", "李", "🦊 and 🦊"]
)
def test_prompt_and_target_join_to_the_whole(tokenizer: Any, target: str) -> None:
    for prompt in ("Ada lives in", "x", "It’s “李”", "a  b", "({})", "end."):
        ((ids, answer),) = continuations(tokenizer, [prompt], [target])
        whole = tokenizer(f"{prompt} {target}")["input_ids"]
        if whole[-1] == tokenizer.eos_token_id:  # what it appends is no target
            whole = whole[:-1]
        assert [*ids, *answer] == whole
        assert answer and tokenizer.bos_token_id not in answer
        assert tokenizer.eos_token_id not in [*ids, *answer]
        assert tokenizer.decode(answer) == f" {target}"


def test_target_ids_have_no_bos_and_no_stray_space(llama: Tiny) -> None:
    """The naive way, tokenizing the target alone, has BOS in front."""
    tokenizer = llama.tokenizer
    naive = tokenizer("Oslo")["input_ids"]
    ((_, answer),) = continuations(tokenizer, ["Ada lives in"], ["Oslo"])
    assert naive[0] == tokenizer.bos_token_id
    assert list(answer) == naive[1:]


def test_tokens_that_change_when_the_target_follows_are_refused() -> None:
    # Many spaces are one token: the space before the target joins the prompt's.
    tokenizer = make_tokenizer("gpt2", texts=["a    b    c    d"] * 50)
    with pytest.raises(PromptError, match="tokens of .* change when ' +Oslo' follows"):
        continuations(tokenizer, ["Ada is   "], ["    Oslo"])


def test_an_empty_prompt_needs_a_token_before_it() -> None:
    with pytest.raises(PromptError, match="nothing predicts 'Oslo'"):
        continuations(make_tokenizer("gpt2"), [""], ["Oslo"])
    ((ids, answer),) = continuations(make_tokenizer("llama"), [""], ["Oslo"])
    assert ids == (0,) and answer


def test_appended_end_tokens_are_dropped_prepended_ones_kept() -> None:
    for kind in ("gpt2", "llama"):
        plain, ending = make_tokenizer(kind), make_tokenizer(kind, eos=True)
        text = "Ada lives in"
        assert ending(text)["input_ids"][-1] == ending.eos_token_id
        assert tokenize(ending, [text]) == tokenize(plain, [text])
        assert tokenize(plain, [text])[0][0] == tuple(plain(text)["input_ids"])


def test_no_texts_have_no_ids(tokenizer: Any) -> None:
    assert tokenize(tokenizer, []) == [] == continuations(tokenizer, [], [])


def test_ids_do_not_depend_on_padding_or_truncation_settings(tokenizer: Any) -> None:
    texts = ["Ada lives in", "a longer text of Ada lives in New York"]
    expected = tokenize(tokenizer, texts)
    changed = copy.deepcopy(tokenizer)
    changed.pad_token = "</s>"
    changed.padding_side, changed.truncation_side = "left", "left"
    changed.model_max_length = 4
    assert tokenize(changed, texts) == expected
    changed(texts, padding=True, truncation=True)  # what a caller may have done before
    assert tokenize(changed, texts) == expected


class _Slow(PreTrainedTokenizer):
    """A genuine slow tokenizer: one token per character."""

    def get_vocab(self) -> dict[str, int]:
        return {chr(i): i for i in range(128)}

    @property
    def vocab_size(self) -> int:
        return 128

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(PromptError, match="_Slow gives no character offsets.*fast"):
        tokenize(_Slow(), ["Ada"])


def test_too_long_prompts_are_refused(tiny: Tiny) -> None:
    check_rows(tiny.adapter, [range(96)])
    with pytest.raises(PromptError, match="97 tokens, the model has 96 positions"):
        check_rows(tiny.adapter, [range(3), range(97)])


@pytest.mark.parametrize("left", [False, True])
def test_padding(left: bool) -> None:
    rows = [[5, 6, 7], [8], []]
    batch = pad(rows, torch.device("cpu"), left=left)
    assert batch.ids.shape == (3, 3)
    for index, row in enumerate(rows):
        real = batch.mask[index].bool()
        assert batch.ids[index][real].tolist() == row
        assert batch.positions[index][real].tolist() == list(range(len(row)))
        ordered = [True] * len(row) + [False] * (3 - len(row))
        assert real.tolist() == (ordered[::-1] if left else ordered)
    assert int(batch.positions.min()) == 0 and int(batch.positions.max()) == 2


def test_buckets_hold_each_index_once_within_the_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 3000, (60,), generator=generator).tolist()
    lengths += [TOKENS_PER_FORWARD + 5]
    batches = list(buckets(lengths))
    assert sorted(i for batch in batches for i in batch) == list(range(61))
    for batch in batches:
        size = len(batch) * max(lengths[i] for i in batch)
        assert size <= TOKENS_PER_FORWARD or len(batch) == 1
    assert len(batches) < 40
    assert list(buckets([])) == []


@pytest.mark.parametrize("templates", [(), ("Hi. {}",), ("{}", "no slot"), ("{}{}",)])
def test_malformed_contexts_are_refused(templates: tuple[str, ...]) -> None:
    with pytest.raises(PromptError):
        Contexts(templates)


@pytest.mark.parametrize("wrong", [{"top_k": 0}, {"samples": (("The", 0),)}])
def test_malformed_context_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match="at least 1"):
        ContextSettings(**wrong)


SETTINGS = ContextSettings((("", 6), ("The", 8), ("Because", 1)))


def test_contexts_are_the_bare_prompt_then_one_for_each_sample(tiny: Tiny) -> None:
    contexts = generate_contexts(tiny.adapter, tiny.tokenizer, SETTINGS, seed=1)
    assert len(contexts.templates) == 4 and contexts.templates[0] == SLOT
    for template in contexts.templates[1:]:
        assert template.endswith(". {}") and template.count("{") == 1
    assert contexts.templates[2].startswith("The")
    # As many tokens as its seed has, so nothing was generated.
    assert contexts.templates[3] == "Because. {}"


def test_contexts_depend_on_their_seed_alone(tiny: Tiny) -> None:
    torch.manual_seed(1)
    first = generate_contexts(tiny.adapter, tiny.tokenizer, SETTINGS, seed=5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = generate_contexts(tiny.adapter, tiny.tokenizer, SETTINGS, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again
    others = {
        generate_contexts(tiny.adapter, tiny.tokenizer, SETTINGS, seed=seed).templates
        for seed in range(2)
    }
    assert len(others) == 2


def test_contexts_of_top_1_are_greedy(tiny: Tiny) -> None:
    settings = ContextSettings((("The", 9),), top_k=1)
    (_, template) = generate_contexts(
        tiny.adapter, tiny.tokenizer, settings, seed=0
    ).templates
    ids = tiny.tokenizer("The")["input_ids"]
    bos = ids[0] == tiny.tokenizer.bos_token_id
    for _ in range(9 - len(ids) + bos):
        with torch.no_grad():
            logits = tiny.model(input_ids=torch.tensor([ids])).logits
        ids.append(int(logits[0, -1].argmax()))
    text = tiny.tokenizer.decode(ids, skip_special_tokens=True)
    assert template == " ".join(text.replace("{", " ").replace("}", " ").split()) + (
        ". {}"
    )


def test_an_appended_end_token_is_not_continued_from(tiny: Tiny) -> None:
    ending = make_tokenizer(tiny.kind, eos=True)
    plain = generate_contexts(tiny.adapter, tiny.tokenizer, SETTINGS, seed=3)
    assert generate_contexts(tiny.adapter, ending, SETTINGS, seed=3) == plain


def test_a_seed_is_needed_without_bos_and_eos(gpt2: Tiny) -> None:
    tokenizer = make_tokenizer("gpt2")
    tokenizer.eos_token = None
    with pytest.raises(PromptError, match="neither BOS nor EOS"):
        generate_contexts(gpt2.adapter, tokenizer, ContextSettings((("", 5),)), seed=0)


@pytest.fixture(scope="module")
def genuine_cases() -> list[Any]:
    return read_edits(DATA / "counterfact" / "flat.jsonl")[:500]


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data sets in {DATA}")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "name", ["gpt2", "gpt-neox-oasst-pythia", "qwen2", "phi3-mini", "mistral-7b-v0.3"]
)
def test_genuine_tokenizers_on_genuine_prompts(
    name: str, genuine_cases: list[Any]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DATA / "tokenizers" / name)
    contexts = Contexts(("{}", "The “naïve” 李 🦊 isn't. {}"))
    filled = [
        row
        for e in genuine_cases
        for row in in_contexts(contexts, e.template, e.subject)
    ]
    prompts = subject_prompts(tokenizer, filled)
    spans = tokenizer([t for t, _ in filled], return_offsets_mapping=True)[
        "offset_mapping"
    ]
    for (text, end), prompt, offsets in zip(filled, prompts, spans, strict=True):
        start, stop = offsets[prompt.subject_end]
        assert start <= end - 1 < stop, text
        later = offsets[prompt.subject_end + 1 :]
        assert all(not start <= end - 1 < stop for start, stop in later), text
        if name in ("gpt2", "gpt-neox-oasst-pythia", "qwen2"):
            ids = list(prompt.ids)
            assert prompt.subject_end == subject_index(tokenizer, ids, text, end), text
        else:  # sentencepiece: what is decoded up to there ends in the subject
            said = tokenizer.decode(prompt.ids[: prompt.subject_end + 1])
            assert text[:end].strip() in said, text
    texts = [text for text, _ in filled]
    targets = [e.target for e in genuine_cases for _ in contexts.templates]
    for text, target, (ids, answer) in zip(
        texts, targets, continuations(tokenizer, texts, targets), strict=True
    ):
        assert [*ids, *answer] == tokenizer(f"{text} {target}")["input_ids"]
        assert not set(answer) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(answer).strip() == target


def test_texts_have_what_the_tests_rely_on() -> None:
    tokenizer = make_tokenizer("gpt2")
    assert len(tokenizer) <= 360
    assert sum(len(tokenizer(text)["input_ids"]) for text in TEXTS) > 4000
