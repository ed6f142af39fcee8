"""Causal tracing by its definition: one forward of a clean row and all samples for each
restored state. What the tests and `benchmarks/locate.py` compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from unified_edit.model.restoring import Kind, window_at


def plain_trace(
    model: nn.Module,
    ids: Sequence[int],
    prompt: int,
    answer: Sequence[int],
    noise: Tensor,
    modules: Mapping[Kind, Sequence[nn.Module]],
    window: int,
    tokens: Sequence[int] | None = None,
) -> tuple[float, float, dict[Kind, Tensor]]:
    """The answer's probability clean, corrupted, and with each state restored
    [tokens, layers].

    Args:
        ids: prompt and answer, without the answer's last token.
        prompt: number of the prompt's.
        noise: [1 + samples, ids, d]; the first row's is zero.
        modules: each layer's, whose outputs are restored.
        tokens: only these are restored; the others' probabilities are NaN.
    """
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    rows = torch.tensor([list(ids)] * len(noise))

    def corrupt(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output + noise.to(output.dtype)

    def run() -> Tensor:
        logits = model(input_ids=rows, use_cache=False).logits[:, prompt - 1 :]
        logs = logits.double().log_softmax(-1)
        index = torch.tensor(list(answer)).expand(len(rows), -1)[:, :, None]
        return logs.gather(2, index)[:, :, 0].sum(1).exp()

    found: dict[Kind, Tensor] = {}
    with torch.no_grad(), embedding.register_forward_hook(corrupt):
        base = run()
        for kind, each in modules.items():
            table = torch.full((prompt, len(each)), torch.nan, dtype=torch.float64)
            for layer in range(len(each)):
                width = 1 if kind == "hidden" else window
                chosen = [each[i] for i in window_at(layer, width, len(each))]
                for token in range(prompt) if tokens is None else tokens:
                    with ExitStack() as hooks:
                        for module in chosen:
                            restore = _restoring(len(rows), token)
                            hooks.enter_context(module.register_forward_hook(restore))
                        table[token, layer] = run()[1:].mean()
            found[kind] = table
    return float(base[0]), float(base[1:].mean()), found


def _restoring(rows: int, token: int) -> Any:
    def restore(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden.clone()
        # Some modules see rows and positions as one.
        table = hidden.view(rows, -1, hidden.shape[-1])
        table[1:, token] = table[0, token]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return restore
