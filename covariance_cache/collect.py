"""The streaming pass: the second moments of all layers from one reading of the text."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from covariance_cache.capture import evaluating
from covariance_cache.checkpoint import Checkpoint
from covariance_cache.corpus import Cursor, Documents, Window, packed_windows
from covariance_cache.errors import (
    CorpusError,
    CorpusExhausted,
    StatisticsError,
)
from covariance_cache.feeder import Feeder, sample_keys
from covariance_cache.fingerprint import model_fingerprint, tokenizer_fingerprint
from covariance_cache.layer import LayerSums
from covariance_cache.modules import key_modules
from covariance_cache.ranks import ALONE, Ranks
from covariance_cache.statistics import KeyStatistics, Provenance, library_version

TOKENS_PER_DIMENSION = 10
"""Default budget, in tokens for each dimension of the widest key."""


def collect(
    model: nn.Module,
    tokenizer: Any,
    corpus: str | Path | Iterable[Any],
    layers: Iterable[int] | Mapping[int, str],
    *,
    tokens: int | None = None,
    window: int = 128,
    batch_size: int = 16,
    seed: int | None = 0,
    field: str = "text",
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 100,
    probes: int = 32,
    save: Callable[[KeyStatistics], object] | None = None,
    ranks: Ranks = ALONE,
    progress: bool = True,
) -> dict[int, KeyStatistics]:
    """Mean second moments of the keys of `layers`, from one pass over the text.

    Every forward serves all layers and stops at the last one's key. The model runs as
    it is loaded (its dtype, its devices), in evaluation mode, without gradients, and
    is left as it was found.

    Args:
        model: a transformers causal language model.
        tokenizer: its transformers tokenizer.
        corpus: a `.txt` or `.jsonl` file, or any iterable of texts (`corpus.py`).
        layers: indices of decoder blocks; for a model type that `KEY_MODULES` does not
            have, a mapping from layer to the name of the MLP's down-projection.
        tokens: positions to read, which is the number of keys; by default 10 for each
            dimension of the widest key.
        window: positions in a window of text. Explicit, never taken from the model.
        batch_size: windows in a forward.
        seed: of the order of documents; None for the source's own order.
        field: of a `.jsonl` file's text.
        checkpoint_dir: folder of a checkpoint to go on from, if it is there, and to
            keep; removed once all is collected. On the CPU an interrupted and resumed
            collection ends bit-identical to an uninterrupted one.
        checkpoint_every: batches between checkpoints.
        probes: keys for which the adequacy report compares the solutions of half the
            tokens and of all of them; 0 for no report, which saves two Cholesky
            factorizations of each layer, in float64.
        save: called with each layer's statistics before the checkpoint is removed, such
            as a store's `save`: so a collection that is killed then loses nothing.
        ranks: processes that share the text, each with the same model and arguments
            (`joined`); all return the result. The first keeps the checkpoint, which a
            collection by another number of processes may continue.
        progress: show a bar.

    Returns:
        Statistics by layer, ascending.

    Raises:
        StatisticsError: a layer that does not exist, unknown model type, a setting
            out of range.
        StatisticsMismatch: the checkpoint is of other settings, model or text.
        NonFiniteActivations: NaN or infinity in a key, with layer and text position.
        CorpusError: unusable or no text.

    Warns:
        CorpusExhausted: the text ended before `tokens`; `count` says what was read.
    """
    _check_settings(model, tokens, window, batch_size, checkpoint_every)
    if probes < 0:
        raise StatisticsError(f"probes must be at least 0, got {probes}")
    documents = Documents(corpus, field=field, seed=seed)
    names = key_modules(model, layers)
    settings: dict[str, Any] = {
        "model_fingerprint": model_fingerprint(model),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "window": window,
        "seed": seed,
        "library_version": library_version(),
    }
    with evaluating(model), torch.no_grad():
        sums = {
            layer: LayerSums(
                sample,
                probes if ranks.first else 0,
                f"layer {layer} ({names[layer]})",
            )
            for layer, sample in sample_keys(model, names).items()
        }
        _check_devices(sums, ranks)
        dtypes = {layer: str(each.key_dtype)[6:] for layer, each in sums.items()}
        if tokens is None:
            widest = max(each.moment.d_key for each in sums.values())
            tokens = TOKENS_PER_DIMENSION * widest
        checkpoint = None
        cursor = Cursor()
        if checkpoint_dir is not None:
            checkpoint = Checkpoint(
                Path(checkpoint_dir) / Checkpoint.NAME,
                settings
                | {"tokens": tokens, "batch_size": batch_size, "probes": probes}
                | {f"module of layer {layer}": name for layer, name in names.items()}
                | {f"dtype of layer {layer}": name for layer, name in dtypes.items()},
            )
            # One process reads and writes the file; it may be another machine's.
            cursor = ranks.gather(checkpoint.read(sums) if ranks.first else None)[0]
        windows = packed_windows(
            tokenizer, documents, length=window, budget=tokens, start=cursor
        )
        with tqdm(
            total=tokens,
            initial=cursor.used,
            desc=f"collecting key statistics of {len(names)} layer(s)",
            unit="token",
            unit_scale=True,
            disable=not (progress and ranks.first),
        ) as bar:
            cursor = _read(
                Feeder(model, names, sums, documents),
                _batches(windows, batch_size),
                sums,
                cursor,
                bar,
                tokens=tokens,
                checkpoint=checkpoint,
                every=checkpoint_every,
                ranks=ranks,
            )
    if not cursor.used:
        raise CorpusError("the text holds no tokens, so nothing was collected")
    if cursor.used < tokens:
        warnings.warn(
            f"the text ended after {cursor.used} of {tokens} tokens",
            CorpusExhausted,
            stacklevel=2,
        )
    collected = {}
    for layer, name in names.items():
        provenance = Provenance(
            **settings,
            module=name,
            model_dtype=dtypes[layer],
            corpus_fingerprint=cursor.token_digest,
        )
        collected[layer] = _frozen(layer, sums.pop(layer), provenance, ranks)
        if save is not None and ranks.first:
            save(collected[layer])
    if checkpoint is not None and ranks.first:
        checkpoint.remove()
    return collected


def _read(
    feeder: Feeder,
    batches: Iterable[list[Window]],
    sums: Mapping[int, LayerSums],
    cursor: Cursor,
    bar: Any,
    *,
    tokens: int,
    checkpoint: Checkpoint | None,
    every: int,
    ranks: Ranks,
) -> Cursor:
    """Adds this process's share of the batches; in the end the first process's sums
    are all processes'. Returns where the text was left."""
    since = 0  # batches since the last checkpoint
    for batch in batches:
        if since % ranks.world == ranks.rank:
            feeder.feed(batch)
        since += 1
        bar.update(batch[-1].end.used - cursor.used)
        halved = 2 * cursor.used < tokens <= 2 * batch[-1].end.used
        cursor = batch[-1].end
        due = checkpoint is not None and since == every
        if halved or due:
            _gather(feeder, sums, ranks)
        if halved:
            for each in sums.values():
                each.halve()
        if due:
            since = 0
            if checkpoint is not None and ranks.first:
                checkpoint.write(sums, cursor)
    _gather(feeder, sums, ranks)
    return cursor


