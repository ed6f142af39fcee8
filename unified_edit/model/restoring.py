"""The runs of one fact that causal tracing compares: clean, corrupted, and corrupted
with one state restored.

Nothing before the subject is corrupted, and no token sees those after it: restoring a
state before the subject changes nothing, and what changes stands at or after the
restored token, in blocks above the restored one. Only that part runs again. The
corrupted run leaves hidden states and attention keys and values for the rest, and
restored tokens, states that begin at one layer, and all samples share a forward.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache

from unified_edit.edits import Edit
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.hooks import (
    by_row,
    hidden_of,
    returning,
    seeing,
    stopping_at,
    wide,
)
from unified_edit.model.partial import (
    keys_and_values,
    pass_cost,
    prefix_cache,
    reading,
    take,
)
from unified_edit.model.prompts import check_logits, within
from unified_edit.model.rows import by_width

Kind = Literal["hidden", "mlp", "attention"]
"""What is restored: a block's output; or, over a window of layers, the outputs of the
MLPs' down-projections or of the attentions' output projections."""
KINDS: tuple[Kind, ...] = get_args(Kind)


def window_at(layer: int, width: int, layers: int) -> range:
    """The window whose centre is a layer, cut at the model's ends.

    Source: kmeng01/rome, `trace_important_window`.
    """
    return range(max(0, layer - width // 2), min(layers, layer - (-width // 2)))


@dataclass(frozen=True)
class Row:
    """A fact as ids."""

    fact: Edit
    ids: tuple[int, ...]
    """The prompt's, and the answer's but for the last, which is only predicted."""
    prompt: int
    """Number of the prompt's."""
    subject: range
    answer: tuple[int, ...]

    @property
    def reads(self) -> range:
        """Positions that predict the answer."""
        return range(self.prompt - 1, len(self.ids))


def embedding_of(adapter: ModelAdapter) -> nn.Module:
    embedding = adapter.model.get_input_embeddings()  # type: ignore[operator]
    assert isinstance(embedding, nn.Module)
    return embedding


