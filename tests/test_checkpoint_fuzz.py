"""Malformed checkpoints, by the thousand: each is read as the safetensors library
reads it, or refused with an error of ours that can be printed; never anything else, and
what was refused leaves the disk as it was.

The mutants are the same in every run. Special files, hangs and memory are in
`test_checkpoint_fuzz_files`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from unified_edit.algebra.addition import added
from unified_edit.algebra.update import RankKUpdate, UpdateSet, WeightAddress
from unified_edit.checkpoint.layout import read_header, read_tensor
from unified_edit.checkpoint.patch import history, patch, revert, verify
from unified_edit.checkpoint.revert import recover
from unified_edit.checkpoint.sharded import Checkpoint
from unified_edit.errors import (
    CheckpointError,
    NonFiniteError,
    UnsupportedModel,
    UpdateError,
)

SINGLE, INDEX, CONFIG = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
)
pytestmark = pytest.mark.slow

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
STATE = ".unified-edit"
ADDRESSES = (WeightAddress("a.weight", 0, False), WeightAddress("b.weight", 1, True))
READ = (CheckpointError,)
PATCH = (CheckpointError, UnsupportedModel, UpdateError, NonFiniteError)
SECONDS = 5


@pytest.fixture(autouse=True)
def quick_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power, and waiting for the disk would take most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# ---------------------------------------------------------------- what is mutated


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(4, 6, generator=generator)
    return {
        "a.weight": matrix,
        "b.weight": matrix.T.contiguous().bfloat16(),
        "half": matrix[0].half(),
        "double": torch.tensor(0.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "mask": torch.tensor([True, False]),
    }


def write_checkpoint(folder: Path, *, sharded: bool) -> None:
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps({"model_type": "gpt2", "n_layer": 2}))
    whole = tensors()
    if not sharded:
        save_file(whole, folder / SINGLE, metadata={"format": "pt"})
        return
    names = list(whole)
    weight_map = {}
    for shard, part in zip(SHARDS, (names[:3], names[3:]), strict=True):
        save_file({name: whole[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


def make_update(folder: Path) -> UpdateSet:
    """Fits the two matrices of the folder as it is."""
    generator = torch.Generator().manual_seed(4)
    changes = {}
    for address in ADDRESSES:
        left = torch.randn(4, 2, generator=generator)
        changes[address] = RankKUpdate(left, torch.randn(2, 6, generator=generator))
    metadata = {
        "base_fingerprint": Checkpoint.open(folder).fingerprint(),
        "edits": [{"prompt": "{} is in", "subject": "Île", "target": "Rome"}],
    }
    return UpdateSet(changes, metadata)


# ---------------------------------------------------------------- how it is mutated


class Raw(str):
    """Text that goes into JSON as it is; a lone surrogate becomes an invalid byte."""


class Pairs(list):  # type: ignore[type-arg]
    """An object whose keys may repeat."""


def dumps(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, (dict, Pairs)):
        items = value.items() if isinstance(value, dict) else value
        return "{" + ",".join(f"{json.dumps(k)}:{dumps(v)}" for k, v in items) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dumps, value)) + "]"
    return json.dumps(value)


def encoded(value: Any) -> bytes:
    return dumps(value).encode("utf-8", "surrogateescape")


NAMES = (
    *("", ".", "..", "../x", "a/b", "a\\b", "/etc/passwd", "\0", "a\0b", "\ud800"),
    *("\udcff", "x" * 300, "x" * 5000, "__metadata__", "a.weight", "half", "Ω\n"),
    *(SINGLE, CONFIG, INDEX, STATE, f"{STATE}.lock", f"{STATE}/manifest.json", *SHARDS),
)
DTYPES = (
    *("F32", "BF16", "F16", "F64", "U8", "I8", "BOOL", "I64", "C64", "F8_E4M3"),
    *("F8_E8M0", "F4", "F6_E2M3", "f32", "F31", "\ud800"),
)
DEEP = 100_000
ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 6, 8, 96, 2**31, 2**62, 2**63 - 1, 2**63),
    *(2**64, 10**400, 0.0, 1.5, 8.0, Raw("1" * 5000), Raw("NaN"), Raw("Infinity")),
    *(Raw("-Infinity"), Raw("1e400"), Raw("-0"), Raw("01"), Raw("1_0"), Raw("")),
    *(Raw('"\udcff"'), Raw('"\\ud83d"'), Raw("/**/1"), Raw('"\x01"'), Raw("'a'")),
    *(Raw("[" * DEEP + "]" * DEEP), Raw('{"a":' * DEEP), Raw("[" * DEEP)),
    *([], {}, [[]], [0], [0, 0], [8, 0], [-8, 0], [0, 2**63], [0, 10**400]),
    *([0.0, 8.0], [True, 8], [0, 96, 96], ["0", "8"], [None, None], {"a": 1}),
    *([2**62, 8, 0], [0, 2**62, 8], [2**63 - 1] * 9, [1] * 5000, [0] * 70),
    *([2**32, 2**32], Pairs([("a", 1), ("a", 2)]), Pairs([("a", {}), ("a", {})])),
    *NAMES,
    *DTYPES,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside a JSON value."""
    found = [at]
    if isinstance(value, (dict, list)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in pairs:
            found += places(item, (*at, key))
    return found


def inside(value: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        value = value[key]
    return value


def edited(value: Any, at: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """A copy with the value at one place changed."""
    if not at:
        return change(value)
    copy = value.copy()
    copy[at[0]] = edited(value[at[0]], at[1:], change)
    return copy


def json_mutant(rng: random.Random, value: Any) -> Any:
    """One to three structural changes of a JSON value."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.choice(places(value))
        here = inside(value, at)
        kind = rng.choice(("odd", "odd", "drop", "twice", "rename", "swap", "add"))
        keys = list(here) if isinstance(here, dict) else []
        if kind == "swap":
            other = inside(value, rng.choice(places(value)))
            value = edited(value, at, lambda _, other=other: other)
        elif kind == "drop" and keys:
            gone = rng.choice(keys)
            kept = {key: here[key] for key in keys if key != gone}
            value = edited(value, at, lambda _, kept=kept: kept)
        elif kind == "twice" and keys:
            key = rng.choice(keys)
            again = rng.choice((here[key], rng.choice(ODD)))
            pairs = Pairs([*here.items(), (key, again)])
            return edited(value, at, lambda _, pairs=pairs: pairs)
        elif kind == "rename" and keys:
            old, new = rng.choice(keys), rng.choice(NAMES)
            named = {new if key == old else key: item for key, item in here.items()}
            value = edited(value, at, lambda _, named=named: named)
        elif kind == "add" and isinstance(here, dict):
            more = {**here, rng.choice(NAMES): rng.choice((rng.choice(ODD), here))}
            value = edited(value, at, lambda _, more=more: more)
        else:
            odd = rng.choice(ODD)
            value = edited(value, at, lambda _, odd=odd: odd)
            if isinstance(odd, (Raw, Pairs)):
                return value
    return value


def text_mutant(rng: random.Random, raw: bytes) -> bytes:
    """A JSON text with some bytes changed, added or removed."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        token = rng.choice(
            (bytes([rng.randrange(256)]), b"\0", b"\xff", b'"', b"{", b"}", b"[", b",")
        )
        data[at : at + rng.choice((0, 0, 1, 1, 5))] = rng.choice((token, token, b""))
    start = rng.randrange(12)
    if start == 0:
        return bytes(data[: rng.randrange(len(data) + 1)])
    prefix = {1: b"\xef\xbb\xbf", 2: b" ", 3: b"\0", 4: b"\xff\xfe"}.get(start, b"")
    return prefix + bytes(data)


def split(content: bytes) -> tuple[bytes, bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length], content[8 + length :]


def joined(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def by_length(rng: random.Random, content: bytes) -> bytes:
    header, data = split(content)
    near = (0, 1, 2, len(header), len(content) - 8, len(content), 10**8)
    claims = [
        claim + step for claim in near for step in (-1, 0, 1) if claim + step >= 0
    ]
    claims += [2**power - step for power in (16, 31, 32, 62, 63, 64) for step in (1, 9)]
    claims.append(int.from_bytes(rng.randbytes(rng.randrange(1, 9)), "little"))
    return joined(header, data, rng.choice(claims))


def by_header_text(rng: random.Random, content: bytes) -> bytes:
    header, data = split(content)
    mutant = text_mutant(rng, header)
    return joined(mutant, data, rng.choice((None, None, len(header))))


def by_header_json(rng: random.Random, content: bytes) -> bytes:
    header, data = split(content)
    return joined(encoded(json_mutant(rng, json.loads(header))), data)


def by_layout(rng: random.Random, content: bytes) -> bytes:
    """Shapes, dtypes and offsets that are sizes, but not these tensors'."""
    raw, data = split(content)
    header = json.loads(raw)
    names = [name for name in header if name != "__metadata__"]
    one, two = header[rng.choice(names)], header[rng.choice(names)]
    kind = rng.randrange(8)
    if kind == 0:  # a gap, an overlap, or beyond the end
        step = rng.choice((-96, -8, -4, -2, -1, 1, 2, 4, 8, 48, 96, 1000))
        one["data_offsets"] = [one["data_offsets"][0] + step, one["data_offsets"][1]]
    elif kind == 1:
        step = rng.choice((-8, -4, -1, 1, 4, 8, 1000))
        one["data_offsets"] = [offset + step for offset in one["data_offsets"]]
    elif kind == 2:
        one["data_offsets"], two["data_offsets"] = (
            two["data_offsets"],
            one["data_offsets"],
        )
    elif kind == 3:
        one["data_offsets"] = one["data_offsets"][::-1]
    elif kind == 4:  # often still valid
        one["shape"] = rng.choice(
            (one["shape"][::-1], [*one["shape"], 1], [1, *one["shape"]], two["shape"])
        )
    elif kind == 5:  # often still valid
        one["dtype"] = rng.choice(("I32", "F32", "U16", "BF16", "I8", "F8_E5M2", "F4"))
    elif (
        kind == 6 and "empty" in header
    ):  # valid: no bytes, whatever the other sizes; or too large for torch
        size = rng.choice((1, 7, 2**31, 2**62, 2**63 - 1))
        header["empty"]["shape"] = rng.sample([0, size, rng.choice((1, 2, 8))], 3)
    else:  # valid: another tensor without bytes
        offset = one["data_offsets"][rng.randrange(2)]
        header[rng.choice(NAMES)] = {
            "dtype": rng.choice(DTYPES),
            "shape": [rng.choice((0, 1))],
            "data_offsets": [offset, offset],
        }
    return joined(json.dumps(header).encode(), data)


def by_data(rng: random.Random, content: bytes) -> bytes:
    """Valid files with other numbers, NaN and infinities among them."""
    header, data = split(content)
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 30))):
        changed[rng.randrange(len(data))] = rng.choice((0, 0x7F, 0xFF, 0x80, 0xC0))
    return joined(header, bytes(changed))


