"""Losses, their gradients in factors, and changed linear maps: against plain forward
passes of one prompt at a time, on weights that were really changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from families import FAMILIES, VARIANTS, Family
from model_kit import EDITS, KINDS, Tiny, make_model, make_tokenizer
from test_target_families import keep_softmax_wide
from test_wrapped import WRAPPED
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from unified_edit.edits import Edit
from unified_edit.errors import NonFiniteError, PromptError
from unified_edit.model.adapter import ModelAdapter
from unified_edit.model.frames import PLAIN, Frame
from unified_edit.model.gradients import (
    Factors,
    Labelled,
    decomposed,
    labelled,
    logits_of,
    nll,
    with_changes,
    with_matrices,
)

ALL: dict[str, Family] = {**FAMILIES, **VARIANTS, **WRAPPED}
CHOSEN = [EDITS[0], EDITS[3]]
"""Prompts and targets of different lengths."""
Row = tuple[list[int], list[int]]


def rows_of(
    tokenizer: Any, edits: Sequence[Edit] = EDITS, frame: Frame = PLAIN
) -> list[Row]:
    """Ids of each prompt, and of what follows it."""
    rows = []
    for edit in edits:
        prompt = frame.before + edit.text + frame.after
        ids = tokenizer(prompt)["input_ids"]
        whole = tokenizer(prompt + frame.joint + edit.target)["input_ids"]
        assert whole[: len(ids)] == ids
        rows.append((ids, whole[len(ids) :]))
    assert len({len(ids) + len(answer) for ids, answer in rows}) > 1
    assert len({len(answer) for _, answer in rows}) > 1
    return rows


def batch_of(
    adapter: ModelAdapter, tokenizer: Any, edits: Sequence[Edit] = EDITS
) -> Labelled:
    texts, targets = [edit.text for edit in edits], [edit.target for edit in edits]
    return labelled(adapter, tokenizer, texts, targets)


def plain_nll(model: Any, row: Row, weights: Mapping[str, Tensor] = {}) -> Tensor:
    """-log p of the whole answer, without padding; `weights` instead of the model's."""
    ids, answer = row
    logits = torch.func.functional_call(
        model,
        dict(weights),
        kwargs={"input_ids": torch.tensor([ids + answer[:-1]]), "use_cache": False},
    ).logits[0]
    logs = logits.log_softmax(-1)[len(ids) - 1 :]
    assert len(logs) == len(answer)
    return -logs[range(len(answer)), answer].sum()


def plain_mean(model: Any, row: Row, weights: Mapping[str, Tensor] = {}) -> Tensor:
    return plain_nll(model, row, weights) / len(row[1])


def stored(module: nn.Module, matrix: Tensor) -> Tensor:
    """A matrix [d_out, d_in] as the module stores it, or back."""
    return matrix.T if isinstance(module, Conv1D) else matrix


def summed(factors: Factors, row: int | slice = slice(None)) -> Tensor:
    """Σδxᵀ [d_out, d_in], token by token."""
    x, delta = factors.x[row].flatten(0, -2), factors.delta[row].flatten(0, -2)
    return sum(torch.outer(d, k) for d, k in zip(delta, x, strict=True))  # type: ignore[return-value]


def near(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    assert found.shape == expected.shape
    size = float(expected.norm())
    assert size > 0
    return float((found - expected).norm()) <= tolerance * size


def hooks_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer("llama")


@pytest.fixture(scope="module", params=ALL)
def made(request: pytest.FixtureRequest) -> tuple[Family, ModelAdapter]:
    """A small model of each family in turn."""
    family = ALL[request.param]
    return family, ModelAdapter.of(family.make(layers=2))


@pytest.mark.parametrize(
    "frame", [PLAIN, Frame("They ask. ", ".\nThey say:", "  ")], ids=["plain", "framed"]
)
def test_nll_is_that_of_whole_answers_one_at_a_time(tiny64: Tiny, frame: Frame) -> None:
    rows = rows_of(tiny64.tokenizer, EDITS, frame)
    texts, targets = [edit.text for edit in EDITS], [edit.target for edit in EDITS]
    batch = labelled(tiny64.adapter, tiny64.tokenizer, texts, targets, frame=frame)
    assert len(batch) == len(EDITS)
    found = nll(tiny64.adapter, batch)
    assert found.dtype == torch.float64
    counts = torch.tensor([len(answer) for _, answer in rows])
    plain = torch.stack([plain_nll(tiny64.model, row) for row in rows])
    assert torch.allclose(found * counts, plain, rtol=1e-10)
    # Through other rows' padding, and to every parameter.
    parameters = dict(tiny64.model.named_parameters())
    mine = torch.autograd.grad(found.sum(), list(parameters.values()))
    other = torch.autograd.grad((plain / counts).sum(), list(parameters.values()))
    for name, a, b in zip(parameters, mine, other, strict=True):
        # The keys' biases move all scores alike.
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10), name
        assert float(a.abs().max()) > 0, name


