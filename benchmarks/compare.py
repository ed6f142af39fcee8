"""All editors, closed-form and not, on the same records, metrics and model.

    python benchmarks/compare.py [--json] [--family gpt2] [--records 200]
        [--editors NAME …] [--kinds single batch10 batch100 sequence] [--out FILE]
        [--mend EDITOR]

Each editor makes the records' edits one at a time on the unedited model (`single`), 10
and 100 at once, each batch on the unedited model, and one after another on the model as
it is by then (`sequence`, judged at its end on all records). Prints
`{editor}_{kind}_{es|ps|ns|s|…}`, and under `intervals` between what each mean lies (a
95 % bootstrap over records). Two editors run side by side, a thread each.

Every editor has the hyperparameters that were chosen for the embedded models on other
records: the closed-form ones their presets, MEND the editor of examples/tinyworld/mend,
which learned from other subjects, fine-tuning what benchmarks/fine_tuning.py finds.
Beside S and its parts: `entropy` (GE of 40-token texts, of 50 records), `unrelated`
(facts about other subjects still said), `skills`, `seconds_per_edit`, and
`extra_memory` (MiB by which an edit raises the process's peak; Linux tells it).
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
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unified_edit import Edit, EditResult, Record
    from unified_edit.evaluate.world import World

WORLD = Path(__file__).parents[1] / "examples" / "tinyworld"
KINDS = ("single", "batch10", "batch100", "sequence")
CLOSED = ("rome", "memit", "emmet", "alphaedit")
EDITORS = (*CLOSED, "mend", "ft", "ft_l")
"""By default; `lora` can be asked for as well."""
METRICS = ("s", "es", "ps", "ns")
FINE_TUNING: dict[str, dict[str, tuple[tuple[int, ...], dict[str, Any]]]] = {
    "gpt2": {
        "ft": ((2,), {}),
        "ft_l": ((0,), {"norm_constraint": 3e-3}),
        "lora": ((0, 1, 2, 3, 4), {"learning_rate": 5e-4}),
    },
    "llama": {
        "ft": ((4,), {}),
        "ft_l": ((0,), {"norm_constraint": 5e-3}),
        "lora": ((0, 1, 2, 3, 4), {"learning_rate": 5e-4}),
    },
}
"""Layers and settings, found by benchmarks/fine_tuning.py on records 200 to 249."""
SAMPLED = 50
UNRELATED = 100


@dataclass(frozen=True, eq=False)
class Bench:
    """A model of the world, and an editor of it."""

    world: World
    model: Any
    tokenizer: Any
    compute: Callable[[Sequence[Edit]], EditResult]
    """Edits the model as it is by now; leaves it as it is."""
    following: Callable[[Sequence[Edit]], float] | None = None
    """One step of a sequence, if the editor has its own way of it: its seconds."""


def bench(name: str, family: str, trained: Path | None = None) -> Bench:
    """An editor with all that it needs, on its model.

    Args:
        trained: MEND's editor, if not the one that ships.
    """
    from unified_edit import Mend, recipe
    from unified_edit.demo import load, world_statistics
    from unified_edit.engine import edit
    from unified_edit.evaluate.world import World
    from unified_edit.guard import OFF
    from unified_edit.model.adapter import ModelAdapter
    from unified_edit.model.prompts import generate_contexts
    from unified_edit.preparation import prepare
    from unified_edit.recipes import matching_preset
    from unified_edit.session import EditSession

    world = World.load(WORLD / "data")
    model, tokenizer = load(WORLD / family)
    if name == "mend":
        editor = Mend.load(trained or WORLD / "mend" / f"{family}.safetensors")
        return Bench(
            world,
            model,
            tokenizer,
            lambda edits: editor.edit(model, tokenizer, edits, check_base=False),
        )
    if name not in CLOSED:
        layers, changes = FINE_TUNING[family][name]
        return Bench(
            world, model, tokenizer, tuner(model, tokenizer, name, layers, changes)
        )
    preset = matching_preset(model.config)
    assert preset is not None
    chosen = recipe(name, preset)
    statistics = world_statistics(model, tokenizer, world, preset, progress=False)
    contexts = generate_contexts(ModelAdapter.of(model), tokenizer, chosen.contexts, 0)
    prepared = prepare(chosen, statistics)
    sessions: list[EditSession] = []

    def following(edits: Sequence[Edit]) -> float:
        if not sessions:
            sessions.append(
                EditSession.begin(
                    model, tokenizer, chosen, statistics, guard=OFF, contexts=contexts
                )
            )
        seconds = sessions[0].step(edits).seconds
        return seconds["targets"] + seconds["solve"]

    return Bench(
        world,
        model,
        tokenizer,
        lambda edits: edit(
            model,
            tokenizer,
            edits,
            chosen,
            statistics,
            contexts=contexts,
            prepared=prepared,
        ),
        following,
    )


def tuner(
    model: Any, tokenizer: Any, name: str, layers: Sequence[int], changes: Any
) -> Callable[[Sequence[Edit]], EditResult]:
    """Fine-tuning of a kind, with settings."""
    from unified_edit import FineTuneSettings, LoraSettings, fine_tune, lora_tune

    if name == "lora":
        low_rank = LoraSettings(**changes)
        return lambda edits: lora_tune(model, tokenizer, edits, layers, low_rank)
    dense = FineTuneSettings(**changes)
    return lambda edits: fine_tune(model, tokenizer, edits, layers, dense)


def run(task: tuple[str, str, tuple[str, ...], int, Path | None]) -> dict[str, Any]:
    """One editor's figures by key; in a process of its own."""
    import torch

    torch.set_num_threads(1)
    name, family, kinds, count, trained = task
    here = bench(name, family, trained)
    records = here.world.records[:count]
    found: dict[str, Any] = {}
    for kind in kinds:
        begun = time.perf_counter()
        if kind == "sequence":
            figures, intervals = sequence(here, records)
        else:
            size = 1 if kind == "single" else int(kind.removeprefix("batch"))
            figures, intervals = apart(here, records, size)
        figures["wall_seconds"] = time.perf_counter() - begun
        found |= {f"{name}_{kind}_{key}": value for key, value in figures.items()}
        found.setdefault("intervals", {}).update(
            {f"{name}_{kind}_{key}": value for key, value in intervals.items()}
        )
    return found


