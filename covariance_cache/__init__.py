"""Second moments of a language model's MLP keys: collected in one pass over any text,
kept one file per layer, refused where they do not belong.

Stands alone: it knows modules by name, and nothing of editing.
"""

from covariance_cache.accumulator import SecondMomentAccumulator
from covariance_cache.adequacy import Adequacy
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
from covariance_cache.hub import HubText, hub_documents
from covariance_cache.legacy import import_npz
from covariance_cache.merge import merge
from covariance_cache.modules import KEY_MODULES
from covariance_cache.ranks import ALONE, Ranks, joined
from covariance_cache.shrinkage import Shrinkage
from covariance_cache.statistics import KeyStatistics, Provenance
from covariance_cache.store import StatisticsStore

__all__ = [
    "ALONE",
    "Adequacy",
    "CaptureError",
    "CorpusError",
    "CorpusExhausted",
    "HubText",
    "KEY_MODULES",
    "KeyStatistics",
    "NonFiniteActivations",
    "Provenance",
    "Ranks",
    "SecondMomentAccumulator",
    "Shrinkage",
    "StatisticsError",
    "StatisticsMismatch",
    "StatisticsStore",
    "capture_inputs",
    "captured_inputs",
    "collect",
    "exact_fingerprint",
    "hub_documents",
    "import_npz",
    "joined",
    "merge",
    "model_fingerprint",
    "tokenizer_fingerprint",
]
