"""What the folder of a run tells a launcher, and the little that a launcher writes there. Standard library only."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttt_lit.record.schema import RECORD_NAME
from ttt_lit.record.status import ENDED

if TYPE_CHECKING:
    from ttt_lit.launch.matrix import PlannedRun

LOG_NAME = "log.txt"
BUDGET_NAME = "budget.json"

_TAIL_BYTES = 20_000


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What the record says of a run's state."""

    status: str
    reason: str | None = None
    written: float | None = None
    """Time of the file's last change (``written``)."""


@dataclass(frozen=True, kw_only=True)
class MatchedBudget:
    """GPU-hours of a wall-clock-matched run, and what they were made from."""

    of: str
    """EXPERIMENT/ID of the baseline."""
    share: float
    started: str | None
    """When the baseline was started, by its record."""
    compute_seconds: float
    """Compute device-seconds of the baseline."""
    gpu_hours: float


SOME_HOURS = 1.0
"""Stands for GPU-hours that are not known yet, where any number serves."""


class NotFinished(ValueError):
    """A baseline whose GPU-hours are not known yet."""


def recorded(folder: Path) -> Recorded | None:
    """None for a run that never began to train. ValueError for a record that cannot be read."""
    record = read_json(folder / RECORD_NAME)
    if record is None:
        return None
    status, reason = str(record.get("status")), record.get("reason")
    return Recorded(status=status, reason=reason, written=written(folder / RECORD_NAME))


def matched_budget(folder: Path, of: str, baseline: Path, share: float) -> MatchedBudget:
    """``share`` of the GPU-hours of the run ``of``, which has the folder ``baseline``.

    Raises:
        NotFinished: the baseline is not finished.
        ValueError: the first start in ``folder`` fixed a budget that was made from something else.
    """
    path, record = folder / BUDGET_NAME, read_json(baseline / RECORD_NAME)
    if record is None or record.get("status") != "finished":
        raise NotFinished(f"{baseline}: not finished, so its GPU-hours are not known")
    try:
        seconds = float(record["totals"]["gpu_seconds"]["compute"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{baseline / RECORD_NAME}: totals.gpu_seconds.compute is missing ({error})") from error
    hours = round(share * seconds / 3600, 6)
    if hours <= 0:
        raise ValueError(f"{folder}: {share:g} of the GPU-hours of {baseline} is less than a millionth of an hour")
    made = MatchedBudget(of=of, share=share, started=record.get("started"), compute_seconds=seconds, gpu_hours=hours)
    kept = read_json(path)
    if kept is not None:
        _refuse_change(path, kept, dataclasses.asdict(made))
    return made


def kept_hours(folder: Path) -> float | None:
    """GPU-hours that the run's first start fixed; None before that. ValueError for a file that cannot be read."""
    path = folder / BUDGET_NAME
    kept = read_json(path)
    if kept is None:
        return None
    hours = kept.get("gpu_hours")
    if not isinstance(hours, int | float):
        raise ValueError(f"{path}: gpu_hours: got {hours!r}, expected a number; delete this file to match anew")
    return float(hours)


def matched_hours(run: PlannedRun, runs: Mapping[str, PlannedRun]) -> float | None:
    """GPU-hours that a wall-clock-matched run has or would be given; None: it is matched by tokens, or its baseline is not finished.

    Args:
        runs: EXPERIMENT/ID → run, with the baseline.

    Raises:
        ValueError: a file cannot be read, or the run, which may still go on, has a budget that was made from something else.
    """
    match, kept = run.gpu_hours, kept_hours(run.folder)
    if match is None:
        return None
    found = recorded(run.folder)
    if kept is not None and found is not None and found.status in ENDED:
        return kept
    try:
        return matched_budget(run.folder, match.of, runs[match.of].folder, match.share).gpu_hours
    except NotFinished:
        return kept


def _refuse_change(path: Path, kept: dict[str, Any], made: dict[str, Any]) -> None:
    changed = [f"{key} {kept.get(key)} → {value}" for key, value in made.items() if kept.get(key) != value]
    if changed:
        raise ValueError(
            f"{path}: the budget was made from something else ({', '.join(changed)}); delete this file, and the rest of the run's folder "
            "if it has begun to train, to match anew"
        )


def keep_budget(folder: Path, budget: MatchedBudget) -> None:
    """A second start needs the identical number, or ``fit`` would take it for another configuration."""
    write_json(folder / BUDGET_NAME, dataclasses.asdict(budget))


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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value) + "\n", encoding="utf-8")
    os.replace(temporary, path)


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
