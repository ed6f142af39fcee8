"""Session-wide models. Each test that takes one also checks that it left it alone."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
# Several threads on tensors this small only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture
def tell(record_property) -> Callable[[str], None]:  # type: ignore[no-untyped-def]
    """Prints a line after all tests, such as what a test counted."""
    return lambda line: record_property("told", line)


def pytest_terminal_summary(terminalreporter) -> None:  # type: ignore[no-untyped-def]
    told = [
        line
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        for name, line in getattr(report, "user_properties", [])
        if name == "told"
    ]
    if told:
        terminalreporter.section("what tests counted")
        for line in told:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def _tinies():  # type: ignore[no-untyped-def]
    from model_kit import KINDS, LAYERS, TEXTS, Tiny, make_model, make_tokenizer

    from covariance_cache import collect

    made = {}
    for kind in KINDS:
        tokenizer = make_tokenizer(kind)
        model = make_model(kind, len(tokenizer))
        statistics = collect(
            model,
            tokenizer,
            TEXTS,
            range(LAYERS),
            tokens=4000,
            window=32,
            progress=False,
        )
        made[kind] = Tiny(kind, model, tokenizer, statistics)
    return made


def _guarded(tiny) -> Iterator:  # type: ignore[no-untyped-def]
    from model_kit import assert_same_bits, state_of

    before = state_of(tiny.model)
    yield tiny
    assert_same_bits(tiny.model, before)
    assert all(parameter.requires_grad for parameter in tiny.model.parameters())
    assert all(parameter.grad is None for parameter in tiny.model.parameters())
    for module in tiny.model.modules():
        assert not module.training
        assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.fixture(params=["gpt2", "llama"])
def tiny(request, _tinies) -> Iterator:  # type: ignore[no-untyped-def]
    """Each architecture's model, tokenizer and statistics; not to be changed."""
    yield from _guarded(_tinies[request.param])


@pytest.fixture
def gpt2(_tinies) -> Iterator:  # type: ignore[no-untyped-def]
    yield from _guarded(_tinies["gpt2"])


@pytest.fixture
def llama(_tinies) -> Iterator:  # type: ignore[no-untyped-def]
    yield from _guarded(_tinies["llama"])


@pytest.fixture(scope="session")
def _tinies64(_tinies):  # type: ignore[no-untyped-def]
    from model_kit import Tiny

    # A fingerprint reads float32, so the statistics belong to these as well.
    return {
        kind: Tiny(kind, copy.deepcopy(t.model).double(), t.tokenizer, t.statistics)
        for kind, t in _tinies.items()
    }


@pytest.fixture(params=["gpt2", "llama"])
def tiny64(request, _tinies64) -> Iterator:  # type: ignore[no-untyped-def]
    """The same models in float64, for theorems."""
    yield from _guarded(_tinies64[request.param])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "built" in metafunc.fixturenames:
        from families import FAMILIES, VARIANTS

        names = {**FAMILIES, **VARIANTS}
        metafunc.parametrize("built", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def built(request, tmp_path_factory):  # type: ignore[no-untyped-def]
    """A small model of every family in turn."""
    from families import FAMILIES, VARIANTS, build

    family = {**FAMILIES, **VARIANTS}[request.param]
    return build(family, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def _workplace(tmp_path_factory):  # type: ignore[no-untyped-def]
    from cli_kit import make_workplace

    return make_workplace(tmp_path_factory.mktemp("workplace"), "gpt2")


@pytest.fixture
def place(_workplace, tmp_path):  # type: ignore[no-untyped-def]
    """A folder of its own with a model and all that commands need beside it."""
    from cli_kit import Workplace

    shutil.copytree(_workplace.path, tmp_path / "work")
    return Workplace(tmp_path / "work")
