"""Sequences of edits on an embedded model until they do not hold any more.

    python benchmarks/sequences.py [--json] [--experiment recipes|regularizers|guard]
        [--family gpt2] [--edits N] [--minutes M] [--one-word 25] [--seed 0]
        [--runs DIR] [--full] [--configurations NAME …]
        [--set key=value …]

Each configuration edits one stream of the world, one edit a step, until S over all its
edits is below .8 (with --full: .5), the edits are used up or, without --full, the time
is. What is printed counts the edits held at S ≥ .8; where a configuration never fell
below, the count is a lower bound and its name is in `not_ended`. `held_with_skills`
counts those held with skills within 3 points of the unedited model's as well. Two
configurations run side by side, a thread each; the one that has done gives its place to
the next.

The stream is `unified_edit.evaluate.stream.world_stream`: one subject in five is never
edited and judges the damage; every `--one-word`th edit is about a name of one word that
begins its prompt, the kind that ROME's published code breaks on (0 for none). Another
`--seed` makes another stream, with other subjects held out.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:
    # Run as a script: this folder, which comes first, would hide the standard
    # library's `statistics` behind the script of that name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from unified_edit.evaluate.runs import Run

WORLD = Path(__file__).parents[1] / "examples" / "tinyworld"
AT_LEAST = 0.8
SKILLS_DROP = 0.03


@dataclass(frozen=True)
class Configuration:
    """A recipe with changes and, if it has one, a guard."""

    recipe: str
    changes: dict[str, Any] = field(default_factory=dict)
    guard: str | None = None
    """`refuse`, `warn` or `shrink`, with the default limits; None for no guard."""


def configurations(experiment: str) -> dict[str, Configuration]:
    """By name. `rome_original` has its own contexts: with others its two keys differ
    less than they do in its code. The first ones are the default run."""
    from unified_edit.presets import ROME_CONTEXTS

    published = {"contexts": ROME_CONTEXTS}
    gently = {"most_probable_stop": 3, "learning_rate": 0.1}
    recipes = {
        "emmet_seq, early stop": Configuration("emmet_seq", gently),
        "rome_original": Configuration("rome_original", published),
        "memit": Configuration("memit"),
        "emmet_seq": Configuration("emmet_seq"),
        "memit_seq": Configuration("memit_seq"),
        "rome": Configuration("rome"),
        "emmet": Configuration("emmet"),
        "alphaedit": Configuration("alphaedit"),
        "encore": Configuration("encore"),
        "memit, early stop": Configuration("memit", gently),
    }
    if experiment == "recipes":
        return recipes
    if experiment == "regularizers":
        rules = ("rect:0.4", "prune:1.2", "norm:2")
        return {
            f"{name} {rule}": Configuration(name, {"regularizer": rule})
            for name in ("memit", "emmet")
            for rule in ("none", *rules)
        }
    guarded = {
        f"{name}, {guard or 'no guard'}": Configuration(name, chosen.changes, guard)
        for name in ("rome_original", "memit", "emmet_seq")
        for chosen in (recipes[name],)
        for guard in (None, "refuse", "shrink")
    }
    return guarded


@dataclass(frozen=True)
class Task:
    """One configuration's run; made of plain data, for another process."""

    name: str
    configuration: Configuration
    family: str
    edits: int
    one_word: int
    seed: int
    """Of the stream."""
    every: int
    at_most: int
    stop_below: float
    deadline: float
    """By the clock; no step begins after it."""
    statistics: Path
    out: Path


