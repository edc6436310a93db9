"""Figures of the report: the right numbers, one look per role, and labels that cover nothing."""

import itertools
import math

import pytest
from helpers.records import point, run, validation
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from ttt_lit.record.measured import Bucket
from ttt_lit.record.schema import Parent
from ttt_lit.report.bars import target_figure
from ttt_lit.report.differences import family_differences
from ttt_lit.report.figure_style import COLOURS, WIDTH, label, styles
from ttt_lit.report.frontier import frontier_figure, pareto, trend_shift
from ttt_lit.report.labels import spread
from ttt_lit.report.lines import series_figure
from ttt_lit.report.positions import position_differences_figure
from ttt_lit.report.timeline import timeline_figure
from ttt_lit.verdict.heldout import block_words, subset_loss
from ttt_lit.verdict.study import read_study

CONTROLS = ("q_static", "q_swa_only", "q_first_order", "q_ttt_at_evaluation", "q_other")


def arm(experiment, role, loss, hours, *, tilt=0.0, **fields):
    final = validation({f"{n:02d}": loss + 0.01 * (n % 3) - 0.01 for n in range(9)})
    final.buckets = [
        Bucket(start=start, stop=stop, nats_per_token=loss + by)
        for start, stop, by in ((0, 64, tilt), (64, 1024, 0.0), (1024, 32768, -tilt))
    ]
    series = [point(hours * share, loss + 1 - share) for share in (0.25, 0.5, 1.0)]
    whole = {"parents": [] if role.endswith("scratch") else [Parent(name="free", gpu_seconds=0.0)]}
    return run(experiment, role, {}, hours=hours, final=final, evaluations=series, **(whole | fields))


def family(records):
    (found,) = read_study(records).families.values()
    return found


def crowd():
    """Ten arms and four shares, most of them close together."""
    records = [
        arm("q_ttt_scratch", "ttt_scratch", 2.600, 1000),
        arm("q_fa_scratch", "fa_scratch", 2.612, 640),
        arm("q_fa_import", "fa_import", 2.601, 610),
        arm("q_p1_bridge", "bridge", 2.598, 612),
        arm("q_p2_direct", "direct", 2.603, 615),
        *(arm(name, "control", 2.606 + 0.001 * n, 600 + 6 * n) for n, name in enumerate(CONTROLS)),
    ]
    shares = (arm("q_p1_bridge", "bridge", 2.61 - s / 50, 1000 * s, share=s) for s in (0.35, 0.5, 0.7, 1.0))
    return family([*records, *shares])


def overlapping(figure):
    figure.draw_without_rendering()
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in texts]  # of an annotation: with its arrow
    pairs = itertools.combinations(boxes, 2)
    return len(boxes), [(one, other) for (one, a), (other, b) in pairs if a.overlaps(b)]


@pytest.mark.parametrize("account", ["marginal", "with_parents"])
def test_labels_of_the_frontier_do_not_overlap_and_stay_inside(account):
    crowded = crowd()
    figure = frontier_figure(crowded, account, family_differences(crowded))
    assert overlapping(figure) == (14, [])
    frame = figure.axes[0].get_window_extent().padded(1)
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert frame.x0 <= box.x0
        assert box.x1 <= frame.x1
        assert frame.y0 <= box.y0
        assert box.y1 <= frame.y1


def test_no_label_of_the_frontier_covers_a_mark():
    crowded = crowd()
    figure = frontier_figure(crowded, "marginal", family_differences(crowded))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    places = axes.transData.transform([text.xy for text in axes.texts])
    for text in axes.texts:
        box = text.get_window_extent()
        assert not any(box.contains(*place) for place in places), text.get_text()


@pytest.mark.parametrize("against", ["tokens", "gpu_hours"])
def test_labels_at_the_ends_of_lines_do_not_overlap(against):
    assert overlapping(series_figure(crowd(), against)) == (10, [])