def by_cutting(rng: random.Random, content: bytes) -> bytes:
    header, _ = split(content)
    start = 8 + len(header)
    ends = [
        start + offset
        for name, entry in json.loads(header).items()
        if name != "__metadata__"
        for offset in entry["data_offsets"]
    ]
    edges = [edge + step for edge in (0, 8, start, *ends) for step in (-1, 0, 1)]
    edges = [edge for edge in edges if 0 <= edge < len(content)]
    return content[: rng.choice((rng.choice(edges), rng.randrange(len(content))))]


def by_adding(rng: random.Random, content: bytes) -> bytes:
    more = rng.choice((b"\0", b"\0" * 8, rng.randbytes(rng.randrange(1, 99)), content))
    return content + more


def by_many_entries(rng: random.Random, content: bytes) -> bytes:
    """Hundreds of entries, of which one may be wrong."""
    raw, data = split(content)
    header = json.loads(raw)
    end = len(data)
    count = rng.randrange(100, 600)
    for number in range(count):
        header[f"n{number}"] = {"dtype": "U8", "shape": [0], "data_offsets": [end, end]}
    entry = header[f"n{rng.randrange(count)}"]
    entry[rng.choice(list(entry))] = rng.choice((rng.choice(ODD), [0], [end, end]))
    return joined(encoded(header), data)


