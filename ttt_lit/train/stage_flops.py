"""Work per token of a stage, as the engine's policy makes it."""

from __future__ import annotations

from ttt_lit.model.spec import ModelSpec
from ttt_lit.train.stages import StagePlan
from ttt_lit.ttt.flops import FlopCount, chunks_kept, training_flops
from ttt_lit.ttt.settings import EngineConfig


def number_bytes(precision: str | int | None) -> int:
    """Bytes of a number in the result of a matrix product, for a value of trainer.precision."""
    return 2 if str(precision).startswith("bf16") else 4


def stage_flops(
    spec: ModelSpec,
    plan: StagePlan,
    engine: EngineConfig,
    *,
    precision: str | int | None,
    teacher: ModelSpec | None = None,
) -> FlopCount:
    """FLOPs per trained token. ``spec``: the network with the stage's window; ``teacher``: the stage's, if it has one."""
    mode, kept = plan.config.mode, 0
    if mode in ("meta", "first_order"):
        kept = chunks_kept(
            spec,
            tokens=plan.sequences * plan.chunk,
            chunks=plan.context // plan.chunk,
            number_bytes=number_bytes(precision),
            budget_bytes=engine.residual_bytes,
        )
    return training_flops(
        spec,
        context=plan.context,
        mode=mode,
        chunk=plan.chunk,
        recompute_blocks=engine.recompute_blocks,
        kept_chunks=kept,
        fast_weights=engine.fast_weights,
        teacher=teacher,
    )
