"""What free texts are like: how varied, and how near to texts about the same thing.

| name | of a record's sampled texts |
|---|---|
| GE | mean of ⅓·H₂ + ⅔·H₃, the base-2 entropies of a text's bigrams and trigrams |
| RS | cosine of TF-IDF vectors: the texts together, the reference texts together |

Published tables give GE and RS times 100. As published, texts have 100 tokens, the
prompt among them, each drawn from the 5 most probable; the end of a text does not stop
them; compatibility characters are taken apart (NFKD). Here the draws have a seed, and
words are cut by a regular expression (`words`) where the published code asks nltk,
whose model must be downloaded: nltk cuts `don't` into two words, here it is one. So GE
is to be compared with GE from here.

Source: Meng et al. 2022 (ROME), section 3.3; Zhang et al. 2018 for the entropy.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unified_edit.edits import Record, read_entries
from unified_edit.errors import EditError
from unified_edit.evaluate.intervals import mean_of
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.frames import PLAIN, Frame
from unified_edit.model.scoring import sample

References = Mapping[tuple[str, str], Sequence[str]]
"""(relation, id of the target) → texts about things of which it is true."""

_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
_TERM = re.compile(r"\b\w\w+\b")


@dataclass(frozen=True)
class Sampling:
    """How texts are drawn."""

    tokens: int = 100
    """Of a text, its prompt among them."""
    top_k: int = 5
    """Draw among this many most probable tokens; 1 is greedy."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.top_k < 1:
            raise EditError(f"{self}: tokens and top_k must be at least 1")


def words(text: str) -> list[str]:
    """Letters, digits and underscores in a row, with apostrophes between them; every
    other character that is no space alone."""
    return _WORD.findall(text)


def ngram_entropy(text: str, n: int) -> float:
    """Base-2 entropy of a text's runs of n words; 0 for a text without any."""
    found = words(text)
    counts = Counter(zip(*(found[start:] for start in range(n)), strict=False))
    total = sum(counts.values())
    return sum(-k / total * math.log2(k / total) for k in counts.values())


def generation_entropy(text: str) -> float:
    """⅓·H₂ + ⅔·H₃, as published: the mean of ⅔·H₂ and 4/3·H₃."""
    return ngram_entropy(text, 2) / 3 + 2 * ngram_entropy(text, 3) / 3


@dataclass(frozen=True)
class TfIdf:
    """Term weights, in scikit-learn's default definition: lower case, terms of two
    letters and more, idf = ln((1 + documents) / (1 + documents with it)) + 1."""

    idf: Mapping[str, float]
    """A term that is not in it counts for nothing."""

    @classmethod
    def of(cls, documents: Iterable[str]) -> TfIdf:
        """With the idf of these documents."""
        having: Counter[str] = Counter()
        count = 0
        for document in documents:
            having.update(set(_terms(document)))
            count += 1
        return cls({t: math.log((1 + count) / (1 + k)) + 1 for t, k in having.items()})

    def vector(self, text: str) -> dict[str, float]:
        """Counts times idf, of length 1; nothing for a text without known terms."""
        counts = Counter(term for term in _terms(text) if term in self.idf)
        weights = {term: k * self.idf[term] for term, k in counts.items()}
        length = math.hypot(*weights.values())
        return {term: weight / length for term, weight in weights.items()}

    def similarity(self, one: str, other: str) -> float:
        """Cosine of two texts' vectors; 0 if one of them has no known term."""
        a, b = self.vector(one), self.vector(other)
        return math.fsum(weight * b[term] for term, weight in a.items() if term in b)


def _terms(text: str) -> list[str]:
    return _TERM.findall(text.lower())


def sampled_texts(
    adapter: ModelAdapter,
    tokenizer: Any,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    frame: Frame = PLAIN,
    progress: bool = False,
) -> list[str]:
    """Prompts and what the model says after them, as GE and RS read them."""
    texts = sample(
        adapter,
        tokenizer,
        prompts,
        sampling.tokens,
        top_k=sampling.top_k,
        seed=sampling.seed,
        frame=frame,
        progress=progress,
    )
    return [unicodedata.normalize("NFKD", t).replace("\n\n", " ") for t in texts]


def generation_scores(
    records: Sequence[Record],
    texts: Sequence[Sequence[str]],
    references: References | None = None,
    tfidf: TfIdf | None = None,
) -> list[tuple[float | None, float | None]]:
    """GE and RS of each record; None without generation prompts or reference texts.

    Args:
        texts: of each record, as `sampled_texts` gives them.
        tfidf: by default with the idf of all reference texts.
    """
    known = references or {}
    about = [known.get(_key(record), ()) for record in records]
    if references is not None and tfidf is None:
        tfidf = TfIdf.of(text for group in known.values() for text in group)
    found: list[tuple[float | None, float | None]] = []
    for said, wanted in zip(texts, about, strict=True):
        near = None
        if said and wanted and tfidf is not None:
            near = tfidf.similarity(" ".join(said), " ".join(wanted))
        varied = mean_of([generation_entropy(text) for text in said]) if said else None
        found.append((varied, near))
    return found


def check_references(records: Sequence[Record], references: References) -> None:
    """Before texts are sampled for nothing.

    Raises:
        EditError: there are none for any of the records.
    """
    if not any(references.get(_key(record)) for record in records):
        raise EditError(
            f"no reference texts for any record; the first has {_key(records[0])} as "
            "its relation and target's id"
        )


def _key(record: Record) -> tuple[str, str]:
    return record.relation, record.target_id


def read_references(path: str | Path) -> dict[tuple[str, str], tuple[str, ...]]:
    """Reads reference texts as ROME publishes them (`attribute_snippets.json`): a list
    of `{"relation_id", "target_id", "samples": [{"text"}]}`.

    Raises:
        EditError: naming the file and the entry.
    """
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for relation, target, texts in read_entries(path, _reference):
        found[relation, target] = found.get((relation, target), ()) + texts
    return found


def _reference(entry: Mapping[str, Any]) -> tuple[str, str, tuple[str, ...]]:
    relation, target, samples = (
        entry.get(name) for name in ("relation_id", "target_id", "samples")
    )
    texts = (
        tuple(each.get("text") if isinstance(each, dict) else None for each in samples)
        if isinstance(samples, list)
        else (None,)
    )
    if not all(isinstance(each, str) for each in (relation, target, *texts)):
        raise EditError(
            'reference texts are {"relation_id": …, "target_id": …, "samples": '
            '[{"text": …}, …]}'
        )
    return relation, target, texts  # type: ignore[return-value]  # just checked