Mutator = Callable[[random.Random, bytes], bytes]
WEIGHTS: dict[str, tuple[Mutator, int, set[str]]] = {
    "length field": (by_length, 250, {"accepted", "refused"}),
    "header text": (by_header_text, 400, {"accepted", "refused"}),
    "header JSON": (by_header_json, 700, {"accepted", "refused"}),
    "layout": (by_layout, 330, {"accepted", "refused"}),
    "data": (by_data, 110, {"accepted", "refused"}),
    "truncated": (by_cutting, 160, {"refused"}),
    "trailing bytes": (by_adding, 60, {"refused"}),
    "many entries": (by_many_entries, 60, {"accepted", "refused"}),
}
"""Class → how it is made, how many, what must be among the outcomes of a patch."""


# ---------------------------------------------------------------- what is asked of it


class Hang(BaseException):
    """Something took longer than any of these files is worth."""


@contextmanager
def impatient() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


class Fuzz:
    """Runs mutants, counts what became of them and keeps what went wrong."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.failures: list[str] = []

    def run(self, kind: str, label: str, ask: Callable[[], str]) -> None:
        """`ask` returns an outcome; every exception is a failure."""
        try:
            with impatient():
                outcome = ask()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            lines = " > ".join(
                f"{Path(frame.filename).name}:{frame.lineno}"
                for frame in traceback.extract_tb(error.__traceback__)
                if {"checkpoint", "algebra", "tests"} & set(Path(frame.filename).parts)
            )
            text = ascii(str(error))[:300]
            self.failures.append(
                f"{kind} #{label}: {type(error).__name__} {text}: {lines}"
            )
            outcome = "FAILED"
        self.outcomes[kind, outcome] += 1

    def report(
        self, tell: Callable[[str], None], title: str, at_least: int
    ) -> dict[str, set[str]]:
        """Prints the counts, fails on failures; outcomes seen, by class."""
        found: dict[str, Counter[str]] = {}
        for (kind, outcome), count in self.outcomes.items():
            found.setdefault(kind, Counter())[outcome] += count
        total = sum(self.outcomes.values())
        tell(f"{title}: {total} mutants")
        for kind, counts in found.items():
            told = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items()))
            tell(f"  {kind}: {told}")
        if self.failures:
            shown = "\n".join(self.failures[:40])
            pytest.fail(f"{len(self.failures)} of {total}:\n{shown}", pytrace=False)
        assert total >= at_least
        return {kind: set(counts) for kind, counts in found.items()}


def asked(allowed: tuple[type[Exception], ...], call: Callable[[], Any]) -> Any:
    """The call's result, or None if it was refused as it may be, in words that any
    terminal can show."""
    try:
        return call()
    except allowed as error:
        str(error).encode()
        assert len(str(error)) < 20_000, "an error that nobody can read"
        return None


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its content."""
    return {
        os.path.join(parent, name): Path(parent, name).read_bytes()
        if name in files
        else None
        for parent, folders, files in os.walk(folder)
        for name in (*folders, *files)
    }


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_as_safetensors(content: bytes, path: Path) -> None:
    """What our reader accepts is what safetensors reads, and never more than that."""
    entries = read_header(path)
    # raises what it refuses: then it was not ours to accept
    theirs = dict(safetensors.deserialize(content))
    assert entries.keys() == theirs.keys()
    for name, entry in entries.items():
        told = theirs[name]
        assert (entry.dtype, list(entry.shape)) == (told["dtype"], told["shape"])
        assert content[entry.begin : entry.end] == bytes(told["data"])
        tensor = asked(READ, lambda entry=entry: read_tensor(path, entry))
        if tensor is not None:
            assert tensor.shape == entry.shape
            assert raw_bytes(tensor) == bytes(told["data"])


