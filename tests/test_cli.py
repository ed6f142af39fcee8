import json
import shutil
import subprocess
import sys

import pytest
import torch
from checkpoint_kit import disk
from cli_kit import (
    RECORDS,
    Workplace,
    answer,
    make_workplace,
    refusal,
    run,
    write_edits,
)
from model_kit import EDITS, KINDS, make_model, make_tokenizer
from safetensors.torch import load_file, save_file

from covariance_cache import StatisticsStore
from unified_edit import recipes
from unified_edit.algebra.update import RankKUpdate, UpdateSet
from unified_edit.engine import edit
from unified_edit.presets import Preset
from unified_edit.recipes import memit

COMMANDS = ("demo", "doctor", "edit", "evaluate", "patch", "revert", "verify")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """For each kind a workplace with an update in it."""
    made = {}
    for kind in KINDS:
        place = make_workplace(tmp_path_factory.mktemp(kind), kind)
        assert run(*place.editing()).exit_code == 0
        made[kind] = place
    return made


@pytest.fixture(params=KINDS)
def place(request, originals, tmp_path):
    shutil.copytree(originals[request.param].path, tmp_path / "work")
    return Workplace(tmp_path / "work")


@pytest.fixture
def gpt2(originals, tmp_path):
    shutil.copytree(originals["gpt2"].path, tmp_path / "work")
    return Workplace(tmp_path / "work")


def test_the_whole_way_and_back(place):
    start = disk(place.path)
    out = place.path / "patched"
    made = answer(*place.editing(), "--force")
    assert made["update"] == str(place.update)
    assert made["recipe"]["layers"] == [0, 1]
    assert len(made["report"]["outcomes"]) == len(EDITS)
    # A model that knows nothing cannot be taught much, but the solve is a real one.
    found = made["report"]["certificates"]
    assert found.keys() == {"0", "1"}
    assert all(each["relative_residual_error"] < 0.5 for each in found.values())

    patched = answer("patch", place.model, place.update, "--out", out)
    names = [each["name"] for each in patched["tensors"]]
    assert len(names) == 2 and patched["number"] == 1
    checked = answer("verify", out, "--base", place.model)
    assert checked["ok"] and sorted(checked["tensors"]) == sorted(names)
    assert checked["compared_with_base"] > 2

    # Files and live model agree to the bit, and so do their scores.
    score = ["evaluate", "counterfact"]
    scored = answer(*score, place.model, place.records, "--update", place.update)
    assert scored["records"] == len(RECORDS)
    assert scored["after"]["em"] != scored["before"]["em"]
    again = answer(*score, out, place.records)
    assert again["before"] == scored["after"] and again["after"] is None

    taken = answer("revert", out)
    assert taken["remaining"] == 0
    assert disk(out) == disk(place.model)
    shutil.rmtree(out)
    assert disk(place.path) == start


def test_in_place_and_back(place):
    start = disk(place.model)
    assert run("patch", place.model, place.update, "--in-place").exit_code == 0
    assert disk(place.model) != start
    assert run("verify", place.model).exit_code == 0
    result = run("revert", place.model)
    assert result.exit_code == 0 and "update 1 taken back" in result.stdout
    assert disk(place.model) == start


def test_edit_writes_what_the_library_computes(gpt2):
    model = make_model("gpt2", len(make_tokenizer("gpt2")))
    settings = {"steps": 8, "preservation_weight": 1.0, "clamp": 3.0}
    expected = edit(
        model,
        make_tokenizer("gpt2"),
        EDITS[:2],
        memit(layers=(1, 2), **settings),
        StatisticsStore(gpt2.statistics).load(model, [1, 2]),
        seed=4,
    )
    arguments = gpt2.editing(layers="1-2", seed=4, limit=2)
    assert run(*arguments, "--force").exit_code == 0
    written = UpdateSet.load(gpt2.update)
    assert written.metadata == json.loads(json.dumps(expected.update.metadata))
    assert len(written) == 2
    for (address, one), (other, two) in zip(written, expected.update, strict=True):
        assert address == other
        assert torch.equal(one.left, two.left) and torch.equal(one.right, two.right)


