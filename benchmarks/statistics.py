"""What `covariance_cache.collect` costs, and how exact its sums are.

    python benchmarks/statistics.py [--json] [--rounds 3] [--cases …] [--device cuda]

All times of a case are taken in this one process: rounds of every kind of work by
turns, once everything is warm; figures are of medians. Where `spread` (the slowest of
some work's repetitions ÷ their median) is far from 1, something else ran on the machine
and the case's ratios mean little. With `--json` one flat object is printed: the worst
of all cases, and `CASE_FIGURE` for each. The figures:

`five_layers_ratio`: one pass for each of five layers in the plain way
(`plain_statistics.py`) ÷ `collect` of all five, both for ten tokens a dimension.
`flops_ratio`: the same in FLOPs, a triangle for ours: what a faster machine comes to.
`own_passes_ratio`: five `collect` of one layer ÷ one of five, without reports.
`overhead_ratio`: `collect` as users call it ÷ (a forward stopped at the last layer, on
windows tokenized beforehand + one bare XᵀX for each layer and batch, on tensors of the
keys' shape).
`peak_over_bound`: peak resident memory of `collect` over the loaded model ÷ (4 L d_key²
bytes + what the stopped forward alone peaks at over the loaded model + 200 MB), each in
a process of its own. Peaks are the kernel's (VmHWM, set back once the model is there).
`max_relative_error`: of the mean against float64, Frobenius: over 2 million keys such
as models have (`accuracy`), and over keys of each model.

What costs the same for each batch is measured on few of them (`few_tokens`), and
`collect` of GPT-2's shape on a fifth of its tokens (`part_tokens`): its passes are
scaled up to `tokens`, its report, which does not depend on their number, is not.
`--full` measures all on all tokens, within an hour or so.

`--device cuda` measures Llama-3-8B's shape instead: its first nine layers, random
weights. `--tiny` runs any of it in seconds, on the CPU, with figures that mean nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Run as a script: this folder, which comes first, would hide the standard
    # library's `statistics` behind this very file.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import gc
import io
import json
import math
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import median
from typing import Any

import torch
from rich.console import Console
from scipy.linalg import blas
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, GPT2Config, LlamaConfig

from benchmarks.models import LLAMA_3_8B, random_model
from benchmarks.plain_statistics import plain_moments, stopped_forward
from benchmarks.report import (
    figures_table,
    machine,
    print_json,
    product_rate,
    timed,
    versions,
)
from covariance_cache import SecondMomentAccumulator, collect
from covariance_cache.corpus import Documents, TextFile, packed_windows
from covariance_cache.modules import key_modules
from unified_edit.demo import load

WORLD = Path(__file__).resolve().parents[1] / "examples" / "tinyworld"
CORPUS = WORLD / "data" / "corpus.txt"
ALLOWANCE = 200e6
"""Bytes over sums and activations that a collection may take."""
# Hours for 44M tokens (100 000 articles), as the authors give them.
PUBLISHED_HOURS = {"published_gptj_hours": 36.0, "published_llama2_7b_hours": 40.0}
PUBLISHED_TOKENS = 44e6
# Reported as the worst over all cases: the smallest of these, the largest of those.
FALLING = ("five_layers_ratio", "own_passes_ratio")
GROWING = ("overhead_ratio", "peak_over_bound", "max_relative_error")


@dataclass(frozen=True, eq=False)
class Case:
    """One model, the layers that an edit needs, and the text."""

    name: str
    model: Any
    tokenizer: Any
    layers: Sequence[int]
    window: int
    texts: Any = CORPUS
    batch_size: int = 16
    part: int | None = None
    """Positions that `collect` reads; None for all."""
    few: int | None = None
    """Positions for what costs the same for each batch; None for all."""
    device: str = "cpu"

    @cached_property
    def modules(self) -> list[nn.Module]:
        """The down-projections."""
        names = key_modules(self.model, self.layers).values()
        return [self.model.get_submodule(name) for name in names]

    @cached_property
    def d_key(self) -> int:
        keys = stopped_forward(self.model, self.modules[0], self.batches(1)[0])
        return keys.shape[-1]

    @property
    def tokens(self) -> int:
        """The default budget of `collect`."""
        return 10 * self.d_key

    def collect(self, tokens: int, layers: Sequence[int] = (), **settings: Any) -> Any:
        """As users call it, its bar drawn into a string."""
        with contextlib.redirect_stderr(io.StringIO()):
            return collect(
                self.model,
                self.tokenizer,
                self.texts,
                layers or self.layers,
                tokens=tokens,
                window=self.window,
                batch_size=self.batch_size,
                **settings,
            )

    def windows(self, tokens: int) -> list[list[int]]:
        """The windows that `collect` reads."""
        found = packed_windows(
            self.tokenizer,
            Documents(self.texts, seed=0),
            length=self.window,
            budget=tokens,
        )
        return [each.ids for each in found]

    def batches(self, tokens: int) -> list[Tensor]:
        """Those windows as `collect` joins them: the last may be shorter, and alone."""
        windows = self.windows(tokens)
        whole = [each for each in windows if len(each) == self.window]
        rest = [each for each in windows if len(each) < self.window]
        groups = [
            whole[start : start + self.batch_size]
            for start in range(0, len(whole), self.batch_size)
        ]
        groups += [rest] if rest else []
        return [torch.tensor(group, device=self.device) for group in groups]


def embedded(family: str) -> Case:
    """A model of the embedded world, all five layers."""
    model, tokenizer = load(WORLD / family)
    return Case(f"embedded_{family}", model, tokenizer, range(5), 64)


def gpt2_small_shape(name: str, layers: Sequence[int]) -> Case:
    """GPT-2 of 12 layers with the embedded world's words. A part of two tokens a
    dimension, so that half of it can be solved with, as in a whole collection."""
    tokenizer = AutoTokenizer.from_pretrained(WORLD / "gpt2")
    config = GPT2Config(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = random_model(config, "cpu", torch.float32)
    return Case(name, model, tokenizer, layers, 128, part=6144, few=2048)


def llama_8b_shape(device: str) -> Case:
    """The first nine layers of Llama-3-8B's shape with the embedded world's words; the
    text four times over, which is more than ten tokens a dimension."""
    tokenizer = AutoTokenizer.from_pretrained(WORLD / "llama")
    config = LlamaConfig(**LLAMA_3_8B | {"num_hidden_layers": 9})
    model = random_model(config, device, torch.bfloat16)
    texts = list(TextFile(CORPUS)) * 4
    layers = range(4, 9)
    return Case("llama_8b_shape", model, tokenizer, layers, 128, texts, device=device)


def tiny(name: str) -> Case:
    """Any case's code in no time."""
    kind = "llama" if "llama" in name else "gpt2"
    tokenizer = AutoTokenizer.from_pretrained(WORLD / kind)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": 0}
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), **ends}
    config: Any
    if kind == "llama":
        sizes |= {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 5}
        config = LlamaConfig(**sizes, num_key_value_heads=1, intermediate_size=48)
    else:
        config = GPT2Config(**sizes, n_embd=16, n_head=2, n_layer=5, n_positions=64)
    dtype = torch.bfloat16 if name == "llama_8b_shape" else torch.float32
    model = random_model(config, "cpu", dtype)
    case = Case(name, model, tokenizer, range(5), 16, batch_size=4)
    shaped = name.startswith("gpt2_small_shape")
    return replace(case, part=128, few=64) if shaped else case


