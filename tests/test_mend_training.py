"""Training of a MEND editor: against a plain loop over dense weights, and that it
learns, stops, goes on where it was, and refuses what it cannot learn from."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_kit import EDITS, TEXTS, Tiny
from torch import Tensor, nn
from torch.func import functional_call

from unified_edit.baselines import mend_training
from unified_edit.baselines.mend import Mend, MendSettings
from unified_edit.baselines.mend_training import TrainingSettings, train_mend
from unified_edit.edits import Record
from unified_edit.errors import EditorError

RECORDS = [
    Record(
        edit,
        true,
        paraphrase_prompts=(
            f"Everyone says {edit.subject} likes",
            f"{edit.subject} is",
        ),
        neighborhood_prompts=("Bo Diaz lives in", "In Porto, chess was"),
    )
    for edit, true in zip(
        EDITS, ["Lyon", "Porto", "chess", "Quito", "chess"], strict=True
    )
]
EDITOR = MendSettings(layers=(1, 2), rank=4, step_size=1e-3)
SETTINGS = TrainingSettings(
    steps=4,
    edits=2,
    accumulate=2,
    learning_rate=1e-3,
    step_size_rate=1e-4,
    tokens=12,
    validate_every=2,
)


def trained(tiny: Tiny, settings: TrainingSettings = SETTINGS, **more: Any) -> Mend:
    return train_mend(
        tiny.model,
        tiny.tokenizer,
        RECORDS[:3],
        RECORDS[3:],
        TEXTS[:9],
        settings,
        EDITOR,
        **more,
    )


def ids_of(tiny: Tiny, text: str) -> list[int]:
    found: list[int] = tiny.tokenizer(text)["input_ids"]
    return found


def plain_nll(
    model: nn.Module, weights: Any, prompt: list[int], whole: list[int]
) -> Tensor:
    logits = functional_call(model, weights, (torch.tensor([whole]),)).logits[0]
    labels = torch.tensor(whole[len(prompt) :])
    return nn.functional.cross_entropy(logits[len(prompt) - 1 : -1], labels)


def plain_losses(
    tiny: Tiny, mend: Mend, record: Record, rephrased: str, piece: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """L_e and L_loc of one edit, on weights that were edited densely. The editor's maps
    of gradients are its own; what they are is tests/test_mend.py's."""
    model = tiny.model
    names = [address.tensor for address in mend.addresses]
    own = dict(model.named_parameters())
    target = record.edit.target
    batch = mend_training.labelled(
        tiny.adapter, tiny.tokenizer, [record.edit.text], [target]
    )
    found, _ = mend_training.decomposed(tiny.adapter, batch, mend.modules_edited)
    changes = mend.changes(found)
    weights = {}
    for address, module in zip(mend.addresses, mend.modules_edited, strict=True):
        dense = changes[module].delta[0].T @ changes[module].x[0]
        dense = dense.T if address.transposed else dense
        weights[address.tensor] = own[address.tensor].detach() + dense
    assert set(weights) == set(names)
    asked = ids_of(tiny, rephrased)
    wrong = plain_nll(model, weights, asked, ids_of(tiny, f"{rephrased} {target}"))
    rows = torch.tensor([piece])
    with torch.no_grad():
        before = model(rows).logits[0].log_softmax(-1)
    after = functional_call(model, weights, (rows,)).logits[0].log_softmax(-1)
    moved = nn.functional.kl_div(after, before, log_target=True, reduction="sum")
    return wrong, moved / len(piece)


def test_a_step_is_adams_on_the_losses_of_dense_weights(tiny: Tiny) -> None:
    """The job's own draws; losses, gradients, accumulation and step plainly."""
    settings = replace(SETTINGS, steps=1, validate_every=1)
    pieces = mend_training._pieces(tiny.adapter, tiny.tokenizer, TEXTS[:9], 12)
    job = mend_training._Job(
        tiny.adapter, tiny.tokenizer, RECORDS[:3], RECORDS[3:], pieces, settings
    )
    training = mend_training._Training(Mend.of(tiny.model, EDITOR), settings, "")
    with mend_training.frozen(tiny.model):
        # So that the statistics of the plain way are those of the real one.
        for records, rephrased, drawn in job.passes(0):
            with torch.no_grad():
                job.losses(training.mend, records, rephrased, drawn, observe=True)
        plain = copy.deepcopy(training.mend)
        buffers = {n: b.clone() for n, b in plain.named_buffers()}
        optimizer = torch.optim.Adam(
            [
                {"params": plain.editors.parameters(), "lr": settings.learning_rate},
                {"params": [plain.step_sizes], "lr": settings.step_size_rate},
            ]
        )
        losses = []
        for records, rephrased, drawn in job.passes(0):
            for record, said, piece in zip(records, rephrased, drawn, strict=True):
                wrong, moved = plain_losses(tiny, plain, record, said, piece)
                losses.append(0.1 * wrong + moved)
        assert len(losses) == 4
        torch.stack(losses).mean().backward()
        # The real one observes the same gradients again; as if it had not.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mend_training._Job, "losses", _unobserved)
            training.take(job)
        for name, each in training.mend.named_parameters():
            other = dict(plain.named_parameters())[name].grad
            assert each.grad is not None and other is not None, name
            torch.testing.assert_close(each.grad, other, rtol=2e-3, atol=1e-6)
        optimizer.step()
    assert all(torch.equal(b, buffers[n]) for n, b in training.mend.named_buffers())
    for name, each in training.mend.named_parameters():
        moved_by = (each - dict(plain.named_parameters())[name]).detach().abs()
        # As large as Adam's rate, but where a gradient is nearly zero.
        assert float(moved_by.median()) < 1e-6, name


_LOSSES = mend_training._Job.losses


