"""The primary gate by hand, where a rule has an edge."""

import pytest
from helpers.gate_reasons import NOMINAL, reason_kinds
from helpers.records import run, validation

from ttt_lit.record.schema import Environment, Model, Parent
from ttt_lit.verdict.gates import judge_candidates, primary_gate
from ttt_lit.verdict.study import read_study

IDS = [f"{index:03}" for index in range(32)]


def losses(mean, scatter=0.0):
    return {each: mean + scatter * (-1) ** index for index, each in enumerate(IDS)}


def study_of(deltas, *, measured=None, scatter=0.0, seeds=(0, 1), parents=(), baseline=None, **fields):
    """A baseline at 3 nats and 100 h, and a candidate whose differences are ``deltas`` (share → nats)."""
    records = []
    for seed in seeds:
        records.append(run("q_ttt_scratch", "ttt_scratch", losses(3.0), seed=seed, **(baseline or {})))
        for share, delta in deltas.items():
            hours = 100 * (measured or {}).get(share, share)
            candidate = losses(3.0 + delta, scatter)
            records.append(
                run(
                    "q_p1_bridge",
                    "bridge",
                    candidate,
                    seed=seed,
                    share=share,
                    hours=hours,
                    parents=list(parents),
                    **fields,
                )
            )
    return read_study(records).families["qwen2"]


def gate_of(deltas, account="marginal", **options):
    return primary_gate(study_of(deltas, **options), "q_p1_bridge", "", account, resamples=300)


HOLDS_FROM_HALF = {0.35: 0.05, 0.5: 0.0, 0.7: -0.01, 1.0: -0.02}


def test_the_smallest_share_that_holds_is_the_reduction():
    gate = gate_of(HOLDS_FROM_HALF)
    assert (gate.outcome, gate.reduction, gate.decided_by) == ("pass", pytest.approx(0.5), "q_p1_bridge at 0.5")
    assert dict(gate.numbers)["saving"] == "0.500 of the baseline's GPU-hours"


def test_measured_hours_count_not_planned_ones():
    assert gate_of(HOLDS_FROM_HALF, measured={0.5: 0.62}).reduction == pytest.approx(0.38)
    late = {0.35: 0.05, 0.5: 0.05, 0.7: 0.0, 1.0: 0.0}
    assert gate_of(late, measured={0.7: 0.709}).outcome == "pass"
    assert gate_of(late, measured={0.7: 0.711}).outcome == "insufficient"


def test_a_run_that_overran_its_budget_and_holds_leaves_a_gap_and_no_failure():
    """Between the dearest that is worse and the limit nothing was measured, and somewhere there the loss may come to hold."""
    overrun = {0.35: 0.373, 0.5: 0.526, 0.7: 0.728, 1.0: 1.03}
    gate = gate_of({0.35: 0.05, 0.5: 0.03, 0.7: 0.0, 1.0: -0.01}, measured=overrun)
    assert (gate.outcome, reason_kinds(gate.reasons)) == ("insufficient", {"gap"})
    assert gate.reduction == pytest.approx(0.272)
    worse = gate_of({0.35: 0.05, 0.5: 0.04, 0.7: 0.03, 1.0: -0.01}, measured=overrun)
    assert worse.outcome == "fail"
    assert "q_p1_bridge at 0.7 costs 0.728" in worse.reasons[0]
    crossing = gate_of({0.35: 0.05, 0.5: 0.04, 0.7: 0.01, 1.0: -0.01}, measured=overrun, scatter=0.004)
    assert (crossing.outcome, reason_kinds(crossing.reasons)) == ("insufficient", {"gap"})


@pytest.mark.parametrize("measured, outcome", [(0.689, "insufficient"), (0.691, "fail")])
def test_a_failure_needs_a_run_near_the_limit(measured, outcome):
    assert gate_of({0.35: 0.05, 0.5: 0.04, 0.7: 0.03, 1.0: 0.0}, measured={0.7: measured}).outcome == outcome


@pytest.mark.parametrize(
    "fields, kind",
    [
        ({"model": Model(family="qwen2", num_parameters=2, num_layers=1, ttt_layers=[0])}, "unmatched"),
        ({"model": Model(family="qwen2", num_parameters=1, num_layers=1, ttt_layers=[1])}, "unmatched"),
        ({"environment": Environment(device="H200", num_devices=8)}, "devices"),
    ],
)
def test_another_network_or_another_machine_is_not_a_matched_comparison(fields, kind):
    gate = gate_of(HOLDS_FROM_HALF, **fields)
    assert (gate.outcome, reason_kinds(gate.reasons)) == ("insufficient", {kind})
    assert gate.reduction == pytest.approx(0.5)


