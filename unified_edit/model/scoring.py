"""How probable continuations are, and what a model says by itself."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from covariance_cache.capture import evaluating
from unified_edit.errors import PromptError
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.frames import PLAIN, Frame
from unified_edit.model.gradients import logits_of
from unified_edit.model.prompts import (
    buckets,
    check_logits,
    check_rows,
    continuations,
    next_token,
    pad,
    tokenize,
    within,
)


@dataclass(frozen=True)
class Score:
    """One continuation of one prompt, teacher-forced."""

    nll: float
    """Mean negative log-likelihood of the target's tokens, in nats."""
    argmax: bool
    """Every token of the target is the most probable one."""
    share: float
    """Share of the target's tokens that are the most probable ones."""
    predicted: tuple[int, ...]
    """The most probable token in each one's place."""


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
            logits = logits_of(adapter, batch, keep=most)
            logs = torch.log_softmax(logits.float(), dim=-1)
            best = logs.argmax(-1)
            for row, i in enumerate(chosen):
                target = torch.tensor(pairs[i][1], device=logs.device)
                tail = slice(most - len(target), most)
                picked = logs[row, tail].gather(1, target[:, None])
                right = best[row, tail] == target
                found[i] = Score(
                    nll=-float(picked.mean()),
                    argmax=bool(right.all()),
                    share=int(right.sum()) / len(target),
                    predicted=tuple(best[row, tail].tolist()),
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


@torch.no_grad()
def sample(
    adapter: ModelAdapter,
    tokenizer: Any,
    prompts: Sequence[str],
    tokens: int,
    *,
    top_k: int = 5,
    seed: int = 0,
    frame: Frame = PLAIN,
    progress: bool = False,
) -> list[str]:
    """Prompts with what follows, each token drawn from the `top_k` most probable ones:
    texts of `tokens` tokens, the prompt's own among them (not the frame's). The end of
    a text does not stop them.

    A text depends on the seed, its prompt and how often that came before, not on the
    others.

    Raises:
        PromptError: a prompt without tokens, or more than the model's positions.
        NonFiniteError: NaN or infinity in the logits.
    """
    framed = [frame.around(prompt) for prompt in prompts]
    rows = [ids for ids, _ in tokenize(tokenizer, framed, special=frame.special)]
    missing = [tokens - len(ids) for ids, _ in tokenize(tokenizer, prompts)]
    missing = [max(0, count) for count in missing]
    if not all(rows):
        raise PromptError(
            "a prompt is empty and the tokenizer puts no token before it; give a prompt"
        )
    lengths = [len(row) + count for row, count in zip(rows, missing, strict=True)]
    check_rows(adapter, [row + (0,) * n for row, n in zip(rows, missing, strict=True)])
    generators = [torch.Generator().manual_seed(each) for each in _seeds(seed, prompts)]
    # Of one length, so that nothing is padded: the same texts in any company.
    alike: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        alike[len(row), missing[index]].append(index)
    said: list[list[int]] = [[] for _ in prompts]
    with (
        evaluating(adapter.model),
        tqdm(total=sum(missing), desc="sampling", disable=not progress) as bar,
    ):
        for chosen in within([alike[key] for key in sorted(alike)], lengths):
            ids = torch.tensor([rows[i] for i in chosen], device=adapter.device)
            cache = None
            past = 0
            for _ in range(missing[chosen[0]]):
                positions = torch.arange(past, past + ids.shape[1], device=ids.device)
                past += ids.shape[1]
                output = adapter.model(
                    input_ids=ids,
                    attention_mask=ids.new_ones(len(chosen), past),
                    position_ids=positions.expand(len(chosen), -1),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                logits, cache = output.logits[:, -1], output.past_key_values
                check_logits(adapter, logits)
                drawn = [
                    next_token(row, top_k, generators[i])
                    for row, i in zip(logits, chosen, strict=True)
                ]
                for token, i in zip(drawn, chosen, strict=True):
                    said[i].append(token)
                ids = torch.tensor(drawn, device=adapter.device)[:, None]
                bar.update(len(chosen))
    texts = []
    for prompt, row, new in zip(prompts, rows, said, strict=True):
        # A template's own words are no part of a text.
        text = tokenizer.decode(
            [*row, *new] if frame == PLAIN else new,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        texts.append(text if frame == PLAIN else f"{prompt} {text.strip()}")
    return texts


def _seeds(seed: int, prompts: Sequence[str]) -> list[int]:
    seen: Counter[str] = Counter()
    found = []
    for prompt in prompts:
        name = f"{seed} {seen[prompt]} {prompt}".encode()
        digest = hashlib.blake2b(name, digest_size=7).digest()
        found.append(int.from_bytes(digest, "big"))
        seen[prompt] += 1
    return found
