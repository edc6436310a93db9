"""``progress.json``: how far a run is, for whoever watches it. Standard library only."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from ttt_lit.record.codec import write_atomic

PROGRESS_NAME = "progress.json"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The heartbeat of a run, written while it trains: totals over all its stages and ranks."""

    stage: str
    step: int
    """Optimiser steps of the run."""
    tokens: int
    planned_tokens: int | None
    """Null where time is the budget."""
    planned_gpu_seconds: float | None
    """Null where tokens are the budget."""
    fraction: float
    """Share of the whole run's budget that is spent, 0 to 1."""
    loss: float | None
    """Training loss of the last optimiser step in nats per token; null before the first, and where it is not finite."""
    gpu_seconds: float
    """Compute device-seconds."""
    devices: int
    time: str
    """UTC, ISO 8601."""

    @property
    def whole_seconds(self) -> float | None:
        """Wall-clock time of compute from the beginning to the end, if it goes on as so far. None before anything is spent."""
        return self.gpu_seconds / self.devices / self.fraction if self.fraction and self.gpu_seconds else None

    @property
    def remaining_seconds(self) -> float | None:
        return None if self.whole_seconds is None else self.whole_seconds * (1 - self.fraction)

    def write(self, folder: Path) -> None:
        """Replace the file of a run's folder in one step."""
        write_atomic(folder / PROGRESS_NAME, json.dumps(dataclasses.asdict(self), allow_nan=False) + "\n")

    @classmethod
    def read(cls, folder: str | Path) -> Progress | None:
        """None where a run has not written any, or another version wrote it: a heartbeat is shown, nothing is decided from it."""
        try:
            return cls(**json.loads((Path(folder) / PROGRESS_NAME).read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None
