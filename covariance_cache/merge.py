"""One layer's statistics from parts that were collected apart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch

from covariance_cache.errors import StatisticsError, StatisticsMismatch
from covariance_cache.shrinkage import Shrinkage
from covariance_cache.statistics import KeyStatistics

_ROWS = 1024
_SHARED = (
    "model_fingerprint",
    "module",
    "tokenizer_fingerprint",
    "window",
    "model_dtype",
)


def merge(parts: Sequence[KeyStatistics]) -> KeyStatistics:
    """The mean over all the parts' keys, as if they had been read in one pass.

    Fingerprints of the texts are kept as `provenance.parts`; what only a pass can
    measure (`adequacy`) is dropped.

    Raises:
        StatisticsError: fewer than two parts, or one that is shrunk.
        StatisticsMismatch: of another layer, model, module, tokenizer, window, width
            or dtype, naming both sides; or the same text twice.
    """
    for part in parts:
        if part.shrinkage != Shrinkage():
            raise StatisticsError(
                f"a part is used with shrinkage {part.shrinkage}; merge plain means, "
                "and shrink the result"
            )
    if len(parts) < 2:
        raise StatisticsError(f"there is nothing to merge in {len(parts)} part(s)")
    first = parts[0]
    for number, part in enumerate(parts[1:], start=2):
        for name, one, other in _differences(first, part):
            raise StatisticsMismatch(
                f"part {number} has {name} {other}, part 1 has {one}; merge what was "
                "collected on one model, with one tokenizer and window"
            )
    texts = [text for part in parts for text in _texts(part)]
    repeated = {text for text in texts if texts.count(text) > 1}
    if repeated:
        raise StatisticsMismatch(
            f"the text {min(repeated)} is in two of the parts, so its keys would "
            "count twice; merge parts of different texts"
        )
    count = sum(part.count for part in parts)
    total = torch.empty_like(first.second_moment)
    for start in range(0, first.d_key, _ROWS):
        rows = slice(start, start + _ROWS)
        sums = [part.second_moment[rows].double() * part.count for part in parts]
        total[rows] = torch.stack(sums).sum(dim=0) / count
    seeds = {part.provenance.seed for part in parts}
    provenance = replace(
        first.provenance,
        corpus_fingerprint=hashlib.sha256("".join(texts).encode()).hexdigest(),
        seed=seeds.pop() if len(seeds) == 1 else None,
        origin=None,
        parts=tuple(texts),
    )
    accepted = [part for part in parts if part.accepted_mismatch]
    return KeyStatistics(
        first.layer,
        total,
        count,
        provenance,
        accepted_mismatch="; ".join(
            dict.fromkeys(str(part.accepted_mismatch) for part in accepted)
        )
        or None,
        accepted_for=accepted[0].accepted_for if accepted else None,
    )


def _texts(part: KeyStatistics) -> tuple[str, ...]:
    source = part.provenance
    return source.parts or ((source.corpus_fingerprint or source.origin or "unknown"),)


def _differences(
    one: KeyStatistics, other: KeyStatistics
) -> list[tuple[str, object, object]]:
    pairs: list[tuple[str, object, object]] = [
        ("layer", one.layer, other.layer),
        ("d_key", one.d_key, other.d_key),
        ("dtype", one.second_moment.dtype, other.second_moment.dtype),
        ("accepted_for", one.accepted_for, other.accepted_for),
    ]
    pairs += [
        (name, getattr(one.provenance, name), getattr(other.provenance, name))
        for name in _SHARED
    ]
    return [each for each in pairs if each[1] != each[2]]