def test_the_matching_preset_is_used_unless_told_otherwise(gpt2, monkeypatch):
    settings = {"rome": {"layers": (2,), "steps": 3}}
    config = json.loads((gpt2.model / "config.json").read_text())
    preset = Preset("gpt2", 3, 16, config["vocab_size"], settings, "published", "it")
    monkeypatch.setitem(recipes.PRESETS, "tiny", preset)
    base = ["edit", gpt2.model, gpt2.edits, "--statistics", gpt2.statistics]
    base += ["--out", gpt2.update, "--force", "--limit", 1]
    used = answer(*base, "--recipe", "rome")["recipe"]
    assert (used["layers"], used["origin"]) == ([2], "published")
    assert used["targets"]["steps"] == 3
    changed = answer(*base, "--recipe", "rome", "--set", "steps=2")["recipe"]
    assert (changed["targets"]["steps"], changed["origin"]) == (2, "unvalidated")
    # A method that the preset does not know is not held up by it.
    other = answer(*base, "--recipe", "emmet", "--layers", "0")["recipe"]
    assert (other["layers"], other["origin"]) == ([0], "unvalidated")
    none = run(*base, "--recipe", "rome", "--preset", "none")
    assert none.exit_code == 1 and "which layers?" in none.stderr


def test_terminal_output(place):
    out = place.path / "patched"
    for arguments, shown in (
        ([*place.editing(limit=1), "--force"], ["memit (unvalidated)", "wrote"]),
        (["patch", place.model, place.update, "--out", out], ["patched, update 1"]),
        (["verify", out, "--base", place.model], ["intact", "compared"]),
        (
            ["evaluate", "counterfact", out, place.records],
            ["metric", "es", "records: 2"],
        ),
        (["revert", out], ["update 1 taken back", "updates left: 0"]),
    ):
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        for text in shown:
            assert text in result.stdout


def test_evaluate_limits_skips_and_writes_each_record(gpt2):
    rows = gpt2.path / "rows.jsonl"
    arguments = [
        "evaluate",
        "counterfact",
        gpt2.model,
        gpt2.records,
        "--per-record",
        rows,
    ]
    scored = answer(*arguments, "--update", gpt2.update, "--no-generations")
    assert "rewrite_generation" not in scored["before"]
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(lines) == len(RECORDS)
    for side in ("before", "after"):
        mean = sum(line[side]["em"] for line in lines) / len(lines)
        assert mean == pytest.approx(scored[side]["em"], abs=1e-12)
    alone = answer(*arguments, "--force", "--limit", 1)
    assert alone["records"] == 1
    assert alone["before"]["em"] == pytest.approx(lines[0]["before"]["em"], abs=1e-6)
    assert "rewrite_generation" in alone["before"]
    assert json.loads(rows.read_text())["after"] is None
    assert not list(gpt2.path.glob(".*.tmp"))


