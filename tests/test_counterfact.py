"""CounterFact's metrics against a scorer that takes one prompt at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_kit import (
    DATA,
    EDITS,
    RECORD,
    Tiny,
    greedy_word,
    make_model,
    make_tokenizer,
    target_ids,
)

from unified_edit.edits import Edit, Record, read_records
from unified_edit.errors import EditError
from unified_edit.evaluate.counterfact import (
    CounterFactScores,
    RecordScores,
    evaluate_counterfact,
)

RECORDS = [
    replace(RECORD, case_id=1),
    Record(
        edit=EDITS[2],
        target_true="chess",
        paraphrase_prompts=("Often Carla Nunes likes",),
        neighborhood_prompts=("Dov Stern likes", "Eero Lind likes"),
        case_id=2,
    ),
    Record(edit=EDITS[3], target_true="New York", case_id=3),
    Record(
        edit=EDITS[4],
        target_true="a red boat",
        neighborhood_prompts=("Ada Lovelace likes",),
        case_id=4,
    ),
]
SAMPLED = {"generation_entropy", "reference_score"}  # in test_generations.py
FIELDS = [
    name
    for name in RecordScores.__dataclass_fields__
    if name != "case_id" and name not in SAMPLED
]


class PlainScorer:
    """As the published scorer has it, slowly."""

    def __init__(self, tiny: Tiny) -> None:
        self.tiny = tiny

    def nll(self, prompt: str, target: str) -> tuple[float, bool]:
        ids = self.tiny.tokenizer(prompt)["input_ids"]
        answer = target_ids(self.tiny.tokenizer, prompt, target)
        with torch.no_grad():
            logits = self.tiny.model(input_ids=torch.tensor([ids + answer])).logits[0]
        total, right = 0.0, True
        for offset, token in enumerate(answer):
            row = logits[len(ids) - 1 + offset].double()
            total -= float(row.log_softmax(0)[token])
            right = right and int(row.argmax()) == token
        return total / len(answer), right

    def says(self, prompt: str, target: str) -> bool:
        encoded = self.tiny.tokenizer(prompt, return_tensors="pt")
        encoded.pop("token_type_ids", None)
        output = self.tiny.model.generate(
            **encoded, max_new_tokens=12, do_sample=False, pad_token_id=1
        )
        said = self.tiny.tokenizer.decode(
            output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return bool(said.strip().startswith(target))

    def record(self, record: Record) -> dict[str, float | None]:
        new, true = record.edit.target, record.target_true

        def mean(values: list[float]) -> float | None:
            return sum(values) / len(values) if values else None

        def group(prompts: list[str]) -> dict[str, list[float]]:
            found: dict[str, list[float]] = {}
            for prompt in prompts:
                (n, n_right), (t, t_right) = (
                    self.nll(prompt, new),
                    self.nll(prompt, true),
                )
                for name, value in (
                    ("win", t > n),
                    ("loss", t < n),
                    ("margin", math.exp(-n) - math.exp(-t)),
                    ("new_right", n_right),
                    ("true_right", t_right),
                ):
                    found.setdefault(name, []).append(float(value))
            return found

        rewrite = group([record.edit.text])
        paraphrase = group(list(record.paraphrase_prompts))
        neighbors = group(list(record.neighborhood_prompts))
        return {
            "es": mean(rewrite["win"]),
            "ps": mean(paraphrase.get("win", [])),
            "ns": mean(neighbors.get("loss", [])),
            "em": mean(rewrite["margin"]),
            "pm": mean(paraphrase.get("margin", [])),
            "nm": mean([-m for m in neighbors.get("margin", [])]),
            "rewrite_accuracy": mean(rewrite["new_right"]),
            "paraphrase_accuracy": mean(paraphrase.get("new_right", [])),
            "neighborhood_accuracy": mean(neighbors.get("true_right", [])),
            "rewrite_generation": float(self.says(record.edit.text, new)),
            "paraphrase_generation": mean(
                [float(self.says(p, new)) for p in record.paraphrase_prompts]
            ),
        }


def test_every_metric_equals_the_plain_scorer(tiny: Tiny) -> None:
    scores = evaluate_counterfact(tiny.model, tiny.tokenizer, RECORDS)
    plain = [PlainScorer(tiny).record(record) for record in RECORDS]
    for record, found, expected in zip(RECORDS, scores.records, plain, strict=True):
        assert found.case_id == record.case_id
        for name in FIELDS:
            value, wanted = getattr(found, name), expected[name]
            if wanted is None:
                assert value is None, name
            else:
                assert math.isclose(value, wanted, rel_tol=1e-3, abs_tol=1e-9), name
    for name in FIELDS:
        known = [each[name] for each in plain if each[name] is not None]
        expected_mean = sum(known) / len(known)  # type: ignore[arg-type]
        assert math.isclose(
            scores.mean(name), expected_mean, rel_tol=1e-3, abs_tol=1e-9
        )
    # Not all alike, or the test would show little.
    assert len({each["es"] for each in plain} | {each["ns"] for each in plain}) > 1


def test_accuracy_and_generation_of_what_the_model_does_say(tiny: Tiny) -> None:
    """The target is the model's own greedy continuation; the other object is not."""
    prompt, word = greedy_word(tiny)
    subject = prompt.split()[0]
    record = Record(
        edit=Edit("{}" + prompt.removeprefix(subject), subject, word),
        target_true="Quito",
        paraphrase_prompts=(prompt,),
        neighborhood_prompts=(prompt,),
    )
    scores = evaluate_counterfact(tiny.model, tiny.tokenizer, [record])
    (found,) = scores.records
    assert found.es == found.ps == found.rewrite_accuracy == 1
    assert found.rewrite_generation == found.paraphrase_generation == 1
    assert found.ns == 0 and found.neighborhood_accuracy == 0
    assert found.em > 0 and found.nm is not None and found.nm < 0
    assert scores.s == 0
    swapped = replace(record, edit=replace(record.edit, target="Quito"))
    swapped = replace(swapped, target_true=word)
    (other,) = evaluate_counterfact(tiny.model, tiny.tokenizer, [swapped]).records
    assert other.es == 0 and other.ns == 1 and other.neighborhood_accuracy == 1
    assert other.rewrite_generation == 0
    assert math.isclose(other.em, -found.em, rel_tol=1e-4)


