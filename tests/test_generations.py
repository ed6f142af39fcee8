"""Sampled texts, their entropy and their nearness to others, against numbers worked
out by hand and plain loops."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_kit import EDITS, RECORD, Tiny, make_tokenizer

from unified_edit.edits import Record, records_of
from unified_edit.errors import EditError, PromptError
from unified_edit.evaluate.counterfact import evaluate_counterfact
from unified_edit.evaluate.generations import (
    Sampling,
    TfIdf,
    generation_entropy,
    ngram_entropy,
    read_references,
    sampled_texts,
    words,
)
from unified_edit.model.frames import Frame
from unified_edit.model.scoring import sample

PROMPTS = ["Ada Lovelace lives in", "In Porto,", "Bo", "Bo", "Dov Stern likes"]


def test_words() -> None:
    assert words("Don't—stop, l’été's 3.5 km (a_b)!") == [
        *("Don't", "—", "stop", ",", "l’été's", "3", ".", "5", "km"),
        *("(", "a_b", ")", "!"),
    ]
    assert words("'quoted' \n") == ["'", "quoted", "'"]


def test_entropy_by_hand() -> None:
    # a b, b a, a b: shares 2/3 and 1/3; a b a, b a b: halves.
    two = math.log2(3) - 2 / 3
    assert math.isclose(ngram_entropy("a b a b", 2), two)
    assert math.isclose(ngram_entropy("a b a b", 3), 1)
    assert math.isclose(generation_entropy("a b a b"), two / 3 + 2 / 3)
    assert generation_entropy("no no no no no no no") == 0
    assert generation_entropy("alone") == generation_entropy("") == 0
    # Each n-gram once is the most there can be.
    distinct = " ".join(f"w{n}" for n in range(18))
    assert math.isclose(
        generation_entropy(distinct), math.log2(17) / 3 + 2 * math.log2(16) / 3
    )


def test_tfidf_equals_scikit_learns_documented_example() -> None:
    """Counts and smoothed rows of its user guide, section "Tf-idf term weighting"."""
    counts = [(3, 0, 1), (2, 0, 0), (3, 0, 0), (4, 0, 0), (3, 2, 0), (3, 0, 2)]
    terms = ("aa", "bb", "cc")
    texts = [
        " ".join(t for t, count in zip(terms, row, strict=True) for _ in range(count))
        for row in counts
    ]
    fitted = TfIdf.of(texts)
    expected = [(0.85151335, 0, 0.52433293), (1, 0, 0), (1, 0, 0), (1, 0, 0)]
    expected += [(0.55422893, 0.83236428, 0), (0.63035731, 0, 0.77630514)]
    for text, row in zip(texts, expected, strict=True):
        vector = fitted.vector(text)
        assert [vector.get(t, 0) for t in terms] == pytest.approx(row, abs=1e-8)
    assert fitted.similarity(texts[0], texts[5]) == pytest.approx(
        0.85151335 * 0.63035731 + 0.52433293 * 0.77630514, abs=1e-8
    )


def test_terms_are_scikit_learns() -> None:
    fitted = TfIdf.of(["The cat's hat", "the Dog"])
    # Lower case, no single letters, no marks.
    assert fitted.idf == {
        "the": 1.0,
        **dict.fromkeys(("cat", "hat", "dog"), math.log(3 / 2) + 1),
    }
    assert math.isclose(fitted.similarity("THE DOG!", "a dog, the s"), 1)
    assert fitted.similarity("a zebra", "the dog") == 0
    assert fitted.similarity("zebra the", "the") == 1  # unknown terms do not count


def test_the_most_probable_alone_is_greedy(tiny: Tiny) -> None:
    found = sample(tiny.adapter, tiny.tokenizer, PROMPTS, 30, top_k=1)
    for prompt, text in zip(PROMPTS, found, strict=True):
        ids = list(tiny.tokenizer(prompt)["input_ids"])
        while len(ids) < 30:  # the end of a text does not stop it
            with torch.no_grad():
                logits = tiny.model(input_ids=torch.tensor([ids])).logits[0, -1]
            ids.append(int(logits.argmax()))
        assert text == tiny.tokenizer.decode(ids, skip_special_tokens=True)


def test_draws_follow_the_most_probable_tokens(gpt2: Tiny) -> None:
    (ids,) = gpt2.tokenizer([PROMPTS[0]])["input_ids"]
    with torch.no_grad():
        logits = gpt2.model(input_ids=torch.tensor([ids])).logits[0, -1]
    top = logits.topk(3)
    chances = top.values.softmax(0).tolist()
    expected = {
        gpt2.tokenizer.decode([*ids, token], skip_special_tokens=True): chance
        for token, chance in zip(top.indices.tolist(), chances, strict=True)
    }
    count = 900
    drawn = Counter(
        sample(
            gpt2.adapter, gpt2.tokenizer, [PROMPTS[0]] * count, len(ids) + 1, top_k=3
        )
    )
    assert set(drawn) == set(expected)
    for text, chance in expected.items():
        deviation = math.sqrt(count * chance * (1 - chance))
        assert abs(drawn[text] - count * chance) < 4 * deviation


def test_a_text_depends_on_its_prompt_and_seed_alone(tiny: Tiny) -> None:
    def texts(prompts: list[str], seed: int = 0) -> list[str]:
        return sample(tiny.adapter, tiny.tokenizer, prompts, 20, seed=seed)

    state = torch.random.get_rng_state()
    found = texts(PROMPTS)
    assert texts(PROMPTS) == found != texts(PROMPTS, seed=1)
    assert found[2] != found[3]  # the same prompt again is another draw
    assert texts(PROMPTS[:3]) == found[:3]
    assert texts(PROMPTS[::-1])[0] == found[-1]
    assert torch.equal(torch.random.get_rng_state(), state)
    for prompt, text in zip(PROMPTS, found, strict=True):
        assert text.strip().startswith(prompt)


def test_lengths(tiny: Tiny) -> None:
    prompt = PROMPTS[0]
    count = len(tiny.tokenizer(prompt)["input_ids"])
    same = sample(tiny.adapter, tiny.tokenizer, [prompt], count)
    assert same == sample(tiny.adapter, tiny.tokenizer, [prompt], 1)
    assert same[0].strip() == prompt
    with pytest.raises(PromptError, match="96 positions"):
        sample(tiny.adapter, tiny.tokenizer, [prompt], 97)
    for wrong in ({"tokens": 0}, {"top_k": 0}):
        with pytest.raises(EditError, match="at least 1"):
            Sampling(**wrong)


def test_empty_prompts_need_a_token_before_them(gpt2: Tiny) -> None:
    with pytest.raises(PromptError, match="empty"):
        sample(gpt2.adapter, make_tokenizer("gpt2"), ["Ada", ""], 9)
    assert sample(gpt2.adapter, gpt2.tokenizer, [], 9) == []


def test_a_frames_words_are_no_part_of_a_text(gpt2: Tiny) -> None:
    frame = Frame("Question: ", "\nAnswer:")
    (text,) = sample(
        gpt2.adapter, gpt2.tokenizer, ["Ada lives in"], 20, top_k=1, frame=frame
    )
    room = 20 - len(gpt2.tokenizer("Ada lives in")["input_ids"])
    framed = gpt2.tokenizer("Question: Ada lives in\nAnswer:")["input_ids"]
    (whole,) = sample(
        gpt2.adapter,
        gpt2.tokenizer,
        ["Question: Ada lives in\nAnswer:"],
        len(framed) + room,
        top_k=1,
    )
    said = whole.removeprefix("Question: Ada lives in\nAnswer:")
    assert said != whole and text == f"Ada lives in {said.strip()}"


RECORDS = [
    replace(
        RECORD,
        generation_prompts=("Ada Lovelace's town", "Ada Lovelace's town", "In Oslo"),
        relation="P1",
        target_id="Q60",
    ),
    Record(EDITS[4], "chess", relation="P2", target_id="Q5"),
    Record(EDITS[2], "chess", generation_prompts=("Carla Nunes likes",)),
]
REFERENCES = {
    ("P1", "Q60"): ("New York is a town in the state of New York.", "letters say"),
    ("P2", "Q5"): ("The cello is what friends say.",),
}


def test_in_counterfacts_metrics(gpt2: Tiny) -> None:
    sampling = Sampling(40, seed=3)
    found = evaluate_counterfact(
        gpt2.model,
        gpt2.tokenizer,
        RECORDS,
        generations=False,
        sampling=sampling,
        references=REFERENCES,
    )
    first, bare, last = found.records
    texts = sampled_texts(
        gpt2.adapter, gpt2.tokenizer, RECORDS[0].generation_prompts, sampling
    )
    assert len(set(texts)) == 3
    assert first.generation_entropy is not None and last.generation_entropy is not None
    assert math.isclose(
        first.generation_entropy, sum(map(generation_entropy, texts)) / 3
    )
    fitted = TfIdf.of([text for group in REFERENCES.values() for text in group])
    near = fitted.similarity(" ".join(texts), " ".join(REFERENCES["P1", "Q60"]))
    assert first.reference_score == near and 0 < near < 1
    # No prompts, no texts; no reference texts, no nearness.
    assert (bare.generation_entropy, bare.reference_score) == (None, None)
    assert last.reference_score is None
    means = found.as_dict()
    assert means["reference_score"] == near
    assert math.isclose(
        means["generation_entropy"],
        (first.generation_entropy + last.generation_entropy) / 2,
    )
    table = TfIdf({"town": 1.0, "york": 2.0})
    other = evaluate_counterfact(
        gpt2.model,
        gpt2.tokenizer,
        RECORDS[:1],
        generations=False,
        sampling=sampling,
        references=REFERENCES,
        tfidf=table,
    )
    assert other.records[0].reference_score == table.similarity(
        " ".join(texts), " ".join(REFERENCES["P1", "Q60"])
    )
    without = evaluate_counterfact(gpt2.model, gpt2.tokenizer, RECORDS).as_dict()
    assert not {"generation_entropy", "reference_score"} & set(without)
    for name in set(without) & set(means):
        assert without[name] == means[name]


def test_texts_are_as_published(gpt2: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "unified_edit.evaluate.generations.sample",
        lambda *_, **__: ["ﬁne\n\nday\nx"],
    )
    texts = sampled_texts(gpt2.adapter, gpt2.tokenizer, ["x"], Sampling())
    assert texts == ["fine day\nx"]


def test_references_that_lead_nowhere(gpt2: Tiny) -> None:
    def score(**options: object) -> None:
        evaluate_counterfact(gpt2.model, gpt2.tokenizer, RECORDS, **options)  # type: ignore[arg-type]

    with pytest.raises(EditError, match="ask for those, too"):
        score(references=REFERENCES)
    other = {("P1", "Q61"): ("a text",)}
    with pytest.raises(EditError, match=r"no reference texts .*'P1', 'Q60'"):
        score(references=other, sampling=Sampling(9))


def test_reading_references(tmp_path: Path) -> None:
    path = tmp_path / "attribute_snippets.json"
    entries = [
        {
            "relation_id": "P1",
            "target_id": "Q60",
            "samples": [{"name": "Ada", "text": "one"}, {"text": "two"}],
        },
        {"relation_id": "P2", "target_id": "Q60", "samples": []},
        {"relation_id": "P1", "target_id": "Q60", "samples": [{"text": "three"}]},
    ]
    path.write_text(json.dumps(entries))
    assert read_references(path) == {
        ("P1", "Q60"): ("one", "two", "three"),
        ("P2", "Q60"): (),
    }
    for wrong in (
        {"samples": None},
        {"samples": [{"name": "Ada"}]},
        {"samples": ["one"]},
        {"target_id": 60},
    ):
        path.write_text(json.dumps([entries[0], {**entries[0], **wrong}]))
        with pytest.raises(EditError, match="entry 1: reference texts are"):
            read_references(path)


def test_records_know_their_targets_id() -> None:
    request = {
        "prompt": "{} lives in",
        "subject": "Ada",
        "relation_id": "P551",
        "target_new": {"str": "Oslo", "id": "Q585"},
        "target_true": {"str": "Rome"},
    }
    (record,) = records_of([{"requested_rewrite": request}])
    assert (record.relation, record.target_id) == ("P551", "Q585")
    request["target_new"] = {"str": "Oslo"}
    assert records_of([{"requested_rewrite": request}])[0].target_id == ""