class Bench:
    """A folder that each mutant is put into and taken out of again."""

    def __init__(self, root: Path, *, sharded: bool) -> None:
        self.root, self.folder, self.out = root, root / "base", root / "out"
        write_checkpoint(self.folder, sharded=sharded)
        self.update = make_update(self.folder)
        self.valid = {path.name: path.read_bytes() for path in self.folder.iterdir()}

    @contextmanager
    def holding(self, name: str, content: bytes) -> Iterator[None]:
        (self.folder / name).write_bytes(content)
        try:
            yield
        finally:
            (self.folder / name).write_bytes(self.valid[name])
            shutil.rmtree(self.out, ignore_errors=True)

    def ask(self, check_base: bool) -> str:
        """Opens, reads and patches the folder."""
        before = snapshot(self.root)
        checkpoint = asked(READ, lambda: Checkpoint.open(self.folder))
        if checkpoint is not None:
            asked(READ, checkpoint.fingerprint)
            for name in checkpoint.tensors:
                asked(READ, lambda name=name: checkpoint.read(name))
            for name in checkpoint.files:
                assert_as_safetensors(
                    (self.folder / name).read_bytes(), self.folder / name
                )
        patched = asked(
            PATCH,
            lambda: patch(self.folder, self.update, self.out, check_base=check_base),
        )
        if patched is not None:
            assert checkpoint is not None
            report = patched.verify()
            assert report.ok, report.problems
            assert len(history(self.out)) == 1
            shutil.rmtree(self.out)
        assert snapshot(self.root) == before
        return "refused" if patched is None else "accepted"


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Bench]:
    root = tmp_path_factory.mktemp("fuzz")
    return {s: Bench(root / f"sharded-{s}", sharded=s) for s in (False, True)}