def test_a_baseline_with_updates_is_not_compared_with_a_candidate_without():
    family = study_of(HOLDS_FROM_HALF)
    for record in (record for arm in family.arms if arm.share for record in arm.records):
        record.final().inner = record.headline = "off"
    gate = primary_gate(family, "q_p1_bridge", "", "marginal", resamples=100)
    assert (gate.outcome, reason_kinds(gate.reasons)) == ("insufficient", {"unmatched"})


def test_shares_of_a_candidate_with_other_inner_rates_are_no_candidate():
    family = study_of(HOLDS_FROM_HALF)
    for arm in family.arms:
        for record in arm.records:
            record.config = {"model": {"inner": {"lr": 1.0 if arm.share is None else 0.1}}}
    assert primary_gate(family, "q_p1_bridge", "", "marginal", resamples=100).outcome == "pass"
    family.shares("q_p1_bridge", "")[0.7].records[0].config = {"model": {"inner": {"lr": 0.3}}}
    gate = primary_gate(family, "q_p1_bridge", "", "marginal", resamples=100)
    assert (gate.outcome, reason_kinds(gate.reasons)) == ("insufficient", {"inner loops"})


def test_a_saving_inside_the_tolerance_says_so_and_a_dearer_run_saves_nothing():
    gate = gate_of({0.35: 0.05, 0.5: 0.05, 0.7: 0.0, 1.0: 0.0}, measured={0.7: 0.709})
    assert gate.reasons[0].startswith("saves 29.1% of the baseline's GPU-hours, within the tolerance of 1%, with")
    dear = gate_of({0.35: 0.05, 0.5: 0.04, 0.7: 0.03, 1.0: 0.0}, measured={1.0: 1.5})
    assert dict(dear.numbers)["saving"] == "none, since what holds costs 1.50 of the baseline's GPU-hours"


def test_the_whole_interval_counts_not_the_estimate():
    deltas = {0.35: 0.05, 0.5: 0.05, 0.7: 0.0095, 1.0: 0.0}
    assert gate_of(deltas).outcome == "pass"
    unsure = gate_of(deltas, scatter=0.004)
    assert unsure.outcome == "insufficient"
    assert reason_kinds(unsure.reasons) == {"crossing"}


def test_a_smaller_share_that_crosses_takes_nothing_from_a_larger_one_that_holds():
    gate = gate_of({0.35: 0.01, 0.5: 0.0, 0.7: 0.0, 1.0: 0.0}, scatter=0.004)
    assert (gate.outcome, gate.reduction) == ("pass", pytest.approx(0.5))


def test_holding_only_at_the_full_budget_fails():
    gate = gate_of({0.35: 0.05, 0.5: 0.04, 0.7: 0.03, 1.0: 0.0})
    assert (gate.outcome, gate.reduction) == ("fail", pytest.approx(0.0))


def test_parents_are_added_to_every_share_and_to_no_baseline():
    cheap = [Parent(name="a", gpu_seconds=5 * 3600), Parent(name="b", gpu_seconds=10 * 3600)]
    assert gate_of(HOLDS_FROM_HALF, "with_parents", parents=cheap).reduction == pytest.approx(0.35)
    dear = [Parent(name="a", gpu_seconds=30 * 3600)]
    assert gate_of(HOLDS_FROM_HALF, "marginal", parents=dear).outcome == "pass"
    gap = gate_of(HOLDS_FROM_HALF, "with_parents", parents=dear)  # 0.35 + 0.30 is worse, 0.50 + 0.30 holds
    assert (gap.outcome, reason_kinds(gap.reasons)) == ("insufficient", {"gap"})
    nobody = gate_of(HOLDS_FROM_HALF, "with_parents")
    assert nobody.reasons == ("the cost of parents is not known: checkpoint",)
    unknown = gate_of(HOLDS_FROM_HALF, "with_parents", parents=[Parent(name="Qwen/Qwen2.5-1.5B")])
    assert unknown.outcome == "insufficient"
    assert unknown.reasons == ("the cost of parents is not known: Qwen/Qwen2.5-1.5B",)


