import json
import shutil
from dataclasses import replace

import pytest
from checkpoint_kit import disk
from cli_kit import Workplace, answer, make_workplace, run
from families import FAMILIES, VARIANTS, build
from model_kit import KINDS, LAYERS, make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, ByT5Tokenizer, GPT2Config

from covariance_cache import (
    SecondMomentAccumulator,
    StatisticsStore,
    model_fingerprint,
)
from unified_edit import recipes
from unified_edit.doctor import examine
from unified_edit.errors import RecipeError
from unified_edit.options import parse_settings, read_recipe
from unified_edit.presets import Preset
from unified_edit.recipes import RECIPES


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return {kind: make_workplace(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture
def work(originals, tmp_path):
    """A copy of a kind's workplace."""

    def copy(kind):
        shutil.copytree(originals[kind].path, tmp_path / kind)
        return Workplace(tmp_path / kind)

    return copy


def test_facts_of_each_architecture(work):
    expected = {
        "gpt2": ("transformer.h.{}.mlp.c_proj.weight", (64, 16), "Conv1D", True),
        "llama": ("model.layers.{}.mlp.down_proj.weight", (24, 40), "Linear", False),
    }
    for kind in KINDS:
        place = work(kind)
        report = examine(str(place.model), place.statistics)
        assert report.supported and report.problems == ()
        assert (report.model_type, report.updates) == (kind, 0)
        model = make_model(kind, len(make_tokenizer(kind)))
        assert report.fingerprint == model_fingerprint(model)
        assert report.files == tuple(
            sorted(path.name for path in place.model.glob("*.safetensors"))
        )
        assert (len(report.files) > 1) == (kind == "gpt2")
        found = report.weights
        assert found is not None
        facts = (found.tensor, found.shape, found.storage, found.tied_head)
        assert facts == expected[kind]
        assert (found.layers, found.dtypes) == (LAYERS, ("F32",))
        stored = {
            layer: name
            for name in report.files
            for layer in range(LAYERS)
            if found.tensor.format(layer) in load_file(place.model / name)
        }
        shown = {layer: name for name, held in found.shards.items() for layer in held}
        assert shown == stored and list(stored) == list(range(LAYERS))
        assert found.head == "lm_head" and found.wrapped is None
        weights = {p.data_ptr(): p.numel() for p in model.parameters()}
        total = SecondMomentAccumulator(found.d_key)._total
        assert found.collect_bytes == total.numel() * total.element_size()
        assert found.model_bytes == 4 * sum(weights.values())
        shape = found.shape[::-1] if kind == "gpt2" else found.shape
        assert (found.d_value, found.d_key) == shape
        assert found.undo_bytes == 4 * found.d_value * found.d_key
        # What a file of statistics really holds, without its header.
        moment = StatisticsStore(place.statistics).open(0).second_moment
        assert found.statistics_bytes == moment.numel() * moment.element_size()
        tokenizer = report.tokenizer
        assert tokenizer is not None and tokenizer.fast
        habits = (tokenizer.adds_bos, tokenizer.prepends_space, tokenizer.adds_eos)
        assert habits == ((kind == "llama"), (kind == "llama"), False)
        assert tokenizer.bos_token == ("<s>" if kind == "llama" else None)
        assert not tokenizer.chat_template
        assert tokenizer.vocabulary == len(make_tokenizer(kind))
        assert report.statistics is not None
        assert [each.layer for each in report.statistics] == list(range(LAYERS))
        for each in report.statistics:
            assert each.count == 2000 and each.problem is None
            assert each.keys_per_dimension == 2000 / found.d_key


def test_a_checkpoint_of_the_bare_decoder_shows_its_own_names(work):
    place = work("gpt2")
    shutil.rmtree(place.model)
    model = make_model("gpt2", len(make_tokenizer("gpt2")))
    model.transformer.save_pretrained(place.model)
    make_tokenizer("gpt2").save_pretrained(place.model)
    report = examine(str(place.model))
    assert report.supported and report.weights is not None
    assert report.weights.tensor == "h.{}.mlp.c_proj.weight"


def test_no_weight_is_loaded_and_nothing_is_written(work, monkeypatch):
    place = work("gpt2")

    def forbidden(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", forbidden)
    before = disk(place.path)
    assert examine(str(place.model), place.statistics).supported
    assert disk(place.path) == before


def test_recipes_are_labelled(work, monkeypatch):
    place = work("gpt2")
    vocabulary = len(make_tokenizer("gpt2"))
    settings = {"rome": {"layers": (1,)}, "memit": {"layers": (0, 1), "steps": 7}}
    preset = Preset("gpt2", LAYERS, 16, vocabulary, settings, "tuned here", "a bench")
    monkeypatch.setitem(recipes.PRESETS, "tiny", preset)
    report = examine(str(place.model))
    assert report.preset == "tiny"
    found = {each.name: each for each in report.recipes}
    assert found.keys() == RECIPES.keys()
    memit = found["memit"]
    assert (memit.layers, memit.origin, memit.source) == (
        (0, 1),
        "tuned here",
        "a bench",
    )
    assert memit.settings is not None and memit.settings["targets"]["steps"] == 7
    assert memit.statistics_bytes == 2 * 4 * 64 * 64
    assert memit.update_bytes == 2 * 4 * (64 + 16)
    for name in ("rome", "r_rome", "p_rome", "rome_original"):
        assert (found[name].layers, found[name].origin) == ((1,), "tuned here")
    emmet = found["emmet"]
    assert (emmet.layers, emmet.origin) == (None, "unvalidated")
    # The third block of 32, of 3: none; and its room is reckoned with.
    assert emmet.suggested_layers == (0,) and emmet.statistics_bytes == 4 * 64 * 64
    assert "llama-2-7b" in emmet.source
    shown = run("doctor", place.model).stdout
    assert "tuned here" in shown and "unvalidated" in shown
    assert "name --layers" in shown


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("gemma2", (True, False, 1.0)),
        ("granite", (False, False, 0.22)),
        ("gptj", (False, True, 1.0)),
        ("falcon-alibi", (False, False, 1.0)),
    ],
)
def test_what_becomes_of_the_mlps_output(name, facts, tmp_path):
    build({**FAMILIES, **VARIANTS}[name], tmp_path)
    report = examine(str(tmp_path))
    found = report.weights
    assert (found.normalized, found.parallel, found.residual_scale) == facts
    memit = next(each for each in report.recipes if each.name == "memit")
    # Layers 4 to 8 of 32, of 5: 0 and 1; a norm makes an edit one layer's.
    assert memit.suggested_layers == ((1,) if found.normalized else (0, 1))
    shown = " ".join(run("doctor", tmp_path).stdout.split())
    assert ("a norm after the MLP" in shown) == facts[0]
    assert ("attention and MLP in parallel" in shown) == facts[1]
    assert ("times 0.22" in shown) == (facts[2] != 1)
    assert "name --layers" in shown and "no layer was probed" in shown


def test_json_and_terminal(work):
    place = work("llama")
    command = ["doctor", place.model, "--statistics", place.statistics]
    found = answer(*command)
    assert found["supported"] is True and found["refusal"] is None
    assert found["weights"]["shape"] == [24, 40]
    result = run(*command)
    assert result.exit_code == 0 and "error" not in result.stderr
    for text in ("model.layers.{}.mlp.down_proj.weight", "[d_value, d_key]", "50.0"):
        assert text in result.stdout


def _config(place, **changes):
    path = place.model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_refused_models_are_reported_with_the_reason(work):
    place = work("gpt2")
    kept = (place.model / "config.json").read_text()
    for changes, reason in (
        ({"model_type": "zebra"}, "'zebra' is not in the architecture table"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized (awq)"),
        ({"n_inner": 48}, "its config asks for [48, 16]"),
        ({"n_layer": LAYERS + 1}, f"transformer.h.{LAYERS}.mlp.c_proj.weight"),
        ({"n_embd": "wide"}, "cannot load the config"),
    ):
        _config(place, **changes)
        result = run("doctor", place.model, "--statistics", place.statistics, "--json")
        assert result.exit_code == 1
        report = json.loads(result.stdout)
        assert report["supported"] is False and reason in report["refusal"]
        assert report["weights"] is None and report["recipes"] == []
        assert len(report["files"]) > 1
        # A config that newer transformers cannot read stands in the tokenizer's way.
        readable = report["tokenizer"] is not None
        assert readable or changes == {"n_embd": "wide"}
        assert result.stderr.count("error: ") == len(report["problems"]) == 2 - readable
        assert reason in result.stderr and "Traceback" not in result.stderr
        assert run("doctor", place.model).exit_code == 1
        (place.model / "config.json").write_text(kept)
    assert run("doctor", place.model).exit_code == 0


def test_folders_that_cannot_be_examined(work, tmp_path):
    place = work("gpt2")
    next(place.model.glob("*.safetensors")).unlink()
    for arguments, message in (
        ([place.model], "is missing"),
        ([tmp_path], "holds no config.json"),
        (["no/such-model"], "neither a folder nor"),
        ([place.model, "--statistics", "nowhere"], "no such folder of statistics"),
    ):
        result = run("doctor", *arguments)
        assert result.exit_code == 1 and result.stdout == ""
        assert result.stderr.count("\n") == 1 and message in result.stderr


def test_a_missing_and_a_slow_tokenizer(work):
    place = work("gpt2")
    for path in place.model.glob("*token*"):
        path.unlink()
    (missing,) = examine(str(place.model)).problems
    assert "holds no tokenizer" in missing
    ByT5Tokenizer().save_pretrained(place.model)
    report = examine(str(place.model))
    assert report.supported and report.tokenizer is not None
    assert not report.tokenizer.fast and report.tokenizer.adds_eos
    assert "slow tokenizer" in report.problems[0]


def _problems(place):
    return examine(str(place.model), place.statistics).problems


def test_statistics_that_do_not_match(work):
    place = work("gpt2")
    store = StatisticsStore(place.statistics)
    first = store.open(0)
    store.save(replace(first, layer=7))
    (place.statistics / "layer-001.safetensors").write_bytes(b"")
    other = replace(first.provenance, module="transformer.h.2.attn.c_proj")
    store.save(replace(first, layer=2, provenance=other))
    report = examine(str(place.model), place.statistics)
    assert report.statistics is not None
    damaged, module, layer = (each.problem for each in report.statistics[1:])
    assert report.statistics[0].problem is None
    assert damaged and "layer-001.safetensors: cannot be read" in damaged
    assert module and "module transformer.h.2.attn.c_proj, here" in module
    assert layer and "layers 0 to 2 only" in layer
    assert report.problems == (damaged, module, layer)


def test_statistics_of_an_edited_model(work):
    place = work("gpt2")
    path = sorted(place.model.glob("*.safetensors"))[-1]
    tensors = load_file(path)
    name = max(tensors, key=lambda each: tensors[each].ndim)
    tensors[name] += 0.5
    save_file(tensors, path, {"format": "pt"})
    problems = _problems(place)
    assert len(problems) == LAYERS
    assert all("another model or tokenizer (model " in each for each in problems)


def test_statistics_by_another_tokenizer(work):
    place = work("gpt2")
    make_tokenizer("gpt2", texts=["other words"]).save_pretrained(place.model)
    problems = _problems(place)
    assert len(problems) == LAYERS
    assert all("(tokenizer " in each for each in problems)


def test_a_folder_without_statistics(work, tmp_path):
    (tmp_path / "empty").mkdir()
    problems = examine(str(work("gpt2").model), tmp_path / "empty").problems
    assert problems == (f"{tmp_path / 'empty'}: holds no statistics",)


def test_patched_folders_show_their_updates(work):
    place = work("gpt2")
    assert run(*place.editing(limit=1)).exit_code == 0
    assert run("patch", place.model, place.update, "--in-place").exit_code == 0
    report = examine(str(place.model), place.statistics)
    assert report.updates == 1
    assert len(report.problems) == LAYERS  # the statistics are the base's


GPT2_XL = GPT2Config(n_layer=48, n_embd=1600, n_head=25)


def test_recipe_options():
    found = read_recipe(GPT2_XL, "memit")
    assert (found.layers, found.origin) == (tuple(range(13, 18)), "published")
    changed = read_recipe(GPT2_XL, "memit", settings=["clamp=1.5"])
    assert (changed.targets.clamp, changed.origin) == (1.5, "unvalidated")
    same = read_recipe(GPT2_XL, "memit", layers="13-17", settings=["steps=20"])
    assert same.origin == "published"
    named = read_recipe(GPT2_XL, "rome", preset="gpt-j")
    assert named.layers == (5,)
    with pytest.raises(RecipeError, match="which layers"):
        read_recipe(GPT2_XL, "memit", preset="none")
    # No hyperparameters for this pair: not by itself, and only by name an error.
    llama3 = read_recipe(_llama3(), "emmet", layers="5")
    assert (llama3.layers, llama3.origin) == ((5,), "unvalidated")
    with pytest.raises(RecipeError, match="no hyperparameters of emmet"):
        read_recipe(_llama3(), "emmet", preset="llama-3-8b", layers="5")


def _llama3():
    from transformers import LlamaConfig

    return LlamaConfig(
        num_hidden_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        vocab_size=128256,
    )


def test_settings_have_their_fields_types():
    assert parse_settings(
        [
            "steps=30",
            "clamp=1",
            " learning_rate = 5e-2",
            "null_space_relative=true",
            "key_average=clean",
            "kl_position=end",
            'kl_prompts=["{} is", "{} has a = b"]',
        ]
    ) == {
        "steps": 30,
        "clamp": 1.0,
        "learning_rate": 0.05,
        "null_space_relative": True,
        "key_average": "clean",
        "kl_position": "end",
        "kl_prompts": ("{} is", "{} has a = b"),
    }
    assert type(parse_settings(["clamp=1"])["clamp"]) is float


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("steps", "expected key=value"),
        ("=3", "no setting ''"),
        ("steps=1.0", "expected a whole number"),
        ("steps=true", "expected a whole number"),
        ("steps=", "expected a whole number"),
        ("clamp=high", "expected a finite number"),
        ("clamp=true", "expected a finite number"),
        ("clamp=1e999", "expected a finite number"),
        ("clamp=NaN", "expected a finite number"),
        ("published_denominator=1", "expected true or false"),
        ("key_average=mean", "expected flat or half or clean"),
        ("kl_prompts={} is", "expected a JSON list of texts"),
        ("kl_prompts=[]", "expected a JSON list of texts"),
        ("kl_prompts=[1]", "expected a JSON list of texts"),
        ("layers=[1]", "no setting 'layers'"),
        ("origin=published", "no setting 'origin'"),
        ("contexts=[]", "no setting 'contexts'"),
    ],
)
def test_ill_typed_settings(pair, message):
    with pytest.raises(RecipeError, match="--set") as caught:
        parse_settings([pair])
    assert message in str(caught.value)
