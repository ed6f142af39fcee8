"""Second moments of a language model's MLP keys: collected in one pass over any text,
kept one file per layer, refused where they do not belong.

Stands alone: it knows modules by name, and nothing of editing.
"""

from covariance_cache.accumulator import SecondMomentAccumulator
from covariance_cache.capture import capture_inputs, captured_inputs
from covariance_cache.collect import collect
from covariance_cache.errors import (
    CaptureError,
    CorpusError,
    CorpusExhausted,
    NonFiniteActivations,
    StatisticsError,
    StatisticsMismatch,
)
from covariance_cache.fingerprint import (
    exact_fingerprint,
    model_fingerprint,
    tokenizer_fingerprint,
)
from covariance_cache.modules import KEY_MODULES
from covariance_cache.ranks import ALONE, Ranks, joined
from covariance_cache.statistics import KeyStatistics, Provenance
from covariance_cache.store import StatisticsStore

__all__ = [
    "ALONE",
    "CaptureError",
    "CorpusError",
    "CorpusExhausted",
    "KEY_MODULES",
    "KeyStatistics",
    "NonFiniteActivations",
    "Provenance",
    "Ranks",
    "SecondMomentAccumulator",
    "StatisticsError",
    "StatisticsMismatch",
    "StatisticsStore",
    "capture_inputs",
    "captured_inputs",
    "collect",
    "exact_fingerprint",
    "joined",
    "model_fingerprint",
    "tokenizer_fingerprint",
]
