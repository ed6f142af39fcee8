"""The doctor: what this project makes of a model, told from its config, the headers of
its files and its tokenizer. No weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from covariance_cache.__main__ import auto_class
from covariance_cache.accumulator import total_bytes
from covariance_cache.errors import StatisticsError
from covariance_cache.fingerprint import tokenizer_fingerprint
from covariance_cache.store import StatisticsStore
from unified_edit.checkpoint.patch import history
from unified_edit.checkpoint.sharded import Checkpoint
from unified_edit.errors import CheckpointError, UnsupportedModel
from unified_edit.loading import folder_of, read_config, read_tokenizer, reading
from unified_edit.model.adapter import ModelAdapter
from unified_edit.options import from_preset
from unified_edit.presets import PRESETS
from unified_edit.recipes import RECIPES, matching_preset, recipe

_FLOAT32, _FLOAT64 = 4, 8
_REFERENCE = "llama-2-7b"
"""Its preset knows every recipe."""


@dataclass(frozen=True)
class EditedWeights:
    """The weights that edits change, alike in all layers."""

    layers: int
    """Number of decoder blocks."""
    wrapped: str | None
    """Type of the text decoder, where the model wraps one."""
    tensor: str
    """Name in the files, `{}` for the layer."""
    shape: tuple[int, int]
    """As stored."""
    storage: str
    """`Conv1D` is stored [d_key, d_value], `Linear` [d_value, d_key]."""
    dtypes: tuple[str, ...]
    """In the files, e.g. `BF16`."""
    shards: Mapping[str, tuple[int, ...]]
    """Which layers' tensors each file holds."""
    d_key: int
    d_value: int
    normalized: bool
    """A norm follows the MLP, so that targets are optimised at its own output and an
    edit is one layer's."""
    parallel: bool
    """Attention and MLP read the same input."""
    residual_scale: float
    """What the MLP's output is multiplied by before it is added."""
    head: str
    """Module of the language-model head."""
    tied_head: bool
    """Whether the head is the input embedding."""
    model_bytes: int
    """Memory for all weights in float32, as `edit` loads them by default."""
    collect_bytes: int
    """Memory for each layer's running total while statistics are collected."""
    statistics_bytes: int
    """A layer's file of statistics: C in float32."""
    solve_bytes: int
    """Memory for a layer's C as loaded, and for it and its factor in float64."""
    update_bytes: int
    """One edit's share of an update's file, for each layer."""
    undo_bytes: int
    """What a patched folder keeps for undoing, for each layer."""


@dataclass(frozen=True)
class TokenizerFacts:
    """What a tokenizer does by itself."""

    kind: str
    """Its class."""
    fast: bool
    """Gives character offsets, which edits need."""
    vocabulary: int
    adds_bos: bool
    adds_eos: bool
    prepends_space: bool
    """A text's first word is tokenized as if a space stood before it."""
    bos_token: str | None
    chat_template: bool
    """Whether `--chat` can be used."""
    padding_side: str
    """Of its own; batches are padded here without it."""
    has_pad_token: bool
    """Not needed here."""


@dataclass(frozen=True)
class LayerStatistics:
    """One layer's file of statistics, by its header."""

    layer: int
    count: int | None
    """Keys that C is the mean of."""
    keys_per_dimension: float | None
    """count / d_key; below 1, C is singular."""
    problem: str | None
    """Why it is not of use for this model; None if it is."""


@dataclass(frozen=True)
class RecipeFacts:
    """What a recipe would use on this model."""

    name: str
    layers: tuple[int, ...] | None
    """None: there are no hyperparameters for this model, name the layers."""
    suggested_layers: tuple[int, ...] | None
    """Where there are none: the same depth as another model's published layers. Where
    a fact is kept was not looked for in this model."""
    origin: str
    """"published", "tuned here" or "unvalidated"."""
    source: str
    settings: Mapping[str, Any] | None
    """All of the recipe's fields."""
    statistics_bytes: int
    """Files of statistics of its layers."""
    collect_bytes: int
    """Memory to collect them, with the weights; activations come to it."""
    edit_bytes: int
    """Memory to edit, with the weights; activations come to it."""
    update_bytes: int
    """One edit's share of its update's file."""