def test_valid_checkpoints_are_patched(benches: dict[bool, Bench]) -> None:
    """Otherwise the rest would prove nothing."""
    for bench in benches.values():
        assert bench.ask(check_base=True) == "accepted"


# ---------------------------------------------------------------- weight files


def test_mutated_weight_files(
    benches: dict[bool, Bench], tell: Callable[[str], None]
) -> None:
    fuzz = Fuzz()
    for kind, (mutate, count, _) in WEIGHTS.items():
        for number in range(count):
            rng = random.Random(f"{kind} {number}")
            bench = benches[number % 3 == 2]
            name = rng.choice([n for n in bench.valid if n.endswith(".safetensors")])
            content = mutate(rng, bench.valid[name])

            def ask(
                bench: Bench = bench,
                name: str = name,
                content: bytes = content,
                check: bool = number % 5 == 0,
            ) -> str:
                with bench.holding(name, content):
                    entries = asked(READ, lambda: read_header(bench.folder / name))
                    if entries is not None:
                        assert_as_safetensors(content, bench.folder / name)
                    return bench.ask(check)

            fuzz.run(kind, str(number), ask)
    found = fuzz.report(tell, "weight files", at_least=2000)
    for kind, (_, _, expected) in WEIGHTS.items():
        assert found[kind] == expected, kind


# ---------------------------------------------------------------- index and config


def test_mutated_index_and_config(
    benches: dict[bool, Bench], tell: Callable[[str], None]
) -> None:
    bench, fuzz = benches[True], Fuzz()
    for number in range(300):
        rng = random.Random(f"folder {number}")
        name = INDEX if number % 3 else CONFIG
        data = json.loads(bench.valid[name])
        if number % 6 == 1:  # a shard's name, only
            weight_map = data["weight_map"]
            weight_map[rng.choice(list(weight_map))] = rng.choice((*NAMES, *ODD))
            content = encoded(data)
        elif number % 6 == 3:
            key = rng.choice(("quantization_config", "compression_config"))
            quant = {"quant_method": rng.choice(ODD)}
            data[key] = rng.choice((quant, quant, rng.choice(ODD)))
            content = encoded(data)
        elif number % 6 == 5:
            content = text_mutant(rng, bench.valid[name])
        else:
            content = encoded(json_mutant(rng, data))

        def ask(
            name: str = name, content: bytes = content, check: bool = number % 5 == 0
        ) -> str:
            with bench.holding(name, content):
                return bench.ask(check)

        fuzz.run(name, str(number), ask)
    found = fuzz.report(tell, "index and config", at_least=300)
    assert all(found[name] == {"accepted", "refused"} for name in (INDEX, CONFIG))


# ---------------------------------------------------------------- updates


def test_mutated_updates(
    benches: dict[bool, Bench], tell: Callable[[str], None], tmp_path: Path
) -> None:
    bench, fuzz = benches[False], Fuzz()
    path = bench.update.save(tmp_path / "update.safetensors")
    valid = path.read_bytes()
    raw, data = split(valid)
    header = json.loads(raw)
    told = header["__metadata__"]["unified_edit"]
    for number in range(350):
        rng = random.Random(f"update {number}")
        if number % 2:
            kind = rng.choice(list(WEIGHTS))
            content = WEIGHTS[kind][0](rng, valid) if kind != "layout" else None
            content = content or by_header_json(rng, valid)
        else:
            kind = "what it says of itself"
            text: Any = dumps(json_mutant(rng, json.loads(told)))
            if number % 10 == 0:
                text = text_mutant(rng, told.encode()).decode("latin-1")
            text = text.encode("utf-8", "replace").decode()
            metadata = {"unified_edit": text}
            content = joined(encoded({**header, "__metadata__": metadata}), data)

        def ask(content: bytes = content) -> str:
            path.write_bytes(content)
            update = asked((UpdateError,), lambda: UpdateSet.load(path))
            if update is None:
                return "refused"
            theirs = dict(safetensors.deserialize(content))
            for address, change in update:
                for name, factor in (("left", change.left), ("right", change.right)):
                    stored = theirs[f"{address.tensor}/{name}"]
                    assert raw_bytes(factor) == bytes(stored["data"])
            before = snapshot(bench.root)
            patched = asked(
                PATCH, lambda: patch(bench.folder, update, bench.out, check_base=False)
            )
            if patched is not None:
                assert patched.verify().ok
                shutil.rmtree(bench.out)
            assert snapshot(bench.root) == before
            return "loaded, not patched" if patched is None else "patched"

        fuzz.run(kind, str(number), ask)
    found = fuzz.report(tell, "updates", at_least=350)
    assert found["what it says of itself"] == {
        *("patched", "refused", "loaded, not patched")
    }