def apart(here: Bench, records: Sequence[Record], size: int) -> tuple[Any, Any]:
    """Batches of a size, each on the unedited model; figures and intervals."""
    from unified_edit import applied, evaluate_counterfact
    from unified_edit.evaluate.counterfact import CounterFactScores

    scores, other, skills, seconds, memory = [], [], [], 0.0, []
    batches = [records[i : i + size] for i in range(0, len(records), size)]
    for index, batch in enumerate(batches):
        with peak() as reading:
            result = here.compute([record.edit for record in batch])
        memory.append(reading[0])
        seconds += sum(result.report.seconds.values())
        with (
            applied(here.model, result.update) if len(result.update) else nullcontext()
        ):
            scores += evaluate_counterfact(
                here.model,
                here.tokenizer,
                batch,
                generations=False,
                sampling=_sampling() if index * size < SAMPLED else None,
            ).records
            other.append(_unrelated(here, batch, index))
            # Of single edits every eighth: each is small.
            if size > 1 or index % 8 == 0:
                skills.append(_skills(here))
    return _figures(
        CounterFactScores(tuple(scores)),
        unrelated=_mean(other),
        skills=_mean(skills),
        seconds_per_edit=seconds / len(records),
        extra_memory=max(memory),
    )


def sequence(here: Bench, records: Sequence[Record]) -> tuple[Any, Any]:
    """One edit after another; judged at the end, on all of them."""
    from unified_edit import apply, evaluate_counterfact

    seconds = 0.0
    for record in records:
        if here.following is not None:
            seconds += here.following([record.edit])
            continue
        result = here.compute([record.edit])
        seconds += sum(result.report.seconds.values())
        if len(result.update):
            apply(here.model, result.update, check_base=False)
    scores = evaluate_counterfact(
        here.model, here.tokenizer, records, generations=False
    )
    sampled = evaluate_counterfact(
        here.model,
        here.tokenizer,
        records[:SAMPLED],
        generations=False,
        sampling=_sampling(),
    )
    return _figures(
        scores,
        unrelated=_unrelated(here, records, 0),
        skills=_skills(here),
        seconds_per_edit=seconds / len(records),
        generation_entropy=sampled.mean("generation_entropy"),
    )


