"""Figures show the numbers that they were given, one look per role, in letters that a phone can show."""

import math

import numpy as np
import pytest
from helpers.records import point, run, validation
from matplotlib import pyplot
from matplotlib.text import Text

from ttt_lit.record.measured import Bucket, Document, Validation
from ttt_lit.record.schema import Parent
from ttt_lit.report.compute import frontier_figure, pareto, target_figure, timeline_figure, trend_shift
from ttt_lit.report.curves import (
    intervals,
    position_differences_figure,
    positions_figure,
    series_figure,
    stages_figure,
)
from ttt_lit.report.drawing import COLOURS, WIDTH, label, looks, save_figure
from ttt_lit.report.pictures import family_pictures
from ttt_lit.report.words import family_differences
from ttt_lit.verdict.heldout import block_words, subset_loss
from ttt_lit.verdict.study import read_study

CONTROLS = ("q_static", "q_swa_only", "q_first_order", "q_ttt_at_evaluation", "q_other")
EDGES = ((0, 4), (4, 16), (16, 64))


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


def frontier(found, account="marginal"):
    return frontier_figure(found, account, family_differences(found))


@pytest.fixture(scope="module")
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


def entry(inner, last, *, scatter=0.0):
    """A validation of 64 positions as a run in training keeps it; ``last``: loss of its last bucket."""
    means = (4.0, 3.0, last)
    documents = [
        Document(id=str(n), source=n, bytes=1, nats_per_token=3.0, short=3.0, deciles=[3.0 + scatter * n] * 10)
        for n in range(4)
    ]
    buckets = [Bucket(start=a, stop=b, nats_per_token=m) for (a, b), m in zip(EDGES, means, strict=True)]
    return Validation(
        inner=inner, context=64, nats_per_token=3.0, bits_per_byte=1.0, blocks=4, tokens=256, bytes=4, buckets=buckets,
        documents=documents,
    )  # fmt: skip


STAGES = {"B1": [entry("off", 2.9)], "C": [entry("off", 2.9), entry("on", 2.0)]}


def test_lines_of_a_run_in_training_are_its_bucket_means_solid_with_the_inner_loop_and_dashed_without():
    axes = stages_figure(STAGES, window=None).axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    on, off, before = (
        lines[f"{name}, inner loop {inner}"] for name, inner in (("C", "on"), ("C", "off"), ("B1", "off"))
    )
    assert list(on.get_xdata()) == [2.5, 10.5, 40.5]
    assert list(on.get_ydata()) == [4.0, 3.0, 2.0]
    assert (on.is_dashed(), off.is_dashed()) == (False, True)
    assert on.get_color() == off.get_color() != before.get_color()
    low, high = axes.get_ylim()
    assert low < 2.0 < 4.0 < high


def test_the_band_is_the_interval_over_documents_whatever_it_hides_nothing():
    documents = [entry("on", 2.0, scatter=0.1).documents]
    (low, high), *others = intervals(documents)
    assert 3.0 <= low < 3.15 < high <= 3.3
    assert others == [(low, high)] * 9
    assert intervals(documents, documents) == [(0.0, 0.0)] * 10
    assert intervals(documents, [documents[0][:3]]) == []
    assert intervals([documents[0][:1]]) == []
    bands = stages_figure({"C": [entry("on", 2.0, scatter=0.1)]}, window=None).axes[0].collections
    assert len(bands) == 1


@pytest.mark.parametrize("window, marked", [(16, True), (64, False), (None, False)])
def test_the_window_is_marked_where_the_context_passes_it(window, marked):
    texts = [text.get_text() for text in stages_figure(STAGES, window=window).axes[0].texts]
    assert texts == (["window: 16 tokens "] if marked else [])


def test_the_same_figure_gives_the_same_files_and_registers_no_global_figure(tmp_path):
    first, second = (save_figure(stages_figure(STAGES, window=16), tmp_path / "new" / "losses") for _ in range(2))
    assert first == second == (tmp_path / "new" / "losses.svg").read_text()
    assert all(text in first for text in ("nats per token", "C, inner loop on", "window: 16 tokens"))
    assert (tmp_path / "new" / "losses.png").read_bytes()[:4] == b"\x89PNG"
    assert pyplot.get_fignums() == []


