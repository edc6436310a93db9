"""Logs every optimiser step: loss, norms, learning rates, throughput, FLOPs, memory, and what the budget has spent."""

from __future__ import annotations

import resource
import sys
from typing import Any

import lightning as L
import torch

from ttt_lit import metrics
from ttt_lit.train.module import TTTModule


class StepLog(L.Callback):
    """Writes to the run's logger at optimiser-step boundaries. The loss also goes on a ``tokens/`` and a ``gpu_hours/`` axis.

    Args:
        every_steps: optimiser steps between two log lines; throughput is that of the steps since the last one.
    """

    def __init__(self, every_steps: int = 1) -> None:
        if every_steps < 1:
            raise ValueError(f"StepLog.every_steps: got {every_steps}, expected at least 1")
        self.every_steps = every_steps
        self._mark: tuple[float, int] | None = None

    def on_train_start(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        self._mark = None

    def on_train_epoch_start(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        self._mark = None
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(module.device)

    def on_train_batch_start(self, trainer: L.Trainer, module: TTTModule, *_: Any) -> None:  # type: ignore[override]
        if self._mark is None:
            self._mark = self._now(module)

    def on_train_batch_end(self, trainer: L.Trainer, module: TTTModule, *_: Any) -> None:  # type: ignore[override]
        if not module.at_boundary:
            return
        report = module.report
        assert report is not None
        stage = module.history.stage(module.plan.name)
        stage.add_step(report, module.ledger.total().gpu_seconds["compute"])
        stage.peak_gib = max(stage.peak_gib, peak_memory_gib(module.device))
        # The bar shows the loss of the whole step over all ranks, not the last micro-batch's.
        module.log("loss", report.loss, prog_bar=True, logger=False, on_step=True, on_epoch=False)
        if len(stage.losses) % self.every_steps == 0 and trainer.is_global_zero:
            self._write(trainer, module)

    def _write(self, trainer: L.Trainer, module: TTTModule) -> None:
        report, logger = module.report, trainer.logger
        if report is None or logger is None:
            return
        values = {
            metrics.TRAIN_LOSS: report.loss,
            metrics.GRAD_NORM: report.grad_norm,
            metrics.BUDGET_SPENT: module.fraction,
            metrics.PEAK_MEMORY: module.history.stage(module.plan.name).peak_gib,
            "stage": float(module.entered),
        }
        values |= {metrics.learning_rate(name): rate for name, rate in report.rates.items()}
        if report.teacher_kl is not None:
            values[metrics.TEACHER_KL] = report.teacher_kl
        if report.update_norms:
            values[metrics.INNER_UPDATE_NORM] = sum(report.update_norms) / len(report.update_norms)
            values[metrics.INNER_LEARNING_RATE] = report.inner_lr
        values |= self._throughput(module)
        total = module.ledger.total()
        values |= {metrics.TOKENS: float(total.tokens), metrics.BYTES: float(total.bytes)}
        values |= {metrics.gpu_seconds(account): seconds for account, seconds in total.gpu_seconds.items()}
        logger.log_metrics(values, step=trainer.global_step)
        axes = {
            metrics.on_tokens_axis(metrics.TRAIN_LOSS): total.tokens,
            metrics.on_gpu_hours_axis(metrics.TRAIN_LOSS): metrics.gpu_hours_step(total.gpu_seconds["compute"]),
        }
        for name, step in axes.items():
            logger.log_metrics({name: report.loss}, step=step)

    def _throughput(self, module: TTTModule) -> dict[str, float]:
        before, now = self._mark, self._now(module)
        self._mark = now
        if before is None or now[0] <= before[0]:
            return {}
        rate = (now[1] - before[1]) / (now[0] - before[0])
        return {
            metrics.TOKENS_PER_SECOND: rate,
            metrics.SECONDS_PER_1K_TOKENS: 1000 / rate,
            metrics.FLOP_PER_SECOND: rate * module.flop_per_token(),
        }

    def _now(self, module: TTTModule) -> tuple[float, int]:
        spent = module.ledger.spent(module.plan.name)
        return spent.gpu_seconds["compute"] / module.ledger.devices, spent.tokens


def peak_memory_gib(device: torch.device) -> float:
    """Rank 0's largest memory: what the stage has allocated on a CUDA device, on CPU the resident set of the process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Linux counts kibibytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
