"""Adds a model type to the architecture table: `python tests/add_family.py MODEL_TYPE`.

Makes a small random model of the type, finds out by passes through it where the edited
weight is and what becomes of what it returns, and prints the lines that say so. With
`--write` puts them into the tables and runs the conformance tests of that family.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from families import _OWN, GPT_SHAPE, SHAPE, Family
from family_probe import LAYER, DoesNotFit, Measured, matrix, measure
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from unified_edit.model.architectures import (
    ARCHITECTURES,
    REFUSED,
    Architecture,
    When,
)

ROOT = Path(__file__).resolve().parents[1]

KEYS = "covariance_cache/modules.py"
RECORDS = "unified_edit/model/architectures.py"
CONFIGS = "tests/families.py"
FILES = (KEYS, RECORDS, CONFIGS)
TESTS = [f"tests/test_{x}.py" for x in ("conformance", "conformance_files")]
TESTS += ["tests/test_target_families.py"]
WIDTH = 88


# Sizes of a small model


_NAMES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": (
        *("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_inner"),
        *("d_ff", "inner_size", "mlp_dim", "ffn_intermediate_size"),
    ),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_attention_heads": (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
    ),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads"),
    "max_position_embeddings": (
        *("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"),
    ),
}
"""What types call the sizes in SHAPE."""
_DECIDE = ("hidden_size", "num_hidden_layers", "num_attention_heads")


def default_config(model_type: str) -> PretrainedConfig:
    """Raises: DoesNotFit, where it alone tells."""
    if model_type in REFUSED:
        raise DoesNotFit(REFUSED[model_type])
    if model_type not in CONFIG_MAPPING:
        raise DoesNotFit("is not in the installed transformers")
    config = CONFIG_MAPPING[model_type]()
    if config.model_type != model_type:
        raise DoesNotFit(f"is another name of {config.model_type!r}")
    if config.is_encoder_decoder:
        raise DoesNotFit("is an encoder-decoder")
    text = config.get_text_config().model_type
    if text != model_type:
        raise DoesNotFit(
            f"wraps a text decoder ({text!r}): where it keeps that is a line in "
            f"WRAPPERS, in {KEYS}"
        )
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise DoesNotFit("is not among transformers' causal language models")
    return config


def small_family(model_type: str, given: Mapping[str, Any]) -> Family:
    """What makes a small model of a type: SHAPE in its own config's words, and what was
    given."""
    has = vars(default_config(model_type))
    named = {
        own: next((name for name in names if name in has), None)
        for own, names in _NAMES.items()
    }
    inner = named["intermediate_size"]
    config: dict[str, Any] = {}
    if all(named[name] == name for name in _DECIDE):
        shape = SHAPE
    elif all(name in has for name in GPT_SHAPE):
        shape = GPT_SHAPE
    else:
        shape = {name: SHAPE[own] for own, name in named.items() if name}
    if inner and inner not in shape:
        config[inner] = SHAPE["intermediate_size"]
    odd = {inner: 41} if inner else None
    return Family(model_type, {**config, **given}, shape, odd)


# One type, in all its configurations that differ in one switch


@dataclass(frozen=True)
class Survey:
    """A type's record, how to make a small model of it, and what could not be told."""

    record: Architecture
    family: Family
    notes: tuple[str, ...]


def survey(family: Family) -> Survey:
    """Raises: DoesNotFit."""
    try:
        base = measure(family)
    except (FloatingPointError, RuntimeError):  # masks overflow in some types
        family = dataclasses.replace(family, dtype=torch.float32, tolerance=1e-4)
        base = measure(family)
    if family.dtype == torch.float64 and base.rounding > 1e-9:
        # Some of it is computed in float32.
        family = dataclasses.replace(family, tolerance=1e-5)
    return Switches(family, base).survey()


_EVERYWHERE = {*vars(PretrainedConfig()), "use_cache", "tie_word_embeddings"}
_EVERYWHERE |= {"add_cross_attention", "is_decoder"}