def test_a_curve_of_a_diverged_run_does_not_spoil_the_picture():
    broken = entry("on", math.nan)
    for stages in ({"D": [broken]}, STAGES | {"D": [broken]}):
        assert np.isfinite(stages_figure(stages, window=None).axes[0].get_ylim()).all()
    with pytest.raises(ValueError, match="got no curve"):
        stages_figure({}, window=None)


def test_position_differences_are_the_arms_minus_the_control_with_the_paired_interval():
    pair = family([arm("a", "fa_import", 2.5, 10, tilt=0.1), arm("b", "bridge", 2.4, 10, tilt=0.3)])
    axes = position_differences_figure(pair, pair.fa_import).axes[0]
    assert axes.get_lines()[0].get_ydata() == pytest.approx([0.1, -0.1, -0.3])
    assert list(axes.get_lines()[0].get_xdata()) == [32.5, 544.5, 16896.5]
    assert len(axes.collections) == 1
    pair.arms[1].records[0].stages[-1].validations[0].buckets[0].stop = 63
    assert "same position buckets" in position_differences_figure(pair, pair.fa_import)


def test_a_colour_belongs_to_a_role_and_arms_of_a_role_differ_otherwise(crowd):
    found = looks(crowd.arms)
    assert found["q_fa_import"].colour == COLOURS["fa_import"]
    assert found["q_p1_bridge"] == found["q_p1_bridge at 0.5"]
    assert len(set(COLOURS.values())) == len(COLOURS)
    assert len({(found[name].colour, found[name].marker) for name in CONTROLS}) == len(CONTROLS)


def test_names_in_figures_are_never_formulas():
    assert label("$x$") == r"\$x\$"
    assert label("a\n\x00ß漢") == "a??ß?"
    assert len(label("x" * 100)) == 26


def test_every_arm_stands_once_in_the_legend_and_every_budget_at_its_point(crowd):
    for figure in (frontier(crowd), series_figure(crowd, "tokens"), positions_figure(crowd)):
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        assert sorted(names) == sorted(arm.name for arm in crowd.arms if arm.share is None)
    assert [text.get_text() for text in frontier(crowd).axes[0].texts] == ["at 0.35", "at 0.5", "at 0.7", "at 1"]


def test_no_text_of_a_figure_is_smaller_than_a_phone_can_show(crowd):
    for figure in (frontier(crowd), target_figure(crowd), series_figure(crowd, "tokens"), timeline_figure(crowd)):
        texts = [text for text in figure.findobj(Text) if text.get_text().strip()]
        assert min(text.get_fontsize() for text in texts) * 364 / (WIDTH * 72) >= 7


def bar_texts(records):
    axes = target_figure(family(records)).axes[0]
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    return dict(zip(names, [text.get_text() for text in axes.texts], strict=True)), axes


KNOWN, UNKNOWN = Parent(name="x", gpu_seconds=36_000.0), Parent(name="y")


def test_hours_to_the_target_are_drawn_and_an_arm_that_never_got_there_is_said():
    records = [arm("a", "ttt_scratch", 2.5, 100), arm("b", "bridge", 2.4, 100, parents=[KNOWN])]
    records += [arm("c", "control", 2.9, 100), arm("d", "direct", 2.4, 100, parents=[UNKNOWN])]
    texts, axes = bar_texts(records)
    assert texts == {"a": "100", "b": "90 / 100", "c": "not reached", "d": "90 / not known"}
    hatched = [(bar.get_x(), bar.get_width()) for bar in axes.patches if bar.get_hatch()]
    assert hatched == [(0.0, pytest.approx(10.0))]


