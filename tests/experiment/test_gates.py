"""The primary gate against a second computation of the same rules, on 500 random studies, and by hand where a rule has an edge."""

import re
from collections import Counter

import numpy as np
import pytest
from records import CONTEXT, STEP_TOKENS, run, validation

from ttt_lit.experiment.gates import judge_candidates, primary_gate
from ttt_lit.experiment.record import Environment, Model, Parent, Start
from ttt_lit.experiment.study import read_study

NOMINAL = (0.35, 0.5, 0.7, 1.0)
HOURS = 100.0

# Reason → what its sentence says. Every sentence of the gate must be exactly one of these.
SENTENCES = {
    "no baseline": "there is no baseline",
    "baseline not from scratch": "did not start from random weights",
    "no runs": "no wall-clock-matched runs",
    "missing share": "no run at .* of the baseline's GPU-hours",
    "single seed": "a single seed",
    "unfinished": "the run did not finish: (diverged|interrupted)",
    "nan": "a document's loss is not finite",
    "seed alone": "without a partner of the same seed",
    "twice": "2 runs of seed",
    "other documents": "measured on different documents",
    "few documents": r"documents, an interval needs",
    "demo evaluation": "evaluation tokens, at least",
    "demo training": "training tokens, at least",
    "demo context": "long context of",
    "unknown entropy": "the unigram entropy is not known",
    "learnt too little": "has learnt too little",
    "devices": "GPU-hours of different devices",
    "unknown parents": "cost of parents is not known",
    "order": "with more GPU-hours does not",
    "crossing": "the interval crosses 0.01",
    "too dear": "no run within 0.71",
    "gap": "no run between .* where the loss is worse, and 0.71",
    "unmatched": "is not the matched baseline of",
}


def reason_kinds(reasons):
    kinds = set()
    for reason in reasons:
        found = [kind for kind, pattern in SENTENCES.items() if re.search(pattern, reason)]
        assert len(found) == 1, (reason, found)
        kinds.add(found[0])
    return kinds


# ---- Random studies, as arrays


def random_world(random):
    """A study in plain numbers. Each defect is rare, so that about half of the studies have none."""

    def rarely(chance=0.02):
        return random.random() < chance

    seeds = 1 if rarely(0.05) else int(random.integers(2, 4))
    documents = 12 if rarely(0.03) else 32
    context = 4096 if rarely() else CONTEXT
    world = {
        "account": ["marginal", "with_parents"][int(random.integers(2))],
        "seeds": list(range(seeds)),
        "ids": [f"{index:03}" for index in range(documents)],
        "context": context,
        "steps": 20 if rarely(0.03) else 240,
        "entropy": None if rarely(0.03) else 4.0 if rarely(0.05) else 7.0,
        "from_scratch": not rarely(),
        "parents": random.choice([0.0, 0.0, 1.0, 12.0, 50.0], size=2).tolist(),
        "baseline": None if rarely(0.03) else random.normal(3, 0.3, (seeds, documents)),
        "baseline_status": "interrupted" if rarely() else "finished",
        "arms": {},
    }
    if rarely(0.08):
        world["parents"] = [[None, 5.0], []][int(random.integers(2))]
    truth = world["baseline"] if world["baseline"] is not None else np.full((seeds, documents), 3.0)
    states = sorted(random.choice(3, size=4), reverse=True)  # 2: above the limit, 1: crosses, 0: holds
    kind = random.random()
    if kind < 0.12:
        states = [2, 2, 2, int(random.choice(3))]
    elif kind < 0.45:
        states = [int(random.choice(3)), 0, 0, 0]
    if rarely(0.08):
        states = random.permutation([2, 0, 0, 2])
    for share, state in zip(NOMINAL, states, strict=True):
        if not rarely(0.015):
            world["arms"][share] = random_arm(random, world, truth, share, state)
    if rarely(0.03):
        world["arms"] = {}
    return world


