"""Who may import whom: the table of docs/architecture.md, enforced on the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("unified_edit", "covariance_cache")


@dataclass(frozen=True)
class Row:
    """A row of the table. Names are patterns of dotted module names."""

    modules: tuple[str, ...]
    sees: tuple[str, ...]
    third_party: frozenset[str] = frozenset()


BASE = ("unified_edit.errors", "unified_edit.edits", "unified_edit.facts")
ALGEBRA = ("unified_edit.algebra", "unified_edit.algebra.*")
STATISTICS = ("covariance_cache", "covariance_cache.*")
MODEL = ("unified_edit.model", "unified_edit.model.*")
CHECKPOINT = ("unified_edit.checkpoint", "unified_edit.checkpoint.*")
ASSEMBLY = tuple(
    f"unified_edit.{name}"
    for name in (
        "presets",
        "recipes",
        "hparams",
        "live",
        "preparation",
        "report",
        "engine",
        "foresight",
        "guard",
        "session",
        "session_state",
        "target_cache",
        "tensor_file",
        "baselines",
        "baselines.*",
    )
)
LEDGER = (
    "unified_edit.ledger",
    "unified_edit.ledger_entries",
    "unified_edit.ledger_rebuild",
)
UPDATE = ("unified_edit.algebra.addition", "unified_edit.algebra.update")

ROWS = {
    "base": Row(BASE, BASE),
    "algebra": Row(ALGEBRA, (*BASE, *ALGEBRA), frozenset({"torch"})),
    "statistics": Row(
        STATISTICS, STATISTICS, frozenset({"torch", "numpy", "safetensors", "tqdm"})
    ),
    "model": Row(
        MODEL,
        (
            *BASE,
            *MODEL,
            *UPDATE,
            "covariance_cache.capture",
            "covariance_cache.fingerprint",
            "covariance_cache.modules",
            "covariance_cache.ranks",
        ),
        frozenset({"torch", "transformers", "tqdm"}),
    ),
    "checkpoint": Row(
        CHECKPOINT,
        (*BASE, *CHECKPOINT, *UPDATE, "covariance_cache.fingerprint"),
        frozenset({"torch", "numpy", "safetensors"}),
    ),
    "assembly": Row(
        ASSEMBLY,
        (*BASE, *ALGEBRA, *STATISTICS, *MODEL, *ASSEMBLY),
        frozenset({"torch", "tqdm"}),
    ),
    "ledger": Row(
        LEDGER,
        (*BASE, *ALGEBRA, *STATISTICS, *MODEL, *CHECKPOINT, *ASSEMBLY, *LEDGER),
        frozenset({"torch", "safetensors"}),
    ),
    "outer": Row(
        (
            "unified_edit",
            "unified_edit.__main__",
            "unified_edit.evaluate",
            "unified_edit.evaluate.*",
            *(
                f"unified_edit.{name}"
                for name in (
                    "cli",
                    "cli_baselines",
                    "cli_evaluate",
                    "cli_files",
                    "cli_ledger",
                    "cli_locate",
                    "cli_report",
                    "cli_sequential",
                    "cli_tasks",
                    "console",
                    "demo",
                    "display",
                    "doctor",
                    "loading",
                    "options",
                )
            ),
        ),
        ("unified_edit", "unified_edit.*", *STATISTICS),
        frozenset({"torch", "transformers", "tqdm", "rich", "typer", "matplotlib"}),
    ),
}
EXTRA = {
    "unified_edit.algebra.linalg": {"scipy"},
    "unified_edit.algebra.update": {"safetensors"},
    "unified_edit.evaluate.intervals": {"numpy"},
    "unified_edit.evaluate.onset": {"numpy"},
    "unified_edit.evaluate.tasks": {"numpy", "lm_eval"},
    "unified_edit.hparams": {"yaml"},
    "unified_edit.target_cache": {"safetensors"},
    "unified_edit.tensor_file": {"safetensors"},
    "unified_edit.baselines.lora_tuning": {"peft"},
    "covariance_cache.__main__": {"typer", "transformers"},
    "covariance_cache.adequacy": {"scipy"},
    "covariance_cache.display": {"rich"},
    "covariance_cache.hub": {"datasets"},
    "covariance_cache.spectrum": {"matplotlib"},
}
"""What single modules may import beyond their row."""


def modules() -> dict[str, Path]:
    """Dotted name → source, of every module of both packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join(parts)] = path
    return found


MODULES = modules()


