"""The ledger: the set of edits behind a checkpoint, as one readable file.

Beside the file lies, for each edit, what took long to find: its target value, and its
key at the first edited layer. So a new set of edits is solved for without optimising
the old ones again. Edits are solved in an order of their own (their ids'), so that the
result depends on the set and not on how it came about.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from covariance_cache import KeyStatistics
from covariance_cache.capture import evaluating
from covariance_cache.fingerprint import model_fingerprint
from unified_edit.algebra.update import UpdateSet
from unified_edit.checkpoint.files import (
    locked,
    present,
    reported,
    sync_folder,
    write_json,
)
from unified_edit.edits import Edit, check_edits
from unified_edit.engine import EditResult, edit
from unified_edit.errors import LedgerError, UnifiedEditError
from unified_edit.ledger_entries import (
    Entry,
    check_types,
    ordered,
    packed,
    put,
    read_entry,
    tidy,
    unpacked,
)
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.descent import Targets
from unified_edit.model.frames import PLAIN
from unified_edit.model.keys import keys_at_subjects
from unified_edit.model.prompts import Contexts, generate_contexts
from unified_edit.model.targets import optimize_targets
from unified_edit.preparation import check_statistics
from unified_edit.recipes import Recipe

FORMAT = "unified-edit/ledger/1"
_NO_LEDGER = (
    *(ValueError, KeyError, TypeError, AttributeError, OverflowError),
    UnifiedEditError,
)


@dataclass(frozen=True)
class Ledger:
    """A ledger's file as read. What changes it writes the file and returns another."""

    path: Path
    base: str
    """Folder of the checkpoint, or cached name of the model, that is edited."""
    base_fingerprint: str
    dtype: str
    """In which the model is loaded to be edited."""
    recipe: Recipe
    statistics: str
    """Folder of the key statistics."""
    statistics_fingerprints: Mapping[int, str]
    shrinkage: str
    contexts: Contexts
    seed: int
    """Of the contexts."""
    entries: tuple[Entry, ...] = ()
    """In the order of their ids."""

    @property
    def edits(self) -> list[Edit]:
        """The edits, in the order in which they are solved."""
        return [entry.edit for entry in self.entries]

    @property
    def values(self) -> Path:
        """Folder beside the file, with a file of values for each edit."""
        return self.path.with_name(f"{self.path.name}.values")

    @property
    def digest(self) -> str:
        """Of all that a solution depends on."""
        data = self.as_dict()
        del data["base"], data["statistics"]["folder"]
        text = json.dumps(data, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data, as the file holds it."""
        return {
            "format": FORMAT,
            "base": self.base,
            "base_fingerprint": self.base_fingerprint,
            "dtype": self.dtype,
            "recipe": self.recipe.as_dict(),
            "statistics": {
                "folder": self.statistics,
                "shrinkage": self.shrinkage,
                "fingerprints": {
                    str(k): v for k, v in self.statistics_fingerprints.items()
                },
            },
            **self.contexts.as_dict(),
            "seed": self.seed,
            "edits": [entry.as_dict() for entry in self.entries],
        }

    @classmethod
    def read(cls, path: str | Path) -> Ledger:
        """Reads a ledger's file.

        Raises:
            LedgerError: missing, unreadable, or not a ledger.
        """
        path = Path(path)
        try:
            data = json.loads(path.read_bytes())
            if data["format"] != FORMAT:
                raise ValueError(f"its format is {data['format']!r}, not {FORMAT!r}")
            check_types(data)
            used = data["statistics"]
            found = cls(
                path,
                data["base"],
                data["base_fingerprint"],
                data["dtype"],
                Recipe.from_dict(data["recipe"]),
                used["folder"],
                {int(k): v for k, v in used["fingerprints"].items()},
                used["shrinkage"],
                Contexts.from_dict(data),
                data["seed"],
                ordered(read_entry(each) for each in data["edits"]),
            )
            if found.statistics_fingerprints.keys() != {*found.recipe.layers}:
                raise ValueError("its statistics are not those of the recipe's layers")
            if found.recipe.contexts.chat != (found.contexts.frame != PLAIN):
                raise ValueError("one of its recipe and contexts is in chat, one not")
            if found.entries:
                check_edits(found.edits)
            if json.loads(json.dumps(found.as_dict())) != data:
                raise ValueError("it has fields or values that this version does not")
            return found
        except OSError as error:
            raise LedgerError(
                f"{path}: cannot be read: {error.strerror}; `ledger add` makes one"
            ) from error
        except _NO_LEDGER as error:
            raise LedgerError(f"{path}: not a ledger: {error}") from error
        except RecursionError as error:
            raise LedgerError(f"{path}: not a ledger: nested too deep") from error

    @classmethod
    def create(
        cls,
        path: str | Path,
        model: nn.Module,
        tokenizer: Any,
        recipe: Recipe,
        statistics: Mapping[int, KeyStatistics],
        *,
        base: str,
        statistics_folder: str,
        dtype: str = "float32",
        seed: int = 0,
    ) -> Ledger:
        """An empty ledger for a model; its file is written with the first edits.

        Args:
            model: loaded from `base` in `dtype`.
            statistics: of the recipe's layers, loaded from `statistics_folder`.

        Raises:
            LedgerError: the file exists already.
            RecipeError, UnsupportedModel: as `edit`.
        """
        path = Path(path)
        if path.exists():
            raise LedgerError(f"{path}: exists already; add to it, or name another")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise LedgerError(
                f"{path.parent}: no folder that can be written to; make one first"
            )
        adapter = ModelAdapter.of(model)
        adapter.check_layers(recipe.layers)
        fingerprint = model_fingerprint(model)
        check_statistics(adapter, recipe, statistics, fingerprint)
        _check_dtype(path, model, dtype)
        with evaluating(model):
            contexts = generate_contexts(adapter, tokenizer, recipe.contexts, seed)
        shrinkages = {str(statistics[layer].shrinkage) for layer in recipe.layers}
        if len(shrinkages) > 1:
            raise LedgerError(
                f"{path}: a ledger's statistics share one shrinkage, not {shrinkages}"
            )
        return cls(
            path,
            base,
            fingerprint,
            dtype,
            recipe,
            statistics_folder,
            {layer: statistics[layer].fingerprint() for layer in recipe.layers},
            shrinkages.pop(),
            contexts,
            seed,
        )

    def add(
        self,
        model: nn.Module,
        tokenizer: Any,
        edits: Sequence[Edit],
        *,
        token_budget: int | None = None,
        progress: bool = False,
    ) -> Ledger:
        """Finds targets and keys of new edits, and writes the ledger with them.

        Args:
            model: the base, unedited.
            edits: not in the ledger yet.
            token_budget: as of `edit`.

        Raises:
            LedgerError: another model, or the files cannot be written.
            EditError: edits repeated or contradictory, among themselves or with those
                that are there.
        """
        self._check_model(model)
        check_edits([*self.edits, *edits])
        adapter = ModelAdapter.of(model)
        adapter.check_finite()
        recipe = self.recipe
        with evaluating(model):
            targets = optimize_targets(
                adapter,
                tokenizer,
                edits,
                self.contexts,
                recipe.layers[-1],
                recipe.targets,
                token_budget=token_budget,
                progress=progress,
            )
            keys = keys_at_subjects(
                adapter,
                tokenizer,
                edits,
                self.contexts,
                recipe.layers[0],
                recipe.key_average,
            )
        files = {}
        for index, each in enumerate(edits):
            files[each] = packed(targets.select(index), keys[index : index + 1])
        return self.join(files)

    def join(self, values: Mapping[Edit, bytes]) -> Ledger:
        """Writes the ledger with edits whose values are known, such as another
        ledger's for the same base, recipe and contexts (`packed_values`).

        Raises:
            LedgerError: the files cannot be written, or somebody changed the ledger.
        """
        for data in values.values():
            unpacked(data)
        fresh = {
            Entry(each, hashlib.sha256(data).hexdigest()): data
            for each, data in values.items()
        }
        grown = replace(self, entries=ordered([*self.entries, *fresh]))
        check_edits(grown.edits)
        return self._write(grown, {entry.id: data for entry, data in fresh.items()})

    def remove(self, ids: Iterable[str]) -> Ledger:
        """Writes the ledger without some edits.

        Args:
            ids: of the edits, or beginnings that name one edit each.

        Raises:
            LedgerError: an id that names no edit, or several.
        """
        gone = set()
        for wanted in ids:
            found = [e for e in self.entries if wanted and e.id.startswith(wanted)]
            if len(found) != 1:
                known = "several edits" if found else "no edit"
                raise LedgerError(
                    f"{self.path}: {wanted!r} names {known}; `ledger list` shows ids"
                )
            gone.add(found[0])
        kept = tuple(entry for entry in self.entries if entry not in gone)
        return self._write(replace(self, entries=kept), {})

    def packed_values(self, entry: Entry) -> bytes:
        """The content of an edit's file of values.

        Raises:
            LedgerError: missing, or not what the ledger says.
        """
        path = self._values_of(entry.id)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise LedgerError(
                f"{path}: cannot be read: {error.strerror}; remove edit {entry.id} and "
                "add it again"
            ) from error
        if hashlib.sha256(data).hexdigest() != entry.values_sha256:
            raise LedgerError(
                f"{path}: was changed since it was written; restore it, or remove edit "
                f"{entry.id} and add it again"
            )
        return data

    def solve(
        self,
        model: nn.Module,
        tokenizer: Any,
        statistics: Mapping[int, KeyStatistics],
        *,
        progress: bool = False,
    ) -> EditResult:
        """The update for exactly these edits, from their kept values. The same edits
        with the same values give the same bytes, however the ledger came to them.

        Args:
            model: the base, unedited; the same afterwards.

        Raises:
            LedgerError: another model or other statistics, no edits, or a damaged file.
            as `edit`.
        """
        self._check_model(model)
        if not self.entries:
            raise LedgerError(
                f"{self.path}: holds no edits; its checkpoint is the base"
            )
        for layer, expected in self.statistics_fingerprints.items():
            found = statistics[layer].fingerprint() if layer in statistics else "none"
            if found != expected:
                raise LedgerError(
                    f"{self.path}: layer {layer} was edited with statistics "
                    f"{expected}, these are {found}; use those, or begin another ledger"
                )
        kept = [unpacked(self.packed_values(entry)) for entry in self.entries]
        result = edit(
            model,
            tokenizer,
            self.edits,
            self.recipe,
            statistics,
            contexts=self.contexts,
            seed=self.seed,
            targets=Targets(
                *(
                    torch.cat([values[name] for values in kept])
                    for name in Targets.__dataclass_fields__
                )
            ),
            keys=torch.cat([values["keys"] for values in kept]),
            progress=progress,
        )
        metadata = {**result.update.metadata, "ledger": self.digest}
        return replace(result, update=UpdateSet(result.update.updates, metadata))

    def _check_model(self, model: nn.Module) -> None:
        _check_dtype(self.path, model, self.dtype)
        found = model_fingerprint(model)
        if found != self.base_fingerprint:
            raise LedgerError(
                f"{self.path}: is of the model {self.base_fingerprint}, this one is "
                f"{found}; load the unedited base in {self.dtype}"
            )

    def _values_of(self, id_: str) -> Path:
        return self.values / f"{id_}.safetensors"

    def _write(self, grown: Ledger, fresh: Mapping[str, bytes]) -> Ledger:
        """Values first, then the file that names them, then what it no longer names."""
        path = self.path
        try:
            with (
                reported(f"{path}: cannot be written"),
                locked(path.with_name(f".{path.name}.lock")),
            ):
                known = Ledger.read(path) if present(path) else None
                if known != self and (known is not None or self.entries):
                    raise LedgerError(
                        f"{path}: was changed meanwhile; read it again and repeat"
                    )
                if fresh:
                    self.values.mkdir(exist_ok=True)
                    for id_, data in fresh.items():
                        put(self._values_of(id_), data)
                    sync_folder(self.values)
                write_json(path, grown.as_dict(), readable=True)
                with suppress(OSError):  # the ledger is written; the next would tidy
                    tidy(self.values, grown.entries)
        except LedgerError:
            raise
        except UnifiedEditError as error:
            raise LedgerError(str(error)) from error
        return grown


def _check_dtype(ledger: Path, model: nn.Module, dtype: str) -> None:
    """A fingerprint reads float32, whatever the model is in."""
    found = str(next(model.parameters()).dtype).removeprefix("torch.")
    if dtype not in (found, "auto"):
        raise LedgerError(
            f"{ledger}: is of the model loaded in {dtype}, this one is in {found}; "
            f"load the unedited base in {dtype}"
        )