@dataclass(frozen=True)
class DoctorReport:
    """What `examine` found."""

    folder: str
    model_type: str | None
    refusal: str | None
    """Why the model cannot be edited; None if it can."""
    fingerprint: str
    files: tuple[str, ...]
    """Weight files (shards)."""
    tensors: int
    bytes: int
    """Of all tensors."""
    updates: int
    """Updates that were patched into the folder."""
    weights: EditedWeights | None
    tokenizer: TokenizerFacts | None
    preset: str | None
    """The preset made for this model."""
    recipes: tuple[RecipeFacts, ...]
    statistics: tuple[LayerStatistics, ...] | None
    """None: no folder was named, or the model is refused."""
    problems: tuple[str, ...]
    """What stands in the way of edits; empty when nothing does."""

    @property
    def supported(self) -> bool:
        """Whether this model can be edited."""
        return self.refusal is None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {**asdict(self), "supported": self.supported}


def examine(name: str, statistics: Path | None = None) -> DoctorReport:
    """Looks at a model, by folder or cached name, and at statistics made for it.

    Raises:
        CheckpointError: no such model, or its files are malformed.
        StatisticsError: no such folder of statistics.
    """
    store = None if statistics is None else StatisticsStore(statistics)
    kept = [] if store is None else store.layers()
    folder = folder_of(name)
    checkpoint = Checkpoint.open(folder)
    problems: list[str] = []
    updates = 0
    try:
        updates = len(history(folder))
    except CheckpointError as error:
        problems.append(str(error))
    tokenizer = facts = None
    try:
        tokenizer = read_tokenizer(folder)
        facts = _tokenizer_facts(tokenizer)
        if not facts.fast:
            problems.append(
                f"{facts.kind} is a slow tokenizer, which gives no character offsets; "
                "save the model with its fast tokenizer"
            )
    except CheckpointError as error:
        problems.append(str(error))
    fingerprint = checkpoint.fingerprint()
    weights = refusal = preset = found = None
    recipes: tuple[RecipeFacts, ...] = ()
    try:
        config = read_config(folder, checkpoint)
        adapter = _outline(folder, config)
        weights = _edited_weights(adapter, checkpoint)
    except (UnsupportedModel, CheckpointError) as error:
        refusal = str(error)
        problems.insert(0, refusal)
    else:
        preset = matching_preset(config)
        recipes = tuple(_recipe_facts(each, preset, weights) for each in RECIPES)
        if store is not None:
            found = tuple(
                _examine_layer(store, layer, adapter, weights, fingerprint, tokenizer)
                for layer in kept
            )
            problems += [each.problem for each in found if each.problem]
            if not found:
                problems.append(f"{statistics}: holds no statistics")
    return DoctorReport(
        folder=str(folder),
        model_type=checkpoint.config.get("model_type"),
        refusal=refusal,
        fingerprint=fingerprint,
        files=checkpoint.files,
        tensors=len(checkpoint.tensors),
        bytes=sum(entry.nbytes for entry in checkpoint.tensors.values()),
        updates=updates,
        weights=weights,
        tokenizer=facts,
        preset=preset,
        recipes=recipes,
        statistics=found,
        problems=tuple(problems),
    )


def _outline(folder: Path, config: Any) -> ModelAdapter:
    """The model without its weights: modules, shapes and ties only."""
    with reading(folder, "the config"), torch.device("meta"):
        model = auto_class(config).from_config(config, trust_remote_code=False)
        model.tie_weights()  # which older transformers leaves to the weights
    return ModelAdapter.of(model)


def _edited_weights(adapter: ModelAdapter, checkpoint: Checkpoint) -> EditedWeights:
    entries = []
    for layer in range(adapter.layer_count):
        entry = checkpoint.editable(adapter.address(layer))
        expected = tuple(adapter.weight(layer).shape)
        if entry.shape != expected:
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {entry.name!r} is {list(entry.shape)}, "
                f"its config asks for {list(expected)}"
            )
        entries.append(entry)
    names = {name.format(0): name for name in adapter.tensor_names()}
    tensor = names[entries[0].name]
    d_value, d_key = adapter.matrix(0).shape
    model, kind = adapter.model, adapter.architecture.model_type
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    shards: dict[str, tuple[int, ...]] = {}
    for layer, entry in enumerate(entries):
        shards[entry.file] = (*shards.get(entry.file, ()), layer)
    (head,) = (name for name, each in model.named_modules() if each is adapter.head)
    return EditedWeights(
        layers=len(entries),
        wrapped=None if kind == checkpoint.config.get("model_type") else kind,
        tensor=tensor,
        shape=(entries[0].shape[0], entries[0].shape[1]),
        storage=adapter.architecture.storage,
        dtypes=tuple(sorted({entry.dtype for entry in entries})),
        shards=shards,
        d_key=d_key,
        d_value=d_value,
        normalized=adapter.normalized,
        parallel=adapter.parallel,
        residual_scale=adapter.residual_scale(0),
        head=head,
        tied_head=adapter.head.weight is embedding.weight,
        model_bytes=_FLOAT32 * sum(each.numel() for each in model.parameters()),
        collect_bytes=total_bytes(d_key),
        statistics_bytes=_FLOAT32 * d_key**2,
        solve_bytes=(_FLOAT32 + 2 * _FLOAT64) * d_key**2,
        update_bytes=_FLOAT32 * (d_key + d_value),
        undo_bytes=max(entry.nbytes for entry in entries),
    )