def test_evaluate_tells_how_far_means_may_be_off(gpt2, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    score = ["evaluate", "counterfact", gpt2.model, gpt2.records, "--no-generations"]
    found = answer(*score, "--update", gpt2.update)
    for side in ("before", "after"):
        assert found["intervals"][side].keys() == found[side].keys()
        # Two records: a mean of the one twice, of both, of the other twice.
        low, high = found["intervals"][side]["em"]
        assert low < found[side]["em"] < high
    assert answer(*score)["intervals"]["after"] is None
    shown = run(*score, "--update", gpt2.update).stdout
    low, high = found["intervals"]["after"]["em"]
    cell = f"{found['after']['em']:.3f} [{low:.2f}, {high:.2f}]"
    change = f"{found['after']['em'] - found['before']['em']:+.3f}"
    (line,) = [each for each in shown.splitlines() if "│ em " in each]
    assert cell in line and change in line


def test_evaluate_sampled_texts(gpt2):
    entries = json.loads(gpt2.records.read_text())
    for number, entry in enumerate(entries):
        entry["generation_prompts"] = ["Ada Lovelace's town", "In Oslo, letters"]
        entry["requested_rewrite"]["relation_id"] = "P1"
        entry["requested_rewrite"]["target_new"]["id"] = f"Q{number}"
    gpt2.records.write_text(json.dumps(entries))
    texts = gpt2.path / "attribute_snippets.json"
    samples = [{"name": "Ada", "text": "Ada Lovelace's letters of the town of Oslo"}]
    known = {"relation_id": "P1", "target_id": "Q0", "samples": samples}
    texts.write_text(json.dumps([known]))
    rows = gpt2.path / "rows.jsonl"
    score = ["evaluate", "counterfact", gpt2.model, gpt2.records, "--no-generations"]
    plain = answer(*score)["before"]
    asked = [*score, "--entropy", 30, "--references", texts]
    found = answer(*asked, "--per-record", rows, "--force")
    assert found["before"].keys() - plain == {"generation_entropy", "reference_score"}
    assert 0 < found["before"]["generation_entropy"] < 5
    one, two = [json.loads(line)["before"] for line in rows.read_text().splitlines()]
    assert 0 < one["reference_score"] < 1 and two["reference_score"] is None
    assert found["before"]["reference_score"] == one["reference_score"]
    assert answer(*asked)["before"] == found["before"]
    assert answer(*asked, "--seed", 1)["before"] != found["before"]
    assert "96 positions" in refusal(gpt2.path, *score, "--entropy", 100)
    refused = refusal(gpt2.path, *score, "--references", texts)
    assert "add --entropy" in refused


def test_evaluate_zsre(gpt2):
    file = gpt2.path / "zsre.json"
    entry = {
        "src": "Where does Ada Lovelace live?",
        "subject": "Ada Lovelace",
        "rephrase": "Ada Lovelace lives where?",
        "alt": "New York",
        "answers": ["London"],
        "loc": "nq question: where does Ada Lovelace live",
        "loc_ans": "in New York, Lyon and Cairo, her friends say",
    }
    file.write_text(json.dumps([entry, {**entry, "alt": "Oslo"}]))
    rows = gpt2.path / "rows.jsonl"
    score = ["evaluate", "zsre", gpt2.model, file]
    found = answer(*score, "--update", gpt2.update, "--per-record", rows)
    assert found["records"] == 2
    metrics = {"s", "efficacy", "paraphrase", "specificity"}
    assert found["before"].keys() == metrics == found["intervals"]["before"].keys()
    assert found["after"].keys() == metrics | {"agreement"}
    assert found["intervals"]["after"].keys() == found["after"].keys()
    after = [json.loads(line)["after"] for line in rows.read_text().splitlines()]
    agreement = sum(each["agreement"] for each in after) / 2
    assert agreement == found["after"]["agreement"] < 1
    alone = answer(*score, "--limit", 1, "--answer", "answers")
    assert alone["records"] == 1 and alone["after"] is None
    shown = run(*score, "--update", gpt2.update).stdout
    assert "agreement" in shown and "records: 2" in shown
    for arguments, message in (
        ([*score, "--answer", "pred"], "expected alt or answers"),
        (["evaluate", "zsre", gpt2.model, gpt2.records], "field 'alt'"),
        ([*score, "--per-record", rows], "exists already"),
    ):
        assert message in refusal(gpt2.path, *arguments)


def test_verify_reports_damage_and_fails(gpt2):
    out = gpt2.path / "patched"
    assert run("patch", gpt2.model, gpt2.update, "--out", out).exit_code == 0
    (out / "README.md").write_text("another card\n")
    result = run("verify", out, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert not report["ok"] and "README.md" in report["problems"][0]
    assert result.stderr.startswith("error: ") and "README.md" in result.stderr
    assert "NOT intact" in run("verify", out).stdout


def test_force_is_needed_to_replace_an_update(gpt2):
    before = gpt2.update.read_bytes()
    assert "exists already" in refusal(gpt2.path, *gpt2.editing())
    assert run(*gpt2.editing(), "--force").exit_code == 0
    assert gpt2.update.read_bytes() == before  # same inputs, same bytes
    assert run(*gpt2.editing(seed=1), "--force").exit_code == 0
    assert gpt2.update.read_bytes() != before


GOOD = EDITS[0].as_dict()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{**GOOD, "prompt": "Nobody lives in"}], "the subject is not in the prompt"),
        ([{**GOOD, "target": " "}], "target is empty"),
        ([GOOD, GOOD], "edit 1 repeats edit 0"),
        ([GOOD, {**GOOD, "target": "Oslo"}], "edits 0 and 1 contradict each other"),
        ([{"prompt": "{} is"}], "edits.jsonl, entry 0"),
        ([], "there are no edits"),
    ],
)
def test_bad_edits(gpt2, entries, message):
    gpt2.update.unlink()
    write_edits(gpt2.edits, entries)
    assert message in refusal(gpt2.path, *gpt2.editing())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "memoir"}, "unknown recipe 'memoir'"),
        ({"layers": None}, "which layers?"),
        ({"layers": "one"}, "layers 'one': expected"),
        ({"layers": "1-3"}, "the model has layers 0 to 2"),
        ({"preset": "gpt5"}, "unknown preset 'gpt5'"),
        ({"set": "clamp"}, "expected key=value"),
        ({"set": "clump=1"}, "no setting 'clump'"),
        ({"set": "clamp=NaN"}, "expected a finite number"),
        ({"set": "clamp=1"}, "clamp is set twice"),
        ({"dtype": "float8"}, "dtype 'float8': expected one of"),
        ({"device": "abacus"}, "device 'abacus'"),
        ({"edits": "none.jsonl"}, "none.jsonl: cannot be read"),
        ({"model": "no/such-model"}, "no/such-model: neither a folder nor"),
        ({"statistics": "nowhere"}, "nowhere: no such folder of statistics"),
        ({"out": "nowhere/update.safetensors"}, "nowhere: no such folder"),
        ({"out": "."}, "is a folder"),
    ],
)
def test_bad_options_of_edit(gpt2, changes, message):
    gpt2.update.unlink()
    assert message in refusal(gpt2.path, *gpt2.editing(**changes))


