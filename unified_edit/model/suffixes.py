"""What a change at the subject's last token does to what a model says, computed from
there on only.

δ enters at one position of one module's output. The positions before it never change:
one pass over the whole prompts leaves their attention keys and values. Nor do the
blocks below: the same pass leaves what they hand on. So each step runs the blocks above
over the suffixes, and the head where something is read, all through the model's own
forward; nothing here knows a family.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from transformers import Cache, DynamicCache

from unified_edit.model.adapter import ModelAdapter, Site
from unified_edit.model.hooks import (
    add_first,
    adding,
    by_row,
    hidden_of,
    returning,
    seeing,
    wide,
)
from unified_edit.model.partial import (
    all_but_gaps,
    keys_and_values,
    pass_cost,
    prefix_cache,
    reading,
    take,
)
from unified_edit.model.prompts import pad, within
from unified_edit.model.rows import Row, by_width, heads_of


@dataclass(frozen=True, eq=False)
class Reads:
    """Where logits are read: first what predicts labels, then the KL terms."""

    rows: Tensor
    """[reads]"""
    columns: Tensor
    """[reads], counted in the suffixes"""
    labels: Tensor
    """[labels], what the first of the reads predict"""
    edits: Tensor
    """[reads], whose they are"""
    weights: Tensor
    """[reads], float64: each one's in the mean over its edit's."""

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Reads:
        """All that is read of some rows."""
        places = [
            (index, row.read + k, label, row.edit, row.weight / len(row.labels))
            for index, row in enumerate(rows)
            for k, label in enumerate(row.labels)
        ]
        count = len(places)
        places += [
            (index, row.read, -1, row.edit, row.weight)
            for index, row in enumerate(rows)
            if not row.labels
        ]
        rows_at, columns, labels, edits = torch.tensor([each[:4] for each in places]).T
        weights = torch.tensor([each[4] for each in places], dtype=torch.float64)
        return cls(rows_at, columns, labels[:count], edits, weights)


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rows of some edits after one pass of the unedited model over the whole of them.

    Prefixes end in one column, as if padded on the left, so that distances are true
    where attention has a window. They ran padded on the right, where every position
    sees something, as some attention kernels need.
    """

    adapter: ModelAdapter
    site: Site
    layer: int
    rows: tuple[Row, ...]
    """Edit by edit, the bare prompt first; `edit` counts from the chunk's first."""
    cache: tuple[tuple[Tensor, Tensor], ...]
    """For each layer that runs again [rows, heads, prefix, head size], twice; empty if
    no row has a prefix."""
    entry: Tensor | None
    """[rows, width, d_value], what the last block that does not run again hands on."""
    extras: int | None
    """How many more things such a block returns in a tuple; None: a bare tensor."""
    values: Tensor
    """[edits, d_value] at the site, at the bare prompts' subjects; float32 or wider."""
    reference: Tensor
    """[KL rows, vocabulary], log-probabilities, in order of rows."""
    nll: Tensor
    """[edits], of the targets, float64."""

    @property
    def skipped(self) -> int:
        """How many blocks need not run again."""
        return _below(self.site, self.layer)


