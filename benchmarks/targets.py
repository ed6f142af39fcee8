"""How fast target values are optimised, against the plain loop, and the same values.

    python benchmarks/targets.py [--json] [--rounds 3] [--cases …] [--device cuda]

Each case is measured in this one process: rounds of the package's batch and of the
plain loop (`plain_targets.py`: one request at a time, whole prompts) by turns, and
plain matrix products between them; ratios are of medians. FLOPs are counted by torch,
padding and all; `needed` leaves padding out. Data come from the folder in
UNIFIED_EDIT_DATA (../shared/data by default).

`--published COMMAND` also runs another program on the same model, edits and contexts:
`COMMAND job.json out` must write `out.safetensors` with `values` and `seconds`, one
for each edit. It is meant for published code in an environment of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Run as a script: this folder, which comes first, would hide the standard
    # library's `statistics` behind the script of that name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import os
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, GPT2Config, LlamaConfig

from benchmarks.models import LLAMA_3_8B, random_model
from benchmarks.plain_targets import PlainTarget, plain_rows, plain_target
from benchmarks.report import (
    figures_table,
    machine,
    print_json,
    product_rate,
    timed,
    versions,
)
from unified_edit.demo import load
from unified_edit.edits import Edit, read_edits
from unified_edit.evaluate.world import World
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.descent import Targets, TargetSettings
from unified_edit.model.prompts import Contexts, generate_contexts
from unified_edit.model.rows import make_rows
from unified_edit.model.targets import optimize_targets
from unified_edit.recipes import recipe

ROOT = Path(__file__).parents[1]
WORLD = ROOT / "examples" / "tinyworld"
DATA = Path(os.environ.get("UNIFIED_EDIT_DATA", ROOT.parent / "shared" / "data"))

# What MEMIT's published code samples looks like this.
CONTEXTS = Contexts(
    (
        "{}",
        "The first time that I saw it in. {}",
        "Therefore, it was decided to build a new. {}",
        "Because of the rain, the players had to. {}",
        "I have been looking for a way to. {}",
        "You can now see what the people in the. {}",
    )
)


@dataclass(frozen=True, eq=False)
class Case:
    """One model with edits; the plain loop runs an even sample of them."""

    name: str
    model: Any
    tokenizer: Any
    edits: Sequence[Edit]
    contexts: Contexts
    layer: int
    settings: TargetSettings
    sample: Sequence[int]

    @property
    def adapter(self) -> ModelAdapter:
        return ModelAdapter.of(self.model)

    def ours(self, settings: TargetSettings | None = None) -> Targets:
        return optimize_targets(
            self.adapter,
            self.tokenizer,
            self.edits,
            self.contexts,
            self.layer,
            settings or self.settings,
        )

    def plain(self, settings: TargetSettings | None = None) -> list[PlainTarget]:
        settings = settings or self.settings
        site = self.adapter.site(settings.site, self.layer)
        found = []
        for index in self.sample:
            rows = plain_rows(
                self.tokenizer, self.edits[index], self.contexts, settings
            )
            found.append(plain_target(self.model, site, rows, settings))
        return found


def embedded(family: str, device: str) -> Case:
    """64 records of the embedded world at the recipe's layer, stopped as published
    code stops."""
    model, tokenizer = load(WORLD / family)
    model.to(device)
    chosen = recipe("emmet", f"tinyworld-{family}", loss_threshold=0.05, steps=25)
    contexts = generate_contexts(
        ModelAdapter.of(model), tokenizer, chosen.contexts, seed=0
    )
    edits = [record.edit for record in World.load(WORLD / "data").records[:64]]
    return Case(
        f"embedded_{family}",
        model,
        tokenizer,
        edits,
        contexts,
        chosen.layers[-1],
        chosen.targets,
        range(0, 64, 2),
    )


def tuned(family: str, device: str) -> Case:
    """The same with the recipe's own settings: an edit is done after some six or
    eleven steps instead of up to 25."""
    settings = recipe("emmet", f"tinyworld-{family}").targets
    case = embedded(family, device)
    return replace(case, name=f"tuned_{family}", settings=settings)


def shaped(
    name: str,
    config: Any,
    layer: int,
    edits: int,
    sample: int,
    device: str,
    steps: int = 20,
) -> Case:
    """Random weights in a published model's shape, genuine tokenizer and prompts,
    MEMIT's published settings."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = random_model(config, device, dtype)
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tokenizers" / "gpt2")
    records = read_edits(DATA / "counterfact" / "full_300.json")
    return Case(
        name,
        model,
        tokenizer,
        [records[index % len(records)] for index in range(edits)],
        CONTEXTS,
        layer,
        TargetSettings("block_output", steps=steps),
        range(0, edits, edits // sample),
    )


CASES: dict[str, Callable[[str], Case]] = {
    "embedded_gpt2": partial(embedded, "gpt2"),
    "embedded_llama": partial(embedded, "llama"),
    "tuned_gpt2": partial(tuned, "gpt2"),
    "tuned_llama": partial(tuned, "llama"),
    "gpt2_small_shape": lambda device: shaped(
        "gpt2_small_shape", GPT2Config(), 4, 32, 4, device
    ),
    "gpt2_small_shape_64": lambda device: shaped(
        "gpt2_small_shape_64", GPT2Config(), 4, 64, 1, device, steps=5
    ),
    "llama_8b_shape": lambda device: shaped(
        "llama_8b_shape", LlamaConfig(**LLAMA_3_8B), 8, 2048, 2, device
    ),
}
ON_CPU = ["embedded_gpt2", "embedded_llama", "gpt2_small_shape", "gpt2_small_shape_64"]
# Only the package runs: its share of what a matrix product reaches.
ALONE = {"gpt2_small_shape_64"}


def measure(case: Case, rounds: int, device: str) -> dict[str, float]:
    """Figures of one case."""
    case.model.requires_grad_(False)
    both = case.name not in ALONE
    ours_seconds, plain_seconds, product = [], [], []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    replace(case, edits=case.edits[:2]).ours()
    if both:
        replace(case, sample=case.sample[:1]).plain()
    for _ in range(rounds):
        product.append(product_rate(device))
        seconds, found = timed(case.ours, device)
        ours_seconds.append(seconds)
        if both:
            seconds, expected = timed(case.plain, device)
            plain_seconds.append(seconds)
    rate = statistics.median(product)
    edits = len(case.edits)
    ours = edits / statistics.median(ours_seconds)
    counted = our_flops(case, found) / edits
    needed = needed_flops(case, found) / edits
    figures = {
        "edits_per_second": ours,
        "mean_steps": float(found.steps.double().mean()),
        "gflop_per_edit": counted / 1e9,
        "needed_gflop_per_edit": needed / 1e9,
        "matmul_gflops": rate / 1e9,
        "matmul_fraction": needed * ours / rate,
        "matmul_fraction_with_padding": counted * ours / rate,
    }
    if device == "cuda":
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if both:
        plain = len(case.sample) / statistics.median(plain_seconds)
        plain_counted = plain_flops(case, expected) / len(case.sample)
        figures |= {
            "plain_edits_per_second": plain,
            "ratio": ours / plain,
            "plain_gflop_per_edit": plain_counted / 1e9,
            "flops_ratio": plain_counted / counted,
            "of_flops_ratio": ours / plain / (plain_counted / counted),
            **differences(case, found, [each.value for each in expected]),
            "same_steps": float(
                all(
                    len(each.losses) == int(found.steps[index])
                    for index, each in zip(case.sample, expected, strict=True)
                )
            ),
        }
    return figures


def differences(
    case: Case, found: Targets, expected: Sequence[torch.Tensor]
) -> dict[str, float]:
    """Of target values, and of what was added to the value before the edit."""
    values, moves, cosines = [], [], []
    for index, value in zip(case.sample, expected, strict=True):
        ours, start = found.values[index].double(), found.initial[index].double()
        theirs = value.double().cpu()
        values.append(float((ours - theirs).norm() / theirs.norm()))
        moves.append(float((ours - theirs).norm() / (theirs - start).norm()))
        cosines.append(float(torch.cosine_similarity(ours, theirs, dim=0)))
    return {
        "max_relative_difference": max(values),
        "max_relative_difference_of_delta": max(moves),
        "min_cosine": min(cosines),
    }


def needed_flops(case: Case, found: Targets) -> float:
    """What the loop cannot do without, in FLOPs: for each edit and step, suffix tokens
    × 4 × parameters above, and 4 × the head's for each position read; its last
    evaluation has no backward."""
    settings = case.settings
    rows = make_rows(
        case.tokenizer,
        case.edits,
        case.contexts,
        settings.kl_prompts,
        settings.kl_position,
    )
    adapter = case.adapter
    above = sum(
        parameter.numel()
        for layer in range(case.layer + 1, adapter.layer_count)
        for parameter in adapter.block(layer).parameters()
    )
    head = sum(parameter.numel() for parameter in adapter.head.parameters())
    total = 0.0
    for each, steps in zip(rows, found.steps.tolist(), strict=True):
        tokens = sum(len(row.suffix) for row in each)
        reads = sum(max(len(row.labels), 1) for row in each)
        total += (4 * steps - 2) * (tokens * above + reads * head)
    return total


def our_flops(case: Case, found: Targets) -> float:
    """Counted over a whole run, or over two and three steps where no edit stops
    early."""
    if bool((found.steps == case.settings.steps).all()):
        return extrapolated(case.ours, case.settings, case.settings.steps)
    with FlopCounterMode(display=False) as counter:
        case.ours()
    return float(counter.get_total_flops())


def plain_flops(case: Case, found: Sequence[PlainTarget]) -> float:
    """Counted over two and three steps, one edit at a time."""
    total = 0.0
    for index, each in zip(case.sample, found, strict=True):
        alone = replace(case, sample=[index])
        total += extrapolated(alone.plain, case.settings, len(each.losses))
    return total


def extrapolated(
    work: Callable[[TargetSettings], Any], settings: TargetSettings, steps: int
) -> float:
    """FLOPs of so many steps, each after the second costing the same."""
    counts = []
    for few in (2, 3):
        with FlopCounterMode(display=False) as counter:
            work(replace(settings, steps=few, loss_threshold=0.0))
        counts.append(counter.get_total_flops())
    return float(counts[0] + (steps - 2) * (counts[1] - counts[0]))


def published(case: Case, command: str, sample: int) -> dict[str, float]:
    """Another program's targets and edits per second, and ours on the same edits."""
    some = [case.edits[index] for index in case.sample[:sample]]
    settings = case.settings
    with tempfile.TemporaryDirectory() as folder:
        model, job, out = (Path(folder) / each for each in ("model", "job.json", "out"))
        case.model.save_pretrained(model)
        case.tokenizer.save_pretrained(model)
        job.write_text(
            json.dumps(
                {
                    "model": str(model),
                    "layer": case.layer,
                    "contexts": case.contexts.templates,
                    "edits": [
                        {
                            "template": edit.template,
                            "subject": edit.subject,
                            "target": edit.target,
                        }
                        for edit in some
                    ],
                    "steps": settings.steps,
                    "learning_rate": settings.learning_rate,
                    "clamp": settings.largest,
                    "weight_decay": settings.weight_decay,
                    "kl_factor": settings.kl_factor,
                    "threads": torch.get_num_threads(),
                }
            )
        )
        subprocess.run(
            [*shlex.split(command), job, out], check=True, stdout=subprocess.DEVNULL
        )
        theirs = load_file(f"{out}.safetensors")
    ours = replace(case, edits=some, sample=range(len(some))).ours()
    compared = replace(case, sample=range(len(some)))
    rate = 1 / float(theirs["seconds"].double().mean())
    return {
        "published_edits_per_second": rate,
        **{
            f"published_{name}": value
            for name, value in differences(
                compared, ours, list(theirs["values"])
            ).items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cases", nargs="+", choices=list(CASES))
    parser.add_argument("--published", metavar="COMMAND")
    parser.add_argument("--published-sample", type=int, default=8)
    arguments = parser.parse_args()
    device = arguments.device
    default = ["llama_8b_shape"] if device == "cuda" else ON_CPU
    console = Console(stderr=arguments.json, width=120)
    begun = time.perf_counter()
    cases: dict[str, dict[str, float]] = {}
    for name in arguments.cases or default:
        case = CASES[name](device)
        rounds = arguments.rounds - (name == "gpt2_small_shape")  # minutes each
        figures = cases[name] = measure(case, max(rounds, 1), device)
        if arguments.published and case.model.config.model_type == "gpt2":
            found = published(case, arguments.published, arguments.published_sample)
            figures |= found
            figures["published_ratio"] = (
                figures["edits_per_second"] / found["published_edits_per_second"]
            )
        console.print(figures_table(name, figures))
        del case
    answer: dict[str, Any] = {}
    ratios = {name: each["ratio"] for name, each in cases.items() if "ratio" in each}
    embedded_ratios = [r for name, r in ratios.items() if name.startswith("embedded")]
    if embedded_ratios:
        answer["embedded_batch64_ratio"] = min(embedded_ratios)
    if "gpt2_small_shape" in ratios:
        answer["gpt2_small_shape_ratio"] = ratios["gpt2_small_shape"]
    if ratios:
        answer["max_relative_difference"] = max(
            cases[name]["max_relative_difference"] for name in ratios
        )
    for name in ("gpt2_small_shape_64", "llama_8b_shape"):
        if name in cases:
            answer["matmul_fraction"] = cases[name]["matmul_fraction"]
    answer |= {
        "cases": cases,
        "seconds": time.perf_counter() - begun,
        "machine": machine(device),
        "versions": versions(),
    }
    if arguments.json:
        print_json(answer)


if __name__ == "__main__":
    main()
