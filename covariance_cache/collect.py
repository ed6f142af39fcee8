"""The streaming pass: the second moments of all layers from one reading of the text."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from covariance_cache.accumulator import SecondMomentAccumulator
from covariance_cache.capture import capture_inputs, captured_inputs, evaluating
from covariance_cache.checkpoint import Checkpoint
from covariance_cache.corpus import Cursor, Documents, Window, packed_windows
from covariance_cache.errors import (
    CorpusError,
    CorpusExhausted,
    NonFiniteActivations,
    StatisticsError,
)
from covariance_cache.fingerprint import model_fingerprint, tokenizer_fingerprint
from covariance_cache.modules import key_modules
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
        samples = _sample_keys(model, names)
        sums = {layer: _empty_sum(sample) for layer, sample in samples.items()}
        dtypes = {layer: str(each.dtype)[6:] for layer, each in samples.items()}
        if tokens is None:
            tokens = TOKENS_PER_DIMENSION * max(each.d_key for each in sums.values())
        checkpoint = None
        cursor = Cursor()
        if checkpoint_dir is not None:
            checkpoint = Checkpoint(
                Path(checkpoint_dir) / Checkpoint.NAME,
                settings
                | {"tokens": tokens, "batch_size": batch_size}
                | {f"module of layer {layer}": name for layer, name in names.items()}
                | {f"dtype of layer {layer}": name for layer, name in dtypes.items()},
            )
            cursor = checkpoint.read(sums)
        windows = packed_windows(
            tokenizer, documents, length=window, budget=tokens, start=cursor
        )
        with tqdm(
            total=tokens,
            initial=cursor.used,
            desc=f"collecting key statistics of {len(names)} layer(s)",
            unit="token",
            unit_scale=True,
            disable=not progress,
        ) as bar:
            for number, batch in enumerate(_batches(windows, batch_size), start=1):
                _add_batch(model, names, sums, batch, documents)
                bar.update(batch[-1].end.used - cursor.used)
                cursor = batch[-1].end
                if checkpoint is not None and number % checkpoint_every == 0:
                    checkpoint.write(sums, cursor)
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
        try:
            # Popped, so that sums and means of all layers are never held together.
            second_moment, count = sums.pop(layer).freeze()
        except NonFiniteActivations as error:
            raise NonFiniteActivations(f"layer {layer} ({name}): {error}") from error
        provenance = Provenance(
            **settings,
            module=name,
            model_dtype=dtypes[layer],
            corpus_fingerprint=cursor.token_digest,
        )
        collected[layer] = KeyStatistics(layer, second_moment, count, provenance)
    if checkpoint is not None:
        checkpoint.remove()
    return collected


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


def _sample_keys(model: nn.Module, names: Mapping[int, str]) -> dict[int, Tensor]:
    """One key of each layer, [1, 1, d_key]: width, dtype and device, whatever the
    module's type. Also finds out, before the long pass, what is never reached."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=_input_device(model))
    inputs = captured_inputs(model, names.values(), lambda: _run(model, ids))
    return {layer: inputs[name] for layer, name in names.items()}


def _empty_sum(sample: Tensor) -> SecondMomentAccumulator:
    dtype = torch.promote_types(sample.dtype, torch.float32)
    return SecondMomentAccumulator(sample.shape[-1], dtype, sample.device)


def _run(model: nn.Module, ids: Tensor) -> None:
    model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def _check_vocabulary(model: nn.Module, largest: int) -> None:
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(embeddings, "num_embeddings", None)
    if size is not None and largest >= size:
        raise CorpusError(
            f"the tokenizer made token id {largest}, but {type(model).__name__} has "
            f"{size} embeddings; is it this model's tokenizer?"
        )


def _input_device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


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


def _add_batch(
    model: nn.Module,
    names: Mapping[int, str],
    sums: Mapping[int, SecondMomentAccumulator],
    batch: list[Window],
    documents: Documents,
) -> None:
    """One forward, stopped after the last layer; its keys go into the sums at once."""
    layers = {name: layer for layer, name in names.items()}
    ids = torch.tensor([window.ids for window in batch])
    _check_vocabulary(model, int(ids.max()))
    ids = ids.to(_input_device(model))

    def add(name: str, keys: Tensor) -> None:
        try:
            sums[layers[name]].update(keys.flatten(0, -2))
        except NonFiniteActivations as error:
            row, position = divmod(error.row or 0, ids.shape[1])
            end = batch[row].end
            raise NonFiniteActivations(
                f"layer {layers[name]} ({name}): the first key that is not "
                f"finite is at token {position} of the "
                f"window of {ids.shape[1]} that ends {end.token} tokens into "
                f"{documents.where(end.opened - 1)}; check the model's "
                "weights, or load it in a wider dtype",
                error.row,
            ) from error

    with capture_inputs(model, names.values(), add):
        _run(model, ids)
