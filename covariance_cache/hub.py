"""A data set of the Hugging Face hub, or a folder of data files, as a text source.

Needs the package `datasets`, imported only when a data set is asked for; it downloads
the whole of it into its own cache. Code that comes with a data set never runs.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from covariance_cache.errors import CorpusError

_OLDEST = 4  # Earlier versions of `datasets` can run code that comes with a data set.


@dataclass(frozen=True)
class HubText:
    """Which data set of the hub, pinned."""

    name: str
    """Such as `wikimedia/wikipedia`, or a folder of data files, which goes first."""
    config: str | None = None
    """Such as `20231101.en`; None for its only or default configuration."""
    split: str = "train"
    """Also a part of one, such as `train[:10%]`."""
    revision: str | None = None
    """Branch, tag or commit; None for the newest. Without a network `datasets` takes
    what it cached last, so that only a full commit is a pin there as well."""

    @classmethod
    def parse(cls, spec: str) -> HubText:
        """`hub:NAME[:CONFIG][@REVISION]`; a folder with `:` or `@` in its path cannot
        be written so. Raises CorpusError for anything else."""
        pattern = r"hub:([^:@]+)(?::([^:@]+))?(?:@([^:@]+))?"
        match = re.fullmatch(pattern, spec)
        if match is None:
            raise CorpusError(
                f"{spec!r}: expected hub:NAME[:CONFIG][@REVISION], such as "
                "hub:wikimedia/wikipedia:20231101.en@main"
            )
        return cls(match[1], match[2], revision=match[3])

    def __str__(self) -> str:
        config = "" if self.config is None else f":{self.config}"
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"hub:{self.name}{config}{revision}"


def hub_documents(
    spec: str | HubText, *, split: str | None = None, field: str = "text"
) -> Sequence[Mapping[str, Any]]:
    """The rows of a data set, each a mapping with `field` alone, read from the disk one
    at a time. `collect` takes them like any texts, with the same `field`.

    Args:
        spec: what `HubText.parse` reads, or its result.
        split: None for that of `spec`, which is `train` where it says nothing else.
        field: column that holds the text.

    Raises:
        CorpusError: `datasets` is missing or too old; no such data set, configuration,
            revision, split or field; out of reach; comes with code; cannot be read.
    """
    text = spec if isinstance(spec, HubText) else HubText.parse(spec)
    library = _library(text)
    path = os.path.abspath(os.path.expanduser(text.name))
    folder = os.path.isdir(path)
    if folder and text.revision is not None:
        raise CorpusError(f"{text}: {path} is a folder, which has no revisions")
    try:
        # By its full path a folder is never mistaken for a name.
        name = path if folder else text.name
        builder = library.load_dataset_builder(
            name, text.config, revision=text.revision
        )
        if not folder and builder.repo_id is None:
            # Such as `json`: it would read whatever lies in the current folder.
            raise CorpusError(f"{name} is not the name of a data set")
        pinned = re.fullmatch("[0-9a-f]{40}", text.revision or "")
        if pinned and builder.hash != text.revision:
            raise CorpusError(
                f"the hub is out of reach, and the revision cached is {builder.hash}; "
                "name that one, or load this one once where the hub can be reached"
            )
        builder.download_and_prepare()
        dataset = builder.as_dataset(split=text.split if split is None else split)
        if field not in dataset.column_names:
            raise CorpusError(f"no field {field!r}, only {dataset.column_names}")
    except Exception as error:  # Of many libraries below, all of them about the data.
        raise CorpusError(f"{text}: {_reason(error, folder)}") from error
    documents: Sequence[Mapping[str, Any]] = dataset.select_columns([field])
    return documents


def _library(text: HubText) -> Any:
    try:
        library = importlib.import_module("datasets")
        found = str(library.__version__)
    except (ImportError, AttributeError) as error:
        library, found = None, str(error)
    if library is None or int(found.split(".")[0]) < _OLDEST:
        raise CorpusError(
            f"{text}: needs the package datasets, version {_OLDEST} or later ({found}):"
            " pip install 'unified-edit[datasets]'"
        )
    return library


def _reason(error: Exception, folder: bool) -> str:
    if isinstance(error, StopIteration):  # What `datasets` makes of an empty file.
        return "it holds no documents"
    told = [str(each) for each in (error, error.__cause__) if str(each or "")]
    reason = " ".join(": ".join(told).split()) or type(error).__name__
    if not folder and isinstance(error, FileNotFoundError | ConnectionError):
        reason += (
            "; check the name, load it once where the hub can be reached, or pass a "
            "folder of data files or a .jsonl file"
        )
    return reason
