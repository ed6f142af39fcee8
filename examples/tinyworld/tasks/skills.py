"""The tiny world's exercises, for lm-eval. Here, because a .yaml's own paths are looked
up in the folder lm-eval is started in, and this file knows where it lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

EXERCISES = Path(__file__).resolve().parents[1] / "data" / "skills.jsonl"


def exercises(skill: str, **_: Any) -> dict[str, Dataset]:
    """Those of one skill; lm-eval passes the .yaml's other settings, too."""
    lines = EXERCISES.read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["skill"] == skill]
    return {"test": Dataset.from_list(rows)}
