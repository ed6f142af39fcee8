"""Edits and the files they come in. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from unified_edit.errors import EditError

SLOT = "{}"

T = TypeVar("T")


@dataclass(frozen=True)
class Edit:
    """One correction: after `prompt`, the model shall say `target`."""

    prompt: str
    """Text with `{}` in the subject's place, or the plain text with the subject in
    it exactly once. Ends where the target begins, e.g. `{} plays the`."""
    subject: str
    """Whose fact it is; its last token is where the edit acts."""
    target: str
    """What the model shall say, without a leading space."""

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise EditError(f"{self}: the {name} is empty; give some text")
        if self.subject != self.subject.strip():
            raise EditError(
                f"{self}: the subject begins or ends with space; write it without, its "
                "last character is where the edit acts"
            )
        if self.target != self.target.strip():
            raise EditError(
                f"{self}: the target begins or ends with space; write it without, the "
                "space before it is added as the tokenizer needs it"
            )
        if self.prompt != self.prompt.rstrip():
            raise EditError(
                f"{self}: the prompt ends with space; end it with its last word"
            )
        slots = self.prompt.count(SLOT)
        mentions = self.prompt.count(self.subject)
        if slots > 1:
            raise EditError(f"{self}: the prompt has {slots} slots {{}}; keep one")
        if slots == 0 and mentions == 0:
            raise EditError(
                f"{self}: the subject is not in the prompt; put {{}} or the subject "
                "itself where it belongs (same spelling and case)"
            )
        if slots == 0 and mentions > 1:
            raise EditError(
                f"{self}: the subject is in the prompt {mentions} times; mark the "
                "place that counts with {}"
            )

    @property
    def template(self) -> str:
        """The prompt with `{}` in the subject's place."""
        if SLOT in self.prompt:
            return self.prompt
        return self.prompt.replace(self.subject, SLOT)

    @property
    def text(self) -> str:
        """The prompt with the subject in it."""
        return fill(self.template, self.subject)[0]

    def as_dict(self) -> dict[str, str]:
        """The edit in this project's own JSON form."""
        return {"prompt": self.prompt, "subject": self.subject, "target": self.target}


def fill(template: str, subject: str) -> tuple[str, int]:
    """Puts the subject in a template's first slot.

    Returns:
        The text, and the index of the character after the subject. Other braces and
        percent signs stay as they are.
    """
    before, slot, after = template.partition(SLOT)
    if not slot:
        raise EditError(f"template {template!r} has no slot {{}} for the subject")
    return before + subject + after, len(before) + len(subject)


@dataclass(frozen=True)
class Record:
    """An edit with the prompts that judge it, as in CounterFact."""

    edit: Edit
    target_true: str
    paraphrase_prompts: tuple[str, ...] = ()
    neighborhood_prompts: tuple[str, ...] = ()
    attribute_prompts: tuple[str, ...] = ()
    generation_prompts: tuple[str, ...] = ()
    relation: str = ""
    case_id: int | str = 0
    target_id: str = ""
    """The target's id, by which reference texts are found."""


def check_edits(edits: Sequence[Edit]) -> None:
    """Refuses an empty set, repeated edits and edits that contradict each other.

    Raises:
        EditError: naming the edits by their numbers (from 0) and contents.
    """
    if not edits:
        raise EditError("there are no edits; give at least one")
    seen: dict[str, int] = {}
    for index, edit in enumerate(edits):
        first = seen.setdefault(edit.text, index)
        if first == index:
            continue
        if edits[first].target == edit.target:
            raise EditError(
                f"edit {index} repeats edit {first}: {edit.text!r} → "
                f"{edit.target!r}; keep one of them"
            )
        raise EditError(
            f"edits {first} and {index} contradict each other: {edit.text!r} → "
            f"{edits[first].target!r} and → {edit.target!r}; keep one of them"
        )


def read_edits(path: str | Path) -> list[Edit]:
    """Reads edits from `.jsonl` (an entry a line) or `.json` (a list of entries, or one
    object of parallel lists). Forms of an entry:

    - `{"prompt", "subject", "target"}`, this project's own;
    - `{"prompt", "subject", "target_new"}`, the target a text (EasyEdit, KnowEdit) or
      `{"str": text}` (ROME's and MEMIT's requests);
    - a CounterFact record, which holds such a request as `requested_rewrite`;
    - `{"src", "subject", "alt"}`, zsRE's questions as MEND and ROME have them.

    Parallel lists are EasyEdit's arguments: `{"prompts": […], "subject": […],
    "target_new": […]}`. Further fields of an entry are not looked at.

    Raises:
        EditError: naming the file, the entry and the field.
    """
    content = _content(path)
    if isinstance(content, Mapping) and "prompts" in content:
        content = _located(str(path), _from_lists, content)
    return [
        _located(f"{path}, entry {index}", _edit_from, entry)
        for index, entry in enumerate(_entries(path, content))
    ]