def noise_of(row: Row, samples: int, deviation: float, seed: int, size: int) -> Tensor:
    """[1 + samples, positions, size]: zero in the first, clean row, and where the
    subject is not."""
    name = f"{seed} {row.fact.text}".encode()
    digest = hashlib.blake2b(name, digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    noise = torch.zeros(1 + samples, len(row.ids), size)
    drawn = torch.randn((samples, len(row.subject), size), generator=generator)
    noise[1:, row.subject.start : row.subject.stop] = deviation * drawn
    return noise


def _adding(module: nn.Module, noise: Tensor) -> RemovableHandle:
    """Adds to what a module returns, rounded once."""

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return (wide(output) + noise.to(output.device)).to(output.dtype)

    return module.register_forward_hook(hook)


def _restoring(count: int, rows: Tensor, columns: Tensor, values: Tensor) -> Any:
    """A hook that puts values [n, d] at places of what a module returns for so many
    rows."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = hidden_of(output)
        places = (rows.to(hidden.device), columns.to(hidden.device))
        table = by_row(hidden, count).index_put(places, values.to(hidden.device))
        changed = table.view_as(hidden)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


@dataclass(frozen=True)
class _State:
    """What is restored in one pass."""

    kind: Kind
    layer: int
    window: range
    """The layers; of a hidden state, its own."""
    token: int


@dataclass(frozen=True, eq=False)
class Runs:
    """What the clean and the corrupted runs of one fact have left: row 0 is clean, the
    others are the samples."""

    adapter: ModelAdapter
    row: Row
    noise: Tensor
    """[1 + samples, positions, d_embedding]"""
    states: Mapping[tuple[Kind, int], Tensor]
    """By kind and layer, [1 + samples, positions, d_value]."""
    extras: int | None
    """How many more things a block returns in a tuple; None: a bare tensor."""
    cache: tuple[tuple[Tensor, Tensor], ...]
    """For each layer [1 + samples, heads, positions, head size], twice."""
    clean: Tensor
    corrupted: Tensor
    """Probabilities of the answer, float64; the samples' mean."""

    @classmethod
    def of(
        cls, adapter: ModelAdapter, row: Row, kinds: Sequence[Kind], noise: Tensor
    ) -> Runs:
        """Runs clean and corrupted in one forward."""
        count = len(noise)
        seen: dict[str, Any] = {}
        names: dict[tuple[Kind, int], str] = {}
        with ExitStack() as hooks:
            hooks.enter_context(_adding(embedding_of(adapter), noise))
            for layer in range(adapter.layer_count):
                # Blocks' outputs are also where passes begin again.
                for kind in ("hidden", *kinds):
                    name = names[kind, layer] = f"{kind} {layer}"
                    if name not in seen:
                        seen[name] = None
                        module = _module(adapter, kind, layer)
                        hooks.enter_context(seeing(module, seen, name))
            cache = DynamicCache()
            last = adapter.layer_count - 1
            logs = _answer_logs(adapter, row, count, 0, cache, last)
        first = seen["hidden 0"]
        found = logs.exp()
        return cls(
            adapter=adapter,
            row=row,
            noise=noise,
            states={
                key: by_row(hidden_of(seen[name]), count) for key, name in names.items()
            },
            extras=len(first) - 1 if isinstance(first, tuple) else None,
            cache=keys_and_values(cache),
            clean=found[0],
            corrupted=found[1:].mean(),
        )

    def restored(self, kinds: Sequence[Kind], width: int) -> dict[Kind, Tensor]:
        """The answer's probability with each state restored, [tokens, layers]."""
        layers, row = self.adapter.layer_count, self.row
        found = {
            kind: self.corrupted.expand(row.prompt, layers).clone() for kind in kinds
        }
        windows = [
            (kind, layer, window_at(layer, 1 if kind == "hidden" else width, layers))
            for kind in kinds
            for layer in range(layers)
        ]
        for start in sorted({window.start for _, _, window in windows}):
            shared = [each for each in windows if each[2].start == start]
            changed = {kind: self._changed(kind, start) for kind, _, _ in shared}
            # After the last block positions do not meet any more: only a state where
            # the answer is predicted counts.
            begin = row.subject.start if start < layers - 1 else row.reads.start
            for tokens in self._groups(range(begin, row.prompt), len(shared)):
                states = [
                    _State(kind, layer, window, token)
                    for token in tokens
                    for kind, layer, window in shared
                ]
                probabilities = self._run(states, changed).exp().mean(1)
                for each, probability in zip(states, probabilities, strict=True):
                    found[each.kind][each.token, each.layer] = probability
        return found

    def _groups(self, tokens: range, states: int) -> Iterator[list[int]]:
        """Tokens whose passes share a forward, which begins at the first of them."""
        whole, rows = len(self.row.ids), states * (len(self.noise) - 1)
        widths = [whole - token for token in tokens]
        groups = by_width(widths, -(-pass_cost(self.adapter) // rows))
        for chosen in within(groups, [rows * width for width in widths]):
            yield [tokens[index] for index in sorted(chosen)]

    def _changed(self, kind: Kind, layer: int) -> Tensor:
        """What a block returns where its state is restored, [samples, positions,
        d_value], from the subject on: there only does it return something else than in
        the corrupted run. For within a block positions meet in its attention alone,
        before what is restored; so one pass with all positions restored shows each
        one's."""
        adapter, begin = self.adapter, self.row.subject.start
        clean = self.states[kind, layer][:1, begin:]
        samples = torch.arange(1, len(self.noise))
        if kind == "hidden":
            return clean.expand(len(samples), -1, -1)
        found: list[Tensor] = []

        def restore(_module: nn.Module, _inputs: Any, output: Any) -> Tensor:
            # A tensor of its own: some blocks go on in place.
            return clean.repeat(len(samples), 1, 1).view_as(hidden_of(output))

        with ExitStack() as hooks:
            module = _module(adapter, kind, layer)
            hooks.enter_context(stopping_at(adapter.block(layer), found.append))
            hooks.enter_context(module.register_forward_hook(restore))
            self._forward(hooks, samples, begin, layer)
        return found[0]

    def _run(self, states: Sequence[_State], changed: Mapping[Kind, Tensor]) -> Tensor:
        """Log-probabilities of the answer [states, samples]. All windows begin at one
        layer; `changed` is what its block returns."""
        adapter, samples = self.adapter, len(self.noise) - 1
        start, begin = states[0].window.start, states[0].token
        sample = torch.arange(samples).repeat(len(states))
        rows = torch.arange(len(sample))
        token = torch.tensor([each.token for each in states])
        token = token.repeat_interleave(samples)
        entry = take(self.states["hidden", start][:, begin:], sample + 1)
        first = self.row.subject.start
        for kind, values in changed.items():
            mine = torch.tensor([each.kind == kind for each in states])
            mine = mine.repeat_interleave(samples)
            entry[rows[mine], token[mine] - begin] = values[
                sample[mine], token[mine] - first
            ]
        last = start
        with ExitStack() as hooks:
            for kind in changed:
                above = [each.window.stop for each in states if each.kind == kind]
                for layer in range(start + 1, max(above)):
                    mine = torch.tensor(
                        [e.kind == kind and layer in e.window for e in states]
                    ).repeat_interleave(samples)
                    clean = take(self.states[kind, layer][0], token[mine])
                    places = (rows[mine], token[mine] - begin)
                    module = _module(adapter, kind, layer)
                    hook = _restoring(len(rows), *places, clean)
                    hooks.enter_context(module.register_forward_hook(hook))
                    last = layer
            logs = self._forward(hooks, sample + 1, begin, start + 1, entry, last)
        return logs.view(len(states), samples)

    def _forward(
        self,
        hooks: ExitStack,
        rows: Tensor,
        begin: int,
        skipped: int,
        entry: Tensor | None = None,
        changed: int | None = None,
    ) -> Tensor:
        """Log-probabilities of the answer [rows] in a pass over positions from `begin`
        on.

        Args:
            rows: of these runs, those that the pass follows.
            skipped: blocks that do not run.
            entry: what the last of them returns, if not what it did.
            changed: the highest layer with a hook, by default the last.
        """
        adapter = self.adapter
        if not skipped:
            noise = self.noise[rows][:, begin:]
            hooks.enter_context(_adding(embedding_of(adapter), noise))
        else:
            if entry is None:
                entry = take(self.states["hidden", skipped - 1][:, begin:], rows)
            blocks = [adapter.block(layer) for layer in range(skipped)]
            hooks.enter_context(returning(blocks, entry, self.extras))
        before = [
            (take(k[:, :, :begin], rows), take(v[:, :, :begin], rows))
            for k, v in self.cache[skipped:]
        ]
        cache = prefix_cache(begin, before, skipped)
        if changed is None:
            changed = adapter.layer_count - 1
        return _answer_logs(adapter, self.row, len(rows), begin, cache, changed)


def _module(adapter: ModelAdapter, kind: Kind, layer: int) -> nn.Module:
    if kind == "hidden":
        return adapter.block(layer)
    if kind == "mlp":
        return adapter.down_projection(layer)
    return adapter.attention(layer)


def _answer_logs(
    adapter: ModelAdapter,
    row: Row,
    count: int,
    start: int,
    cache: Any,
    layer: int,
) -> Tensor:
    """Log-probability of the answer [count] in so many rows of ids from a position on;
    the model is hooked by the caller, up to `layer`."""
    # Tensors of their own: some models go on with them in place.
    ids = torch.tensor([row.ids[start:]] * count, device=adapter.device)
    positions = torch.arange(start, len(row.ids), device=adapter.device)
    columns = torch.tensor(row.reads).repeat(count) - start
    rows = torch.arange(count).repeat_interleave(len(row.reads))
    with reading(adapter, layer, rows, columns):
        logits = adapter.model(
            input_ids=ids,
            attention_mask=ids.new_ones(count, len(row.ids)),
            position_ids=positions.repeat(count, 1),
            past_key_values=cache,
            use_cache=cache is not None,
        ).logits[0]
    check_logits(adapter, logits)
    logs = torch.log_softmax(wide(logits), dim=-1).view(count, len(row.reads), -1)
    answer = torch.tensor(row.answer, device=logs.device).expand(count, -1)
    picked = logs.gather(2, answer[:, :, None])[:, :, 0]
    return picked.double().sum(1).cpu()