def random_arm(random, world, truth, share, state):
    """One wall-clock-matched arm; ``state`` says where its interval will lie."""

    def rarely():
        return random.random() < 0.01

    documents = truth.shape[1]
    centre = [random.uniform(-0.03, 0.0), random.uniform(0.0095, 0.0105), random.uniform(0.025, 0.06)][state]
    noise = random.normal(0, 0.01, documents)
    noise *= 0.01 / noise.std()
    noise -= noise.mean()  # so that no bound lies so near the limit that two bootstraps could disagree
    arm = {
        "losses": truth + centre + noise + random.normal(0, 0.001, truth.shape),
        "seeds": list(world["seeds"]),
        "ids": list(world["ids"]),
        "hours": share * HOURS * random.uniform(0.99, 1.01)
        + (float(random.choice([0.4, 3.0])) if share == 0.7 else 0.0),
        "status": "finished",
        "device": "B200" if rarely() else "H200",
        "num_devices": 8 if rarely() else 1,
        "num_parameters": 2 if rarely() else 1,
        "twice": rarely(),
    }
    if rarely():
        arm["status"], arm["losses"][0, 3] = "diverged", np.nan
    if rarely():
        arm["status"] = "interrupted"
    if rarely():
        arm["ids"][0] = "zzz"
    if rarely() and len(arm["seeds"]) > 1:
        arm["seeds"][-1] += 10
    return arm


def records_of(world):
    def runs(experiment, role, arm, **fields):
        made = []
        for seed, row in zip(arm["seeds"], arm["losses"], strict=True):
            final = validation(dict(zip(arm["ids"], map(float, row), strict=True)), context=world["context"])
            status = arm["status"]
            made.append(
                run(
                    experiment,
                    role,
                    {},
                    final=final,
                    seed=seed,
                    hours=arm["hours"],
                    steps=world["steps"],
                    status=status,
                    reason=None if status == "finished" else "why",
                    unigram_entropy=world["entropy"],
                    environment=Environment(device=arm["device"], num_devices=arm.get("num_devices", 1)),
                    model=Model(
                        family="qwen2", num_parameters=arm.get("num_parameters", 1), num_layers=1, ttt_layers=[0]
                    ),
                    **fields,
                )
            )
        return made

    found = []
    if world["baseline"] is not None:
        arm = {"losses": world["baseline"], "seeds": world["seeds"], "ids": world["ids"], "hours": HOURS}
        arm |= {"status": world["baseline_status"], "device": "H200"}
        start = Start(source=None if world["from_scratch"] else "somewhere")
        found += runs("q_ttt_scratch", "ttt_scratch", arm, start=start)
    parents = [
        Parent(name=f"parent/{index}", gpu_seconds=None if hours is None else hours * 3600)
        for index, hours in enumerate(world["parents"])
    ]
    for share, arm in world["arms"].items():
        made = runs("q_p1_bridge", "bridge", arm, share=share, parents=parents)
        found += made
        if arm["twice"]:
            again = runs("q_p1_bridge", "bridge", arm, share=share, parents=parents)[0]
            again.run_id = "zz"
            found.append(again)
    return found


# ---- The same rules once more, on the arrays


def percentile_interval(table, random, resamples=400):
    """(seeds, documents) → bounds, from resampled tables as such."""
    seeds, documents = table.shape
    rows = random.integers(seeds, size=(resamples, seeds, 1))
    columns = random.integers(documents, size=(resamples, 1, documents))
    means = table[rows, columns].mean(axis=(1, 2))
    return np.percentile(means, 2.5), np.percentile(means, 97.5)


