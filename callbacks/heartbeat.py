"""Tells others how far a run is: ``progress.json``."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L

from ttt_lit.record.progress import Progress
from ttt_lit.train.module import TTTModule


class Heartbeat(L.Callback):
    """Writes at optimiser-step boundaries and at the end, on rank 0.

    Args:
        every_seconds: least time between two writes.
    """

    def __init__(self, every_seconds: float = 5.0) -> None:
        if every_seconds < 0:
            raise ValueError(f"Heartbeat.every_seconds: got {every_seconds}, expected at least 0")
        self.every_seconds = every_seconds
        self._last = float("-inf")

    def on_train_batch_end(self, trainer: L.Trainer, module: TTTModule, *_: Any) -> None:  # type: ignore[override]
        if module.at_boundary and time.monotonic() - self._last >= self.every_seconds:
            self._write(trainer, module)

    def on_train_epoch_end(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        self._write(trainer, module)

    def _write(self, trainer: L.Trainer, module: TTTModule) -> None:
        if not trainer.is_global_zero:
            return
        total, report = module.ledger.total(), module.report
        tokens, seconds = _planned(module)
        spent = total.tokens / tokens if tokens is not None else total.gpu_seconds["compute"] / (seconds or math.inf)
        loss = None if report is None or not math.isfinite(report.loss) else float(report.loss)
        Progress(
            stage=module.plan.name,
            step=total.optimizer_steps,
            tokens=total.tokens,
            planned_tokens=tokens,
            planned_gpu_seconds=seconds,
            fraction=min(1.0, spent),
            loss=loss,
            gpu_seconds=total.gpu_seconds["compute"],
            devices=module.ledger.devices,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        ).write(Path(trainer.default_root_dir))
        self._last = time.monotonic()


def _planned(module: TTTModule) -> tuple[int | None, float | None]:
    """Tokens of all stages, or their device-seconds: one budget decides all of them."""
    tokens = [plan.tokens for plan in module.plans]
    known = [count for count in tokens if count is not None]
    if len(known) == len(tokens):
        return sum(known), None
    return None, sum(plan.budget.seconds or 0.0 for plan in module.plans)
