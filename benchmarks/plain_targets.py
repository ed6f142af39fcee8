"""The plain loop that optimises a target value, as published code has it: one request
at a time, whole prompts, every layer, logits over all positions. The oracle of
`tests/test_targets.py` and the yardstick of `benchmarks/targets.py`.

Source: Meng et al. 2022 (ROME), equation 4; Meng et al. 2023 (MEMIT), equation 16; for
the loss, its stop and its clamp, the loop of their published code. Shares nothing with
`unified_edit.model` but the settings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unified_edit.edits import Edit
from unified_edit.model.descent import TargetSettings
from unified_edit.model.prompts import Contexts


@dataclass(frozen=True)
class PlainRow:
    """One whole prompt."""

    ids: list[int]
    """With the target's tokens but for the last."""
    subject: int
    """Index of the subject's last token."""
    read: int
    """Index where the first label, or the KL term, is read."""
    labels: list[int]
    """Empty in KL rows."""


@dataclass(frozen=True, eq=False)
class PlainTarget:
    """What the loop found, and its way there."""

    value: Tensor
    initial: Tensor
    losses: list[float]
    probabilities: list[float]


def plain_rows(
    tokenizer: Any, edit: Edit, contexts: Contexts, settings: TargetSettings
) -> list[PlainRow]:
    """An edit's prompt in every context, and its KL prompts, by character offsets."""

    def encode(text: str) -> tuple[list[int], int]:
        end = text.rindex(edit.subject) + len(edit.subject)
        found = tokenizer(text, return_offsets_mapping=True)
        spans = enumerate(found["offset_mapping"])
        return found["input_ids"], max(i for i, (a, b) in spans if a < end <= b)

    rows = []
    for context in contexts.templates:
        text = context.replace("{}", edit.template.replace("{}", edit.subject))
        ids, subject = encode(text)
        labels = tokenizer(f"{text} {edit.target}")["input_ids"][len(ids) :]
        rows.append(PlainRow(ids + labels[:-1], subject, len(ids) - 1, labels))
    for prompt in settings.kl_prompts if settings.kl_factor else ():
        ids, subject = encode(prompt.replace("{}", edit.subject))
        read = subject if settings.kl_position == "subject" else len(ids) - 1
        rows.append(PlainRow(ids, subject, read, []))
    return rows


def plain_target(
    model: Any, module: nn.Module, rows: Sequence[PlainRow], settings: TargetSettings
) -> PlainTarget:
    """Optimises δ, added to a module's output at the subject in every row; the bare
    prompt's row is the first, KL rows are the last. Parameters must be without
    gradient."""
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows])
    mask = torch.tensor([[i < len(row.ids) for i in range(width)] for row in rows])
    every, subjects = torch.arange(len(rows)), torch.tensor([r.subject for r in rows])
    said = [index for index, row in enumerate(rows) if row.labels]
    stay = [index for index, row in enumerate(rows) if not row.labels]
    labels = torch.full((len(said), width), -1)
    for index in said:
        row = rows[index]
        labels[index, row.read : row.read + len(row.labels)] = torch.tensor(row.labels)
    counts = (labels >= 0).sum(1)
    device = next(model.parameters()).device
    ids, mask, labels, counts = (x.to(device) for x in (ids, mask, labels, counts))
    weight = next(module.parameters())
    dtype = torch.promote_types(weight.dtype, torch.float32)
    delta = torch.zeros(
        model.config.get_text_config().hidden_size,
        dtype=dtype,
        device=device,
        requires_grad=True,
    )
    initial: list[Tensor] = []

    def hook(_: Any, __: Any, output: Any) -> Any:
        given = output[0] if isinstance(output, tuple) else output
        hidden = given.view(len(rows), -1, given.shape[-1])  # OPT flattens
        if not initial:
            initial.append(hidden[0, subjects[0]].detach().to(dtype))
        hidden = hidden.clone()
        hidden[every, subjects] = (hidden[every, subjects] + delta).to(hidden.dtype)
        hidden = hidden.view_as(given)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = module.register_forward_hook(hook)
    optimizer = torch.optim.Adam([delta], lr=settings.learning_rate)
    reference = None
    losses, probabilities = [], []
    try:
        for step in range(settings.steps):
            output = model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
            logs = torch.log_softmax(output.logits.to(dtype), dim=2)
            picked = logs[: len(said)].gather(2, labels.clamp_min(0)[:, :, None])[
                ..., 0
            ]
            nll = (-(picked * (labels >= 0)).sum(1) / counts).mean()
            kl = nll.new_zeros(())
            if stay:
                now = torch.stack([logs[index, rows[index].read] for index in stay])
                reference = now.detach().clone() if reference is None else reference
                kl = (now.exp() * (now - reference)).sum(1).mean()
            decay = settings.weight_decay * delta.norm() / initial[0].norm() ** 2
            loss = nll + settings.kl_factor * kl + decay
            losses.append(float(loss.detach()))
            probabilities.append(math.exp(-float(nll.detach())))
            if losses[-1] < settings.loss_threshold or step == settings.steps - 1:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            limit = settings.largest * initial[0].norm()
            with torch.no_grad():
                if delta.norm() > limit:
                    delta.mul_(limit / delta.norm())
    finally:
        handle.remove()
    return PlainTarget(initial[0] + delta.detach(), initial[0], losses, probabilities)
