"""One verdict per family, with the reason and what would change it."""

from pathlib import Path

import pytest
from helpers.records import FALLING, ceiling, run, stage, validation

from ttt_lit.record.schema import Model, Parent
from ttt_lit.verdict.gates import judge_candidates
from ttt_lit.verdict.next_step import EXAMPLE
from ttt_lit.verdict.recommendation import MAX_FAILURE, recommend_scaling
from ttt_lit.verdict.study import read_study

IDS = [f"{index:03}" for index in range(32)]
PASSES = {0.35: 0.05, 0.5: 0.0, 0.7: 0.0, 1.0: 0.0}
FAILS = {0.35: 0.05, 0.5: 0.05, 0.7: 0.05, 1.0: 0.0}


def losses(mean):
    return dict.fromkeys(IDS, mean)


def with_off(record, worth):
    """The run read without updates too: ``worth`` nats worse than with."""
    (on,) = record.stages[0].validations
    record.stages[0].validations.append(validation(losses(on.nats_per_token + worth), inner="off"))
    return record


def baseline(seeds=(0, 1), *, memory=0.02):
    """``memory``: nats that its inner updates win."""
    return [with_off(run("q_ttt_scratch", "ttt_scratch", losses(3.0), seed=seed), memory) for seed in seeds]


def candidate(deltas, *, experiment="q_p1_bridge", seeds=(0, 1), deciles=FALLING, train_losses=None, **fields):
    made = []
    for seed in seeds:
        for share, delta in deltas.items():
            final = validation(losses(3.0 + delta), deciles=deciles)
            hours = 100 * (1.0 if share is None else share)
            whole = {"share": share, "hours": hours, "stages": [stage(losses=train_losses, validations=[final])]}
            whole["ceiling"] = [ceiling(0.05)]  # so high that the primary gate tells a memory from none
            made.append(run(experiment, "bridge", {}, final=final, seed=seed, **(whole | fields)))
    return made


def recommended(*records):
    (family,) = read_study(records).families.values()
    return recommend_scaling(family, judge_candidates(family, resamples=100))


def test_a_saving_with_sound_secondary_gates_says_scale_up():
    cheap = [Parent(name="pretraining", gpu_seconds=5 * 3600)]
    found = recommended(*baseline(), *candidate(PASSES, parents=cheap))
    assert (found.family, found.verdict) == ("qwen2", "scale up")
    assert "saves 50.0%" in found.why
    assert "next size" in found.would_change


@pytest.mark.parametrize("memory, verdict", [(0.02, "scale up"), (0.009, "not yet"), (0.0, "not yet")])
def test_a_high_ceiling_excuses_nobody_where_the_baseline_itself_wins_less_than_the_gate(memory, verdict):
    """A candidate without memory (nothing is known of its updates) equals such a baseline to 0.01, whatever there was to remember."""
    found = recommended(*baseline(memory=memory), *candidate(PASSES))
    assert found.verdict == verdict
    assert ("a model without memory could pass" in found.why) == (verdict == "not yet")


def test_updates_that_do_harm_forbid_scaling_up_whatever_the_ceiling():
    harmed = [with_off(each, -0.02) for each in candidate(PASSES)]
    found = recommended(*baseline(), *harmed)
    assert found.verdict == "not yet"
    assert "the gate of TTT's own part is failed" in found.why
    assert "could pass" not in found.why
    assert "wholly above 0: updates do harm" in found.would_change


@pytest.mark.parametrize("hours, words", [(None, "evidence is insufficient"), (75.0, "the gate fails")])
def test_scaling_up_says_what_the_parents_do_to_it(hours, words):
    parents = [Parent(name="pretraining", gpu_seconds=None if hours is None else hours * 3600)]
    found = recommended(*baseline(), *candidate(PASSES, parents=parents))
    assert found.verdict == "scale up"
    assert f"With its parent runs {'the evidence' if hours is None else 'the gate'}" in found.why
    assert words in found.why
    assert "GPU-hours of the parent runs" in found.would_change


def test_a_candidate_that_fails_is_a_no():
    found = recommended(*baseline(), *candidate(FAILS))
    assert found.verdict == "no"
    assert "whole interval above 0.01" in found.why
    assert "within 0.71 of the baseline's GPU-hours" in found.would_change


def test_one_good_candidate_is_enough_and_one_bad_does_not_decide_for_another():
    bad, good = candidate(FAILS), candidate(PASSES, experiment="q_p2_direct")
    assert recommended(*baseline(), *bad, *good).verdict == "scale up"
    unmeasured = candidate({0.5: 0.0}, experiment="q_p2_direct")
    found = recommended(*baseline(), *bad, *unmeasured)
    assert found.verdict == "not yet"
    assert "q_p2_direct" in found.why