def oracle(world, random):
    """(outcome, reduction, reasons)."""
    why, base, arms = set(), world["baseline"], world["arms"]
    everybody = [len(arm["seeds"]) for arm in arms.values()] + ([] if base is None else [len(base)])
    why |= {"single seed"} if 1 in everybody else set()
    why |= {"no runs"} if not arms else {"missing share"} if set(NOMINAL) - set(arms) else set()
    if base is None:
        why.add("no baseline")
    else:
        tokens = len(world["ids"]) * world["context"]
        conditions = {
            "baseline not from scratch": not world["from_scratch"],
            "unfinished": world["baseline_status"] != "finished",
            "demo evaluation": tokens < 1e6,
            "few documents": len(world["ids"]) < 20,
            "demo training": world["steps"] * STEP_TOKENS < 1e8,
            "demo context": world["context"] < 8192,
            "unknown entropy": world["entropy"] is None,
            "learnt too little": world["entropy"] is not None and any(base.mean(1) > world["entropy"] - 1),
            "devices": any((arm["device"], arm["num_devices"]) != ("H200", 1) for arm in arms.values()),
            "unmatched": any(arm["num_parameters"] != 1 for arm in arms.values()),
        }
        why |= {kind for kind, holds in conditions.items() if holds}
    known = world["parents"] != [] and None not in world["parents"]
    known = known and (
        base is None or world["from_scratch"]
    )  # what comes from somewhere and names no parents has unknown ones
    extra = sum(world["parents"]) if known and world["account"] == "with_parents" else 0.0
    if world["account"] == "with_parents" and not known and (arms or not world["from_scratch"]):
        why.add("unknown parents")
    table = []  # (share, low, high)
    for arm in arms.values() if base is not None else ():
        why |= {"unfinished"} if arm["status"] != "finished" else set()
        why |= {"nan"} if np.isnan(arm["losses"]).any() else set()
        why |= {"twice"} if arm["twice"] else set()
        why |= {"seed alone"} if arm["seeds"] != world["seeds"] else set()
        why |= {"other documents"} if arm["ids"] != world["ids"] else set()
        both = [seed in world["seeds"] for seed in arm["seeds"]]
        difference = (arm["losses"] - base)[both]
        if np.isnan(difference).any() or arm["ids"] != world["ids"] or not len(difference):
            continue
        low, high = percentile_interval(difference, random)
        assert min(abs(low - 0.01), abs(high - 0.01)) > 0.0008  # else two bootstraps might disagree by chance
        if known or world["account"] == "marginal":
            table.append(((arm["hours"] + extra) / HOURS, low, high))
    table = np.array(sorted(table)).reshape(-1, 3)
    share, low, high = table.T
    holds, above = high <= 0.01, low > 0.01
    if any(holds[i] and above[i:].any() for i in range(len(table))):
        why.add("order")
    reduction = 1 - share[holds].min() if holds.any() else None
    cheap = share <= 0.71
    # The first run at 0.69 or more speaks for all that are cheaper, if they say the same.
    witness = above.copy()
    witness[: np.searchsorted(share, 0.69)] = False
    if reduction is not None and reduction >= 0.29:
        outcome = "pass"
    elif (len(table) and extra / HOURS > 0.71) or (witness.any() and above[: witness.argmax() + 1].all()):
        outcome = "fail"
    elif (cheap & ~above).any():
        outcome = "crossing"
    else:
        outcome = "gap" if cheap.any() else "too dear"
    if outcome in SENTENCES:
        why |= {outcome} if len(table) else set()
        outcome = "insufficient"
    return ("insufficient" if why else outcome), reduction, why


def test_500_random_studies_end_as_a_second_computation_says():
    random = np.random.default_rng(20)
    outcomes, kinds, reductions, accounts = Counter(), Counter(), 0, Counter()
    done = 0
    while done < 500:
        world = random_world(random)
        family = read_study(records_of(world)).families.get("qwen2")
        if family is None:
            continue  # nothing was run at all
        done += 1
        outcome, reduction, why = oracle(world, random)
        gate = primary_gate(family, "q_p1_bridge", "", world["account"], resamples=400)
        assert gate.outcome == outcome, (world, gate)
        assert gate.reduction == (None if reduction is None else pytest.approx(reduction))
        assert (reason_kinds(gate.reasons) if outcome == "insufficient" else set()) == why, gate
        outcomes[outcome] += 1
        accounts[outcome, world["account"]] += 1
        kinds.update(why)
        reductions += outcome == "insufficient" and reduction is not None
    assert len(accounts) == 6
    assert min(accounts.values()) >= 20, accounts
    assert min(outcomes.values()) >= 60, outcomes
    assert set(kinds) == set(SENTENCES)
    assert min(kinds.values()) >= 5, kinds
    assert reductions >= 50  # a reader sees what was measured also where it does not suffice


# ---- By hand

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
