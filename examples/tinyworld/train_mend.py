"""Trains the embedded models' MEND editors.

    python examples/tinyworld/train_mend.py gpt2        # half an hour on one core
    python examples/tinyworld/train_mend.py llama
    python examples/tinyworld/train_mend.py gpt2 --neighbors 0 --out FILE

The edits are about the subjects that no record of `data/records.json` is about, so that
records 0 to 199 can judge; records 200 to 249 stop the training. The unrelated text is
`data/corpus.txt`, and for every other edit a fact about a neighbour (with `--neighbors
0` none, as published: then other subjects get the edit's object, too). Interrupted, the
same command goes on from `runs/`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from unified_edit.baselines.mend import MendSettings
from unified_edit.baselines.mend_training import TrainingSettings, train_mend
from unified_edit.demo import load
from unified_edit.evaluate.stream import world_records
from unified_edit.evaluate.world import World

HERE = Path(__file__).parent
RECORDS = 6000
VALIDATION = slice(200, 250)
EDITOR = MendSettings(rank=64)
SETTINGS = TrainingSettings(
    steps=4000,
    edits=10,
    accumulate=1,
    learning_rate=1e-4,
    patience=1000,
    tokens=24,
    neighbors=0.5,
)
"""Far fewer than the published steps on a model a five-hundredth of GPT2-XL's size,
hence the larger rate; ten edits share a pass instead of ten passes a step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=("gpt2", "llama"))
    parser.add_argument("--neighbors", type=float, default=SETTINGS.neighbors)
    parser.add_argument("--steps", type=int, default=SETTINGS.steps)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    family, share = arguments.family, arguments.neighbors
    world = World.load(HERE / "data")
    model, tokenizer = load(HERE / family)
    judged = {record.edit.subject for record in world.records}
    others = sorted({subject for subject, _, _ in world.facts} - judged)
    runs = HERE / "runs"
    runs.mkdir(exist_ok=True)
    state = runs / f"{family}-mend-{share:g}.safetensors"
    editor = train_mend(
        model,
        tokenizer,
        world_records(world, others, RECORDS),
        world.records[VALIDATION],
        world.corpus.read_text(encoding="utf-8").split("\n\n"),
        replace(SETTINGS, neighbors=share, steps=arguments.steps),
        EDITOR,
        state=state,
        progress=True,
    )
    path = editor.save(arguments.out or HERE / "mend" / f"{family}.safetensors")
    state.unlink(missing_ok=True)
    print(f"wrote {path}: {editor.about['best']}")


if __name__ == "__main__":
    main()
