import json
import subprocess
import sys

import pytest
import torch
from statistics_helpers import TEXTS, make_model, make_tokenizer
from typer.testing import CliRunner

from covariance_cache import StatisticsError, StatisticsStore, collect
from covariance_cache.__main__ import app, parse_layers, parse_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("statistics")
    make_model("llama").save_pretrained(path / "model")
    make_tokenizer(bos=True).save_pretrained(path / "model")
    lines = (json.dumps({"body": text}) for text in TEXTS)
    (path / "text.jsonl").write_text("\n".join(lines))
    return path


def run(*arguments):
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    if result.exit_code and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def collecting(folder, out, **changes):
    options = {
        "corpus": folder / "text.jsonl",
        "field": "body",
        "layers": "0,2",
        "tokens": "1k",
        "window": 32,
        "batch-size": 4,
        "seed": 5,
        "out": out,
    }
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    return ["collect", folder / "model", *flags]


def test_collects_what_the_library_collects_and_shows_it(folder, tmp_path):
    result = run(*collecting(folder, tmp_path), "--json")
    assert result.exit_code == 0, result.output
    layers = json.loads(result.stdout)["layers"]
    assert [entry["layer"] for entry in layers] == [0, 2]
    assert {entry["count"] for entry in layers} == {1000}
    model = make_model("llama")
    expected = collect(
        model,
        make_tokenizer(bos=True),
        TEXTS,
        [0, 2],
        tokens=1000,
        window=32,
        batch_size=4,
        seed=5,
        progress=False,
    )
    loaded = StatisticsStore(tmp_path).load(model, [0, 2], make_tokenizer(bos=True))
    for layer, statistics in expected.items():
        assert torch.equal(loaded[layer].second_moment, statistics.second_moment)
        assert loaded[layer].provenance == statistics.provenance
    shown = run("show", tmp_path, "--json")
    assert json.loads(shown.stdout)["layers"] == layers
    table = run("show", tmp_path)
    assert "1,000" in table.stdout and "25.0" in table.stdout


def test_a_module_pattern_and_a_dtype(folder, tmp_path):
    result = run(
        *collecting(folder, tmp_path, module="model.layers.{}.mlp.gate_proj"),
        *("--dtype", "bfloat16", "--json"),
    )
    assert result.exit_code == 0, result.output
    entry = json.loads(result.stdout)["layers"][1]
    assert entry["d_key"] == 16
    assert entry["provenance"]["module"] == "model.layers.2.mlp.gate_proj"
    assert entry["provenance"]["model_dtype"] == "bfloat16"


def test_a_short_text_is_a_note(folder, tmp_path):
    result = run(*collecting(folder, tmp_path, tokens="1M"))
    assert result.exit_code == 0, result.output
    assert "note: the text ended after" in result.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "2-4"}, "layer 3 does not exist"),
        ({"layers": "two"}, "layers 'two': expected"),
        ({"tokens": "many"}, "tokens 'many': expected"),
        ({"corpus": "missing.txt"}, "missing.txt: no such file"),
        ({"field": "text"}, "no field 'text'"),
        ({"module": "model.layers.mlp"}, "needs a {}"),
    ],
)
def test_errors_are_one_line_and_exit_code_one(folder, tmp_path, changes, message):
    result = run(*collecting(folder, tmp_path / "out", **changes))
    assert result.exit_code == 1
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ") and message in line
    assert "Traceback" not in result.output
    assert not list((tmp_path / "out").glob("*"))


def test_folders_that_hold_nothing(tmp_path):
    for path, message in ((tmp_path, "holds no statistics"), ("none", "no such")):
        result = run("show", path)
        assert result.exit_code == 1
        assert message in result.stderr
    corpus = tmp_path / "a.txt"
    corpus.write_text("text")
    arguments = ["--corpus", corpus, "--layers", "0", "--out", tmp_path]
    result = run("collect", tmp_path, *arguments)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1


def test_runs_as_a_module(folder, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "covariance_cache", "show", str(tmp_path / "none")],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_layer_ranges():
    assert parse_layers("13-17") == [13, 14, 15, 16, 17]
    assert parse_layers("4,0-1, 1") == [0, 1, 4]
    for text in ("", "3-1", "1-", "-1", "a", "1;2"):
        with pytest.raises(StatisticsError, match="expected"):
            parse_layers(text)


def test_token_budgets():
    assert [parse_tokens(text) for text in ("64000", "64k", "1M", "1.5M")] == [
        64_000,
        64_000,
        1_000_000,
        1_500_000,
    ]
    for text in ("", "0", "-1", "1.5", "1G", "k"):
        with pytest.raises(StatisticsError, match="expected"):
            parse_tokens(text)