def _tokenizer_facts(tokenizer: Any) -> TokenizerFacts:
    word = "word"
    plain = tokenizer(word, add_special_tokens=False)["input_ids"]
    whole = tokenizer(word)["input_ids"]
    first = tokenizer.convert_ids_to_tokens(plain[:1])
    return TokenizerFacts(
        kind=type(tokenizer).__name__,
        fast=bool(tokenizer.is_fast),
        vocabulary=len(tokenizer),
        adds_bos=len(whole) > len(plain) and whole[0] == tokenizer.bos_token_id,
        adds_eos=len(whole) > len(plain) and whole[-1] == tokenizer.eos_token_id,
        prepends_space=bool(first) and str(first[0])[:1] in ("▁", "Ġ"),
        bos_token=tokenizer.bos_token,
        chat_template=bool(tokenizer.chat_template),
        padding_side=str(tokenizer.padding_side),
        has_pad_token=tokenizer.pad_token_id is not None,
    )


def _recipe_facts(name: str, preset: str | None, weights: EditedWeights) -> RecipeFacts:
    found = None if preset is None else from_preset(name, preset)
    layers = found.layers if found else _suggested(name, weights)
    count = len(layers)
    return RecipeFacts(
        name=name,
        layers=found.layers if found else None,
        suggested_layers=None if found else layers,
        origin=found.origin if found else "unvalidated",
        source=found.source if found else f"the depth of {_REFERENCE}'s layers",
        settings=found.as_dict() if found else None,
        statistics_bytes=count * weights.statistics_bytes,
        collect_bytes=weights.model_bytes + count * weights.collect_bytes,
        edit_bytes=weights.model_bytes
        + count * (weights.solve_bytes + _FLOAT32 * weights.d_key * weights.d_value),
        update_bytes=count * weights.update_bytes,
    )


def _suggested(name: str, weights: EditedWeights) -> tuple[int, ...]:
    reference = PRESETS[_REFERENCE]
    published = recipe(name, _REFERENCE).layers
    layers = sorted({layer * weights.layers // reference.layers for layer in published})
    return tuple(layers[-1:] if weights.normalized else layers)


def _examine_layer(
    store: StatisticsStore,
    layer: int,
    adapter: ModelAdapter,
    weights: EditedWeights,
    fingerprint: str,
    tokenizer: Any,
) -> LayerStatistics:
    path = store.file(layer)
    try:
        header = store.header(layer)
        count, d_key, source = header["count"], header["d_key"], header["provenance"]
        facts = {
            "model": (source["model_fingerprint"], fingerprint),
            "module": (source["module"], adapter.key_module(layer)),
            "width of keys": (d_key, weights.d_key),
        }
        words = source["tokenizer_fingerprint"]
    except StatisticsError as error:
        return LayerStatistics(layer, None, None, str(error))
    except (KeyError, TypeError) as error:
        problem = f"{path}: its header lacks {error}; collect the statistics again"
        return LayerStatistics(layer, None, None, problem)
    if words is not None and tokenizer is not None:
        facts["tokenizer"] = (words, tokenizer_fingerprint(tokenizer))
    if layer >= weights.layers:
        problem = f"{path}: the model has layers 0 to {weights.layers - 1} only"
        return LayerStatistics(layer, count, count / d_key, problem)
    differing = [
        f"{what} {str(theirs)[:40]}, here {str(ours)[:40]}"
        for what, (theirs, ours) in facts.items()
        if theirs != ours
    ]
    problem = (
        f"{path}: was collected on another model or tokenizer "
        f"({'; '.join(differing)}); collect statistics of this one"
    )
    return LayerStatistics(layer, count, count / d_key, problem if differing else None)
