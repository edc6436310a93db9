"""The intervals are what they say: exact on small tables, right about as often as promised, and the same at every call."""

import itertools
from collections import Counter

import numpy as np
import pytest

from ttt_lit.verdict.statistics import _bootstrap_means, level_change, mean_interval, paired_difference


def named(values):
    """(seeds, documents) → one mapping per seed."""
    return [{f"d{index:03}": float(value) for index, value in enumerate(row)} for row in values]


def every_resample(values):
    """Means of all equally likely tables of resampled seeds and documents, by enumeration."""
    seeds, documents = values.shape
    return [
        float(np.mean([[values[s, d] for d in columns] for s in rows]))
        for rows in itertools.product(range(seeds), repeat=seeds)
        for columns in itertools.product(range(documents), repeat=documents)
    ]


@pytest.mark.parametrize("shape", [(1, 2), (1, 4), (2, 3), (3, 2)])
def test_resampled_means_are_distributed_as_enumeration_says(shape):
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])[: shape[0] * shape[1]].reshape(shape)
    exact = Counter(round(mean, 9) for mean in every_resample(values))
    drawn = Counter(np.round(_bootstrap_means(values, np.ones(shape[1]), 20_000, np.random.default_rng(0)), 9).tolist())
    assert set(drawn) <= set(exact)
    for mean, count in exact.items():
        share = count / sum(exact.values())
        scatter = (share * (1 - share) / 20_000) ** 0.5
        assert drawn[mean] / 20_000 == pytest.approx(share, abs=5 * scatter)


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("shape", [(1, 5), (2, 3)])
def test_the_interval_is_that_of_the_enumerated_distribution(shape, level):
    values = np.random.default_rng(3).normal(size=shape)
    interval = mean_interval(named(values), resamples=40_000, level=level)
    exact = np.array(every_resample(values))
    spread = exact.max() - exact.min()
    assert interval.low == pytest.approx(np.quantile(exact, (1 - level) / 2), abs=0.02 * spread)
    assert interval.high == pytest.approx(np.quantile(exact, (1 + level) / 2), abs=0.02 * spread)
    assert interval.estimate == pytest.approx(values.mean())
    assert (interval.seeds, interval.documents, interval.level) == (*shape, level)


def share_of_hits(tables, truth, resamples=300):
    intervals = [mean_interval(named(table), resamples=resamples) for table in tables]
    return np.mean([interval.low <= truth <= interval.high for interval in intervals])


@pytest.mark.parametrize("seeds, between_seeds", [(1, 0.0), (3, 0.0), (5, 0.003)])
def test_a_95_percent_interval_holds_the_truth_about_95_times_of_100(seeds, between_seeds):
    generator = np.random.default_rng(11)

    def table():
        documents = generator.normal(0, 0.03, (1, 40))
        return (
            0.01 + documents + generator.normal(0, between_seeds, (seeds, 1)) + generator.normal(0, 0.01, (seeds, 40))
        )

    assert 0.90 <= share_of_hits([table() for _ in range(300)], 0.01) <= 0.98


def test_documents_alone_would_promise_too_much_where_seeds_differ():
    generator = np.random.default_rng(5)
    tables = [generator.normal(0, 0.02, (6, 1)) + generator.normal(0, 0.02, (6, 40)) for _ in range(200)]
    over_both = share_of_hits(tables, 0.0)
    over_documents = share_of_hits([table.mean(0, keepdims=True) for table in tables], 0.0)
    assert over_both > 0.85
    assert over_documents < 0.6