def test_position_differences_are_the_arms_minus_the_control():
    pair = family([arm("a", "fa_import", 2.5, 10, tilt=0.1), arm("b", "bridge", 2.4, 10, tilt=0.3)])
    figure = position_differences_figure(pair, pair.fa_import)
    line = figure.axes[0].get_lines()[0]
    assert line.get_ydata() == pytest.approx([0.1, -0.1, -0.3])
    assert list(line.get_xdata()) == [32.5, 544.5, 16896.5]


def test_an_arm_in_other_buckets_than_the_control_has_no_difference():
    other = arm("b", "bridge", 2.4, 10)
    other.stages[-1].validations[0].buckets[0].stop = 63
    pair = family([arm("a", "fa_import", 2.5, 10), other])
    assert "same position buckets" in position_differences_figure(pair, pair.fa_import)


def test_a_colour_belongs_to_a_role_and_arms_of_a_role_differ_otherwise():
    looks = styles(crowd().arms)
    assert looks["q_fa_import"].colour == COLOURS["fa_import"]
    assert looks["q_p1_bridge"] == looks["q_p1_bridge at 0.5"]
    assert len({COLOURS[role] for role in COLOURS}) == len(COLOURS)
    assert len({(looks[name].colour, looks[name].marker) for name in CONTROLS}) == len(CONTROLS)


def test_labels_are_dark_enough_to_read():
    for look in styles(crowd().arms).values():
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(look.ink)]
        luminance = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
        assert 1.05 / (luminance + 0.05) >= 4.5


def test_names_in_figures_are_never_formulas():
    assert label("$x$") == r"\$x\$"
    assert label("a\n\x00ß漢") == "a??ß?"
    assert len(label("x" * 100)) == 26


def test_hours_to_the_target_are_drawn_and_an_arm_that_never_got_there_is_said():
    parents = [Parent(name="x", gpu_seconds=36_000.0)]
    pair = family(
        [
            arm("a", "ttt_scratch", 2.5, 100),
            arm("b", "bridge", 2.4, 100, parents=parents),
            arm("c", "control", 2.9, 100),
            arm("d", "direct", 2.4, 100, parents=[Parent(name="y")]),
        ]
    )
    figure = target_figure(pair)
    names = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    texts = dict(zip(names, [text.get_text() for text in figure.axes[0].texts], strict=True))
    assert texts == {"a": "100", "b": "90 / 100", "c": "not reached", "d": "90 / not known"}
    hatched = [(bar.get_x(), bar.get_width()) for bar in figure.axes[0].patches if bar.get_hatch()]
    assert hatched == [(0.0, pytest.approx(10.0))]


def test_an_arm_that_begins_at_the_target_has_an_upper_bound():
    parents = [Parent(name="x", gpu_seconds=36_000.0)]
    quick = [arm("b", "bridge", 1.7, 100, parents=parents), arm("c", "direct", 1.7, 100, parents=[Parent(name="y")])]
    texts = [
        text.get_text() for text in target_figure(family([arm("a", "ttt_scratch", 2.5, 100), *quick])).axes[0].texts
    ]
    assert texts == ["100", "≤ 25 / ≤ 35", "≤ 25 / not known"]


def test_one_seed_that_begins_at_the_target_makes_the_mean_an_upper_bound():
    seeds = [arm("b", "bridge", loss, 100, seed=seed) for seed, loss in enumerate((2.4, 1.7))]
    baseline = [arm("a", "ttt_scratch", 2.5, 100, seed=seed) for seed in (0, 1)]
    texts = [text.get_text() for text in target_figure(family([*baseline, *seeds])).axes[0].texts]
    assert texts == ["100", "≤ 57.5"]


def test_a_single_document_has_no_bar():
    lone = validation({"0": 2.5})
    pair = family([arm("a", "ttt_scratch", 2.5, 100), arm("b", "bridge", 2.4, 90)])
    for each in pair.arms:
        each.records[0].stages[-1].validations = [lone]
    figure = frontier_figure(pair, "marginal", family_differences(pair))
    assert not figure.axes[0].collections[:-1]  # rings of the Pareto front alone
    assert all(map(math.isfinite, figure.axes[0].get_ylim()))


