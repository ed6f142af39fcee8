"""Pictures of causal traces: what they show is what was traced, and can be read."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_kit import EDITS, LAYERS, Tiny

from unified_edit.edits import Edit
from unified_edit.errors import UnifiedEditError
from unified_edit.evaluate import effects
from unified_edit.evaluate.effects import AverageEffects, RoleEffects
from unified_edit.evaluate.intervals import Interval
from unified_edit.evaluate.trace_charts import (
    COLUMN,
    PAGE,
    check_format,
    effect_curves,
    heat_map,
    save,
)
from unified_edit.model.restoring import KINDS, Kind
from unified_edit.model.tracing import ROLES, Trace, Traces, TraceSettings, trace

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[1]
BEGIN = {".png": b"\x89PNG\r\n", ".svg": b"<?xml", ".pdf": b"%PDF-"}
SETTINGS = TraceSettings(samples=2)
POINT = Interval(0.5, 0.5, 0.5)


def traced(tiny: Tiny, settings: TraceSettings = SETTINGS) -> Traces:
    return trace(tiny.model, tiny.tokenizer, EDITS, settings, known_only=False)


def made(
    tokens: tuple[str, ...], subject: range, layers: int = 5, seed: int = 0
) -> Trace:
    """Of no model, with probabilities around the corrupted run's."""
    generator = torch.Generator().manual_seed(seed)
    tables: dict[Kind, Any] = {
        kind: 0.1
        + 0.6 * torch.rand(len(tokens), layers, generator=generator).double() ** 4
        for kind in KINDS
    }
    return Trace(Edit("{} speaks", "Ada", "French"), tokens, subject, 0.9, 0.2, tables)


def small(tokens: int = 2) -> Any:
    """A picture with one panel, which is soon drawn."""
    return narrow(("a",) * tokens)


def narrow(tokens: tuple[str, ...]) -> Any:
    """The same of these tokens."""
    fact = made(tokens, range(1))
    tables: dict[Kind, Any] = {"mlp": fact.restored["mlp"]}
    return heat_map(replace(fact, restored=tables), window=1)


def heat_axes(figure: Any) -> list[Any]:
    """The panels, not the scale of colours."""
    return [each for each in figure.axes if each.get_xlabel() == "layer"]


def scale_of(figure: Any) -> Any:
    (found,) = [each for each in figure.axes if "p(answer)" in each.get_xlabel()]
    return found


def shown_labels(figure: Any) -> list[str]:
    """As they are drawn: escaped dollars are dollars."""
    labels = heat_axes(figure)[0].get_yticklabels()
    return [each.get_text().replace(r"\$", "$") for each in labels]


def drawn(figure: Any) -> list[tuple[Any, Any]]:
    """All text that is drawn at print's resolution, and the box of each."""
    from matplotlib.backends.backend_agg import RendererAgg

    class Recorder(RendererAgg):
        def draw_text(self, *args: Any, **options: Any) -> None:
            text = args[7] if len(args) > 7 else options["mtext"]
            if text is not None:  # a line of a text with several
                found.append(text)
            super().draw_text(*args, **options)

    found: list[Any] = []
    figure.set_dpi(300)
    renderer = Recorder(*figure.bbox.size, 300)
    figure.draw(renderer)
    found += [text for text in figure.texts if "\n" in text.get_text()]
    return [(each, each.get_window_extent(renderer)) for each in found]


def check_readable(figure: Any) -> None:
    """No text is small, leaves the picture or covers another."""
    assert figure.get_figwidth() in (COLUMN, PAGE) and figure.get_figheight() <= 9
    texts = drawn(figure)
    assert len(texts) > 8
    assert min(text.get_fontsize() for text, _ in texts) >= 6
    page = figure.bbox
    for index, (text, box) in enumerate(texts):
        assert page.x0 - 1 <= box.x0 and box.x1 <= page.x1 + 1, text
        assert page.y0 - 1 <= box.y0 and box.y1 <= page.y1 + 1, text
        for other, beside in texts[:index]:
            wide = min(box.x1, beside.x1) - max(box.x0, beside.x0)
            high = min(box.y1, beside.y1) - max(box.y0, beside.y0)
            # Boxes have air above and below the letters.
            least = 0.2 * min(box.height, beside.height)
            assert wide <= 1 or high <= least, (text, other)


