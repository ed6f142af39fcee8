"""Data sets of the hub as a text: the real `datasets`, on folders and without a
network, with a cache of its own for each test."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from statistics_helpers import LAYERS, TEXTS, make_model, make_tokenizer

from covariance_cache import CorpusError, collect
from covariance_cache.corpus import Documents
from covariance_cache.hub import HubText, hub_documents

COMMIT = "0123456789abcdef0123456789abcdef01234567"
README = """---
configs:
- {config_name: one, data_files: one.jsonl}
- {config_name: two, data_files: two.jsonl}
---
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """The package `datasets`, which keeps nothing beyond the test."""
    datasets = pytest.importorskip("datasets")
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(
        datasets.config, "DOWNLOADED_DATASETS_PATH", cache / "downloads"
    )
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return datasets


def lines(texts, field="text"):
    rows = [{"id": number, field: text} for number, text in enumerate(texts)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def folder(path, **files):
    """A folder of files; a `_` in a name is its dot."""
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name.replace("_", ".")).write_text(content, encoding="utf-8")
    return path


def written(path, kind, field="body"):
    """A folder that holds TEXTS in two files, among other columns."""
    path.mkdir()
    for name, texts in (("a", TEXTS[:25]), ("b", TEXTS[25:])):
        if kind == "jsonl":
            (path / f"{name}.jsonl").write_text(lines(texts, field), encoding="utf-8")
        else:
            arrow = pytest.importorskip("pyarrow")
            from pyarrow import parquet

            table = arrow.table({"id": range(len(texts)), field: texts})
            parquet.write_table(table, path / f"{name}.parquet")
    return path


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("hub:squad", HubText("squad")),
        ("hub:a/b-c.d_e", HubText("a/b-c.d_e")),
        ("hub:a/b:2023.en", HubText("a/b", "2023.en")),
        ("hub:a/b@refs/pr/1", HubText("a/b", revision="refs/pr/1")),
        ("hub:/an abs/path:c@v1", HubText("/an abs/path", "c", revision="v1")),
        (
            "hub:wikimedia/wikipedia:20231101.en@main",
            HubText("wikimedia/wikipedia", "20231101.en", "train", "main"),
        ),
    ],
)
def test_a_spec_is_name_config_and_revision(spec, expected):
    assert HubText.parse(spec) == expected
    assert str(expected) == spec


@pytest.mark.parametrize(
    "spec",
    ["", "squad", "hub", "hub:", "Hub:a", " hub:a", "hub::c", "hub:@main", "hub:a:"]
    + ["hub:a@", "hub:a:@main", "hub:a:b:c", "hub:a@b@c", "hub:a@main:c", "hub:a\nb:"],
)
def test_anything_else_is_refused(spec):
    with pytest.raises(CorpusError, match=r"expected hub:NAME\[:CONFIG\]\[@REVISION\]"):
        HubText.parse(spec)
    with pytest.raises(CorpusError, match="expected hub:NAME"):
        hub_documents(spec)


def test_a_missing_package_is_told_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match=r"pip install 'unified-edit\[datasets\]'"):
        hub_documents("hub:a/b")


def test_a_version_that_can_run_code_is_refused(library, monkeypatch):
    monkeypatch.setattr(library, "__version__", "3.6.0")
    with pytest.raises(
        CorpusError, match=r"version 4 or later \(3\.6\.0\): pip install"
    ):
        hub_documents("hub:a/b")