def _unobserved(job: Any, *arguments: Any, observe: bool) -> Any:
    assert observe
    return _LOSSES(job, *arguments, observe=False)


def test_an_editor_learns_to_edit_and_to_spare(gpt2: Tiny) -> None:
    """On records that it has seen: what a random model knows of others is chance."""
    settings = replace(
        SETTINGS,
        steps=30,
        edits=3,
        accumulate=1,
        validate_every=30,
        learning_rate=2e-3,
        step_size_rate=1e-3,
        edit_weight=1.0,
    )

    def judged(steps: int, rate: float) -> dict[str, float]:
        chosen = replace(settings, steps=steps, learning_rate=rate)
        seen = RECORDS[:3]
        model, tokenizer = gpt2.model, gpt2.tokenizer
        mend = train_mend(model, tokenizer, seen, seen, TEXTS[:9], chosen, EDITOR)
        best: dict[str, float] = mend.about["best"]
        return best

    first, last = judged(1, 1e-9), judged(30, 2e-3)
    assert last["edit"] < 0.8 * first["edit"]
    assert last["edit"] + last["locality"] < 0.85 * first["edit"]


def test_the_least_validation_loss_is_returned_and_training_stops(gpt2: Tiny) -> None:
    """With a rate that wrecks the editor, the first look is the best one."""
    settings = replace(
        SETTINGS, steps=50, learning_rate=0.5, patience=4, validate_every=1
    )
    mend = trained(gpt2, settings)
    best, steps = mend.about["best"]["step"], mend.about["steps"]
    assert steps == best + 4 < 50
    assert same(mend, trained(gpt2, replace(settings, steps=best)))


def same(one: Mend, other: Mend) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


class _Interrupted(Exception):
    pass


def test_interrupted_it_goes_on_bit_for_bit(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(tiny)
    state = tmp_path / "state.safetensors"
    take = mend_training._Training.take

    def failing(self: Any, job: Any) -> None:
        if self.step == 3:
            raise _Interrupted
        take(self, job)

    monkeypatch.setattr(mend_training._Training, "take", failing)
    with pytest.raises(_Interrupted):
        trained(tiny, state=state)
    steps = []

    def counting(self: Any, job: Any) -> None:
        steps.append(self.step)
        take(self, job)

    monkeypatch.setattr(mend_training._Training, "take", counting)
    again = trained(tiny, state=state)
    assert steps == [2, 3]
    assert same(whole, again) and whole.about == again.about
    paths = [m.save(tmp_path / f"{i}") for i, m in enumerate((whole, again))]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_another_trainings_state_is_refused_and_kept(
    gpt2: Tiny, tmp_path: Path
) -> None:
    state = tmp_path / "state.safetensors"
    trained(gpt2, state=state)
    before = state.read_bytes()
    with pytest.raises(EditorError, match="another training's, with other data"):
        trained(gpt2, replace(SETTINGS, seed=1), state=state)
    state.write_bytes(before[:-10])
    with pytest.raises(EditorError, match="cannot be gone on with"):
        trained(gpt2, state=state)
    assert state.read_bytes() == before[:-10]


def test_neighbors_take_their_share_of_the_text(gpt2: Tiny) -> None:
    pieces = mend_training._pieces(gpt2.adapter, gpt2.tokenizer, TEXTS[:9], 12)

    def drawn(share: float) -> list[tuple[int, ...]]:
        settings = replace(SETTINGS, edits=3, accumulate=20, neighbors=share)
        job = mend_training._Job(
            gpt2.adapter, gpt2.tokenizer, RECORDS[:3], RECORDS[3:], pieces, settings
        )
        return [piece for *_, found in job.passes(0) for piece in found]

    facts = {
        tuple(ids_of(gpt2, f"{prompt} {record.target_true}"))[:12]
        for record in RECORDS[:3]
        for prompt in record.neighborhood_prompts
    }
    assert not set(drawn(0.0)) & facts
    assert set(drawn(1.0)) == facts
    assert 15 < sum(piece in facts for piece in drawn(0.5)) < 45


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"learning_rate": 0.0}, "must be positive"),
        ({"clip": float("nan")}, "must be positive"),
        ({"edit_weight": -1.0}, "must not be negative"),
        ({"neighbors": 1.5}, "from 0 to 1"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(EditorError, match=said):
        replace(SETTINGS, **change)


def test_what_cannot_be_learned_from_is_refused(gpt2: Tiny) -> None:
    model, tokenizer = gpt2.model, gpt2.tokenizer
    bare = replace(RECORDS[1], paraphrase_prompts=())
    alone = replace(RECORDS[1], neighborhood_prompts=())
    texts = TEXTS[:3]
    for records, judged, text, changed, said in (
        ([], RECORDS[3:], texts, {}, "no training records"),
        (RECORDS, [], texts, {}, "no validation records"),
        (
            [RECORDS[0], bare],
            RECORDS[3:],
            texts,
            {},
            "training record 1 .* no paraphrases",
        ),
        (RECORDS, [bare], texts, {}, "validation record 0 .* paraphrases"),
        (RECORDS, RECORDS, [""], {}, "no unrelated text"),
        (RECORDS, [alone], texts, {"neighbors": 0.5}, "has no neighbourhood prompts"),
    ):
        settings = replace(SETTINGS, **changed)
        with pytest.raises(EditorError, match=said):
            train_mend(model, tokenizer, records, judged, text, settings, EDITOR)


def test_a_loss_that_is_not_finite_ends_training(gpt2: Tiny) -> None:
    settings = replace(SETTINGS, steps=30, learning_rate=1e30, step_size_rate=1e30)
    with pytest.raises(EditorError, match="lower the learning rates"):
        trained(gpt2, settings)
