"""Runs find their arm and their family, whatever state they are in, and what keeps them apart is said."""

import dataclasses
import itertools

import pytest
from helpers.records import point, run, validation

from ttt_lit.record.schema import Data, Model, Parent, RunRecord, Spent, Start
from ttt_lit.verdict.comparison import compare, compare_all, flags, hours_to_target, target_loss
from ttt_lit.verdict.study import read_study

IDS = [f"{index:03}" for index in range(24)]
NAN = float("nan")


def losses(mean):
    return {each: mean + 0.001 * index for index, each in enumerate(IDS)}


def baseline(**fields):
    return run("q_ttt_scratch", "ttt_scratch", losses(3.0), **fields)


def bridge(mean=3.0, **fields):
    return run("q_p1_bridge", "bridge", losses(mean), **fields)


def only_arm(*records):
    (family,) = read_study(records).families.values()
    (arm,) = family.arms
    return arm


def test_runs_that_differ_in_the_seed_alone_are_one_arm_whatever_their_order():
    records = [bridge(seed=seed, share=share) for seed in (2, 0, 1) for share in (None, 0.35)] + [baseline()]
    for order in itertools.islice(itertools.permutations(records), 0, 5040, 500):
        study = read_study(order)
        family = study.families["qwen2"]
        assert [arm.name for arm in family.arms] == ["q_p1_bridge", "q_p1_bridge at 0.35", "q_ttt_scratch"]
        assert family.matched("q_p1_bridge", "").seeds == (0, 1, 2)
        assert family.baseline.seeds == (0,)
        assert family.candidates == [("q_p1_bridge", "")]
        assert study.problems == []


def test_a_variant_is_another_candidate_and_never_the_baseline():
    records = [
        bridge(),
        bridge(variant="b2_budget=5"),
        baseline(variant="lr=low"),
        bridge(share=0.7),
        bridge(share=0.5),
    ]
    family = read_study(records).families["qwen2"]
    assert family.candidates == [("q_p1_bridge", ""), ("q_p1_bridge", "b2_budget=5")]
    assert family.matched("q_p1_bridge", "b2_budget=5").name == "q_p1_bridge b2_budget=5"
    assert list(family.shares("q_p1_bridge", "")) == [0.5, 0.7]
    assert family.shares("q_p1_bridge", "b2_budget=5") == {}
    assert family.baseline is None


def test_every_role_finds_its_place():
    roles = ["external", None, "fa_scratch", "fa_import", "direct", "control"]
    study = read_study([run(f"e_{role}", role, losses(3.0)) for role in roles])
    family = study.families["qwen2"]
    assert [record.experiment for record in study.external] == ["e_external"]
    assert [record.experiment for record in study.others] == ["e_None"]
    assert (family.fa_scratch.name, family.fa_import.name) == ("e_fa_scratch", "e_fa_import")
    assert family.candidates == [("e_direct", "")]
    assert len(family.arms) == 4


def test_families_are_never_mixed():
    gemma = Model(family="gemma3", num_parameters=1, num_layers=1, ttt_layers=[0])
    study = read_study([baseline(), bridge(), run("q_p1_bridge", "bridge", losses(2.0), model=gemma, seed=5)])
    assert list(study.families) == ["qwen2", "gemma3"]  # the one with evidence first
    assert study.families["gemma3"].baseline is None
    assert study.families["qwen2"].matched("q_p1_bridge", "").seeds == (0,)
    assert any("several families: gemma3, qwen2" in problem for problem in study.problems)


def test_two_runs_of_a_seed_are_a_problem_of_the_arm():
    arm = only_arm(bridge(run_id="b"), bridge(run_id="a", mean=9.0), bridge(seed=1))
    assert arm.seeds == (0, 1)
    assert arm.records[0].run_id == "a"
    assert "2 runs of seed 0: q_p1_bridge/a, q_p1_bridge/b" in arm.problems[0]
    assert any("2 runs of seed 0" in flag for flag in flags(arm))


