"""What `add_family.py` measures is what the table says; what does not fit is refused by
what it does, not by its name; and the lines it writes are those that were there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import add_family
import pytest
import torch
from add_family import (
    FILES,
    KEYS,
    RECORDS,
    ROOT,
    Switches,
    agrees,
    default_config,
    entries,
    inserted,
    key_line,
    main,
    names_of_tests,
    record_lines,
    survey,
)
from families import FAMILIES, GPT_SHAPE, VARIANTS, Family
from family_probe import DoesNotFit, Measured, Probe, measure
from torch import Tensor, nn

from unified_edit.model.architectures import ARCHITECTURES

SAMPLE = [
    *("biogpt", "cohere", "gemma2", "gpt_neo", "gpt_neox", "granite"),
    *("minicpm3", "mistral", "mpt", "olmo2", "phi"),
]


@pytest.mark.parametrize("name", SAMPLE)
def test_it_measures_what_the_table_says(name: str) -> None:
    family = FAMILIES[name]
    found = survey(family)
    assert agrees(found.record, ARCHITECTURES[name]), found.record
    assert found.family == family


def test_wider_arithmetic_is_asked_for_where_float64_overflows() -> None:
    plain = Family("mpt", shape=FAMILIES["mpt"].shape, odd=None)
    assert survey(plain).family == FAMILIES["mpt"]


# Switches


def _measured(**facts: bool) -> Measured:
    known: dict[str, Any] = {"normalized": False, "parallel": False, **facts}
    names: dict[str, Any] = {"down_projection": "h.{}.down", "storage": "Linear"}
    names["attention"] = "attn.out"
    return Measured(**names, **known, residual_scale=None, head="head", rounding=0.0)


@pytest.mark.parametrize("base", [(x, y) for x in (0, 1) for y in (0, 1)])
@pytest.mark.parametrize(
    ("truth", "expected"),
    [
        (lambda a, b: a, (("a", True),)),
        (lambda a, b: not b, (("b", False),)),
        (lambda a, b: a or not b, (("a", True), ("b", False))),
        (lambda a, b: True, True),
        (lambda a, b: False, ()),
    ],
)
def test_conditions_are_found_from_any_configuration(
    truth: Callable[[Any, Any], Any], expected: Any, base: tuple[int, int]
) -> None:
    class Known(Switches):
        settings: Any = {"a": bool(base[0]), "b": bool(base[1])}

        def flipped(self, state: Any) -> Any:
            now = {**self.settings, **state}
            flips = [(name, {**now, name: not now[name]}) for name in now]
            return {n: _measured(parallel=bool(truth(**each))) for n, each in flips}

    switches = Known(FAMILIES["llama"], _measured(parallel=bool(truth(*base))))
    flips = switches.flipped({})
    found = switches.condition("parallel", flips)
    if expected == (("a", True), ("b", False)) and base == (1, 0):
        # Either alone suffices, so that neither switch does anything by itself.
        assert found is True
    else:
        assert found == expected
    assert switches.condition("normalized", flips) == ()


def test_a_condition_on_several_switches_together_is_refused() -> None:
    class Both(Switches):
        settings: Any = {"a": True, "b": True}

        def flipped(self, state: Any) -> Any:
            now = {**self.settings, **state}
            flips = [(name, {**now, name: not now[name]}) for name in now]
            return {n: _measured(parallel=each["a"] and each["b"]) for n, each in flips}

    switches = Both(FAMILIES["llama"], _measured(parallel=True))
    with pytest.raises(DoesNotFit, match="a and b are as they are together"):
        switches.condition("parallel", switches.flipped({}))


# Refusals


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mixtral", "mixture of experts"),
        ("t5", "encoder-decoder"),
        ("mamba", "state-space"),
        ("bert", "encoder"),
        ("jamba", "state-space"),
        ("llava", "wraps a text decoder .'llama'.*WRAPPERS"),
        ("gpt-sw3", "another name of 'gpt2'"),
        ("vit", "not among transformers' causal language models"),
        ("no_such_type", "not in the installed transformers"),
    ],
)
def test_a_type_is_refused_with_its_reason(
    name: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--write"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert re.search(f"^{name} .*{reason}", told.err, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mixtral", "3-D weights .*experts.*several down-projections"),
        ("mamba", "no MLP after attention"),
        ("bert", "sees what stands after a token"),
        ("jamba", "layers of unlike kinds"),
    ],
)
def test_what_does_not_fit_is_seen_by_what_it_does(name: str, reason: str) -> None:
    with pytest.raises(DoesNotFit, match=reason):
        measure(Family(name))


def test_an_encoder_decoder_tells_by_its_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(add_family, "REFUSED", {})
    with pytest.raises(DoesNotFit, match="is an encoder-decoder"):
        default_config("t5")


class _Rounded(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.sign())


class _Scaled(nn.Module):
    inside: Any

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, hidden: Tensor) -> Any:
        return 0.3 * self.inside(hidden)


class _Twice(_Scaled):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__(inside)
        down: Any = inside.down_proj
        self.other = nn.Linear(24, down.out_features, dtype=down.weight.dtype)

    def forward(self, hidden: Tensor) -> Any:
        return self.inside(hidden) + self.other(hidden)


class _Useless(_Scaled):
    def forward(self, hidden: Tensor) -> Any:
        return 0 * self.inside(hidden)


def _break(model: Any, how: str) -> None:
    layers = model.model.layers
    for layer in layers:
        if how == "rounded":
            new = _Rounded(40, 24, bias=False)
            new.weight = layer.mlp.down_proj.weight
            layer.mlp.down_proj = new
        elif how == "shared":
            layer.mlp = layers[0].mlp
        else:
            kinds = {"scaled": _Scaled, "twice": _Twice, "useless": _Useless}
            layer.mlp = kinds[how](layer.mlp)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("rounded", r"stores in model.layers.1.mlp.down_proj other weights than it"),
        ("shared", "shares weights between layers"),
        ("scaled", "scales what its MLPs return by 0.3, which is no attribute"),
        ("twice", "several down-projections: .*down_proj, .*other"),
        ("useless", "that its MLPs have no part in"),
    ],
)
def test_a_llama_with_one_thing_changed_does_not_fit(how: str, reason: str) -> None:
    model = FAMILIES["llama"].make()
    Probe(model).measure()
    _break(model, how)
    with pytest.raises(DoesNotFit, match=reason):
        Probe(model).measure()


def test_a_model_that_forgets_its_cache_does_not_fit() -> None:
    model = FAMILIES["llama"].make()
    forward = model.forward

    def forgetful(input_ids: Tensor, **options: Any) -> Any:
        output = forward(input_ids, **options)
        for kept in getattr(output.past_key_values, "layers", ()):
            kept.values = torch.zeros_like(kept.values)
        return output

    model.forward = forgetful
    with pytest.raises(DoesNotFit, match="something else when it goes on from a cache"):
        Probe(model).measure()


def test_a_model_that_takes_no_mask_does_not_fit() -> None:
    model = FAMILIES["llama"].make()
    forward = model.forward

    def seeing(input_ids: Tensor, attention_mask: Any = None, **options: Any) -> Any:
        return forward(input_ids, **options)

    model.forward = seeing
    with pytest.raises(DoesNotFit, match="tokens that its attention mask hides"):
        Probe(model).measure()


# Lines


def test_every_line_of_the_tables_is_one_it_would_write() -> None:
    """Taken out and put in again, each comes where it was, as it was."""
    for file, table, line in (
        (KEYS, "KEY_MODULES", key_line),
        (RECORDS, "ARCHITECTURES", record_lines),
    ):
        text = (ROOT / file).read_text("utf-8")
        assert list(entries(text, table)) == list(ARCHITECTURES)
        for name, record in ARCHITECTURES.items():
            without = _without(text, table, name)
            assert without != text and name not in entries(without, table)
            assert inserted(without, table, name, line(record)) == text


def _without(text: str, table: str, name: str) -> str:
    first, last = entries(text, table)[name]
    lines = text.splitlines(keepends=True)
    return "".join(lines[: first - 1] + lines[last:])


TABLES = ("KEY_MODULES", "ARCHITECTURES", "_OWN")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the files that the command changes."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def _contents(tree: Path) -> list[str]:
    return [(tree / name).read_text("utf-8") for name in FILES]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("qwen2", None),  # its own config stays where it is
        ("phi3", []),
        ("gpt2", []),
        ("bloom", []),
        ("xglm", []),
        ("gptj", ["rotary_dim=4"]),
        ("opt", ["word_embed_proj_dim=16"]),
        ("hyperclovax", ["residual_multiplier=0.4"]),
    ],
)
def test_a_type_taken_out_is_put_in_again_byte_for_byte(
    name: str, config: list[str] | None, tree: Path
) -> None:
    before = _contents(tree)
    for file, table, text in zip(FILES, TABLES, before, strict=True):
        if name in entries(text, table) and (table != "_OWN" or config is not None):
            (tree / file).write_text(_without(text, table, name), "utf-8")
    command = [name, "--root", str(tree), "--no-tests"]
    command += ["--config", *config] if config else []
    assert _contents(tree)[:2] != before[:2]
    assert main([*command, "--write"]) == 0
    assert _contents(tree) == before


def test_what_it_prints_is_what_it_writes(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file, table in zip(FILES[:2], TABLES, strict=False):
        path = tree / file
        path.write_text(_without(path.read_text("utf-8"), table, "stablelm"), "utf-8")
    before = _contents(tree)
    command = ["stablelm", "--root", str(tree), "--no-tests"]
    assert main(command) == 0
    assert _contents(tree) == before
    told = capsys.readouterr().out
    assert main([*command, "--write"]) == 0
    assert capsys.readouterr().out == told
    for text, new in zip(before[:2], _contents(tree), strict=False):
        (added,) = {*new.splitlines()} - {*text.splitlines()}
        assert f"\n{added}\n" in told
    assert "note: with use_parallel_residual=True, parallel is True\n" in told
    assert "settings that are no booleans" in told


def test_a_table_that_says_otherwise_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Falcon's new architecture is parallel in any case, but cannot be made with
    `parallel_attn=False`."""
    assert main(["falcon"]) == 0
    told = capsys.readouterr().out
    assert "KEY_MODULES: already has falcon" in told
    assert "note: with parallel_attn=False, parallel is False\n" in told
    assert "the table says otherwise: " in told and "('new_decoder_arch" in told


def test_what_needs_settings_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpt_neo", "--config", "window_size=4"]) == 1
    assert "does it need --config" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="expected a name=value in JSON"):
        main(["llama", "--config", "hidden_act=relu"])


def test_the_tests_of_a_type_are_its_own() -> None:
    every = {**FAMILIES, **VARIANTS}
    for name in FAMILIES:
        parts = names_of_tests(name)
        for other, family in every.items():
            for test in (f"a[{other}]", f"a[{other}-half]", f"a[block-{other}]"):
                mine = any(part in test for part in parts)
                assert mine == (family.model_type == name), (name, test)


def test_the_guide_shows_lines_of_the_tables() -> None:
    guide = (ROOT / "docs" / "how-to-add-an-architecture.md").read_text("utf-8")
    sources = "".join((ROOT / name).read_text("utf-8") for name in FILES)
    blocks = re.findall(r"```text\n(.*?)```", guide, flags=re.DOTALL)
    assert len(blocks) == 3
    for line in "".join(blocks).splitlines():
        assert f"{line}\n" in sources


def test_gpt_sizes_are_told_by_the_config() -> None:
    assert add_family.small_family("gpt2", {}).shape is GPT_SHAPE
