"""Hyperparameter files of other tools: what they say here, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_kit import answer, make_workplace, refusal, run
from torch import Tensor
from transformers import GPT2Config, LlamaConfig

from unified_edit import hparams
from unified_edit.algebra.solve import solve
from unified_edit.errors import RecipeError
from unified_edit.hparams import read_hparams
from unified_edit.model.descent import TargetSettings
from unified_edit.model.prompts import ContextSettings
from unified_edit.options import read_recipe
from unified_edit.presets import MEMIT_CONTEXTS
from unified_edit.recipes import Recipe, recipe

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")

# Of each model: its blocks, and its modules' names.
MODELS: dict[str, tuple[int, str, str]] = {
    "gpt2-xl": (48, "transformer.h.{}", "c_proj"),
    "gpt-j": (28, "transformer.h.{}", "fc_out"),
    "llama-2-7b": (32, "model.layers.{}", "down_proj"),
    "llama-3-8b": (32, "model.layers.{}", "down_proj"),
}
STEMS = {
    "gpt2-xl": "gpt2-xl",
    "gpt-j": "EleutherAI_gpt-j-6B",
    "llama-2-7b": "llama2-7b",
    "llama-3-8b": "Llama3-8B",
}
# What was published, by method and model: layers, steps, lr, clamp, weight decay, and
# C's weight (MEMIT's λ, EMMET's w).
PUBLISHED: dict[tuple[str, str], tuple[list[int], int, float, float, float, float]] = {
    ("ROME", "gpt2-xl"): ([17], 20, 0.5, 4, 0.5, 0),
    ("ROME", "gpt-j"): ([5], 20, 0.5, 4, 0.5, 0),
    ("ROME", "llama-2-7b"): ([5], 25, 0.5, 4, 1e-3, 0),
    ("ROME", "llama-3-8b"): ([5], 25, 0.5, 4, 1e-3, 0),
    ("MEMIT", "gpt2-xl"): ([13, 14, 15, 16, 17], 20, 0.5, 0.75, 0.5, 20000),
    ("MEMIT", "gpt-j"): ([3, 4, 5, 6, 7, 8], 25, 0.5, 0.75, 0.5, 15000),
    ("MEMIT", "llama-2-7b"): ([4, 5, 6, 7, 8], 25, 0.5, 4, 1e-3, 15000),
    ("MEMIT", "llama-3-8b"): ([4, 5, 6, 7, 8], 25, 0.1, 0.75, 0.5, 15000),
    ("EMMET", "gpt2-xl"): ([17], 20, 0.5, 0.75, 0.5, 1000),
    ("EMMET", "gpt-j"): ([5], 25, 0.5, 0.75, 0.5, 1),
    ("EMMET", "llama-2-7b"): ([5], 25, 0.5, 4, 1e-3, 1),
}
PUBLISHED |= {
    ("AlphaEdit", model): values
    for (method, model), values in PUBLISHED.items()
    if method == "MEMIT"
}
EQUIVALENT_WEIGHT = {"gpt2-xl": 100.0, "gpt-j": 0.1, "llama-2-7b": 0.1}


def form(method: str, model: str, **changes: Any) -> dict[str, Any]:
    """A file's content as the methods' own repositories have it; None leaves a field
    out."""
    layers, steps, lr, clamp, decay, weight = PUBLISHED[method, model]
    depth, block, down = MODELS[model]
    data: dict[str, Any] = {
        "layers": layers,
        "fact_token": "subject_last",
        "v_num_grad_steps": steps,
        "v_lr": lr,
        "v_loss_layer": depth - 1,
        "v_weight_decay": decay,
        "clamp_norm_factor": clamp,
        "kl_factor": 0.0625,
        "mom2_adjustment": True,
        "rewrite_module_tmp": f"{block}.mlp.{down}",
        "layer_module_tmp": block,
        "mlp_module_tmp": f"{block}.mlp",
        "attn_module_tmp": f"{block}.attn",
        "ln_f_module": "norm",
        "lm_head_module": "lm_head",
        "mom2_dataset": "wikipedia",
        "mom2_n_samples": 100000,
        "mom2_dtype": "float32",
    }
    if method == "ROME":
        data["context_template_length_params"] = [[5, 10], [10, 10]]
    else:
        data |= {"layer_selection": "all", "mom2_update_weight": weight}
    if method == "EMMET":
        data |= {"update_norm_lambda": 0, "emmet_lambda": 0.1}
        data |= {"calculate_objective_value": False}
    if method == "AlphaEdit":
        data |= {"model_name": STEMS[model], "nullspace_threshold": 0.02, "L2": 10}
    return {k: v for k, v in {**data, **changes}.items() if v is not None}


def write(folder: Path, method: str, model: str, **changes: Any) -> Path:
    path = folder / method / f"{STEMS[model]}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(form(method, model, **changes)), encoding="utf-8")
    return path


def write_yaml(folder: Path, method: str, model: str, **changes: Any) -> Path:
    """In EasyEdit's form: the method's and the model's name inside, numbers without a
    point, a comment."""
    data = form(
        method,
        model,
        **{
            "model_name": f"./hugging_cache/{model}",
            "stats_dir": "./data/stats",
            "device": 0,
            "alg_name": method,
            **changes,
        },
    )
    lines = [f"{name}: {json.dumps(value)}" for name, value in data.items()]
    text = "\n".join(["# a comment", *lines]).replace("v_lr: 0.5", "v_lr: 5e-1")
    path = folder / "any.yaml"
    path.write_text(text.replace("decay: 0.001", "decay: 1e-3"), encoding="utf-8")
    return path


def said(found: Recipe, **changes: Any) -> Recipe:
    """What a recipe says to do: without its labels, and with the clamp that is meant if
    it names none."""
    targets = found.targets.at(found.targets.site)
    bare = replace(found, name="", source="", origin="unvalidated", targets=targets)
    return replace(bare, **changes)


# What a published file says, in our words


@pytest.mark.parametrize(("method", "model"), PUBLISHED)
def test_a_published_file_is_its_preset(
    tmp_path: Path, method: str, model: str
) -> None:
    changes = {"emmet_lambda": 0} if method == "EMMET" else {}
    path = write(tmp_path, method, model, **changes)
    read = read_hparams(path)
    assert said(read.recipe) == said(recipe(method.lower(), model))
    assert read.recipe.name == method.lower() and read.recipe.source == path.name
    assert read.recipe.origin == "published"
    assert read.model_name == STEMS[model]


@pytest.mark.parametrize("model", EQUIVALENT_WEIGHT)
def test_emmet_with_its_slack_is_least_squares(tmp_path: Path, model: str) -> None:
    read = read_hparams(write(tmp_path, "EMMET", model))
    assert said(read.recipe) == said(
        recipe("emmet", model),
        memorization="least_squares",
        preservation_weight=EQUIVALENT_WEIGHT[model],
    )
    assert read.recipe.origin == "unvalidated"
    (note,) = [each for each in read.notes if each.startswith("emmet_lambda")]
    assert "memorization='equality'" in note


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", ["MEMIT", "AlphaEdit"])
def test_easyedit_says_the_same(tmp_path: Path, method: str, model: str) -> None:
    path = write_yaml(tmp_path, method, model)
    text = path.read_text(encoding="utf-8")
    assert "v_lr: 5e-1" in text or "v_lr: 0.1" in text
    own = read_hparams(write(tmp_path, method, model))
    read = read_hparams(path)
    assert read.recipe == replace(own.recipe, source="any.yaml")
    assert read.model_name == f"./hugging_cache/{model}"
    assert any(note.startswith("device: ") for note in read.notes)


def test_easyedits_rome_has_contexts_of_its_own(tmp_path: Path) -> None:
    found = read_hparams(write_yaml(tmp_path, "ROME", "gpt2-xl")).recipe
    words = ("The", "Therefore", "Because", "I", "You")
    assert found.contexts.samples == tuple(
        (word, length) for length in (5, 10) for word in words for _ in range(2)
    )
    own = recipe("rome", "gpt2-xl")
    assert said(found) == said(own, contexts=found.contexts)
    assert found.origin == "unvalidated"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "rome"),
        ({"alg_name": "R-ROME"}, "r_rome"),
        ({"enable_random_prefix_keys": True, "original_implementation": True}, "rome"),
        ({"enable_random_prefix_keys": False}, "p_rome"),
        (
            {
                "enable_random_prefix_keys": False,
                "enable_prompt_keys": True,
                "original_implementation": True,
            },
            "rome_original",
        ),
        ({"alg_name": "R-ROME", "enable_random_prefix_keys": False}, "p_rome"),
        ({"if_c_rome": True}, "r_rome"),
        ({"if_c_rome": False}, "rome"),
    ],
)
def test_romes_kin_by_their_fields(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    found = read_hparams(write_yaml(tmp_path, "ROME", "gpt2-xl", **changes)).recipe
    own = recipe(expected, "gpt2-xl")
    assert said(found) == said(own, contexts=found.contexts)
    assert found.name == expected


def test_romes_second_key_is_there_when_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, "ROME", "gpt2-xl")
    assert any("rome_original" in note for note in read_hparams(path).notes)
    read = read_hparams(path, method="rome_original")
    assert said(read.recipe) == said(recipe("rome_original", "gpt2-xl"))
    assert read.recipe.origin == "published"
    assert not any("rome_original" in note for note in read.notes)


def test_methods_by_folder_fields_and_name(tmp_path: Path) -> None:
    for method, expected in (
        ("ROME", "rome"),
        ("MEMIT", "memit"),
        ("AlphaEdit", "alphaedit"),
    ):
        path = tmp_path / "mine.json"
        path.write_text(json.dumps(form(method, "gpt2-xl")))
        assert read_hparams(path).recipe.name == expected
    # EMMET's and MEMIT's files in one repository have the same fields.
    path.write_text(json.dumps(form("EMMET", "gpt2-xl")))
    with pytest.raises(RecipeError, match="nothing says for which method"):
        read_hparams(path)
    assert read_hparams(path, method="EMMET").recipe.name == "emmet"
    assert read_hparams(path, method="memit").recipe.preservation_weight == 1000.0
    for folder, expected in (("c-rome", "r_rome"), ("P-ROME", "p_rome")):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "x.json"
        path.write_text(json.dumps(form("ROME", "gpt2-xl")))
        assert read_hparams(path).recipe.name == expected


def test_only_what_is_published_for_the_model_is_called_so(tmp_path: Path) -> None:
    changed = write(tmp_path, "MEMIT", "gpt2-xl", v_lr=0.4)
    assert read_hparams(changed).recipe.origin == "unvalidated"
    other = write(tmp_path, "MEMIT", "llama-2-7b", model_name="Mistral-7B")
    assert read_hparams(other).recipe.origin == "unvalidated"


# The mathematics of a file, against the formulas as their code has them


def published_update(data: dict[str, Any], k: Tensor, r: Tensor, c: Tensor) -> Tensor:
    """Δ [d_value, d_key]; keys k [d_key, n], residuals r [d_value, n]."""
    eye, ones = torch.eye(len(c), dtype=c.dtype), torch.eye(k.shape[1], dtype=c.dtype)
    if "nullspace_threshold" in data:
        u, s, _ = torch.linalg.svd(c)
        u = u[:, s < data["nullspace_threshold"]]
        p = u @ u.T
        return torch.linalg.solve(p @ k @ k.T + data["L2"] * eye, p @ k @ r.T).T
    weighted = data["mom2_update_weight"] * c
    if "emmet_lambda" not in data:
        return r @ k.T @ torch.linalg.inv(weighted + k @ k.T)
    inverse = torch.linalg.inv(weighted + data["update_norm_lambda"] * eye)
    d = k.T @ inverse @ k + data["emmet_lambda"] * ones
    return r @ torch.linalg.inv(d) @ k.T @ inverse


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("MEMIT", {"mom2_update_weight": 3.0}),
        ("EMMET", {"mom2_update_weight": 7.0}),
        ("EMMET", {"mom2_update_weight": 7.0, "emmet_lambda": 0}),
        ("EMMET", {"mom2_update_weight": 7.0, "update_norm_lambda": 0.3}),
        (
            "EMMET",
            {"mom2_update_weight": 7.0, "update_norm_lambda": 0.3, "emmet_lambda": 0},
        ),
        ("AlphaEdit", {"L2": 0.5, "nullspace_threshold": 0.3}),
    ],
)
def test_a_files_recipe_solves_the_files_equation(
    tmp_path: Path, method: str, changes: dict[str, float]
) -> None:
    generator = torch.Generator().manual_seed(1)
    k, r = (
        torch.randn(rows, 4, generator=generator, dtype=torch.float64)
        for rows in (9, 5)
    )
    background = torch.randn(200, 9, generator=generator, dtype=torch.float64)
    background[:, :3] *= 0.1
    c = background.T @ background / 200
    found = read_hparams(write(tmp_path, method, "gpt2-xl", **changes)).recipe
    update = solve(found.objective(c), keys=k.T, residuals=r.T).update
    expected = published_update(form(method, "gpt2-xl", **changes), k, r, c)
    torch.testing.assert_close(
        update.left @ update.right, expected, rtol=1e-9, atol=1e-12
    )


# What is refused, and what is told


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (
            "ROME",
            {"fact_token": "last"},
            "fact_token is 'last'; expected 'subject_last",
        ),
        ("ROME", {"fact_token": None}, "lacks the field fact_token"),
        ("ROME", {"mom2_adjustment": False}, "mom2_adjustment is False.*identity"),
        ("ROME", {"mom2_adjustment": 1}, "mom2_adjustment is 1; expected true or"),
        ("ROME", {"layers": [5, 6]}, "one layer's; got layers"),
        ("ROME", {"layers": "5"}, "layers is '5'; expected a list"),
        ("ROME", {"layers": [True]}, "layers is .True"),
        ("ROME", {"context_template_length_params": None}, "lacks the field context_t"),
        ("ROME", {"context_template_length_params": [[5]]}, "params is ..5..; expect"),
        ("ROME", {"context_template_length_params": 5}, "params is 5; expected"),
        ("ROME", {"bias_update": True}, "bias_update is True; expected False"),
        ("ROME", {"dynamic": True}, "dynamic is True; expected False"),
        ("ROME", {"use_chat_template": True}, "use_chat_template is True"),
        ("ROME", {"mom2_update_weight": 1}, "mom2_update_weight: not known.*rome's"),
        ("MEMIT", {"layer_selection": "random"}, "layer_selection is 'random'"),
        ("MEMIT", {"layers": [17, 16]}, "MEMIT.gpt2-xl.json: .*ascending"),
        ("MEMIT", {"v_num_grad_steps": 2.5}, "v_num_grad_steps is 2.5; expected a wh"),
        ("MEMIT", {"v_num_grad_steps": 0}, "v_num_grad_steps is 0"),
        ("MEMIT", {"v_lr": "fast"}, "v_lr is 'fast'; expected more than 0"),
        ("MEMIT", {"v_lr": True}, "v_lr is True"),
        ("MEMIT", {"clamp_norm_factor": 0}, "clamp_norm_factor is 0"),
        ("MEMIT", {"v_weight_decay": -1}, "v_weight_decay is -1"),
        ("MEMIT", {"kl_factor": float("nan")}, "kl_factor is nan"),
        ("MEMIT", {"v_loss_layer": 46}, "v_loss_layer is 46; expected 47"),
        ("MEMIT", {"mom2_update_weight": 0}, "mom2_update_weight is 0"),
        (
            "MEMIT",
            {"update_norm_lambda": 0.01},
            "update_norm_lambda is 0.01; exp.*ridge",
        ),
        ("MEMIT", {"rewrite_module_tmp": "transformer.h.{}.mlp.c_fc"}, "projection"),
        ("MEMIT", {"rewrite_module_tmp": "transformer.h.3.mlp.c_proj"}, "with {} for"),
        ("MEMIT", {"rewrite_module_tmp": "h.{}.attn.c_proj"}, "mlp_module_tmp is"),
        ("MEMIT", {"mlp_module_tmp": "transformer.h.{}"}, "expected .*h.{}.mlp, which"),
        ("MEMIT", {"layer_module_tmp": "transformer"}, "expected transformer.h.{}, wh"),
        ("MEMIT", {"L2": 10}, "L2: not known as a field of memit's"),
        ("MEMIT", {"b": 1, "a": 2}, "a, b: not known as a field"),
        ("EMMET", {"emmet_lambda": None}, "lacks the field emmet_lambda"),
        ("EMMET", {"emmet_lambda": -0.1}, "emmet_lambda is -0.1"),
        ("EMMET", {"norm_control": 0.5}, "norm_control is 0.5; expected 0"),
        ("EMMET", {"prob_cutoff": 0.9}, "prob_cutoff is 0.9"),
        ("AlphaEdit", {"L2": 0}, "L2 is 0; expected more than 0"),
        ("AlphaEdit", {"nullspace_threshold": None}, "lacks the field nullspace_thr"),
    ],
)
def test_what_would_change_the_mathematics_is_refused_by_name(
    tmp_path: Path, method: str, changes: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, method, "gpt2-xl", **changes)
    with pytest.raises(RecipeError, match=message) as caught:
        read_hparams(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("method", ["ROME", "MEMIT", "EMMET", "AlphaEdit"])
def test_no_field_is_passed_over_in_silence(tmp_path: Path, method: str) -> None:
    """Another value of any field gives another recipe, or is refused, or the field is
    in a note."""
    base = form(method, "gpt2-xl", prob_cutoff=None)
    read = read_hparams(write(tmp_path, method, "gpt2-xl"))
    told = " ".join(note.partition(": ")[0] for note in read.notes)
    for name, value in base.items():
        if name in told or name == "model_name":
            continue
        other: Any = not value if isinstance(value, bool) else f"{value}x"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            other = value + 1
        elif isinstance(value, list):
            other = value[1:] or [3]
        try:
            changed = read_hparams(write(tmp_path, method, "gpt2-xl", **{name: other}))
        except RecipeError as error:
            assert name in str(error)
        else:
            assert changed.recipe != read.recipe or name in " ".join(changed.notes)


def test_a_number_of_right_evaluations_becomes_the_stopping_rule(
    tmp_path: Path,
) -> None:
    read = read_hparams(write(tmp_path, "EMMET", "gpt2-xl", prob_cutoff=-3))
    assert read.recipe.targets.most_probable_stop == 3
    assert any(note.startswith("prob_cutoff") for note in read.notes)


def test_a_file_is_checked_against_the_model(tmp_path: Path) -> None:
    path = write(tmp_path, "MEMIT", "gpt2-xl")
    xl = GPT2Config(n_layer=48)
    assert read_hparams(path, config=xl) == read_hparams(path)
    with pytest.raises(RecipeError, match="v_loss_layer is 47; expected 11"):
        read_hparams(path, config=GPT2Config())
    with pytest.raises(RecipeError, match="rewrite_module_tmp.*down_proj, as llama"):
        read_hparams(path, config=LlamaConfig(num_hidden_layers=48))
    # Of a model whose name says nothing, the last layer is taken on trust.
    unknown = write_yaml(tmp_path, "MEMIT", "gpt2-xl", model_name="mine")
    assert any("47 is taken for" in note for note in read_hparams(unknown).notes)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", "is not valid JSON"),
        ("a.json", b"[1]", "expected one object"),
        ("a.json", b"\xff", "is not UTF-8"),
        ("a.yaml", b"a: [", "is not valid YAML"),
        ("a.yml", b"5: 1", "expected one object"),
        ("a.yaml", b"", "expected one object"),
        ("a.yaml", b"!!python/object/apply:os.system [x]", "is not valid YAML"),
        ("a.toml", b"a = 1", "expected a file ending in"),
        ("a.yaml", b"alg_name: PMET", "the method is 'PMET'; known: .*memit"),
        ("a.yaml", b"alg_name: [1]", "the method is .1."),
        ("absent.json", None, "cannot be read"),
    ],
)
def test_files_that_cannot_be_read(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as caught:
        read_hparams(path)
    assert str(path) in str(caught.value)


def test_the_class_method_warns_of_what_has_no_meaning(tmp_path: Path) -> None:
    path = write(tmp_path, "MEMIT", "gpt2-xl")
    with pytest.warns(UserWarning) as caught:
        found = Recipe.from_hparams(path)
    assert found == read_hparams(path).recipe
    (warning,) = caught
    assert warning.filename == __file__
    for name in ("mom2_dataset", "mom2_n_samples", "ln_f_module", str(path)):
        assert name in str(warning.message)


# On the command line


def test_a_file_where_a_recipe_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "MEMIT", "gpt2-xl")
    xl = GPT2Config(n_layer=48)
    own = read_hparams(path).recipe
    assert read_recipe(xl, str(path)) == own
    told = capsys.readouterr()
    assert told.out == "" and "note: mom2_dataset, " in told.err
    assert read_recipe(xl, str(path), layers="13-17", settings=["steps=20"]) == own
    changed = read_recipe(xl, str(path), layers="14", settings=["clamp=2", "ridge=0.1"])
    assert changed == replace(
        own,
        layers=(14,),
        ridge=0.1,
        targets=replace(own.targets, clamp=2.0),
        origin="unvalidated",
        source="gpt2-xl.json, changed",
    )
    with pytest.raises(RecipeError, match="hyperparameters of its own"):
        read_recipe(xl, str(path), preset="gpt2-xl")


def test_edit_by_a_file(tmp_path: Path) -> None:
    place = make_workplace(tmp_path, "gpt2")
    path = write_yaml(tmp_path, "MEMIT", "gpt2-xl", layers=[0, 1], v_loss_layer=2)
    made = answer(*place.editing(recipe=path, layers=None))
    assert made["recipe"]["source"] == "any.yaml, changed"
    assert made["recipe"]["layers"] == [0, 1]
    assert made["recipe"]["targets"]["learning_rate"] == 0.5
    assert made["recipe"]["targets"]["steps"] == 8  # by --set
    place.update.unlink()
    noted = run(*place.editing(recipe=path, layers="1"))
    assert noted.exit_code == 0 and "note: device" not in noted.stdout
    assert "note: device" in noted.stderr
    place.update.unlink()
    path = write_yaml(tmp_path, "MEMIT", "gpt2-xl", layers=[0, 1])
    message = refusal(tmp_path, *place.editing(recipe=path, layers=None))
    assert "v_loss_layer is 47; expected 2" in message


# docs/migrating.md


def table() -> list[list[str]]:
    """Cells of the guide's table of fields."""
    part = GUIDE.partition("## Fields")[2].partition("\n## ")[0]
    rows = [line for line in part.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_guides_table_is_complete_and_true() -> None:
    theirs = {name for row in table() for name in re.findall(r"`(\w+)`", row[0])}
    source = (ROOT / "unified_edit" / "hparams.py").read_text(encoding="utf-8")
    assert len(theirs) > 40
    assert [name for name in theirs if not re.search(rf"\b{name}\b", source)] == []
    for names in hparams._NO_MEANING.values():
        assert set(names.split()) <= theirs
    for method, model in PUBLISHED:
        assert set(form(method, model)) <= theirs
    known = {
        field.name
        for each in (Recipe, TargetSettings, ContextSettings)
        for field in fields(each)
    }
    ours = {name for row in table() for name in re.findall(r"`(\w+)`", row[1])}
    assert ours - known == set()
    assert {"layers", "steps", "clamp", "preservation_weight", "ridge"} <= ours


def test_the_guides_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("gpt2", "data"):
        name = Path("examples") / "tinyworld" / part
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    (shown,) = re.findall(r"```json\n(.*?)```", GUIDE, flags=re.DOTALL)
    Path("hparams/MEMIT").mkdir(parents=True)
    Path("hparams/MEMIT/tinyworld.json").write_text(shown, encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the file's notes
        for block in blocks:
            exec(compile(block, "migrating.md", "exec"), names)
    assert names["recipe"].contexts == MEMIT_CONTEXTS
    assert names["result"].report.success >= 0.5
    assert len(names["results"]) == 2


def test_the_guides_calls_name_what_exists() -> None:
    import unified_edit

    for line in GUIDE.splitlines():
        for name in re.findall(r"from unified_edit import ([\w, ]+)", line):
            for each in name.split(", "):
                assert getattr(unified_edit, each)
