"""The statistics commands: what people are shown in 80 columns, what programs are
given, and one line for whatever a user gets wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from statistics_helpers import TEXTS, make_model, make_tokenizer, random_keys
from typer.testing import CliRunner

from covariance_cache import (
    Adequacy,
    KeyStatistics,
    Provenance,
    StatisticsStore,
    collect,
    model_fingerprint,
)
from covariance_cache.__main__ import app
from covariance_cache.store import FORMAT, write_file

NPZ = "transformer.h.1.mlp.c_proj_float32_mom2_100.npz"
SOURCE = Provenance(
    model_fingerprint="0123456789abcdef" * 4,
    module="model.layers.17.mlp.down_proj",
    tokenizer_fingerprint="123456789abcdef0" * 4,
    corpus_fingerprint="23456789abcdef01" * 4,
    window=128,
    seed=0,
    model_dtype="bfloat16",
    library_version="0.1.0",
)
MEASURED = Adequacy(
    tokens_per_dimension=3069.2,
    effective_rank=1234.5,
    condition=3.2e9,
    shrinkage_intensity=2.4e-5,
    first_position_share=0.123,
    change=0.016,
    change_shrinkage="none",
)


def run(*arguments: Any, columns: int = 80) -> Any:
    result = CliRunner().invoke(
        app, [str(each) for each in arguments], env={"COLUMNS": str(columns)}
    )
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*arguments: Any) -> str:
    """The one line of a command that fails."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == "" and "Traceback" not in result.stderr
    # Before it there may be transformers' bar of a model that was loaded.
    lines = [each for each in result.stderr.splitlines() if each.startswith("error")]
    assert len(lines) == 1 and result.stderr.endswith(f"{lines[0]}\n")
    return lines[0].removeprefix("error: ")


def put(
    folder: Path,
    layer: int,
    adequacy: Adequacy | None = MEASURED,
    d_key: int = 14336,
    count: int = 44_000_000,
    **source: Any,
) -> None:
    """A file as a wide model's would be, but for its matrix, which `show` does not
    read."""
    module = f"model.layers.{layer}.mlp.down_proj"
    provenance = dataclasses.replace(SOURCE, **{"module": module, **source})
    header = {
        "format": FORMAT,
        "layer": layer,
        "count": count,
        "d_key": d_key,
        "normalization": "mean",
        "dtype": "float32",
        "packed": False,
        "provenance": dataclasses.asdict(provenance),
        "adequacy": adequacy and dataclasses.asdict(adequacy),
    }
    path = StatisticsStore(folder).file(layer)
    write_file(path, {"second_moment": torch.eye(2)}, header)


def shown(folder: Path) -> str:
    """What `show` prints in 80 columns, nothing cut and nothing beyond them."""
    result = run("show", folder)
    assert result.exit_code == 0, result.output
    text: str = result.stdout
    assert "…" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    return text


def cells(text: str, layer: int) -> list[str]:
    """The words of a layer's row."""
    rows = [line.split() for line in text.splitlines()]
    (found,) = [row for row in rows if row and row[0] == str(layer) and len(row) > 5]
    return found