def test_the_baselines_series_is_shifted_to_end_at_its_final_loss():
    pair = family([arm("a", "ttt_scratch", 2.5, 100), arm("b", "bridge", 2.4, 90)])
    baseline = pair.baseline.records[0]
    for measured in baseline.evaluations:
        measured.inner_on += 0.2
    assert trend_shift(baseline) == pytest.approx(-0.2)
    line = frontier_figure(pair, "marginal", family_differences(pair)).axes[0].get_lines()[0]
    assert line.get_ydata() == pytest.approx([3.25, 3.0, 2.5])


def test_a_single_measurement_is_no_figure():
    alone = family([arm("a", "ttt_scratch", 2.5, 100)])
    assert "only a has" in frontier_figure(alone, "marginal", family_differences(alone))
    assert "only the baseline" in target_figure(alone)
    alone.arms[0].records[0].evaluations = []
    assert "single measurement" in series_figure(alone, "tokens")


def test_the_legend_and_the_target_say_how_many_blocks():
    config = {"model": {"validation": {"subset": 2}}}
    pair = family([arm("a", "ttt_scratch", 2.5, 100, config=config), arm("b", "bridge", 2.4, 90, config=config)])
    (legend,) = series_figure(pair, "tokens").legends
    assert [text.get_text() for text in legend.get_texts()] == ["line: 2 held-out blocks", "hollow: 9 held-out blocks"]
    records = pair.baseline.records
    assert subset_loss(2.54321, records) == "2.54"
    records[0].config["model"]["validation"]["subset"] = 8
    assert subset_loss(2.54321, records) == "2.543"
    assert block_words([None]) == "held-out blocks whose number was not recorded"


def test_no_text_of_a_figure_is_smaller_than_a_phone_can_show():
    crowded = crowd()
    made = [target_figure(crowded), series_figure(crowded, "tokens"), timeline_figure(crowded)]
    for figure in made:
        texts = [text for text in figure.findobj(Text) if text.get_text().strip()]
        assert min(text.get_fontsize() for text in texts) * 364 / (WIDTH * 72) >= 7


def test_costs_of_parents_move_points_to_the_right_and_unknown_ones_remove_them():
    known, unknown = Parent(name="x", gpu_seconds=36_000.0), Parent(name="y")
    for parents, expected in (([known], [20.0]), ([known, unknown], [])):
        pair = family(
            [
                arm("a", "ttt_scratch", 2.5, 100),
                arm("b", "bridge", 2.4, 10, parents=parents),
                arm("c", "direct", 2.4, 50),
            ]
        )
        figure = frontier_figure(pair, "with_parents", family_differences(pair))
        drawn = [text.xy[0] for text in figure.axes[0].texts if text.get_text() == "b"]
        assert drawn == pytest.approx(expected)


def test_the_pareto_front_is_what_nobody_beats_in_both():
    assert pareto([(3, 1.0), (1, 3.0), (2, 3.0), (2, 2.0), (4, 1.0)]) == [(1, 3.0), (2, 2.0), (3, 1.0)]


@pytest.mark.parametrize(
    "wanted, gap, expected",
    [
        ([0.2, 0.8], 0.1, [0.2, 0.8]),
        ([0.5, 0.5, 0.5], 0.1, [0.4, 0.5, 0.6]),
        ([0.0, 0.0, 0.15], 0.1, [0.0, 0.1, 0.2]),
        ([0.9, 1.0, 1.0], 0.1, [0.8, 0.9, 1.0]),
        ([0.5] * 3, 0.6, [-0.1, 0.5, 1.1]),
    ],
)
def test_labels_are_spread_as_little_as_needed(wanted, gap, expected):
    assert spread(wanted, gap) == pytest.approx(expected)
