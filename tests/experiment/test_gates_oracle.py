"""The primary gate against a second computation of the same rules, on 500 random studies."""

from collections import Counter

import numpy as np
import pytest
from gate_reasons import NOMINAL, SENTENCES, reason_kinds
from records import CONTEXT, STEP_TOKENS, run, validation

from ttt_lit.experiment.gates import primary_gate
from ttt_lit.experiment.record import Environment, Model, Parent, Start
from ttt_lit.experiment.study import read_study

HOURS = 100.0

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
