"""Eigenvalues against numpy's, and pictures of them that real matplotlib draws."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from statistics_helpers import random_keys
from torch import Tensor

from covariance_cache import KeyStatistics, Provenance, StatisticsError
from covariance_cache.spectrum import plot_spectrum, spectrum

SOURCE = Provenance(model_fingerprint="f" * 64, module="h.0.mlp.c_proj")
BEGIN = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml"}


def made(
    d_key: int = 16, count: int = 50, layer: int = 0, scale: float = 1.0
) -> KeyStatistics:
    keys = random_keys(count, d_key, seed=layer).double()
    moment = (scale * (keys.T @ keys) / count).float()
    return KeyStatistics(layer, (moment + moment.T) / 2, count, SOURCE)


class TestEigenvalues:
    @pytest.mark.parametrize("d_key", [1, 2, 16, 300])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_are_numpys_descending(self, d_key: int, dtype: torch.dtype) -> None:
        matrix = made(d_key, 2 * d_key).second_moment.to(dtype)
        found = spectrum(KeyStatistics(0, matrix, 2 * d_key, SOURCE))
        expected = np.linalg.eigvalsh(matrix.numpy().astype(np.float64))[::-1]
        assert found.dtype == torch.float64 and found.shape == (d_key,)
        assert np.allclose(found.numpy(), expected, rtol=0, atol=1e-12 * expected[0])
        assert bool((found[:-1] >= found[1:]).all())

    def test_are_those_that_the_matrix_was_made_of(self) -> None:
        values = torch.tensor([100.0, 7.0, 1.0, 0.5, 1e-6], dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(
            torch.randn(5, 5, generator=generator, dtype=torch.float64)
        ).Q
        matrix = basis @ torch.diag(values) @ basis.T
        matrix = (matrix + matrix.T) / 2
        found = spectrum(KeyStatistics(0, matrix, 9, SOURCE))
        assert torch.allclose(found, values, rtol=0, atol=1e-12)

    def test_of_fewer_keys_than_dimensions_end_in_zeros(self) -> None:
        found = spectrum(made(40, 10))
        assert bool((found[:10] > 1e-3).all())
        assert float(found[10:].abs().max()) < 1e-5

    def test_are_of_the_mean_itself_and_leave_it_alone(self) -> None:
        matrix = made().second_moment.double()
        kept = matrix.clone()
        statistics = KeyStatistics(0, matrix, 50, SOURCE)
        found = spectrum(statistics)
        assert torch.equal(spectrum(statistics.shrunk("oas")), found)
        assert torch.equal(matrix, kept)


class TestPicture:
    @pytest.fixture(autouse=True)
    def library(self) -> Any:
        return pytest.importorskip("matplotlib")

    @pytest.fixture
    def drawn(self, library: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """The axes of every figure that is saved."""
        from matplotlib.figure import Figure

        axes: list[Any] = []
        save = Figure.savefig

        def keep(self: Any, *args: Any, **options: Any) -> None:
            axes.extend(self.axes[:1])
            save(self, *args, **options)

        monkeypatch.setattr(Figure, "savefig", keep)
        return axes

    @pytest.mark.parametrize("suffix", sorted(BEGIN))
    def test_is_of_the_kind_that_the_suffix_names(
        self, tmp_path: Path, suffix: str
    ) -> None:
        path = tmp_path / f"picture{suffix}"
        plot_spectrum({0: made(), 4: made(layer=4)}, path)
        content = path.read_bytes()
        assert content.startswith(BEGIN[suffix]) and len(content) > 5000

    def test_shows_something(self, tmp_path: Path, library: Any) -> None:
        """Not only axes: many shades, and another picture for other statistics."""
        from matplotlib import image

        pictures = []
        for number, statistics in enumerate((made(), made(count=9), made(16, 5000))):
            path = tmp_path / f"{number}.png"
            plot_spectrum({0: statistics}, path)
            pictures.append(image.imread(path))
        assert len({each.tobytes() for each in pictures}) == 3
        for each in pictures:
            assert each.shape[0] > 400 and each.shape[1] > 600
            blue = np.abs(each[..., :3] - np.array([0, 0x72, 0xB2]) / 255).max(axis=-1)
            assert int((blue < 0.02).sum()) > 300

    def test_the_drawn_values_are_the_spectrum(
        self, tmp_path: Path, drawn: list[Any]
    ) -> None:
        """Relative to their mean, floored where rounding left nothing; the dotted line
        is what oas adds."""
        few, many = made(30, 12, layer=3), made(16, 500, layer=8, scale=100.0)
        plot_spectrum({8: many, 3: few}, tmp_path / "a.png")
        (axes,) = drawn
        assert axes.get_xscale() == axes.get_yscale() == "log"
        lines = axes.get_lines()
        assert len(lines) == 4
        for statistics, curve, dotted in (
            (few, lines[0], lines[1]),
            (many, lines[2], lines[3]),
        ):
            values = spectrum(statistics).numpy()
            expected = np.maximum(values / values.mean(), 1e-12)
            assert np.array_equal(curve.get_xdata(), range(1, len(values) + 1))
            assert np.allclose(curve.get_ydata(), expected, rtol=1e-12)
            lifted = statistics.shrunk("oas").regularized()
            smallest = float(torch.linalg.eigvalsh(lifted)[0])
            scaled = 1 - intensity_of(statistics)
            added = (smallest - scaled * max(values[-1], 0)) / values.mean()
            assert np.allclose(dotted.get_ydata(), added, rtol=1e-3)
            assert f"layer {statistics.layer} " in curve.get_label()
            low, high = axes.get_ylim()
            assert low < expected.min() and high > expected.max()
        assert "0.4 tokens per dimension" in lines[0].get_label()

    @pytest.mark.parametrize("layers", [7, 32, 48])
    def test_many_layers_are_told_apart(
        self, tmp_path: Path, drawn: list[Any], layers: int
    ) -> None:
        """Each has a colour of its own, and all their names leave room for curves."""
        path = tmp_path / "many.png"
        plot_spectrum({n: made(layer=n) for n in range(layers)}, path)
        assert path.read_bytes().startswith(BEGIN[".png"])
        axes = drawn[0]
        curves = [each for each in axes.get_lines() if len(each.get_xdata()) == 16]
        assert len({str(each.get_color()) for each in curves}) == layers
        assert axes.get_position().width > 0.6 and axes.get_position().height > 0.6
        axes.figure.draw_without_rendering()  # now at one resolution for both boxes
        if legend := axes.get_legend():
            outer, inner = axes.figure.bbox, legend.get_window_extent()
            assert outer.x0 <= inner.x0 and inner.x1 <= outer.x1
            assert outer.y0 <= inner.y0 and inner.y1 <= outer.y1

    @pytest.mark.parametrize(("d_key", "count"), [(1, 1), (40, 3)])
    def test_small_and_singular_ones(
        self, tmp_path: Path, d_key: int, count: int
    ) -> None:
        path = tmp_path / "a.png"
        plot_spectrum({0: made(d_key, count)}, path)
        assert path.read_bytes().startswith(BEGIN[".png"])

    @pytest.mark.parametrize("name", ["a.docx", "a.npz", "a.png.txt"])
    def test_an_unknown_suffix(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        with pytest.raises(StatisticsError, match=f"{name}: cannot be written.*format"):
            plot_spectrum({0: made()}, path)
        assert not list(tmp_path.iterdir())

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        path = tmp_path / "none" / "a.png"
        with pytest.raises(StatisticsError, match=r"none/a\.png: cannot be written"):
            plot_spectrum({0: made()}, path)

    def test_keys_that_are_all_zero(self, tmp_path: Path) -> None:
        zero = KeyStatistics(3, torch.zeros(4, 4), 9, SOURCE)
        with pytest.raises(StatisticsError, match="layer 3: all eigenvalues are zero"):
            plot_spectrum({3: zero}, tmp_path / "a.png")

    def test_nothing_of_a_screen_is_touched(self, tmp_path: Path) -> None:
        """pyplot would choose a backend, and hold on to every figure."""
        before = "matplotlib.pyplot" in sys.modules
        plot_spectrum({0: made()}, tmp_path / "a.png")
        assert ("matplotlib.pyplot" in sys.modules) == before


def intensity_of(statistics: KeyStatistics) -> float:
    matrix: Tensor = statistics.second_moment
    scale, _ = statistics.shrunk("oas").shrinkage.weights(matrix, statistics.count)
    return 1 - scale


def test_without_matplotlib_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [each for each in sys.modules if each.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what makes an import fail
    with pytest.raises(StatisticsError, match=r"pip install 'unified-edit\[plots\]'"):
        plot_spectrum({0: made()}, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
    assert spectrum(made()).shape == (16,)  # numbers need none