def works_of(case: Case, part: int, few: int) -> dict[str, Callable[[], Any]]:
    """What is timed, on so many tokens; see `Case`."""
    batches, last = case.batches(few), case.modules[-1]
    keys = [torch.randn(batches[0].numel(), case.d_key) for _ in case.layers]

    def bare_products() -> None:
        for batch in batches:
            for each in keys:
                each = each[: batch.numel()]
                each.T @ each

    def products() -> None:
        sums = [SecondMomentAccumulator(case.d_key) for _ in case.layers]
        for batch in batches:
            for each, total in zip(keys, sums, strict=True):
                total.update(each[: batch.numel()])

    return {
        "collect": lambda: case.collect(part),
        "without_report": lambda: case.collect(part, probes=0),
        "published": lambda: plain_moments(case.model, case.modules, batches),
        "own_passes": lambda: [
            case.collect(few, layers=[layer], probes=0) for layer in case.layers
        ],
        "forward": lambda: [stopped_forward(case.model, last, x) for x in batches],
        "bare_products": bare_products,
        "tokenization": lambda: case.windows(few),
        "products": products,
    }


def measure(case: Case, rounds: int) -> dict[str, float]:
    """Ratios of a case on the CPU, and where the time of `collect` goes."""
    tokens, part, few = case.tokens, case.part or case.tokens, case.few or case.tokens
    warm = works_of(case, 2 * case.window, 2 * case.window)
    taken, spread = medians(warm, works_of(case, part, few), rounds, case.device)
    # The report costs the same for any number of tokens; all else grows with it.
    report = taken["collect"] - taken["without_report"]
    seconds = {
        name: value * tokens / (part if name == "without_report" else few)
        for name, value in taken.items()
        if name != "collect"
    }
    whole = seconds["without_report"] + report
    bare = seconds["forward"] + seconds["bare_products"]
    parts = {name: seconds[name] for name in ("tokenization", "forward", "products")}
    parts["report"] = report
    parts["rest"] = whole - sum(parts.values())
    one_window = case.batches(case.window)
    published = flops(lambda: plain_moments(case.model, case.modules, one_window))
    return {
        "five_layers_ratio": seconds["published"] / whole,
        "own_passes_ratio": seconds["own_passes"] / seconds["without_report"],
        "overhead_ratio": whole / bare,
        "overhead_ratio_without_report": seconds["without_report"] / bare,
        "tokens_per_second": tokens / whole,
        "seconds": whole,
        **{f"{name}_share": value / whole for name, value in parts.items()},
        "published_seconds": seconds["published"],
        "forward_seconds": seconds["forward"],
        "bare_products_seconds": seconds["bare_products"],
        "tokens": tokens,
        "part_tokens": part,
        "few_tokens": few,
        "flops_ratio": published / case.window / needed_flops(case),
        "max_relative_error": error_on_text(
            case, min(few, 4 * case.batch_size * case.window)
        ),
        "spread": spread,
    }