@pytest.mark.parametrize("number", [0, 3])
def test_a_heat_map_shows_the_trace(tiny: Tiny, number: int) -> None:
    found = traced(tiny)
    fact = found.traces[number]
    figure = heat_map(fact, window=found.window)
    panels = heat_axes(figure)
    assert [each.get_title() for each in panels] == [
        "hidden state",
        "MLP, window of 1 layer",
        "attention, window of 1 layer",
    ]
    for axes, kind in zip(panels, KINDS, strict=True):
        (image,) = axes.images
        assert image.get_array().shape == (len(fact.tokens), LAYERS)
        assert image.get_array().tolist() == fact.restored[kind].tolist()
        left, right, bottom, top = image.get_extent()
        assert (left, right) == (-0.5, LAYERS - 0.5)
        assert (bottom, top) == (len(fact.tokens) - 0.5, -0.5)  # the first on top
        assert image.norm is panels[0].images[0].norm
    labels = shown_labels(figure)
    assert list(panels[0].get_yticks()) == list(range(len(fact.tokens)))
    for index, (label, token) in enumerate(zip(labels, fact.tokens, strict=True)):
        assert label == token.replace(" ", "␣") + "*" * (index in fact.subject)
    title = figure.get_suptitle()
    assert fact.fact.text in title and title.endswith(f"→ {fact.fact.target}")


def test_one_scale_of_colours_from_the_corrupted_run_up(gpt2: Tiny) -> None:
    fact = traced(gpt2).traces[0]
    tables = list(fact.restored.values())
    norm = heat_axes(heat_map(fact, window=1))[0].images[0].norm
    assert norm.vmin == min(fact.corrupted, *(float(each.min()) for each in tables))
    assert norm.vmax == max(float(each.max()) for each in tables)
    assert not norm.clip
    higher: dict[Kind, Any] = {kind: table + 1 for kind, table in fact.restored.items()}
    norm = heat_axes(heat_map(replace(fact, restored=higher), window=1))[0].images[0]
    assert norm.norm.vmin == fact.corrupted


@pytest.mark.parametrize(("clean", "at"), [(0.6, 0.6), (0.701, 0.7), (0.95, None)])
def test_both_runs_stand_at_the_scale(clean: float, at: float | None) -> None:
    """Restored states may miss the clean run by rounding alone, or by far."""
    fact = replace(made(("Ada", " speaks"), range(1)), clean=clean, corrupted=0.2)
    fact.restored["hidden"][0, 0] = 0.7
    axes = scale_of(heat_map(fact, window=3))
    marks = {line.get_marker(): line.get_xdata()[0] for line in axes.lines}
    assert marks == {"v": 0.2, **({} if at is None else {"^": at})}
    label = axes.get_xlabel()
    assert "corrupted 0.2" in label and f"clean {clean}" in label
    assert ("△" in label) == ("beyond" not in label) == (at is not None)


def test_only_kinds_that_were_traced_have_a_panel(gpt2: Tiny) -> None:
    kinds: tuple[Kind, ...] = ("attention", "hidden")
    for chosen in (kinds, kinds[:1]):
        found = traced(gpt2, replace(SETTINGS, kinds=chosen))
        figure = heat_map(found.traces[0], window=4)
        names = [each.get_title() for each in heat_axes(figure)]
        wanted = ["hidden state", "attention, window of 4 layers"]
        assert names == wanted[2 - len(chosen) :]
        assert figure.get_figwidth() == (PAGE if len(chosen) == 2 else COLUMN)
        averages = effect_curves(effects.average_effects(found), window=4)
        titles = [each.get_title() for each in averages.axes if each.get_title()]
        assert titles == wanted[2 - len(chosen) :]