# ---------------------------------------------------------------- a patched folder


STATES = (
    *("manifest.json", "journal.json", "update-0001.safetensors"),
    *("undo-0001.safetensors", "undo-0002.safetensors"),
)


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two updates, those that it came from, and one whose second patch
    stopped before its last step."""
    root = tmp_path_factory.mktemp("patched")
    write_checkpoint(root / "base", sharded=False)
    patch(root / "base", make_update(root / "base"), root / "once")
    shutil.copytree(root / "once", root / "halfway")
    second = make_update(root / "once")
    patch(root / "once", second, root / "twice")
    replace = os.replace

    def stop(source: Path, target: Path) -> None:
        if Path(target) == root / "halfway" / SINGLE:
            raise OSError(5, "the disk is gone")
        replace(source, target)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "replace", stop)
        with pytest.raises(CheckpointError, match="interrupted"):
            patch(root / "halfway", second)
    assert (root / "halfway" / STATE / "journal.json").exists()
    return root


ENDS: dict[str, Callable[[Path], object]] = {
    "reverted": revert,
    "all reverted": lambda folder: revert(folder, all_updates=True),
    "recovered": recover,
    "undone": lambda folder: recover(folder, undo=True),
}


def refit(manifest: bytes, name: str, content: bytes) -> bytes:
    """The manifest with the right SHA-256 for a changed file: a careful forgery."""
    import hashlib

    data = json.loads(manifest)
    for record in data["updates"]:
        for kind in ("update", "undo"):
            if record[kind] == name:
                record[f"{kind}_sha256"] = hashlib.sha256(content).hexdigest()
    return json.dumps(data).encode()


def test_mutated_state_of_a_patched_folder(
    twice: Path, tell: Callable[[str], None], tmp_path: Path
) -> None:
    fuzz = Fuzz()
    state = twice / "twice" / STATE
    valid = {path.name: path.read_bytes() for path in state.iterdir()}
    journal = twice / "halfway" / STATE / "journal.json"
    valid[journal.name] = journal.read_bytes()
    weights = {
        (twice / name / SINGLE).read_bytes() for name in ("base", "once", "twice")
    }
    third = make_update(twice / "twice")
    for number in range(200):
        rng = random.Random(f"state {number}")
        name = STATES[rng.choice((0, 0, 0, 1, 1, 2, 3, 4))]
        end = rng.choice(list(ENDS)[2:] if name == journal.name else list(ENDS)[:3])
        changed = {}
        if not name.endswith(".json"):
            mutate = rng.choice([mutate for mutate, _, _ in WEIGHTS.values()])
            mutate = by_header_json if name.startswith("update") else mutate
            changed[name] = mutate(rng, valid[name])
            if number % 2:
                changed["manifest.json"] = refit(
                    valid["manifest.json"], name, changed[name]
                )
        elif number % 5 == 0:
            changed[name] = text_mutant(rng, valid[name])
        else:
            changed[name] = encoded(json_mutant(rng, json.loads(valid[name])))

        def ask(
            name: str = name, changed: dict[str, bytes] = changed, end: str = end
        ) -> str:
            folder = tmp_path / "f"
            shutil.rmtree(folder, ignore_errors=True)
            source = "halfway" if name == journal.name else "twice"
            shutil.copytree(twice / source, folder)
            for file, content in changed.items():
                (folder / STATE / file).write_bytes(content)
            before = snapshot(tmp_path)
            asked(READ, lambda: [record.as_dict() for record in history(folder)])
            for base in (None, twice / "base", twice / "once"):
                report = asked(READ, lambda base=base: verify(folder, base))
                if report is not None:
                    json.dumps(report.as_dict(), ensure_ascii=False).encode()
            patched = asked(PATCH, lambda: patch(folder, third, tmp_path / "out"))
            if patched is not None:
                shutil.rmtree(tmp_path / "out")
            assert snapshot(tmp_path) == before
            if asked(READ, lambda: ENDS[end](folder)) is None:
                left, was = (
                    {path: data for path, data in files.items() if "staged" not in path}
                    for files in (snapshot(tmp_path), before)
                )
                assert left == was, "what was refused changed the disk"
                return f"not {end}"
            assert (folder / SINGLE).read_bytes() in weights
            assert not (folder / STATE / journal.name).exists()
            asked(READ, lambda: verify(folder))
            return end

        fuzz.run(name, str(number), ask)
    found = fuzz.report(tell, "state of patched folders", at_least=200)
    for name, ends in {
        "manifest.json": {"reverted", "all reverted", "not reverted"},
        "journal.json": {"recovered", "not recovered", "undone", "not undone"},
        "undo-0002.safetensors": {"not reverted", "not all reverted"},
    }.items():
        assert found[name] >= ends, name


# ---------------------------------------------------------------- found by hand


def test_a_shard_cannot_be_named_as_our_own_files(tmp_path: Path) -> None:
    """The lock is removed after use: a shard of its name would go with it."""
    for name in (f"{STATE}.lock", STATE, ".git"):
        folder = tmp_path / name.strip(".")
        write_checkpoint(folder, sharded=True)
        (folder / SHARDS[0]).rename(folder / name)
        index = (folder / INDEX).read_text().replace(SHARDS[0], name)
        (folder / INDEX).write_text(index)
        before = snapshot(folder)
        with pytest.raises(CheckpointError):
            patch(folder, make_update(folder))
        assert snapshot(folder) == before


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "a/../../b", "\0", "\ud800"]
)
def test_a_manifest_cannot_lead_out_of_its_folder(twice: Path, name: str) -> None:
    folder = twice.parent / "out of its folder"
    shutil.copytree(twice / "twice", folder)
    path = folder / STATE / "manifest.json"
    data = json.loads(path.read_text())
    data["files"][name] = "0" * 64
    path.write_text(json.dumps(data))
    try:
        for call in (history, verify, revert, recover):
            with pytest.raises(CheckpointError, match="manifest"):
                call(folder)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "place", [*ADDRESSES[:1], "metadata"], ids=["alias", "metadata"]
)
@pytest.mark.parametrize("in_place", [False, True])
def test_text_that_is_no_unicode(tmp_path: Path, place: Any, in_place: bool) -> None:
    """JSON can say half a character, which no file can hold."""
    folder = tmp_path / "base"
    write_checkpoint(folder, sharded=False)
    update = make_update(folder)
    if place == "metadata":
        update = UpdateSet(update.updates, {**update.metadata, "seed": "\ud800"})
    else:
        [(_, change), _] = update
        address = WeightAddress("a.weight", 0, False, ("\ud800",))
        update = UpdateSet({address: change}, update.metadata)
    before = snapshot(tmp_path)
    with pytest.raises((UpdateError, CheckpointError)):
        patch(folder, update, None if in_place else tmp_path / "out")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(("weight", "factor"), [(5e-324, 1.0), (1.0, 1e100)])
@pytest.mark.parametrize("in_place", [False, True])
def test_numbers_too_large_to_be_reported(
    tmp_path: Path, weight: float, factor: float, in_place: bool
) -> None:
    """‖ΔW‖ or ‖ΔW‖/‖W‖ overflows where W + ΔW does not: patched, verified and taken
    back, or refused, and then nothing is left."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / CONFIG).write_text("{}")
    matrix = torch.zeros(2, 2, dtype=torch.float64)
    matrix[0, 0] = weight
    save_file({"w": matrix}, folder / SINGLE)
    factors = torch.full((2, 1), factor, dtype=torch.float64)
    update = RankKUpdate(factors, factors.T.contiguous())
    changes = UpdateSet({WeightAddress("w", 0, False): update})
    before = snapshot(tmp_path)
    out = None if in_place else tmp_path / "out"
    patched = asked(PATCH, lambda: patch(folder, changes, out, check_base=False))
    if patched is not None:
        json.dumps(patched.report.as_dict(), allow_nan=False)
        assert patched.verify().ok
        patched.revert()
        if out is not None:
            shutil.rmtree(out)
    assert snapshot(tmp_path) == before


