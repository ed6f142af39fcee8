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
and NS. Teacher forcing flatters: the generations are reported beside it.

Source: Meng et al. 2022 (ROME), section 3.3 and appendix; kmeng01/memit's scorer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from unified_edit.edits import Record
from unified_edit.errors import EditError
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


@dataclass(frozen=True)
class CounterFactScores:
    """Means over records."""

    records: tuple[RecordScores, ...]

    def mean(self, name: str) -> float:
        """Mean of a field of `RecordScores` over the records that have it; NaN if
        none has."""
        values = [getattr(record, name) for record in self.records]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else math.nan

    @property
    def s(self) -> float:
        """Harmonic mean of the mean ES, PS and NS; 0 if one of them is."""
        parts = [self.mean(name) for name in ("es", "ps", "ns")]
        if any(part == 0 for part in parts):
            return 0.0
        return len(parts) / sum(1 / part for part in parts)

    def as_dict(self) -> dict[str, float]:
        """S and the mean of every metric; absent where no record has it."""
        names = [n for n in RecordScores.__dataclass_fields__ if n != "case_id"]
        means = {"s": self.s, **{name: self.mean(name) for name in names}}
        return {name: value for name, value in means.items() if not math.isnan(value)}

    def per_record(self) -> list[dict[str, Any]]:
        """Every record's metrics as plain data."""
        return [asdict(record) for record in self.records]


def evaluate_counterfact(
    model: nn.Module,
    tokenizer: Any,
    records: Sequence[Record],
    *,
    generations: bool = True,
    frame: Frame = PLAIN,
    progress: bool = False,
) -> CounterFactScores:
    """Scores a model, edited or not, on records in CounterFact's schema.

    Args:
        generations: also whether the model says it by itself.
        frame: around each prompt, such as `chat_frame(tokenizer)`.

    Raises:
        EditError: no records.
    """
    if not records:
        raise EditError("there are no records to evaluate")
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
    found, start = [], 0
    for record in records:
        count = len(_prompts(record))
        span = slice(start, start + count)
        found.append(
            _record_scores(
                record,
                both[span],
                both[len(prompts) + start : len(prompts) + start + count],
                said[span] if generations else None,
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
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
