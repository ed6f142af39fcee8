"""Hard texts over every style of tokenizer: where a subject ends and what a target's
tokens are, found again by counting the bytes that tokens stand for."""

from __future__ import annotations

import copy
import unicodedata
from itertools import product
from typing import Any

import pytest
from model_kit import DATA
from tokenizer_kit import STYLES, Pieces, styled_tokenizer
from tokenizers import processors

from unified_edit.edits import Edit
from unified_edit.errors import EditError, PromptError
from unified_edit.model.prompts import (
    Contexts,
    continuations,
    in_contexts,
    subject_prompts,
    tokenize,
)
from unified_edit.model.rows import make_rows

GENUINE = ("gpt2", "gpt-neox-oasst-pythia", "qwen2", "phi3-mini", "mistral-7b-v0.3")
NFC, NFD = "Amélie Café", "Ame\N{COMBINING ACUTE ACCENT}lie Cafe\u0301"
SUBJECTS = [
    *("Ada Lovelace", "X", "O'Brien", '"The Who"', "don't", "C++ (lang)", "F.C."),
    *("100%", "100% {x}", "%s", "Yahoo!", "New\tYork", "a\nb", "Straße №7"),
    *("李小龙", "नि", "각", "가\u11a8", "ﷺ", "ﬁ", "İ"),
    *(NFC, NFD, "e\u0301", "x\u0301\u0323", "Q\u0323\u0307", "zero\u200dwidth\u200d"),
    *("🦊", "naïve 👩‍🚀", "👨‍👩‍👧‍👦 Ltd", "🇳🇴", "1️⃣"),
]
TEMPLATES = [
    *("{} lives in", "the town of {} is", "everyone likes {}", '"{}"', "({}'s)"),
    *("un{}able to", "Ada X {} Ada X {", "{}\nlives\nin", "In 100% of }{} {x}%s"),
    *(" {}!", "{}李", "🦊{}🦊", "{}. It"),
]
TARGETS = [
    *("Oslo", "the cello", "São Paulo", "李 x", "🦊 and 🦊", "45,", ".", '"q"', "'s"),
    *("a\nb", "100%", "{}", "e\u0301"),
]
CONTEXTS = Contexts(("{}", "Zoë’s “naïve” 李. {}!"))


def load(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DATA / "tokenizers" / name)


@pytest.fixture(
    scope="module",
    params=[
        *((style, both, both) for style in STYLES for both in (False, True)),
        *(
            pytest.param((name, False, False), marks=pytest.mark.data)
            for name in GENUINE
        ),
    ],
    ids=lambda p: p[0] + "+bos" * p[1] + "+eos" * p[2],
)
def tokenizer(request: Any) -> Any:
    style, bos, eos = request.param
    if style in STYLES:
        return styled_tokenizer(style, bos=bos, eos=eos)
    if not DATA.is_dir():
        pytest.skip(f"no data sets in {DATA}")
    return load(style)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_hard_subjects_and_targets(tokenizer: Any) -> None:
    pieces = Pieces(tokenizer)
    filled = [
        row
        for template, subject in product(TEMPLATES, SUBJECTS)
        for row in in_contexts(CONTEXTS, template, subject)
    ]
    prompts = subject_prompts(tokenizer, filled)
    for (text, end), prompt in zip(filled, prompts, strict=True):
        assert prompt.subject_end == pieces.index(prompt.ids, text, end), text[:end]
    texts = [text for text, _ in filled]
    targets = [TARGETS[i % len(TARGETS)] for i in range(len(texts))]
    pairs = continuations(tokenizer, texts, targets)
    for prompt, target, (ids, answer) in zip(prompts, targets, pairs, strict=True):
        assert ids == prompt.ids
        # Text, so neither BOS nor EOS nor a second space.
        assert pieces.joined(answer) == f" {pieces.normal(target)}".encode()
        assert not set(answer) & set(tokenizer.all_special_ids)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_rows_are_whole_whatever_the_subject(tokenizer: Any) -> None:
    edits = [
        Edit("In 100% of }{} {x}%s", subject, target)
        for subject, target in zip(SUBJECTS, TARGETS * 3, strict=False)
    ]
    rows = make_rows(tokenizer, edits, CONTEXTS, ("{}李",), "end")
    texts = [text for e in edits for text, _ in in_contexts(CONTEXTS, e.prompt, "§")]
    assert len(texts) == len(edits) * 2  # the slot is the first {}, others are text
    for edit, each in zip(edits, rows, strict=True):
        filled = in_contexts(CONTEXTS, edit.template, edit.subject)
        pairs = continuations(tokenizer, [t for t, _ in filled], [edit.target] * 2)
        for row, prompt, (ids, answer) in zip(
            each, subject_prompts(tokenizer, filled), pairs, strict=False
        ):
            assert row.prefix + row.suffix == ids + answer[:-1]
            assert row.labels == answer and row.prefix == ids[: prompt.subject_end]
            assert len(row.prefix) + row.read == len(ids) - 1
        kept = each[2]
        text = f"{edit.subject}李"
        assert [kept.prefix + kept.suffix] == [tokenize(tokenizer, [text])[0][0]]