def test_undo_data_of_another_shape_are_refused_without_a_warning() -> None:
    update = RankKUpdate(torch.ones(2, 1), torch.ones(1, 2))
    with pytest.raises(UpdateError, match="this one is"):
        added(torch.zeros(1, 2, 2), update, transposed=True)


def test_sizes_beside_a_zero_are_read_or_refused(tmp_path: Path) -> None:
    """Without bytes, any sizes fit; torch cannot hold all of them."""
    (tmp_path / CONFIG).write_text("{}")
    for shape in ([0, 2**62, 8], [2**62, 8, 0], [2**62, 0], [0, 2**63 - 1], [0] * 70):
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
        (tmp_path / SINGLE).write_bytes(joined(json.dumps({"w": entry}).encode(), b""))
        checkpoint = asked(READ, lambda: Checkpoint.open(tmp_path))
        if checkpoint is not None:
            tensor = asked(READ, lambda c=checkpoint: c.read("w"))
            assert tensor is None or list(tensor.shape) == shape


def test_tensors_that_torch_cannot_hold_are_compared_by_their_bytes(
    tmp_path: Path,
) -> None:
    """Beside the edited ones, a tensor may be of a dtype that only the file knows."""
    folder = tmp_path / "base"
    write_checkpoint(folder, sharded=False)
    header, data = split((folder / SINGLE).read_bytes())
    entry = {
        "dtype": "F8_E8M0",
        "shape": [2],
        "data_offsets": [len(data), len(data) + 2],
    }
    header = json.dumps({**json.loads(header), "scale": entry}).encode()
    (folder / SINGLE).write_bytes(joined(header, data + b"\x01\x02"))
    patched = patch(folder, make_update(folder), tmp_path / "out")
    assert patched.verify().problems == ()


