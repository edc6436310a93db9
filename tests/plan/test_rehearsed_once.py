"""How long a plan takes: what is equal is rehearsed once, and what takes long says so."""

import dataclasses
import functools
import itertools
import time

from ttt_lit.model.spec import LayerSpec, ModelSpec
from ttt_lit.plan import memory as plan_memory
from ttt_lit.plan.announced import announced
from ttt_lit.plan.rehearsal import MicroBatch, Peaks
from ttt_lit.ttt.settings import EngineConfig

SPEC = ModelSpec(
    vocab_size=8, hidden_size=4, intermediate_size=4, num_heads=1, num_kv_heads=1, head_dim=4, layers=(LayerSpec(),)
)
BATCH = MicroBatch(
    sequences=1,
    context=8,
    chunk=4,
    mode="none",
    engine=EngineConfig(),
    half=True,
    on_cpu=False,
    gradients_exist=True,
    sharded=True,
)


def test_what_a_rehearsal_cannot_tell_apart_is_rehearsed_once(monkeypatch):
    made = []

    def rehearse(spec, batch):
        made.append((spec, batch))
        return Peaks(1, 1, 1)

    monkeypatch.setattr(plan_memory, "_rehearsed_once", functools.cache(rehearse))
    wide = SPEC.with_layers((LayerSpec(window=100),))
    for spec, exist in itertools.product((SPEC, wide), (True, False)):
        plan_memory._rehearsed(spec, dataclasses.replace(BATCH, gradients_exist=exist))
    assert len(made) == 1
    plan_memory._rehearsed(SPEC, dataclasses.replace(BATCH, sharded=False))
    plan_memory._rehearsed(SPEC, dataclasses.replace(BATCH, context=4))
    assert len(made) == 3


def test_what_takes_long_is_said_and_what_does_not_is_not(capsys):
    with announced("quick", after_seconds=60):
        pass
    said = ""
    with announced("slow", after_seconds=0.0):
        while not said:
            time.sleep(0.001)
            said = capsys.readouterr().err
    assert said == "slow\n"
