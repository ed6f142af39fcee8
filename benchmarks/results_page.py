"""Plots of docs/results.md, from the files of benchmarks/results.

    python benchmarks/results_page.py

Writes results-sequences.png, results-batches.png and results-editors.png in docs, and
prints the tables that stand in docs/results.md.
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
KINDS = {
    "single": "single edits",
    "batch10": "batches of 10",
    "batch100": "batches of 100",
    "sequence": "200 in sequence",
}
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


def editors_of(result: dict[str, Any]) -> list[str]:
    """Those that were compared, in the order they were."""
    return [
        key.removesuffix("_single_s") for key in result if key.endswith("_single_s")
    ]


def plot_editors(results: dict[str, dict[str, Any]]) -> None:
    """ES, PS, NS and S of every editor, a panel for each model and kind."""
    figure, panels = plt.subplots(
        len(results), len(KINDS), figsize=(10, 2.6 * len(results)), squeeze=False
    )
    for row, (family, result) in zip(panels, results.items(), strict=True):
        names = editors_of(result)
        for axes, (kind, title) in zip(row, KINDS.items(), strict=True):
            for place, metric in enumerate(("es", "ps", "ns", "s")):
                for index, name in enumerate(names):
                    key = f"{name}_{kind}_{metric}"
                    if key not in result:
                        continue
                    low, high = result["intervals"][key]
                    axes.errorbar(
                        result[key],
                        index + 0.18 * (place - 1.5),
                        xerr=[[result[key] - low], [high - result[key]]],
                        color=COLOURS[place] if metric != "s" else "black",
                        marker=MARKERS[place],
                        markersize=4,
                        linewidth=0.8,
                        linestyle="none",
                        label=metric.upper() if index == 0 else None,
                    )
            axes.set_xlim(-0.04, 1.04)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_yticks(range(len(names)), names if axes is row[0] else [])
            axes.set_title(f"{family}, {title}", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.25)
    panels[0, 0].legend(fontsize=6, loc="upper left", framealpha=0.9)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "results-editors.png", dpi=130)
    plt.close(figure)


def editors_table(result: dict[str, Any], kind: str) -> list[str]:
    """Markdown of one kind of the comparison of editors."""
    lines = [
        "| editor | S | ES | PS | NS | entropy | unrelated | skills | s per edit "
        "| memory, MiB |",
        "|---" * 10 + "|",
    ]
    for name in editors_of(result):
        key = f"{name}_{kind}"
        if f"{key}_s" not in result:
            continue
        low, high = result["intervals"][f"{key}_s"]
        cells = [f"{result[f'{key}_s']:.3f} ({low:.2f}–{high:.2f})"]
        cells += [f"{result[f'{key}_{part}']:.3f}" for part in ("es", "ps", "ns")]
        cells.append(f"{result[f'{key}_entropy']:.2f}")
        cells += [f"{result[f'{key}_{part}']:.3f}" for part in ("unrelated", "skills")]
        cells.append(f"{result[f'{key}_seconds_per_edit']:.2f}")
        memory = result.get(f"{key}_extra_memory")
        cells.append("" if memory is None else f"{memory:.0f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def sequence_table(result: dict[str, Any]) -> list[str]:
    """Markdown of a sequence experiment."""
    lines = [
        "| configuration | edits held at S ≥ .8 | and skills within 3 points "
        "| forgetting | collapse | edits made | S | skills | unrelated | drift "
        "| refused | overhead |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, last in result["last"].items():
        open_end = "≥ " if name in result["not_ended"] else ""
        held, able = result["held"][name], result["held_with_skills"][name]
        onsets = ["–" if each is None else str(each) for each in result["onsets"][name]]
        cells = [
            *(name, f"{open_end}{held}", f"{open_end if able == held else ''}{able}"),
            *(*onsets, last["edits"], f"{last['s']:.3f}", f"{last['skills']:.3f}"),
            *(f"{last['unrelated']:.3f}", f"{last['drift']:.2f}", last["refused"]),
            f"{100 * result['overhead'][name]:.0f} %",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
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
    compared = {
        family: result
        for family in ("gpt2", "llama")
        if (result := read(f"compare-{family}")) is not None
    }
    if compared:
        plot_editors(compared)
    for family, result in compared.items():
        for kind, title in KINDS.items():
            print(f"\n{family}, {title}")
            print("\n".join(editors_table(result, kind)))


if __name__ == "__main__":
    main()