@pytest.mark.parametrize("accents", [NFC, NFD])
def test_composed_and_decomposed_accents(accents: str) -> None:
    """A normalizing tokenizer composes the accent into the letter before: its token is
    the subject's last, not an error."""
    text, end = in_contexts(Contexts(), "{}'s", accents)[0]
    normalizing = styled_tokenizer("bytes+nfc")
    composed = in_contexts(Contexts(), "{}'s", NFC)
    assert subject_prompts(normalizing, [(text, end)]) == subject_prompts(
        normalizing, composed
    )
    plain = styled_tokenizer("bytes")
    (prompt,) = subject_prompts(plain, [(text, end)])
    said = plain.decode(prompt.ids[: prompt.subject_end + 1])
    assert said == accents
    assert (prompt == subject_prompts(plain, composed)[0]) == (accents == NFC)


def test_an_accent_that_is_dropped_is_its_letters() -> None:
    from tokenizers import normalizers

    tokenizer = styled_tokenizer("bytes")
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents()]
    )
    (prompt,) = subject_prompts(tokenizer, [("Cafe\u0301 is", 5)])
    assert tokenizer.decode(prompt.ids[: prompt.subject_end + 1]) == "Cafe"
    # What combines with nothing is not its neighbour's.
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("!", "")
    with pytest.raises(PromptError, match="last character '!'; the tokenizer drops"):
        subject_prompts(tokenizer, [("Ada! is", 4)])


def test_unknown_characters_in_a_row_are_told_apart() -> None:
    """Unigram's byte tokens all have the whole row's offsets."""
    tokenizer = styled_tokenizer("unigram")
    text = "everyone likes 李🦊龙!"
    spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert spans[-1] == spans[-11] == (15, 19)
    for end in (16, 17, 18, 19):
        (prompt,) = subject_prompts(tokenizer, [(text, end)])
        said = tokenizer.decode(prompt.ids[: prompt.subject_end + 1])
        assert said == text[:end]
        assert "\ufffd" in tokenizer.decode(prompt.ids[: prompt.subject_end]) or (
            end == 19  # one byte
        )


def test_a_token_over_the_subjects_end_is_the_subjects() -> None:
    """The last character's token may hold more: it is where the edit acts."""
    tokenizer = styled_tokenizer("bytes")
    pieces = Pieces(tokenizer)
    text = "Ada lives in"
    (prompt,) = subject_prompts(tokenizer, [(text, len("Ada li"))])
    held = pieces.joined(prompt.ids[: prompt.subject_end + 1]).decode()
    assert held.startswith("Ada li") and len(held) > len("Ada li")
    before = pieces.joined(prompt.ids[: prompt.subject_end]).decode()
    assert len(before) < len("Ada li")


@pytest.mark.parametrize("style", STYLES)
def test_special_tokens_and_settings_change_nothing(style: str) -> None:
    """BOS goes before the prompt and EOS nowhere; subject and target stay."""
    filled = [
        row for s in SUBJECTS for row in in_contexts(CONTEXTS, "the town of {} is", s)
    ]
    texts, targets = [text for text, _ in filled], [TARGETS[1]] * len(filled)
    plain = styled_tokenizer(style)
    expected = subject_prompts(plain, filled)
    answers = [answer for _, answer in continuations(plain, texts, targets)]
    shift = len(tokenize(plain, [""])[0][0])
    for bos, eos in product((False, True), (False, True)):
        changed = styled_tokenizer(style, bos=bos, eos=eos)
        changed.pad_token = "</s>"
        changed.padding_side = changed.truncation_side = "left"
        changed.model_max_length = 3
        changed.backend_tokenizer.enable_truncation(3)
        changed.backend_tokenizer.enable_padding(length=50)
        more = int(changed("x")["input_ids"][0] == changed.bos_token_id) - shift
        for prompt, before in zip(
            subject_prompts(changed, filled), expected, strict=True
        ):
            assert prompt.ids[more:] == before.ids
            assert prompt.subject_end == before.subject_end + more
        found = continuations(changed, texts, targets)
        assert [answer for _, answer in found] == answers


