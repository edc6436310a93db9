"""What an arm's policy keeps, found by measuring where the policy is a target, and the operations that it asks for."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from step.arms import POLICIES, SEARCHED, Arm
from step.bench import Bench
from step.naive import naive_flops
from ttt_lit.ttt.flops import chunks_kept, product_numbers, training_flops
from ttt_lit.ttt.settings import EngineConfig


def settle(bench: Bench, arm: Arm, arms: Sequence[Arm]) -> None:
    """Choose what the arm keeps, and count its operations."""
    if arm.policy in SEARCHED:
        _search(bench, arm, arms)
    elif arm.mode == "none":
        arm.engine = EngineConfig(recompute_blocks=arm.policy == "recompute", compile=bench.compiled)
    elif arm.kind != "transformers" and not arm.kind.startswith("naive"):
        arm.engine = dataclasses.replace(POLICIES[arm.policy or "recompute"], compile=bench.compiled)
    if arm.failure is None:
        arm.flops = count_flops(bench, arm)


def count_flops(bench: Bench, arm: Arm) -> float:
    context, chunk = bench.context, bench.sizes["chunk"]
    spec = bench.specs[arm.network]
    if arm.kind == "transformers":
        # It keeps its logits, which our backward makes again.
        return training_flops(spec, context=context, mode="none").total - 2 * spec.vocab_size * spec.hidden_size
    if arm.kind.startswith("naive"):
        return naive_flops(spec, context=context, chunk=chunk, recompute=arm.kind == "naive_recompute")
    assert arm.engine is not None
    blocks = arm.engine.recompute_blocks
    if arm.mode == "none":
        return training_flops(spec, context=context, mode="none", recompute_blocks=blocks).total
    return training_flops(
        spec,
        context=context,
        mode=arm.mode,
        chunk=chunk,
        recompute_blocks=blocks,
        kept_chunks=_kept(bench, arm.engine),
        fast_weights=arm.engine.fast_weights,
    ).total


def _chunk_numbers(bench: Bench) -> dict[str, Any]:
    tokens = bench.arguments.batch * bench.sizes["chunk"]
    return {"tokens": tokens, "number_bytes": 2 if bench.arguments.precision == "bf16" else 4}


def _kept(bench: Bench, engine: EngineConfig) -> int:
    """Chunks whose matrix products are kept."""
    chunks = bench.context // bench.sizes["chunk"]
    return chunks_kept(bench.specs["ttt"], chunks=chunks, budget_bytes=engine.residual_bytes, **_chunk_numbers(bench))


def _search(bench: Bench, arm: Arm, arms: Sequence[Arm]) -> None:
    """The least work among the settings whose measured peak is within the target."""
    target = _target(bench, arm, arms)
    if target is None:
        return
    numbers = _chunk_numbers(bench)
    chunk_bytes = product_numbers(bench.specs["ttt"]) * numbers["tokens"] * numbers["number_bytes"]
    chunks, fitting = bench.context // bench.sizes["chunk"], []
    for blocks in (False, True):

        def engine(kept: int, blocks: bool = blocks) -> EngineConfig:
            budget = (kept + 0.5) * chunk_bytes / 2**30 if kept else 0.0
            return EngineConfig(recompute_blocks=blocks, residual_gib=budget, compile=bench.compiled)

        def peak(kept: int, engine: Callable[[int], EngineConfig] = engine) -> float:
            return bench.peak_or_infinity(Arm(arm.kind, arm.policy, engine(kept)))

        most = most_kept(peak, target, chunks, chunk_bytes)
        if most is not None:
            fitting.append(engine(most))
        if most == chunks:
            break
    if not fitting:
        arm.failure = "does not fit"
        arm.note = f"every setting is above {target / bench.device.unit_bytes:,.1f} {bench.device.unit}"
        return
    arm.engine = min(fitting, key=lambda e: count_flops(bench, Arm(arm.kind, arm.policy, e)))
    below = "run again" if arm.engine.recompute_blocks else "keep their graphs"
    arm.note = f"products of {_kept(bench, arm.engine)} of {chunks} chunks kept, blocks {below}"


def _target(bench: Bench, arm: Arm, arms: Sequence[Arm]) -> float | None:
    """Bytes beyond parameters and optimiser; None where there is no target, with the reason in the arm."""
    if arm.policy == "equal_memory":
        known = [a.peak for a in arms if a.kind == "naive_recompute" and a.peak is not None]
        target = known[0] if known else bench.peak_or_infinity(Arm("naive_recompute", None))
        if target == math.inf:
            arm.failure, arm.note = "no target", "naive_recompute does not fit, so there is no peak to equal"
            return None
        return target
    given = bench.arguments.memory_gib
    state = 2 if bench.optimizer is not None else 0
    resident = sum(p.nbytes for p in bench.decoder.parameters()) * (1 + state)
    # What the allocator, the compiler's kernels and other libraries hold is not in the count.
    return (0.92 * bench.device.memory if given is None else given * 2**30) - resident


def most_kept(peak: Callable[[int], float], target: float, chunks: int, chunk_bytes: float) -> int | None:
    """The largest number of kept chunks whose peak is within the target; None: not even none. Peaks are nearly affine: few probes."""
    low, high, at = -1, chunks + 1, 0
    while high - low > 1:
        found = peak(at)
        low, high = (at, high) if found <= target else (low, at)
        guess = (low + high) // 2 if math.isinf(found) else at + math.floor((target - found) / chunk_bytes)
        at = min(max(guess, low + 1), high - 1)
    return low if low >= 0 else None
