"""The picture shows the numbers that it was given."""

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.lines import Line2D

from ttt_lit.metrics import position_buckets
from ttt_lit.report.position_loss import Curve, position_figure, save_position_figure

CONTEXT = 64
ON = np.linspace(4, 2, CONTEXT)
OFF = np.linspace(4, 3, CONTEXT)


@pytest.fixture
def curves():
    return [
        Curve(stage="B1", inner="off", losses=OFF.tolist()),
        Curve(stage="C", inner="off", losses=OFF.tolist()),
        Curve(stage="C", inner="on", losses=ON.tolist()),
    ]


def _lines(figure) -> dict[str, Line2D]:
    return {line.get_label(): line for line in figure.axes[0].get_lines()}


def test_lines_are_the_bucket_means_solid_with_the_inner_loop_and_dashed_without(curves):
    lines = _lines(position_figure(curves))
    assert {"B1, inner loop off", "C, inner loop off", "C, inner loop on"} <= set(lines)
    on, off = lines["C, inner loop on"], lines["C, inner loop off"]
    assert on.get_ydata() == pytest.approx([ON[start:stop].mean() for start, stop in position_buckets(CONTEXT)])
    assert not on.is_dashed()
    assert off.is_dashed()
    assert on.get_color() == off.get_color() != lines["B1, inner loop off"].get_color()


def test_every_bucket_mean_lies_inside_the_axes(curves):
    figure = position_figure(curves)
    axes = figure.axes[0]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for label, line in _lines(figure).items():
        if "inner loop" in label:
            x, y = line.get_data()
            assert left <= min(x)
            assert max(x) <= right
            assert bottom <= min(y)
            assert max(y) <= top


@pytest.mark.parametrize("window, marked", [(16, True), (CONTEXT, False), (None, False)])
def test_the_window_is_marked_where_the_context_passes_it(curves, window, marked):
    texts = [text.get_text() for text in position_figure(curves, window=window).axes[0].texts]
    assert texts == (["window: 16 tokens "] if marked else [])


def test_png_and_svg_are_written_and_the_same_curves_give_the_same_svg(curves, tmp_path):
    png, svg = save_position_figure(curves, tmp_path / "new" / "position_loss", window=16)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["position_loss.png", "position_loss.svg"]
    assert png.read_bytes()[:4] == b"\x89PNG"
    first = svg.read_text()
    assert all(text in first for text in ("nats per token", "C, inner loop on", "window: 16 tokens"))
    save_position_figure(curves, tmp_path / "new" / "position_loss", window=16)
    assert svg.read_text() == first


def test_a_curve_of_a_diverged_run_does_not_spoil_the_picture(curves):
    broken = Curve(stage="D", inner="on", losses=[float("nan")] * CONTEXT)
    assert np.isfinite(position_figure([*curves, broken]).axes[0].get_ylim()).all()
    assert np.isfinite(position_figure([broken]).axes[0].get_ylim()).all()


def test_no_curve_is_an_error():
    with pytest.raises(ValueError, match="got no curve"):
        position_figure([])


def test_drawing_registers_no_global_figure(curves, tmp_path):
    save_position_figure(curves, tmp_path / "picture")
    assert pyplot.get_fignums() == []
