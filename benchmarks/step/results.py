"""What was measured, as the JSON file has it."""

import contextlib
import dataclasses
import importlib.metadata
import math
import os
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from step.arms import Arm
from step.bench import INNER, Bench


def baseline_of(arms: Sequence[Arm]) -> Arm | None:
    """The first dense arm that fits."""
    return next((arm for arm in arms if arm.kind == "dense" and arm.median is not None), None)


def result_of(arm: Arm, baseline: Arm | None, tokens: int) -> dict[str, Any]:
    engine = None if arm.engine is None else dataclasses.asdict(arm.engine)
    if engine is not None and math.isinf(engine["residual_gib"]):
        engine["residual_gib"] = ".inf"
    result: dict[str, Any] = {
        "name": arm.name,
        "mode": arm.mode,
        "engine": engine,
        "failure": arm.failure,
        "note": arm.note,
    }
    times = [t for t in arm.seconds if t is not None]
    result |= {"first_step_seconds": arm.first_seconds, "seconds": arm.seconds, "peak_bytes": arm.peak}
    result |= {"gradient_error": arm.error, "compared_with": arm.compared_with, "flops_per_token": arm.flops}
    if arm.median is None:
        return result
    result |= {"median_seconds": arm.median, "min_seconds": min(times), "max_seconds": max(times)}
    result["tokens_per_second"] = tokens / arm.median
    if baseline is not None and baseline.flops is not None and arm.flops is not None:
        pairs = [(a, b) for a, b in zip(arm.seconds, baseline.seconds, strict=True) if a is not None and b is not None]
        result["time_ratio"] = statistics.median(a / b for a, b in pairs)
        result["flops_ratio"] = arm.flops / baseline.flops
        result["time_over_flops"] = result["time_ratio"] / result["flops_ratio"]
    return result


def price_of_sinks(arms: Sequence[Arm]) -> dict[str, dict[str, float]]:
    """Time and operations of every arm with sinks, as multiples of the same arm's without; the time is the median of the rounds' ratios."""
    by_name, found = {arm.name: arm for arm in arms}, {}
    for arm in arms:
        without = by_name.get(arm.name.replace("_sinks", "", 1))
        if without is None or without is arm or None in (arm.median, without.median, arm.flops, without.flops):
            continue
        pairs = [(a, b) for a, b in zip(arm.seconds, without.seconds, strict=True) if a is not None and b is not None]
        times, flops = statistics.median(a / b for a, b in pairs), arm.flops / without.flops  # type: ignore[operator]
        found[arm.name] = {"time_ratio": times, "flops_ratio": flops}
    return found


def describe(bench: Bench) -> dict[str, Any]:
    """Where, with what and on what: everything but the measurements."""
    names = ["torch", "transformers", "triton", "flash_attn"]
    versions = {"Python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    machine = {"cpu": _cpu_name(), "cores": os.cpu_count(), "system": platform.platform()} | bench.device.describe()
    arguments = {name: str(v) if isinstance(v, Path) else v for name, v in vars(bench.arguments).items()}
    named = bench.decoder.named_parameters()
    return {
        "benchmark": "meta_step",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "versions": versions,
        "arguments": arguments,
        "sizes": dict(bench.sizes),
        "inner": INNER,
        "parameters": bench.specs["ttt"].num_parameters(),
        "prime_parameters": sum(p.numel() for name, p in named if "prime" in name),
        "compiled": bench.compiled,
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
