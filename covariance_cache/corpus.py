"""Text sources → packed windows of token ids: deterministic, with a resumable cursor.

Documents are tokenized without special tokens, each followed by the tokenizer's
end-of-text token where it has one, and cut, across documents, into windows of one
explicit length. Every window begins with what the tokenizer itself puts before a prompt
(a BOS, or nothing), because the first position's key is unlike all others and belongs
into the statistics in the proportion in which it occurs. Windows are full, so there are
no pads; only the last is shorter, where the text or the budget ends. Knows nothing of
models.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from covariance_cache.errors import CorpusError, StatisticsMismatch

_START = hashlib.sha256(b"").hexdigest()
_PROBES = ("a", "A", "0", ".")


class TextFile:
    """The documents of a file, read one at a time: a `.txt` holds them separated by
    blank lines, a `.jsonl` one in each line, under `field`. UTF-8."""

    def __init__(self, path: str | Path, field: str = "text") -> None:
        self.path = Path(path)
        self.field = field
        if self.path.suffix not in (".txt", ".jsonl"):
            raise CorpusError(
                f"{self.path}: a corpus file ends in .txt or .jsonl; pass text in "
                "memory as a list of strings"
            )
        self._bounds = array("Q")  # start and end byte of each document
        by_line = self.path.suffix == ".jsonl"
        try:
            with self.path.open("rb") as file:
                position, inside = 0, False
                for line in file:
                    blank = not line.strip()
                    if not blank and (by_line or not inside):
                        self._bounds.extend((position, position))
                    position += len(line)
                    if not blank:
                        self._bounds[-1] = position
                    inside = not blank
        except OSError as error:
            raise CorpusError(f"{self.path}: cannot be read: {error}") from error

    def __len__(self) -> int:
        return len(self._bounds) // 2

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> str:
        start, end = self._bounds[2 * index], self._bounds[2 * index + 1]
        with self.path.open("rb") as file:
            file.seek(start)
            data = file.read(end - start)
        try:
            text = data.decode("utf-8-sig" if start == 0 else "utf-8")
            if self.path.suffix == ".txt":
                return text.replace("\r\n", "\n").rstrip("\n")
            return _text_of(json.loads(text), self.field, self.where(index))
        except ValueError as error:
            if isinstance(error, CorpusError):
                raise
            raise CorpusError(f"{self.where(index)}: {error}") from error

    def where(self, index: int) -> str:
        """File and first line of a document, for messages."""
        with self.path.open("rb") as file:
            before = file.read(self._bounds[2 * index]).count(b"\n")
        return f"{self.path}, line {before + 1}"


class Documents:
    """The texts of a source in a fixed order.

    Args:
        source: path of a `.txt` or `.jsonl` file, or any iterable of strings or of
            mappings that hold one under `field`. One with a length is shuffled by
            `seed`; one without, such as a generator, keeps its own order.
        seed: None for the source's own order.

    Raises:
        CorpusError: unreadable, not text, or a seed for a source without a length.
    """

    def __init__(
        self,
        source: str | Path | Iterable[Any],
        *,
        field: str = "text",
        seed: int | None = None,
    ) -> None:
        texts: Any = source
        if isinstance(source, str | Path):
            texts = TextFile(source, field)
        if isinstance(source, Mapping):
            raise CorpusError("a mapping is no text source; pass an iterable of texts")
        self._source = texts
        self._field = field
        self._order: list[int] | None = None
        if seed is not None:
            if not (hasattr(texts, "__len__") and hasattr(texts, "__getitem__")):
                raise CorpusError(
                    "a text source without a length cannot be shuffled; pass seed=None "
                    "to take it in its own order, or a list"
                )
            generator = torch.Generator().manual_seed(seed)
            count = len(texts)
            self._order = torch.randperm(count, generator=generator).tolist()

    def __iter__(self) -> Iterator[str]:
        ordered = (
            self._source
            if self._order is None
            else (self._source[index] for index in self._order)
        )
        for position, item in enumerate(ordered):
            if isinstance(item, str):
                yield item
            else:
                yield _text_of(item, self._field, self.where(position))

    def where(self, position: int) -> str:
        """Which document of the source comes at this position, for messages."""
        index = position if self._order is None else self._order[position]
        if isinstance(self._source, TextFile):
            return self._source.where(index)
        return f"document {index} of the text"


@dataclass(frozen=True)
class Cursor:
    """How far a text has been read, and a record of what was read.

    Digests are chained, h ← SHA-256(h ‖ next), so that reading can stop and go on.
    """

    opened: int = 0
    """Documents begun so far."""
    token: int = 0
    """Tokens used of the last of them."""
    used: int = 0
    """Positions handed out so far, prefixes included."""
    text_digest: str = _START
    """Over the texts of the documents begun."""
    token_digest: str = _START
    """Over the windows handed out: the corpus fingerprint."""


@dataclass(frozen=True)
class Window:
    """One window of token ids and the place in the text where it ends."""

    ids: list[int]
    end: Cursor


def prompt_prefix(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before a prompt by itself, most often [BOS] or
    nothing: found by comparing what it makes of a text with and without them."""
    for probe in _PROBES:
        bare = _ids(tokenizer, probe, special=False)
        full = _ids(tokenizer, probe, special=True)
        for start in range(len(full) - len(bare) + 1 if bare else 0):
            if full[start : start + len(bare)] == bare:
                return full[:start]
    # No probe has a token of its own: what surrounds an empty text is all there is.
    around = _ids(tokenizer, "", special=True)
    if len(around) > 1:
        raise CorpusError(
            f"cannot tell which of the special tokens {around} come before a prompt"
        )
    return around


