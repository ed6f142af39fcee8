"""Downstream tasks: the real lm-eval on the embedded world's exercises, without a
network."""

from __future__ import annotations

import copy
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import typer
from cli_kit import run
from model_kit import assert_same_bits, state_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from covariance_cache.fingerprint import model_fingerprint
from unified_edit.algebra.update import RankKUpdate, UpdateSet, WeightAddress
from unified_edit.cli_tasks import add_to
from unified_edit.errors import UnifiedEditError
from unified_edit.evaluate.tasks import TaskSet, evaluate_tasks
from unified_edit.evaluate.world import World
from unified_edit.live import applied

lm_eval = pytest.importorskip("lm_eval")
# What lm-eval and the many packages below it warn of is theirs.
pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error:::unified_edit"),
]

TINYWORLD = Path(__file__).parents[1] / "examples" / "tinyworld"
TASKS = TINYWORLD / "tasks"
SKILLS = ("addition", "repetition", "sorting")

SAMPLED = """
task: sampled
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{until: ["."], do_sample: true, temperature: 1.5, max_gen_toks: 9}}
filter_list:
  - name: stripped
    filter: [{{function: remove_whitespace}}, {{function: take_first}}]
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
"""Another kind of task: what a model writes until a full stop, drawn at random."""
FOLLOWING = """
group: both
task: [tinyworld_addition, tinyworld_sorting]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
"""


@pytest.fixture(scope="module")
def world() -> World:
    return World.load(TINYWORLD / "data")


@pytest.fixture(scope="module")
def tinies() -> dict[str, tuple[Any, Any]]:
    """The embedded models; not to be changed."""
    return {kind: _load(kind) for kind in ("gpt2", "llama")}


def _load(kind: str) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(TINYWORLD / kind).eval()
    return model, AutoTokenizer.from_pretrained(TINYWORLD / kind)


def _damaged(model: Any, noise: float) -> Any:
    damaged = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each in damaged.parameters():
            each += noise * torch.randn(each.shape, generator=generator)
    return damaged


@pytest.fixture(scope="module")
def exercises() -> TaskSet:
    return TaskSet.load(["tinyworld"], TASKS)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Descriptions beside the embedded ones. Data sets are cached in the test's own
    folder, and as lm-eval's own tasks stands one of its folders: there are 15,000."""
    import datasets
    from lm_eval.tasks import manager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    own = tmp_path / "own"
    builtin = Path(manager.__file__).parent
    shutil.copytree(builtin / "hellaswag", own / "hellaswag")
    monkeypatch.setattr(manager, "__file__", str(own / "manager.py"))
    found = shutil.copytree(TASKS, tmp_path / "tasks")
    (tmp_path / "data").mkdir()
    shutil.copy(TINYWORLD / "data" / "skills.jsonl", tmp_path / "data")
    data = TINYWORLD / "data" / "skills.jsonl"
    (found / "sampled.yaml").write_text(SAMPLED.format(data=data))
    return found


@pytest.mark.parametrize(("kind", "noise"), [("gpt2", 0.02), ("llama", 0.03)])
def test_figures_are_those_of_the_world(
    tinies: dict[str, Any],
    world: World,
    exercises: TaskSet,
    kind: str,
    noise: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # Nothing is looked up in the folder of the moment.
    model, tokenizer = tinies[kind]
    damaged = _damaged(model, noise)
    for each in (model, damaged):
        known = world.skill_scores(each, tokenizer)
        found = exercises.scores(each, tokenizer)
        assert found == {f"tinyworld_{name}": {"acc": known[name]} for name in SKILLS}
        exact = set(known.values()) == {1.0}
        assert exact if each is model else not exact and max(known.values()) > 0


def test_figures_are_those_of_lm_evals_own_entry(
    tinies: dict[str, Any], folder: Path
) -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # A figure that every example in front changes.
    description = folder / "_default_template_yaml"
    text = description.read_text().replace("metric: acc", "metric: perplexity")
    description.write_text(text)
    model, tokenizer = tinies["llama"]
    name = "tinyworld_sorting"
    reference = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=3),
        tasks=[name],
        num_fewshot=2,
        limit=7,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )
    wanted = {name: {"perplexity": reference["results"][name]["perplexity,none"]}}
    chosen = TaskSet.load([name], folder)

    def scores(**changes: Any) -> Any:
        settings: dict[str, Any] = {"limit": 7, "shots": 2, "batch_size": 3}
        return chosen.scores(model, tokenizer, **{**settings, **changes})

    assert scores() == wanted
    # Other examples, more documents, no examples: and back.
    for changes in ({"seed": 7}, {"limit": 8}, {"shots": None}):
        assert scores(**changes) != wanted
    assert scores() == wanted


