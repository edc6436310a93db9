"""What the folder of a run tells a launcher, and the little that a launcher writes there. Standard library only."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttt_lit.experiment.record import RECORD_NAME

LOG_NAME = "log.txt"
BUDGET_NAME = "budget.json"


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What the record says of a run's state."""

    status: str
    reason: str | None = None


def recorded(folder: Path) -> Recorded | None:
    """None for a run that never began to train. ValueError for a record that cannot be read."""
    record = _read(folder / RECORD_NAME)
    return None if record is None else Recorded(status=str(record.get("status")), reason=record.get("reason"))


def compute_gpu_hours(folder: Path) -> float:
    """Of a finished run. ValueError for any other."""
    record = _read(folder / RECORD_NAME)
    if record is None or record.get("status") != "finished":
        raise ValueError(f"{folder}: not finished, so its GPU-hours are not known")
    try:
        return float(record["totals"]["gpu_seconds"]["compute"]) / 3600
    except KeyError as error:
        raise ValueError(f"{folder / RECORD_NAME}: totals.gpu_seconds.compute is missing ({error})") from error


def matched_budget(folder: Path, baseline: Path, share: float) -> float:
    """GPU-hours of a wall-clock-matched run: ``share`` of the baseline's, or what a first start in this folder came to.

    ValueError if the baseline is not finished.
    """
    kept = _read(folder / BUDGET_NAME)
    if kept is not None:
        return float(kept["gpu_hours"])
    hours = round(share * compute_gpu_hours(baseline), 6)
    if hours <= 0:
        raise ValueError(f"{folder}: {share:g} of the GPU-hours of {baseline} is less than a millionth of an hour")
    return hours


def keep_budget(folder: Path, hours: float) -> None:
    """A second start needs the identical number, or ``fit`` would take it for another configuration."""
    write_json(folder / BUDGET_NAME, {"gpu_hours": hours})


def last_error(folder: Path) -> str | None:
    """The last line of a run's log that explains an end, else its last line."""
    try:
        text = (folder / LOG_NAME).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    lines = [line.strip() for line in text[-20_000:].splitlines() if line.strip()]
    explained = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return next(iter([*explained[-1:], *lines[-1:]]), None)


def write_json(path: Path, value: Any) -> None:
    """Replace the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