def _config(place, **changes):
    path = place.model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _shard(place, index=0):
    return sorted(place.model.glob("*.safetensors"))[index]


def _rewrite(place, change):
    """Rewrites the shard that holds an edited weight."""
    for path in place.model.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [each for each in tensors if "h.1.mlp.c_proj.weight" in each]:
            change(tensors, name)
            save_file(tensors, path, {"format": "pt"})


def _make_nan(tensors, name):
    tensors[name][0, 0] = float("nan")


def _drop(tensors, name):
    del tensors[name]


def _forget(place):
    """Drops a weight from its shard and from the index."""
    _rewrite(place, _drop)
    path = place.model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].pop("transformer.h.1.mlp.c_proj.weight")
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda place: _config(place, model_type="zebra"), "'zebra' is not in"),
        (
            lambda place: _config(place, quantization_config={"quant_method": "gptq"}),
            "quantized (gptq)",
        ),
        # Newer versions of transformers check a config before they build a model.
        (lambda place: _config(place, n_embd="wide"), "cannot load the "),
        (lambda place: _shard(place, 1).unlink(), "is missing"),
        (lambda place: _shard(place).write_bytes(b"short"), "header"),
        (lambda place: _rewrite(place, _make_nan), "NaN or infinity"),
        (_forget, "no weights for transformer.h.1.mlp.c_proj.weight"),
        (lambda place: (place.model / "config.json").unlink(), "holds no config.json"),
        (lambda place: (place.model / "tokenizer.json").unlink(), "the tokenizer"),
        (
            lambda place: [each.unlink() for each in place.model.glob("*token*")],
            "holds no tokenizer",
        ),
        (
            lambda place: make_model("gpt2", seed=9).save_pretrained(place.model),
            "holds both model.safetensors and",
        ),
        (
            lambda place: (place.statistics / "layer-001.safetensors").unlink(),
            "has no statistics of layer 1",
        ),
        (
            lambda place: (place.statistics / "layer-001.safetensors").write_bytes(b""),
            "layer-001.safetensors: cannot be read",
        ),
    ],
)
def test_bad_models_and_statistics(gpt2, damage, message):
    gpt2.update.unlink()
    damage(gpt2)
    assert message in refusal(gpt2.path, *gpt2.editing())


def test_statistics_of_another_model_or_tokenizer(originals, gpt2):
    gpt2.update.unlink()
    other = originals["llama"].statistics
    message = refusal(gpt2.path, *gpt2.editing(statistics=other))
    assert "was collected on model" in message
    make_tokenizer("gpt2", texts=["other words"]).save_pretrained(gpt2.model)
    message = refusal(gpt2.path, *gpt2.editing())
    assert "was collected with tokenizer" in message