@dataclass(frozen=True, eq=False)
class Bucket:
    """Rows of like width, ready for a forward pass from the subject on."""

    chunk: Chunk
    edits: Tensor
    """[rows], whose they are"""
    ids: Tensor
    """[rows, width]"""
    mask: Tensor
    """[rows, prefix + width]"""
    positions: Tensor
    """[rows, width]"""
    cache: Cache | None
    """The prefixes' keys and values; None if no row has a prefix."""
    entry: Tensor | None
    """[rows, width, d_value]"""
    reads: Reads
    reference: Tensor
    """[KL reads, vocabulary]"""

    def logits(self, delta: Tensor) -> Tensor:
        """The model's own logits [reads, vocabulary] with δ [rows, d_value] added at
        the subjects."""
        chunk, entry = self.chunk, self.entry
        adapter = chunk.adapter
        with ExitStack() as hooks:
            if chunk.site == "mlp_output":
                hooks.enter_context(adding(adapter.down_projection(chunk.layer), delta))
            elif entry is not None:
                entry = add_first(entry, delta)
            if entry is not None:
                below = [adapter.block(layer) for layer in range(chunk.skipped)]
                hooks.enter_context(returning(below, entry, chunk.extras))
            hooks.enter_context(
                reading(adapter, chunk.layer, self.reads.rows, self.reads.columns)
            )
            output = adapter.model(
                input_ids=self.ids,
                attention_mask=self.mask,
                position_ids=self.positions,
                past_key_values=self.cache,
                use_cache=self.cache is not None,
            )
        logits: Tensor = output.logits[0]
        return logits

    def measure(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Each read's loss [reads], in float32 or wider: the label's NLL, or
        KL(now ‖ unedited); and whether each label is the most probable token."""
        return _measure(self.logits(delta), self.reads, self.reference)


@torch.no_grad()
def run_whole(
    adapter: ModelAdapter, rows: Sequence[Row], site: Site, layer: int
) -> Chunk:
    """Runs whole prompts, each once, and keeps what will not change."""
    skipped = _below(site, layer)
    width = max(len(row.suffix) for row in rows)
    prefix = max(len(row.prefix) for row in rows)
    heads = heads_of(rows)
    begun = _run_heads(adapter, heads)
    extras = None
    order: list[int] = []
    values, entries, references = [], [], []
    pairs: list[list[tuple[Tensor, Tensor]]] = []
    nll = torch.zeros(rows[-1].edit + 1, dtype=torch.float64)
    which = [index % len(heads) for index in range(len(rows))]
    rests = [row.prefix[len(heads[w]) :] for row, w in zip(rows, which, strict=True)]
    lengths = [len(rest + row.suffix) for rest, row in zip(rests, rows, strict=True)]
    for chosen in within(by_width(lengths, pass_cost(adapter)), lengths):
        order += chosen
        some = [rows[index] for index in chosen]
        whole = pad([rests[i] + rows[i].suffix for i in chosen], adapter.device)
        head = torch.tensor([which[index] for index in chosen])
        sizes = torch.tensor([[len(heads[which[index]])] for index in chosen])
        cache, mask = _following(begun, head, sizes, prefix > 0)
        cuts = torch.tensor([len(rests[index]) for index in chosen])
        reads = Reads.of(some)
        seen: dict[str, Any] = {}
        with ExitStack() as hooks:
            hooks.enter_context(seeing(adapter.site(site, layer), seen, "value"))
            if skipped:
                hooks.enter_context(seeing(adapter.block(skipped - 1), seen, "entry"))
            columns = reads.columns + cuts[reads.rows]
            hooks.enter_context(reading(adapter, layer, reads.rows, columns))
            output = adapter.model(
                input_ids=whole.ids,
                attention_mask=all_but_gaps(mask, whole.ids),
                position_ids=whole.positions + sizes.to(whole.positions.device),
                past_key_values=cache,
                use_cache=cache is not None,
            )
        logits, count = wide(output.logits[0]), len(reads.labels)
        references.append(log_softmax(logits[count:], dim=-1))
        losses, _ = _measure(logits[:count], reads, logits[:0])
        nll.index_add_(
            0, reads.edits[:count], losses.double().cpu() * reads.weights[:count]
        )
        value = by_row(hidden_of(seen["value"]), len(chosen))
        values.append(wide(_columns(value, cuts, 1, dim=1)[:, 0]))
        if skipped:
            returned = seen["entry"]
            extras = len(returned) - 1 if isinstance(returned, tuple) else None
            entries.append(_columns(hidden_of(returned), cuts, width, dim=1))
        if cache is not None:
            starts = mask.shape[1] + cuts - prefix
            pairs.append(
                [
                    (
                        _columns(keys, starts, prefix, dim=2),
                        _columns(vectors, starts, prefix, dim=2),
                    )
                    for keys, vectors in keys_and_values(cache)[skipped:]
                ]
            )
    back = torch.tensor(order).argsort()
    stays = [index for index in order if not rows[index].labels]
    bare = [i for i, row in enumerate(rows) if not i or rows[i - 1].edit != row.edit]
    return Chunk(
        adapter=adapter,
        site=site,
        layer=layer,
        rows=tuple(rows),
        cache=tuple(
            (_cat([k for k, _ in each], back), _cat([v for _, v in each], back))
            for each in zip(*pairs, strict=True)
        ),
        entry=_cat(entries, back) if entries else None,
        extras=extras,
        values=_cat(values, back[bare]),
        reference=_cat(references, torch.tensor(stays).argsort()),
        nll=nll,
    )


def _run_heads(
    adapter: ModelAdapter, heads: Sequence[tuple[int, ...]]
) -> list[tuple[Tensor, Tensor]]:
    """For each layer, attention keys and values of the heads, padded on the right."""
    if not any(heads):
        return []
    batch = pad(heads, adapter.device)
    output = adapter.model(
        input_ids=batch.ids,
        attention_mask=torch.ones_like(batch.ids),
        position_ids=batch.positions,
        past_key_values=DynamicCache(),
        use_cache=True,
        logits_to_keep=1,
    )
    return list(keys_and_values(output.past_key_values))


def _following(
    begun: Sequence[tuple[Tensor, Tensor]], head: Tensor, sizes: Tensor, wanted: bool
) -> tuple[Cache | None, Tensor]:
    """The cache in which rows follow their heads, moved to the right, to stand before
    what follows; and its mask [rows, columns]."""
    longest = int(sizes.max())
    mask = torch.arange(longest) >= longest - sizes
    if not wanted:
        return None, mask
    cache = DynamicCache()
    for index, pair in enumerate(begun if longest else ()):
        keys, values = (
            _columns(take(each, head), sizes[:, 0] - longest, longest, dim=2)
            for each in pair
        )
        cache.update(keys, values, index)
    return cache, mask


def as_buckets(chunk: Chunk, edits: Sequence[int]) -> list[Bucket]:
    """The rows of some of a chunk's edits, which then count in the order given."""
    number = {edit: index for index, edit in enumerate(edits)}
    chosen = [index for index, row in enumerate(chunk.rows) if row.edit in number]
    kl_rows = [index for index, row in enumerate(chunk.rows) if not row.labels]
    kl_index = {row: index for index, row in enumerate(kl_rows)}
    found = []
    widths = [len(chunk.rows[index].suffix) for index in chosen]
    for group in by_width(widths, pass_cost(chunk.adapter)):
        index = [chosen[each] for each in group]
        rows = [replace(chunk.rows[i], edit=number[chunk.rows[i].edit]) for i in index]
        suffix = pad([row.suffix for row in rows], chunk.adapter.device)
        before = torch.tensor([[len(row.prefix)] for row in rows])
        prefix = int(before.max())
        mask = torch.arange(prefix) >= prefix - before
        at = torch.tensor(index)
        stays = torch.tensor([kl_index[i] for i in index if i in kl_index]).long()
        entry, width = chunk.entry, suffix.ids.shape[1]
        found.append(
            Bucket(
                chunk=chunk,
                edits=torch.tensor([row.edit for row in rows]),
                ids=suffix.ids,
                mask=all_but_gaps(mask, suffix.ids),
                positions=suffix.positions + before.to(suffix.positions.device),
                cache=prefix_cache(
                    prefix,
                    [_last(pair, at, prefix) for pair in chunk.cache if prefix],
                    chunk.skipped,
                ),
                entry=None if entry is None else take(entry, at)[:, :width],
                reads=Reads.of(rows),
                reference=take(chunk.reference, stays),
            )
        )
    return found


def _below(site: Site, layer: int) -> int:
    return layer + (site == "block_output")


def _measure(logits: Tensor, reads: Reads, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of labels and KL terms, and whether labels are the most probable."""
    logits, count = wide(logits), len(reads.labels)
    labels = reads.labels.to(logits.device)
    losses = cross_entropy(logits[:count], labels, reduction="none")
    right = logits[:count].detach().argmax(-1) == labels
    if len(logits) > count:
        now = log_softmax(logits[count:], dim=-1)
        kl = (now.exp() * (now - reference.to(now.device))).sum(-1)
        losses = torch.cat([losses, kl])
    return losses, right


def _columns(tensor: Tensor, starts: Tensor, count: int, dim: int) -> Tensor:
    """Of each row, `count` columns of dimension `dim` from its own start on; columns
    that do not exist repeat the nearest."""
    columns = starts[:, None] + torch.arange(count)
    columns = columns.clamp(0, tensor.shape[dim] - 1).to(tensor.device)
    shape = [len(columns)] + [1] * (tensor.ndim - 1)
    shape[dim] = count
    wanted = list(tensor.shape)
    wanted[dim] = count
    return tensor.gather(dim, columns.view(shape).expand(wanted))


def _last(
    pair: tuple[Tensor, Tensor], rows: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """The rows' last columns of attention keys and values."""
    keys, values = (take(each, rows)[:, :, -count:] for each in pair)
    return keys, values


def _cat(parts: Sequence[Tensor], rows: Tensor) -> Tensor:
    return take(torch.cat(list(parts)), rows)