def test_every_family_in_factors(
    made: tuple[Family, ModelAdapter], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Σδxᵀ is autograd's gradient by every linear map of the MLPs; maps that are
    changed by factors, each row by its own, compute what changed weights do."""
    keep_softmax_wide(monkeypatch)
    family, adapter = made
    model, tolerance = adapter.model, 10 * family.tolerance
    names = [each for layer in (0, 1) for each in adapter.mlp_modules(layer)]
    maps = {each: model.get_submodule(each) for each in names}
    weights = {f"{each}.weight": maps[each].weight for each in names}
    rows, batch = rows_of(tokenizer, CHOSEN), batch_of(adapter, tokenizer, CHOSEN)

    found, losses = decomposed(adapter, batch, names)
    for weight in weights.values():
        weight.requires_grad_(True)
    plain = [plain_mean(model, row) for row in rows]
    gradients = torch.autograd.grad(sum(plain), list(weights.values()))  # type: ignore[arg-type]
    for weight in weights.values():
        weight.requires_grad_(False)
    plain = [each.detach() for each in plain]
    assert torch.allclose(losses, torch.stack(plain), rtol=tolerance)
    for each, gradient in zip(names, gradients, strict=True):
        assert near(stored(maps[each], summed(found[each])), gradient, tolerance), each

    scale = {each: 0.3 / float(summed(f).norm()) for each, f in found.items()}
    changes = {e: Factors(f.x, -scale[e] * f.delta) for e, f in found.items()}
    with torch.no_grad(), with_changes(model, changes):
        changed = nll(adapter, batch)
    for index, row in enumerate(rows):
        new = {
            f"{each}.weight": weights[f"{each}.weight"]
            + stored(maps[each], summed(changes[each], index))
            for each in names
        }
        expected = plain_mean(model, row, new)
        assert abs(float(expected - plain[index])) > 1e-2
        assert math.isclose(changed[index], expected, rel_tol=tolerance)


def test_mlp_modules_are_what_a_block_has_beside_its_attention(
    made: tuple[Family, ModelAdapter],
) -> None:
    _, adapter = made
    for layer in (0, 1):
        names = adapter.mlp_modules(layer)
        prefix = adapter.architecture.block.format(layer)
        attention = f"{prefix}.{adapter.architecture.attention}".rpartition(".")[0]
        assert attention != prefix
        assert [*names] == [
            name
            for name, module in adapter.model.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
            and name.startswith(f"{prefix}.")
            and not name.startswith(f"{attention}.")
        ]
        assert len(names) in (2, 3) and names[-1] == adapter.key_module(layer)
        for each in names:
            address = adapter.address(layer, each)
            module = adapter.model.get_submodule(each)
            assert adapter.model.get_parameter(address.tensor) is module.weight
            assert address.layer == layer
            assert address.transposed == isinstance(module, Conv1D)
        assert adapter.address(layer, adapter.key_module(layer)) == adapter.address(
            layer
        )


def test_rows_stay_apart(tiny64: Tiny) -> None:
    names = [*tiny64.adapter.mlp_modules(0), *tiny64.adapter.mlp_modules(2)]
    batch = batch_of(tiny64.adapter, tiny64.tokenizer)
    together, losses = decomposed(tiny64.adapter, batch, names)
    assert list(together) == names and not losses.requires_grad
    for index, edit in enumerate(EDITS):
        one = batch_of(tiny64.adapter, tiny64.tokenizer, [edit])
        alone, loss = decomposed(tiny64.adapter, one, names)
        assert math.isclose(losses[index], loss[0], rel_tol=1e-10)
        length = one.rows.ids.shape[1]
        padding = batch.rows.ids.shape[1] - length
        assert int((batch.rows.mask[index] == 0).sum()) == padding
        for name in names:
            both, single = together[name], alone[name]
            assert not both.x.requires_grad and not both.delta.requires_grad
            assert not both.delta[index, length:].any()
            assert near(both.x[index, :length], single.x[0], 1e-10)
            assert near(both.delta[index, :length], single.delta[0], 1e-10)
            # A causal model: no token is without effect before the last label.
            assert bool(single.delta[0, -1].any())


def _mixed(tiny: Tiny) -> Any:
    """A copy in which some parameters want gradients and some modules train."""
    model = copy.deepcopy(tiny.model)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
    return model


@pytest.mark.parametrize("gradients", [True, False])
def test_a_model_is_left_as_it_was(tiny: Tiny, gradients: bool) -> None:
    model = _mixed(tiny)
    adapter = ModelAdapter.of(model)
    wanted = [p.requires_grad for p in model.parameters()]
    batch = batch_of(adapter, tiny.tokenizer)
    names = list(adapter.mlp_modules(1))

    def check() -> None:
        assert [p.requires_grad for p in model.parameters()] == wanted
        assert all(p.grad is None for p in model.parameters())
        assert not hooks_of(model)

    with torch.set_grad_enabled(gradients):
        found, losses = decomposed(adapter, batch, names)
        check()
        with pytest.raises(AttributeError):
            decomposed(adapter, batch, [*names, "no.such.module"])
        check()
        matrices = {name: summed(found[name]) for name in names}
        for changed in (with_changes(model, found), with_matrices(model, matrices)):
            with pytest.raises(KeyError), changed:
                assert len(hooks_of(model)) == len(names)
                raise KeyError
            check()
        for changed in (
            with_changes(model, {**found, "no.such.module": found[names[0]]}),
            with_matrices(model, {**matrices, "no.such.module": matrices[names[0]]}),
        ):
            with pytest.raises(AttributeError), changed:
                pass
            check()
        expected = nll(adapter, batch)
        assert expected.requires_grad == gradients
        assert torch.allclose(losses, expected)
        with torch.no_grad():
            adapter.weight(2)[0, 0] = math.nan
        with pytest.raises(NonFiniteError) as caught:
            decomposed(adapter, batch, names)
        assert adapter.address(2).tensor in str(caught.value)
        check()


def test_what_cannot_be_tokenized_or_run_is_refused(tiny: Tiny) -> None:
    adapter = tiny.adapter
    with pytest.raises(PromptError, match="96 positions"):
        labelled(adapter, tiny.tokenizer, ["x " * 99 + "x"], ["Oslo"])
    with pytest.raises(PromptError, match="change when 'ves' follows"):
        labelled(adapter, tiny.tokenizer, ["Bo li"], ["ves"], frame=Frame(joint=""))
    with pytest.raises(PromptError, match="token id"):
        small = ModelAdapter.of(make_model("llama", 40))
        labelled(small, tiny.tokenizer, ["Bo lives in"], ["Oslo"])


def _random_changes(
    tiny: Tiny, count: int, rank: int = 3, seed: int = 0
) -> dict[str, Factors]:
    """Changes of all of an MLP's maps and one more, large enough to matter, that want
    gradients."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in (*tiny.adapter.mlp_modules(1), tiny.adapter.key_module(2)):
        module = tiny.model.get_submodule(name)
        d_out, d_in = stored(module, module.weight).shape
        x, delta = (
            torch.randn(count, rank, d, generator=generator, dtype=torch.float64) * 0.3
            for d in (d_in, d_out)
        )
        found[name] = Factors(x.requires_grad_(), delta.requires_grad_())
    return found


def _changed_weights(
    tiny: Tiny, changes: Mapping[str, Factors], row: int
) -> dict[str, Tensor]:
    found = {}
    for name, change in changes.items():
        module = tiny.model.get_submodule(name)
        matrix = torch.einsum("to,ti->oi", change.delta[row], change.x[row])
        found[f"{name}.weight"] = module.weight + stored(module, matrix)
    return found


@pytest.mark.parametrize("owners", [None, [1, 0, 1, 1, 2]])
def test_each_row_has_the_change_that_it_owns(
    tiny64: Tiny, owners: list[int] | None
) -> None:
    """Values and gradients by both factors; `owners` may give one to several rows and
    another to none."""
    count = len(EDITS) if owners is None else 4
    changes = _random_changes(tiny64, count)
    batch = batch_of(tiny64.adapter, tiny64.tokenizer)
    chosen = None if owners is None else torch.tensor(owners)
    with with_changes(tiny64.model, changes, chosen):
        found = nll(tiny64.adapter, batch)
        logits = logits_of(tiny64.adapter, batch.rows)
    assert logits.shape[:2] == batch.rows.ids.shape
    expected = torch.stack(
        [
            plain_mean(tiny64.model, row, _changed_weights(tiny64, changes, owner))
            for row, owner in zip(
                rows_of(tiny64.tokenizer),
                range(count) if owners is None else owners,
                strict=True,
            )
        ]
    )
    assert torch.allclose(found, expected, rtol=1e-10)
    unchanged = nll(tiny64.adapter, batch)
    assert bool(((found - unchanged).abs() > 1e-3).all())
    leaves = [t for change in changes.values() for t in (change.x, change.delta)]
    pairs = zip(
        torch.autograd.grad(found.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    )
    for mine, other in pairs:
        assert near(mine, other, 1e-9)
        if owners is not None:  # what nobody owns matters to nobody
            assert not mine[3].any() and bool(mine[2].any())


def test_matrices_are_the_same_for_all_rows(tiny64: Tiny) -> None:
    changes = {
        name: torch.einsum("to,ti->oi", change.delta[0], change.x[0])
        .detach()
        .requires_grad_()
        for name, change in _random_changes(tiny64, 1).items()
    }
    batch, rows = batch_of(tiny64.adapter, tiny64.tokenizer), rows_of(tiny64.tokenizer)
    with with_matrices(tiny64.model, changes):
        found = nll(tiny64.adapter, batch)
    new = {
        f"{name}.weight": (module := tiny64.model.get_submodule(name)).weight
        + stored(module, change)
        for name, change in changes.items()
    }
    expected = torch.stack([plain_mean(tiny64.model, row, new) for row in rows])
    assert torch.allclose(found, expected, rtol=1e-10)
    leaves = list(changes.values())
    for mine, other in zip(
        torch.autograd.grad(found.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        assert near(mine, other, 1e-9)
    # A change of nothing is none.
    zeros = {name: torch.zeros_like(change) for name, change in changes.items()}
    before = nll(tiny64.adapter, batch)
    with with_matrices(tiny64.model, zeros):
        assert torch.equal(nll(tiny64.adapter, batch), before)
    assert bool(((found - before).abs() > 1e-3).all())


@pytest.mark.parametrize("kind", KINDS)
def test_changes_of_half_precision_maps_are_computed_wide(kind: str) -> None:
    """A map's input meets a float32 change as it is; only what is added is rounded."""
    model = make_model(kind).bfloat16()
    adapter = ModelAdapter.of(model)
    tiny = Tiny(kind, model, make_tokenizer(kind), {})
    name = adapter.key_module(1)
    random = _random_changes(tiny, 2)[name]
    change = Factors(random.x.detach().float(), random.delta.detach().float())
    batch = batch_of(adapter, tiny.tokenizer, CHOSEN)
    module = model.get_submodule(name)
    seen: list[tuple[Tensor, Tensor]] = []

    def see(_: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.append((inputs[0].detach(), output.detach()))

    matrices = [summed(change, row) for row in (0, 1)]
    with torch.no_grad():
        for context in (
            None,
            with_changes(model, {name: change}),
            with_matrices(model, {name: matrices[0]}),
        ):
            if context is None:
                with module.register_forward_hook(see):
                    logits_of(adapter, batch.rows)
                continue
            with context, module.register_forward_hook(see):
                logits_of(adapter, batch.rows)
    (given, output), (_, apart), (_, same) = seen
    assert apart.dtype == same.dtype == torch.bfloat16
    for found, chosen in ((apart, matrices), (same, matrices[:1] * 2)):
        for row, matrix in enumerate(chosen):
            more = (given[row].double() @ matrix.double().T).float()
            expected = output[row] + more.bfloat16()
            # Where float32 ends just beside the middle of two bfloat16 values.
            assert float((found[row] != expected).float().mean()) < 0.01
            narrow = output[row] + given[row] @ matrix.bfloat16().T
            assert float((found[row] != narrow).float().mean()) > 0.1
