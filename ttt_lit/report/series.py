"""Curves that runs have left behind, as lists of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ttt_lit.record.measured import EvaluationPoint
from ttt_lit.record.schema import RunRecord
from ttt_lit.verdict.arm import Account, Arm

Point = tuple[float, float]
"""GPU-hours or tokens, and nats per token."""
Buckets = list[tuple[int, int, float]]
"""First position, one past the last, and nats per token."""


def evaluation_series(record: RunRecord, account: Account = "marginal") -> list[Point]:
    """(GPU-hours, loss) of the evaluations on the fixed subset, in the headline setting; empty if a parent's cost is missing."""
    parents = [parent.gpu_seconds for parent in record.parents] if account == "with_parents" else []
    if None in parents:
        return []
    before = sum(seconds or 0.0 for seconds in parents)
    return [((before + point.gpu_seconds) / 3600, loss) for point, loss in _evaluations(record)]


def token_series(record: RunRecord) -> list[Point]:
    """(tokens, loss) of the same evaluations."""
    return [(float(point.tokens), loss) for point, loss in _evaluations(record)]


def _evaluations(record: RunRecord) -> Iterator[tuple[EvaluationPoint, float]]:
    for point in record.evaluations:
        loss = point.inner_on if record.headline == "on" else point.inner_off
        if loss is not None and math.isfinite(loss):
            yield point, loss


def position_losses(arm: Arm) -> Buckets:
    """Final losses by position bucket in the headline setting, mean over seeds; empty where a seed has none, or other buckets."""
    runs = [final.buckets if final else [] for final in arm.finals()]
    edges = [[(bucket.start, bucket.stop) for bucket in run] for run in runs]
    if not edges or not edges[0] or any(each != edges[0] for each in edges):
        return []
    means = [sum(bucket.nats_per_token for bucket in same) / len(runs) for same in zip(*runs, strict=True)]
    if not all(math.isfinite(mean) for mean in means):
        return []
    return [(start, stop, mean) for (start, stop), mean in zip(edges[0], means, strict=True)]
