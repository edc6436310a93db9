"""The secondary gates at their limits."""

import numpy as np
import pytest
from helpers.records import FALLING, run, stage, validation

from ttt_lit.verdict.gates import SPIKE_STEPS, SPIKE_WINDOW, convergence_gate, long_token_gate
from ttt_lit.verdict.study import read_study

IDS = [f"{index:03}" for index in range(32)]


def arm_of(*records):
    ((arm,),) = (family.arms for family in read_study(records).families.values())
    return arm


def trained(losses, *, before=(), seed=0, **fields):
    final = validation(dict.fromkeys(IDS, 3.0))
    stages = [*before, stage(losses=losses, validations=[final], steps=len(losses))]
    return run("q_p1_bridge", "bridge", {}, final=final, seed=seed, **({"stages": stages} | fields))


def convergence(losses, **fields):
    return convergence_gate(arm_of(trained(losses, **fields)), resamples=400)


def level(steps, seed=0):
    return list(np.random.default_rng(seed).normal(3, 0.05, steps))


def spiked(height, length, at=50, steps=150):
    return [3.0] * at + [3.0 + height] * length + [3.0] * (steps - at - length)


# ---- Convergence


def test_a_falling_run_is_stable():
    gate = convergence(list(np.linspace(4, 3, 150) + np.random.default_rng(0).normal(0, 0.05, 150)))
    assert gate.outcome == "pass"
    assert gate.subject == "q_p1_bridge"
    assert gate.numbers[0][0] == "change over the last third of C, seed 0"


@pytest.mark.parametrize("length, outcome", [(SPIKE_STEPS - 1, "pass"), (SPIKE_STEPS, "fail")])
def test_a_spike_is_twenty_high_steps_in_a_row(length, outcome):
    assert convergence(spiked(0.51, length)).outcome == outcome


@pytest.mark.parametrize("height, outcome", [(0.5, "pass"), (0.51, "fail")])
def test_a_spike_is_more_than_half_a_nat_high(height, outcome):
    assert convergence(spiked(height, 40)).outcome == outcome


def test_one_low_step_ends_a_spike():
    losses = spiked(0.6, 35)
    losses[50 + SPIKE_STEPS - 1] = 3.0
    assert convergence(losses).outcome == "pass"


@pytest.mark.parametrize("at, outcome", [(SPIKE_WINDOW - 1, "pass"), (SPIKE_WINDOW, "fail")])
def test_the_limit_stands_once_the_window_has_been_full(at, outcome):
    """A spike that starts one step earlier has its first step in the warm-up, and is one short."""
    assert convergence(spiked(0.6, SPIKE_STEPS, at=at)).outcome == outcome


def test_the_limit_stays_where_the_lowest_median_was_while_the_loss_climbs():
    """A median that follows the loss would never notice this."""
    losses = [3.0] * 50 + list(np.linspace(3.0, 4.5, 300)) + [3.0] * 400
    gate = convergence(losses)
    assert gate.outcome == "fail"
    assert "stage C, step" in gate.reasons[0]


def test_every_stage_is_looked_at_and_starts_afresh():
    high_then_low = stage("B1", losses=[2.0] * 60)
    assert convergence(level(150), before=[high_then_low]).outcome == "pass"
    assert convergence(level(150), before=[stage("B1", losses=spiked(0.6, 30))]).outcome == "fail"


def test_a_divergence_stop_fails():
    gate = convergence(level(150), status="diverged", reason="the loss is nan")
    assert gate.outcome == "fail"
    assert "the loss is nan" in gate.reasons[0]


def test_a_loss_that_is_no_number_fails():
    assert convergence([3.0] * 100 + [float("nan")] + [3.0] * 50).outcome == "fail"


def test_a_last_third_that_rises_fails_and_an_earlier_rise_does_not():
    noise = np.random.default_rng(1).normal(0, 0.02, 150)
    end = np.concatenate([np.full(100, 3.0), np.linspace(3.0, 3.2, 50)]) + noise
    gate = convergence(list(end))
    assert (gate.outcome, "rises over the last third" in gate.reasons[0]) == ("fail", True)
    assert convergence(list(np.concatenate([np.linspace(3.0, 3.2, 100), np.full(50, 3.2)]) + noise)).outcome == "pass"


@pytest.mark.parametrize("steps, outcome", [(119, "insufficient"), (120, "pass")])
def test_a_trend_needs_forty_steps(steps, outcome):
    assert convergence([3.0] * steps).outcome == outcome


@pytest.mark.parametrize("noise, outcome", [(0.02, "pass"), (0.2, "insufficient")])
def test_a_flat_end_passes_where_a_rise_can_be_excluded(noise, outcome):
    """An interval around 0 is what a converged run gives; how wide it may be is the margin's to say."""
    gate = convergence(list(3.0 + np.random.default_rng(3).normal(0, noise, 150)))
    assert gate.outcome == outcome
    assert any("rise" in reason and "nats per token" in reason for reason in gate.reasons)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"status": "interrupted", "reason": "SIGTERM"}, "did not finish: interrupted"),
        ({"stages": []}, "no stage C"),
        ({"stages": [stage("C", losses=())]}, "no training losses"),
    ],
)
def test_a_run_that_did_not_finish_is_not_evidence(fields, words):
    gate = convergence(level(150), **fields)
    assert gate.outcome == "insufficient"
    assert any(words in reason for reason in gate.reasons)


