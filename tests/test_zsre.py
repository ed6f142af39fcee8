"""zsRE's metrics against the published way: each token of an answer as a prompt of its
own."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from model_kit import (
    DATA,
    TEXTS,
    Tiny,
    greedy_word,
    make_model,
    target_ids,
)
from transformers import PreTrainedTokenizerFast

from unified_edit.edits import Edit, read_edits
from unified_edit.errors import EditError
from unified_edit.evaluate.zsre import (
    ZsreRecord,
    ZsreRecordScores,
    evaluate_zsre,
    read_zsre,
)
from unified_edit.model.prompts import continuations

FILE = DATA / "zsre_eval_1037.json"
RAW = {
    "subject": "Ada Lovelace",
    "src": "Where does Ada Lovelace live?",
    "rephrase": "Which town does Ada Lovelace live in?",
    "alt": "New York",
    "answers": ["London", "Ealing"],
    "loc": "nq question: who likes chess in Porto",
    "loc_ans": "Dov Stern",
}


@torch.no_grad()
def says(model: Any, ids: list[int]) -> int:
    return int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())


def plain(tiny: Tiny, prompt: str, answer: str) -> list[bool]:
    """Each token after the prompt and the tokens before it."""
    ids = tiny.tokenizer(prompt)["input_ids"]
    wanted = target_ids(tiny.tokenizer, prompt, answer)
    return [
        says(tiny.model, ids + wanted[:count]) == token
        for count, token in enumerate(wanted)
    ]


def published(tiny: Tiny, prompt: str, answer: str) -> list[bool]:
    """As texts, which GPT-2's kind of tokenizer reads the same."""
    tokenizer = tiny.tokenizer
    tokens = tokenizer(f" {answer}")["input_ids"]
    return [
        says(tiny.model, tokenizer(prompt + tokenizer.decode(tokens[:i]))["input_ids"])
        == tokenizer(tokenizer.decode(tokens[i]))["input_ids"][0]
        for i in range(len(tokens))
    ]


def known_records(tiny: Tiny) -> list[ZsreRecord]:
    """Whose answers the model gives in full, in part and not at all."""
    prompt, word = greedy_word(tiny)
    subject = prompt.split()[0]
    asked = Edit("{}" + prompt.removeprefix(subject), subject, word)
    half = Edit(asked.prompt, subject, f"{word} Quito")
    records = [
        ZsreRecord(asked, TEXTS[9], "nq question: " + TEXTS[40], word, 0),
        ZsreRecord(half, prompt, f"nq question: {prompt}", f"{word} in Quito", 1),
        ZsreRecord(Edit("{} plays", "Bo Diaz", "chess"), "Bo plays", RAW["loc"], "x"),
    ]
    # An unrelated question whose answer begins with what the model says by itself.
    for text in TEXTS[::3]:
        loc = f"nq question: {text}"
        said = says(tiny.model, tiny.tokenizer(f"{loc}?")["input_ids"])
        first = tiny.tokenizer.decode([said]).strip()
        if first and target_ids(tiny.tokenizer, f"{loc}?", first) == [said]:
            break
    records.append(ZsreRecord(asked, prompt, loc, f"{first} Quito, they say", "z"))
    return records


def test_metrics_equal_one_prompt_for_each_token(tiny: Tiny) -> None:
    records = known_records(tiny)
    scores = evaluate_zsre(tiny.model, tiny.tokenizer, records)
    shares = []
    for record, found in zip(records, scores.records, strict=True):
        assert found.case_id == record.case_id
        for value, prompt, answer in (
            (found.efficacy, record.edit.text, record.edit.target),
            (found.paraphrase, record.rephrase, record.edit.target),
            (found.specificity, f"{record.loc}?", record.loc_ans),
        ):
            right = plain(tiny, prompt, answer)
            assert value == sum(right) / len(right)
            if tiny.kind == "gpt2":
                assert right == published(tiny, prompt, answer)
            shares.append(value)
    assert {0.0, 1.0} < set(shares)  # and some are in part
    assert scores.records[0].efficacy == 1 and 0 < scores.records[1].efficacy < 1
    assert 0 < scores.records[3].specificity < 1


def test_means_and_s(tiny: Tiny) -> None:
    scores = evaluate_zsre(tiny.model, tiny.tokenizer, known_records(tiny))
    means = scores.as_dict()
    assert list(means) == ["s", "efficacy", "paraphrase", "specificity"]
    assert set(scores.intervals()) == set(means)
    parts = [means[name] for name in ("efficacy", "paraphrase", "specificity")]
    assert math.isclose(means["s"], 3 / sum(1 / part for part in parts))
    assert math.isclose(parts[0], sum(r.efficacy for r in scores.records) / 4)