def error_on_text(case: Case, tokens: int) -> float:
    """The largest relative error, Frobenius, of what `collect` finds in a text: against
    the plain way in float64, which also shows that both do the same work."""
    found = case.collect(tokens, probes=0).values()
    batches = case.batches(tokens)
    expected = plain_moments(case.model, case.modules, batches, torch.float64)
    return max(
        relative(each.second_moment, exact)
        for each, exact in zip(found, expected, strict=True)
    )


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖, in float64 by rows."""
    pairs = list(
        zip(torch.split(found, 1024), torch.split(expected, 1024), strict=True)
    )
    wrong = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return math.sqrt(wrong / sum(float(b.double().square().sum()) for _, b in pairs))


def medians(
    warm: Mapping[str, Callable[[], Any]],
    works: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: str,
) -> tuple[dict[str, float], float]:
    """Seconds of each kind of work, the median of rounds of all by turns, once all that
    is to warm up was done; and how many times its median the slowest repetition took,
    for the worst of them."""
    for work in warm.values():
        work()
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            taken[name].append(timed(work, device)[0])
    middle = {name: median(values) for name, values in taken.items()}
    spread = max(max(values) / middle[name] for name, values in taken.items())
    return middle, spread


def accuracy(tokens: int) -> dict[str, float]:
    """Errors of the accumulator's mean over so many keys of 768 dimensions, and over a
    quarter of them rounded to bfloat16, against LAPACK's own sums in float64."""
    found = {}
    for name, dtype, count in (
        ("", torch.float32, tokens),
        ("_bf16", torch.bfloat16, tokens // 4),
    ):
        frobenius, diagonal = errors(count, 768, dtype)
        found[f"max_relative_error{name}"] = frobenius
        found[f"diagonal_relative_error{name}"] = diagonal
    return found


def errors(count: int, width: int, dtype: torch.dtype) -> tuple[float, float]:
    """Relative error of the mean, Frobenius and the largest on the diagonal."""
    ours = SecondMomentAccumulator(width)
    exact = torch.zeros(width, width, dtype=torch.float64).T.numpy()
    for keys in likely_keys(count, width):
        keys = keys.to(dtype)
        ours.update(keys)
        wide = keys.double().numpy().T
        exact = blas.dsyrk(1.0, wide, beta=1.0, c=exact, lower=1, overwrite_c=1)
    triangle = torch.from_numpy(exact).tril() / count
    expected = triangle + triangle.tril(-1).T
    mean = ours.freeze()[0].double()
    wrong = (mean - expected).diagonal().abs() / expected.diagonal()
    return relative(mean, expected), float(wrong.max())


def likely_keys(count: int, width: int, block: int = 16384) -> Iterator[Tensor]:
    """Keys such as a model has: GELU of Gaussians around a mean, every 97th dimension a
    hundred times larger, every 128th row (a first position) far off in some others."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(width, generator=generator) * 0.5
    scale = torch.ones(width)
    scale[::97] = 100
    first = torch.zeros(width)
    first[::61] = 300 * torch.randn(len(first[::61]), generator=generator)
    for start in range(0, count, block):
        size = min(block, count - start)
        keys = torch.randn(size, width, generator=generator).add_(mean)
        keys = nn.functional.gelu(keys).mul_(scale)
        keys[::128] += first
        yield keys


def memory(small: bool) -> dict[str, float]:
    """Peaks over the loaded model of two fresh processes."""
    found: dict[str, dict[str, float]] = {}
    for work in ("collect", "forward"):
        command = [sys.executable, __file__, "--peak", work, *["--tiny"] * small]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        found[work] = json.loads(output)
    layers, width = found["collect"]["layers"], found["collect"]["d_key"]
    sums = 4 * layers * width**2
    activations = found["forward"]["peak"]
    peak = found["collect"]["peak"]
    return {
        "peak_over_bound": peak / (sums + activations + ALLOWANCE),
        "peak_mb": peak / 1e6,
        "sums_mb": sums / 1e6,
        "activations_mb": activations / 1e6,
        "kernel_counted": min(each["kernel_counted"] for each in found.values()),
    }


def peak(work: str, small: bool) -> dict[str, float]:
    """Peak of this process over the loaded model."""
    case = CASES["gpt2_small_shape"]()
    case = tiny(case.name) if small else case
    tokens = case.part or case.tokens
    batches = case.batches(tokens)
    answer = {"layers": float(len(case.layers)), "d_key": float(case.d_key)}
    gc.collect()
    with ResidentPeak() as watch:
        if work == "collect":
            case.collect(tokens)
        else:
            for each in batches:
                stopped_forward(case.model, case.modules[-1], each)
    return {**answer, "peak": watch.peak, "kernel_counted": float(watch.exact)}


class ResidentPeak:
    """The most bytes resident inside the block, over those at its start."""

    peak: float
    exact: bool
    """By the kernel; otherwise by looking every millisecond."""

    def __enter__(self) -> ResidentPeak:
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.exact = True
        except OSError:
            self.exact = False
        self._start = self._most = resident("VmRSS")
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        if not self.exact:
            self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self._most = max(self._most, resident("VmRSS"))

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self.exact:
            self._most = resident("VmHWM")
        else:
            self._watcher.join()
        self.peak = self._most - self._start


def resident(field: str) -> float:
    """A line of the process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return float(line.split()[1]) * 1024
    raise LookupError(field)


def on_device(case: Case, rounds: int, sizes: Sequence[int]) -> dict[str, float]:
    """Rates, shares, peak and error of a collection on a GPU."""
    cuda = case.device == "cuda"
    tokens, width, layers = case.tokens, case.d_key, len(case.layers)
    figures: dict[str, float] = {}
    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        stopped_forward(case.model, case.modules[-1], case.batches(1 << 14)[0])
        activations = torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        case.collect(tokens)
        most = torch.cuda.max_memory_allocated() - before
        bound = 4 * layers * width**2 + activations + ALLOWANCE
        figures |= {
            "peak_gib": most / 2**30,
            "activations_gib": activations / 2**30,
            "peak_over_bound": most / bound,
        }
    batches = case.batches(tokens)

    def forward() -> None:
        for batch in batches:
            stopped_forward(case.model, case.modules[-1], batch)

    works: dict[str, Callable[[], Any]] = {
        "collect": lambda: case.collect(tokens),
        "without_report": lambda: case.collect(tokens, probes=0),
        "forward": forward,
        "tokenization": lambda: case.windows(tokens),
    }
    for size in sizes:
        other = replace(case, batch_size=size)
        works[f"batch_{size}"] = partial(other.collect, tokens, probes=0)
    rates = [product_rate(case.device)]
    seconds, spread = medians(works, works, rounds, case.device)
    rates.append(product_rate(case.device))
    rate = median(rates)
    needed = tokens * needed_flops(case)
    report = seconds["collect"] - seconds["without_report"]
    figures |= {
        "spread": spread,
        "matmul_tflops": rate / 1e12,
        "needed_gflop_per_token": needed / tokens / 1e9,
        "tokens": tokens,
        "seconds": seconds["collect"],
        "report_seconds": report,
        "tokens_per_second": tokens / seconds["without_report"],
        "matmul_fraction": needed / seconds["without_report"] / rate,
        "matmul_fraction_with_report": needed / seconds["collect"] / rate,
        "forward_share": seconds["forward"] / seconds["collect"],
        "tokenization_share": seconds["tokenization"] / seconds["collect"],
    }
    for size in sizes:
        taken = seconds[f"batch_{size}"]
        figures[f"batch_{size}_tokens_per_second"] = tokens / taken
        figures[f"batch_{size}_matmul_fraction"] = needed / taken / rate
    passes = PUBLISHED_TOKENS / tokens * seconds["without_report"]
    figures |= {"hours_of_44m_tokens": (passes + report) / 3600, **PUBLISHED_HOURS}
    # One layer: forwards of the same shape repeat exactly, so the sums alone differ.
    alone = replace(case, layers=case.layers[-1:])
    few = 2 * case.batch_size * case.window
    figures["max_relative_error"] = error_on_text(alone, few)
    return figures


def needed_flops(case: Case) -> float:
    """FLOPs a token of what a collection cannot do without: the forward up to the last
    key, as torch counts it (attention whole), and a triangle of kkᵀ for each layer."""
    ids = case.batches(case.window)[0]
    forward = flops(lambda: stopped_forward(case.model, case.modules[-1], ids))
    return forward / ids.numel() + len(case.layers) * case.d_key**2


def flops(work: Callable[[], Any]) -> int:
    """FLOPs that torch counts."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


CASES: dict[str, Callable[[], Case]] = {
    "embedded_gpt2": partial(embedded, "gpt2"),
    "embedded_llama": partial(embedded, "llama"),
    "gpt2_small_shape": partial(gpt2_small_shape, "gpt2_small_shape", range(7, 12)),
    "gpt2_small_shape_3_7": partial(
        gpt2_small_shape, "gpt2_small_shape_3_7", range(3, 8)
    ),
}
OTHERS = ("accuracy", "memory")


def figures_of(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """A case's figures; its model is gone afterwards."""
    small = arguments.tiny
    if name == "accuracy":
        return accuracy(20_000 if small else 2_000_000)
    if name == "memory":
        return memory(small)
    if name == "llama_8b_shape":
        case = tiny(name) if small else llama_8b_shape(arguments.device)
        return on_device(case, arguments.rounds, arguments.batch_sizes)
    case = tiny(name) if small else CASES[name]()
    if arguments.full:
        case = replace(case, part=None, few=None)
    return measure(case, arguments.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    choices = [*CASES, *OTHERS]
    parser.add_argument("--cases", nargs="+", choices=choices, default=choices)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--full", action="store_true", help="no part for the whole")
    parser.add_argument("--tiny", action="store_true", help="a trial run in seconds")
    parser.add_argument("--peak", choices=["collect", "forward"], help="this process's")
    arguments = parser.parse_args()
    if arguments.peak:
        print_json(peak(arguments.peak, arguments.tiny))
        return
    console = Console(stderr=arguments.json, width=120)
    begun = time.perf_counter()
    cuda = arguments.device == "cuda"
    found = {}
    for name in ["llama_8b_shape"] if cuda else arguments.cases:
        found[name] = figures_of(name, arguments)
        console.print(figures_table(name, found[name]))
    answer: dict[str, Any] = {}
    for names, worst in ((FALLING, min), (GROWING, max)):
        for name in names:
            values = [each[name] for each in found.values() if name in each]
            if values:
                answer[name] = worst(values)
    console.print(figures_table("worst of all cases", answer))
    for name, figures in found.items():
        answer |= {f"{name}_{key}": value for key, value in figures.items()}
    answer |= {
        "seconds": time.perf_counter() - begun,
        "machine": machine("cpu" if arguments.tiny else arguments.device),
        "versions": versions(),
    }
    if arguments.json:
        print_json(answer)


if __name__ == "__main__":
    main()