def test_blocks_of_one_document_count_as_one_unit():
    """Blocks that repeat each other add nothing: the interval is that of the documents alone."""
    values = np.random.default_rng(4).normal(size=(2, 12))
    once = mean_interval(named(values))
    repeated = {f"d{index:03}": index // 3 for index in range(36)}
    fourfold = mean_interval(named(values.repeat(3, axis=1)), documents=repeated)
    assert (fourfold.blocks, fourfold.documents) == (36, 12)
    assert (fourfold.low, fourfold.high) == pytest.approx((once.low, once.high))
    assert mean_interval(named(values.repeat(3, axis=1))).width < 0.75 * once.width


def test_a_document_weighs_as_many_times_as_it_has_blocks():
    values, documents = np.array([[1.0, 1.0, 1.0, 5.0]]), {"d000": 7, "d001": 7, "d002": 7, "d003": 3}
    interval = mean_interval(named(values), documents=documents, level=0.999)
    assert interval.estimate == pytest.approx(2.0)
    assert (interval.low, interval.high) == (1.0, 5.0)


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_single_document_has_a_mean_and_no_bounds(blocks):
    """Resampled, it is always itself: a width of zero would look certain."""
    values = np.arange(2.0 * blocks).reshape(2, blocks)
    alone = mean_interval(named(values), documents={f"d{index:03}": 7 for index in range(blocks)})
    assert alone.estimate == pytest.approx(values.mean())
    assert (alone.low, alone.high, alone.documents, alone.bounded) == (-np.inf, np.inf, 1, False)
    assert mean_interval(named(np.ones((1, 2)))).bounded


@pytest.mark.parametrize("known, hits", [(True, (0.88, 0.98)), (False, (0.0, 0.75))])
def test_only_resampled_documents_hold_the_truth_where_blocks_of_one_resemble_each_other(known, hits):
    generator = np.random.default_rng(7)
    documents = {f"d{index:03}": index // 4 for index in range(120)} if known else None

    def hit():
        values = generator.normal(0, 0.03, (1, 30)).repeat(4, axis=1) + generator.normal(0, 0.01, (1, 120))
        interval = mean_interval(named(values), documents=documents, resamples=300)
        return interval.low <= 0 <= interval.high

    assert hits[0] <= np.mean([hit() for _ in range(200)]) <= hits[1]


def test_pairing_cancels_how_hard_a_document_is():
    generator = np.random.default_rng(0)
    hardness = generator.normal(3, 1, (1, 50))
    baseline, candidate = named(hardness), named(hardness + 0.02 + generator.normal(0, 0.001, (1, 50)))
    paired = paired_difference(candidate, baseline)
    assert 0.019 < paired.low < paired.estimate < paired.high < 0.021
    assert mean_interval(candidate).width > 100 * paired.width


def test_equal_arguments_give_equal_intervals_and_the_order_of_documents_does_not_count():
    table = named(np.random.default_rng(0).normal(size=(2, 30)))
    shuffled = [dict(reversed(row.items())) for row in table]
    first = mean_interval(table, resamples=1_500)
    assert mean_interval(table, resamples=1_500) == first == mean_interval(shuffled, resamples=1_500)
    other = mean_interval(table, resamples=1_500, seed=1)
    assert other != first
    assert other.low == pytest.approx(first.low, abs=0.05)


def test_candidate_i_is_paired_with_baseline_i():
    a, b = named([[1.0, 2.0], [10.0, 20.0]]), named([[1.0, 2.0], [10.0, 20.0]])
    assert paired_difference(a, b, resamples=200).width == 0
    assert paired_difference(a, b[::-1], resamples=200).width > 0


@pytest.mark.parametrize(
    "candidate, baseline, message",
    [
        ([{"a": 1.0}], [{"b": 1.0}], "0 in common"),
        ([{"a": 1.0}], [{"a": 1.0, "b": 1.0}], "1 and 2 blocks"),
        ([{"a": 1.0}, {"b": 1.0}], [{"a": 1.0}, {"a": 1.0}], "0 in common"),
        ([{"a": 1.0}], [{"a": 1.0}, {"a": 1.0}], "1 and 2 seeds"),
        ([], [], "no blocks"),
        ([{}], [{}], "no blocks"),
        ([{"a": float("nan")}], [{"a": 1.0}], "not finite"),
    ],
)
def test_what_cannot_be_paired_is_refused(candidate, baseline, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(candidate, baseline)


@pytest.mark.parametrize("options", [{"resamples": 0}, {"level": 1.0}, {"level": 0.0}])
def test_senseless_options_are_refused(options):
    with pytest.raises(ValueError, match="resamples at level"):
        mean_interval([{"a": 1.0}], **options)


def test_a_level_series_rarely_rises_and_a_rising_one_does():
    generator = np.random.default_rng(2)
    false_alarms = np.mean([level_change(generator.normal(3, 0.05, 24), resamples=300).low > 0 for _ in range(400)])
    assert false_alarms < 0.08
    rising = [level_change(generator.normal(3, 0.05, 24) + np.linspace(0, 0.3, 24), resamples=300) for _ in range(50)]
    assert all(change.low > 0 for change in rising)
    assert np.mean([change.estimate for change in rising]) == pytest.approx(0.3 * 12 / 23, abs=0.02)


def test_the_change_of_a_step_is_exact_and_the_odd_value_belongs_to_the_second_half():
    change = level_change([1.0, 1.0, 2.0, 2.0, 2.0])
    assert (change.estimate, change.low, change.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("series", [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0, float("nan")]])
def test_a_series_too_short_or_broken_is_refused(series):
    with pytest.raises(ValueError, match="at least 4"):
        level_change(series)