def test_every_seed_must_be_stable():
    good, bad = trained(level(150)), trained(spiked(0.6, 30), seed=1)
    assert convergence_gate(arm_of(good, trained(level(150, 1), seed=1)), resamples=300).outcome == "pass"
    gate = convergence_gate(arm_of(good, bad), resamples=300)
    assert gate.outcome == "fail"
    assert gate.reasons[0].startswith("seed 1: stage C")


# ---- Long tokens


def measured(deciles, *, documents=32, scatter=0.0, seed=0):
    """A run whose documents have these deciles; ``scatter`` moves the last one up and down by document."""
    rows = {each: [*deciles[:-1], deciles[-1] + scatter * (-1) ** index] for index, each in enumerate(IDS[:documents])}
    return run(
        "q_p1_bridge",
        "bridge",
        dict.fromkeys(rows, 3.0),
        final=validation(dict.fromkeys(rows, 3.0), deciles=rows),
        seed=seed,
    )


def long_tokens(deciles, **options):
    return long_token_gate(arm_of(measured(deciles, **options)), resamples=300)


def with_last(value):
    return [*FALLING[:-1], value]


def test_a_loss_that_falls_with_the_position_passes():
    gate = long_tokens(FALLING)
    assert gate.outcome == "pass"
    assert gate.numbers[0] == ("last tenth minus second", "−0.1600 [−0.1600, −0.1600] nats per token")


def test_the_first_tenth_does_not_count():
    """Nothing has been read there yet, so everything is better than it."""
    assert long_tokens([2.0, *[3.0] * 9]).outcome == "fail"  # a rise between neighbours
    assert long_tokens([9.0, *[3.0] * 9]).outcome == "pass"
    assert long_tokens([9.0, *[3.0] * 8, 3.001]).outcome == "fail"


@pytest.mark.parametrize("rise, outcome", [(0.0199, "pass"), (0.0201, "fail")])
def test_no_tenth_rises_by_more_than_the_limit(rise, outcome):
    flat = FALLING[7]
    gate = long_tokens([*FALLING[:8], flat + rise, flat])
    assert gate.outcome == outcome
    assert gate.numbers[1] == (
        "largest rise between neighbours (tenth 8 to 9)",
        f"{rise:+.4f} [{rise:+.4f}, {rise:+.4f}] nats per token",
    )


def test_an_interval_across_the_limit_is_not_enough_evidence():
    value = FALLING[8] + 0.02
    gate = long_tokens(with_last(value), scatter=0.05)
    assert gate.outcome == "insufficient"
    assert all("crosses 0.02" in reason for reason in gate.reasons)


def test_many_open_neighbours_are_said_in_one_sentence_beside_the_full_list():
    rows = {each: [3.0 - 0.02 * t + 0.2 * (-1) ** (index + t) for t in range(10)] for index, each in enumerate(IDS)}
    for row in rows.values():
        row[6] += 0.01  # the pair 6 to 7 has the highest bound
    final = validation(dict.fromkeys(IDS, 3.0), deciles=rows)
    gate = long_token_gate(arm_of(run("q_p1_bridge", "bridge", {}, final=final)), resamples=300)
    assert gate.outcome == "insufficient"
    assert len(gate.reasons) > len(gate.brief) > 0
    assert "for 9 of 9 pairs of neighbouring tenths" in gate.brief[-1]
    assert "tenth 6 to 7: " in gate.brief[-1]
    assert sum("crosses 0.02" in reason for reason in gate.reasons) == 9
    failing = {each: [*row[:9], row[8] + 1.0] for each, row in rows.items()}
    broken = run("q_p1_bridge", "bridge", {}, final=validation(dict.fromkeys(IDS, 3.0), deciles=failing))
    assert long_token_gate(arm_of(broken), resamples=300).brief == ()  # what failed is never behind a count


def test_too_few_documents_can_neither_pass_nor_fail():
    assert long_tokens(FALLING, documents=19).outcome == "insufficient"
    assert long_tokens(with_last(4.0), documents=19).outcome == "insufficient"
    assert long_tokens(FALLING, documents=20).outcome == "pass"


@pytest.mark.parametrize("deciles", [FALLING[:9], (*FALLING[:9], float("nan")), ()])
def test_broken_deciles_are_no_evidence(deciles):
    record = run("q_p1_bridge", "bridge", {}, final=validation(dict.fromkeys(IDS, 3.0), deciles=deciles))
    assert long_token_gate(arm_of(record), resamples=20).outcome == "insufficient"


def test_a_run_without_validation_is_no_evidence():
    record = run("q_p1_bridge", "bridge", {}, stages=[])
    assert long_token_gate(arm_of(record), resamples=20).outcome == "insufficient"


def test_seeds_measured_on_other_documents_are_no_evidence():
    arm = arm_of(measured(FALLING), measured(FALLING, documents=24, seed=1))
    assert long_token_gate(arm, resamples=20).outcome == "insufficient"