def test_parents_dearer_than_any_saving_decide_without_a_cheap_run():
    holds = dict.fromkeys(NOMINAL, 0.0)
    assert gate_of(holds, "with_parents", parents=[Parent(name="a", gpu_seconds=80 * 3600)]).outcome == "fail"
    between = gate_of(holds, "with_parents", parents=[Parent(name="a", gpu_seconds=50 * 3600)])
    assert (between.outcome, reason_kinds(between.reasons)) == ("insufficient", {"too dear"})


def test_all_that_is_in_the_way_is_listed_beside_what_was_measured():
    deltas = {share: HOLDS_FROM_HALF[share] for share in (0.5, 0.7)}
    gate = gate_of(deltas, seeds=(0,), steps=20, baseline={"unigram_entropy": 3.5, "steps": 20})
    expected = {"missing share", "single seed", "demo training", "learnt too little"}
    assert (gate.outcome, gate.reduction) == ("insufficient", pytest.approx(0.5))
    assert reason_kinds(gate.reasons) == expected
    assert sum("no run at" in reason for reason in gate.reasons) == 2


def test_more_hours_with_a_worse_loss_are_suspicious():
    gate = gate_of({0.35: 0.05, 0.5: 0.0, 0.7: 0.05, 1.0: 0.0})
    assert (gate.outcome, reason_kinds(gate.reasons)) == ("insufficient", {"order"})


@pytest.mark.parametrize(
    "fields, word",
    [
        ({"stages": []}, "was not measured"),
        ({"final": validation({})}, "no document was measured"),
        ({"headline": "off"}, "was not measured"),
    ],
)
def test_runs_without_a_measurement_are_evidence_of_nothing(fields, word):
    gate = gate_of(HOLDS_FROM_HALF, **fields)
    assert gate.outcome == "insufficient"
    assert any(word in reason for reason in gate.reasons)
    assert gate.reduction is None


def test_unknown_hours_are_named():
    family = study_of(HOLDS_FROM_HALF)
    for arm in family.arms:
        for record in arm.records:
            record.totals.gpu_seconds.clear()
    gate = primary_gate(family, "q_p1_bridge", "", "marginal", resamples=100)
    assert gate.outcome == "insufficient"
    assert sum("GPU-hours of" in reason and "not known" in reason for reason in gate.reasons) == 5


def test_a_candidate_that_is_not_there_has_no_evidence():
    gate = primary_gate(study_of(HOLDS_FROM_HALF), "q_p2_direct", "", "marginal", resamples=100)
    assert (gate.outcome, reason_kinds(gate.reasons)) == ("insufficient", {"no runs"})


def test_what_is_counted_are_documents_not_the_blocks_cut_from_them():
    family = study_of(HOLDS_FROM_HALF)
    for record in (record for arm in family.arms for record in arm.records):
        for number, block in enumerate(record.final().documents):
            block.source = number // 2
    gate = primary_gate(family, "q_p1_bridge", "", "marginal", resamples=100)
    assert gate.reasons == ("q_ttt_scratch, seed 0, 1: demo size: 16 documents, an interval needs at least 20",)


def test_the_same_number_of_tokens_is_a_number_of_the_gate_and_decides_nothing():
    family = study_of(HOLDS_FROM_HALF | {None: 0.05}, measured={None: 2.5})
    gate = primary_gate(family, "q_p1_bridge", "", "marginal", resamples=100)
    assert (gate.outcome, gate.reduction) == ("pass", pytest.approx(0.5))
    text = dict(gate.numbers)["q_p1_bridge − baseline, same number of tokens"]
    assert text == "+0.0500 [+0.0500, +0.0500] nats per token (2.500 of its GPU-hours, 2 seeds)"


def test_secondary_gates_are_about_the_arm_that_decided_else_about_the_token_matched_one():
    (decided,) = judge_candidates(study_of(HOLDS_FROM_HALF | {None: 0.0}, measured={None: 1}), resamples=100)
    assert {gate.subject for gate in decided.secondary} == {"q_p1_bridge at 0.5"}
    (undecided,) = judge_candidates(study_of({1.0: 0.05, None: 0.0}, measured={None: 1}), resamples=100)
    assert {gate.subject for gate in undecided.secondary} == {"q_p1_bridge"}
    (neither,) = judge_candidates(study_of({1.0: 0.05}), resamples=100)
    assert neither.secondary == ()
    assert neither.gates == (neither.marginal, neither.with_parents)