# ---------------------------------------------------------------- hypothesis


sizes = st.one_of(st.integers(0, 4), st.integers(-2, 2**70), st.sampled_from(ODD[:22]))
junk = st.recursive(
    st.none() | st.booleans() | sizes | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Safetensors files, laid out as the format wants it up to a few slips."""
    slip = draw(st.integers(0, 3)) == 0
    header: dict[str, Any] = {}
    position = 0
    for name in draw(st.lists(st.text(max_size=4), max_size=5)):
        dtype = draw(st.sampled_from(("F32", "BF16", "U8", "BOOL", "F64", "F4", "C64")))
        shape = draw(st.lists(st.integers(0, 3), max_size=4))
        bits = {"F32": 32, "BF16": 16, "F64": 64, "F4": 4, "C64": 64}.get(dtype, 8)
        for size in shape:
            bits *= size
        end = position + bits // 8
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        if name not in header:
            position = end
            header[name] = entry
    if draw(st.booleans()):
        header["__metadata__"] = draw(
            st.dictionaries(st.text(max_size=3), st.text(max_size=3))
            if not slip
            else junk
        )
    if slip and header:
        at = draw(st.sampled_from(places(header)))
        header = edited(header, at, lambda _: draw(junk))
    raw = json.dumps(header).encode() + b" " * draw(st.integers(0, 2))
    data = draw(st.binary(min_size=position, max_size=position))
    if slip:
        data = data[: draw(st.integers(0, len(data)))] + draw(st.binary(max_size=2))
        length = len(raw) + draw(st.integers(-2, 2))
        return joined(raw, data, max(0, length))
    return joined(raw, data)


outcomes: Counter[str] = Counter()


@settings(
    max_examples=300,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(content=files() | st.binary(max_size=40))
def test_arbitrary_files(scratch: Path, content: bytes) -> None:
    """Accepted exactly as safetensors reads it, or a CheckpointError."""
    path = scratch / SINGLE
    path.write_bytes(content)
    entries = asked(READ, lambda: read_header(path))
    if entries is not None:
        assert_as_safetensors(content, path)
        checkpoint = Checkpoint.open(scratch)
        asked(READ, checkpoint.fingerprint)
        assert checkpoint.tensors == entries
    outcomes["refused" if entries is None else "accepted"] += 1


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scratch")
    (folder / CONFIG).write_text("{}")
    return folder


def test_arbitrary_files_were_of_both_kinds(tell: Callable[[str], None]) -> None:
    if not outcomes:
        pytest.skip("test_arbitrary_files did not run")
    tell(f"arbitrary files: {dict(outcomes)}")
    assert min(outcomes["accepted"], outcomes["refused"]) > 30


@settings(max_examples=150, derandomize=True, database=None, deadline=None)
@given(config=junk, index=junk, name=st.text(max_size=6))
def test_arbitrary_folders(
    scratch_of_any: Path, config: Any, index: Any, name: str
) -> None:
    """Config and index of any content: opened, or refused in words."""
    folder = scratch_of_any
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / INDEX).write_text(json.dumps({"weight_map": {name: index}, name: index}))
    asked(READ, lambda: Checkpoint.open(folder))


@pytest.fixture(scope="module")
def scratch_of_any(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")