def _frozen(
    layer: int, sums: LayerSums, provenance: Provenance, ranks: Ranks
) -> KeyStatistics:
    """A layer's statistics, in every process."""
    sums.share(ranks)
    second_moment, count = sums.finish()
    adequacy = ranks.gather(sums.measure(second_moment, count))[0]
    return KeyStatistics(layer, second_moment, count, provenance, adequacy)


def _gather(feeder: Feeder, sums: Mapping[int, LayerSums], ranks: Ranks) -> None:
    feeder.settle()
    for each in sums.values():
        each.gather(ranks)


def _check_devices(sums: Mapping[int, LayerSums], ranks: Ranks) -> None:
    devices = {each.moment.device for each in sums.values()}
    if ranks.world > 1 and len(devices) > 1:
        raise StatisticsError(
            "processes that share a text must each hold the edited layers on one "
            f"device; here they are on {', '.join(sorted(map(str, devices)))}"
        )


def _check_settings(
    model: nn.Module,
    tokens: int | None,
    window: int,
    batch_size: int,
    checkpoint_every: int,
) -> None:
    for name, value in (
        ("tokens", tokens),
        ("window", window),
        ("batch_size", batch_size),
        ("checkpoint_every", checkpoint_every),
    ):
        if value is not None and value < 1:
            raise StatisticsError(f"{name} must be at least 1, got {value}")
    # The config bounds the window, it never chooses it: a model may claim a million.
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if limit is not None and window > limit:
        raise StatisticsError(
            f"a window of {window} is longer than the {limit} positions of "
            f"{type(model).__name__}; pass a shorter window"
        )


def _batches(windows: Iterable[Window], size: int) -> Iterator[list[Window]]:
    """Up to `size` windows of one length, so that a batch has no pads."""
    batch: list[Window] = []
    for window in windows:
        if batch and len(window.ids) != len(batch[0].ids):
            yield batch
            batch = []
        batch.append(window)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