def test_of_two_runs_of_a_seed_the_longest_finished_one_stands_whatever_it_is_called():
    tried, cut = bridge(run_id="a", mean=9.0), bridge(run_id="b", mean=8.0, status="interrupted", reason="why")
    tried.totals.tokens //= 10
    arm = only_arm(tried, cut, bridge(run_id="z"))
    assert [record.run_id for record in arm.records] == ["z"]
    assert "3 runs of seed 0" in arm.problems[0]


def test_two_baselines_are_none():
    study = read_study([baseline(), run("another", "ttt_scratch", losses(3.0))])
    assert study.families["qwen2"].baseline is None
    assert any("2 arms have the role ttt_scratch: another, q_ttt_scratch" in problem for problem in study.problems)


def test_an_arm_with_two_roles_is_a_problem():
    assert (
        "several roles: bridge, direct"
        in only_arm(bridge(), run("q_p1_bridge", "direct", losses(3.0), seed=1)).problems[0]
    )


def _with(record, name):
    if name == "network":
        record.model.num_parameters = 2
    elif name == "headline":
        record.headline = "off"
    else:
        record.stages[0].windows = [4096]
    return record


@pytest.mark.parametrize(
    "name, words",
    [
        ("network", "the network"),
        ("headline", "the setting that they are judged by"),
        ("window", "their stages"),
    ],
)
def test_seeds_that_differ_in_more_than_the_seed_are_no_arm(name, words):
    runs = [run("q_p1_bridge", "bridge", {"a": 3.0}, seed=seed) for seed in (0, 1)]
    assert only_arm(*runs).problems == ()
    assert only_arm(runs[0], _with(runs[1], name)).problems == (f"its seeds differ in {words}",)


def test_numbers_are_means_over_seeds():
    parents = [Parent(name="a", gpu_seconds=3600.0), Parent(name="b", gpu_seconds=7200.0)]
    arm = only_arm(bridge(3.0, hours=10, parents=parents), bridge(4.0, seed=1, hours=20, parents=parents))
    assert arm.loss == pytest.approx(3.5115)
    assert arm.gpu_hours("marginal") == pytest.approx(15)
    assert arm.gpu_hours("with_parents") == pytest.approx(18)
    assert arm.tokens == 240 * 524_288
    assert arm.finished


def test_what_one_seed_does_not_know_the_arm_does_not_know():
    arm = only_arm(bridge(parents=[Parent(name="a", gpu_seconds=1.0)]), bridge(seed=1, parents=[Parent(name="a")]))
    assert arm.gpu_hours("with_parents") is None
    assert arm.gpu_hours("marginal") == pytest.approx(100)
    assert only_arm(bridge(), bridge(seed=1, stages=[])).loss is None
    assert only_arm(bridge(NAN)).loss is None


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"final": validation(dict(losses(3.0), other=3.0))}, "different documents (25 and 24, 24 in common)"),
        ({"data": Data(tokenizer="x", short="s", long="l")}, "same tokenizer"),
        ({"data": Data(tokenizer="t", short="x", long="l")}, "same short documents"),
        ({"data": Data(tokenizer="t", short="s", long="x")}, "same long documents"),
        ({"steps": 239}, "trained on 125,304,832 and 125,829,120 tokens"),
    ],
)
def test_what_arms_must_share_and_do_not_is_said_and_forbids_the_comparison(fields, words):
    study = read_study([baseline(), bridge(**fields)])
    family = study.families["qwen2"]
    assert len(study.problems) == 1
    assert words in study.problems[0]
    assert words in compare(family.matched("q_p1_bridge", ""), family.baseline, resamples=50).reasons[0]


def test_tokens_per_step_must_be_equal_and_total_tokens_only_where_matched_by_tokens():
    small = bridge(share=0.5, steps=120)
    assert read_study([baseline(), small]).problems == []
    small.stages[0].spent.tokens //= 2
    assert "tokens per optimiser step" in read_study([baseline(), small]).problems[0]


def test_short_documents_that_a_run_does_not_read_are_not_unequal():
    assert read_study([baseline(), bridge(data=Data(tokenizer="t", long="l"))]).problems == []