@dataclass(frozen=True)
class Switches:
    """A type's configurations."""

    family: Family
    base: Measured

    @cached_property
    def settings(self) -> dict[str, bool]:
        """The booleans of the type's own in its config."""
        config = vars(self.family.make().config)
        return {
            name: value
            for name, value in config.items()
            if isinstance(value, bool)
            and name not in _EVERYWHERE
            and not name.startswith("_")
        }

    def flipped(self, state: Mapping[str, bool]) -> dict[str, Measured | str]:
        """What each of them changes, starting from a state; or why it was not seen."""
        found: dict[str, Measured | str] = {}
        for name, value in {**self.settings, **state}.items():
            try:
                found[name] = measure(self.family, **{**state, name: not value})
            except DoesNotFit as reason:
                found[name] = f"it does not fit: it {reason}"
            except Exception as error:  # whatever a model says to an odd config
                text = " ".join(str(error).split())
                found[name] = f"it fails ({type(error).__name__}: {text:.60})"
        return found

    def condition(self, fact: str, flips: Mapping[str, Measured | str]) -> When:
        """What a fact depends on, as a record has it: true where any switch stands as
        named.

        Raises:
            DoesNotFit: several switches make it true only together.
        """
        state: dict[str, bool] = {}
        if getattr(self.base, fact):
            state = {
                name: not self.settings[name]
                for name, found in flips.items()
                if isinstance(found, Measured) and not getattr(found, fact)
            }
            if not state:
                return True
            flips = self.flipped(state)
        now = {**self.settings, **state}
        names = sorted(
            name
            for name, found in flips.items()
            if isinstance(found, Measured) and getattr(found, fact)
        )
        if state and not names:
            raise DoesNotFit(
                f"is {fact} where {' and '.join(state)} are as they are together, "
                "which a record cannot say"
            )
        return tuple((name, not now[name]) for name in names)

    def survey(self) -> Survey:
        base, flips = self.base, self.flipped({})
        seen = [found for found in flips.values() if isinstance(found, Measured)]
        scales = {each.residual_scale for each in (base, *seen)} - {None}
        record = Architecture(
            self.family.model_type,
            base.down_projection,
            storage=base.storage,  # type: ignore[arg-type]
            attention=base.attention,
            normalized=self.condition("normalized", flips) or False,
            parallel=self.condition("parallel", flips) or False,
            residual_scale=min((str(each) for each in scales), default=None),
            heads=(base.head,),
        )
        return Survey(record, self.with_odd(), tuple(self.notes(flips)))

    def notes(self, flips: Mapping[str, Measured | str]) -> Iterator[str]:
        for name, found in flips.items():
            setting = f"{name}={not self.settings[name]}"
            if isinstance(found, str):
                yield f"with {setting} {found}"
                continue
            old, new = vars(self.base), vars(found)
            changed = [n for n in old if n != "rounding" and old[n] != new[n]]
            if changed:
                now = ", ".join(f"{n} is {new[n]}" for n in changed)
                yield f"with {setting}, {now}"

    def with_odd(self) -> Family:
        """The family, without what makes d_key odd if that does not."""
        if self.family.odd is not None:
            try:
                model = self.family.make(**self.family.odd)
                name = self.base.down_projection.format(LAYER)
                if matrix(model.get_submodule(name)).shape[1] % 2:
                    return self.family
            except Exception:  # whatever a model says to an odd config
                pass
        return dataclasses.replace(self.family, odd=None)


# Lines of the tables


class Raw(str):
    """Source as it stands."""


@dataclass(frozen=True)
class Group:
    """Source of brackets with something in them."""

    start: str
    items: list[tuple[str, Any]]
    end: str

    @classmethod
    def of(cls, value: Any) -> Group | str:
        if isinstance(value, Group | Raw):
            return value
        if isinstance(value, dict):
            pairs = [(f"{json.dumps(key)}: ", each) for key, each in value.items()]
            return cls("{", pairs, "}")
        if isinstance(value, list | tuple):
            start, end = "[]" if isinstance(value, list) else "()"
            return cls(start, [("", each) for each in value], end)
        if isinstance(value, str):
            return json.dumps(value, ensure_ascii=False)
        return str(value)

    def flat(self) -> str:
        inside = ", ".join(head + _flat(each) for head, each in self.items)
        comma = "," if self.start == "(" and len(self.items) == 1 else ""
        return f"{self.start}{inside}{comma}{self.end}"


def _flat(value: Any) -> str:
    found = Group.of(value)
    return found if isinstance(found, str) else found.flat()


def source(head: str, value: Any, indent: int) -> str:
    """Lines that the formatter leaves as they are."""
    found, space = Group.of(value), " " * indent
    line = f"{space}{head}{_flat(value)},\n"
    if isinstance(found, str) or not found.items or len(line) - 1 <= WIDTH:
        return line
    parts = [source(name, each, indent + 4) for name, each in found.items]
    return f"{space}{head}{found.start}\n{''.join(parts)}{space}{found.end},\n"


def key_line(record: Architecture) -> str:
    return source(f'"{record.model_type}": ', record.down_projection, 4)


def record_lines(record: Architecture) -> str:
    """Without what is the default."""
    known = [
        (f"{each.name}=", getattr(record, each.name))
        for each in dataclasses.fields(record)[2:]
        if getattr(record, each.name) != each.default
    ]
    return source("", Group("_family(", [("", record.model_type), *known], ")"), 8)


def config_lines(family: Family) -> str:
    """How to make the small model; nothing where the defaults do."""
    plain = Family(family.model_type)
    own = {
        name: getattr(family, name)
        for name in ("shape", "config", "odd", "dtype", "tolerance")
        if getattr(family, name) != getattr(plain, name)
    }
    if own.get("shape") == GPT_SHAPE:
        own["shape"] = Raw("GPT_SHAPE")
    elif "shape" in own:
        depth = {name: Raw("LAYERS") for name in _NAMES["num_hidden_layers"]}
        own["shape"] = {n: depth.get(n, size) for n, size in own["shape"].items()}
    if "tolerance" in own:
        own["tolerance"] = Raw(f"{family.tolerance:.0e}".replace("e-0", "e-"))
    return source(f'"{family.model_type}": ', own, 4) if own else ""


