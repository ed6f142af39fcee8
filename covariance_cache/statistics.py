"""The frozen result: a layer's mean second moment and where it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from covariance_cache.adequacy import Adequacy, measure
from covariance_cache.errors import StatisticsError
from covariance_cache.shrinkage import Shrinkage

_ROWS = 1024
_ASYMMETRY = 1e-5
"""Allowed |C - Cᵀ|, of the largest |C|: rounding of a product formed elsewhere."""


def library_version() -> str:
    """Version of the installed distribution; "uninstalled" when run from sources."""
    try:
        return version("unified-edit")
    except PackageNotFoundError:
        return "uninstalled"


@dataclass(frozen=True)
class Provenance:
    """What second moments were collected from. None stands for unknown."""

    model_fingerprint: str
    """Of the model whose keys these are (`model_fingerprint`)."""
    module: str
    """Name of the module whose input is the key."""
    tokenizer_fingerprint: str | None = None
    """Of the tokenizer that read the text (`tokenizer_fingerprint`)."""
    corpus_fingerprint: str | None = None
    """SHA-256 over the windows of token ids actually used."""
    window: int | None = None
    """Positions of a window of text."""
    seed: int | None = None
    """Seed of the order of documents; None for the source's own order."""
    model_dtype: str | None = None
    """Dtype of the keys as the model computed them."""
    library_version: str = "unknown"
    """Version of this package at collection."""
    origin: str | None = None
    """Where they come from if they were not collected by this package."""
    parts: tuple[str, ...] = ()
    """Corpus fingerprints of the collections that these were merged from."""

    @classmethod
    def from_header(cls, fields: Mapping[str, Any]) -> Provenance:
        """From the plain data of a file's header."""
        return cls(**{**fields, "parts": tuple(fields.get("parts", ()))})


@dataclass(frozen=True, eq=False)
class KeyStatistics:
    """Mean second moment of a layer's keys, and how many it is the mean of.

    Raises:
        StatisticsError: not a square, symmetric, finite floating-point matrix with a
            diagonal that is nowhere negative, or no keys counted.
    """

    layer: int
    """Index of the decoder block."""
    second_moment: Tensor
    """[d_key, d_key], the uncentred *mean* of k kᵀ, float32 or float64."""
    count: int
    """Keys (token positions) it is the mean of."""
    provenance: Provenance
    """What it was collected from."""
    adequacy: Adequacy | None = None
    """What its tokens bought, as measured when it was collected."""
    shrinkage: Shrinkage = Shrinkage()
    """What `regularized` mixes in. Files never hold a shrunk matrix."""
    accepted_mismatch: str | None = None
    """Why these are not the statistics of the model they are used for, where that was
    accepted explicitly."""
    accepted_for: str | None = None
    """Fingerprint of the model for which it was accepted."""

    def __post_init__(self) -> None:
        matrix, where = self.second_moment, f"second moment of layer {self.layer}"
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.numel():
            raise StatisticsError(
                f"{where} must be [d_key, d_key], got {list(matrix.shape)}"
            )
        if matrix.dtype not in (torch.float32, torch.float64):
            raise StatisticsError(
                f"{where} must be float32 or float64, got {matrix.dtype}"
            )
        if self.layer < 0:
            raise StatisticsError(f"a layer is counted from 0, got {self.layer}")
        if self.count < 1:
            raise StatisticsError(
                f"{where} must be a mean of at least one key, got {self.count}"
            )
        largest = asymmetry = 0.0
        for start, rows in self._row_blocks():
            mirrored = matrix[:, start : start + _ROWS].T
            if not bool(torch.isfinite(rows).all()):
                raise StatisticsError(f"{where} holds NaN or infinity")
            largest = max(largest, float(rows.abs().max()))
            asymmetry = max(asymmetry, float((rows - mirrored).abs().max()))
        if asymmetry > _ASYMMETRY * largest:
            raise StatisticsError(
                f"{where} is not symmetric: C and Cᵀ differ by {asymmetry:.3g}, the "
                f"largest value is {largest:.3g}"
            )
        if bool((matrix.diagonal() < 0).any()):
            raise StatisticsError(
                f"{where} has a negative diagonal, so it is no mean of squares"
            )

    @property
    def d_key(self) -> int:
        """Width of the keys."""
        return self.second_moment.shape[0]

    def shrunk(self, shrinkage: Shrinkage | str) -> KeyStatistics:
        """The same statistics, to be used with another shrinkage; the matrix is shared.

        Raises:
            StatisticsError: not a shrinkage (`Shrinkage.parse`).
        """
        if isinstance(shrinkage, str):
            shrinkage = Shrinkage.parse(shrinkage)
        return replace(self, shrinkage=shrinkage)

    def regularized(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """A new [d_key, d_key]: the second moment, shrunk as `shrinkage` says."""
        scale, shift = self.shrinkage.weights(self.second_moment, self.count)
        matrix = self.second_moment.to(device, dtype, copy=True)
        if scale != 1:
            matrix *= scale
        matrix.diagonal().add_(shift)
        return matrix

    def measured(self) -> Adequacy:
        """What the tokens bought: as measured at collection, or else measured now,
        without what only a collection sees."""
        return self.adequacy or measure(self.second_moment, self.count)

    def fingerprint(self) -> str:
        """SHA-256 of the matrix, count, layer, provenance and shrinkage. The matrix is
        read the first time only: it is frozen with the rest."""
        entries = [
            self.layer,
            self.count,
            self.d_key,
            asdict(self.provenance),
            str(self.shrinkage),
            self._matrix_digest,
        ]
        text = json.dumps(entries, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def _matrix_digest(self) -> str:
        digest = hashlib.sha256()
        for _, rows in self._row_blocks():
            digest.update(rows.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def _row_blocks(self) -> Iterator[tuple[int, Tensor]]:
        # By blocks, so that checking needs no second matrix of this size.
        for start in range(0, self.d_key, _ROWS):
            yield start, self.second_moment[start : start + _ROWS]
