"""A tiny model's folder with everything a command needs beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_kit import disk
from model_kit import EDITS, LAYERS, RECORD, TEXTS, make_model, make_tokenizer
from typer.testing import CliRunner, Result

from covariance_cache.__main__ import app as statistics_app
from unified_edit.cli import app
from unified_edit.edits import Record

RECORDS = [
    RECORD,
    Record(EDITS[4], "a red boat", ("Eero Lind always likes",), ("Bo Diaz likes",)),
]


def run(*arguments: Any, of: Any = app) -> Result:
    """A command's result; a defect keeps its traceback."""
    result = CliRunner().invoke(of, [str(each) for each in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def answer(*arguments: Any) -> Any:
    """The one JSON object of a command that succeeds."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def refusal(folder: Path, *arguments: Any) -> str:
    """The one line of a command that fails, after which `folder` is as it was."""
    before = disk(folder)
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert disk(folder) == before
    assert "Traceback" not in result.output
    assert result.stdout == ""
    lines = [each for each in result.stderr.splitlines() if each.startswith("error")]
    assert len(lines) == 1 and result.stderr.endswith(f"{lines[0]}\n")
    return lines[0].removeprefix("error: ")


@dataclass(frozen=True)
class Workplace:
    """Paths; each test gets its own copy."""

    path: Path

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def statistics(self) -> Path:
        return self.path / "statistics"

    @property
    def edits(self) -> Path:
        return self.path / "edits.jsonl"

    @property
    def records(self) -> Path:
        return self.path / "records.json"

    @property
    def update(self) -> Path:
        return self.path / "update.safetensors"

    def editing(self, **changes: Any) -> list[Any]:
        """Arguments of `edit`; None leaves an option out."""
        options: dict[str, Any] = {
            "recipe": "memit",
            "layers": "0-1",
            "statistics": self.statistics,
            "out": self.update,
            **changes,
        }
        model, edits = (
            options.pop("model", self.model),
            options.pop("edits", self.edits),
        )
        flags = [
            part
            for name, value in options.items()
            if value is not None
            for part in (f"--{name}", value)
        ]
        quick = ("--set", "steps=8", "--set", "preservation_weight=1")
        return ["edit", model, edits, *flags, *quick, "--set", "clamp=3"]


def make_workplace(path: Path, kind: str) -> Workplace:
    """A model (GPT-2's in shards), statistics collected by their own command, edits
    and records."""
    place = Workplace(path)
    tokenizer = make_tokenizer(kind)
    model = make_model(kind, len(tokenizer))
    size = 20_000 if kind == "gpt2" else 10**9
    model.save_pretrained(place.model, max_shard_size=size)
    tokenizer.save_pretrained(place.model)
    (place.model / "README.md").write_text("a card\n")
    corpus = path / "corpus.jsonl"
    corpus.write_text("".join(f"{json.dumps({'text': text})}\n" for text in TEXTS))
    options = ["--corpus", corpus, "--layers", f"0-{LAYERS - 1}", "--tokens", "2k"]
    options += ["--window", 32, "--out", place.statistics]
    result = run("collect", place.model, *options, of=statistics_app)
    assert result.exit_code == 0, result.output
    write_edits(place.edits, [edit.as_dict() for edit in EDITS])
    place.records.write_text(json.dumps([_entry(record) for record in RECORDS]))
    return place


def write_edits(path: Path, entries: list[dict[str, str]]) -> Path:
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    return path


def _entry(record: Record) -> dict[str, Any]:
    return {
        "requested_rewrite": {
            "prompt": record.edit.prompt,
            "subject": record.edit.subject,
            "target_new": {"str": record.edit.target},
            "target_true": {"str": record.target_true},
        },
        "paraphrase_prompts": record.paraphrase_prompts,
        "neighborhood_prompts": record.neighborhood_prompts,
    }
