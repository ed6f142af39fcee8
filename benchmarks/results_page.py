"""Plots of docs/results.md, from the files of benchmarks/results.

    python benchmarks/results_page.py

Writes docs/results-sequences.png and docs/results-batches.png, and prints the tables
that stand in docs/results.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Run as a script: this folder, which comes first, would hide the standard
    # library's `statistics` behind the script of that name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#666666")
MARKERS = "os^DvP*"
FILES = ("recipes-gpt2", "recipes-llama", "regularizers-gpt2", "guard-gpt2")


def read(name: str) -> dict[str, Any] | None:
    """A result file; None if it was not made."""
    path = RESULTS / f"{name}-cpu.json"
    return json.loads(path.read_bytes()) if path.exists() else None


def plot_sequences(results: dict[str, dict[str, Any]]) -> None:
    """S over edits, a panel for each experiment."""
    rows = -(-len(results) // 2)
    figure, panels = plt.subplots(
        rows, 2, figsize=(8.4, 3.4 * rows), sharey=True, squeeze=False
    )
    for axes in panels.flat[len(results) :]:
        axes.set_visible(False)
    for axes, (name, result) in zip(panels.flat, results.items(), strict=False):
        for index, (run, curve) in enumerate(result["curves"].items()):
            points = [
                (n, s) for n, s in zip(curve["edits"], curve["s"], strict=True) if n
            ]
            axes.plot(
                [n for n, _ in points],
                [s for _, s in points],
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                linestyle="-" if index < len(COLOURS) else "--",
                markersize=3,
                linewidth=1.2,
                label=run,
            )
        axes.axhline(0.8, color="black", linewidth=0.8, linestyle=":")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("edits made", fontsize=8)
        axes.set_ylim(0, 1.02)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=6, loc="lower left", framealpha=0.9)
    for axes in panels[:, 0]:
        axes.set_ylabel("S over all edits so far", fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "results-sequences.png", dpi=130)
    plt.close(figure)


def plot_batches(result: dict[str, Any]) -> None:
    """S, PS and NS over batch size."""
    names = ("emmet", "memit", "memit_one_layer")
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True)
    for axes, metric in zip(panels, ("s", "ps", "ns"), strict=True):
        for index, name in enumerate(names):
            sizes = sorted(
                int(key[len(name) + 1 : -len(metric) - 1])
                for key in result
                if key.startswith(f"{name}_")
                and key.endswith(f"_{metric}")
                and key[len(name) + 1 : -len(metric) - 1].isdigit()
            )
            keys = [f"{name}_{size}_{metric}" for size in sizes]
            axes.plot(
                sizes,
                [result[key] for key in keys],
                color=COLOURS[index],
                marker=MARKERS[index],
                markersize=4,
                label=name.replace("_", " ", 1).replace("_", " "),
            )
            axes.fill_between(
                sizes,
                [result[f"{key}_low"] for key in keys],
                [result[f"{key}_high"] for key in keys],
                color=COLOURS[index],
                alpha=0.15,
                linewidth=0,
            )
        axes.set_xscale("log", base=4)
        axes.set_xticks([1, 4, 16, 64, 256, 1024], [1, 4, 16, 64, 256, 1024])
        axes.set_title(metric.upper(), fontsize=9)
        axes.set_xlabel("edits of a batch", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "results-batches.png", dpi=130)
    plt.close(figure)


def sequence_table(result: dict[str, Any]) -> list[str]:
    """Markdown of a sequence experiment."""
    lines = [
        "| configuration | edits held at S ≥ .8 | forgetting | collapse | edits made "
        "| S | skills | unrelated | drift | refused | overhead |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, last in result["last"].items():
        open_end = "≥ " if name in result["not_ended"] else ""
        onsets = ["–" if each is None else str(each) for each in result["onsets"][name]]
        lines.append(
            f"| {name} | {open_end}{result['held'][name]} | {onsets[0]} | {onsets[1]} "
            f"| {last['edits']} | {last['s']:.3f} | {last['skills']:.3f} "
            f"| {last['unrelated']:.3f} | {last['drift']:.2f} | {last['refused']} "
            f"| {100 * result['overhead'][name]:.0f} % |"
        )
    return lines


def main() -> None:
    found = {name: result for name in FILES if (result := read(name)) is not None}
    if found:
        plot_sequences(found)
    for name, result in found.items():
        print(f"\n{name}")
        print("\n".join(sequence_table(result)))
    batches = read("batches-gpt2")
    if batches is not None:
        plot_batches(batches)
        print("\nbatches")
        columns = ("s", "es", "ps", "ns", "same_subject", "unrelated", "skills")
        print("| recipe | edits | " + " | ".join(columns) + " |")
        print("|---" * (len(columns) + 2) + "|")
        for name in ("emmet", "memit", "memit_one_layer"):
            for size in (1, 4, 16, 64, 256, 1024):
                key = f"{name}_{size}"
                if f"{key}_s" not in batches:
                    if batches["refused"].get(key):
                        print(f"| {name} | {size} | refused |" + " |" * 6)
                    continue
                values = [batches[f"{key}_{column}"] for column in columns]
                cells = (f"{value:.3f}" for value in values)
                print(f"| {name} | {size} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
