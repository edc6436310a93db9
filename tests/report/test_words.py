"""What the report says was measured: hours of finished runs only, no interval where there is none, and what is in the times."""

import pytest
from helpers.records import run

from ttt_lit.record.schema import Environment, Parent
from ttt_lit.report.tables import measured
from ttt_lit.report.words import remarks
from ttt_lit.verdict.comparison import compare_all, flags
from ttt_lit.verdict.formats import NONE, nats
from ttt_lit.verdict.gates import judge_candidates
from ttt_lit.verdict.study import read_study

FREE = [Parent(name="pretraining", gpu_seconds=0.0)]
MANY = [f"{number:03}" for number in range(32)]
CONTROLS_MISSING = [
    f"There is no run with the role {role}: differences to it are missing." for role in ("fa_scratch", "fa_import")
]


def table(records):
    (family,) = read_study(records).families.values()
    differences = {arm.name: compare_all(family, arm, resamples=100) for arm in family.arms}
    return measured(family, judge_candidates(family, resamples=100), differences)


def row(records, name="q_p1_bridge"):
    (found,) = (each for each in table(records).rows if each[0][0].partition(" [")[0] == name)
    return found


def said(records):
    (family,) = read_study(records).families.values()
    return list(remarks(family, judge_candidates(family, resamples=100)))


def baseline(losses=MANY, **fields):
    return run("q_ttt_scratch", "ttt_scratch", dict.fromkeys(losses, 3.0), **fields)


def bridge(losses=MANY, **fields):
    return run("q_p1_bridge", "bridge", dict.fromkeys(losses, 2.9), **({"parents": FREE} | fields))


@pytest.mark.parametrize(
    "status_of_baseline, status_of_bridge, share",
    [("finished", "finished", "0.350"), ("running", "finished", NONE), ("finished", "running", NONE)],
)
def test_hours_are_compared_only_where_both_runs_are_finished(status_of_baseline, status_of_bridge, share):
    """A baseline that has run for 10 of its 100 hours would make every budget look ten times as dear."""
    half = bridge(share=0.35, hours=35.0, run_id="t", status=status_of_bridge)
    records = [baseline(status=status_of_baseline), bridge(), half]
    assert row(records, "q_p1_bridge at 0.35")[2:4] == (share, share)
    unfinished = "GPU-hours of q_p1_bridge are not compared: q_ttt_scratch did not finish."
    assert (unfinished in said(records)) == (status_of_baseline != "finished")


def test_one_document_is_shown_as_a_point_without_an_interval():
    records = [baseline(["0"]), bridge(["0"]), run("q_fa_import", "fa_import", {"0": 2.8}, parents=FREE)]
    found = row(records)
    assert found[4] == ("−0.1000", "(1 document: no interval)")
    assert found[6][1] == "(1 document: no interval)"
    assert "1 block of 1 document" in table(records).title


def test_a_run_of_a_seed_too_many_is_said_beside_the_number_that_it_spoils():
    twice = [baseline(), bridge(), bridge(run_id="again")]
    assert row(twice)[4][0].endswith("†")
    flagged, *missing = said(twice)
    assert flagged.startswith("Flagged, so q_p1_bridge is no evidence: q_p1_bridge: 2 runs of seed 0")
    assert missing == said([baseline(), bridge()]) == CONTROLS_MISSING


def test_one_document_decides_nothing():
    small = [
        baseline(["0"]),
        *(bridge(["0"], share=share, hours=100 * share, run_id=str(share)) for share in (0.35, 0.7)),
    ]
    (family,) = read_study(small).families.values()
    (candidate,) = judge_candidates(family, resamples=100)
    assert {gate.outcome for gate in (candidate.marginal, candidate.with_parents)} == {"insufficient"}
    assert candidate.marginal.reduction is None


def test_whether_a_control_is_worse_than_its_start_is_not_told_from_one_document():
    control = run("q_static", "control", {"0": 9.0})
    control.start_validation = run("start", "control", {"0": 1.0}).final()
    (family,) = read_study([control]).families.values()
    assert any("cannot be told: the two were measured on 1 document" in flag for flag in flags(family.arms[0]))


def test_the_unit_stands_before_the_words_that_replace_an_interval():
    (family,) = read_study([baseline(["0"]), bridge(["0"])]).families.values()
    interval = compare_all(family, family.matched("q_p1_bridge", ""))["ttt_scratch"].interval
    assert nats(interval) == "−0.1000 nats per token (1 document: no interval)"


def test_a_difference_that_cannot_be_formed_is_a_dash():
    found = row([baseline(), bridge(MANY[:4]), run("q_fa_import", "fa_import", dict.fromkeys(MANY, 2.8))])
    assert found[4:] == ((NONE,),) * 3


def test_hours_of_processes_on_a_cpu_and_of_different_devices_say_so():
    cpu, gpu = Environment(device="x86_64 cpu"), Environment(device="H200")
    for environment, expected in ((cpu, True), (gpu, False)):
        both = [each(environment=environment) for each in (baseline, bridge)]
        assert ("processes on CPU cores: other work" in table(both).title) == expected
        assert said(both) == CONTROLS_MISSING
    assert "of different devices: H200, x86_64 cpu" in said([baseline(environment=cpu), bridge(environment=gpu)])[0]