def test_an_arm_that_begins_at_the_target_has_an_upper_bound():
    quick = [arm("b", "bridge", 1.7, 100, parents=[KNOWN]), arm("c", "direct", 1.7, 100, parents=[UNKNOWN])]
    texts, _ = bar_texts([arm("a", "ttt_scratch", 2.5, 100), *quick])
    assert list(texts.values()) == ["100", "≤ 25 / ≤ 35", "≤ 25 / not known"]
    seeds = [arm("b", "bridge", loss, 100, seed=seed) for seed, loss in enumerate((2.4, 1.7))]
    texts, _ = bar_texts([arm("a", "ttt_scratch", 2.5, 100, seed=seed) for seed in (0, 1)] + seeds)
    assert list(texts.values()) == ["100", "≤ 57.5"]


def test_a_single_document_has_no_bar():
    pair = family([arm("a", "ttt_scratch", 2.5, 100), arm("b", "bridge", 2.4, 90)])
    assert len(frontier(pair).axes[0].collections) == 3
    for each in pair.arms:
        each.records[0].stages[-1].validations = [validation({"0": 2.5})]
    assert len(frontier(pair).axes[0].collections) == 2  # the Pareto front alone
    assert all(map(math.isfinite, frontier(pair).axes[0].get_ylim()))


def test_the_baselines_series_is_shifted_to_end_at_its_final_loss():
    pair = family([arm("a", "ttt_scratch", 2.5, 100), arm("b", "bridge", 2.4, 90)])
    for measured in pair.baseline.records[0].evaluations:
        measured.inner_on += 0.2
    assert trend_shift(pair.baseline.records[0]) == pytest.approx(-0.2)
    assert frontier(pair).axes[0].get_lines()[0].get_ydata() == pytest.approx([3.25, 3.0, 2.5])


def test_a_single_measurement_is_no_figure():
    alone = family([arm("a", "ttt_scratch", 2.5, 100)])
    assert "only a has" in frontier(alone)
    assert "only the baseline" in target_figure(alone)
    alone.arms[0].records[0].evaluations = []
    assert "single measurement" in series_figure(alone, "tokens")


def test_captions_say_how_many_blocks_and_what_else_is_in_times_on_a_cpu():
    config = {"model": {"validation": {"subset": 2}}}
    pair = family([arm("a", "ttt_scratch", 2.5, 100, config=config), arm("b", "bridge", 2.4, 90, config=config)])
    records = [record for each in pair.arms for record in each.records]
    for device, said in (("x86_64 cpu", True), ("H200", False)):
        for record in records:
            record.environment.device = device
        captions = {name: each.caption for name, each in family_pictures(pair, family_differences(pair)).items()}
        assert "subset of 2 held-out blocks" in captions["loss_tokens"]
        assert "final loss on 9 held-out blocks" in captions["loss_tokens"]
        timed = ("loss_gpu_hours", "frontier_marginal", "frontier_with_parents", "timeline", "target", "speed")
        assert {n for n, caption in captions.items() if "Processes on CPU" in caption} == (
            set(timed) if said else set()
        )
    assert subset_loss(2.54321, records[:1]) == "2.54"
    records[0].config["model"]["validation"]["subset"] = 8
    assert subset_loss(2.54321, records[:1]) == "2.543"
    assert block_words([None]) == "held-out blocks whose number was not recorded"


def test_costs_of_parents_move_points_to_the_right_and_unknown_ones_remove_them():
    for parents, expected in (([KNOWN], [20.0]), ([KNOWN, UNKNOWN], [])):
        others = [arm("a", "ttt_scratch", 2.5, 100), arm("c", "direct", 2.4, 50)]
        figure = frontier(family([*others, arm("b", "bridge", 2.4, 10, parents=parents)]), "with_parents")
        lines = figure.axes[0].get_lines()
        drawn = [
            line.get_xdata()[0] for line in lines if line.get_marker() == "o" and line.get_color() == COLOURS["bridge"]
        ]
        assert drawn == pytest.approx(expected)


def test_the_pareto_front_is_what_nobody_beats_in_both():
    assert pareto([(3, 1.0), (1, 3.0), (2, 3.0), (2, 2.0), (4, 1.0)]) == [(1, 3.0), (2, 2.0), (3, 1.0)]