def test_bad_patches(originals, gpt2):
    out = gpt2.path / "patched"
    patch = ["patch", gpt2.model, gpt2.update]
    for arguments, message in (
        (patch, "where to?"),
        ([*patch, "--out", out, "--in-place"], "where to?"),
        ([*patch, "--out", gpt2.statistics], "exists already"),
        ([*patch, "--out", gpt2.path / "a" / "b"], "not a folder"),
        (["patch", "no/such-model", gpt2.update, "--out", out], "neither a folder"),
        (["patch", gpt2.model, "none", "--out", out], "none: cannot be read"),
        (["patch", gpt2.model, _shard(gpt2), "--out", out], "not an update file"),
        (
            ["patch", gpt2.model, originals["llama"].update, "--out", out],
            "stores no tensor 'model.layers.0.mlp.down_proj.weight'",
        ),
        (["verify", gpt2.model], "was not patched"),
        (["verify", out], "not a"),
        (["revert", gpt2.model], "holds no update to revert"),
        (["revert", out], "not a"),
    ):
        assert message in refusal(gpt2.path, *arguments)


def test_a_patch_is_not_made_twice_from_one_base(gpt2):
    patch = ["patch", gpt2.model, gpt2.update, "--in-place"]
    assert run(*patch).exit_code == 0
    assert "the update was made for" in refusal(gpt2.path, *patch)


def test_bad_evaluations(originals, gpt2):
    empty = gpt2.path / "empty.json"
    empty.write_text("[]")
    score = ["evaluate", "counterfact", gpt2.model, gpt2.records]
    foreign = UpdateSet(
        {
            address: RankKUpdate(each.left * 0, each.right)
            for address, each in UpdateSet.load(gpt2.update)
        },
        UpdateSet.load(gpt2.update).metadata,
    ).save(gpt2.path / "zero.safetensors")
    for arguments, message in (
        (["evaluate", "counterfact", gpt2.model, empty], "no records"),
        (
            ["evaluate", "counterfact", gpt2.model, "none.json"],
            "none.json: cannot be read",
        ),
        (["evaluate", "counterfact", gpt2.model, gpt2.edits], "requested_rewrite"),
        ([*score, "--update", originals["llama"].update], "made for the model"),
        ([*score, "--update", foreign], "changes nothing"),
        ([*score, "--per-record", empty], "exists already"),
        (["demo", "--world", gpt2.path / "none"], "no such folder"),
    ):
        assert message in refusal(gpt2.path, *arguments)


def test_a_file_that_cannot_be_written_in_the_end(gpt2):
    blocked = gpt2.path / ("x" * 252)  # its own name fits, the staged one does not
    arguments = [
        "evaluate",
        "counterfact",
        gpt2.model,
        gpt2.records,
        "--per-record",
        blocked,
    ]
    assert "cannot be written" in refusal(gpt2.path, *arguments)


def test_unknown_errors_keep_their_traceback(gpt2, monkeypatch):
    def fail(*_):
        raise KeyError("a defect")

    monkeypatch.setattr("unified_edit.checkpoint.patch.verify", fail)
    with pytest.raises(KeyError, match="a defect"):
        run("verify", gpt2.model)


def test_demo_hands_over_and_keeps_stdout_clean(tmp_path, monkeypatch):
    demo = pytest.importorskip("unified_edit.demo")

    def run_demo(world, out, console):
        console.print("on the way")
        return {"world": str(world), "out": str(out), "bad": float("nan")}

    monkeypatch.setattr(demo, "run_demo", run_demo)
    arguments = ["demo", "--world", tmp_path, "--out", tmp_path / "out"]
    found = answer(*arguments)
    assert found == {"world": str(tmp_path), "out": str(tmp_path / "out"), "bad": None}
    assert run(*arguments).stdout == "on the way\n"


def test_help_is_complete_and_light():
    result = run("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert f" {command} " in result.stdout
        assert run(command, "--help").exit_code == 0
    for metrics in ("counterfact", "zsre"):
        assert f" {metrics} " in run("evaluate", "--help").stdout
        assert run("evaluate", metrics, "--help").exit_code == 0
    code = (
        "import sys, typer.testing, unified_edit.cli as cli\n"
        "result = typer.testing.CliRunner().invoke(cli.app, ['edit', '--help'])\n"
        "assert result.exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'safetensors'}\n"
        "print(*heavy & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.stdout.strip(), found.stderr) == ("", "")


def test_patching_a_local_folder_needs_no_transformers(gpt2):
    code = (
        "import sys\n"
        "sys.modules['transformers'] = None\n"
        "from unified_edit.cli import app\n"
        "app(sys.argv[1:])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, "patch", gpt2.model, gpt2.update, "--in-place"],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr


def test_runs_as_a_module(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "unified_edit", "revert", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
