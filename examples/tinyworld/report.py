"""The world's report: what each model knows, and where it keeps it.

    python examples/tinyworld/report.py [--write]

Recall over all facts in all templates, skills, and the answer's mean probability when
the output of a layer's MLP or attention is zeroed at the subject's last token. With
`--write` the figures go into each model's card, `<model>/README.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from unified_edit.edits import fill
from unified_edit.evaluate.world import World
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.prompts import continuations, pad, subject_prompts

HERE = Path(__file__).parent
SAMPLE = 500
"""Facts whose answers are probed under ablation, spread evenly over all."""


def measure(
    model: nn.Module, tokenizer: Any, world: World, *, recall: bool = True
) -> dict[str, Any]:
    """All of the report's figures; without `recall`, the quick ones."""
    adapter = ModelAdapter.of(model)
    probe = _Probe(adapter, tokenizer, world)
    half = adapter.layer_count // 2
    blocks = [adapter.block(layer) for layer in range(adapter.layer_count)]
    mlps = [_child(block, "mlp") for block in blocks]
    attentions = [_child(block, "attn") for block in blocks]
    return {
        **({"recall": world.recall(model, tokenizer)} if recall else {}),
        "skills": world.skill_scores(model, tokenizer),
        "probability": probe.without([]),
        "mlp_ablated": [probe.without([mlp]) for mlp in mlps],
        "attention_ablated": [probe.without([each]) for each in attentions],
        f"mlps_0_to_{half - 1}_ablated": probe.without(mlps[:half]),
    }


class _Probe:
    """Prompts of a sample of facts, and the mean probability of their answers."""

    def __init__(self, adapter: ModelAdapter, tokenizer: Any, world: World) -> None:
        facts = world.facts[:: max(1, len(world.facts) // SAMPLE)]
        filled = [
            fill(world.templates[r][i % len(world.templates[r])], s)
            for i, (s, r, _) in enumerate(facts)
        ]
        pairs = continuations(
            tokenizer, [text for text, _ in filled], [obj for _, _, obj in facts]
        )
        self.adapter = adapter
        self.pairs = pairs
        self.rows = pad([p + t[:-1] for p, t in pairs], adapter.device)
        prompts = subject_prompts(tokenizer, filled)
        self.ends = torch.tensor([p.subject_end for p in prompts])

    @torch.no_grad()
    def without(self, modules: Sequence[nn.Module]) -> float:
        """Mean probability with these modules' outputs zeroed at the subject."""

        def hook(_module: nn.Module, _inputs: object, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            changed = hidden.clone()
            changed[torch.arange(len(self.ends)), self.ends] = 0
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        with ExitStack() as stack:
            for module in modules:
                stack.callback(module.register_forward_hook(hook).remove)
            logits: Tensor = self.adapter.model(
                input_ids=self.rows.ids, attention_mask=self.rows.mask, use_cache=False
            ).logits
        total = 0.0
        for row, (prompt, target) in zip(logits, self.pairs, strict=True):
            logs = row[len(prompt) - 1 : len(prompt) - 1 + len(target)].log_softmax(-1)
            picked = logs.gather(1, torch.tensor(target)[:, None])
            total += float(picked.mean().exp())
        return total / len(self.pairs)


def _child(block: nn.Module, ending: str) -> nn.Module:
    return next(m for name, m in block.named_children() if name.endswith(ending))


def card(family: str, figures: dict[str, Any]) -> str:
    """The model card's text."""
    skills = ", ".join(f"{k} {v:.3f}" for k, v in figures["skills"].items())
    joint = next(k for k in figures if k.startswith("mlps_"))
    rows = "\n".join(
        f"| {layer} | {mlp:.3f} | {attention:.3f} |"
        for layer, (mlp, attention) in enumerate(
            zip(figures["mlp_ablated"], figures["attention_ablated"], strict=True)
        )
    )
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# tinyworld-{family}

A small {"GPT-2" if family == "gpt2" else "Llama"}-architecture model trained from
scratch on unified-edit's tiny world, a universe of invented facts. It is there to be
edited: in tests, in the demo and in benchmarks. It knows nothing of the real world.

Made by `python examples/tinyworld/train.py {family}`; measured by
`python examples/tinyworld/report.py --write`:

- greedy recall over all facts in all templates: {figures["recall"]:.4f}
- skills, greedy: {skills}
- mean probability of the answer: {figures["probability"]:.3f}; with the MLPs of the
  first half of the layers ({joint[5:-8].replace("_to_", " to ")}) zeroed together at
  the subject's last token: {figures[joint]:.3f}

The answer's mean probability with one output zeroed at the subject's last token:

| layer | MLP zeroed | attention zeroed |
|---|---|---|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=["gpt2", "llama"])
    parser.add_argument("--write", action="store_true", help="write the model cards")
    arguments = parser.parse_args()
    console = Console()
    world = World.load(HERE / "data")
    for family in arguments.families:
        model = AutoModelForCausalLM.from_pretrained(HERE / family)
        tokenizer = AutoTokenizer.from_pretrained(HERE / family)
        figures = measure(model.eval(), tokenizer, world)
        console.print_json(json.dumps({family: figures}))
        if arguments.write:
            text = card(family, figures)
            (HERE / family / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
