"""How probable continuations are, and what a model says by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from covariance_cache.capture import evaluating
from unified_edit.errors import NonFiniteError
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.frames import PLAIN, Frame
from unified_edit.model.prompts import buckets, check_rows, continuations, pad, tokenize


@dataclass(frozen=True)
class Score:
    """One continuation of one prompt, teacher-forced."""

    nll: float
    """Mean negative log-likelihood of the target's tokens, in nats."""
    argmax: bool
    """Every token of the target is the most probable one."""


@torch.no_grad()
def score(
    adapter: ModelAdapter,
    tokenizer: Any,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    frame: Frame = PLAIN,
    progress: bool = False,
) -> list[Score]:
    """Scores `targets[i]` after `prompts[i]` in its frame, by default one space after
    the prompt.

    Raises:
        PromptError: a prompt cannot be tokenized so, or is too long.
        NonFiniteError: NaN or infinity in the logits.
    """
    framed = [frame.around(prompt) for prompt in prompts]
    pairs = continuations(tokenizer, framed, targets, frame)
    rows = [ids + target[:-1] for ids, target in pairs]
    check_rows(adapter, rows)
    found: list[Score | None] = [None] * len(rows)
    with (
        evaluating(adapter.model),
        tqdm(total=len(rows), desc="scoring", disable=not progress) as bar,
    ):
        for chosen in buckets([len(row) for row in rows]):
            # Padded on the left, the targets end together: the head sees only them.
            batch = pad([rows[i] for i in chosen], adapter.device, left=True)
            most = max(len(pairs[i][1]) for i in chosen)
            logits = adapter.model(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                position_ids=batch.positions,
                use_cache=False,
                logits_to_keep=most,
            ).logits
            if not bool(torch.isfinite(logits).all()):
                raise NonFiniteError(
                    f"the model's logits are not finite: {adapter.why_not_finite()}"
                )
            logs = torch.log_softmax(logits.float(), dim=-1)
            best = logs.argmax(-1)
            for row, i in enumerate(chosen):
                target = torch.tensor(pairs[i][1], device=logs.device)
                tail = slice(most - len(target), most)
                picked = logs[row, tail].gather(1, target[:, None])
                found[i] = Score(
                    nll=-float(picked.mean()),
                    argmax=bool((best[row, tail] == target).all()),
                )
            bar.update(len(chosen))
    return [each for each in found if each is not None]


@torch.no_grad()
def generate(
    adapter: ModelAdapter,
    tokenizer: Any,
    prompts: Sequence[str],
    new_tokens: int,
    *,
    frame: Frame = PLAIN,
) -> list[str]:
    """Greedy continuations, without the prompts and special tokens."""
    framed = [frame.around(prompt) for prompt in prompts]
    encoded = [ids for ids, _ in tokenize(tokenizer, framed, special=frame.special)]
    check_rows(adapter, [ids + (0,) * new_tokens for ids in encoded])
    found = [""] * len(prompts)
    filler = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    for chosen in buckets([len(ids) + new_tokens for ids in encoded]):
        batch = pad([encoded[i] for i in chosen], adapter.device, left=True)
        with evaluating(adapter.model):
            output = adapter.model.generate(  # type: ignore[operator]
                input_ids=batch.ids,
                attention_mask=batch.mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=filler,
            )
        for row, i in enumerate(chosen):
            found[i] = tokenizer.decode(
                output[row, batch.ids.shape[1] :],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
    return found
