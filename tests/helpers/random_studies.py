"""Random studies in plain numbers, and their records: what the oracle of the gates computes on."""

import numpy as np

from helpers.gate_reasons import NOMINAL
from helpers.records import CONTEXT, run, validation
from ttt_lit.record.schema import Environment, Model, Parent, Start

HOURS = 100.0


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
    if kind < 0.14:
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

    def rarely(chance=0.01):
        return random.random() < chance

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
    arm["inner_lr"] = 0.3 if rarely(0.006) else 0.1
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
                    config={"model": {"inner": {"lr": arm.get("inner_lr", 1.0)}}},
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
