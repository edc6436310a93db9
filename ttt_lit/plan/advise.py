"""The engine setting that needs the least work among those that fit into a device's memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ttt_lit.model.spec import ModelSpec
from ttt_lit.plan.memory import Setting, all_products, stage_memory
from ttt_lit.train.stage_flops import stage_flops
from ttt_lit.train.stages import StagePlan
from ttt_lit.ttt.settings import EngineConfig, FastWeightStorage

USABLE = 0.9
"""Share of a device's memory that is counted on: the rest is for the context, libraries and gaps between blocks."""

# Work decides among the first three. Copies over the bus are no work, but take time: only where nothing else fits.
_BY_WORK: tuple[FastWeightStorage, ...] = ("every", "factors", "two_level")
_GIB = 2**30


class Stage(NamedTuple):
    """What computes in a stage: the network with its window, and the teacher, if there is one."""

    spec: ModelSpec
    plan: StagePlan
    teacher: ModelSpec | None = None

    def memory(self, engine: EngineConfig, setting: Setting) -> float:
        """Bytes at the peak."""
        return stage_memory(self.spec, self.plan, engine, setting, teacher=self.teacher).total

    def operations(self, engine: EngineConfig, setting: Setting) -> float:
        precision = "bf16-mixed" if setting.half else "32-true"
        flops = stage_flops(self.spec, self.plan, engine, precision=precision, teacher=self.teacher)
        return flops.total * (self.plan.tokens or 1)


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    engine: EngineConfig
    operations: float
    """Over all stages; a stage limited by time counts as one token."""
    peak: float
    """Bytes, at most over all stages."""


def describe(engine: EngineConfig) -> str:
    """The settings as flags of the command line."""
    residual = ".inf" if math.isinf(engine.residual_gib) else f"{engine.residual_gib:g}"
    values = {
        "recompute_blocks": str(engine.recompute_blocks).lower(),
        "fast_weights": engine.fast_weights,
        "residual_gib": residual,
    }
    return " ".join(f"--model.engine.{name} {value}" for name, value in values.items())


def recommended(stages: Sequence[Stage], engine: EngineConfig, setting: Setting, limit: float) -> Recommendation | None:
    """The best setting for all stages together within ``limit`` bytes, or None. Blocks are recomputed if they must be."""
    for blocks in dict.fromkeys((engine.recompute_blocks, True)):
        base = dataclasses.replace(engine, recompute_blocks=blocks, residual_gib=0.0)
        found = list(_fitting(stages, base, _BY_WORK, setting, limit)) or list(
            _fitting(stages, base, ("offload",), setting, limit)
        )
        if found:
            return min(found, key=lambda one: one.operations)
    return None


def _fitting(
    stages: Sequence[Stage],
    base: EngineConfig,
    storages: Sequence[FastWeightStorage],
    setting: Setting,
    limit: float,
) -> Iterator[Recommendation]:
    for storage in storages:
        engine = dataclasses.replace(base, fast_weights=storage)
        if max(stage.memory(engine, setting) for stage in stages) > limit:
            continue
        engine = dataclasses.replace(engine, residual_gib=_largest_residual(stages, engine, setting, limit))
        yield Recommendation(
            engine=engine,
            operations=sum(stage.operations(engine, setting) for stage in stages),
            peak=max(stage.memory(engine, setting) for stage in stages),
        )


def _largest_residual(stages: Sequence[Stage], engine: EngineConfig, setting: Setting, limit: float) -> float:
    """GiB that may be kept in every stage, in tenths; infinite where all products fit everywhere."""
    tightest = math.inf
    for stage in stages:
        everything = dataclasses.replace(engine, residual_gib=math.inf)
        if all_products(stage.spec, stage.plan, setting) and stage.memory(everything, setting) > limit:
            free = limit - stage.memory(engine, setting)
            tightest = min(tightest, math.floor(free / _GIB * 10) / 10)
    return tightest
