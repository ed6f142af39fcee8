"""Published statistics: the `.npz` files of ROME, MEMIT, AlphaEdit and EasyEdit.

All four write `stats/{model}/{corpus}_stats/{module}_{precision}_mom2_{texts}.npz`, in
which `mom2.mom2` is the *sum* of k kᵀ over all tokens and `mom2.count` their number.
Here the sum is divided, once. Nothing pickled is ever loaded.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from covariance_cache.capture import find_modules
from covariance_cache.errors import CaptureError, StatisticsError, StatisticsMismatch
from covariance_cache.fingerprint import model_fingerprint, tokenizer_fingerprint
from covariance_cache.modules import key_width
from covariance_cache.statistics import KeyStatistics, Provenance, library_version

_SUM, _COUNT = "mom2.mom2", "mom2.count"
_NAME = re.compile(r"([\w.]+?)_float(?:16|32|64)_.*mom2.*\.npz")
_INSTEAD = "get the file again, or collect statistics of the model"


@dataclass(frozen=True, eq=False)
class Published:
    """What a published file holds, and what its path says of it."""

    second_moment: Tensor
    """[d_key, d_key], the *mean* of k kᵀ, float32 or float64 as in the file."""
    count: int
    """Tokens it is the mean of."""
    module: str | None
    """Whose input the keys are, by the file's name; None if that does not say."""
    layer: int | None
    """The first number among the parts of the module's name."""
    corpus: str | None
    """Name of the text, by the folder `{corpus}_stats`."""
    digest: str
    """SHA-256 of the file."""


def read_npz(path: str | Path) -> Published:
    """A published file as it is; `import_npz` makes it statistics of a model.

    Raises:
        StatisticsError: unreadable, damaged, or no sum and count of second moments.
    """
    path = Path(path)
    if path.suffix.lower() in (".pt", ".pth"):
        raise StatisticsError(
            f"{path}: expected an .npz file of second moments. A null-space projection "
            "is not read, it is always recomputed from C: import the second moments "
            "that it was made of"
        )
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
            if not zipfile.is_zipfile(file):
                raise ValueError("this is no zip archive, or its end is missing")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                if not {_SUM, _COUNT} <= set(archive):
                    raise ValueError(f"it has only {sorted(archive)}")
                count, total = _checked(archive[_COUNT], archive[_SUM])
    except MemoryError:
        raise
    except Exception as error:  # zipfile, each decompressor and numpy raise their own
        raise StatisticsError(
            f"{path}: expected an .npz archive of plain numbers, with the sum {_SUM} "
            f"and its {_COUNT}; {type(error).__name__}: {error}; {_INSTEAD}"
        ) from error
    module = _module_of(path)
    folder = path.absolute().parent.name
    return Published(
        # In place: a second matrix of this size may not fit.
        second_moment=torch.from_numpy(total).div_(count),
        count=count,
        module=module,
        layer=_layer_of(module),
        corpus=folder.removesuffix("_stats") if folder.endswith("_stats") else None,
        digest=digest.hexdigest(),
    )


def import_npz(
    path: str | Path,
    model: nn.Module,
    *,
    layer: int | None = None,
    module: str | None = None,
    tokenizer: Any = None,
) -> KeyStatistics:
    """A published file as statistics of `model`.

    The file does not say which model its keys are of. That they are this one's is the
    caller's claim, and `provenance.origin` says so: only the module's existence and
    width can be checked.

    Args:
        model: the model, of the same weights, that the file was made with.
        layer: index of the decoder block; by default the number in the module's name.
        module: name in `model` of the module whose input the keys are; by default the
            one in the file's name.
        tokenizer: the tokenizer that the file was made with, by the same claim.

    Raises:
        StatisticsError: as `read_npz`; no module or layer in the file's name and none
            given; NaN, or not symmetric.
        StatisticsMismatch: file name, `module` and `layer` speak of different layers;
            the module is of another width.
        CaptureError: no such module.
    """
    path = Path(path)
    name, index = _target(path, layer, module)
    try:
        width = key_width(find_modules(model, [name])[name])
    except CaptureError as error:
        raise CaptureError(f"{path}: {error}; pass module=") from error
    published = read_npz(path)
    d_key = len(published.second_moment)
    if width not in (None, d_key):
        raise StatisticsMismatch(
            f"{path} holds keys of width {d_key}, {name} of this {type(model).__name__}"
            f" takes {width}; import it for the model and module it was made with"
        )
    words = None if tokenizer is None else tokenizer_fingerprint(tokenizer)
    provenance = Provenance(
        model_fingerprint=model_fingerprint(model),
        module=name,
        tokenizer_fingerprint=words,
        library_version=library_version(),
        origin=f"imported from {path.name}, SHA-256 {published.digest}; that it is of "
        "this model is the importer's claim",
    )
    matrix, count = published.second_moment, published.count
    try:
        return KeyStatistics(index, matrix, count, provenance)
    except StatisticsError as error:
        raise StatisticsError(f"{path}: {error}; {_INSTEAD}") from error


def _checked(count: Any, total: Any) -> tuple[int, np.ndarray]:
    # numpy hands out what is no array in an archive as bytes.
    count, total = np.asarray(count), np.asarray(total)
    if count.dtype.kind not in "iu" or count.size != 1 or count.item() < 1:
        raise ValueError(f"{_COUNT} is {count!r:.60}, not a number of tokens above 0")
    square = total.ndim == 2 and total.shape[0] == total.shape[1] > 0
    if not square or total.dtype not in (np.float32, np.float64):
        raise ValueError(
            f"{_SUM} is {list(total.shape)} of {total.dtype}, not [d_key, d_key] of "
            "float32 or float64"
        )
    return int(count.item()), total


def _target(path: Path, layer: int | None, module: str | None) -> tuple[str, int]:
    """Module and layer, on which file name, `module` and `layer` have to agree."""
    named = _module_of(path)
    name = module or named
    if name is None:
        raise StatisticsError(
            f"{path}: expected a name that says the module, as in "
            "transformer.h.17.mlp.c_proj_float32_mom2_100000.npz; pass module="
        )
    claims = {"the file": _layer_of(named), name: _layer_of(name), "layer=": layer}
    said = {who: number for who, number in claims.items() if number is not None}
    if not said:
        raise StatisticsError(f"{path}: {name} names no layer; pass layer=")
    if len(set(said.values())) > 1:
        # Nothing later would tell: all layers of a model are equally wide.
        listed = ", ".join(f"{who} says {number}" for who, number in said.items())
        raise StatisticsMismatch(
            f"{path}: which layer is it of? {listed}; pass what is right, or rename "
            "the file"
        )
    return name, next(iter(said.values()))


def _module_of(path: Path) -> str | None:
    match = _NAME.fullmatch(path.name)
    return match[1] if match else None


def _layer_of(module: str | None) -> int | None:
    parts = (module or "").split(".")
    return next((int(part) for part in parts if part.isdecimal()), None)
