"""Every family of the table is what its record says, and is edited as the mathematics
has it: each against plain loops over a small random model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import (
    CONTEXTS,
    FAMILIES,
    FEW,
    LAYER,
    TOKENS,
    VARIANTS,
    Built,
    build,
    seen_by,
)
from model_kit import EDITS, TEXTS, rows_of, subject_index
from torch import Tensor

from covariance_cache.corpus import Documents, packed_windows
from unified_edit import applied, emmet
from unified_edit.edits import Edit
from unified_edit.engine import edit
from unified_edit.errors import RecipeError
from unified_edit.model.adapter import ModelAdapter, Site
from unified_edit.model.descent import Targets, TargetSettings
from unified_edit.model.keys import keys_at_subjects
from unified_edit.model.prompts import Contexts
from unified_edit.model.targets import optimize_targets

CHOSEN = EDITS[:3]


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Built:
    """Of every family in turn, without files: no test here reads them."""
    family = {**FAMILIES, **VARIANTS}[request.param]
    return build(family, tmp_path_factory.getbasetemp(), save=False, layers=FEW)


def at_subject(built: Built, chosen: Edit, module: torch.nn.Module) -> Tensor:
    """What a module returns at the subject's last token of the bare prompt."""
    ids = built.tokenizer(chosen.text)["input_ids"]
    end = chosen.text.index(chosen.subject) + len(chosen.subject)
    index = subject_index(built.tokenizer, ids, chosen.text, end)
    return seen_by(built.model, module, ids)[1][index].double()


def test_the_record_says_what_the_model_does(built: Built) -> None:
    model = built.wide
    adapter = ModelAdapter.of(model)
    record = adapter.architecture
    ids = list(range(2, 14))
    assert adapter.layer_count == FEW
    (head,) = (n for n, module in model.named_modules() if module is adapter.head)
    assert head in record.heads

    # The value: the stored weight, read as the record says, times the key.
    down, block = adapter.down_projection(LAYER), adapter.block(LAYER)
    keys, values = seen_by(model, down, ids)
    bias = 0 if down.bias is None else down.bias
    assert torch.allclose(keys @ adapter.matrix(LAYER).T + bias, values, atol=1e-5)

    # What it becomes of: added to the block's output as it is, scaled, or normalised.
    change = torch.randn(values.shape[1], dtype=values.dtype) / 10
    _, before = seen_by(model, block, ids)

    def add(_: torch.nn.Module, __: object, output: Tensor) -> Tensor:
        output = output.clone()
        output.view(-1, output.shape[-1])[3] += change
        return output

    with down.register_forward_hook(add):
        _, after = seen_by(model, block, ids)
    others = [index for index in range(len(ids)) if index != 3]
    assert torch.equal(before[others], after[others])
    expected = change * adapter.residual_scale(LAYER)
    added = torch.allclose(after[3] - before[3], expected, atol=1e-5)
    assert added != adapter.normalized

    # In the first block the key sees other tokens only through attention before it.
    first = adapter.down_projection(0)
    here, _ = seen_by(model, first, ids)
    there, _ = seen_by(model, first, [id + 9 for id in ids[:3]] + ids[3:])
    alone = torch.allclose(here[3], there[3], atol=1e-6)
    assert alone == adapter.parallel


def test_keys_are_what_plain_passes_show(built: Built) -> None:
    found = keys_at_subjects(
        built.adapter, built.tokenizer, CHOSEN, CONTEXTS, LAYER, "half"
    )
    down = built.adapter.down_projection(LAYER)
    for key, chosen in zip(found, CHOSEN, strict=True):
        plain = [
            seen_by(built.model, down, ids)[0][index].double()
            for _, ids, index in rows_of(built.tokenizer, chosen, CONTEXTS)
        ]
        expected = (plain[0] + plain[1]) / 2
        assert float((key - expected).norm() / expected.norm()) < 1e-5