HOSTILE = {
    "$x^2$": "$x^2$",
    " a\n\tb": r"␣a\n\tb",
    "\u0000": r"\x00",
    "\u05e9\u05dc\u05d5\u05dd": "\u05e9\u05dc\u05d5\u05dd",
    "\u202eabc": r"\u202eabc",
    "\ud800": r"\ud800",
    "\u4e2d": r"\u4e2d",  # the font has no picture of it
    "\U0001fae8": r"\U0001fae8",
    r"\frac{1}$": r"\frac{1}$",
    "$": "$",
    "{}%_^~&#": "{}%_^~&#",
    " \ufffd": "␣\ufffd",
    "": '""',
    "  ": "␣␣",
}


@pytest.mark.parametrize("suffix", sorted(BEGIN))
def test_hostile_text_is_drawn_as_it_is(tmp_path: Path, suffix: str) -> None:
    """Warnings are errors: of letters without a picture, of broken formulas."""
    fact = replace(
        made(tuple(HOSTILE), range(3, 5)),
        fact=Edit("$\\foo \n$x^2$ \u0000\u202e{} is", "$\u05e9\n\u4e2d", "$y_\ud800"),
    )
    figure = heat_map(fact, window=2)
    stars = ["*" if index in (3, 4) else "" for index in range(len(HOSTILE))]
    wanted = [each + star for each, star in zip(HOSTILE.values(), stars, strict=True)]
    assert shown_labels(figure) == wanted
    save(figure, tmp_path / f"a{suffix}")
    for text in figure.texts + heat_axes(figure)[0].get_yticklabels():
        assert not text._preprocess_math(text.get_text())[1], text.get_text()


def test_a_formula_would_have_been_seen() -> None:
    """The check above can fail: matplotlib takes text between dollars for one."""
    from matplotlib.text import Text

    assert Text(0, 0, "$x^2$")._preprocess_math("$x^2$")[1]


