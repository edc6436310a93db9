"""The primary gate, and the recommendation that also needs TTT's own part, against a second computation of the rules on random studies."""

from collections import Counter

import numpy as np
import pytest
from helpers.gate_reasons import NOMINAL, SENTENCES, reason_kinds
from helpers.random_studies import HOURS, random_world, records_of
from helpers.records import STEP_TOKENS, ceiling, run, validation

from ttt_lit.verdict.gates import judge_candidates, primary_gate
from ttt_lit.verdict.own_part import ceiling_sentence
from ttt_lit.verdict.recommendation import recommend_scaling
from ttt_lit.verdict.study import read_study

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
    why |= {"inner loops"} if len({arm["inner_lr"] for arm in arms.values()}) > 1 else set()
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


# ---- Where a model without memory could pass: the ceiling, on − off, and the control that never updates

CEILINGS = {
    "high": [ceiling(0.02), ceiling(0.001, window=2048)],
    "low": [ceiling(0.0199, nats=0.5)],
    "few documents": [ceiling(0.05, documents=19)],
    "no interval": [ceiling(None, nats=0.05)],
    "another window": [ceiling(0.05, window=2048)],
    "another model": [ceiling(0.05, digest="a" * 64)],
    "none": [],
}
BASELINES = (-0.025, -0.011, -0.005, 0.025)
"""On − off: more than the gate's 0.01, perhaps more, less, harm."""
CONTROLS = ("attention", "static", "missing", "single seed", "other attention", "updates", "other tokens", "harmed")


def random_memory(random):
    """What the gate of TTT's own part reads, in plain numbers."""

    def pick(choices, first):
        """The first as often as needed for many studies that have everything."""
        return choices[0 if random.random() < first else int(random.integers(len(choices)))]

    return {
        "ceiling": pick([*CEILINGS, "conflict"], 0.55),
        "baseline": pick(BASELINES, 0.5),
        "on_off": pick([-0.02, 0.0, 0.02], 0.5),
        "control": pick(CONTROLS, 0.4),
        "against": pick([-0.03, 0.0, 0.03], 0.6),
        "matched": random.random() < 0.95,
    }


def around(random, centre, shape):
    """(seeds, documents) around a centre, so that the interval of the mean holds it and nothing far away."""
    noise = random.normal(0, 0.01, shape[1])
    return centre + (noise - noise.mean()) + random.normal(0, 1e-4, shape)


def with_memory(world, memory, random):
    """(records, on − off of every run of a share, that of the baseline, matched arm − control): the tables as arrays."""
    records, ids, seeds = records_of(world), world["ids"], world["seeds"]
    shape = (len(seeds), len(ids))
    gains, own, over_control = (around(random, memory[name], shape) for name in ("on_off", "baseline", "against"))
    for record in records:
        (on,) = record.stages[0].validations
        row = (own if record.role == "ttt_scratch" else gains)[record.seed % 10]
        off = {block.id: block.nats_per_token - by for block, by in zip(on.documents, row, strict=True)}
        record.stages[0].validations = [validation(off, context=world["context"], inner="off"), on]
    on = 3.0 + random.normal(0, 0.1, shape)

    def add(experiment, role, rows, inner, **changes):
        for seed, row in zip(seeds, rows, strict=True):
            losses = dict(zip(ids, map(float, row), strict=True))
            steps = world["steps"] + changes.get("steps", 0)
            final = validation(losses, context=world["context"], inner=inner)
            record = run(experiment, role, {}, final=final, seed=seed, steps=steps, headline=inner)
            record.start_validation = validation({i: loss - changes.get("harm", 0) for i, loss in losses.items()})
            last = record.stages[0]
            last.mode, last.windows = changes.get("mode", "meta"), changes.get("windows", last.windows)
            records.append(record)

    if memory["matched"]:
        add("q_p1_bridge", "bridge", on, "on")
    changes = {
        "static": {"mode": "static"}, "other attention": {"windows": [None]}, "updates": {"mode": "meta"}, "harmed": {"harm": 0.1},
        "other tokens": {"steps": 1},
    }.get(memory["control"], {})  # fmt: skip
    if memory["control"] != "missing":
        add("q_control", "control", on - over_control, "off", **{"mode": "none"} | changes)
    if memory["control"] == "single seed":
        records = [record for record in records if record.experiment != "q_control" or record.seed == 0]
    for number, record in enumerate(records):
        conflict = [ceiling(0.05, nats=0.06 if number else 0.07)]
        record.ceiling = conflict if memory["ceiling"] == "conflict" else CEILINGS[memory["ceiling"]]
    return records, gains, own, over_control


def own_part(memory, gains, over_control, random):
    """pass, fail or insufficient, from the tables."""
    signs = [percentile_interval(gains, random)]
    whole = memory["matched"] and memory["control"] in ("attention", "static")
    signs += [percentile_interval(over_control, random)] if whole else []
    if any(low > 0 for low, _ in signs):
        return "fail"
    return "pass" if whole and all(high < 0 for _, high in signs) else "insufficient"


def gate_suffices(world, memory, baseline, random):
    """Whether a candidate without memory would fail where it equals the baseline in all else; ``baseline``: its on − off."""
    _, high = percentile_interval(baseline, random)
    usable = world["baseline_status"] == "finished" and len(world["ids"]) >= 20
    # A baseline that started from weights did not start from those that were probed.
    return memory["ceiling"] == "high" and world["from_scratch"] and usable and high < -0.01


def test_120_random_studies_are_recommended_as_a_second_computation_says():
    random, seen, done = np.random.default_rng(9), Counter(), 0
    while done < 120:
        world, memory = random_world(random) | {"account": "marginal"}, random_memory(random)
        if (
            world["baseline"] is None
            or not world["arms"]
            or not any(len(a["seeds"]) > 1 for a in world["arms"].values())
        ):
            continue
        primary, _, _ = oracle(world, random)
        if primary != "pass" and random.random() < 0.8:
            continue  # the rest decides only where the primary gate passes
        done += 1
        records, gains, baseline, over_control = with_memory(world, memory, random)
        (family,) = read_study(records).families.values()
        judged = judge_candidates(family, resamples=400)
        own, alone = own_part(memory, gains, over_control, random), gate_suffices(world, memory, baseline, random)
        good = own == "pass" or (own == "insufficient" and alone)
        wanted = {"fail": "no", "insufficient": "not yet"}.get(primary, "scale up" if good else "not yet")
        found = recommend_scaling(family, judged)
        assert found.verdict == wanted, (memory, primary, own, found)
        said = ceiling_sentence(family, resamples=400)
        assert ("a model without memory could pass" in said, "its equal without memory" in said) == (not alone, alone)
        if primary == "pass":
            assert judged[0].own_part.outcome == own, (memory, judged[0].own_part)
            assert ("without memory could pass" in found.why) == (not alone)
            seen.update([(alone, own), memory["ceiling"], memory["control"], ("matched", memory["matched"])])
            seen[memory["ceiling"] == "high", memory["baseline"]] += 1
    assert {key for key in seen if isinstance(key, str)} == {*CEILINGS, "conflict", *CONTROLS}
    assert min(seen[alone, own] for alone in (True, False) for own in ("pass", "fail", "insufficient")) >= 4, seen
    assert min(seen[True, baseline] for baseline in BASELINES) >= 2, seen
    assert seen["matched", False] >= 2, seen
