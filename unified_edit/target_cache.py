"""Optimised target values on disk, found again by content.

A target depends on the model, the layer, the settings and its prompts' tokens, and on
nothing else; its key is a digest of exactly these. So another λ, another order or more
edits find what is there, and whatever changes is a miss.
"""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from unified_edit.errors import UnifiedEditError
from unified_edit.model.descent import Targets


class TargetCache:
    """A folder of target values, one small file for each edit."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def file(self, key: str) -> Path:
        """Where the targets of a key are, or would be."""
        return self.path / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> Targets | None:
        """The targets of one edit, or None. A damaged file is a miss, with a warning:
        it will be written anew."""
        path = self.file(key)
        if not path.exists():
            return None
        try:
            found = Targets(**load_file(path))
            problem = _problem(found)
        except (OSError, SafetensorError, TypeError) as error:
            problem = str(error)
        if not problem:
            return found
        warnings.warn(
            f"{path}: cannot be used ({problem}); these targets are optimised anew",
            stacklevel=2,
        )
        return None

    def put(self, key: str, targets: Targets) -> None:
        """Keeps the targets of one edit; whole or not at all.

        Raises:
            UnifiedEditError: the folder cannot be written to.
        """
        path = self.file(key)
        staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(
                {
                    name: getattr(targets, name).cpu().contiguous()
                    for name in Targets.__dataclass_fields__
                },
                staged,
            )
            os.replace(staged, path)
        except (OSError, SafetensorError) as error:
            raise UnifiedEditError(
                f"{path}: target values cannot be kept there: {error}; choose another "
                "folder, or none"
            ) from error
        finally:
            with suppress(OSError):
                staged.unlink(missing_ok=True)


def _problem(targets: Targets) -> str:
    """Why these cannot be the targets of one edit; empty if they can."""
    sizes = {len(getattr(targets, name)) for name in Targets.__dataclass_fields__}
    if sizes != {1} or targets.values.shape != targets.initial.shape:
        return "not one edit's"
    finite = torch.isfinite(targets.values).all() and torch.isfinite(targets.initial)
    return "" if bool(finite.all()) else "not finite"