@pytest.mark.parametrize("name", ["add_bos_token", "add_eos_token"])
@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data sets in {DATA}")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("genuine", ["phi3-mini", "mistral-7b-v0.3"])
def test_genuine_switches_of_special_tokens(genuine: str, name: str) -> None:
    tokenizer = load(genuine)
    filled = [("The town of Zoë’s 李 is", len("The town of Zoë"))]
    found = []
    for value in (False, True):
        changed = copy.deepcopy(tokenizer)
        bos, eos = genuine == "mistral-7b-v0.3", False
        bos, eos = (value, eos) if name == "add_bos_token" else (bos, value)
        single = " ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos)
        changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        assert (changed("x")["input_ids"][-1] == 2) == eos
        (prompt,) = subject_prompts(changed, filled)
        assert prompt.ids[0] == 1 or not bos
        ((ids, answer),) = continuations(changed, [filled[0][0]], ["Oslo"])
        assert ids == prompt.ids
        found.append((ids[bos:], prompt.subject_end - bos, answer))
    assert found[0] == found[1]


def test_targets_of_one_and_of_many_tokens() -> None:
    for style in STYLES:
        tokenizer = styled_tokenizer(style)
        prompts, targets = ["Ada lives in"] * 2, ["Oslo", "Porto or Quito 李"]
        (_, short), (_, long) = continuations(tokenizer, prompts, targets)
        assert len(short) < len(long) and len(long) > 3
    ((_, answer),) = continuations(styled_tokenizer("bytes"), ["x"], ["is"])
    assert len(answer) == 1


@pytest.mark.parametrize("style", STYLES)
def test_half_a_character_is_refused(style: str) -> None:
    """JSON can hold it; tokenizers raise TypeError without a word about it."""
    with pytest.raises(PromptError, match=r"'Ada \\ud83e' holds half of a character"):
        tokenize(styled_tokenizer(style), ["Ada lives", "Ada \ud83e"])


@pytest.mark.parametrize(
    ("prompt", "subject", "target", "expected"),
    [
        ("Ada lives in", "Bo", "Oslo", "not in the prompt"),
        ("Ada lives in", "ada", "Oslo", "same spelling and case"),
        ("Ada L lives in", "Ada Lovelace", "Oslo", "not in the prompt"),
        ("Ada knows Ada in", "Ada", "Oslo", r"2 times; mark the place .* with \{\}"),
        ("aaa", "aa", "Oslo", None),  # overlapping mentions are one
        ("{} and {}", "Ada", "Oslo", "2 slots"),
        ("{} lives in", "Ada", " Oslo", "write it without, the space before it is"),
        ("{} lives in", "Ada", "Oslo\n", "begins or ends with space"),
        ("{} lives in ", "Ada", "Oslo", "end it with its last word"),
        ("{}\nlives in\n", "Ada", "Oslo", "end it with its last word"),
        ("{} lives in", "Ada ", "Oslo", "last character is where the edit acts"),
        (f"{NFD} is", NFC, "Oslo", "same spelling"),  # the same to the eye
    ],
)
def test_edits_that_name_no_place_are_refused(
    prompt: str, subject: str, target: str, expected: str | None
) -> None:
    if expected is None:
        assert Edit(prompt, subject, target).text == prompt
        return
    with pytest.raises(EditError, match=expected):
        Edit(prompt, subject, target)


def test_the_kit_counts_as_python_does() -> None:
    """A check of the check: without tokens that hold more, the counted prefix is the
    text up to there."""
    for style in STYLES:
        tokenizer = styled_tokenizer(style, bos=True)
        pieces = Pieces(tokenizer)
        for text in ("Zoë’s 李 🦊!", f"{NFD} is"):
            ids = tokenizer(text)["input_ids"]
            whole = unicodedata.normalize("NFC", text) if "nfc" in style else text
            assert pieces.joined(ids).decode().removeprefix(" ") == whole
            assert pieces.index(ids, text, len(text)) == len(ids) - 1