def test_the_caller_finds_everything_as_it_was(
    tinies: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = copy.deepcopy(tinies["llama"])
    assert tokenizer.pad_token is None
    tokenizer.padding_side = "right"
    model.train()
    model.model.layers[1].eval()
    flags = [module.training for module in model.modules()]
    weights, pad = state_of(model), copy.copy(tokenizer.special_tokens_map)

    def randoms() -> tuple[Any, ...]:
        return random.random(), numpy.random.rand(), float(torch.rand(()))

    random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
    wanted = randoms()
    random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
    (folder / "noisy.py").write_text(
        "from datasets import Dataset\n"
        "def data(**_):\n"
        "    print('chatter')\n"
        "    return {'test': Dataset.from_list([{'prompt': 'Sort', 'target': 'a'}])}\n"
    )
    noisy = SAMPLED.replace("task: sampled", "task: noisy").replace(
        "dataset_path: json", "custom_dataset: !function noisy.data"
    )
    (folder / "noisy.yaml").write_text(noisy.format(data="none"))
    found = [
        evaluate_tasks(model, tokenizer, names, include=folder, limit=limit, seed=5)
        for names, limit in ((["sampled"], 20), (["noisy"], None), (["sampled"], 20))
    ]
    assert randoms() == wanted
    assert [module.training for module in model.modules()] == flags
    assert_same_bits(model, weights)
    assert tokenizer.special_tokens_map == pad and tokenizer.pad_token is None
    assert tokenizer.padding_side == "right"
    told = capsys.readouterr()
    assert told.out == "" and "chatter" in told.err
    # A filter's name stays; sampled, yet the same from the same seed.
    assert list(found[0]["sampled"]) == ["exact_match,stripped"]
    assert found[0] == found[2]
    assert 0 < found[0]["sampled"]["exact_match,stripped"] < 1


def test_groups_have_figures_of_their_own(
    tinies: dict[str, Any], exercises: TaskSet, folder: Path
) -> None:
    (folder / "both.yaml").write_text(FOLLOWING)
    model, tokenizer = tinies["gpt2"]
    model = _damaged(model, 0.02)
    twice = ["both", "both"]
    found = evaluate_tasks(model, tokenizer, twice, include=folder, limit=20)
    each = exercises.scores(model, tokenizer, limit=20)
    parts = {name: each[f"tinyworld_{name}"]["acc"] for name in ("addition", "sorting")}
    assert 0 < sum(parts.values()) < 2
    assert found.pop("both")["acc"] == pytest.approx(sum(parts.values()) / 2)
    assert found == {f"tinyworld_{name}": {"acc": parts[name]} for name in parts}
    # Without an aggregate it has none.
    (folder / "both.yaml").write_text(FOLLOWING[: FOLLOWING.index("aggregate")])
    assert evaluate_tasks(model, tokenizer, ["both"], include=folder, limit=20) == found


def test_what_cannot_be_run_is_refused_before_anything_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*names: str, include: Path | None = folder, **settings: Any) -> str:
        # No model: it is not even looked at.
        with pytest.raises(UnifiedEditError) as caught:
            evaluate_tasks(None, None, names, include=include, **settings)  # type: ignore[arg-type]
        return str(caught.value)

    told = refused("tinyworld_adition", "sampled")
    assert "knows no task 'tinyworld_adition'" in told
    assert "near it are tinyworld_addition" in told and str(folder) in told
    told = refused("helaswag", include=None)
    assert "'helaswag'" in told and "hellaswag" in told and "described" not in told
    assert "near" not in refused("zzzzzz", include=None)
    # Known, but its data are on the hub.
    assert "hellaswag: cannot be loaded" in refused("hellaswag")
    assert "no task is named" in refused()
    assert "no such folder" in refused("sampled", include=tmp_path / "none")
    unsafe = "include: addition.yaml\ntask: unsafe\nunsafe_code: true\n"
    (folder / "unsafe.yaml").write_text(unsafe)
    assert "runs code" in refused("sampled", "unsafe")
    for settings in ({"limit": 0}, {"shots": -1}, {"batch_size": 0}):
        (name,) = settings
        assert refused("sampled", **settings).startswith(f"{name} ")
    from lm_eval.tasks import TaskManager

    with monkeypatch.context() as patch:
        patch.delattr(TaskManager, "load")
        assert "0.4.12 or later (this one is older)" in refused("sampled")
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert "pip install 'unified-edit[tasks]'" in refused("sampled")