class TestShow:
    def test_a_wide_model_fits(self, tmp_path: Path) -> None:
        put(tmp_path, 17)
        text = shown(tmp_path)
        expected = "17 14336 44,000,000 3069.2 1234.5 3e+09 2e-05 12.3% 2%"
        assert cells(text, 17) == expected.split()
        for title in ("layer", "d_key", "keys", "per dim.", "eff. rank", "condition"):
            assert title in text
        for title in ("oas", "1st pos.", "change"):
            assert title in text

    def test_measured_or_not_in_one_folder(self, tmp_path: Path) -> None:
        """Together they are as wide as any table gets."""
        few = dataclasses.replace(
            MEASURED,
            effective_rank=12345.6,
            condition=None,
            shrinkage_intensity=0.31,
            change=1.43,
            change_shrinkage="oas",
        )
        put(tmp_path, 17)
        put(tmp_path, 18, few, count=9_000)
        put(tmp_path, 119, None)
        text = shown(tmp_path)
        assert cells(text, 17)[-1] == "2%"
        row = "18 14336 9,000 0.6 12345.6 - 3e-01 12.3% 143% oas"
        assert cells(text, 18) == row.split()
        assert cells(text, 119) == "119 14336 44,000,000 3069.2 - ? - - -".split()

    def test_where_they_come_from_is_said_once(self, tmp_path: Path) -> None:
        for layer in range(17, 22):
            put(tmp_path, layer)
        words = [" ".join(line.split()) for line in shown(tmp_path).splitlines()]
        for line in (
            "model 0123456789ab",
            "module model.layers.{layer}.mlp.down_proj",
            "tokenizer 123456789abc",
            "text 23456789abcd",
            "window 128",
            "seed 0",
            "dtype of the keys bfloat16",
            "version 0.1.0",
        ):
            assert words.count(line) == 1
        assert not any(line.startswith(("origin", "texts merged")) for line in words)

    def test_and_by_layer_where_it_differs(self, tmp_path: Path) -> None:
        put(tmp_path, 3)
        put(tmp_path, 4, window=64, seed=None, tokenizer_fingerprint=None)
        words = [" ".join(line.split()) for line in shown(tmp_path).splitlines()]
        for line in ("window of 3 128", "window of 4 64", "seed of 4 unknown"):
            assert line in words
        assert "tokenizer of 4 unknown" in words and "model 0123456789ab" in words

    def test_nothing_long_is_cut(self, tmp_path: Path) -> None:
        """An imported file's origin, a merged one's parts, a module's long name, a
        folder's long path: in pieces, but whole."""
        origin = f"imported from {NPZ}, SHA-256 {'89abcdef' * 8}; of this model"
        module = f"encoder.{'transformer_stack.' * 4}17.feed_forward.projection_down"
        parts = tuple(f"{n:012x}" + "f" * 52 for n in range(0x111111, 0x11111B))
        folder = tmp_path / ("a_rather_long_name_of_a_folder" * 4)
        put(folder, 17, origin=origin, module=module, parts=parts)
        pieces = "".join(shown(folder).split())
        assert "".join(origin.split()) in pieces
        assert module.replace(".17.", ".{layer}.") in pieces
        assert folder.name in pieces
        for part in parts:
            assert part[:12] in pieces

    def test_json_has_everything(self, tmp_path: Path) -> None:
        put(tmp_path, 17, origin="imported", parts=("a" * 64, "b" * 64))
        put(tmp_path, 2, None)
        result = run("show", tmp_path, "--json")
        assert result.exit_code == 0 and result.stdout.count("\n") == 1
        two, seventeen = json.loads(result.stdout)["layers"]
        assert (two["layer"], seventeen["layer"]) == (2, 17)
        assert two["adequacy"] is None
        assert Adequacy(**seventeen["adequacy"]) == MEASURED
        source = Provenance.from_header(seventeen["provenance"])
        assert source == dataclasses.replace(
            SOURCE, origin="imported", parts=("a" * 64, "b" * 64)
        )
        assert (seventeen["count"], seventeen["d_key"]) == (44_000_000, 14336)
        assert seventeen["dtype"] == "float32" and seventeen["packed"] is False
        assert Path(seventeen["file"]) == tmp_path / "layer-017.safetensors"

    def test_a_spectrum_beside_the_table(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        store = StatisticsStore(tmp_path / "stats")
        for layer in (0, 3):
            keys = random_keys(40, 12, seed=layer)
            moment = (keys.T @ keys / 40).contiguous()
            store.save(KeyStatistics(layer, moment, 40, SOURCE), packed=layer == 3)
        picture = tmp_path / "out.png"
        result = run("show", store.path, "--spectrum", picture)
        assert result.exit_code == 0 and "3.3" in cells(result.stdout, 3)
        content = picture.read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 5000
        for path, message in (
            (tmp_path / "out.docx", "out.docx: cannot be written"),
            (tmp_path / "none" / "out.png", "none/out.png: cannot be written"),
        ):
            assert message in refused("show", store.path, "--spectrum", path)
            assert not path.exists()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2's folder and a text."""
    folder = tmp_path_factory.mktemp("place")
    make_model("gpt2").save_pretrained(folder / "gpt2")
    make_tokenizer().save_pretrained(folder / "gpt2")
    (folder / "text.txt").write_text("\n\n".join(TEXTS))
    return folder


def collecting(place: Path, out: Path, **changes: Any) -> list[Any]:
    options = {
        "corpus": place / "text.txt",
        "layers": "0,2",
        "tokens": 300,
        "window": 32,
        "out": out,
        **changes,
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    return ["collect", place / "gpt2", *flags]


class TestCollect:
    def test_packed_and_unmeasured(self, place: Path, tmp_path: Path) -> None:
        arguments = collecting(place, tmp_path / "one", probes=0)
        result = run(*arguments, "--packed")
        assert result.exit_code == 0, result.output
        # Nothing measured is a question mark, not a number.
        expected = "2 64 300 4.7 - ? - - -".split()
        assert cells(result.stdout, 2) == expected
        assert cells(shown(tmp_path / "one"), 2) == expected
        store = StatisticsStore(tmp_path / "one")
        assert store.layers() == [0, 2]
        assert list(load_file(store.file(2))) == ["upper_triangle"]
        assert store.header(2)["adequacy"] is None
        # The same numbers as unpacked and measured.
        result = run(*collecting(place, tmp_path / "two", probes=4), "--json")
        assert result.exit_code == 0, result.output
        plain = StatisticsStore(tmp_path / "two")
        for layer, entry in zip(
            (0, 2), json.loads(result.stdout)["layers"], strict=True
        ):
            one, two = store.open(layer), plain.open(layer)
            assert torch.equal(one.second_moment, two.second_moment)
            assert one.fingerprint() == two.fingerprint()
            assert one.adequacy is None and two.adequacy is not None
            assert entry["adequacy"] == dataclasses.asdict(two.adequacy)
            small, large = (each.file(layer).stat().st_size for each in (store, plain))
            assert small < 0.65 * large

    @pytest.mark.parametrize("probes", [0, 5])
    def test_is_the_librarys(self, place: Path, tmp_path: Path, probes: int) -> None:
        result = run(*collecting(place, tmp_path, probes=probes))
        assert result.exit_code == 0, result.output
        expected = collect(
            make_model("gpt2"),
            make_tokenizer(),
            place / "text.txt",
            [0, 2],
            tokens=300,
            window=32,
            probes=probes,
            progress=False,
        )
        for layer, statistics in expected.items():
            found = StatisticsStore(tmp_path).open(layer)
            assert found.fingerprint() == statistics.fingerprint()
            assert found.adequacy == statistics.adequacy


class TestImport:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        return self.write(tmp_path / NPZ)

    def write(self, path: Path, d_key: int = 64) -> Path:
        """The sum of k kᵀ and its count, as published code writes them."""
        keys = random_keys(100, d_key).numpy()
        np.savez(path, **{"mom2.mom2": keys.T @ keys, "mom2.count": 100})
        return path

    @pytest.mark.parametrize("packed", [False, True])
    def test_a_file(
        self, place: Path, file: Path, tmp_path: Path, packed: bool
    ) -> None:
        out = tmp_path / "out"
        flags = ["--model", place / "gpt2", "--out", out] + ["--packed"] * packed
        result = run("import", file, *flags)
        assert result.exit_code == 0, result.output
        keys = random_keys(100, 64).double()
        model = make_model("gpt2")
        found = StatisticsStore(out).load(model, [1], make_tokenizer())[1]
        error = (found.second_moment.double() - keys.T @ keys / 100).abs().max()
        assert float(error) < 1e-6 and found.count == 100
        assert found.provenance.model_fingerprint == model_fingerprint(model)
        assert found.provenance.module == "transformer.h.1.mlp.c_proj"
        assert found.provenance.origin and NPZ in found.provenance.origin
        assert StatisticsStore(out).header(1)["packed"] is packed
        assert cells(result.stdout, 1) == "1 64 100 1.6 - ? - - -".split()

    def test_says_where_it_came_from_in_full(
        self, place: Path, file: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        assert (
            run("import", file, "--model", place / "gpt2", "--out", out).exit_code == 0
        )
        origin = StatisticsStore(out).header(1)["provenance"]["origin"]
        assert "".join(origin.split()) in "".join(shown(out).split())

    def test_several_files_and_named_ones(
        self, place: Path, file: Path, tmp_path: Path
    ) -> None:
        other = self.write(tmp_path / NPZ.replace(".h.1.", ".h.2."))
        target = ["--model", place / "gpt2", "--out", tmp_path / "out", "--json"]
        result = run("import", file, other, *target)
        assert result.exit_code == 0, result.output
        assert [e["layer"] for e in json.loads(result.stdout)["layers"]] == [1, 2]
        unnamed = self.write(tmp_path / "mine.npz")
        names = ["--layer", 0, "--module", "transformer.h.0.mlp.c_proj"]
        result = run("import", unnamed, *names, *target)
        (entry,) = json.loads(result.stdout)["layers"]
        assert entry["layer"] == 0 and entry["provenance"]["module"] == names[-1]
        assert StatisticsStore(tmp_path / "out").layers() == [0, 1, 2]

    def test_refusals(self, place: Path, file: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        target = ["--model", place / "gpt2", "--out", out]
        unnamed = self.write(tmp_path / "mine.npz")
        absent = self.write(tmp_path / NPZ.replace(".h.1.", ".h.9."))
        broken = tmp_path / f"broken.{NPZ}"
        broken.write_bytes(file.read_bytes()[:-30])
        for arguments, message in (
            ([unnamed, *target], "mine.npz: expected a name that says the module"),
            ([absent, *target], "transformer.h.9.mlp.c_proj"),
            ([file, "--layer", 2, *target], "which layer is it of?"),
            ([file, unnamed, "--layer", 1, *target], "pass one file"),
            ([tmp_path / f"none.{NPZ}", "--layer", 1, *target], f"none.{NPZ}"),
            ([broken, *target], f"broken.{NPZ}"),
            ([self.write(tmp_path / NPZ, d_key=8), *target], "width 8"),
            ([file, "--model", tmp_path / "none", "--out", out], "none"),
        ):
            assert message in refused("import", *arguments)
        assert not out.exists()


def stored(folder: Path, layers: tuple[int, ...], text: int, **source: Any) -> Path:
    for layer in layers:
        keys = random_keys(20, 6, seed=text)
        provenance = dataclasses.replace(
            SOURCE, corpus_fingerprint=f"{text:064x}", **source
        )
        StatisticsStore(folder).save(
            KeyStatistics(layer, (keys.T @ keys / 20).contiguous(), 20, provenance)
        )
    return folder


class TestMerge:
    def test_folders(self, tmp_path: Path) -> None:
        parts = [stored(tmp_path / f"{n}", (3, 11), n) for n in range(3)]
        out = tmp_path / "out"
        result = run("merge", *parts, "--out", out)
        assert result.exit_code == 0, result.output
        assert cells(result.stdout, 11)[:3] == ["11", "6", "60"]
        keys = torch.cat([random_keys(20, 6, seed=n) for n in range(3)]).double()
        found = StatisticsStore(out).open(11)
        error = (found.second_moment.double() - keys.T @ keys / 60).abs().max()
        assert float(error) < 1e-6
        lines = [" ".join(line.split()) for line in shown(out).splitlines()]
        zeros = ", ".join(["0" * 12] * 3)  # of each text, the first twelve digits
        assert f"texts merged {zeros}" in lines

    def test_refusals(self, tmp_path: Path) -> None:
        one = stored(tmp_path / "one", (3, 11), 1)
        out = tmp_path / "out"
        foreign = stored(tmp_path / "foreign", (3, 11), 2, model_fingerprint="a" * 64)
        again = stored(tmp_path / "again", (3, 11), 1)
        less = stored(tmp_path / "less", (3,), 3)
        empty = tmp_path / "empty"
        empty.mkdir()
        for folders, message in (
            ([one, less], "has the layers [3]"),
            ([less, one], "less has [3]"),
            ([one, empty], "has the layers []"),
            ([empty, one], "merge folders of the same layers"),
            ([one, tmp_path / "none"], "none: no such folder of statistics"),
            ([tmp_path / "none", one], "none: no such folder of statistics"),
            ([one], "nothing to merge in 1 part"),
            ([one, again], "is in two of the parts"),
            ([one, one], "is in two of the parts"),
            ([one, foreign], "part 2 has model_fingerprint aaaa"),
        ):
            assert message in refused("merge", *folders, "--out", out)
        assert not out.exists()

    def test_a_damaged_file_is_named(self, tmp_path: Path) -> None:
        one, two = (stored(tmp_path / f"{n}", (3,), n) for n in (1, 2))
        path = StatisticsStore(two).file(3)
        path.write_bytes(path.read_bytes()[:-8])
        message = refused("merge", one, two, "--out", tmp_path / "out")
        assert f"{path}: cannot be read" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": "none.txt"}, "none.txt: no such file"),
        ({"corpus": "none"}, "none: no such file"),
        ({"corpus": "hub:"}, "'hub:': expected hub:NAME[:CONFIG][@REVISION]"),
        ({"corpus": "hub:a:b:c"}, "'hub:a:b:c': expected hub:NAME[:CONFIG][@REVISION]"),
        ({"corpus": "hub:a@b@c"}, "'hub:a@b@c': expected hub:NAME[:CONFIG][@REVISION]"),
        ({"corpus": "hub:no-body/no-text"}, "hub:no-body/no-text: "),
        ({"probes": -1}, "probes must be at least 0, got -1"),
        ({"window": 0}, "window must be at least 1"),
        ({"window": 65}, "longer than the 64 positions"),
        ({"layers": "3"}, "layer 3 does not exist"),
    ],
)
def test_what_cannot_be_collected(
    place: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    out = tmp_path / "out"
    assert message in refused(*collecting(place, out, **changes))
    assert not out.exists()


def test_folders_that_cannot_be_shown(tmp_path: Path) -> None:
    assert "none: no such folder" in refused("show", tmp_path / "none")
    assert "holds no statistics" in refused("show", tmp_path)
    file = stored(tmp_path / "one", (3,), 1) / "layer-003.safetensors"
    file.write_bytes(b"{}")
    assert f"{file}: cannot be read" in refused("show", file.parent)


def test_all_of_it_as_a_program(tmp_path: Path) -> None:
    """In a process of its own, whose output goes to a pipe."""
    put(tmp_path, 17)
    environment = {**os.environ, "COLUMNS": "80"}

    def program(*arguments: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "covariance_cache", *map(str, arguments)],
            capture_output=True,
            text=True,
            env=environment,
        )

    result = program("show", tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "…" not in result.stdout and "44,000,000" in result.stdout
    result = program("merge", tmp_path, tmp_path / "none", "--out", tmp_path / "out")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