def row_of(module: str) -> str | None:
    rows = [
        name
        for name, row in ROWS.items()
        if any(fnmatch(module, pattern) for pattern in row.modules)
    ]
    assert len(rows) <= 1, f"{module} is in the rows {rows}"
    return rows[0] if rows else None


def imports(source: str) -> set[str]:
    """Absolute names of what a source imports anywhere in it; for `from a import b`
    it is `a.b` where that is a module of ours, else `a`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            module = node.module or ""
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                found.add(inner if inner in MODULES else module)
    return found


def violations(module: str, source: str) -> list[str]:
    name = row_of(module)
    if name is None:
        return [f"{module} is in no row of the table"]
    row = ROWS[name]
    allowed = row.third_party | EXTRA.get(module, set())
    wrong = []
    for wanted in sorted(imports(source)):
        top = wanted.partition(".")[0]
        if top in PACKAGES:
            if not any(fnmatch(wanted, pattern) for pattern in row.sees):
                wrong.append(f"{module} ({name}) may not see {wanted}")
        elif top not in sys.stdlib_module_names and top not in allowed:
            wrong.append(f"{module} ({name}) may not import {wanted}")
    return wrong


@pytest.mark.parametrize("module", MODULES)
def test_the_table_holds(module: str) -> None:
    assert violations(module, MODULES[module].read_text(encoding="utf-8")) == []


def test_every_row_and_exception_is_of_something_that_exists() -> None:
    assert {row_of(module) for module in MODULES} == set(ROWS)
    assert set(EXTRA) <= set(MODULES)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("unified_edit.errors", "import torch"),
        ("unified_edit.algebra.solve", "from transformers import AutoModel"),
        ("unified_edit.algebra.solve", "def f():\n    import scipy.linalg"),
        ("unified_edit.algebra.solve", "from unified_edit.model import keys"),
        ("covariance_cache.store", "from unified_edit.errors import EditError"),
        ("covariance_cache.store", "import transformers"),
        ("unified_edit.model.keys", "from unified_edit.algebra.solve import solve"),
        ("unified_edit.model.keys", "from covariance_cache.store import write_file"),
        ("unified_edit.checkpoint.patch", "import transformers.utils"),
        ("unified_edit.checkpoint.patch", "from unified_edit.model.adapter import x"),
        ("unified_edit.engine", "from unified_edit.cli import main"),
        ("unified_edit.engine", "from unified_edit.checkpoint.patch import patch"),
        ("unified_edit.engine", "import unified_edit"),
        ("unified_edit.brand_new", "import json"),
    ],
)
def test_violations_are_found(module: str, source: str) -> None:
    assert violations(module, source)


def test_no_source_is_too_long() -> None:
    lengths = {
        name: len(path.read_text(encoding="utf-8").splitlines())
        for name, path in MODULES.items()
    }
    assert {name: count for name, count in lengths.items() if count > 500} == {}


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in `sys.modules` after a statement in a fresh interpreter."""
    code = f"{statement}\nimport sys\nsys.stdout.write(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_importing_the_package_loads_nothing_heavy() -> None:
    found = loaded_by("import unified_edit")
    assert "unified_edit" in found
    assert not found & {"torch", "transformers", "numpy", "scipy", "safetensors"}


def test_statistics_algebra_and_checkpoints_never_load_transformers() -> None:
    found = loaded_by(
        "import covariance_cache, unified_edit.algebra.solve\n"
        "import unified_edit.checkpoint.patch\n"
        "from unified_edit import UpdateSet, patch, solve"
    )
    assert "torch" in found and "transformers" not in found


def test_public_names_are_sorted_complete_and_there() -> None:
    import covariance_cache
    import unified_edit

    for package in (covariance_cache, unified_edit):
        names = package.__all__
        assert list(names) == sorted(set(names))
        for name in names:
            assert getattr(package, name) is not None
    assert set(dir(unified_edit)) >= set(unified_edit.__all__)
    with pytest.raises(AttributeError, match="nothing_such"):
        unified_edit.nothing_such  # noqa: B018
    # What type checkers read is what is loaded at run time.
    tree = ast.parse(MODULES["unified_edit"].read_text(encoding="utf-8"))
    declared = {
        alias.asname or alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and "unified_edit" in (node.module or "")
        for alias in node.names
    }
    assert set(declared) == set(unified_edit.__all__)
    for name, module in declared.items():
        assert module is not None
        __import__(module)
        assert getattr(unified_edit, name) is getattr(sys.modules[module], name)