def _figures(scores: Any, **more: float) -> tuple[dict[str, float], dict[str, Any]]:
    found = {**scores.as_dict(), **more}
    intervals = {name: each.as_list() for name, each in scores.intervals().items()}
    found["entropy"] = found.pop("generation_entropy")
    return found, {name: intervals[name] for name in METRICS}


def _sampling() -> Any:
    from unified_edit import Sampling

    return Sampling(tokens=40)


def _skills(here: Bench) -> float:
    found = here.world.skill_scores(here.model, here.tokenizer)
    return sum(found.values()) / len(found)


def _unrelated(here: Bench, records: Sequence[Record], index: int) -> float:
    others = here.world.unrelated(records)
    stride = max(1, len(others) // UNRELATED)
    return here.world.retention(
        here.model, here.tokenizer, others[index % stride :: stride]
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@contextmanager
def peak() -> Iterator[list[float]]:
    """MiB by which the work inside raises this process's memory at its peak."""
    reading: list[float] = []
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _memory("VmRSS")
    except OSError:
        yield reading
        reading.append(float("nan"))
        return
    yield reading
    reading.append(_memory("VmHWM") - before)


def _memory(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return int(value) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--family", default="gpt2")
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--editors", nargs="+", default=EDITORS)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--mend", type=Path, help="Another editor of MEND's.")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, help="File for the figures as well.")
    arguments = parser.parse_args()
    # Before torch is loaded, here and in the processes that inherit it.
    os.environ["OMP_NUM_THREADS"] = "1"
    from rich.console import Console
    from rich.table import Table

    from benchmarks.report import print_json, processor, versions

    console = Console(stderr=arguments.json, width=140)
    begun = time.perf_counter()
    answer: dict[str, Any] = {"intervals": {}}
    tasks = [
        (
            name,
            arguments.family,
            tuple(arguments.kinds),
            arguments.records,
            arguments.mend,
        )
        for name in arguments.editors
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=context) as pool:
        for (name, *_), found in zip(tasks, pool.map(run, tasks), strict=True):
            answer["intervals"] |= found.pop("intervals")
            answer |= found
            console.print(f"{name}: done after {time.perf_counter() - begun:.0f} s")
    columns = (
        *(*METRICS, "entropy", "unrelated", "skills"),
        *("seconds_per_edit", "extra_memory"),
    )
    for kind in arguments.kinds:
        table = Table(title=f"{arguments.family}, {kind}, {arguments.records} records")
        for column in ("editor", *columns):
            table.add_column(column.replace("_", " "), justify="right")
        for name in arguments.editors:
            cells = (answer.get(f"{name}_{kind}_{column}") for column in columns)
            table.add_row(name, *("" if c is None else f"{c:.3f}" for c in cells))
        console.print(table)
    answer |= {
        "family": arguments.family,
        "records": arguments.records,
        "seconds": time.perf_counter() - begun,
        "machine": f"{processor()}, {arguments.processes} processes of one thread",
        "versions": versions(),
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
    if arguments.json:
        print_json(answer)


if __name__ == "__main__":
    main()
