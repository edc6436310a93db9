"""What the folder of a run tells a launcher, and the little that is written there for it. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ttt_lit.record.codec import write_atomic
from ttt_lit.record.schema import ENDED, RECORD_NAME

if TYPE_CHECKING:
    from ttt_lit.launch.matrix import PlannedRun

LOG_NAME = "log.txt"
BUDGET_NAME = "budget.json"

SOME_HOURS = 1.0
"""Stands for GPU-hours that are not known yet, where any number serves."""

_TAIL_BYTES = 20_000


class Recorded(NamedTuple):
    """What the record says of a run's state."""

    status: str
    reason: str | None
    written: float | None
    """Time of the file's last change (``written``)."""


def recorded(folder: Path) -> Recorded | None:
    """None for a run that never began to train. ValueError for a record that cannot be read."""
    record = read_json(folder / RECORD_NAME)
    if record is None:
        return None
    return Recorded(str(record.get("status")), record.get("reason"), written(folder / RECORD_NAME))


# A budget that is a share of a baseline's GPU-hours -------------------------------------------------------------------------------


def matched_budget(run: PlannedRun, baseline: PlannedRun) -> dict[str, Any] | None:
    """The GPU-hours of a wall-clock-matched run and what they are made from; None: the baseline is not finished.

    Raises:
        ValueError: the run's first start fixed a budget that was made from something else.
    """
    record = read_json(baseline.folder / RECORD_NAME)
    if run.gpu_hours is None or record is None or record.get("status") != "finished":
        return None
    try:
        seconds = float(record["totals"]["gpu_seconds"]["compute"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{baseline.folder / RECORD_NAME}: totals.gpu_seconds.compute is missing ({error})") from error
    share = run.gpu_hours.share
    hours = round(share * seconds / 3600, 6)
    if hours <= 0:
        raise ValueError(
            f"{run.folder}: {share:g} of the GPU-hours of {baseline.folder} is less than a millionth of an hour"
        )
    made = {"of": baseline.name, "share": share, "started": record.get("started"), "compute_seconds": seconds}
    made |= {"gpu_hours": hours}
    kept = _kept_budget(run)
    changed = [] if kept is None else [key for key, value in made.items() if kept.get(key) != value]
    if kept is not None and changed:
        changes = ", ".join(f"{key} {kept.get(key)} → {made[key]}" for key in changed)
        raise ValueError(
            f"{run.folder / BUDGET_NAME}: the budget was made from something else ({changes}); delete this file, and the rest of the "
            "run's folder if it has begun to train, to match anew"
        )
    return made


def fix_hours(run: PlannedRun, baseline: PlannedRun) -> float:
    """Write down the GPU-hours: a second start needs the identical number, or ``fit`` would take it for another configuration."""
    budget = matched_budget(run, baseline)
    if budget is None:
        raise ValueError(f"{baseline.folder}: not finished, so its GPU-hours are not known")
    write_json(run.folder / BUDGET_NAME, budget)
    return float(budget["gpu_hours"])


def matched_hours(run: PlannedRun, runs: Mapping[str, PlannedRun]) -> float | None:
    """GPU-hours that a wall-clock-matched run has or would be given; None: it is matched by tokens, or its baseline is not finished.

    Args:
        runs: EXPERIMENT/ID → run, with the baseline.

    Raises:
        ValueError: a file cannot be read, or the run, which may still go on, has a budget that was made from something else.
    """
    if run.gpu_hours is None:
        return None
    found, budget = recorded(run.folder), _kept_budget(run)
    if found is None or found.status not in ENDED or budget is None:
        budget = matched_budget(run, runs[run.gpu_hours.of]) or budget
    return None if budget is None else float(budget["gpu_hours"])


def _kept_budget(run: PlannedRun) -> dict[str, Any] | None:
    """What the run's first start fixed; None before that. ValueError for a file that cannot be read."""
    path = run.folder / BUDGET_NAME
    kept = read_json(path)
    if kept is not None and not isinstance(kept.get("gpu_hours"), int | float):
        raise ValueError(
            f"{path}: gpu_hours: got {kept.get('gpu_hours')!r}, expected a number; delete this file to match anew"
        )
    return kept


# Files ----------------------------------------------------------------------------------------------------------------------------


def last_error(log: Path) -> str | None:
    """The last line of a log that explains an end, else its last line; None for no log or an empty one."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    explained = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return next(iter([*explained[-1:], *lines[-1:]]), None)


def written(path: Path) -> float | None:
    """When a file was changed, in seconds on the clock of its file system; None where there is none. Comparable within a folder."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def write_json(path: Path, value: Any) -> None:
    """Replace the file in one step."""
    write_atomic(path, json.dumps(value, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no file. ValueError for anything but a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got {type(value).__name__}, expected an object")
    return value
