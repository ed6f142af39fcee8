"""Trains the embedded models' MEND editors.

    python examples/tinyworld/train_mend.py gpt2        # half an hour on one core
    python examples/tinyworld/train_mend.py llama

The edits are about the subjects that no record of `data/records.json` is about, so that
records 0 to 199 can judge; records 200 to 249 stop the training. The unrelated text is
`data/corpus.txt`. Interrupted, the same command goes on from `runs/`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from unified_edit.baselines.mend import MendSettings
from unified_edit.baselines.mend_training import TrainingSettings, train
from unified_edit.demo import load
from unified_edit.evaluate.stream import world_records
from unified_edit.evaluate.world import World

HERE = Path(__file__).parent
RECORDS = 6000
VALIDATION = slice(200, 250)
EDITOR = MendSettings(rank=64)
SETTINGS = TrainingSettings(
    steps=3000,
    edits=10,
    accumulate=1,
    learning_rate=3e-5,
    patience=600,
)
"""A hundredth of the published steps on a model a five-hundredth of GPT2-XL's size,
hence the larger rate; ten edits share a pass instead of ten passes a step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=("gpt2", "llama"))
    family = parser.parse_args().family
    world = World.load(HERE / "data")
    model, tokenizer = load(HERE / family)
    judged = {record.edit.subject for record in world.records}
    others = sorted({subject for subject, _, _ in world.facts} - judged)
    runs = HERE / "runs"
    runs.mkdir(exist_ok=True)
    state = runs / f"{family}-mend.safetensors"
    editor = train(
        model,
        tokenizer,
        world_records(world, others, RECORDS),
        world.records[VALIDATION],
        world.corpus.read_text(encoding="utf-8").split("\n\n"),
        SETTINGS,
        EDITOR,
        state=state,
        progress=True,
    )
    (HERE / "mend").mkdir(exist_ok=True)
    path = editor.save(HERE / "mend" / f"{family}.safetensors")
    state.unlink(missing_ok=True)
    print(f"wrote {path}: {editor.about['best']}")


if __name__ == "__main__":
    main()