def test_the_package_is_imported_by_nothing_but_the_function():
    code = (
        "import sys, covariance_cache, covariance_cache.hub as hub;"
        "hub.HubText.parse('hub:a/b');"
        "print(sys.modules.get('datasets'))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.split() == ["None"], found.stderr


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("seed", [None, 3])
def test_statistics_are_those_of_a_list_of_the_same_texts(
    library, tmp_path, kind, seed
):
    path = written(tmp_path / "texts", kind)
    files = {each: each.read_bytes() for each in path.rglob("*")}
    rows = hub_documents(f"hub:{path}", field="body")
    assert len(rows) == len(TEXTS)
    assert list(rows) == [{"body": text} for text in TEXTS]
    assert rows[7] == {"body": TEXTS[7]}
    assert {each: each.read_bytes() for each in path.rglob("*")} == files

    def gather(corpus):
        settings = {"tokens": 1000, "window": 32, "seed": seed, "field": "body"}
        tokenizer = make_tokenizer(bos=True)
        layers = range(LAYERS)
        return collect(
            make_model("gpt2"), tokenizer, corpus, layers, progress=False, **settings
        )

    found, expected = gather(rows), gather(TEXTS)
    for layer in range(LAYERS):
        assert torch.equal(found[layer].second_moment, expected[layer].second_moment)
        assert found[layer].provenance == expected[layer].provenance
        assert found[layer].count == expected[layer].count == 1000


def test_a_split_is_chosen_by_the_spec_or_over_it(library, tmp_path):
    path = folder(
        tmp_path / "texts",
        train_jsonl=lines(["a", "b", "c", "d"]),
        validation_jsonl=lines(["e"]),
    )

    def texts(spec, **more):
        return list(Documents(hub_documents(spec, **more)))

    assert texts(f"hub:{path}") == texts(HubText(str(path))) == ["a", "b", "c", "d"]
    assert texts(f"hub:{path}", split="validation") == ["e"]
    assert texts(HubText(str(path), split="validation")) == ["e"]
    assert texts(HubText(str(path), split="validation"), split="train[:50%]") == [
        "a",
        "b",
    ]
    with pytest.raises(CorpusError, match="nope.*'train', 'validation'"):
        hub_documents(f"hub:{path}", split="nope")


def test_a_configuration_is_chosen_by_the_spec(library, tmp_path):
    path = folder(
        tmp_path / "texts",
        README_md=README,
        one_jsonl=lines(["a"]),
        two_jsonl=lines(["b"]),
    )
    assert list(Documents(hub_documents(f"hub:{path}:two"))) == ["b"]
    for spec in (f"hub:{path}", f"hub:{path}:three"):
        with pytest.raises(CorpusError, match=r"'one', 'two'") as caught:
            hub_documents(spec)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a_jsonl": lines(["x"], "body")}, r"no field 'text', only \['id', 'body'\]"),
        ({"a_jsonl": lines(["x"]) + '{"text": "y"'}, r"JSON parse error.* in row 1"),
        ({"a_jsonl": ""}, "holds no documents"),
        ({}, "doesn't contain any data files$"),
    ],
)
def test_folders_of_no_use_are_refused_by_name(library, tmp_path, files, message):
    path = folder(tmp_path / "texts", **files)
    with pytest.raises(CorpusError, match=message) as caught:
        hub_documents(f"hub:{path}")
    assert str(caught.value).startswith(f"hub:{path}: ")
    assert "\n" not in str(caught.value)


def test_code_of_a_data_set_never_runs(library, tmp_path):
    trace = tmp_path / "ran"
    code = f"open({str(trace)!r}, 'w')\nimport datasets\n"
    path = folder(tmp_path / "texts", texts_py=code, a_jsonl=lines(["x"]))
    with pytest.raises(
        CorpusError, match=r"scripts are no longer supported.*texts\.py"
    ):
        hub_documents(f"hub:{path}")
    # Under any other name it is no script, and the data beside it is read.
    (path / "texts.py").rename(path / "other.py")
    assert list(Documents(hub_documents(f"hub:{path}"))) == ["x"]
    assert not trace.exists()


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "/no/such/folder"])
def test_out_of_reach_or_missing_says_what_to_do(library, name):
    with pytest.raises(CorpusError, match="load it once where the hub") as caught:
        hub_documents(f"hub:{name}")
    assert str(caught.value).startswith(f"hub:{name}: ")
    assert str(caught.value).endswith("a folder of data files or a .jsonl file")


def test_a_folder_goes_before_a_name_and_has_no_revisions(
    library, tmp_path, monkeypatch
):
    # `json` is a format to `datasets`: it would read all of the current folder.
    folder(tmp_path / "here", a_jsonl=lines(["not asked for"]))
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CorpusError, match="json is not the name of a data set"):
        hub_documents("hub:json")
    folder(tmp_path / "here" / "json", a_jsonl=lines(["asked for"]))
    for spec in ("hub:json", "hub:~/here/json"):
        assert list(Documents(hub_documents(spec))) == ["asked for"]
    with pytest.raises(CorpusError, match=r"here/json is a folder.*no revisions"):
        hub_documents("hub:json@main")


def test_a_changed_file_is_read_anew(library, tmp_path):
    path = folder(tmp_path / "texts", a_jsonl=lines(["before"]))
    assert list(Documents(hub_documents(f"hub:{path}"))) == ["before"]
    (path / "a.jsonl").write_text(lines(["after!"]), encoding="utf-8")
    assert list(Documents(hub_documents(f"hub:{path}"))) == ["after!"]


def test_a_cached_data_set_is_read_without_a_network_at_its_commit_only(
    library, tmp_path
):
    # What a download leaves: the prepared files, in a folder named for the commit.
    path = folder(tmp_path / "name", a_jsonl=lines(["cached"]))
    prepared = Path(hub_documents(f"hub:{path}").cache_files[0]["filename"]).parent
    cached = tmp_path / "cache" / "owner___name" / "default" / "0.0.0"
    cached.mkdir(parents=True)
    shutil.copytree(prepared, cached / COMMIT)
    for revision in ("", "@main", f"@{COMMIT}"):
        rows = hub_documents(f"hub:owner/name{revision}")
        assert list(Documents(rows)) == ["cached"]
    other = COMMIT[::-1]
    with pytest.raises(CorpusError, match=rf"@{other}: .*cached is {COMMIT}"):
        hub_documents(f"hub:owner/name@{other}")
    with pytest.raises(CorpusError, match=r"Available configs.*\['default'\]"):
        hub_documents("hub:owner/name:else")