def test_statistics_are_what_plain_passes_show(built: Built) -> None:
    windows = packed_windows(
        built.tokenizer, Documents(TEXTS, seed=0), length=48, budget=TOKENS
    )
    down = built.adapter.down_projection(LAYER)
    rows = [seen_by(built.model, down, window.ids)[0] for window in windows]
    keys = torch.cat(rows).double()
    expected = keys.T @ keys / len(keys)
    found = built.statistics[LAYER]
    assert found.count == len(keys) == TOKENS
    error = (found.second_moment.double() - expected).norm() / expected.norm()
    assert float(error) < 1e-5


@pytest.mark.parametrize("site", ["block_output", "mlp_output"])
def test_an_equality_edit_reaches_its_values(built: Built, site: Site) -> None:
    """(W + ΔW) k = v, seen in a forward pass of the edited model."""
    adapter = built.adapter
    settings = TargetSettings(site)
    recipe = emmet(layers=[LAYER], site=site, key_average="clean")
    module = adapter.site(adapter.target_site(site), LAYER)
    now = torch.stack([at_subject(built, each, module) for each in CHOSEN])
    generator = torch.Generator().manual_seed(1)
    wanted = now + torch.randn(now.shape, generator=generator) * now.std()
    nothing = torch.zeros(len(CHOSEN))
    targets = Targets(wanted, now, nothing, nothing, nothing.long())
    assert settings.largest  # a site's own clamp exists
    result = edit(
        built.model, built.tokenizer, CHOSEN, recipe, built.statistics,
        contexts=CONTEXTS, targets=targets,
    )  # fmt: skip
    with applied(built.model, result.update):
        for value, chosen in zip(wanted, CHOSEN, strict=True):
            reached = at_subject(built, chosen, module)
            assert float((reached - value).norm() / value.norm()) < 1e-5


def test_an_edit_makes_its_target_likelier(built: Built) -> None:
    """One whose subject stands last: what random blocks make of an earlier one says
    little."""
    (chosen,) = (each for each in CHOSEN if each.text.endswith(each.subject))
    free = {"kl_factor": 0.0, "weight_decay": 0.0}
    result = built.edit([chosen], contexts=Contexts(), steps=20, **free)
    (outcome,) = result.report.outcomes
    assert outcome.optimised > 1.1 * outcome.before
    assert outcome.after > 1.02 * outcome.before
    note = "normalises what its MLPs return"
    assert built.adapter.normalized == any(note in n for n in result.report.notes)


def test_batches_of_one_and_of_many_agree(built: Built) -> None:
    model = built.wide
    adapter = ModelAdapter.of(model)
    settings = TargetSettings("block_output", steps=2, clamp=4.0)

    def targets(edits: list[Edit]) -> Tensor:
        found = optimize_targets(
            adapter, built.tokenizer, edits, CONTEXTS, LAYER, settings
        )
        return found.values - found.initial

    def keys(edits: list[Edit]) -> Tensor:
        return keys_at_subjects(
            adapter, built.tokenizer, edits, CONTEXTS, LAYER, "half"
        )

    for compute in (targets, keys):
        many = compute(CHOSEN[1:])
        alone = torch.cat([compute([each]) for each in CHOSEN[1:]])
        error = (many - alone).norm() / many.norm()
        assert float(error) < max(built.family.tolerance, 1e-6)


@pytest.mark.parametrize(
    "name", [name for name, family in FAMILIES.items() if family.odd]
)
def test_an_odd_number_of_dimensions(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    assert family.odd is not None
    built = build(family, tmp_path, save=False, layers=FEW, **family.odd)
    assert built.adapter.matrix(LAYER).shape[1] % 2 == 1
    result = built.edit(CHOSEN[:2], steps=2)
    (certificate,) = result.report.certificates.values()
    assert certificate.worst_residual_error < 1e-8


def test_several_layers_are_refused_where_a_norm_follows(built: Built) -> None:
    if not built.adapter.normalized:
        built.adapter.check_layers([LAYER, LAYER + 1])
        return
    with pytest.raises(RecipeError, match="normalises.*name one layer"):
        built.adapter.check_layers([LAYER, LAYER + 1])
    built.adapter.check_layers([LAYER])