def entries(text: str, table: str) -> dict[str, tuple[int, int]]:
    """The types in a table of a source file, and their first and last lines."""
    (value,) = (
        node.value
        for node in ast.parse(text).body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and node.target.id == table
    )
    pairs: list[tuple[Any, ast.expr]]
    if isinstance(value, ast.Dict):
        pairs = [(k, v) for k, v in zip(value.keys, value.values, strict=True) if k]
    else:
        assert isinstance(value, ast.DictComp)
        (records,) = (each.iter for each in value.generators)
        assert isinstance(records, ast.Tuple)
        pairs = [(each.args[0], each) for each in records.elts]  # type: ignore[attr-defined]
    return {
        key.value: (min(key.lineno, each.lineno), each.end_lineno or 0)
        for key, each in pairs
    }


def inserted(text: str, table: str, model_type: str, new: str) -> str:
    """With an entry in sorted place."""
    there = entries(text, table)
    before = [name for name in there if name < model_type]
    at = there[max(before)][1] if before else min(there.values())[0] - 1
    lines = text.splitlines(keepends=True)
    return "".join([*lines[:at], new, *lines[at:]])


# The command


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_type")
    parser.add_argument(
        "--config", action="extend", nargs="+", default=[], metavar="KEY=JSON",
        help="what its small config needs besides sizes",
    )  # fmt: skip
    parser.add_argument("--write", action="store_true", help="add it and test it")
    parser.add_argument("--no-tests", action="store_true", help="do not test it")
    parser.add_argument("--root", type=Path, default=ROOT, help="where the tables are")
    options = parser.parse_args(arguments)
    model_type, root = options.model_type, options.root
    before = {name: (root / name).read_text("utf-8") for name in FILES}
    own = model_type in entries(before[CONFIGS], "_OWN") and not options.config
    try:
        default_config(model_type)
        family = (
            Family(model_type, **_OWN[model_type])
            if own
            else small_family(model_type, dict(map(_setting, options.config)))
        )
        found = survey(family)
    except DoesNotFit as reason:
        sys.stderr.write(f"{model_type} {reason}\n")
        return 1
    except Exception as error:  # whatever a model says to a config
        sys.stderr.write(
            f"no small {model_type} could be made and run; does it need --config "
            f"KEY=VALUE?\n{type(error).__name__}: {error}\n"
        )
        return 1
    new = [
        (KEYS, "KEY_MODULES", key_line(found.record)),
        (RECORDS, "ARCHITECTURES", record_lines(found.record)),
    ]
    if not own:
        new.append((CONFIGS, "_OWN", config_lines(found.family)))
    texts = dict(before)
    for name, table, lines in new:
        if lines and model_type not in entries(texts[name], table):
            sys.stdout.write(f"{name}, {table}:\n{lines}")
            texts[name] = inserted(texts[name], table, model_type, lines)
        elif lines:
            sys.stdout.write(f"{name}, {table}: already has {model_type}\n")
    _tell(found)
    if not options.write:
        return 0
    for name, text in texts.items():
        if text != before[name]:
            (root / name).write_text(text, "utf-8")
    return 0 if options.no_tests else run_tests(model_type, root)


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        raise SystemExit(f"--config {text!r}: expected a name=value in JSON") from None


def _tell(found: Survey) -> None:
    """What else was seen, and what cannot be."""
    notes = list(found.notes)
    listed = ARCHITECTURES.get(found.record.model_type)
    if listed is not None and not agrees(found.record, listed):
        notes.append(f"the table says otherwise: {listed}")
    notes.append(
        "what depends on settings that are no booleans, or on several, was not seen"
    )
    sys.stdout.writelines(f"note: {note}\n" for note in notes)


def agrees(found: Architecture, listed: Architecture) -> bool:
    """The table may also have the heads of other versions of transformers."""
    same = dataclasses.replace(found, heads=listed.heads) == listed
    return same and set(found.heads) <= set(listed.heads)


def run_tests(model_type: str, root: Path) -> int:
    """The conformance tests of a type. Returns the exit code."""
    command = [sys.executable, "-m", "pytest", "-n", "0", *TESTS]
    wanted = " or ".join(names_of_tests(model_type))
    return subprocess.run([*command, "-k", wanted], cwd=root).returncode


def names_of_tests(model_type: str) -> list[str]:
    """What tests of a type and its variants have in their names, and those of another
    that the name is a part of have not."""
    return [f"{a}{model_type}{b}" for a in "[-" for b in "]-"]


if __name__ == "__main__":
    sys.exit(main())
