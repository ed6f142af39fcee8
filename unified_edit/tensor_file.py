"""One safetensors file of tensors and a JSON header: written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from unified_edit.errors import UnifiedEditError

_HEADER = "unified_edit"


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    error: type[UnifiedEditError],
) -> Path:
    """Writes a file; same content, same bytes.

    Args:
        header: plain JSON data, its `format` among it.
        error: what to raise.

    Raises:
        error: it cannot be written.
    """
    path = Path(path)
    content = {name: each.cpu().contiguous() for name, each in tensors.items()}
    text = json.dumps(header, sort_keys=True, ensure_ascii=False)
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with staged.open("wb") as file:
            file.write(save(content, {_HEADER: text}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    except OSError as problem:
        raise error(f"{path}: cannot be written: {problem.strerror}") from problem
    finally:
        with suppress(OSError):
            staged.unlink(missing_ok=True)
    return path


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], Any]:
    """Tensors and header of a file of the format `kind`.

    Raises:
        ValueError: no such file, or of another format; SafetensorError, OSError as
            they come.
    """
    if not Path(path).is_file():
        raise ValueError("no such file")
    with safe_open(str(path), framework="pt") as file:
        header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
        if not isinstance(header, dict) or header.get("format") != kind:
            raise ValueError(f"not a file of format {kind!r}")
        return {name: file.get_tensor(name) for name in file.keys()}, header


@contextmanager
def reading(
    path: str | Path, what: str, error: type[UnifiedEditError]
) -> Iterator[None]:
    """What reading a damaged or foreign file raises, as one error of ours.

    Args:
        what: is then wrong, such as "not a session".
        error: what to raise.
    """
    try:
        yield
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from problem
    except (
        *(UnifiedEditError, SafetensorError, ValueError, KeyError, TypeError),
        *(AttributeError, IndexError, RuntimeError, RecursionError),
    ) as problem:
        raise error(f"{path}: {what}: {problem}") from problem
