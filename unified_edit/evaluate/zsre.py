"""zsRE's metrics, exactly as ROME and MEMIT score them.

| name | share of the tokens that are the argmax, of | after |
|---|---|---|
| efficacy | the new answer | the question |
| paraphrase | the new answer | the question in other words |
| specificity | the gold answer of an unrelated question | that question and "?" |

Each token follows its prompt and the tokens before it, the right ones, so an answer
that is half right counts half, and its length is given away. Averaged over an answer's
tokens, then over records; S is the harmonic mean of the three.

Specificity is not about the edit alone: an unedited model gives few gold answers. What
an update changed is `agreement`: the share of the same tokens in whose place the argmax
is the unedited model's (EasyEdit's locality).

Source: Meng et al. 2022 (ROME), section 3.1; kmeng01/memit's scorer. It tokenizes every
prompt with the answer's first tokens anew, and so counts BOS where a tokenizer adds
one; here an answer's tokens are those that follow its prompt. With GPT-2's tokenizer
the two are one, but for characters cut in half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from unified_edit.edits import Edit, read_entries
from unified_edit.errors import EditError
from unified_edit.evaluate.intervals import MeanScores
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.scoring import score

Answer = Literal["alt", "answers"]
"""Which field is the new answer: `alt`, which MEND and EasyEdit edit in and
`read_edits` takes, or the first of `answers`, the true one, as ROME and MEMIT do."""

_UNRELATED = "nq question: "


@dataclass(frozen=True)
class ZsreRecord:
    """A question with a new answer, in other words, and an unrelated one."""

    edit: Edit
    rephrase: str
    loc: str
    """A question of Natural Questions, with its prefix and without a question mark."""
    loc_ans: str
    case_id: int | str = 0

    def __post_init__(self) -> None:
        for name in ("rephrase", "loc", "loc_ans"):
            text = getattr(self, name)
            if not isinstance(text, str) or not text.strip():
                raise EditError(f"{self.edit}: {name} is no text: {text!r}")
        if _UNRELATED not in self.loc:
            raise EditError(
                f"{self.edit}: loc must hold {_UNRELATED!r}, as in MEND's data: "
                f"{self.loc!r}"
            )


@dataclass(frozen=True)
class ZsreRecordScores:
    """One record's metrics."""

    case_id: int | str
    efficacy: float
    paraphrase: float
    specificity: float
    agreement: float | None
    """With the unedited model, if that was scored."""
    predicted: tuple[int, ...]
    """The argmax in the place of each of the gold answer's tokens."""


@dataclass(frozen=True)
class ZsreScores(MeanScores[ZsreRecordScores]):
    """Means over records."""

    harmonic: ClassVar[tuple[str, ...]] = ("efficacy", "paraphrase", "specificity")
    apart: ClassVar[tuple[str, ...]] = ("case_id", "predicted")

    def compared(self, unedited: ZsreScores) -> ZsreScores:
        """The same with `agreement`: how many argmaxes are the unedited model's."""
        return ZsreScores(
            tuple(
                replace(one, agreement=_agreement(one.predicted, other.predicted))
                for one, other in zip(self.records, unedited.records, strict=True)
            )
        )


def _agreement(one: Sequence[int], other: Sequence[int]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def read_zsre(path: str | Path, answer: Answer = "alt") -> list[ZsreRecord]:
    """Reads zsRE's evaluation records as MEND and ROME have them:
    `{"src", "subject", "alt", "answers", "rephrase", "loc", "loc_ans"}`.

    Raises:
        EditError: naming the file and the entry.
    """
    if answer not in ("alt", "answers"):
        raise EditError(f"answer {answer!r}: expected alt or answers")
    records = read_entries(path, partial(_record_from, answer))
    return [replace(each, case_id=number) for number, each in enumerate(records)]


def _record_from(answer: Answer, entry: Mapping[str, Any]) -> ZsreRecord:
    given = entry[answer]
    if answer == "answers":
        if not isinstance(given, list) or not given:
            raise EditError(f"answers must be a list of texts, got {given!r}")
        given = given[0]
    if not isinstance(given, str):
        raise EditError(f"the answer in {answer!r} is no text: {given!r}")
    return ZsreRecord(
        edit=Edit(entry["src"], entry["subject"], given.strip()),
        rephrase=entry["rephrase"],
        loc=entry["loc"],
        loc_ans=entry["loc_ans"],
    )


def evaluate_zsre(
    model: nn.Module,
    tokenizer: Any,
    records: Sequence[ZsreRecord],
    *,
    progress: bool = False,
) -> ZsreScores:
    """Scores a model, edited or not, on zsRE's records.

    Raises:
        EditError: no records.
    """
    if not records:
        raise EditError("there are no records to evaluate")
    prompts: list[str] = []
    answers: list[str] = []
    for record in records:
        prompts += [record.edit.text, record.rephrase, f"{record.loc}?"]
        answers += [record.edit.target, record.edit.target, record.loc_ans]
    found = score(
        ModelAdapter.of(model), tokenizer, prompts, answers, progress=progress
    )
    return ZsreScores(
        tuple(
            ZsreRecordScores(
                case_id=record.case_id,
                efficacy=found[start].share,
                paraphrase=found[start + 1].share,
                specificity=found[start + 2].share,
                agreement=None,
                predicted=found[start + 2].predicted,
            )
            for start, record in zip(range(0, len(found), 3), records, strict=True)
        )
    )
