"""Facts that a model may know, and the files they come in. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unified_edit.edits import Edit, read_entries, records_of
from unified_edit.errors import EditError


def read_facts(path: str | Path) -> list[Edit]:
    """Reads facts, as edits whose target is the true answer, from `.jsonl` (an entry a
    line) or `.json` (a list of entries). Forms of an entry:

    - `{"prompt", "subject", "answer"}`, this project's own;
    - `{"prompt", "subject", "attribute"}`, the facts of ROME's causal tracing;
    - a CounterFact record, whose answer is `requested_rewrite.target_true`;
    - `{"prompt", "subject", "ground_truth"}`, EasyEdit's flat form of it.

    Raises:
        EditError: naming the file, the entry and the field; also for edits, which do
            not tell what is true now.
    """
    facts = read_entries(path, _fact_from)
    if not facts:
        raise EditError(f"{path}: there are no facts; give at least one")
    return facts


def _fact_from(entry: Mapping[str, Any]) -> Edit:
    if "requested_rewrite" in entry:
        (record,) = records_of([entry])
        return Edit(record.edit.prompt, record.edit.subject, record.target_true)
    names = ("answer", "attribute", "ground_truth")
    known = next((name for name in names if name in entry), None)
    if known is None:
        raise EditError(
            "no answer that the model may know: it has none of "
            f"{', '.join(map(repr, names))}; a new target says nothing of it"
        )
    values = [entry["prompt"], entry["subject"], entry[known]]
    if not all(isinstance(value, str) for value in values):
        raise EditError(f"prompt, subject and {known} are texts, not {values}")
    prompt, subject, answer = values
    return Edit(prompt, subject, answer.strip())