def with_inner_lr(rate):
    return {"model": {"inner": {"lr": rate, "clip": 1.0}}}


def test_the_inner_rate_belongs_to_the_start_so_only_arms_that_start_from_weights_must_have_it_alike():
    arms = [baseline(config=with_inner_lr(1.0)), bridge(config=with_inner_lr(0.1))]
    assert read_study(arms).problems == []
    direct = run("q_p2_direct", "direct", losses(3.0), config=with_inner_lr(0.3))
    (problem,) = read_study([*arms, direct]).problems
    assert problem.endswith("same inner loop (q_p1_bridge: lr 0.1 clip 1.0; q_p2_direct: lr 0.3 clip 1.0)")
    direct.variant = "inner_lr=0.3"  # what an ablation changes on purpose
    assert read_study([*arms, direct]).problems == []
    static = run("q_static", "control", losses(3.0), config=with_inner_lr(1.0), headline="off")
    static.stages[0].mode = "static"  # its rate moves nothing
    static.stages[0].validations[0].inner = "off"
    assert read_study([*arms, static]).problems == []


def test_seeds_of_one_arm_have_one_inner_loop():
    study = read_study([baseline(), *(bridge(seed=seed, config=with_inner_lr(0.1 + seed)) for seed in (0, 1))])
    assert any("its seeds differ in the inner loop" in problem for problem in study.problems)


BROKEN = {
    "no stages": {"stages": []},
    "no totals": {"totals": Spent()},
    "no documents": {"final": validation({})},
    "nan": {"final": validation(losses(NAN)), "status": "diverged", "reason": "nan"},
    "running": {"status": "running"},
    "other headline": {"headline": "off"},
    "no data": {"data": Data()},
    "deciles cut": {"final": validation(losses(3.0), deciles=(1.0,))},
    "no documents and no entropy": {"final": validation({}), "unigram_entropy": None},
}


@pytest.mark.parametrize("role", ["ttt_scratch", "bridge", "fa_import", "control", "fa_scratch", "external", None])
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_run_is_read_and_compared_with_reasons(role, broken):
    study = read_study([run("x", role, losses(3.0), **BROKEN[broken]), baseline(), bridge(share=0.5)])
    for family in study.families.values():
        for arm in family.arms:
            compared = compare_all(family, arm, resamples=20).values()
            assert all(each is None or each.interval is not None or each.reasons for each in compared)
            hours_to_target(arm, 3.0, "with_parents")


def test_nothing_at_all_is_a_study_without_families():
    assert read_study([]).families == {}


# ---- Comparisons


def test_a_comparison_is_paired_by_seed_and_document():
    family = read_study(
        [baseline(seed=s, final=validation(losses(3.0 + s))) for s in (0, 1)]
        + [bridge(3.01 + s, seed=s) for s in (1, 0)]
    ).families["qwen2"]
    found = compare(family.matched("q_p1_bridge", ""), family.baseline, resamples=100)
    assert found.reasons == ()
    assert (found.interval.estimate, found.interval.low, found.interval.high) == pytest.approx((0.01, 0.01, 0.01))
    assert (found.interval.seeds, found.interval.documents) == (2, 24)


def test_a_seed_without_a_partner_is_left_out_and_said():
    family = read_study([baseline(), bridge(3.1), bridge(9.0, seed=1)]).families["qwen2"]
    found = compare(family.matched("q_p1_bridge", ""), family.baseline, resamples=50)
    assert found.interval.estimate == pytest.approx(0.1)
    assert "q_p1_bridge has runs without a partner of the same seed in q_ttt_scratch: seed 1" in found.reasons