def run(task: Task) -> tuple[str, list[dict[str, Any]]]:
    """Runs a task in this process; its name and checkpoints."""
    import torch

    torch.set_num_threads(1)
    from benchmarks.report import machine, versions
    from covariance_cache import StatisticsStore
    from unified_edit.demo import load
    from unified_edit.evaluate.sequential import Plan, run_sequence
    from unified_edit.evaluate.stream import world_stream
    from unified_edit.evaluate.world import World
    from unified_edit.guard import OFF, Guard
    from unified_edit.model.perplexity import Canary
    from unified_edit.recipes import matching_preset, recipe
    from unified_edit.session import EditSession

    world = World.load(WORLD / "data")
    model, tokenizer = load(WORLD / task.family)
    chosen = recipe(
        task.configuration.recipe,
        matching_preset(model.config),
        **task.configuration.changes,
    )
    statistics = StatisticsStore(task.statistics).load(model, chosen.layers, tokenizer)
    stream = world_stream(
        world, task.edits, seed=task.seed, one_word_every=task.one_word
    )
    on_limit = task.configuration.guard
    guard = OFF if on_limit is None else Guard(on_limit=on_limit)  # type: ignore[arg-type]
    canary = Canary.of(tokenizer, stream.canary)
    saved = task.out / "session.safetensors"
    session = (
        EditSession.resume(saved, model, tokenizer, statistics, canary=canary)
        if saved.exists()
        else EditSession.begin(
            model, tokenizer, chosen, statistics, guard=guard, canary=canary
        )
    )
    found = run_sequence(
        session,
        stream.records,
        Plan(every=task.every, at_most=task.at_most, stop_below=task.stop_below),
        task.out,
        probes=stream.probes,
        canary=Canary.of(tokenizer, stream.texts),
        about={
            "name": task.name,
            "model": f"examples/tinyworld/{task.family}",
            "records": {"file": "world_stream", "count": task.edits},
            "one_word_every": task.one_word,
            "stream_seed": task.seed,
            "machine": machine(),
            "versions": versions(),
        },
        seconds=max(0.0, task.deadline - time.time()),
    )
    return task.name, found


def spent(run: Run) -> dict[str, float]:
    """Seconds of a run's step, by stage."""
    found: dict[str, float] = {}
    for step in run.steps:
        for stage, seconds in step["seconds"].items():
            found[stage] = found.get(stage, 0.0) + seconds / len(run.steps)
    return found


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Edits held, onsets and what was left of skills, for each configuration."""
    from unified_edit.evaluate.onset import held
    from unified_edit.evaluate.runs import refused

    names = ("held", "held_with_skills", "onsets", "last", "curves")
    answer: dict[str, Any] = {name: {} for name in names}
    answer["not_ended"] = []
    for run in runs:
        name, holding = run.name, held(run.edits, run.mean("earlier.s"), AT_LEAST)
        curves: dict[str, Any] = {
            "edits": run.edits,
            "s": run.mean("earlier.s"),
            "rewrite_accuracy": run.mean("earlier.rewrite_accuracy"),
            "unrelated": run.mean("unrelated"),
            "skills": run.skills(),
            "drift": run.drift(),
        }
        skills = curves["skills"]
        able = held(run.edits, skills, skills[0] - SKILLS_DROP)
        answer["held"][name] = holding.edits
        answer["held_with_skills"][name] = min(holding.edits, able.edits)
        if not holding.ended:
            answer["not_ended"].append(name)
        answer["onsets"][name] = [run.found.forgetting, run.found.collapse]
        answer["curves"][name] = curves
        answer["last"][name] = {
            **{key: curves[key][-1] for key in ("edits", "s")},
            "skills_before": skills[0],
            "skills_held": skills[run.edits.index(holding.edits)],
            **{key: curves[key][-1] for key in ("skills", "unrelated", "drift")},
            "refused": refused(run.steps),
        }
    return answer


def compared(answer: dict[str, Any]) -> dict[str, Any]:
    """The best of our configurations against ROME's published code and plain MEMIT."""
    published = ("rome_original", "memit")
    ours = {name: n for name, n in answer["held"].items() if name not in published}
    best = max(ours, key=lambda name: (ours[name], answer["last"][name]["s"] or 0.0))
    last = answer["last"][best]
    return {
        "best": best,
        "best_over_rome_original": ours[best] / max(1, answer["held"]["rome_original"]),
        "best_over_memit": ours[best] / max(1, answer["held"]["memit"]),
        "skills_drop": last["skills_before"] - last["skills_held"],
    }


