"""The ledger: every second in exactly one account, nothing lost across resume. The clock is ours."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_lit.metrics import ACCOUNTS
from ttt_lit.train.budget import StageBudget
from ttt_lit.train.ledger import Ledger, nothing


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def seconds(**accounts):
    return dict.fromkeys(ACCOUNTS, 0.0) | accounts


def test_time_goes_to_one_account_and_is_multiplied_by_devices(clock):
    ledger = Ledger(devices=4, clock=clock)
    clock.now += 1000
    ledger.start_stage("B2")
    clock.now += 3
    with ledger.account("validation"):
        clock.now += 2
        with ledger.account("checkpoint"):
            clock.now += 1
        clock.now += 2
    clock.now += 5
    assert ledger.spent("B2").gpu_seconds == seconds(compute=32.0, validation=16.0, checkpoint=4.0)
    ledger.stop()
    clock.now += 1000
    assert ledger.total().gpu_seconds == seconds(compute=32.0, validation=16.0, checkpoint=4.0)


def test_paired_hooks_can_switch_and_hand_back(clock):
    ledger = Ledger(clock=clock)
    ledger.start_stage("C")
    previous = ledger.switch("compile")
    clock.now += 7
    ledger.switch(previous)
    clock.now += 1
    assert ledger.spent("C").gpu_seconds == seconds(compile=7.0, compute=1.0)


def test_an_exception_inside_an_account_hands_the_clock_back(clock):
    ledger = Ledger(clock=clock)
    ledger.start_stage("C")

    def fail_during_validation():
        with ledger.account("validation"):
            clock.now += 1
            raise KeyError

    with pytest.raises(KeyError):
        fail_during_validation()
    clock.now += 2
    assert ledger.spent("C").gpu_seconds == seconds(validation=1.0, compute=2.0)


def test_a_stage_start_inside_an_account_does_not_leak_it(clock):
    ledger = Ledger(clock=clock)
    ledger.start_stage("B1")
    ledger.switch("validation")
    clock.now += 1
    ledger.start_stage("B2")
    clock.now += 2
    assert ledger.spent("B1").gpu_seconds == seconds(validation=1.0)
    assert ledger.spent("B2").gpu_seconds == seconds(compute=2.0)
    with ledger.account("checkpoint"):
        ledger.stop()
    assert ledger.stages() == ("B1", "B2")


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.sampled_from([*ACCOUNTS, "stage", "resume"]), st.integers(0, 1000)), max_size=30))
def test_no_second_is_lost_or_counted_twice_across_any_resume(events):
    clock = Clock()
    ledger = Ledger(devices=2, clock=clock)
    ledger.start_stage("A")
    stage, expected = 0, 0
    for event, wait in events:
        if event == "stage":
            stage += 1
            ledger.start_stage(f"S{stage}")
        elif event == "resume":
            state = json.loads(json.dumps(ledger.state_dict()))
            name = ledger.stage
            clock = Clock()
            ledger = Ledger(devices=2, clock=clock)
            ledger.load_state_dict(state)
            clock.now += 10_000
            ledger.start_stage(name)
        else:
            ledger.switch(event)
        clock.now += wait
        expected += 2 * wait
    assert sum(ledger.total().gpu_seconds.values()) == expected


def test_counts_per_stage_and_per_run_survive_resume(clock):
    ledger = Ledger(clock=clock)
    ledger.start_stage("B2")
    for _ in range(4):
        ledger.count_micro_batch(tokens=100, num_bytes=330)
    ledger.count_optimizer_step()
    ledger.start_stage("C")
    ledger.count_micro_batch(tokens=7, num_bytes=20)

    resumed = Ledger(clock=clock)
    resumed.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    resumed.start_stage("C")
    resumed.count_micro_batch(tokens=7, num_bytes=20)
    resumed.count_optimizer_step()
    assert resumed.spent("B2") == dataclasses.replace(
        nothing(), tokens=400, bytes=1320, optimizer_steps=1, micro_batches=4
    )
    assert resumed.total() == dataclasses.replace(nothing(), tokens=414, bytes=1360, optimizer_steps=2, micro_batches=6)
    assert ledger.spent("C").tokens == 7


def test_accounts_of_a_resume_file_with_the_older_name_are_read(clock):
    ledger = Ledger(clock=clock)
    ledger.start_stage("C")
    clock.now += 5
    state = ledger.state_dict()
    state["stages"]["C"]["seconds"] = state["stages"]["C"].pop("gpu_seconds")
    resumed = Ledger(clock=clock)
    resumed.load_state_dict(state)
    assert resumed.total() == ledger.total()


def test_a_reading_does_not_change_with_the_ledger(clock):
    ledger = Ledger(clock=clock)
    ledger.start_stage("C")
    reading = ledger.spent("C")
    clock.now += 5
    ledger.count_optimizer_step()
    ledger.spent("C")
    assert reading == nothing()


def test_fractions_count_compute_only(clock):
    ledger = Ledger(devices=2, clock=clock)
    ledger.start_stage("C")
    budget = StageBudget(seconds=20.0)
    with ledger.account("validation"):
        clock.now += 100
    clock.now += 9
    assert ledger.spent_fraction("C", budget) == 0.9
    assert not ledger.stage_spent("C", budget)
    clock.now += 1
    assert ledger.stage_spent("C", budget)
    steps = StageBudget(steps=1)
    assert not ledger.stage_spent("C", steps)
    ledger.count_optimizer_step()
    assert ledger.stage_spent("C", steps)
    assert ledger.spent_fraction("later", steps) == 0.0


def test_misuse_is_an_error(clock):
    ledger = Ledger(clock=clock)
    with pytest.raises(RuntimeError, match="start_stage first"):
        ledger.count_optimizer_step()
    with pytest.raises(RuntimeError, match="start_stage first"):
        ledger.switch("validation")
    ledger.start_stage("C")
    with pytest.raises(ValueError, match="got account 'coffee'"):
        ledger.switch("coffee")
    with pytest.raises(ValueError, match="format 99"):
        ledger.load_state_dict({"format": 99, "stages": {}})
    with pytest.raises(ValueError, match="at least 1"):
        Ledger(devices=0)