def scores_of(**values: Any) -> RecordScores:
    return RecordScores(
        **{"case_id": 0, **dict.fromkeys(FIELDS), "es": 1.0, "em": 0.0, **values}
    )


def test_s_is_the_harmonic_mean_of_the_means() -> None:
    records = (scores_of(es=1.0, ps=0.5, ns=0.8), scores_of(es=0.5, ps=0.9, ns=None))
    scores = CounterFactScores(records)
    assert math.isclose(scores.s, 3 / (1 / 0.75 + 1 / 0.7 + 1 / 0.8))
    assert math.isclose(scores.as_dict()["s"], scores.s)
    zero = CounterFactScores((scores_of(es=1.0, ps=0.0, ns=1.0),))
    assert zero.s == 0 and zero.as_dict()["s"] == 0


def test_metrics_that_no_record_has_are_absent() -> None:
    scores = CounterFactScores((scores_of(es=1.0),))
    assert math.isnan(scores.mean("ps")) and math.isnan(scores.s)
    plain = scores.as_dict()
    assert "ps" not in plain and "s" not in plain and plain["es"] == 1
    assert scores.per_record()[0]["ps"] is None


def test_every_mean_has_its_interval(gpt2: Tiny) -> None:
    scores = evaluate_counterfact(gpt2.model, gpt2.tokenizer, RECORDS)
    found = scores.intervals()
    assert {name: each.mean for name, each in found.items()} == scores.as_dict()
    assert list(found) == list(scores.as_dict()) and "s" in found
    # Margins differ from record to record.
    assert found["em"].low < found["em"].mean < found["em"].high
    assert found == scores.intervals(seed=0)
    # ES, PS and NS of the same records: s cannot leave what they allow.
    parts = [found[name] for name in ("es", "ps", "ns")]
    assert min(p.low for p in parts) <= found["s"].low
    assert found["s"].high <= max(p.high for p in parts)


def test_generations_can_be_left_out(gpt2: Tiny) -> None:
    scores = evaluate_counterfact(
        gpt2.model, gpt2.tokenizer, RECORDS, generations=False
    )
    plain = scores.as_dict()
    assert "rewrite_generation" not in plain and "paraphrase_generation" not in plain
    with_them = evaluate_counterfact(gpt2.model, gpt2.tokenizer, RECORDS).as_dict()
    for name, value in plain.items():
        assert value == with_them[name]


def test_no_records_are_refused(gpt2: Tiny) -> None:
    with pytest.raises(EditError, match="no records"):
        evaluate_counterfact(gpt2.model, gpt2.tokenizer, [])


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data sets in {DATA}")
def test_genuine_records() -> None:
    """Longer than what the other tests have: 13 prompts each, quotes, newlines."""
    records = read_records(DATA / "counterfact" / "full_300.json")[:4]
    model = make_model("gpt2", n_positions=512)
    tiny = Tiny("gpt2", model, make_tokenizer("gpt2"), {})
    scores = evaluate_counterfact(model, tiny.tokenizer, records, generations=False)
    plain = PlainScorer(tiny)
    for record, found in zip(records, scores.records, strict=True):
        expected = plain.record(record)
        for name in FIELDS[:9]:
            assert math.isclose(
                getattr(found, name), expected[name], rel_tol=1e-3, abs_tol=1e-9
            ), name
