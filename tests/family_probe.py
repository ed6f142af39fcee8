"""What passes through a small random model of a type show of its architecture: where
the edited weight is, and what becomes of what it returns. No name is trusted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import pytest
import torch
from families import Family
from test_target_families import keep_softmax_wide
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.pytorch_utils import Conv1D

IDS = torch.arange(2, 14)
LAYER, AT = 1, 6
EARLY, LATE = slice(3, 6), slice(6, None)
"""Tokens that are changed, and where that may be seen: attention may have a window."""
Change = Callable[[Tensor], Tensor]


class DoesNotFit(Exception):
    """Why the methods here cannot edit a model of this type."""


@dataclass(frozen=True)
class Measured:
    """What passes through one model showed."""

    down_projection: str
    storage: str
    attention: str
    normalized: bool
    parallel: bool
    residual_scale: str | None
    head: str
    rounding: float = field(compare=False)
    """By how much a pass over a cached prefix differs from one over all."""


@dataclass
class Seen:
    """What a module got and returned, [positions, width] each, in every run of it."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Probe:
    """A model, and how to look into it."""

    model: Any

    @torch.no_grad()
    def look(
        self,
        watched: Iterable[nn.Module],
        changes: Mapping[nn.Module, Change] | None = None,
        ids: Tensor = IDS,
    ) -> tuple[dict[nn.Module, Seen], Tensor]:
        """What modules get and return in one pass, and its logits. `changes` replace
        what some of them return, [positions, width]."""
        seen = {module: Seen() for module in watched}

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            first = args[0] if args else next(iter(kwargs.values()))
            hidden = output[0] if isinstance(output, tuple) else output
            if not isinstance(hidden, Tensor):
                name = self.name_of(module)
                raise DoesNotFit(f"returns from {name} neither a tensor nor a tuple")
            flat = hidden.reshape(-1, hidden.shape[-1])
            if changes and module in changes:
                flat = changes[module](flat.clone())
            if module in seen:
                seen[module].inputs.append(first.reshape(-1, first.shape[-1]))
                # Copies: some blocks add to it in place.
                seen[module].outputs.append(flat.clone())
            hidden = flat.reshape(hidden.shape)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handles = [
            module.register_forward_hook(hook, with_kwargs=True)
            for module in {*seen, *(changes or ())}
        ]
        try:
            logits = self.model(input_ids=ids[None]).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        if not logits.isfinite().all():
            raise FloatingPointError
        return seen, logits

    def name_of(self, wanted: nn.Module) -> str:
        names = (n for n, each in self.model.named_modules() if each is wanted)
        return str(next(names))

    @cached_property
    def blocks(self) -> nn.ModuleList:
        """The outermost list of as many modules as there are layers that has linear
        modules in it.

        Raises:
            DoesNotFit: none, several, layers that are unlike or share weights, or
                experts in them.
        """
        depth = self.model.config.num_hidden_layers
        lists = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList)
            and len(module) == depth
            and all(any(map(_is_linear, each.modules())) for each in module)
        }
        outer = [n for n in lists if not any(n.startswith(f"{o}.") for o in lists)]
        if len(outer) != 1:
            raise DoesNotFit(
                f"has {len(outer)} lists of {depth} blocks ({', '.join(outer)})"
            )
        found = lists[outer[0]]
        kinds = [
            [(name, type(module)) for name, module in block.named_modules()]
            + [(n, p.shape) for n, p in block.named_parameters() if p.ndim > 1]
            for block in found
        ]
        other = [index for index, kind in enumerate(kinds) if kind != kinds[0]]
        if other:
            raise DoesNotFit(f"has layers of unlike kinds: {other} are not as 0 is")
        weights = [id(p) for block in found for p in block.parameters()]
        if len(set(weights)) < len(weights):
            raise DoesNotFit("shares weights between layers")
        for module in found[LAYER].modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 2 and not _is_convolution(module):
                    raise DoesNotFit(
                        f"has {parameter.ndim}-D weights ({self.name_of(module)}."
                        f"{name}): a mixture of experts has several down-projections"
                    )
        return found

    @property
    def block(self) -> nn.Module:
        return self.blocks[LAYER]

    def check_order(self) -> None:
        """Raises: DoesNotFit, unless each block runs once, and no token is seen before
        its turn."""
        seen, logits = self.look(self.blocks)
        if any(len(each.outputs) != 1 for each in seen.values()):
            raise DoesNotFit("has blocks that do not run once in a pass")
        later = IDS.clone()
        later[AT:] += 20
        if differ(self.look([], ids=later)[1][:AT], logits[:AT]):
            raise DoesNotFit("sees what stands after a token: an encoder")

    def candidates(self) -> dict[nn.Module, Seen]:
        """A block's linear modules that return what is as wide as its own output, and
        what they do in a plain pass.

        Raises:
            DoesNotFit: experts, which each get some of the tokens.
        """
        linear = [each for each in self.block.modules() if _is_linear(each)]
        seen, _ = self.look([self.block, *linear])
        width = seen[self.block].outputs[0].shape[1]
        found = {m: seen[m] for m in linear if matrix(m).shape[0] == width}
        for module, each in found.items():
            if [len(rows) for rows in each.outputs] != [len(IDS)]:
                raise DoesNotFit(
                    f"does not run {self.name_of(module)} once for every token, as "
                    "in a mixture of experts, which has several down-projections"
                )
        return found

    @cached_property
    def flow(self) -> dict[nn.Module, tuple[bool, bool]]:
        """Of each such module, whether another's input changes with what it returns,
        and whether its own sees other tokens otherwise than through such modules."""
        seen = self.candidates()
        reached = {}
        for module in seen:
            moved, _ = self.look(seen, {module: _turned(slice(AT, AT + 1))})
            reached[module] = {
                other
                for other in seen
                if differ(moved[other].inputs[0], seen[other].inputs[0])
            }
        found = {}
        for module in seen:
            upstream = [each for each in seen if module in reached[each]]
            changes: dict[nn.Module, Change] = {
                each: partial(_as_before, seen[each].outputs[0]) for each in upstream
            }
            moved, _ = self.look(
                [module], {**changes, self.blocks[LAYER - 1]: _turned(EARLY)}
            )
            here, there = moved[module].inputs[0][LATE], seen[module].inputs[0][LATE]
            found[module] = bool(reached[module]), differ(here, there)
        return found

    @cached_property
    def down(self) -> nn.Module:
        """The MLP's down-projection in the block: the last such module in the flow of
        data whose input sees other tokens through earlier such modules alone, which
        stand for attention.

        Raises:
            DoesNotFit: none or several.
        """
        found = [m for m, (goes_on, mixes) in self.flow.items() if not goes_on | mixes]
        if not found:
            raise DoesNotFit(
                "has no MLP after attention in its blocks: what they return last mixes "
                "tokens"
            )
        if len(found) > 1:
            names = ", ".join(map(self.name_of, found))
            raise DoesNotFit(f"has several down-projections: {names}")
        return found[0]

    def attention(self) -> str:
        """Name in the block of the attention's output projection: such a module whose
        input sees other tokens by itself.

        Raises:
            DoesNotFit: none or several.
        """
        found = [module for module, (_, mixes) in self.flow.items() if mixes]
        names = ", ".join(map(self.name_of, found))
        if len(found) != 1:
            raise DoesNotFit(
                f"has {len(found)} output projections of attention ({names})"
            )
        return names.removeprefix(f"{self.name_of(self.block)}.")

    def pattern(self) -> str:
        """The down-projection's name, `{}` for the layer."""
        own = self.name_of(self.block)
        start = own.removesuffix(str(LAYER)) + "{}"
        return start + self.name_of(self.down).removeprefix(own)

    def storage(self) -> str:
        """By the module's type, which then has to compute what it says.

        Raises:
            DoesNotFit: it computes otherwise.
        """
        seen = self.look([self.down])[0][self.down]
        bias = 0 if self.down.bias is None else self.down.bias
        values = seen.inputs[0] @ matrix(self.down).T + bias  # type: ignore[operator]
        if differ(values, seen.outputs[0]):
            raise DoesNotFit(
                f"stores in {self.name_of(self.down)} other weights than it computes "
                "with"
            )
        return "Conv1D" if isinstance(self.down, Conv1D) else "Linear"

    def random(self, seed: int) -> Tensor:
        """Something to add to what the down-projection returns."""
        weight = matrix(self.down)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(len(weight), generator=generator, dtype=weight.dtype) / 10

    def effect(self, delta: Tensor) -> Tensor:
        """What the block's output [d_value] changes by when δ is added to what its
        down-projection returns."""
        before = self.look([self.block])[0][self.block].outputs[0]
        seen, _ = self.look([self.block], {self.down: _adding(delta)})
        change = seen[self.block].outputs[0] - before
        others = torch.arange(len(IDS)) != AT
        if differ(change[others] + before[others], before[others]):
            raise DoesNotFit("lets an MLP change other tokens in its own block")
        return change[AT]

    def becomes(self) -> tuple[bool, str | None]:
        """Whether what the MLP returns is normalised, and the attribute of a block that
        scales it.

        Raises:
            DoesNotFit: it is scaled by what is no attribute of the block.
        """
        deltas = [self.random(seed) for seed in range(2)]
        changes = [self.effect(delta) for delta in deltas]
        scales = [
            change @ delta / (delta @ delta)
            for change, delta in zip(changes, deltas, strict=True)
        ]
        plain = not differ(scales[0], scales[1]) and not any(
            differ(change, scales[0] * delta)
            for change, delta in zip(changes, deltas, strict=True)
        )
        if not any(differ(change, 0 * change) for change in changes):
            raise DoesNotFit("returns blocks that its MLPs have no part in")
        attribute = self.halving(deltas[0], changes[0] / 2)
        if plain and attribute is None and differ(scales[0], torch.ones(())):
            raise DoesNotFit(
                f"scales what its MLPs return by {float(scales[0]):.4g}, which is no "
                "attribute of its blocks"
            )
        return not plain, attribute

    def halving(self, delta: Tensor, half: Tensor) -> str | None:
        """The block's attribute that halves the effect when it is halved: one that is
        1 can be found by nothing else."""
        numbers = {n: v for n, v in vars(self.block).items() if isinstance(v, float)}
        for name, value in numbers.items():
            setattr(self.block, name, value / 2)
            try:
                # Its other work, in attention say, would halve no effect exactly.
                if value and not differ(self.effect(delta), half):
                    return name
            finally:
                setattr(self.block, name, value)
        return None

    def parallel(self, pattern: str) -> bool:
        """Whether the first block's key depends on its token alone."""
        first = self.model.get_submodule(pattern.format(0))
        earlier = IDS.clone()
        earlier[EARLY] += 20
        keys = [
            self.look([first], ids=ids)[0][first].inputs[0][LATE]
            for ids in (IDS, earlier)
        ]
        return not differ(*keys)

    @torch.no_grad()
    def check_mask(self) -> None:
        """Raises: DoesNotFit, unless tokens on the left that a mask hides change
        nothing."""
        hidden = torch.zeros(3, dtype=IDS.dtype)
        places = torch.arange(len(IDS))
        found = self.model(
            input_ids=torch.cat([hidden + 7, IDS])[None],
            attention_mask=torch.cat([hidden, torch.ones_like(IDS)])[None],
            position_ids=torch.cat([hidden, places])[None],
        ).logits[0, len(hidden) :]
        if not found.isfinite().all():
            raise FloatingPointError
        if differ(found, self.look([])[1]):
            raise DoesNotFit("sees tokens that its attention mask hides")

    @torch.no_grad()
    def rounding(self) -> float:
        """How exactly a pass that is given a prefix's attention keys and values says
        what one over the whole says.

        Raises:
            DoesNotFit: not at all.
        """
        _, whole = self.look([])
        places = torch.arange(len(IDS))[None]

        def run(part: slice, cache: Cache) -> Any:
            return self.model(
                input_ids=IDS[None, part],
                attention_mask=torch.ones_like(IDS)[None, : part.stop],
                position_ids=places[:, part],
                past_key_values=cache,
                use_cache=True,
            )

        try:
            begun = run(slice(0, AT), DynamicCache()).past_key_values
            cache = DynamicCache()
            layers = [(kept.keys, kept.values) for kept in begun.layers]
            for index, (keys, values) in enumerate(layers):
                if keys.shape[2] != AT or values.shape[2] != AT:
                    raise ValueError("other columns than tokens")
                cache.update(keys, values, index)
            rest = run(slice(AT, len(IDS)), cache).logits[0]
        except (AttributeError, IndexError, TypeError, ValueError, RuntimeError) as e:
            if "overflow" in str(e):
                raise
            raise DoesNotFit(
                "does not go on from a cache of attention keys and values "
                f"({' '.join(str(e).split())[:80]})"
            ) from e
        if len(layers) != len(self.blocks):
            raise DoesNotFit(
                f"caches keys and values of {len(layers)} of {len(self.blocks)} layers"
            )
        error = distance(rest, whole[AT:])
        if differ(rest, whole[AT:]):
            raise DoesNotFit(
                "says something else when it goes on from a cache of attention keys "
                f"and values than after the whole prompt (by {error:.1g})"
            )
        return error

    def measure(self) -> Measured:
        """Raises: DoesNotFit."""
        head = self.model.get_output_embeddings()
        if head is None:
            raise DoesNotFit("has no language-model head")
        self.check_order()
        pattern = self.pattern()
        normalized, scale = self.becomes()
        with pytest.MonkeyPatch.context() as patch:
            keep_softmax_wide(patch)
            self.check_mask()
            rounding = self.rounding()
        return Measured(
            pattern,
            self.storage(),
            self.attention(),
            normalized,
            self.parallel(pattern),
            scale,
            self.name_of(head),
            rounding,
        )


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative where something is expected."""
    size = float(expected.norm())
    return float((found - expected).norm()) / (size or 1.0)


def differ(found: Tensor, expected: Tensor) -> bool:
    """By more than rounding, in models some of which compute in float32."""
    return distance(found, expected) > 1e-4


def matrix(module: nn.Module) -> Tensor:
    """Its weight as [output, input]."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(module, Conv1D) else weight


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d)


def _adding(delta: Tensor) -> Change:
    def add(output: Tensor) -> Tensor:
        output[AT] += delta
        return output

    return add


def _turned(rows: slice) -> Change:
    """What makes other rows of some of a module's, and not small changes: attention
    may be sure of what it attends to."""

    def turn(output: Tensor) -> Tensor:
        output[rows] = output[rows].flip(1)
        return output

    return turn


def _as_before(before: Tensor, output: Tensor) -> Tensor:
    output[LATE] = before[LATE]
    return output


def measure(family: Family, **changes: Any) -> Measured:
    """Raises: DoesNotFit."""
    return Probe(family.make(**changes)).measure()
