"""JSON from files that nobody vouches for: strict, and bounded in memory."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_PER_ITEM = 100
"""Bytes that parsing makes of each list, object and item, at most and on average."""
SPARE = 64 << 20
"""Memory that reading a file may take beyond the file's size."""


def loads(raw: bytes | bytearray, size: int) -> Any:
    """The data of a JSON text in UTF-8.

    Args:
        size: of the file that the text is from, in bytes. What would take more memory
            than that and `SPARE` is refused.

    Raises:
        ValueError: not JSON, too large or too deep, a key given twice, a number that
            is not finite, or a text that is none (a lone surrogate).
    """
    marks = sum(raw.count(mark) for mark in (b",", b"[", b"{"))
    needed = _PER_ITEM * marks + len(raw) * (2 if raw.isascii() else 8)
    if needed > size + SPARE:
        raise ValueError(
            f"{marks} items in {len(raw)} bytes of text need more memory than the file "
            "may take"
        )
    try:
        data = json.loads(
            raw.decode(),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse,
            parse_float=_finite,
        )
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"nested too deep or too large: {error}") from error
    if _SURROGATE.search(raw):
        _check_texts(data)
    return data


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name!r} is given twice")
            seen.add(name)
    return result


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large for a number")
    return value


def _check_texts(data: Any) -> None:
    """Raises UnicodeEncodeError, a ValueError, for a lone surrogate anywhere."""
    if isinstance(data, str):
        data.encode()
    elif isinstance(data, dict):
        for key, value in data.items():
            key.encode()
            _check_texts(value)
    elif isinstance(data, list):
        for value in data:
            _check_texts(value)