@pytest.mark.parametrize(
    ("tokens", "layers", "kinds"),
    [(1, 1, KINDS), (7, 12, KINDS[1:2]), (24, 48, KINDS), (130, 80, KINDS[2:])],
)
def test_heat_maps_are_readable_in_print(
    tokens: int, layers: int, kinds: tuple[Kind, ...]
) -> None:
    words = ("Ada", " WWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWW", " of", " internationally", "-")
    names = tuple(words[index % 5] for index in range(tokens))
    whole = made(names, range(tokens // 2, tokens // 2 + 1), layers)
    fact = replace(
        whole,
        fact=Edit("W" * 90 + " {} " + "mmm " * 90 + "is", "Ada", "long answer" * 20),
        restored={kind: whole.restored[kind] for kind in kinds},
    )
    figure = heat_map(fact, window=17)
    check_readable(figure)
    labels = shown_labels(figure)
    assert [label.endswith("*") for label in labels].count(True) == 1
    rows = list(heat_axes(figure)[0].get_yticks())
    assert tokens // 2 in rows and tokens - 1 in rows
    if tokens <= 24:
        assert rows == list(range(tokens))


def test_taller_for_more_tokens_until_a_page_is_full() -> None:
    heights = [small(count).get_figheight() for count in (6, 12, 90, 400)]
    assert heights[0] < heights[1] < heights[2] == heights[3] == 9


def test_averages_are_drawn_as_they_are(tiny: Tiny) -> None:
    found = traced(tiny)
    averages = effects.average_effects(found)
    figure = effect_curves(averages, window=found.window)
    upper = [each for each in figure.axes if each.get_title()]
    lower = heat_axes(figure)
    assert len(upper) == len(lower) == len(KINDS)
    roles = [role for role in ROLES if role in averages.indirect["hidden"]]
    assert len(roles) > 3
    for axes, below, kind in zip(upper, lower, KINDS, strict=True):
        lines = {line.get_label(): line for line in axes.lines}
        bands = dict(zip(roles, axes.collections, strict=True))
        for role in roles:
            each = averages.indirect[kind][role].layers
            assert lines[role].get_xdata().tolist() == list(range(LAYERS))
            assert lines[role].get_ydata().tolist() == [at.mean for at in each]
            corners = {tuple(at) for at in bands[role].get_paths()[0].vertices.tolist()}
            assert corners == {
                (layer, value)
                for layer, at in enumerate(each)
                for value in (at.low, at.high)
            }
        (image,) = below.images
        assert image.get_array().tolist() == [
            [at.mean for at in averages.indirect[kind][role].layers] for role in roles
        ]
        assert image.norm is lower[0].images[0].norm
        assert axes.get_ylim() == upper[0].get_ylim()
    assert [each.get_text() for each in lower[0].get_yticklabels()] == roles
    assert upper[0].get_ylabel() == "average indirect effect"
    assert f"total effect {averages.total.mean:.3g}" in figure.get_suptitle()
    assert f"{len(EDITS)} facts" in figure.get_suptitle()


def test_one_legend_names_the_roles_and_tells_them_apart_without_colour(
    gpt2: Tiny,
) -> None:
    averages = effects.average_effects(traced(gpt2))
    figure = effect_curves(averages, window=1)
    (legend,) = figure.legends
    roles = averages.indirect["mlp"]
    for text, (role, each) in zip(legend.get_texts(), roles.items(), strict=True):
        some = f"{role} (n={each.facts})"
        assert text.get_text() == (role if each.facts == len(EDITS) else some)
    assert any("n=" in each.get_text() for each in legend.get_texts())
    handles = legend.get_lines()
    for looks in ("get_color", "get_marker"):
        assert len({getattr(each, looks)() for each in handles}) == len(roles)
    axes = figure.axes[0]
    for handle, role in zip(handles, roles, strict=True):
        (line,) = [each for each in axes.lines if each.get_label() == role]
        assert line.get_color() == handle.get_color()
        assert line.get_marker() == handle.get_marker()


def average_of(layers: int, kinds: tuple[Kind, ...], facts: int) -> AverageEffects:
    waves = [
        [math.sin(layer / 5 + role) for layer in range(layers)] for role in range(6)
    ]
    each = {
        role: RoleEffects(
            facts - number % 2,
            tuple(Interval(at / 3, at / 3 - 0.05, at / 3 + 0.1) for at in wave),
        )
        for number, (role, wave) in enumerate(zip(ROLES, waves, strict=True))
    }
    return AverageEffects(facts, POINT, POINT, dict.fromkeys(kinds, each))


@pytest.mark.parametrize(
    ("layers", "kinds"), [(1, KINDS), (2, KINDS[:1]), (80, KINDS), (80, KINDS[:1])]
)
def test_averages_are_readable_in_print(layers: int, kinds: tuple[Kind, ...]) -> None:
    figure = effect_curves(average_of(layers, kinds, 1200), window=17)
    check_readable(figure)


def test_one_fact_and_one_layer(gpt2: Tiny, tmp_path: Path) -> None:
    facts = trace(gpt2.model, gpt2.tokenizer, EDITS[:1], SETTINGS, known_only=False)
    figure = effect_curves(effects.average_effects(facts), window=1)
    assert "1 fact:" in figure.get_suptitle()
    check_readable(figure)
    figure = effect_curves(average_of(1, KINDS, 1), window=1)
    save(figure, tmp_path / "a.png")
    (band, *_) = figure.axes[0].collections
    low, high = band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices
    assert (low, high[:, 1].max()) == pytest.approx((-0.05, 0.1))
    assert high[:, 0].min() < high[:, 0].max()  # or it could not be seen


def test_nothing_has_an_effect(tmp_path: Path) -> None:
    flat: dict[Kind, Any] = {kind: torch.full((2, 3), 0.25) for kind in KINDS}
    fact = replace(
        made(("a", "b"), range(1)), restored=flat, corrupted=0.25, clean=0.25
    )
    save(heat_map(fact, window=1), tmp_path / "a.png")
    zero = RoleEffects(1, (Interval(0, 0, 0),) * 3)
    averages = AverageEffects(1, POINT, POINT, {"mlp": {"last token": zero}})
    save(effect_curves(averages, window=1), tmp_path / "b.png")


def test_same_trace_same_bytes(tmp_path: Path, gpt2: Tiny) -> None:
    """Whatever was drawn before, and also of a picture that is saved again."""
    found = traced(gpt2, replace(SETTINGS, kinds=("mlp",)))
    # Layout is settled alike for both pictures: the slower one in one format.
    for suffixes, draw in (
        (BEGIN, lambda: narrow((" $x", "Ada"))),
        (
            [".svg"],
            lambda: effect_curves(effects.average_effects(found), window=1),
        ),
    ):
        kept, again = draw(), draw()
        for suffix in suffixes:
            begin = BEGIN[suffix]
            contents = []
            for number, figure in enumerate((kept, kept, again)):
                path = tmp_path / f"{number}{suffix}"
                save(figure, path)
                contents.append(path.read_bytes())
            assert contents[0].startswith(begin) and len(contents[0]) > 5000
            assert contents[0] == contents[1] == contents[2]
            assert not re.search(rb"<dc:date>|CreationDate|tIME", contents[0])


def test_the_users_style_neither_shows_nor_changes(tmp_path: Path) -> None:
    import matplotlib

    save(narrow(("Ada", " $s$")), tmp_path / "a.svg")
    theirs: Any = {
        "font.size": 30,
        "text.usetex": True,
        "axes.titlesize": 40,
        "font.family": ["monospace"],
        "svg.fonttype": "none",
        "savefig.transparent": True,
        "savefig.bbox": "tight",
    }
    with matplotlib.rc_context(theirs):
        before = dict(matplotlib.rcParams)
        save(narrow(("Ada", " $s$")), tmp_path / "b.svg")
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_pictures_differ_when_traces_do(tmp_path: Path) -> None:
    from matplotlib.image import imread

    pictures = []
    for seed in (1, 2):
        path = tmp_path / f"{seed}.PNG"
        save(heat_map(made(("a", "b"), range(1), seed=seed), window=1), path)
        pictures.append(imread(path))
    assert pictures[0].shape[:2] == pictures[1].shape[:2]
    assert pictures[0].shape[1] == round(PAGE * 300)
    assert (pictures[0] != pictures[1]).any()


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.png.txt", ".png", "a.ps"])
def test_other_formats_are_refused_before_anything_is_written(
    tmp_path: Path, name: str
) -> None:
    figure = small()
    for attempt in (lambda p: save(figure, p), check_format):
        with pytest.raises(UnifiedEditError, match=r"\.pdf, \.png, \.svg"):
            attempt(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_by_a_whole_picture_or_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = small()
    with pytest.raises(UnifiedEditError, match="no such folder"):
        save(figure, tmp_path / "none" / "a.png")
    (tmp_path / "b.png").mkdir()
    with pytest.raises(UnifiedEditError, match="is a folder"):
        save(figure, tmp_path / "b.png")
    path = tmp_path / "a.svg"
    path.write_bytes(b"mine")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", full)
        with pytest.raises(UnifiedEditError, match=r"a\.svg: cannot be written: No sp"):
            save(figure, path)
    assert path.read_bytes() == b"mine"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.svg", "b.png"]
    save(figure, path)
    assert path.read_bytes().startswith(BEGIN[".svg"])
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.svg", "b.png"]


def test_matplotlib_is_loaded_to_draw_and_pyplot_never(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
import torch
from unified_edit.edits import Edit
from unified_edit.evaluate.trace_charts import heat_map, save
from unified_edit.model.tracing import Trace
assert not [name for name in sys.modules if name.startswith("matplotlib")]
fact = Edit("{{}} is", "Ada", "x")
tables = {{"mlp": torch.rand(2, 3).double()}}
figure = heat_map(Trace(fact, ("a", "b"), range(1), 0.9, 0.1, tables), window=1)
for suffix in ("png", "svg", "pdf"):
    save(figure, Path({str(tmp_path)!r}) / f"a.{{suffix}}")
assert "matplotlib" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fact = made(("a", "b"), range(1))
    figure = small()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for attempt in (
        lambda: heat_map(fact, window=1),
        lambda: effect_curves(average_of(2, KINDS, 3), window=1),
        lambda: save(figure, tmp_path / "a.png"),
        lambda: check_format(tmp_path / "a.png"),
    ):
        with pytest.raises(
            UnifiedEditError, match=r"pip install 'unified-edit\[plots\]'"
        ):
            attempt()
    assert list(tmp_path.iterdir()) == []