def measure(
    arguments: argparse.Namespace, runs: Path, statistics: Path, console: Console
) -> None:
    """Runs the configurations, two at a time; what is in `runs` is gone on with."""
    from covariance_cache import StatisticsStore
    from unified_edit.demo import load, world_statistics
    from unified_edit.evaluate.world import World
    from unified_edit.options import parse_settings
    from unified_edit.recipes import matching_preset

    chosen = configurations(arguments.experiment)
    if arguments.configurations:
        chosen = {name: chosen[name] for name in arguments.configurations}
    elif arguments.experiment == "recipes" and not arguments.full:
        chosen = {name: chosen[name] for name in list(chosen)[:4]}
    if arguments.set:
        changes = parse_settings(arguments.set)
        chosen = {
            " ".join((name, *arguments.set)): replace(
                each, changes={**each.changes, **changes}
            )
            for name, each in chosen.items()
        }
    runs.mkdir(parents=True, exist_ok=True)
    store = StatisticsStore(statistics)
    model, tokenizer = load(WORLD / arguments.family)
    preset = matching_preset(model.config)
    assert preset is not None
    world = World.load(WORLD / "data")
    for each in world_statistics(
        model, tokenizer, world, preset, progress=False
    ).values():
        store.save(each)
    minutes = 1e6 if arguments.full else arguments.minutes
    deadline = time.time() + 60 * minutes
    tasks = [
        Task(
            name,
            configuration,
            arguments.family,
            arguments.edits,
            arguments.one_word,
            arguments.seed,
            arguments.every,
            arguments.at_most,
            0.5 if arguments.full else AT_LEAST,
            deadline,
            statistics,
            runs / name.replace(" ", "-").replace(",", "").replace(":", ""),
        )
        for name, configuration in chosen.items()
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        for name, checkpoints in pool.map(run, tasks):
            console.print(f"{name}: {checkpoints[-1]['edits']} edits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--experiment",
        choices=("recipes", "regularizers", "guard"),
        default="recipes",
    )
    parser.add_argument("--family", default="gpt2")
    parser.add_argument("--edits", type=int, default=4000)
    parser.add_argument("--one-word", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0, help="Of the stream.")
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--at-most", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=23.0)
    parser.add_argument("--configurations", nargs="+")
    parser.add_argument(
        "--set", nargs="+", default=[], help="Settings, key=value, in each of them."
    )
    parser.add_argument("--runs", type=Path, help="Folder that keeps the runs.")
    parser.add_argument("--full", action="store_true")
    parser.add_argument(
        "--summarize", action="store_true", help="Only read what --runs holds."
    )
    arguments = parser.parse_args()
    console = Console(stderr=arguments.json, width=140)
    begun = time.perf_counter()
    # Before torch is loaded, here and in the processes that inherit it.
    os.environ["OMP_NUM_THREADS"] = "1"
    from benchmarks.report import print_json, processor, versions
    from unified_edit.evaluate.runs import read_runs

    with tempfile.TemporaryDirectory() as temporary:
        runs = arguments.runs or Path(temporary) / "runs"
        if not arguments.summarize:
            measure(arguments, runs, Path(temporary) / "statistics", console)
        found = read_runs(runs)
    answer, seconds = summary(found), {run.name: spent(run) for run in found}
    if {"rome_original", "memit"} < seconds.keys():
        answer = {**compared(answer), **answer}
    answer |= {
        "seconds_per_step": seconds,
        "overhead": {
            name: sum(each.values()) / each["targets"] - 1
            for name, each in seconds.items()
        },
        "seconds": time.perf_counter() - begun,
        "machine": f"{processor()}, 2 processes of one thread",
        "versions": versions(),
    }
    table = Table(title=f"{arguments.family}: edits held at S ≥ {AT_LEAST}")
    for column in (
        *("configuration", "held", "forgetting", "collapse", "edits", "S", "skills"),
        *("unrelated", "drift", "refused"),
    ):
        table.add_column(column, justify="right")
    for name, last in answer["last"].items():
        open_end = "≥ " if name in answer["not_ended"] else ""
        forgetting, collapse = answer["onsets"][name]
        table.add_row(
            name,
            f"{open_end}{answer['held'][name]}",
            *("–" if each is None else str(each) for each in (forgetting, collapse)),
            str(last["edits"]),
            f"{last['s']:.3f}",
            f"{last['skills']:.3f}",
            f"{last['unrelated']:.3f}",
            f"{last['drift']:.2f}",
            str(last["refused"]),
        )
    console.print(table)
    if arguments.json:
        print_json(answer)


if __name__ == "__main__":
    main()