def control(before, after, role="fa_import", **fields):
    """A run whose documents' losses on the short context have these means, with other deviations of 0.005 before than after."""
    started = None
    if before is not None:
        short = {each: before + 0.005 * (-1) ** index for index, each in enumerate(IDS)}
        started = validation(losses(3.0), short=short, inner="off")
    ended = validation(
        losses(3.0), short={each: after + 0.005 * (-1) ** (index // 2) for index, each in enumerate(IDS)}
    )
    source = Start(source="checkpoint", weights_hash="w")
    return run("q_fa_import", role, {}, final=ended, **({"start": source, "start_validation": started} | fields))


@pytest.mark.parametrize("role", ["fa_import", "control"])
@pytest.mark.parametrize("before, after, flagged", [(3.0, 3.05, True), (3.0, 3.009, False), (3.05, 3.0, False)])
def test_a_control_worse_than_its_start_is_flagged(role, before, after, flagged):
    found = flags(only_arm(control(before, after, role)), resamples=200)
    assert [("worse than the checkpoint" in flag) for flag in found] == ([True] if flagged else [])


def test_conversions_may_be_worse_than_their_start():
    assert flags(only_arm(control(3.0, 3.5, "bridge")), resamples=50) == []


def test_a_flagged_control_forbids_what_is_compared_with_it():
    family = read_study([baseline(), bridge(), control(3.0, 3.1)]).families["qwen2"]
    compared = compare_all(family, family.matched("q_p1_bridge", ""), resamples=50)
    assert "worse than the checkpoint" in compared["fa_import"].reasons[0]
    assert compared["fa_import"].interval is not None
    assert compared["ttt_scratch"].reasons == ()
    assert compared["fa_scratch"] is None


def test_a_start_is_known_by_its_source_even_where_its_weights_have_no_hash():
    assert "cannot be told" in flags(only_arm(control(None, 3.0, start=Start(source="checkpoint"))), resamples=50)[0]


def test_a_start_that_was_not_measured_is_not_taken_for_a_good_one():
    assert "cannot be told" in flags(only_arm(control(None, 3.0)), resamples=50)[0]
    assert flags(only_arm(control(None, 3.0, start=Start())), resamples=50) == []  # random weights


# ---- GPU-hours to a target


def series(*points, **fields):
    return only_arm(bridge(evaluations=[point(hours, loss) for hours, loss in points], **fields))


def test_the_first_crossing_is_interpolated():
    arm = series((1, 5.0), (2, 4.0), (4, 3.0), (5, 3.5), (6, 2.0))
    assert hours_to_target(arm, 3.5, "marginal") == pytest.approx(3)
    assert hours_to_target(arm, 4.0, "marginal") == pytest.approx(2)
    assert hours_to_target(arm, 6.0, "marginal") == pytest.approx(1)
    assert hours_to_target(arm, 1.9, "marginal") is None


def test_parents_are_paid_before_the_first_step():
    arm = series((1, 4.0), (3, 2.0), parents=[Parent(name="a", gpu_seconds=36_000.0)])
    assert hours_to_target(arm, 3.0, "with_parents") == pytest.approx(12)
    assert hours_to_target(series((1, 2.0), parents=[Parent(name="a")]), 3.0, "with_parents") is None


def test_holes_in_the_series_are_skipped():
    assert hours_to_target(series((1, 4.0), (1.5, None), (2, NAN), (3, 2.0)), 3.0, "marginal") == pytest.approx(2)


def test_the_series_is_that_of_the_headline():
    off = only_arm(bridge(headline="off", evaluations=[point(2, 1.0, inner_off=2.0)]))
    assert target_loss(off) == 2.0
    assert target_loss(series((1, 5.0), (2, 2.5))) == 2.5
    assert target_loss(series()) is None


def test_an_arm_reaches_a_target_when_all_its_seeds_do():
    seeds = [bridge(seed=seed, evaluations=[point(1, 4.0), point(hours, 2.0)]) for seed, hours in enumerate((3, 5))]
    assert hours_to_target(only_arm(*seeds), 3.0, "marginal") == pytest.approx(2.5)
    assert hours_to_target(only_arm(*seeds, bridge(seed=2, evaluations=[])), 3.0, "marginal") is None


def test_records_of_these_tests_are_records():
    """So that the studies above are made of what a run can write."""
    record = dataclasses.replace(bridge(evaluations=[point(1, 2.0)]), start_validation=validation(losses(3.0)))
    assert RunRecord.from_dict(record.to_dict()) == record