def test_agreement_is_with_the_unedited_model(gpt2: Tiny) -> None:
    records = known_records(gpt2)
    before = evaluate_zsre(gpt2.model, gpt2.tokenizer, records)
    assert all(each.agreement is None for each in before.records)
    assert before.compared(before).as_dict()["agreement"] == 1
    edited = copy.deepcopy(gpt2.model)
    weight = edited.transformer.h[1].mlp.c_proj.weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weight.add_(0.3 * noise)
    after = evaluate_zsre(edited, gpt2.tokenizer, records).compared(before)
    expected = []
    for record, found in zip(records, after.records, strict=True):
        prompt = f"{record.loc}?"
        ids = gpt2.tokenizer(prompt)["input_ids"]
        wanted = target_ids(gpt2.tokenizer, prompt, record.loc_ans)
        same = [
            says(edited, ids + wanted[:i]) == says(gpt2.model, ids + wanted[:i])
            for i in range(len(wanted))
        ]
        expected.append(sum(same) / len(same))
        assert found.agreement == expected[-1]
        assert isinstance(found, ZsreRecordScores)
    assert 0 < sum(expected) / len(expected) < 1
    assert math.isclose(after.as_dict()["agreement"], sum(expected) / len(expected))
    assert after.intervals()["agreement"].mean == after.mean("agreement")


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "zsre.json"
    path.write_text(json.dumps([RAW, {**RAW, "alt": " Oslo "}]))
    first, second = read_zsre(path)
    assert first == ZsreRecord(
        Edit(RAW["src"], "Ada Lovelace", "New York"),  # type: ignore[arg-type]
        rephrase="Which town does Ada Lovelace live in?",
        loc="nq question: who likes chess in Porto",
        loc_ans="Dov Stern",
        case_id=0,
    )
    assert (second.edit.target, second.case_id) == ("Oslo", 1)
    assert [each.edit for each in (first, second)] == read_edits(path)
    assert read_zsre(path, "answers")[0].edit.target == "London"
    with pytest.raises(EditError, match="expected alt or answers"):
        read_zsre(path, "pred")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loc": "who likes chess"}, "loc must hold 'nq question: '"),
        ({"loc_ans": " "}, "loc_ans is no text"),
        ({"rephrase": None}, "rephrase is no text"),
        ({"answers": []}, "answers must be a list of texts"),
        ({"answers": [3]}, "the answer in 'answers' is no text"),
        ({"subject": "Ann"}, "the subject is not in the prompt"),
        ({"src": None}, "prompt is empty"),
    ],
)
def test_bad_records(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "zsre.json"
    path.write_text(json.dumps([RAW, {**RAW, **changes}]))
    with pytest.raises(EditError, match=f"entry 1: .*{message}"):
        read_zsre(path, "answers")
    del (lacking := dict(RAW))["loc"]
    path.write_text(json.dumps([lacking]))
    with pytest.raises(EditError, match="entry 0: lacks or misuses the field 'loc'"):
        read_zsre(path)


def test_no_records(gpt2: Tiny) -> None:
    with pytest.raises(EditError, match="no records"):
        evaluate_zsre(gpt2.model, gpt2.tokenizer, [])


@pytest.mark.data
@pytest.mark.skipif(not FILE.is_file(), reason=f"no {FILE}")
def test_genuine_records() -> None:
    records = read_zsre(FILE)
    assert len(records) == 1037
    assert [each.edit for each in records] == read_edits(FILE)
    true = read_zsre(FILE, "answers")
    assert true[0].edit.target == "1998" and records[0].edit.target == "2006"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(DATA / "tokenizers" / "gpt2" / "tokenizer.json")
    )
    tiny = Tiny("gpt2", make_model("gpt2", len(tokenizer)), tokenizer, {})
    # Their tokens are those of the published code, but for characters cut in half.
    prompts = [(f"{each.loc}?", each.loc_ans) for each in records]
    prompts += [(each.rephrase, each.edit.target) for each in true]
    plain_ones = [(p, a) for p, a in prompts if a.isascii()]
    assert len(plain_ones) > 0.95 * len(prompts)
    pairs = continuations(tokenizer, *zip(*plain_ones, strict=True))
    for (_, answer), (_, tokens) in zip(plain_ones, pairs, strict=True):
        assert list(tokens) == tokenizer(f" {answer}")["input_ids"]
    some = records[::70]
    scores = evaluate_zsre(tiny.model, tokenizer, some)
    for record, found in zip(some, scores.records, strict=True):
        for value, prompt, answer in (
            (found.efficacy, record.edit.text, record.edit.target),
            (found.paraphrase, record.rephrase, record.edit.target),
            (found.specificity, f"{record.loc}?", record.loc_ans),
        ):
            right = published(tiny, prompt, answer)
            assert value == sum(right) / len(right)
