"""Learning rates: the reference's schedule, and an end that follows the budget."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_lit.train.schedule import InnerLRSchedule, LRSchedule

shares = st.floats(0, 0.99)


def test_steps_reproduce_the_reference_schedule():
    """Linear 0 → 1e-3 over 2 steps, then cosine to 1e-5 at step 10: the golden cases' optimiser."""
    schedule = LRSchedule(warmup_share=0.2, final_lr_ratio=0.01)
    expected = [0.0, 5e-4] + [1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * (s - 2) / 8)) / 2 for s in range(2, 11)]
    assert [schedule.lr(1e-3, step / 10) for step in range(11)] == pytest.approx(expected, rel=1e-12)


@settings(deadline=None, max_examples=100)
@given(shares, st.floats(0, 1), st.floats(1, 10))
def test_peak_at_the_end_of_warm_up_and_final_value_when_the_budget_ends(warmup, final, overrun):
    schedule = LRSchedule(warmup_share=warmup, final_lr_ratio=final)
    assert schedule.factor(warmup) == pytest.approx(1.0)
    assert schedule.factor(overrun) == pytest.approx(final, abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(shares, st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_rises_before_the_peak_and_falls_after_it(warmup, final, a, b):
    schedule = LRSchedule(warmup_share=warmup, final_lr_ratio=final)
    low, high = sorted((a, b))
    if high <= warmup:
        assert schedule.factor(low) <= schedule.factor(high)
    elif low >= warmup:
        assert schedule.factor(low) >= schedule.factor(high) - 1e-12


def test_inner_warm_up_reproduces_the_reference():
    """At outer step s of 20 with n = 5: init + (ilr - init) · min(1, (s + 1) / 5)."""
    schedule = InnerLRSchedule(warmup_share=0.25, initial_ratio=0.1)
    got = [schedule.lr(0.3, (step + 1) / 20) for step in range(20)]
    assert got == pytest.approx([0.03 + 0.27 * min(1, (step + 1) / 5) for step in range(20)])


def test_without_warm_up_the_inner_rate_is_the_target_at_once():
    assert InnerLRSchedule().lr(1.0, 0.0) == 1.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: LRSchedule(warmup_share=1.0),
        lambda: LRSchedule(warmup_share=-0.1),
        lambda: LRSchedule(final_lr_ratio=1.5),
        lambda: InnerLRSchedule(initial_ratio=float("nan")),
        lambda: LRSchedule().factor(-0.01),
        lambda: LRSchedule().factor(float("nan")),
    ],
)
def test_senseless_values_are_refused(make):
    with pytest.raises(ValueError, match="expected"):
        make()
