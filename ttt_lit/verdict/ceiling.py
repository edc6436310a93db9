"""The ceiling of a study: what context beyond its window is worth, the most that a memory can win. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ttt_lit.record.measured import Ceiling
from ttt_lit.record.schema import RunRecord
from ttt_lit.verdict.arm import Arm
from ttt_lit.verdict.findings import window_of

HOW_TO_MEASURE = "measure it with python cli.py probe on the imported model and name its probe.json in model.validation.probe of every run"


@dataclass(frozen=True, kw_only=True)
class StudyCeiling:
    """The ceiling of one family, or why there is none."""

    window: int | None = None
    """Of its TTT arms; None: they have none in common, or layers that see the whole context."""
    ceiling: Ceiling | None = None
    problem: str = ""
    """Why there is no ceiling; empty: there is one."""


def run_window(record: RunRecord) -> int | None:
    """How far the last stage's attention reaches; None where a layer sees the whole context. The record has stages."""
    last = record.stages[-1]
    window = window_of(last)
    return window if window is not None and window < last.context else None


def arm_windows(arm: Arm) -> set[int | None]:
    return {run_window(record) for record in arm.records if record.stages}


def study_ceiling(judged: Sequence[Arm], arms: Sequence[Arm]) -> StudyCeiling:
    """``judged``: the arms whose window counts, baseline and candidates; ``arms``: all that may carry a ceiling."""
    windows = set[int | None]().union(*map(arm_windows, judged))
    if not windows:
        return StudyCeiling(
            problem="there is no run of a baseline or a conversion, so there is no window to measure a ceiling for"
        )
    if len(windows) > 1:
        found = ", ".join(sorted("the whole context" if each is None else f"{each:,}" for each in windows))
        return StudyCeiling(problem=f"its arms see different windows ({found}), so they have no ceiling in common")
    (window,) = windows
    if window is None:
        return StudyCeiling(
            problem="layers of its arms see the whole context: nothing lies beyond a window, so there is no ceiling"
        )
    found_rows: list[Ceiling] = []
    for record in (record for arm in arms for record in arm.records):
        found_rows += [row for row in record.ceiling if row.window == window and row not in found_rows]
    if len(found_rows) > 1:
        values = " and ".join(f"{row.nats:.4f} by {row.checkpoint}" for row in found_rows)
        return StudyCeiling(
            window=window,
            problem=f"its runs carry different ceilings for window {window:,} ({values}); give all of them one probe",
        )
    if not found_rows:
        return StudyCeiling(window=window, problem=f"no ceiling was measured for window {window:,}; {HOW_TO_MEASURE}")
    (row,) = found_rows
    foreign = [arm.name for arm in judged if not all(_is_of(row, record) for record in arm.records)]
    if foreign:
        return StudyCeiling(
            window=window,
            problem=f"its ceiling was measured on {row.checkpoint}, from which {', '.join(foreign)} did not start; {HOW_TO_MEASURE}",
        )
    return StudyCeiling(window=window, ceiling=row)


def _is_of(row: Ceiling, record: RunRecord) -> bool:
    """Whether a ceiling is that of the model that a run was made from. A run from random weights has none of its own."""
    return record.start.source is None or row.digest in record.start.models


def share_of_ceiling(estimate: float, ceiling: Ceiling | None) -> float | None:
    """A difference as a share of the ceiling; None where the ceiling is not known to be above 0, so that a share would say nothing."""
    if ceiling is None or ceiling.low is None or ceiling.low <= 0:
        return None
    return estimate / ceiling.nats