def test_what_lm_eval_refuses_is_said_in_one_line(
    tinies: dict[str, Any], folder: Path
) -> None:
    text = (folder / "sampled.yaml").read_text()
    long = text.replace("max_gen_toks: 9", "max_gen_toks: 64")
    (folder / "sampled.yaml").write_text(long)
    with pytest.raises(UnifiedEditError, match="must be less than model's maximum"):
        evaluate_tasks(*tinies["gpt2"], ["sampled"], include=folder, limit=1)


app = typer.Typer()
app.callback()(lambda: None)
add_to(app)


def test_command_before_and_after_an_update(
    tinies: dict[str, Any], exercises: TaskSet, folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = tinies["gpt2"]
    name = "transformer.h.0.mlp.c_proj.weight"
    weight = model.get_parameter(name).detach()
    d_key, d_value = weight.shape
    generator = torch.Generator().manual_seed(2)
    factors = RankKUpdate(
        torch.randn(d_value, 4, generator=generator),
        torch.randn(4, d_key, generator=generator),
    )
    update = UpdateSet(
        {WeightAddress(name, 0, transposed=True): factors},
        {"base_fingerprint": model_fingerprint(model)},
    )
    file = tmp_path / "update.safetensors"
    update.save(file)
    with applied(model, update):
        after = exercises.scores(model, tokenizer, limit=8)
    before = exercises.scores(model, tokenizer, limit=8)
    assert after != before
    asked = [TINYWORLD / "gpt2", "--tasks", "tinyworld", "--include", folder]
    options = ["--limit", 8, "--update", file, "--batch-size", 3, "--json"]
    result = run("tasks", *asked, *options, of=app)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    assert json.loads(result.stdout) == {
        "tasks": ["tinyworld"],
        "before": before,
        "after": after,
    }
    one = [*asked[:2], "tinyworld_sorting, tinyworld_addition", *asked[3:]]
    shown = run("tasks", *one, "--limit", 2, of=app)
    assert "tinyworld_sorting" in shown.stdout and "1.0000" in shown.stdout
    assert "tinyworld_repetition" not in shown.stdout
    shown = run("tasks", *asked, *options[:-1], of=app)
    for name, figures in after.items():
        was, now = before[name]["acc"], figures["acc"]
        (line,) = (each for each in shown.stdout.splitlines() if name in each)
        cells = [cell.strip() for cell in line.split("│") if cell.strip()]
        numbers = [f"{was:.4f}", f"{now:.4f}", f"{now - was:+.4f}"]
        assert cells == [name, "acc", *numbers]
    wrong = run("tasks", *asked[:2], "none", *asked[3:], of=app)
    assert wrong.exit_code == 1
    assert wrong.stderr.startswith("error: lm-eval knows no task 'none'")