def packed_windows(
    tokenizer: Any,
    documents: Documents,
    *,
    length: int,
    budget: int,
    start: Cursor | None = None,
) -> Iterator[Window]:
    """Windows of `length` ids until `budget` positions are handed out or the text ends.

    Args:
        tokenizer: any transformers tokenizer.
        length: positions in a window, prefix included.
        budget: positions in all; the last window is cut to meet it exactly.
        start: where an earlier reading of the same text ended.

    Raises:
        CorpusError: no room for text in a window; unusable text.
        StatisticsMismatch: `start` was reached in another text.
    """
    prefix = prompt_prefix(tokenizer)
    if length <= len(prefix):
        raise CorpusError(
            f"a window of {length} has no room for text after the {len(prefix)} "
            "token(s) that the tokenizer puts first"
        )
    ending = getattr(tokenizer, "eos_token_id", None)
    separator = [] if ending is None else [ending]
    begin = start or Cursor()
    opened, text_digest = 0, _START
    used, token_digest = begin.used, begin.token_digest
    buffer: list[int] = []
    ids: list[int] = []
    if used >= budget:
        return

    def next_window(text: list[int], token: int) -> Window:
        nonlocal used, token_digest
        ids = (prefix + text)[: budget - used]
        used += len(ids)
        token_digest = _chain(token_digest, np.asarray(ids, dtype="<i8").tobytes())
        return Window(ids, Cursor(opened, token, used, text_digest, token_digest))

    def room() -> int:
        return max(min(length, budget - used) - len(prefix), 0)

    for text in documents:
        opened += 1
        text_digest = _chain(text_digest, text.encode())
        if opened < begin.opened:
            continue
        if opened == begin.opened and text_digest != begin.text_digest:
            raise _changed_text(documents.where(opened - 1))
        ids = _ids(tokenizer, text, special=False)
        ids += separator if ids else []
        buffer += ids[begin.token :] if opened == begin.opened else ids
        # What is left of earlier documents is shorter than a window, so after the
        # first cut the rest of the buffer is this document's: a cursor is two numbers.
        taken = 0
        while len(buffer) - taken >= room():
            piece = buffer[taken : taken + room()]
            taken += len(piece)
            yield next_window(piece, len(ids) - (len(buffer) - taken))
            if used >= budget:
                return
        buffer = buffer[taken:]
    if opened < begin.opened:
        raise _changed_text("its end")
    if buffer:
        yield next_window(buffer, len(ids))


def _changed_text(where: str) -> StatisticsMismatch:
    return StatisticsMismatch(
        f"the text is not the one that was read before: it differs up to {where}; "
        "restore it, or start again without the checkpoint"
    )


def _chain(digest: str, data: bytes) -> str:
    link = hashlib.sha256(bytes.fromhex(digest))
    link.update(data)
    return link.hexdigest()


def _ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    # verbose=False: a document longer than the model is no mistake, it will be cut.
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return list(ids)


def _text_of(item: Any, field: str, where: str) -> str:
    text = item
    if isinstance(item, Mapping):
        if field not in item:
            raise CorpusError(f"{where}: no field {field!r}, only {sorted(item)}")
        text = item[field]
    if not isinstance(text, str):
        raise CorpusError(f"{where}: expected text, found {type(text).__name__}")
    return text
