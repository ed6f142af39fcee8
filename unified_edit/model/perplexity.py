"""Perplexity of a model on some texts: the canary of a sequence of edits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from covariance_cache.capture import evaluating
from unified_edit.errors import NonFiniteError, PromptError
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.prompts import buckets, check_rows, pad, tokenize


@dataclass(frozen=True)
class Canary:
    """Held-out texts as token ids, tokenized once."""

    rows: tuple[tuple[int, ...], ...]
    """Each of two tokens at least."""

    @classmethod
    def of(cls, tokenizer: Any, texts: Sequence[str], window: int = 128) -> Canary:
        """Of texts, each cut to its first `window` tokens.

        Raises:
            PromptError: no texts, one without a token to predict, or no Unicode.
        """
        rows = tuple(ids[:window] for ids, _ in tokenize(tokenizer, texts))
        if not rows:
            raise PromptError("there are no texts to measure perplexity on")
        for text, ids in zip(texts, rows, strict=True):
            if len(ids) < 2:
                raise PromptError(f"{text!r} has no token to predict; give longer text")
        return cls(rows)

    @torch.no_grad()
    def perplexity(self, adapter: ModelAdapter) -> float:
        """exp of the mean negative log-likelihood per predicted token; infinity if it
        overflows.

        Raises:
            PromptError: a text is too long for the model.
            NonFiniteError: NaN in the logits.
        """
        check_rows(adapter, self.rows)
        total, count = 0.0, 0
        with evaluating(adapter.model):
            for chosen in buckets([len(row) for row in self.rows]):
                batch = pad([self.rows[i] for i in chosen], adapter.device)
                logits = adapter.model(
                    input_ids=batch.ids,
                    attention_mask=batch.mask,
                    position_ids=batch.positions,
                    use_cache=False,
                ).logits[:, :-1]
                predicted = batch.mask[:, 1:].to(logits.device, torch.bool)
                wanted = batch.ids[:, 1:].to(logits.device)[predicted]
                logs = torch.log_softmax(logits[predicted].float(), dim=-1)
                picked = logs.gather(1, wanted[:, None])
                total -= float(picked.double().sum())
                count += len(wanted)
        if math.isnan(total):
            raise NonFiniteError(
                f"the model's logits are not finite: {adapter.why_not_finite()}"
            )
        mean = total / count
        return math.exp(mean) if mean < 700 else math.inf
