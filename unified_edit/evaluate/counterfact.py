"""CounterFact's metrics, exactly as their authors score them.

For an object o after a prompt, n(o) is the mean negative log-likelihood of its tokens.

| name | per prompt | prompts |
|---|---|---|
| ES, PS | n(true) > n(new) | rewrite, paraphrases |
| NS | n(true) < n(new) | neighbours |
| EM, PM | e^−n(new) − e^−n(true) | rewrite, paraphrases |
| NM | e^−n(true) − e^−n(new) | neighbours |
| accuracies | every token of new (neighbours: of true) is the argmax | all |
| generations | the greedy continuation begins with new | rewrite, paraphrases |

Averaged over a record's prompts, then over records; S is the harmonic mean of ES, PS
and NS. Teacher forcing flatters: the generations are reported beside it. The entropy of
sampled texts and their nearness to reference texts (GE, RS) are asked for apart: see
generations.py.

Source: Meng et al. 2022 (ROME), section 3.3 and appendix; kmeng01/memit's scorer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from unified_edit.edits import Record
from unified_edit.errors import EditError
from unified_edit.evaluate.generations import (
    References,
    Sampling,
    TfIdf,
    check_references,
    generation_scores,
    sampled_texts,
)
from unified_edit.evaluate.intervals import MeanScores
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.frames import PLAIN, Frame
from unified_edit.model.prompts import continuations
from unified_edit.model.scoring import Score, generate, score


@dataclass(frozen=True)
class RecordScores:
    """One record's metrics, each a mean over its prompts; None without prompts."""

    case_id: int | str
    es: float
    ps: float | None
    ns: float | None
    em: float
    pm: float | None
    nm: float | None
    rewrite_accuracy: float
    paraphrase_accuracy: float | None
    neighborhood_accuracy: float | None
    rewrite_generation: float | None
    paraphrase_generation: float | None
    generation_entropy: float | None = None
    """GE, in bits."""
    reference_score: float | None = None
    """RS, between 0 and 1."""


@dataclass(frozen=True)
class CounterFactScores(MeanScores[RecordScores]):
    """Means over records."""

    harmonic: ClassVar[tuple[str, ...]] = ("es", "ps", "ns")


def evaluate_counterfact(
    model: nn.Module,
    tokenizer: Any,
    records: Sequence[Record],
    *,
    generations: bool = True,
    sampling: Sampling | None = None,
    references: References | None = None,
    tfidf: TfIdf | None = None,
    frame: Frame = PLAIN,
    progress: bool = False,
) -> CounterFactScores:
    """Scores a model, edited or not, on records in CounterFact's schema.

    Args:
        generations: also whether the model says it by itself.
        sampling: also the entropy of texts drawn so after the generation prompts; slow.
        references: also how near those texts are to these.
        tfidf: how RS weighs terms; by default with the idf of all reference texts.
        frame: around each prompt, such as `chat_frame(tokenizer)`.

    Raises:
        EditError: no records; references without sampling or for none of the records.
    """
    if not records:
        raise EditError("there are no records to evaluate")
    if references is not None and sampling is None:
        raise EditError(
            "reference texts are compared with sampled texts; ask for those, too "
            "(sampling, or --entropy)"
        )
    if references is not None:
        check_references(records, references)
    adapter = ModelAdapter.of(model)
    prompts: list[str] = []
    new: list[str] = []
    true: list[str] = []
    for record in records:
        for prompt in _prompts(record):
            prompts.append(prompt)
            new.append(record.edit.target)
            true.append(record.target_true)
    both = score(
        adapter,
        tokenizer,
        prompts + prompts,
        new + true,
        frame=frame,
        progress=progress,
    )
    said = [""] * len(prompts)
    if generations:
        said = _generations(adapter, tokenizer, records, prompts, new, frame)
    free: list[tuple[float | None, float | None]] = [(None, None)] * len(records)
    if sampling is not None:
        asked = [prompt for record in records for prompt in record.generation_prompts]
        texts = iter(
            sampled_texts(
                adapter, tokenizer, asked, sampling, frame=frame, progress=progress
            )
        )
        grouped = [[next(texts) for _ in each.generation_prompts] for each in records]
        free = generation_scores(records, grouped, references, tfidf)
    found, start = [], 0
    for record, (entropy, near) in zip(records, free, strict=True):
        count = len(_prompts(record))
        span = slice(start, start + count)
        found.append(
            _record_scores(
                record,
                both[span],
                both[len(prompts) + start : len(prompts) + start + count],
                said[span] if generations else None,
                entropy,
                near,
            )
        )
        start += count
    return CounterFactScores(tuple(found))


def _prompts(record: Record) -> list[str]:
    return [
        record.edit.text,
        *record.paraphrase_prompts,
        *record.neighborhood_prompts,
    ]


def _generations(
    adapter: ModelAdapter,
    tokenizer: Any,
    records: Sequence[Record],
    prompts: Sequence[str],
    new: Sequence[str],
    frame: Frame,
) -> list[str]:
    """Greedy continuations of rewrite and paraphrase prompts, "" elsewhere."""
    wanted: list[int] = []
    start = 0
    for record in records:
        wanted += range(start, start + 1 + len(record.paraphrase_prompts))
        start += len(_prompts(record))
    asked = [prompts[i] for i in wanted]
    framed = [frame.around(prompt) for prompt in asked]
    pairs = continuations(tokenizer, framed, [new[i] for i in wanted], frame)
    longest = max(len(target) for _, target in pairs)
    said = [""] * len(prompts)
    texts = generate(adapter, tokenizer, asked, longest, frame=frame)
    for index, text in zip(wanted, texts, strict=True):
        said[index] = text
    return said


def _record_scores(
    record: Record,
    new: Sequence[Score],
    true: Sequence[Score],
    said: Sequence[str] | None,
    entropy: float | None,
    near: float | None,
) -> RecordScores:
    wins = [float(t.nll > n.nll) for n, t in zip(new, true, strict=True)]
    losses = [float(t.nll < n.nll) for n, t in zip(new, true, strict=True)]
    margins = [
        math.exp(-n.nll) - math.exp(-t.nll) for n, t in zip(new, true, strict=True)
    ]
    generated = [
        float(text.strip().startswith(record.edit.target)) for text in said or ()
    ]
    paraphrases = slice(1, 1 + len(record.paraphrase_prompts))
    neighbors = slice(paraphrases.stop, None)
    return RecordScores(
        case_id=record.case_id,
        es=wins[0],
        ps=_mean(wins[paraphrases]),
        ns=_mean(losses[neighbors]),
        em=margins[0],
        pm=_mean(margins[paraphrases]),
        nm=_mean([-margin for margin in margins[neighbors]]),
        rewrite_accuracy=float(new[0].argmax),
        paraphrase_accuracy=_mean([float(s.argmax) for s in new[paraphrases]]),
        neighborhood_accuracy=_mean([float(s.argmax) for s in true[neighbors]]),
        rewrite_generation=generated[0] if generated else None,
        paraphrase_generation=_mean(generated[paraphrases]),
        generation_entropy=entropy,
        reference_score=near,
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
