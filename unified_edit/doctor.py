"""The doctor: what this project makes of a model, told from its config, the headers of
its files and its tokenizer. No weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from covariance_cache.__main__ import auto_class
from covariance_cache.errors import StatisticsError
from covariance_cache.fingerprint import tokenizer_fingerprint
from covariance_cache.store import StatisticsStore
from unified_edit.checkpoint.patch import history
from unified_edit.checkpoint.sharded import Checkpoint
from unified_edit.errors import CheckpointError, UnsupportedModel
from unified_edit.loading import folder_of, read_config, read_tokenizer
from unified_edit.model.adapter import ModelAdapter
from unified_edit.options import from_preset
from unified_edit.recipes import RECIPES, matching_preset

_FLOAT32, _FLOAT64 = 4, 8


@dataclass(frozen=True)
class EditedWeights:
    """The weights that edits change, alike in all layers."""

    layers: int
    """Number of decoder blocks."""
    tensor: str
    """Name in the files, `{}` for the layer."""
    shape: tuple[int, int]
    """As stored."""
    storage: str
    """`Conv1D` is stored [d_key, d_value], `Linear` [d_value, d_key]."""
    dtypes: tuple[str, ...]
    """In the files, e.g. `BF16`."""
    d_key: int
    d_value: int
    tied_head: bool
    """Whether the head is the input embedding."""
    statistics_bytes: int
    """A layer's file of statistics: C in float32."""
    solve_bytes: int
    """Memory for a layer's C and its factor in float64."""
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
    origin: str
    """"published", "tuned here" or "unvalidated"."""
    source: str
    settings: Mapping[str, Any] | None
    """All of the recipe's fields."""
    statistics_bytes: int | None
    """Files of statistics of its layers."""
    update_bytes: int | None
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
        adapter = _outline(config)
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


def _outline(config: Any) -> ModelAdapter:
    """The model without its weights: modules, shapes and ties only."""
    with torch.device("meta"):
        return ModelAdapter.of(
            auto_class(config).from_config(config, trust_remote_code=False)
        )


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
    model = adapter.model
    head = model.get_output_embeddings()  # type: ignore[operator]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return EditedWeights(
        layers=len(entries),
        tensor=tensor,
        shape=(entries[0].shape[0], entries[0].shape[1]),
        storage=adapter.architecture.storage,
        dtypes=tuple(sorted({entry.dtype for entry in entries})),
        d_key=d_key,
        d_value=d_value,
        tied_head=head.weight is embedding.weight,
        statistics_bytes=_FLOAT32 * d_key**2,
        solve_bytes=2 * _FLOAT64 * d_key**2,
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
        padding_side=str(tokenizer.padding_side),
        has_pad_token=tokenizer.pad_token_id is not None,
    )


def _recipe_facts(name: str, preset: str | None, weights: EditedWeights) -> RecipeFacts:
    found = None if preset is None else from_preset(name, preset)
    if found is None:
        return RecipeFacts(name, None, "unvalidated", "", None, None, None)
    return RecipeFacts(
        name=name,
        layers=found.layers,
        origin=found.origin,
        source=found.source,
        settings=found.as_dict(),
        statistics_bytes=len(found.layers) * weights.statistics_bytes,
        update_bytes=len(found.layers) * weights.update_bytes,
    )


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
