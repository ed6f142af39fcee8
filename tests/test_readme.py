"""The README's Python blocks run as they stand, one after another."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from covariance_cache.modules import WRAPPERS
from unified_edit.model.architectures import ARCHITECTURES

ROOT = Path(__file__).parents[1]


def test_the_models_it_names_are_those_of_the_tables() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    part = text.partition("## Models")[2].partition("\n## ")[0]
    listed = part.partition("can be edited")[2].partition("\n\n")[0]
    named = re.findall(r"`([a-z0-9_-]+)`", listed)
    alone = [name for name, record in ARCHITECTURES.items() if record.alone]
    assert named == [*alone, *WRAPPERS]


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("gpt2", "data"):
        shutil.copytree(
            ROOT / "examples" / "tinyworld" / part,
            tmp_path / "examples" / "tinyworld" / part,
        )
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["result"].report.success >= 0.9
    before = (ROOT / "examples/tinyworld/gpt2/model.safetensors").read_bytes()
    assert (tmp_path / "gpt2-edited/model.safetensors").read_bytes() == before
    assert names["choice"].layers == (0,)
    assert names["step"].made and len(names["session"].state.edits) >= 2
    assert names["solution"].update.rank == 8