def test_an_ablation_without_wall_clock_runs_does_not_keep_a_no_open():
    ablation = candidate({None: 0.0}, variant="b2_budget=5")
    assert recommended(*baseline(), *candidate(FAILS), *ablation).verdict == "no"


def test_a_main_candidate_that_was_never_run_by_time_keeps_a_no_open():
    """It may be the one that saves: better after the same tokens, and in fewer GPU-hours."""
    direct = candidate({None: -0.05}, experiment="q_p2_direct", hours=60)
    found = recommended(*baseline(), *candidate(FAILS), *direct)
    assert found.verdict == "not yet"
    assert "q_p2_direct" in found.why
    assert "no wall-clock-matched runs" in found.would_change


@pytest.mark.parametrize(
    "records, missing",
    [
        ([], "no baseline"),
        ([*baseline(), *candidate({None: 0.0})], "no wall-clock-matched runs"),
        ([*baseline((0,)), *candidate(PASSES, seeds=(0,))], "a single seed"),
        ([*baseline(), *candidate({0.35: 0.05, 0.5: 0.0, 1.0: 0.0})], "no run at 0.7"),
    ],
)
def test_missing_evidence_says_not_yet_and_names_it(records, missing):
    found = recommended(*(records or candidate(PASSES)))
    assert found.verdict == "not yet"
    assert missing in found.would_change


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"train_losses": [3.0] * 60 + [4.0] * 30 + [3.0] * 60}, "stable convergence is failed"),
        ({"deciles": (*FALLING[:9], 4.0)}, "long-token loss is failed"),
        ({"train_losses": [3.0] * 20}, "stable convergence is insufficient in evidence"),
    ],
)
def test_a_saving_that_is_not_sound_says_not_yet(fields, words):
    found = recommended(*baseline(), *candidate(PASSES, **fields))
    assert found.verdict == "not yet"
    assert words in found.why
    assert "q_p1_bridge at 0.5" in found.would_change


def test_the_words_of_a_failed_run_are_cut_and_a_short_reason_is_not():
    long = "invalid shape dimension " + "9" * 200
    found = recommended(
        *[run("q_ttt_scratch", "ttt_scratch", losses(3.0), status="failed", reason=long)], *candidate(PASSES)
    )
    assert found.would_change.count("9") < MAX_FAILURE
    assert f"({long[: MAX_FAILURE - 1]}…)" in found.would_change
    short = "x" * MAX_FAILURE
    found = recommended(
        *[run("q_ttt_scratch", "ttt_scratch", losses(3.0), status="failed", reason=short)], *candidate(PASSES)
    )
    assert f"({short})" in found.would_change


def small(records):
    for record in records:
        record.totals.tokens = 1_000
    return records


def test_a_demos_size_is_said_to_decide_nothing_before_what_it_can_still_show():
    found = recommended(*small([*baseline((0,)), *candidate({None: 0.0}, seeds=(0,))]))
    assert (found.verdict, found.step.kind) == ("not yet", "wall-clock runs")
    assert found.step.command == "python cli.py matrix --config configs/matrix/demo_wallclock.yaml"
    assert found.would_change.startswith(
        "A demo's size can never decide (q_ttt_scratch, seed 0: demo size: 1,000 training"
    )
    assert "shares: [0.35, 0.5, 0.7, 1]" in found.would_change
    assert (Path(__file__).parents[2] / EXAMPLE).is_file()


@pytest.mark.parametrize("seeds, kind", [((0,), "seeds"), ((0, 1), "nothing")])
def test_at_a_demos_size_seeds_follow_wall_clock_runs_and_then_nothing_is_left(seeds, kind):
    found = recommended(*small([*baseline(seeds), *candidate(PASSES, seeds=seeds)]))
    assert (found.verdict, found.step.kind) == ("not yet", kind)


def test_a_baseline_that_still_runs_is_not_called_a_demo():
    running = small(baseline((0,)))
    running[0].status = "running"
    found = recommended(*running, *small(candidate({None: 0.0}, seeds=(0,))))
    assert found.step is None
    assert "did not finish: running" in found.would_change


def test_a_family_without_conversions_says_not_yet():
    found = recommended(*baseline())
    assert found.verdict == "not yet"
    assert "no conversion" in found.why


def test_each_family_has_its_own_verdict():
    gemma = Model(family="gemma3", num_parameters=1, num_layers=1, ttt_layers=[0])
    families = read_study(
        [*baseline(), *candidate(PASSES), *candidate(PASSES, experiment="g_p1", model=gemma)]
    ).families
    verdicts = {
        name: recommend_scaling(family, judge_candidates(family, resamples=50)).verdict
        for name, family in families.items()
    }
    assert verdicts == {"gemma3": "not yet", "qwen2": "scale up"}