def edits_of(entries: Iterable[Mapping[str, Any]] | Mapping[str, Any]) -> list[Edit]:
    """Edits from what is already in memory, in any form that `read_edits` takes.

    Raises:
        EditError: naming the entry and the field.
    """
    found = _from_lists(entries) if isinstance(entries, Mapping) else entries
    return [
        _located(f"entry {index}", _edit_from, entry)
        for index, entry in enumerate(found)
    ]


def read_records(path: str | Path) -> list[Record]:
    """Reads records in the full CounterFact schema.

    Raises:
        EditError: naming the file and the entry.
    """
    return read_entries(path, _record_from)


def read_entries(path: str | Path, parse: Callable[[Mapping[str, Any]], T]) -> list[T]:
    """What `parse` makes of each entry of a `.jsonl` or `.json` file.

    Raises:
        EditError: naming the file, the entry and the field.
    """
    return [
        _located(f"{path}, entry {index}", parse, entry)
        for index, entry in enumerate(_entries(path, _content(path)))
    ]


def records_of(entries: Iterable[Mapping[str, Any]]) -> list[Record]:
    """Records from CounterFact entries already in memory."""
    return [_record_from(entry) for entry in entries]


def _content(path: str | Path) -> Any:
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            # Not splitlines(): JSON strings may hold other characters that it cuts at.
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        return json.loads(text)
    except OSError as error:
        raise EditError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise EditError(f"{path}: is not valid JSON: {error}") from error


def _entries(path: str | Path, content: Any) -> list[Mapping[str, Any]]:
    if not isinstance(content, list) or not all(isinstance(e, dict) for e in content):
        raise EditError(f"{path}: expected a list of JSON objects, one for each edit")
    return content


def _from_lists(lists: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    columns: dict[str, Sequence[Any]] = {}
    for name in ("prompts", "subject", "target_new"):
        given = lists.get(name)
        column = [given] if isinstance(given, str) else given
        if not isinstance(column, (list, tuple)):
            raise EditError(
                f"lacks or misuses the field {name!r}: parallel lists are "
                '{"prompts": […], "subject": […], "target_new": […]}'
            )
        columns[name] = column
    if len({len(column) for column in columns.values()}) > 1:
        sizes = ", ".join(f"{len(each)} in {name!r}" for name, each in columns.items())
        raise EditError(f"parallel lists must be of one length; there are {sizes}")
    return [
        {"prompt": prompt, "subject": subject, "target_new": target}
        for prompt, subject, target in zip(*columns.values(), strict=True)
    ]


def _located(where: str, parse: Any, entry: Any) -> Any:
    try:
        return parse(entry)
    except EditError as error:
        raise EditError(f"{where}: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise EditError(
            f"{where}: lacks or misuses the field {error}; expected "
            '{"prompt", "subject", "target"}, a request of ROME, MEMIT or EasyEdit, '
            "or a record of CounterFact or zsRE"
        ) from error


def _edit_from(entry: Mapping[str, Any]) -> Edit:
    if "requested_rewrite" in entry:
        return _record_from(entry).edit
    if "src" in entry and "prompt" not in entry:
        return Edit(_text(entry, "src"), _text(entry, "subject"), _target(entry, "alt"))
    own = "target" in entry
    return Edit(
        _text(entry, "prompt"),
        _text(entry, "subject"),
        _text(entry, "target") if own else _target(entry, "target_new"),
    )


def _record_from(entry: Mapping[str, Any]) -> Record:
    rewrite = entry["requested_rewrite"]
    return Record(
        edit=_edit_from(rewrite),
        target_true=_target(rewrite, "target_true"),
        paraphrase_prompts=_texts(entry, "paraphrase_prompts"),
        neighborhood_prompts=_texts(entry, "neighborhood_prompts"),
        attribute_prompts=_texts(entry, "attribute_prompts"),
        generation_prompts=_texts(entry, "generation_prompts"),
        relation=rewrite.get("relation_id", ""),
        case_id=entry.get("case_id", 0),
        target_id=_id(rewrite.get("target_new")),
    )


def _text(entry: Mapping[str, Any], name: str) -> str:
    text = entry[name]
    if not isinstance(text, str):
        raise EditError(f"lacks or misuses the field {name!r}: not a text: {text!r}")
    return text


def _target(entry: Mapping[str, Any], name: str) -> str:
    # Their code puts the space before a target unless the file has it already.
    value = entry[name]
    if isinstance(value, Mapping):
        if "str" not in value:
            raise EditError(f"lacks or misuses the field {name!r}: it has no 'str'")
        return _target({f"{name}.str": value["str"]}, f"{name}.str")
    return _text(entry, name).strip()


def _id(target: Any) -> str:
    return str(target.get("id", "")) if isinstance(target, Mapping) else ""


def _texts(entry: Mapping[str, Any], name: str) -> tuple[str, ...]:
    texts = entry.get(name, [])
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise EditError(f"{name} must be a list of texts, got {texts!r}")
    return tuple(texts)
