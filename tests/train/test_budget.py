"""Budgets: exact totals, whole steps, one-line errors."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_lit.train.budget import Budget, StageBudget, allocate_steps, split_budget


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=5), st.integers(1000, 10**6), st.booleans(), st.integers(1, 4096)
)
def test_steps_add_up_exactly_and_stay_within_one_of_their_share(weights, total, leave_one_open, tokens_per_step):
    shares = {f"S{i}": weight / sum(weights) for i, weight in enumerate(weights)}
    exact = dict(shares)
    if leave_one_open:
        shares["S0"] = None
    steps = allocate_steps(total * tokens_per_step, tokens_per_step, shares)
    assert list(steps) == list(shares)
    assert sum(steps.values()) == total
    assert all(abs(steps[stage] - exact[stage] * total) < 1 + 1e-6 for stage in steps)


def test_decimal_shares_are_exact():
    """0.3 · 1000 is 299.99… in binary; the stage still gets its 300 steps."""
    assert allocate_steps(1000, 1, {"A": 0.1, "B": 0.3, "C": 0.6}) == {"A": 100, "B": 300, "C": 600}


def test_the_open_stage_takes_the_rest_and_order_is_kept():
    assert allocate_steps(4096 * 10, 4096, {"B1": 0.2, "B2": None, "C": 0.3}) == {"B1": 2, "B2": 5, "C": 3}


@pytest.mark.parametrize(
    "tokens, shares, message",
    [
        (1000, {"C": None}, "use 768 or 1024"),
        (100, {"C": None}, "use 256$"),
        (2560, {"B": 0.7, "C": 0.6}, "sum to 1.3, expected at most 1"),
        (2560, {"B": 0.5, "C": 0.3}, "sum to 0.8, expected 1; set one share to null"),
        (2560, {"B": None, "C": None}, "expected at most one"),
        (2560, {"B": 1.0, "C": None}, "nothing is left for stage C"),
        (2560, {"B": 0.01, "C": None}, "stage B gets no optimiser step out of 10"),
        (2560, {"B": 0.0, "C": None}, "stage B has share 0.0"),
        (2560, {}, "no stage"),
        (0, {"C": None}, "at least 1"),
    ],
)
def test_errors_are_one_line_and_name_the_stage(tokens, shares, message):
    with pytest.raises(ValueError, match=message) as error:
        allocate_steps(tokens, 256, shares)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fields", [{}, {"tokens": 1, "gpu_hours": 1.0}])
def test_a_budget_is_exactly_one_thing(fields):
    with pytest.raises(ValueError, match="exactly one of tokens and gpu_hours"):
        Budget(**fields)


@pytest.mark.parametrize("fields", [{"tokens": 0}, {"gpu_hours": float("inf")}, {"gpu_hours": float("nan")}])
def test_a_budget_is_positive_and_finite(fields):
    with pytest.raises(ValueError, match="positive finite"):
        Budget(**fields)


def test_time_is_split_by_share():
    budgets = split_budget(Budget(gpu_hours=2.0), tokens_per_step=1, shares={"B2": 0.25, "C": None})
    assert budgets == {"B2": StageBudget(seconds=1800.0), "C": StageBudget(seconds=5400.0)}


def test_tokens_are_split_into_steps():
    budgets = split_budget(Budget(tokens=800), tokens_per_step=100, shares={"B2": 0.25, "C": None})
    assert budgets == {"B2": StageBudget(steps=2), "C": StageBudget(steps=6)}


def test_fractions_follow_the_kind_of_budget():
    assert StageBudget(steps=4).fraction(optimizer_steps=1, compute_seconds=1e9) == 0.25
    assert StageBudget(seconds=10.0).fraction(optimizer_steps=10**9, compute_seconds=12.5) == 1.25
